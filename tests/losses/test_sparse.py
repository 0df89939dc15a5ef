"""topk_kd_loss and topk_teacher: against the dense loss, the formulas and the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from lib.bounds import INF, NAN, SparseAllowance, assert_close
from lib.logits import at_backend, normal, pair, some_labels
from torch import Tensor
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd import TopKKDLoss, losses, spec, topk_teacher
from fastkd.core import checks, chunks

kd_loss, topk_kd_loss = map(at_backend, (fastkd.kd_loss, fastkd.topk_kd_loss))
OUTSIDE = ("bucket", "restrict", "renormalize")
Z = torch.tensor([[1, 2, 0.5, -1, 3]]).double()
V = torch.tensor([[2, 1, 0, -2, 4]]).double()


@pytest.fixture
def backend(kernel):
    return kernel


def gradient(loss, student: Tensor, *inputs, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, *inputs, **options)
    value.sum().backward()
    return value.detach(), student.grad


def tolerance(backend) -> dict[str, float]:
    """For torch.testing.assert_close."""
    eps = 1e-7 if backend.float64 else 1e-5
    return {"rtol": eps, "atol": eps}


@pytest.mark.parametrize(
    ("outside", "T", "expected"),
    [
        ("renormalize", 1.0, 0.3453326703),
        ("bucket", 1.0, 0.1742656862),
        ("bucket", 2.0, 0.2970976773),
    ],
)
def test_golden(backend, outside, T, expected):
    z, v = Z.to(backend.finest), V.to(backend.finest)
    eps = 1e-9 if backend.float64 else 1e-6
    teacher = topk_teacher(v, 2)
    assert teacher.ids.tolist() == [[4, 0]]
    loss, grad = gradient(
        topk_kd_loss, z, *teacher, outside=outside, temperature=T, backend=backend.name
    )
    assert abs(loss.item() - expected) < eps
    if outside == "bucket" and T == 1:
        known = [-0.0278322032, 0.1834258417, 0.0409278374, 0.0091322349, -0.2056537108]
        assert (grad - torch.tensor(known, dtype=torch.float64)).abs().max() < eps


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_restrict_is_top_k(backend, k, T):
    z, v = pair(4, 1500, dtype=backend.finest)
    teacher = topk_teacher(v, k)
    order = torch.randperm(k)
    options = {"temperature": T, "backend": backend.name}
    actual = gradient(topk_kd_loss, z, teacher.ids[:, order], teacher.log_probs[:, order],
                      outside="restrict", **options)  # fmt: skip
    expected = gradient(kd_loss, z, v, top_k=k, **options)
    torch.testing.assert_close(actual, expected, **tolerance(backend))


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_all_classes_are_the_dense_loss(backend, outside, T):
    """k = V, and more than V with duplicates that share a class's probability: no bucket left."""
    z, v = pair(3, 40, dtype=backend.finest)
    expected = gradient(kd_loss, z, v, temperature=T, backend=backend.name)
    ids, log_probs = topk_teacher(v, 99)
    assert ids.shape == (3, 40)
    twice = torch.cat((ids, ids[:, :5], ids[:, 3:4]), -1)
    parts = torch.tensor([2.0, 2, 2, 3, 2] + [1.0] * 35, dtype=v.dtype).log()
    shares = log_probs - parts
    shared = torch.cat((shares, shares[:, :5], shares[:, 3:4]), -1)
    for i, p in ((ids, log_probs), (twice, shared)):
        actual = gradient(
            topk_kd_loss, z, i, p, outside=outside, temperature=T, backend=backend.name
        )
        torch.testing.assert_close(actual, expected, **tolerance(backend))


def textbook(z: Tensor, ids: Tensor, log_probs: Tensor, T: float, outside: str) -> Tensor:
    inside = torch.zeros_like(z).scatter(-1, ids, 1.0).bool()
    x, y = z.gather(-1, ids), log_probs
    if outside == "bucket":
        x = torch.cat((x, z.masked_fill(inside, -INF).logsumexp(-1, keepdim=True)), -1)
        y = torch.cat((y, (1 - y.exp().sum(-1, keepdim=True)).log()), -1)
    lp, lq = (y / T).log_softmax(-1), (x / T).log_softmax(-1)
    if outside == "renormalize":
        lq = (z / T).log_softmax(-1).gather(-1, ids)
    return T * T * (lp.exp() * (lp - lq)).sum(-1)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5])
def test_textbook(backend, outside, T, k):
    z, v = pair(5, 60, dtype=backend.finest)
    teacher = topk_teacher(v, k)
    options = {"temperature": T, "outside": outside, "reduction": "none"}
    actual = gradient(topk_kd_loss, z, *teacher, **options, backend=backend.name)
    exact = gradient(textbook, z.double(), teacher.ids, teacher.log_probs.double(), T, outside)
    expected = tuple(x.to(z.dtype) for x in exact)
    torch.testing.assert_close(actual, expected, **tolerance(backend))


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("V", [1, 3, 1023, 1025, 5003])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_definition(backend, outside, V, dtype):
    """With the hard term, a vocab_size, ignored rows, per-row temperatures and padded ids."""
    z, v = pair(5, V + 3, dtype=dtype)
    y = some_labels(5, V, ignored=(3,))
    z[3] = NAN
    ids, log_probs = topk_teacher(v, min(V, 9), vocab_size=V)
    if V > 3:
        ids[1, 4:], log_probs[2, 0] = -1, -INF
    named = ids.where(log_probs > -INF, -1)
    T = torch.tensor([1.0, 2.0, 0.5, 4.0, 30.0])
    backend.need(dtype)
    for alpha in (1.0, 0.6):
        results = []
        for s, name in ((z, backend.name), (z.double(), "reference")):
            student = s.clone().requires_grad_()
            out = topk_kd_loss(
                student, ids, log_probs if name != "reference" else log_probs.double(), y,
                outside=outside, temperature=T, alpha=alpha, vocab_size=V, return_terms=True,
                reduction="none", backend=name,
            )  # fmt: skip
            out.loss.sum().backward()
            results.append((*out, student.grad))
        (*actual, grad), (*expected, exact) = results
        counting = torch.arange(5) != 3
        options = {"temperature": T[counting], "alpha": alpha, "vocab_size": V}
        bounds = SparseAllowance(z[counting], named[counting], log_probs[counting], y[counting],
                                 outside, options)  # fmt: skip
        terms = bounds.rows(expected[1][counting], expected[2][counting])
        whole = alpha * terms[0] + (1 - alpha) * terms[1]
        stored = torch.float64 if dtype == torch.float64 else torch.float32
        for a, e, bound, name in zip(actual, expected, (whole, *terms), ("loss", "soft", "hard"),
                                     strict=True):  # fmt: skip
            assert_close(a[counting], e[counting], stored, bound, what=name)
        assert (grad[3] == 0).all() and (alpha < 1 or (grad[:, V:] == 0).all())
        assert_close(grad[counting], exact[counting], dtype, bounds.gradient(), spacings=2,
                     what="gradient")  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE)
def test_at_a_match_there_is_nothing_to_learn(backend, outside):
    """At every temperature, by pooling before softening; renormalising is no match."""
    z = normal(3, 3001, dtype=backend.finest)
    for T in (1.0, 2.0, 20.0):
        loss, grad = gradient(topk_kd_loss, z, *topk_teacher(z, 16), outside=outside, temperature=T,
                              backend=backend.name)  # fmt: skip
        if outside == "renormalize":
            assert loss > 0.01
        else:
            eps = 1e-12 if backend.float64 else 1e-6 * T  # of the gradient; squared in the loss
            assert 0 <= loss < eps and grad.abs().max() < eps


@pytest.mark.parametrize("outside", OUTSIDE)
def test_edges(backend, monkeypatch, outside):
    """-inf on either side, an empty bucket, probabilities beyond 1, a student with a tiny tail."""
    monkeypatch.setattr(checks, "on_host", lambda tensor: False)
    z, v = pair(8, 50, dtype=backend.finest)
    ids, log_probs = topk_teacher(v, 6)
    z[0, ids[0, 0]] = -INF
    z[1] = z[1].index_fill(0, torch.arange(50), -INF).scatter(0, ids[1], z[1][ids[1]])
    z[2, ids[2, 0]] = 80.0
    log_probs[3] += 5
    log_probs[4, 1:] = -INF
    z[5, (ids[5, 0] + 1) % 50] = NAN
    log_probs[6, 2] = NAN
    z[7] = -INF
    rows = [
        gradient(topk_kd_loss, z, ids, log_probs, outside=outside, reduction="none", backend=name)
        for name in (backend.name, "reference")
    ]
    torch.testing.assert_close(*rows, equal_nan=True, **tolerance(backend))
    loss, grad = rows[0]
    assert loss[0] == INF and grad[0, ids[0, 0]] == 0 and loss[5:].isnan().all()
    assert loss[2:5].isfinite().all() and (outside != "bucket" or loss[1] == INF)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_logits_that_are_all_large(backend, outside):
    """Far above what an exponential can be of, named or not."""
    z, v = pair(2, 300)
    z = z + 200
    results = [
        gradient(topk_kd_loss, z, *topk_teacher(v, 9), outside=outside, temperature=T, backend=name)
        for name in (backend.name, "reference")
        for T in (1.0, 3.0)
    ]
    for actual, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_what_the_student_forbids_is_infinite_also_where_it_underflows(backend, outside):
    """As in the dense loss, which knows the teacher's logit there from -inf."""
    student = torch.tensor([[1, 2, -INF, 0.5]], dtype=backend.finest)
    ids, log_probs = torch.tensor([[0, 2]]), torch.tensor([[-0.01, -60]], dtype=backend.finest)
    options = {"temperature": 0.05, "backend": backend.name}
    value, g = gradient(topk_kd_loss, student, ids, log_probs, outside=outside, **options)
    assert value == INF and g[0, 2] == 0 and g.isfinite().all()
    teacher = torch.tensor([[-0.01, -INF, -60, -INF]], dtype=backend.finest)
    assert kd_loss(student, teacher, **options) == INF


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("unchecked", [False, True], ids=["checked", "unchecked"])
def test_rows_without_ids_do_not_count(backend, monkeypatch, outside, labelled, unchecked):
    """As rows that are ignored: whether by -1 or by a probability of 0, whatever they hold."""
    if unchecked:
        monkeypatch.setattr(checks, "on_host", lambda tensor: False)
        monkeypatch.setattr(losses, "on_host", lambda tensor: False)
    z = normal(4, 32)  # each row begins at a whole vector, with the others left out as well
    z[0], z[2, 1] = NAN, NAN
    ids = torch.tensor([[-1, -1], [3, 4], [0, 0], [7, 0]])
    log_probs = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-INF, -INF], [-0.5, -INF]])
    y = (some_labels(4, 32),) if labelled else ()
    options = {"outside": outside, "alpha": 0.5 if labelled else 1.0, "backend": backend.name}
    loss, grad = gradient(topk_kd_loss, z, ids, log_probs, *y, **options)
    rows = torch.tensor([1, 3])
    given = z[rows], ids[rows].where(log_probs[rows] > -INF, -1), log_probs[rows]
    expected = gradient(topk_kd_loss, *given, *(labels[rows] for labels in y), **options)
    assert torch.equal(loss, expected[0]) and torch.equal(grad[rows], expected[1])
    assert (grad[[0, 2]] == 0).all()
    loss, grad = gradient(topk_kd_loss, z[[0, 2]], ids[[0, 2]], log_probs[[0, 2]],
                          *(labels[[0, 2]] for labels in y), **options)  # fmt: skip
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("outside", OUTSIDE)
def test_padding_with_an_id_and_no_probability(backend, outside):
    """As trainers pad: the id 0 at -inf names nothing, though the row may name class 0 as well."""
    z, v = pair(3, 30)
    ids, log_probs = topk_teacher(v, 4)
    ids[1, 2] = 0
    padded = F.pad(ids, (0, 3)), F.pad(log_probs, (0, 3), value=-INF)
    options = {"outside": outside, "temperature": 2.0, "backend": backend.name}
    expected = gradient(topk_kd_loss, z, ids, log_probs, **options)
    for actual, exact in zip(gradient(topk_kd_loss, z, *padded, **options), expected, strict=True):
        torch.testing.assert_close(actual, exact, **tolerance(backend))


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32], ids=str)
def test_ids_as_caches_store_them(backend, outside, dtype):
    z, v = pair(3, 300)
    ids, log_probs = topk_teacher(v, 4)
    options = {"outside": outside, "backend": backend.name}
    expected = gradient(topk_kd_loss, z, ids, log_probs, **options)
    for given in (ids.to(dtype), ids.repeat(1, 2).to(dtype)[:, :4]):
        actual = gradient(topk_kd_loss, z, given, log_probs, **options)
        assert all(map(torch.equal, actual, expected))


def test_a_sampled_class_that_is_named_again(backend):
    """Servers name the sampled class beside the most probable ones, of which it may be one."""
    z, v = pair(4, 30)
    ids, log_probs = topk_teacher(v, 3)
    both = topk_teacher(v, 5)
    sample = torch.tensor([[0], [2], [4], [1]])  # of the five: the third row's is a class more
    again = tuple(torch.cat((of_five.gather(1, sample), of_three), 1)
                  for of_five, of_three in zip(both, (ids, log_probs), strict=True))  # fmt: skip
    once = torch.cat((ids, both.ids[:, 4:]), 1), torch.cat((log_probs, both.log_probs[:, 4:]), 1)
    once[0][[0, 1, 3], 3] = -1
    options = {"reduction": "none", "backend": backend.name}
    expected = gradient(topk_kd_loss, z, *once, **options)
    actual = gradient(topk_kd_loss, z, *again, repeated_ids="once", **options)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance(backend))
    ids = torch.tensor([[3, 3, 1], [1, 2, 1]])
    log_probs = torch.tensor([[0.2, 0.3, 0.4], [0.1, 0.5, 0.25]]).log()
    added = torch.tensor([[1, 3], [1, 2]]), torch.tensor([[0.4, 0.5], [0.35, 0.5]]).log()
    expected = gradient(topk_kd_loss, z[:2], *added, **options)
    actual = gradient(topk_kd_loss, z[:2], ids, log_probs, **options)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_that_are_logits(dtype):
    """Their sum shows it, beyond what the rounding of the logarithms may have added to it."""
    v = normal(64, 3000)
    ids, log_probs = topk_teacher(v, 2000)
    z = normal(64, 3000, seed=1)
    assert topk_kd_loss(z, ids, log_probs.to(dtype)).isfinite()
    assert topk_kd_loss(z, ids, torch.full_like(log_probs, -math.log(2000)).to(dtype)).isfinite()
    with pytest.raises(ValueError, match=r"teacher_log_probs must hold log-prob.*log_softmax"):
        topk_kd_loss(z, ids[:, :9], v.gather(1, ids)[:, :9].to(dtype))
    twice = ids.repeat(1, 2), log_probs.repeat(1, 2).to(dtype)
    with pytest.raises(ValueError, match=r"repeated_ids"):
        topk_kd_loss(z, *twice)
    assert topk_kd_loss(z, *twice, repeated_ids="once").isfinite()


def test_ids_that_cannot_be_checked(backend, monkeypatch):
    """On a GPU they are not read back: their row becomes NaN, the others stay."""
    monkeypatch.setattr(checks, "on_host", lambda tensor: False)
    z = normal(3, 30)
    ids = torch.tensor([[1, 30], [2, 3], [-2, 5]])
    for outside in OUTSIDE:
        loss, grad = gradient(topk_kd_loss, z, ids, torch.full((3, 2), -2.0), outside=outside,
                              reduction="none", backend=backend.name)  # fmt: skip
        assert loss[[0, 2]].isnan().all() and loss[1].isfinite() and grad[1].isfinite().all()


@pytest.mark.parametrize(
    "function", [spec.order_named, torch.ops.fastkd.order_named], ids=["definition", "native"]
)
@pytest.mark.parametrize("k", [1, 2, 5, 40, 300])
def test_classes_in_order(function, k):
    """Against a dictionary: any order, twice or thrice the same, none, no class, -inf and NaN."""
    generator = torch.Generator().manual_seed(k)
    N, V = 60, 90
    low, high = (-1, V) if k > 1 else (-2, V + 1)
    ids = torch.randint(low, high, (N, k), generator=generator)
    ids[::3] = ids[::3] % 7  # many of the same
    log_probs = torch.randn(N, k, generator=generator, dtype=torch.float64) - math.log(k) - 1
    log_probs[1::5] += 4  # more than 1 in all
    log_probs[2::7, 0] = -INF
    log_probs[3, k // 2] = NAN
    ids[4], ids[5, 0], ids[6, -1] = -1, V, -2
    ids[7], log_probs[7] = torch.arange(k) % V, math.log(1 / k)  # nothing left of 1
    for dtype, eps in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        given = log_probs.to(dtype)
        before = ids.clone(), given.clone()
        ordered, ordered_log_probs, log_rest = function(ids, given, V, True)
        assert ordered_log_probs.dtype == log_rest.dtype == dtype and log_rest.shape == (N,)
        for row in range(N):
            named: dict[int, float] = {}
            for one, value in zip(
                ids[row].tolist(), given[row].double().exp().tolist(), strict=True
            ):
                if one != -1:
                    named[one] = named.get(one, 0.0) + value
            total, listed = sum(named.values()), len(named)
            if not named.keys() <= set(range(V)):
                assert ordered_log_probs[row].isnan().all() and log_rest[row].isnan()
                continue
            named = {one: value for one, value in named.items() if value != 0}
            assert ordered[row].tolist() == sorted(named) + [V] * (k - len(named))
            expected = torch.tensor(
                [named[one] for one in sorted(named)], dtype=torch.float64
            ).log()
            got = ordered_log_probs[row, : len(named)].double()
            if total > 1:
                expected -= math.log(total)
            torch.testing.assert_close(got, expected, rtol=eps, atol=eps, equal_nan=True)
            assert (ordered_log_probs[row, len(named) :] == -INF).all()
            rest = max(0.0, 1 - total) if total == total else NAN
            if abs(total - 1) < 1e-6 or listed == V:
                assert log_rest[row] < math.log(1e-6)
            else:
                got = log_rest[row].double().exp()
                expected = torch.full_like(got, rest)
                torch.testing.assert_close(got, expected, rtol=eps, atol=eps, equal_nan=True)
        ordered_ids = ordered.masked_fill(ordered == V, -1)
        classes, _, none = function(ordered_ids, torch.zeros_like(given), V, False)
        assert torch.equal(classes, ordered) and none.shape == (0,)
        torch.testing.assert_close((ids, given), before, rtol=0, atol=0, equal_nan=True)
    assert [x.shape for x in function(ids[:0], log_probs[:0], V, True)] == [(0, k), (0, k), (0,)]


def test_the_native_classes_are_the_defined_ones():
    for dtype in (torch.float32, torch.float64):
        ids = torch.randint(-1, 50, (500, 33), generator=torch.Generator().manual_seed(0))
        log_probs = normal(500, 33, dtype=dtype) - 3
        for bucket in (False, True):
            args = (ids, log_probs, 50, bucket)
            actual, expected = torch.ops.fastkd.order_named(*args), spec.order_named(*args)
            assert torch.equal(actual[0], expected[0])
            eps = 1e-6 if dtype == torch.float32 else 1e-14
            torch.testing.assert_close(actual[1:], expected[1:], rtol=eps, atol=eps)
            opcheck(torch.ops.fastkd.order_named.default, args)


def test_inplace_and_determinism(backend):
    z, v = pair(6, 4000)
    teacher = topk_teacher(v, 20)
    _, expected = gradient(topk_kd_loss, z, *teacher, backend=backend.name)
    logits = z.clone().requires_grad_() * 1
    logits.retain_grad()
    topk_kd_loss(logits, *teacher, inplace=True, backend=backend.name).backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("op", ["sparse_rows", "sparse_rows_reference"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(op, gradient):
    z = normal(2, 3, 9)
    ids = torch.tensor([[0, 4, 9]]).repeat(6, 1)
    one = torch.ones(6)
    for rest, labels in ((None, None), (-one, some_labels(6, 8))):
        args = (
            z, ids, torch.full((6, 3), -1.0), rest, labels, one, one, one,
            None if labels is None else one, torch.empty_like(z) if gradient else None, 8, False,
        )  # fmt: skip
        opcheck(getattr(torch.ops.fastkd, op).default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outside": "drop"}, ValueError, "outside must be one of bucket"),
        ({"repeated_ids": "first"}, ValueError, "repeated_ids must be one of add, once"),
        (
            {"ids": torch.tensor([[0, 20], [1, 2]])},
            ValueError,
            r"teacher_ids must lie in \[0, 20\)",
        ),
        (
            {"ids": torch.tensor([[0.0, 1], [1, 2]])},
            TypeError,
            "teacher_ids must be of an integer dtype",
        ),
        ({"ids": torch.tensor([[0], [1]])}, ValueError, "same k"),
        ({"ids": torch.tensor([0, 1])}, ValueError, "teacher_ids must have shape"),
        (
            {"log_probs": torch.zeros(2, 2).long()},
            TypeError,
            "teacher_log_probs must be of a float",
        ),
        ({"alpha": 0.5}, ValueError, "needs labels"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must lie in \[1, 20\]"),
    ],
    ids=str,
)
def test_arguments(change, error, message):
    given = {"ids": torch.tensor([[0, 1], [1, 2]]), "log_probs": torch.full((2, 2), -1.0), **change}
    ids, log_probs = given.pop("ids"), given.pop("log_probs")
    with pytest.raises(error, match=message):
        topk_kd_loss(normal(2, 20), ids, log_probs, **given)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)])
def test_a_teacher_of_no_rows(shape):
    for k in (3, 9):
        ids, log_probs = topk_teacher(torch.empty(shape), k)
        assert ids.shape == log_probs.shape == (*shape[:-1], min(k, 7))
        student = torch.empty(shape, requires_grad=True)
        loss = topk_kd_loss(student, ids, log_probs)
        loss.backward()
        assert loss == 0 and student.grad.shape == shape


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t[:, :-1],
        lambda t: t[:, :, 1:],
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    ],
)
def test_a_teacher_of_any_strides_is_read_a_few_rows_at_a_time(monkeypatch, view):
    logits = view(normal(4, 33, 400))
    monkeypatch.setattr(chunks, "LOGITS", 10 * 400)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        actual = topk_teacher(logits, 5)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= 4 * 10 * 400
    expected = topk_teacher(logits.contiguous(), 5)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_the_teacher_and_the_module():
    v = normal(2, 3, 100, dtype=torch.bfloat16)
    ids, log_probs = topk_teacher(v, 5, vocab_size=90)
    assert ids.shape == log_probs.shape == (2, 3, 5) and log_probs.dtype == torch.float32
    expected = F.log_softmax(v[..., :90].float(), -1).gather(-1, ids)
    torch.testing.assert_close(log_probs, expected)
    with pytest.raises(ValueError, match="k must be >= 1"):
        topk_teacher(v, 0)
    z = normal(2, 3, 100)
    module = TopKKDLoss(outside="restrict")
    actual = module(z, ids, log_probs, temperature=2.0)
    assert actual == topk_kd_loss(z, ids, log_probs, outside="restrict", temperature=2.0)
