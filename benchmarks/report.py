"""Draws what was measured.

python -m benchmarks.report                  README.md's performance section, the plots, and beside
                                             every results file all of its numbers as a table
python -m benchmarks.report --results DIR    the tables and plots of DIR alone
"""

import argparse
import json
import re
from pathlib import Path

from . import budgets
from .cases import CONVERGED, HEADLINE, OPTIONS, OVERHEAD, SURE
from .figures import (
    OFF,
    PEERS,
    Record,
    Results,
    bandwidth,
    device_name,
    error,
    gradients,
    label,
    losses,
    of_add,
    of_copy,
    ours,
    passes,
    ratio,
    seconds,
    spread,
    timed,
    usual,
)
from .measure import CHECKED
from .store import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
BUSY = 0.5  # load on a machine that should have been idle
PLOTS = {
    "bandwidth": "Bandwidth of forward and backward against the vocabulary",
    "speedup": "Speed-up over eager PyTorch",
    "memory": "Peak memory against the vocabulary",
}
LEGEND = """\
Forward and backward at V = {V}, medians of {rounds} rounds in which all take turns, ± half the
interquartile range; ratios are the medians of those of the rounds. Bandwidth counts the bytes that
any implementation has to move: two tensors in, one out (one in where the teacher is sparse); *of
copy*: as a part of what `copy_` of the same logits reaches in the same rounds, *inplace*: of
`torch.add(a, b, out=c)`. Memory is the peak of what the step allocates, in N x V gradients: fastkd
/ inplace / eager{compiled}. Error: of the gradient against float64, the largest of {rows} rows,
fastkd / eager; a provider whose gradient is off by more than 1% says so. *float32*: 16-bit logits
are converted first.""".replace("\n", " ")


def load(folder: Path) -> dict[Path, Results]:
    """The results of every device, CPUs first."""
    files = sorted(folder.glob("*/cpu.json")) + sorted(folder.glob("*/cuda.json"))
    return {path: json.loads(path.read_text()) for path in files}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits at least, and no exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def headline(results: Results) -> str:
    processor, gpu, versions = (results[k] for k in ("processor", "gpu", "versions"))
    commit = results["commit"]
    source = f" at {commit['id'][:9]}{' (modified)' if commit['dirty'] else ''}" if commit else ""
    threads = f"{processor['threads']} threads on {processor['cores']} cores"
    on = f"{processor['instruction_set']}, {threads}"
    if gpu:
        clocks = [r["clock_mhz"] for r in results["cases"] if r.get("clock_mhz")]
        seen = f", {min(clocks):.0f} to {max(clocks):.0f} MHz seen" if clocks else ""
        on = f"driver {gpu.get('driver_version', 'unknown')}, CUDA {gpu['cuda']}{seen}"
    others = ", ".join(
        f"{name} {version}" for name, version in versions.items() if name != "fastkd"
    )
    return (
        f"**{device_name(results)}** ({on}): fastkd {versions['fastkd']}{source}, {others}; "
        f"{results['date'][:10]}; `{results['command']}`."
    )


def at_headline(results: Results) -> list[Record]:
    order = {option: i for i, option in enumerate(OPTIONS)}
    records = [r for r in usual(results) if r["V"] == HEADLINE]
    return sorted(records, key=lambda r: (r["dtype"], order[r["option"]]))


def speedup(record: Record, name: str, than: str) -> str:
    figures = record["providers"].get(name, {})
    if "failed" in figures:
        return "no memory" if figures["failed"] == "out of memory" else "failed"
    if not timed(record, name, than):
        return ""
    off = error(record, name) or 0.0
    return f"{ratio(record, name, than):.1f}x" + (f", off by {off:.0%}" if off > OFF else "")


def main_table(results: Results) -> str:
    records = [r for r in at_headline(results) if timed(r, ours(r))]
    if not records:
        return ""
    peers = [name for name in PEERS if any(name in r["providers"] for r in records)]
    triton = any(timed(r, "fastkd triton") and ours(r) != "fastkd triton" for r in records)
    compiled = "torch.compile" in peers

    def row(r: Record) -> list[str]:
        us, inplace = ours(r), f"{ours(r)}, inplace"
        memory = [us, inplace, "eager", *(["torch.compile"] if compiled else [])]
        return [
            f"{r['option']}, {r['dtype']}",
            f"{number(seconds(r, us) * 1e3)} ±{spread(r, us):.0%}",
            number(bandwidth(r, us) / 1e9),
            f"{of_copy(r, us):.0%}",
            f"{of_add(r, inplace):.0%}" if timed(r, inplace) else "",
            *([f"{of_copy(r, 'fastkd triton'):.0%}" if timed(r, "fastkd triton") else ""]
              if triton else []),
            *(speedup(r, name, us) for name in peers),
            " / ".join(f"{gradients(r, n):.1f}" if timed(r, n) else "-" for n in memory),
            " / ".join(f"{e:.0e}" for n in (us, "eager") if (e := error(r, n)) is not None),
        ]  # fmt: skip

    header = [
        f"loss, N = {records[0]['N']}", "ms", "GB/s", "of copy", "inplace, of add",
        *(["triton, of copy"] if triton else []), *(f"than {name}" for name in peers),
        "memory", "error",
    ]  # fmt: skip
    legend = LEGEND.format(
        V=HEADLINE,
        rounds=results["settings"]["rounds"],
        compiled=" / torch.compile" if compiled else "",
        rows=CHECKED,
    )
    return f"{table(header, [row(r) for r in records])}\n\n{legend}"


def full_table(results: Results) -> str:
    """Every provider of every case."""
    rows = []
    for r in losses(results):
        for name, figures in r["providers"].items():
            if timed(r, name):
                off = error(r, name)
                numbers = [
                    number(seconds(r, name) * 1e3),
                    f"{spread(r, name):.0%}",
                    number(bandwidth(r, name) / 1e9),
                    f"{of_copy(r, name):.0%}",
                    f"{gradients(r, name):.2f}" if "peak_bytes" in figures else "",
                    "" if off is None else f"{off:.1e}",
                ]
            else:
                numbers = [figures["failed"], *[""] * 5]
            case = f"{r['option']}{passes(r)}, {r['dtype']}, {r['N']} x {r['V']}"
            rows.append([case, name, *numbers])
    header = ["case", "provider", "ms", "±", "GB/s", "of copy", "memory, N x V", "gradient error"]
    return table(header, rows)


def specials(results: Results) -> list[str]:
    parts = []
    for r in results["cases"]:
        if r["option"] == OVERHEAD and "providers" in r:
            calls = ", ".join(f"{n} {seconds(r, n) * 1e6:.0f}" for n in r["providers"])
            shape = f"{r['N']} x {r['V']}"
            parts.append(
                f"A call on {shape} logits, forward and backward, in us, of {r['rounds']} rounds "
                f"those in which the last was fastest: {calls}."
            )
        if r["option"] == CONVERGED and "providers" in r:
            found = {n: f["loss_error"] for n, f in r["providers"].items() if "loss_error" in f}
            errors = ", ".join(f"{name} {value:.0e}" for name, value in found.items())
            parts.append(
                f"Relative error of the loss where the student is all but the teacher, "
                f"{r['dtype']}, V = {r['V']}, a loss of {r['loss']:.1e}: {errors}."
            )
        if r["option"] == SURE and "providers" in r:
            errors = ", ".join(f"{n} {e:.0e}" for n in r["providers"] if (e := error(r, n)))
            parts.append(
                f"Relative error of the gradient of a row where both sides put 0.5 to 1 - 6e-6 on "
                f"one class, {r['dtype']}, V = {r['V']}, the worst of KL, with a hard term, and "
                f"JSD: {errors}."
            )
    return parts


def without(results: Results) -> list[str]:
    """What is not in the table, and why."""
    names = [n for n in results["unavailable"] if "," not in n and not n.startswith("fastkd")]
    reasons = (f"{n} ({'; '.join(results['unavailable'][n])})" for n in names)
    parts = [f"Not measured there: {', '.join(reasons)}."] if names else []
    failures = [
        f"{label(r)}: {failed}"
        for r in results["cases"]
        if (failed := r.get("failed") or r["providers"].get(ours(r), {}).get("failed"))
    ]
    return parts + ([f"Failed there: {'; '.join(failures)}."] if failures else [])


def step(path: Path) -> str:
    """The training step of examples/distill_lm.py."""
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    s = results["settings"]
    rows = [
        [run["name"], f"{run['step_ms']:.0f}", f"{run['loss_ms']:.0f}",
         f"{run['loss_ms'] / run['step_ms']:.0%}", f"{run['peak_mib']:,.0f}"]
        for run in results["runs"]
        if run["name"] != "teacher"
    ]  # fmt: skip
    return (
        f"A training step of [examples/distill_lm.py](examples/distill_lm.py), its vocabulary "
        f"padded to {s['pad_vocab']} classes, {s['batch']} x {s['context']} tokens, float32, alpha "
        f"{s['alpha']:g}:\n\n"
        + table(["student", "step, ms", "of it the loss, ms", "share", "peak memory, MiB"], rows)
    )


def section(everything: dict[Path, Results]) -> str:
    """What the README shows."""
    parts = []
    for path, results in everything.items():
        folder = f"benchmarks/results/{path.parent.name}"
        pictures = [f"![{text}]({folder}/{path.stem}_{name}.svg)" for name, text in PLOTS.items()]
        parts += [
            headline(results),
            main_table(results),
            *specials(results),
            *without(results),
            step(path.with_name("step.json")),
            f"Every number of this device: [{path.stem}.md]({folder}/{path.stem}.md).",
            *pictures,
        ]
    for kind, stem in (("CPU", "cpu"), ("GPU", "cuda")):
        if not any(path.stem == stem for path in everything):
            parts.append(f"{kind}: not yet measured.")
    parts.append("The numbers that fastkd is built to reach:")
    parts.append(table(budgets.HEADER, budgets.rows(everything.values())))
    return "\n\n".join(part for part in parts if part)


def details(path: Path, results: Results) -> str:
    load = results["processor"]["load_before"]
    parts = [
        headline(results),
        f"Load before the run: {load}{'' if load < BUSY else '. **The machine was busy.**'}",
        main_table(results),
        *specials(results),
        *without(results),
        step(path.with_name("step.json")),
        table(budgets.HEADER, budgets.rows([results])),
        full_table(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_BETWEEN = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?=\n{re.escape(END)})", re.DOTALL)


def shown(readme: str) -> str:
    """The performance section as it stands in the README."""
    found = _BETWEEN.search(readme)
    if not found:
        raise ValueError(f"no place for the results: {BEGIN} and {END} are not there")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="tables and plots from the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="their folder")
    given = parser.parse_args()

    everything = load(given.results)
    for path, results in everything.items():
        path.with_suffix(".md").write_text(details(path, results))
    text = section(everything)
    print(text)
    if given.results == RESULTS:
        README.write_text(_BETWEEN.sub(lambda _: text, README.read_text()))

    from .plots import draw  # matplotlib, without which there are the tables

    for path, results in everything.items():
        for name, title in PLOTS.items():
            draw(name, title, results, path.with_name(f"{path.stem}_{name}.svg"))


if __name__ == "__main__":
    main()
