"""Mutual learning, a teacher assistant, self-distillation.

Zhang et al. 2018 (mutual), Mirzadeh et al. 2020 (assistant), Furlanello et al. 2018 (self): each
helps the student in its paper.
"""

import torch
from torch import Tensor, nn

import fastkd

from .data import Batch
from .report import Experiment, Row, row
from .training import (
    Networks,
    Settings,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

STUDENT, ASSISTANT = (8, 8), (32, 32)


class Peers(nn.Module):
    """Two students per seed, which see the same batches."""

    def __init__(self, one: Networks, two: Networks):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:  # [2 S, B, C]
        return torch.cat([self.one(x), self.two(x)])


def mutual(logits: Tensor, batch: Batch) -> Tensor:
    """Each learns from the labels and from the other, at T = 1 as in the paper."""
    one, two = logits.chunk(2)
    options = {"alpha": 0.5, "num_items": batch.size}
    return fastkd.kd_loss(one, two.detach(), batch.labels, **options) + fastkd.kd_loss(
        two, one.detach(), batch.labels, **options
    )


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    S, T = settings.seeds, settings.temperature
    rows: list[Row] = [row("teacher", teacher, splits)]

    def student(name: str, hidden: tuple[int, int], teacher: Networks | None) -> Networks:
        loss = cross_entropy
        if teacher is not None:
            logits = teacher.logits(splits.training.inputs)
            loss = distilled(logits, temperature=T, alpha=settings.alpha)
        networks = initialised(S, hidden)
        train(networks, splits.training, loss, settings.epochs, name)
        rows.append(row(name, networks, splits))
        return networks

    alone = student("student, hard targets", STUDENT, None)
    student("student, from the teacher", STUDENT, teacher)
    student("student, from itself trained before", STUDENT, alone)
    assistant = student("assistant, from the teacher", ASSISTANT, teacher)
    student("student, from the assistant", STUDENT, assistant)
    second = initialised(2 * S, STUDENT).trained_as(range(S, 2 * S))
    peers = Peers(initialised(S, STUDENT), second)
    train(peers, splits.training, mutual, settings.epochs, "mutual")
    rows.append(row("student, mutual learning", peers.one, splits))
    return Experiment(
        "Mutual learning, assistant, self-distillation", rows,
        baseline="student, hard targets",
    )  # fmt: skip
