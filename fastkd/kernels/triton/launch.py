"""The ops of the Triton backend: tensors to pointers and strides, and the configurations."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...core.checks import check_overwritten
from ...spec import FORWARD, MIXTURE, REVERSE
from .. import triton as backend
from . import row as kernels
from . import sparse
from . import sums as passes


class Config(NamedTuple):
    threads: int
    sample: int  # logits that the selection of classes looks at first


class Machine(NamedTuple):
    """What the table knows of a kind of GPU."""

    threads: int  # that a multiprocessor's registers suffice for, by tests/triton_table_*.txt
    options: dict[str, int]  # of the compiler, so that they do for programs of fewer
    cache: int | None  # bytes of the last cache before the memory; None: torch knows it
    rows: tuple[tuple[int, Config], ...]  # by the largest row that they serve, both logits in bytes


# No entry has been timed: they are counted from sizes.
_ROWS = ((8 << 10, Config(128, 512)), (64 << 10, Config(256, 1024)), (1 << 62, Config(512, 2048)))
TABLE = {  # by the beginning of the architecture's name
    "sm": Machine(512, {"maxnreg": 128}, None, _ROWS),
    "gfx94": Machine(1024, {}, 256 << 20, _ROWS),
    "gfx95": Machine(1024, {}, 256 << 20, _ROWS),
    "gfx9": Machine(1024, {}, None, _ROWS),
    "gfx": Machine(768, {}, 64 << 20, _ROWS),
    # Its time goes by the tile: few, and still a first, some whole and a last one.
    "interpreter": Machine(512, {}, 0, (
        (16 << 10, Config(256, 64)), (128 << 10, Config(1024, 512)), (1 << 62, Config(4096, 512)),
    )),
}  # fmt: skip
# Of a tile, per thread: a vector of half precision. For two the registers do not suffice.
COLUMNS = 8
# Of split rows: two programs on a multiprocessor of NVIDIA's, so that one works while one waits.
SLICE = Config(256, 0)
PARTS = 32  # at most
# Of the cache: what rows in flight may take of it, and slices, of which more are read at a time.
ROWS_SHARE, SLICES_SHARE = 0.6, 0.5
SHARED, NONE = int(kernels.SHARED.value), int(passes.NONE.value)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


class Device(NamedTuple):
    multiprocessors: int
    cache: int  # bytes
    warp: int
    machine: Machine

    def configuration(self, row: int) -> Config:
        """For rows of so many bytes."""
        return next(config for limit, config in self.machine.rows if limit >= row)

    def options(self, config: Config) -> dict[str, int]:
        """Of a launch."""
        options = self.machine.options if config.threads < self.machine.threads else {}
        warps = max(config.threads // self.warp, 1)
        return {"BLOCK": config.threads * COLUMNS, "num_warps": warps, **options}

    def programs(self, config: Config) -> int:
        """That run at a time."""
        return self.multiprocessors * max(self.machine.threads // config.threads, 1)


@functools.cache
def _device(device: torch.device) -> Device:
    if backend.INTERPRETED:
        return Device(PARTS, 0, 32, TABLE["interpreter"])
    gpu = torch.cuda.get_device_properties(device)
    with _current(device):  # a machine may have two kinds of GPU
        target = triton.runtime.driver.active.get_current_target()
    return device_of(target.arch, gpu.multi_processor_count, gpu.L2_cache_size, target.warp_size)


def device_of(arch: int | str, multiprocessors: int, cache: int, warp: int) -> Device:
    name = f"sm_{arch}" if isinstance(arch, int) else arch
    machine = next(machine for kind, machine in TABLE.items() if name.startswith(kind))
    return Device(multiprocessors, machine.cache or cache, warp, machine)


def slice_columns(device: Device, V: int, pair: int) -> int:
    """Of the slices that rows of V pairs of logits of `pair` bytes are split into; V: of none.

    Rows are split that the cache loses before they are read again, if as many are in flight as the
    GPU has room for. However many there are, then: a row does not depend on its neighbours.
    """
    if backend.INTERPRETED:  # it runs programs one after another: one would wait for ever
        return V
    rows = device.programs(device.configuration(V * pair))
    if rows * V * pair <= ROWS_SHARE * device.cache:
        return V
    block = SLICE.threads * COLUMNS
    columns = int(SLICES_SHARE * device.cache / (device.programs(SLICE) * pair))
    parts = -(-V // max(columns, -(-V // PARTS), block))
    return -(-V // parts // block) * block


@functools.lru_cache
def _plan(
    device: torch.device, V: int, pair: int, whole: bool, shifted: int
) -> tuple[int, int, dict[str, int]]:
    """Slices of a row, their columns, and options of the launch. A row may begin up to `shifted`
    columns after a whole vector, and its slices then end so much later."""
    gpu = _device(device)
    columns = V if whole else slice_columns(gpu, V + shifted, pair)
    parts = -(-V // columns)
    if parts > 1:
        parts = -(-(V + shifted) // columns)
    if not 1 < parts <= gpu.multiprocessors:
        parts = 1
    config = SLICE if parts > 1 else gpu.configuration(V * pair)
    options = {"SAMPLE": config.sample, "PARTS": PARTS if parts > 1 else 1, **gpu.options(config)}
    return parts, columns, options


def _exchange(like: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What the programs of split rows meet by: zeros [1 + N] int32 to count in, and in the same
    allocation [N, SHARED, PARTS] float32. It ends with the call: a tensor that were kept would lie
    in the memory pool of whoever came first, a CUDA graph's for one."""
    front = -(-(1 + N) // 4) * 4  # the values begin at a multiple of 16 bytes
    both = like.new_empty(front + N * SHARED * PARTS, dtype=torch.float32)
    counters = both[: 1 + N].view(torch.int32)
    return counters.zero_(), both[front:]


class _Rows(NamedTuple):
    """As the kernels take them; row a * B + b begins at base + shift + a * outer + b * inner."""

    base: Tensor  # at a multiple of 16 bytes, if that lies in the same storage
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
    apart = target_weight is not None
    if labels is None and (apart or hard_weight is not None):
        raise ValueError("fastkd: a term of the labels without labels")
    if divergence not in (FORWARD, REVERSE, MIXTURE) or (beta is None) == (divergence == MIXTURE):
        raise ValueError("fastkd: no such divergence, a mixture without beta, or beta besides")
    if apart and (target is None or soft_weight is None or divergence != FORWARD):
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
    prune = divergence != NONE and keep is not None
    shifted = vector - 1 if (s.shift | s.outer | s.inner) % vector else 0
    parts, columns, options = _plan(student.device, vocab_size, sum(sizes), prune, shifted)
    counters = shared = soft
    with _current(student.device):
        if parts > 1:
            if N * parts >= 2**31:
                raise ValueError(f"fastkd: too many rows for the Triton kernels, {N}")
            counters, shared = _exchange(soft, N)
        kernels.dense_rows_kernel[(N * parts,)](
            s.base, t.base, g.base,
            student if labels is None else labels,
            student_inv_temperature, teacher_inv_temperature,
            soft if soft_weight is None else soft_weight,
            hard if hard_weight is None else hard_weight,
            target_weight if apart else soft, soft, hard, target if apart else soft,
            keep if prune else student, soft if beta is None else beta,
            counters, shared,
            N, parts, columns, student.shape[-2], vocab_size, student.shape[-1],
            *s[2:], *t[2:], *g[2:],
            DIVERGENCE=divergence, PRUNE=prune, PROBS=teacher_probs and divergence != NONE,
            APART=apart,
            HARD=hard_weight is not None,
            TAIL=hard_weight is not None and student.shape[-1] > vocab_size,
            LABELS=labels is not None, GRADIENT=dstudent is not None,
            VECTOR=vector, G_VECTOR=vector if g is s or s.alike(g, lane) else 1, LANE=lane,
            **options,
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
    gpu = _device(student.device)
    outside = sparse.RESTRICT if restricted else sparse.WHOLE if log_rest is None else sparse.BUCKET
    with _current(student.device):
        sparse.sparse_rows_kernel[(N,)](
            s.base, g.base, ids, log_probs,
            soft if log_rest is None else log_rest,
            student if labels is None else labels,
            student_inv_temperature, teacher_inv_temperature, soft_weight,
            soft if hard_weight is None else hard_weight,
            soft, hard, k, student.shape[-2], vocab_size, student.shape[-1], *s[2:], *g[2:],
            OUTSIDE=outside.value, HARD=hard_weight is not None,
            TAIL=hard_weight is not None and student.shape[-1] > vocab_size,
            LABELS=labels is not None,
            GRADIENT=dstudent is not None, VECTOR=lane if s.aligned else 1,
            G_VECTOR=lane if s.alike(g, lane) else 1, LANE=lane,
            K=triton.next_power_of_2(max(k, 16)),
            **gpu.options(gpu.configuration(vocab_size * size)),
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
    gpu, size = _device(dstudent.device), dstudent.element_size()
    with _current(dstudent.device):
        kernels.scale_rows_kernel[(N,)](
            g.base, scale, dstudent.shape[-2], dstudent.shape[-1], *g[2:],
            PER_ROW=scale.numel() != 1, VECTOR=16 // size if g.aligned else 1,
            **gpu.options(gpu.configuration(dstudent.shape[-1] * size)),
        )  # fmt: skip
