"""Batches of changing length: few graphs of torch.compile, and one of torch.export for all."""

import pytest
import torch
from lib.logits import normal, pair, some_labels
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd

V = 11
LENGTHS = range(3, 16)


def calls(name):
    """Each of student, teacher and labels, to a scalar."""
    options = {"backend": name}
    kd, sparse = fastkd.kd_loss, fastkd.topk_kd_loss
    return {
        "kd": lambda s, t, y: kd(s, t, **options),
        "kd, hard": lambda s, t, y: kd(s, t, y, alpha=0.5, temperature=2.0, top_k=5, **options),
        "kd, num_items": lambda s, t, y: kd(s, t, y, alpha=0.5, num_items=7.0, **options),
        "kd, none": lambda s, t, y: kd(s, t, y, reduction="none", **options).sum(),
        "kd, terms": lambda s, t, y: kd(s, t, y, return_terms=True, **options).loss,
        "kd, in place": lambda s, t, y: kd(s * 1, t, y, inplace=True, **options),
        "dkd": lambda s, t, y: fastkd.dkd_loss(s, t, y, **options),
        "bucket": lambda s, t, y: sparse(s, *fastkd.topk_teacher(t, 3), y, **options),
        "restrict": lambda s, t, y: sparse(
            s, *fastkd.topk_teacher(t, 3), y, outside="restrict", alpha=0.5, **options
        ),
        "ensemble": lambda s, t, y: kd(s, fastkd.ensemble([t, 2 * t]), **options),
        "ensemble, rows": lambda s, t, y: kd(
            s, fastkd.ensemble([t, 2 * t], temperature=t.std(-1)), **options
        ),
        "ensemble, logits": lambda s, t, y: kd(
            s, fastkd.ensemble([t, 2 * t], [0.3, 0.7], mean="logits"), **options
        ),
    }


def gradient(function, s, t, y):
    leaf = s.clone().requires_grad_()
    loss = function(leaf, t, y)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def batch(N, backend):
    s, t = pair(N, V)
    y = some_labels(N, V, ignored=(1,))
    return s.to(backend.device), t.to(backend.device), y.to(backend.device)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "automatic") for name in calls("")]
    + [(name, how) for name in ("kd, hard", "bucket") for how in ("dynamic", "marked")],
)
def test_few_graphs(backend, name, how):
    if backend.emulated or backend.interpreted:
        pytest.skip("the Python layer is the same above all kernels")
    torch._dynamo.reset()
    function = calls(backend.name)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        function, fullgraph=True, dynamic=True if how == "dynamic" else None, backend=counter
    )
    for N in LENGTHS:
        inputs = batch(N, backend)
        if how == "marked":
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        leaf = inputs[0].requires_grad_()
        loss = compiled(leaf, *inputs[1:])
        (actual,) = torch.autograd.grad(loss, leaf)
        if N in (3, 9):
            expected = gradient(function, leaf.detach(), *inputs[1:])
            torch.testing.assert_close((loss.detach(), actual), expected)
    assert counter.frame_count <= (1 if how == "marked" else 3)


@pytest.mark.slow  # exports
@pytest.mark.parametrize("name", calls(""))
def test_export_of_a_dynamic_batch(backend, name):
    if backend.emulated or backend.interpreted:
        pytest.skip("the Python layer is the same above all kernels")
    function = calls(backend.name)[name]

    class Module(torch.nn.Module):
        def forward(self, s, t, y):
            return function(s, t, y)

    n = torch.export.Dim("n", min=2, max=999)
    exported = torch.export.export(
        Module(), batch(4, backend), dynamic_shapes=({0: n}, {0: n}, {0: n})
    )
    for N in (2, 9):
        inputs = batch(N, backend)
        torch.testing.assert_close(exported.module()(*inputs), function(*inputs))


@pytest.mark.slow  # compiles
def test_many_rows_of_changing_number():
    """Sums of many rows are taken in parts, whose number must not be fixed either."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastkd.kd_loss, fullgraph=True, dynamic=True, backend=counter)
    for N in (17_000, 20_000, 33_000, 50_000, 70_001):
        s, t = normal(N, 3), normal(N, 3, seed=1)
        torch.testing.assert_close(compiled(s, t), fastkd.kd_loss(s, t))
    assert counter.frame_count <= 3
