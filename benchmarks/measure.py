"""How it is measured: time in turns, memory as the allocator saw it, errors against float64."""

import gc
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import CONVERGED, CPU_PAIRS, OVERHEAD, SURE, Case, Logits, Loss
from .environment import clock_mhz
from .figures import Record
from .providers import PROVIDERS, fastkd_loss, unavailable

CHECKED = 16  # rows whose gradient is compared with float64
# How far the student's logits are from the teacher's: KL = distance^2 / (2 T^2) = 5e-6 at T = 2.
NEAR = 0.0063
IDLE = "an autograd.Function that does nothing"
PLAIN = ", plain"  # ends the name of a provider that computes another loss: kd_loss, beside it

Step = Callable[[Any], object]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    rounds: int = 11
    # Where a call's overhead is measured:
    calls: int = 100  # per round
    spread: int = 4  # so many times the rounds, of which those of an undisturbed machine count
    pause: float = 0.5  # seconds before each round
    pairs: int = CPU_PAIRS


SMOKE = Settings(rounds=1, calls=2, pause=0)


def loop(timed: Callable, setup: Callable, rounds: int) -> None:
    """As pytest-benchmark's `pedantic`, which may stand in its place."""
    for _ in range(rounds):
        arguments, keywords = setup()
        timed(*arguments, **keywords)


def measure(case: Case, settings: Settings, drive: Callable = loop) -> Record:
    """Never raises: what went wrong is a result."""
    special = {OVERHEAD: _overhead, CONVERGED: _near_convergence, SURE: _sure_of_one_class}
    record, failed = attempt(lambda: special.get(case.option, _loss)(case, settings, drive))
    _release()
    return asdict(case) | {"clock_mhz": clock_mhz(case.device)} | (record or {"failed": failed})


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What `call` returns, or None and why it failed; then nothing holds its memory."""
    try:
        return call(), ""
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:  # of a peer, of a compiler
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        if "can't allocate memory" in why:
            why = "out of memory"
    _release()
    return None, why


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _losses(case: Case) -> dict[str, Loss]:
    torch.compiler.reset()  # else the cases share one cache, and its limit
    missing = unavailable(case.device)
    makes = {name: provider.loss for name, provider in PROVIDERS.items() if name not in missing}
    return {name: loss for name, make in makes.items() if (loss := make(case)) is not None}


def _loss(case: Case, settings: Settings, drive: Callable) -> Record:
    logits = Logits(case)
    teacher, copy = logits.teacher, torch.empty_like(logits.teacher)
    expected, rounding = _expected(case, logits) if case.backward else (None, None)
    providers: dict[str, Figures] = {}
    steps: dict[str, Step] = {}

    def prepare() -> Tensor:
        if case.device == "cuda":
            poison(teacher)
        return logits.student()

    def examine(loss: Loss, step: Step, expected: Tensor | None) -> Figures:
        error = (
            {} if expected is None else {"gradient_error": _gradient_error(logits, loss, expected)}
        )
        step(prepare())  # from the second call on a compiled function has been compiled
        return {"peak_bytes": peak_bytes(case.device, step, prepare()), **error}

    for name, loss in _losses(case).items():
        plain = name.endswith(PLAIN)
        step = _step(case, loss, teacher if plain else logits.given)
        figures, failed = attempt(partial(examine, loss, step, None if plain else expected))
        providers[name] = figures or {"failed": failed}
        if figures:
            steps[name] = step

    # The bandwidth of the device: one tensor in, one out; two in, one out, as a loss does.
    steps["copy"] = lambda student: copy.copy_(teacher)
    steps["torch.add"] = lambda student: torch.add(student.detach(), teacher, out=copy)
    for name, seconds in race(case.device, steps, prepare, settings.rounds, drive).items():
        providers[name] = per_call(seconds) | providers.get(name, {})
    moved = {"moved_bytes": case.moved_bytes, "tensor_bytes": case.tensor_bytes}
    return moved | {"rounding": rounding, "providers": providers}


def _step(case: Case, loss: Loss, given: Any) -> Step:
    def forward(student: Tensor) -> None:
        with torch.no_grad():
            loss(student.detach(), given)

    def forward_backward(student: Tensor) -> None:
        loss(student, given).backward()

    return forward_backward if case.backward else forward


def race(
    device: str,
    steps: Mapping[str, Step],
    prepare: Callable[[], Any],
    rounds: int,
    drive: Callable = loop,
) -> dict[str, list[float]]:
    """Seconds per step and round, the steps taking turns: what slows the machine slows them all.

    `prepare` makes a step's argument, untimed. `drive` times the first step; the others run in its
    setup, in another order every time: whose memory a step finds freed must be no step's advantage.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}

    def timed(name: str, argument: Any) -> None:
        times[name].append(elapsed(device, steps[name], argument))

    first, *others = steps
    generator = random.Random(0)

    def setup() -> tuple[tuple[str, Any], dict[str, Any]]:
        for name in generator.sample(others, len(others)):
            timed(name, prepare())
        return (first, prepare()), {}

    for step in steps.values():
        step(prepare())  # warm-up
    drive(timed, setup=setup, rounds=rounds)
    return times


def elapsed(device: str, step: Step, argument: Any) -> float:
    """Seconds of the device. What prepared the argument keeps a GPU busy while the host runs on."""
    if device != "cuda":
        start = time.perf_counter()
        step(argument)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step(argument)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def per_call(seconds: list[float], calls: int = 1) -> Figures:
    """Every round's value, in order: the rounds of two providers belong together (figures.py)."""
    return {"seconds": [rounded(total / calls) for total in seconds]}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def peak_bytes(device: str, step: Step, argument: Any) -> int:
    """The most that `step` had allocated from torch at one time."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(argument)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write over the progress bar
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


def poison(like: Tensor) -> None:
    """Fill the memory that the next tensor of this size gets from torch's allocator with NaN."""
    torch.full_like(like, torch.nan)


def _sampled(x: Tensor) -> Tensor:
    rows = torch.linspace(0, len(x) - 1, min(CHECKED, len(x)), device=x.device).long()
    return x[rows]


def _in_float64(given: Any) -> Any:
    ids_and_log_probs = isinstance(given, tuple)
    return (_sampled(given[0]), _sampled(given[1]).double()) if ids_and_log_probs else (
        _sampled(given).double())  # fmt: skip


def _expected(case: Case, logits: Logits) -> tuple[Tensor, float]:
    """The gradient of sampled rows in float64, and what storing it in the dtype costs."""
    kwargs: dict[str, Any] = {"backend": "reference", "num_items": case.N}
    if "labels" in case.kwargs:
        kwargs["labels"] = _sampled(case.kwargs["labels"])
    student = _sampled(logits.student().detach()).double().requires_grad_()
    fastkd_loss(case, **kwargs)(student, _in_float64(logits.given)).backward()
    assert student.grad is not None
    return student.grad, worst_row(student.grad.to(logits.teacher.dtype), student.grad)


def _gradient_error(logits: Logits, loss: Loss, expected: Tensor) -> float:
    seen: list[Tensor] = []
    student = logits.student()
    student.register_hook(lambda dstudent: seen.append(_sampled(dstudent).double()))
    poison(logits.teacher)
    loss(student, logits.given).backward()
    return worst_row(seen[0], expected)


def worst_row(value: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of a row."""
    error = (value.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = error.max().item()
    if not math.isfinite(worst):
        raise FloatingPointError("the gradient is not finite")
    return rounded(worst)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; consumes `value`."""
    return (value.sub_(expected).norm() / expected.norm()).item()


class _Nothing(torch.autograd.Function):
    """A loss that computes nothing: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.dstudent = teacher
        return teacher.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        return ctx.dstudent, None


def _overhead(case: Case, settings: Settings, drive: Callable) -> Record:
    """What a call costs where there is nothing to compute.

    A machine shared with others runs for seconds at half its speed, and a round takes 50 ms. So the
    rounds are spread over half a minute, and those count in which a function that is not ours, and
    does nothing, was fastest.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, case.N, case.V, generator=generator)
    plain, hard = replace(case, option="plain"), replace(case, option="hard")
    losses: dict[str, Loss] = {
        "fastkd cpu": fastkd_loss(plain, "cpu"),
        "fastkd cpu, labels": fastkd_loss(hard, "cpu"),
        # A leaf may not be written over: what it costs to clone one is in this time too.
        "fastkd cpu, inplace": lambda s, t: fastkd_loss(plain, "cpu", inplace=True)(s.clone(), t),
        "eager": PROVIDERS["eager"].loss(plain),
        IDLE: _Nothing.apply,
    }

    def step(loss: Loss, leaf: Tensor) -> None:
        for _ in range(settings.calls):
            leaf.grad = None  # as an optimizer leaves it, so that nothing is added up
            loss(leaf, teacher).backward()

    steps = {name: partial(step, loss) for name, loss in losses.items()}
    prepared = itertools.count()

    def prepare() -> Tensor:
        if next(prepared) % len(steps) == 0:
            time.sleep(settings.pause)
        return student.clone().requires_grad_()

    times = race("cpu", steps, prepare, settings.spread * settings.rounds, drive)
    counted = fastest(times[IDLE], settings.rounds)
    return {
        "rounds": len(times[IDLE]),
        "providers": {
            name: per_call([times[name][i] for i in counted], settings.calls) for name in times
        },
    }


def fastest(seconds: list[float], count: int) -> list[int]:
    """Which rounds, in order."""
    return sorted(sorted(range(len(seconds)), key=seconds.__getitem__)[:count])


def _near_convergence(case: Case, settings: Settings, drive: Callable) -> Record:
    """The largest relative error of the loss of a row whose student is all but its teacher."""
    as_plain = replace(case, option="plain", N=1)
    logits = Logits(case, distance=NEAR)
    rows = list(zip(logits.student().detach().split(1), logits.teacher.split(1), strict=True))
    exact = fastkd_loss(as_plain, "reference")
    values = [exact(s.double(), t.double()).item() for s, t in rows]
    providers = {}
    for name, loss in _losses(as_plain).items():
        if name.endswith(", inplace"):
            continue

        def worst(loss: Loss = loss) -> float:
            losses = [loss(s.clone().requires_grad_(), t).item() for s, t in rows]
            return max(abs(a - b) / b for a, b in zip(losses, values, strict=True))

        error, failed = attempt(worst)
        providers[name] = {"failed": failed} if error is None else {"loss_error": rounded(error)}
    return {"loss": rounded(max(values)), "providers": providers}


def _sure_of_one_class(case: Case, settings: Settings, drive: Callable) -> Record:
    """The largest relative error of the gradient of a row, of three losses."""
    providers: dict[str, Figures] = {}
    for option in ("plain", "hard", "jsd"):
        one = replace(case, option=option)
        logits = Logits(one)
        logits.make_sure(torch.arange(case.N, device=case.device) * 7919 % case.V)
        expected, _ = _expected(one, logits)
        for name, loss in _losses(one).items():
            if "," in name or "failed" in providers.get(name, {}):
                continue
            error, failed = attempt(partial(_gradient_error, logits, loss, expected))
            before = providers.get(name, {}).get("gradient_error", 0.0)
            providers[name] = (
                {"failed": failed} if failed else {"gradient_error": max(error, before)}
            )
    return {"providers": providers}
