"""Which classes a tile has: those that are kept, a teacher's probabilities as logits."""

import triton
import triton.language as tl

from .load import positions
from .math import log2_of


@triton.jit
def kept_classes(row, t, start, KIND: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr):
    """The mask of a tile `t` of the teacher as it is stored, or True where it needs none. The tile
    of a label that is set apart counts as ragged. What has no logarithm and a NaN is kept, and
    spoils its row."""
    if KIND.pruned or RAGGED:
        kept = ~(t < row.threshold)
        if KIND.probs:
            kept = kept | (t < 0)
        if RAGGED:
            at = positions(start, TILE)
            inside = (at >= row.low) & (at < row.high)
            if KIND.decoupled:
                inside = inside & (at != row.label)
            kept = (kept & inside) if KIND.pruned else inside
        return kept
    else:
        return True


@triton.jit
def where_kept(kept, x, other: tl.constexpr, KIND: tl.constexpr, RAGGED: tl.constexpr):
    """`x` of the classes kept and `other` elsewhere; `kept` as from kept_classes."""
    if KIND.pruned or RAGGED:
        return tl.where(kept, x, other)
    else:
        return x


@triton.jit
def logits_of(t, unit, PROBS: tl.constexpr, EXACT: tl.constexpr):
    """A teacher's logits; those of probabilities P are log2(unit P), the unit being a power of two
    that brings every P > 0 above the subnormal numbers, which the logarithm takes for 0. EXACT:
    where it is compared with a logit that may be close."""
    if PROBS:
        return tl.log2(t * unit) if EXACT else log2_of(t * unit)
    else:
        return t


@triton.jit
def unit_of(largest, PROBS: tl.constexpr):
    """The unit for a row with this largest probability, and log2 of it."""
    shift = tl.full([], 0.0, tl.float32)
    if PROBS:
        shift = tl.where(largest < 2.0**104, 23.0, 0.0)
    return tl.exp2(shift), shift
