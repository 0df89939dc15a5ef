"""The ops of the Triton backend: tensors to pointers and strides, checks, launches."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...core.checks import check_overwritten
from ...spec import FORWARD, MIXTURE, REVERSE
from . import exchange, plan, sparse, types
from . import row as kernels
from .types import Kind, Tile

SHARED, NONE = int(exchange.SHARED.value), int(types.NONE.value)


def _exchange(like: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What the programs of split rows meet by: zeros [1 + N] int32 to count in, and in the same
    allocation [N, SHARED, PARTS] float32. It ends with the call: a tensor that were kept would lie
    in the memory pool of whoever came first, a CUDA graph's for one."""
    front = -(-(1 + N) // 4) * 4  # the values begin at a multiple of 16 bytes
    both = like.new_empty(front + N * SHARED * plan.PARTS, dtype=torch.float32)
    counters = both[: 1 + N].view(torch.int32)
    return counters.zero_(), both[front:]


class _Rows(NamedTuple):
    """Rows as kernels take them: row a * B + b begins at base + shift + a * outer + b * inner."""

    base: Tensor  # begins at a multiple of 16 bytes, if that lies in the same storage
    aligned: bool
    shift: int
    outer: int
    inner: int

    def alike(self, other: "_Rows", lane: int) -> bool:
        """Whether every row of both begins as many elements after a multiple of `lane`."""
        differences = (
            (self.shift - other.shift) | (self.outer - other.outer) | (self.inner - other.inner)
        )
        return self.aligned and other.aligned and differences % lane == 0


def _rows(rows: Tensor) -> _Rows:
    *outer, inner, _ = rows.stride()
    shift = rows.data_ptr() % 16 // rows.element_size()
    aligned = shift == 0 or rows.storage_offset() >= shift
    if not aligned:
        shift = 0
    base = rows.as_strided((1,), (1,), rows.storage_offset() - shift) if shift else rows
    return _Rows(base, aligned, shift, outer[0] if outer else 0, inner)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    student: Tensor,
    teacher: Tensor,
    dstudent: Tensor | None,
    vectors: list[Tensor],
    integers: list[Tensor | None],
    vocab_size: int,
) -> None:
    """What keeps a call of the bare op from memory that is not there; kd_loss checks the rest."""
    leading, width = student.shape[:-1], student.shape[-1]
    N = leading.numel()
    for rows in (student, teacher) if dstudent is None else (student, teacher, dstudent):
        if rows.shape[:-1] != leading or len(leading) not in (1, 2):
            raise ValueError("fastkd: the rows must come as [N, V] or [A, B, V], alike")
        if rows.stride(-1) != 1 and rows.shape[-1] != 1:
            raise ValueError("fastkd: rows must have stride 1 in V")
        if rows.dtype not in _DTYPES:
            raise ValueError(f"fastkd: the Triton kernels do not take {rows.dtype}")
    if dstudent is not None and dstudent.shape[-1] != width:
        raise ValueError("fastkd: dstudent must have the V of student")
    if not 1 <= vocab_size <= min(width, teacher.shape[-1]):
        raise ValueError("fastkd: vocab_size out of range")
    for vector in vectors:
        if vector.numel() != N or not vector.is_contiguous() or vector.dtype != torch.float32:
            raise ValueError("fastkd: a per-row vector must be contiguous float32 [N]")
    for x in integers:
        if x is None:
            continue
        if x.numel() != N or not x.is_contiguous() or x.dtype != torch.int64:
            raise ValueError("fastkd: labels and keep must be contiguous int64 [N]")


def _as(rows: Tensor, leading: torch.Size) -> Tensor:
    """[N, V] as [A, B, V], a view."""
    fits = rows.dim() == 2 and rows.shape[0] == leading.numel()
    return rows.unflatten(0, leading) if fits else rows


def dense_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    student_inv_temperature: Tensor,
    teacher_inv_temperature: Tensor,
    soft_weight: Tensor | None,
    hard_weight: Tensor | None,
    dstudent: Tensor | None,
    keep: Tensor | None,
    vocab_size: int,
    divergence: int,
    beta: Tensor | None,
    target_weight: Tensor | None = None,
    target: Tensor | None = None,
    teacher_probs: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op fastkd::dense_rows_triton; arguments as in spec.dense_rows."""
    given = [x for x in (student, teacher, dstudent) if x is not None]
    if len({x.dim() for x in given}) > 1:
        leading = max((x.shape[:-1] for x in given), key=len)
        student, teacher = _as(student, leading), _as(teacher, leading)
        dstudent = None if dstudent is None else _as(dstudent, leading)
    vectors = [student_inv_temperature, teacher_inv_temperature]
    optional = (soft_weight, hard_weight, beta, target_weight, target)
    vectors += [v for v in optional if v is not None]
    _check(student, teacher, dstudent, vectors, [labels, keep], vocab_size)
    if dstudent is not None and soft_weight is not None:
        check_overwritten(dstudent, teacher)
    decoupled = target_weight is not None
    if labels is None and (decoupled or hard_weight is not None):
        raise ValueError("fastkd: a term of the labels without labels")
    if divergence not in (FORWARD, REVERSE, MIXTURE) or (beta is None) == (divergence == MIXTURE):
        raise ValueError("fastkd: no such divergence, a mixture without beta, or beta besides")
    if decoupled and (target is None or soft_weight is None or divergence != FORWARD):
        raise ValueError("fastkd: decoupled terms need target, soft_weight and KL(p || q)")
    soft = torch.empty_like(student_inv_temperature)
    hard = torch.empty_like(student_inv_temperature)
    N = soft.numel()
    if N == 0:
        return soft, hard
    s, t = _rows(student), _rows(teacher)
    g = s if dstudent is None or dstudent is student else _rows(dstudent)
    sizes = student.element_size(), teacher.element_size()
    lane = 16 // min(sizes)
    vector = lane if s.alike(t, lane) else 1
    if soft_weight is None:
        divergence = NONE
    pruned = divergence != NONE and keep is not None
    shifted = vector - 1 if (s.shift | s.outer | s.inner) % vector else 0
    cut = plan.plan(student.device, vocab_size, sum(sizes), pruned, shifted)
    kind = Kind(
        divergence=divergence,
        pruned=pruned,
        probs=teacher_probs and divergence != NONE,
        decoupled=decoupled,
        hard=hard_weight is not None,
        tail=hard_weight is not None and student.shape[-1] > vocab_size,
        labels=labels is not None,
        gradient=dstudent is not None,
    )
    tile = Tile(cut.block, lane, vector, vector if g is s or s.alike(g, lane) else 1)
    counters = shared = soft
    with plan.current(student.device):
        if cut.parts > 1:
            if N * cut.parts >= 2**31:
                raise ValueError(f"fastkd: too many rows for the Triton kernels, {N}")
            counters, shared = _exchange(soft, N)
        kernels.dense_rows_kernel[(N * cut.parts,)](
            s.base, t.base, g.base,
            student if labels is None else labels,
            student_inv_temperature, teacher_inv_temperature,
            soft if soft_weight is None else soft_weight,
            hard if hard_weight is None else hard_weight,
            target_weight if decoupled else soft, soft, hard, target if decoupled else soft,
            keep if pruned else student, soft if beta is None else beta,
            counters, shared,
            N, cut.parts, cut.columns, student.shape[-2], vocab_size, student.shape[-1],
            *s[2:], *t[2:], *g[2:],
            KIND=kind, TILE=tile, SAMPLE=cut.sample, PARTS=cut.most_parts, **cut.options,
        )  # fmt: skip
    return soft, hard


def sparse_rows(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    student_inv_temperature: Tensor,
    teacher_inv_temperature: Tensor,
    soft_weight: Tensor | None,
    hard_weight: Tensor | None,
    dstudent: Tensor | None,
    vocab_size: int,
    restricted: bool,
) -> tuple[Tensor, Tensor]:
    """The op fastkd::sparse_rows_triton; arguments as in spec.sparse_rows."""
    if soft_weight is None:
        return dense_rows(
            student, student, labels, student_inv_temperature, teacher_inv_temperature, None,
            hard_weight, dstudent, None, vocab_size, FORWARD, None,
        )  # fmt: skip
    if dstudent is not None and student.dim() != dstudent.dim():
        leading = max(student.shape[:-1], dstudent.shape[:-1], key=len)
        student, dstudent = _as(student, leading), _as(dstudent, leading)
    vectors = [student_inv_temperature, teacher_inv_temperature, soft_weight]
    vectors += [v for v in (hard_weight, log_rest) if v is not None]
    _check(student, student, dstudent, vectors, [labels], vocab_size)
    N, k = student_inv_temperature.numel(), ids.shape[-1]
    for x, dtype in ((ids, torch.int64), (log_probs, torch.float32)):
        if x.shape != (N, k) or not x.is_contiguous() or x.dtype != dtype:
            raise ValueError(f"fastkd: the teacher's rows must be contiguous {dtype} [N, k]")
    if labels is None and hard_weight is not None:
        raise ValueError("fastkd: a hard term without labels")
    soft = torch.empty_like(student_inv_temperature)
    hard = torch.empty_like(student_inv_temperature)
    if N == 0:
        return soft, hard
    s = _rows(student)
    g = s if dstudent is None or dstudent is student else _rows(dstudent)
    size = student.element_size()
    lane = 16 // size
    gpu = plan.device_of(student.device)
    config = gpu.configuration(vocab_size * size)
    kind = Kind(
        divergence=FORWARD,
        pruned=False,
        probs=False,
        decoupled=False,
        hard=hard_weight is not None,
        tail=hard_weight is not None and student.shape[-1] > vocab_size,
        labels=labels is not None,
        gradient=dstudent is not None,
    )
    tile = Tile(config.block, lane, lane if s.aligned else 1, lane if s.alike(g, lane) else 1)
    outside = sparse.RESTRICT if restricted else sparse.WHOLE if log_rest is None else sparse.BUCKET
    with plan.current(student.device):
        sparse.sparse_rows_kernel[(N,)](
            s.base, g.base, ids, log_probs,
            soft if log_rest is None else log_rest,
            student if labels is None else labels,
            student_inv_temperature, teacher_inv_temperature, soft_weight,
            soft if hard_weight is None else hard_weight,
            soft, hard, k, student.shape[-2], vocab_size, student.shape[-1], *s[2:], *g[2:],
            KIND=kind, TILE=tile, OUTSIDE=outside.value,
            K=triton.next_power_of_2(max(k, 16)),
            **gpu.options(config),
        )  # fmt: skip
    return soft, hard


def scale_rows_(dstudent: Tensor, scale: Tensor) -> None:
    """The op fastkd::scale_rows_triton_."""
    N = dstudent.shape[:-1].numel()
    if scale.numel() not in (1, N) or not scale.is_contiguous() or not scale.is_floating_point():
        raise ValueError("fastkd: scale must be contiguous, one value or N, of a floating dtype")
    _check(dstudent, dstudent, None, [], [], 1)
    if N == 0:
        return
    g = _rows(dstudent)
    gpu, size = plan.device_of(dstudent.device), dstudent.element_size()
    config = gpu.configuration(dstudent.shape[-1] * size)
    vector = 16 // size if g.aligned else 1
    with plan.current(dstudent.device):
        kernels.scale_rows_kernel[(N,)](
            g.base, scale, dstudent.shape[-2], dstudent.shape[-1], *g[2:],
            PER_ROW=scale.numel() != 1, TILE=Tile(config.block, 1, vector, vector),
            **gpu.options(config),
        )  # fmt: skip
