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

from .load import LOG2E, NINF
from .sums import FORWARD, MIXTURE, NONE
from .tail import LOWEST

# What is told, [SHARED, PARTS] per row: the maxima that the sums refer to, of s and of t; zs, zt,
# zh, cross (sums.sums); the divergence as two sums (sums.second); the maximum of
# s that zh refers to; the largest lane of zs and of zt, and how `cross` spreads; of careful rows,
# both logits of the slice's top class, and the four sums of sums.second; the frame and the
# sum of the tail (tail).
SHARED = tl.constexpr(20)


@triton.jit
def tell(shared, which: tl.constexpr, part, value, PARTS: tl.constexpr):
    tl.store(shared + which * PARTS + part, value)


@triton.jit
def told(shared, which: tl.constexpr, parts, other, PARTS: tl.constexpr):
    """[PARTS]. Not from the cache of a multiprocessor, which may hold what was there before."""
    part = tl.arange(0, PARTS)
    return tl.load(
        shared + which * PARTS + part, mask=part < parts, other=other, cache_modifier=".cg"
    )


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
def weights(maximum, scale):
    """The largest maximum of a row's slices, and what a sum of each slice counts under it."""
    whole = tl.max(maximum, 0)
    # The sums of a slice without a finite logit are 0.
    return whole, tl.where(maximum == NINF, 0.0, tl.exp2((maximum - whole) * scale))


@triton.jit
def combined(
    shared, parts, s_scale, t_scale, DIVERGENCE: tl.constexpr, APART: tl.constexpr,
    HARD: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of a row from those of its slices; the same bits in all of its programs."""
    s_part = told(shared, 0, parts, NINF, PARTS)
    s_max, s_weight = weights(s_part, s_scale)
    t_max = s_max
    h_max = s_max
    zs = tl.full([], 0.0, tl.float32)
    zt = zs
    zh = zs
    cross = zs
    s_most = zs
    t_most = zs
    spread = zs
    if HARD:
        h_part = told(shared, 8, parts, NINF, PARTS)
        h_max, h_weight = weights(h_part, LOG2E)
        zh = tl.sum(h_weight * told(shared, 4, parts, 0.0, PARTS), 0)
        if not TAIL:
            zh = tl.where(h_max == NINF, float("nan"), zh)
    if DIVERGENCE != NONE:
        t_part = told(shared, 1, parts, NINF, PARTS)
        t_max, t_weight = weights(t_part, t_scale)
        zs_part = told(shared, 2, parts, 0.0, PARTS)
        zt_part = told(shared, 3, parts, 0.0, PARTS)
        zs = tl.sum(s_weight * zs_part, 0)
        zt = tl.sum(t_weight * zt_part, 0)
        s_most = tl.max(s_weight * told(shared, 9, parts, 0.0, PARTS), 0)
        t_most = tl.max(t_weight * told(shared, 10, parts, 0.0, PARTS), 0)
        spread = tl.sum(s_weight * told(shared, 11, parts, 0.0, PARTS), 0)
        if not APART:  # a side without a finite logit is no distribution
            zs = tl.where(s_max == NINF, float("nan"), zs)
            zt = tl.where(t_max == NINF, float("nan"), zt)
        if DIVERGENCE != MIXTURE:
            # By how much ln(a / b) moves with the maxima. NaN, and so the row a careful one, where
            # just one side has a finite logit in the slice. Where neither has, `cross` of the slice
            # tells a slice beyond the end of the row, 0, from one of infinities, NaN.
            moved = (t_part - t_max) * t_scale - (s_part - s_max) * s_scale
            part = told(shared, 5, parts, 0.0, PARTS)
            if DIVERGENCE == FORWARD:
                term = t_weight * (part + zt_part * moved)
            else:
                term = s_weight * (part - zs_part * moved)
            empty = (s_part == NINF) & (t_part == NINF)
            cross = tl.sum(tl.where(empty, part, term), 0)
    return s_max, t_max, h_max, zs, zt, zh, cross, s_most, t_most, spread


@triton.jit
def tell_tail(shared, part, frame, z, PARTS: tl.constexpr):
    tell(shared, 18, part, frame, PARTS)
    tell(shared, 19, part, z, PARTS)


@triton.jit
def tail_of(shared, parts, PARTS: tl.constexpr):
    """The frame and the sum of a row's tail from those of its programs."""
    part = told(shared, 18, parts, LOWEST, PARTS)
    frame = tl.max(part, 0)
    z = told(shared, 19, parts, 0.0, PARTS)
    return frame, tl.sum(z * tl.exp2((part - frame) * LOG2E), 0)


@triton.jit
def values_of(shared, first: tl.constexpr, parts, PARTS: tl.constexpr):
    value0 = tl.sum(told(shared, first, parts, 0.0, PARTS), 0)
    return value0, tl.sum(told(shared, first + 1, parts, 0.0, PARTS), 0)


@triton.jit
def top_of(shared, parts, PARTS: tl.constexpr):
    """Both logits of the largest of the slices' top classes."""
    s = told(shared, 12, parts, NINF, PARTS)
    s_top = tl.max(s, 0)
    t = told(shared, 13, parts, NINF, PARTS)
    return s_top, tl.max(tl.where(s == s_top, t, NINF), 0)
