"""Schedules: what a distillation run changes from epoch to epoch, or from batch to batch.

Pure functions of the epoch, counted from 0 (or of any other unit in which the whole run is counted,
such as the step), for a plain loop or for the attributes of :class:`fastkd.KDLoss`::

    loss = fastkd.KDLoss()
    for epoch in range(epochs):
        loss.temperature = schedules.epoch_adaptive_temperature(epoch, epochs)
        loss.bottom_percentile = schedules.pruning_percentile(epoch, epochs)
        for inputs, labels in batches:
            loss(student(inputs), teacher(inputs), labels).backward()

Where all are used: the temperature of the epoch, then the pruning, then the rows' losses under
both, then the temperature per row, and the warm-up factor on the soft term.

To stop distilling early (Cho & Hariharan 2019): ``loss.alpha = 0.9 if epoch < stop else 0.0``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .core.checks import check_labels, check_temperature, is_number

Value = TypeVar("Value")
PROGRESSIONS = ("geometric", "cubic", "linear")


def _check(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """A finite number from `low` (`above`: greater than it) to `high`."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high or (above and value == low) or math.isinf(value):
        lowest = f"greater than {low}" if above else f"at least {low}"
        highest = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name} must be {lowest}{highest} and finite, got {value}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


def _stage(epoch: float, epochs: float, stages: int) -> int:
    """Which of `stages` equal parts of the run `epoch` lies in; the last one once it is over."""
    _check("epoch", epoch, 0)
    _check("epochs", epochs, 0, above=True)
    return min(int(epoch * stages // epochs), stages - 1)


def in_equal_parts(values: Sequence[Value], epoch: float, epochs: float) -> Value:
    """The value whose turn it is, where each has an equal part of the run.

    Args:
        values: one per part, at least one.
        epoch: from 0; from `epochs` on the last value stays.
        epochs: how many there are.

    Raises:
        TypeError: a number that is none.
        ValueError: no values, epoch < 0 or epochs <= 0.

    Examples:
        >>> [schedules.in_equal_parts("ab", epoch, 5) for epoch in range(6)]
        ['a', 'a', 'a', 'b', 'b', 'b']
    """
    if len(values) == 0:
        raise ValueError("values must hold at least one value")
    return values[_stage(epoch, epochs, len(values))]


def epoch_adaptive_temperature(
    epoch: float, epochs: float, temperature: float = 4.0, delta: float = 0.4, stages: int = 8
) -> float:
    """EAT: from temperature * (1 + delta) down to temperature * (1 - delta) in equal stages.

    A high temperature first shows the student how the teacher relates all classes, a low one later
    lets it settle on the likely ones. The paper gives the two ends and 8 stages of 10 epochs, with
    delta = 0.4 best for the smaller student and 0.2 for the larger; the steps between are linear
    here: ``temperature * (1 + delta - 2 * delta * stage / (stages - 1))``.

    Args:
        epoch: from 0; from `epochs` on the last stage stays.
        epochs: how many there are.
        temperature: the middle of the range, > 0.
        delta: half its width as a share of `temperature`, in [0, 1).
        stages: how many temperatures; 1 keeps the first.

    Returns:
        The temperature, a float.

    Raises:
        TypeError, ValueError: an argument that is none of this.

    Examples:
        >>> [round(schedules.epoch_adaptive_temperature(e, 80), 2) for e in (0, 9, 10, 79, 80)]
        [5.6, 5.6, 5.14, 2.4, 2.4]
    """
    _check("temperature", temperature, 0, above=True)
    _check("delta", delta, 0)
    if delta >= 1:
        raise ValueError(f"delta must be less than 1, which leaves no temperature, got {delta}")
    _check_count("stages", stages)
    stage = _stage(epoch, epochs, stages)
    return temperature * (1 + delta - 2 * delta * stage / max(stages - 1, 1))


def pruning_percentile(
    epoch: float, epochs: float, percentiles: Sequence[float] = (0.0, 40 / 3, 80 / 3, 40.0)
) -> float:
    """LP: the `bottom_percentile` of the epoch, each of `percentiles` over an equal part.

    The teacher's smallest logits are noise to a small student: more of them are left out the longer
    it has learnt. The default goes from the paper's 0 % to its 40 % in four linear parts (the paper
    gives the ends and the four parts). The label's class may be pruned from the soft term; the hard
    term is never pruned.

    Args:
        epoch: from 0; from `epochs` on the last percentile stays.
        epochs: how many there are.
        percentiles: each in [0, 100), at least one.

    Returns:
        The percentile, a float; :func:`fastkd.kd_loss` drops floor(V * percentile / 100) classes.

    Raises:
        TypeError, ValueError: an argument that is none of this.

    Examples:
        >>> [round(schedules.pruning_percentile(e, 80), 1) for e in (0, 20, 40, 60)]
        [0.0, 13.3, 26.7, 40.0]
    """
    for percentile in percentiles:
        _check("percentiles", percentile, 0)
        if percentile >= 100:
            raise ValueError(f"percentiles must be less than 100, got {percentile}")
    return float(in_equal_parts(percentiles, epoch, epochs))


def data_adaptive_temperature(
    row_loss: Tensor,  # [...], one per row
    temperature: float | Tensor,
    fraction: float = 0.1,
    delta: float = 0.05,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """DAT: per row, a higher temperature where the batch is hardest, a lower one where easiest.

    Of the n rows that count, the floor(fraction * n) of largest loss get temperature * (1 + delta),
    as many of smallest loss temperature * (1 - delta), all others `temperature`. Equal losses rank
    by their position, the first lowest; a NaN ranks above infinity. The paper ranks the KL
    divergence at the temperature of the epoch, under the pruning of the epoch::

        with torch.no_grad():
            row_loss = fastkd.kd_loss(student, teacher, labels, temperature=T, reduction="none")
        T_row = schedules.data_adaptive_temperature(row_loss, T, labels=labels)
        loss = fastkd.kd_loss(student, teacher, labels, temperature=T_row)

    Args:
        row_loss: floating, in any shape, all of it one batch; a constant here.
        temperature: > 0, a number or one per row.
        fraction: of the rows at each end, in [0, 0.5].
        delta: in [0, 1).
        labels: one per row, as in :func:`fastkd.kd_loss`; without them every row counts. Rows
            labelled `ignore_index` have no rank and keep `temperature`.
        ignore_index: the label of rows that do not count.

    Returns:
        One temperature per row, in the shape of `row_loss`: in the dtype of `temperature` where it
        is a tensor, else of `row_loss` where that is float64, else float32; without a gradient, and
        computed with no device sync.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a value out of range, or shapes and devices that do not fit `row_loss`.

    Examples:
        >>> schedules.data_adaptive_temperature(torch.arange(10.0), 4.0)[[0, 1, 8, 9]]
        tensor([3.8000, 4.0000, 4.0000, 4.2000])
    """
    if not isinstance(row_loss, Tensor):
        raise TypeError(f"row_loss must be a torch.Tensor, got {type(row_loss).__name__}")
    if not row_loss.is_floating_point():
        raise TypeError(f"row_loss must be of a floating dtype, got {row_loss.dtype}")
    _check("fraction", fraction, 0, 0.5)
    _check("delta", delta, 0)
    if delta >= 1:
        raise ValueError(f"delta must be less than 1, which leaves no temperature, got {delta}")
    like = row_loss.detach().unsqueeze(-1)  # shaped as logits are, for the checks
    temperature = check_temperature("temperature", temperature, like)
    if labels is not None:
        labels = check_labels(labels, like, torch.iinfo(torch.int64).max, ignore_index)

    flat = row_loss.detach().reshape(-1)
    counting = torch.ones_like(flat, dtype=torch.bool) if labels is None else labels != ignore_index
    order = flat.argsort(stable=True)
    # The rank of a row among those that count: how many of them come before it.
    rank = torch.empty_like(order)
    rank[order] = counting[order].cumsum(0) - 1
    count = counting.sum()
    double = torch.float32 if flat.device.type == "mps" else torch.float64
    # As in number_kept: 0.29 * 100 is 28.999999999999996.
    n = (count.to(double) * fraction + 1e-6).floor()

    if not isinstance(temperature, Tensor):
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        temperature = torch.full_like(flat, temperature, dtype=dtype)
    temperature = temperature.detach()
    warmer = torch.where(counting & (rank >= count - n), temperature * (1 + delta), temperature)
    cooler = torch.where(counting & (rank < n), temperature * (1 - delta), warmer)
    return cooler.reshape(row_loss.shape)


class Stage(NamedTuple):
    """One stage of a compression in several: what is left at its end, and its temperature."""

    keep: float  # of the weights, or of the classes; in (0, 1]
    temperature: float


def stages(
    count: int = 4,
    keep: float = 0.3,
    temperature: float | Sequence[float] = 2.0,
    progression: str = "geometric",
) -> list[Stage]:
    """Multi-stage compression: from all of it (keep 1, not a stage) to `keep` in `count` stages.

    After every stage the compressed student is distilled before the next one begins; a single stage
    is one-shot compression. :func:`enough_stages` says how many are worth it. ::

        for stage in schedules.stages(4, keep=0.1):
            prune(student, stage.keep)
            train(student, fastkd.KDLoss(temperature=stage.temperature))

    Where the classes are what is pruned: ``bottom_percentile=100 * (1 - stage.keep)``. The sources
    (arXiv:2601.03195) speak of 3 to 5 stages and name no schedule; these are the usual ones.

    Args:
        count: how many stages.
        keep: what the last one keeps, in (0, 1].
        temperature: of every stage, or one each.
        progression: what stage k = 1 ... n keeps. "geometric": ``keep ** (k / n)``, the same share
            of the rest each time; "cubic": ``1 - (1 - keep) * (1 - (1 - k / n) ** 3)`` (Zhu & Gupta
            2017), most of it early; "linear": ``1 - (1 - keep) * k / n``.

    Raises:
        TypeError, ValueError: an argument that is none of this.

    Examples:
        >>> [round(stage.keep, 4) for stage in schedules.stages(3)]
        [0.6694, 0.4481, 0.3]
    """
    _check_count("count", count)
    _check("keep", keep, 0, 1, above=True)
    if progression not in PROGRESSIONS:
        raise ValueError(
            f"progression must be one of {', '.join(PROGRESSIONS)}, got {progression!r}"
        )
    temperatures = temperature if isinstance(temperature, Sequence) else [temperature] * count
    if len(temperatures) != count:
        raise ValueError(f"temperature must be one or {count} values, got {len(temperatures)}")
    result = []
    for k, T in enumerate(temperatures, start=1):
        _check("temperature", T, 0, above=True)
        done = k / count
        kept = {
            "geometric": keep**done,
            "cubic": 1 - (1 - keep) * (1 - (1 - done) ** 3),
            "linear": 1 - (1 - keep) * done,
        }[progression]
        result.append(Stage(float(keep) if k == count else kept, float(T)))
    return result


def enough_stages(error: float, tolerance: float) -> int:
    """The number of stages after which one more would gain less than `tolerance`.

    The O(1/n) rule: a path walked in n steps errs by O(1/n^2) in each, by error / n in all; stage
    n + 1 then gains error / (n (n + 1)). A heuristic, not a bound.

    Args:
        error: of compressing in a single stage, in any unit, >= 0. From two runs of n and n + 1
            stages: n (n + 1) times their difference.
        tolerance: in the same unit, > 0.

    Raises:
        TypeError, ValueError: an argument that is none of this.

    Examples:
        >>> schedules.enough_stages(1.0, 0.06)  # the fifth stage would gain 0.05
        4
    """
    _check("error", error, 0)
    _check("tolerance", tolerance, 0, above=True)
    # The root of n (n + 1) = error / tolerance may be off by rounding: begin a little below it.
    n = max(1, math.floor((math.sqrt(1 + 4 * error / tolerance) - 1) / 2) - 1)
    while error / (n * (n + 1)) >= tolerance:
        n += 1
    return n


def warm_up(epoch: float, epochs: float = 20) -> float:
    """The factor that fades the soft term in: 1/epochs in the first epoch, 1 from the last on.

    ``min((epoch + 1) / epochs, 1)``: DKD (Zhao et al. 2022) over 20 epochs beside an unscaled
    cross-entropy, since an untrained student's non-target term is large. ::

        loss.alpha, loss.beta = factor * 1.0, factor * 8.0  # both terms of DKD

    Args:
        epoch: from 0 (the paper's code counts from 1).
        epochs: of the warm-up; 0 for none.

    Raises:
        TypeError, ValueError: a negative number, or none.

    Examples:
        >>> [schedules.warm_up(epoch) for epoch in (0, 9, 19, 20)]
        [0.05, 0.5, 1.0, 1.0]
    """
    _check("epoch", epoch, 0)
    _check("epochs", epochs, 0)
    return 1.0 if epochs == 0 else min((epoch + 1) / epochs, 1.0)
