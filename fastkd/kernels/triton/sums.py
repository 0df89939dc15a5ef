"""The passes over one row: maxima, sums of exponentials, then divergence and gradient.

See row.py for their order.
"""

import triton
import triton.language as tl

from ... import spec
from .load import (
    LN2,
    LOG2E,
    NINF,
    beside_label,
    edges,
    excess,
    expm1,
    load_tile,
    log_terms,
    logits_of,
    masked_start,
    positions,
    row_offset,
    step_back,
    store_tile,
    to_float,
    unit_of,
    whole_start,
)

# Which divergence D(p, q): none, or one of spec.py.
NONE, FORWARD, REVERSE, MIXTURE = (
    tl.constexpr(x) for x in (-1, spec.FORWARD, spec.REVERSE, spec.MIXTURE)
)


@triton.jit
def open_row(
    row, student, teacher, dstudent, labels, soft_weight, hard_weight, target_weight, inner,
    classes,
    s_shift, s_outer, s_inner, t_shift, t_outer, t_inner, g_shift, g_outer, g_inner,
    DIVERGENCE: tl.constexpr, APART: tl.constexpr, HARD: tl.constexpr, LABELS: tl.constexpr,
    GRADIENT: tl.constexpr, VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
):  # fmt: skip
    """Where a row begins, stepped back to a whole vector by the columns before `low`; its weights;
    whether it is skipped; its label, and whether that is one of so many classes."""
    s_row = row_offset(row, s_shift, inner, s_outer, s_inner)
    t_row = row_offset(row, t_shift, inner, t_outer, t_inner)
    low = (s_row % VECTOR).to(tl.int32)
    s_row = step_back(student, s_row, low, VECTOR)
    t_row = step_back(teacher, t_row, low, VECTOR)
    g_row = s_row
    if GRADIENT:
        g_row = row_offset(row, g_shift, inner, g_outer, g_inner)
        g_row = step_back(dstudent, g_row, low, G_VECTOR)
    s_weight = tl.full([], 0.0, tl.float32)
    h_weight = s_weight
    t_weight = s_weight
    if DIVERGENCE != NONE:
        s_weight = tl.load(soft_weight + row)
    if HARD:
        h_weight = tl.load(hard_weight + row)
    if APART:
        t_weight = tl.load(target_weight + row)
    skipped = (s_weight == 0) & (h_weight == 0) & (t_weight == 0)
    label = tl.full([], 0, tl.int64)
    valid = True
    if LABELS:
        label = tl.load(labels + row)
        valid = (label >= 0) & (label < classes)
    label = label.to(tl.int32)
    return s_row, t_row, g_row, low, s_weight, h_weight, t_weight, skipped, label, valid


@triton.jit
def kept_classes(
    t, threshold, start, low, high, at_label,
    PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Mask of a tile of the teacher as it is stored; only called where PRUNE or RAGGED, as the tile
    of the label is that is left out where APART. What has no logarithm and a NaN is kept, and
    spoils its row."""
    kept = ~(t < threshold)
    if PROBS:
        kept = kept | (t < 0)
    if RAGGED:
        at = positions(start, BLOCK, LANE)
        inside = (at >= low) & (at < high)
        if APART:
            inside = inside & (at != at_label)
        kept = (kept & inside) if PRUNE else inside
    return kept


@triton.jit
def maxima(
    s_row, t_row, end, low, high, threshold, at_label,
    PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Of the columns before `end`: max of s and of t over the kept, of s over all, NaN in s; and
    unit_of the row."""
    s_max = tl.full([BLOCK // LANE], NINF, tl.float32)
    t_max = s_max
    h_max = s_max
    lost = tl.zeros([BLOCK // LANE], tl.int32)
    for start in tl.range(0, end, BLOCK):
        s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, True, False)
        t = load_tile(t_row, start, low, high, VECTOR, BLOCK, LANE, True, False)
        h_max = tl.maximum(h_max, tl.max(s, 1))
        if PRUNE:
            lost += tl.sum((s != s).to(tl.int32), 1)
        if PRUNE or APART:
            kept = kept_classes(
                t, threshold, start, low, high, at_label, PRUNE, PROBS, APART, BLOCK, LANE, True
            )
            s = tl.where(kept, s, NINF)
            t = tl.where(kept, t, NINF)
        s_max = tl.maximum(s_max, tl.max(s, 1))
        t_max = tl.maximum(t_max, tl.max(t, 1))
    t_max = tl.max(t_max, 0)
    unit, shift = unit_of(t_max, PROBS)
    if PROBS:
        t_max = logits_of(tl.maximum(t_max, 0.0), unit, PROBS, False)
    return tl.max(s_max, 0), t_max, tl.max(h_max, 0), tl.sum(lost, 0), unit, shift


@triton.jit
def sums_of(
    s, t, start, low, high, threshold, unit, at_label, s_max, t_max, h_max, s_scale, t_scale,
    zs, zt, zh, cross,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to the sums; `t` only where there is a divergence."""
    if HARD:
        h = s
        if RAGGED:
            h = tl.where(positions(start, BLOCK, LANE) == at_label, NINF, s)
        zh += tl.sum(tl.exp2((h - h_max) * LOG2E), 1)
    if DIVERGENCE != NONE:
        us = (s - s_max) * s_scale
        ut = (logits_of(t, unit, PROBS, False) - t_max) * t_scale
        if PRUNE or RAGGED:
            kept = kept_classes(
                t, threshold, start, low, high, at_label, PRUNE, PROBS, APART, BLOCK, LANE, RAGGED
            )
        if PRUNE or (PROBS and RAGGED) or (APART and RAGGED):
            us = tl.where(kept, us, NINF)
            ut = tl.where(kept, ut, NINF)
        es = tl.exp2(us)
        et = tl.exp2(ut)
        zs += tl.sum(es, 1)
        zt += tl.sum(et, 1)
        # NaN or infinite where a logit is; that is how the careful rows are found.
        if DIVERGENCE == FORWARD:
            term = et * (ut - us)
        if DIVERGENCE == REVERSE:
            term = es * (us - ut)
        if DIVERGENCE != MIXTURE:
            if PRUNE or RAGGED:
                term = tl.where(kept, term, 0.0)
            cross += tl.sum(term, 1)
    return zs, zt, zh, cross


@triton.jit
def sums_tile(
    s_row, t_row, start, low, high, threshold, unit, at_label, s_max, t_max, h_max,
    s_scale, t_scale, zs, zt, zh, cross,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, False)
    t = s
    if DIVERGENCE != NONE:
        t = load_tile(t_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, False)
    return sums_of(
        s, t, start, low, high, threshold, unit, at_label, s_max, t_max, h_max, s_scale, t_scale,
        zs, zt, zh, cross, DIVERGENCE, PRUNE, PROBS, APART, HARD, BLOCK, LANE, RAGGED,
    )  # fmt: skip


@triton.jit
def sums(
    s_row, t_row, low, high, threshold, unit, at_label, s_max, t_max, h_max, s_scale, t_scale,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Sums of exp((x - max) / T) of both sides, of the student's at T = 1 over all classes but the
    label, and of a exp * ln(a / b) before normalisation, all in powers of two. Besides, the largest
    part of either side's sum that fell to one lane, nearly all where a row is sure of a class; all
    parts of the student's; and how far those of the last sum are from the mean, of the reverse."""
    zs = tl.zeros([BLOCK // LANE], tl.float32)
    zt = zs
    zh = zs
    cross = zs
    begin, end, first, full = edges(low, high, BLOCK)
    LABEL: tl.constexpr = APART or HARD
    label_tile, masked, whole = beside_label(at_label, end, first, full, BLOCK, LABEL)
    for start in tl.range(first, whole, BLOCK):
        zs, zt, zh, cross = sums_tile(
            s_row, t_row, whole_start(start, label_tile, BLOCK, LABEL), low, high, threshold, unit,
            at_label, s_max, t_max, h_max, s_scale, t_scale, zs, zt, zh, cross,
            DIVERGENCE, PRUNE, PROBS, APART, HARD, VECTOR, BLOCK, LANE, False,
        )  # fmt: skip
    for edge in tl.range(begin, masked):
        zs, zt, zh, cross = sums_tile(
            s_row, t_row, masked_start(edge, end, full, label_tile, LABEL), low, high, threshold,
            unit, at_label, s_max, t_max, h_max, s_scale, t_scale, zs, zt, zh, cross,
            DIVERGENCE, PRUNE, PROBS, APART, HARD, VECTOR, BLOCK, LANE, True,
        )  # fmt: skip
    spread = tl.sum(zs, 0) * 0.0
    if DIVERGENCE == REVERSE:
        spread = tl.sum(tl.abs(cross - zs * (tl.sum(cross, 0) / tl.sum(zs, 0))), 0)
    return (
        tl.sum(zs, 0), tl.sum(zt, 0), tl.sum(zh, 0), tl.sum(cross, 0),
        tl.max(zs, 0), tl.max(zt, 0), zs, spread,
    )  # fmt: skip


@triton.jit
def top_class(
    s_row, t_row, low, high, threshold, unit, at_label, lanes, most,
    PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Both sides' logits of the student's largest class, which is one of the few of the lane whose
    part is `most`; -inf where there is none."""
    lane = tl.max(tl.where(lanes == most, tl.arange(0, BLOCK // LANE), 0), 0)
    s_top = tl.full([], NINF, tl.float32)
    t_top = s_top
    for start in tl.range(0, high, BLOCK * (BLOCK // LANE)):
        place = positions(0, BLOCK, LANE)
        at = start + place // LANE * BLOCK + lane * LANE + place % LANE
        inside = (at >= low) & (at < high)
        if APART:
            inside = inside & (at != at_label)
        s = to_float(tl.load(s_row + at, mask=inside, other=NINF))
        t = to_float(tl.load(t_row + at, mask=inside, other=NINF))
        if PRUNE:
            s = tl.where(t < threshold, NINF, s)
        if PROBS:
            t = logits_of(tl.maximum(t, 0.0), unit, PROBS, True)
        largest = tl.max(tl.max(s, 1), 0)
        other = tl.max(tl.max(tl.where(s == largest, t, NINF), 1), 0)
        t_top = tl.where(largest > s_top, other, t_top)
        s_top = tl.maximum(s_top, largest)
    return s_top, t_top


@triton.jit
def hard_terms(others, h_max, label_logit):
    """The hard term, log2 of the sum of all classes, and the slope at the label, which has digits
    also where the label is sure: of the sum of the other classes, not of 1 - q."""
    own = tl.exp2((label_logit - h_max) * LOG2E)
    total = others + own
    h_log = tl.log2(total)
    sure = others < own
    log, _ = log_terms(tl.where(sure, others / own, 0.0))
    hard = tl.where(sure, log, h_log * LN2 + (h_max - label_logit))
    return hard, h_log, -others / total


@triton.jit
def hard_slope(
    s, start, at_label, h_max, h_log, label_slope,
    LABEL: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Of the hard term, with respect to a tile of s; LABEL: which may hold the label."""
    slope = tl.exp2((s - h_max) * LOG2E - h_log)
    if LABEL:
        slope = tl.where(positions(start, BLOCK, LANE) == at_label, label_slope, slope)
    return slope


@triton.jit
def difference(s, t, s_zero, t_zero, ratio, less, less_low):
    """(s - s_zero) - (t - t_zero) ratio - less, rounded once where ratio is 1 and so the zeros 0:
    what the first difference is rounded by is found and added."""
    a = s - s_zero
    b = (t - t_zero) * ratio
    apart = a - b
    moved = apart - a
    low = (a - (apart - moved)) - (b + moved)
    low = tl.where(tl.abs(apart) < float("inf"), low - less_low, 0.0)
    return (apart - less) + low


@triton.jit
def second_of(
    s, t, g_row, start, low, high, threshold, unit, s_max, t_max, h_max, s_inverse, t_inverse,
    s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low, at_top,
    soft_factor, hard_factor, target_factor, label_slope,
    divergence, beta, rest, at_label, value0, value1, value2, value3,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, CAREFUL: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to the sums of `second`, and its gradient to g_row."""
    GUARDED: tl.constexpr = CAREFUL or DIVERGENCE == MIXTURE
    if DIVERGENCE != NONE:
        if PRUNE or RAGGED:
            kept = kept_classes(
                t, threshold, start, low, high, at_label, PRUNE, PROBS, APART, BLOCK, LANE, RAGGED
            )
        t = logits_of(t, unit, PROBS, CAREFUL)
        ds = s - s_max
        dt = t - t_max
        # The logarithm of a sum is subtracted by itself: added to the maximum first, it would be
        # rounded as a logit is.
        log_q = ds * (s_inverse * LOG2E) - s_log
        log_p = dt * (t_inverse * LOG2E) - t_log
        if PRUNE or RAGGED:
            log_q = tl.where(kept, log_q, NINF)
            log_p = tl.where(kept, log_p, NINF)
        q = tl.exp2(log_q)
        p = tl.exp2(log_p)
        soft = q - p
        if CAREFUL:
            # ln(q / p) is x, and d what it is more than at the class that both sides are relative
            # to, where d is 0 however products and sums are fused, as it is where the logits agree.
            # Finite wherever these are: log_q may overflow at the lowest of them.
            d = difference(s, t, s_zero, t_zero, t_inverse / s_inverse, from_top, from_top_low)
            d *= s_inverse
            x = d - log_ratio
            # To the precision of the logits' difference, where q - p has that of p.
            soft = tl.where(tl.abs(x) < 0.5, p * expm1(x), soft)
            no_s = s == NINF
            if VALUE:
                value2 += tl.sum(soft, 1)
            if DIVERGENCE == FORWARD:
                if VALUE:
                    term = excess(p, q, -x, t == NINF, no_s)
                    value0 += tl.sum(tl.where(kept, term, 0.0) if PRUNE or RAGGED else term, 1)
                soft = tl.where(no_s, 0.0, soft)
            if DIVERGENCE == REVERSE:
                if VALUE:
                    term = excess(q, p, x, no_s, t == NINF)
                    value0 += tl.sum(tl.where(kept, term, 0.0) if PRUNE or RAGGED else term, 1)
                bracket = d
            if DIVERGENCE == MIXTURE:
                # ln(q / m), likewise: its exponential is q / p over beta + rest q / p.
                near = tl.abs(d) < tl.where(at_top > 0, 0.5, 0.0)
                change = tl.where(near, at_top * expm1(-d), tl.exp2(-x * LOG2E) - at_top)
                bracket, _ = log_terms(change * (beta / (rest + beta * at_top)))
                bracket = -bracket
            if VALUE and DIVERGENCE != FORWARD:
                value3 += tl.sum(tl.where(q > 0, q * bracket, 0.0), 1)
        if DIVERGENCE == MIXTURE:
            # p / m = 1 - rest y and q / m = 1 + beta y: each divergence is a sum of
            # r ln r - r + 1 over m, without cancellation.
            m = beta * p + rest * q
            y = soft / tl.maximum(m, 1.1754943508222875e-38)
            log, from_q = log_terms(beta * y)
            if VALUE:
                _, from_p = log_terms(-rest * y)
                value0 += tl.sum(m * from_p, 1)
                value1 += tl.sum(m * from_q, 1)
            if not CAREFUL:
                soft = rest * q * (log - divergence)
        elif not CAREFUL:
            # sum(q - p) is 0: with it the errors of both normalisers cancel to first order.
            if DIVERGENCE == FORWARD:
                term = p * (log_p - log_q)
                remainder = soft
            else:
                term = q * (log_q - log_p)
                remainder = -soft
                soft = q * ((log_q - log_p) * LN2 - divergence)
            if PRUNE or RAGGED:
                term = tl.where(kept, term, 0.0)
                if DIVERGENCE == REVERSE:  # q - p is 0 - 0 there
                    soft = tl.where(kept, soft, 0.0)
            if VALUE:
                value0 += tl.sum(term, 1)
                value1 += tl.sum(remainder, 1)
        if CAREFUL and DIVERGENCE != FORWARD:
            share = rest * q if DIVERGENCE == MIXTURE else q
            soft = tl.where(q > 0, share * (bracket - divergence), 0.0)
        if GRADIENT:
            gradient = soft_factor * soft
            if GUARDED:  # not even a NaN comes of a term without weight
                gradient = tl.where(soft_factor != 0, gradient, 0.0)
            if APART:  # the label's class takes what it gains from the others, by their shares
                share = target_factor * q
                gradient -= tl.where(target_factor != 0, share, 0.0) if GUARDED else share
            if GUARDED and PRUNE:
                gradient = tl.where(kept, gradient, 0.0)
    if GRADIENT:
        if APART and RAGGED:
            label = (positions(start, BLOCK, LANE) == at_label) & (s > NINF)
            gradient = tl.where(label, target_factor, gradient)
        if HARD:
            # The label in the same sum: there the two terms nearly cancel, before any rounding.
            hard = hard_factor * hard_slope(
                s, start, at_label, h_max, h_log, label_slope, RAGGED, BLOCK, LANE
            )
            if DIVERGENCE == NONE:
                gradient = hard
            else:
                gradient += tl.where(hard_factor != 0, hard, 0.0) if GUARDED else hard
        store_tile(g_row, gradient, start, low, high, G_VECTOR, BLOCK, RAGGED)
    return value0, value1, value2, value3


@triton.jit
def second_tile(
    s_row, t_row, g_row, start, low, high, threshold, unit, s_max, t_max, h_max, s_inverse,
    t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low, at_top,
    soft_factor, hard_factor, target_factor, label_slope, divergence, beta, rest, at_label,
    value0, value1, value2, value3,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, CAREFUL: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, GRADIENT)
    t = s
    if DIVERGENCE != NONE:
        t = load_tile(t_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, GRADIENT)
    return second_of(
        s, t, g_row, start, low, high, threshold, unit, s_max, t_max, h_max, s_inverse, t_inverse,
        s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low, at_top,
        soft_factor, hard_factor, target_factor, label_slope, divergence, beta, rest, at_label,
        value0, value1, value2, value3,
        DIVERGENCE, PRUNE, PROBS, APART, HARD, CAREFUL, VALUE, GRADIENT, G_VECTOR, BLOCK, LANE,
        RAGGED,
    )  # fmt: skip


@triton.jit
def second(
    s_row, t_row, g_row, low, high, threshold, unit, s_max, t_max, h_max, s_inverse, t_inverse,
    s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low, at_top,
    soft_factor, hard_factor, target_factor, label_slope, divergence, beta, rest, at_label,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, CAREFUL: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """The divergence as two sums and the gradient, from the end of the row: that is what the cache
    still holds of a row longer than it has room for. Of careful rows besides, the sum of q - p and
    what all classes' brackets have in common (see `corrected`)."""
    value0 = tl.zeros([BLOCK // LANE], tl.float32)
    value1 = value0
    value2 = value0
    value3 = value0
    LABEL: tl.constexpr = APART or HARD
    begin, end, first, full = edges(low, high, BLOCK)
    label_tile, masked, whole = beside_label(at_label, end, first, full, BLOCK, LABEL)
    for edge in tl.range(begin, masked):
        value0, value1, value2, value3 = second_tile(
            s_row, t_row, g_row, masked_start(edge, end, full, label_tile, LABEL), low, high,
            threshold, unit, s_max, t_max, h_max, s_inverse, t_inverse, s_log, t_log, h_log,
            log_ratio, s_zero, t_zero, from_top, from_top_low, at_top, soft_factor, hard_factor,
            target_factor, label_slope, divergence, beta, rest, at_label,
            value0, value1, value2, value3, DIVERGENCE, PRUNE, PROBS, APART, HARD,
            CAREFUL, VALUE, GRADIENT, VECTOR, G_VECTOR, BLOCK, LANE, True,
        )  # fmt: skip
    for forward in tl.range(first, whole, BLOCK):
        start = whole - BLOCK + first - forward
        value0, value1, value2, value3 = second_tile(
            s_row, t_row, g_row, whole_start(start, label_tile, BLOCK, LABEL), low, high,
            threshold, unit, s_max, t_max, h_max, s_inverse, t_inverse, s_log, t_log, h_log,
            log_ratio, s_zero, t_zero, from_top, from_top_low, at_top, soft_factor, hard_factor,
            target_factor, label_slope, divergence, beta, rest, at_label,
            value0, value1, value2, value3, DIVERGENCE, PRUNE, PROBS, APART, HARD,
            CAREFUL, VALUE, GRADIENT, VECTOR, G_VECTOR, BLOCK, LANE, False,
        )  # fmt: skip
    return tl.sum(value0, 0), tl.sum(value1, 0), tl.sum(value2, 0), tl.sum(value3, 0)


@triton.jit
def digits(zs, zt, s_most, t_most, soft, spread, rest, DIVERGENCE: tl.constexpr):
    """Whether p and q formed apart leave the gradient its digits, as far as a small divergence does
    not tell: it may be that of small classes, while the gradient's norm is that of a large one. And
    of the reverse divergence and of mixtures, which compare what every class has of the divergence
    with the mean, whether classes differ in it: neither where one has all of q nor where ln(q / p)
    is large and nearly the same of all, nor where p has next to nothing of any that q has."""
    of_s = s_most / zs
    apart = tl.abs(of_s - t_most / zt) > of_s * (1 / 32)
    enough = apart | (of_s < 0.25)
    if DIVERGENCE != FORWARD:
        enough = enough & (of_s < 0.75)
    if DIVERGENCE == REVERSE:
        enough = enough & ~(spread * LN2 < zs * soft * (1 / 128))
    if DIVERGENCE == MIXTURE:
        enough = enough & ~saturated(soft, rest)
    return enough


@triton.jit
def saturated(from_student, rest):
    """Whether a mixture is nearly as far from q as it can be: KL(q || m) <= -ln(rest)."""
    return from_student > tl.log2(rest) * (-LN2 * 0.75)


@triton.jit
def quick_soft(zs, zt, s_log, t_log, cross, DIVERGENCE: tl.constexpr):
    """KL as a difference of sums, and whether that leaves it digits and no logit is infinite."""
    soft = tl.full([], 0.0, tl.float32)
    if DIVERGENCE == FORWARD:
        soft = (cross / zt - (t_log - s_log)) * LN2
    if DIVERGENCE == REVERSE:
        soft = (cross / zs - (s_log - t_log)) * LN2
    return soft, (cross < 1e30) & (soft > 0.01)


@triton.jit
def soft_of(
    value0, value1, zs, zt, nans, beta, rest, DIVERGENCE: tl.constexpr, APART: tl.constexpr
):
    """The soft term of guarded rows."""
    soft = value0
    if DIVERGENCE == MIXTURE:
        soft = beta * value0 + rest * value1
    if APART:  # nothing to match, or no class to match it with
        soft = tl.where(zt == 0, 0.0, tl.where(zs == 0, float("inf"), soft))
    # A NaN, or a side without a finite logit: its maximum is -inf, and -inf - -inf is NaN.
    if (zs != zs) | (zt != zt) | (nans > 0):
        soft = tl.full([], float("nan"), tl.float32)
    return soft


@triton.jit
def corrected(soft, excessive, beta, rest, DIVERGENCE: tl.constexpr):
    """The soft term less what it has of the sum of q - p, which is 0 but for the rounding of both
    sums' logarithms, and the logarithm of what q is too large by."""
    excessive = tl.where(tl.abs(excessive) < 0.5, excessive, 0.0)
    log, second = log_terms(excessive)
    if DIVERGENCE == FORWARD:
        soft -= excessive * log - second
    if DIVERGENCE == REVERSE:
        soft = (soft - second) / (1.0 + excessive)
    if DIVERGENCE == MIXTURE:  # to second order: such rows are close
        soft -= beta * rest * 0.5 * excessive * excessive
    return soft, log


@triton.jit
def unusable(soft, DIVERGENCE: tl.constexpr):
    """Whether the gradient of a row with this soft term is NaN."""
    lost = soft != soft
    if DIVERGENCE == REVERSE:
        lost = lost | (soft == float("inf"))
    return lost
