"""What comes out: rows with a value per seed, tables of means and standard errors, JSON, plots."""

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sklearn
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

import fastkd

from .data import Splits
from .training import Networks, Settings, errors

ROOT = Path(__file__).parent.parent.parent
TEST, CHECK = "test error %", "validation error %"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class Row:
    """One line of a table; with `series` and `x` also a point of a curve."""

    name: str
    values: dict[str, list[float]]  # column: one per seed
    series: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class Experiment:
    title: str
    rows: list[Row]
    baseline: str  # a row, or the series of the same x, with which the others are compared
    x_label: str = ""  # of curves
    x_scale: str = "linear"
    reference: tuple[str, ...] = ()  # rows drawn as lines across the curves

    def baseline_of(self, row: Row) -> Row | None:
        """None: the row has none, or is one."""
        for other in self.rows:
            if other.name == self.baseline or (
                other.series == self.baseline and other.x == row.x is not None
            ):
                return None if other is row else other
        return None


def row(
    name: str,
    networks: Networks,
    splits: Splits,
    *,
    series: str | None = None,
    x: float | None = None,
    **columns: Tensor,
) -> Row:
    """The errors of the networks, and further columns [S]."""
    values = {
        CHECK: errors(networks.logits(splits.validation.inputs), splits.validation.labels),
        TEST: errors(networks.logits(splits.test.inputs), splits.test.labels),
    }
    return measured(name, {**values, **columns}, series=series, x=x)


def measured(
    name: str,
    values: Mapping[str, Tensor],
    *,
    series: str | None = None,
    x: float | None = None,
) -> Row:
    columns = {
        name.replace("_", " "): [round(value, 4) for value in column.tolist()]
        for name, column in values.items()
    }
    return Row(name, columns, series, x)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over the seeds and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _cell(values: Sequence[float] | None, sign: str = "") -> str:
    if values is None:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f} ± {error:.2f}"


def table(experiment: Experiment) -> str:
    """In Markdown: means ± standard errors; the last column is the difference of each seed's test
    error from the same seed's in the baseline.
    """
    names = list(dict.fromkeys(name for row in experiment.rows for name in row.values))
    header = ["", *names, f"test, less {experiment.baseline}"]
    lines = []
    for each in experiment.rows:
        last, baseline = "", experiment.baseline_of(each)
        if baseline is not None:
            pairs = zip(each.values[TEST], baseline.values[TEST], strict=True)
            last = _cell([a - b for a, b in pairs], "+")
        lines.append([each.name, *(_cell(each.values.get(name)) for name in names), last])
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    text = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (header, rule, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def plot(experiment: Experiment, path: Path) -> None:
    """Curves where the rows have series, else one bar of error per row."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(row.series for row in experiment.rows if row.series is not None)
    if names:
        for name in names:
            points = [row for row in experiment.rows if row.series == name]
            means, bars = zip(*(mean_and_error(row.values[TEST]) for row in points), strict=True)
            axes.errorbar(
                [row.x for row in points], means, bars, label=name, marker="o", markersize=4,
                capsize=2,
            )  # fmt: skip
        for style, name in zip(("--", ":", "-."), experiment.reference, strict=False):
            row = next(row for row in experiment.rows if row.name == name)
            mean, _ = mean_and_error(row.values[TEST])
            axes.axhline(mean, color="0.3", linewidth=1, linestyle=style, label=name)
        axes.set(xlabel=experiment.x_label, ylabel=TEST, yscale="log")
        scale = axes.yaxis
        if experiment.x_scale == "log":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    else:
        rows = experiment.rows[::-1]
        means, bars = zip(*(mean_and_error(row.values[TEST]) for row in rows), strict=True)
        axes.errorbar(means, range(len(rows)), xerr=bars, fmt="o", capsize=3)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set(xlabel=TEST, xscale="log")
        scale = axes.xaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_locator(NullLocator())
    figure.suptitle(experiment.title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def environment() -> dict[str, Any]:
    """What a result depends on. Nothing that names a person."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What a run itself leaves behind does not count.
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")
        commit = {"id": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastkd": fastkd.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
    }


def save(
    name: str, experiment: Experiment, settings: Settings, seconds: float, folder: Path
) -> None:
    """NAME.json and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    options = "".join(
        f" --{field.name} {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    )
    results = {
        "command": f"python -m examples.digits {name}{options}",
        **environment(),
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        **asdict(experiment),
    }
    rows = ",\n  ".join(json.dumps(row) for row in results.pop("rows"))  # a line each
    text = json.dumps(results, indent=1).removesuffix("\n}")
    (folder / f"{name}.json").write_text(
        f'{text},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8"
    )
    plot(experiment, folder / f"{name}.png")


def read(path: Path) -> tuple[Experiment, dict[str, Any]]:
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in results["rows"]]
    others = {k: results[k] for k in ("title", "baseline", "x_label", "x_scale")}
    return Experiment(rows=rows, reference=tuple(results["reference"]), **others), results


def update_readme(readme: Path, names: Sequence[str], folder: Path) -> None:
    """Writes the tables of all results that there are between the markers."""
    parts = []
    for name in names:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        experiment, results = read(path)
        plot(experiment, path.with_suffix(".png"))
        commit, versions, settings = (results[k] for k in ("commit", "versions", "settings"))
        source = f" at {commit['id'][:9]}{' (modified)' if commit['dirty'] else ''}"
        image = os.path.relpath(path.with_suffix(".png"), readme.parent)
        parts += [
            f"### {experiment.title}",
            f"`{results['command']}`: {settings['seeds']} seeds, {settings['epochs']} epochs, "
            f"{results['seconds']:.0f} s on {results['cores']} cores; fastkd {versions['fastkd']}"
            f"{source if commit else ''}, torch {versions['torch']}; {results['date'][:10]}.",
            table(experiment),
            f"![{experiment.title}]({image})",
        ]
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the tables: {BEGIN} and {END} are not in {readme.name}")
    body = "\n\n".join(parts)
    readme.write_text(f"{head}{begin}\n{body}\n{end}{tail}", encoding="utf-8")
