"""The Triton kernels as machine code for six GPUs, none of which is needed.

The interpreter checks numbers and knows no registers; it also never specialises, so that a kernel
may pass it and not compile at all. Both cannot be in one process.
"""

from importlib.util import find_spec

import pytest
import torch

from fastkd.kernels import triton as triton_backend

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_backend.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

import aot
import triton
from aot import TARGETS, VARIANTS

# The table of this version of Triton, if it is one that CI has.
COMMITTED = aot.TABLE.read_text().splitlines() if aot.TABLE.exists() else []


# Spill accesses in a loop of the one kernel that has any: Triton 3.6 is content with 64 registers
# there, where 3.7 takes as many as it needs.
SPILLS = {"3.6.0 sm_120 bfloat16 pruned mixture + hard": 3}


def compiled(target: str, dtype: torch.dtype, variant: str) -> aot.Report:
    with aot.captured(TARGETS[target]) as kernels:
        aot.launch(dtype, **VARIANTS[variant])
    assert len(kernels) == 1
    return aot.report(kernels[0])


# What is compiled where --every-target does not ask for all: one of each maker, some minutes less.
ONE_OF_EACH = ("sm_90", "gfx942")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = ("target", "dtype", "variant")
    if set(names) <= set(metafunc.fixturenames):
        every = metafunc.config.getoption("--every-target")
        cases = [case for case in aot.cases() if every or case[0] in ONE_OF_EACH]
        metafunc.parametrize(names, cases, ids=str)


def test_machine_code(target, dtype, variant):
    report = compiled(target, dtype, variant)
    assert report.loops
    kernel = f"{triton.__version__} {target} {str(dtype).removeprefix('torch.')} {variant}"
    for loop in report.loops:
        assert loop.spills <= SPILLS.get(kernel, 0)
    if variant != "rows not alike":
        searches = [loop for loop in report.loops if searches_one_lane(loop)]
        assert len(searches) <= 1
        for loop in report.loops:
            # The classes of a sparse teacher are looked up one by one, as int64.
            if loop not in searches and (loop.loads != {8: 1} or loop.stores):
                wide(loop, target, 1 if "sparse" in variant else 2)
    if target.startswith("sm_"):
        assert report.registers <= 128  # the table of configurations counts on it
        for loop in report.loops:
            # One without loads is over the classes that a sparse teacher names, which are held.
            ordinary = loop.loads and variant != "rows not alike"
            assert loop.exponentials == 0 or loop.barriers == 0 or not ordinary
        if "sparse" not in variant:  # those of flat.py: is_flat, the sums, and two passes
            assert sum(loop.loads[8] > 0 for loop in report.loops) <= 4
        # A counter is read again by every turn of the loop that waits at it.
        assert ("split" in variant) == any(loop.polls and loop.barriers for loop in report.loops)
        if variant in ("forward", "split"):
            costs = aot.costs(report, 2 * dtype.itemsize)
            instructions = costs.sums.instructions + costs.fast.instructions
            exponentials = costs.sums.exponentials + costs.fast.exponentials
            assert instructions / costs.pairs <= 31
            assert exponentials / costs.pairs <= 4.3
    if f"# triton {triton.__version__}" in COMMITTED:
        no_worse(aot.table_row(target, dtype, variant, report))


def no_worse(row: str) -> None:
    """Than what is committed for this version of Triton, which always compiles to the same."""
    name, figures = row[: aot.NAME], row[aot.NAME :].split()
    (committed,) = (x[aot.NAME :].split() for x in COMMITTED if x.startswith(name))
    assert len(figures) == len(committed)
    for now, then in zip(map(float, figures), map(float, committed), strict=True):
        assert now <= then, (row, committed)


def searches_one_lane(loop: aot.Loop) -> bool:
    """Whether it is for the class of which a careful row's student has most: it reads the eight
    columns of both sides that one lane has of every tile, each by itself."""
    narrow = sum(count for size, count in loop.loads.items() if size < 8)
    return narrow == loop.loads.total() == 16 and not loop.stores and loop.exponentials == 0


def wide(loop: aot.Loop, target: str, sides: int) -> None:
    """128 bits at a time, at a V that is no multiple of anything; but the ends of a row. In
    flat.py half of that."""
    for accesses in (loop.loads, loop.stores):
        narrow = sum(count for size, count in accesses.items() if size < 8)
        assert narrow == 0 or accesses[16] + accesses[8] > 0
    if target.startswith("sm_"):
        assert set(loop.loads) | set(loop.stores) <= {2, 4, 8, 16}
    else:  # the whole kernel as one loop
        assert loop.loads[16] >= 4 * sides and loop.stores[16] >= 4


def test_one_kernel_for_every_size():
    """Neither a size of 1 nor one divisible by 16 is compiled anew: only what the table tells."""

    def kernels_of(*sizes: tuple[int, int], **options) -> set[str]:
        with aot.captured(TARGETS["sm_90"]) as kernels:
            for N, V in sizes:
                aot.launch(N=N, V=V, **options)
        return {kernel.hash for kernel in kernels}

    dense = kernels_of((1, 20000), (2, 20001), (16, 32768), (67, 30000))
    split = kernels_of((1, 65537), (2, 131072), (16, 128256), (1, 400000), (64, 262144))
    pruned = kernels_of((1, 20000), (16, 32768), (100, 131072), pruned=True)
    assert len(dense) == len(split) == len(pruned) == 1 and len(dense | split | pruned) == 3
    sparse = {
        hash
        for named in (1, 2, 9, 16)
        for hash in kernels_of((1, 20000), (16, 32768), (67, 30001), named=named)
    }
    more = kernels_of((2, 20000), named=17) | kernels_of((16, 32768), named=32)
    assert len(sparse) == len(more) == 1 and sparse != more
    decoupled = kernels_of((1, 20000), (16, 32768), (67, 30001), decoupled=True, probs=True)
    assert len(decoupled) == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_other_methods_cost_little_more(target):
    """Instructions per class, of ordinary rows and both passes; and what one unit computes, of
    which a teacher's probabilities take their logarithms twice."""

    def per_class(variant: str) -> tuple[float, float]:
        c = aot.costs(compiled(target, torch.bfloat16, variant), 4)
        instructions = c.sums.instructions + c.fast.instructions
        return instructions / c.pairs, (c.sums.exponentials + c.fast.exponentials) / c.pairs

    plain = per_class("forward")
    for variant, exponentials in (("decoupled", 4.3), ("probabilities", 6.3)):
        instructions, found = per_class(variant)
        assert instructions <= 1.15 * plain[0] and found <= exponentials
    # Against few classes: one side's exponentials, or none. Of the loops over whole vectors.
    for variant in ("sparse whole", "sparse restricted"):
        loops = compiled(target, torch.bfloat16, variant).loops
        whole = [x for x in loops if set(x.loads) | set(x.stores) == {16}]
        each = [x.instructions * 2 / max(x.bytes_loaded, x.bytes_stored) for x in whole]
        assert len(each) >= 2 and sum(sorted(each)[-2:]) <= plain[0] / 2


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "variant",
    ["forward + hard", "pruned mixture + hard", "hard", "decoupled probs + hard",
     "split + hard", "split decoupled + hard", "sparse bucket + hard"],
)  # fmt: skip
def test_classes_that_the_student_has_alone(target, variant):
    """Two loops in place of the one that fills with zeros. Of a row that is split four scalars at
    most find no register while loops over single columns run: at its ends, in its tail, where it
    searches for a class."""
    with aot.captured(TARGETS[target]) as kernels:
        aot.launch(**VARIANTS[variant])
        aot.launch(**VARIANTS[variant], tail=3001)
    without, report = map(aot.report, kernels)
    assert all(loop.spills <= (4 if "split" in variant else 0) for loop in report.loops)
    if target.startswith("sm_"):
        assert report.registers <= 128
        assert len(report.loops) == len(without.loops) + 1


def test_which_rows_are_split():
    """Those of which a GPU's cache does not hold as many as are in flight until their second read,
    into slices of which it does."""
    plan, cache = aot.triton_plan, 50 << 20
    h200 = plan.device_like(90, 132, cache, 32)

    def parts(V: int, pair: int = 4, device=h200) -> int:
        columns = plan.slice_columns(device, V, pair)
        assert columns == V or columns % plan.SLICE.block == 0
        return -(-V // columns)

    for V, pair in ((60000, 4), (128256, 4), (151936, 4), (262144, 4), (151936, 8), (786432, 4)):
        count = parts(V, pair)
        assert 1 < count <= plan.PARTS
        # A slice is a whole number of tiles, so up to one more.
        assert 2 * 132 * (V / count) * pair < plan.ROWS_SHARE * cache
    assert parts(57000) == parts(32768) == parts(1) == parts(28000, 8) == 1
    for V in (10**6, 10**7, 32 * 2048 * 40 - 7, 32 * 2048 * 40 + 1):
        assert parts(V) <= plan.PARTS
    mi300 = plan.device_like("gfx942", 304, 4 << 20, 64)
    assert parts(32768, device=mi300) == 1 and parts(262144, device=mi300) > 1
    assert parts(32768, device=plan.device_like("gfx90a", 104, 8 << 20, 64)) > 1


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
