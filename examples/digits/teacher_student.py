"""A teacher, students of five sizes from hard targets, and from the teacher at five temperatures.

Hinton et al. 2015, section 3: 67 errors of the teacher, 146 of the student, 74 of the student
distilled at T = 20; with few units a lower temperature is best.
"""

from .report import Experiment, Row, row
from .training import Settings, cross_entropy, data_and_teacher, distilled, initialised, train

WIDTHS = (4, 8, 16, 32, 64)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
HARD = "hard targets"


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    logits = teacher.logits(splits.training.inputs)
    losses = {HARD: cross_entropy} | {
        f"T = {T:g}": distilled(logits, temperature=T, alpha=settings.alpha) for T in TEMPERATURES
    }
    rows: list[Row] = [row("teacher", teacher, splits)]
    for width in WIDTHS:
        for series, loss in losses.items():
            name = f"{width} + {width} units, {series}"
            student = initialised(settings.seeds, (width, width))
            train(student, splits.training, loss, settings.epochs, name)
            rows.append(row(name, student, splits, series=series, x=width))
    return Experiment(
        "Hard targets and a teacher's, by the student's width and the temperature",
        rows, baseline=HARD, x_label="units in each of the two hidden layers",
        x_scale="log", reference=("teacher",),
    )  # fmt: skip
