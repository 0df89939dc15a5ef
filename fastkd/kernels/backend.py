"""What the choice among the backends knows of each."""

from collections.abc import Callable
from typing import NamedTuple

from .. import spec


class Backend(NamedTuple):
    suffix: str  # of its ops
    missing: list[str]  # why it cannot run in this process, whatever the tensors
    device: str | None = None  # the device type it takes; None: any
    float64: bool = True  # whether it takes float64 logits
    unfit: Callable[[int], list[str]] | None = None  # why it cannot run on that device of its type
    by_name: bool = False  # "auto" passes it over
    order_named: Callable = spec.order_named  # its fastkd::order_named
