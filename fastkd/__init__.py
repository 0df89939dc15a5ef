"""Fused knowledge-distillation losses for large vocabularies. Start with :func:`fastkd.kd_loss`."""

from . import schedules
from .loss import KDLoss, KDLossOutput, kd_loss
from .ops import backends
from .version import __version__

__all__ = ["KDLoss", "KDLossOutput", "__version__", "backends", "kd_loss", "schedules"]
