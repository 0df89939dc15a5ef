"""What only a GPU can show: streams, graphs, syncs, memory, 64-bit offsets, several devices."""

import math
import subprocess
import sys

import pytest
import torch
from lib.backends import BACKENDS, Backend
from lib.bounds import NAN
from lib.logits import normal, pair, some_labels

import fastkd
from benchmarks.gpu import captured
from fastkd import dkd_loss, kd_loss, topk_kd_loss, topk_teacher
from fastkd.spec import FORWARD, MIXTURE

GPUBACKENDS = [backend for backend in BACKENDS if backend.device == "cuda"]
pytestmark = pytest.mark.gpu


@pytest.fixture(params=GPUBACKENDS, ids=str)
def gpu(request):
    reasons = fastkd.backends()[request.param.name]
    if reasons:
        pytest.skip(f"{request.param}: " + "; ".join(reasons))
    return request.param


def loss_and_gradient(backend, student, teacher, *labels, loss=kd_loss, **options):
    leaf = student.detach().requires_grad_()
    value = loss(leaf * 1, teacher, *labels, backend=backend.name, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaf)


class Output(torch.autograd.Function):
    """A model whose output is `values`, with no copy; its backward drops the gradient."""

    @staticmethod
    def forward(ctx, weight, values):
        return values.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def probabilities(student, teacher, labels, **options):
    return kd_loss(student, teacher.float().softmax(-1), labels, teacher_kind="probs", **options)


def sparse(student, teacher, labels, **options):
    return topk_kd_loss(student, *topk_teacher(teacher, 9), labels, **options)


CALLS = {
    "plain": {},
    "jsd": {"beta": 0.5, "temperature": 2.0},
    "hard": {"alpha": 0.3, "temperature": 3.0},
    "top_k": {"top_k": 9, "reduction": "none"},
    "inplace": {"inplace": True, "temperature": 2.0},
    "limit": {"temperature": math.inf, "alpha": 0.3},
    # "loss": instead of kd_loss
    "decoupled": {"loss": dkd_loss, "hard_weight": 0.5},
    "decoupled, pruned": {"loss": dkd_loss, "top_k": 9, "reduction": "none"},
    "probabilities": {"loss": probabilities, "temperature": 2.0, "bottom_percentile": 20.0},
    "sparse": {"loss": sparse, "alpha": 0.3, "temperature": 2.0},
    "sparse, restricted": {"loss": sparse, "outside": "restrict", "inplace": True},
    "sparse, renormalised": {"loss": sparse, "outside": "renormalize", "temperature": 2.0},
}


@pytest.fixture(params=CALLS)
def call(request):
    return request.param


def arguments(call: str, V: int = 3001, dtype=torch.float32):
    student, teacher = (x.to("cuda") for x in pair(7, V, dtype=dtype))
    labels = some_labels(7, V, ignored=(2,)).to("cuda")
    return student, teacher, labels, {**CALLS[call]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_gpu(gpu, call, dtype):
    """Forward, and backward with a gradient that is not 1; temperatures and labels on the GPU."""
    student, teacher, labels, options = arguments(call, dtype=dtype)
    loss = options.pop("loss", kd_loss)
    rows = torch.linspace(0.5, 4, 7, device="cuda")
    factor = torch.full((), 3.0, device="cuda")
    for extra in ({}, {"temperature": rows}, {"token_weights": rows}, {"num_items": factor}):
        if "num_items" in extra and options.get("reduction") == "none":
            continue
        leaf = student.detach().clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = loss(leaf * 1, teacher, labels, backend=gpu.name, **{**options, **extra})
            (factor * out).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert leaf.grad.isfinite().all()


def test_on_the_current_stream(gpu, call):
    """The logits arrive late, on a stream of their own: any other stream would see none."""
    student, teacher, labels, options = arguments(call)
    expected = loss_and_gradient(gpu, student, teacher, labels, **options)
    late_student, late_teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # once before, so that the stream has its memory
        loss_and_gradient(gpu, late_student, late_teacher, labels, **options)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        late_student.copy_(student)
        late_teacher.copy_(teacher)
        actual = loss_and_gradient(gpu, late_student, late_teacher, labels, **options)
        assert not side.query(), "the host waited, and this shows nothing"
    side.synchronize()
    assert all_equal(actual, expected)


def test_captured_in_a_graph(gpu, call):
    """Forward and backward, replayed twice on logits that the capture did not see."""
    student, teacher, labels, options = arguments(call)
    loss = options.pop("loss", kd_loss)
    grad_output = torch.ones((), device="cuda")

    def step():
        leaf = student.detach().requires_grad_()
        value = loss(leaf * 1, teacher, labels, backend=gpu.name, **options)
        return value.detach(), *torch.autograd.grad((grad_output * value).sum(), leaf)

    graph, outputs = captured(step)
    for seed in (3, 5):
        student.copy_(pair(7, 3001, seed=seed)[0])
        labels.copy_(some_labels(7, 3001, ignored=(seed,)))
        grad_output.fill_(seed / 2)
        expected = [x.clone() for x in step()]
        graph.replay()
        assert all_equal(outputs, expected)


def test_out_of_memory_is_torchs_own_and_nothing_is_written(gpu):
    """The gradient does not fit: the same error as of any torch function; in place it fits."""
    student, teacher = (torch.randn(512, 131_072, device="cuda").bfloat16() for _ in range(2))
    before = student.clone()
    weight = torch.zeros(1, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + student.nbytes // 2
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            kd_loss(Output.apply(weight, student), teacher, backend=gpu.name)
        assert torch.equal(student, before)
        logits = Output.apply(weight, student)
        kd_loss(logits, teacher, inplace=True, backend=gpu.name).backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    expected = loss_and_gradient(gpu, before, teacher)[1]
    assert torch.equal(student, expected)


def test_memory(gpu):
    """One gradient of the size of the logits, or nothing with inplace=True."""
    N, V = 256, 131_072
    student, teacher = (torch.randn(N, V, device="cuda") for _ in range(2))
    weight = torch.zeros(1, device="cuda", requires_grad=True)
    for given in ({}, {"top_k": 64}, {"beta": 0.5, "bottom_percentile": 20.0}):
        for inplace, allowed in ((False, 1.01), (True, 0.01)):
            options = {**given, "inplace": inplace, "backend": gpu.name}
            kd_loss(Output.apply(weight, student), teacher, **options)
            torch.cuda.synchronize()
            begin = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kd_loss(Output.apply(weight, student), teacher, **options).backward()
            added = torch.cuda.max_memory_allocated() - begin
            assert added <= allowed * student.nbytes + (1 << 20), options


def test_more_than_two_to_the_31_logits(gpu):
    """Rows on either side of every 2^31 bytes and elements give what they give alone."""
    N, V = 8200, 262_144
    if torch.cuda.mem_get_info()[0] < 3 * N * V * 2:
        pytest.skip("needs 13 GB of free memory")
    student = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_(0, 3)
    teacher = torch.empty_like(student).normal_(0, 3)
    weight = torch.zeros(1, device="cuda", requires_grad=True)
    rows = torch.tensor([0, 1, 2047, 2048, 4095, 4096, 8191, 8192, N - 1], device="cuda")
    few = student[rows], teacher[rows]  # copies
    expected = loss_and_gradient(gpu, *few, num_items=N)[1]
    logits = Output.apply(weight, student)
    kd_loss(logits, teacher, num_items=N, inplace=True, backend=gpu.name).backward()
    torch.testing.assert_close(student[rows], expected, rtol=2**-7, atol=1e-12)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(gpu, call):
    student, teacher, labels, options = arguments(call)
    expected = loss_and_gradient(gpu, student, teacher, labels, **options)
    loss_of = options.pop("loss", kd_loss)
    other = [x.to("cuda:1") for x in (student, teacher, labels)]
    with torch.cuda.device(0):
        root = other[0].requires_grad_()
        loss = loss_of(root * 1, *other[1:], backend=gpu.name, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), root)
        assert torch.cuda.current_device() == 0
    assert loss.device == gradient.device == torch.device("cuda:1")
    assert torch.equal(loss.detach().cpu(), expected[0].cpu())
    assert torch.equal(gradient.cpu(), expected[1].cpu())


def test_the_op_refuses_memory_of_another_device(gpu):
    """Called without kd_loss, which would refuse in Python."""
    if gpu.name != "cuda":
        pytest.skip("the op is written in Python")
    student, teacher, labels, _ = arguments("plain")
    one = torch.ones(7, device="cuda")
    ids = torch.arange(9, device="cuda").repeat(7, 1)
    sparse = (student, ids, ids.float(), one, labels, one, one, one, one, torch.empty_like(student))
    torch.ops.fastkd.sparse_rows(*sparse, 3001, False)
    for position in range(1, len(sparse)):
        bad = [*sparse, 3001, False]
        bad[position] = bad[position].cpu()
        with pytest.raises(RuntimeError, match=r"device|elsewhere"):
            torch.ops.fastkd.sparse_rows(*bad)
    keep = torch.full((7,), 9, device="cuda")
    tensors = (student, teacher, labels, one, one, one, one, torch.empty_like(student), keep)
    torch.ops.fastkd.dense_rows(*tensors, 3001, MIXTURE, one)
    for position in range(1, len(tensors)):
        bad = [*tensors, 3001, MIXTURE, one]
        bad[position] = bad[position].cpu()
        with pytest.raises(RuntimeError, match="device"):
            torch.ops.fastkd.dense_rows(*bad)
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.fastkd.dense_rows(*tensors, 3001, MIXTURE, one.cpu())
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.fastkd.scale_rows_(student, torch.ones(1))
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.fastkd.dense_rows(student.double(), teacher.double(), None, one.double(),
                                 one.double(), one.double(), None, None, None, 9, FORWARD,
                                 None)  # fmt: skip
    torch.cuda.synchronize()


def test_float64_goes_to_the_definition(gpu):
    student, teacher = (x.double().to("cuda") for x in pair(3, 50))
    auto, named = (
        loss_and_gradient(Backend(name), student, teacher) for name in ("auto", "reference")
    )
    assert all_equal(auto, named)
    if not gpu.float64:
        with pytest.raises(TypeError, match="float64"):
            kd_loss(student, teacher, backend=gpu.name)


def test_under_deterministic_algorithms(gpu):
    """Torch then fills empty tensors with NaN, and raises where a sum has no fixed order."""
    student, teacher, labels, _ = arguments("plain")
    torch.use_deterministic_algorithms(True)
    try:
        results = [
            loss_and_gradient(gpu, student, teacher, labels, alpha=0.5, top_k=9) for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all_equal(*results) and results[0][1].isfinite().all()


def test_a_row_of_nan_stays_alone_in_a_full_grid(gpu):
    """More rows than the GPU holds at a time: what the next row of a CTA inherits would show."""
    student, teacher = (normal(4000, 5003, seed=seed).to("cuda") for seed in range(2))
    clean = loss_and_gradient(gpu, student, teacher, top_k=50, reduction="sum")[1]
    bad = torch.arange(0, 4000, 7)
    student[bad] = NAN
    spoilt = loss_and_gradient(gpu, student, teacher, top_k=50, reduction="sum")[1]
    rest = torch.ones(4000, dtype=torch.bool)
    rest[bad] = False
    assert torch.equal(spoilt[rest.to("cuda")], clean[rest.to("cuda")])
    assert spoilt[bad.to("cuda")].isnan().all()


def test_importing_leaves_cuda_alone():
    """So that a process may fork after it."""
    code = "import fastkd, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
