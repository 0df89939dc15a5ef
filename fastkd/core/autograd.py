"""The autograd function of the losses: forward runs the call, backward scales its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .call import Call
from .checks import on_host
from .run import Terms, as_rows, is_view, run

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
    def forward(ctx: Any, student: Tensor, call: Call) -> tuple[Tensor | None, ...]:
        if call.inplace:
            dstudent = student
        else:
            dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
        terms, ctx.scale = run(student, call, dstudent)
        if call.inplace:
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(dstudent)
        # Not the call itself: it would keep the teacher's logits alive.
        ctx.inplace, ctx.per_row, ctx.ops = call.inplace, call.per_row, call.ops
        ctx.spent = False
        ctx.set_materialize_grads(False)
        # What is saved of an output leads back to this node, and so to the student's graph, and
        # keeps no logits alive: backward needs that where it is to be differentiated itself.
        anchor = () if call.inplace else (dstudent,)
        if not call.return_terms:
            return (terms.loss, *anchor)
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
        if rows is not dstudent and not is_view(rows, dstudent):
            dstudent.copy_(rows.view_as(dstudent))
        return dstudent, None


def _has_tangent(student: Tensor) -> bool:
    """Whether forward-mode AD follows it: the ops alone would drop what it carries."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(student).tangent is not None


def kd_terms(student: Tensor, call: Call) -> Terms:
    """The loss and its terms, reduced, with a graph where the student needs a gradient."""
    if not (student.requires_grad and torch.is_grad_enabled()) and not _has_tangent(student):
        return run(student, call, None)[0]
    terms = _KDTerms.apply(student, call)
    return Terms(*terms[:4]) if call.return_terms else Terms(terms[0])
