"""One row of the loss per program, in Triton. What is computed: fastkd/spec.py.

A row is read once for the sums of its exponentials (`sums`) and, out of the L2 cache, a second time
for the divergence and the gradient, which it writes. Rows for which the quick formulas do not do
are read again by careful ones: with infinities, with logits far above those that the row begins
with, or where student and teacher agree so well that KL as a difference of sums has no digits left.
"""

import triton
import triton.language as tl

from .triton_math import (
    LN2,
    LOG2E,
    NINF,
    edges,
    load_tile,
    row_offset,
    step_back,
    store_tile,
    to_float,
)
from .triton_passes import FORWARD, MIXTURE, NONE, REVERSE, maxima, second, sums
from .triton_select import kth_largest

# A size or stride of 1, or one divisible by 16, is no reason to compile another kernel.
UNSPECIALISED = (
    "N inner vocab width keep s_shift s_outer s_inner t_shift t_outer t_inner "
    "g_shift g_outer g_inner shift outer inner_stride"
).split()


@triton.jit
def row_terms(
    s_row, t_row, g_row, low, high, keep, s_inverse, t_inverse, soft_weight, hard_weight, label,
    beta, rest,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Both terms, and whether the gradient is written; where it is not, it is NaN."""
    # Read before any thread can have written the gradient over it.
    label_logit = 0.0
    if HARD:
        label_logit = to_float(tl.load(s_row + low + label))
    threshold = NINF
    end = tl.minimum(high, BLOCK)
    if PRUNE:
        threshold = kth_largest(t_row, low, high, keep, VECTOR, BLOCK, LANE, SAMPLE)
        end = high
    s_scale = s_inverse * LOG2E
    t_scale = t_inverse * LOG2E

    # The first tile mostly holds a number near enough to the maximum. Where it does not, all do.
    s_max = tl.full([], 0.0, tl.float32)
    t_max = s_max
    h_max = s_max
    zs = s_max
    zt = s_max
    zh = s_max
    cross = s_max
    nans = tl.full([], 0, tl.int32)
    tries = nans
    sound = False
    while tries < 2:
        s_max, t_max, h_max, nans = maxima(
            s_row, t_row, end, low, high, threshold, PRUNE, VECTOR, BLOCK, LANE
        )
        zs, zt, zh, cross = sums(
            s_row, t_row, low, high, threshold, s_max, t_max, h_max, s_scale, t_scale,
            DIVERGENCE, PRUNE, HARD, VECTOR, BLOCK, LANE,
        )  # fmt: skip
        sound = zs + zt + zh < 16777216.0
        tries = tl.where(sound, 2, tries + 1)
        end = high

    s_log = tl.log2(zs)
    t_log = tl.log2(zt)
    h_log = tl.log2(zh)
    hard = tl.full([], 0.0, tl.float32)
    if HARD:
        hard = h_log * LN2 + (h_max - label_logit)
    lost = (hard_weight != 0) & (hard != hard)
    at_label = low + label
    soft = tl.full([], 0.0, tl.float32)
    soft_factor = soft_weight * s_inverse
    if DIVERGENCE == NONE:
        if GRADIENT:
            second(
                s_row, t_row, g_row, low, high, threshold, s_max, t_max, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, soft_factor, hard_weight, soft, beta, rest,
                at_label, NONE, PRUNE, HARD, False, False, True, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
    else:
        quick = False
        if DIVERGENCE == FORWARD:
            soft = (cross / zt - (t_log - s_log)) * LN2
        if DIVERGENCE == REVERSE:
            soft = (cross / zs - (s_log - t_log)) * LN2
        if DIVERGENCE != MIXTURE:
            quick = sound & (cross < 1e30) & (soft > 0.01)
        if DIVERGENCE != MIXTURE and quick:
            value0, value1 = second(
                s_row, t_row, g_row, low, high, threshold, s_max, t_max, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, soft_factor, hard_weight, soft, beta, rest,
                at_label, DIVERGENCE, PRUNE, HARD, False, True, GRADIENT, VECTOR, G_VECTOR,
                BLOCK, LANE,
            )  # fmt: skip
            soft = value0 * LN2 + value1
        else:
            value0, value1 = second(
                s_row, t_row, g_row, low, high, threshold, s_max, t_max, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, soft_factor, hard_weight, soft, beta, rest,
                at_label, DIVERGENCE, PRUNE, HARD, True, True,
                GRADIENT and DIVERGENCE == FORWARD, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
            soft = value0
            divergence = value0
            if DIVERGENCE == MIXTURE:
                soft = beta * value0 + rest * value1
                divergence = value1
            if GRADIENT and DIVERGENCE != FORWARD:  # it needs the divergence first
                second(
                    s_row, t_row, g_row, low, high, threshold, s_max, t_max, h_max, s_inverse,
                    t_inverse, s_log, t_log, h_log, soft_factor, hard_weight, divergence, beta,
                    rest, at_label, DIVERGENCE, PRUNE, HARD, True, False, True, VECTOR,
                    G_VECTOR, BLOCK, LANE,
                )  # fmt: skip
            # A NaN, or a side without a finite logit: its maximum is -inf, and -inf - -inf is NaN.
            if (zs != zs) | (zt != zt) | (nans > 0):
                soft = tl.full([], float("nan"), tl.float32)
        soft = tl.where(soft < 0, 0.0, soft)
        unusable = soft != soft
        if DIVERGENCE == REVERSE:
            unusable = unusable | (soft == float("inf"))
        lost = lost | (unusable & (soft_weight != 0))
    return soft, hard, lost


@triton.jit
def fill(row, value, low, high, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    values = tl.zeros([BLOCK], tl.float32) + value
    begin, end, first, full = edges(low, high, BLOCK)
    for start in tl.range(first, full, BLOCK):
        store_tile(row, values, start, low, high, VECTOR, BLOCK, False)
    for edge in tl.range(begin, end):
        store_tile(row, values, edge * full, low, high, VECTOR, BLOCK, True)


@triton.jit(do_not_specialize=UNSPECIALISED)
def kd_rows_kernel(
    student, teacher, dstudent, labels, student_inverse, teacher_inverse, soft_weight, hard_weight,
    soft, hard,
    N, inner, vocab, width, keep, beta, rest,
    s_shift, s_outer: tl.int64, s_inner: tl.int64,
    t_shift, t_outer: tl.int64, t_inner: tl.int64,
    g_shift, g_outer: tl.int64, g_inner: tl.int64,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, HARD: tl.constexpr, LABELS: tl.constexpr,
    GRADIENT: tl.constexpr,
    # Elements of a vector, where all rows of both sides (and dstudent's) lie alike in it; else 1.
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Rows r, r + number of programs, ...: how many are in flight is how much of the cache is."""
    row = tl.program_id(0)
    while row < N:
        s_row = row_offset(row, s_shift, inner, s_outer, s_inner)
        t_row = row_offset(row, t_shift, inner, t_outer, t_inner)
        low = (s_row % VECTOR).to(tl.int32)
        s_row = step_back(student, s_row, low, VECTOR)
        t_row = step_back(teacher, t_row, low, VECTOR)
        g_row = s_row
        if GRADIENT:
            g_row = row_offset(row, g_shift, inner, g_outer, g_inner)
            g_row = step_back(dstudent, g_row, low, G_VECTOR)
        high = low + vocab

        s_weight = tl.full([], 0.0, tl.float32)
        h_weight = s_weight
        if DIVERGENCE != NONE:
            s_weight = tl.load(soft_weight + row)
        if HARD:
            h_weight = tl.load(hard_weight + row)
        skipped = (s_weight == 0) & (h_weight == 0)
        label = tl.full([], 0, tl.int64)
        valid = True
        if LABELS:
            label = tl.load(labels + row)
            valid = (label >= 0) & (label < vocab)
        # Of a row that is skipped, or whose label is no class.
        value = tl.where(skipped, 0.0, float("nan"))
        s_term = value if DIVERGENCE != NONE else s_weight
        h_term = value if HARD else h_weight
        lost = True
        if valid & ~skipped:
            s_term, h_term, lost = row_terms(
                s_row, t_row, g_row, low, high, keep,
                tl.load(student_inverse + row), tl.load(teacher_inverse + row),
                s_weight, h_weight, label.to(tl.int32), beta, rest,
                DIVERGENCE, PRUNE, HARD, GRADIENT, VECTOR, G_VECTOR, BLOCK, LANE, SAMPLE,
            )  # fmt: skip
        if GRADIENT:
            if lost:
                tl.debug_barrier()  # other threads may still read the row, or write it
                fill(g_row, value, low, high, G_VECTOR, BLOCK)
            for start in tl.range(high // BLOCK * BLOCK, low + width, BLOCK):
                zeros = tl.zeros([BLOCK], tl.float32)
                store_tile(g_row, zeros, start, high, low + width, G_VECTOR, BLOCK, True)
        tl.store(soft + row, s_term)
        tl.store(hard + row, h_term)
        row += tl.num_programs(0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def scale_rows_kernel(
    dstudent, scale, inner, width, shift, outer: tl.int64, inner_stride: tl.int64,
    PER_ROW: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dstudent *= scale; where that is 1 nothing is read, and the host need not know."""
    row = tl.program_id(0)
    factor = tl.load(scale + (row if PER_ROW else 0)).to(tl.float32)
    if factor != 1:
        offset = row_offset(row, shift, inner, outer, inner_stride)
        low = (offset % VECTOR).to(tl.int32)
        g_row = step_back(dstudent, offset, low, VECTOR)
        begin, end, first, full = edges(low, low + width, BLOCK)
        for start in tl.range(first, full, BLOCK):
            x = load_tile(g_row, start, low, low + width, VECTOR, BLOCK, 1, False, True)
            store_tile(g_row, x * factor, start, low, low + width, VECTOR, BLOCK, False)
        for edge in tl.range(begin, end):
            x = load_tile(g_row, edge * full, low, low + width, VECTOR, BLOCK, 1, True, True)
            store_tile(g_row, x * factor, edge * full, low, low + width, VECTOR, BLOCK, True)
