"""The CPU kernels' module, fastkd._C, which registers them where it is here."""

from importlib import import_module
from importlib.util import find_spec

from ..core.ops import ORDER_NAMED_OP
from .backend import Backend

MISSING = []
if find_spec("fastkd._C") is not None:
    import_module("fastkd._C")
else:
    MISSING.append("fastkd._C is not built in this source tree")

BACKEND = Backend("", MISSING, "cpu", order_named=ORDER_NAMED_OP)
