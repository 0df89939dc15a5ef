"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from . import schedules
from .decoupled import DKDLossOutput, dkd_loss
from .loss import KDLossOutput, kd_loss
from .modules import DKDLoss, KDLoss, TopKKDLoss
from .ops import backends
from .sparse import TopKTeacher, topk_kd_loss, topk_teacher
from .teachers import class_bias, ensemble
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
