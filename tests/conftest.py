"""The fixtures and options of every test: the backends as a parameter."""

import re
import zlib

import pytest
import torch
from cuda_kernels.emulation import build
from lib.backends import BACKENDS, INSTRUCTION_SETS, KERNELS, Backend

import fastkd
from fastkd.kernels import triton as triton_backend

if triton_backend.INTERPRETED and not triton_backend.MISSING:
    from triton_kernels import interpreter as triton_interpreter


def _parameters(backends: tuple[Backend, ...]) -> list:
    marks = {"cpu": [], "cuda": [pytest.mark.gpu]}
    return [pytest.param(b, id=str(b), marks=marks[b.device]) for b in backends]


def _ready(backend: Backend) -> Backend:
    reasons = fastkd.backends()[backend.name]
    if reasons:
        pytest.skip(f"{backend.name}: " + "; ".join(reasons))
    if backend.emulated:  # here, for a test of another backend would wait for the compiler
        build.load()
    return backend


@pytest.fixture(params=_parameters(BACKENDS))
def backend(request: pytest.FixtureRequest):
    yield from _limited(_ready(request.param))


@pytest.fixture(params=_parameters(KERNELS))
def kernel(request: pytest.FixtureRequest):
    """Every backend, the cpu backend once per instruction set."""
    yield from _limited(_ready(request.param))


def _limited(backend: Backend):
    if backend.split:
        with triton_interpreter.taking_turns():
            yield backend
    elif backend.instruction_set == 0:
        yield backend
    else:
        torch.ops.fastkd.cpu_instruction_set(backend.instruction_set)
        yield backend
        torch.ops.fastkd.cpu_instruction_set(0)


@pytest.fixture(params=range(len(INSTRUCTION_SETS)), ids=INSTRUCTION_SETS)
def cpu_isa(request: pytest.FixtureRequest):
    """The name of the instruction set that the cpu backend is limited to."""
    yield torch.ops.fastkd.cpu_instruction_set(request.param)
    torch.ops.fastkd.cpu_instruction_set(0)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_configure(config: pytest.Config) -> None:
    # Rows this short gain nothing from threads; test_determinism.py: 2 give the same bits.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"fastkd {fastkd.__version__}, cpu instruction sets: {', '.join(INSTRUCTION_SETS)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interpreted", type=int, default=1, metavar="N",
        help="parameter sets per test, of split rows or not, in Triton's interpreter; 0: all",
    )  # fmt: skip
    parser.addoption(
        "--every-layout", action="store_true",
        help="run all parameter sets in both layouts of the emulated CUDA kernels",
    )  # fmt: skip
    parser.addoption(
        "--every-target", action="store_true",
        help="compile the Triton kernels for every GPU of the table, not for one of each maker",
    )  # fmt: skip


NOT_SPLIT = "top_k|percentile|prun|select|test_sparse"
PRUNES_NOTHING = r"top_k=(1100|10{12})-|percentile=0\.001-|long_rows\[triton-split-5000\]"


def _interpreted_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects most parameter sets of the triton backend: the interpreter is 1000 times slower.

    Which ones stay depends on the test, so that together they meet all dtypes, betas and options.
    """
    count = config.getoption("interpreted")
    groups: dict[str, list[pytest.Item]] = {}
    left_out = set()
    for item in items:
        values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        kernels = [v for v in values if isinstance(v, Backend) and v.interpreted]
        if kernels:
            pruned = re.search(NOT_SPLIT, item.nodeid) and not re.search(
                PRUNES_NOTHING, item.nodeid
            )
            pruned = pruned and kernels[0].split
            if torch.float64 in values or pruned:  # would be skipped; would not be split
                left_out.add(item)
                continue
            name = item.nodeid.split("[")[0]
            groups.setdefault(name, []).append(item)
    for name, group in groups.items():
        if 0 < count < len(group):
            first = zlib.crc32(name.encode()) % len(group)
            taken = {(first + i * len(group) // count) % len(group) for i in range(count)}
            left_out |= {item for i, item in enumerate(group) if i not in taken}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _layouts_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects two of three parameter sets of the emulated CUDA kernels' second layout.

    A row's code is the same in both but for how its blocks meet, of which test_emulation.py runs
    every kind of row in every layout and schedule.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(v, Backend) and v.name == "emulated_ticket" for v in values):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = {
        item
        for name, group in groups.items()
        for i, item in enumerate(group)
        if len(group) > 3 and (i + zlib.crc32(name.encode())) % 3
    }
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if triton_backend.INTERPRETED:
        _interpreted_share(config, items)
    if not config.getoption("every_layout"):
        _layouts_share(config, items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch.cuda sees none"))
