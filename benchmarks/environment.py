"""What a result depends on: processor, threads, versions, commit. Nothing that names a person."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info  # a dependency of pytest-benchmark

import fastkd

ROOT = Path(__file__).parent.parent
# Of the last minute, at import: well under 1 on an idle machine. On a busy one the threads of
# PyTorch's own kernels wait for each other, and every ratio flatters the kernels that share less.
_LOAD_BEFORE = os.getloadavg()[0]


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "pytest benchmarks",
        "processor": {
            "name": get_cpu_info().get("brand_raw") or platform.processor() or platform.machine(),
            "instruction_set": torch.ops.fastkd.cpu_instruction_set(0),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": round(_LOAD_BEFORE, 2),
        },
        "versions": {
            "fastkd": fastkd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _commit() -> dict[str, Any] | None:
    """The commit of the source tree, and whether it was changed since; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What a run itself leaves behind does not count.
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(name: str) -> str:
    """`name` as a folder: "AMD EPYC 9654 96-Core Processor" -> "amd-epyc-9654-96-core-processor".

    Trade marks and clock speeds, which some processors carry in their name, are left out.
    """
    name = re.sub(r"\((r|tm)\)|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
