"""The public losses. The arguments that they share are read in core/call.py."""

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.autograd import kd_terms
from .core.call import SparseTeacher, prepare
from .core.checks import (
    check_alpha,
    check_log_probs,
    check_sparse_teacher,
    check_unit_interval,
    check_weight,
    on_host,
)
from .kernels import choose_backend

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .core.options import DKDOptions, KDOptions, TopKKDOptions

OUTSIDE = ("bucket", "restrict", "renormalize")
REPEATED = ("add", "once")


class KDLossOutput(NamedTuple):
    """What ``kd_loss(..., return_terms=True)`` returns.

    ``loss`` is ``alpha * soft + (1 - alpha) * hard`` and carries the graph. ``soft`` and ``hard``
    are detached and reduced as the loss is, before their mixing weights: the soft term with T^2,
    both with the token weights. ``hard`` is None where no labels were given.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: "Unpack[KDOptions]",
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: "Unpack[KDOptions]",
) -> KDLossOutput: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_terms: bool,
    **options: "Unpack[KDOptions]",
) -> Tensor | KDLossOutput: ...


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    bottom_percentile: float = 0.0,
    vocab_size: int | None = None,
    teacher_kind: str = "logits",
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossOutput:
    r"""Knowledge-distillation loss between logits, with its gradient computed in the same pass.

    Per row r, with p the teacher's and q the student's distribution::

        loss_r = token_weight_r * (alpha * T^2 * D(p, q) + (1 - alpha) * -log softmax(z)[label])
        p = softmax(v / T_teacher) over K,  q = softmax(z / T) over K

    ``kd_loss(s, t, temperature=T)`` is
    ``F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2``
    for ``s``, ``t`` of shape [N, V]; with more dimensions every leading position is a row.

    Args:
        student_logits: [..., V_s], float32, bfloat16, float16 or float64. Arithmetic is float32
            (float64 where either logits are). The last dimension should have stride 1 and at most
            two strides should describe the rows, as in ``logits[:, :-1]``; anything else is copied.
        teacher_logits: [..., V_t], the same leading shape, of any of these dtypes; a constant.
        labels: of any integer dtype, one per row (the leading shape, or flat), each a class of the
            student. Rows labelled `ignore_index` do not count: their loss and gradient are exactly
            0 whatever they hold. Without labels every row counts.
        temperature: T > 0, a number, or a floating tensor of one value or with one per row, shaped
            as the labels or [..., 1]. The soft term is scaled by T^2 (Hinton et al. 2015, section
            2.1), per row inside the mean. The number may be ``math.inf``, the limit there: half the
            variance of z - v over K, for a mixture times beta (1 - beta); +inf, without a gradient,
            where a class has a logit on one side only.
        teacher_temperature: the teacher's own temperature; None: the same. Infinite with the other.
        beta: which divergence D: 0 KL(p||q), 1 KL(q||p), between them the generalised
            Jensen-Shannon divergence beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q
            (Agarwal et al. 2024). 0 and 1 are conventions, not its limits, which are 0.
        alpha: weight of the soft term; 1 - alpha weighs the hard one, the cross-entropy with
            `labels` at T = 1 over all V_s classes, never pruned, whatever `vocab_size` is:
            ``F.cross_entropy(student_logits, labels)``.
        top_k: keep the k largest teacher logits of each row in both distributions.
        bottom_percentile: drop floor(V * percentile / 100) classes with the smallest teacher
            logits, in [0, 100). Both options: the smaller set is kept, at least one class. Classes
            tied with the last one kept are kept. Pruned classes get no gradient from the soft term.
        vocab_size: number of leading classes that the soft term is over, where the two V differ or
            are padded; its gradient is exactly 0 beyond. The hard term is over all V_s: padding is
            kept out of both by ``student_logits[..., :vocab_size]``.
        teacher_kind: "logits", which log-probabilities are as well, or "probs": `teacher_logits`
            then hold probabilities, of any sum; p = P^(1/T) / sum P^(1/T), a zero stays zero.
        ignore_index: the label of rows that do not count.
        token_weights: one weight per row, multiplying both terms. A row of weight 0 is skipped.
        num_items: the divisor of "batchmean" in place of the number of counting rows, for gradient
            accumulation or data parallelism; a number, or a tensor of one. It may be 0 where no row
            counts or has a weight; elsewhere 0 is an error on the host, and the loss infinite.
        reduction: "batchmean": sum / number of counting rows (at least 1); "sum"; "none": one
            value per row, in the leading shape, 0 where a row does not count.
        return_terms: return a :class:`KDLossOutput` with both terms beside the loss.
        inplace: write the gradient over `student_logits`, with no N x V allocation. From the call
            on they no longer hold logits, and after backward they hold the gradient. Nothing is
            written where no gradient is needed. A teacher in the same memory must be the same view.
        backend: "auto", or one of :func:`fastkd.backends`; a backend asked for by name runs or
            raises.

    Returns:
        A scalar float32 (float64 for float64 logits), one per row for "none", or a KDLossOutput.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a value out of range, shapes or devices that do not fit, a teacher that requires
            a gradient, alpha < 1 without labels, inplace=True on a leaf or over other rows of the
            teacher.
        RuntimeError: a named backend that cannot run (with every reason); a second-order gradient,
            whatever asks for it; a second backward with inplace=True; several threads in a process
            that was forked after its parent had used them.

    Examples:
        >>> student, teacher = torch.randn(8, 32000, requires_grad=True), torch.randn(8, 32000)
        >>> fastkd.kd_loss(student, teacher, temperature=2.0).backward()
    """
    check_unit_interval("beta", beta)
    check_alpha(alpha, labels)
    loss, soft, hard, _ = kd_terms(
        student_logits,
        prepare(
            student_logits,
            teacher_logits,
            labels,
            soft=float(alpha),
            hard=1 - float(alpha),
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            beta=beta,
            top_k=top_k,
            bottom_percentile=bottom_percentile,
            vocab_size=vocab_size,
            teacher_kind=teacher_kind,
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


class DKDLossOutput(NamedTuple):
    """What ``dkd_loss(..., return_terms=True)`` returns.

    ``loss`` is ``alpha * target + beta * nontarget + hard_weight * hard`` and carries the graph;
    the terms are detached, reduced as the loss is, before their weights, the first two with T^2.
    """

    loss: Tensor
    target: Tensor
    nontarget: Tensor
    hard: Tensor


@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    return_terms: Literal[False] = False,
    **options: "Unpack[DKDOptions]",
) -> Tensor: ...


@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    return_terms: Literal[True],
    **options: "Unpack[DKDOptions]",
) -> DKDLossOutput: ...


@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    return_terms: bool,
    **options: "Unpack[DKDOptions]",
) -> Tensor | DKDLossOutput: ...


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    hard_weight: float = 0.0,
    top_k: int | None = None,
    bottom_percentile: float = 0.0,
    vocab_size: int | None = None,
    teacher_kind: str = "logits",
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | DKDLossOutput:
    r"""Decoupled knowledge distillation, with its gradient computed in the same pass.

    Per row, with y its label, p the teacher's and q the student's softmax at T, and p', q' the same
    over all classes but y::

        target    = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        nontarget = KL(p' || q')
        loss      = T^2 (alpha target + beta nontarget) + hard_weight * -log softmax(z)[y]

    KL(p || q) = target + (1 - p_y) nontarget (Zhao et al. 2022, arXiv:2203.08679, section 3.1): the
    plain loss mutes what a confident teacher knows of the other classes, this one does not. All of
    it is computed from logarithms: a student that is sure of its label loses no digit.

    Pruning applies to the other classes; the label is always kept. Where the teacher leaves them no
    probability at all, there is nothing to match and nontarget is 0.

    Args:
        labels: of any integer dtype, one per row; needed here. Rows of `ignore_index` do not count.
            Classes below `vocab_size`, for the teacher must have them as well.
        temperature: T > 0, a number or one value per row.
        alpha: weight of the target term.
        beta: weight of the non-target term; the paper takes 8 on CIFAR-100, and 2 to 0.5 for
            teachers and students that are closer. It warms both up over the first 20 epochs.
        hard_weight: weight of the cross-entropy with `labels` at T = 1 over all V_s classes of the
            student. The paper's whole loss has 1.
        return_terms: return a :class:`DKDLossOutput`.

    The other arguments, the shapes, the dtypes and the errors are those of :func:`kd_loss`.

    Examples:
        >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
        >>> fastkd.dkd_loss(student, teacher, torch.arange(8), hard_weight=1.0).backward()
    """
    if labels is None:
        raise ValueError("dkd_loss sets the label's class apart and needs labels, got None")
    for name, weight in (("alpha", alpha), ("beta", beta), ("hard_weight", hard_weight)):
        check_weight(name, weight)
    loss, nontarget, hard, target = kd_terms(
        student_logits,
        prepare(
            student_logits,
            teacher_logits,
            labels,
            soft=float(beta),
            hard=float(hard_weight),
            target=float(alpha),
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            top_k=top_k,
            bottom_percentile=bottom_percentile,
            vocab_size=vocab_size,
            teacher_kind=teacher_kind,
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
    assert target is not None and nontarget is not None and hard is not None, "asked for above"
    return DKDLossOutput(loss, target, nontarget, hard)


def _each_id_once(ids: Tensor, log_probs: Tensor) -> Tensor:
    """The ids, of equal ones all but the most probable turned into -1."""
    _, by_probability = log_probs.sort(dim=-1, descending=True, stable=True)
    ordered, by_id = ids.gather(-1, by_probability).sort(dim=-1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    order = by_probability.gather(-1, by_id)
    return torch.empty_like(ids).scatter_(-1, order, ordered.masked_fill(again, -1))


def _named(ids: Tensor, log_probs: Tensor, vocab: int) -> Tensor | None:
    """Which rows [N] name a class, in the order of spec.order_named; None: all do."""
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
    ids, log_probs, log_rest = choose_backend(backend, student_logits.device, dtype).order_named(
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
        prepare(
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
