"""What a call costs where there is nothing to compute: forward and backward of four short rows."""

from functools import partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastkd

from .cases import TEMPERATURE
from .measure import Step, race, summary
from .providers import Loss, plain

N, V = 4, 32


class _Nothing(torch.autograd.Function):
    """A loss that computes nothing: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.dstudent = teacher
        return teacher.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        return ctx.dstudent, None


def _step(loss: Loss, teacher: Tensor, calls: int) -> Step:
    def step(student: Tensor) -> None:
        for _ in range(calls):
            student.grad = None  # as an optimizer leaves it, so that nothing is added up
            loss(student, teacher).backward()

    return step


def test_overhead(benchmark: BenchmarkFixture, settings: Any, results: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, V, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    kd_loss = partial(fastkd.kd_loss, temperature=TEMPERATURE)
    losses: dict[str, Loss] = {
        "fastkd": kd_loss,
        "fastkd labels": lambda s, t: kd_loss(s, t, labels, alpha=0.5),
        # A leaf may not be written over: what it costs to clone one is in this time too.
        "fastkd inplace": lambda s, t: kd_loss(s.clone(), t, inplace=True),
        "eager": partial(plain, temperature=TEMPERATURE),
        "an autograd.Function that does nothing": _Nothing.apply,
    }

    def leaf() -> Tensor:
        return student.clone().requires_grad_()

    steps = {name: _step(loss, teacher, settings.calls) for name, loss in losses.items()}
    times = race(benchmark, steps, leaf, settings.overhead_rounds)
    providers = {name: summary(seconds, settings.calls) for name, seconds in times.items()}
    benchmark.extra_info.update(providers)
    results["overhead"] = {"V": V, "N": N, "calls": settings.calls, "providers": providers}
