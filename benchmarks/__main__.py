"""python -m benchmarks: measures every case that the device's results file does not hold yet.

The file is benchmarks/results/<device>/cpu.json or cuda.json; it is written after every case and
begun anew for another commit. After --seconds no other case begins, and the status is 75 if some
are left: run it again. Then comes examples/distill_lm.py, a training step at a large vocabulary.
python -m benchmarks.report draws what was measured.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from .cases import CPU_PAIRS, plan
from .environment import ROOT
from .gpu import UNFINISHED
from .measure import SMOKE, Settings, measure
from .store import RESULTS, Store

# The text has 32768 tokens; to the softmax it is all one. On a GPU more of them per step.
STEP = ("--pad-vocab", "128256", "--teacher-steps", "6", "--steps", "24")
STEP_ON = {"cpu": (), "cuda": ("--batch", "16", "--context", "256")}
STEP_SECONDS = 200  # or so


def main() -> int:
    parser = argparse.ArgumentParser(description="measure fastkd and what one would pick instead")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="their folder")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after these")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--pairs", type=int, default=CPU_PAIRS, help="N * V on a CPU, at least")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, which mean nothing")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    if given.smoke and given.results == RESULTS:
        given.results = None  # writes nothing

    command = f"python -m benchmarks --device {given.device}"
    settings = SMOKE if given.smoke else Settings(pairs=given.pairs)
    store = Store(given.device, settings, given.results, command)
    for name, reasons in store.results["unavailable"].items():
        if "," not in name:  # else a variant
            print(f"without {name}: {'; '.join(reasons)}")

    begin, failed = time.monotonic(), 0
    cases = [c for c in plan(given.device, given.smoke, given.pairs) if given.only in str(c)]
    left = [case for case in cases if case not in store]
    progress = tqdm(left, unit="case", initial=len(cases) - len(left), total=len(cases))
    for case in progress:
        if time.monotonic() - begin > given.seconds:
            return UNFINISHED
        progress.set_postfix_str(str(case))
        record = measure(case, settings)
        store.add(record)
        for name, figures in {"case": record, **record.get("providers", {})}.items():
            if "failed" in figures:
                failed += figures["failed"] != "out of memory"
                tqdm.write(f"{case}, {name}: {figures['failed']}")
    if given.smoke:
        return 1 if failed else 0
    if given.only or has_step(store):
        return 0
    if time.monotonic() - begin > given.seconds - STEP_SECONDS:
        return UNFINISHED
    return train(store, given.device)


def _step_path(store: Store) -> Path:
    assert store.path is not None
    return store.path.with_name("step.json").resolve()


def has_step(store: Store) -> bool:
    path = _step_path(store)
    return path.exists() and json.loads(path.read_text())["commit"] == store.results["commit"]


def train(store: Store, device: str) -> int:
    """A few training steps at a large vocabulary, by the example."""
    missing = [name for name in ("tokenizers", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"no training step: {' and '.join(missing)} not installed")
        return 0
    with TemporaryDirectory() as folder:
        written = ["--json", str(_step_path(store)), "--png", str(Path(folder) / "curves.png")]
        example = ["examples/distill_lm.py", "--device", device, *STEP, *STEP_ON[device], *written]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        return subprocess.run([sys.executable, *example], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
