"""inplace=True: the gradient is where the logits were, and autograd knows it."""

import pytest
import torch
from conftest import normal, on, pair, run, some_labels
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd import kd_loss


def test_inplace_leaves_the_gradient_in_the_logits(backend):
    s, t = on(backend, *pair(4, 50))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for reduction, g in (("batchmean", 1.0), ("batchmean", 3.0), ("none", 0.5)):
            expected = run(backend, s.to(dtype), t, reduction=reduction, grad_output=g)
            root = s.clone().to(dtype).requires_grad_()
            logits = root * 1
            loss = kd_loss(logits, t, reduction=reduction, inplace=True, backend=backend.name)
            assert logits._version > 0
            loss.backward(torch.full_like(loss, g))
            assert torch.equal(root.grad, logits.detach())
            assert torch.equal(root.grad.cpu(), expected.gradient)


@pytest.mark.parametrize("view", ["same", "slice", "reshape", "transposed"])
@pytest.mark.parametrize("needs", [torch.exp, torch.sigmoid, torch.softmax, torch.square])
def test_inplace_never_gives_a_wrong_gradient(backend, view, needs):
    """Whoever still needs the logits gets autograd's error; who does not, the right gradient."""
    root, t = on(backend, normal(3, 6, 6, scale=1.0), normal(3, 6, 6))
    views = {
        "same": lambda x: x,
        "slice": lambda x: x[:, :-1],
        "reshape": lambda x: x.view(18, 6),
        "transposed": lambda x: x.transpose(1, 2),
    }

    def loss(leaf, inplace):
        x = needs(leaf, -1) if needs is torch.softmax else needs(leaf)
        student = views[view](x)
        return kd_loss(student, views[view](t), inplace=inplace, backend=backend.name)

    leaf = root.clone().requires_grad_()
    if needs is torch.square:  # saves its input, not its output
        other = root.clone().requires_grad_()
        loss(leaf, True).backward()
        loss(other, False).backward()
        torch.testing.assert_close(leaf.grad, other.grad)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(leaf, True).backward()


def test_inplace_beside_another_loss_on_the_same_logits(backend):
    """The other one first: what it saved is its own, and the two gradients add up."""
    s, t = on(backend, *pair(4, 50))
    labels = some_labels(4, 50).to(backend.device)
    gradients = []
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        other = torch.nn.functional.cross_entropy(logits, labels)
        kd = kd_loss(logits, t, inplace=inplace, backend=backend.name)
        (0.5 * other + 2 * kd).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_inplace_refuses_logits_changed_after_the_call(backend):
    s, t = on(backend, *pair(4, 50))
    logits = s.requires_grad_() * 1
    loss = kd_loss(logits, t, inplace=True, backend=backend.name)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_allocates_no_gradient():
    N, V = 16, 4096
    if fastkd.backends()["cpu"]:
        pytest.skip("; ".join(fastkd.backends()["cpu"]))
    t, root = normal(N, V), normal(N, V, seed=1).requires_grad_()

    def largest(inplace: bool) -> int:
        logits = root * 1
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loss = kd_loss(logits, t, inplace=inplace, top_k=99, beta=0.5, backend="cpu")
            torch.autograd.grad(loss, logits)
        return max(e.cpu_memory_usage for e in recorded.events())

    size = N * V * 4
    assert largest(False) >= size  # the measurement sees one
    assert largest(True) < size / 16
