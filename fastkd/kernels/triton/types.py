"""What travels between the functions of a kernel, as named tuples.

`Kind` and `Tile` are known to the compiler. All others are values of the program at run time:
scalars, pointers, or tensors of one value per lane of a tile where the field says so.
`s` is the student's side, `t` the teacher's, `h` that of the hard term, which has the student's
logits at T = 1.
"""

from typing import Any, NamedTuple

import triton.language as tl

from ... import spec

# Which divergence D(p, q) is computed: none, or one of spec.py.
NONE, FORWARD, REVERSE, MIXTURE = (
    tl.constexpr(x) for x in (-1, spec.FORWARD, spec.REVERSE, spec.MIXTURE)
)

# Arguments of the kernels whose value is no reason to compile another kernel, be it a size or
# stride of 1 or one divisible by 16.
UNSPECIALISED = (
    "N parts columns inner vocab width s_shift s_outer s_inner t_shift t_outer t_inner "
    "g_shift g_outer g_inner shift outer inner_stride"
).split()


class Kind(NamedTuple):
    """What a launch computes."""

    divergence: int
    pruned: bool  # only classes whose teacher's logit reaches a threshold are kept
    probs: bool  # the teacher's rows hold probabilities
    decoupled: bool  # the label is left out of the divergence and has a term of its own
    hard: bool
    tail: bool  # beside a hard term, the student has classes from vocab_size on
    labels: bool
    gradient: bool


class Tile(NamedTuple):
    """The columns that a program reads at a time: [block // lane, lane], a row of them a lane."""

    block: int
    lane: int
    vector: int  # elements of a vector, where all rows of both sides lie alike in it; else 1
    g_vector: int  # the same of both sides and the gradient


class Strided(NamedTuple):
    """Rows in memory: row a * inner + b begins at base + shift + a * outer + b * inner_stride."""

    base: Any
    shift: Any
    outer: Any
    inner_stride: Any


class Row(NamedTuple):
    """Columns [low, high) of a row or of a slice of one, counted from the whole vector before."""

    student: Any  # pointers, as the two that follow
    teacher: Any
    gradient: Any
    low: Any
    high: Any
    label: Any  # the label's column; that of another slice is outside of [low, high)
    threshold: Any  # the teacher's value that classes must reach to be kept, where pruned


class Slice(NamedTuple):
    """What the programs of one row meet by, and which of them this is; see exchange.py."""

    counter: Any  # a pointer: how many programs were counted in
    shared: Any  # a pointer: [SHARED, PARTS] float32
    part: Any
    parts: Any


class Label(NamedTuple):
    """Both sides' logits of the label, read before the gradient can be written over them."""

    s: Any
    t: Any


class Weights(NamedTuple):
    """What each term of a row counts."""

    soft: Any
    hard: Any
    target: Any


class Terms(NamedTuple):
    """The terms of a row."""

    soft: Any
    hard: Any
    target: Any


class Offsets(NamedTuple):
    """What is subtracted from the logits before they are divided by T and become exponents."""

    s: Any
    t: Any
    h: Any


class Scales(NamedTuple):
    """1 / T of both sides, the teacher's times ln 2 where its logits are log2 of probabilities."""

    s: Any
    t: Any
    unit: Any  # what probabilities are multiplied by before their logarithm is taken
    shift: Any  # log2 of it; each slice of a row has its own


class Sums(NamedTuple):
    """Sums over a row's classes, all in powers of two."""

    s: Any  # the sum of exp((s - offset) / T)
    t: Any
    h: Any  # over all classes but the label, at T = 1
    cross: Any  # a exp * log2(a / b) summed before normalisation; a mixture has none
    s_most: (
        Any  # the largest part of `s` that fell to one lane, nearly all in a row sure of a class
    )
    t_most: Any
    spread: Any  # how far the lanes' parts of `cross` are from the mean, of the reverse divergence


class Read(NamedTuple):
    """What the first read of a row found."""

    offsets: Any
    scales: Any
    sums: Any
    sound: Any  # neither did a sum overflow nor is a logit infinite or NaN, as far as sums tell
    nans: Any  # how many logits of the student are NaN: those that are not kept are in no sum
    lanes: Any  # one per lane: the parts of `sums.s`
    most: Any  # the largest of these in this slice


class Logs(NamedTuple):
    """log2 of the sums of both sides."""

    s: Any
    t: Any


class Hard(NamedTuple):
    """The softmax of the hard term: exp2((s - offset) log2(e) - log) over all classes."""

    offset: Any
    log: Any
    slope: Any  # the term's derivative at the label


class Tail(NamedTuple):
    """The classes from vocab_size on, but the label: an offset that no logit is above, and the sum
    of exp(s - offset)."""

    offset: Any
    sum: Any


class Factors(NamedTuple):
    """What the terms count in the gradient, and what the soft term's formula takes besides."""

    soft: Any
    hard: Any
    target: Any
    divergence: Any  # what the gradient takes off every class's bracket
    beta: Any


class Given(NamedTuple):
    """What the second read of a row takes of its first."""

    offsets: Any
    scales: Any
    logs: Any
    hard: Any
    factors: Any


class Reference(NamedTuple):
    """The class that both sides of a careful row are relative to; see careful.py."""

    log_ratio: Any  # ln(p / q) there
    p_per_q: Any  # its exponential; 0 where the teacher lacks the class
    s_zero: Any  # its logits, or 0 where both temperatures are alike
    t_zero: Any
    less: Any  # the difference of its logits less the zeros, in two parts
    less_low: Any
