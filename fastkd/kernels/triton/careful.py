"""Rows for which p and q formed apart have too few digits, read twice more: the first time for the
divergence and what the gradient needs of the whole row, the second time for the gradient.

- Rows with infinities, or with logits far above those that the row begins with.
- Rows where student and teacher agree, for p and q formed apart are each rounded as if they did
  not. With x = ln(q / p), the difference of the logits (`difference` in math.py) less the logarithm
  of both sums' quotient, q - p is p expm1(x); and the sum of all q - p, which has to be 0, tells
  what that logarithm is off by (`corrected`). So T large, or both sure of one class, costs no
  digits.
- Rows where what a class has of the divergence is nearly the mean (`has_digits` in sums.py): that
  is then relative to a class of which the student has most (`top_class`), where it is exactly 0.
"""

import triton
import triton.language as tl

from .classes import logits_of, where_kept
from .exchange import CAREFUL_VALUES, S_TOP, T_TOP, count_in, meet, tell, top_of, values_of
from .fast import both_sides, write_gradient
from .load import each_tile, load_student, load_teacher, positions, to_float
from .math import LN2, LOG2E, NINF, difference, excess, expm1, log_terms, mixture_terms
from .sums import soft_term, target_terms
from .types import FORWARD, MIXTURE, REVERSE, Factors, Given, Logs, Offsets, Reference, Tile


@triton.constexpr_function
def narrow_tile(tile):
    """A tile of one vector a thread, for the registers. Others have two of float32: with these,
    Triton 3.7.1 spills 38 times in the loops of split rows on sm_90."""
    block, lane, vector, g_vector = tile  # to Triton 3.6's interpreter it is a plain tuple
    return Tile(block // 2 if lane == 4 else block, lane, vector, g_vector)


@triton.jit
def top_class(row, unit, lanes, most, KIND: tl.constexpr, TILE: tl.constexpr):
    """Both sides' logits of the student's largest class, which is one of the few of the lane whose
    part is `most`; -inf where there is none."""
    BLOCK: tl.constexpr = TILE.block
    LANE: tl.constexpr = TILE.lane
    lane = tl.max(tl.where(lanes == most, tl.arange(0, BLOCK // LANE), 0), 0)
    s_top = tl.full([], NINF, tl.float32)
    t_top = s_top
    for start in tl.range(0, row.high, BLOCK * (BLOCK // LANE)):
        place = positions(0, TILE)
        at = start + place // LANE * BLOCK + lane * LANE + place % LANE
        inside = (at >= row.low) & (at < row.high)
        if KIND.decoupled:
            inside = inside & (at != row.label)
        s = to_float(tl.load(row.student + at, mask=inside, other=NINF))
        t = to_float(tl.load(row.teacher + at, mask=inside, other=NINF))
        if KIND.pruned:
            s = tl.where(t < row.threshold, NINF, s)
        if KIND.probs:
            t = logits_of(tl.maximum(t, 0.0), unit, True, True)
        largest = tl.max(tl.max(s, 1), 0)
        other = tl.max(tl.max(tl.where(s == largest, t, NINF), 1), 0)
        t_top = tl.where(largest > s_top, other, t_top)
        s_top = tl.maximum(s_top, largest)
    return s_top, t_top


@triton.jit
def careful_tile(
    row, given, state, start, KIND: tl.constexpr, TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to the sums of `careful_pass`, and its gradient."""
    given, reference = given
    value0, value1, excessive, common = state
    scales = given.scales
    factors = given.factors
    s = load_student(row, start, TILE, RAGGED, GRADIENT)
    t = load_teacher(row, start, TILE, RAGGED, GRADIENT)
    kept, t, _log_q, _log_p, q, p = both_sides(row, given, s, t, start, KIND, TILE, RAGGED, True)
    # ln(q / p) is x, and d what it is more than at the class that both sides are relative to, where
    # d is 0 however products and sums are fused, as it is where the logits agree. Both are finite
    # wherever the logits are: log_q may overflow at the lowest of them.
    d = difference(
        s, t, reference.s_zero, reference.t_zero, scales.t / scales.s, reference.less,
        reference.less_low,
    )  # fmt: skip
    d *= scales.s
    x = d - reference.log_ratio
    # This has the precision of the logits' difference, where q - p has that of p.
    slope = tl.where(tl.abs(x) < 0.5, p * expm1(x), q - p)
    no_s = s == NINF
    if VALUE:
        excessive += tl.sum(slope, 1)
    if KIND.divergence == FORWARD:
        if VALUE:
            term = excess(p, q, -x, t == NINF, no_s)
            value0 += tl.sum(where_kept(kept, term, 0.0, KIND, RAGGED), 1)
        slope = tl.where(no_s, 0.0, slope)
    else:
        if KIND.divergence == REVERSE:
            if VALUE:
                term = excess(q, p, x, no_s, t == NINF)
                value0 += tl.sum(where_kept(kept, term, 0.0, KIND, RAGGED), 1)
            bracket = d
            share = q
        if KIND.divergence == MIXTURE:
            # ln(q / m), likewise: its exponential is q / p over beta + (1 - beta) q / p.
            beta = factors.beta
            p_per_q = reference.p_per_q
            near = tl.abs(d) < tl.where(p_per_q > 0, 0.5, 0.0)
            change = tl.where(near, p_per_q * expm1(-d), tl.exp2(-x * LOG2E) - p_per_q)
            bracket, _ = log_terms(change * (beta / ((1.0 - beta) + beta * p_per_q)))
            bracket = -bracket
            share = (1.0 - beta) * q
            if VALUE:
                _, from_p, from_q = mixture_terms(p, q, slope, beta)
                value0 += tl.sum(from_p, 1)
                value1 += tl.sum(from_q, 1)
        if VALUE:
            common += tl.sum(tl.where(q > 0, q * bracket, 0.0), 1)
        slope = tl.where(q > 0, share * (bracket - factors.divergence), 0.0)
    if GRADIENT:
        write_gradient(row, given, s, q, slope, kept, start, KIND, TILE, RAGGED, True)
    return value0, value1, excessive, common


@triton.jit
def careful_pass(
    row, given, reference, KIND: tl.constexpr, ROW_TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The divergence, or of a mixture KL(p || m) and KL(q || m); the sum of q - p; and what all
    classes' brackets have in common, which the gradient takes off them."""
    TILE: tl.constexpr = narrow_tile(ROW_TILE)
    zero = tl.zeros([TILE.block // TILE.lane], tl.float32)
    value0, value1, excessive, common = each_tile(
        careful_tile, row, (given, reference), (zero, zero, zero, zero), KIND, TILE, True, VALUE,
        GRADIENT,
    )  # fmt: skip
    return tl.sum(value0, 0), tl.sum(value1, 0), tl.sum(excessive, 0), tl.sum(common, 0)


@triton.jit
def relative_to(s_top, t_top, read, given, KIND: tl.constexpr, PARTS: tl.constexpr):
    """Offsets and logarithms of the sums under the logits of the top class, if these are finite,
    and the Reference."""
    offsets = read.offsets
    scales = read.scales
    s_offset = offsets.s
    t_offset = offsets.t
    s_log = given.logs.s
    t_log = given.logs.t
    finite = (s_top < float("inf")) & (t_top < float("inf"))
    if finite & (s_top > NINF) & (t_top > NINF):
        s_log -= (s_top - s_offset) * (scales.s * LOG2E)
        t_log -= (t_top - t_offset) * (scales.t * LOG2E)
        s_offset = s_top
        t_offset = t_top
    # Below what its roundings make of it there is no ratio.
    s_log = tl.where(tl.abs(s_log - t_log) < 6e-6, t_log, s_log)
    log_ratio = (s_log - t_log) * LN2
    # Where the teacher lacks that class, relative to one that it lacks.
    p_per_q = tl.where(t_top > NINF, tl.exp2(log_ratio * LOG2E), 0.0)
    own = t_offset + scales.shift if KIND.probs and PARTS > 1 else t_offset
    ratio = scales.t / scales.s
    s_zero = tl.where(ratio == 1, 0.0, s_offset)
    t_zero = tl.where(ratio == 1, 0.0, own)
    zero = tl.full([], 0.0, tl.float32)
    less = difference(s_offset, own, s_zero, t_zero, ratio, zero, zero)
    less_low = difference(s_offset, own, s_zero, t_zero, ratio, less, zero)
    reference = Reference(log_ratio, p_per_q, s_zero, t_zero, less, less_low)
    return Offsets(s_offset, t_offset, offsets.h), own, Logs(s_log, t_log), reference


@triton.jit
def corrected(soft, excessive, beta, KIND: tl.constexpr):
    """The soft term less what it has of the sum of q - p, which is 0 but for the rounding of both
    sums' logarithms; and the logarithm of what q is too large by."""
    excessive = tl.where(tl.abs(excessive) < 0.5, excessive, 0.0)
    log, second = log_terms(excessive)
    if KIND.divergence == FORWARD:
        soft -= excessive * log - second
    if KIND.divergence == REVERSE:
        soft = (soft - second) / (1.0 + excessive)
    if KIND.divergence == MIXTURE:  # such rows are close: the second order suffices
        soft -= beta * (1.0 - beta) * 0.5 * excessive * excessive
    return soft, log


@triton.jit
def careful_row(
    row, given, read, label, weights, target, meetings, slice, KIND: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The soft and the target term of a careful row, whose gradient is written, and whether this
    program is the last of the row's. `target`: as fast formulas have it, where there is one."""
    sums = read.sums
    scales = given.scales
    factors = given.factors
    # Relative to a class of which the student has much, if the teacher has it at all.
    s_top, t_top = top_class(row, scales.unit, read.lanes, read.most, KIND, TILE)
    if KIND.probs and PARTS > 1:
        t_top -= scales.shift
    if PARTS > 1:
        tell(slice, S_TOP, s_top, PARTS)
        tell(slice, T_TOP, t_top, PARTS)
        meetings += 1
        meet(slice, meetings)
        s_top, t_top = top_of(slice, PARTS)
    offsets, t_own, logs, reference = relative_to(s_top, t_top, read, given, KIND, PARTS)
    own = Offsets(offsets.s, t_own, offsets.h)
    given = Given(own, scales, logs, given.hard, factors)
    value0, value1, excessive, common = careful_pass(row, given, reference, KIND, TILE, True, False)
    if PARTS > 1:
        tell(slice, CAREFUL_VALUES, value0, PARTS)
        tell(slice, CAREFUL_VALUES + 1, value1, PARTS)
        tell(slice, CAREFUL_VALUES + 2, excessive, PARTS)
        tell(slice, CAREFUL_VALUES + 3, common, PARTS)
        meetings += 1
        meet(slice, meetings)
        value0, value1 = values_of(slice, CAREFUL_VALUES, PARTS)
        excessive, common = values_of(slice, CAREFUL_VALUES + 2, PARTS)
    soft = soft_term(value0, value1, sums, read.nans, factors.beta, KIND)
    soft, excessive = corrected(soft, excessive, factors.beta, KIND)
    log_ratio = reference.log_ratio
    of_target = factors.target
    if KIND.decoupled:
        no_s = sums.s == 0
        no_t = sums.t == 0
        target, of_target, _ = target_terms(
            label, offsets, scales,
            Logs(tl.where(no_s, NINF, logs.s), tl.where(no_t, NINF, logs.t)),
            tl.where(no_s | no_t, float("inf"), log_ratio), excessive, weights.target,
        )  # fmt: skip
    if KIND.gradient:
        logs = Logs(logs.s + excessive * LOG2E, logs.t)
        factors = Factors(factors.soft, factors.hard, of_target, common, factors.beta)
        reference = Reference(
            log_ratio + excessive, reference.p_per_q, reference.s_zero, reference.t_zero,
            reference.less, reference.less_low,
        )  # fmt: skip
        careful_pass(
            row, Given(own, scales, logs, given.hard, factors), reference, KIND, TILE, False, True
        )
    last = tl.full([], 1, tl.int1)
    if PARTS > 1:
        last = count_in(slice.counter) == (meetings + 1) * slice.parts - 1
    return soft, target, last
