"""The CUDA kernels' machine code: compiled here, or taken from a module that has been built.

FASTKD_GATE_MODULE: a fastkd/_C_cuda.abi3.so built with FASTKD_LINEINFO=1, so that nothing is
compiled twice. The code is read by nvdisasm and cuobjdump, of the triton package or of the toolkit.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = ("-cubin", "-std=c++20", "-O3", "-lineinfo")
TOOLS = ("nvdisasm", "cuobjdump")


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(home) if home.exists() else shutil.which("nvcc")


def tool(name: str) -> str | None:
    triton = find_spec("triton")
    places = [Path(p) / "backends/nvidia/bin" for p in triton.submodule_search_locations or ()] \
        if triton else []  # fmt: skip
    compiler = nvcc()
    if compiler:
        places.append(Path(compiler).parent)
    found = [str(place / name) for place in places if (place / name).exists()]
    return found[0] if found else shutil.which(name)


def missing() -> list[str]:
    """What is not there of what the gate needs."""
    return [name for name, path in (("nvcc", nvcc()), *((t, tool(t)) for t in TOOLS)) if not path]


def run(program: str | None, *arguments: str | Path, cwd: str | None = None) -> str:
    assert program is not None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def release(program: str | None) -> str:
    return re.findall(r"release ([\d.]+)", run(program, "--version"))[0]


class Cubin(NamedTuple):
    """One source compiled for one target, as the tools print it."""

    resources: str  # of cuobjdump
    code: str  # of nvdisasm


def read(path: Path) -> Cubin:
    return Cubin(
        run(tool("cuobjdump"), "-res-usage", path), run(tool("nvdisasm"), "-c", "-gi", path)
    )


def compile_for(source: Path, target: str) -> Cubin:
    """From the cache under the user's, where the same sources were compiled before."""
    key = hashlib.sha256(repr((FLAGS, release(nvcc()), target, source.name)).encode())
    for path in sorted({source, *KERNELS.glob("*"), KERNELS.parent / "call.h"}):
        key.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd-gate"
    cubin = cache / f"{key.hexdigest()[:16]}.cubin"
    cache.mkdir(parents=True, exist_ok=True)
    with cubin.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another process compiles is waited for
        if not cubin.exists():
            new = cubin.with_suffix(".new")
            run(nvcc(), *FLAGS, f"-arch={target}", "-o", new, source)
            new.rename(cubin)  # now it is whole
    return read(cubin)


def built(module: Path) -> dict[tuple[str, str], Cubin]:
    """Those of a module, by the name of their source and their target."""
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "-xelf", "all", module.resolve(), cwd=folder)
        found = {}
        for path in Path(folder).glob("kernels.*.cubin"):  # no other source has any
            source, target, _ = path.name.rsplit(".", 2)
            found[source, target] = read(path)
    assert found, f"{module} has no machine code for GPUs"
    for (source, _), cubin in found.items():
        assert f"{source}.cu" in cubin.code, f"{module} was built without FASTKD_LINEINFO=1"
    return found
