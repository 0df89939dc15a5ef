"""The losses as modules, whose options are attributes."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .decoupled import DKDLossOutput, dkd_loss
from .loss import KDLossOutput, kd_loss
from .sparse import topk_kd_loss


class _LossModule(nn.Module):
    """A loss whose keywords are attributes; see KDLoss."""

    loss: ClassVar[Callable[..., Any]]
    _options: ClassVar[dict[str, Any]]  # with their defaults

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        signature = inspect.signature(cls.loss)
        options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        cls._options = {p.name: p.default for p in options}
        cls.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=options, return_annotation=inspect.Signature.empty
        )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in self._known({**self._options, **options}).items():
            setattr(self, name, value)

    @classmethod
    def _known(cls, options: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in options if name not in cls._options]
        if unknown:
            raise TypeError(
                f"{cls.__name__} got {', '.join(unknown)}, which is no option of "
                f"{cls.loss.__name__}: {', '.join(cls._options)}"
            )
        return options

    def _call(self, *inputs: Tensor | None, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._loss(*inputs, **options)
        # An integer of a module is a constant of the graph otherwise: compiled anew for each top_k.
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
            return self._loss(*inputs, **options)

    def _loss(self, *inputs: Tensor | None, **options: Any) -> Any:
        current = {name: getattr(self, name) for name in self._options}
        return type(self).loss(*inputs, **{**current, **self._known(options)})

    def extra_repr(self) -> str:
        changed = {name: getattr(self, name) for name in self._options}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in changed.items()
            if isinstance(value, Tensor) or value != self._options[name]
        )


class KDLoss(_LossModule):
    """:func:`kd_loss` as a module: the same keywords, kept as attributes.

    A schedule may change an attribute between steps (``loss.temperature = 3.0``). What belongs to
    one batch may also be given to the call: ``loss(student, teacher, labels, token_weights=w)``.

    Raises:
        TypeError: a keyword that :func:`kd_loss` does not have.
    """

    loss = staticmethod(kd_loss)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | KDLossOutput:
        """`options` override the attributes for this call; see :func:`kd_loss`."""
        return self._call(student_logits, teacher_logits, labels, **options)


class DKDLoss(_LossModule):
    """:func:`dkd_loss` as a module, like :class:`KDLoss`."""

    loss = staticmethod(dkd_loss)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any
    ) -> Tensor | DKDLossOutput:
        """`options` override the attributes for this call; see :func:`dkd_loss`."""
        return self._call(student_logits, teacher_logits, labels, **options)


class TopKKDLoss(_LossModule):
    """:func:`topk_kd_loss` as a module, like :class:`KDLoss`."""

    loss = staticmethod(topk_kd_loss)

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | KDLossOutput:
        """`options` override the attributes for this call; see :func:`topk_kd_loss`."""
        return self._call(student_logits, teacher_ids, teacher_log_probs, labels, **options)
