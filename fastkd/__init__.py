"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from . import schedules
from .kernels import backends
from .losses import DKDLossOutput, KDLossOutput, dkd_loss, kd_loss, topk_kd_loss
from .modules import DKDLoss, KDLoss, TopKKDLoss
from .teachers import TopKTeacher, class_bias, ensemble, topk_teacher
from .version import __version__

__all__ = [
    "DKDLoss",
    "DKDLossOutput",
    "KDLoss",
    "KDLossOutput",
    "TopKKDLoss",
    "TopKTeacher",
    "__version__",
    "backends",
    "class_bias",
    "dkd_loss",
    "ensemble",
    "kd_loss",
    "schedules",
    "topk_kd_loss",
    "topk_teacher",
]
