"""Rows a few at a time, which bounds the memory of what is computed in plain torch."""

from collections.abc import Iterator

import torch
from torch import Tensor

LOGITS = 1 << 22  # at a time
ALL = slice(None)


def chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of `logits` [..., V], to be taken by :func:`take`.

    A graph of torch.compile has all rows in one: a loop would fix their number, and the compiler
    fuses what is done to them.
    """
    if torch.compiler.is_compiling():
        yield ALL
        return
    N, step = logits.shape[:-1].numel(), max(1, LOGITS // logits.shape[-1])
    for begin in range(0, N, step):
        yield slice(begin, min(begin + step, N))


def take(logits: Tensor, rows: slice) -> Tensor:
    """[n, V]: these rows of [..., V], of any strides; a view where one stride gives all rows."""
    V = logits.shape[-1]
    if rows == ALL:
        return logits.reshape(-1, V)
    try:
        return logits.view(-1, V)[rows]
    except RuntimeError:  # it is no view: reshape would copy all rows to give a few
        flat = torch.arange(rows.start, rows.stop, device=logits.device)
        return logits[torch.unravel_index(flat, logits.shape[:-1])]
