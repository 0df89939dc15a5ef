"""What the other losses take, beside kd_loss on the same logits, all in turn."""

from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastkd

from .cases import TEMPERATURE, Case, Logits
from .measure import Step, peak_bytes, race, rounded, summary

CLASSES = 64  # of a sparse teacher


def _losses(case: Case, teacher: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    labels = torch.arange(case.N) * 7919 % case.V
    probs = teacher.float().softmax(-1).to(teacher.dtype)
    sparse = fastkd.topk_teacher(teacher, CLASSES)
    T = {"temperature": TEMPERATURE}
    return {
        "kd_loss": lambda s: fastkd.kd_loss(s, teacher, **T),
        "dkd_loss": lambda s: fastkd.dkd_loss(s, teacher, labels, **T),
        "probabilities": lambda s: fastkd.kd_loss(s, probs, teacher_kind="probs", **T),
        "top_k": lambda s: fastkd.kd_loss(s, teacher, top_k=CLASSES, **T),
        **{
            outside: lambda s, outside=outside: fastkd.topk_kd_loss(
                s, *sparse, outside=outside, **T
            )
            for outside in ("bucket", "restrict", "renormalize")
        },
    }


def test_methods(
    benchmark: BenchmarkFixture, plain_case: Case, settings: Any, results: dict[str, Any]
) -> None:
    logits = Logits(plain_case)

    def step(loss: Callable[[Tensor], Any]) -> Step:
        return lambda student: loss(student).backward()

    steps = {name: step(loss) for name, loss in _losses(plain_case, logits.teacher).items()}
    nbytes = logits.teacher.nbytes
    peaks = {name: peak_bytes(steps[name], logits.student()) / nbytes for name in steps}
    times = race(benchmark, steps, logits.student, settings.rounds)
    providers = {
        name: summary(times[name]) | {"gradients_allocated": rounded(peaks[name])} for name in steps
    }
    benchmark.extra_info.update(providers)
    record = {"dtype": plain_case.dtype, "V": plain_case.V, "N": plain_case.N}
    results["methods"].append({**record, "option": "methods", "providers": providers})
