"""The threshold of pruning: the keep-th largest teacher logit of a row, exactly, without a sort.

Logits are ordered by integer keys: the bits of a stored number, sign and magnitude turned into a
two's complement, so -0 and +0 are one key. A bracket of keys [low, high) around the answer is cut
by counting how many logits reach three pivots, all in one read of the row from the L2 cache. The
first pivots come from a sample; every count is exact, so a bad guess costs time and nothing else.

A NaN reaches every pivot: it is kept, and makes its row NaN.
"""

import triton
import triton.language as tl

from .load import edges, load_tile, to_float


@triton.jit
def key_of(x, LIKE: tl.constexpr):
    """The key of the float32 `x`, cut to what the dtype LIKE stores."""
    if LIKE == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        magnitude = bits & 0x7FFF
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if LIKE == tl.bfloat16:
            magnitude = magnitude >> 16
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def float_of(key, LIKE: tl.constexpr):
    magnitude = tl.abs(key).to(tl.int32)
    if LIKE == tl.float16:
        x = magnitude.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif LIKE == tl.bfloat16:
        x = (magnitude << 16).to(tl.float32, bitcast=True)
    else:
        x = magnitude.to(tl.float32, bitcast=True)
    return tl.where(key < 0, -x, x)


@triton.constexpr_function
def infinity_key(LIKE):
    return 0x7C00 if LIKE == tl.float16 else (0x7F80 if LIKE == tl.bfloat16 else 0x7F800000)


@triton.jit
def count_tile(row, start, low, high, pivots, counts, TILE: tl.constexpr, RAGGED: tl.constexpr):
    pivot0, pivot1, pivot2 = pivots
    n0, n1, n2, largest = counts
    x = load_tile(row, start, low, high, TILE, RAGGED, False)
    n0 += tl.sum((~(x < pivot0)).to(tl.int32), 1)
    n1 += tl.sum((~(x < pivot1)).to(tl.int32), 1)
    n2 += tl.sum((~(x < pivot2)).to(tl.int32), 1)
    return n0, n1, n2, tl.maximum(largest, tl.max(x, 1))


@triton.jit
def count(row, low, high, pivots, TILE: tl.constexpr):
    """How many logits reach each pivot, all > -inf, and the largest that is no NaN."""
    n0 = tl.zeros([TILE.block // TILE.lane], tl.int32)
    n1 = tl.zeros([TILE.block // TILE.lane], tl.int32)
    n2 = tl.zeros([TILE.block // TILE.lane], tl.int32)
    largest = tl.full([TILE.block // TILE.lane], float("-inf"), tl.float32)
    counts = (n0, n1, n2, largest)
    begin, end, first, full = edges(low, high, TILE.block)
    for start in tl.range(first, full, TILE.block):
        counts = count_tile(row, start, low, high, pivots, counts, TILE, False)
    for edge in tl.range(begin, end):
        counts = count_tile(row, edge * full, low, high, pivots, counts, TILE, True)
    n0, n1, n2, largest = counts
    return tl.sum(n0, 0), tl.sum(n1, 0), tl.sum(n2, 0), tl.max(largest, 0)


@triton.jit
def sample_keys(row, low, high, keep, SAMPLE: tl.constexpr, LANE: tl.constexpr):
    """Three keys that the answer lies around, by rank: some deviations below it, at it, above."""
    LIKE: tl.constexpr = row.dtype.element_ty
    # Whole vectors of LANE columns, evenly over the row.
    vectors: tl.constexpr = SAMPLE // LANE
    skip = (low + LANE - 1) // LANE
    step = (high // LANE - skip) // vectors
    at = (skip + tl.arange(0, vectors) * step) * LANE
    columns = at[:, None] + tl.arange(0, LANE)[None, :]
    x = tl.reshape(to_float(tl.load(row + columns)), [SAMPLE, 1])
    share = keep.to(tl.float32) / (high - low).to(tl.float32)
    rank = share * SAMPLE
    deviation = tl.sqrt(rank * (1.0 - share)) + 1.0
    which = tl.arange(0, 4)
    # Descending: more logits reach a smaller key. The fourth is not used.
    rank += tl.where(which == 0, 3.0, tl.where(which == 2, -3.0, 0.0)) * deviation
    rank = tl.minimum(tl.maximum(rank, 1.0), SAMPLE)
    INFINITY: tl.constexpr = infinity_key(LIKE)
    key = tl.full([4], -INFINITY, tl.int64)
    bit = tl.full([], INFINITY, tl.int64)
    for _ in tl.range(0, 20):  # the largest key that `rank` of the sample reach
        pivot = tl.minimum(key + bit, INFINITY)
        reach = tl.sum((~(x < float_of(pivot, LIKE)[None, :])).to(tl.float32), 0)
        key = tl.where(reach >= rank, pivot, key)
        bit = (bit + 1) // 2
    low_key = tl.sum(tl.where(which == 0, key, 0), 0)
    middle = tl.sum(tl.where(which == 1, key, 0), 0)
    high_key = tl.sum(tl.where(which == 2, key, 0), 0)
    return low_key, middle, high_key + 1


@triton.jit
def kth_largest(row, low, high, keep, TILE: tl.constexpr, SAMPLE: tl.constexpr):
    """A number that exactly the `keep` largest of columns [low, high) reach, and their equals."""
    LIKE: tl.constexpr = row.dtype.element_ty
    INFINITY: tl.constexpr = infinity_key(LIKE)
    # `reached` logits reach the key `bottom`, `above` reach `top`: reached >= keep > above.
    bottom = tl.full([], -INFINITY, tl.int64)
    top = tl.full([], INFINITY + 1, tl.int64)
    reached = high - low
    above = tl.zeros_like(reached)
    sweep = tl.zeros_like(reached)
    key0 = tl.full([], 0, tl.int64)
    key1 = key0
    key2 = key0
    sampled = high - low >= 4 * SAMPLE
    if sampled:
        key0, key1, key2 = sample_keys(row, low, high, keep, SAMPLE, TILE.lane)
    while (reached != keep) & (top - bottom > 1):
        width = top - bottom
        if (sweep > 0) | ~sampled:
            key0 = bottom + width // 4
            key1 = bottom + width // 2
            key2 = top - width // 4
            # The guess is where the answer is if the logits lie evenly in the bracket, with two
            # deviations of its order statistic around it. The middle key still halves the bracket.
            value = float_of(bottom, LIKE)
            inside = (reached - above).to(tl.float32)
            span = float_of(tl.minimum(top, INFINITY), LIKE) - value
            guess = value + span * ((reached - keep).to(tl.float32) / inside)
            deviation = span * (1.0 / tl.sqrt(inside))
            if (span < 1e30) & (width > 4) & (sweep % 2 == 1):
                guess0 = key_of(guess - deviation, LIKE).to(tl.int64)
                guess2 = key_of(guess + deviation, LIKE).to(tl.int64) + 1
                key0 = tl.minimum(guess0, key1)
                key2 = tl.maximum(guess2, key1)
                key1 = tl.maximum(guess0, tl.minimum(guess2, key1))
        key0 = tl.minimum(tl.maximum(key0, bottom + 1), top - 1)
        key1 = tl.minimum(tl.maximum(key1, key0), top - 1)
        key2 = tl.minimum(tl.maximum(key2, key1), top - 1)
        pivots = (float_of(key0, LIKE), float_of(key1, LIKE), float_of(key2, LIKE))
        n0, n1, n2, largest = count(row, low, high, pivots, TILE)
        if n2 >= keep:
            bottom = key2
            reached = n2
        elif n1 >= keep:
            bottom = key1
            reached = n1
            top = key2
            above = n2
        elif n0 >= keep:
            bottom = key0
            reached = n0
            top = key1
            above = n1
        else:
            top = key0
            above = n0
        # Nothing but a NaN is above the largest.
        past = key_of(largest, LIKE).to(tl.int64) + 1
        if (past < top) & (past > bottom) & (above == 0):
            top = past
        sweep += 1
    return float_of(bottom, LIKE)
