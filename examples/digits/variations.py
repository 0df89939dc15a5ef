"""Mutual learning, a teacher assistant, self-distillation, and pruning in several stages.

Zhang et al. 2018 (mutual), Mirzadeh et al. 2020 (assistant), Furlanello et al. 2018 (self): each
helps the student in its paper. arXiv:2601.03195: several small steps lose less than a large one.
"""

import torch
from torch import Tensor, nn

import fastkd
from fastkd import schedules

from .data import Batch, Splits
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
KEPT = 0.02  # of the teacher's weights, after pruning
STAGES = (1, 2, 3, 4, 5)


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


def magnitude_masks(networks: Networks, keep: float) -> list[Tensor]:
    """Per seed, the largest weights of all layers together."""
    sizes = [weight[0].numel() for weight in networks.weights]
    flat = torch.cat([weight.detach().abs().flatten(1) for weight in networks.weights], 1)
    count = max(1, round(keep * flat.shape[1]))
    kept = torch.zeros_like(flat).scatter_(1, flat.topk(count, dim=1).indices, 1.0)
    return [
        mask.view_as(weight)
        for mask, weight in zip(kept.split(sizes, dim=1), networks.weights, strict=True)
    ]


def pruned(teacher: Networks, stages: int, splits: Splits, settings: Settings) -> Networks:
    """The teacher, pruned and after each stage distilled from itself as it was before all."""
    S = settings.seeds
    logits = teacher.logits(splits.training.inputs)
    student = teacher.trained_as(range(S)).requires_grad_()
    student.dropout = 0.0
    for stage in schedules.stages(stages, KEPT, settings.temperature):
        masks = magnitude_masks(student, stage.keep)

        def mask(networks: Networks, masks: list[Tensor] = masks) -> None:
            with torch.no_grad():
                for weight, each in zip(networks.weights, masks, strict=True):
                    weight.mul_(each)

        mask(student)
        loss = distilled(logits, temperature=stage.temperature, alpha=settings.alpha)
        epochs = max(1, settings.epochs // stages)  # the same number in all
        name = f"pruned to {stage.keep:.1%}"
        train(student, splits.training, loss, epochs, name, after_step=mask)
    return student


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
    for stages in STAGES:
        name = f"teacher pruned to {KEPT:.0%} of its weights in {stages} stage" + "s" * (stages > 1)
        rows.append(row(name, pruned(teacher, stages, splits, settings), splits))
    return Experiment(
        "Mutual learning, assistant, self-distillation, pruning in stages", rows,
        baseline="student, hard targets",
    )  # fmt: skip
