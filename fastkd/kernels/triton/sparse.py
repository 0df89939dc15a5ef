"""One row of the loss against a teacher of k classes per program. What is computed: sparse_rows in
fastkd/spec.py.

The student's row is read once for its sums and, out of the L2 cache, a second time for the
gradient. That is written for all classes alike, as if none were named; then the same program writes
those of the named classes anew, of which it has kept the logits.
"""

import triton
import triton.language as tl

from .load import (
    LN2,
    LOG2E,
    NINF,
    edges,
    excess,
    expm1,
    load_tile,
    log_terms,
    positions,
    store_tile,
    to_float,
    to_stored,
)
from .row import UNSPECIALISED, fill
from .sums import FORWARD, hard_terms, open_row
from .tail import joined, tail_sums, write_tail

# What becomes of the classes that are not named: one more class of both sides; no classes; classes
# without a teacher's probability.
BUCKET, RESTRICT, WHOLE = (tl.constexpr(i) for i in range(3))
FAR = tl.constexpr(0x7FFFFFC0)  # beyond every column


@triton.jit
def column_of(ids, place, k, low):
    """Of the named class at this place, in the row stepped back by `low`."""
    return tl.load(ids + place, mask=place < k, other=FAR) + low


@triton.jit
def others(s, start, high, low, ids, place, k, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """A tile without the named classes, which are in order, those before it passed over. Not by
    subtraction afterwards: what a sure student leaves the others would be lost in it. Each class
    costs every thread 22 instructions, 64 of them about two thirds of both passes over 128256."""
    stop = tl.minimum(start + BLOCK, high)
    column = column_of(ids, place, k, low)
    if column < stop:
        lane = tl.arange(0, BLOCK // LANE)
        named = tl.zeros([BLOCK // LANE], tl.int32)
        one = tl.full([], 1, tl.int32)
        while column < stop:
            at = column.to(tl.int32) - start
            named |= tl.where(lane == at // LANE, one << at % LANE, 0)
            place += 1
            column = column_of(ids, place, k, low)
        bits = (named[:, None] >> tl.arange(0, LANE)[None, :]) & 1
        s = tl.where(bits != 0, NINF, s)
    return s, place


@triton.jit
def sums_tile(
    s_row, start, low, high, ids, place, k, at_label, o_max, h_max, scale, zo, zh, nans,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, False)
    if HARD:
        h = s
        if (at_label >= start) & (at_label < start + BLOCK):
            h = tl.where(positions(start, BLOCK, LANE) == at_label, NINF, s)
        zh += tl.sum(tl.exp2((h - h_max) * LOG2E), 1)
    if OUTSIDE == RESTRICT:
        nans += tl.sum((s != s).to(tl.int32), 1)
    else:
        if OUTSIDE == BUCKET:
            s, place = others(s, start, high, low, ids, place, k, BLOCK, LANE)
        zo += tl.sum(tl.exp2((s - o_max) * scale), 1)
    return zo, zh, nans, place


@triton.jit
def sums(
    s_row, low, high, ids, columns, k, at_label, o_max, h_max, scale,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials: of the others, or of all where none is set apart; of all but the label
    at T = 1. And how many NaN there are, where the first is not needed."""
    zo = tl.zeros([BLOCK // LANE], tl.float32)
    zh = zo
    nans = tl.zeros([BLOCK // LANE], tl.int32)
    begin, end, first, full = edges(low, high, BLOCK)
    place = tl.sum((columns < first).to(tl.int32), 0)
    for start in tl.range(first, full, BLOCK):
        zo, zh, nans, place = sums_tile(
            s_row, start, low, high, ids, place, k, at_label, o_max, h_max, scale, zo, zh, nans,
            OUTSIDE, HARD, VECTOR, BLOCK, LANE, False,
        )  # fmt: skip
    for edge in tl.range(begin, end):
        place = tl.sum((columns < edge * full).to(tl.int32), 0)
        zo, zh, nans, place = sums_tile(
            s_row, edge * full, low, high, ids, place, k, at_label, o_max, h_max, scale, zo, zh,
            nans, OUTSIDE, HARD, VECTOR, BLOCK, LANE, True,
        )  # fmt: skip
    return tl.sum(zo, 0), tl.sum(zh, 0), tl.sum(nans, 0)


@triton.jit
def maxima(
    s_row, end, low, high, ids, k, OUTSIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Of the columns before `end`: of those that are summed up, and of all. 0 where all are -inf:
    then a sum is 0."""
    o_max = tl.full([BLOCK // LANE], NINF, tl.float32)
    h_max = o_max
    place = tl.full([], 0, tl.int32)
    for start in tl.range(0, end, BLOCK):
        s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, True, False)
        h_max = tl.maximum(h_max, tl.max(s, 1))
        if OUTSIDE == BUCKET:
            s, place = others(s, start, high, low, ids, place, k, BLOCK, LANE)
            o_max = tl.maximum(o_max, tl.max(s, 1))
    h = tl.max(h_max, 0)
    h = tl.where(h == NINF, 0.0, h)
    if OUTSIDE == BUCKET:
        o = tl.max(o_max, 0)
        return tl.where(o == NINF, 0.0, o), h
    else:
        return h, h


@triton.jit
def gradient_tile(
    s_row, g_row, start, low, high, o_max, h_max, scale, o_factor, h_factor,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    gradient = tl.zeros([BLOCK // LANE, LANE], tl.float32)
    if HARD or OUTSIDE != RESTRICT:
        s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, RAGGED, True)
    if OUTSIDE != RESTRICT:
        gradient = o_factor * tl.exp2((s - o_max) * scale)
    if HARD:  # infinite logits outside of what is restricted may be none of a row without it
        hard = h_factor * tl.exp2((s - h_max) * LOG2E)
        gradient += tl.where(h_factor != 0, hard, 0.0)
    store_tile(g_row, gradient, start, low, high, G_VECTOR, BLOCK, RAGGED)


@triton.jit
def of_all(
    s_row, g_row, low, high, o_max, h_max, scale, o_factor, h_factor,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """The gradient of all classes, as if none were named nor the label; from the end of the row:
    that is what the cache still holds of a row longer than it has room for."""
    begin, end, first, full = edges(low, high, BLOCK)
    for edge in tl.range(begin, end):
        gradient_tile(
            s_row, g_row, edge * full, low, high, o_max, h_max, scale, o_factor, h_factor,
            OUTSIDE, HARD, VECTOR, G_VECTOR, BLOCK, LANE, True,
        )  # fmt: skip
    for forward in tl.range(first, full, BLOCK):
        gradient_tile(
            s_row, g_row, full - BLOCK + first - forward, low, high, o_max, h_max, scale, o_factor,
            h_factor, OUTSIDE, HARD, VECTOR, G_VECTOR, BLOCK, LANE, False,
        )  # fmt: skip


@triton.jit
def below_top(x, rest):
    """The vector x and the scalar `rest` less the largest of them, and the logarithm of their sum
    of exponentials. NaN where all are -inf."""
    top = tl.maximum(tl.max(x, 0), rest)
    x -= top
    rest -= top
    total = tl.sum(tl.exp2(x.to(tl.float32) * LOG2E), 0) + tl.exp2(rest.to(tl.float32) * LOG2E)
    return x, rest, (tl.log2(total) * LN2).to(tl.float64)


@triton.jit
def compared(log_p, log_q, p_log, q_log):
    """Of classes whose logarithms less p_log and q_log are those of p and q: what they add to
    KL(p || q), q - p, and q. The logarithms come in float64: where the two are close, q - p is of
    the precision of their difference."""
    d = ((log_p - log_q) - (p_log - q_log)).to(tl.float32)
    p = tl.exp2((log_p - p_log).to(tl.float32) * LOG2E)
    q = tl.exp2((log_q - q_log).to(tl.float32) * LOG2E)
    difference = tl.where(tl.abs(d) < 0.5, -q * expm1(d), q - p)
    return excess(p, q, d, log_p == NINF, log_q == NINF), difference, q


@triton.jit
def row_terms(
    s_row, g_row, low, high, vocab, ids, log_probs, k, log_rest, s_inverse, t_inverse,
    soft_weight, hard_weight, label, tail_max, tail_z,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, TAIL: tl.constexpr, GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Both terms, and whether the gradient is not written and NaN; the frame and the logarithm of
    the hard term's sum, and its slope at the label."""
    # Read before any thread can have written the gradient over it.
    label_logit = 0.0
    if HARD:
        label_logit = to_float(tl.load(s_row + low + label))
    place = tl.arange(0, K)
    named = tl.load(ids + place, mask=place < k, other=FAR)
    there = (named >= 0) & (named < vocab)
    columns = tl.maximum(tl.minimum(named, FAR), -1).to(tl.int32) + low
    s = to_float(tl.load(s_row + columns, mask=there, other=NINF))
    log_p = tl.load(log_probs + place, mask=there, other=NINF).to(tl.float64) * t_inverse
    bad = tl.sum((named < 0).to(tl.int32), 0) > 0
    at_label = low + label

    # The first tile mostly holds a number near enough to the maximum. Where it does not, all do.
    scale = LOG2E if OUTSIDE == BUCKET else s_inverse * LOG2E
    o_max = tl.full([], 0.0, tl.float32)
    h_max = o_max
    zo = o_max
    zh = o_max
    nans = tl.full([], 0, tl.int32)
    end = tl.minimum(high, BLOCK)
    tries = nans
    while tries < 2:
        if HARD or OUTSIDE != RESTRICT:
            o_max, h_max = maxima(s_row, end, low, high, ids, k, OUTSIDE, VECTOR, BLOCK, LANE)
        if HARD:
            h_max = tl.maximum(h_max, label_logit)
        zo, zh, nans = sums(
            s_row, low, high, ids, columns, k, at_label, o_max, h_max, scale, OUTSIDE, HARD, VECTOR,
            BLOCK, LANE,
        )  # fmt: skip
        # A sum of 0 may be one of a first tile of -inf alone.
        sound = (zo + zh < 16777216.0) & ((zo > 0) | (OUTSIDE == RESTRICT))
        if HARD:
            sound = sound & (zh + tl.exp2((label_logit - h_max) * LOG2E) > 0)
        tries = tl.where(sound, 2, tries + 1)
        end = high

    if TAIL:
        h_max, zh = joined(h_max, zh, tail_max, tail_z, label_logit)
    hard = tl.full([], 0.0, tl.float32)
    h_log = hard
    label_slope = hard
    total = hard
    if HARD:
        hard, h_log, label_slope = hard_terms(zh, h_max, label_logit)
        total = zh + tl.exp2((label_logit - h_max) * LOG2E)
        hard = tl.where(total > 0, hard, float("nan"))
    rest_p = tl.full([], NINF, tl.float64)
    rest_q = rest_p
    frame = o_max
    if OUTSIDE == BUCKET:
        rest_p = tl.load(log_rest).to(tl.float64) * t_inverse
        rest_q = (tl.log2(zo) * LN2).to(tl.float64) * s_inverse
    if OUTSIDE == RESTRICT:
        frame = tl.max(s, 0)
    log_q = (s.to(tl.float64) - frame) * s_inverse
    q_log = (tl.log2(zo) * LN2).to(tl.float64)
    if OUTSIDE != WHOLE:
        log_q, rest_q, q_log = below_top(log_q, rest_q)
    log_p, rest_p, p_log = below_top(log_p, rest_p)
    apart = OUTSIDE == WHOLE
    if OUTSIDE == WHOLE:
        # What little the named classes leave the others is no difference to 1.
        of_named = tl.sum(tl.exp2((log_q - q_log).to(tl.float32) * LOG2E), 0)
        apart = of_named < 0.75
        if of_named >= 0.75:
            others_sum, _no_sum, _no_nans = sums(
                s_row, low, high, ids, columns, k, at_label, o_max, h_max, scale, BUCKET, False,
                VECTOR, BLOCK, LANE,
            )  # fmt: skip
            rest_q = (tl.log2(others_sum) * LN2).to(tl.float64)
            log_q, rest_q, q_log = below_top(log_q, rest_q)
    tries = tl.where(apart, 1, 0)
    soft = tl.full([], 0.0, tl.float32)
    rest = soft
    rest_difference = soft
    difference = tl.zeros([K], tl.float32)
    q = difference
    while tries < 2:
        term, difference, q = compared(log_p, log_q, p_log, q_log)
        difference = tl.where(there, difference, 0.0)
        soft = tl.sum(tl.where(there, term, 0.0), 0)
        if apart:
            rest = 1.0 - tl.sum(q, 0)
            soft += rest
        else:
            # The differences sum to 0, but for what both sums' logarithms are off by.
            rest_term, rest_difference, rest = compared(rest_p, rest_q, p_log, q_log)
            if OUTSIDE != RESTRICT:
                soft += rest_term
            excessive = tl.sum(difference, 0) + rest_difference
            near = tl.abs(excessive) < 0.5
            log, _ = log_terms(tl.where(near, excessive, 0.0))
            q_log += log
            difference -= q * excessive
            rest_difference -= rest * excessive
        tries += 1
    factor = soft_weight * s_inverse
    o_factor = tl.full([], 0.0, tl.float32)
    if OUTSIDE == WHOLE:
        o_factor = factor / zo
    if OUTSIDE == BUCKET:
        o_factor = tl.where(zo > 0, factor * rest_difference / zo, 0.0)
    difference = tl.where(log_q == NINF, 0.0, difference)
    o_factor = tl.where(soft_weight != 0, o_factor, 0.0)
    soft = tl.where(soft < 0, 0.0, soft)
    # A sum that is NaN says that a logit is, or that a side has no class.
    lost = bad | (nans > 0) | (p_log != p_log) | (q_log != q_log) | (q_log == NINF)
    soft = tl.where(lost, float("nan"), soft)
    lost = ((soft != soft) & (soft_weight != 0)) | ((hard != hard) & (hard_weight != 0))
    if GRADIENT and not lost:
        h_factor = hard_weight / total if HARD else 0.0
        of_all(
            s_row, g_row, low, high, o_max, h_max, scale, o_factor, h_factor,
            OUTSIDE, HARD, VECTOR, G_VECTOR, BLOCK, LANE,
        )  # fmt: skip
        # Another thread of the program has written these classes already. The barrier orders its
        # store before the one here: bar.sync does on NVIDIA's; on AMD's tl.debug_barrier is a
        # release and an acquire of the workgroup, and the compiler waits where the hardware would
        # not keep the order.
        tl.debug_barrier()
        value = tl.where(soft_weight != 0, factor * difference, 0.0)
        if HARD:
            of_soft = o_factor * tl.exp2((label_logit - o_max) * scale)
            own = hard_weight * label_slope
            if tl.sum((there & (named == label)).to(tl.int32), 0) == 0:
                own_class = of_soft + own if OUTSIDE != RESTRICT else own
                stored = to_stored(own_class, g_row.dtype.element_ty)
                weighs = hard_weight != 0
                if TAIL:  # of a label in the tail write_tail sees to it
                    weighs = weighs & (label < vocab)
                tl.store(g_row + low + label, stored, mask=weighs)
            hard_value = h_factor * tl.exp2((s - h_max) * LOG2E)
            hard_value = tl.where(named == label, own, hard_value)
            value += tl.where(hard_weight != 0, hard_value, 0.0)
        stored = to_stored(value, g_row.dtype.element_ty)
        tl.store(g_row + columns, stored, mask=there)
    return soft, hard, lost, h_max, h_log, label_slope


PER_ROW = (
    "ids log_probs log_rest labels student_inverse teacher_inverse soft_weight hard_weight soft "
    "hard"
).split()


@triton.jit(do_not_specialize=[*UNSPECIALISED, "k"], do_not_specialize_on_alignment=PER_ROW)
def sparse_rows_kernel(
    student, dstudent, ids, log_probs, log_rest, labels, student_inverse, teacher_inverse,
    soft_weight, hard_weight, soft, hard, k, inner, vocab, width,
    s_shift, s_outer: tl.int64, s_inner: tl.int64, g_shift, g_outer: tl.int64, g_inner: tl.int64,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, TAIL: tl.constexpr, LABELS: tl.constexpr,
    GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    K: tl.constexpr,  # a power of two >= k
):  # fmt: skip
    row = tl.program_id(0)
    s_row, _, g_row, low, s_weight, h_weight, _, skipped, label, valid = open_row(
        row, student, student, dstudent, labels, soft_weight, hard_weight, soft_weight, inner,
        width, s_shift, s_outer, s_inner, s_shift, s_outer, s_inner, g_shift, g_outer, g_inner,
        FORWARD, False, HARD, LABELS, GRADIENT, VECTOR, G_VECTOR,
    )  # fmt: skip
    high = low + vocab
    value = tl.where(skipped, 0.0, float("nan"))  # or its label is no class
    s_term = value
    h_term = value if HARD else h_weight
    lost = True
    h_max = tl.full([], 0.0, tl.float32)
    h_log = tl.full([], float("nan"), tl.float32)
    label_slope = h_log
    if valid & ~skipped:
        first = tl.cast(row, tl.int64) * k
        tail_max = h_max
        tail_z = h_max
        if TAIL:
            tail_max, tail_z = tail_sums(
                s_row, high, low + width, low + label, 0, 1, VECTOR, BLOCK, LANE
            )
        s_term, h_term, lost, h_max, h_log, label_slope = row_terms(
            s_row, g_row, low, high, vocab, ids + first, log_probs + first, k, log_rest + row,
            tl.load(student_inverse + row), tl.load(teacher_inverse + row), s_weight, h_weight,
            label, tail_max, tail_z, OUTSIDE, HARD, TAIL, GRADIENT, VECTOR, G_VECTOR, BLOCK, LANE,
            K,
        )  # fmt: skip
    if GRADIENT:
        if lost:
            tl.debug_barrier()  # other threads may still read the row
            fill(g_row, value, low, high, G_VECTOR, BLOCK)
        if TAIL:
            write_tail(
                s_row, g_row, high, low + width, low + label, h_max, h_log, label_slope, h_weight,
                0, 1, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
        else:
            for start in tl.range(high // BLOCK * BLOCK, low + width, BLOCK):
                zeros = tl.zeros([BLOCK], tl.float32)
                store_tile(g_row, zeros, start, high, low + width, G_VECTOR, BLOCK, True)
    tl.store(soft + row, s_term)
    tl.store(hard + row, h_term)
