"""The classes from vocab_size on, which the student has alone: the hard term's softmax is over them
as well, and of all terms only its gradient reaches them.

A call in which there are none, or no hard term, is compiled without all of this. Otherwise they are
read by loops that take every tile for a ragged one, the tiles in turn by the programs of a row.
"""

import triton
import triton.language as tl

from .load import LOG2E, NINF, load_tile, positions, store_tile
from .sums import hard_slope

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tail_sums(
    s_row, high, stop, at_label, part, parts,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Of this program's tiles of the columns [high, stop) but the label: a number that no logit is
    above, but for NaN, and the sum of exp(s - that). 0 beside the lowest number where all are
    -inf."""
    top = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    z = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(high // BLOCK * BLOCK + part * BLOCK, stop, parts * BLOCK):
        s = load_tile(s_row, start, high, stop, VECTOR, BLOCK, LANE, True, False)
        s = tl.where(positions(start, BLOCK, LANE) == at_label, NINF, s)
        above = tl.maximum(top, tl.max(s, 1))
        z *= tl.exp2((top - above) * LOG2E)
        z += tl.sum(tl.exp2((s - above[:, None]) * LOG2E), 1)
        top = above
    whole = tl.max(top, 0)
    return whole, tl.sum(z * tl.exp2((top - whole) * LOG2E), 0)


@triton.jit
def joined(h_max, zh, tail_max, tail_z, label_logit):
    """A frame of all classes, and the sum over all but the label: of sums over some and over the
    others."""
    h_max = tl.where(zh == 0, NINF, h_max)  # whatever stood in for it
    top = tl.maximum(tl.maximum(h_max, tail_max), label_logit)
    return top, zh * tl.exp2((h_max - top) * LOG2E) + tail_z * tl.exp2((tail_max - top) * LOG2E)


@triton.jit
def write_tail(
    s_row, g_row, high, stop, at_label, h_max, h_log, label_slope, hard_weight, part, parts,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """The gradient there, of the hard term alone; NaN where h_log is."""
    for start in tl.range(high // BLOCK * BLOCK + part * BLOCK, stop, parts * BLOCK):
        s = load_tile(s_row, start, high, stop, VECTOR, BLOCK, LANE, True, True)
        slope = hard_slope(s, start, at_label, h_max, h_log, label_slope, True, BLOCK, LANE)
        gradient = hard_weight * slope
        gradient = tl.where(hard_weight != 0, gradient, 0.0)
        store_tile(g_row, gradient, start, high, stop, G_VECTOR, BLOCK, True)
