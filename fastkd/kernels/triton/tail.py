"""The classes from vocab_size on, which the student has alone: the hard term's softmax is over them
as well, and its gradient is the only one that reaches them.

A call in which there are none, or no hard term, is compiled without all of this. Otherwise they are
read by loops that take every tile for a ragged one, the tiles in turn by the programs of a row.
"""

import triton
import triton.language as tl

from .load import load_tile, positions, store_tile
from .math import LOG2E, LOWEST, NINF
from .sums import hard_slope
from .types import Tail


@triton.jit
def read_tail(row, high, stop, part, parts, TILE: tl.constexpr):
    """The Tail of this program's tiles of the columns [high, stop), the sum over all of them but
    the label: 0 beside the lowest number where all are -inf."""
    BLOCK: tl.constexpr = TILE.block
    top = tl.full([BLOCK // TILE.lane], LOWEST, tl.float32)
    z = tl.zeros([BLOCK // TILE.lane], tl.float32)
    for start in tl.range(high // BLOCK * BLOCK + part * BLOCK, stop, parts * BLOCK):
        s = load_tile(row.student, start, high, stop, TILE, True, False)
        s = tl.where(positions(start, TILE) == row.label, NINF, s)
        above = tl.maximum(top, tl.max(s, 1))
        z *= tl.exp2((top - above) * LOG2E)
        z += tl.sum(tl.exp2((s - above[:, None]) * LOG2E), 1)
        top = above
    whole = tl.max(top, 0)
    return Tail(whole, tl.sum(z * tl.exp2((top - whole) * LOG2E), 0))


@triton.jit
def joined(offset, sum, tail, label_logit):
    """An offset for all classes, and the sum over all but the label, from the sum over the classes
    before the tail and from the tail."""
    offset = tl.where(sum == 0, NINF, offset)  # whatever stood in for it
    top = tl.maximum(tl.maximum(offset, tail.offset), label_logit)
    head_part = sum * tl.exp2((offset - top) * LOG2E)
    return top, head_part + tail.sum * tl.exp2((tail.offset - top) * LOG2E)


@triton.jit
def write_tail(row, high, stop, hard, hard_weight, part, parts, TILE: tl.constexpr):
    """Writes the gradient of this program's tiles of the columns [high, stop), that of the hard
    term alone; NaN where the logarithm of the term's sum is."""
    BLOCK: tl.constexpr = TILE.block
    for start in tl.range(high // BLOCK * BLOCK + part * BLOCK, stop, parts * BLOCK):
        s = load_tile(row.student, start, high, stop, TILE, True, True)
        gradient = hard_weight * hard_slope(row, s, start, hard, True, TILE)
        gradient = tl.where(hard_weight != 0, gradient, 0.0)
        store_tile(row.gradient, gradient, start, high, stop, TILE, True)
