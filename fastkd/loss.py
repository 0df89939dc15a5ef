"""The public loss kd_loss; the arguments that all losses share are read in request.py."""

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from torch import Tensor

from .arguments import check_alpha, check_unit_interval
from .autograd import kd_terms
from .request import request

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import KDOptions


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
        request(
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
