"""The Triton backend as seen without Triton: why it cannot run, and its ops, which import it late.

Triton is no dependency of fastkd: torch brings it where it has GPUs. Importing it takes half a
second and is left to the first call.
"""

import functools
import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...core.ops import define
from ..backend import Backend

OLDEST = (3, 6)  # torch 2.10 brings it; earlier ones lack what the kernels use
# Triton's interpreter, on CPU tensors: for tests of the kernels, thousands of times slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _installed(*distributions: str) -> tuple[int, ...] | None:
    """The version of the first that is there."""
    for distribution in distributions:
        try:
            return tuple(map(int, version(distribution).split(".")[:2]))
        except PackageNotFoundError:
            pass
    return None


def _missing() -> list[str]:
    if find_spec("triton") is None:
        return ["triton is not installed"]
    reasons = []
    # torch for AMD calls the distribution by other names.
    found = _installed("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton") or OLDEST
    if found < OLDEST:
        reasons.append(f"triton {found[0]}.{found[1]} is older than {OLDEST[0]}.{OLDEST[1]}")
    if not INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        reasons.append(
            f"torch {torch.__version__} is built without CUDA or ROCm (for tests on CPU tensors, "
            "set TRITON_INTERPRET=1)"
        )
    if INTERPRETED and found < (3, 7) and (_installed("numpy") or (0,)) >= (2, 4):
        reasons.append("Triton's interpreter before 3.7 fails with numpy 2.4 or later")
    return reasons


MISSING = _missing()
DEVICE = "cpu" if INTERPRETED else "cuda"  # torch calls AMD's GPUs cuda as well


def unfit(index: int) -> list[str]:
    """Why the kernels cannot run on the GPU of this index; initialises CUDA."""
    gpu = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None or gpu.major >= 8:
        return []
    return [
        f"GPU {index}, {gpu.name}, has compute capability {gpu.major}.{gpu.minor}, and the Triton "
        "kernels need 8.0"
    ]


@functools.cache
def _launch() -> Any:
    return import_module("fastkd.kernels.triton.launch")


def dense_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _launch().dense_rows(*arguments)


def sparse_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _launch().sparse_rows(*arguments)


def scale_rows_(dstudent: Tensor, scale: Tensor) -> None:
    _launch().scale_rows_(dstudent, scale)


define("_triton", dense_rows, scale_rows_, sparse_rows)
BACKEND = Backend(
    "_triton",
    MISSING,
    DEVICE,
    float64=False,
    unfit=None if INTERPRETED else unfit,
    by_name=INTERPRETED,
)
