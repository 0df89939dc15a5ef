"""dkd_loss and teachers given as probabilities: against the formulas that users know, against the
definition in float64, and at the edges.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from lib.backends import DTYPES
from lib.bounds import INF, NAN, DecoupledAllowance, assert_close
from lib.logits import at_backend, normal, pair, some_labels
from torch import Tensor

import fastkd
from fastkd import DKDLoss

dkd_loss, kd_loss = map(at_backend, (fastkd.dkd_loss, fastkd.kd_loss))
GOLDEN = (torch.tensor([[1, 2, 0.5, -1, 3]]).double(), torch.tensor([[2, 1, 0, -2, 4]]).double())
LABEL = torch.tensor([4])


@pytest.fixture
def backend(kernel):
    return kernel


def gradient(loss, student: Tensor, *inputs, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, *inputs, **options)
    value.sum().backward()
    return value.detach(), student.grad


def textbook(z: Tensor, v: Tensor, y: Tensor, T, alpha=1.0, beta=8.0, teacher_T=None) -> Tensor:
    """Per row, from the probabilities, as the paper writes it."""
    p, q = (v / (teacher_T or T)).softmax(-1), (z / T).softmax(-1)
    at = F.one_hot(y, z.shape[-1]).bool()
    binary = [torch.stack((x[at], x[~at].view(len(x), -1).sum(-1)), -1) for x in (p, q)]
    rest = [x[~at].view(len(x), -1) / pair[:, 1:] for x, pair in zip((p, q), binary, strict=True)]
    kl = [(a * (a / b).log()).sum(-1) for a, b in (binary, rest)]
    return T * T * (alpha * kl[0] + beta * kl[1])


def test_golden(backend):
    z, v = (x.to(backend.finest) for x in GOLDEN)
    for percentile, T, expected in ((0.0, 4.0, 3.2859197908), (40.0, 4.0, 4.1034013915)):
        options = {"temperature": T, "bottom_percentile": percentile}
        loss, grad = gradient(dkd_loss, z, v, LABEL, backend=backend.name, **options)
        bounds = DecoupledAllowance(z, v, LABEL, options)
        rows = bounds.rows()
        bound = rows["target"] + 8 * rows["nontarget"] + 8 * bounds.eps * expected + 1e-9
        assert abs(loss.item() - expected) < bound.item() < 1e-4
        if percentile == 0:
            known = [-3.0669074122, 1.9341342324, 0.5009622051, 0.9136203199, -0.2818093453]
            off = (grad - torch.tensor(known, dtype=torch.float64)).abs()
            assert (off < bounds.gradient() + 1e-9).all()


def test_a_student_that_is_sure(backend):
    """Where 1 - q is 0 in float32, and so the textbook's loss infinite."""
    z, v = torch.tensor([[120.0, 0, 1, 2]]), torch.tensor([[3.0, 1, 0, 2]])
    options = {"temperature": 1.0, "backend": backend.name}
    loss, grad = gradient(dkd_loss, z, v, torch.tensor([0]), **options)
    assert abs(loss.item() - 42.4594) < 1e-4
    expected = torch.tensor([[0.3561, -1.2696, 1.1504, -0.2369]])
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0}, {"beta": 0.0}, {"alpha": 3.0, "beta": 0.5}]
)
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_textbook(backend, options, T):
    dtype = backend.finest
    z, v = pair(6, 50, dtype=dtype)
    y = some_labels(6, 50)
    actual = gradient(dkd_loss, z, v, y, temperature=T, reduction="none", **options,
                      backend=backend.name)  # fmt: skip
    expected = gradient(textbook, z.double(), v.double(), y, T, **options)
    eps = 1e-7 if backend.float64 else 1e-5
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.to(dtype), rtol=eps, atol=eps)


def test_decomposition(backend):
    """KL = target + (1 - p_y) nontarget, and its gradient."""
    z, v = pair(5, 2000, dtype=backend.finest)
    y = v.argmax(-1)
    one = {"temperature": 2.0, "reduction": "none", "backend": backend.name}
    out = dkd_loss(z, v, y, return_terms=True, **one)
    rest = 1 - (v / 2).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    torch.testing.assert_close(out.target + rest * out.nontarget, kd_loss(z, v, **one))


@pytest.mark.parametrize("V", [1, 2, 3, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_kind": "probs"},
        {"top_k": 3},
        {"teacher_kind": "probs", "bottom_percentile": 30.0},
        {"bottom_percentile": 60.0, "hard_weight": 0.7},
        {"top_k": 1, "hard_weight": 1.0, "teacher_temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_definition(backend, V, options, dtype):
    """Labels in the first, the last and a middle column; the reference is float64."""
    z, v = pair(4, V, dtype=dtype)
    y = torch.tensor([0, V - 1, V // 2, (V - 1) // 1024 * 1024])
    if options.get("teacher_kind") == "probs":
        v = v.float().softmax(-1).to(dtype)
    backend.need(dtype)
    results = []
    for s, t, name in ((z, v, backend.name), (z.double(), v.double(), "reference")):
        student = s.clone().requires_grad_()
        out = dkd_loss(student, t, y, temperature=2.0, return_terms=True, reduction="none",
                       backend=name, **options)  # fmt: skip
        out.loss.sum().backward()
        results.append((*out, student))
    (*actual, student), (*expected, exact) = results
    bounds = DecoupledAllowance(z, v, y, {"temperature": 2.0, **options})
    rows = bounds.rows()
    weights = {"target": 1.0, "nontarget": 8.0, "hard": options.get("hard_weight", 0.0)}
    rows["loss"] = sum(weight * rows[name] for name, weight in weights.items())
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    for name, a, e in zip(("loss", "target", "nontarget", "hard"), actual, expected, strict=True):
        assert_close(a, e, stored, rows[name] + 8 * bounds.eps * e.abs(), what=name)
    assert_close(student.grad, exact.grad, dtype, bounds.gradient(), what="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges(backend, dtype):
    """Where a side is without the label, without all the others, without both, or not a number."""
    backend.need(dtype)
    z = normal(9, 40, dtype=dtype)
    v = normal(9, 40, seed=1, dtype=dtype)
    y = torch.arange(9) * 4
    others = ~F.one_hot(y, 40).bool()
    v[0, 0] = z[1, 4] = v[2, 8] = z[2, 8] = -INF
    v[3, others[3]] = -INF
    z[4, others[4]] = -INF
    z[5, others[5]] = v[5, others[5]] = -INF
    z[6, y[6] + 1] = v[7, y[7]] = NAN
    z[8, ::4] = v[8, ::2] = -INF
    y[8] = 1
    for options in ({}, {"top_k": 1}, {"top_k": 20, "hard_weight": 1.0}, {"alpha": 0.0}):
        rows = []
        for name in (backend.name, "reference"):
            s = z.clone().requires_grad_()
            out = dkd_loss(s, v, y, backend=name, reduction="none", return_terms=True, **options)
            out.loss.sum().backward()
            rows.append((*out, s.grad))
        for a, e in zip(*rows, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6, equal_nan=True)
    loss = dkd_loss(z, v, y, backend=backend.name, reduction="none", return_terms=True)
    assert loss.nontarget[3] == 0 and loss.nontarget[4] == INF and loss.loss[5] == 0
    assert loss.loss[6:8].isnan().all() and loss.loss[[0, 2, 3, 8]].isfinite().all()


def test_at_a_match_there_is_nothing_to_learn(backend):
    z = normal(3, 3001)
    loss, grad = gradient(dkd_loss, z, z, some_labels(3, 3001), backend=backend.name)
    assert loss == 0 and (grad == 0).all()


def test_ignored_rows_inplace_and_reductions(backend):
    z, v = pair(6, 300)
    y = some_labels(6, 300, ignored=(1, 4))
    z[1], v[4] = NAN, NAN
    rows = dkd_loss(z, v, y, reduction="none", backend=backend.name)
    assert (rows[[1, 4]] == 0).all()
    torch.testing.assert_close(dkd_loss(z, v, y, backend=backend.name), rows.sum() / 4)
    _, expected = gradient(dkd_loss, z, v, y, backend=backend.name)
    assert (expected[[1, 4]] == 0).all() and expected.sum(-1).abs().max() < 1e-5
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    logits.retain_grad()
    dkd_loss(logits, v, y, backend=backend.name, inplace=True).backward()
    assert torch.equal(logits.grad, expected)


def test_weights_that_are_all_0(backend):
    z, v = pair(3, 40)
    v[0, 3] = -INF
    options = {"alpha": 0.0, "beta": 0.0, "backend": backend.name}
    loss, grad = gradient(dkd_loss, z, v, some_labels(3, 40), **options)
    assert loss == 0 and (grad == 0).all()


def test_half_precision_does_not_underflow(backend):
    z, v = pair(2, 5003, dtype=torch.float16)
    y = some_labels(2, 5003)

    def loss(student, *inputs, **options):  # as with gradient scaling
        return 65536 * dkd_loss(student, *inputs, num_items=4096.0, **options)

    _, grad = gradient(loss, z, v, y, backend=backend.name)
    _, exact = gradient(loss, z.double(), v.double(), y, backend="reference")
    assert (grad.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"bottom_percentile": 50.0}], ids=str)
def test_probabilities(backend, beta, options):
    """P^(1/T) / sum, whatever P sums to; zeros stay zero; log-probabilities are logits."""
    z, v = pair(4, 1500, dtype=torch.float64)
    probs = v.softmax(-1) * torch.tensor([[1.0], [0.3], [7.0], [1e-30]])
    if beta != 1:
        probs[0, 3:] = 0
    options = {**options, "temperature": 3.0, "beta": beta, "backend": backend.name}
    expected = gradient(kd_loss, z, probs.log(), **{**options, "backend": "reference"})
    if backend.float64:
        actual = gradient(kd_loss, z, probs, teacher_kind="probs", **options)
        torch.testing.assert_close(actual, expected)
    singles = gradient(kd_loss, z.float(), probs.float(), teacher_kind="probs", **options)
    torch.testing.assert_close(singles[0], expected[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(singles[1], expected[1].float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logarithms_of_probabilities(backend, dtype):
    """Read back by one class against another: from subnormal numbers to the largest."""
    backend.need(dtype)
    P = torch.tensor([5e-324, 1e-310, 1e-40, 1.2e-38, 1e-20, 0.1, 0.7, 0.99, 1.0, 3.0, 1e30])
    P = P.to(dtype)
    P = P[(P > 0) & P.isfinite()]
    rows = torch.stack((P, torch.ones_like(P)), -1)
    z = torch.zeros_like(rows)
    T = 50.0
    options = {"temperature": T, "reduction": "sum", "teacher_kind": "probs"}
    grad = gradient(kd_loss, z.double(), rows.double(), backend="reference", **options)[1]
    got = gradient(kd_loss, z.to(torch.float32 if dtype != torch.float64 else dtype), rows,
                   backend=backend.name, **options)[1]  # fmt: skip
    expected = T * (0.5 - torch.sigmoid(P.double().log() / T))
    torch.testing.assert_close(grad[:, 0], expected)
    torch.testing.assert_close(got[:, 0].double(), expected, rtol=1e-6, atol=T * 1e-7)


@pytest.mark.parametrize("bad", [-0.1, NAN, INF])
def test_what_is_no_probability_spoils_its_row_only(backend, bad):
    z, probs = normal(3, 20), normal(3, 20, seed=1).softmax(-1)
    probs[1, 7] = bad
    loss = kd_loss(z, probs, teacher_kind="probs", reduction="none", backend=backend.name)
    assert loss[1].isnan() and loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, ValueError, "needs labels"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
        ({"hard_weight": "1"}, TypeError, "hard_weight must be a number"),
        ({"teacher_kind": "odds"}, ValueError, "teacher_kind must be one of logits, probs"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"labels": torch.tensor([0, 20])}, ValueError, r"labels must lie in \[0, 20\)"),
    ],
    ids=str,
)
def test_arguments(change, error, message):
    options = {"labels": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message):
        dkd_loss(normal(2, 20), normal(2, 20), **options)


def test_module():
    module = DKDLoss(beta=2.0)
    z, v = pair(3, 20)
    y = some_labels(3, 20)
    assert torch.equal(module(z, v, labels=y, alpha=0.5), dkd_loss(z, v, y, beta=2.0, alpha=0.5))
    assert "beta=2.0" in repr(module)
    with pytest.raises(TypeError, match="DKDLoss got gamma"):
        DKDLoss(gamma=1)
