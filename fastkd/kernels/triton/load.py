"""How a row lies in memory and is walked over: its edges, its tiles, the loop over them.

Tiles are [block // lane, lane]: one thread holds a row of one, so that a reduction over axis 1
needs no other thread, and sums over a row are kept per lane until its end.
"""

import triton
import triton.language as tl

from .math import INTERPRETED, NINF
from .types import NONE, Label, Weights


@triton.jit
def to_float(x):
    """`x` in float32. bfloat16 by a shift: fewer instructions than the conversion, and in Triton's
    interpreter exact, whose conversion loses subnormals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_stored(x, dtype: tl.constexpr):
    """`x` as it is stored, rounded to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        bits = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def row_offset(row, shift, inner, outer_stride, inner_stride):
    """Elements before row = a * inner + b; in 64 bits, for rows * V exceeds 2^31."""
    row = tl.cast(row, tl.int64)
    return shift + row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def step_back(base, offset, columns, VECTOR: tl.constexpr):
    """`columns` before base + offset: tiles from there on begin with a whole vector."""
    return base + tl.multiple_of(offset - columns, VECTOR)


@triton.jit
def open_row(row, student, teacher, dstudent, inner, TILE: tl.constexpr, GRADIENT: tl.constexpr):
    """Where a row of these Strided begins, stepped back to a whole vector by the columns before
    `low`, and `low`."""
    s_row = row_offset(row, student.shift, inner, student.outer, student.inner_stride)
    t_row = row_offset(row, teacher.shift, inner, teacher.outer, teacher.inner_stride)
    low = (s_row % TILE.vector).to(tl.int32)
    s_row = step_back(student.base, s_row, low, TILE.vector)
    t_row = step_back(teacher.base, t_row, low, TILE.vector)
    g_row = s_row
    if GRADIENT:
        g_row = row_offset(row, dstudent.shift, inner, dstudent.outer, dstudent.inner_stride)
        g_row = step_back(dstudent.base, g_row, low, TILE.g_vector)
    return s_row, t_row, g_row, low


@triton.jit
def load_weights(row, pointers, KIND: tl.constexpr):
    """The row's weights, 0 of a term that is not computed."""
    soft = tl.full([], 0.0, tl.float32)
    hard = soft
    target = soft
    if KIND.divergence != NONE:
        soft = tl.load(pointers.soft + row)
    if KIND.hard:
        hard = tl.load(pointers.hard + row)
    if KIND.decoupled:
        target = tl.load(pointers.target + row)
    return Weights(soft, hard, target)


@triton.jit
def load_label(row, labels, classes, KIND: tl.constexpr):
    """The row's label, and whether it is one of so many classes."""
    label = tl.full([], 0, tl.int64)
    valid = True
    if KIND.labels:
        label = tl.load(labels + row)
        valid = (label >= 0) & (label < classes)
    return label.to(tl.int32), valid


@triton.jit
def label_logits(row, KIND: tl.constexpr):
    """The label's logits, for the terms that take them: to be read before any thread, here or at
    another slice, can have written the gradient over them."""
    s = tl.full([], 0.0, tl.float32)
    t = s
    if KIND.hard or KIND.decoupled:
        s = to_float(tl.load(row.student + row.label))
    if KIND.decoupled:
        t = to_float(tl.load(row.teacher + row.label))
    return Label(s, t)


@triton.jit
def edges(low, high, BLOCK: tl.constexpr):
    """Columns [low, high), of a row stepped back by `low`, as tiles: those that are not whole begin
    at edge * full for edge in range(begin, end), the whole ones are range(first, full, BLOCK).

    Only the first tile and the last can be ragged. Only those two are masked, in a loop of its own.
    """
    full = high // BLOCK * BLOCK
    first = tl.where(low > 0, BLOCK, 0)
    begin = tl.where((low > 0) | (full == 0), 0, 1)
    end = tl.where((high > full) & (full > 0), 2, 1)
    return begin, end, first, full


@triton.jit
def beside_label(label, end, first, full, BLOCK: tl.constexpr, LABEL: tl.constexpr):
    """The whole tile that holds the label joins the masked ones, as their last, and the loop over
    whole tiles skips it. Returns where it begins, the new end of the masked tiles and that of the
    whole ones; `end`, `first` and `full` are what `edges` returned."""
    label_tile = full
    if LABEL:
        holds = ((label >= first) & (label < full)).to(tl.int32)
        label_tile = tl.where(holds > 0, label // BLOCK * BLOCK, full)
        return label_tile, end + holds, full - holds * BLOCK
    else:
        return label_tile, end, full


@triton.jit
def masked_start(edge, end, full, label_tile, LABEL: tl.constexpr):
    """Where the masked tile number `edge` begins; `end` is what `edges` returned, the number of the
    label's tile."""
    return tl.where(edge == end, label_tile, edge * full) if LABEL else edge * full


@triton.jit
def whole_start(start, label_tile, BLOCK: tl.constexpr, LABEL: tl.constexpr):
    """`start`, moved past the label's tile."""
    return start + tl.where(start >= label_tile, BLOCK, 0) if LABEL else start


@triton.jit
def each_tile(
    fn: tl.constexpr, row, given, state, KIND: tl.constexpr, TILE: tl.constexpr,
    BACKWARD: tl.constexpr,  # begins at the row's end: that is what the L2 cache still holds
    VALUE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """state = fn(row, given, state, start, KIND, TILE, VALUE, GRADIENT, RAGGED) for every tile of
    the row, those that need masks in a loop of their own: the row's ends, and the tile of a label
    that is treated otherwise than other classes."""
    BLOCK: tl.constexpr = TILE.block
    LABEL: tl.constexpr = KIND.decoupled or KIND.hard
    begin, end, first, full = edges(row.low, row.high, BLOCK)
    label_tile, masked, whole = beside_label(row.label, end, first, full, BLOCK, LABEL)
    if BACKWARD:
        for edge in tl.range(begin, masked):
            start = masked_start(edge, end, full, label_tile, LABEL)
            state = fn(row, given, state, start, KIND, TILE, VALUE, GRADIENT, True)
        for forward in tl.range(first, whole, BLOCK):
            start = whole_start(whole - BLOCK + first - forward, label_tile, BLOCK, LABEL)
            state = fn(row, given, state, start, KIND, TILE, VALUE, GRADIENT, False)
    else:
        for forward in tl.range(first, whole, BLOCK):
            start = whole_start(forward, label_tile, BLOCK, LABEL)
            state = fn(row, given, state, start, KIND, TILE, VALUE, GRADIENT, False)
        for edge in tl.range(begin, masked):
            start = masked_start(edge, end, full, label_tile, LABEL)
            state = fn(row, given, state, start, KIND, TILE, VALUE, GRADIENT, True)
    return state


@triton.jit
def positions(start, TILE: tl.constexpr):
    """The columns of the tile that begins at `start`."""
    return tl.reshape(start + tl.arange(0, TILE.block), [TILE.block // TILE.lane, TILE.lane])


@triton.jit
def load_tile(
    pointer, start, low, high, TILE: tl.constexpr, RAGGED: tl.constexpr,
    LAST: tl.constexpr,  # the row is not read again: its lines may leave the cache
):  # fmt: skip
    """float32 [block // lane, lane], -inf outside [low, high), where nothing is read."""
    VECTOR: tl.constexpr = TILE.vector
    columns = tl.multiple_of(start, VECTOR) + tl.arange(0, TILE.block)
    policy: tl.constexpr = "evict_first" if LAST else ""
    if RAGGED:
        vector = columns // VECTOR * VECTOR
        whole = (vector >= low) & (vector + VECTOR <= high)
        x = tl.load(pointer + columns, mask=whole, other=NINF, eviction_policy=policy)
        if VECTOR > 1:  # the vectors that the row begins and ends in, by columns
            inside = (columns >= low) & (columns < high) & ~whole
            edge = tl.load(pointer + columns, mask=inside, other=NINF, eviction_policy=policy)
            x = tl.where(whole, x, edge)
    else:
        x = tl.load(pointer + columns, eviction_policy=policy)
    return tl.reshape(to_float(x), [TILE.block // TILE.lane, TILE.lane])


@triton.jit
def store_tile(pointer, values, start, low, high, TILE: tl.constexpr, RAGGED: tl.constexpr):
    """Writes what load_tile reads, rounded to the pointer's dtype."""
    VECTOR: tl.constexpr = TILE.g_vector
    columns = tl.multiple_of(start, VECTOR) + tl.arange(0, TILE.block)
    values = to_stored(tl.reshape(values, [TILE.block]), pointer.dtype.element_ty)
    if RAGGED:
        vector = columns // VECTOR * VECTOR
        whole = (vector >= low) & (vector + VECTOR <= high)
        tl.store(pointer + columns, values, mask=whole, eviction_policy="evict_first")
        if VECTOR > 1:  # the vectors that the row begins and ends in, by columns
            inside = (columns >= low) & (columns < high) & ~whole
            tl.store(pointer + columns, values, mask=inside, eviction_policy="evict_first")
    else:
        tl.store(pointer + columns, values, eviction_policy="evict_first")


@triton.jit
def load_student(row, start, TILE: tl.constexpr, RAGGED: tl.constexpr, LAST: tl.constexpr):
    return load_tile(row.student, start, row.low, row.high, TILE, RAGGED, LAST)


@triton.jit
def load_teacher(row, start, TILE: tl.constexpr, RAGGED: tl.constexpr, LAST: tl.constexpr):
    return load_tile(row.teacher, start, row.low, row.high, TILE, RAGGED, LAST)


@triton.jit
def store_gradient(row, values, start, TILE: tl.constexpr, RAGGED: tl.constexpr):
    store_tile(row.gradient, values, start, row.low, row.high, TILE, RAGGED)


@triton.jit
def fill(row, value, TILE: tl.constexpr):
    """Writes one value as the gradient of every class."""
    BLOCK: tl.constexpr = TILE.block
    values = tl.zeros([BLOCK], tl.float32) + value
    begin, end, first, full = edges(row.low, row.high, BLOCK)
    for start in tl.range(first, full, BLOCK):
        store_gradient(row, values, start, TILE, False)
    for edge in tl.range(begin, end):
        store_gradient(row, values, edge * full, TILE, True)


@triton.jit
def fill_tail(row, high, stop, TILE: tl.constexpr):
    """Writes zeros as the gradient of the columns [high, stop)."""
    BLOCK: tl.constexpr = TILE.block
    for start in tl.range(high // BLOCK * BLOCK, stop, BLOCK):
        zeros = tl.zeros([BLOCK], tl.float32)
        store_tile(row, zeros, start, high, stop, TILE, True)
