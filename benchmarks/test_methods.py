"""What the other losses take, beside kd_loss on the same logits, all in turn."""

from collections.abc import Callable
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .cases import Case, Logits
from .measure import Step, peak_bytes, race, rounded, summary
from .methods import losses


def test_methods(
    benchmark: BenchmarkFixture, plain_case: Case, settings: Any, results: dict[str, Any]
) -> None:
    logits = Logits(plain_case)

    def step(loss: Callable[[Tensor], Any]) -> Step:
        return lambda student: loss(student).backward()

    steps = {name: step(loss) for name, loss in losses(plain_case, logits.teacher).items()}
    nbytes = logits.teacher.nbytes
    peaks = {name: peak_bytes(steps[name], logits.student()) / nbytes for name in steps}
    times = race(benchmark, steps, logits.student, settings.rounds)
    providers = {
        name: summary(times[name]) | {"gradients_allocated": rounded(peaks[name])} for name in steps
    }
    benchmark.extra_info.update(providers)
    record = {"dtype": plain_case.dtype, "V": plain_case.V, "N": plain_case.N}
    results["methods"].append({**record, "option": "methods", "providers": providers})
