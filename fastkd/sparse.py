"""Teachers of a few classes a row: computed once, cached, or cut from full logits."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    as_int,
    check_alpha,
    check_log_probs,
    check_one_logits,
    check_sparse_teacher,
    check_vocab_size,
    on_host,
)
from .autograd import SparseTeacher, kd_terms
from .chunks import chunks, take
from .loss import KDLossOutput
from .ops import choose_backend
from .request import request

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import TopKKDOptions

OUTSIDE = ("bucket", "restrict", "renormalize")
REPEATED = ("add", "once")


class TopKTeacher(NamedTuple):
    """What :func:`topk_teacher` returns; the second and third argument of topk_kd_loss."""

    ids: Tensor  # [..., k] int64
    log_probs: Tensor  # [..., k] float32 (float64 of float64), at T = 1


def topk_teacher(teacher_logits: Tensor, k: int, vocab_size: int | None = None) -> TopKTeacher:
    """The k most probable classes of every row with their log-probabilities, largest first.

    Args:
        teacher_logits: [..., V]; read a few rows at a time, nothing of N x V is made.
        k: how many; all where there are fewer.
        vocab_size: number of leading classes that take part, and over which the probabilities sum
            to 1; None: all.

    Raises:
        TypeError, ValueError: as :func:`kd_loss`.

    Examples:
        >>> ids, log_probs = fastkd.topk_teacher(torch.randn(8, 32000), 64)
        >>> student = torch.randn(8, 32000, requires_grad=True)
        >>> fastkd.topk_kd_loss(student, ids, log_probs, temperature=2.0).backward()
    """
    check_one_logits("teacher_logits", teacher_logits)
    vocab = check_vocab_size(vocab_size, teacher_logits.shape[-1], None)
    k = as_int("k", k)
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    leading = teacher_logits.shape[:-1]
    dtype = torch.float64 if teacher_logits.dtype == torch.float64 else torch.float32
    shape = (math.prod(leading), min(k, vocab))
    ids = torch.empty(shape, dtype=torch.int64, device=teacher_logits.device)
    log_probs = torch.empty(shape, dtype=dtype, device=teacher_logits.device)
    for rows in chunks(teacher_logits):
        logits = take(teacher_logits.detach(), rows)[:, :vocab]
        values, ids[rows] = logits.topk(shape[1], dim=-1)
        lse = logits.to(dtype).logsumexp(-1, keepdim=True)
        log_probs[rows] = values.to(dtype) - lse
    return TopKTeacher(ids.view(*leading, shape[1]), log_probs.view(*leading, shape[1]))


def _each_id_once(ids: Tensor, log_probs: Tensor) -> Tensor:
    """The ids, of equal ones all but the most probable turned into -1."""
    _, by_probability = log_probs.sort(dim=-1, descending=True, stable=True)
    ordered, by_id = ids.gather(-1, by_probability).sort(dim=-1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    order = by_probability.gather(-1, by_id)
    return torch.empty_like(ids).scatter_(-1, order, ordered.masked_fill(again, -1))


def _named(ids: Tensor, log_probs: Tensor, vocab: int) -> Tensor | None:
    """Which rows [N] name a class, in the order of spec.sparse_teacher; None: all do."""
    if ids.shape[0] == 0:
        return None
    named = (ids[:, 0] < vocab) | log_probs[:, 0].isnan()  # of a bad id only the NaN is left
    return None if on_host(named) and bool(named.all()) else named


@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: "Unpack[TopKKDOptions]",
) -> Tensor: ...


@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: "Unpack[TopKKDOptions]",
) -> KDLossOutput: ...


@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: bool,
    **options: "Unpack[TopKKDOptions]",
) -> Tensor | KDLossOutput: ...


def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    outside: str = "bucket",
    repeated_ids: str = "add",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossOutput:
    r"""Distillation from a teacher known by k classes per row; the student's row is read once.

    Per row ``T^2 KL(p || q)``, mixed with the hard term as in :func:`kd_loss`, where `outside` says
    what becomes of the classes that the teacher does not name:

    - "bucket": together they are one more class of both sides, the teacher's with what its
      probabilities leave of 1, the student's with the sum of its own (Hinton et al. 2015, section
      5.1, call it the dustbin). At T != 1 the bucket is pooled first and then softened like any
      class, so that equal distributions have zero loss at every temperature. It is a lower bound of
      the full divergence, and grows to it with k.
    - "restrict": both sides are softmaxes over the named classes; the others get no gradient.
      Exact at every temperature, and of the classes of :func:`topk_teacher` the same as
      ``kd_loss(..., top_k=k)``, unless more than k classes reach the k-th largest logit, all of
      which top_k keeps, or fewer than k have one above -inf, where top_k keeps every class.
    - "renormalize": the teacher's probabilities are scaled to sum to 1 and held against the
      student's full softmax, which makes the student drop all other classes.

    Args:
        student_logits: [..., V].
        teacher_ids: [..., k], of any integer dtype: classes, in any order. -1: none, for rows that
            have fewer.
        teacher_log_probs: [..., k]: the logarithms of their probabilities at T = 1, as
            :func:`topk_teacher` makes them. A class at -inf is not named, so that padding with any
            id and -inf is as good as -1. Where the probabilities sum to more than 1 by rounding
            they are scaled to 1 and the bucket is empty.
        outside: see above.
        repeated_ids: what an id is worth that a row gives more than once. "add": the sum of its
            probabilities, as of a teacher's classes mapped onto fewer. "once": the largest, for
            servers that name the sampled class beside the most probable ones, of which it may be
            one. The same for ids that occur once.

    The other arguments, the result and the errors are those of :func:`kd_loss`. A row that names no
    class does not count, as one that is ignored. On the CPU it is an error, and elsewhere makes its
    row NaN, where an id is no class; and on the CPU it is an error where the probabilities of a row
    sum to more than 1, as they do where logits are passed for log-probabilities.
    """
    if repeated_ids not in REPEATED:
        raise ValueError(f"repeated_ids must be one of {', '.join(REPEATED)}, got {repeated_ids!r}")
    if outside not in OUTSIDE:
        raise ValueError(f"outside must be one of {', '.join(OUTSIDE)}, got {outside!r}")
    check_alpha(alpha, labels)
    vocab = check_sparse_teacher(student_logits, teacher_ids, teacher_log_probs, vocab_size)
    double = torch.float64 in (student_logits.dtype, teacher_log_probs.dtype)
    dtype = torch.float64 if double else torch.float32
    k = teacher_ids.shape[-1]
    ids = teacher_ids.detach().reshape(-1, k).to(torch.int64).contiguous()
    given = teacher_log_probs.detach().reshape(-1, k)
    if repeated_ids == "once":
        ids = _each_id_once(ids, given)
    check_log_probs(ids, given)
    ids, log_probs, log_rest = choose_backend(backend, student_logits.device, dtype).sparse_teacher(
        ids, given.to(dtype).contiguous(), vocab, outside == "bucket"
    )
    teacher = SparseTeacher(
        ids,
        log_probs,
        log_rest if outside == "bucket" else None,
        outside == "restrict",
        _named(ids, log_probs, vocab),
    )
    loss, soft, hard, _ = kd_terms(
        student_logits,
        request(
            student_logits,
            teacher,
            labels,
            soft=float(alpha),
            hard=1 - float(alpha),
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            vocab_size=vocab,
            ignore_index=ignore_index,
            token_weights=token_weights,
            num_items=num_items,
            reduction=reduction,
            return_terms=return_terms,
            inplace=inplace,
            backend=backend,
        ),
    )
    if not return_terms:
        return loss
    assert soft is not None, "asked for above"
    return KDLossOutput(loss, soft, hard)
