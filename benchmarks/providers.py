"""The losses that are compared. A provider is a name and a function from a case to a loss.

The loss takes (student, teacher) and returns a scalar; None: the provider has no part in the case.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .cases import PRUNING, TEMPERATURE, Case

Loss = Callable[[Tensor, Tensor], Any]


def plain(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """As trl's generalised JSD, with the mixture by logaddexp."""
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    kl_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    kl_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (beta * kl_teacher + (1 - beta) * kl_student) * temperature**2


def _pruned(student: Tensor, teacher: Tensor, tau: Tensor, temperature: float) -> Tensor:
    dropped = teacher < tau
    log_q = F.log_softmax((student / temperature).masked_fill(dropped, -torch.inf), -1)
    p = F.softmax((teacher / temperature).masked_fill(dropped, -torch.inf), -1)
    # 0 * -inf is NaN: the dropped classes leave the sum.
    kl = F.kl_div(log_q.masked_fill(dropped, 0), p, reduction="batchmean")
    return kl * temperature**2


def top_k(student: Tensor, teacher: Tensor, temperature: float, top_k: int) -> Tensor:
    tau = teacher.topk(top_k, -1).values[..., -1:]
    return _pruned(student, teacher, tau, temperature)


def bottom_percentile(
    student: Tensor, teacher: Tensor, temperature: float, bottom_percentile: float
) -> Tensor:
    dropped = int(teacher.shape[-1] * bottom_percentile / 100 + 1e-6)
    tau = teacher.kthvalue(dropped + 1, -1, keepdim=True).values
    return _pruned(student, teacher, tau, temperature)


def hard(
    student: Tensor, teacher: Tensor, temperature: float, alpha: float, labels: Tensor
) -> Tensor:
    soft = plain(student, teacher, temperature)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


EAGER: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "top_k": top_k,
    "bottom_percentile": bottom_percentile,
    "jsd": jsd,
    "hard": hard,
}


def _fastkd(case: Case) -> Loss:
    return partial(fastkd.kd_loss, **case.kwargs, backend=case.backend)


def _fastkd_inplace(case: Case) -> Loss:
    return partial(_fastkd(case), inplace=True)


def _fastkd_unpruned(case: Case) -> Loss | None:
    """The same logits without pruning: what the selection costs."""
    if case.option not in PRUNING:
        return None
    return partial(fastkd.kd_loss, temperature=TEMPERATURE, backend=case.backend)


def _eager(case: Case) -> Loss:
    return partial(EAGER[case.option], **case.kwargs)


def _eager_float32(case: Case) -> Loss | None:
    """16-bit logits in float32, as trainers do for the sake of the loss."""
    if case.dtype == "float32":
        return None
    return lambda student, teacher: _eager(case)(student.float(), teacher.float())


def _compiled(case: Case) -> Loss:
    torch.compiler.reset()  # else the cases share one cache, and its limit
    compiled = torch.compile(EAGER[case.option], fullgraph=True, dynamic=False)
    return partial(compiled, **case.kwargs)


PROVIDERS: dict[str, Callable[[Case], Loss | None]] = {
    "fastkd": _fastkd,
    "fastkd inplace": _fastkd_inplace,
    "fastkd unpruned": _fastkd_unpruned,
    "eager": _eager,
    "eager float32": _eager_float32,
    "torch.compile": _compiled,
}
