"""pytest benchmarks: the cases of python -m benchmarks as tests, timed by pytest-benchmark."""

import sys
from pathlib import Path
from typing import Any

import pytest

from .cases import plan
from .measure import SMOKE, Settings
from .store import RESULTS, Store


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastkd")
    group.addoption("--smoke", action="store_true", help="tiny inputs, one round")
    group.addoption("--results", type=Path, help="their folder (none: benchmarks/results)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "case" in metafunc.fixturenames:
        cases = plan(config.getoption("--device"), config.getoption("--smoke"))
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="session")
def store(pytestconfig: Any) -> Store:
    smoke = pytestconfig.getoption("--smoke")
    command = "pytest benchmarks " + " ".join(a for a in sys.argv[1:] if a.startswith("--"))
    settings = SMOKE if smoke else Settings()
    folder = pytestconfig.getoption("--results") or (None if smoke else RESULTS)
    return Store(pytestconfig.getoption("--device"), settings, folder, command.strip())
