"""What a result depends on: device, threads, versions, commit. Nothing that names a person."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastkd

ROOT = Path(__file__).parent.parent
PACKAGES = ("triton", "liger_kernel", "trl", "speculators")
# The load of the last minute, at import: well under 1 on an idle machine. On a busy one the threads
# of PyTorch's own kernels wait for each other, and ratios flatter the kernels that share less.
_LOAD_BEFORE = os.getloadavg()[0]


def environment(command: str, device: str = "cpu") -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "processor": {
            "name": _processor_name(),
            "instruction_set": torch.ops.fastkd.cpu_instruction_set(0),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": round(_LOAD_BEFORE, 2),
        },
        "gpu": gpu(torch.device("cuda", 0)) if device == "cuda" else None,
        "versions": {
            "fastkd": fastkd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _processor_name() -> str:
    name = re.search(r"^model name\s*: (.+)", _cpuinfo(), re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU that a result depends on, its driver and the clocks it may reach."""
    properties = torch.cuda.get_device_properties(device)
    queries = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        **_nvidia_smi(device, *queries),
    }


def clock_mhz(device: str) -> float | None:
    """What the device runs at now."""
    if device == "cuda":
        seen = _nvidia_smi(torch.device("cuda", 0), "clocks.sm").get("clocks.sm", "")
    else:
        seen = max(
            re.findall(r"^cpu MHz\s*: (.+)", _cpuinfo(), re.MULTILINE), key=float, default=""
        )
    numbers = re.findall(r"[\d.]+", seen)
    return float(numbers[0]) if numbers else None


def _nvidia_smi(device: torch.device, *queries: str) -> dict[str, str]:
    """Nothing where there is no nvidia-smi."""
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader"]
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
        answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError, AttributeError):  # no uuid before torch 2.6
        return {}
    return dict(zip(queries, map(str.strip, answers.split(",")), strict=False))


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
