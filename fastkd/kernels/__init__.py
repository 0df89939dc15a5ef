"""The backends: which there are, whether they can run here, and the choice of one."""

from typing import Any, NamedTuple

import torch

from . import cpu, cuda, reference, triton
from .backend import Backend

BACKENDS: dict[str, Backend] = {  # in the order in which "auto" tries them
    "cuda": cuda.BACKEND,
    "triton": triton.BACKEND,
    "cpu": cpu.BACKEND,
    "reference": reference.BACKEND,
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
    return {name: _reasons(backend) for name, backend in BACKENDS.items()}


def _can_run(backend: Backend, device: torch.device) -> bool:
    if backend.missing or backend.device not in (None, device.type):
        return False
    return backend.unfit is None or not backend.unfit(device.index)


class Ops(NamedTuple):
    """The ops of one backend; core.ops has their schemas."""

    dense_rows: Any
    scale_rows_: Any
    sparse_rows: Any
    order_named: Any


def _backend_ops(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    double = dtype == torch.float64
    if name == "auto":
        name = next(
            name
            for name, backend in BACKENDS.items()
            if not backend.by_name and (backend.float64 or not double) and _can_run(backend, device)
        )
    if name not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
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
    dense_rows, scale_rows_, sparse_rows = (
        getattr(torch.ops.fastkd, op).default
        for op in (f"dense_rows{x}", f"scale_rows{x}_", f"sparse_rows{x}")
    )
    return Ops(dense_rows, scale_rows_, sparse_rows, backend.order_named)


# A choice is kept: to make it takes as long as a small kernel.
_CHOSEN: dict[tuple[str, torch.device, torch.dtype], Ops] = {}


def register(name: str, backend: Backend) -> None:
    """One more, the last that "auto" tries; its ops are there (core.ops.define)."""
    BACKENDS[name] = backend
    _CHOSEN.clear()


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
