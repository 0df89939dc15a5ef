"""Schedules: the papers' values, ends and borders of stages, ranks with ties, arguments."""

import doctest

import pytest
import torch
from lib.bounds import INF, NAN
from lib.compare import run
from lib.logits import normal, pair

import fastkd
from fastkd import schedules
from fastkd.core.checks import number_kept


def test_the_examples_of_the_docstrings():
    names = {"schedules": schedules, "torch": torch, "fastkd": fastkd}
    failed, attempted = doctest.testmod(schedules, extraglobs=names)
    assert attempted >= 7 and failed == 0


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (0.4, [5.6, 5.142857, 4.685714, 4.228571, 3.771429, 3.314286, 2.857143, 2.4]),
        (0.2, [4.8, 4.571429, 4.342857, 4.114286, 3.885714, 3.657143, 3.428571, 3.2]),
    ],
)
def test_epoch_adaptive_temperature_of_the_paper(delta, expected):
    actual = [schedules.epoch_adaptive_temperature(e, 80, 4.0, delta) for e in range(80)]
    for stage, value in enumerate(expected):
        assert actual[10 * stage : 10 * stage + 10] == [pytest.approx(value, abs=5e-7)] * 10


def test_epoch_adaptive_temperature_at_its_ends():
    eat = schedules.epoch_adaptive_temperature
    assert eat(80, 80) == eat(1000, 80) == eat(79, 80)
    assert eat(5, 80, stages=1) == pytest.approx(5.6)
    assert eat(5, 80, 3.0, delta=0) == 3.0
    assert [eat(e, 3, 1.0, 0.5, stages=8) for e in range(3)] == pytest.approx(
        [1.5, 1.5 - 2 / 7, 1.5 - 5 / 7]
    )  # fewer epochs than stages: some are left out


def test_pruning_percentile():
    values = [schedules.pruning_percentile(e, 80) for e in range(81)]
    assert values[:20] == [0.0] * 20 and values[60:] == [40.0] * 21
    dropped = [100 - number_kept(None, values[e], 100) for e in (0, 20, 40, 60)]
    assert dropped == [0, 13, 26, 40]
    assert [schedules.pruning_percentile(e, 4, [0, 10, 20, 40]) for e in range(4)] == [
        0,
        10,
        20,
        40,
    ]


def test_the_parts_of_in_equal_parts_are_equal():
    for epochs in (1, 7, 8, 80, 1001):
        for count in (1, 3, 4, 8):
            taken = [schedules.in_equal_parts(range(count), e, epochs) for e in range(epochs)]
            assert taken == sorted(taken)
            sizes = [taken.count(k) for k in range(count)]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("rows", "expected"), [(8, 0), (9, 0), (10, 1), (64, 6), (100, 10), (128, 12)]
)
def test_data_adaptive_temperature_counts(rows, expected):
    T = schedules.data_adaptive_temperature(normal(rows), 4.0)
    assert T.shape == (rows,) and T.dtype == torch.float32
    values, counts = T.unique(return_counts=True)
    if expected == 0:
        assert values.tolist() == [4.0]
    else:
        assert values.tolist() == pytest.approx([3.8, 4.0, 4.2])
        assert counts.tolist() == [expected, rows - 2 * expected, expected]


def test_data_adaptive_temperature_ranks_the_losses():
    loss = normal(3, 20, seed=5)
    T = schedules.data_adaptive_temperature(loss, 4.0)
    order = loss.flatten().argsort()
    assert (T.flatten()[order[:6]] < 4).all() and (T.flatten()[order[-6:]] > 4).all()
    assert (T.flatten()[order[6:-6]] == 4).all()


def test_fractions_are_counted_as_percentiles_are():
    T = schedules.data_adaptive_temperature(normal(100), 4.0, fraction=0.29)
    assert int((T > 4).sum()) == int((T < 4).sum()) == 29
    T = schedules.data_adaptive_temperature(normal(9), 4.0, fraction=0.5)
    assert int((T == 4).sum()) == 1


def test_equal_losses_rank_by_position():
    T = schedules.data_adaptive_temperature(torch.zeros(20), 4.0)
    assert (T[:2] < 4).all() and (T[2:18] == 4).all() and (T[18:] > 4).all()
    # 40 rows are more than an unstable sort would leave in place
    loss = torch.tensor([1.0, 0.0] * 20)
    T = schedules.data_adaptive_temperature(loss, 4.0)
    assert (T < 4).nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert (T > 4).nonzero().flatten().tolist() == [32, 34, 36, 38]


def test_ignored_rows_have_no_rank():
    loss = normal(40).abs()
    labels = torch.arange(40) % 10
    ignored = torch.arange(0, 40, 2)
    labels[ignored] = -100
    loss[ignored] = 0.0  # as reduction="none" gives
    T = schedules.data_adaptive_temperature(loss, 4.0, labels=labels)
    assert (T[ignored] == 4).all()
    kept = schedules.data_adaptive_temperature(loss[1::2], 4.0)
    assert torch.equal(T[1::2], kept) and int((kept > 4).sum()) == 2
    loss[ignored] = NAN
    assert torch.equal(T, schedules.data_adaptive_temperature(loss, 4.0, labels=labels))
    labels[:] = -100
    assert (schedules.data_adaptive_temperature(loss, 4.0, labels=labels) == 4).all()


def test_infinite_and_nan_losses_are_the_hardest():
    loss = torch.tensor([INF, *range(17), NAN, 3.0])
    T = schedules.data_adaptive_temperature(loss, 4.0)
    assert (T > 4).nonzero().flatten().tolist() == [0, 18]


def test_per_row_temperatures_are_scaled_in_place_and_dtype():
    base = torch.linspace(1, 2, 20, dtype=torch.float64)
    loss = torch.arange(20.0)
    T = schedules.data_adaptive_temperature(loss, base)
    expected = base.clone()
    expected[:2] *= 0.95
    expected[-2:] *= 1.05
    assert T.dtype == torch.float64 and torch.equal(T, expected)
    assert schedules.data_adaptive_temperature(loss.double(), 4.0).dtype == torch.float64
    assert schedules.data_adaptive_temperature(loss.bfloat16(), 4.0).dtype == torch.float32
    assert schedules.data_adaptive_temperature(torch.empty(0, 3), 4.0).shape == (0, 3)


def test_no_value_is_read_back():
    loss, labels = normal(40), torch.arange(40) % 10
    labels[::3] = -100

    def adapt(loss, labels):
        return schedules.data_adaptive_temperature(loss, 4.0, labels=labels)

    assert adapt(loss.to("meta"), labels.to("meta")).shape == (40,)  # holds none: .item() raises
    compiled = torch.compile(adapt, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(loss, labels), adapt(loss, labels))


def test_no_gradient_passes_through_the_temperature(backend):
    s, t = pair(20, 11)
    z = s.to(backend.device).requires_grad_()
    row_loss = fastkd.kd_loss(
        z, t.to(backend.device), temperature=4.0, reduction="none", backend=backend.name
    )
    T = schedules.data_adaptive_temperature(row_loss, 4.0)
    assert row_loss.requires_grad and not T.requires_grad
    assert not T.flatten().eq(4).all()
    # and the loss takes it, T_r^2 inside the mean
    actual = run(backend, s, t, temperature=T.cpu())
    rows = [
        run(backend, s[r : r + 1], t[r : r + 1], temperature=T[r].item()).loss for r in range(20)
    ]
    assert actual.loss.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("progression", "count", "expected"),
    [
        ("geometric", 3, [0.6694, 0.4481, 0.3]),
        ("geometric", 5, [0.786, 0.6178, 0.4856, 0.3817, 0.3]),
        ("cubic", 5, [1 - s for s in (0.3416, 0.5488, 0.6552, 0.6944, 0.7)]),
        ("linear", 5, [1 - s for s in (0.14, 0.28, 0.42, 0.56, 0.7)]),
        ("linear", 1, [0.3]),
    ],
)
def test_stages(progression, count, expected):
    stages = schedules.stages(count, 0.3, progression=progression)
    assert [stage.keep for stage in stages] == pytest.approx(expected, abs=5e-5)
    assert stages[-1].keep == 0.3
    assert {stage.temperature for stage in stages} == {2.0}


def test_stages_with_temperatures_of_their_own():
    stages = schedules.stages(3, temperature=[4.0, 2.0, 1.0])
    assert [stage.temperature for stage in stages] == [4.0, 2.0, 1.0]
    # in the epochs of one run: the schedule of the stages is the schedule of equal parts
    assert schedules.in_equal_parts(stages, 5, 9) == stages[1]


def test_enough_stages():
    # the gain of the fourth, fifth and sixth stage: 1/12, 1/20, 1/30
    gains = [(0.09, 3), (0.08, 4), (0.06, 4), (0.05, 5), (0.04, 5), (1 / 30, 6)]
    for tolerance, expected in gains:
        assert schedules.enough_stages(1.0, tolerance) == expected, tolerance
    assert schedules.enough_stages(0.0, 1e-9) == 1
    assert schedules.enough_stages(1.0, 10.0) == 1
    for error in (1e-3, 0.7, 3.0, 1e6):
        for n in (1, 2, 3, 10, 1000):
            count = schedules.enough_stages(error, error / (n * (n + 1)) * (1 + 1e-9))
            assert count == n


def test_warm_up():
    factors = [schedules.warm_up(epoch) for epoch in range(30)]
    assert factors[:20] == pytest.approx([0.05 * k for k in range(1, 21)])
    assert factors[20:] == [1.0] * 10
    assert schedules.warm_up(0, 0) == 1.0


def test_a_module_takes_what_the_schedules_give():
    s, t = pair(4, 50)
    loss = fastkd.KDLoss()
    seen = set()
    for epoch in range(8):
        loss.temperature = schedules.epoch_adaptive_temperature(epoch, 8)
        loss.bottom_percentile = schedules.pruning_percentile(epoch, 8)
        seen.add(loss(s, t).item())
    assert len(seen) == 8


EAT, DAT = schedules.epoch_adaptive_temperature, schedules.data_adaptive_temperature
ROWS = torch.zeros(4)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "epoch ", lambda: EAT(-1, 80)),
        (ValueError, "epochs", lambda: EAT(0, 0)),
        (TypeError, "epoch ", lambda: EAT("0", 80)),
        (ValueError, "temperature", lambda: EAT(0, 80, 0.0)),
        (ValueError, "temperature", lambda: EAT(0, 80, NAN)),
        (ValueError, "delta", lambda: EAT(0, 80, 4.0, 1.0)),
        (ValueError, "delta", lambda: EAT(0, 80, 4.0, -0.1)),
        (ValueError, "stages", lambda: EAT(0, 80, stages=0)),
        (TypeError, "stages", lambda: EAT(0, 80, stages=2.5)),
        (ValueError, "percentiles", lambda: schedules.pruning_percentile(0, 8, [0, 100])),
        (ValueError, "percentiles", lambda: schedules.pruning_percentile(0, 8, [-1])),
        (ValueError, "values", lambda: schedules.pruning_percentile(0, 8, [])),
        (TypeError, "row_loss", lambda: DAT([1.0], 4.0)),
        (TypeError, "row_loss", lambda: DAT(torch.arange(4), 4.0)),
        (ValueError, "temperature", lambda: DAT(ROWS, -1.0)),
        (ValueError, "temperature", lambda: DAT(ROWS, torch.ones(3))),
        (ValueError, "temperature", lambda: DAT(ROWS, torch.zeros(4))),
        (ValueError, "fraction", lambda: DAT(ROWS, 4.0, fraction=0.6)),
        (ValueError, "delta", lambda: DAT(ROWS, 4.0, delta=1.0)),
        (ValueError, "labels", lambda: DAT(ROWS, 4.0, labels=torch.zeros(5, dtype=torch.long))),
        (TypeError, "labels", lambda: DAT(ROWS, 4.0, labels=torch.zeros(4))),
        (ValueError, "count", lambda: schedules.stages(0)),
        (ValueError, "keep", lambda: schedules.stages(3, 0.0)),
        (ValueError, "keep", lambda: schedules.stages(3, 1.1)),
        (ValueError, "progression", lambda: schedules.stages(3, progression="square")),
        (ValueError, "temperature", lambda: schedules.stages(3, temperature=[1.0, 2.0])),
        (ValueError, "temperature", lambda: schedules.stages(1, temperature=-1)),
        (ValueError, "error", lambda: schedules.enough_stages(-1, 1)),
        (ValueError, "error", lambda: schedules.enough_stages(INF, 1)),
        (ValueError, "tolerance", lambda: schedules.enough_stages(1, 0)),
        (ValueError, "epoch", lambda: schedules.warm_up(-1)),
        (TypeError, "epochs", lambda: schedules.warm_up(0, None)),
    ],
)
def test_what_is_refused(error, name, call):
    with pytest.raises(error, match=name):
        call()
