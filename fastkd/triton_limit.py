"""Rows at T = infinity, which have an inverse temperature of 0: logit_match in fastkd/spec.py.

They are rare. So this is kept out of the passes that matter, reads a row twice by loops that take
every tile for a ragged one, and is the work of one program, of a split row too.
"""

import triton
import triton.language as tl

from .triton_math import LN2, LOG2E, NINF, load_tile, log2_of, store_tile, to_float
from .triton_passes import hard_slope, kept_classes


@triton.jit
def differences(
    s_row, t_row, start, low, high, threshold,
    PRUNE: tl.constexpr, PROBS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A tile of s; of s - t, infinite where a class has a logit on one side only and NaN where it
    spoils the row; and its classes, beside which the difference is 0."""
    s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, True, LAST)
    t = load_tile(t_row, start, low, high, VECTOR, BLOCK, LANE, True, LAST)
    kept = kept_classes(t, threshold, start, low, high, low, PRUNE, PROBS, False, BLOCK, LANE, True)
    if PROBS:  # see logits_of; the row's largest is not known here
        small = t < 2.0**-100
        t = LN2 * (log2_of(t * tl.where(small, 2.0**24, 1.0)) - tl.where(small, 24.0, 0.0))
    kept = kept & ~((s == NINF) & (t == NINF))
    d = s - t
    d = tl.where(d == NINF, float("inf"), d)
    d = tl.where((s < float("inf")) & (t < float("inf")), d, float("nan"))
    return s, tl.where(kept, d, tl.where(s != s, s, 0.0)), kept


@triton.jit
def limit_row(
    s_row, t_row, g_row, low, high, threshold, label, soft_weight, hard_weight, curvature,
    PRUNE: tl.constexpr, PROBS: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr,
    ROW_VECTOR: tl.constexpr, ROW_G_VECTOR: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Both terms. Writes the gradient."""
    # Half a tile of the other passes, for the registers.
    LANE: tl.constexpr = 4
    BLOCK: tl.constexpr = ROW_BLOCK // 2
    VECTOR: tl.constexpr = min(ROW_VECTOR, LANE)
    G_VECTOR: tl.constexpr = min(ROW_G_VECTOR, LANE)
    label_logit = 0.0
    if HARD:  # before any thread can have written the gradient over it
        label_logit = to_float(tl.load(s_row + low + label))
    total = tl.zeros([BLOCK // LANE], tl.float64)
    count = tl.zeros([BLOCK // LANE], tl.int32)
    h_max = tl.full([BLOCK // LANE], -3.4028234663852886e38, tl.float32)
    zh = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, high, BLOCK):
        s, d, kept = differences(
            s_row, t_row, start, low, high, threshold, PRUNE, PROBS, VECTOR, BLOCK, LANE, False
        )
        total += tl.sum(d.to(tl.float64), 1)
        count += tl.sum(kept.to(tl.int32), 1)
        if HARD:
            above = tl.maximum(h_max, tl.max(s, 1))
            zh *= tl.exp2((h_max - above) * LOG2E)
            zh += tl.sum(tl.exp2((s - above[:, None]) * LOG2E), 1)
            h_max = above
    # In two parts, and the sum in float64: what the mean is off by, all differences would share.
    sum_d = tl.sum(total, 0)
    classes = tl.sum(count, 0).to(tl.float32)
    mean = sum_d.to(tl.float32) / classes
    rest = (sum_d - mean.to(tl.float64) * classes).to(tl.float32) / classes
    hard = tl.full([], 0.0, tl.float32)
    top = hard
    h_log = hard
    if HARD:
        top = tl.max(h_max, 0)
        h_log = tl.log2(tl.sum(zh * tl.exp2((h_max - top) * LOG2E), 0))
        hard = h_log * LN2 + (top - label_logit)
    factor = soft_weight * curvature / classes
    lost = ~(tl.abs(sum_d) < float("inf")) | (classes == 0)
    lost = (lost & (soft_weight != 0)) | ((hard != hard) & (hard_weight != 0))
    squares = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, high, BLOCK):
        s, d, kept = differences(
            s_row, t_row, start, low, high, threshold, PRUNE, PROBS, VECTOR, BLOCK, LANE, GRADIENT
        )
        d = tl.where(kept, (d - mean) - rest, 0.0)
        squares += tl.sum(d * d, 1)
        if GRADIENT:
            gradient = tl.where(soft_weight != 0, factor * d, 0.0)
            if HARD:
                slope = hard_slope(s, start, low + label, top, h_log, BLOCK, LANE)
                gradient += tl.where(hard_weight != 0, hard_weight * slope, 0.0)
            gradient = tl.where(lost, float("nan"), gradient)
            store_tile(g_row, gradient, start, low, high, G_VECTOR, BLOCK, True)
    soft = curvature * tl.sum(squares, 0) / (2 * classes)
    return tl.where(sum_d == float("inf"), float("inf"), soft), hard
