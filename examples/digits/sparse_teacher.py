"""The teacher's k likeliest classes only, k = 1 ... 10, and what is done about the others.

"bucket": one class of all others together; "restrict": student and teacher over the k classes only;
"renormalize": the teacher over its k, the student over all. At k = 10 all three are the full loss.
"""

import fastkd

from .data import CLASSES, Batch
from .report import Experiment, Row, row
from .training import (
    Settings,
    Tensor,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

HIDDEN = (12, 12)


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    logits, T = teacher.logits(splits.training.inputs), settings.temperature
    rows: list[Row] = [row("teacher", teacher, splits)]

    def student(name: str, loss, **point) -> None:
        networks = initialised(settings.seeds, HIDDEN)
        train(networks, splits.training, loss, settings.epochs, name)
        rows.append(row(name, networks, splits, **point))

    student("hard targets", cross_entropy)
    student("the full teacher", distilled(logits, temperature=T, alpha=settings.alpha))
    for outside in ("bucket", "restrict", "renormalize"):
        for k in range(1, CLASSES + 1):
            ids, log_probs = fastkd.topk_teacher(logits, k)

            def loss(
                student_logits: Tensor, batch: Batch,
                ids: Tensor = ids, log_probs: Tensor = log_probs, outside: str = outside,
            ) -> Tensor:  # fmt: skip
                return fastkd.topk_kd_loss(
                    student_logits, batch.of(ids), batch.of(log_probs), batch.labels,
                    outside=outside, temperature=T, alpha=settings.alpha, num_items=batch.size,
                )  # fmt: skip

            student(f"k = {k}, {outside}", loss, series=outside, x=k)
    return Experiment(
        "The teacher's k likeliest classes", rows, baseline="the full teacher",
        x_label="k", reference=("hard targets", "the full teacher"),
    )  # fmt: skip
