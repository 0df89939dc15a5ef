"""One call run: the student's logits as rows, the kernel, and the reduction of its rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import REVERSE
from .call import Call, SparseTeacher


def as_rows(logits: Tensor) -> Tensor:
    """[..., V] as [N, V] or [A, B, V], stride 1 in V: a view wherever two strides give the rows.

    Three dimensions, not only two: ``logits[:, :-1]`` of [batch, sequence, V] needs no copy.
    """
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    dim = logits.dim()
    if 2 <= dim <= 3:
        return logits
    return logits.flatten(0, -3) if dim > 3 else logits.unsqueeze(0)


def is_view(rows: Tensor, logits: Tensor) -> bool:
    """Whether `as_rows` made `rows` without a copy: then they have the strides of `logits`."""
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        return False
    if logits.dim() <= 3:
        return True
    sizes, strides = logits.shape[:-2], logits.stride()[:-2]
    outer = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
    return all(s == n1 * s1 for (_, s), (n1, s1) in pairwise(outer))


# torch sums 32768 numbers on one thread and more on all: in an order that depends on how many.
_SERIAL_SUM = 16384


def _weighted_sum(rows: Tensor, weight: Tensor) -> Tensor:
    """sum_r rows_r weight_r, a scalar; the same bits whatever the number of threads."""
    if rows.numel() > _SERIAL_SUM:
        N = rows.numel()
        weighted = F.pad(rows * weight, (0, -N % _SERIAL_SUM)).view(-1, _SERIAL_SUM)
        return weighted.sum(1).sum()  # by rows: torch splits only what is left over threads
    if rows.is_cpu:  # one op for two, 4 of a call's 60 us; as exact: 1.2e-7 against 1.5e-7 here
        return torch.dot(rows, weight)
    return (rows * weight).sum()


def _float16_scale(
    inv_temperature: Tensor,
    soft: Tensor | None,
    hard: Tensor | None,
    target: Tensor | None,
    *,
    divergence: int,
) -> Tensor:
    """[N] powers of two, each bringing the largest gradient its row's weights allow to about 2^8.

    float16 ends at 6e-8 and a gradient is of the order of 1 / (V N): so it is stored scaled, and
    backward divides. |q - p| <= 1, and the gradient of a mixture's divergence is hardly larger;
    that of the reverse one, and at a large T of all, is of the order of a gap between logits over
    T: 2^4 leaves that room up to 4000.
    Per row: one weight or temperature that is huge, infinite or NaN costs no other row its digits.
    """
    bound = torch.zeros_like(inv_temperature)
    gap = 16 * inv_temperature.square()
    slope = torch.minimum(inv_temperature * (16 if divergence == REVERSE else 1), gap)
    slope = slope.masked_fill(inv_temperature == 0, 1)  # by a weight without T^2, and over V
    for weight in (soft, target):
        if weight is not None:
            bound = bound + weight.abs() * slope
    if hard is not None:
        bound = bound + hard.abs()
    _, exponent = torch.frexp(bound)
    exponent = (8 - exponent).clamp(-100, 100)  # also its inverse is finite
    return torch.where((bound > 0) & (bound < torch.inf), torch.exp2(exponent.to(bound.dtype)), 1)


def _total(rows: Tensor | None, weight: Tensor | None, shape: torch.Size | None) -> Tensor:
    """A term that was computed, weighted: one value per row in `shape`, or the sum of them."""
    assert rows is not None and weight is not None
    return _weighted_sum(rows, weight) if shape is None else (rows * weight).view(shape)


class Terms(NamedTuple):
    """The loss, and beside it every term that was asked for, reduced like the loss."""

    loss: Tensor
    soft: Tensor | None = None
    hard: Tensor | None = None
    target: Tensor | None = None


class _Rows(NamedTuple):
    """The terms of every row [N], as the kernel computed them; None: not computed."""

    soft: Tensor | None
    hard: Tensor | None
    target: Tensor | None


def _launch(
    student: Tensor,  # rows, as `dstudent`
    call: Call,
    weights: Sequence[Tensor | None],  # of the soft, the hard and the target term
    dstudent: Tensor | None,
) -> _Rows:
    soft_weight, hard_weight, target_weight = weights
    teacher = call.teacher
    if isinstance(teacher, SparseTeacher):
        soft, hard = call.ops.sparse_rows(
            student,
            teacher.ids,
            teacher.log_probs,
            teacher.log_rest,
            call.labels,
            call.student_inv_temperature,
            call.teacher_inv_temperature,
            soft_weight,
            hard_weight,
            dstudent,
            call.vocab_size,
            teacher.restricted,
        )
        return _Rows(soft, hard, None)
    target = None if target_weight is None else torch.empty_like(call.student_inv_temperature)
    soft, hard = call.ops.dense_rows(
        student,
        as_rows(teacher.logits),
        call.labels,
        call.student_inv_temperature,
        call.teacher_inv_temperature,
        soft_weight,
        hard_weight,
        dstudent,
        teacher.keep,
        call.vocab_size,
        call.divergence,
        call.beta,
        target_weight,
        target,
        teacher.probs,
    )
    return _Rows(soft, hard, target)


def _reduce(rows: _Rows, call: Call, shape: torch.Size | None) -> Terms:
    """`shape`: the leading one for reduction "none", else None."""
    computed = tuple(zip(rows, (call.soft, call.hard, call.target), strict=True))
    parts = [_total(values, term.weight, shape) for values, term in computed if term.counts]
    if not parts:  # every weight is 0, as a schedule may have it
        zero = torch.zeros_like(call.student_inv_temperature)
        parts.append(_total(zero, zero, shape))
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    if not call.return_terms:
        return Terms(loss)
    return Terms(
        loss,
        *(
            None if values is None or term.scale is None else _total(values, term.scale, shape)
            for values, term in computed
        ),
    )


def run(student: Tensor, call: Call, dstudent: Tensor | None) -> tuple[Terms, Tensor | None]:
    """The terms, reduced, and what the gradient in `dstudent` is scaled by [N]; None: nothing.

    `dstudent` has the shape of `student` or is `student`, which the gradient is written over then;
    None: no gradient is needed.
    """
    weights: Sequence[Tensor | None] = (call.soft.weight, call.hard.weight, call.target.weight)
    scale = None
    if dstudent is not None and dstudent.dtype == torch.float16:
        scale = _float16_scale(call.student_inv_temperature, *weights, divergence=call.divergence)
        weights = [None if weight is None else weight * scale for weight in weights]
    student_rows = as_rows(student)
    dstudent_rows = dstudent  # contiguous where it is new, and rows if the student is
    if dstudent is student:
        dstudent_rows = student_rows
    elif dstudent is not None and student_rows is not student:
        dstudent_rows = as_rows(dstudent)
    rows = _launch(student_rows, call, weights, dstudent_rows)
    if dstudent is student and dstudent_rows is not None and not is_view(student_rows, student):
        student.copy_(dstudent_rows.view_as(student))
    return _reduce(rows, call, student.shape[:-1] if call.per_row else None), scale
