"""What type checkers see: a user's calls, and the lists of options that only they read."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import fastkd
from fastkd.core import options

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # mypy reads torch
def test_a_users_calls():
    """Whatever is wrong in them is marked; a mark that is not needed is an error as well."""
    pytest.importorskip("mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--allow-untyped-calls",
        "--follow-imports=silent",  # of fastkd itself other flags are asked
        "--config-file=",
        "tests/api/typing_user.py",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


LOSSES = {
    fastkd.kd_loss: (options.KDOptions, fastkd.KDLoss),
    fastkd.dkd_loss: (options.DKDOptions, fastkd.DKDLoss),
    fastkd.topk_kd_loss: (options.TopKKDOptions, fastkd.TopKKDLoss),
}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_lists_of_options_are_one(loss):
    given, module = LOSSES[loss]
    keywords = {p.name for p in inspect.signature(loss).parameters.values()
                if p.kind is p.KEYWORD_ONLY}  # fmt: skip
    names = {"Unpack": Any, "KDOptions": Any, "DKDOptions": Any, "TopKKDOptions": Any}
    hints = {
        name: hint for name, hint in get_type_hints(loss, None, names).items() if name in keywords
    }
    assert get_type_hints(given) == {k: v for k, v in hints.items() if k != "return_terms"}
    attributes = get_type_hints(module, None, names)
    assert {name: attributes[name] for name in keywords} == hints
