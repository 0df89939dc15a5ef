"""Ensembles, their identities and memory; mutual learning; the class bias; the recipes."""

import doctest
import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from lib.bounds import INF, NAN
from lib.compare import run
from lib.logits import normal, pair
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd import teachers
from fastkd.core import chunks


def members(*shape, count=3, dtype=torch.float64):
    return [normal(*shape, seed=10 + m, dtype=dtype) for m in range(count)]


def mean_of_probs(teachers, T=1.0, weights=None):
    weights = weights or [1 / len(teachers)] * len(teachers)
    pairs = zip(teachers, weights, strict=True)
    return sum(w * F.softmax(v.double() / T, -1) for v, w in pairs)


def test_the_recipes_and_examples_of_the_docstrings():
    torch.manual_seed(0)
    model = {name: torch.nn.Linear(6, 10) for name in ("student", "peer", "assistant", "teacher")}
    names = {
        "torch": torch, "F": F, "math": math, "fastkd": fastkd, "own_share": 0.3,
        "inputs": torch.randn(8, 6), "labels": torch.arange(8), **model,
        "specialist_logits": torch.randn(8, 4),
    }  # fmt: skip
    failed, attempted = doctest.testmod(teachers, extraglobs=names)
    assert attempted >= 12 and failed == 0
    assert all(m.weight.grad is not None for n, m in model.items() if n != "teacher")
    assert model["teacher"].weight.grad is None


@pytest.mark.parametrize("T", [1.0, 4.0, 0.5])
def test_the_mean_of_probabilities(T):
    teachers = members(5, 33)
    logits = fastkd.ensemble(teachers, temperature=T)
    assert logits.dtype == torch.float64 and not logits.requires_grad
    torch.testing.assert_close(F.softmax(logits / T, -1), mean_of_probs(teachers, T))
    if T == 1:
        torch.testing.assert_close(logits.exp(), mean_of_probs(teachers))


def test_a_temperature_per_row():
    teachers, T = members(2, 3, 11), torch.linspace(0.5, 6, 6, dtype=torch.float64)
    logits = fastkd.ensemble(teachers, temperature=T.reshape(2, 3))
    T = T.reshape(2, 3, 1)
    torch.testing.assert_close(F.softmax(logits / T, -1), mean_of_probs(teachers, T))


def test_the_mean_of_logits_is_the_geometric_mean_at_every_temperature():
    teachers, weights = members(5, 33), [0.5, 0.3, 0.2]
    logits = fastkd.ensemble(teachers, weights, mean="logits")
    for T in (1.0, 3.0):
        pairs = zip(teachers, weights, strict=True)
        log_p = sum(w * F.log_softmax(v / T, -1) for v, w in pairs)
        torch.testing.assert_close(F.softmax(logits / T, -1), F.softmax(log_p, -1))


def test_weights_are_normalised_and_a_teacher_of_weight_0_is_not_read():
    teachers = members(4, 9)
    lost = torch.full_like(teachers[0], NAN)
    for mean in ("probs", "logits"):
        expected = fastkd.ensemble(teachers, [0.5, 0.25, 0.25], mean=mean)
        actual = fastkd.ensemble([lost, *teachers], [0, 4, 2, 2], mean=mean)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(fastkd.ensemble(iter(teachers[:1]), mean="logits"), teachers[0])
    torch.testing.assert_close(
        F.softmax(expected, -1), F.softmax(teachers[0] / 2 + (teachers[1] + teachers[2]) / 4, -1)
    )


def test_dtypes_may_be_mixed():
    a, b, c = members(6, 50)
    teachers = [a.bfloat16(), b.half(), c.float()]
    logits = fastkd.ensemble(teachers, temperature=2.0)
    assert logits.dtype == torch.float32
    expected = mean_of_probs(teachers, 2.0)
    torch.testing.assert_close(F.softmax(logits.double() / 2, -1), expected, rtol=2e-6, atol=1e-12)
    assert fastkd.ensemble([a.bfloat16(), b]).dtype == torch.float64


@pytest.mark.parametrize("mean", ["probs", "logits"])
def test_leading_shapes_strides_and_chunks(monkeypatch, mean):
    flat = members(24, 7)
    expected = fastkd.ensemble(flat, temperature=2.0, mean=mean)
    monkeypatch.setattr(chunks, "LOGITS", 5 * 7)  # 5 chunks, the last one shorter
    assert torch.equal(fastkd.ensemble(flat, temperature=2.0, mean=mean), expected)
    for shape in ((2, 12, 7), (2, 3, 4, 7), (24, 1, 7)):
        views = [v.reshape(shape) for v in flat]
        actual = fastkd.ensemble(views, temperature=2.0, mean=mean)
        assert actual.shape == shape and torch.equal(actual.reshape(24, 7), expected)
    shifted = [F.pad(v.reshape(2, 12, 7), (2, 1, 1, 0))[:, 1:, 2:-1] for v in flat]
    columns = [v.t().contiguous().t() for v in flat]
    assert torch.equal(fastkd.ensemble(columns, temperature=2.0, mean=mean), expected)
    assert torch.equal(
        fastkd.ensemble(shifted, temperature=2.0, mean=mean).reshape(24, 7), expected
    )
    one = fastkd.ensemble([v[3] for v in flat], temperature=2.0, mean=mean)
    assert one.shape == (7,) and torch.equal(one, expected[3])
    assert fastkd.ensemble([v[:0] for v in flat], mean=mean).shape == (0, 7)


def test_infinities_and_nan():
    a, b = members(3, 6, count=2)
    a[0, :2], b[0, 1:3] = -INF, -INF
    b[1, 4] = NAN
    probs, logits = fastkd.ensemble([a, b]), fastkd.ensemble([a, b], mean="logits")
    p = mean_of_probs([a, b])
    assert probs[0, 1] == -INF and (probs[0] == -INF).sum() == 1
    torch.testing.assert_close(probs[0].exp(), p[0])
    torch.testing.assert_close(probs[0, 0].exp(), F.softmax(b[0], -1)[0] / 2)
    assert (logits[0] == -INF).nonzero().flatten().tolist() == [0, 1, 2]
    assert probs[1].isnan().all() and logits[1].isnan().nonzero().flatten().tolist() == [4]
    assert probs[2].isfinite().all() and logits[2].isfinite().all()


def test_no_value_is_read_back():
    teachers = members(4, 33)

    def both(*teachers):
        return fastkd.ensemble(teachers), fastkd.ensemble(teachers, [1, 2, 3], mean="logits")

    assert both(*(v.to("meta") for v in teachers))[0].shape == (4, 33)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*teachers), both(*teachers), strict=True):
        torch.testing.assert_close(actual, expected)


def test_class_bias_under_a_default_device():
    logits, labels = torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([1, 0])
    with torch.device("meta"):
        assert fastkd.class_bias(logits, labels, [1]) == 3.0


def test_weights_may_be_a_tensor():
    teachers = members(4, 9)
    expected = fastkd.ensemble(teachers, [1.0, 2.0, 5.0])
    for weights in (torch.tensor([1, 2, 5]), torch.tensor([1.0, 2.0, 5.0])):
        assert torch.equal(fastkd.ensemble(teachers, weights), expected)


def test_a_small_probability_keeps_its_logarithm():
    v = torch.tensor([[0.0, -300.0, -90.0]])
    logits = fastkd.ensemble([v, v, v])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.log_softmax(v, -1), rtol=1e-6, atol=1e-6)


def test_memory_is_the_result_and_a_few_chunks(monkeypatch):
    N, V = 64, 4096
    teachers = members(N, V, count=6, dtype=torch.float32)
    monkeypatch.setattr(chunks, "LOGITS", 2 * V)
    for mean in ("probs", "logits"):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            fastkd.ensemble(teachers, mean=mean)
        events = profiler.profiler.kineto_results.events()
        events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak = max(accumulate(event.nbytes() for event in events))
        assert 4 * N * V <= peak < 4 * V * (N + 12)


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_distilling_the_mean_is_distilling_from_all(backend, T):
    """The gradients agree; the losses differ by T^2 sum_m w_m KL(p_m || mean)."""
    s, _ = pair(6, 33)
    teachers, weights = members(6, 33, dtype=torch.float32), [0.5, 0.3, 0.2]
    joint = run(backend, s, fastkd.ensemble(teachers, weights, T), temperature=T)
    each = [run(backend, s, v, temperature=T) for v in teachers]
    gradient = sum(w * r.gradient for w, r in zip(weights, each, strict=True))
    torch.testing.assert_close(joint.gradient, gradient, rtol=1e-5, atol=1e-7)
    mean = mean_of_probs(teachers, T, weights).log()
    constant = sum(
        w * T**2 * F.kl_div(mean, F.log_softmax(v.double() / T, -1), reduction="batchmean",
                            log_target=True)
        for w, v in zip(weights, teachers, strict=True)
    )  # fmt: skip
    separate = sum(w * r.loss for w, r in zip(weights, each, strict=True))
    assert separate - joint.loss == pytest.approx(constant.item(), rel=1e-5)
    assert constant > 0.1


def test_the_mean_of_logits_is_the_mean_of_reverse_divergences(backend):
    s, _ = pair(6, 33)
    teachers, weights = members(6, 33, dtype=torch.float32), [0.5, 0.3, 0.2]
    joint = run(backend, s, fastkd.ensemble(teachers, weights, mean="logits"), beta=1.0)
    each = [run(backend, s, v, beta=1.0) for v in teachers]
    gradient = sum(w * r.gradient for w, r in zip(weights, each, strict=True))
    torch.testing.assert_close(joint.gradient, gradient, rtol=2e-5, atol=1e-6)


def test_two_peers_move_against_each_other(backend):
    """Two students learn from each other at T = 1, without labels: gradients -g and g."""
    a, b = pair(5, 40)
    one, two = run(backend, a, b), run(backend, b, a)
    torch.testing.assert_close(one.gradient, -two.gradient, rtol=1e-5, atol=1e-8)
    assert one.gradient.abs().max() > 1e-3


def accuracy(logits, labels, classes, delta):
    shifted = logits.clone()
    shifted[:, classes] += delta
    return int((shifted.argmax(-1) == labels).sum())


@pytest.mark.parametrize("classes", [[3], [0, 4, 2]])
@pytest.mark.parametrize("seed", range(5))
def test_class_bias_is_the_best_offset(classes, seed):
    labels = torch.arange(60) % 5
    logits = normal(60, 5, seed=seed, scale=1.5)
    logits[torch.arange(60), labels] += 2
    logits[:, classes] -= 3
    delta = fastkd.class_bias(logits, labels, classes)
    found = accuracy(logits, labels, classes, delta)
    grid = torch.linspace(-15, 15, 3001).tolist()
    assert found == max(accuracy(logits, labels, classes, d) for d in grid)
    assert found > accuracy(logits, labels, classes, 0.0)
    # what does not count does not matter
    ignored = labels.clone()
    ignored[::2] = -100
    assert fastkd.class_bias(logits, ignored, classes) == fastkd.class_bias(
        logits[1::2], labels[1::2], classes
    )


def test_class_bias_leaves_alone_what_is_right():
    logits = F.one_hot(torch.arange(4), 4).float()
    assert fastkd.class_bias(logits, torch.arange(4), [1]) == 0.0
    assert fastkd.class_bias(logits, torch.full((4,), -100), [1]) == 0.0
    # Every row is of another class: any offset low enough, but not without end.
    assert -4 < fastkd.class_bias(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), [1]) < 0
    assert 0 < fastkd.class_bias(torch.zeros(3, 2), torch.ones(3, dtype=torch.long), [1]) < 4
    # Rows that no offset can move do not count.
    logits = torch.tensor([[1.0, 0.0], [-INF, 0.0], [0.0, -INF], [5.0, 0.0], [NAN, 0.0]])
    assert fastkd.class_bias(logits, torch.tensor([1, 1, 0, 0, 0]), [1]) == 3.0


TWO = members(4, 9, count=2)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "at least one", lambda: fastkd.ensemble([])),
        (TypeError, r"teacher_logits_list\[1\]", lambda: fastkd.ensemble([TWO[0], [1.0]])),
        (TypeError, r"list\[0\] must be float32", lambda: fastkd.ensemble([torch.arange(3)])),
        (ValueError, r"list\[0\] must have shape", lambda: fastkd.ensemble([torch.zeros(())])),
        (ValueError, r"list\[1\].*\(4, 9\).*\(4, 8\)",
         lambda: fastkd.ensemble([TWO[0], TWO[1][:, :8]])),
        (ValueError, r"list\[1\] requires a gradient",
         lambda: fastkd.ensemble([TWO[0], TWO[1].clone().requires_grad_()])),
        (ValueError, "device", lambda: fastkd.ensemble([TWO[0], TWO[1].to("meta")])),
        (ValueError, "weights", lambda: fastkd.ensemble(TWO, [1.0])),
        (ValueError, "weights", lambda: fastkd.ensemble(TWO, [1.0, -1.0])),
        (ValueError, "weights", lambda: fastkd.ensemble(TWO, [1.0, NAN])),
        (ValueError, "weights", lambda: fastkd.ensemble(TWO, [0, 0])),
        (TypeError, "weights", lambda: fastkd.ensemble(TWO, ["1", 1])),
        (ValueError, "mean", lambda: fastkd.ensemble(TWO, mean="median")),
        (ValueError, "temperature", lambda: fastkd.ensemble(TWO, temperature=0.0)),
        (ValueError, "temperature", lambda: fastkd.ensemble(TWO, temperature=torch.ones(5))),
        (TypeError, "temperature", lambda: fastkd.ensemble(TWO, temperature="2")),
        (ValueError, "classes", lambda: fastkd.class_bias(TWO[0], torch.zeros(4).long(), [])),
        (ValueError, "classes", lambda: fastkd.class_bias(TWO[0], torch.zeros(4).long(), [9])),
        (ValueError, "classes", lambda: fastkd.class_bias(TWO[0], torch.zeros(4).long(), [1, 1])),
        (ValueError, "classes", lambda: fastkd.class_bias(TWO[0], torch.zeros(4).long(), range(9))),
        (TypeError, "classes", lambda: fastkd.class_bias(TWO[0], torch.zeros(4).long(), [1.0])),
        (ValueError, "labels", lambda: fastkd.class_bias(TWO[0], torch.full((4,), 9), [1])),
        (TypeError, "labels", lambda: fastkd.class_bias(TWO[0], None, [1])),
        (TypeError, "logits", lambda: fastkd.class_bias([1.0], torch.zeros(1).long(), [0])),
    ],
)  # fmt: skip
def test_what_is_refused(error, name, call):
    with pytest.raises(error, match=name):
        call()


def test_a_teacher_that_requires_a_gradient_is_fine_where_there_is_none():
    with torch.no_grad():
        fastkd.ensemble([TWO[0], TWO[1].clone().requires_grad_()])
