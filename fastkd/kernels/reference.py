"""The reference backend: the definition itself, on any device."""

from .. import spec
from ..core.ops import define
from .backend import Backend

define("_reference", spec.dense_rows, spec.scale_rows_, spec.sparse_rows)
BACKEND = Backend("_reference", [])
