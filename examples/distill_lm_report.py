"""The report of distill_lm.py: the table, the plot, and what the numbers depend on.

python examples/distill_lm_report.py benchmarks/results/distill_lm.json     to the terminal
... --update-readme     and between the markers in README.md; with it the runs beside it that were
                        made with other options, distill_lm_*.json
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import tokenizers
import torch
from matplotlib.figure import Figure

import fastkd

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PLOT = "examples/distill_lm.png"  # where the README expects it
SECTIONS = "distillation", "other options"  # of README.md, between <!-- name --> and <!-- /name -->
POINTS = 100  # of a training curve, at most
HEADER = ["", "validation loss", "tokens/s", "step", "of it the loss", "share", "peak memory"]

Results = dict[str, Any]  # what distill_lm.py --json writes


def environment(device: torch.device) -> Results:
    """What a result depends on. Nothing that names a person."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": {
            "name": name[1] if name else platform.processor() or platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {
            "fastkd": fastkd.__version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _commit() -> Results | None:
    """The commit of the source tree, and whether it was changed since; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What a run itself leaves behind does not count.
        left = (":!benchmarks/results", ":!README.md", f":!{PLOT}")
        return {
            "id": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", ".", *left)),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def averaged(curve: list[float]) -> list[tuple[int, float]]:
    """A curve with a value per step as (last step, mean) of at most POINTS blocks of steps."""
    size = math.ceil(len(curve) / POINTS)
    blocks = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(min((i + 1) * size, len(curve)), fmean(block)) for i, block in enumerate(blocks)]


def table(results: Results) -> str:
    """In Markdown, its columns aligned for the terminal."""
    rows = [
        [
            run["name"],
            f"{run['validation'][-1][1]:.4f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['step_ms']:.1f} ms",
            f"{run['loss_ms']:.1f} ms",
            f"{run['loss_ms'] / run['step_ms']:.0%}",
            f"{run['peak_mib']:,.0f} MiB",
        ]
        for run in results["runs"]
    ]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (HEADER, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def agreement(results: Results) -> str:
    difference = results["difference"]
    return (
        f"The distilled curves differ by at most {difference['training']:.1g} in training and "
        f"{difference['validation']:.1g} in validation ({results['tolerance']:g} is allowed)."
    )


def markdown(results: Results) -> str:
    """What the README shows."""
    s, processor, versions, commit = (
        results[k] for k in ("settings", "processor", "versions", "commit")
    )
    where = results["gpu"] or (
        f"{processor['name']}, {processor['instruction_set']}, {processor['threads']} threads on "
        f"{processor['cores']} cores"
    )
    source = f" at {commit['id'][:9]}{' (modified)' if commit['dirty'] else ''}" if commit else ""
    pruning = f", top-k {s['top_k']}" if s["top_k"] else ""
    percentiles = s.get("percentiles") or [s["bottom_percentile"]]
    if any(percentiles):
        steps = ", ".join(f"{percentile:.3g}" for percentile in percentiles)
        pruning += f", bottom {steps} % pruned"
    vocab = f"{s['vocab']}, padded to {s['pad_vocab']}" if s.get("pad_vocab") else s["vocab"]
    return "\n\n".join(
        [
            f"{results['text']}, a vocabulary of {vocab}; {s['teacher_steps']} steps of the "
            f"teacher and {s['steps']} of each student, of {s['batch']} x {s['context']} tokens; "
            f"temperature {s['temperature']:g}, alpha {s['alpha']:g}{pruning}. {where}; "
            f"fastkd {versions['fastkd']}{source}, torch {versions['torch']}; "
            f"{results['date'][:10]}; {results['seconds'] / 60:.1f} minutes in all.",
            table(results),
            agreement(results),
            f"![Loss curves of the students]({PLOT})",
        ]
    )


def other_options(folder: Path) -> str:
    """The runs beside the usual one: what each student came to."""
    lines = ["| command | teacher | student | validation loss |", "| --- | ---: | --- | ---: |"]
    for path in sorted(folder.glob("distill_lm*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        settings, (teacher, *students) = results["settings"], results["runs"]
        options = "".join(
            f" --{name.replace('_', '-')} {settings[name]:g}"
            for name in ("top_k", "prune_to", "sparse_teacher")
            if settings.get(name)
        )
        for run in students:
            if run["name"] != "distilled, eager":
                final, of_teacher = (f"{r['validation'][-1][1]:.4f}" for r in (run, teacher))
                lines.append(
                    f"| `distill_lm.py{options}` | {of_teacher} | {run['name']} | {final} |"
                )
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """The curves; the eager run is a wide line below the dashes of the fastkd run."""
    teacher, *students = results["runs"]
    styles: list[dict[str, Any]] = [
        {"color": "0.45", "linewidth": 1.5},
        {"color": "#ffb870", "linewidth": 6},
        {"color": "#1f4e9c", "linewidth": 1.8, "linestyle": (0, (3, 2))},
        {"color": "#2a8a57", "linewidth": 1.5},  # of a sparse teacher, if there is one
    ]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(students, styles[: len(students)], strict=True):
        for axes, curve in ((left, run["training"]), (right, run["validation"])):
            axes.plot(*zip(*curve, strict=True), label=run["name"], **style)
    final = teacher["validation"][-1][1]
    right.axhline(final, color="0.2", linewidth=1, linestyle=":", label="teacher, at its end")
    left.set(title="Training: what each student minimises", xlabel="step", ylabel="loss")
    right.set(title="Validation: cross-entropy", xlabel="step", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="the report of one run, in Markdown")
    parser.add_argument("results", type=Path, help="what distill_lm.py --json wrote")
    parser.add_argument("--update-readme", action="store_true", help="put it into README.md too")
    args = parser.parse_args()
    try:
        text = markdown(json.loads(args.results.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"no results in {args.results}: {error!r}")
    print(text)
    if args.update_readme:
        readme = README.read_text(encoding="utf-8")
        for name, shown in zip(SECTIONS, (text, other_options(args.results.parent)), strict=True):
            head, begin, rest = readme.partition(f"<!-- {name} -->")
            _, end, tail = rest.partition(f"<!-- /{name} -->")
            if not begin or not end:
                parser.error(f"{README.name} has no place for {name}")
            readme = f"{head}{begin}\n{shown}\n{end}{tail}"
        README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
