"""The second read of ordinary rows: the divergence, and the gradient, which it writes.

p and q are formed apart, each from its own logits, offset and sum. Rows for which that leaves too
few digits are careful.py's.
"""

import triton
import triton.language as tl

from .classes import kept_classes, logits_of, where_kept
from .exchange import VALUES, count_in, tell, values_of
from .load import each_tile, load_student, load_teacher, positions, store_gradient
from .math import LN2, LOG2E, NINF, mixture_terms
from .sums import hard_slope
from .types import FORWARD, MIXTURE, NONE, REVERSE


@triton.jit
def both_sides(row, given, s, t, start, KIND: tl.constexpr, TILE: tl.constexpr,
               RAGGED: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The mask of the classes kept, the teacher's logits, log2 q, log2 p, q and p of a tile."""
    kept = kept_classes(row, t, start, KIND, TILE, RAGGED)
    t = logits_of(t, given.scales.unit, KIND.probs, EXACT)
    ds = s - given.offsets.s
    dt = t - given.offsets.t
    # The logarithm of a sum is subtracted by itself: added to the offset first, it would be rounded
    # as a logit is.
    log_q = ds * (given.scales.s * LOG2E) - given.logs.s
    log_p = dt * (given.scales.t * LOG2E) - given.logs.t
    log_q = where_kept(kept, log_q, NINF, KIND, RAGGED)
    log_p = where_kept(kept, log_p, NINF, KIND, RAGGED)
    return kept, t, log_q, log_p, tl.exp2(log_q), tl.exp2(log_p)


@triton.jit
def write_gradient(
    row, given, s, q, slope, kept, start, KIND: tl.constexpr, TILE: tl.constexpr,
    RAGGED: tl.constexpr,
    GUARDED: tl.constexpr,  # a term without weight may have slopes that are not finite
):  # fmt: skip
    """Writes a tile's gradient: the soft term's slope by its factor, and the other terms'."""
    factors = given.factors
    if KIND.divergence != NONE:
        gradient = factors.soft * slope
        if GUARDED:
            gradient = tl.where(factors.soft != 0, gradient, 0.0)
        if KIND.decoupled:  # the label takes what it gains from the others, by their shares
            share = factors.target * q
            gradient -= tl.where(factors.target != 0, share, 0.0) if GUARDED else share
        if GUARDED and KIND.pruned:
            gradient = tl.where(kept, gradient, 0.0)
    if KIND.decoupled and RAGGED:
        label = (positions(start, TILE) == row.label) & (s > NINF)
        gradient = tl.where(label, factors.target, gradient)
    if KIND.hard:
        # The label in the same sum: there the two terms nearly cancel, before any rounding.
        hard = factors.hard * hard_slope(row, s, start, given.hard, RAGGED, TILE)
        if KIND.divergence == NONE:
            gradient = hard
        else:
            gradient += tl.where(factors.hard != 0, hard, 0.0) if GUARDED else hard
    store_gradient(row, gradient, start, TILE, RAGGED)


@triton.jit
def fast_tile(
    row, given, state, start, KIND: tl.constexpr, TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile adds to the divergence, and its gradient."""
    value0, value1 = state
    s = load_student(row, start, TILE, RAGGED, GRADIENT)
    kept = True
    q = s
    slope = s
    if KIND.divergence != NONE:
        t = load_teacher(row, start, TILE, RAGGED, GRADIENT)
        kept, t, log_q, log_p, q, p = both_sides(row, given, s, t, start, KIND, TILE, RAGGED, False)
        slope = q - p
        if KIND.divergence == MIXTURE:
            beta = given.factors.beta
            log, from_p, from_q = mixture_terms(p, q, slope, beta)
            if VALUE:
                value0 += tl.sum(from_p, 1)
                value1 += tl.sum(from_q, 1)
            slope = (1.0 - beta) * q * (log - given.factors.divergence)
        else:
            # sum(q - p) is 0: with it the errors of both normalisers cancel to first order.
            if KIND.divergence == FORWARD:
                term = p * (log_p - log_q)
                remainder = slope
            else:
                term = q * (log_q - log_p)
                remainder = -slope
                slope = q * ((log_q - log_p) * LN2 - given.factors.divergence)
            term = where_kept(kept, term, 0.0, KIND, RAGGED)
            if KIND.divergence == REVERSE:  # q - p is 0 - 0 elsewhere
                slope = where_kept(kept, slope, 0.0, KIND, RAGGED)
            if VALUE:
                value0 += tl.sum(term, 1)
                value1 += tl.sum(remainder, 1)
    if GRADIENT:
        write_gradient(
            row, given, s, q, slope, kept, start, KIND, TILE, RAGGED, KIND.divergence == MIXTURE
        )
    return value0, value1


@triton.jit
def fast_pass(
    row, given, KIND: tl.constexpr, TILE: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The divergence as two sums, in powers of two and what is left, or of a mixture KL(p || m) and
    KL(q || m)."""
    zero = tl.zeros([TILE.block // TILE.lane], tl.float32)
    value0, value1 = each_tile(
        fast_tile, row, given, (zero, zero), KIND, TILE, True, VALUE, GRADIENT
    )
    return tl.sum(value0, 0), tl.sum(value1, 0)


@triton.jit
def fast_row(
    row, given, soft, meetings, slice, KIND: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """The soft term of an ordinary row, whose gradient is written, and whether this program is the
    last of the row's. `soft`: what is known of the term, all of it of a mixture."""
    VALUE: tl.constexpr = KIND.divergence != MIXTURE
    last = tl.full([], 1, tl.int1)
    value0 = soft
    value1 = soft
    if KIND.gradient or VALUE:
        value0, value1 = fast_pass(row, given, KIND, TILE, VALUE, KIND.gradient)
    if PARTS > 1:
        if VALUE:
            tell(slice, VALUES, value0, PARTS)
            tell(slice, VALUES + 1, value1, PARTS)
        last = count_in(slice.counter) == (meetings + 1) * slice.parts - 1
        if VALUE:
            if last:
                tl.debug_barrier()
                value0, value1 = values_of(slice, VALUES, PARTS)
    if VALUE:
        soft = value0 * LN2 + value1
    return soft, last
