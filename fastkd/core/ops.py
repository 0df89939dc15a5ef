"""The ops' schemas and fakes. One schema serves every backend, written once.

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

# student, dstudent [A, B, V_student], teacher [A, B, V_teacher], or [N, V] each, with stride 1 in
# the last dimension; every vector [N], N = A * B, in the compute dtype, labels and keep int64. What
# a schedule changes is a vector: a number in a graph would be compiled anew. See spec.dense_rows.
DENSE_ROWS = (
    "(Tensor student, Tensor teacher, Tensor? labels, Tensor student_inv_temperature, "
    "Tensor teacher_inv_temperature, Tensor? soft_weight, Tensor? hard_weight, "
    "Tensor(a!)? dstudent, Tensor? keep, int vocab_size, int divergence, Tensor? beta, "
    "Tensor? target_weight=None, Tensor(b!)? target=None, bool teacher_probs=False) "
    "-> (Tensor soft, Tensor hard)"
)
# ids, log_probs [N, k]: ids ascending, each once, those >= vocab_size not there; log_rest [N]. See
# spec.sparse_rows.
SPARSE_ROWS = (
    "(Tensor student, Tensor ids, Tensor log_probs, Tensor? log_rest, Tensor? labels, "
    "Tensor student_inv_temperature, Tensor teacher_inv_temperature, Tensor? soft_weight, "
    "Tensor? hard_weight, Tensor(a!)? dstudent, int vocab_size, bool restricted) "
    "-> (Tensor soft, Tensor hard)"
)
# What sparse_rows takes, of ids in any order; see spec.order_named.
ORDER_NAMED = (
    "(Tensor ids, Tensor log_probs, int vocab_size, bool bucket) "
    "-> (Tensor ids, Tensor log_probs, Tensor log_rest)"
)
# dstudent *= scale, one value or one per row, read on the device; nothing is done where it is 1.
SCALE_ROWS = "(Tensor(a!) dstudent, Tensor scale) -> ()"


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
