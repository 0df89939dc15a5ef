"""The teacher pruned to a fiftieth of its weights, at once and in up to five stages.

arXiv:2601.03195 (Sparse-KD): a path of several small steps, with distillation after each, loses
less than a large one, by O(1/n) in the number n of stages, of which 3 to 5 are enough.
"""

import torch
from torch import Tensor

from fastkd import schedules

from .data import Splits
from .report import Experiment, Row, row
from .training import Networks, Settings, data_and_teacher, distilled, train

KEPT = 0.02
STAGES = (2, 3, 4, 5)


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


def pruned(
    teacher: Networks, stages: list[schedules.Stage], splits: Splits, settings: Settings
) -> Networks:
    """The teacher, pruned and after each stage distilled from itself as it was before all."""
    S = settings.seeds
    logits = teacher.logits(splits.training.inputs)
    student = teacher.trained_as(range(S)).requires_grad_()
    student.dropout = 0.0
    for stage in stages:
        masks = magnitude_masks(student, stage.keep)

        def mask(networks: Networks, masks: list[Tensor] = masks) -> None:
            with torch.no_grad():
                for weight, each in zip(networks.weights, masks, strict=True):
                    weight.mul_(each)

        mask(student)
        loss = distilled(logits, temperature=stage.temperature, alpha=settings.alpha)
        epochs = max(1, settings.epochs // len(stages))  # the same number in all
        name = f"pruned to {stage.keep:.1%}"
        train(student, splits.training, loss, epochs, name, after_step=mask)
    return student


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    rows: list[Row] = [row("teacher", teacher, splits)]

    def add(name: str, count: int, progression: str, **point) -> None:
        stages = schedules.stages(count, KEPT, settings.temperature, progression)
        rows.append(row(name, pruned(teacher, stages, splits, settings), splits, **point))

    add("1 stage", 1, "geometric")
    for progression in schedules.PROGRESSIONS:
        for count in STAGES:
            name = f"{count} stages, {progression}"
            add(name, count, progression, series=progression, x=count)
    return Experiment(
        f"The teacher pruned to {KEPT:.0%} of its weights in stages, the same epochs in all",
        rows, baseline="1 stage", x_label="stages", reference=("1 stage", "teacher"),
    )  # fmt: skip
