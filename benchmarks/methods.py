"""The other losses beside kd_loss, on the logits of one case."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd

from .cases import TEMPERATURE, Case

CLASSES = 64  # of a sparse teacher


def losses(case: Case, teacher: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Each a loss of the student's logits alone."""
    labels = torch.arange(case.N, device=teacher.device) * 7919 % case.V
    sparse = fastkd.topk_teacher(teacher, CLASSES)
    probs = torch.empty_like(teacher)
    for rows, logits in zip(probs.split(256), teacher.split(256), strict=True):
        rows.copy_(logits.float().softmax(-1))
    T = {"temperature": TEMPERATURE, "backend": case.backend}
    return {
        "kd_loss": lambda s: fastkd.kd_loss(s, teacher, **T),
        "dkd_loss": lambda s: fastkd.dkd_loss(s, teacher, labels, **T),
        "probabilities": lambda s: fastkd.kd_loss(s, probs, teacher_kind="probs", **T),
        "top_k": lambda s: fastkd.kd_loss(s, teacher, top_k=CLASSES, **T),
        **{
            outside: lambda s, outside=outside: fastkd.topk_kd_loss(
                s, *sparse, outside=outside, **T
            )
            for outside in ("bucket", "restrict", "renormalize")
        },
    }
