"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from .decoupled import DKDLossOutput, dkd_loss
from .loss import KDLossOutput, kd_loss
from .modules import DKDLoss, KDLoss
from .ops import backends
from .version import __version__

__all__ = [
    "DKDLoss",
    "DKDLossOutput",
    "KDLoss",
    "KDLossOutput",
    "__version__",
    "backends",
    "dkd_loss",
    "kd_loss",
]
