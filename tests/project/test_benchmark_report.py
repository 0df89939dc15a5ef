"""What the benchmark's report makes of a record whose numbers can be worked out by hand."""

import pytest

from benchmarks import budgets, report
from benchmarks.figures import bandwidth, gradients, of_add, of_copy, ratio
from benchmarks.measure import fastest

N, V = 8, 128256
NBYTES = N * V * 4


def record(**providers):
    figures = {name: {"seconds": [0.95 * s, 1.05 * s, s]} for name, s in providers.items()}
    return {
        "option": "plain", "dtype": "float32", "N": N, "V": V, "device": "cpu", "backward": True,
        "compiled": False, "tensor_bytes": NBYTES, "moved_bytes": 3 * NBYTES, "rounding": 4e-8,
        "providers": figures,
    }  # fmt: skip


@pytest.fixture
def results():
    case = record(**{"fastkd cpu": 3.0, "eager": 15.0, "copy": 1.0, "torch.add": 1.5, "TRL": 6.0})
    case["providers"]["fastkd cpu, inplace"] = {"seconds": [1.9, 2.1, 2.0], "peak_bytes": 0}
    case["providers"]["fastkd cpu"] |= {"peak_bytes": NBYTES, "gradient_error": 2e-7}
    case["providers"]["eager"] |= {"peak_bytes": 5 * NBYTES, "gradient_error": 1e-6}
    case["providers"]["TRL"] |= {"peak_bytes": 7 * NBYTES, "gradient_error": 0.25}
    case["providers"]["torch.compile"] = {"failed": "out of memory"}
    return {
        "date": "2026-01-01T00:00:00", "command": "python -m benchmarks", "gpu": None,
        "processor": {"name": "P", "instruction_set": "AVX2", "threads": 1, "cores": 1,
                      "load_before": 0.0},
        "versions": {"fastkd": "0", "torch": "2"}, "commit": None, "settings": {"rounds": 3},
        "unavailable": {"Liger-Kernel": ["no GPU"]}, "cases": [case],
    }  # fmt: skip


def test_figures(results):
    (case,) = results["cases"]
    assert bandwidth(case, "fastkd cpu") == 3 * NBYTES / 3
    assert of_copy(case, "fastkd cpu") == pytest.approx(0.5)  # 3 tensors in 3 s, 2 in 1 s
    assert of_add(case, "fastkd cpu, inplace") == pytest.approx(0.75)
    assert gradients(case, "eager") == 5


def test_ratios_are_those_of_a_round():
    """A machine that slows down for some of the rounds does so for both."""
    case = record(**{"fastkd cpu": 1.0, "eager": 10.0})
    case["providers"]["fastkd cpu"]["seconds"] = [1.0, 2.0, 1.0, 2.0, 1.0]
    case["providers"]["eager"]["seconds"] = [10.0, 20.0, 20.0, 20.0, 10.0]
    assert ratio(case, "eager", "fastkd cpu") == 10


def test_rounds_of_an_undisturbed_machine():
    assert fastest([4.0, 2.1, 4.2, 2.0, 2.2], 3) == [1, 3, 4]


def test_a_row_tells_all_of_it(results):
    _, _, row, *_ = report.main_table(results).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "plain, float32" and cells[1] == "3,000 ±5%"
    assert cells[3:] == ["50%", "75%", "5.0x", "no memory", "2.0x, off by 25%",
                         "1.0 / 0.0 / 5.0 / -", "2e-07 / 1e-06"]  # fmt: skip
    assert report.without(results) == ["Not measured there: Liger-Kernel (no GPU)."]
    assert "out of memory" in report.full_table(results)


def test_a_failure_of_ours_is_told(results):
    (case,) = results["cases"]
    results["cases"] += [
        case | {"V": 5, "failed": "out of memory", "providers": {}},
        case | {"V": 6, "providers": {"fastkd cpu": {"failed": "RuntimeError: no"}}},
    ]
    assert report.without(results)[1] == (
        "Failed there: plain, float32, V = 5: out of memory; "
        "plain, float32, V = 6: RuntimeError: no."
    )


def test_budgets(results):
    lines = {row[0]: row[3:] for row in budgets.rows([results])}
    assert lines["CPU: times faster than eager"] == [
        "5", "plain, float32, V = 128256", "**missed by 16.7%**"
    ]  # fmt: skip
    assert lines["CPU, float32, inplace: of the bandwidth of torch.add"][-1] == "met, and the aim"
    assert lines["CPU, float32: error of the gradient"][-1] == "met, and the aim"
    assert lines["CPU: times faster than torch.compile"][-1] == "not yet measured"
    assert all(row[-1] == "not yet measured" for what, row in lines.items() if "GPU" in what)


def test_a_budget_goes_by_its_worst_case(results):
    (case,) = results["cases"]
    results["cases"].append(case | {"V": 5, "moved_bytes": case["moved_bytes"] / 2})
    lines = {row[0]: row[3:] for row in budgets.rows([results])}
    row = lines["CPU, float32, inplace: of the bandwidth of torch.add"]
    assert row == ["0.375", "plain, float32, V = 5", "**missed by 25.0%**"]
