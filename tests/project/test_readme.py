"""What README.md says was measured comes from committed results, and nothing else is said."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = re.compile(r"<!-- ([\w ]+) -->\n(.*?)\n<!-- /\1 -->", re.DOTALL)
# 12.8x, 75 %, 1.41 ns, 4.4 minutes, 137 MiB, 3 TB/s
MEASURED = re.compile(
    r"(?<![\w.])\d[\d.,]*\s?(x\b|%|[nuµm]?s\b|(micro|milli)?seconds|[KMGT]i?B\b|[GT]B/s)"
)


def test_performance_is_what_the_results_say():
    assert report.shown(README) == report.section(report.load(report.RESULTS)), (
        "python -m benchmarks.report"
    )


def test_tables_of_every_device_are_what_the_results_say():
    for path, results in report.load(report.RESULTS).items():
        assert path.with_suffix(".md").read_text() == report.details(path, results)


def test_distillation_is_what_its_results_say(monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("distill_lm_report")
    try:
        (path,) = report.RESULTS.glob("*/distill_lm.json")
        shown = dict(GENERATED.findall(README))["distillation"]
        assert shown == example.markdown(json.loads(path.read_text(encoding="utf-8")))
        shown = dict(GENERATED.findall(README))["other options"]
        assert shown == example.other_options(path.parent)
    finally:
        sys.modules.pop("distill_lm_report")


def test_pictures_are_there():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_no_measurement_is_told_by_hand():
    prose = re.sub(r"```.*?```|`[^`]*`", "", GENERATED.sub("", README), flags=re.DOTALL)
    assert not [match[0] for match in MEASURED.finditer(prose)]
    assert MEASURED.search("at least 12.8x eager") and MEASURED.search("took 1.4 ns")
