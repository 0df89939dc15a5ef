"""The report: Markdown tables from the results of one run.

python -m benchmarks.report benchmarks/results/<processor>/cpu.json     everything, to the terminal
... --update-readme     the headline table, between the markers in README.md
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .cases import PRUNING

README = Path(__file__).parent.parent / "README.md"
BUSY = 0.5  # load on a machine that should have been idle
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
LEGEND = (
    "A pair is one class of one row. `torch.add(a, b, out=c)` moves the bytes that a loss has to "
    "move: two tensors in, one out. Memory is the peak of what forward and backward allocate, in "
    "N x V gradients."
)

METHODS = (
    "The other losses, in ns per pair and beside `kd_loss` on the same logits: decoupled, from "
    "probabilities, with `top_k=64`, and `topk_kd_loss` from the 64 likeliest classes:"
)

Record = dict[str, Any]  # one case and what its providers needed


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def has(record: Record, *names: str) -> bool:
    return all(name in record["providers"] for name in names)


def ratio(record: Record, slow: str, fast: str) -> float:
    providers = record["providers"]
    return providers[slow]["median_s"] / providers[fast]["median_s"]


def ns_per_pair(record: Record, name: str) -> float:
    return record["providers"][name]["median_s"] / (record["N"] * record["V"]) * 1e9


def allocated(record: Record, name: str) -> float:
    return record["providers"][name]["gradients_allocated"]


def times_eager(record: Record) -> float:
    return ratio(record, "eager", "fastkd")


def times_compiled(record: Record) -> float:
    return ratio(record, "torch.compile", "fastkd")


def of_bandwidth(record: Record) -> float:
    """What inplace reaches of the bandwidth of torch.add, which moves as many bytes."""
    return ratio(record, "torch.add", "fastkd inplace")


def label(record: Record) -> str:
    return f"{record['option']}, {record['dtype']}, V = {record['V']}"


def headline(results: dict[str, Any]) -> str:
    processor, versions, commit = (results[k] for k in ("processor", "versions", "commit"))
    source = f" at {commit['id'][:9]}{' (modified)' if commit['dirty'] else ''}" if commit else ""
    return (
        f"{processor['name']}, {processor['instruction_set']}, {processor['threads']} threads on "
        f"{processor['cores']} cores; fastkd {versions['fastkd']}{source}, "
        f"torch {versions['torch']}, Python {versions['python']}; {results['date'][:10]}. "
        f"Forward and backward, medians of {results['settings']['rounds']} rounds in which all "
        "take turns."
    )


def markdown(results: dict[str, Any]) -> str:
    """What the README shows."""
    rows = [
        [
            label(r),
            f"{ns_per_pair(r, 'fastkd'):.2f}",
            f"{times_eager(r):.1f}x",
            f"{times_compiled(r):.1f}x",
            f"{ns_per_pair(r, 'fastkd inplace'):.2f}",
            f"{of_bandwidth(r):.0%}",
            " / ".join(
                f"{allocated(r, name):.1f}"
                for name in ("fastkd", "fastkd inplace", "eager", "torch.compile")
            ),
        ]
        for r in results["loss"]
    ]
    header = [
        "loss",
        "ns per pair",
        "faster than eager",
        "than torch.compile",
        "inplace, ns per pair",
        "inplace, of the bandwidth of `torch.add`",
        "memory: fastkd / inplace / eager / compile",
    ]
    parts = [headline(results)]
    if rows:
        parts += [table(header, rows), LEGEND]
    if results["methods"]:
        parts += [METHODS, _by_provider(results["methods"], _beside_kd_loss)]
    if overhead := results["overhead"]:
        calls = ", ".join(
            f"{name} {timing['median_s'] * 1e6:.0f}"
            for name, timing in overhead["providers"].items()
        )
        shape = f"{overhead['N']} x {overhead['V']}"
        parts.append(f"A call on {shape} logits, forward and backward, in microseconds: {calls}.")
    return "\n\n".join(parts)


def _by_provider(records: list[Record], show: Callable[[Record, str], str]) -> str:
    names = list(dict.fromkeys(name for r in records for name in r["providers"]))
    rows = [[label(r), *(show(r, name) if has(r, name) else "" for name in names)] for r in records]
    return table(["", *names], rows)


def _beside_kd_loss(record: Record, name: str) -> str:
    times = "" if name == "kd_loss" else f" ({ratio(record, name, 'kd_loss'):.2f}x)"
    return f"{ns_per_pair(record, name):.2f}{times}"


def _timing(record: Record, name: str) -> str:
    timing = record["providers"][name]
    return f"{ns_per_pair(record, name):.2f} ±{timing['iqr_s'] / timing['median_s'] / 2:.0%}"


def _error(record: Record, name: str) -> str:
    error = record["providers"][name].get("gradient_error")
    return "" if error is None else f"{error:.0e}"


class Budget(NamedTuple):
    """A number to reach, in every case: at most or at least `limit`."""

    what: str
    limit: float
    aim: float | None
    measured: dict[str, float]
    at_most: bool = False

    def row(self) -> list[str]:
        worst = (max if self.at_most else min)(self.measured, key=lambda k: self.measured[k])
        value = self.measured[worst]
        return [
            self.what,
            f"{'at most' if self.at_most else 'at least'} {self.limit:g}",
            "" if self.aim is None else f"{self.aim:g}",
            f"{value:.3g}",
            worst,
            self.verdict(value),
        ]

    def verdict(self, value: float) -> str:
        def reached(limit: float) -> bool:
            return value <= limit if self.at_most else value >= limit

        if not reached(self.limit):
            return f"MISSED by {abs(value / self.limit - 1):.1%}"
        return "met, and the aim" if self.aim is not None and reached(self.aim) else "met"


def budgets(results: dict[str, Any]) -> list[Budget]:
    every = results["loss"]
    pruned = [r for r in every if r["option"] in PRUNING]
    unpruned = [r for r in every if r["option"] not in PRUNING]
    plain = [r for r in every if r["option"] == "plain" and r["dtype"] == "float32"]

    def of(records: list[Record], value: Callable[[Record], float]) -> dict[str, float]:
        return {label(r): value(r) for r in records}

    without_pruning = of(pruned, lambda r: ratio(r, "fastkd", "fastkd unpruned"))
    memory = of(every, lambda r: allocated(r, "fastkd"))
    memory_inplace = of(every, lambda r: allocated(r, "fastkd inplace"))
    methods = results["methods"]

    def beside(*names: str) -> dict[str, float]:
        return {f"{name}, {label(r)}": ratio(r, name, "kd_loss") for r in methods for name in names}

    providers = results["overhead"]["providers"] if results["overhead"] else {}
    calls = {n: t["median_s"] * 1e6 for n, t in providers.items() if n == "fastkd"}
    lines = [
        Budget("times eager", 6, 10, of(unpruned, times_eager)),
        Budget("times torch.compile", 3, 5, of(every, times_compiled)),
        Budget("plain, inplace, float32: of torch.add's", 0.5, 0.7, of(plain, of_bandwidth)),
        Budget("pruned: times eager", 10, None, of(pruned, times_eager)),
        Budget("pruned: times its time without pruning", 1.6, None, without_pruning, at_most=True),
        Budget("memory, in gradients", 1.01, None, memory, at_most=True),
        Budget("memory, in gradients, inplace", 0.01, None, memory_inplace, at_most=True),
        Budget(
            "methods: times kd_loss",
            1.15,
            None,
            beside("dkd_loss", "probabilities", "restrict"),
            at_most=True,
        ),
        Budget(
            "64 classes: times kd_loss",
            0.75,
            None,
            beside("bucket", "restrict", "renormalize"),
            at_most=True,
        ),
        Budget("microseconds per call", 60, 40, calls, at_most=True),
    ]
    return [line for line in lines if line.measured]


def report(results: dict[str, Any]) -> str:
    """Everything: what the README shows, every provider's numbers, and the budgets."""
    load = results["processor"]["load_before"]
    parts = [
        f"Load before the run: {load}{'' if load < BUSY else '. THE MACHINE WAS BUSY.'}",
        markdown(results),
    ]
    if results["loss"]:
        parts += [
            "ns per pair, and half the interquartile range:",
            _by_provider(results["loss"], _timing),
            "Relative L2 error of the gradient, against the definition on the logits in float32:",
            _by_provider(results["loss"], _error),
        ]
    header = ["budget", "limit", "aim", "worst", "in", ""]
    parts.append(table(header, [line.row() for line in budgets(results)]))
    return "\n\n".join(parts)


def update(text: str, results: dict[str, Any]) -> str:
    """`text` with the table between the markers replaced."""
    between = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"no place for the table: {BEGIN} and {END} are not there")
    return between.sub(lambda _: f"\n{markdown(results)}\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="the tables of one run, in Markdown")
    parser.add_argument("results", type=Path)
    parser.add_argument("--update-readme", action="store_true", help="write them to README.md too")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    print(report(results))
    if arguments.update_readme:
        README.write_text(update(README.read_text(), results))


if __name__ == "__main__":
    main()
