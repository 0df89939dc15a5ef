"""The autograd function of the losses: kernel, reduction of its rows, backward."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import on_host
from .ops import Ops
from .spec import REVERSE


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


def _is_view(rows: Tensor, logits: Tensor) -> bool:
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


class Term(NamedTuple):
    """One term of the rows. It stays out of the sum where it has no part in the loss: 0 times an
    infinite term would be NaN."""

    weight: Tensor | None = None  # [N] in the loss, as the kernel takes it; None: not computed
    scale: Tensor | None = None  # [N] of the term when it is returned by itself
    counts: bool = False  # whether it is part of the loss


class SparseTeacher(NamedTuple):
    """A teacher of k classes a row, as ops.TOPK_ROWS takes it."""

    ids: Tensor  # [N, k]
    log_probs: Tensor  # [N, k]
    log_rest: Tensor | None  # [N]
    restricted: bool
    named: Tensor | None  # [N] whether a row names a class and so counts; None: all do


class Request(NamedTuple):
    """One call of a loss, less the student's logits: the kernel's arguments and the reduction."""

    teacher: Tensor | SparseTeacher  # [..., V_teacher]
    labels: Tensor | None  # [N] int64
    student_inv_temperature: Tensor  # [N]
    teacher_inv_temperature: Tensor  # [N]
    soft: Term
    hard: Term
    target: Term  # of the decoupled loss, whose soft term then leaves out the label
    keep: Tensor | None  # [N] int64; None: nothing is pruned
    vocab_size: int
    divergence: int
    beta: Tensor | None  # [N] of a mixture
    per_row: bool  # reduction "none"
    terms: bool  # return the terms too
    teacher_probs: bool  # the teacher's rows hold probabilities
    inplace: bool
    ops: Ops


# loss, soft, hard, target
Terms = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


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


def _run(student: Tensor, request: Request, dstudent: Tensor | None) -> tuple[Terms, Tensor | None]:
    """Launch the kernel and reduce its rows; returns the terms and what `dstudent` is scaled by."""
    weights = (request.soft.weight, request.hard.weight, request.target.weight)
    soft_weight, hard_weight, target_weight = weights
    inv_temperature = request.student_inv_temperature
    scale = None
    if dstudent is not None and dstudent.dtype == torch.float16:
        scale = _float16_scale(inv_temperature, *weights, divergence=request.divergence)
        soft_weight, hard_weight, target_weight = (
            None if weight is None else weight * scale for weight in weights
        )
    student_rows = as_rows(student)
    dstudent_rows = dstudent  # contiguous where it is new, and rows if the student is
    if dstudent is student:
        dstudent_rows = student_rows
    elif dstudent is not None and student_rows is not student:
        dstudent_rows = as_rows(dstudent)
    target = None
    if isinstance(request.teacher, SparseTeacher):
        ids, log_probs, log_rest, restricted, _ = request.teacher
        soft, hard = request.ops.topk_rows(
            student_rows,
            ids,
            log_probs,
            log_rest,
            request.labels,
            inv_temperature,
            request.teacher_inv_temperature,
            soft_weight,
            hard_weight,
            dstudent_rows,
            request.vocab_size,
            restricted,
        )
    else:
        if target_weight is not None:
            target = torch.empty_like(inv_temperature)
        soft, hard = request.ops.kd_rows(
            student_rows,
            as_rows(request.teacher),
            request.labels,
            inv_temperature,
            request.teacher_inv_temperature,
            soft_weight,
            hard_weight,
            dstudent_rows,
            request.keep,
            request.vocab_size,
            request.divergence,
            request.beta,
            target_weight,
            target,
            request.teacher_probs,
        )

    if dstudent is student and dstudent_rows is not None and not _is_view(student_rows, student):
        student.copy_(dstudent_rows.view_as(student))

    shape = student.shape[:-1] if request.per_row else None
    parts = []
    if request.soft.counts:
        parts.append(_total(soft, request.soft.weight, shape))
    if request.hard.counts:
        parts.append(_total(hard, request.hard.weight, shape))
    if request.target.counts:
        parts.append(_total(target, request.target.weight, shape))
    if not parts:  # every weight is 0, as a schedule may have it
        zero = torch.zeros_like(inv_temperature)
        parts.append(_total(zero, zero, shape))
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    if not request.terms:
        return (loss, None, None, None), scale
    soft_term, hard_term, target_term = (
        None if rows is None or term.scale is None else _total(rows, term.scale, shape)
        for rows, term in (
            (soft, request.soft),
            (hard, request.hard),
            (target, request.target),
        )
    )
    return (loss, soft_term, hard_term, target_term), scale


# Whether the running backward retains its graph, so that what it saved is needed again.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


class _OnceDifferentiable(torch.autograd.Function):
    """Passes a gradient on, and raises where it is to be differentiated again.

    The engine visits only what leads to the inputs it was asked about: so the gradient hangs from
    all that it depends on, the student (through `anchor`) and the gradient of the loss.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor, dloss: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            "the gradient of a fastkd loss is computed in its forward pass and cannot be "
            "differentiated a second time: where a second derivative is needed, take F.kl_div of "
            "log_softmax and softmax"
        )


class _KDTerms(torch.autograd.Function):
    """The loss or all of Terms, and the gradient, which forward computes and backward scales."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, request: Request) -> tuple[Tensor | None, ...]:
        if request.inplace:
            dstudent = student
        else:
            dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
        terms, ctx.scale = _run(student, request, dstudent)
        if request.inplace:
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(dstudent)
        # Not the request itself: it would keep the teacher's logits alive.
        ctx.inplace, ctx.per_row, ctx.ops = request.inplace, request.per_row, request.ops
        ctx.spent = False
        ctx.set_materialize_grads(False)
        # What is saved of an output leads back to this node, and so to the student's graph, and
        # keeps no logits alive: backward needs that where it is to be differentiated itself.
        anchor = () if request.inplace else (dstudent,)
        if not request.terms:
            return (terms[0], *anchor)
        ctx.mark_non_differentiable(*(term for term in terms[1:] if term is not None))
        return (*terms, *anchor)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        if dloss is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph=True
            (anchor,) = ctx.saved_tensors
            with torch.no_grad():
                gradient = _KDTerms.backward(ctx, dloss)[0]
            return _OnceDifferentiable.apply(gradient, anchor, dloss), None
        if ctx.spent:
            raise RuntimeError(
                "kd_loss(inplace=True) was run backward a second time, but its gradient lives in "
                "student_logits and was handed out by the first: pass inplace=False"
            )
        (dstudent,) = ctx.saved_tensors
        if ctx.per_row or ctx.scale is not None:
            dloss = dloss.reshape(-1)  # [N], or [1] beside a scale of [N]
        if ctx.scale is not None:
            dloss = dloss / ctx.scale
        if torch.compiler.is_compiling():  # it fuses the product, and sees no mutation
            if dloss.dim():
                dloss = dloss.view(*dstudent.shape[:-1], 1)
            return (dstudent * dloss).to(dstudent.dtype), None
        dstudent = dstudent.detach()
        if ctx.inplace:
            ctx.spent = True
        elif _keeps_graph():
            dstudent = dstudent.clone()
        if dloss.dim() == 0 and on_host(dloss) and dloss.item() == 1:
            return dstudent, None  # as the op would find out in 2 of a call's 60 us
        rows = as_rows(dstudent)
        ctx.ops.scale_rows_(rows, dloss.contiguous())
        if rows is not dstudent and not _is_view(rows, dstudent):
            dstudent.copy_(rows.view_as(dstudent))
        return dstudent, None


def _has_tangent(student: Tensor) -> bool:
    """Whether forward-mode AD follows it: the ops alone would drop what it carries."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(student).tangent is not None


def kd_terms(student: Tensor, request: Request) -> Terms:
    """The loss and its terms, reduced, with a graph where the student needs a gradient."""
    if (student.requires_grad and torch.is_grad_enabled()) or _has_tangent(student):
        terms = _KDTerms.apply(student, request)
        return terms[:4] if request.terms else (terms[0], None, None, None)
    return _run(student, request, None)[0]
