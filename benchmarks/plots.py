"""The pictures: SVG, the same bytes for the same results."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import DTYPES, HEADLINE
from .figures import (
    PEERS,
    Record,
    Results,
    bandwidth,
    device_name,
    gradients,
    ours,
    ratio,
    timed,
    usual,
)

COLOURS = {
    "fastkd": "#1f4e9c",
    "fastkd, inplace": "#6fa8ff",
    "fastkd triton": "#0b8a8a",
    "eager": "#8a8a8a",
    "eager float32": "#c4c4c4",
    "torch.compile": "#e07b00",
    "torch.compile float32": "#f5c48a",
    "Liger-Kernel": "#7a3fa0",
    "TRL": "#b3261e",
    "speculators": "#4f8a10",
}
matplotlib.rcParams["svg.hashsalt"] = "fastkd"
matplotlib.rcParams["svg.fonttype"] = "none"


def draw(name: str, title: str, results: Results, path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{title}\n{device_name(results)}", fontsize=11)
    {"bandwidth": _bandwidth, "speedup": _speedup, "memory": _memory}[name](figure, usual(results))
    figure.savefig(path, format="svg", metadata={"Date": None})


def _providers(record: Record) -> dict[str, str]:
    """The name in the picture: the name in the record."""
    us = ours(record)
    names = {"fastkd": us, "fastkd, inplace": f"{us}, inplace"}
    if us != "fastkd triton":
        names["fastkd triton"] = "fastkd triton"
    names |= {name: name for name in PEERS}
    return {shown: name for shown, name in names.items() if timed(record, name)}


def _against_vocabulary(
    figure: Figure, records: list[Record], value: Callable, label: str, scale: str
) -> None:
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), DTYPES, strict=True):
        chosen = [r for r in records if r["option"] == "plain" and r["dtype"] == dtype]
        chosen.sort(key=lambda r: r["V"])
        curves: dict[str, list[tuple[int, float]]] = {}
        for r in chosen:
            for shown, name in _providers(r).items():
                curves.setdefault(shown, []).append((r["V"], value(r, name)))
            if value is _gigabytes:
                curves.setdefault("copy", []).append((r["V"], value(r, "copy")))
        for shown, points in curves.items():
            style = {"color": "black", "linestyle": ":"} if shown == "copy" else {
                "color": COLOURS[shown], "marker": "o", "markersize": 4}  # fmt: skip
            axes.plot(*zip(*points, strict=True), label=shown, **style)
        axes.set(title=f"plain, {dtype}", xlabel="V", yscale=scale)
        axes.set_xticks([r["V"] for r in chosen], [f"{r['V'] // 1000}k" for r in chosen])
        _clean(axes)
    figure.axes[0].set_ylabel(label)
    _legend(figure)


def _gigabytes(record: Record, name: str) -> float:
    return bandwidth(record, name) / 1e9


def _mib_per_row(record: Record, name: str) -> float:
    return gradients(record, name) * record["tensor_bytes"] / record["N"] / 2**20


def _bandwidth(figure: Figure, records: list[Record]) -> None:
    _against_vocabulary(figure, records, _gigabytes, "GB/s, of the bytes that must move", "log")


def _memory(figure: Figure, records: list[Record]) -> None:
    _against_vocabulary(figure, records, _mib_per_row, "MiB per row (token)", "linear")


def _speedup(figure: Figure, records: list[Record]) -> None:
    records = [r for r in records if r["V"] == HEADLINE and timed(r, "eager", ours(r))]
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), DTYPES, strict=True):
        chosen = {r["option"]: r for r in records if r["dtype"] == dtype}
        shown_anywhere = {name for r in chosen.values() for name in _providers(r)} - {"eager"}
        names = [name for name in COLOURS if name in shown_anywhere]
        width = 0.8 / max(1, len(names))
        for i, shown in enumerate(names):
            bars = [
                (x + (i - len(names) / 2 + 0.5) * width, ratio(r, "eager", _providers(r)[shown]))
                for x, r in enumerate(chosen.values())
                if shown in _providers(r)
            ]
            axes.bar(*zip(*bars, strict=True), width, color=COLOURS[shown], label=shown)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=f"{dtype}, V = {HEADLINE}", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(range(len(chosen)), list(chosen), rotation=35, ha="right")
        _clean(axes)
    figure.axes[0].set_ylabel("times faster than eager PyTorch")
    _legend(figure)


def _clean(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """One for both halves."""
    labelled = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    order = [*COLOURS, "copy"]
    labels = sorted(labelled, key=order.index)
    figure.legend([labelled[x] for x in labels], labels, loc="outside right", frameon=False)
