"""A digit that the student is never shown, and what one corrected bias makes of it.

Hinton et al. 2015, section 3: without the threes in the transfer set the distilled student still
gets 133 of 1010 of them wrong, and 14 after its bias for them is raised by 3.5; with only sevens
and eights it errs on 47.3 %, and on 13.2 % after the two biases are lowered by 7.6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastkd

from .data import Batch, Digits
from .report import Experiment, Row, row
from .training import (
    Loss,
    Networks,
    Settings,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

HIDDEN = (32, 32)
TEMPERATURES = (2.0, 8.0)  # a higher one says more about the classes that are not shown
IGNORED = -100


def without(data: Digits, unseen: Sequence[int]) -> Digits:
    """The rows of those digits do not count: their loss and gradient are exactly 0."""
    labels = data.labels.masked_fill(torch.isin(data.labels, torch.tensor(unseen)), IGNORED)
    return Digits(data.inputs, labels)


def hard(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch.labels.flatten()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED
    )
    return loss / batch.size


def corrected(networks: Networks, data: Digits, classes: Sequence[int]) -> tuple[Networks, Tensor]:
    """A copy whose biases of `classes` are offset as suits `data` best; the offsets [S]."""
    networks = networks.trained_as(range(len(data.labels)))
    logits = networks.logits(data.inputs)
    offsets = [
        fastkd.class_bias(seed_logits, labels, classes)
        for seed_logits, labels in zip(logits, data.labels, strict=True)
    ]
    networks.biases[-1].data[:, 0, list(classes)] += torch.tensor(offsets).unsqueeze(1)
    return networks, torch.tensor(offsets)


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    logits = teacher.logits(splits.training.inputs)
    soft = {f"T = {T:g}": distilled(logits, temperature=T, alpha=1.0) for T in TEMPERATURES}
    test, rows = splits.test, list[Row]()
    three = test.labels == 3

    def add(name: str, networks: Networks, **columns: Tensor) -> None:
        wrong = networks.logits(test.inputs).argmax(-1) != test.labels
        on_threes = (wrong & three).sum(-1).double() / three.sum(-1) * 100
        rows.append(row(name, networks, splits, threes_wrong_percent=on_threes, **columns))

    def student(name: str, loss: Loss, unseen: Sequence[int]) -> Networks:
        networks = initialised(settings.seeds, HIDDEN)
        train(networks, without(splits.training, unseen), loss, settings.epochs, name)
        add(name, networks)
        return networks

    add("teacher", teacher)
    student("hard targets, all digits", cross_entropy, [])
    for targets, loss in soft.items():
        student(f"{targets}, all digits", loss, [])
    for shown, unseen, offset in (
        ("no 3", [3], [3]),
        ("only 7 and 8", [0, 1, 2, 3, 4, 5, 6, 9], [7, 8]),
    ):
        for targets, loss in (("hard targets", hard), *soft.items()):
            name = f"{targets}, {shown}"
            networks = student(name, loss, unseen)
            better, offsets = corrected(networks, splits.validation, offset)
            add(f"{name}, bias corrected", better, bias=offsets)
    return Experiment(
        "Digits that the student is never shown", rows, baseline="hard targets, all digits"
    )
