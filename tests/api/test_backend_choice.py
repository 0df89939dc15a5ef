"""Which backend is taken, the reasons why another is not, and the layout that the CUDA kernels
take for a row, on machines that are not at hand.
"""

import subprocess
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cuda_kernels.emulation import build

import fastkd
from fastkd import kernels, spec
from fastkd.kernels import cuda

CPU, FLOAT, DOUBLE = torch.device("cpu"), torch.float32, torch.float64


def _ops(suffix: str = "") -> kernels.Ops:
    names = (f"dense_rows{suffix}", f"scale_rows{suffix}_", f"sparse_rows{suffix}")
    of_backend = (getattr(torch.ops.fastkd, name).default for name in names)
    return kernels.Ops(*of_backend, order_named=spec.order_named)


NATIVE, REFERENCE = _ops(), _ops("_reference")
WHEEL = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")


class Properties(NamedTuple):
    major: int
    minor: int
    name: str


def gpu(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


@pytest.fixture
def machine(monkeypatch):
    """machine((7, 5), (9, 0)): one with the CUDA kernels of the wheel and GPUs of this kind.

    Returns how often each GPU was asked for its properties.
    """

    def install(*capabilities, targets=WHEEL):
        asked = [0] * len(capabilities)

        def properties(index):
            asked[index] += 1
            major, minor = capabilities[index]
            return Properties(major, minor, f"GPU of {major}.{minor}")

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(cuda, "_TARGETS", [cuda.Target.parse(name) for name in targets])
        monkeypatch.setitem(kernels.BACKENDS, "cuda", kernels.BACKENDS["cuda"]._replace(missing=[]))
        monkeypatch.setattr(kernels, "_CHOSEN", {})
        return asked

    return install


@pytest.mark.parametrize(
    ("targets", "runs_on", "not_on"),
    [
        (("sm_80",), [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (("sm_86",), [(8, 6), (8, 7)], [(8, 0), (9, 0)]),
        (("sm_90a",), [(9, 0)], [(8, 0), (10, 0)]),
        (("sm_100f",), [(10, 0)], [(10, 3)]),
        (("compute_90",), [(9, 0), (10, 3), (12, 0)], [(8, 9)]),
        # The PTX of 12.0 is for what comes later; 11.0 is a family of its own that none serves.
        (WHEEL, [(8, 0), (8, 7), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)], [(7, 5), (11, 0)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value[0], str) else "",
)
def test_targets(targets, runs_on, not_on):
    parsed = [cuda.Target.parse(name) for name in targets]
    for capability in runs_on:
        assert any(target.runs_on(capability) for target in parsed), capability
    for capability in not_on:
        assert not any(target.runs_on(capability) for target in parsed), capability


def test_auto_takes_the_kernels_where_they_run(machine):
    asked = machine((7, 5), (9, 0))
    assert kernels.choose_backend("auto", gpu(0), FLOAT) == REFERENCE
    assert kernels.choose_backend("auto", gpu(1), FLOAT) == NATIVE
    assert kernels.choose_backend("cuda", gpu(1), FLOAT) == NATIVE
    assert fastkd.backends()["cuda"] == []  # on one of the two it can
    with pytest.raises(RuntimeError, match=r"'cuda'.*GPU 0, GPU of 7\.5,.*7\.5.*sm_80, "):
        kernels.choose_backend("cuda", gpu(0), FLOAT)
    before = list(asked)
    for _ in range(3):
        kernels.choose_backend("auto", gpu(0), FLOAT)
        kernels.choose_backend("cuda", gpu(1), FLOAT)
    assert asked == before


def test_float64_on_a_gpu_goes_to_the_definition(machine):
    machine((9, 0))
    assert kernels.choose_backend("auto", gpu(), DOUBLE) == REFERENCE
    assert kernels.choose_backend("auto", gpu(), FLOAT) == NATIVE
    with pytest.raises(TypeError, match=r"'cuda' takes float32, bfloat16 and float16.*float64"):
        kernels.choose_backend("cuda", gpu(), DOUBLE)


def test_float64_is_refused_before_anything_is_written(monkeypatch):
    """By a backend on the CPU, for want of a GPU; either of the logits decides."""
    monkeypatch.setitem(
        kernels.BACKENDS, "reference", kernels.BACKENDS["reference"]._replace(float64=False)
    )
    monkeypatch.setattr(kernels, "_CHOSEN", {})
    for dtypes in ((DOUBLE, DOUBLE), (FLOAT, DOUBLE), (DOUBLE, FLOAT)):
        student, teacher = (torch.ones(2, 3, dtype=dtype) for dtype in dtypes)
        student = student.requires_grad_() * 1
        with pytest.raises(TypeError, match="float64"):
            fastkd.kd_loss(student, teacher, inplace=True, backend="reference")
        assert (student == 1).all() and student._version == 0
    fastkd.kd_loss(torch.ones(2, 3), torch.ones(2, 3), backend="reference")


def test_reasons(machine, monkeypatch):
    machine((7, 5), (6, 1))
    reasons = fastkd.backends()["cuda"]
    assert len(reasons) == 2 and "7.5" in reasons[0] and "6.1" in reasons[1]
    machine()
    assert fastkd.backends()["cuda"] == ["torch.cuda sees no GPU"]
    with pytest.raises(RuntimeError, match="sees no GPU; the logits are on cpu, not on cuda"):
        kernels.choose_backend("cuda", CPU, FLOAT)

    def broken(index):
        raise RuntimeError("the driver is too old")

    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert fastkd.backends()["cuda"] == ["CUDA cannot be initialised: the driver is too old"]


def test_the_cpu_never_asks_for_a_gpu(machine):
    asked = machine((9, 0))
    for name in ("auto", "reference"):
        for dtype in (FLOAT, DOUBLE):
            kernels.choose_backend(name, CPU, dtype)
    assert asked == [0]


@pytest.mark.parametrize(
    ("version", "present", "words"),
    [
        ("13.0", False, ["not part of this installation"]),
        (None, True, ["built without CUDA"]),
        (None, False, ["not part of this installation", "built without CUDA"]),
        ("13.0", True, ["does not load: it is broken"]),
    ],
)
def test_a_module_that_is_not_there_or_does_not_load(monkeypatch, version, present, words):
    def broken(name):
        assert version is not None, "a torch without CUDA cannot load it"
        raise ImportError("it is broken")

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(cuda, "find_spec", lambda name: present or None)
    monkeypatch.setattr(cuda, "import_module", broken)
    reasons, targets = cuda._load()
    assert not targets and len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


@pytest.mark.slow  # compiles
def test_the_choice_inside_a_compiled_graph(machine):
    """The first call may be a compiled one: the GPU's properties are constants of its graph."""
    machine((7, 5), (9, 0))
    for device, dtype, expected in (
        (gpu(0), FLOAT, REFERENCE),
        (gpu(1), FLOAT, NATIVE),
        (gpu(1), DOUBLE, REFERENCE),
    ):
        torch._dynamo.reset()
        chosen = []

        @torch.compile(fullgraph=True, backend="eager")
        def compiled(x, device=device, chosen=chosen):
            chosen.append(kernels.choose_backend("auto", device, x.dtype))
            return x + 1

        compiled(torch.ones(3, dtype=dtype))
        assert chosen == [expected]


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, []),
        ((13, 1), []),
        ((14, 0), []),
        ((12, 9), ["built with CUDA 13.0", "supports 12.9"]),
    ],
)
def test_a_driver_too_old_for_the_runtime_inside_the_module(monkeypatch, driver, words):
    build = SimpleNamespace(cuda_build=lambda: "13.0 sm_80 compute_120")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.ops, "fastkd", build)
    monkeypatch.setattr(cuda, "find_spec", lambda name: True)
    monkeypatch.setattr(cuda, "import_module", lambda name: None)
    monkeypatch.setattr(cuda, "_driver_version", lambda: driver)
    reasons, targets = cuda._load()
    assert [target.name for target in targets] == ["sm_80", "compute_120"]
    assert len(reasons) == bool(words) and all(word in reasons[0] for word in words)


class Layout(NamedTuple):
    kind: str
    parts: int  # CTAs of a row
    threads: int
    active: int  # rows in work at one time

    def columns(self, V: int) -> int:  # of the longest slice
        return -(-V // 256 // self.parts) * 256


GPUS = {  # vectors of a thread, the largest cluster, multiprocessors per group
    "H200": (4, 16, 16, 16, 16, 16, 16, 16, 18, 18),
    "B200": (3, 16, *[18] * 4, *[19] * 4),
    "RTX 5090": (3, 8, *[14] * 10, *[15] * 2),
    "A100": (3, 0, *[14] * 4, *[13] * 4),
    "small": (3, 0, 14),
}


def layouts(gpu: str, vocabularies, pair_bytes: int = 6) -> dict[int, Layout]:
    program = build.program("plan")
    given = "".join(f"{V} {pair_bytes}\n" for V in vocabularies)
    arguments = [program, *map(str, GPUS[gpu])]
    done = subprocess.run(arguments, input=given, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {V: Layout(kind, *map(int, numbers))
            for V, (kind, *numbers) in zip(vocabularies, rows, strict=True)}  # fmt: skip


VOCABULARIES = (1, 256, 257, 1000, 8192, 8193, 32768, 50257, 65536, 128256, 151936, 262144, 1 << 20)


@pytest.mark.parametrize("pair_bytes", [6, 8, 10, 12])
@pytest.mark.parametrize("gpu", GPUS)
def test_a_layout_holds_its_row(gpu, pair_bytes):
    vectors, largest, *groups = GPUS[gpu]
    for V, layout in layouts(gpu, VOCABULARIES, pair_bytes).items():
        clusters = layout.kind == "cluster"
        assert layout.threads in (32, 64, 128, 256, *[512] * clusters)
        assert layout.active >= 1
        assert layout.parts <= (largest if clusters else min(171, 2 * sum(groups)))
        assert layout.parts == 1 or layout.parts <= -(-V // 256)
        held = layout.threads // 32 * (vectors if clusters else 3) * 256
        if gpu != "small":  # its 28 places hold 172032 classes; beyond, slices are read again
            assert layout.columns(V) <= held, (V, layout)


def test_layouts():
    """As few CTAs of 256 threads as hold a row, two on a multiprocessor, unless that loses more."""
    h200 = layouts("H200", VOCABULARIES)
    assert h200[1][:3] == ("cluster", 1, 32)
    assert h200[8192][:3] == ("cluster", 1, 256) and h200[8192].active == 264
    assert h200[32768][:3] == ("cluster", 4, 256)
    assert h200[128256][:3] == ("cluster", 16, 256)
    # Too long for sixteen of those: of the clusters of CTAs twice as large, 10 to 16 that hold it,
    # of which 8 to 9 run at one time, the one that leaves fewest multiprocessors without work.
    assert h200[151936][:3] == ("cluster", 16, 512)
    assert h200[262144][:3] == ("cluster", 16, 512)
    assert h200[1 << 20].kind == "tickets"
    assert {layout.kind for layout in layouts("A100", VOCABULARIES).values()} == {"tickets"}
    # 48 vectors of 256 columns at 512 threads: no 16 of them hold 2^18.
    assert layouts("B200", [262144])[262144].kind == "tickets"
    assert layouts("RTX 5090", [128256])[128256].kind == "tickets"


def test_a_cluster_that_strands_multiprocessors_is_passed_over():
    """Clusters of 9 use all of groups of 9 multiprocessors; the smallest that fit, 5, use half."""
    GPUS["nines"] = (4, 16, *[9] * 16)
    try:
        (layout,) = layouts("nines", [9 * 8192 - 5]).values()
        assert layout[:3] == ("cluster", 9, 256) and layout.active == 32
        (wide,) = layouts("nines", [5 * 16384]).values()
    finally:
        del GPUS["nines"]
    assert wide.active * wide.parts * wide.threads > 0.8 * 16 * 9 * 512
