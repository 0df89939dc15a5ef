"""One row of the loss per program, in Triton. What is computed: fastkd/spec.py.

A row is read once for the sums of its exponentials (`sums`) and, out of the L2 cache, a second time
for the divergence and the gradient, which it writes; of a mixture, once more between the two. Rows
for which that leaves too few digits are read again by careful formulas, twice, the first time for
the divergence and what the gradient needs of the whole row:

- with infinities, or logits far above those that the row begins with;
- where student and teacher agree, for p and q formed apart are each rounded as if they did not. Of
  x = ln(q / p) instead, which is the difference of the logits (`difference`) less the logarithm of
  both sums' quotient, q - p is p expm1(x); and the sum of all q - p, which has to be 0, tells what
  that logarithm is off by (`corrected`). So T large, or both sure of one class, costs no digits;
- where what a class has of the divergence is nearly the mean (`digits`): that is then relative to a
  class of which the student has most (`top_class`), where it is exactly 0.

Rows at T >= 1000 are read as flat.py says.
"""

import triton
import triton.language as tl

from .exchange import (
    SHARED,
    combined,
    count_in,
    tail_of,
    tell,
    tell_tail,
    top_of,
    values_of,
    wait,
)
from .flat import MATCHES_LOGITS, is_flat, limit_row
from .load import (
    LN2,
    LOG2E,
    NINF,
    binary_divergence,
    edges,
    load_tile,
    row_offset,
    step_back,
    store_tile,
    to_float,
    unit_of,
)
from .select import kth_largest
from .sums import (
    MIXTURE,
    NONE,
    REVERSE,
    corrected,
    difference,
    digits,
    hard_terms,
    logits_of,
    maxima,
    open_row,
    quick_soft,
    second,
    soft_of,
    sums,
    top_class,
    unusable,
)
from .tail import joined, tail_sums, write_tail

# A size or stride of 1, or one divisible by 16, is no reason to compile another kernel.
UNSPECIALISED = (
    "N parts columns inner vocab width s_shift s_outer s_inner t_shift t_outer t_inner "
    "g_shift g_outer g_inner shift outer inner_stride"
).split()


# Read one number at a time: where they begin is none either.
PER_ROW = (
    "labels student_inverse teacher_inverse soft_weight hard_weight target_weight soft hard target "
    "keep beta scale"
).split()


@triton.jit
def target_terms(
    s, t, s_max, t_max, s_inverse, t_inverse, s_log, t_log, log_ratio, excessive, weight
):
    """The target term, what the label gains from the other classes, and the difference between the
    two sides' odds of it, of the label's logits. That difference may be far below what it is one
    of; so it is taken in float64."""
    of_t = (t - t_max) * t_inverse - t_log * LN2
    of_s = (s - s_max) * s_inverse - s_log * LN2
    ratio = t_inverse.to(tl.float64) / s_inverse
    gap = (s.to(tl.float64) - s_max) - (t.to(tl.float64) - t_max) * ratio
    gap = (gap * s_inverse - log_ratio - excessive).to(tl.float32)
    gap = tl.where(tl.abs(gap) < float("inf"), gap, tl.where(of_s == of_t, 0.0, of_s - of_t))
    term, gain = binary_divergence(of_t, of_s, gap)
    return term, tl.where(weight != 0, weight * s_inverse * gain, 0.0), gap


@triton.jit
def row_terms(
    s_row, t_row, g_row, low, high, threshold, s_inverse, t_inverse, soft_weight, hard_weight,
    target_weight, label, tail_max, tail_z, beta, rest, counter, shared, part, parts,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, TAIL: tl.constexpr, GRADIENT: tl.constexpr, VECTOR: tl.constexpr,
    G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The terms, whether the gradient is written (where it is not, it is NaN), and whether it is
    for this program to write the terms: of a slice, columns [low, high), that falls to the last.
    And the frame and the logarithm of the hard term's sum, and its slope at the label."""
    SLICES: tl.constexpr = PROBS and PARTS > 1  # which have units of their own
    # Read before any thread, here or at another slice, can have written the gradient over it.
    label_logit = 0.0
    label_teacher = 0.0
    if HARD or APART:
        label_logit = to_float(tl.load(s_row + low + label))
    if APART:
        label_teacher = to_float(tl.load(t_row + low + label))
    at_label = low + label
    end = high if PRUNE else tl.minimum(high, BLOCK)
    if PROBS:  # their logarithms are to base 2
        t_inverse *= LN2
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
    s_most = s_max
    t_most = s_max
    spread = s_max
    lanes = tl.zeros([BLOCK // LANE], tl.float32)
    nans = tl.full([], 0, tl.int32)
    tries = nans
    unit = s_max
    shift = s_max
    sound = False
    while tries < 2:
        s_max, t_max, h_max, nans, unit, shift = maxima(
            s_row, t_row, end, low, high, threshold, at_label, PRUNE, PROBS, APART, VECTOR, BLOCK,
            LANE,
        )  # fmt: skip
        if HARD:
            h_max = tl.maximum(h_max, label_logit)
        s_frame = s_max
        t_frame = t_max
        h_frame = h_max
        # Without a finite logit a slice adds 0, and a row is NaN, or 0 beside its label.
        if (PARTS > 1 or APART) and tries > 0:
            s_frame = tl.where(s_max == NINF, 0.0, s_max)
            t_frame = tl.where(t_max == NINF, 0.0, t_max)
            h_frame = tl.where(h_max == NINF, 0.0, h_max)
        if TAIL and tries > 0:  # there may be one in the tail
            h_frame = tl.where(h_max == NINF, 0.0, h_max)
        zs, zt, zh, cross, s_most, t_most, lanes, spread = sums(
            s_row, t_row, low, high, threshold, unit, at_label, s_frame, t_frame, h_frame,
            s_scale, t_scale, DIVERGENCE, PRUNE, PROBS, APART, HARD, VECTOR, BLOCK, LANE,
        )  # fmt: skip
        sound = zs + zt + zh < 16777216.0
        tries = tl.where(sound, 2, tries + 1)
        end = high
    most = s_most
    # Without the unit of the slice: what all programs of a row decide by has to be the same bits.
    if SLICES:
        t_max -= shift
    if PARTS > 1:
        tell(shared, 0, part, s_max, PARTS)
        if HARD:
            tell(shared, 4, part, zh, PARTS)
            tell(shared, 8, part, h_max, PARTS)
        if DIVERGENCE != NONE:
            tell(shared, 1, part, t_max, PARTS)
            tell(shared, 2, part, zs, PARTS)
            tell(shared, 3, part, zt, PARTS)
            if DIVERGENCE != MIXTURE:
                tell(shared, 5, part, cross, PARTS)
            tell(shared, 9, part, s_most, PARTS)
            tell(shared, 10, part, t_most, PARTS)
            if DIVERGENCE == REVERSE:
                tell(shared, 11, part, spread, PARTS)
        count_in(counter)
        wait(counter, parts)
        s_max, t_max, h_max, zs, zt, zh, cross, s_most, t_most, spread = combined(
            shared, parts, s_scale, t_scale, DIVERGENCE, APART, HARD, TAIL, PARTS
        )
        sound = zs + zt + zh < float("inf")
        if TAIL:
            tail_max, tail_z = tail_of(shared, parts, PARTS)
    if TAIL:
        h_max, zh = joined(h_max, zh, tail_max, tail_z, label_logit)
        sound = sound & (zh < float("inf"))

    s_log = tl.log2(zs)
    t_log = tl.log2(zt)
    h_log = s_log
    hard = tl.full([], 0.0, tl.float32)
    label_slope = hard
    if HARD:
        hard, h_log, label_slope = hard_terms(zh, h_max, label_logit)
    lost = (hard_weight != 0) & (hard != hard)
    soft = tl.full([], 0.0, tl.float32)
    # Without a weight not even of a temperature that is NaN anything is left.
    soft_factor = tl.where(soft_weight != 0, soft_weight * s_inverse, 0.0)
    log_ratio = soft
    s_zero = soft  # of careful rows, as what follows
    t_zero = soft
    from_top = soft
    from_top_low = soft
    at_top = soft
    target = soft
    target_factor = soft
    gap = soft
    if APART:
        s_max = tl.where(s_max == NINF, 0.0, s_max)
        t_max = tl.where(t_max == NINF, 0.0, t_max)
        if SLICES:
            own_unit, own_shift = unit_of(label_teacher, PROBS)
            label_teacher = logits_of(label_teacher, own_unit, PROBS, True) - own_shift
        else:
            label_teacher = logits_of(label_teacher, unit, PROBS, True)
        target, target_factor, gap = target_terms(
            label_logit, label_teacher, s_max, t_max, s_inverse, t_inverse, s_log, t_log,
            (s_log - t_log) * LN2, 0.0, target_weight,
        )  # fmt: skip
        # A side without another class is no distribution among them.
        soft_factor = tl.where((zs == 0) | (zt == 0), 0.0, soft_factor)
        s_log = tl.where(zs == 0, 0.0, s_log)
        t_log = tl.where(zt == 0, 0.0, t_log)
    t_frame = t_max + shift if SLICES else t_max
    last = True
    if DIVERGENCE == NONE:
        if GRADIENT:
            second(
                s_row, t_row, g_row, low, high, threshold, unit, s_max, t_frame, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low,
                at_top, soft_factor, hard_weight, target_factor, label_slope,
                soft, beta, rest, at_label, NONE, PRUNE, PROBS, APART, HARD, False,
                False, True, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
        if PARTS > 1:
            last = count_in(counter) == 2 * parts - 1
    else:
        divergence = soft
        soft, quick = quick_soft(zs, zt, s_log, t_log, cross, DIVERGENCE)
        quick = quick & sound
        if PRUNE:  # of a class that is not kept a NaN is in no sum
            quick = quick & (nans == 0)
        if APART:
            quick = quick & ((tl.abs(gap) > 0.125) | (target_weight == 0))
        meetings = 1
        if DIVERGENCE == MIXTURE:  # all rows need the divergence first, which tells what they are
            value0, value1, _, _ = second(
                s_row, t_row, g_row, low, high, threshold, unit, s_max, t_frame, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low,
                at_top, soft_factor, hard_weight, target_factor, label_slope,
                soft, beta, rest, at_label, MIXTURE, PRUNE, PROBS, APART, HARD, False,
                True, False, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
            meetings = 2
            if PARTS > 1:
                tell(shared, 6, part, value0, PARTS)
                tell(shared, 7, part, value1, PARTS)
                count_in(counter)
                wait(counter, 2 * parts)
                value0, value1 = values_of(shared, 6, parts, PARTS)
            soft = soft_of(value0, value1, zs, zt, nans, beta, rest, MIXTURE, APART)
            divergence = value1
            quick = ~(soft <= 0.01 * beta * rest)
        quick = quick & digits(
            zs, zt, s_most, t_most, divergence if DIVERGENCE == MIXTURE else soft, spread, rest,
            DIVERGENCE,
        )  # fmt: skip
        if quick:
            if GRADIENT or DIVERGENCE != MIXTURE:
                if DIVERGENCE != MIXTURE:
                    divergence = soft
                value0, value1, _, _ = second(
                    s_row, t_row, g_row, low, high, threshold, unit, s_max, t_frame, h_max,
                    s_inverse, t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top,
                    from_top_low, at_top, soft_factor, hard_weight,
                    target_factor, label_slope, divergence, beta, rest, at_label, DIVERGENCE, PRUNE,
                    PROBS, APART, HARD, False, DIVERGENCE != MIXTURE, GRADIENT, VECTOR, G_VECTOR,
                    BLOCK, LANE,
                )  # fmt: skip
            if PARTS > 1:
                if DIVERGENCE != MIXTURE:
                    tell(shared, 6, part, value0, PARTS)
                    tell(shared, 7, part, value1, PARTS)
                last = count_in(counter) == (meetings + 1) * parts - 1
                if DIVERGENCE != MIXTURE:
                    if last:
                        tl.debug_barrier()
                        value0, value1 = values_of(shared, 6, parts, PARTS)
            if DIVERGENCE != MIXTURE:
                soft = value0 * LN2 + value1
        else:
            # Relative to a class of which the student has much, if the teacher has it at all.
            s_top, t_top = top_class(
                s_row, t_row, low, high, threshold, unit, at_label, lanes, most,
                PRUNE, PROBS, APART, BLOCK, LANE,
            )  # fmt: skip
            if SLICES:
                t_top -= shift
            if PARTS > 1:
                tell(shared, 12, part, s_top, PARTS)
                tell(shared, 13, part, t_top, PARTS)
                count_in(counter)
                meetings += 1
                wait(counter, meetings * parts)
                s_top, t_top = top_of(shared, parts, PARTS)
            finite = (s_top < float("inf")) & (t_top < float("inf"))
            if finite & (s_top > NINF) & (t_top > NINF):
                s_log -= (s_top - s_max) * s_scale
                t_log -= (t_top - t_max) * t_scale
                s_max = s_top
                t_max = t_top
                t_frame = t_max + shift if SLICES else t_max
            # Below what its roundings make of it there is no ratio.
            s_log = tl.where(tl.abs(s_log - t_log) < 6e-6, t_log, s_log)
            log_ratio = (s_log - t_log) * LN2
            # Where the teacher lacks that class, relative to one that it lacks.
            at_top = tl.where(t_top > NINF, tl.exp2(log_ratio * LOG2E), 0.0)
            ratio = t_inverse / s_inverse
            s_zero = tl.where(ratio == 1, 0.0, s_max)
            t_zero = tl.where(ratio == 1, 0.0, t_frame)
            zero = tl.full([], 0.0, tl.float32)
            from_top = difference(s_max, t_frame, s_zero, t_zero, ratio, zero, zero)
            from_top_low = difference(s_max, t_frame, s_zero, t_zero, ratio, from_top, zero)
            value0, value1, excessive, common = second(
                s_row, t_row, g_row, low, high, threshold, unit, s_max, t_frame, h_max, s_inverse,
                t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top, from_top_low,
                at_top, soft_factor, hard_weight, target_factor, label_slope,
                soft, beta, rest, at_label, DIVERGENCE, PRUNE, PROBS, APART, HARD,
                True, True, False, VECTOR, G_VECTOR, BLOCK, LANE,
            )  # fmt: skip
            if PARTS > 1:
                tell(shared, 14, part, value0, PARTS)
                tell(shared, 15, part, value1, PARTS)
                tell(shared, 16, part, excessive, PARTS)
                tell(shared, 17, part, common, PARTS)
                count_in(counter)
                meetings += 1
                wait(counter, meetings * parts)
                value0, value1 = values_of(shared, 14, parts, PARTS)
                excessive, common = values_of(shared, 16, parts, PARTS)
            soft = soft_of(value0, value1, zs, zt, nans, beta, rest, DIVERGENCE, APART)
            soft, excessive = corrected(soft, excessive, beta, rest, DIVERGENCE)
            if APART:
                target, target_factor, gap = target_terms(
                    label_logit, label_teacher, s_max, t_max, s_inverse, t_inverse,
                    tl.where(zs == 0, NINF, s_log), tl.where(zt == 0, NINF, t_log),
                    tl.where((zs == 0) | (zt == 0), float("inf"), log_ratio), excessive,
                    target_weight,
                )  # fmt: skip
            log_ratio += excessive
            s_log += excessive * LOG2E
            if GRADIENT:
                second(
                    s_row, t_row, g_row, low, high, threshold, unit, s_max, t_frame, h_max,
                    s_inverse, t_inverse, s_log, t_log, h_log, log_ratio, s_zero, t_zero, from_top,
                    from_top_low, at_top, soft_factor, hard_weight,
                    target_factor, label_slope, common, beta, rest, at_label, DIVERGENCE, PRUNE,
                    PROBS, APART, HARD, True, False, True, VECTOR, G_VECTOR, BLOCK, LANE,
                )  # fmt: skip
            if PARTS > 1:
                last = count_in(counter) == (meetings + 1) * parts - 1
        soft = tl.where(soft < 0, 0.0, soft)
        if APART:
            either = (soft != soft) | (target != target)
            soft = tl.where(either, float("nan"), soft)
            target = tl.where(either, float("nan"), target)
        counts = (soft_weight != 0) | (target_weight != 0)
        lost = lost | (unusable(soft, DIVERGENCE) & counts)
    return soft, hard, target, lost, last, h_max, h_log, label_slope


@triton.jit
def fill(row, value, low, high, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    values = tl.zeros([BLOCK], tl.float32) + value
    begin, end, first, full = edges(low, high, BLOCK)
    for start in tl.range(first, full, BLOCK):
        store_tile(row, values, start, low, high, VECTOR, BLOCK, False)
    for edge in tl.range(begin, end):
        store_tile(row, values, edge * full, low, high, VECTOR, BLOCK, True)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=PER_ROW)
def dense_rows_kernel(
    student, teacher, dstudent, labels, student_inverse, teacher_inverse,
    soft_weight, hard_weight, target_weight, soft, hard, target, keep, beta,
    counters,  # of split rows: [1 + N] int32, the tickets and one per row, 0 before
    shared,  # of split rows: [N, SHARED, PARTS] float32
    N, parts, columns, inner, vocab, width,
    s_shift, s_outer: tl.int64, s_inner: tl.int64,
    t_shift, t_outer: tl.int64, t_inner: tl.int64,
    g_shift, g_outer: tl.int64, g_inner: tl.int64,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr,
    PROBS: tl.constexpr,  # the teacher's rows hold probabilities
    APART: tl.constexpr,  # the label is left out of the divergence and has a term of its own
    HARD: tl.constexpr,
    TAIL: tl.constexpr,  # beside a hard term, the student has classes from vocab on
    LABELS: tl.constexpr, GRADIENT: tl.constexpr,
    # Elements of a vector, where all rows of both sides (and dstudent's) lie alike in it; else 1.
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr, SAMPLE: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two >= parts
):  # fmt: skip
    """Rows r, r + number of programs, ...; or, of N * parts programs, the slices of `columns`
    columns, a multiple of BLOCK, that the rows are split into."""
    HAS_LIMIT: tl.constexpr = DIVERGENCE != NONE and not APART
    row = tl.program_id(0)
    part = 0
    if PARTS > 1:
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        row = ticket // parts
        part = ticket % parts
    while row < N:
        s_row, t_row, g_row, low, s_weight, h_weight, t_weight, skipped, label, valid = open_row(
            row, student, teacher, dstudent, labels, soft_weight, hard_weight, target_weight,
            inner, vocab if APART else width,
            s_shift, s_outer, s_inner, t_shift, t_outer, t_inner, g_shift, g_outer, g_inner,
            DIVERGENCE, APART, HARD, LABELS, GRADIENT, VECTOR, G_VECTOR,
        )  # fmt: skip
        high = low + vocab
        begin = 0
        first = low
        end = high
        if PARTS > 1:  # the slice as a row of its own, from `begin`
            begin = tl.multiple_of(part * columns, BLOCK)
            first = tl.maximum(low - begin, 0)
            end = tl.minimum(high - begin, columns)
        computed = valid & ~skipped
        s_inverse = tl.load(student_inverse + row)
        t_inverse = tl.load(teacher_inverse + row)
        share = 0.0
        if DIVERGENCE == MIXTURE:
            share = tl.load(beta + row)
        rest = 1.0 - share
        threshold = NINF
        if PRUNE:
            if computed:
                kept = tl.maximum(tl.minimum(tl.load(keep + row), vocab), 1).to(tl.int32)
                threshold = kth_largest(t_row, low, high, kept, VECTOR, BLOCK, LANE, SAMPLE)
        at_limit = computed & (s_inverse <= MATCHES_LOGITS) & (s_inverse == t_inverse) & HAS_LIMIT
        if HAS_LIMIT:
            if at_limit & (s_inverse > 0):  # every part of a split row finds the same
                at_limit = is_flat(
                    s_row, t_row, low, high, threshold, s_inverse, PRUNE, PROBS, VECTOR, BLOCK
                )
                if PARTS > 1:
                    if at_limit:
                        count_in(counters + 1 + row)
        # Of a row that is skipped, or whose label is no class.
        value = tl.where(skipped, 0.0, float("nan"))
        s_term = value if DIVERGENCE != NONE else s_weight
        h_term = value if HARD else h_weight
        t_term = value
        lost = ~at_limit
        last = (part == 0) & ~at_limit
        h_max = tl.full([], 0.0, tl.float32)
        h_log = tl.full([], float("nan"), tl.float32)
        label_slope = h_log
        tail_max = h_max
        tail_z = h_max
        if TAIL:
            tail_parts = tl.where(at_limit, 1, parts)  # all of a flat row is one program's work
            takes_tail = (part == 0) | ~at_limit
            if computed & takes_tail:
                tail_max, tail_z = tail_sums(
                    s_row, high, low + width, low + label, part, tail_parts, VECTOR, BLOCK, LANE
                )
                if PARTS > 1:  # at once: registers are few
                    of_row = shared + tl.cast(row, tl.int64) * (SHARED * PARTS)
                    tell_tail(of_row, part, tail_max, tail_z, PARTS)
        if computed & ~at_limit:
            s_term, h_term, t_term, lost, last, h_max, h_log, label_slope = row_terms(
                s_row + begin, t_row + begin, g_row + begin, first, end, threshold,
                s_inverse, t_inverse,
                s_weight, h_weight, t_weight, label + (low - begin - first), tail_max, tail_z,
                share, rest, counters + 1 + row,
                shared + tl.cast(row, tl.int64) * (SHARED * PARTS), part, parts,
                DIVERGENCE, PRUNE, PROBS, APART, HARD, TAIL, GRADIENT, VECTOR, G_VECTOR, BLOCK,
                LANE, PARTS,
            )  # fmt: skip
        if GRADIENT:
            if lost:
                tl.debug_barrier()  # other threads may still read the row, or write it
                fill(g_row + begin, value, first, end, G_VECTOR, BLOCK)
            if not TAIL and part == 0:
                for start in tl.range(high // BLOCK * BLOCK, low + width, BLOCK):
                    zeros = tl.zeros([BLOCK], tl.float32)
                    store_tile(g_row, zeros, start, high, low + width, G_VECTOR, BLOCK, True)
        if last:
            tl.store(soft + row, s_term)
            tl.store(hard + row, h_term)
            if APART:
                tl.store(target + row, t_term)
        if HAS_LIMIT:
            if at_limit & (part == 0):
                if PARTS > 1:
                    if s_inverse > 0:  # until no part reads what the gradient may be written over
                        wait(counters + 1 + row, parts)
                s_term, h_term, h_max, h_log, label_slope = limit_row(
                    s_row, t_row, g_row, low, high, threshold, label, s_inverse, s_weight, h_weight,
                    tail_max, tail_z, share, rest, DIVERGENCE, PRUNE, PROBS, HARD, TAIL, GRADIENT,
                    VECTOR, G_VECTOR, BLOCK,
                )  # fmt: skip
                tl.store(soft + row, s_term)
                tl.store(hard + row, h_term)
        if TAIL and GRADIENT:
            if takes_tail:
                write_tail(
                    s_row, g_row, high, low + width, low + label, h_max, h_log, label_slope,
                    h_weight, part, tail_parts, VECTOR, G_VECTOR, BLOCK, LANE,
                )  # fmt: skip
        row += N if PARTS > 1 else tl.num_programs(0)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=PER_ROW)
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
