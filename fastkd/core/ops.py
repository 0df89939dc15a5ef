"""The ops' schemas and fakes. One schema serves every backend, the signature of its definition.

``fastkd::dense_rows`` is the native op, its kernels are C++ (csrc/); the other backends register
the same schema under a name of their own, so that a backend asked for by name is that backend and
no other.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import spec


def _schema(definition: Callable, *written: str) -> str:
    """The signature of the definition, as an op's; `written`: what it mutates.

    Every backend takes logits [A, B, V] or [N, V] with stride 1 in the last dimension, and vectors
    [N], N = A * B, contiguous, in the compute dtype; labels and keep int64. What a schedule changes
    is a vector: a number in a graph would be compiled anew, and so are these.
    """
    return torch.library.infer_schema(definition, mutates_args=written).replace("SymInt", "int")


DENSE_ROWS = _schema(spec.dense_rows, "dstudent", "target")
SPARSE_ROWS = _schema(spec.sparse_rows, "dstudent")
ORDER_NAMED = _schema(spec.order_named)
SCALE_ROWS = _schema(spec.scale_rows_, "dstudent")


def _dense_rows_fake(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N = math.prod(student.shape[:-1])
    dtype = spec.compute_dtype(student, teacher)
    return student.new_empty(N, dtype=dtype), student.new_empty(N, dtype=dtype)


def _sparse_rows_fake(student: Tensor, ids: Tensor, log_probs: Tensor, *_: Any) -> Any:
    N = math.prod(student.shape[:-1])
    return log_probs.new_empty(N), log_probs.new_empty(N)


def _order_named_fake(
    ids: Tensor, log_probs: Tensor, vocab_size: int, bucket: bool
) -> tuple[Tensor, Tensor, Tensor]:
    log_rest = log_probs.new_empty(ids.shape[0] if bucket else 0)
    return torch.empty_like(ids), torch.empty_like(log_probs), log_rest


def define(
    suffix: str,
    dense_rows: Callable | None = None,
    scale: Callable | None = None,
    sparse_rows: Callable | None = None,
) -> None:
    for name, schema, kernel, fake in (
        (f"fastkd::dense_rows{suffix}", DENSE_ROWS, dense_rows, _dense_rows_fake),
        (f"fastkd::scale_rows{suffix}_", SCALE_ROWS, scale, lambda dstudent, scale: None),
        (f"fastkd::sparse_rows{suffix}", SPARSE_ROWS, sparse_rows, _sparse_rows_fake),
    ):
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, fake)
        if kernel is not None:
            torch.library.impl(name, "CompositeExplicitAutograd", kernel)


define("")  # of the kernels in C++, which register themselves

# On the host. Elsewhere its definition will do: a few small kernels beside a large one.
torch.library.define("fastkd::order_named", ORDER_NAMED, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastkd::order_named", _order_named_fake)
ORDER_NAMED_OP = torch.ops.fastkd.order_named.default
