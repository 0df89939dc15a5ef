"""T = infinity: half the variance of the logits' difference; and T from 1000 on, on the way there,
where kernels read rows as they do at infinity (csrc/cuda/flat.h, flat.py)."""

import math
from typing import NamedTuple

import pytest
import torch
from lib.backends import Backend
from lib.bounds import INF, assert_close
from lib.compare import run
from lib.logits import normal, pair
from torch import Tensor

import fastkd
from fastkd import kernels
from fastkd.spec import FORWARD, MIXTURE, REVERSE

REFERENCE = Backend("reference")
BETAS = {0.0: 1.0, 1.0: 1.0, 0.5: 0.25, 0.3: 0.21}  # and c, the curvature beside that of KL


@pytest.fixture
def backend(kernel):
    return kernel


def gradient(backend, student: Tensor, teacher: Tensor, labels=None, **options):
    """Loss and gradient, per row unless the options say otherwise."""
    options = {"temperature": INF, "reduction": "none"} | options
    result = run(backend, student, teacher, labels, **options)
    return result.loss, result.gradient


class Limit(NamedTuple):
    """In float64, and what arithmetic of some eps leaves open in it."""

    loss: Tensor  # [N]
    gradient: Tensor  # [N, V]
    loss_bound: Tensor
    gradient_bound: Tensor


def limit(z: Tensor, v: Tensor, beta: float = 0.0) -> Limit:
    """Over all classes; eps is that of float32, unless the logits are float64.

    d = z - v less its mean is off by eps times the logits' size, half the mean of d^2 by that times
    |d|; 8 is for the sum over a chunk's lanes, the mean and the products.
    """
    eps = torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps
    z, v = z.double(), v.double()
    d = z - v
    d = d - d.mean(-1, keepdim=True)
    size = (z.abs() + v.abs()).amax(-1)
    c, V = BETAS[beta], z.shape[-1]
    loss = c * d.square().mean(-1) / 2
    loss_bound = 8 * eps * (size * (2 * loss).sqrt() + loss) + (eps * size) ** 2
    gradient_bound = (8 * eps * c / V * size.unsqueeze(-1)).expand_as(d)
    return Limit(loss, c * d / V, loss_bound, gradient_bound)


@pytest.mark.parametrize("V", [1, 2, 33, 1024, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_closed_form(backend, V, dtype, beta):
    backend.need(dtype)
    z, v = pair(5, V, dtype=dtype)
    value, grad = gradient(backend, z, v, beta=beta)
    expected = limit(z, v, beta)
    assert_close(value, expected.loss, value.dtype, expected.loss_bound)
    assert_close(grad, expected.gradient, dtype, expected.gradient_bound)


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_goes_there(backend, beta):
    """By 2.3 / T for these logits: smoothly, whichever T it is asked at."""
    z, v = pair(4, 257, dtype=backend.finest)
    there, dthere = gradient(backend, z, v, beta=beta)
    for T in (1e2, 999.0, 1e3, 1e4, 1e5):
        value, grad = gradient(backend, z, v, beta=beta, temperature=T)
        bound = 10 / T + (direct(257, T, value.dtype) if T < 1000 else 0)
        assert ((value - there) / there).abs().max() < bound
        assert (grad - dthere).norm() < bound * dthere.norm()


def direct(V: int, T: float, dtype: torch.dtype = torch.float32) -> float:
    """What p and q formed apart leave open in q - p, of the logits' differences.

    Each is off by 2 eps, of the exponential, and by the roundings of its logarithms, some log V.
    """
    return (4 + 2 * math.log(V)) * torch.finfo(dtype).eps * T


@pytest.mark.parametrize("T", [1001.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
def test_nothing_is_lost_at_large_temperatures(backend, beta, dtype, T):
    """As at the limit: the roundings are those of the logits, not T times as many."""
    z, v = pair(5, 2003, dtype=dtype)
    v[1:3] = z[1:3] + (v[1:3] - z[1:3]) / 32  # closer
    value, grad = gradient(backend, z, v, beta=beta, temperature=T)
    exact, dexact = gradient(REFERENCE, z.double(), v.double(), beta=beta, temperature=T)
    bounds = limit(z, v, beta)
    assert_close(value, exact, value.dtype, bounds.loss_bound)
    # A float16 gradient is stored first, 8 times as large.
    roundings, spacings = (2, 1 + 1 / 8) if dtype == torch.float16 else (1, 1)
    assert_close(grad, dexact, dtype, bounds.gradient_bound, roundings=roundings, spacings=spacings)


@pytest.mark.parametrize("options", [{}, {"top_k": 25}, {"beta": 0.5}, {"beta": 1.0}])
def test_rows_that_are_not_flat_at_large_temperatures(backend, options):
    """Beside those that are: a logit as large as T, or on one side only, or none at all."""
    z, v = pair(8, 40)
    z[1:3] *= 200
    v[2:4] *= 200
    z[4, 3] = v[5, 3] = -INF
    z[6, 3] = math.nan
    z[7] = v[7] = -INF
    value, grad = gradient(backend, z, v, temperature=2000.0, **options)
    exact, dexact = gradient(REFERENCE, z.double(), v.double(), temperature=2000.0, **options)
    size = torch.stack((z, v)).nan_to_num(0, 0, 0).abs().amax((0, 2)).double()
    off = direct(40, 2000.0)
    # Where p and q are far apart, T^2 D has roundings of its own.
    own = direct(40, 1.0) * exact.nan_to_num(0, 0, 0)
    assert_close(value, exact, torch.float32, off * size + own)
    assert_close(grad, dexact, torch.float32, off)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"bottom_percentile": 20}, {"vocab_size": 90}])
def test_as_on_the_gathered_classes(backend, options):
    z, v = pair(6, 100)
    value, grad = gradient(backend, z, v, **options)
    for r in range(6):
        keep = {"top_k": 7, "bottom_percentile": 80, "vocab_size": 90}[next(iter(options))]
        kept = torch.arange(90) if "vocab_size" in options else v[r].topk(keep).indices
        alone = limit(z[r : r + 1, kept], v[r : r + 1, kept])
        assert_close(value[r : r + 1], alone.loss, torch.float32, alone.loss_bound)
        assert_close(grad[r : r + 1, kept], alone.gradient, torch.float32, alone.gradient_bound)
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
    alone = limit(z[:1, others], v[:1, others])
    assert_close(value[:1], alone.loss, torch.float32, alone.loss_bound)
    assert_close(grad[:1, others], alone.gradient, torch.float32, alone.gradient_bound)
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
    # The bounds of the finite logits, for as few classes as are kept.
    finite = limit(z.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0))
    fewest = 40 / (options.get("top_k", 35) - 1)
    assert_close(value, expected.double(), torch.float32, fewest * finite.loss_bound)
    assert_close(grad, dz.double(), torch.float32, fewest * finite.gradient_bound)


@pytest.mark.parametrize("T", [1e9, INF])  # the first is that near
def test_beside_the_other_options(backend, T):
    """Labels, weights, the hard term, both reductions and a gradient scaled later."""
    z, v = pair(6, 50)
    labels = torch.tensor([3, -100, 7, 49, 0, 1])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
    options = {"alpha": 0.3, "token_weights": weights, "reduction": "batchmean", "temperature": T}
    value, grad = gradient(backend, z, v, labels, **options)
    soft = limit(z, v)
    hard = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    counting = labels != -100
    mean = weights * counting / counting.sum()
    expected = (mean * (0.3 * soft.loss + 0.7 * hard)).sum()
    eps = torch.finfo(torch.float32).eps  # 20 for an exponential's share, and the logarithm of Z
    bound = (mean * (0.3 * soft.loss_bound + 0.7 * eps * (20 + math.log(50) + hard))).sum()
    assert_close(value, expected, torch.float32, bound)
    assert (grad[1:3] == 0).all()
    assert (grad[[0, 3, 4, 5]] != 0).all()


@pytest.mark.parametrize(
    "options", [(None, FORWARD, None), (40, MIXTURE, 0.3), (280, REVERSE, None)]
)
def test_rows_at_the_limit_beside_others(backend, options):
    """In one call of the op, and the gradient, large or small, over the student."""
    z, v = pair(8, 300)
    inverse = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 9e-4, 5e-4, 1e-6])
    soft_weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0, 1e6, 0.0, 1e12])
    hard_weight = torch.tensor([0.5, 0.0, 1.0, 1.0, 0.0, 1e5, 1e7, 0.0])
    labels = torch.tensor([0, 290, 7, 150, 300, 12, 299, 3])
    keep, divergence, beta = options
    results = []
    for name, device in ((backend.name, backend.device), ("reference", "cpu")):
        op = kernels.choose_backend(name, torch.device(device), torch.float32).dense_rows
        rows, *vectors = (
            x.to(device, copy=True) for x in (z, v, labels, inverse, soft_weight, hard_weight)
        )
        t, y, T, soft, hard = vectors
        kept = None if keep is None else torch.full((8,), keep, device=device)
        mixed = None if beta is None else torch.full((8,), beta, device=device)
        terms = op(rows, t, y, T, T, soft, hard, rows, kept, 300, divergence, mixed)
        results.append([x.cpu() for x in (*terms, rows)])
    # No row takes a neighbour's temperature or weight; how exact it is, is asked elsewhere.
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert (results[0][-1][4] == 0).all()


def test_float16_gradient_keeps_its_digits(backend):
    """It is stored scaled: backward's rounding to float16, near its end, is the only coarse one."""
    z, v = pair(64, 2000, dtype=torch.float16)
    _, grad = gradient(backend, z, v, reduction="batchmean")
    expected = limit(z, v)
    assert_close(grad, expected.gradient / 64, torch.float16, expected.gradient_bound / 64,
                 roundings=2)  # fmt: skip


@pytest.mark.parametrize("T", [1001.0, INF])
@pytest.mark.parametrize("probs", [False, True])
def test_teachers_probabilities(backend, probs, T):
    z, v = pair(4, 60)
    teacher = v.softmax(-1) if probs else v
    kind = "probs" if probs else "logits"
    value, grad = gradient(backend, z, teacher, teacher_kind=kind, temperature=T)
    v = v.double().log_softmax(-1)  # a logarithm is off by 1.2 eps of itself
    exact, dexact = gradient(REFERENCE, z.double(), v, temperature=T)
    bounds = limit(z, v)
    assert_close(value, exact, torch.float32, bounds.loss_bound)
    assert_close(grad, dexact, torch.float32, bounds.gradient_bound)


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
