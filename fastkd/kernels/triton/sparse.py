"""One row of the loss against a teacher of k classes per program. What is computed: sparse_rows in
fastkd/spec.py.

The student's row is read once for its sums and, out of the L2 cache, a second time for the
gradient. That is written for all classes alike, as if none were named; then the same program writes
those of the named classes anew, of which it has kept the logits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .load import (
    edges,
    fill,
    fill_tail,
    label_logits,
    load_label,
    load_student,
    load_weights,
    open_row,
    positions,
    store_gradient,
    to_float,
    to_stored,
)
from .math import LN2, LOG2E, NINF, excess, expm1, log_terms
from .sums import finite, hard_terms
from .tail import joined, read_tail, write_tail
from .types import UNSPECIALISED, Hard, Row, Strided, Tail, Weights

# What becomes of the classes that are not named: one more class of both sides; no classes; classes
# without a teacher's probability.
BUCKET, RESTRICT, WHOLE = (tl.constexpr(i) for i in range(3))
FAR = tl.constexpr(0x7FFFFFC0)  # beyond every column


class Named(NamedTuple):
    """The classes that the teacher names, in order."""

    ids: Any  # a pointer: int64 [k]
    log_probs: Any  # a pointer: float32 [k]
    log_rest: Any  # a pointer: the teacher's logarithm for all others together, where BUCKET
    k: Any
    columns: Any  # [K]: their columns in the row; FAR beyond the k-th


class Outside(NamedTuple):
    """What a sparse row is relative to: offsets, and the scale, log2(e) or times 1 / T, of the
    exponentials of the soft term, which are the others' or all classes'."""

    offset: Any
    h_offset: Any
    scale: Any


class Spread(NamedTuple):
    """What the gradient of a class that is not named takes of its exponentials."""

    outside: Any
    soft: Any
    hard: Any


@triton.jit
def column_of(named, place, low):
    """The column of the named class at this place, in the row stepped back by `low`."""
    return tl.load(named.ids + place, mask=place < named.k, other=FAR) + low


@triton.jit
def without_named(row, s, start, named, place, TILE: tl.constexpr):
    """A tile without the named classes, which are in order, those before it passed over. Not by
    subtraction afterwards: what a sure student leaves the others would be lost in it. Each class
    costs every thread 22 instructions, 64 of them about two thirds of both passes over 128256."""
    LANE: tl.constexpr = TILE.lane
    stop = tl.minimum(start + TILE.block, row.high)
    column = column_of(named, place, row.low)
    if column < stop:
        lane = tl.arange(0, TILE.block // LANE)
        bits = tl.zeros([TILE.block // LANE], tl.int32)
        one = tl.full([], 1, tl.int32)
        while column < stop:
            at = column.to(tl.int32) - start
            bits |= tl.where(lane == at // LANE, one << at % LANE, 0)
            place += 1
            column = column_of(named, place, row.low)
        s = tl.where(((bits[:, None] >> tl.arange(0, LANE)[None, :]) & 1) != 0, NINF, s)
    return s, place


@triton.jit
def sums_tile(
    row, named, outside, state, start, TILE: tl.constexpr,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to each lane's sums, and the place of the first named class behind it."""
    zo, zh, nans, place = state
    s = load_student(row, start, TILE, RAGGED, False)
    if HARD:
        h = s
        if (row.label >= start) & (row.label < start + TILE.block):
            h = tl.where(positions(start, TILE) == row.label, NINF, s)
        zh += tl.sum(tl.exp2((h - outside.h_offset) * LOG2E), 1)
    if OUTSIDE == RESTRICT:
        nans += tl.sum((s != s).to(tl.int32), 1)
    else:
        if OUTSIDE == BUCKET:
            s, place = without_named(row, s, start, named, place, TILE)
        zo += tl.sum(tl.exp2((s - outside.offset) * outside.scale), 1)
    return zo, zh, nans, place


@triton.jit
def find_sums(row, named, outside, TILE: tl.constexpr, OUTSIDE: tl.constexpr, HARD: tl.constexpr):
    """Sums of exponentials: of the others, or of all where none is set apart; of all but the label
    at T = 1. And how many NaN there are, where the first is not needed."""
    zo = tl.zeros([TILE.block // TILE.lane], tl.float32)
    zh = zo
    nans = tl.zeros([TILE.block // TILE.lane], tl.int32)
    begin, end, first, full = edges(row.low, row.high, TILE.block)
    place = tl.sum((named.columns < first).to(tl.int32), 0)
    for start in tl.range(first, full, TILE.block):
        zo, zh, nans, place = sums_tile(
            row, named, outside, (zo, zh, nans, place), start, TILE, OUTSIDE, HARD, False
        )
    for edge in tl.range(begin, end):
        place = tl.sum((named.columns < edge * full).to(tl.int32), 0)
        zo, zh, nans, place = sums_tile(
            row, named, outside, (zo, zh, nans, place), edge * full, TILE, OUTSIDE, HARD, True
        )
    return tl.sum(zo, 0), tl.sum(zh, 0), tl.sum(nans, 0)


@triton.jit
def find_offsets(row, end, named, TILE: tl.constexpr, OUTSIDE: tl.constexpr):
    """The maxima of the columns before `end`: of those that are summed up, and of all. 0 where all
    are -inf: then a sum is 0."""
    o_max = tl.full([TILE.block // TILE.lane], NINF, tl.float32)
    h_max = o_max
    place = tl.full([], 0, tl.int32)
    for start in tl.range(0, end, TILE.block):
        s = load_student(row, start, TILE, True, False)
        h_max = tl.maximum(h_max, tl.max(s, 1))
        if OUTSIDE == BUCKET:
            s, place = without_named(row, s, start, named, place, TILE)
            o_max = tl.maximum(o_max, tl.max(s, 1))
    h = finite(tl.max(h_max, 0))
    if OUTSIDE == BUCKET:
        return finite(tl.max(o_max, 0)), h
    else:
        return h, h


@triton.jit
def first_read(
    row, named, label, scale, TILE: tl.constexpr, OUTSIDE: tl.constexpr, HARD: tl.constexpr
):
    """The Outside of a row, its sums over the others and of the hard term, and how many NaN it has.
    The first tile mostly holds a number near enough to the maximum; where it does not, the row is
    read again for its own."""
    offset = tl.full([], 0.0, tl.float32)
    h_offset = offset
    zo = offset
    zh = offset
    nans = tl.full([], 0, tl.int32)
    end = tl.minimum(row.high, TILE.block)
    tries = nans
    while tries < 2:
        if HARD or OUTSIDE != RESTRICT:
            offset, h_offset = find_offsets(row, end, named, TILE, OUTSIDE)
        if HARD:
            h_offset = tl.maximum(h_offset, label.s)
        outside = Outside(offset, h_offset, scale)
        zo, zh, nans = find_sums(row, named, outside, TILE, OUTSIDE, HARD)
        # A sum of 0 may be one of a first tile of -inf alone.
        sound = (zo + zh < 16777216.0) & ((zo > 0) | (OUTSIDE == RESTRICT))
        if HARD:
            sound = sound & (zh + tl.exp2((label.s - h_offset) * LOG2E) > 0)
        tries = tl.where(sound, 2, tries + 1)
        end = row.high
    return Outside(offset, h_offset, scale), zo, zh, nans


@triton.jit
def gradient_tile(
    row, spread, start, TILE: tl.constexpr,
    OUTSIDE: tl.constexpr, HARD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    outside = spread.outside
    LANE: tl.constexpr = TILE.lane
    gradient = tl.zeros([TILE.block // LANE, LANE], tl.float32)
    if HARD or OUTSIDE != RESTRICT:
        s = load_student(row, start, TILE, RAGGED, True)
    if OUTSIDE != RESTRICT:
        gradient = spread.soft * tl.exp2((s - outside.offset) * outside.scale)
    if HARD:  # infinite logits that are not named count only with a weight
        hard = spread.hard * tl.exp2((s - outside.h_offset) * LOG2E)
        gradient += tl.where(spread.hard != 0, hard, 0.0)
    store_gradient(row, gradient, start, TILE, RAGGED)


@triton.jit
def write_all(row, spread, TILE: tl.constexpr, OUTSIDE: tl.constexpr, HARD: tl.constexpr):
    """Writes the gradient of all classes, as if none were named nor the label; from the end of the
    row: that is what the cache still holds of a row longer than it has room for."""
    BLOCK: tl.constexpr = TILE.block
    begin, end, first, full = edges(row.low, row.high, BLOCK)
    for edge in tl.range(begin, end):
        gradient_tile(row, spread, edge * full, TILE, OUTSIDE, HARD, True)
    for forward in tl.range(first, full, BLOCK):
        start = full - BLOCK + first - forward
        gradient_tile(row, spread, start, TILE, OUTSIDE, HARD, False)


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
    """What classes add to KL(p || q), q - p, and q, where the logarithms of p and q are the given
    ones less p_log and q_log. The logarithms come in float64: where the two are close, q - p is of
    the precision of their difference."""
    d = ((log_p - log_q) - (p_log - q_log)).to(tl.float32)
    p = tl.exp2((log_p - p_log).to(tl.float32) * LOG2E)
    q = tl.exp2((log_q - q_log).to(tl.float32) * LOG2E)
    difference = tl.where(tl.abs(d) < 0.5, -q * expm1(d), q - p)
    return excess(p, q, d, log_p == NINF, log_q == NINF), difference, q


@triton.jit
def compare_named(
    there, log_p, log_q, rest_p, rest_q, p_log, q_log, apart, OUTSIDE: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """The soft term; q - p of the named classes and of the others together; the logarithm of q's
    sum. `apart`: the others are no class of the teacher's, and what the named ones leave them is a
    difference to 1. Otherwise a second turn mends what both sums' logarithms are off by."""
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
    return soft, difference, rest_difference, q_log


@triton.jit
def write_named(
    row, spread, ids, there, s, value, label_logit, label_slope, hard_weight, vocab,
    KIND: tl.constexpr, OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the named classes anew, `value` being the soft term's of each, and the
    label's."""
    outside = spread.outside
    if KIND.hard:
        label = row.label - row.low
        own = hard_weight * label_slope
        if tl.sum((there & (ids == label)).to(tl.int32), 0) == 0:
            of_soft = spread.soft * tl.exp2((label_logit - outside.offset) * outside.scale)
            own_class = of_soft + own if OUTSIDE != RESTRICT else own
            stored = to_stored(own_class, row.gradient.dtype.element_ty)
            weighs = hard_weight != 0
            if KIND.tail:  # write_tail writes a label that lies in the tail
                weighs = weighs & (label < vocab)
            tl.store(row.gradient + row.label, stored, mask=weighs)
        hard_value = spread.hard * tl.exp2((s - outside.h_offset) * LOG2E)
        hard_value = tl.where(ids == label, own, hard_value)
        value += tl.where(hard_weight != 0, hard_value, 0.0)
    columns = tl.maximum(tl.minimum(ids, FAR), -1).to(tl.int32) + row.low
    tl.store(row.gradient + columns, to_stored(value, row.gradient.dtype.element_ty), mask=there)


@triton.jit
def row_terms(
    row, vocab, named, s_inverse, t_inverse, weights, tail,
    KIND: tl.constexpr, TILE: tl.constexpr, OUTSIDE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Both terms, whether the gradient is not written and NaN, and the row's Hard."""
    label = label_logits(row, KIND)
    place = tl.arange(0, K)
    ids = tl.load(named.ids + place, mask=place < named.k, other=FAR)
    there = (ids >= 0) & (ids < vocab)
    columns = tl.maximum(tl.minimum(ids, FAR), -1).to(tl.int32) + row.low
    named = Named(named.ids, named.log_probs, named.log_rest, named.k, columns)
    s = to_float(tl.load(row.student + columns, mask=there, other=NINF))
    log_p = tl.load(named.log_probs + place, mask=there, other=NINF).to(tl.float64) * t_inverse
    bad = tl.sum((ids < 0).to(tl.int32), 0) > 0

    scale = LOG2E if OUTSIDE == BUCKET else s_inverse * LOG2E
    outside, zo, zh, nans = first_read(row, named, label, scale, TILE, OUTSIDE, KIND.hard)
    if KIND.tail:
        h_offset, zh = joined(outside.h_offset, zh, tail, label.s)
        outside = Outside(outside.offset, h_offset, scale)
    zero = tl.full([], 0.0, tl.float32)
    hard_term = zero
    hard = Hard(outside.h_offset, zero, zero)
    total = zero
    if KIND.hard:
        hard_term, hard = hard_terms(zh, outside.h_offset, label.s)
        total = zh + tl.exp2((label.s - outside.h_offset) * LOG2E)
        hard_term = tl.where(total > 0, hard_term, float("nan"))

    rest_p = tl.full([], NINF, tl.float64)
    rest_q = rest_p
    offset = outside.offset
    if OUTSIDE == BUCKET:
        rest_p = tl.load(named.log_rest).to(tl.float64) * t_inverse
        rest_q = (tl.log2(zo) * LN2).to(tl.float64) * s_inverse
    if OUTSIDE == RESTRICT:
        offset = tl.max(s, 0)
    log_q = (s.to(tl.float64) - offset) * s_inverse
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
            others_sum, _no_sum, _no_nans = find_sums(row, named, outside, TILE, BUCKET, False)
            rest_q = (tl.log2(others_sum) * LN2).to(tl.float64)
            log_q, rest_q, q_log = below_top(log_q, rest_q)
    soft, difference, rest_difference, q_log = compare_named(
        there, log_p, log_q, rest_p, rest_q, p_log, q_log, apart, OUTSIDE, K
    )
    factor = weights.soft * s_inverse
    o_factor = zero
    if OUTSIDE == WHOLE:
        o_factor = factor / zo
    if OUTSIDE == BUCKET:
        o_factor = tl.where(zo > 0, factor * rest_difference / zo, 0.0)
    difference = tl.where(log_q == NINF, 0.0, difference)
    o_factor = tl.where(weights.soft != 0, o_factor, 0.0)
    soft = tl.where(soft < 0, 0.0, soft)
    # A sum that is NaN says that a logit is, or that a side has no class.
    lost = bad | (nans > 0) | (p_log != p_log) | (q_log != q_log) | (q_log == NINF)
    soft = tl.where(lost, float("nan"), soft)
    lost = (soft != soft) & (weights.soft != 0)
    lost = lost | ((hard_term != hard_term) & (weights.hard != 0))
    if KIND.gradient and not lost:
        spread = Spread(outside, o_factor, weights.hard / total if KIND.hard else 0.0)
        write_all(row, spread, TILE, OUTSIDE, KIND.hard)
        # Another thread of the program has written these classes already. The barrier orders its
        # store before the one here: bar.sync does on NVIDIA's; on AMD's tl.debug_barrier is a
        # release and an acquire of the workgroup, and the compiler waits where the hardware would
        # not keep the order.
        tl.debug_barrier()
        value = tl.where(weights.soft != 0, factor * difference, 0.0)
        write_named(
            row, spread, ids, there, s, value, label.s, hard.slope, weights.hard, vocab, KIND,
            OUTSIDE,
        )  # fmt: skip
    return soft, hard_term, lost, hard


PER_ROW = (
    "ids log_probs log_rest labels student_inverse teacher_inverse soft_weight hard_weight soft "
    "hard"
).split()


@triton.jit(do_not_specialize=[*UNSPECIALISED, "k"], do_not_specialize_on_alignment=PER_ROW)
def sparse_rows_kernel(
    student, dstudent, ids, log_probs, log_rest, labels, student_inverse, teacher_inverse,
    soft_weight, hard_weight, soft, hard, k, inner, vocab, width,
    s_shift, s_outer: tl.int64, s_inner: tl.int64, g_shift, g_outer: tl.int64, g_inner: tl.int64,
    KIND: tl.constexpr, TILE: tl.constexpr, OUTSIDE: tl.constexpr,
    K: tl.constexpr,  # a power of two >= k
):  # fmt: skip
    r = tl.program_id(0)
    side = Strided(student, s_shift, s_outer, s_inner)
    gradient = Strided(dstudent, g_shift, g_outer, g_inner)
    s_row, _, g_row, low = open_row(r, side, side, gradient, inner, TILE, KIND.gradient)
    weights = load_weights(r, Weights(soft_weight, hard_weight, soft_weight), KIND)
    skipped = (weights.soft == 0) & (weights.hard == 0)
    label, valid = load_label(r, labels, width, KIND)
    high = low + vocab
    row = Row(s_row, s_row, g_row, low, high, low + label, NINF)
    value = tl.where(skipped, 0.0, float("nan"))  # NaN where the label is no class
    s_term = value
    h_term = value if KIND.hard else weights.hard
    lost = True
    zero = tl.full([], 0.0, tl.float32)
    nan = tl.full([], float("nan"), tl.float32)
    softmax = Hard(zero, nan, nan)
    if valid & ~skipped:
        first = tl.cast(r, tl.int64) * k
        named = Named(ids + first, log_probs + first, log_rest + r, k, 0)
        tail = Tail(zero, zero)
        if KIND.tail:
            tail = read_tail(row, high, low + width, 0, 1, TILE)
        s_term, h_term, lost, softmax = row_terms(
            row, vocab, named, tl.load(student_inverse + r), tl.load(teacher_inverse + r), weights,
            tail, KIND, TILE, OUTSIDE, K,
        )  # fmt: skip
    if KIND.gradient:
        if lost:
            tl.debug_barrier()  # other threads may still read the row
            fill(row, value, TILE)
        if KIND.tail:
            write_tail(row, high, low + width, softmax, weights.hard, 0, 1, TILE)
        else:
            fill_tail(g_row, high, low + width, TILE)
    tl.store(soft + r, s_term)
    tl.store(hard + r, h_term)
