"""Ten networks into one of their size, without and with jittered images.

Hinton et al. 2015, section 4, on speech: 58.9 % of the frames right by one, 61.1 % by the ensemble
of ten, 60.8 % by the one distilled from it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastkd

from .data import Batch, Digits, Splits
from .report import CHECK, TEST, Experiment, Row, errors, measured, row
from .training import (
    Loss,
    Networks,
    Settings,
    cross_entropy,
    data_and_teacher,
    initialised,
    train,
)

HIDDEN = (32, 32)
MEMBERS = 10
Vote = Callable[[Sequence[Tensor]], Tensor]


def votes(members: Sequence[Networks], inputs: Tensor) -> list[Tensor]:
    return [member.logits(inputs) for member in members]


def distilled(members: Sequence[Networks], vote: Vote, settings: Settings) -> Loss:
    """From what the members say to the very images of the batch."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return fastkd.kd_loss(
            logits, vote(votes(members, batch.inputs)), batch.labels, num_items=batch.size,
            temperature=settings.temperature, alpha=settings.alpha,
        )  # fmt: skip

    return loss


def compared(splits: Splits, settings: Settings, jitter: bool) -> list[Row]:
    S, training = settings.seeds, splits.training
    suffix = ", jittered images" if jitter else ""
    # The members of a seed share its split; weights and batches are their own.
    data = Digits(training.inputs.repeat(MEMBERS, 1, 1), training.labels.repeat(MEMBERS, 1))
    networks = initialised(MEMBERS * S, HIDDEN)
    name = f"{MEMBERS} members{suffix}"
    train(networks, data, cross_entropy, settings.epochs, name, jitter=jitter)
    members = [networks.trained_as(range(m * S, (m + 1) * S)) for m in range(MEMBERS)]

    single = [row("", member, splits) for member in members]
    average = {
        column: torch.tensor([each.values[column] for each in single]).mean(0)
        for column in (CHECK, TEST)
    }
    rows = [measured(f"one member, on average{suffix}", average)]
    T = settings.temperature
    means: dict[str, Vote] = {
        "probs": lambda each: fastkd.ensemble(each, temperature=T),
        "logits": lambda each: fastkd.ensemble(each, mean="logits"),
    }
    for mean in means:
        values = {
            column: errors(fastkd.ensemble(votes(members, part.inputs), mean=mean), part.labels)
            for column, part in ((CHECK, splits.validation), (TEST, splits.test))
        }
        rows.append(measured(f"ensemble, mean of {mean}{suffix}", values))
    targets = {"one member": (members[:1], means["logits"])} | {
        f"the ensemble, mean of {mean}": (members, vote) for mean, vote in means.items()
    }
    for name, (teachers, vote) in targets.items():
        student = initialised(S, HIDDEN)
        loss = distilled(teachers, vote, settings)
        train(student, training, loss, settings.epochs, name + suffix, jitter=jitter)
        rows.append(row(f"distilled from {name}{suffix}", student, splits))
    return rows


def run(settings: Settings) -> Experiment:
    splits, _ = data_and_teacher(settings)
    return Experiment(
        f"An ensemble of {MEMBERS} distilled into one network of the members' size",
        [row for jitter in (False, True) for row in compared(splits, settings, jitter)],
        baseline="one member, on average",
    )
