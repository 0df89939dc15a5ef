"""One call of the loss, and `check`, which compares it with the definition in float64 within the
bounds of bounds.py.
"""

from dataclasses import dataclass

import torch
from lib.backends import Backend
from lib.bounds import Allowance, assert_close
from lib.logits import copied, moved
from torch import Tensor

import fastkd


@dataclass(frozen=True)
class Result:
    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None
    gradient: Tensor


def run(
    backend: Backend | str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    grad_output: float | Tensor | None = None,
    **options,
) -> Result:
    """One forward and backward; the gradient with respect to `student`, whatever its strides."""
    device = "cpu" if isinstance(backend, str) else backend.device
    name = backend if isinstance(backend, str) else backend.name

    def move(value):
        return moved(value, device) if isinstance(value, Tensor) else value

    teacher, labels = move(teacher), move(labels)
    student = student.detach()
    if 0 in student.stride():  # elements that are shared cannot each take a gradient
        student = student.clone(memory_format=torch.contiguous_format)
    root = torch.zeros((), dtype=student.dtype, device=device, requires_grad=True)
    # The root makes it a non-leaf of the same strides, so that inplace=True is allowed.
    leaf = Graft.apply(copied(student, device), root)
    leaf.retain_grad()
    out = fastkd.kd_loss(
        leaf, teacher, labels, backend=name, **{k: move(v) for k, v in options.items()}
    )
    terms = isinstance(out, fastkd.KDLossOutput)
    loss = out.loss if terms else out
    if grad_output is None:
        grad_output = 1.0
    if not isinstance(grad_output, Tensor):
        grad_output = torch.full_like(loss, grad_output)
    loss.backward(move(grad_output).to(loss.dtype))
    assert leaf.grad is not None
    assert leaf.grad.dtype == student.dtype and leaf.grad.shape == student.shape
    soft, hard = (out.soft, out.hard) if terms else (None, None)
    return Result(*(x if x is None else x.detach().cpu() for x in (loss, soft, hard, leaf.grad)))


class Graft(torch.autograd.Function):
    """Hands `values` on as if computed from `root`."""

    @staticmethod
    def forward(ctx, values: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def check(backend: Backend, student: Tensor, teacher: Tensor, labels=None, **options) -> Result:
    """Loss, terms and gradient of `backend` against the definition in float64.

    The oracle gives the terms per row; they are reduced here, so reductions are judged as well.
    """
    backend.need(student.dtype, teacher.dtype)
    double = torch.float64 in (student.dtype, teacher.dtype)
    stored = torch.float64 if double else torch.float32
    grad_output = options.pop("grad_output", None)
    options = {**options, "return_terms": True}
    actual = run(backend, student, teacher, labels, grad_output=grad_output, **options)
    assert actual.loss.dtype == actual.soft.dtype == stored

    reduction = options.get("reduction", "batchmean")
    leading, N = student.shape[:-1], student.shape[:-1].numel()
    divisor = 1.0
    if reduction == "batchmean":
        items = options.get("num_items")
        counting = labels is None or labels != options.get("ignore_index", -100)
        counting = N if labels is None else int(counting.sum())
        divisor = max(counting, 1) if items is None else float(items)
    factor = torch.as_tensor(1.0 if grad_output is None else grad_output, dtype=torch.float64)
    exact = {**options, "inplace": False, "reduction": "none", "num_items": None}
    expected = run("reference", student.double(), teacher.double(), labels,
                   grad_output=(factor / divisor).expand(leading), **exact)  # fmt: skip

    bounds = Allowance(student, teacher, labels, options)
    soft, hard = (
        x if x is None else x.reshape(-1) / divisor for x in (expected.soft, expected.hard)
    )
    soft_bound, hard_bound = bounds.rows(soft, hard)
    alpha = options.get("alpha", 1.0)
    both = hard_bound is not None and 0 < alpha < 1
    loss_bound = hard_bound if alpha == 0 else soft_bound
    if both:
        loss_bound = alpha * soft_bound + (1 - alpha) * hard_bound
    for name, bound in (("soft", soft_bound), ("hard", hard_bound), ("loss", loss_bound)):
        a, e = getattr(actual, name), getattr(expected, name)
        if e is None:
            assert a is None
            continue
        if reduction == "none":
            bound = bound.reshape(leading)
        else:
            bound, e = bound.sum(), e.sum() / divisor
        assert_close(a, e, stored, bound, what=name)

    bound = bounds.gradient().reshape(student.shape) * factor.abs().reshape(*factor.shape, 1)
    roundings, spacings = 1, 1.0
    if grad_output is not None:
        roundings, spacings = 2, 1 + factor.abs().max().item()  # forward stores, then backward
    if student.dtype == torch.float16:
        # Stored times a power of two that brings the row's weight to at least 2^7, 2^3 reversed.
        weight = bounds.weight.abs() * (alpha * bounds.T.squeeze(-1) + 1 - alpha)
        lost = weight.reshape(leading) * factor.abs() / (2**7 if bounds.beta < 1 else 2**3)
        spacings = 1 + torch.where(weight.reshape(leading) > 0, lost, 0).unsqueeze(-1)
    assert_close(
        actual.gradient, expected.gradient, student.dtype, bound,
        roundings=roundings, spacings=spacings, what="gradient",
    )  # fmt: skip
    return actual
