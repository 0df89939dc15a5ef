"""Every row of DESIGN section 1's edge table, for every beta and every backend."""

import math

import pytest
import torch
from lib.backends import BETAS
from lib.bounds import INF, NAN, Allowance, assert_close
from lib.compare import check, run
from lib.logits import normal, pair, some_labels

import fastkd
from fastkd import dkd_loss, kd_loss, kernels, topk_kd_loss, topk_teacher
from fastkd.spec import FORWARD, MIXTURE, REVERSE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 9: less than a vector; 1100: the infinite column may lie in the first chunk of 1024 or the second.
SIZES = (9, 1100)


@pytest.fixture(params=[(V, place) for V in SIZES for place in ("first", "last")], ids=str)
def column(request) -> tuple[int, int]:
    V, place = request.param
    return V, 0 if place == "first" else V - 1


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
def test_teacher_minus_infinity(kernel, column, beta):
    """p_i = 0; the class still counts in q."""
    V, i = column
    for dtype in DTYPES:
        s, t = pair(3, V, dtype=dtype)
        t[1, i] = -INF
        for options in ({}, {"temperature": 2.0}, {"temperature": 2.0, "teacher_temperature": 3.0}):
            result = check(kernel, s, t, beta=beta, reduction="none", **options)
            assert result.loss.isfinite().all()
            assert result.gradient.isfinite().all()
        # beta = 0: q is pushed down there; the gradient is q_i > 0.
        z, v = s[1].double(), t[1].double()
        gradient = run(kernel, s[1], t[1], beta=beta).gradient.double()
        if beta == 0:
            q = torch.softmax(z, -1)[i]
            assert abs(gradient[i] - q) <= 2**-8 * q + 1e-7
        assert v[i] == -INF and gradient[i] > 0


def test_teacher_minus_infinity_under_reverse_kl(kernel, column):
    """+inf loss and a NaN gradient for that row, and only for it; pruning avoids it."""
    V, i = column
    for dtype in DTYPES:
        s, t = pair(3, V, dtype=dtype)
        t[1, i] = -INF
        for options in ({}, {"temperature": 2.0}, {"temperature": 2.0, "teacher_temperature": 3.0}):
            result = check(kernel, s, t, beta=1.0, reduction="none", **options)
            assert result.loss[1] == INF and result.loss[[0, 2]].isfinite().all()
            assert result.gradient[1].isnan().all() and result.gradient[[0, 2]].isfinite().all()
        pruned = check(kernel, s, t, beta=1.0, top_k=V - 1)
        assert pruned.loss.isfinite() and pruned.gradient.isfinite().all()
        assert pruned.gradient[1, i] == 0


@pytest.mark.parametrize("labelled", [False, True])
def test_infinite_reverse_kl_stops_at_vocab_size(kernel, labelled):
    s, t = pair(2, 12)
    t[0, 3] = -INF
    labels = some_labels(2, 10) if labelled else None
    alpha = 0.5 if labelled else 1.0
    result = check(kernel, s, t, labels, beta=1.0, vocab_size=10, alpha=alpha)
    assert result.loss == INF
    assert result.gradient[0, :10].isnan().all()
    beyond = result.gradient[0, 10:]  # of the hard term alone
    assert (beyond > 0).all() if labelled else (beyond == 0).all()


def test_infinite_term_of_weight_0_leaves_no_trace(kernel):
    s, t = pair(2, 12)
    t[0, 3] = -INF
    labels = some_labels(2, 12)
    result = check(kernel, s, t, labels, beta=1.0, alpha=0.0)
    assert result.soft == INF and result.loss.isfinite() and result.gradient.isfinite().all()
    s[1, labels[1]] = -INF
    t[1, labels[1]] = -INF
    t[0, 3] = 1.0
    result = check(kernel, s, t, labels, alpha=1.0)
    assert result.hard == INF and result.loss.isfinite() and result.gradient.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_student_minus_infinity(kernel, column, beta):
    """beta = 0: +inf, gradient q - p with 0 at i. beta > 0: q_i = 0, finite."""
    V, i = column
    for dtype in DTYPES:
        s, t = pair(3, V, dtype=dtype)
        s[1, i] = -INF
        for options in ({}, {"temperature": 2.0}, {"temperature": 2.0, "teacher_temperature": 3.0}):
            result = check(kernel, s, t, beta=beta, reduction="none", **options)
            assert result.gradient.isfinite().all()
            assert result.gradient[1, i] == 0
            assert result.loss[[0, 2]].isfinite().all()
            assert result.loss[1] == INF if beta == 0 else result.loss[1].isfinite()
        if beta == 0:
            q, p = torch.softmax(s[1].double(), -1), torch.softmax(t[1].double(), -1)
            gradient = run(kernel, s[1], t[1]).gradient.double()
            torch.testing.assert_close(
                gradient, torch.where(s[1] == -INF, 0, q - p), rtol=2**-8, atol=2e-6
            )


def test_infinity_goes_by_logits_not_by_underflow(kernel):
    """p_i = exp(-500) underflows, its logit does not: z_i = -inf there is still +inf."""
    s, t = torch.tensor([[0.0, 1.0, -INF]]), torch.tensor([[0.0, 1.0, -500.0]])
    assert check(kernel, s, t).loss == INF
    assert check(kernel, t, s, beta=1.0).loss == INF
    # And both merely underflowing is finite.
    s[0, 2] = -400.0
    for beta in BETAS:
        assert check(kernel, s, t, beta=beta).loss.isfinite()


@pytest.mark.parametrize("beta", BETAS)
def test_both_minus_infinity_removes_the_column(kernel, column, beta):
    V, i = column
    for dtype in DTYPES:
        s, t = pair(3, V, dtype=dtype)
        s[:, i] = t[:, i] = -INF
        stays = [j for j in range(V) if j != i]
        for options in ({}, {"temperature": 2.0, "teacher_temperature": 3.0}, {"top_k": 5}):
            result = check(kernel, s, t, beta=beta, **options)
            gathered = check(kernel, s[:, stays], t[:, stays], beta=beta, **options)
            assert result.loss.isfinite() and (result.gradient[:, i] == 0).all()
            torch.testing.assert_close(result.loss, gathered.loss, rtol=1e-5, atol=1e-7)
            close = {"rtol": 2**-7, "atol": 1e-6}
            torch.testing.assert_close(result.gradient[:, stays], gathered.gradient, **close)


@pytest.mark.parametrize("beta", BETAS)
def test_bottom_percentile_counts_a_missing_column(kernel, beta):
    """10 classes, 3 missing on both sides: 40 % drops those 3 and one more."""
    s, t = pair(2, 10)
    s[:, 2:5] = t[:, 2:5] = -INF
    result = check(kernel, s, t, beta=beta, bottom_percentile=40.0)
    assert ((result.gradient != 0).sum(-1) == 6).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("V", [3, 1500, 2500])
def test_many_missing_columns(kernel, beta, V):
    """More than a chunk without one finite logit, on one side or both, at either end."""
    for dtype in DTYPES:
        s, t = pair(4, V, dtype=dtype)
        t[0, : V - 2] = -INF
        s[1, : V - 2] = -INF
        s[2, : V - 2] = t[2, : V - 2] = -INF
        s[3, 2:] = t[3, 2:] = -INF
        for options in ({}, {"temperature": 2.0}, {"top_k": 2}, {"top_k": V - 1}):
            check(kernel, s, t, beta=beta, reduction="none", **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"vocab_size": 4}], ids=str)
def test_no_mass_is_nan(kernel, beta, which, options):
    """A softmax over nothing has no value: NaN for the row, on whichever side it is."""
    s, t = pair(3, 6)
    if which != "teacher":
        s[1] = -INF
    if which != "student":
        t[1] = -INF
    labels = some_labels(3, 4)
    for arguments in ((), (labels,)):
        result = run(kernel, s, t, *arguments, beta=beta, reduction="none", **options)
        assert result.loss[1].isnan() and result.loss[[0, 2]].isfinite().all()
        width = options.get("vocab_size", 6)
        assert result.gradient[1, :width].isnan().all()
        assert (result.gradient[1, width:] == 0).all()
        assert result.gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_no_student_mass_among_the_kept(kernel, beta):
    s, t = pair(1, 6)
    s[0, t[0].topk(2).indices] = -INF
    result = run(kernel, s, t, beta=beta, top_k=2)
    assert result.loss.isnan() and result.gradient.isnan().all()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_stays_in_its_row(kernel, column, beta, side, alpha):
    V, i = column
    for dtype in DTYPES:
        s, t = pair(4, V + 2, dtype=dtype)
        (s if side == "student" else t)[1, i] = NAN
        labels = some_labels(4, V)
        for options in ({}, {"top_k": 3}, {"bottom_percentile": 5.0}, {"temperature": 2.0}):
            options = {**options, "vocab_size": V, "alpha": alpha}
            result = check(kernel, s, t, labels, beta=beta, reduction="none", **options)
            others = [0, 2, 3]
            assert result.loss[1].isnan() and result.loss[others].isfinite().all()
            assert result.gradient[1, :V].isnan().all()
            if alpha == 1:
                assert (result.gradient[:, V:] == 0).all()
            assert result.gradient[others].isfinite().all()
            mean = run(kernel, s, t, labels, beta=beta, **options)
            assert mean.loss.isnan() and mean.gradient[others].isfinite().all()


def test_nan_of_a_class_that_is_pruned(kernel):
    """Nor is there a hard term to see it."""
    for beta in BETAS:
        s, t = pair(3, 9)
        s[1, t[1].argmin()] = NAN
        result = run(kernel, s, t, beta=beta, top_k=3, reduction="none")
        assert result.loss[1].isnan() and result.gradient[1].isnan().all()
        assert result.loss[[0, 2]].isfinite().all() and result.gradient[[0, 2]].isfinite().all()


def test_nan_of_the_teacher_leaves_the_hard_term_alone(kernel):
    s, t = pair(3, 9)
    t[1, 4] = NAN
    result = check(kernel, s, t, some_labels(3, 9), alpha=0.0)
    assert result.loss.isfinite() and result.gradient.isfinite().all() and result.soft.isnan()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_ignored_rows_touch_nothing(kernel, beta, value):
    for dtype in DTYPES:
        s, t = pair(4, 11, dtype=dtype)
        labels = some_labels(4, 11, ignored=(1, 3))
        clean = check(kernel, s, t, labels, beta=beta, alpha=0.5)
        s[[1, 3]] = value
        t[[1, 3]] = value
        weights = torch.tensor([1.0, NAN, 1.0, INF])
        for options in ({}, {"token_weights": weights}):
            for reduction in ("batchmean", "sum", "none"):
                common = {"beta": beta, "alpha": 0.5, "reduction": reduction, **options}
                result = check(kernel, s, t, labels, **common)
                assert (result.gradient[[1, 3]] == 0).all()
                assert not torch.signbit(result.gradient[[1, 3]]).any()
                if reduction == "none":
                    assert (result.loss[[1, 3]] == 0).all()
                if reduction == "batchmean":
                    assert torch.equal(result.loss, clean.loss)
                    assert torch.equal(result.gradient, clean.gradient)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, 1e-30])
@pytest.mark.parametrize("name", ["token_weights", "temperature", "teacher_temperature"])
def test_odd_weight_or_temperature_stays_in_its_row(backend, monkeypatch, name, value):
    """As a NaN logit does: the other rows come out bit for bit as beside a plain one.

    float16 above all, whose gradient is stored scaled. Values that are not looked at, as on a GPU.
    """
    monkeypatch.setattr(fastkd.core.checks, "on_host", lambda tensor: False)
    for dtype in (*DTYPES, torch.float64) if backend.float64 else DTYPES:
        s, t = pair(3, 3000, dtype=dtype)
        labels = some_labels(3, 3000)
        for reduction, items, alpha, beta in (
            ("sum", None, 1.0, 0.0),
            ("none", None, 0.5, 0.5),
            ("batchmean", 8192, 0.5, 1.0),
        ):
            options = {"reduction": reduction, "num_items": items, "alpha": alpha, "beta": beta}
            results = []
            for odd in (1.0, value):
                options[name] = torch.tensor([1.0, odd, 2.0])
                results.append(run(backend, s, t, labels, grad_output=1024.0, **options))
            plain, spoilt = results
            assert torch.equal(spoilt.gradient[[0, 2]], plain.gradient[[0, 2]])
            assert (plain.gradient[[0, 2]] != 0).float().mean() > 0.5
            if reduction == "none":
                assert torch.equal(spoilt.loss[[0, 2]], plain.loss[[0, 2]])
            if not math.isfinite(value):
                assert not spoilt.gradient[1].isfinite().any()


def test_rows_of_weight_0_are_skipped(kernel):
    s, t = pair(3, 11)
    s[1] = t[1] = NAN
    result = check(kernel, s, t, some_labels(3, 11), alpha=0.5, token_weights=torch.eye(3)[0])
    assert result.loss.isfinite() and (result.gradient[1:] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_every_row_ignored(backend, reduction, inplace):
    for dtype in DTYPES:
        leaf = torch.full((3, 7), NAN, dtype=dtype, device=backend.device, requires_grad=True)
        labels = torch.full((3,), -100, device=backend.device)
        for alpha in (0.0, 0.5, 1.0):
            leaf.grad = None
            loss = kd_loss(leaf * 1, leaf.detach(), labels, alpha=alpha, reduction=reduction,
                           inplace=inplace, backend=backend.name)  # fmt: skip
            assert (loss == 0).all() and loss.requires_grad
            loss.sum().backward()
            assert (leaf.grad == 0).all()


@pytest.mark.parametrize("unchecked", [False, True], ids=["checked", "unchecked"])
@pytest.mark.parametrize("of", ["number", "tensor"])
def test_num_items_0_where_every_row_is_ignored(backend, monkeypatch, of, unchecked):
    """As a trainer counts them where truncation cut every answer. A row that counts is an error of
    the caller; where it cannot be looked at, its loss is infinite."""
    if unchecked:
        monkeypatch.setattr(fastkd.core.call, "on_host", lambda tensor: False)
        monkeypatch.setattr(fastkd.core.checks, "on_host", lambda tensor: False)
    s, t = (x.to(backend.device) for x in pair(4, 7))
    s[0, 0] = NAN
    num_items = 0 if of == "number" else torch.zeros((), dtype=torch.long, device=backend.device)
    labels = torch.full((4,), -100, device=backend.device)
    ignored = {"kd": lambda z: kd_loss(z, t, labels, alpha=0.5, **options),
               "dkd": lambda z: dkd_loss(z, t, labels, **options),
               "topk": lambda z: topk_kd_loss(z, *topk_teacher(t, 3), labels, **options),
               "weights": lambda z: kd_loss(z[1:], t[1:], token_weights=t.new_zeros(3), **options),
               "no rows": lambda z: kd_loss(z[:0], t[:0], **options)}  # fmt: skip
    options = {"num_items": num_items, "backend": backend.name}
    for name, loss in ignored.items():
        leaf = s.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        assert value == 0 and (leaf.grad == 0).all(), name
    labels[1] = 2
    if not unchecked:
        with pytest.raises(ValueError, match="num_items must be > 0 where a row counts, got 0"):
            kd_loss(s, t, labels, **options)
    elif of == "tensor":
        assert kd_loss(s, t, labels, **options) == INF


@pytest.mark.parametrize("T", [0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("which", ["temperature", "teacher_temperature"])
def test_a_temperature_that_could_not_be_checked(backend, monkeypatch, which, T):
    """NaN for its row, and in no other; not a row that is skipped since T^2 is 0."""
    monkeypatch.setattr(fastkd.core.checks, "on_host", lambda tensor: False)
    s, t = (x.to(backend.device) for x in pair(3, 7))
    labels = torch.tensor([1, 2, 3], device=backend.device)
    temperature = torch.tensor([1.0, T, 2.0], device=backend.device)
    options = {which: temperature, "reduction": "none", "backend": backend.name}
    for loss in (
        lambda z: kd_loss(z, t, **options),
        lambda z: kd_loss(z, t, labels, alpha=0.5, **options),
        lambda z: kd_loss(z, t, beta=0.5, **options),
        lambda z: dkd_loss(z, t, labels, hard_weight=1.0, **options),
        lambda z: topk_kd_loss(z, *topk_teacher(t, 3), **options),
    ):
        leaf = s.clone().requires_grad_()
        value = loss(leaf)
        value.sum().backward()
        assert value.isnan().tolist() == [False, True, False]
        assert leaf.grad.isnan().all(-1).tolist() == [False, True, False]
        assert leaf.grad[[0, 2]].isfinite().all()
    # Where the soft term has no part in the loss it leaves no trace.
    leaf = s.clone().requires_grad_()
    out = kd_loss(leaf, t, labels, alpha=0.0, return_terms=True, **options)
    out.loss.sum().backward()
    assert out.soft.isnan().tolist() == [False, True, False]
    assert out.loss.isfinite().all() and leaf.grad.isfinite().all()


def test_classes_beyond_vocab_size_get_exactly_0_from_the_soft_term(kernel):
    for dtype in DTYPES:
        s, t = pair(3, 1100, dtype=dtype)
        for V in (1, 500, 1024, 1099):
            for given in ((), (some_labels(3, V),)):
                result = run(kernel, s, t, *given, vocab_size=V)
                assert (result.gradient[:, V:] == 0).all()
                assert V == 1 or (result.gradient[:, :V] != 0).any()


def test_pruned_classes_get_exactly_0_from_the_soft_term_only(kernel):
    s, t = pair(3, 1100)
    kept = torch.zeros(3, 1100, dtype=torch.bool).scatter_(1, t.topk(100).indices, True)
    hard = run("reference", s.double(), t.double(), some_labels(3, 1100), alpha=0.0).gradient
    bound = Allowance(s, t, some_labels(3, 1100), {"alpha": 0.0}).gradient()
    for beta in BETAS:
        soft = run(kernel, s, t, top_k=100, beta=beta).gradient
        assert (soft[~kept] == 0).all() and (soft[kept] != 0).any()
        both = run(kernel, s, t, some_labels(3, 1100), top_k=100, beta=beta, alpha=0.5).gradient
        assert_close(both[~kept], 0.5 * hard[~kept], s.dtype, 0.5 * bound[~kept], what="pruned")


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE, MIXTURE])
@pytest.mark.parametrize("hard", [False, True])
def test_rows_that_keep_every_class_beside_others_that_do_not(kernel, divergence, hard):
    """As in a call that prunes nothing, edges and all, and no row takes a neighbour's numbers."""
    V = 1100
    s, t = pair(8, V)
    s[1, 5] = t[1, 5] = t[2, 7] = -INF
    s[3, 600:] = t[3, 600:] = -INF
    s[4, 3] = NAN
    keep = torch.tensor([V, V, V + 1, V, V, 2**62, 40, 3])
    inverse = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5])
    beta = torch.linspace(0.1, 0.9, 8) if divergence == MIXTURE else None
    one, labels = torch.ones(8), some_labels(8, V)

    def terms(name, device, keep, rows=slice(None)):
        op = kernels.choose_backend(name, torch.device(device), torch.float32).dense_rows
        g = torch.empty(len(s[rows]), V, device=device)
        vectors = (
            x if x is None else x[rows].to(device)
            for x in (s, t, labels, inverse, inverse, one, one if hard else None, keep, beta)
        )  # fmt: skip
        *given, kept, mixed = vectors
        return [x.cpu() for x in (*op(*given, g, kept, V, divergence, mixed), g)]

    actual = terms(kernel.name, kernel.device, keep)
    for rows, expected in (
        (slice(0, 6), terms(kernel.name, kernel.device, None, slice(0, 6))),
        (slice(None), terms("reference", "cpu", keep)),
    ):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[rows], e, rtol=2e-5, atol=1e-7, equal_nan=True)
    assert ((actual[2][6:] != 0).sum(-1) == (V if hard else torch.tensor([40, 3]))).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"top_k": 40}], ids=str)
def test_equal_logits_give_exactly_0(kernel, beta, options):
    for dtype in DTYPES:
        t = normal(4, 3000, dtype=dtype)
        t[1, ::3] = -INF
        t[2, :1500] -= 40
        result = run(kernel, t, t, beta=beta, reduction="none", **options)
        if kernel.name == "reference":  # its mixture rounds ln m
            assert (result.loss >= 0).all() and (result.loss < 1e-11).all()
            assert result.gradient.abs().max() < 1e-6
        else:
            assert (result.loss == 0).all()
            assert (result.gradient == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_a_row_sums_to_0(kernel, beta):
    s, t = pair(3, 2000)
    for alpha in (0.0, 0.5, 1.0):
        labels = some_labels(3, 2000)
        g = run(kernel, s, t, labels, beta=beta, alpha=alpha, temperature=2.0).gradient.double()
        # Each class carries a rounding of p + q, which sum to 2; weight 1/3, T = 2.
        assert (g.sum(-1).abs() < 8 * 2**-23 * 2 * 2 / 3).all()


def test_plus_infinity_is_nan(kernel, column):
    """inf - inf has no value: as in F.log_softmax."""
    V, i = column
    for side in range(2):
        logits = pair(3, V)
        logits[side][1, i] = INF
        for beta in BETAS:
            for options in ({}, {"temperature": 2.0}):
                result = check(kernel, *logits, beta=beta, reduction="none", **options)
                assert result.loss[1].isnan() and result.gradient[1].isnan().all()


def test_label_at_minus_infinity(kernel):
    """The hard term is +inf there, its gradient q - onehot, as in F.cross_entropy."""
    s, t = pair(2, 9)
    s[0, 4] = -INF
    labels = torch.tensor([4, 2])
    result = check(kernel, s, t, labels, alpha=0.0)
    leaf = s.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, labels)
    expected.backward()
    assert result.loss == expected == math.inf
    torch.testing.assert_close(result.gradient, leaf.grad)
