"""The Triton kernels as machine code for six GPUs, none of which is needed.

The interpreter checks numbers and knows no registers; it also never specialises, so that a kernel
may pass it and not compile at all. Both cannot be in one process.
"""

from importlib.util import find_spec

import pytest
import torch

from fastkd import triton_backend

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_backend.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

import triton
import triton_compile as aot
from triton_compile import TARGETS, VARIANTS

# Parked outside of the loops: a few scalars of the row.
TOLERATED_SPILL = 256
COMMITTED = aot.TABLE.read_text().splitlines()


def compiled(target: str, dtype: torch.dtype, variant: str) -> aot.Report:
    with aot.captured(TARGETS[target]) as kernels:
        aot.launch(dtype, **VARIANTS[variant])
    assert len(kernels) == 1
    return aot.report(kernels[0])


@pytest.mark.parametrize(("target", "dtype", "variant"), aot.cases(), ids=str)
def test_machine_code(target, dtype, variant):
    report = compiled(target, dtype, variant)
    assert report.spilled <= TOLERATED_SPILL
    assert report.loops
    for loop in report.loops:
        assert loop.spills == 0
    if variant != "rows not alike":
        for loop in report.loops:
            wide(loop, target)
    if target.startswith("sm_"):
        # Half the registers of a multiprocessor at least are for the threads of one program.
        assert report.registers <= 128
        for loop in report.loops:
            assert loop.exponentials == 0 or loop.barriers == 0 or variant == "rows not alike"
        if variant == "forward":
            costs = aot.costs(report, 2 * dtype.itemsize)
            instructions = costs.sums.instructions + costs.quick.instructions
            exponentials = costs.sums.exponentials + costs.quick.exponentials
            assert instructions / costs.pairs <= 31
            assert exponentials / costs.pairs <= 4.3
    if f"# triton {triton.__version__}" in COMMITTED:
        no_worse(aot.table_row(target, dtype, variant, report))


def no_worse(row: str) -> None:
    """Than what is committed for this version of Triton, by more than 3 %."""
    name, figures = row[: aot.NAME], row[aot.NAME :].split()
    (committed,) = (x[aot.NAME :].split() for x in COMMITTED if x.startswith(name))
    assert len(figures) == len(committed)
    for now, then in zip(map(float, figures), map(float, committed), strict=True):
        assert now <= 1.03 * then + (32 if then == 0 else 0), (row, committed)


def wide(loop: aot.Loop, target: str) -> None:
    """128 bits at a time, at a V that is no multiple of anything; but the ends of a row."""
    if target.startswith("sm_"):
        assert set(loop.loads) <= {16}
        assert set(loop.stores) <= {2, 4, 16}
        narrow = sum(count for size, count in loop.stores.items() if size < 16)
        assert narrow == 0 or loop.stores[16] > 0
    else:  # the whole kernel: a label's logit is alone
        assert loop.loads[2] <= 1 and loop.loads[16] >= 8 and loop.stores[16] >= 4


def test_one_kernel_for_every_size():
    """Neither a size of 1 nor one divisible by 16 is compiled anew: only what the table tells."""
    with aot.captured(TARGETS["sm_90"]) as kernels:
        for N in (1, 2, 16):
            for V in (20000, 20001, 32768, 131072):
                aot.launch(N=N, V=V)
        dense = {kernel.hash for kernel in kernels}
        kernels.clear()
        for keep in (1, 2, 16, 333):
            aot.launch(N=1, V=20000, keep=keep)
            aot.launch(N=16, V=32768, keep=keep)
        pruned = {kernel.hash for kernel in kernels}
    assert len(dense) == 1 and len(pruned) == 1 and dense != pruned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_scaling(target, dtype):
    with aot.captured(TARGETS[target]) as kernels:
        aot.triton_launch.scale_rows_(torch.empty(4, 50257, dtype=dtype), torch.empty(4))
    report = aot.report(kernels[0])
    assert report.spilled == 0
    loops = [loop for loop in report.loops if loop.stores]
    assert loops
    for loop in loops:
        assert loop.loads[16] > 0 and loop.stores[16] > 0


@pytest.mark.parametrize("V", [1, 50, 2048, 5000])
def test_small_vocabularies(V):
    """The other entries of the table compile as well."""
    for keep in (None, 1):
        for target in ("sm_80", "gfx942"):
            with aot.captured(TARGETS[target]) as kernels:
                aot.launch(V=V, keep=keep)
            report = aot.report(kernels[0])
            assert report.spilled <= TOLERATED_SPILL
            assert all(loop.spills == 0 for loop in report.loops)
