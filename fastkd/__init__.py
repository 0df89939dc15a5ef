"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from .decoupled import DKDLossOutput, dkd_loss
from .loss import KDLossOutput, kd_loss
from .modules import DKDLoss, KDLoss, TopKKDLoss
from .ops import backends
from .sparse import TopKTeacher, topk_kd_loss, topk_teacher
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
    "dkd_loss",
    "kd_loss",
    "topk_kd_loss",
    "topk_teacher",
]
