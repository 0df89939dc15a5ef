"""The first read of a row: its offsets and sums, and the terms that follow from sums alone."""

import triton
import triton.language as tl

from .classes import kept_classes, logits_of, unit_of, where_kept
from .load import each_tile, load_student, load_teacher, positions
from .math import LN2, LOG2E, NINF, binary_divergence, log_terms
from .types import FORWARD, MIXTURE, NONE, REVERSE, Hard, Offsets, Read, Scales, Sums


@triton.jit
def find_offsets(row, end, KIND: tl.constexpr, TILE: tl.constexpr):
    """The maxima of the columns before `end`: of s and of t over the kept classes, of s over all;
    the unit_of the row; and how many NaN s has."""
    s_max = tl.full([TILE.block // TILE.lane], NINF, tl.float32)
    t_max = s_max
    h_max = s_max
    nans = tl.zeros([TILE.block // TILE.lane], tl.int32)
    for start in tl.range(0, end, TILE.block):
        s = load_student(row, start, TILE, True, False)
        t = load_teacher(row, start, TILE, True, False)
        h_max = tl.maximum(h_max, tl.max(s, 1))
        if KIND.pruned:
            nans += tl.sum((s != s).to(tl.int32), 1)
        if KIND.pruned or KIND.decoupled:
            kept = kept_classes(row, t, start, KIND, TILE, True)
            s = tl.where(kept, s, NINF)
            t = tl.where(kept, t, NINF)
        s_max = tl.maximum(s_max, tl.max(s, 1))
        t_max = tl.maximum(t_max, tl.max(t, 1))
    t_offset = tl.max(t_max, 0)
    unit, shift = unit_of(t_offset, KIND.probs)
    if KIND.probs:
        t_offset = logits_of(tl.maximum(t_offset, 0.0), unit, True, False)
    offsets = Offsets(tl.max(s_max, 0), t_offset, tl.max(h_max, 0))
    return offsets, unit, shift, tl.sum(nans, 0)


@triton.jit
def finite(offset):
    return tl.where(offset == NINF, 0.0, offset)


@triton.jit
def sums_tile(
    row, given, state, start, KIND: tl.constexpr, TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to each lane's sums."""
    offsets, scales = given
    zs, zt, zh, cross = state
    s = load_student(row, start, TILE, RAGGED, False)
    if KIND.divergence != NONE:
        t = load_teacher(row, start, TILE, RAGGED, False)
    if KIND.hard:
        h = s
        if RAGGED:
            h = tl.where(positions(start, TILE) == row.label, NINF, s)
        zh += tl.sum(tl.exp2((h - offsets.h) * LOG2E), 1)
    if KIND.divergence != NONE:
        us = (s - offsets.s) * (scales.s * LOG2E)
        ut = (logits_of(t, scales.unit, KIND.probs, False) - offsets.t) * (scales.t * LOG2E)
        kept = kept_classes(row, t, start, KIND, TILE, RAGGED)
        if KIND.pruned or ((KIND.probs or KIND.decoupled) and RAGGED):
            us = tl.where(kept, us, NINF)
            ut = tl.where(kept, ut, NINF)
        es = tl.exp2(us)
        et = tl.exp2(ut)
        zs += tl.sum(es, 1)
        zt += tl.sum(et, 1)
        # NaN or infinite where a logit is; that is how the careful rows are found.
        if KIND.divergence == FORWARD:
            cross += tl.sum(where_kept(kept, et * (ut - us), 0.0, KIND, RAGGED), 1)
        if KIND.divergence == REVERSE:
            cross += tl.sum(where_kept(kept, es * (us - ut), 0.0, KIND, RAGGED), 1)
    return zs, zt, zh, cross


@triton.jit
def find_sums(row, offsets, scales, KIND: tl.constexpr, TILE: tl.constexpr):
    """The sums of a row, and each lane's part of the student's."""
    zero = tl.zeros([TILE.block // TILE.lane], tl.float32)
    zs, zt, zh, cross = each_tile(
        sums_tile, row, (offsets, scales), (zero, zero, zero, zero), KIND, TILE, False, True, False
    )
    spread = tl.sum(zs, 0) * 0.0
    if KIND.divergence == REVERSE:
        spread = tl.sum(tl.abs(cross - zs * (tl.sum(cross, 0) / tl.sum(zs, 0))), 0)
    sums = Sums(
        tl.sum(zs, 0), tl.sum(zt, 0), tl.sum(zh, 0), tl.sum(cross, 0),
        tl.max(zs, 0), tl.max(zt, 0), spread,
    )  # fmt: skip
    return sums, zs


@triton.jit
def first_read(
    row, s_inverse, t_inverse, label, KIND: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """Offsets and sums. The first tile mostly holds a number near enough to the maximum; where it
    does not, the row is read again for its own."""
    zero = tl.full([], 0.0, tl.float32)
    offsets = Offsets(zero, zero, zero)
    sums = Sums(zero, zero, zero, zero, zero, zero, zero)
    lanes = tl.zeros([TILE.block // TILE.lane], tl.float32)
    nans = tl.full([], 0, tl.int32)
    tries = nans
    unit = zero
    shift = zero
    sound = False
    end = row.high if KIND.pruned else tl.minimum(row.high, TILE.block)
    while tries < 2:
        offsets, unit, shift, nans = find_offsets(row, end, KIND, TILE)
        if KIND.hard:
            offsets = Offsets(offsets.s, offsets.t, tl.maximum(offsets.h, label.s))
        # A slice without a finite logit then adds 0 to the sums of its row. A whole row without one
        # is NaN, and without one beside its label it has sums of 0.
        used = offsets
        if (PARTS > 1 or KIND.decoupled) and tries > 0:
            used = Offsets(finite(offsets.s), finite(offsets.t), finite(offsets.h))
        if KIND.tail and tries > 0:  # the tail may have one
            used = Offsets(used.s, used.t, finite(offsets.h))
        sums, lanes = find_sums(row, used, Scales(s_inverse, t_inverse, unit, shift), KIND, TILE)
        sound = sums.s + sums.t + sums.h < 16777216.0
        tries = tl.where(sound, 2, tries + 1)
        end = row.high
    scales = Scales(s_inverse, t_inverse, unit, shift)
    return Read(offsets, scales, sums, sound, nans, lanes, sums.s_most)


@triton.jit
def hard_terms(others, offset, label_logit):
    """The hard term, and the softmax of its gradient. The slope at the label has digits also where
    the row is sure of it: it comes of the sum of the other classes, not of 1 - q."""
    own = tl.exp2((label_logit - offset) * LOG2E)
    total = others + own
    log = tl.log2(total)
    sure = others < own
    near, _ = log_terms(tl.where(sure, others / own, 0.0))
    hard = tl.where(sure, near, log * LN2 + (offset - label_logit))
    return hard, Hard(offset, log, -others / total)


@triton.jit
def hard_slope(row, s, start, hard, LABEL: tl.constexpr, TILE: tl.constexpr):
    """The hard term's derivative by a tile of s; LABEL: the tile may hold the label."""
    slope = tl.exp2((s - hard.offset) * LOG2E - hard.log)
    if LABEL:
        slope = tl.where(positions(start, TILE) == row.label, hard.slope, slope)
    return slope


@triton.jit
def target_terms(label, offsets, scales, logs, log_ratio, excessive, weight):
    """The target term of a decoupled row, what the label gains from the other classes, and the
    difference between the two sides' odds of it. That difference may be far below the odds; so it
    is taken in float64."""
    of_t = (label.t - offsets.t) * scales.t - logs.t * LN2
    of_s = (label.s - offsets.s) * scales.s - logs.s * LN2
    ratio = scales.t.to(tl.float64) / scales.s
    gap = (label.s.to(tl.float64) - offsets.s) - (label.t.to(tl.float64) - offsets.t) * ratio
    gap = (gap * scales.s - log_ratio - excessive).to(tl.float32)
    gap = tl.where(tl.abs(gap) < float("inf"), gap, tl.where(of_s == of_t, 0.0, of_s - of_t))
    term, gain = binary_divergence(of_t, of_s, gap)
    return term, tl.where(weight != 0, weight * scales.s * gain, 0.0), gap


@triton.jit
def quotient_of_sums(sums, logs, KIND: tl.constexpr):
    """KL from the sums alone, and whether that leaves it digits and no logit is infinite."""
    soft = tl.full([], 0.0, tl.float32)
    if KIND.divergence == FORWARD:
        soft = (sums.cross / sums.t - (logs.t - logs.s)) * LN2
    if KIND.divergence == REVERSE:
        soft = (sums.cross / sums.s - (logs.s - logs.t)) * LN2
    return soft, (sums.cross < 1e30) & (soft > 0.01)


@triton.jit
def saturated(from_student, beta):
    """Whether a mixture is nearly as far from q as it can be: KL(q || m) <= -ln(1 - beta)."""
    return from_student > tl.log2(1.0 - beta) * (-LN2 * 0.75)


@triton.jit
def has_digits(sums, soft, beta, KIND: tl.constexpr):
    """Whether p and q formed apart leave the gradient its digits, as far as a small divergence does
    not tell: it may be that of small classes, while the gradient's norm is that of a large one. The
    reverse divergence and mixtures compare what every class has of the divergence with the mean. So
    classes have to differ in it, which they do not where one has all of q, nor where ln(q / p) is
    large and nearly the same of all, nor where p has next to nothing of any that q has."""
    of_s = sums.s_most / sums.s
    apart = tl.abs(of_s - sums.t_most / sums.t) > of_s * (1 / 32)
    enough = apart | (of_s < 0.25)
    if KIND.divergence != FORWARD:
        enough = enough & (of_s < 0.75)
    if KIND.divergence == REVERSE:
        enough = enough & ~(sums.spread * LN2 < sums.s * soft * (1 / 128))
    if KIND.divergence == MIXTURE:
        enough = enough & ~saturated(soft, beta)
    return enough


@triton.jit
def soft_term(value0, value1, sums, nans, beta, KIND: tl.constexpr):
    """The soft term of a mixture or of a careful row, from its one or two divergences."""
    soft = value0
    if KIND.divergence == MIXTURE:
        soft = beta * value0 + (1.0 - beta) * value1
    if KIND.decoupled:  # nothing to match, or no class to match it with
        soft = tl.where(sums.t == 0, 0.0, tl.where(sums.s == 0, float("inf"), soft))
    # A NaN, or a side without a finite logit: its maximum is -inf, and -inf - -inf is NaN.
    if (sums.s != sums.s) | (sums.t != sums.t) | (nans > 0):
        soft = tl.full([], float("nan"), tl.float32)
    return soft


@triton.jit
def loses_gradient(soft, KIND: tl.constexpr):
    """Whether the gradient of a row with this soft term is NaN."""
    lost = soft != soft
    if KIND.divergence == REVERSE:
        lost = lost | (soft == float("inf"))
    return lost
