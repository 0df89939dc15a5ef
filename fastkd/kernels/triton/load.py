"""What the Triton kernels know of numbers: tiles of logits, exponentials' companions, row edges.

Arguments of exponentials carry log2(e) / T: exp2 is one instruction on every GPU, exp several.
Tiles are [BLOCK // LANE, LANE]: one thread holds a row of one, so that a reduction over axis 1
needs no other thread, and sums over a row are kept per lane until its end.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .. import triton as backend

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NINF = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def to_float(x):
    """To float32. bfloat16 by a shift: fewer instructions than the conversion, and in Triton's
    interpreter exact, whose conversion loses subnormals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_stored(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates: round to even here
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        bits = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def log2_of(P):
    """log2 of a number that is 0 or normal, in one instruction; tl.log2 takes 20 of them."""
    if not INTERPRETED and is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [P], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(P)


@triton.jit
def logits_of(t, unit, PROBS: tl.constexpr, EXACT: tl.constexpr):
    """A teacher's logits; of probabilities P as log2(unit P), the unit being a power of two that
    brings every P > 0 above the subnormal numbers, which the logarithm takes for 0. EXACT: where it
    is compared with a logit that may be close."""
    if PROBS:
        return tl.log2(t * unit) if EXACT else log2_of(t * unit)
    else:
        return t


@triton.jit
def unit_of(largest, PROBS: tl.constexpr):
    """For a row with this largest probability, and log2 of it."""
    shift = tl.full([], 0.0, tl.float32)
    if PROBS:
        shift = tl.where(largest < 2.0**104, 23.0, 0.0)
    return tl.exp2(shift), shift


@triton.jit
def row_offset(row, shift, inner, outer_stride, inner_stride):
    """Of row = a * inner + b; in 64 bits, for rows * V exceeds 2^31."""
    row = tl.cast(row, tl.int64)
    return shift + row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def step_back(base, offset, columns, VECTOR: tl.constexpr):
    """`columns` before base + offset: tiles from there on begin with a whole vector."""
    return base + tl.multiple_of(offset - columns, VECTOR)


@triton.jit
def edges(low, high, BLOCK: tl.constexpr):
    """Columns [low, high), of a row stepped back by `low`, as tiles: those that are not whole begin
    at edge * full for edge in range(begin, end), the whole ones are range(first, full, BLOCK).

    Only the first tile and the last can be ragged. Only those two are masked, in a loop of its own.
    """
    full = high // BLOCK * BLOCK
    first = tl.where(low > 0, BLOCK, 0)
    begin = tl.where((low > 0) | (full == 0), 0, 1)
    end = tl.where((high > full) & (full > 0), 2, 1)
    return begin, end, first, full


@triton.jit
def beside_label(at_label, end, first, full, BLOCK: tl.constexpr, APART: tl.constexpr):
    """Of the tiles that `edges` gave: where the whole one begins that holds the label, the end of
    the masked ones, which it joins, and of the whole ones, which skip it."""
    label_tile = full
    if APART:
        holds = ((at_label >= first) & (at_label < full)).to(tl.int32)
        label_tile = tl.where(holds > 0, at_label // BLOCK * BLOCK, full)
        return label_tile, end + holds, full - holds * BLOCK
    else:
        return label_tile, end, full


@triton.jit
def masked_start(edge, end, full, label_tile, APART: tl.constexpr):
    """Of `end` as `edges` gave it."""
    return tl.where(edge == end, label_tile, edge * full) if APART else edge * full


@triton.jit
def whole_start(start, label_tile, BLOCK: tl.constexpr, APART: tl.constexpr):
    return start + tl.where(start >= label_tile, BLOCK, 0) if APART else start


@triton.jit
def positions(start, BLOCK: tl.constexpr, LANE: tl.constexpr):
    return tl.reshape(start + tl.arange(0, BLOCK), [BLOCK // LANE, LANE])


@triton.jit
def load_tile(
    pointer,
    start,
    low,
    high,
    VECTOR: tl.constexpr,  # 1 where the row is not aligned
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    RAGGED: tl.constexpr,
    LAST: tl.constexpr,  # the row is not read again: its lines may go
):
    """float32 [BLOCK // LANE, LANE], -inf outside [low, high), where nothing is read."""
    columns = tl.multiple_of(start, VECTOR) + tl.arange(0, BLOCK)
    policy: tl.constexpr = "evict_first" if LAST else ""
    if RAGGED:
        vector = columns // VECTOR * VECTOR
        whole = (vector >= low) & (vector + VECTOR <= high)
        x = tl.load(pointer + columns, mask=whole, other=NINF, eviction_policy=policy)
        if VECTOR > 1:  # of the two vectors that are not
            inside = (columns >= low) & (columns < high) & ~whole
            edge = tl.load(pointer + columns, mask=inside, other=NINF, eviction_policy=policy)
            x = tl.where(whole, x, edge)
    else:
        x = tl.load(pointer + columns, eviction_policy=policy)
    return tl.reshape(to_float(x), [BLOCK // LANE, LANE])


@triton.jit
def store_tile(
    pointer,
    values,
    start,
    low,
    high,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    columns = tl.multiple_of(start, VECTOR) + tl.arange(0, BLOCK)
    values = to_stored(tl.reshape(values, [BLOCK]), pointer.dtype.element_ty)
    if RAGGED:
        vector = columns // VECTOR * VECTOR
        whole = (vector >= low) & (vector + VECTOR <= high)
        tl.store(pointer + columns, values, mask=whole, eviction_policy="evict_first")
        if VECTOR > 1:  # of the two vectors that are not
            inside = (columns >= low) & (columns < high) & ~whole
            tl.store(pointer + columns, values, mask=inside, eviction_policy="evict_first")
    else:
        tl.store(pointer + columns, values, eviction_policy="evict_first")


@triton.jit
def excess(a, b, d, a_absent, b_absent):
    """a d - a + b for d = ln(a / b), whose sum is KL(a || b): no term is < 0, none cancels.

    Below |d| = 1/4 by the series of d + exp(-d) - 1. A class of logit -inf has a = 0 and leaves b;
    b absent where a is not is +inf, also where a has underflowed.
    """
    series = (((((-1 / 5040.0) * d + 1 / 720.0) * d - 1 / 120.0) * d + 1 / 24.0) * d - 1 / 6.0) * d
    near = a * (d * d) * (series + 0.5)
    far = tl.where(a > 0, a * d, 0.0) + (b - a)
    value = tl.where(tl.abs(d) < 0.25, near, far)
    return tl.where(a_absent, b, tl.where(b_absent, float("inf"), value))


@triton.jit
def log_terms(y):
    """ln(1 + y), and (1 + y) ln(1 + y) - y to its own precision also near y = 0; y >= -1.

    ln 0 is taken as ln of the smallest normal number. ln(1 + f) = f - f^2 q(f).
    """
    r = tl.maximum(1.0 + y, 1.1754943508222875e-38)
    bits = r.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # r = 2^k * [sqrt(1/2), sqrt(2))
    reduced = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(k == 0, y, reduced)
    q = -0.0873475952 * f + 0.14307497
    q = q * f - 0.149179918
    q = q * f + 0.165705125
    q = q * f - 0.199620709
    q = q * f + 0.250017551
    q = q * f - 0.333339502
    q = q * f + 0.499999916
    log = f - f * f * q + k.to(tl.float32) * LN2
    return log, tl.where(k == 0, f * f * (1.0 - (1.0 + f) * q), r * log - y)


@triton.jit
def expm1(x):
    series = 1 / 6.0 + x * (1 / 24.0 + x * (1 / 120.0 + x * (1 / 720.0)))
    series = 1.0 + x * (1 / 2.0 + x * series)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def log_logistic(x):
    log, _ = log_terms(tl.exp2(-tl.abs(x) * LOG2E))
    return tl.minimum(x, 0.0) - log


@triton.jit
def log_quotient(delta, b, otherwise):
    """ln((b + delta) / b), from `delta` where that is small."""
    near = tl.abs(delta) < 0.25 * b
    log, _ = log_terms(tl.where(near, delta / b, 0.0))
    return tl.where(near, log, otherwise)


@triton.jit
def binary_divergence(a, b, gap):
    """KL((p, 1 - p) || (q, 1 - q)) and q - p, of the odds a = ln(p / (1 - p)) and b of q, and of
    b - a. No digit is lost where either is near 0 or 1, nor where the two agree; the odds may be
    infinite."""
    p = logistic(a)
    q = logistic(b)
    p_not = logistic(-a)
    q_not = logistic(-b)
    fall = expm1(-tl.abs(gap))
    delta = tl.where(gap > 0, -q * p_not * fall, p * q_not * fall)
    log = log_quotient(-delta, q, log_logistic(a) - log_logistic(b))
    log_not = log_quotient(delta, q_not, log_logistic(-a) - log_logistic(-b))
    infinity = float("inf")
    divergence = excess(p, q, log, a == -infinity, b == -infinity)
    return divergence + excess(p_not, q_not, log_not, a == infinity, b == infinity), delta
