"""Op schemas, their fakes, and the choice of a backend with reasons.

One schema serves every backend, written once. ``fastkd::kd_rows`` is the native op, its kernels are
C++ (csrc/); the other backends register the same schema under a name of their own, so that a
backend asked for by name is that backend and no other.
"""

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, spec, triton_backend

# student, dstudent [A, B, V_student], teacher [A, B, V_teacher], or [N, V] each, with stride 1 in
# the last dimension; every vector [N], N = A * B, in the compute dtype, labels and keep int64. What
# a schedule changes is a vector: a number in a graph would be compiled anew. See spec.kd_rows.
KD_ROWS = (
    "(Tensor student, Tensor teacher, Tensor? labels, Tensor student_inv_temperature, "
    "Tensor teacher_inv_temperature, Tensor? soft_weight, Tensor? hard_weight, "
    "Tensor(a!)? dstudent, Tensor? keep, int vocab_size, int divergence, Tensor? beta, "
    "Tensor? target_weight=None, Tensor(b!)? target=None, bool teacher_probs=False) "
    "-> (Tensor soft, Tensor hard)"
)
# ids, log_probs [N, k]: ids ascending, each once, those >= vocab_size not there; log_rest [N]. See
# spec.topk_rows.
TOPK_ROWS = (
    "(Tensor student, Tensor ids, Tensor log_probs, Tensor? log_rest, Tensor? labels, "
    "Tensor student_inv_temperature, Tensor teacher_inv_temperature, Tensor? soft_weight, "
    "Tensor? hard_weight, Tensor(a!)? dstudent, int vocab_size, bool restricted) "
    "-> (Tensor soft, Tensor hard)"
)
# What topk_rows takes, of ids in any order; see spec.sparse_teacher.
SPARSE_TEACHER = (
    "(Tensor ids, Tensor log_probs, int vocab_size, bool bucket) "
    "-> (Tensor ids, Tensor log_probs, Tensor log_rest)"
)
# dstudent *= scale, one value or one per row, read on the device; nothing is done where it is 1.
SCALE_ROWS = "(Tensor(a!) dstudent, Tensor scale) -> ()"


def _kd_rows_fake(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N = math.prod(student.shape[:-1])
    dtype = spec.compute_dtype(student, teacher)
    return student.new_empty(N, dtype=dtype), student.new_empty(N, dtype=dtype)


def _topk_rows_fake(student: Tensor, ids: Tensor, log_probs: Tensor, *_: Any) -> Any:
    N = math.prod(student.shape[:-1])
    return log_probs.new_empty(N), log_probs.new_empty(N)


def _sparse_teacher_fake(
    ids: Tensor, log_probs: Tensor, vocab_size: int, bucket: bool
) -> tuple[Tensor, Tensor, Tensor]:
    log_rest = log_probs.new_empty(ids.shape[0] if bucket else 0)
    return torch.empty_like(ids), torch.empty_like(log_probs), log_rest


def _define(
    suffix: str,
    kd_rows: Callable | None = None,
    scale: Callable | None = None,
    topk_rows: Callable | None = None,
) -> None:
    for name, schema, kernel, fake in (
        (f"fastkd::kd_rows{suffix}", KD_ROWS, kd_rows, _kd_rows_fake),
        (f"fastkd::scale_rows{suffix}_", SCALE_ROWS, scale, lambda dstudent, scale: None),
        (f"fastkd::topk_rows{suffix}", TOPK_ROWS, topk_rows, _topk_rows_fake),
    ):
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, fake)
        if kernel is not None:
            torch.library.impl(name, "CompositeExplicitAutograd", kernel)


_define("")
_define("_reference", spec.kd_rows, spec.scale_rows_, spec.topk_rows)
_define("_triton", triton_backend.kd_rows, triton_backend.scale_rows_, triton_backend.topk_rows)

# On the host. Elsewhere its definition will do: a few small kernels beside a large one.
torch.library.define("fastkd::sparse_teacher", SPARSE_TEACHER, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastkd::sparse_teacher", _sparse_teacher_fake)

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


def _can_run(backend: Backend, device: torch.device) -> bool:
    if backend.missing or backend.device not in (None, device.type):
        return False
    return backend.unfit is None or not backend.unfit(device.index)


class Ops(NamedTuple):
    """Of one backend; see the schemas."""

    kd_rows: Any
    scale_rows_: Any
    topk_rows: Any
    sparse_teacher: Any


def _backend_ops(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    double = dtype == torch.float64
    if name == "auto":
        name = next(
            name
            for name, backend in _BACKENDS.items()
            if not backend.by_name and (backend.float64 or not double) and _can_run(backend, device)
        )
    if name not in _BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(_BACKENDS)}, got {name!r}")
    backend = _BACKENDS[name]
    reasons = []
    if not _can_run(backend, device):
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
    x = backend.suffix
    kd_rows, scale_rows_, topk_rows = (
        getattr(torch.ops.fastkd, op).default
        for op in (f"kd_rows{x}", f"scale_rows{x}_", f"topk_rows{x}")
    )
    native = torch.ops.fastkd.sparse_teacher.default
    sparse_teacher = native if name == "cpu" else spec.sparse_teacher
    return Ops(kd_rows, scale_rows_, topk_rows, sparse_teacher)


# The choice takes as long as the kernel.
_CHOSEN: dict[tuple[str, torch.device, torch.dtype], Ops] = {}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The ops of the first backend that can run, or of the one asked for.

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
