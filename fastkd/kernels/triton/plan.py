"""How a launch is cut: what the kinds of GPU hold, programs, tiles, and the slices of long rows."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton

from .. import triton as backend


class Config(NamedTuple):
    threads: int
    sample: int  # logits that the selection of classes looks at first

    @property
    def block(self) -> int:
        """Columns of a tile."""
        return self.threads * COLUMNS


class Machine(NamedTuple):
    """What the table knows of a kind of GPU."""

    threads: int  # that a multiprocessor's registers suffice for: tests/triton_kernels/table_*
    options: dict[str, int]  # the compiler's, by which they suffice for programs of fewer threads
    cache: int | None  # bytes of the last cache before the memory; None: torch knows it
    rows: tuple[tuple[int, Config], ...]  # the largest row that each serves, both sides' bytes


# No entry has been timed: they are counted from sizes.
_ROWS = ((8 << 10, Config(128, 512)), (64 << 10, Config(256, 1024)), (1 << 62, Config(512, 2048)))
TABLE = {  # the beginning of the architecture's name: what is known of it
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
# Columns of a tile that one thread holds: a vector of half precision. The registers do not suffice
# for two.
COLUMNS = 8
# The configuration of split rows: it leaves room for two programs on a multiprocessor of NVIDIA's,
# so that one works while one waits.
SLICE = Config(256, 0)
PARTS = 32  # A row is split into no more slices than that.
# What share of the cache rows in flight may take, and slices in flight, of which more are read at a
# time.
ROWS_SHARE, SLICES_SHARE = 0.6, 0.5


def current(device: torch.device) -> AbstractContextManager:
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
        """The configuration for rows of so many bytes."""
        return next(config for limit, config in self.machine.rows if limit >= row)

    def options(self, config: Config) -> dict[str, int]:
        """The compiler's options for a launch."""
        options = self.machine.options if config.threads < self.machine.threads else {}
        return {"num_warps": max(config.threads // self.warp, 1), **options}

    def programs(self, config: Config) -> int:
        """How many run at a time."""
        return self.multiprocessors * max(self.machine.threads // config.threads, 1)


@functools.cache
def device_of(device: torch.device) -> Device:
    if backend.INTERPRETED:
        return Device(PARTS, 0, 32, TABLE["interpreter"])
    gpu = torch.cuda.get_device_properties(device)
    with current(device):  # a machine may have two kinds of GPU
        target = triton.runtime.driver.active.get_current_target()
    return device_like(target.arch, gpu.multi_processor_count, gpu.L2_cache_size, target.warp_size)


def device_like(arch: int | str, multiprocessors: int, cache: int, warp: int) -> Device:
    name = f"sm_{arch}" if isinstance(arch, int) else arch
    machine = next(machine for kind, machine in TABLE.items() if name.startswith(kind))
    return Device(multiprocessors, machine.cache or cache, warp, machine)


def slice_columns(device: Device, V: int, pair: int) -> int:
    """The columns of a slice of rows of V pairs of logits of `pair` bytes; V: they are not split.

    Rows are split that the cache loses before they are read again, if as many are in flight as the
    GPU has room for. However many there are, then: a row does not depend on its neighbours.
    """
    if backend.INTERPRETED:  # it runs programs one after another: one would wait for ever
        return V
    rows = device.programs(device.configuration(V * pair))
    if rows * V * pair <= ROWS_SHARE * device.cache:
        return V
    block = SLICE.block
    columns = int(SLICES_SHARE * device.cache / (device.programs(SLICE) * pair))
    parts = -(-V // max(columns, -(-V // PARTS), block))
    return -(-V // parts // block) * block


class Plan(NamedTuple):
    parts: int  # slices of a row
    columns: int  # a slice has these
    block: int  # columns of a tile
    sample: int
    most_parts: int  # a power of two
    options: dict[str, int]  # the compiler's


@functools.lru_cache
def plan(device: torch.device, V: int, pair: int, whole: bool, shifted: int) -> Plan:
    """How rows of V pairs of logits of `pair` bytes are computed; `whole`: they may not be split. A
    row may begin up to `shifted` columns after a whole vector, and its slices then end so much
    later."""
    gpu = device_of(device)
    columns = V if whole else slice_columns(gpu, V + shifted, pair)
    parts = -(-V // columns)
    if parts > 1:
        parts = -(-(V + shifted) // columns)
    if not 1 < parts <= gpu.multiprocessors:
        parts = 1
    config = SLICE if parts > 1 else gpu.configuration(V * pair)
    most = PARTS if parts > 1 else 1
    return Plan(parts, columns, config.block, config.sample, most, gpu.options(config))
