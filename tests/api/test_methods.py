"""The other methods as part of torch: compile, threads, opcheck, no second order, no rows."""

from functools import partial

import pytest
import torch
from lib.logits import pair, some_labels
from torch import Tensor
from torch.library import opcheck

from fastkd import dkd_loss, kd_loss, topk_kd_loss, topk_teacher
from fastkd.spec import FORWARD


def losses(N: int, V: int, backend: str = "cpu", device: str = "cpu") -> dict:
    """Per method a loss of the student's logits alone."""
    teacher = pair(N, V)[1].to(device)
    labels = some_labels(N, V, ignored=(1,)).to(device)
    sparse = topk_teacher(teacher, 5)
    return {
        "decoupled": lambda s: dkd_loss(s, teacher, labels, hard_weight=0.5, backend=backend),
        "probabilities": partial(
            kd_loss, teacher_logits=teacher.softmax(-1), teacher_kind="probs", backend=backend
        ),
        "sparse": lambda s: topk_kd_loss(s, *sparse, labels, alpha=0.7, backend=backend),
    }


METHODS = tuple(losses(2, 9))


def gradient(loss, student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_compile(method, name):
    student, _ = pair(6, 30)
    loss = losses(6, 30, name)[method]
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: 3 * loss(s), fullgraph=True)
    expected = gradient(lambda s: 3 * loss(s), student)
    torch.testing.assert_close(gradient(compiled, student), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_runs_give_the_same_bits(method, threads):
    student, _ = pair(40, 4001)
    loss = losses(40, 4001)[method]
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(gradient(loss, student))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_no_second_order_and_nothing_without_a_gradient(backend, method):
    student = pair(4, 50)[0].to(backend.device)
    loss = losses(4, 50, backend.name, backend.device)[method]
    with torch.no_grad():
        value = loss(student)
    assert not value.requires_grad
    # A GPU's kernels read some rows again for the sake of their gradient, and round them anew.
    torch.testing.assert_close(value, gradient(loss, student)[0], rtol=1e-6, atol=0)
    leaf = student.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        first.sum().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [0, 1])
def test_no_rows_and_one_that_is_ignored(backend, method, N):
    name, device = backend.name, backend.device
    loss = losses(2, 30, name, device)[method]
    if N == 0:
        teacher = torch.empty(0, 30, device=device)
        labels = torch.empty(0, dtype=torch.int64, device=device)
        empty = teacher.long()[:, :3], teacher[:, :3]
        loss = {
            "decoupled": lambda s: dkd_loss(s, teacher, labels, backend=name),
            "probabilities": lambda s: kd_loss(s, teacher, teacher_kind="probs", backend=name),
            "sparse": lambda s: topk_kd_loss(s, *empty, backend=name),
        }[method]
    student = torch.zeros(2 if N else 0, 30, device=device, requires_grad=True)
    value = loss(student)
    value.backward()
    assert value.isfinite() and student.grad is not None
    if method != "probabilities":
        assert (student.grad[1:] == 0).all()


@pytest.mark.parametrize("op", ["dense_rows", "dense_rows_reference"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_of_the_decoupled_terms(op, gradient):
    student, teacher = pair(6, 9)
    one = torch.ones(6)
    args = (
        student, teacher.softmax(-1), some_labels(6, 8), one, one, one, None,
        torch.empty_like(student) if gradient else None, None, 8, FORWARD, None, one,
        torch.empty(6), True,
    )  # fmt: skip
    opcheck(getattr(torch.ops.fastkd, op).default, args)
