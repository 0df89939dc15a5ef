"""Rows that are sure of one class: its gradient is a difference of two numbers near 1.

Every row of a float32 gradient keeps a relative L2 error of 1e-5 (DESIGN section 5), however sure
the two sides are and whether they agree; of a 16-bit one beyond the rounding of its store.
"""

import pytest
import torch
from lib.backends import BETAS
from lib.compare import run
from lib.logits import normal
from torch import Tensor

from fastkd import dkd_loss, topk_kd_loss, topk_teacher

ALLOWED = 1e-5
# The odds of the sure class against all others together, in nats: 0.5 to 1 - 6e-6. Beyond, with
# gaps of 1e-3 between the logits, the definition's own float64 ends.
ODDS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
AT = 7  # the class that the student is sure of
KINDS = ("both", "apart", "student", "teacher")  # is sure


@pytest.fixture
def backend(kernel):
    return kernel


def make_sure(x: Tensor, at: int, odds: Tensor) -> Tensor:
    """One logit set so that its class has these odds against all others."""
    others = x.clone()
    others[:, at] = -torch.inf
    return x.index_copy(1, torch.tensor([at]), (others.logsumexp(-1) + odds).unsqueeze(-1))


def rows(kind: str, V: int, noise: float = 1.0, dtype=torch.float32, odds=ODDS):
    """Student and teacher [len(odds), V], row by row more sure."""
    odds = torch.tensor(odds, dtype=torch.float64)
    t = normal(len(odds), V, seed=V, dtype=torch.float64, scale=1.5)
    s = t + normal(len(odds), V, seed=V + 1, dtype=torch.float64, scale=noise)
    if kind != "teacher":
        s = make_sure(s, AT, odds)
    if kind == "both":
        t = make_sure(t, AT, odds + noise / 2)
    elif kind != "student":
        t = make_sure(t, V - 2, odds.flip(0))
    return s.to(dtype), t.to(dtype)


def errors(actual: Tensor, exact: Tensor) -> Tensor:
    """[N], relative, beyond the rounding of the store; of float16 twice, the first scaled up."""
    info = torch.finfo(actual.dtype)
    off = (actual.double() - exact).abs()
    if actual.dtype != torch.float32:
        roundings, spacings = (2, 9 / 8) if actual.dtype == torch.float16 else (1, 1)
        off = (
            off
            - roundings * info.eps / 2 * exact.abs()
            - spacings * info.smallest_normal * (info.eps / 2)
        )
    return off.clamp_min(0).norm(dim=-1) / exact.norm(dim=-1)


def judge(backend, s: Tensor, t: Tensor, labels=None, **options) -> None:
    options = {"reduction": "sum"} | options
    actual = run(backend, s, t, labels, **options).gradient
    exact = run("reference", s.double(), t.double(), labels, **options).gradient
    off = errors(actual, exact)
    assert off.max() < ALLOWED, off


def width(backend) -> int:
    return 300 if backend.interpreted else 700 if backend.slow else 5000


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 1.5, "teacher_temperature": 1.25},
        {"top_k": 300},
        {"top_k": 12},
        {"bottom_percentile": 20.0},
        {"vocab_size": 600},
    ],
    ids=str,
)
def test_every_divergence(backend, beta, kind, options):
    s, t = rows(kind, width(backend))
    judge(backend, s, t, beta=beta, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_closer_and_further(backend, beta, kind):
    """All other classes nearly as the teacher has them, or not at all; offsets; a late class.

    Where one class is sure on one side only, ln(q / p) of all others is some constant, whose
    rounding shows beside smaller gaps: it is eps times 5, for these odds, over the gap.
    """
    for noise in (1e-3, 0.1, 4.0) if kind == "both" else (0.3, 4.0):
        s, t = rows(kind, width(backend), noise)
        judge(backend, s, t, beta=beta)
        judge(backend, s.flip(-1), t.flip(-1), beta=beta)
        if noise > 1:  # else the rounding of the logits' difference shows
            judge(backend, s + 30, t - 30, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_teacher_probabilities(backend, beta, kind):
    s, t = rows(kind, width(backend))
    judge(backend, s, t.double().softmax(-1).float(), beta=beta, teacher_kind="probs")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_absent_classes(backend, beta, kind):
    """Masked by -inf on both sides, and on the teacher's alone where that has a gradient."""
    s, t = rows(kind, width(backend))
    s[:, ::3] = t[:, ::3] = -torch.inf
    if beta < 1:
        t[:, 1::30] = -torch.inf
    judge(backend, s, t, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("T", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.999])
def test_beside_the_hard_term(backend, beta, T, alpha):
    """Whose label is the class of which the student is sure at T = 1, or another one."""
    for kind in KINDS:
        s, t = rows(kind, width(backend))
        for label in (AT, 3):
            labels = torch.full((len(s),), label)
            options = {"beta": beta, "temperature": T, "alpha": alpha}
            judge(backend, s, t, labels, **options)
            judge(backend, s, t, labels, top_k=20, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_stored_in_16_bits(backend, dtype, beta, kind):
    s, t = rows(kind, width(backend), dtype=dtype, odds=ODDS[:6])
    judge(backend, s, t, beta=beta)
    judge(backend, s, t, torch.full((len(s),), AT), beta=beta, alpha=0.5)


def judge_loss(loss, backend, student: Tensor, *arguments, **options) -> None:
    gradients = []
    for name, z in ((backend.name, student), ("reference", student.double())):
        z = z.to(backend.device if name == backend.name else "cpu", copy=True).requires_grad_()
        moved = [a.to(z.device, z.dtype if a.is_floating_point() else a.dtype) for a in arguments]
        loss(z, *moved, reduction="sum", backend=name, **options).backward()
        gradients.append(z.grad.cpu())
    off = errors(*gradients)
    assert off.max() < ALLOWED, off


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [AT, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"hard_weight": 1.0}, {"beta": 0.0}, {"alpha": 0.0}, {"top_k": 30, "hard_weight": 0.1}],
    ids=str,
)
def test_decoupled(backend, kind, label, options):
    """The label sure, or another one sure among all but the label."""
    s, t = rows(kind, width(backend))
    labels = torch.full((len(s),), label)
    for T in (1.0, 2.0):
        judge_loss(dkd_loss, backend, s, t, labels, temperature=T, **options)


@pytest.mark.parametrize("outside", ["bucket", "restrict", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_sparse_teachers(backend, outside, kind, alpha):
    """What is left for a bucket comes as a logarithm, rounded at -12: off by 5e-7 beside its gap,
    which is half the square of the classes'.
    """
    for noise in (0.5, 1.0):
        s, t = rows(kind, width(backend), noise)
        labels = torch.full((len(s),), AT)
        for k in (16, 200):
            ids, log_probs = topk_teacher(t, k)
            for T in (1.0, 2.0):
                judge_loss(topk_kd_loss, backend, s, ids, log_probs, labels, outside=outside,
                           alpha=alpha, temperature=T)  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("V", [8, 300])
def test_a_class_that_only_the_student_is_sure_of(backend, V, beta):
    """The teacher's probability of it is beyond what float32 holds, and ln(q / m) at its limit."""
    gaps = (20.0, 60.0, 85.0, 89.0, 95.0, 105.0, 150.0, 1e4)
    s, t = (x[:1].expand(len(gaps), V).clone() for x in rows("student", V, odds=(3.0,)))
    t[:, AT] = t.amax(-1) - torch.tensor(gaps)
    actual = run(backend, s, t, beta=beta, reduction="sum").gradient
    exact = run("reference", s.double(), t.double(), beta=beta, reduction="sum").gradient
    allowed = torch.full((len(gaps),), ALLOWED, dtype=torch.float64)
    if backend.name == "triton":  # logits relative to that class are rounded as the gap is
        allowed += torch.finfo(torch.float32).eps * torch.tensor(gaps, dtype=torch.float64)
    assert (errors(actual, exact) <= allowed).all()
