"""The losses as modules, whose options are attributes."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .losses import DKDLossOutput, KDLossOutput, dkd_loss, kd_loss, topk_kd_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .core.options import DKDOptions, KDOptions, TopKKDOptions

# What a call returns: a Tensor, or the loss with its terms.
Result = TypeVar("Result")


class _LossModule(_Loss, Generic[Result]):
    """A loss whose keywords are attributes; see KDLoss."""

    loss: ClassVar[Callable[..., Any]]
    _options: ClassVar[dict[str, Any]]  # with their defaults

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    alpha: float
    vocab_size: int | None
    ignore_index: int
    token_weights: Tensor | None
    num_items: float | Tensor | None
    reduction: str
    return_terms: bool
    inplace: bool
    backend: str

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

    def __setattr__(self, name: str, value: Any) -> None:
        """A tensor is a buffer: it moves with the module and is in its state."""
        if name in self._options:
            self._buffers.pop(name, None)
            self.__dict__.pop(name, None)
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
                return
        elif not hasattr(self, name):
            self._refuse_misspelt(name)
        super().__setattr__(name, value)

    def _refuse_misspelt(self, name: str) -> None:
        """Frameworks keep attributes of their own in a module: only what looks like an option."""
        near = [option for option in self._options if len(name) > 2 and option.startswith(name)]
        near += get_close_matches(name, self._options, cutoff=0.75)
        if near:
            raise AttributeError(
                f"{type(self).__name__} has no option {name!r}, which would have no effect: did "
                f"you mean {near[0]!r}?"
            )

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


class KDLoss(_LossModule[Result]):
    """:func:`kd_loss` as a module: the same keywords, kept as attributes.

    A schedule may change an attribute between steps (``loss.temperature = 3.0``). What belongs to
    one batch may also be given to the call: ``loss(student, teacher, labels, token_weights=w)``.
    An option that is a tensor, as a temperature may be, is a buffer: it moves with the module and
    is part of its state_dict.

    Raises:
        TypeError: a keyword that :func:`kd_loss` does not have.
        AttributeError: the assignment of an attribute that looks like a misspelt option.
    """

    loss = staticmethod(kd_loss)
    beta: float
    top_k: int | None
    bottom_percentile: float
    teacher_kind: str

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: "KDLoss[Tensor]",
            *,
            return_terms: Literal[False] = False,
            **options: Unpack[KDOptions],
        ) -> None: ...
        @overload
        def __init__(
            self: "KDLoss[KDLossOutput]",
            *,
            return_terms: Literal[True],
            **options: Unpack[KDOptions],
        ) -> None: ...
        def __init__(self, **options: Any) -> None: ...

        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor,
            labels: Tensor | None = None,
            **options: Unpack[KDOptions],
        ) -> Result: ...
        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[True],
            **options: Unpack[KDOptions],
        ) -> KDLossOutput: ...
        def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`options` override the attributes for this call; see :func:`kd_loss`."""
        return self._call(student_logits, teacher_logits, labels, **options)


class DKDLoss(_LossModule[Result]):
    """:func:`dkd_loss` as a module, like :class:`KDLoss`."""

    loss = staticmethod(dkd_loss)
    beta: float
    hard_weight: float
    top_k: int | None
    bottom_percentile: float
    teacher_kind: str

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: "DKDLoss[Tensor]",
            *,
            return_terms: Literal[False] = False,
            **options: Unpack[DKDOptions],
        ) -> None: ...
        @overload
        def __init__(
            self: "DKDLoss[DKDLossOutput]",
            *,
            return_terms: Literal[True],
            **options: Unpack[DKDOptions],
        ) -> None: ...
        def __init__(self, **options: Any) -> None: ...

        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor,
            labels: Tensor,
            **options: Unpack[DKDOptions],
        ) -> Result: ...
        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor,
            labels: Tensor,
            *,
            return_terms: Literal[True],
            **options: Unpack[DKDOptions],
        ) -> DKDLossOutput: ...
        def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any
    ) -> Any:
        """`options` override the attributes for this call; see :func:`dkd_loss`."""
        return self._call(student_logits, teacher_logits, labels, **options)


class TopKKDLoss(_LossModule[Result]):
    """:func:`topk_kd_loss` as a module, like :class:`KDLoss`."""

    loss = staticmethod(topk_kd_loss)
    outside: str
    repeated_ids: str

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: "TopKKDLoss[Tensor]",
            *,
            return_terms: Literal[False] = False,
            **options: Unpack[TopKKDOptions],
        ) -> None: ...
        @overload
        def __init__(
            self: "TopKKDLoss[KDLossOutput]",
            *,
            return_terms: Literal[True],
            **options: Unpack[TopKKDOptions],
        ) -> None: ...
        def __init__(self, **options: Any) -> None: ...

        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_ids: Tensor,
            teacher_log_probs: Tensor,
            labels: Tensor | None = None,
            **options: Unpack[TopKKDOptions],
        ) -> Result: ...
        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher_ids: Tensor,
            teacher_log_probs: Tensor,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[True],
            **options: Unpack[TopKKDOptions],
        ) -> KDLossOutput: ...
        def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`options` override the attributes for this call; see :func:`topk_kd_loss`."""
        return self._call(student_logits, teacher_ids, teacher_log_probs, labels, **options)
