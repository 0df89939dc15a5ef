"""What is measured: losses and shapes, their logits, and a student whose gradient is dropped."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastkd

# (student [N, V], what is known of the teacher) -> scalar
Loss = Callable[[Tensor, Any], Tensor]

TEMPERATURE = 2.0
CLASSES = 64  # of a sparse teacher
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hard": {"alpha": 0.5},
    "jsd": {"beta": 0.5},
    "top_k": {"top_k": 64},
    "bottom_percentile": {"bottom_percentile": 20.0},
    "probs": {"teacher_kind": "probs"},
    "dkd": {"beta": 8.0},
    "bucket": {"outside": "bucket"},
    "restrict": {"outside": "restrict"},
    "renormalize": {"outside": "renormalize"},
}
PRUNING = ("top_k", "bottom_percentile")
SPARSE = ("bucket", "restrict", "renormalize")
# Not a loss of its own: what a call costs with nothing to compute, the value of a loss near 0, and
# the gradient of rows of which one class has nearly all.
OVERHEAD, CONVERGED, SURE = "overhead", "near convergence", "sure of one class"
UNTIMED = (CONVERGED, SURE)

VOCABULARIES = (32768, 50257, 128256, 151936, 262144)
HEADLINE = 128256  # the V of the README's tables
# Compiling is most of the time that all of it takes.
COMPILED = {"cpu": (32768, HEADLINE), "cuda": (HEADLINE,)}
COMPILED_OPTIONS = ("plain", "hard", "jsd", "top_k", "bottom_percentile", "dkd")
DTYPES = ("bfloat16", "float32")
CPU_PAIRS = 1 << 23  # N * V on a CPU, at least
GPU_ROWS = 8192
GPU_SWEEP = (1024, 4096, 16384)  # N, at one V
TENSORS = 8  # of N x V that should fit on a GPU: both logits, the buffer, a copy, a gradient, ...
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
    backward: bool = True  # False: the loss alone, under no_grad
    compiled: bool = False  # whether torch.compile takes part

    def __str__(self) -> str:
        passes = "" if self.backward else "-forward"
        return f"{self.option}-{self.dtype}-{self.N}x{self.V}{passes}"

    @property
    def tensor_bytes(self) -> int:
        """The bytes of N x V logits."""
        return self.N * self.V * getattr(torch, self.dtype).itemsize

    @property
    def moved_bytes(self) -> int:
        """What any implementation has to move: the logits in, the gradient out."""
        return self.tensor_bytes * (1 + (self.option not in SPARSE) + self.backward)

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the loss gets beside the student and the teacher."""
        options = {"temperature": TEMPERATURE, **OPTIONS[self.option]}
        if self.option in ("hard", "dkd"):
            options["labels"] = torch.arange(self.N, device=self.device) * 7919 % self.V
        return options


def plan(device: str, smoke: bool = False, pairs: int = CPU_PAIRS) -> list[Case]:
    """Every loss at two V (on a GPU at all), the plain one at all, also without backward."""

    def case(option: str, dtype: str, V: int, N: int = 0, backward: bool = True) -> Case:
        rows = N or (_rows_on_gpu(V, dtype) if device == "cuda" else 16 * math.ceil(pairs / 16 / V))
        compiled = not N and V in COMPILED[device] and option in COMPILED_OPTIONS
        return Case(option, dtype, V, rows, device, backward, compiled)

    if smoke:  # one dtype each; nearly all of the time is compilation
        every = [
            Case(option, DTYPES[i % 2], 1003, 32, device, compiled=option == "plain")
            for i, option in enumerate(OPTIONS)
        ]
        every += [Case("plain", "float32", 1003, 32, device, backward=False)]
        return [
            *every,
            Case(OVERHEAD, "float32", 32, 4),
            Case(CONVERGED, "float32", 4099, 2, device),
            Case(SURE, "float32", 4099, 4, device),
        ]
    sizes = sorted(VOCABULARIES, key=lambda V: V != HEADLINE)  # the README's first
    every = [
        case(option, dtype, V)
        for V in sizes
        for dtype in DTYPES
        for option in OPTIONS
        if option == "plain" or device == "cuda" or V in COMPILED[device]
    ]
    every += [case("plain", dtype, V, backward=False) for V in VOCABULARIES for dtype in DTYPES]
    if device == "cuda":
        every += [case("plain", dtype, HEADLINE, N) for N in GPU_SWEEP for dtype in DTYPES]
    else:  # first, as in a process that has compiled nothing: later a call costs some 5 us more
        every.insert(0, Case(OVERHEAD, "float32", 32, 4))
    return [
        *every,
        Case(CONVERGED, "float32", 131072, 16, device, compiled=True),
        Case(SURE, "float32", 32768, 16, device, compiled=True),
    ]


def _rows_on_gpu(V: int, dtype: str) -> int:
    rows, row_bytes = GPU_ROWS, TENSORS * V * getattr(torch, dtype).itemsize
    while rows * row_bytes > torch.cuda.get_device_properties(0).total_memory:
        rows //= 2
    return rows


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

    def __init__(self, case: Case, seed: int = 0, distance: float = 0.7) -> None:
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
            student = torch.empty_like(teacher).normal_(0, distance, generator=generator)
            teacher_rows.copy_(teacher)
            student_rows.copy_(student.add_(teacher))
        self.given = self._given(case)
        self._buffer = torch.empty_like(self._student)
        self._anchor = torch.zeros(1, device=device, requires_grad=True)
        evicted = EVICTED_BYTES
        if device.type == "cuda":
            evicted = max(evicted, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._evict = torch.ones(evicted // 4, device=device)

    def _given(self, case: Case) -> Any:
        """What the loss knows of the teacher."""
        if case.option in SPARSE:
            return tuple(fastkd.topk_teacher(self.teacher, CLASSES))
        if case.option == "probs":
            return torch.softmax(self.teacher, -1, dtype=torch.float32).to(self.teacher.dtype)
        return self.teacher

    def make_sure(self, classes: Tensor) -> None:
        """One class of each row to odds against all others of 1 to e^12, at the temperature."""
        odds = torch.linspace(0, 12, len(classes), device=classes.device)
        at = classes.unsqueeze(-1)
        for logits, more in ((self.teacher, 0.3), (self._student, 0.0)):
            others = logits.double().scatter_(1, at, -torch.inf) / TEMPERATURE
            value = TEMPERATURE * (others.logsumexp(-1) + odds + more)
            logits.scatter_(1, at, value.to(logits.dtype).unsqueeze(-1))

    def student(self) -> Tensor:
        """The student's logits with a graph, restored where a gradient was written over them."""
        self._buffer.copy_(self._student)
        self._evict.sum()
        return _Model.apply(self._anchor, self._buffer)
