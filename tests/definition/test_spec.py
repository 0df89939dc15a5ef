"""The definition (the reference backend, in float64) against things that are not fastkd.

Float64 autograd of the textbook expressions, golden values worked out by hand, and invariants that
follow from the formulas alone.
"""

import pytest
import torch
import torch.nn.functional as F
from lib.backends import BETAS
from lib.bounds import INF
from lib.logits import normal, pair, some_labels
from torch import Tensor

from fastkd import kd_loss, spec

EXACT = {"rtol": 1e-11, "atol": 1e-13}
# maths.md section 12: z, v, label; forward KL with its gradient at T = 1 and 4, and the rest.
Z = torch.tensor([[1, 2, 0.5, -1, 3]], dtype=torch.float64)
V = torch.tensor([[2, 1, 0, -2, 4]], dtype=torch.float64)
Y = torch.tensor([4])


def both(student: Tensor, teacher: Tensor, labels=None, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = kd_loss(student, teacher, labels, backend="reference", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def divergence(z: Tensor, v: Tensor, T, teacher_T, beta: float) -> Tensor:
    """One row over the classes it is given, by the functions of torch alone."""
    lq, lp = F.log_softmax(z / T, -1), F.log_softmax(v / teacher_T, -1)
    if beta == 0:
        return F.kl_div(lq, lp.exp(), reduction="sum")
    if beta == 1:
        return F.kl_div(lp, lq, reduction="sum", log_target=True)
    m = (beta * lp.exp() + (1 - beta) * lq.exp()).log()
    return beta * F.kl_div(m, lp.exp(), reduction="sum") + (1 - beta) * F.kl_div(
        m, lq, reduction="sum", log_target=True
    )


def textbook(
    student: Tensor, teacher: Tensor, labels=None, *,
    temperature=1.0, teacher_temperature=None, beta=0.0, alpha=1.0, kept=None, vocab_size=None,
    ignore_index=-100, token_weights=None, num_items=None, reduction="batchmean",
):  # fmt: skip
    """DESIGN section 1 row by row on gathered columns, for autograd; `kept`: of each row."""
    width = vocab_size or student.shape[-1]
    z, v = student.reshape(-1, student.shape[-1]), teacher[..., :width].reshape(-1, width)
    rows, counting = [], 0
    for r in range(z.shape[0]):
        if labels is not None and labels.reshape(-1)[r] == ignore_index:
            rows.append(z.new_zeros(()))
            continue
        counting += 1
        T = temperature if isinstance(temperature, float) else temperature.reshape(-1)[r]
        teacher_T = T
        if teacher_temperature is not None:
            teacher_T = teacher_temperature
        columns = torch.arange(width) if kept is None else torch.tensor(kept[r])
        loss = alpha * T**2 * divergence(z[r, columns], v[r, columns], T, teacher_T, beta)
        if alpha < 1:
            loss = loss + (1 - alpha) * F.cross_entropy(z[r], labels.reshape(-1)[r])
        rows.append(loss if token_weights is None else loss * token_weights.reshape(-1)[r])
    loss = torch.stack(rows)
    if reduction == "none":
        return loss.reshape(student.shape[:-1])
    return loss.sum() / ((num_items or max(counting, 1)) if reduction == "batchmean" else 1)


def compare(student: Tensor, teacher: Tensor, labels=None, kept=None, **options) -> None:
    loss, gradient = both(student, teacher, labels, **options)
    for name in ("top_k", "bottom_percentile"):
        options.pop(name, None)
    student = student.detach().clone().requires_grad_()
    expected = textbook(student, teacher, labels, kept=kept, **options)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)


@pytest.mark.parametrize("T", [1.0, 2.0, 0.3, 7.5])
def test_the_two_lines_that_it_replaces(T):
    s, t = pair(6, 50, dtype=torch.float64)
    loss, gradient = both(s, t, temperature=T)
    s.requires_grad_()
    kl = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")
    expected = kl * T**2
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, s.grad, **EXACT)


def test_the_hard_term_is_cross_entropy_at_T_1():
    s, t = pair(6, 50, dtype=torch.float64)
    labels = some_labels(6, 50, ignored=(2,))
    loss, gradient = both(s, t, labels, alpha=0.0, temperature=5.0, top_k=3)
    s.requires_grad_()
    expected = F.cross_entropy(s, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, s.grad, **EXACT)


@pytest.mark.parametrize("beta", [*BETAS, 1e-3, 0.999])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_every_option_against_autograd(beta, alpha, reduction):
    s, t = pair(2, 3, 20, dtype=torch.float64)
    labels = some_labels(6, 17, ignored=(1, 4)).reshape(2, 3)
    weights = normal(2, 3, seed=5, dtype=torch.float64).abs()
    T = torch.linspace(0.5, 4.0, 6, dtype=torch.float64).reshape(2, 3)
    common = {"beta": beta, "alpha": alpha, "reduction": reduction}
    compare(s, t, labels, temperature=T, **common)
    compare(s, t, labels, temperature=2.0, teacher_temperature=3.0, vocab_size=17, **common)
    compare(s, t, labels, token_weights=weights, ignore_index=-100, **common)
    if reduction == "batchmean":
        compare(s, t, labels, num_items=11, **common)
        compare(s, t, labels, num_items=2.5, token_weights=weights, **common)


@pytest.mark.parametrize("beta", BETAS)
def test_unlabelled_rows_all_count(beta):
    s, t = pair(2, 3, 20, dtype=torch.float64)
    compare(s, t, beta=beta)
    compare(s, t, beta=beta, token_weights=torch.rand(6, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_pruned_loss_is_the_loss_on_the_gathered_columns(beta, alpha):
    s, t = pair(4, 30, dtype=torch.float64)
    labels = some_labels(4, 30)
    for options, count in (
        ({"top_k": 7}, 7),
        ({"bottom_percentile": 40.0}, 18),
        ({"top_k": 20, "bottom_percentile": 50.0}, 15),
        ({"top_k": 4, "bottom_percentile": 50.0}, 4),
        ({"top_k": 99}, 30),
        ({"top_k": 1}, 1),
        ({"bottom_percentile": 99.9}, 1),
    ):
        kept = t.argsort(-1, descending=True)[:, :count].tolist()
        compare(s, t, labels, kept=kept, beta=beta, alpha=alpha, temperature=3.0, **options)


def test_pruning_counts_the_classes_below_vocab_size():
    s, t = pair(2, 30, dtype=torch.float64)
    t[:, 20:] += 50  # would be the largest
    kept = t[:, :20].argsort(-1, descending=True)[:, :10].tolist()
    compare(s, t, kept=kept, vocab_size=20, bottom_percentile=50.0)


GOLDEN_GRADIENTS = {
    (0.0, 1.0): [-0.0278322032, 0.1881206242, 0.0359993154, 0.0093659744, -0.2056537108],
    (0.0, 4.0): [-0.1709260081, 0.2396201827, 0.0999266110, 0.1131885597, -0.2818093453],
    (1.0, 1.0): [-0.0471286255, 0.3307036816, 0.0481962350, 0.0164647668, -0.3482360579],
}


@pytest.mark.parametrize(
    ("beta", "T", "golden"),
    [
        (0.0, 1.0, 0.1755560997),
        (0.0, 4.0, 0.4233904563),
        (1.0, 1.0, 0.2734160707),
        (0.5, 1.0, 0.0512522707),
        (0.1, 1.0, 0.0162122873),
    ],
)
def test_golden_values(beta, T, golden):
    loss, gradient = both(Z, V, beta=beta, temperature=T)
    assert abs(loss.item() - golden) < 6e-11
    if (beta, T) in GOLDEN_GRADIENTS:
        expected = torch.tensor([GOLDEN_GRADIENTS[beta, T]], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=6e-11)


def test_golden_mixes_and_pruning():
    assert abs(both(Z, V, Y, alpha=0.0)[0].item() - 0.4722606814) < 6e-11
    assert abs(both(Z, V, Y, alpha=0.9, temperature=4.0)[0].item() - 0.4282774788) < 6e-11
    loss, gradient = both(Z, V, bottom_percentile=40.0, temperature=4.0)
    assert abs(loss.item() - 0.3822500976) < 6e-11
    expected = [[-0.1499230046, 0.3971042511, 0, 0, -0.2471812466]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=6e-11)
    assert gradient[0, 2] == gradient[0, 3] == 0


@pytest.mark.parametrize("beta", BETAS)
def test_infinite_temperature_is_logit_matching(beta):
    """T^2 D -> c mean((z - mean z - v + mean v)^2) / 2, c the curvature of D."""
    c = beta * (1 - beta) if 0 < beta < 1 else 1.0
    for kept, options in ((list(range(5)), {}), ([0, 1, 4], {"bottom_percentile": 40.0})):
        d = Z[:, kept] - V[:, kept]
        d = d - d.mean()
        loss, gradient = both(Z, V, beta=beta, temperature=1e6, **options)
        torch.testing.assert_close(loss, c * d.square().mean() / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient[:, kept], c * d / len(kept), rtol=1e-5, atol=1e-7)
    if c == 1:
        assert abs(both(Z, V, beta=beta, temperature=1e6)[0].item() - 0.42) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_per_row_temperature_squares_stand_inside_the_mean(beta):
    s, t = pair(3, 20, dtype=torch.float64)
    T = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    alone = [both(s[r : r + 1], t[r : r + 1], beta=beta, temperature=T[r].item()) for r in range(3)]
    loss, gradient = both(s, t, beta=beta, temperature=T)
    torch.testing.assert_close(loss, sum(x for x, _ in alone) / 3, **EXACT)
    torch.testing.assert_close(gradient, torch.cat([g for _, g in alone]) / 3, **EXACT)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_permutation_equivariant_and_shift_invariant(beta):
    s, t = pair(3, 20, dtype=torch.float64)
    loss, gradient = both(s, t, beta=beta, temperature=2.0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled, shuffled_gradient = both(s[:, order], t[:, order], beta=beta, temperature=2.0)
    torch.testing.assert_close(shuffled, loss, **EXACT)
    torch.testing.assert_close(shuffled_gradient, gradient[:, order], **EXACT)
    moved, moved_gradient = both(s + 50, t - 30, beta=beta, temperature=2.0)
    torch.testing.assert_close(moved, loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-9, atol=1e-13)


def test_beta_weighs_the_teacher_in_the_mixture():
    """As in GKD, TRL and Liger: JSD_b(p, q) = JSD_(1-b)(q, p), and 0 and 1 are no limits."""
    s, t = pair(3, 20, dtype=torch.float64)
    for beta in (0.1, 0.25, 0.5):
        forward, backward = both(s, t, beta=beta)[0], both(t, s, beta=1 - beta)[0]
        torch.testing.assert_close(forward, backward, **EXACT)
    assert both(s, t, beta=1e-6)[0] < 1e-4 < both(s, t, beta=0.0)[0]


@pytest.mark.parametrize("percentile", [0.29, 13.33, 20.0, 26.67, 29.0, 40.0, 99.99])
@pytest.mark.parametrize("V_", [1, 2, 3, 100, 1000, 128256])
def test_how_many_are_kept(V_, percentile):
    """floor(V * percentile / 100) go; exact arithmetic says what the floor is."""
    from fractions import Fraction

    exact = V_ - int(V_ * Fraction(str(percentile)) / 100)
    assert _keep(V_, percentile) == max(exact, 1)


@pytest.mark.parametrize(
    ("V_", "percentile", "dropped"),
    [(100, 20, 20), (100, 13.33, 13), (100, 26.67, 26), (100, 40, 40), (128256, 20, 25651),
     (100, 29, 29), (6, 100 * 2 / 6, 2), (7, 100 * 1 / 7, 1)],
)  # fmt: skip
def test_count_table(V_, percentile, dropped):
    assert _keep(V_, percentile) == V_ - dropped


def _keep(V_: int, percentile: float) -> int:
    """How many distinct teacher logits keep a soft gradient."""
    teacher = torch.arange(V_, dtype=torch.float64).unsqueeze(0) / V_
    student = teacher.sin()  # differs in every class
    gradient = both(student, teacher, bottom_percentile=percentile, temperature=10.0)[1]
    return max(int((gradient != 0).sum()), 1)


def test_ties_at_the_threshold_are_all_kept():
    v = torch.tensor([[3.0, 1, 1, 1, 2, 0]], dtype=torch.float64)
    for drop, kept in ((2, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4]), (4, [0, 4]), (5, [0])):
        mask = spec.kept_classes(v, torch.tensor([6 - drop]))
        assert mask[0].nonzero().squeeze(-1).tolist() == kept
        compare(normal(1, 6, dtype=torch.float64), v, kept=[kept], top_k=6 - drop)


def test_minus_infinity_on_both_sides_removes_the_column():
    s, t = pair(3, 12, dtype=torch.float64)
    gone = torch.tensor([0, 5, 11])
    stays = [i for i in range(12) if i not in gone.tolist()]
    s[:, gone] = t[:, gone] = -INF
    for beta in BETAS:
        loss, gradient = both(s, t, beta=beta, temperature=2.0)
        expected, expected_gradient = both(s[:, stays], t[:, stays], beta=beta, temperature=2.0)
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(gradient[:, stays], expected_gradient, **EXACT)
        assert (gradient[:, gone] == 0).all()


def test_gradcheck(backend):
    """Finite differences, in float64, of every term and of their mix."""
    backend.need(torch.float64)
    s, t = pair(3, 7, dtype=torch.float64)
    for beta in BETAS:
        for alpha in (0.0, 0.4, 1.0):
            for reduction in ("batchmean", "none"):
                torch.autograd.gradcheck(
                    lambda z, a=alpha, b=beta, r=reduction: kd_loss(
                        z, t.to(backend.device), some_labels(3, 7).to(backend.device), alpha=a,
                        beta=b, temperature=1.5, top_k=5, reduction=r, backend=backend.name,
                    ),
                    s.to(backend.device).requires_grad_(),
                )  # fmt: skip
