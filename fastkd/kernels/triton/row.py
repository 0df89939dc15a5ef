"""One row of the loss per program. What is computed: fastkd/spec.py.

    first read        sums.py     offsets and sums; of a split row, the slices' put together
        |
        |   the hard and the target term follow from the sums; without a soft term this is all
        v
    fast              fast.py     the row again, from the L2 cache: divergence and gradient
        |                         (a mixture's divergence in a read of its own before: its size
        |                         tells whether the row is an ordinary one)
        |   not finite, a divergence too small for the difference of sums, classes that hardly
        |   differ in it, or odds of a label set apart that hardly differ
        v
    careful           careful.py  the row twice more: the divergence, then the gradient

    flat              flat.py     in place of all of these, where T >= 1000 and every logit is small
                                  beside it, or T is infinite

A row that is skipped, or whose label is no class, is filled; so is one whose gradient is NaN.
"""

import triton
import triton.language as tl

from .careful import careful_row
from .classes import logits_of, unit_of
from .exchange import (
    SHARED,
    VALUES,
    count_in,
    meet,
    sums_of_row,
    tail_of_row,
    tell,
    tell_sums,
    tell_tail,
    values_of,
    wait,
)
from .fast import fast_pass, fast_row
from .flat import MATCHES_LOGITS, flat_row, is_flat
from .load import (
    edges,
    fill,
    fill_tail,
    label_logits,
    load_label,
    load_tile,
    load_weights,
    open_row,
    row_offset,
    step_back,
    store_tile,
)
from .math import LN2, NINF
from .select import kth_largest
from .sums import (
    finite,
    first_read,
    hard_terms,
    has_digits,
    loses_gradient,
    quotient_of_sums,
    soft_term,
    target_terms,
)
from .tail import joined, read_tail, write_tail
from .types import (
    MIXTURE,
    NONE,
    UNSPECIALISED,
    Factors,
    Given,
    Hard,
    Label,
    Logs,
    Offsets,
    Read,
    Row,
    Slice,
    Strided,
    Sums,
    Tail,
    Terms,
    Weights,
)

# Arrays of one number per row. Each is read by itself, so that where such an array begins is no
# reason to compile another kernel either.
PER_ROW = (
    "labels student_inverse teacher_inverse soft_weight hard_weight target_weight soft hard target "
    "keep beta scale"
).split()


@triton.jit
def read_row(
    row, s_inverse, t_inverse, label, tail, slice, KIND: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The first read of a row; of a slice, with offsets and sums of all slices, and the tail's with
    them."""
    read = first_read(row, s_inverse, t_inverse, label, KIND, TILE, PARTS)
    offsets = read.offsets
    sums = read.sums
    sound = read.sound
    if PARTS > 1:
        # Without the unit of the slice: what all programs of a row decide by has to be the same
        # bits.
        if KIND.probs:
            offsets = Offsets(offsets.s, offsets.t - read.scales.shift, offsets.h)
        tell_sums(slice, offsets, sums, KIND, PARTS)
        meet(slice, 1)
        offsets, sums = sums_of_row(slice, read.scales, KIND, PARTS)
        sound = sums.s + sums.t + sums.h < float("inf")
        if KIND.tail:
            tail = tail_of_row(slice, PARTS)
    if KIND.tail:
        h_offset, zh = joined(offsets.h, sums.h, tail, label.s)
        sound = sound & (zh < float("inf"))
        offsets = Offsets(offsets.s, offsets.t, h_offset)
        sums = Sums(
            sums.s, sums.t, zh, sums.cross, sums.s_most, sums.t_most, sums.spread
        )  # fmt: skip
    return Read(offsets, read.scales, sums, sound, read.nans, read.lanes, read.most)


@triton.jit
def label_of_row(label, scales, KIND: tl.constexpr, PARTS: tl.constexpr):
    """The label's logits, where the teacher's rows hold probabilities its logarithm as offsets are
    told: in the row's unit, of a slice without one."""
    if KIND.probs and PARTS > 1:
        unit, shift = unit_of(label.t, True)
        return Label(label.s, logits_of(label.t, unit, True, True) - shift)
    else:
        return Label(label.s, logits_of(label.t, scales.unit, KIND.probs, True))


@triton.jit
def hard_row(row, given, slice, KIND: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):
    """Writes the gradient of a row without a soft term. Whether this program is the row's last."""
    last = tl.full([], 1, tl.int1)
    if KIND.gradient:
        fast_pass(row, given, KIND, TILE, False, True)
    if PARTS > 1:
        last = count_in(slice.counter) == 2 * slice.parts - 1
    return last


@triton.jit
def mixture_first(
    row, given, read, slice, KIND: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """A mixture's soft term by fast formulas, and what its gradient takes off every class: all rows
    need these before any gradient."""
    value0, value1 = fast_pass(row, given, KIND, TILE, True, False)
    if PARTS > 1:
        tell(slice, VALUES, value0, PARTS)
        tell(slice, VALUES + 1, value1, PARTS)
        meet(slice, 2)
        value0, value1 = values_of(slice, VALUES, PARTS)
    return soft_term(value0, value1, read.sums, read.nans, given.factors.beta, KIND), value1


@triton.jit
def row_terms(
    row, s_inverse, t_inverse, weights, tail, beta, slice, KIND: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The terms of a row and its Hard; whether the gradient is written (where it is not, it is
    NaN); and whether it is for this program to write the terms: of a split row, for its last."""
    label = label_logits(row, KIND)
    if KIND.probs:  # their logarithms are to base 2
        t_inverse *= LN2
    read = read_row(row, s_inverse, t_inverse, label, tail, slice, KIND, TILE, PARTS)
    offsets = read.offsets
    scales = read.scales
    sums = read.sums
    logs = Logs(tl.log2(sums.s), tl.log2(sums.t))
    zero = tl.full([], 0.0, tl.float32)
    hard_term = zero
    hard = Hard(offsets.h, logs.s, zero)
    if KIND.hard:
        hard_term, hard = hard_terms(sums.h, offsets.h, label.s)
    lost = (weights.hard != 0) & (hard_term != hard_term)
    soft = zero
    # Without a weight nothing is left, not even of a temperature that is NaN.
    soft_factor = tl.where(weights.soft != 0, weights.soft * s_inverse, 0.0)
    target = zero
    target_factor = zero
    gap = zero
    if KIND.decoupled:
        offsets = Offsets(finite(offsets.s), finite(offsets.t), offsets.h)
        label = label_of_row(label, scales, KIND, PARTS)
        target, target_factor, gap = target_terms(
            label, offsets, scales, logs, (logs.s - logs.t) * LN2, 0.0, weights.target
        )
        # A side without another class is no distribution among them.
        soft_factor = tl.where((sums.s == 0) | (sums.t == 0), 0.0, soft_factor)
        logs = Logs(tl.where(sums.s == 0, 0.0, logs.s), tl.where(sums.t == 0, 0.0, logs.t))
    read = Read(offsets, scales, sums, read.sound, read.nans, read.lanes, read.most)
    own = offsets  # those of this slice, which has a unit of its own
    if KIND.probs and PARTS > 1:
        own = Offsets(offsets.s, offsets.t + scales.shift, offsets.h)
    factors = Factors(soft_factor, weights.hard, target_factor, soft, beta)
    last = tl.full([], 1, tl.int1)
    if KIND.divergence == NONE:
        given = Given(own, scales, logs, hard, factors)
        last = hard_row(row, given, slice, KIND, TILE, PARTS)
    else:
        soft, fast = quotient_of_sums(sums, logs, KIND)
        fast = fast & read.sound
        if KIND.pruned:  # a NaN of a class that is not kept is in no sum
            fast = fast & (read.nans == 0)
        if KIND.decoupled:
            fast = fast & ((tl.abs(gap) > 0.125) | (weights.target == 0))
        meetings = 1
        divergence = soft
        if KIND.divergence == MIXTURE:
            given = Given(own, scales, logs, hard, factors)
            soft, divergence = mixture_first(row, given, read, slice, KIND, TILE, PARTS)
            meetings = 2
            fast = ~(soft <= 0.01 * beta * (1.0 - beta))
        fast = fast & has_digits(sums, divergence, beta, KIND)
        factors = Factors(soft_factor, weights.hard, target_factor, divergence, beta)
        given = Given(own, scales, logs, hard, factors)
        if fast:
            soft, last = fast_row(row, given, soft, meetings, slice, KIND, TILE, PARTS)
        else:
            soft, target, last = careful_row(
                row, given, read, label, weights, target, meetings, slice, KIND, TILE, PARTS
            )
        soft = tl.where(soft < 0, 0.0, soft)
        if KIND.decoupled:
            either = (soft != soft) | (target != target)
            soft = tl.where(either, float("nan"), soft)
            target = tl.where(either, float("nan"), target)
        counts = (weights.soft != 0) | (weights.target != 0)
        lost = lost | (loses_gradient(soft, KIND) & counts)
    return Terms(soft, hard_term, target), hard, lost, last


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=PER_ROW)
def dense_rows_kernel(
    student, teacher, dstudent, labels, student_inverse, teacher_inverse,
    soft_weight, hard_weight, target_weight, soft, hard, target, keep, beta,
    counters,  # [1 + N] int32, 0 before, where rows are split: the tickets and one per row
    shared,  # [N, SHARED, PARTS] float32, where rows are split
    N, parts, columns, inner, vocab, width,
    s_shift, s_outer: tl.int64, s_inner: tl.int64,
    t_shift, t_outer: tl.int64, t_inner: tl.int64,
    g_shift, g_outer: tl.int64, g_inner: tl.int64,
    KIND: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two >= parts
):  # fmt: skip
    """Rows r, r + number of programs, ...; or, of N * parts programs, the slices of `columns`
    columns, a multiple of the tile, that the rows are split into."""
    BLOCK: tl.constexpr = TILE.block
    MAY_BE_FLAT: tl.constexpr = KIND.divergence != NONE and not KIND.decoupled
    row = tl.program_id(0)
    part = 0
    if PARTS > 1:
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        row = ticket // parts
        part = ticket % parts
    while row < N:
        s_row, t_row, g_row, low = open_row(
            row, Strided(student, s_shift, s_outer, s_inner),
            Strided(teacher, t_shift, t_outer, t_inner),
            Strided(dstudent, g_shift, g_outer, g_inner), inner, TILE, KIND.gradient,
        )  # fmt: skip
        weights = load_weights(row, Weights(soft_weight, hard_weight, target_weight), KIND)
        skipped = (weights.soft == 0) & (weights.hard == 0) & (weights.target == 0)
        label, valid = load_label(row, labels, vocab if KIND.decoupled else width, KIND)
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
        if KIND.divergence == MIXTURE:
            share = tl.load(beta + row)
        threshold = NINF
        if KIND.pruned:
            if computed:
                kept = tl.maximum(tl.minimum(tl.load(keep + row), vocab), 1).to(tl.int32)
                threshold = kth_largest(t_row, low, high, kept, TILE, SAMPLE)
        whole = Row(s_row, t_row, g_row, low, high, low + label, threshold)
        own = Row(
            s_row + begin, t_row + begin, g_row + begin, first, end, low + label - begin, threshold
        )  # fmt: skip
        slice = Slice(
            counters + 1 + row, shared + tl.cast(row, tl.int64) * (SHARED * PARTS), part, parts
        )
        flat = computed & (s_inverse <= MATCHES_LOGITS) & (s_inverse == t_inverse) & MAY_BE_FLAT
        if MAY_BE_FLAT:
            if flat & (s_inverse > 0):  # every part of a split row finds the same
                flat = is_flat(whole, s_inverse, KIND, TILE)
                if PARTS > 1:
                    if flat:
                        count_in(slice.counter)
        # What a row has that is skipped, or whose label is no class.
        value = tl.where(skipped, 0.0, float("nan"))
        terms = Terms(
            value if KIND.divergence != NONE else weights.soft,
            value if KIND.hard else weights.hard, value,
        )  # fmt: skip
        lost = ~flat
        last = (part == 0) & ~flat
        zero = tl.full([], 0.0, tl.float32)
        nan = tl.full([], float("nan"), tl.float32)
        softmax = Hard(zero, nan, nan)
        tail = Tail(zero, zero)
        if KIND.tail:
            tail_parts = tl.where(flat, 1, parts)  # all of a flat row is one program's work
            takes_tail = (part == 0) | ~flat
            if computed & takes_tail:
                tail = read_tail(whole, high, low + width, part, tail_parts, TILE)
                if PARTS > 1:  # told at once, for registers are few
                    tell_tail(slice, tail, PARTS)
        if computed & ~flat:
            terms, softmax, lost, last = row_terms(
                own, s_inverse, t_inverse, weights, tail, share, slice, KIND, TILE, PARTS
            )
        if KIND.gradient:
            if lost:
                tl.debug_barrier()  # other threads may still read the row, or write it
                fill(own, value, TILE)
            if not KIND.tail and part == 0:
                fill_tail(g_row, high, low + width, TILE)
        if last:
            tl.store(soft + row, terms.soft)
            tl.store(hard + row, terms.hard)
            if KIND.decoupled:
                tl.store(target + row, terms.target)
        if MAY_BE_FLAT:
            if flat & (part == 0):
                if PARTS > 1:
                    if s_inverse > 0:  # until no part reads what the gradient may be written over
                        wait(slice.counter, parts)
                s_term, h_term, softmax = flat_row(
                    whole, s_inverse, weights, tail, share, KIND, TILE
                )
                tl.store(soft + row, s_term)
                tl.store(hard + row, h_term)
        if KIND.tail and KIND.gradient:
            if takes_tail:
                write_tail(whole, high, low + width, softmax, weights.hard, part, tail_parts, TILE)
        row += N if PARTS > 1 else tl.num_programs(0)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=PER_ROW)
def scale_rows_kernel(
    dstudent, scale, inner, width, shift, outer: tl.int64, inner_stride: tl.int64,
    PER_ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dstudent *= scale; where that is 1 nothing is read, and the host need not know."""
    row = tl.program_id(0)
    factor = tl.load(scale + (row if PER_ROW else 0)).to(tl.float32)
    if factor != 1:
        offset = row_offset(row, shift, inner, outer, inner_stride)
        low = (offset % TILE.vector).to(tl.int32)
        g_row = step_back(dstudent, offset, low, TILE.vector)
        high = low + width
        begin, end, first, full = edges(low, high, TILE.block)
        for start in tl.range(first, full, TILE.block):
            x = load_tile(g_row, start, low, high, TILE, False, True)
            store_tile(g_row, x * factor, start, low, high, TILE, False)
        for edge in tl.range(begin, end):
            x = load_tile(g_row, edge * full, low, high, TILE, True, True)
            store_tile(g_row, x * factor, edge * full, low, high, TILE, True)
