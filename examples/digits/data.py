"""The handwritten digits of scikit-learn: 1797 images of 8 x 8 pixels, 10 classes, no download.

All tensors carry the seeds in their first dimension: seed s has its own random split, and its own
network (networks.py). [S, n, 64] images in [0, 1], [S, n] labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

TRAINING, VALIDATION = 1000, 200  # the other 597 are for testing
CLASSES, PIXELS = 10, 64
BATCH = 100


@dataclass(frozen=True)
class Digits:
    """One part of the split, per seed."""

    inputs: Tensor  # [S, n, 64]
    labels: Tensor  # [S, n]

    def __getitem__(self, index: Tensor | slice) -> "Digits":
        """The examples `index` [S, m] of each seed, or the same slice of all."""
        if isinstance(index, slice):
            return Digits(self.inputs[:, index], self.labels[:, index])
        return Digits(rows(self.inputs, index), rows(self.labels, index))

    def __len__(self) -> int:
        return self.labels.shape[1]


@dataclass(frozen=True)
class Splits:
    training: Digits
    validation: Digits
    test: Digits


@dataclass(frozen=True)
class Batch:
    """What a loss gets beside the logits [S, B, 10]."""

    inputs: Tensor  # [S, B, 64]
    labels: Tensor  # [S, B]
    index: Tensor  # [S, B] into the training set
    epoch: int
    epochs: int

    @property
    def size(self) -> int:
        """Rows per seed: a loss is the sum over the seeds of a mean over this many rows."""
        return self.labels.shape[1]

    def of(self, values: Tensor) -> Tensor:
        """[S, B, ...], this batch's part of `values` [S, n, ...] of the whole training set."""
        return rows(values, self.index)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """values[s, index[s]] for every s."""
    return values[torch.arange(len(values)).unsqueeze(1), index]


def load(seeds: int) -> Splits:
    """A random split of the digits for each seed."""
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.stack(
        [
            torch.randperm(len(labels), generator=torch.Generator().manual_seed(s))
            for s in range(seeds)
        ]
    )
    everything = Digits(inputs[order], labels[order])
    return Splits(
        everything[:TRAINING],
        everything[TRAINING : TRAINING + VALIDATION],
        everything[TRAINING + VALIDATION :],
    )


def jittered(inputs: Tensor) -> Tensor:
    """Every image moved by up to one pixel in both directions, at random; what is new is black."""
    S, B, _ = inputs.shape
    padded = F.pad(inputs.view(S * B, 1, 8, 8), (1, 1, 1, 1))
    shifted = F.unfold(padded, 8)  # [S B, 64, 9]
    which = torch.randint(9, (S * B, 1, 1)).expand(-1, PIXELS, 1)
    return shifted.gather(-1, which).view(S, B, PIXELS)


def batches(data: Digits, epoch: int, epochs: int, jitter: bool) -> Iterator[Batch]:
    """One epoch: every seed's examples in an order of its own, the incomplete batch left out."""
    S, n = data.labels.shape
    order = torch.rand(S, n).argsort(dim=1)
    size = min(BATCH, n)
    for index in order[:, : n - n % size].split(size, dim=1):
        part = data[index]
        inputs = jittered(part.inputs) if jitter else part.inputs
        yield Batch(inputs, part.labels, index, epoch, epochs)
