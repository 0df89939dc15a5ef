"""inplace=True: the gradient is where the logits were, and autograd knows it."""

import pytest
import torch
from lib.compare import Graft, run
from lib.logits import normal, on, pair, some_labels
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd import dkd_loss, kd_loss


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


OVERLAPS = {  # student and teacher from [2, 6, 40]
    "shifted": lambda x: (x[:, 1:], x[:, :-1]),
    "shifted back": lambda x: (x[:, :-1], x[:, 1:]),
    "other columns": lambda x: (x[..., 8:], x[..., :-8]),
    "of other strides": lambda x: (x[0], x[0].as_strided((6, 40), (20, 1))),
    "as another dtype": lambda x: (x.view(torch.bfloat16)[..., :40], x),
}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("loss", [kd_loss, dkd_loss], ids=["kd", "dkd"])
def test_inplace_refuses_a_teacher_that_it_would_overwrite(backend, name, loss):
    student, teacher = OVERLAPS[name](normal(2, 6, 40).to(backend.device))
    labels = torch.zeros(student.shape[:-1], dtype=torch.long, device=backend.device)
    root = torch.zeros((), device=backend.device, requires_grad=True)
    student = Graft.apply(student, root)
    before = student.detach().clone()
    with pytest.raises(ValueError, match="same memory"):
        loss(student, teacher.detach(), labels, inplace=True, backend=backend.name)
    assert torch.equal(student, before)


@pytest.mark.slow  # compiles
def test_compiled_inplace_never_overwrites_its_teacher(backend):
    """Where the compiler copies the logits first it is right; else the op refuses."""
    torch._dynamo.reset()

    def loss(x, w, inplace):
        logits = x @ w
        teacher = logits[:, :-1].detach()
        return kd_loss(logits[:, 1:], teacher, inplace=inplace, backend=backend.name)

    x, w = on(backend, normal(1, 33, 8, scale=1.0), normal(8, 400, seed=1))
    x.requires_grad_()
    try:
        actual = torch.compile(loss, fullgraph=True)(x, w, True)
    except (RuntimeError, ValueError) as error:
        assert "teacher" in str(error)  # lies in the same memory
    else:
        torch.testing.assert_close(actual, loss(x, w, False))


def test_inplace_takes_a_teacher_that_is_the_same_view(backend):
    s = normal(3, 40).to(backend.device).requires_grad_()
    for view in (lambda x: x, lambda x: x[1:, 3:]):
        logits = s * 1
        loss = kd_loss(view(logits), view(logits).detach(), inplace=True, backend=backend.name)
        assert loss == 0
        assert (torch.autograd.grad(loss, s)[0] == 0).all()


def test_inplace_takes_a_teacher_beside_it_in_the_same_storage(backend):
    """As of one batch of which a half is the student's and a half the teacher's."""
    both = normal(6, 40).to(backend.device)
    expected = run(backend, both[:3].clone(), both[3:].clone())
    root = torch.zeros((), device=backend.device, requires_grad=True)
    student = Graft.apply(both[:3], root)
    loss = kd_loss(student, both[3:].detach(), inplace=True, backend=backend.name)
    loss.backward()
    assert torch.equal(loss.detach().cpu(), expected.loss)
    assert torch.equal(both[:3].cpu(), expected.gradient)


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
