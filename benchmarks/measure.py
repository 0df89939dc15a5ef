"""How it is measured: time in turns, memory as the allocator saw it, the gradient's error."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .providers import Loss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture  # a GPU's machine may lack it

Step = Callable[[Any], object]


def race(
    benchmark: BenchmarkFixture,
    steps: Mapping[str, Step],
    prepare: Callable[[], Any],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds per step and round, the steps taking turns: what slows the machine slows them all.

    `prepare` makes a step's argument, untimed. The first step is the one that `benchmark` times;
    the others run in its untimed setup.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}

    def timed(name: str, argument: Any) -> None:
        start = time.perf_counter()
        steps[name](argument)
        times[name].append(time.perf_counter() - start)

    first, *others = steps

    def setup() -> tuple[tuple[str, Any], dict[str, Any]]:
        for name in others:
            timed(name, prepare())
        return (first, prepare()), {}

    for step in steps.values():
        step(prepare())  # warm-up
    benchmark.pedantic(timed, setup=setup, rounds=rounds)
    return times


def summary(seconds: list[float], calls: int = 1) -> dict[str, float]:
    """Median, minimum and interquartile range of the time per call, and the number of rounds."""
    per_call = [total / calls for total in seconds]
    low, _, high = statistics.quantiles(per_call, n=4) if len(per_call) > 1 else (0, 0, 0)
    return {
        "median_s": rounded(statistics.median(per_call)),
        "min_s": rounded(min(per_call)),
        "iqr_s": rounded(high - low),
        "rounds": len(per_call),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def peak_bytes(step: Step, argument: Any) -> int:
    """The most that `step` had allocated from torch at one time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(argument)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocated = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of `loss` in float32."""
    seen: list[Tensor] = []
    student.register_hook(lambda dstudent: seen.append(dstudent.to(torch.float32, copy=True)))
    loss(student, teacher).backward()
    return seen[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; consumes `value`."""
    return (value.sub_(expected).norm() / expected.norm()).item()
