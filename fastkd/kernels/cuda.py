"""The CUDA kernels' module, fastkd._C_cuda: whether it is here, and the GPUs it is built for."""

import ctypes
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from .backend import Backend


class Target(NamedTuple):
    """What kernels are compiled for: sm_86, sm_90a, or compute_120, which is PTX."""

    name: str
    capability: tuple[int, int]
    exact: bool  # sm_90a and the like: no later minor version
    forward: bool  # PTX: any later capability

    @staticmethod
    def parse(name: str) -> "Target":
        kind, number = name.split("_")
        digits = number.rstrip("af")
        return Target(name, divmod(int(digits), 10), number != digits, kind == "compute")

    def runs_on(self, capability: tuple[int, int]) -> bool:
        if self.exact:
            return capability == self.capability
        same_major = capability[0] == self.capability[0]
        return capability >= self.capability and (same_major or self.forward)


def _driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver supports, None without a driver; initialises nothing."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _load() -> tuple[list[str], list[Target]]:
    """Register the kernels: why that cannot be done, and their targets. CUDA is not initialised."""
    reasons = []
    found = find_spec("fastkd._C_cuda") is not None  # built only where there was an nvcc
    if not found:
        reasons.append(
            "fastkd._C_cuda, the module with the CUDA kernels, is not part of this installation"
        )
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    if reasons:
        return reasons, []
    try:
        import_module("fastkd._C_cuda")
    except ImportError as error:  # the other backends run without it
        return [f"fastkd._C_cuda does not load: {error}"], []
    toolkit, *targets = torch.ops.fastkd.cuda_build().split()
    driver = _driver_version()
    if driver is not None and driver[0] < int(toolkit.partition(".")[0]):
        # The CUDA runtime inside the module runs on drivers of its own major version and later.
        reasons.append(
            f"fastkd._C_cuda is built with CUDA {toolkit}, and the driver supports "
            f"{driver[0]}.{driver[1]}"
        )
    return reasons, [Target.parse(name) for name in targets]


MISSING, _TARGETS = _load()


def unfit(index: int) -> list[str]:
    """Why the kernels cannot run on the GPU of this index; initialises CUDA."""
    gpu = torch.cuda.get_device_properties(index)  # a constant to torch.compile
    if any(target.runs_on((gpu.major, gpu.minor)) for target in _TARGETS):
        return []
    return [
        f"GPU {index}, {gpu.name}, has compute capability {gpu.major}.{gpu.minor}, and the CUDA "
        f"kernels are built for {', '.join(target.name for target in _TARGETS)}"
    ]


BACKEND = Backend("", MISSING, "cuda", float64=False, unfit=unfit)
