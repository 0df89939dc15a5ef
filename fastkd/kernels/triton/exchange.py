"""One row by several programs: what they tell each other, through the L2 cache, in one launch.

A row that the L2 cache loses before its second read is cut into slices, a program for each. It
reads its slice once for the sums, tells them, counts itself in at the row's counter, waits there
for the others, and reads its slice again while the cache still has it; a careful row meets more
often. What its programs decide by is therefore the same bits in all. The waiting ends, in whatever
order a GPU starts programs, if it has room for those of one row at a time:

- A program takes row and slice by the number of programs started before it, its ticket. So all rows
  whose tickets are out are complete, but for the last.
- A program of a complete row waits only for programs that run already, and each of these, before it
  waits itself, does what it is waited for. So all of them end. What stays are programs of the last
  row, fewer than make up a row: there is room for one more, which takes the next ticket.

The host allows no more programs to a row than there are multiprocessors, each of which has room for
one at least. Another kernel on the GPU, if it does not wait for this one, ends and makes room.

Why the slice is read again and not kept in registers: by counting, for nothing has run on a GPU. At
70 % of its copy rate a multiprocessor of an H200 takes 3.8 pairs a nanosecond, and if loading,
waiting and storing take a program 5 us, programs of 19000 pairs have to be in flight there. In 128
registers a thread keeps 16 pairs, 8192 for the multiprocessor (with 32 the compiler spills 3.3 KB);
the cache has room for 49000. The memory sees 6 bytes a pair either way, the cache 10 instead of 6.

The counters are 0 before each launch, which is 2 us of a memset; they are of no use afterwards.
"""

import triton
import triton.language as tl

from .math import LOG2E, LOWEST, NINF
from .types import FORWARD, MIXTURE, NONE, REVERSE, Offsets, Sums, Tail

# The numbers that are told, [SHARED, PARTS] per row, by their place in it.
SHARED = tl.constexpr(20)
S_OFFSET, T_OFFSET, H_OFFSET = (tl.constexpr(i) for i in (0, 1, 8))
S_SUM, T_SUM, H_SUM, CROSS = (tl.constexpr(i) for i in (2, 3, 4, 5))
S_MOST, T_MOST, SPREAD = (tl.constexpr(i) for i in (9, 10, 11))
VALUES = tl.constexpr(6)  # the two sums of the fast pass
S_TOP, T_TOP = tl.constexpr(12), tl.constexpr(13)  # a careful row's: logits of the top class
CAREFUL_VALUES = tl.constexpr(14)  # the four sums of the careful pass
TAIL_OFFSET, TAIL_SUM = tl.constexpr(18), tl.constexpr(19)


@triton.jit
def tell(slice, which: tl.constexpr, value, PARTS: tl.constexpr):
    tl.store(slice.shared + which * PARTS + slice.part, value)


@triton.jit
def told(slice, which: tl.constexpr, other, PARTS: tl.constexpr):
    """[PARTS]. Not from the cache of a multiprocessor, which may hold what was there before."""
    part = tl.arange(0, PARTS)
    return tl.load(
        slice.shared + which * PARTS + part, mask=part < slice.parts, other=other,
        cache_modifier=".cg",
    )  # fmt: skip


@triton.jit
def count_in(counter):
    """How many were counted in before. Who sees the count sees what this program told."""
    tl.debug_barrier()  # one thread counts: it releases what the others stored before the barrier
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def wait(counter, count):
    """Until `count` are counted in. No compiler takes an acquire out of its loop; one thread does
    it and a barrier hands its result on, so that the loads of every thread come after it."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def meet(slice, meetings):
    """Waits until all programs of the row were counted in for so many meetings."""
    count_in(slice.counter)
    wait(slice.counter, meetings * slice.parts)


@triton.jit
def tell_sums(slice, offsets, sums, KIND: tl.constexpr, PARTS: tl.constexpr):
    tell(slice, S_OFFSET, offsets.s, PARTS)
    if KIND.hard:
        tell(slice, H_SUM, sums.h, PARTS)
        tell(slice, H_OFFSET, offsets.h, PARTS)
    if KIND.divergence != NONE:
        tell(slice, T_OFFSET, offsets.t, PARTS)
        tell(slice, S_SUM, sums.s, PARTS)
        tell(slice, T_SUM, sums.t, PARTS)
        if KIND.divergence != MIXTURE:
            tell(slice, CROSS, sums.cross, PARTS)
        tell(slice, S_MOST, sums.s_most, PARTS)
        tell(slice, T_MOST, sums.t_most, PARTS)
        if KIND.divergence == REVERSE:
            tell(slice, SPREAD, sums.spread, PARTS)


@triton.jit
def weigh(offset, scale):
    """The largest offset of a row's slices, and what a sum of each slice counts under it."""
    whole = tl.max(offset, 0)
    # The sums of a slice without a finite logit are 0.
    return whole, tl.where(offset == NINF, 0.0, tl.exp2((offset - whole) * scale))


@triton.jit
def sums_of_row(slice, scales, KIND: tl.constexpr, PARTS: tl.constexpr):
    """Offsets and sums of a row from those of its slices; the same bits in all of its programs."""
    s_scale = scales.s * LOG2E
    t_scale = scales.t * LOG2E
    s_part = told(slice, S_OFFSET, NINF, PARTS)
    s_offset, s_weight = weigh(s_part, s_scale)
    t_offset = s_offset
    h_offset = s_offset
    zs = tl.full([], 0.0, tl.float32)
    zt = zs
    zh = zs
    cross = zs
    s_most = zs
    t_most = zs
    spread = zs
    if KIND.hard:
        h_part = told(slice, H_OFFSET, NINF, PARTS)
        h_offset, h_weight = weigh(h_part, LOG2E)
        zh = tl.sum(h_weight * told(slice, H_SUM, 0.0, PARTS), 0)
        if not KIND.tail:
            zh = tl.where(h_offset == NINF, float("nan"), zh)
    if KIND.divergence != NONE:
        t_part = told(slice, T_OFFSET, NINF, PARTS)
        t_offset, t_weight = weigh(t_part, t_scale)
        zs_part = told(slice, S_SUM, 0.0, PARTS)
        zt_part = told(slice, T_SUM, 0.0, PARTS)
        zs = tl.sum(s_weight * zs_part, 0)
        zt = tl.sum(t_weight * zt_part, 0)
        s_most = tl.max(s_weight * told(slice, S_MOST, 0.0, PARTS), 0)
        t_most = tl.max(t_weight * told(slice, T_MOST, 0.0, PARTS), 0)
        spread = tl.sum(s_weight * told(slice, SPREAD, 0.0, PARTS), 0)
        if not KIND.decoupled:  # a side without a finite logit is no distribution
            zs = tl.where(s_offset == NINF, float("nan"), zs)
            zt = tl.where(t_offset == NINF, float("nan"), zt)
        if KIND.divergence != MIXTURE:
            # ln(a / b) moves with the offsets. `moved` is NaN, and so the row a careful one, where
            # just one side has a finite logit in the slice. Where neither has, `cross` of the slice
            # tells a slice beyond the end of the row, 0, from one of infinities, NaN.
            moved = (t_part - t_offset) * t_scale - (s_part - s_offset) * s_scale
            part = told(slice, CROSS, 0.0, PARTS)
            if KIND.divergence == FORWARD:
                term = t_weight * (part + zt_part * moved)
            else:
                term = s_weight * (part - zs_part * moved)
            empty = (s_part == NINF) & (t_part == NINF)
            cross = tl.sum(tl.where(empty, part, term), 0)
    offsets = Offsets(s_offset, t_offset, h_offset)
    return offsets, Sums(zs, zt, zh, cross, s_most, t_most, spread)


@triton.jit
def tell_tail(slice, tail, PARTS: tl.constexpr):
    tell(slice, TAIL_OFFSET, tail.offset, PARTS)
    tell(slice, TAIL_SUM, tail.sum, PARTS)


@triton.jit
def tail_of_row(slice, PARTS: tl.constexpr):
    """The tail's offset and sum from those of the row's programs."""
    part = told(slice, TAIL_OFFSET, LOWEST, PARTS)
    offset = tl.max(part, 0)
    sums = told(slice, TAIL_SUM, 0.0, PARTS)
    return Tail(offset, tl.sum(sums * tl.exp2((part - offset) * LOG2E), 0))


@triton.jit
def values_of(slice, first: tl.constexpr, PARTS: tl.constexpr):
    """The row's sums of the slices' `first` value and of the one after it."""
    value0 = tl.sum(told(slice, first, 0.0, PARTS), 0)
    return value0, tl.sum(told(slice, first + 1, 0.0, PARTS), 0)


@triton.jit
def top_of(slice, PARTS: tl.constexpr):
    """Both logits of the largest of the slices' top classes."""
    s = told(slice, S_TOP, NINF, PARTS)
    s_top = tl.max(s, 0)
    t = told(slice, T_TOP, NINF, PARTS)
    return s_top, tl.max(tl.where(s == s_top, t, NINF), 0)
