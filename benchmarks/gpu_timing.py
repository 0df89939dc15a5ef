"""fastkd on a GPU, forward and backward, against the device's copy and eager PyTorch.

python -m benchmarks.gpu_timing OUT [--backend triton]

measures every case that OUT/timing-<backend>.json does not hold yet of this commit, and writes the
tables beside it. After --seconds it begins no other case and ends with status 75 where some are
left: run it again. --backend cpu is a rehearsal on tiny logits, whose numbers mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.arguments import check_keep
from fastkd.ops import choose_backend

from .cases import OPTIONS, PRUNING, Case, Logits
from .environment import environment, gpu
from .gpu import UNFINISHED, arguments
from .measure import Step, gradient, relative_error, rounded, summary
from .methods import losses
from .providers import PROVIDERS, Loss
from .report import Budget, Record, has, label, ratio, table

ROWS = 8192
VOCABULARIES = (32768, 128256, 151936, 262144)
COMPILED_V = 128256  # torch.compile takes half a minute per case
TENSORS = 6  # of N x V that must fit: both logits, the buffer, a gradient, a copy, probabilities
CHECKED = 16  # rows at either end whose gradient is compared with the definition
# Relative L2 error of the gradient: rounding, and what another loss would exceed by far.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}


@dataclass(frozen=True)
class Settings:
    backend: str
    device: str
    rounds: int
    rows: int
    vocabularies: tuple[int, ...]
    compiled_v: int


def settings(backend: str) -> Settings:
    if backend != "cpu":
        return Settings(backend, "cuda", 9, ROWS, VOCABULARIES, COMPILED_V)
    return Settings(backend, "cpu", 2, 2 * CHECKED, (1003,), 0)


def rows_that_fit(rows: int, V: int, dtype: str, device: str) -> int:
    """`rows`, halved until the tensors of a case fit into the memory of the device."""
    if device != "cuda":
        return rows
    row_bytes = TENSORS * V * getattr(torch, dtype).itemsize
    while rows * row_bytes > 0.9 * torch.cuda.get_device_properties(0).total_memory:
        rows //= 2
    return rows


def cases(settings: Settings) -> list[Case]:
    device = settings.device
    return [
        Case(option, dtype, V, rows_that_fit(settings.rows, V, dtype, device), device,
             settings.backend)
        for V in settings.vocabularies
        for dtype in ("bfloat16", "float32")
        for option in OPTIONS
    ]  # fmt: skip


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


def race(
    device: str, steps: dict[str, Step], prepare: Callable[[], Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds per step and round, in turns; a step that runs out of memory is left out."""
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        try:
            for _ in range(2):  # warm-up
                step(prepare())
            times[name] = []
        except torch.OutOfMemoryError:
            pass
        if name not in times:  # now that the exception holds none of it
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, seconds in times.items():
            seconds.append(elapsed(device, steps[name], prepare()))
    return times


def kernel_step(case: Case, teacher: Tensor) -> Step:
    """The op alone: what the public function adds is launches of a few microseconds."""
    N, V, options = case.N, case.V, case.kwargs
    alpha, temperature = options.get("alpha", 1.0), options["temperature"]
    ones = torch.ones(N, device=case.device)
    inverse = ones / temperature
    labels = options.get("labels")
    keep = check_keep(options.get("top_k"), options.get("bottom_percentile", 0.0), V)
    op = choose_backend(case.backend, teacher.device, torch.float32)[0]
    soft_weight = ones * (alpha * temperature**2 / N)
    hard_weight = None if labels is None else ones * ((1 - alpha) / N)

    def step(student: Tensor) -> None:
        student = student.detach()
        op(student, teacher, labels, inverse, inverse, soft_weight,
           hard_weight, torch.empty_like(student), keep, V, options.get("beta", 0.0))  # fmt: skip

    return step


def ends(rows: Tensor) -> Tensor:
    return torch.cat([rows[:CHECKED], rows[-CHECKED:]])


def gradient_error(case: Case, logits: Logits, loss: Loss) -> float:
    """Of the rows at both ends, against the definition on the same logits."""
    kwargs = case.kwargs
    if "labels" in kwargs:
        kwargs["labels"] = ends(kwargs["labels"])
    expected = gradient(
        partial(fastkd.kd_loss, **kwargs, num_items=case.N, backend="reference"),
        ends(logits.student()).float(),
        ends(logits.teacher).float(),
    )
    poison(logits.teacher)
    seen: list[Tensor] = []
    student = logits.student()
    student.register_hook(lambda dstudent: seen.append(ends(dstudent).float()))
    loss(student, logits.teacher).backward()
    return relative_error(seen[0], expected)


def poison(like: Tensor) -> None:
    """Fill the memory that the next tensor of this size gets from torch's allocator with NaN."""
    torch.full_like(like, torch.nan)


def measure(case: Case, settings: Settings) -> Record:
    logits = Logits(case)
    teacher = logits.teacher

    def prepare() -> Tensor:
        poison(teacher)
        return logits.student()

    copy = torch.empty_like(teacher)
    steps: dict[str, Step] = {
        "copy": lambda _: copy.copy_(teacher),
        "torch.add": lambda student: torch.add(student.detach(), teacher, out=copy),
        "kernel": kernel_step(case, teacher),
    }
    errors: dict[str, float] = {}
    for name, make in PROVIDERS.items():
        if name == "torch.compile" and case.V != settings.compiled_v:
            continue
        loss = make(case)
        if loss is None:
            continue
        if name in ("fastkd", "fastkd inplace"):
            errors[name] = rounded(gradient_error(case, logits, loss))
            assert errors[name] < TOLERANCE[case.dtype], f"{case}, {name}: error {errors[name]}"
        steps[name] = lambda student, loss=loss: loss(student, teacher).backward()
    times = race(case.device, steps, prepare, settings.rounds)
    providers: dict[str, Any] = {name: summary(seconds) for name, seconds in times.items()}
    for name, error in errors.items():
        providers[name]["gradient_error"] = error
    return asdict(case) | {"providers": providers}


def measure_methods(case: Case, settings: Settings) -> Record:
    """The other losses beside kd_loss, all in turn."""
    logits = Logits(case)

    def prepare() -> Tensor:
        poison(logits.teacher)
        return logits.student()

    def step(loss: Callable[[Tensor], Any]) -> Step:
        return lambda student: loss(student).backward()

    steps = {name: step(loss) for name, loss in losses(case, logits.teacher).items()}
    times = race(case.device, steps, prepare, settings.rounds)
    return asdict(case) | {"providers": {name: summary(s) for name, s in times.items()}}


def of_copy(record: Record, name: str) -> float:
    """Of the device's copy bandwidth, for the bytes that a loss has to move: read 2, write 1."""
    return 1.5 * ratio(record, "copy", name)


def budgets(records: list[Record]) -> list[Budget]:
    def of(value: Callable[[Record], float], *options: str, dtype: str = "bfloat16",
           needs: str = "kernel", V: int | None = None) -> dict[str, float]:  # fmt: skip
        return {
            label(r): value(r)
            for r in records
            if r["option"] in options and r["dtype"] == dtype and V in (None, r["V"])
            if has(r, needs)
        }

    def times(name: str) -> dict[str, float]:
        return of(lambda r: ratio(r, name, "fastkd"), "plain", needs=name, V=COMPILED_V)

    lines = [
        Budget(
            "kernel, of copy bandwidth", 0.88, 0.95, of(lambda r: of_copy(r, "kernel"), "plain")
        ),
        Budget("pruned kernel, the same", 0.85, None, of(lambda r: of_copy(r, "kernel"), *PRUNING)),
        Budget("times eager", 8, 10, times("eager")),
        Budget("times torch.compile", 2, 3, times("torch.compile")),
    ]
    return [line for line in lines if line.measured]


def report(results: dict[str, Any]) -> str:
    records = results["loss"]
    methods = [
        [f"{r['dtype']}-{r['V']}, N = {r['N']}", *(
            f"{ratio(r, name, 'kd_loss'):.2f}x" if has(r, name) else "no memory"
            for name in r["providers"]
        )]
        for r in results["methods"]
    ]  # fmt: skip

    def ms(record: Record, name: str) -> str:
        return f"{record['providers'][name]['median_s'] * 1e3:.3f}" if has(record, name) else ""

    def times(record: Record, name: str) -> str:
        return f"{ratio(record, name, 'fastkd'):.1f}x" if has(record, name) else "no memory"

    rows = [
        [
            f"{label(r)}, N = {r['N']}",
            ms(r, "kernel"),
            f"{of_copy(r, 'kernel'):.0%}",
            ms(r, "fastkd"),
            f"{of_copy(r, 'fastkd'):.0%}",
            ms(r, "fastkd inplace"),
            times(r, "eager"),
            "" if r["V"] != COMPILED_V else times(r, "torch.compile"),
        ]
        for r in records
    ]
    header = ["loss", "kernel, ms", "of copy", "forward + backward, ms", "of copy", "inplace, ms",
              "than eager", "than torch.compile"]  # fmt: skip
    copies = [2 * r["N"] * r["V"] * getattr(torch, r["dtype"]).itemsize
              / r["providers"]["copy"]["median_s"] for r in records]  # fmt: skip
    parts = [
        f"{(results['gpu'] or {}).get('name', 'no GPU')}, torch {results['versions']['torch']}, "
        f"{results['date'][:10]}; copy {statistics.median(copies) / 1e12:.3f} TB/s",
        table(header, rows),
        table(["budget", "limit", "aim", "worst", "in", ""], [b.row() for b in budgets(records)]),
    ]
    if methods:
        parts.append("Time of the other losses, of kd_loss on the same logits:")
        parts.append(table(["logits", *results["methods"][0]["providers"]], methods))
    return "\n\n".join(parts)


def earlier(path: Path, now: dict[str, Any]) -> dict[str, list[Record]]:
    """What an earlier run of the same commit and settings left in the file."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == now[key] for key in ("commit", "settings", "gpu"))
    return {key: before.get(key, []) if same else [] for key in ("loss", "methods")}


def main() -> int:
    parser = argparse.ArgumentParser(description="time fastkd on a GPU")
    parser.add_argument("out", type=Path)
    given = arguments(parser, seconds=400)
    chosen = settings(given.backend)
    results = environment("bash benchmarks/on_gpu.sh OUT timing") | {
        "gpu": gpu(torch.device("cuda", 0)) if chosen.device == "cuda" else None,
        "settings": asdict(chosen) | {"vocabularies": list(chosen.vocabularies)},
    }
    path = given.out / f"timing-{given.backend}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results |= earlier(path, results)
    kinds = {"loss": measure, "methods": measure_methods}
    done = {(kind, r["option"], r["dtype"], r["V"]) for kind in kinds for r in results[kind]}
    every = cases(chosen)
    left = [("loss", case) for case in every]
    left += [("methods", case) for case in every if case.option == "plain"]
    left = [(kind, c) for kind, c in left if (kind, c.option, c.dtype, c.V) not in done]
    begin = time.monotonic()
    while left and time.monotonic() - begin < given.seconds:
        kind, case = left.pop(0)
        results[kind].append(kinds[kind](case, chosen))
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{case}: done after {time.monotonic() - begin:.0f} s", flush=True)
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
    if results["loss"]:
        text = report(results)
        path.with_suffix(".md").write_text(text + "\n")
        print(text)
    if left:
        print(f"{len(left)} cases are left: run it again")
        return UNFINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
