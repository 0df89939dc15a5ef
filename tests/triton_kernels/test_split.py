"""Rows that several programs of the Triton kernel share: whatever the order in which these run, the
same bits and no program left waiting; and what they meet by ends with the call. In Triton's
interpreter, its programs by turns (interpreter.py).
"""

import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lib.backends import BACKENDS
from lib.bounds import INF, NAN
from lib.compare import check, run
from lib.logits import normal, pair, some_labels
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels import triton as triton_backend

if not triton_backend.INTERPRETED or triton_backend.MISSING:
    pytest.skip("in Triton's interpreter", allow_module_level=True)

from triton_kernels import interpreter as turns

from fastkd.kernels.triton import launch as triton_launch
from fastkd.kernels.triton import plan as triton_plan
from fastkd.spec import FORWARD

TRITON = next(backend for backend in BACKENDS if backend.name == "triton")
N, V = 3, 90  # in slices of 32 columns
CALLS = {
    "forward": {},
    "reverse": {"beta": 1.0, "inplace": True},
    "mixture, hard": {"beta": 0.3, "alpha": 0.5},
    "hard": {"alpha": 0.0, "inplace": True},
    "limit, hard": {"temperature": INF, "alpha": 0.5, "inplace": True},
}


def logits(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = pair(N, V)
    if kind == "near":  # no digits in a difference of sums
        s = t + 1e-3 * normal(N, V, seed=5)
    if kind == "infinite":
        s[0, :40] = t[0, :40] = -INF  # all of a slice
        t[1, 32:64] = -INF
        s[2, 5] = NAN
    return s, t


@pytest.mark.parametrize("kind", ["ordinary", "near", "infinite"])
@pytest.mark.parametrize("call", CALLS)
def test_the_order_of_programs_changes_nothing(call, kind):
    s, t = logits(kind)
    labels = some_labels(N, V, ignored=(1,) if kind == "ordinary" else ())
    results = []
    for room, seed in ((3, 1), (3, 2), (4, 3), (9, 4)):
        with turns.taking_turns(room, seed) as launches:
            results.append(run(TRITON, s, t, labels, reduction="none", **CALLS[call]))
        assert launches
    for result in results[1:]:
        assert torch.equal(result.loss.view(torch.int32), results[0].loss.view(torch.int32))
        assert torch.equal(result.gradient.view(torch.int32), results[0].gradient.view(torch.int32))


def test_less_room_than_a_row_takes_is_noticed():
    """The scheduler of the tests notices it: a kernel which waits too early would hang in it."""
    s, t = pair(N, V)
    with turns.taking_turns(room=2), pytest.raises(Exception, match="wait for each other"):
        run(TRITON, s, t)


def test_counters_are_enough():
    """Rows that are skipped, or have no class for a label, are counted; no program waits there."""
    s, t = pair(4, V)
    labels = torch.tensor([-100, 5, -100, V - 1])
    with turns.taking_turns():
        check(TRITON, s, t, labels, alpha=0.5)
        vector = torch.ones(4)
        g = torch.empty(4, V + 40)
        wide = torch.cat([s, torch.zeros(4, 40)], 1)
        soft, hard = torch.ops.fastkd.dense_rows_triton(
            wide, t, torch.tensor([0, V, -3, 1]), vector, vector, vector, vector, g, None, V,
            FORWARD, None,
        )  # fmt: skip
    for values in (soft, hard, g.sum(-1)):  # the second label is a class of the student alone
        assert values.isnan().tolist() == [False, False, True, False]


def test_slices_of_rows_that_begin_anywhere():
    """The last may hold no column of rows that begin early in a vector."""
    for width in (64, 65, 71, 95, 96, 97):
        s, t = (x[:, 3:] for x in pair(4, width + 3, dtype=torch.bfloat16))
        with turns.taking_turns(), turns.checking_overflow():
            check(TRITON, s, t, alpha=0.5, labels=some_labels(4, width))


class OnGpu(torch.Tensor):
    """A tensor of the CPU that gives itself out for one of a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


class Launches:
    """In the kernel's place: keeps which allocations each launch was given beside its rows."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref] = []

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options) -> None:
        counters, shared = arguments[14:16]
        assert counters.dtype == torch.int32 and counters.numel() == 1 + N
        assert shared.dtype == torch.float32
        assert shared.numel() == N * triton_launch.SHARED * triton_plan.PARTS
        assert counters.untyped_storage()._cdata == shared.untyped_storage()._cdata
        first, last = (
            counters.storage_offset() + counters.numel(),
            shared.storage_offset() + shared.numel(),
        )
        assert first <= shared.storage_offset() and last * 4 == shared.untyped_storage().nbytes()
        assert shared.storage_offset() % 4 == counters.storage_offset() % 4 == 0  # 16 bytes
        self.alive += [weakref.ref(counters), weakref.ref(shared)]


class Allocations(TorchDispatchMode):
    """The operations that make memory, or zero it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(part in name for part in ("empty", "zero", "full", "ones")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_outlives_a_launch(monkeypatch):
    """On a GPU, every call takes all its memory from the pool of that call, a CUDA graph's for one,
    and leaves none of it behind: the second as the first."""
    launches = Launches()
    monkeypatch.setattr(triton_launch.kernels, "dense_rows_kernel", launches)
    monkeypatch.setattr(
        triton_launch, "_rows", lambda rows: triton_launch._Rows(rows, True, 0, 0, V)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, **_: zeros(n, dtype=torch.int32))
    made = []
    with turns.taking_turns():
        rows, vector = (torch.empty(*size).as_subclass(OnGpu) for size in ((N, V), (N,)))
        for _ in range(2):
            with Allocations() as allocations:
                triton_launch.dense_rows(
                    rows, rows, None, vector, vector, vector, None, rows, None, V, FORWARD, None
                )
            made.append(allocations.names)
    assert made[0] == made[1] and "zero_" in made[0]
    assert launches.alive and not any(found() is not None for found in launches.alive)


def test_the_kind_of_gpu_is_that_of_the_tensors(monkeypatch):
    """The current device does not count: a machine may have two kinds."""
    current = [0]

    class On:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_) -> None:
            current[0] = self.before

    class Driver:
        def get_current_target(self):
            arch, warp = (90, 32) if current[0] == 0 else ("gfx942", 64)
            return SimpleNamespace(arch=arch, warp_size=warp)

    class Properties(NamedTuple):
        multi_processor_count: int = 100
        L2_cache_size: int = 1 << 20

    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(triton_plan.triton.runtime, "driver", SimpleNamespace(active=Driver()))
    find = triton_plan.device_of.__wrapped__
    for index, warp in ((0, 32), (1, 64)):
        assert find(torch.device("cuda", index)).warp == warp
        assert current == [0]
