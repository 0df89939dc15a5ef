"""The ops of the Triton backend: tensors to pointers and strides, and the configurations."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_backend
from . import triton_kernels as kernels


class Config(NamedTuple):
    threads: int
    sample: int  # logits that the selection of classes looks at first


# By the largest V they serve. 512 threads of 128 registers are one program on a multiprocessor:
# what is then in flight, a row of both logits each, stays in the L2 cache of an H200 until its
# second read up to V = 57000 in bfloat16, and half of it at V = 128000. Counted from sizes; no
# entry has been timed.
TABLE = ((2048, Config(128, 512)), (16384, Config(256, 1024)), (2**31, Config(512, 2048)))
# Triton's interpreter takes time by the tile: few, and still a first, some whole and a last one.
INTERPRETED = ((4096, Config(128, 64)), (32768, Config(512, 512)), (2**31, Config(4096, 512)))
# Of a tile, per thread: a vector of half precision. For two the registers do not suffice.
COLUMNS = 8
NONE, FORWARD, REVERSE, MIXTURE = (
    int(x.value) for x in (kernels.NONE, kernels.FORWARD, kernels.REVERSE, kernels.MIXTURE)
)


def configuration(V: int) -> Config:
    table = INTERPRETED if triton_backend.INTERPRETED else TABLE
    return next(config for limit, config in table if limit >= V)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


@functools.cache
def _warp_size(device: torch.device) -> int:
    if triton_backend.INTERPRETED:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


class _Rows(NamedTuple):
    """As the kernels take them; row a * B + b begins at base + shift + a * outer + b * inner."""

    base: Tensor  # at a multiple of 16 bytes, if that lies in the same storage
    shift: int
    outer: int
    inner: int
    aligned: bool

    def alike(self, other: "_Rows", lane: int) -> bool:
        """Whether every row of both begins as many elements after a multiple of `lane`."""
        if not (self.aligned and other.aligned):
            return False
        return all((x - y) % lane == 0 for x, y in zip(self[1:4], other[1:4], strict=True))


def _rows(rows: Tensor) -> _Rows:
    shift = rows.data_ptr() % 16 // rows.element_size()
    offset = rows.storage_offset() - shift
    aligned = offset >= 0
    base = rows if shift == 0 or not aligned else rows.as_strided((1,), (1,), offset)
    outer = rows.stride(0) if rows.dim() == 3 else 0
    return _Rows(base, shift if aligned else 0, outer, rows.stride(-2), aligned)


def _check(
    student: Tensor,
    teacher: Tensor,
    dstudent: Tensor | None,
    vectors: list[Tensor],
    labels: Tensor | None,
    vocab_size: int,
) -> None:
    """What keeps a call of the bare op from memory that is not there; kd_loss checks the rest."""
    N, widths = student.shape[:-1].numel(), (student.shape[-1], teacher.shape[-1])
    for rows in (student, teacher) if dstudent is None else (student, teacher, dstudent):
        if (
            rows.dim() not in (2, 3)
            or rows.shape[:-1].numel() != N
            or rows.shape[-2] != student.shape[-2]
        ):
            raise ValueError("fastkd: the rows must come as [N, V] or [A, B, V], alike")
        if rows.stride(-1) != 1 and rows.shape[-1] != 1:
            raise ValueError("fastkd: rows must have stride 1 in V")
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"fastkd: the Triton kernels do not take {rows.dtype}")
    if dstudent is not None and dstudent.shape[-1] != widths[0]:
        raise ValueError("fastkd: dstudent must have the V of student")
    if not 1 <= vocab_size <= min(widths):
        raise ValueError("fastkd: vocab_size out of range")
    for vector in vectors:
        if vector.numel() != N or not vector.is_contiguous() or vector.dtype != torch.float32:
            raise ValueError("fastkd: a per-row vector must be contiguous float32 [N]")
    if labels is not None and not (
        labels.numel() == N and labels.is_contiguous() and labels.dtype == torch.int64
    ):
        raise ValueError("fastkd: labels must be contiguous int64 [N]")


def _as(rows: Tensor, leading: torch.Size) -> Tensor:
    """[N, V] as [A, B, V], a view."""
    fits = rows.dim() == 2 and rows.shape[0] == leading.numel()
    return rows.unflatten(0, leading) if fits else rows


def kd_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    student_inv_temperature: Tensor,
    teacher_inv_temperature: Tensor,
    soft_weight: Tensor | None,
    hard_weight: Tensor | None,
    dstudent: Tensor | None,
    keep: int,
    vocab_size: int,
    beta: float,
    target_weight: Tensor | None = None,
    target: Tensor | None = None,
    teacher_probs: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op fastkd::kd_rows_triton; arguments as in spec.kd_rows."""
    if target_weight is not None or teacher_probs:
        raise ValueError(
            "fastkd: the Triton kernels compute neither decoupled terms nor from probs"
        )
    N = student.shape[:-1].numel()
    given = [x for x in (student, teacher, dstudent) if x is not None]
    leading = max((x.shape[:-1] for x in given), key=len)
    if len({x.dim() for x in given}) > 1 and leading.numel() == N:
        student, teacher = _as(student, leading), _as(teacher, leading)
        dstudent = None if dstudent is None else _as(dstudent, leading)
    vectors = [student_inv_temperature, teacher_inv_temperature]
    vectors += [v for v in (soft_weight, hard_weight) if v is not None]
    _check(student, teacher, dstudent, vectors, labels, vocab_size)
    if keep < 1 or (labels is None and hard_weight is not None):
        raise ValueError("fastkd: keep < 1, or a hard term without labels")
    soft = torch.empty_like(student_inv_temperature)
    hard = torch.empty_like(student_inv_temperature)
    if N == 0:
        return soft, hard
    size = min(student.element_size(), teacher.element_size())
    lane = 16 // size
    s, t = _rows(student), _rows(teacher)
    g = s if dstudent is None else _rows(dstudent)
    vector = lane if s.alike(t, lane) else 1
    g_vector = vector if s.alike(g, lane) else 1
    config = configuration(vocab_size)
    divergence = NONE
    if soft_weight is not None:
        divergence = FORWARD if beta == 0 else REVERSE if beta == 1 else MIXTURE
    with _current(student.device):
        kernels.kd_rows_kernel[(N,)](
            s.base, t.base, g.base,
            student if labels is None else labels,
            student_inv_temperature, teacher_inv_temperature,
            soft if soft_weight is None else soft_weight,
            hard if hard_weight is None else hard_weight,
            soft, hard,
            N, student.shape[-2], vocab_size, student.shape[-1], min(keep, vocab_size),
            beta, 1 - beta,
            *s[1:4], *t[1:4], *g[1:4],
            DIVERGENCE=divergence, PRUNE=divergence != NONE and keep < vocab_size,
            HARD=hard_weight is not None, LABELS=labels is not None, GRADIENT=dstudent is not None,
            VECTOR=vector, G_VECTOR=g_vector, LANE=lane,
            BLOCK=config.threads * COLUMNS, SAMPLE=config.sample,
            num_warps=config.threads // _warp_size(student.device),
        )  # fmt: skip
    return soft, hard


def scale_rows_(dstudent: Tensor, scale: Tensor) -> None:
    """The op fastkd::scale_rows_triton_."""
    N = dstudent.shape[:-1].numel()
    if scale.numel() not in (1, N) or not scale.is_contiguous() or not scale.is_floating_point():
        raise ValueError("fastkd: scale must be contiguous, one value or N, of a floating dtype")
    _check(dstudent, dstudent, None, [], None, 1)
    if N == 0:
        return
    g = _rows(dstudent)
    config = configuration(dstudent.shape[-1])
    with _current(dstudent.device):
        kernels.scale_rows_kernel[(N,)](
            g.base, scale, dstudent.shape[-2], dstudent.shape[-1], *g[1:4],
            PER_ROW=scale.numel() != 1, BLOCK=config.threads * COLUMNS,
            VECTOR=16 // dstudent.element_size() if g.aligned else 1,
            num_warps=config.threads // _warp_size(dstudent.device),
        )  # fmt: skip
