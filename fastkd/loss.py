"""The public losses: arguments -> rows, weights and reduction. No kernel, and all of the policy."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .arguments import (
    check_inplace,
    check_keep,
    check_labels,
    check_logits,
    check_reduction,
    check_rows,
    check_temperature,
    check_unit_interval,
)
from .spec import compute_dtype


class KDLossOutput(NamedTuple):
    """What ``kd_loss(..., return_terms=True)`` returns.

    ``loss`` is ``alpha * soft + (1 - alpha) * hard`` and carries the graph. ``soft`` and ``hard``
    are detached and reduced as the loss is, before their mixing weights: the soft term with T^2,
    both with the token weights. ``hard`` is None where no labels were given.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor | None


def _filled(value: float, N: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        # Inductor keeps an earlier value of a fill that has become symbolic.
        return like.new_ones(N, dtype=dtype) * value
    return like.new_full((N,), value, dtype=dtype)


def _inverse_and_square(
    temperature: float | Tensor, N: int, logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float | Tensor]:
    """1 / T [N], and T^2 as it came; NaN where a T that could not be checked is not usable."""
    if not isinstance(temperature, Tensor):
        return _filled(1 / temperature, N, logits, dtype), temperature * temperature
    temperature = temperature.detach().to(dtype)
    usable = (temperature > 0) & (temperature < torch.inf)
    return torch.where(usable, 1 / temperature, torch.nan), temperature.square()


def _row_scales(
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
            if isinstance(num_items, Tensor):  # of any shape: it must not add dimensions to rows
                divisor = num_items.detach().to(like.dtype).reshape(())
        elif counting is not None:
            divisor = counting.sum().clamp_min(1)
        else:
            divisor = max(like.shape[0], 1)
    weights = counting if token_weights is None else token_weights.detach()
    if weights is None and not isinstance(divisor, Tensor):
        if isinstance(squared_temperature, Tensor):
            return squared_temperature / divisor, None
        scale = squared_temperature / divisor
        return _filled(scale, like.shape[0], like, like.dtype), None
    hard = torch.ones_like(like) if weights is None else weights.to(like.dtype)
    if counting is not None and token_weights is not None:
        hard = torch.where(counting, hard, 0)
    if isinstance(divisor, Tensor) or divisor != 1:
        hard = hard / divisor
    if isinstance(squared_temperature, Tensor):
        return torch.where(hard == 0, 0, hard * squared_temperature), hard
    return (hard if squared_temperature == 1 else hard * squared_temperature), hard


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
        labels: int64 or int32, one per row (the leading shape, or flat). Rows labelled
            `ignore_index` do not count: their loss and gradient are exactly 0 whatever they hold.
            Without labels every row counts.
        temperature: T > 0, a number or a floating tensor with one value per row. The soft term is
            scaled by T^2 (Hinton et al. 2015, section 2.1), per row inside the mean.
        teacher_temperature: the teacher's own temperature; None: the same.
        beta: which divergence D: 0 KL(p||q), 1 KL(q||p), between them the generalised
            Jensen-Shannon divergence beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q
            (Agarwal et al. 2024). 0 and 1 are conventions, not its limits, which are 0.
        alpha: weight of the soft term; 1 - alpha weighs the hard one, the cross-entropy with
            `labels` at T = 1 over all classes, never pruned.
        top_k: keep the k largest teacher logits of each row in both distributions.
        bottom_percentile: drop floor(V * percentile / 100) classes with the smallest teacher
            logits, in [0, 100). Both options: the smaller set is kept, at least one class. Classes
            tied with the last one kept are kept. Pruned classes get no gradient from the soft term.
        vocab_size: number of leading classes that take part, where the two V differ or are padded;
            the gradient is exactly 0 beyond.
        ignore_index: the label of rows that do not count.
        token_weights: one weight per row, multiplying both terms. A row of weight 0 is skipped.
        num_items: the divisor of "batchmean" in place of the number of counting rows, for gradient
            accumulation or data parallelism; a number, or a tensor of one.
        reduction: "batchmean": sum / number of counting rows (at least 1); "sum"; "none": one
            value per row, in the leading shape, 0 where a row does not count.
        return_terms: return a :class:`KDLossOutput` with both terms beside the loss.
        inplace: write the gradient over `student_logits`, with no N x V allocation. From the call
            on they no longer hold logits, and after backward they hold the gradient. Nothing is
            written where no gradient is needed.
        backend: "auto", or one of :func:`fastkd.backends`; a backend asked for by name runs or
            raises.

    Returns:
        A scalar float32 (float64 for float64 logits), one per row for "none", or a KDLossOutput.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a value out of range, shapes or devices that do not fit, a teacher that requires
            a gradient, alpha < 1 without labels, inplace=True on a leaf.
        RuntimeError: a named backend that cannot run (with every reason); a second-order gradient;
            a second backward with inplace=True.

    Examples:
        >>> student, teacher = torch.randn(8, 32000, requires_grad=True), torch.randn(8, 32000)
        >>> fastkd.kd_loss(student, teacher, temperature=2.0).backward()
    """
    vocab = check_logits(student_logits, teacher_logits, vocab_size)
    check_unit_interval("beta", beta)
    check_unit_interval("alpha", alpha)
    check_reduction(reduction, num_items)
    keep = check_keep(top_k, bottom_percentile, vocab)
    labels = check_labels(labels, student_logits, vocab, ignore_index, alpha)
    temperature = check_temperature("temperature", temperature, student_logits)
    if teacher_temperature is not None:
        teacher_temperature = check_temperature(
            "teacher_temperature", teacher_temperature, student_logits
        )
    if token_weights is not None:
        token_weights = check_rows("token_weights", token_weights, student_logits)
    if inplace:
        check_inplace(student_logits)

    dtype = compute_dtype(student_logits, teacher_logits)
    N = student_logits.shape[:-1].numel()
    student_inverse, squared = _inverse_and_square(temperature, N, student_logits, dtype)
    teacher_inverse = student_inverse
    if teacher_temperature is not None:
        teacher_inverse, _ = _inverse_and_square(teacher_temperature, N, student_logits, dtype)
    counting = None if labels is None else labels != ignore_index
    soft_scale, hard_scale = _row_scales(
        student_inverse, squared, counting, token_weights, num_items, reduction
    )
    request = ops.Request(
        teacher=teacher_logits,
        labels=labels,
        student_inv_temperature=student_inverse,
        teacher_inv_temperature=teacher_inverse,
        soft_scale=soft_scale if alpha > 0 or return_terms else None,
        hard_scale=hard_scale if labels is not None and (alpha < 1 or return_terms) else None,
        alpha=float(alpha),
        keep=keep,
        vocab_size=vocab,
        beta=float(beta),
        per_row=reduction == "none",
        terms=return_terms,
        inplace=inplace,
        ops=ops.choose_backend(backend, student_logits.device, dtype),
    )
    terms = ops.kd_terms(student_logits, request)
    if not return_terms:
        return terms[0]
    loss, soft, hard = terms
    assert soft is not None, "asked for above"
    return KDLossOutput(loss, soft, hard)


_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(kd_loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


class KDLoss(nn.Module):
    """:func:`kd_loss` as a module: the same keywords, kept as attributes.

    A schedule may change an attribute between steps (``loss.temperature = 3.0``). What belongs to
    one batch may also be given to the call: ``loss(student, teacher, labels, token_weights=w)``.

    Raises:
        TypeError: a keyword that :func:`kd_loss` does not have.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in self._known({**_OPTIONS, **options}).items():
            setattr(self, name, value)

    @staticmethod
    def _known(options: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise TypeError(
                f"KDLoss got {', '.join(unknown)}, which is no option of kd_loss: "
                f"{', '.join(_OPTIONS)}"
            )
        return options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | KDLossOutput:
        """`options` override the attributes for this call; see :func:`kd_loss`."""
        current = {name: getattr(self, name) for name in _OPTIONS}
        return kd_loss(
            student_logits, teacher_logits, labels, **{**current, **self._known(options)}
        )

    def extra_repr(self) -> str:
        changed = {name: getattr(self, name) for name in _OPTIONS}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in changed.items()
            if isinstance(value, Tensor) or value != _OPTIONS[name]
        )


KDLoss.__signature__ = inspect.signature(kd_loss).replace(  # type: ignore[attr-defined]
    parameters=[
        parameter
        for name, parameter in inspect.signature(kd_loss).parameters.items()
        if name in _OPTIONS
    ],
    return_annotation=inspect.Signature.empty,
)
