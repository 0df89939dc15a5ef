"""Rows at T >= 1000, whose two sides are all but flat; T = infinity has an inverse of 0.

There p and q formed apart and subtracted would lose T roundings. Here nothing cancels but the
logits, which T^2 KL matches: at T = infinity it is flat_term in fastkd/spec.py. With K classes,

    u = T ln(q / p) = d - mean     d = z - v, and the mean makes the sum of q 1
    w = T (q / p - 1) = T expm1(u / T)

    T^2 KL(p || q) = sum p T^2 (exp(u / T) - 1 - u / T)       gradient: T (q - p) = p w
    T^2 KL(q || p) = sum q T^2 (exp(-u / T) - 1 + u / T)                q (u - T KL)
    of a mixture            sum beta KL(p || m) + (1 - beta) KL(q || m), likewise

Such rows are rare. So this is kept out of the passes that matter, reads a row up to four times by
loops that take every tile for a ragged one, and is the work of one program, of a split row too.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .classes import kept_classes
from .load import label_logits, load_student, load_teacher, positions, store_gradient
from .math import LN2, LOG2E, LOWEST, NINF, log2_of
from .sums import hard_slope, hard_terms
from .tail import joined
from .types import FORWARD, MIXTURE, REVERSE, Hard, Tile

MATCHES_LOGITS = tl.constexpr(1e-3)  # 1 / T from which on this is the more exact way
FLAT = tl.constexpr(1 / 16)  # the largest |logit| / T at which the series hold


@triton.jit
def exponential_series(y):
    """(exp(y) - 1 - y) / y^2 for |y| < 1/4."""
    series = 1 / 24.0 + y * (1 / 120.0 + y * (1 / 720.0 + y * (1 / 5040.0)))
    return 0.5 + y * (1 / 6.0 + y * series)


@triton.jit
def log_series(x):
    """ln(1 + x) / x for |x| < 0.29."""
    series = x * 0.0
    for i in tl.static_range(12):
        series = 1 / (12.0 - i) - x * series
    return series


@triton.jit
def entropy_series(x):
    """((1 + x) ln(1 + x) - x) / x^2 for |x| < 0.29."""
    series = x * 0.0
    for i in tl.static_range(12):
        series = 1 / ((12.0 - i) * (13.0 - i)) - x * series
    return series


@triton.jit
def bend(x, inverse):
    """T expm1(x / T) - x."""
    return x * (x * inverse) * exponential_series(x * inverse)


@triton.constexpr_function
def half_tile(tile):
    """Half a tile of the other passes, for the registers."""
    block, _lane, vector, g_vector = tile  # to Triton 3.6's interpreter it is a plain tuple
    return Tile(block // 2, 4, min(vector, 4), min(g_vector, 4))


class Flat(NamedTuple):
    """What a flat row's formulas take of the whole row, besides 1 / T."""

    inverse: Any
    mean: Any
    mean_low: Any  # what `mean` is rounded by: all classes would share it
    per_p: Any  # p of a class whose teacher's logit is 0
    from_student: Any  # what the gradient takes off every class
    beta: Any
    factor: Any  # what the soft term counts in the gradient
    hard_weight: Any
    lost: Any  # the gradient is NaN


@triton.jit
def load_both(row, start, KIND: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr):
    """A tile of both sides' logits, and the mask of the kept classes that have one."""
    s = load_student(row, start, TILE, True, LAST)
    t = load_teacher(row, start, TILE, True, LAST)
    kept = kept_classes(row, t, start, KIND, TILE, True)
    if KIND.probs:  # see logits_of; the row's largest is not known here
        small = t < 2.0**-100
        t = LN2 * (log2_of(t * tl.where(small, 2.0**24, 1.0)) - tl.where(small, 24.0, 0.0))
    return s, t, kept & ~((s == NINF) & (t == NINF))


@triton.jit
def is_flat(row, inverse, KIND: tl.constexpr, ROW_TILE: tl.constexpr):
    """Whether a row has classes, and all their logits are small beside T: no NaN, none infinite."""
    TILE: tl.constexpr = half_tile(ROW_TILE)
    count = tl.zeros([TILE.block // TILE.lane], tl.int32)
    steep = count
    for start in tl.range(0, row.high, TILE.block):
        s, t, kept = load_both(row, start, KIND, TILE, False)
        flat = (tl.abs(s) * inverse <= FLAT) & (tl.abs(t) * inverse <= FLAT)
        steep += tl.sum(((kept & ~flat) | (s != s)).to(tl.int32), 1)
        count += tl.sum(kept.to(tl.int32), 1)
    return (tl.sum(steep, 0) == 0) & (tl.sum(count, 0) > 0)


@triton.jit
def flat_pass(
    row, flat, hard, KIND: tl.constexpr, TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """T^2 D times K, but for its curvature, and what a mixture's gradient takes off every class."""
    inverse = flat.inverse
    beta = flat.beta
    divergence = tl.zeros([TILE.block // TILE.lane], tl.float32)
    student = divergence
    for start in tl.range(0, row.high, TILE.block):
        s, t, kept = load_both(row, start, KIND, TILE, GRADIENT)
        u = ((s - t) - flat.mean) - flat.mean_low
        w = u + bend(u, inverse)
        p = (1.0 + inverse * (t + bend(t, inverse))) * flat.per_p
        q = p + p * (inverse * w)
        if KIND.divergence == FORWARD:
            value = p * u * u * exponential_series(u * inverse)
            slope = p * w
        if KIND.divergence == REVERSE:
            value = q * u * u * exponential_series(-u * inverse)
            slope = q * (u - flat.from_student)
        if KIND.divergence == MIXTURE:
            # p is 1 - (1 - beta) y / T of the mixture m, and q is 1 + beta y / T.
            per_m = 1.0 + (1.0 - beta) * inverse * w
            y = w / per_m
            of_p = entropy_series(-(1.0 - beta) * inverse * y)
            of_q = entropy_series(beta * inverse * y)
            value = p * per_m * y * y * ((1.0 - beta) * of_p + beta * of_q)
            log = y * log_series(beta * inverse * y)
            student += tl.sum(tl.where(kept, q * log, 0.0), 1)
            slope = q * (log - flat.from_student)
        if VALUE:
            divergence += tl.sum(tl.where(kept, value, 0.0), 1)
        if GRADIENT:
            gradient = tl.where(flat.factor != 0, flat.factor * slope, 0.0)
            gradient = tl.where(kept, gradient, 0.0)
            if KIND.hard:
                h = flat.hard_weight * hard_slope(row, s, start, hard, True, TILE)
                gradient += tl.where(flat.hard_weight != 0, h, 0.0)
            gradient = tl.where(flat.lost, float("nan"), gradient)
            store_gradient(row, gradient, start, TILE, True)
    return tl.sum(divergence, 0), tl.sum(student, 0)


@triton.jit
def flat_sums(row, inverse, KIND: tl.constexpr, TILE: tl.constexpr):
    """Sums over the classes kept: of T (exp(z / T) - exp(v / T)), of T (exp(z / T) - 1), how many
    they are; and the hard term's offset of each lane and its sum over all classes but the label."""
    total = tl.zeros([TILE.block // TILE.lane], tl.float64)
    students = tl.zeros([TILE.block // TILE.lane], tl.float32)
    count = tl.zeros([TILE.block // TILE.lane], tl.int32)
    h_max = tl.full([TILE.block // TILE.lane], LOWEST, tl.float32)
    zh = tl.zeros([TILE.block // TILE.lane], tl.float32)
    for start in tl.range(0, row.high, TILE.block):
        s, t, kept = load_both(row, start, KIND, TILE, False)
        # Infinite where a class has a logit on one side only, and NaN where it spoils the row.
        d = s - t
        d = tl.where(d == NINF, float("inf"), d)
        d = tl.where((s < float("inf")) & (t < float("inf")), d, float("nan"))
        finite = tl.abs(d) < float("inf")
        bent = bend(s, inverse)
        d += tl.where(finite, bent - bend(t, inverse), 0.0)
        total += tl.sum(tl.where(kept, d, tl.where(s != s, s, 0.0)).to(tl.float64), 1)
        students += tl.sum(tl.where(kept & finite, s + bent, 0.0), 1)
        count += tl.sum(kept.to(tl.int32), 1)
        if KIND.hard:
            h = tl.where(positions(start, TILE) == row.label, NINF, s)
            above = tl.maximum(h_max, tl.max(h, 1))
            zh *= tl.exp2((h_max - above) * LOG2E)
            zh += tl.sum(tl.exp2((h - above[:, None]) * LOG2E), 1)
            h_max = above
    return tl.sum(total, 0), tl.sum(students, 0), tl.sum(count, 0).to(tl.float32), h_max, zh


@triton.jit
def flat_row(row, inverse, weights, tail, beta, KIND: tl.constexpr, ROW_TILE: tl.constexpr):
    """The soft and the hard term of a row that is flat, or at T = infinity, and its Hard. Writes
    the gradient, except the tail's."""
    TILE: tl.constexpr = half_tile(ROW_TILE)
    label = label_logits(row, KIND)
    sum_d, students, K, h_max, zh = flat_sums(row, inverse, KIND, TILE)
    # exp(z / T) is `student` in the mean, exp(v / T) is 1 / per_p.
    student = 1.0 + inverse * (students / K)
    per_p = 1.0 / (student - inverse * (sum_d / K).to(tl.float32))
    mean_d = sum_d / (K * student)
    mean_d *= log_series(-inverse * mean_d)
    mean = mean_d.to(tl.float32)
    mean_low = (mean_d - mean.to(tl.float64)).to(tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    hard_term = zero
    hard = Hard(zero, zero, zero)
    if KIND.hard:
        top = tl.maximum(tl.max(h_max, 0), label.s)
        others = tl.sum(zh * tl.exp2((h_max - top) * LOG2E), 0)
        if KIND.tail:
            top, others = joined(top, others, tail, label.s)
        hard_term, hard = hard_terms(others, top, label.s)
    lost = ~(tl.abs(sum_d) < float("inf")) | (K == 0)
    lost = (lost & (weights.soft != 0)) | ((hard_term != hard_term) & (weights.hard != 0))
    # The weight has a T^2 that all of this includes.
    scale = tl.where(inverse > 0, inverse, 1.0)
    curvature = beta * (1.0 - beta) if KIND.divergence == MIXTURE else 1.0
    factor = weights.soft * scale * scale * curvature / K
    flat = Flat(inverse, mean, mean_low, per_p, zero, beta, factor, weights.hard, lost)
    soft, of_mixture = flat_pass(
        row, flat, hard, KIND, TILE, True, KIND.gradient and KIND.divergence == FORWARD
    )
    soft = curvature * soft / K
    if KIND.gradient and KIND.divergence != FORWARD:  # it needs the divergence first
        from_student = inverse * soft if KIND.divergence == REVERSE else of_mixture / K
        flat = Flat(inverse, mean, mean_low, per_p, from_student, beta, factor, weights.hard, lost)
        flat_pass(row, flat, hard, KIND, TILE, False, True)
    soft = tl.where(sum_d == float("inf"), float("inf"), soft * scale * scale)
    return soft, hard_term, hard
