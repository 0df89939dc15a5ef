"""A student with more classes than its teacher: the soft term is cut to the vocab_size classes that
they share, the hard term is F.cross_entropy over all that the student has.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lib.backends import BETAS, DTYPES
from lib.bounds import INF, NAN, Allowance, DecoupledAllowance, SparseAllowance, assert_close
from lib.compare import check, run
from lib.logits import normal, some_labels
from torch import Tensor

import fastkd
from fastkd.kernels import choose_backend
from fastkd.spec import FORWARD

# Classes that are shared, and of the student: without a whole vector, around a tile and a chunk,
# and most of the row beyond them.
SIZES = ((1, 2), (9, 12), (1023, 1031), (1024, 1025), (40, 2101), (1100, 3301))
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def pair(N: int, shared: int, own: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a student of `own` classes, and of a teacher of whom it is close in the shared."""
    teacher = normal(N, shared, dtype=torch.float64)
    student = normal(N, own, seed=1, dtype=torch.float64)
    student[:, :shared] = teacher + student[:, :shared] / 3
    return student.to(dtype), teacher.to(dtype)


def labels_of(N: int, shared: int, own: int, ignored: tuple[int, ...] = ()) -> Tensor:
    """On both sides of `shared`, and at both its edges."""
    labels = torch.tensor([shared - 1, shared, own - 1, 0, (shared + own) // 2])[
        torch.arange(N) % 5
    ]
    labels[list(ignored)] = -100
    return labels


def textbook(z: Tensor, v: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    """What a user would write, per row."""
    shared = v.shape[-1]
    q, p = (z[:, :shared] / T).log_softmax(-1), (v / T).log_softmax(-1)
    soft = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T", [1.0, 2.0, 1.5])
def test_definition(alpha, T):
    for shared, own in SIZES:
        z, v = pair(5, shared, own, torch.float64)
        y = labels_of(5, shared, own)
        z.requires_grad_()
        expected = textbook(z, v, y, T, alpha)
        (slope,) = torch.autograd.grad(expected.sum(), z)
        options = {"temperature": T, "alpha": alpha, "vocab_size": shared, "reduction": "none"}
        actual = run("reference", z, v, y, **options)
        torch.testing.assert_close(actual.loss, expected.detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(actual.gradient, slope, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_textbook(kernel, shape, inplace):
    """Soft and hard, and hard alone, at the temperatures whose exponentials both terms may share
    and at another; with rows that are ignored and that weigh nothing."""
    shared, own = shape
    y = labels_of(7, shared, own, ignored=(3,))
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 0.0, 3.0])
    counting = torch.tensor([0, 1, 2, 4, 6])
    for dtype, (T, alpha) in itertools.product(
        (torch.float32,) if kernel.interpreted else NARROW,
        ((1.0, 0.6), (2.0, 0.6), (4.0, 0.9), (1.3, 0.6), (2.0, 0.0)),
    ):
        z, v = pair(7, shared, own, dtype)
        exact = z[counting].double().requires_grad_()
        expected = textbook(exact, v[counting].double(), y[counting], T, alpha)
        expected = expected * weights[counting]
        (slope,) = torch.autograd.grad(expected.sum(), exact)
        z[3], v[3], z[5] = NAN, NAN, INF
        options = {"temperature": T, "alpha": alpha, "vocab_size": shared, "reduction": "none",
                   "token_weights": weights}  # fmt: skip
        actual = run(kernel, z, v, y, inplace=inplace, **options)
        assert (actual.gradient[[3, 5]] == 0).all() and (actual.loss[[3, 5]] == 0).all()
        options["token_weights"] = weights[counting]
        bounds = Allowance(z[counting], v[counting], y[counting], options)
        rows = bounds.rows(expected.detach(), expected.detach())
        bound = alpha * rows[0] + (1 - alpha) * rows[1] + 8 * bounds.eps * expected.detach().abs()
        assert_close(actual.loss[counting], expected.detach(), torch.float32, bound, what="loss")
        assert_close(actual.gradient[counting], slope, dtype, bounds.gradient(), spacings=2,
                     what="gradient")  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"temperature": 2.0}, {"alpha": 1.0}], ids=str
)
def test_every_divergence(kernel, beta, options):
    """Also where the hard term weighs nothing and is only reported."""
    for shared, own in ((9, 12), (1100, 3301)):
        for dtype in DTYPES if kernel.float64 else (torch.float32, torch.float16):
            z, v = pair(5, shared, own, dtype)
            y = labels_of(5, shared, own, ignored=(3,))
            given = {"alpha": 0.5, "beta": beta, "vocab_size": shared, **options}
            result = check(kernel, z, v, y, **given)
            hard = F.cross_entropy(z.double(), y)
            assert abs(result.hard - hard) < 1e-5 * (1 + hard)
            if given["alpha"] == 1:
                assert (result.gradient[:, shared:] == 0).all()
            else:
                assert (result.gradient[y != -100, shared:] != 0).any(-1).all()


TAILS = {
    "far above": lambda tail: tail + 300,
    "far below": lambda tail: tail - 300,
    "-inf but one": lambda tail: tail.where(torch.arange(tail.shape[-1]) == 1, -INF),
    "-inf": lambda tail: torch.full_like(tail, -INF),
    "NaN": lambda tail: tail.where(torch.arange(tail.shape[-1]) != 2, NAN),
    "+inf": lambda tail: tail.where(torch.arange(tail.shape[-1]) != 2, INF),
}


@pytest.mark.parametrize("T", [1.0, 2.0, 1.3])
@pytest.mark.parametrize("tail", TAILS)
def test_what_lies_beyond(kernel, tail, T):
    """One row among others is sliced; its label lies in the slice and outside."""
    for (shared, own), beta in itertools.product(((9, 12), (1100, 2301)), (0.0, 0.5)):
        z, v = pair(5, shared, own)
        y = labels_of(5, shared, own)
        for r in (1, 3):
            z[r, shared:] = TAILS[tail](z[r, shared:])
        options = {"temperature": T, "beta": beta, "alpha": 0.5, "vocab_size": shared}
        result = check(kernel, z, v, y, reduction="none", **options)
        assert result.soft.isfinite().all()
        hard = F.cross_entropy(z.double(), y, reduction="none")
        torch.testing.assert_close(result.hard.double(), hard, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert result.gradient[[0, 2, 4]].isfinite().all()
        if tail == "NaN" or tail == "+inf":
            assert result.hard[[1, 3]].isnan().all() and result.gradient[[1, 3]].isnan().all()
        else:
            assert result.gradient.isfinite().all()
            assert (result.gradient[1, shared:][z[1, shared:] == -INF] <= 0).all()
        # Without a hard term nothing of it is seen, and where it weighs nothing, only in itself.
        soft = run(kernel, z, v, y, **{**options, "alpha": 1.0})
        assert soft.loss.isfinite() and soft.gradient.isfinite().all()
        check(kernel, z, v, y, **{**options, "alpha": 1.0})


@pytest.mark.parametrize("T", [1.0, 1.3])
def test_nothing_but_what_lies_beyond(kernel, T):
    """No shared class has a finite logit: no soft term, and a hard one."""
    for shared, own in ((9, 12), (1100, 2301)):
        z, v = pair(5, shared, own)
        z[1, :shared], z[2], z[4] = -INF, -INF, z[4] - 500
        z[4, :shared] = -INF
        y = torch.full((5,), shared + 1)
        options = {"temperature": T, "vocab_size": shared, "reduction": "none"}
        for alpha in (0.0, 0.5):
            result = check(kernel, z, v, y, alpha=alpha, **options)
            hard = F.cross_entropy(z.double(), y, reduction="none")
            torch.testing.assert_close(
                result.hard.double(), hard, rtol=1e-5, atol=1e-5, equal_nan=True
            )
            assert result.soft[[1, 2, 4]].isnan().all()
            assert result.gradient[[1, 4], shared:].isfinite().all()


def test_first_tile_of_nothing(kernel):
    """What is found there of the maximum is -inf."""
    z, v = pair(3, 20000 if not kernel.slow else 9000, 20100)
    z[:, :8500] = -INF
    check(kernel, z, v, labels_of(3, *(x.shape[-1] for x in (v, z))), beta=0.5, alpha=0.5,
          vocab_size=v.shape[-1])  # fmt: skip


@pytest.mark.parametrize("T", [1500.0, math.inf])
def test_at_large_temperatures(kernel, T):
    for shared, own in ((9, 12), (1100, 2301)):
        for beta in (0.0, 0.5):
            z, v = pair(5, shared, own)
            y = labels_of(5, shared, own)
            y[4] = -100
            options = {"temperature": T, "beta": beta, "alpha": 0.5, "vocab_size": shared}
            actual = run(kernel, z, v, y, reduction="none", return_terms=True, **options)
            given = {"alpha": 0.0, "vocab_size": shared, "reduction": "none"}
            bounds = Allowance(z, v, y, given)
            hard = F.cross_entropy(z.double(), y, reduction="none")
            assert_close(actual.hard, hard, z.dtype, bounds.rows(hard, hard)[1], what="hard")
            exact = run("reference", z.double(), v.double(), y, reduction="none", **options)
            assert_close(actual.gradient[:, shared:], exact.gradient[:, shared:], z.dtype,
                         bounds.gradient()[:, shared:], what="beyond")  # fmt: skip
            torch.testing.assert_close(
                actual.gradient.double(), exact.gradient, rtol=1e-4, atol=1e-6
            )
            z[1, shared] = NAN
            spoilt = run(kernel, z, v, y, reduction="none", return_terms=True, **options)
            torch.testing.assert_close(spoilt.soft, actual.soft)
            assert spoilt.hard[1].isnan()
            assert spoilt.gradient[1].isnan().all()
            assert torch.equal(spoilt.gradient[[0, 2, 3, 4]], actual.gradient[[0, 2, 3, 4]])


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_strided_rows(kernel, inplace):
    """Rows that begin anywhere in a vector and are not contiguous."""
    for dtype in (torch.float32, torch.bfloat16):
        for shared, own in ((9, 12), (1100, 2301)):
            z, v = pair(6, shared, own, dtype)
            apart = torch.zeros(2, 4, own + 3, dtype=dtype)[:, :-1, 2:-1]
            apart.copy_(z.view(2, 3, own))
            y = labels_of(6, shared, own, ignored=(2,)).view(2, 3)
            v = F.pad(v, (0, 5), value=NAN).view(2, 3, -1)
            check(kernel, apart, v, y, alpha=0.5, vocab_size=shared, inplace=inplace,
                  temperature=2.0)  # fmt: skip


def test_a_label_that_only_masks(kernel):
    """A class that the teacher lacks is a label as any other where there is no hard term."""
    z, v = pair(5, 9, 12)
    y = labels_of(5, 9, 12, ignored=(3,))
    masked = torch.where(y < 0, y, 0)
    for options in ({}, {"beta": 0.5}, {"top_k": 3}):
        actual = check(kernel, z, v, y, vocab_size=9, **options)
        only = run(kernel, z, v, y, vocab_size=9, **options)
        expected = run(kernel, z, v, masked, vocab_size=9, **options)
        assert torch.equal(only.loss, expected.loss)
        assert torch.equal(only.gradient, expected.gradient)
        torch.testing.assert_close(actual.loss, only.loss)
        assert (only.gradient[:, 9:] == 0).all()


@pytest.mark.parametrize("decoupled", [False, True], ids=["", "decoupled"])
@pytest.mark.parametrize("hard_weight", [None, 0.0, 0.5])
def test_labels_that_the_host_has_not_checked(kernel, hard_weight, decoupled):
    """As on a GPU: one that is no class makes its row NaN; beyond vocab_size, where only the hard
    term has a gradient, not without that."""
    if kernel.device != "cpu":
        pytest.skip("the op is called with tensors of the host")
    shared, own = 9, 12
    z, v = pair(5, shared, own)
    y = torch.tensor([shared, own - 1, own, -1, 3])
    good = torch.tensor([4] if decoupled else [0, 1, 4])
    bad = torch.tensor([0, 1, 2, 3] if decoupled else [2, 3])
    one = torch.ones(5)
    gradient, target = torch.full((1, 5, own), 7.0), torch.empty(5)
    weight = None if hard_weight is None else one * hard_weight
    given = (one, target) if decoupled else ()
    op = choose_backend(kernel.name, z.device, z.dtype).dense_rows
    soft, hard = op(
        z[None], v[None], y, one, one, one, weight, gradient, None, shared, FORWARD, None, *given
    )
    gradient = gradient[0]
    assert soft[bad].isnan().all() and gradient[bad, :shared].isnan().all()
    assert soft[good].isfinite().all() and gradient[good].isfinite().all()
    if decoupled:
        assert target[bad].isnan().all() and target[good].isfinite().all()
    if hard_weight is not None:
        assert hard[bad].isnan().all() and hard[good].isfinite().all()
    if hard_weight:
        assert gradient[bad, shared:].isnan().all()
    else:
        assert (gradient[:, shared:] == 0).all()


def gradient_of(loss, student: Tensor, *inputs, **options):
    student = student.detach().clone().requires_grad_()
    out = loss(student * 1, *inputs, return_terms=True, reduction="none", **options)
    out.loss.sum().backward()
    return [x if x is None else x.detach() for x in out], student.grad


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_decoupled(kernel, inplace):
    for shared, own in ((9, 12), (1100, 2301)):
        for dtype in DTYPES if kernel.float64 else (torch.float32, torch.bfloat16):
            z, v = pair(5, shared, own, dtype)
            y = some_labels(5, shared)
            y[1] = shared - 1
            z[2, shared:], z[3, shared + 1] = z[2, shared:] + 50, -INF
            options = {"temperature": 2.0, "hard_weight": 0.7, "vocab_size": shared}
            actual, slope = gradient_of(
                fastkd.dkd_loss, z, v, y, backend=kernel.name, inplace=inplace, **options
            )
            expected, exact = gradient_of(
                fastkd.dkd_loss, z.double(), v.double(), y, backend="reference", **options
            )
            hard = F.cross_entropy(z.double(), y, reduction="none")
            torch.testing.assert_close(expected[3], hard)
            bounds = DecoupledAllowance(z, v, y, options)
            stored = torch.float64 if dtype == torch.float64 else torch.float32
            bound = bounds.rows()["hard"] + 8 * bounds.eps * hard
            assert_close(actual[3], expected[3], stored, bound, what="hard")
            assert_close(slope, exact, dtype, bounds.gradient(), spacings=2, what="gradient")
            z[1, shared] = NAN
            spoilt, slope = gradient_of(
                fastkd.dkd_loss, z, v, y, backend=kernel.name, inplace=inplace, **options
            )
            assert spoilt[3][1].isnan() and slope[1].isnan().all()
            for term, before in zip(spoilt[1:3], actual[1:3], strict=True):
                torch.testing.assert_close(term, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outside", ["bucket", "restrict", "renormalize"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_sparse(kernel, outside, inplace):
    for shared, own in ((9, 12), (1100, 2301)):
        for dtype in DTYPES if kernel.float64 else (torch.float32, torch.bfloat16):
            z, v = pair(6, shared, own, dtype)
            y = labels_of(6, shared, own)
            z[1, shared:], z[4, shared:] = -INF, z[4, shared:] + 300
            z[1, shared] = 0
            ids, log_probs = fastkd.topk_teacher(v, 4)
            T = torch.tensor([1.0, 2.0, 0.5, 4.0, 3.0, 1.0])
            for alpha in (0.0, 0.6):
                options = {"outside": outside, "temperature": T, "alpha": alpha,
                           "vocab_size": shared}  # fmt: skip
                actual, slope = gradient_of(
                    fastkd.topk_kd_loss, z, ids, log_probs, y,
                    backend=kernel.name, inplace=inplace, **options,
                )  # fmt: skip
                expected, exact = gradient_of(
                    fastkd.topk_kd_loss, z.double(), ids, log_probs.double(), y,
                    backend="reference", **options,
                )  # fmt: skip
                hard = F.cross_entropy(z.double(), y, reduction="none")
                torch.testing.assert_close(expected[2], hard)
                bounds = SparseAllowance(z, ids, log_probs, y, outside, options)
                stored = torch.float64 if dtype == torch.float64 else torch.float32
                rows = bounds.rows(expected[1], expected[2])
                for a, e, bound in zip(actual[1:], expected[1:], rows, strict=True):
                    assert_close(a, e, stored, bound)
                assert_close(slope, exact, dtype, bounds.gradient(), spacings=2, what="gradient")
            z[2, shared] = NAN
            spoilt, slope = gradient_of(fastkd.topk_kd_loss, z, ids, log_probs, y,
                                        backend=kernel.name, **options)  # fmt: skip
            torch.testing.assert_close(spoilt[1], actual[1])
            assert spoilt[2][2].isnan()
            assert slope[2].isnan().all() and slope[[0, 1, 3, 4, 5]].isfinite().all()
            soft, slope = gradient_of(fastkd.topk_kd_loss, z, ids, log_probs, outside=outside,
                                      vocab_size=shared, backend=kernel.name)  # fmt: skip
            assert soft[0].isfinite().all() and (slope[:, shared:] == 0).all()


def test_sparse_with_no_shared_class_left(kernel):
    """All its mass lies beyond vocab_size, far below 0."""
    z, v = pair(2, 9, 12)
    z[0, :9], z[0, 9:] = -INF, z[0, 9:] - 1000
    y = torch.tensor([10, 10])
    given = fastkd.topk_teacher(v, 4)
    for outside in ("bucket", "restrict", "renormalize"):
        actual, slope = gradient_of(fastkd.topk_kd_loss, z, *given, y, outside=outside, alpha=0.0,
                                    vocab_size=9, backend=kernel.name)  # fmt: skip
        hard = F.cross_entropy(z.double(), y, reduction="none")
        torch.testing.assert_close(actual[2].double(), hard, rtol=1e-5, atol=1e-5)
        assert slope.isfinite().all() and (slope[0, :9] == 0).all()


def test_a_label_that_is_no_class():
    z, v = pair(3, 9, 12)
    ids, log_probs = fastkd.topk_teacher(v, 4)
    for bad in (12, -1):
        y = torch.tensor([9, bad, 2])
        for call in (
            lambda y: fastkd.kd_loss(z, v, y, vocab_size=9),
            lambda y: fastkd.topk_kd_loss(z, ids, log_probs, y, vocab_size=9),
        ):
            with pytest.raises(ValueError, match=rf"labels must lie in \[0, 12\) .* got {bad}"):
                call(y)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\) .* got 9"):
        fastkd.dkd_loss(z, v, torch.tensor([1, 9, 2]), vocab_size=9)
