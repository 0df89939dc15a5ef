"""What is measured: cases, their logits, and a student whose gradient can be timed and dropped."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEMPERATURE = 2.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 64},
    "bottom_percentile": {"bottom_percentile": 20.0},
    "jsd": {"beta": 0.5},
    "hard": {"alpha": 0.5},
}
PRUNING = ("top_k", "bottom_percentile")
# Read between two steps, so that none finds its input in the cache: at least so much, and four
# times a GPU's L2.
EVICTED_BYTES = 64 << 20


@dataclass(frozen=True)
class Case:
    """One loss on logits of one shape and dtype."""

    option: str
    dtype: str
    V: int
    N: int
    device: str = "cpu"
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.option}-{self.dtype}-{self.V}"

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": TEMPERATURE, **OPTIONS[self.option]}

    @property
    def kwargs(self) -> dict[str, Any]:
        """What kd_loss gets beside the logits."""
        options = self.options
        if options.get("alpha", 1.0) < 1:
            options["labels"] = torch.arange(self.N, device=self.device) * 7919 % self.V
        return options


def cases(vocabularies: tuple[int, ...], pairs: int) -> list[Case]:
    """Every option but the hard term at every V and dtype, with at least `pairs` pairs."""
    return [
        Case(option, dtype, V, N=16 * math.ceil(pairs / (16 * V)))
        for V in vocabularies
        for dtype in ("float32", "bfloat16")
        for option in OPTIONS
        if option != "hard"
    ]


class _Model(torch.autograd.Function):
    """Stands for the model: its output is `buffer` itself, its backward drops the gradient.

    So the logits are no leaf, as in training, and a loss may write its gradient over them; nothing
    is copied, and freeing the gradient is part of every provider's time.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[None, None]:
        return None, None


class Logits:
    """The logits of one case: Zipf-distributed classes, exponential tails, a student near by."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        device = torch.device(case.device)
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        self.teacher = torch.empty(case.N, case.V, dtype=dtype, device=device)
        self._student = torch.empty_like(self.teacher)
        rank = torch.randperm(case.V, generator=generator, device=device).float()
        step = max(1, (1 << 28) // case.V)  # rows at a time: the float32 of all need not fit
        for teacher_rows, student_rows in zip(
            self.teacher.split(step), self._student.split(step), strict=True
        ):
            teacher = torch.empty(teacher_rows.shape, device=device)
            teacher.exponential_(1 / 1.5, generator=generator)
            teacher -= torch.log(rank + 2.7)
            student = torch.empty_like(teacher).normal_(0, 0.7, generator=generator).add_(teacher)
            teacher_rows.copy_(teacher)
            student_rows.copy_(student)
        self._buffer = torch.empty_like(self._student)
        self._anchor = torch.zeros(1, device=device, requires_grad=True)
        evicted = EVICTED_BYTES
        if device.type == "cuda":
            evicted = max(evicted, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._evict = torch.ones(evicted // 4, device=device)

    def student(self) -> Tensor:
        """The student's logits with a graph, restored where a gradient was written over them."""
        self._buffer.copy_(self._student)
        self._evict.sum()
        return _Model.apply(self._anchor, self._buffer)
