"""The backends as tests have them, each a value of the fixtures `backend` and `kernel`."""

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels.emulation import build

import fastkd
from fastkd import kernels
from fastkd.kernels import triton as triton_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BETAS = (0.0, 1.0, 0.1, 0.5)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    float64: bool = True
    instruction_set: int = 0  # of the cpu backend: 0 is the widest this processor has
    label: str = ""
    emulated: bool = False
    split: bool = False  # rows over several programs of the Triton kernel, however short

    @property
    def interpreted(self) -> bool:
        """In Triton's interpreter a row takes some 20 ms: fewer and shorter ones, then."""
        return self.name == "triton" and triton_backend.INTERPRETED

    @property
    def slow(self) -> bool:
        """A hundred times slower than a kernel in its place."""
        return self.emulated or self.interpreted or self.name == "reference"

    @property
    def finest(self) -> torch.dtype:
        return torch.float64 if self.float64 else torch.float32

    def need(self, *dtypes: torch.dtype) -> None:
        if torch.float64 in dtypes and not self.float64:
            pytest.skip(f"the {self.name} backend refuses float64")

    def __str__(self) -> str:
        return self.label or self.name


# The CUDA kernels' own source, emulated on the CPU: in both of its layouts of a row.
# Not where FASTKD_EMULATION=0 says that a GPU is at hand.
EMULATED = build.backends() if os.environ.get("FASTKD_EMULATION") != "0" else []
BACKENDS = tuple(
    Backend(name, backend.device or "cpu", backend.float64, emulated=name in EMULATED)
    for name, backend in kernels.BACKENDS.items()
)
if triton_backend.INTERPRETED and not triton_backend.MISSING:
    from triton_kernels import interpreter as triton_interpreter

    triton_interpreter.patch_once()
    BACKENDS += (Backend("triton", float64=False, label="triton-split", split=True),)
DEVICES = {backend.name: backend.device for backend in BACKENDS}


def _instruction_sets() -> list[str]:
    """What the cpu backend has on this processor, widest first."""
    if fastkd.backends()["cpu"]:
        return []
    limit = torch.ops.fastkd.cpu_instruction_set
    names = list(itertools.takewhile(bool, map(limit, range(8))))
    limit(0)
    return names


INSTRUCTION_SETS = _instruction_sets()
# The backends, and the cpu backend again at every narrower instruction set.
KERNELS = BACKENDS + tuple(
    Backend("cpu", instruction_set=index, label=f"cpu-{name}")
    for index, name in enumerate(INSTRUCTION_SETS)
    if index > 0
)
