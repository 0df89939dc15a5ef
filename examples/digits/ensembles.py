"""Ten networks into one of their size.

Hinton et al. 2015, section 4, on speech: 58.9 % of the frames right by one, 61.1 % by the ensemble
of ten, 60.8 % by the one distilled from it.
"""

import torch

import fastkd

from .data import Digits
from .report import CHECK, TEST, Experiment, Row, errors, measured, row
from .training import (
    Settings,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

HIDDEN = (32, 32)
MEMBERS = 10


def run(settings: Settings) -> Experiment:
    splits, _ = data_and_teacher(settings)
    S, T = settings.seeds, settings.temperature
    # The members of a seed share its split; weights and batches are their own.
    training = splits.training
    data = Digits(training.inputs.repeat(MEMBERS, 1, 1), training.labels.repeat(MEMBERS, 1))
    networks = initialised(MEMBERS * S, HIDDEN)
    train(networks, data, cross_entropy, settings.epochs, f"{MEMBERS} members")
    members = [networks.trained_as(range(m * S, (m + 1) * S)) for m in range(MEMBERS)]

    single = [row("", member, splits) for member in members]
    average = {
        column: torch.tensor([each.values[column] for each in single]).mean(0)
        for column in (CHECK, TEST)
    }
    rows: list[Row] = [measured("one member, on average", average)]
    for mean in ("probs", "logits"):
        values = {}
        for column, part in ((CHECK, splits.validation), (TEST, splits.test)):
            votes = [member.logits(part.inputs) for member in members]
            values[column] = errors(fastkd.ensemble(votes, mean=mean), part.labels)
        rows.append(measured(f"ensemble, mean of {mean}", values))

    logits = [member.logits(training.inputs) for member in members]
    targets = {
        "one member": logits[0],
        "the ensemble, mean of probs": fastkd.ensemble(logits, temperature=T),
        "the ensemble, mean of logits": fastkd.ensemble(logits, mean="logits"),
    }
    for name, target in targets.items():
        student = initialised(S, HIDDEN)
        loss = distilled(target, temperature=T, alpha=settings.alpha)
        train(student, training, loss, settings.epochs, name)
        rows.append(row(f"distilled from {name}", student, splits))
    return Experiment(
        f"An ensemble of {MEMBERS} distilled into one network of the members' size", rows,
        baseline="one member, on average",
    )  # fmt: skip
