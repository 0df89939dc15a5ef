"""The axioms of a softening operator (arXiv:2601.03195), of what the kernels do with a row.

The operator F_T(p) = p^(1/T) / Z is softmax(log p / T). No kernel returns it, but from the
gradient it can be had: a teacher that is sure of another class leaves dloss/dz = T q. The
entropy comes from the loss: with one that is sure of nothing, KL(q || uniform) = log V - H(q).

Order kept, continuous, entropy growing with T, identity at T = 1, and the limits where they hold: a
power keeps a probability of 0, so that T -> infinity gives the uniform distribution on the support.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from lib.bounds import INF
from lib.compare import run

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from fastkd.kernels import triton as triton_backend

SETTINGS = settings(
    max_examples=3 if triton_backend.INTERPRETED else 40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EPS = torch.finfo(torch.float32).eps
# As in bounds.Allowance: exp, sum, division and products carry 20 roundings, the rounding of z / T
# is relative to |ln q|, which is at most 100 where q is a normal number.
RELATIVE = 200 * EPS
TEMPERATURES = st.floats(-1.3, 2.7).map(lambda e: 10.0**e)  # 0.05 ... 500
rows = st.lists(
    st.one_of(st.floats(-12, 0, width=32), st.sampled_from([0.0, -1.0, -INF])),
    min_size=2, max_size=40,
).filter(lambda row: max(row) > -INF).map(lambda row: torch.tensor([row]))  # fmt: skip


def soften(kernel, log_p, T):
    """F_T(p) [1, V]."""
    extra = log_p.amax(-1, keepdim=True) - 200 * T  # one more class, without mass, for the teacher
    teacher = F.pad(torch.full_like(log_p, -INF), (0, 1))
    return run(kernel, torch.cat([log_p, extra], -1), teacher, temperature=T).gradient[:, :-1] / T


def entropy(kernel, log_p, T):
    """H(F_T(p)) from the value of the reverse KL, over the support."""
    uniform = torch.zeros_like(log_p).masked_fill(log_p == -INF, -INF)
    loss = run(kernel, log_p, uniform, temperature=T, beta=1.0).loss.item()
    return math.log(int((log_p > -INF).sum())) - loss / T**2


@given(log_p=rows, T=TEMPERATURES)
@SETTINGS
def test_order_is_kept(kernel, log_p, T):
    q, p = soften(kernel, log_p, T)[0], log_p[0]
    order = p.argsort(stable=True)
    p, q = p[order], q[order]
    steps = p.diff()
    equal = steps.nan_to_num(0) == 0
    assert torch.equal(q[1:][equal], q[:-1][equal])
    # Two exponentials may be rounded past each other; beyond that the order is strict.
    assert (q.diff() >= -4 * EPS * q[1:])[~equal].all()
    exact = F.softmax(p.double() / T, -1)
    clear = (exact.diff() > RELATIVE * exact[1:]) & (exact[1:] > 1e-30)
    assert (q.diff()[clear] > 0).all()


@given(log_p=rows, T=TEMPERATURES, step=st.floats(-0.5, 0.5), seed=st.integers(0, 99))
@SETTINGS
def test_it_is_continuous_in_the_row_and_in_the_temperature(kernel, log_p, T, step, seed):
    """|softmax(x) - softmax(y)|_1 <= max |x - y|, and x = log p / T with its largest value at 0."""
    generator = torch.Generator().manual_seed(seed)
    for size in (step, step * 1e-2, step * 1e-4):
        moved = log_p + size * torch.randn(log_p.shape, generator=generator)
        T_moved = T * (1 + size)
        x, y = (
            (row.double() - row.double().max()) / at for row, at in ((log_p, T), (moved, T_moved))
        )
        distance = (x - y).nan_to_num(0).abs().max().item()
        change = (soften(kernel, log_p, T) - soften(kernel, moved, T_moved)).abs().sum().item()
        assert change <= distance + RELATIVE


@given(log_p=rows, T=TEMPERATURES, factor=st.floats(1.001, 30))
@SETTINGS
def test_entropy_grows_with_the_temperature(kernel, log_p, T, factor):
    V = log_p.shape[-1]
    cooler, warmer = entropy(kernel, log_p, T), entropy(kernel, log_p, T * factor)
    rounding = RELATIVE * (1 + math.log(V))
    assert -rounding <= cooler <= warmer + rounding <= math.log(V) + 2 * rounding
    p = [F.softmax(log_p.double() / at, -1) for at in (T, T * factor)]
    exact = [torch.special.entr(row).sum().item() for row in p]
    assert cooler == pytest.approx(exact[0], abs=rounding)
    if exact[1] - exact[0] > 2 * rounding:
        assert warmer > cooler


@given(log_p=rows)
@SETTINGS
def test_a_temperature_of_1_changes_nothing(kernel, log_p):
    log_p = F.log_softmax(log_p.double(), -1).float()
    q = soften(kernel, log_p, 1.0)
    # a log-probability in float32 is itself rounded, relative to its size
    torch.testing.assert_close(q, log_p.exp(), rtol=RELATIVE, atol=1e-30)
    assert (q[log_p == -INF] == 0).all()


@given(log_p=rows, T=TEMPERATURES)
@SETTINGS
def test_it_is_the_power_of_the_probabilities(kernel, log_p, T):
    p = F.softmax(log_p.double(), -1)
    power = p ** (1 / T)
    torch.testing.assert_close(
        soften(kernel, log_p, T).double(), power / power.sum(), rtol=RELATIVE, atol=1e-30
    )


@given(log_p=rows, T=TEMPERATURES)
@SETTINGS
def test_teacher_and_student_are_softened_alike(kernel, log_p, T):
    actual = run(kernel, log_p, log_p, temperature=T)
    q = soften(kernel, log_p, T)
    assert (actual.gradient.abs() <= T * RELATIVE * q + 1e-30).all()
    assert 0 <= actual.loss <= T**2 * RELATIVE**2


@given(log_p=rows)
@SETTINGS
def test_a_high_temperature_gives_the_uniform_distribution_on_the_support(kernel, log_p):
    support = log_p > -INF
    width = (log_p[support].max() - log_p[support].min()).item()
    n = int(support.sum())
    for T in (50.0, 900.0):
        q = soften(kernel, log_p, T)
        assert (q[~support] == 0).all()
        assert ((q[support] - 1 / n).abs() <= math.expm1(width / T) / n + RELATIVE).all()


@given(log_p=rows)
@SETTINGS
def test_a_low_temperature_gives_the_uniform_distribution_on_the_largest(kernel, log_p):
    largest = log_p == log_p.max()
    below = log_p[~largest]
    gap = (log_p.max() - below.max()).item() if len(below) else INF
    assume(gap > 1e-3)
    q = soften(kernel, log_p, min(gap, 1.0) / 120)
    assert (q[~largest] <= 1e-30).all()
    torch.testing.assert_close(
        q[largest], torch.full_like(q[largest], 1 / int(largest.sum())), rtol=RELATIVE, atol=0
    )


def test_zeros_stay_zero_at_every_temperature(kernel):
    p = torch.tensor([[0.7, 0.3, 0.0, 0.0]])
    for T in (0.1, 1.0, 2.0, 900.0):
        q = soften(kernel, p.log(), T)
        assert q[0, 2:].tolist() == [0.0, 0.0]
        assert q[0, :2].sum().item() == pytest.approx(1, abs=1e-6)
    assert q[0, :2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
