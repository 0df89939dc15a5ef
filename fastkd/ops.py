"""Op schemas, their fakes, the choice of a backend with reasons, and the autograd function.

One schema serves every backend, written once. ``fastkd::kd_rows`` is the native op, its kernels are
C++ (csrc/); the other backends register the same schema under a name of their own, so that a
backend asked for by name is that backend and no other.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, spec, triton_backend

# student, dstudent [A, B, V_student], teacher [A, B, V_teacher], or [N, V] each, with stride 1 in
# the last dimension; every vector [N], N = A * B, in the compute dtype, labels int64. See
# spec.kd_rows.
KD_ROWS = (
    "(Tensor student, Tensor teacher, Tensor? labels, Tensor student_inv_temperature, "
    "Tensor teacher_inv_temperature, Tensor? soft_weight, Tensor? hard_weight, "
    "Tensor(a!)? dstudent, int keep, int vocab_size, float beta) -> (Tensor soft, Tensor hard)"
)
# dstudent *= scale, one value or one per row, read on the device; nothing is done where it is 1.
SCALE_ROWS = "(Tensor(a!) dstudent, Tensor scale) -> ()"


def _kd_rows_fake(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N = student.shape[:-1].numel()
    dtype = spec.compute_dtype(student, teacher)
    return student.new_empty(N, dtype=dtype), student.new_empty(N, dtype=dtype)


def _define(suffix: str, kd_rows: Callable | None = None, scale: Callable | None = None) -> None:
    for name, schema, kernel, fake in (
        (f"fastkd::kd_rows{suffix}", KD_ROWS, kd_rows, _kd_rows_fake),
        (f"fastkd::scale_rows{suffix}_", SCALE_ROWS, scale, lambda dstudent, scale: None),
    ):
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, fake)
        if kernel is not None:
            torch.library.impl(name, "CompositeExplicitAutograd", kernel)


_define("")
_define("_reference", spec.kd_rows, spec.scale_rows_)
_define("_triton", triton_backend.kd_rows, triton_backend.scale_rows_)

_HAS_NATIVE = find_spec("fastkd._C") is not None  # absent only in a source tree that is not built
if _HAS_NATIVE:
    import_module("fastkd._C")  # registers the CPU kernels


class Backend(NamedTuple):
    suffix: str  # of its ops
    missing: list[str]  # why it cannot run in this process, whatever the tensors
    device: str | None = None  # the device type it takes; None: any
    float64: bool = True  # whether it takes float64 logits
    unfit: Callable[[int], list[str]] | None = None  # why it cannot run on that device of its type
    by_name: bool = False  # "auto" passes it over


_BACKENDS = {  # in the order in which "auto" tries them
    "cuda": Backend("", cuda.MISSING, "cuda", float64=False, unfit=cuda.unfit),
    "triton": Backend(
        "_triton",
        triton_backend.MISSING,
        triton_backend.DEVICE,
        float64=False,
        unfit=None if triton_backend.INTERPRETED else triton_backend.unfit,
        by_name=triton_backend.INTERPRETED,
    ),
    "cpu": Backend(
        "", [] if _HAS_NATIVE else ["fastkd._C is not built in this source tree"], "cpu"
    ),
    "reference": Backend("_reference", []),
}


def _reasons(backend: Backend) -> list[str]:
    """Why it cannot run on this machine."""
    if backend.missing or backend.unfit is None:
        return list(backend.missing)
    try:
        unfit = [backend.unfit(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a driver too old for this torch, a forked process
        return [f"CUDA cannot be initialised: {error}"]
    if not unfit:
        return ["torch.cuda sees no GPU"]
    return [reason for reasons in unfit for reason in reasons] if all(unfit) else []


def backends() -> dict[str, list[str]]:
    """Per backend the reasons why it cannot run on this machine; an empty list: it can.

    Where there are GPU kernels this initialises CUDA.

    >>> fastkd.backends()["cpu"]
    []
    """
    return {name: _reasons(backend) for name, backend in _BACKENDS.items()}


def _can_run(backend: Backend, device: torch.device, double: bool) -> bool:
    if backend.missing or backend.device not in (None, device.type):
        return False
    if double and not backend.float64:
        return False
    return backend.unfit is None or not backend.unfit(device.index)


def _backend_ops(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    double = dtype == torch.float64
    if name == "auto":
        name = next(
            name
            for name, backend in _BACKENDS.items()
            if not backend.by_name and _can_run(backend, device, double)
        )
    if name not in _BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(_BACKENDS)}, got {name!r}")
    backend = _BACKENDS[name]
    reasons = []
    if not _can_run(backend, device, False):
        reasons = _reasons(backend)
        if backend.device not in (None, device.type):
            reasons.append(f"the logits are on {device.type}, not on {backend.device}")
        elif not reasons and backend.unfit is not None:
            reasons = backend.unfit(device.index)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run here: " + "; ".join(reasons))
    if double and not backend.float64:
        raise TypeError(
            f"backend {name!r} takes float32, bfloat16 and float16 logits, got float64: "
            'pass backend="auto"'
        )
    ops = torch.ops.fastkd
    return (
        getattr(ops, f"kd_rows{backend.suffix}").default,
        getattr(ops, f"scale_rows{backend.suffix}_").default,
    )


# The choice takes as long as the kernel.
_CHOSEN: dict[tuple[str, torch.device, torch.dtype], tuple[Any, Any]] = {}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The ops kd_rows and scale_rows_ of the first backend that can run, or of the one asked for.

    `dtype` is that of the arithmetic, spec.compute_dtype.

    Raises:
        TypeError: a backend that does not take the dtype.
        ValueError: no such backend.
        RuntimeError: the backend asked for cannot run; the message holds every reason.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str, got {type(name).__name__}")
    key = (name, device, dtype)
    ops = _CHOSEN.get(key)
    if ops is None:
        ops = _CHOSEN[key] = _backend_ops(*key)
    return ops


def as_rows(logits: Tensor) -> Tensor:
    """[..., V] as [N, V] or [A, B, V], stride 1 in V: a view wherever two strides give the rows.

    Three dimensions, not only two: ``logits[:, :-1]`` of [batch, sequence, V] needs no copy.
    """
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    dim = logits.dim()
    if dim > 3:
        return logits.flatten(0, -3)
    return logits if dim > 1 else logits.unsqueeze(0)


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


class Request(NamedTuple):
    """One call of a loss, less the student's logits: the kernel's arguments and the reduction."""

    teacher: Tensor  # [..., V_teacher]
    labels: Tensor | None  # [N] int64
    student_inv_temperature: Tensor  # [N]
    teacher_inv_temperature: Tensor  # [N]
    soft_scale: Tensor | None  # [N] what a row's soft term counts, before alpha; None: not computed
    hard_scale: Tensor | None  # [N] the same of the hard term, before 1 - alpha
    alpha: float
    keep: int
    vocab_size: int
    beta: float
    per_row: bool  # reduction "none"
    terms: bool  # return soft and hard too
    inplace: bool
    ops: tuple[Any, Any]  # kd_rows and scale_rows_ of the backend


Terms = tuple[Tensor, Tensor | None, Tensor | None]  # loss, soft, hard


def _float16_scale(
    inv_temperature: Tensor, soft: Tensor | None, hard: Tensor | None, beta: float
) -> Tensor:
    """[N] powers of two, each bringing the largest gradient its row's weights allow to about 2^8.

    float16 ends at 6e-8 and a gradient is of the order of 1 / (V N): so it is stored scaled, and
    backward divides. |q - p| <= 1, and the gradient of a mixture's divergence is hardly larger;
    that of the reverse one grows with the gap between the logits: 2^4 leaves it room up to 4000.
    Per row: one weight or temperature that is huge, infinite or NaN costs no other row its digits.
    """
    bound = torch.zeros_like(inv_temperature)
    if soft is not None:
        bound = bound + soft.abs() * inv_temperature
    if hard is not None:
        bound = bound + hard.abs()
    _, exponent = torch.frexp(bound)
    exponent = ((8 if beta < 1 else 4) - exponent).clamp(-100, 100)  # also its inverse is finite
    return torch.where((bound > 0) & (bound < torch.inf), torch.exp2(exponent.to(bound.dtype)), 1)


def _run(student: Tensor, request: Request, dstudent: Tensor | None) -> tuple[Terms, Tensor | None]:
    """Launch the kernel and reduce its rows; returns the terms and what `dstudent` is scaled by."""
    alpha, soft_scale, hard_scale = request.alpha, request.soft_scale, request.hard_scale
    soft_weight = soft_scale if soft_scale is None or alpha == 1 else soft_scale * alpha
    hard_weight = hard_scale if hard_scale is None or alpha == 0 else hard_scale * (1 - alpha)
    scale, weights = None, [soft_weight, hard_weight]
    if dstudent is not None and dstudent.dtype == torch.float16:
        scale = _float16_scale(
            request.student_inv_temperature, soft_weight, hard_weight, request.beta
        )
        weights = [None if weight is None else weight * scale for weight in weights]
    student_rows = as_rows(student)
    dstudent_rows = None
    if dstudent is not None:
        dstudent_rows = student_rows if dstudent is student else as_rows(dstudent)
    soft, hard = request.ops[0](
        student_rows,
        as_rows(request.teacher),
        request.labels,
        request.student_inv_temperature,
        request.teacher_inv_temperature,
        *weights,
        dstudent_rows,
        request.keep,
        request.vocab_size,
        request.beta,
    )

    if dstudent is student and dstudent_rows is not None and not _is_view(student_rows, student):
        student.copy_(dstudent_rows.view_as(student))

    def reduce(rows: Tensor) -> Tensor:
        if request.per_row:
            return rows.view(student.shape[:-1])
        if rows.shape[0] <= _SERIAL_SUM:
            return rows.sum()
        return torch.stack([part.sum() for part in rows.split(_SERIAL_SUM)]).sum()

    # A term of weight 0 stays out of the sum: 0 times an infinite term would be NaN.
    if hard_weight is None or alpha == 1:
        assert soft_weight is not None, "alpha has weight on a term that was not asked for"
        loss = soft * soft_weight
    elif soft_weight is None or alpha == 0:
        loss = hard * hard_weight
    else:
        loss = torch.addcmul(soft * soft_weight, hard, hard_weight)
    if not request.terms:
        return (reduce(loss), None, None), scale
    soft_term, hard_term = (
        None if weight is None else reduce(rows * weight)
        for rows, weight in ((soft, soft_scale), (hard, hard_scale))
    )
    return (reduce(loss), soft_term, hard_term), scale


# Whether the running backward retains its graph, so that what it saved is needed again.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


class _OnceDifferentiable(torch.autograd.Function):
    """Passes a gradient on, and raises where it is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        raise RuntimeError("the gradient of kd_loss cannot be differentiated a second time")


class _KDTerms(torch.autograd.Function):
    """The loss, or (loss, soft, hard); forward computes its gradient, backward scales it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, request: Request) -> Tensor | Terms:
        if request.inplace:
            dstudent = student
        else:
            dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
        (loss, soft, hard), ctx.scale = _run(student, request, dstudent)
        if request.inplace:
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(dstudent)
        # Not the request itself: it would keep the teacher's logits alive.
        ctx.inplace, ctx.per_row, ctx.ops = request.inplace, request.per_row, request.ops
        ctx.spent = False
        ctx.set_materialize_grads(False)
        if not request.terms:
            return loss
        ctx.mark_non_differentiable(*(term for term in (soft, hard) if term is not None))
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        if dloss is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradient = _KDTerms.backward(ctx, dloss)[0]
            assert gradient is not None
            anchor = torch.zeros((), device=gradient.device, requires_grad=True)
            return _OnceDifferentiable.apply(gradient, anchor), None
        if ctx.spent:
            raise RuntimeError(
                "kd_loss(inplace=True) was run backward a second time, but its gradient lives in "
                "student_logits and was handed out by the first: pass inplace=False"
            )
        (dstudent,) = ctx.saved_tensors
        dstudent = dstudent.detach()
        if ctx.per_row or ctx.scale is not None:
            dloss = dloss.reshape(-1)  # [N], or [1] beside a scale of [N]
        if ctx.scale is not None:
            dloss = dloss / ctx.scale
        if torch.compiler.is_compiling():  # it fuses the product, and sees no mutation
            if dloss.dim():
                dloss = dloss.view(*dstudent.shape[:-1], 1)
            return (dstudent * dloss).to(dstudent.dtype), None
        if ctx.inplace:
            ctx.spent = True
        elif _keeps_graph():
            dstudent = dstudent.clone()
        rows = as_rows(dstudent)
        ctx.ops[1](rows, dloss.contiguous())
        if not _is_view(rows, dstudent):
            dstudent.copy_(rows.view_as(dstudent))
        return dstudent, None


def kd_terms(student: Tensor, request: Request) -> Terms:
    """The loss and its terms, reduced, with a graph where the student needs a gradient."""
    if student.requires_grad and torch.is_grad_enabled():
        terms = _KDTerms.apply(student, request)
        return terms if request.terms else (terms, None, None)
    return _run(student, request, None)[0]
