"""The reference backend: the definition itself, on any device."""

from .. import spec
from ..core.ops import define

SUFFIX = "_reference"
define(SUFFIX, spec.dense_rows, spec.scale_rows_, spec.sparse_rows)
