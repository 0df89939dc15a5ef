"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from .loss import KDLoss, KDLossOutput, kd_loss
from .ops import backends

__version__ = "0.1.0"
__all__ = ["KDLoss", "KDLossOutput", "backends", "kd_loss"]
