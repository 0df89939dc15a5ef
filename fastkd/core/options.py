"""The options of the losses, as type checkers know them: what the functions and modules take.

The functions have them as parameters, with defaults and documentation; tests/api/test_typing.py
holds the two together.
"""

from typing import TypedDict

from torch import Tensor


class _Options(TypedDict, total=False):
    """What every loss takes."""

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    alpha: float
    vocab_size: int | None
    ignore_index: int
    token_weights: Tensor | None
    num_items: float | Tensor | None
    reduction: str
    inplace: bool
    backend: str


class _DenseOptions(_Options, total=False):
    """What the losses take that read all of the teacher's logits."""

    beta: float
    top_k: int | None
    bottom_percentile: float
    teacher_kind: str


class KDOptions(_DenseOptions, total=False):
    """The options of :func:`fastkd.kd_loss`."""


class DKDOptions(_DenseOptions, total=False):
    """The options of :func:`fastkd.dkd_loss`."""

    hard_weight: float


class TopKKDOptions(_Options, total=False):
    """The options of :func:`fastkd.topk_kd_loss`."""

    outside: str
    repeated_ids: str
