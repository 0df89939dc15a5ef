"""Teachers of a few classes a row: computed once, cached, or cut from full logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import (
    as_int,
    check_alpha,
    check_one_logits,
    check_sparse_teacher,
    check_vocab_size,
)
from .autograd import SparseTeacher, kd_terms
from .chunks import chunks, take
from .loss import KDLossOutput
from .ops import choose_backend
from .request import request

OUTSIDE = ("bucket", "restrict", "renormalize")


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


def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    outside: str = "bucket",
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
    - "restrict": both sides are softmaxes over the named classes; the others get no gradient. The
      same as ``kd_loss(..., top_k=k)``, and exact at every temperature.
    - "renormalize": the teacher's probabilities are scaled to sum to 1 and held against the
      student's full softmax, which makes the student drop all other classes.

    Args:
        student_logits: [..., V].
        teacher_ids: [..., k], int64 or int32: classes, in any order. -1: none, for rows that have
            fewer. The probabilities of an id given twice are added.
        teacher_log_probs: [..., k]: their logarithms at T = 1, as :func:`topk_teacher` makes them.
            Where they sum to more than 1 they are scaled to 1 and the bucket is empty.
        outside: see above.

    The other arguments, the result and the errors are those of :func:`kd_loss`. An id that is no
    class is an error on the CPU and makes its row NaN elsewhere; so does, but for the bucket, a row
    that names no class.
    """
    if outside not in OUTSIDE:
        raise ValueError(f"outside must be one of {', '.join(OUTSIDE)}, got {outside!r}")
    check_alpha(alpha, labels)
    vocab = check_sparse_teacher(student_logits, teacher_ids, teacher_log_probs, vocab_size)
    double = torch.float64 in (student_logits.dtype, teacher_log_probs.dtype)
    dtype = torch.float64 if double else torch.float32
    k = teacher_ids.shape[-1]
    ids, log_probs, log_rest = choose_backend(backend, student_logits.device, dtype).sparse_teacher(
        teacher_ids.detach().reshape(-1, k).to(torch.int64).contiguous(),
        teacher_log_probs.detach().reshape(-1, k).to(dtype).contiguous(),
        vocab,
        outside == "bucket",
    )
    teacher = SparseTeacher(
        ids, log_probs, log_rest if outside == "bucket" else None, outside == "restrict"
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
