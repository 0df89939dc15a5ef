"""Who is compared: one signature for all.

A provider says why it cannot run on a device (no reason: it can), and makes the loss of a case;
None: it has no part in the case.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.kernels import BACKENDS

from .cases import SPARSE, TEMPERATURE, Case, Loss
from .eager import EAGER
from .peers import liger, liger_reasons, speculators, speculators_reasons, trl, trl_reasons


class Provider(NamedTuple):
    loss: Callable[[Case], Loss | None]
    reasons: Callable[[str], list[str]] = lambda device: []


def fastkd_loss(case: Case, backend: str, **more: Any) -> Loss:
    options = case.kwargs | {"backend": backend} | more
    if case.option in SPARSE:
        return lambda student, teacher: fastkd.topk_kd_loss(student, *teacher, **options)
    return partial(fastkd.dkd_loss if case.option == "dkd" else fastkd.kd_loss, **options)


def _fastkd(backend: str) -> dict[str, Provider]:
    def reasons(device: str) -> list[str]:
        if backend in ("cpu", "cuda") and backend != device:
            return [f"for tensors on {backend}"]
        return fastkd.backends()[backend]

    def inplace(case: Case) -> Loss | None:
        return fastkd_loss(case, backend, inplace=True) if case.backward else None

    def plain(case: Case, inplace: bool = False) -> Loss | None:
        """kd_loss without options on logits of the same size: what an option costs."""
        if case.option == "plain" or not case.backward:
            return None
        return partial(fastkd.kd_loss, temperature=TEMPERATURE, inplace=inplace, backend=backend)

    return {
        f"fastkd {backend}": Provider(partial(fastkd_loss, backend=backend), reasons),
        f"fastkd {backend}, inplace": Provider(inplace, reasons),
        f"fastkd {backend}, plain": Provider(plain, reasons),
        f"fastkd {backend}, inplace, plain": Provider(partial(plain, inplace=True), reasons),
    }


def _eager(case: Case) -> Loss:
    return partial(EAGER[case.option], **case.kwargs)


def _eager_float32(case: Case) -> Loss | None:
    """16-bit logits in float32, as trainers do for the sake of the loss."""
    if case.dtype == "float32":
        return None
    eager = _eager(case)

    def loss(student: Tensor, teacher: Any) -> Tensor:
        return eager(student.float(), teacher if isinstance(teacher, tuple) else teacher.float())

    return loss


def _compiled(make: Callable[[Case], Loss | None]) -> Callable[[Case], Loss | None]:
    def compiled(case: Case) -> Loss | None:
        loss = make(case) if case.compiled else None
        return loss and torch.compile(loss, fullgraph=True, dynamic=False)

    return compiled


PROVIDERS: dict[str, Provider] = {
    provider: how
    for backend in sorted(BACKENDS.keys() - {"reference"})
    for provider, how in _fastkd(backend).items()
} | {
    "eager": Provider(_eager),
    "eager float32": Provider(_eager_float32),
    "torch.compile": Provider(_compiled(_eager)),
    "torch.compile float32": Provider(_compiled(_eager_float32)),
    "Liger-Kernel": Provider(liger, liger_reasons),
    "TRL": Provider(trl, trl_reasons),
    "speculators": Provider(speculators, speculators_reasons),
}


@cache
def unavailable(device: str) -> dict[str, list[str]]:
    """Per provider that cannot run on that device, why."""
    reasons = {name: provider.reasons(device) for name, provider in PROVIDERS.items()}
    return {name: why for name, why in reasons.items() if why}
