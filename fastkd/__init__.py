"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from . import schedules
from .loss import KDLoss, KDLossOutput, kd_loss
from .ops import backends
from .teachers import class_bias, ensemble
from .version import __version__

__all__ = [
    "KDLoss",
    "KDLossOutput",
    "__version__",
    "backends",
    "class_bias",
    "ensemble",
    "kd_loss",
    "schedules",
]
