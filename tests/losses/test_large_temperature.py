"""Gradients keep their digits however large the temperature: by rows, of every loss and divergence.

There p and q differ by 1 / T of the logits' difference, and T (q - p) from p and q formed apart
would carry T times their rounding.
"""

import pytest
import torch
from lib.backends import BETAS
from lib.logits import normal, some_labels
from torch import Tensor

from fastkd import dkd_loss, kd_loss, topk_kd_loss, topk_teacher

TEMPERATURES = (2.0, 10.0, 30.0, 100.0, 300.0, 999.0, 1e3, 1e4)
GAPS = (0.1, 2.0)  # between the logits of the two sides
V = 137


@pytest.fixture
def backend(kernel):
    return kernel


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """A student, a teacher and temperatures: a row for every gap at every temperature."""
    T = torch.tensor(TEMPERATURES).repeat_interleave(len(GAPS))
    gap = torch.tensor(GAPS).repeat(len(TEMPERATURES)).unsqueeze(-1)
    teacher = normal(len(T), V)
    return teacher + gap * normal(len(T), V, seed=1, scale=1.0), teacher, T


def outcome(name: str, dtype, device, loss, student: Tensor, inputs, options):
    """Loss and gradient by row, in float64."""

    def move(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    x = move(student).clone().requires_grad_()
    named = {key: move(value) for key, value in options.items()}
    value = loss(x, *map(move, inputs), reduction="none", backend=name, **named)
    value.sum().backward()
    assert x.grad is not None
    return value.detach().double().cpu(), x.grad.double().cpu()


def holds(backend, loss, student: Tensor, *inputs, bound: Tensor | float = 1e-5, **options) -> None:
    """Loss and gradient within `bound` of the definition in float64, in every row."""
    call = loss, student, inputs, options
    value, gradient = outcome(backend.name, torch.float32, backend.device, *call)
    exact, dexact = outcome("reference", torch.float64, "cpu", *call)
    errors = {
        "loss": (value - exact).abs() / exact,
        "gradient": (gradient - dexact).norm(dim=-1) / dexact.norm(dim=-1),
    }
    for what, error in errors.items():
        over = [i for i in range(len(error)) if not (error < bound)[i]]
        rows = {
            f"T {TEMPERATURES[i // 2]:g}, {GAPS[i % 2]} apart": f"{error[i].item():.1e}"
            for i in over
        }
        assert not rows, (what, rows)


@pytest.mark.parametrize("beta", BETAS)
def test_logits(backend, beta):
    s, t, T = rows()
    holds(backend, kd_loss, s, t, beta=beta, temperature=T)


@pytest.mark.parametrize("options", [{}, {"bottom_percentile": 20.0}], ids=str)
def test_every_divergence(backend, options):
    """As above, and for slow backends, which are given few of its parameters."""
    s, t, T = rows()
    for beta in BETAS:
        holds(backend, kd_loss, s, t, beta=beta, temperature=T, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{"top_k": 20}, {"bottom_percentile": 20.0}], ids=str)
def test_pruned(backend, beta, options):
    s, t, T = rows()
    holds(backend, kd_loss, s, t, beta=beta, temperature=T, **options)


@pytest.mark.parametrize("beta", BETAS)
def test_teachers_probabilities(backend, beta):
    s, t, T = rows()
    p = t.softmax(-1)
    holds(backend, kd_loss, s, p, beta=beta, temperature=T, teacher_kind="probs")


def test_temperatures_that_differ(backend):
    s, t, T = rows()
    for beta in BETAS:
        holds(backend, kd_loss, s, t, beta=beta, temperature=T, teacher_temperature=1.01 * T)


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_a_constant_between_the_sides(backend, offset):
    """It changes nothing but the rounding of the logits, which is what may be lost besides."""
    s, t, T = rows()
    gap = torch.tensor(GAPS).repeat(len(TEMPERATURES))
    bound = 1e-5 + torch.finfo(torch.float32).eps / 2 * abs(offset) / gap
    for beta in BETAS:
        holds(backend, kd_loss, s + offset, t, beta=beta, temperature=T, bound=bound)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"teacher_kind": "probs"}, {"alpha": 0.0}, {"beta": 0.0}],
    ids=str,
)  # fmt: skip
def test_decoupled(backend, options):
    s, t, T = rows()
    y = some_labels(len(T), V)
    if "teacher_kind" in options:
        t = t.softmax(-1)
    holds(backend, dkd_loss, s, t, y, temperature=T, **options)


@pytest.mark.parametrize("outside", ["bucket", "restrict", "renormalize"])
@pytest.mark.parametrize("k", [9, V - 1, V])
def test_sparse(backend, outside, k):
    """Where all classes are named nothing is outside, and the sides are as close as logits are."""
    s, t, T = rows()
    ids, log_probs = topk_teacher(t, k)
    holds(backend, topk_kd_loss, s, ids, log_probs, temperature=T, outside=outside)
