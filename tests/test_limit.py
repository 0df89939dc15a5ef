"""T = infinity: half the variance of the logits' difference, and what the loss goes to there."""

import math

import pytest
import torch
from bounds import INF, assert_close
from conftest import normal, pair, run
from torch import Tensor

import fastkd
from fastkd import ops

BETAS = {0.0: 1.0, 1.0: 1.0, 0.5: 0.25, 0.3: 0.21}  # and c, the curvature beside that of KL


@pytest.fixture
def backend(kernel):
    return kernel


def gradient(backend, student: Tensor, teacher: Tensor, labels=None, **options):
    """Loss and gradient, per row unless the options say otherwise."""
    options = {"temperature": INF, "reduction": "none"} | options
    result = run(backend, student, teacher, labels, **options)
    return result.loss, result.gradient


def closed_form(z: Tensor, v: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and what rounding each difference of logits leaves open in it, in float64."""
    z, v = z.double(), v.double()
    d = z - v
    d = d - d.mean(-1, keepdim=True)
    size = (z.abs() + v.abs()).amax(-1)
    return c * d.square().mean(-1) / 2, c * d / z.shape[-1], size


@pytest.mark.parametrize("V", [1, 2, 33, 1024, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_closed_form(backend, V, dtype, beta):
    backend.need(dtype)
    z, v = pair(5, V, dtype=dtype)
    value, grad = gradient(backend, z, v, beta=beta)
    expected, dz, size = closed_form(z, v, BETAS[beta])
    eps = torch.finfo(value.dtype).eps
    # d is off by eps times the logits' size, half the mean of d^2 by that times |d|.
    spread = (2 * expected).sqrt()
    assert_close(
        value, expected, value.dtype, 8 * eps * (size * spread + expected) + (eps * size) ** 2
    )
    bound = 8 * eps * size.unsqueeze(-1) / V * BETAS[beta]
    assert_close(grad, dz, dtype, bound.expand_as(dz))


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_goes_there(backend, beta):
    """By 2.3 / T for these logits: smoothly, whichever T it is asked at.

    p and q are off by 2 eps each, of the exponential, and by the roundings of their logarithms,
    some log V: by so many T eps of the logits' differences, which q - p is made of.
    """
    z, v = pair(4, 257, dtype=backend.finest)
    limit, dlimit = gradient(backend, z, v, beta=beta)
    for T in (1e2, 1e3, 1e4, 1e5):
        value, grad = gradient(backend, z, v, beta=beta, temperature=T)
        bound = 10 / T + (4 + 2 * math.log(257)) * torch.finfo(value.dtype).eps * T
        assert ((value - limit) / limit).abs().max() < bound
        assert (grad - dlimit).norm() < bound * dlimit.norm()


@pytest.mark.parametrize("options", [{"top_k": 7}, {"bottom_percentile": 20}, {"vocab_size": 90}])
def test_as_on_the_gathered_classes(backend, options):
    z, v = pair(6, 100)
    value, grad = gradient(backend, z, v, **options)
    for r in range(6):
        keep = {"top_k": 7, "bottom_percentile": 80, "vocab_size": 90}[next(iter(options))]
        kept = torch.arange(90) if "vocab_size" in options else v[r].topk(keep).indices
        alone, dalone = gradient(backend, z[r : r + 1, kept], v[r : r + 1, kept])
        torch.testing.assert_close(value[r : r + 1], alone, rtol=1e-6, atol=0)
        expected = torch.zeros(100).scatter(0, kept, dalone[0])
        torch.testing.assert_close(grad[r], expected, rtol=1e-5, atol=1e-8)
        assert (grad[r] == 0).sum() == 100 - keep


def test_edges(backend):
    z, v = pair(8, 40)
    z[0, 3] = v[0, 3] = -INF  # no class
    z[1, 3] = -INF
    v[2, 3] = -INF
    z[3, 3] = math.nan
    v[4, 3] = math.nan
    z[5] = v[5] = -INF
    z[6, 3] = INF
    z[7] = v[7] + 2.5  # a constant
    value, grad = gradient(backend, z, v)
    others = [i for i in range(40) if i != 3]
    alone, dalone = gradient(backend, z[:1, others], v[:1, others])
    torch.testing.assert_close(value[:1], alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[:1, others], dalone, rtol=1e-5, atol=1e-8)
    assert grad[0, 3] == 0
    assert value[1] == value[2] == INF
    assert value[3:7].isnan().all()
    assert grad[1:7].isnan().all()
    assert 0 <= value[7] < 1e-11
    assert grad[7].abs().max() < 1e-7


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"beta": 0.5, "vocab_size": 35}])
def test_one_class_of_every_kind(backend, options):
    kinds = torch.tensor([-INF, INF, math.nan, 1.5, -2.0])
    z, v = pair(len(kinds) ** 2, 40)
    z[:, 3], v[:, 3] = torch.cartesian_prod(kinds, kinds).T
    value, grad = gradient(backend, z, v, **options)
    expected, dz = gradient("reference", z, v, **options)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, dz, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_beside_the_other_options(backend):
    """Labels, weights, the hard term, both reductions and a gradient scaled later."""
    z, v = pair(6, 50)
    labels = torch.tensor([3, -100, 7, 49, 0, 1])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
    options = {"alpha": 0.3, "token_weights": weights, "reduction": "batchmean"}
    value, grad = gradient(backend, z, v, labels, **options)
    d = (z - v).double()
    soft = d.var(-1, correction=0) / 2
    hard = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    counting = labels != -100
    expected = (weights * counting * (0.3 * soft + 0.7 * hard)).sum() / counting.sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert (grad[1:3] == 0).all()
    assert (grad[[0, 3, 4, 5]] != 0).all()


@pytest.mark.parametrize("options", [(300, 0.0), (40, 0.3), (280, 1.0)])
def test_rows_at_the_limit_beside_others(backend, options):
    """In one call of the op, and the gradient over the student."""
    z, v = pair(5, 300)
    inverse = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0])
    soft_weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0])
    hard_weight = torch.tensor([0.5, 0.0, 1.0, 1.0, 0.0])
    labels = torch.tensor([0, 290, 7, 150, 300])
    keep, beta = options
    results = []
    for name, device in ((backend.name, backend.device), ("reference", "cpu")):
        op = ops.choose_backend(name, torch.device(device), torch.float32).kd_rows
        rows, *vectors = (
            x.to(device, copy=True) for x in (z, v, labels, inverse, soft_weight, hard_weight)
        )
        t, y, T, soft, hard = vectors
        terms = op(rows, t, y, T, T, soft, hard, rows, keep, 300, beta)
        results.append([x.cpu() for x in (*terms, rows)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert (results[0][-1][4] == 0).all()


def test_float16_gradient_keeps_its_digits(backend):
    """It is stored scaled: backward's rounding to float16, near its end, is the only coarse one."""
    z, v = pair(64, 2000, dtype=torch.float16)
    _, grad = gradient(backend, z, v, reduction="batchmean")
    _, dz, size = closed_form(z, v, 1.0)
    bound = 8 * torch.finfo(torch.float32).eps * size.unsqueeze(-1) / (2000 * 64)
    assert_close(grad, dz / 64, torch.float16, bound.expand_as(dz), roundings=2)


@pytest.mark.parametrize("probs", [False, True])
def test_teachers_probabilities(backend, probs):
    z, v = pair(4, 60)
    teacher = v.softmax(-1) if probs else v
    kind = "probs" if probs else "logits"
    value, _ = gradient(backend, z, teacher, teacher_kind=kind)
    torch.testing.assert_close(value.double(), closed_form(z, v, 1.0)[0], rtol=1e-5, atol=0)


def test_infinite_on_both_sides(backend):
    z, v = pair(2, 10)
    one, two = ({"temperature": INF}, {"temperature": INF, "teacher_temperature": INF})
    assert torch.equal(gradient(backend, z, v, **one)[1], gradient(backend, z, v, **two)[1])


def test_only_kd_loss_has_the_limit():
    z, v = pair(2, 10)
    labels = torch.tensor([0, 1])
    ids, log_probs = fastkd.topk_teacher(v, 3)
    for call in (
        lambda: fastkd.dkd_loss(z, v, labels, temperature=INF),
        lambda: fastkd.topk_kd_loss(z, ids, log_probs, temperature=INF),
        lambda: fastkd.kd_loss(z, v, temperature=torch.full((2,), INF)),
    ):
        with pytest.raises(ValueError, match="temperature must be finite"):
            call()


def test_auto_finds_a_backend_and_compiles():
    z, v = normal(3, 20), normal(3, 20, seed=1)
    compiled = torch.compile(fastkd.kd_loss, fullgraph=True)
    torch.testing.assert_close(
        compiled(z, v, temperature=INF), fastkd.kd_loss(z, v, temperature=INF)
    )
