"""The CUDA kernels' module, fastkd._C_cuda: whether it is here, and the GPUs it is built for."""

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch


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
    return [], [Target.parse(name) for name in torch.ops.fastkd.cuda_targets().split()]


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
