"""What every loss has in common: its arguments, checked, become a Call. All of the policy."""

import math
from array import array
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import Ops, choose_backend
from ..spec import FORWARD, MIXTURE, REVERSE, compute_dtype
from .checks import (
    as_int,
    check_inplace,
    check_labels,
    check_limit,
    check_logits,
    check_pruning,
    check_reduction,
    check_rows,
    check_teacher_kind,
    check_temperature,
    number_kept,
    on_host,
)


class Term(NamedTuple):
    """One term of the rows. It stays out of the sum where it has no part in the loss: 0 times an
    infinite term would be NaN."""

    weight: Tensor | None = None  # [N] in the loss, as the kernel takes it; None: not computed
    scale: Tensor | None = None  # [N] of the term when it is returned by itself
    counts: bool = False  # whether it is part of the loss


class DenseTeacher(NamedTuple):
    """A teacher of all classes, as ops.DENSE_ROWS takes it."""

    logits: Tensor  # [..., V_teacher]
    keep: Tensor | None  # [N] int64, how many classes of a row; None: nothing is pruned
    probs: bool  # the logits are probabilities


class SparseTeacher(NamedTuple):
    """A teacher of k classes a row, as ops.SPARSE_ROWS takes it."""

    ids: Tensor  # [N, k]
    log_probs: Tensor  # [N, k]
    log_rest: Tensor | None  # [N]
    restricted: bool
    named: Tensor | None  # [N] whether a row names a class and so counts; None: all do


class Call(NamedTuple):
    """One call of a loss, less the student's logits: the kernel's arguments and the reduction."""

    teacher: DenseTeacher | SparseTeacher
    labels: Tensor | None  # [N] int64
    student_inv_temperature: Tensor  # [N]
    teacher_inv_temperature: Tensor  # [N]
    soft: Term
    hard: Term
    target: Term  # of the decoupled loss, whose soft term then leaves out the label
    vocab_size: int
    divergence: int
    beta: Tensor | None  # [N] of a mixture
    per_row: bool  # reduction "none"
    return_terms: bool
    inplace: bool
    ops: Ops


_FEW_ROWS = 4096
_FLOAT_MAX = torch.finfo(torch.float32).max
_CODES = {torch.float32: "f", torch.float64: "d", torch.int64: "q"}  # type codes of array.array
# The least and the largest beta of a mixture: rounded to 0 or 1 it would be none, and 0 times a
# divergence that is infinite; 1 / beta, a ratio q / m may be as large, has to be a number.
_MIXTURES = {
    dtype: (torch.finfo(dtype).eps ** 4, 1 - torch.finfo(dtype).eps / 2)
    for dtype in (torch.float32, torch.float64)
}


@lru_cache(maxsize=64)
def _kept(value: float, N: int, dtype: torch.dtype) -> Tensor:
    """Filled vectors of the host, never written to: two new ones are 3 of a call's 60 us.

    Through a buffer no dispatch mode and no transform of the caller's sees it made.
    """
    return torch.frombuffer(array(_CODES[dtype], [value]) * N, dtype=dtype)


def _filled(value: float, N: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        # Inductor keeps an earlier value of a fill that has become symbolic.
        return like.new_ones(N, dtype=dtype) * value
    if value > _FLOAT_MAX and value > torch.finfo(dtype).max:
        raise ValueError(
            f"a row's weights are {dtype}, which {value} does not fit: the square of the "
            "temperature, its inverse, or the inverse of num_items"
        )
    if 0 < N <= _FEW_ROWS and on_host(like):
        return _kept(value, N, dtype)
    return like.new_full((N,), value, dtype=dtype)


def _inverse_and_square(
    temperature: float | Tensor, N: int, logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float | Tensor]:
    """1 / T of every row [N], and T^2: a number, or [N] where the temperature is a tensor.

    A temperature that could not be checked and is not usable gives NaN. An infinite one has an
    inverse of 0, by which kernels know the limit, and a square of 1, for the limit includes T^2.
    """
    if not isinstance(temperature, Tensor):
        squared = 1.0 if temperature == math.inf else temperature * temperature
        return _filled(1 / temperature, N, logits, dtype), squared
    temperature = temperature.detach().to(dtype)
    usable = (temperature > 0) & (temperature < torch.inf)
    temperature = torch.where(usable, temperature, torch.nan)  # 0^2 would have the row skipped
    return 1 / temperature, temperature.square()


def _check_nothing_counts(counts: bool, num_items: float) -> None:
    if counts:
        raise ValueError(f"num_items must be > 0 where a row counts, got {num_items}")


def _divergence(beta: float, N: int, like: Tensor, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The number of the divergence, and beta [N] where it is a mixture."""
    if beta == 0:
        return FORWARD, None
    if beta == 1:
        return REVERSE, None
    least, most = _MIXTURES[dtype]
    if torch.compiler.is_compiling():
        return MIXTURE, _filled(beta, N, like, dtype).clamp(least, most)
    return MIXTURE, _filled(min(max(beta, least), most), N, like, dtype)


def _keep(
    top_k: int | None, bottom_percentile: float, vocab: int, N: int, like: Tensor
) -> Tensor | None:
    """How many classes of each row are kept [N]; None: all of them."""
    if top_k is None and bottom_percentile == 0:
        return None
    if not torch.compiler.is_compiling():
        keep = number_kept(top_k, bottom_percentile, vocab)
        return None if keep == vocab else _filled(keep, N, like, torch.int64)
    # The numbers may be symbols, and a graph is compiled anew for whatever Python asks of them: so
    # this is number_kept in tensors.
    kept = _filled(vocab, N, like, torch.int64)
    if bottom_percentile > 0:
        double = torch.float32 if like.device.type == "mps" else torch.float64
        percentile = _filled(bottom_percentile, N, like, double)
        kept = kept - (percentile * vocab / 100 + 1e-6).to(torch.int64)
    if top_k is not None:
        kept = torch.minimum(kept, _filled(top_k, N, like, torch.int64))
    return kept.clamp_min(1)


def _row_scales(
    N: int,
    like: Tensor,  # [N]
    squared_temperature: float | Tensor,  # [N]
    counting: Tensor | None,  # [N] bool
    token_weights: Tensor | None,  # [N]
    num_items: float | Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """What a row's soft and hard term count in the loss, before alpha: the one place of policy.

    Without labels there is no hard term, and no scale of it.

    scale_r = token_weight_r / divisor, for the soft term times T_r^2, and 0 where r does not count:
    selected there, not multiplied, for an ignored row may carry a NaN.
    """
    divisor: float | Tensor = 1.0
    if reduction == "batchmean":
        if num_items is not None:
            divisor = num_items
            if isinstance(num_items, Tensor):  # its shape must not add dimensions to rows
                on_device = num_items.detach().to(like.dtype).reshape(())
                divisor = num_items.item() if on_host(num_items) else on_device
        elif counting is not None:
            divisor = counting.sum().clamp_min(1)
        else:
            divisor = max(N, 1)
    weights = counting if token_weights is None else token_weights.detach()
    if weights is None and not isinstance(divisor, Tensor):
        if divisor == 0:
            _check_nothing_counts(N > 0, divisor)
            divisor = 1.0
        if isinstance(squared_temperature, Tensor):
            return squared_temperature / divisor, None
        scale = squared_temperature / divisor
        return _filled(scale, N, like, like.dtype), None
    hard = torch.ones_like(like) if weights is None else weights.to(like.dtype)
    if counting is not None and token_weights is not None:
        hard = torch.where(counting, hard, 0)
    if num_items is None:
        hard = hard / divisor if isinstance(divisor, Tensor) or divisor != 1 else hard
    else:  # num_items may be 0 where every row is ignored
        if on_host(hard) and not isinstance(divisor, Tensor) and divisor == 0:
            _check_nothing_counts(bool(hard.any()), divisor)
        hard = torch.where(hard == 0, 0, hard / divisor)
    if isinstance(squared_temperature, Tensor):
        return torch.where(hard == 0, 0, hard * squared_temperature), hard
    return (hard if squared_temperature == 1 else hard * squared_temperature), hard


NOT_COMPUTED = Term()


def _term(scale: Tensor | None, mix: float) -> Term:
    """`scale` is what a row's term counts before it is mixed with the others."""
    if scale is None:
        return NOT_COMPUTED
    if mix == 0:  # a product would keep the NaN of a temperature that is not usable
        return Term(torch.zeros_like(scale), scale, False)
    return Term(scale if mix == 1 else scale * mix, scale, True)


class _Settled(NamedTuple):
    """What follows from the options that are no tensors, and from how many rows there are."""

    student_inverse: Tensor  # [N]
    teacher_inverse: Tensor  # [N]
    squared_temperature: float | Tensor
    keep: Tensor | None  # [N]
    divergence: int
    beta: Tensor | None  # [N]
    scale: Tensor | None  # [N] of the soft term, where neither labels nor weights tell rows apart


def _settle(
    like: Tensor,  # the student's logits
    N: int,
    vocab: int,
    dtype: torch.dtype,
    has_limit: bool,
    rows_alike: bool,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    beta: float,
    top_k: int | None,
    bottom_percentile: float,
    teacher_kind: str,
    reduction: str,
    num_items: float | Tensor | None,
) -> _Settled:
    check_pruning(top_k, bottom_percentile)
    check_teacher_kind(teacher_kind)
    check_reduction(reduction, num_items)
    temperature = check_temperature("temperature", temperature, like, has_limit)
    if teacher_temperature is not None:
        teacher_temperature = check_temperature(
            "teacher_temperature", teacher_temperature, like, has_limit
        )
    check_limit(temperature, teacher_temperature)
    student_inverse, squared = _inverse_and_square(temperature, N, like, dtype)
    teacher_inverse = student_inverse
    if teacher_temperature is not None:
        teacher_inverse, _ = _inverse_and_square(teacher_temperature, N, like, dtype)
    scale = None
    if rows_alike:
        scale, _ = _row_scales(N, student_inverse, squared, None, None, num_items, reduction)
    return _Settled(
        student_inverse,
        teacher_inverse,
        squared,
        _keep(top_k, bottom_percentile, vocab, N, like),
        *_divergence(beta, N, like, dtype),
        scale,
    )


_HOST = torch.empty(0, device="cpu")


@lru_cache(maxsize=64, typed=True)
def _settled_on_host(*numbers: Any) -> _Settled:
    """Kept, since a call that repeats the options of another would spend 8 of its 60 us on them."""
    return _settle(_HOST, *numbers)


def prepare(
    student_logits: Tensor,
    teacher: Tensor | SparseTeacher,
    labels: Tensor | None,
    *,
    soft: float,
    hard: float,
    target: float | None = None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    beta: float = 0.0,
    top_k: int | None = None,
    bottom_percentile: float = 0.0,
    vocab_size: int | None,
    teacher_kind: str = "logits",
    ignore_index: int,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    reduction: str,
    return_terms: bool,
    inplace: bool,
    backend: str,
) -> Call:
    """Checks the arguments and folds them into what the kernel takes.

    `soft`, `hard`, `target`: what the terms weigh in the loss; a target makes it the decoupled one.
    The other arguments are those of :func:`fastkd.kd_loss`. A sparse teacher has been checked.
    """
    if isinstance(teacher, SparseTeacher):
        assert vocab_size is not None
        vocab = vocab_size
        dtype = teacher.log_probs.dtype
        named = teacher.named
    else:
        vocab = check_logits(student_logits, teacher, vocab_size)
        dtype = compute_dtype(student_logits, teacher)
        named = None
    # The decoupled terms set apart a class that the teacher has as well.
    label_classes = student_logits.shape[-1] if target is None else vocab
    if labels is not None:
        ignore_index = as_int("ignore_index", ignore_index)
        labels = check_labels(labels, student_logits, label_classes, ignore_index)
    if token_weights is not None:
        token_weights = check_rows("token_weights", token_weights, student_logits)
    if top_k is not None:
        top_k = as_int("top_k", top_k, "an int or None")
    wants_soft = soft > 0 or return_terms or target is not None
    wants_hard = labels is not None and (hard > 0 or return_terms)
    if inplace:
        reads_teacher = wants_soft and not isinstance(teacher, SparseTeacher)
        check_inplace(student_logits, teacher if reads_teacher else None)  # type: ignore[arg-type]

    N = math.prod(student_logits.shape[:-1])
    rows_alike = labels is None and token_weights is None and named is None
    numbers = (
        N,
        vocab,
        dtype,
        target is None and not isinstance(teacher, SparseTeacher),
        rows_alike,
        temperature,
        teacher_temperature,
        float(beta),
        top_k,
        bottom_percentile,
        teacher_kind,
        reduction,
        num_items,
    )
    per_row = isinstance(temperature, Tensor) or isinstance(teacher_temperature, Tensor)
    if per_row or N > _FEW_ROWS or isinstance(num_items, Tensor) or not on_host(student_logits):
        settled = _settle(student_logits, *numbers)
    else:
        try:
            settled = _settled_on_host(*numbers)
        except TypeError:  # also of a wrong type that has no hash, which is then refused by name
            settled = _settle(student_logits, *numbers)
    soft_scale, hard_scale = settled.scale, None
    if not rows_alike:
        counting = None if labels is None else labels != ignore_index
        if named is not None:
            counting = named if counting is None else counting & named
        soft_scale, hard_scale = _row_scales(
            N,
            settled.student_inverse,
            settled.squared_temperature,
            counting,
            token_weights,
            num_items,
            reduction,
        )
    if isinstance(teacher, Tensor):
        given: DenseTeacher | SparseTeacher = DenseTeacher(
            logits=teacher, keep=settled.keep, probs=teacher_kind == "probs"
        )
    else:
        given = teacher
    return Call(
        teacher=given,
        labels=labels,
        student_inv_temperature=settled.student_inverse,
        teacher_inv_temperature=settled.teacher_inverse,
        soft=_term(soft_scale, soft) if wants_soft else NOT_COMPUTED,
        hard=_term(hard_scale, hard) if wants_hard else NOT_COMPUTED,
        target=NOT_COMPUTED if target is None else _term(soft_scale, target),
        vocab_size=vocab,
        divergence=settled.divergence,
        beta=settled.beta,
        per_row=reduction == "none",
        return_terms=return_terms,
        inplace=inplace,
        ops=choose_backend(backend, student_logits.device, dtype),
    )
