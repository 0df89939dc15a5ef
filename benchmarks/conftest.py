"""Options, the cases, and what is done with the results when all of them are there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

import fastkd

from .cases import Case, cases
from .environment import environment, slug
from .report import report

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    rounds: int
    pairs: int
    vocabularies: tuple[int, ...] = (32768, 128256)
    overhead_rounds: int = 25
    calls: int = 100  # per round of the overhead


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastkd")
    group.addoption("--smoke", action="store_true", help="tiny inputs, one round, no file written")
    group.addoption("--rounds", type=int, default=9, help="rounds of every provider (default 9)")
    group.addoption("--pairs", type=int, default=1 << 24, help="N * V, at least (default 2^24)")


_RECORDS = pytest.StashKey[dict[str, Any]]()


def _settings(config: pytest.Config) -> Settings:
    if config.getoption("--smoke"):
        return Settings(1, 1, vocabularies=(1003,), overhead_rounds=1, calls=2)
    return Settings(config.getoption("--rounds"), config.getoption("--pairs"))


def _cases(config: pytest.Config) -> list[Case]:
    settings = _settings(config)
    every = cases(settings.vocabularies, settings.pairs)
    if config.getoption("--smoke"):  # one dtype per option: nearly all of the time is compilation
        return [c for c in every if (c.dtype == "float32") == (c.option in ("top_k", "jsd"))]
    return every


def _plain_cases(config: pytest.Config) -> list[Case]:
    return [case for case in _cases(config) if case.option == "plain"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {"loss": [], "methods": [], "overhead": None}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", _cases(metafunc.config), ids=str)
    if "plain_case" in metafunc.fixturenames:
        metafunc.parametrize("plain_case", _plain_cases(metafunc.config), ids=str)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    reasons = fastkd.backends()["cpu"]
    assert not reasons, f"nothing to measure: {'; '.join(reasons)}"
    return _settings(pytestconfig)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> dict[str, Any]:
    return pytestconfig.stash[_RECORDS]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[_RECORDS]
    if not any(records.values()):
        return
    settings = _settings(config)
    results = {**environment("pytest benchmarks"), "settings": asdict(settings), **records}
    terminalreporter.section("fastkd")
    terminalreporter.write_line(report(results))
    if config.getoption("--smoke"):
        terminalreporter.write_line("\nA smoke test: these numbers mean nothing. No file written.")
        return
    expected = {"loss": len(_cases(config)), "methods": len(_plain_cases(config))}
    if any(len(records[k]) < n for k, n in expected.items()) or records["overhead"] is None:
        terminalreporter.write_line("\nNot every case: no file written.")
        return
    path = RESULTS / slug(results["processor"]["name"]) / "cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    terminalreporter.write_line(f"Written to {path.relative_to(config.rootpath)}")
