"""3 % of the training set: hard targets overfit it, soft targets do not.

Hinton et al. 2015, section 6, on speech: trained on 3 % with hard targets 67.3 % of the training
frames and 44.5 % of the test frames are right, and that with early stopping; with soft targets from
a teacher of all the data 65.4 % and 57.0 %; with all the data 63.4 % and 58.9 %.
"""

import torch
from torch import Tensor

from .data import TRAINING, Digits, Splits
from .report import CHECK, TEST, Experiment, Row, errors, measured, row
from .training import (
    Loss,
    Networks,
    Settings,
    Trained,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

HIDDEN = (32, 32)
SHARE = 0.03
COUNT = round(SHARE * TRAINING)


def best(trained: Trained) -> dict[str, Tensor]:
    """The error of each seed, at the epoch of its lowest validation error: stopped early."""
    validation, test = torch.stack(trained.validation), torch.stack(trained.test)
    epoch = validation.argmin(0, keepdim=True)
    return {CHECK: validation.gather(0, epoch)[0], TEST: test.gather(0, epoch)[0]}


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    rows: list[Row] = [row("teacher", teacher, splits)]
    few, everything = splits.training[:COUNT], splits.training

    def soft(data: Digits) -> Loss:
        return distilled(teacher.logits(data.inputs), temperature=settings.temperature, alpha=1.0)

    def add(name: str, data: Digits, loss: Loss, epochs: int, watched: Splits | None = None):
        networks = initialised(settings.seeds, HIDDEN)
        trained = train(networks, data, loss, epochs, name, watched=watched)
        on_training = _training_error(networks, data)
        rows.append(row(name, networks, splits, training_error_percent=on_training))
        if watched is not None:
            rows.append(measured(f"{name}, stopped early", best(trained)))

    # As many steps as with all of it: an epoch of so few examples is one.
    longer = settings.epochs * 10
    add("3 %, hard targets", few, cross_entropy, longer, splits)
    add("3 %, soft targets", few, soft(few), longer)
    add("100 %, hard targets", everything, cross_entropy, settings.epochs)
    add("100 %, soft targets", everything, soft(everything), settings.epochs)
    return Experiment(
        "3 % of the training set, hard and soft targets", rows,
        baseline="3 %, hard targets, stopped early",
    )  # fmt: skip


def _training_error(networks: Networks, data: Digits) -> Tensor:
    return errors(networks.logits(data.inputs), data.labels)
