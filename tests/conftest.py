"""What every test shares: the backends as a parameter, one call of the loss, and `check`, which
compares it with the definition in float64 within the bounds of bounds.py.
"""

import functools
import itertools
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from bounds import INF, NAN, Allowance, assert_close
from emulation import build
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastkd
from fastkd.kernels import triton as triton_backend

__all__ = ["INF", "NAN", "assert_close"]  # for tests, beside what is defined here
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BETAS = (0.0, 1.0, 0.1, 0.5)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    float64: bool = True
    instruction_set: int = 0  # of the cpu backend: 0 is the widest this processor has
    label: str = ""
    emulated: bool = False
    split: bool = False  # rows over several programs of the Triton kernel, however short

    @property
    def interpreted(self) -> bool:
        """In Triton's interpreter a row takes some 20 ms: fewer and shorter ones, then."""
        return self.name == "triton" and triton_backend.INTERPRETED

    @property
    def slow(self) -> bool:
        """A hundred times slower than a kernel in its place."""
        return self.emulated or self.interpreted or self.name == "reference"

    @property
    def finest(self) -> torch.dtype:
        return torch.float64 if self.float64 else torch.float32

    def need(self, *dtypes: torch.dtype) -> None:
        if torch.float64 in dtypes and not self.float64:
            pytest.skip(f"the {self.name} backend refuses float64")

    def __str__(self) -> str:
        return self.label or self.name


# A further backend is one line here.
BACKENDS = (
    Backend("reference"),
    Backend("cpu"),
    Backend("cuda", "cuda", float64=False),
    # With TRITON_INTERPRET=1 in Triton's interpreter, else on a GPU.
    Backend("triton", triton_backend.DEVICE, float64=False),
    # The CUDA kernels' own source, emulated on the CPU: in both of its layouts of a row.
    # Not where FASTKD_EMULATION=0 says that a GPU is at hand.
    *(
        Backend(name, float64=False, emulated=True)
        for name in (build.backends() if os.environ.get("FASTKD_EMULATION") != "0" else ())
    ),
)
if triton_backend.INTERPRETED and not triton_backend.MISSING:
    import triton_interpreter

    triton_interpreter.patch_once()
    BACKENDS += (Backend("triton", float64=False, label="triton-split", split=True),)
DEVICES = {backend.name: backend.device for backend in BACKENDS}


def _instruction_sets() -> list[str]:
    """What the cpu backend has on this processor, widest first."""
    if fastkd.backends()["cpu"]:
        return []
    limit = torch.ops.fastkd.cpu_instruction_set
    names = list(itertools.takewhile(bool, map(limit, range(8))))
    limit(0)
    return names


INSTRUCTION_SETS = _instruction_sets()
# The backends, and the cpu backend again at every narrower instruction set.
KERNELS = BACKENDS + tuple(
    Backend("cpu", instruction_set=index, label=f"cpu-{name}")
    for index, name in enumerate(INSTRUCTION_SETS)
    if index > 0
)


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
        help="parameter sets per test that are run in Triton's interpreter; 0: all",
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
            name = item.nodeid.split("[")[0] + str(kernels[0])
            groups.setdefault(name, []).append(item)
    for name, group in groups.items():
        if 0 < count < len(group):
            first = zlib.crc32(name.encode()) % len(group)
            taken = {(first + i * len(group) // count) % len(group) for i in range(count)}
            left_out |= {item for i, item in enumerate(group) if i not in taken}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if triton_backend.INTERPRETED:
        _interpreted_share(config, items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch.cuda sees none"))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale=3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def pair(*shape: int, dtype=torch.float32, teacher_dtype=None, seed=0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher that agree about as much as in training."""
    teacher = normal(*shape, seed=seed, dtype=torch.float64)
    student = teacher + normal(*shape, seed=seed + 1, dtype=torch.float64, scale=1.0)
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def some_labels(N: int, vocab: int, ignored: tuple[int, ...] = ()) -> Tensor:
    labels = torch.arange(N) * 7919 % vocab
    labels[list(ignored)] = -100
    return labels


def copied(tensor: Tensor, device: str) -> Tensor:
    """A copy of all its storage on that device, and there the strides and the offset of `tensor`.

    `.to` makes contiguous what has gaps, shares elements or begins later in its storage.
    """
    whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage()).to(device, copy=True)
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return whole.new_empty(0).set_(whole.untyped_storage(), *place)


def moved(tensor: Tensor, device: str) -> Tensor:
    """As `.to(device)`, with a gradient as well; but on the other device it lies as here."""
    if tensor.device.type == torch.device(device).type:
        return tensor
    return _Moved.apply(tensor, device)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, device: str) -> Tensor:
        ctx.device = tensor.device
        return copied(tensor, device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.device), None


def on(backend: Backend, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(moved(tensor, backend.device) for tensor in tensors)


def at_backend(loss: Callable) -> Callable:
    """`loss` for tensors on the CPU, where its results come back to, on its backend's device."""

    @functools.wraps(loss)
    def call(*arguments, **options):
        device = DEVICES[options.get("backend", "cpu")]
        arguments, options = tree_map_only(
            Tensor, lambda tensor: moved(tensor, device), (arguments, options)
        )
        return tree_map_only(Tensor, Tensor.cpu, loss(*arguments, **options))

    return call


@dataclass(frozen=True)
class Result:
    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None
    gradient: Tensor


def run(
    backend: Backend | str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    grad_output: float | Tensor | None = None,
    **options,
) -> Result:
    """One forward and backward; the gradient with respect to `student`, whatever its strides."""
    device = "cpu" if isinstance(backend, str) else backend.device
    name = backend if isinstance(backend, str) else backend.name

    def move(value):
        return moved(value, device) if isinstance(value, Tensor) else value

    teacher, labels = move(teacher), move(labels)
    student = student.detach()
    if 0 in student.stride():  # elements that are shared cannot each take a gradient
        student = student.clone(memory_format=torch.contiguous_format)
    root = torch.zeros((), dtype=student.dtype, device=device, requires_grad=True)
    # The root makes it a non-leaf of the same strides, so that inplace=True is allowed.
    leaf = _Graft.apply(copied(student, device), root)
    leaf.retain_grad()
    out = fastkd.kd_loss(
        leaf, teacher, labels, backend=name, **{k: move(v) for k, v in options.items()}
    )
    terms = isinstance(out, fastkd.KDLossOutput)
    loss = out.loss if terms else out
    if grad_output is None:
        grad_output = 1.0
    if not isinstance(grad_output, Tensor):
        grad_output = torch.full_like(loss, grad_output)
    loss.backward(move(grad_output).to(loss.dtype))
    assert leaf.grad is not None
    assert leaf.grad.dtype == student.dtype and leaf.grad.shape == student.shape
    soft, hard = (out.soft, out.hard) if terms else (None, None)
    return Result(*(x if x is None else x.detach().cpu() for x in (loss, soft, hard, leaf.grad)))


class _Graft(torch.autograd.Function):
    """Hands `values` on as if computed from `root`."""

    @staticmethod
    def forward(ctx, values: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def check(backend: Backend, student: Tensor, teacher: Tensor, labels=None, **options) -> Result:
    """Loss, terms and gradient of `backend` against the definition in float64.

    The oracle gives the terms per row; they are reduced here, so reductions are judged as well.
    """
    backend.need(student.dtype, teacher.dtype)
    double = torch.float64 in (student.dtype, teacher.dtype)
    stored = torch.float64 if double else torch.float32
    grad_output = options.pop("grad_output", None)
    options = {**options, "return_terms": True}
    actual = run(backend, student, teacher, labels, grad_output=grad_output, **options)
    assert actual.loss.dtype == actual.soft.dtype == stored

    reduction = options.get("reduction", "batchmean")
    leading, N = student.shape[:-1], student.shape[:-1].numel()
    divisor = 1.0
    if reduction == "batchmean":
        items = options.get("num_items")
        counting = labels is None or labels != options.get("ignore_index", -100)
        counting = N if labels is None else int(counting.sum())
        divisor = max(counting, 1) if items is None else float(items)
    factor = torch.as_tensor(1.0 if grad_output is None else grad_output, dtype=torch.float64)
    exact = {**options, "inplace": False, "reduction": "none", "num_items": None}
    expected = run("reference", student.double(), teacher.double(), labels,
                   grad_output=(factor / divisor).expand(leading), **exact)  # fmt: skip

    bounds = Allowance(student, teacher, labels, options)
    soft, hard = (
        x if x is None else x.reshape(-1) / divisor for x in (expected.soft, expected.hard)
    )
    soft_bound, hard_bound = bounds.rows(soft, hard)
    alpha = options.get("alpha", 1.0)
    both = hard_bound is not None and 0 < alpha < 1
    loss_bound = hard_bound if alpha == 0 else soft_bound
    if both:
        loss_bound = alpha * soft_bound + (1 - alpha) * hard_bound
    for name, bound in (("soft", soft_bound), ("hard", hard_bound), ("loss", loss_bound)):
        a, e = getattr(actual, name), getattr(expected, name)
        if e is None:
            assert a is None
            continue
        if reduction == "none":
            bound = bound.reshape(leading)
        else:
            bound, e = bound.sum(), e.sum() / divisor
        assert_close(a, e, stored, bound, what=name)

    bound = bounds.gradient().reshape(student.shape) * factor.abs().reshape(*factor.shape, 1)
    roundings, spacings = 1, 1.0
    if grad_output is not None:
        roundings, spacings = 2, 1 + factor.abs().max().item()  # forward stores, then backward
    if student.dtype == torch.float16:
        # Stored times a power of two that brings the row's weight to at least 2^7, 2^3 reversed.
        weight = bounds.weight.abs() * (alpha * bounds.T.squeeze(-1) + 1 - alpha)
        lost = weight.reshape(leading) * factor.abs() / (2**7 if bounds.beta < 1 else 2**3)
        spacings = 1 + torch.where(weight.reshape(leading) > 0, lost, 0).unsqueeze(-1)
    assert_close(
        actual.gradient, expected.gradient, student.dtype, bound,
        roundings=roundings, spacings=spacings, what="gradient",
    )  # fmt: skip
    return actual
