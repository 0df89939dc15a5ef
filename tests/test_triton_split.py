"""Rows that several programs of the Triton kernel share: whatever the order in which these run, the
same bits, no program left waiting, and counters as they were. In Triton's interpreter, its programs
by turns (triton_interpreter.py).
"""

import pytest
import torch
from conftest import BACKENDS, INF, NAN, check, normal, pair, run, some_labels

from fastkd import triton_backend

if not triton_backend.INTERPRETED or triton_backend.MISSING:
    pytest.skip("in Triton's interpreter", allow_module_level=True)

import triton_interpreter as turns

from fastkd import triton_launch
from fastkd.spec import FORWARD

TRITON = next(backend for backend in BACKENDS if backend.name == "triton")
N, V = 3, 90  # in slices of 32 columns
CALLS = {
    "forward": {},
    "reverse": {"beta": 1.0, "inplace": True},
    "mixture, hard": {"beta": 0.3, "alpha": 0.5},
    "hard": {"alpha": 0.0, "inplace": True},
    "limit, hard": {"temperature": INF, "alpha": 0.5, "inplace": True},
}


@pytest.fixture
def counters(monkeypatch):
    """What the launches count in."""
    found = torch.zeros(1 + N, dtype=torch.int32)
    monkeypatch.setattr(triton_launch, "_counters", lambda device, n: found[:n])
    return found


def logits(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = pair(N, V)
    if kind == "near":  # no digits in a difference of sums
        s = t + 1e-3 * normal(N, V, seed=5)
    if kind == "infinite":
        s[0, :40] = t[0, :40] = -INF  # all of a slice
        t[1, 32:64] = -INF
        s[2, 5] = NAN
    return s, t


@pytest.mark.parametrize("kind", ["ordinary", "near", "infinite"])
@pytest.mark.parametrize("call", CALLS)
def test_the_order_of_programs_changes_nothing(counters, call, kind):
    s, t = logits(kind)
    labels = some_labels(N, V, ignored=(1,) if kind == "ordinary" else ())
    results = []
    for room, seed in ((3, 1), (3, 2), (4, 3), (9, 4)):
        with turns.taking_turns(room, seed) as launches:
            results.append(run(TRITON, s, t, labels, reduction="none", **CALLS[call]))
        assert launches and not counters.any()
    for result in results[1:]:
        assert torch.equal(result.loss.view(torch.int32), results[0].loss.view(torch.int32))
        assert torch.equal(result.gradient.view(torch.int32), results[0].gradient.view(torch.int32))


def test_less_room_than_a_row_takes_is_noticed():
    """By the scheduler of the tests, that is: a kernel which waits too early would hang in it."""
    s, t = pair(N, V)
    with turns.taking_turns(room=2), pytest.raises(Exception, match="wait for each other"):
        run(TRITON, s, t)


def test_counters_are_enough():
    """For rows that are skipped or have no class for a label, which no program waits at."""
    s, t = pair(4, V)
    labels = torch.tensor([-100, 5, -100, V - 1])
    with turns.taking_turns():
        check(TRITON, s, t, labels, alpha=0.5)
        vector = torch.ones(4)
        g = torch.empty(4, V + 40)
        wide = torch.cat([s, torch.full((4, 40), NAN)], 1)
        soft, hard = torch.ops.fastkd.kd_rows_triton(
            wide, t, torch.tensor([0, V, -3, 1]), vector, vector, vector, vector, g, None, V,
            FORWARD, None,
        )  # fmt: skip
    for values in (soft, hard, g[:, :V].sum(-1)):
        assert torch.equal(values.isnan(), torch.tensor([False, True, True, False]))
    assert (g[:, V:] == 0).all()


def test_slices_of_rows_that_begin_anywhere():
    """The last may hold no column of rows that begin early in a vector."""
    for width in (64, 65, 71, 95, 96, 97):
        s, t = (x[:, 3:] for x in pair(4, width + 3, dtype=torch.bfloat16))
        with turns.taking_turns(), turns.checking_overflow():
            check(TRITON, s, t, alpha=0.5, labels=some_labels(4, width))


def test_launches_share_counters_in_a_stream_only(monkeypatch):
    made = []

    def zeros(n, **_):
        made.append(n)
        return torch.empty(n, dtype=torch.int32)

    stream, capturing = [7], [False]
    monkeypatch.setattr(triton_launch.torch, "zeros", zeros)
    monkeypatch.setattr(triton_launch, "_COUNTERS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    class Stream:
        def __init__(self, device):
            self.cuda_stream = stream[0]

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    gpu = torch.device("cuda", 0)
    first = triton_launch._counters(gpu, 5)
    assert triton_launch._counters(gpu, 1000) is first
    stream[0] = 8
    assert triton_launch._counters(gpu, 5) is not first
    stream[0] = 7
    larger = triton_launch._counters(gpu, 5000)
    assert larger is not first and larger.numel() >= 5000
    assert triton_launch._counters(gpu, 5) is larger
    capturing[0] = True  # the graph may be replayed beside anything
    assert triton_launch._counters(gpu, 5) is not triton_launch._counters(gpu, 5)
    assert len(made) == 5
