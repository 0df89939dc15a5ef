"""Schedules under torch.compile: a number that changes from step to step becomes a symbol of one
graph. Torch compiles no ninth graph of a function, and raises with fullgraph=True."""

import pytest
import torch
from lib.compare import run
from lib.logits import pair, some_labels
from torch._dynamo.testing import CompileCounterWithBackend

from fastkd import DKDLoss, KDLoss, dkd_loss, kd_loss

V = 50
TEMPERATURES = [1 + 0.3 * i for i in range(13)]
SCHEDULES = {
    "temperature": TEMPERATURES,
    "teacher_temperature": TEMPERATURES,
    "alpha": [i / 12 for i in range(13)],
    "beta": [i / 12 for i in range(13)],
    "bottom_percentile": [8.0 * i for i in range(13)],
    "top_k": [1, 2, 3, 5, 7, 11, 20, 30, 49, 50, 51, 99, 4],
    "num_items": [3 + 0.5 * i for i in range(13)],
}
# One with the first value in it, one with a symbol in its place, and one at each end of the range
# where a term or the pruning goes.
GRAPHS = 4


def by_argument(loss, module, compiler, name, options):
    @compiler
    def step(student, teacher, labels, value):
        return loss(student, teacher, labels, **{name: value}, **options)

    return step


def by_attribute(loss, module, compiler, name, options):
    module = module(**options)
    compiled = compiler(module)

    def step(student, teacher, labels, value):
        setattr(module, name, value)
        return compiled(student, teacher, labels)

    return step


def follow(backend, loss, module, given, name, values, **options) -> int:
    """Compares the loss and its gradient with eager ones; how many graphs it took."""
    if backend.emulated or backend.interpreted:
        pytest.skip("the Python layer is the same above all kernels")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options["backend"] = backend.name
    step = given(
        loss, module, lambda f: torch.compile(f, backend=counter, fullgraph=True), name, options
    )
    student, teacher = (x.to(backend.device) for x in pair(4, V))
    labels = some_labels(4, V, ignored=(1,)).to(backend.device)
    for value in values:
        leaf, eager = (student.clone().requires_grad_() for _ in range(2))
        actual = step(leaf, teacher, labels, value)
        expected = loss(eager, teacher, labels, **{name: value}, **options)
        actual.backward()
        expected.backward()
        for pair_of in ((actual, expected), (leaf.grad, eager.grad)):
            torch.testing.assert_close(*pair_of, msg=lambda m, v=value: f"{name}={v}: {m}")
    return counter.frame_count


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("given", [by_argument, by_attribute])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_few_graphs(backend, name, given):
    assert follow(backend, kd_loss, KDLoss, given, name, SCHEDULES[name]) <= GRAPHS


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("given", [by_argument, by_attribute])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("beta", {"top_k": 9, "alpha": 0.5}),
        ("beta", {"temperature": float("inf")}),
        ("bottom_percentile", {"top_k": 20, "beta": 0.3, "vocab_size": 41}),
        ("top_k", {"bottom_percentile": 29.0, "beta": 1.0, "temperature": 2.0}),
    ],
)
def test_a_schedule_beside_other_options(backend, name, others, given):
    """What is kept is the smaller set, and the same number of classes as in eager mode."""
    assert follow(backend, kd_loss, KDLoss, given, name, SCHEDULES[name], **others) <= GRAPHS


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", ["temperature", "alpha", "beta", "hard_weight", "top_k"])
def test_a_schedule_of_the_decoupled_loss(backend, name):
    values = SCHEDULES.get(name, SCHEDULES["alpha"])
    assert follow(backend, dkd_loss, DKDLoss, by_attribute, name, values) <= GRAPHS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [1e-300, 1e-45, 1e-30, 1 - 1e-9, 1 - 2**-53])
def test_a_mixture_all_but_at_its_end(backend, beta, dtype):
    """In the compute dtype it would be 0 or 1, and 0 times infinite: all it is, is finite."""
    backend.need(dtype)
    student, teacher = pair(4, V, dtype=dtype)
    student[:2, 3] = teacher[1:3, 4] = -torch.inf
    result = run(backend, student, teacher, beta=beta)
    assert 0 <= result.loss < 1e-6 and result.gradient.isfinite().all()
