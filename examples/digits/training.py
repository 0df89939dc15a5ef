"""Networks for all seeds at once, and the one training loop of every experiment."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastkd

from .data import CLASSES, PIXELS, Batch, Digits, Splits, batches, load

# The loss of logits [S, B, C]: the sum over the seeds of their mean losses.
Loss = Callable[[Tensor, Batch], Tensor]

TEACHER = (128, 128)  # hidden units
SEED = 1  # of weights, batches and jitter: the same for all that is compared


@dataclass(frozen=True)
class Settings:
    """The settings of a run; temperature and alpha of distillation where one does not say so.

    These, and the widths, rates and epochs, were chosen on the validation parts of five seeds.
    """

    seeds: int = 10
    epochs: int = 120
    temperature: float = 2.0
    alpha: float = 0.9


class Networks(nn.Module):
    """S multilayer perceptrons that share nothing but the call: weights [S, in, out].

    Adam works on each weight alone, so that training them together is training each.
    """

    def __init__(
        self,
        seeds: int,
        hidden: Sequence[int],
        dropout: float = 0.0,
        classes: int = CLASSES,
    ):
        super().__init__()
        sizes = [PIXELS, *hidden, classes]
        self.dropout = dropout
        self.weights = nn.ParameterList(
            (torch.rand(seeds, a, b) * 2 - 1) * math.sqrt(6 / a) for a, b in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(seeds, 1, size) for size in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:  # [S, B, 64] -> [S, B, classes]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer > 0:
                x = F.dropout(x.relu(), self.dropout, self.training)
            x = torch.baddbmm(bias, x, weight)
        return x

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """As a teacher, or to be judged: without dropout or gradient."""
        self.eval()
        return self(inputs)

    def trained_as(self, index: Sequence[int]) -> "Networks":
        """Copies of the networks `index`, to be trained further."""
        networks = copy.deepcopy(self)
        for parameter in networks.parameters():
            parameter.data = parameter.data[list(index)].clone()
        return networks


def initialised(seeds: int, hidden: Sequence[int], **options: float) -> Networks:
    """The same weights at every call with the same arguments."""
    torch.manual_seed(SEED)
    return Networks(seeds, hidden, **options)  # type: ignore[arg-type]


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch.labels.flatten()
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / batch.size


def distilled(teacher_logits: Tensor, **options: float) -> Loss:
    """kd_loss from the teacher's logits [S, n, C] of the training set."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return fastkd.kd_loss(
            logits, batch.of(teacher_logits), batch.labels, num_items=batch.size, **options
        )

    return loss


@dataclass
class Trained:
    """What was watched."""

    validation: list[Tensor] = field(default_factory=list)  # errors in % [S], per epoch
    test: list[Tensor] = field(default_factory=list)


def errors(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of misclassified examples of each seed, in %: [S]."""
    return (logits.argmax(-1) != labels).double().mean(-1) * 100


def train(
    networks: nn.Module,
    data: Digits,
    loss: Loss,
    epochs: int,
    name: str,
    *,
    learning_rate: float = 1e-2,
    jitter: bool = False,
    after_step: Callable[[Any], None] | None = None,
    watched: Splits | None = None,
) -> Trained:
    """Adam with a linear warm-up over a tenth of the epochs and cosine decay.

    `watched`: the errors are taken after every epoch, for what is stopped early.
    """
    torch.manual_seed(SEED + 1)
    result = Trained()
    optimizer = torch.optim.Adam(networks.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda e: min(10 * (e + 1) / epochs, (1 + math.cos(math.pi * e / epochs)) / 2)
    )
    for epoch in tqdm(range(epochs), desc=name, unit="epoch", leave=False, disable=None):
        networks.train()
        for batch in batches(data, epoch, epochs, jitter):
            optimizer.zero_grad()
            loss(networks(batch.inputs), batch).backward()
            optimizer.step()
            if after_step is not None:
                after_step(networks)
        schedule.step()
        if watched is not None:
            for part, history in (
                (watched.validation, result.validation),
                (watched.test, result.test),
            ):
                history.append(errors(networks.logits(part.inputs), part.labels))
    networks.eval()
    return result


@cache
def data_and_teacher(settings: Settings) -> tuple[Splits, Networks]:
    """The splits, and a large network for each, with dropout and jittered images."""
    splits = load(settings.seeds)
    teacher = initialised(settings.seeds, TEACHER, dropout=0.1)
    train(
        teacher, splits.training, cross_entropy, 2 * settings.epochs, "teacher",
        jitter=True,
    )  # fmt: skip
    return splits, teacher.requires_grad_(False)
