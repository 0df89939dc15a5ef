"""Decoupled knowledge distillation (Zhao et al. 2022): the target and the other classes apart."""

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from torch import Tensor

from .arguments import check_weight
from .autograd import kd_terms
from .request import request

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DKDOptions


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
        request(
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
