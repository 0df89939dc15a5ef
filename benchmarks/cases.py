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
}
PRUNING = ("top_k", "bottom_percentile")
EVICTED_BYTES = 64 << 20  # read between two steps, so that none finds its input in the cache


@dataclass(frozen=True)
class Case:
    """One loss on logits of one shape and dtype."""

    option: str
    dtype: str
    V: int
    N: int

    def __str__(self) -> str:
        return f"{self.option}-{self.dtype}-{self.V}"

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"temperature": TEMPERATURE, **OPTIONS[self.option]}


def cases(vocabularies: tuple[int, ...], pairs: int) -> list[Case]:
    """Every option and dtype at every V, with rows for at least `pairs` pairs of logits."""
    return [
        Case(option, dtype, V, N=16 * math.ceil(pairs / (16 * V)))
        for V in vocabularies
        for dtype in ("float32", "bfloat16")
        for option in OPTIONS
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
        generator = torch.Generator().manual_seed(seed)
        shape = (case.N, case.V)
        rank = torch.randperm(case.V, generator=generator).float()
        teacher = torch.empty(shape).exponential_(1 / 1.5, generator=generator)
        teacher -= torch.log(rank + 2.7)
        student = torch.empty(shape).normal_(0, 0.7, generator=generator).add_(teacher)
        dtype = getattr(torch, case.dtype)
        self.teacher = teacher.to(dtype)
        self._student = student.to(dtype)
        self._buffer = torch.empty_like(self._student)
        self._anchor = torch.zeros(1, requires_grad=True)
        self._evict = torch.ones(EVICTED_BYTES // 4)

    def student(self) -> Tensor:
        """The student's logits with a graph, restored where a gradient was written over them."""
        self._buffer.copy_(self._student)
        self._evict.sum()
        return _Model.apply(self._anchor, self._buffer)
