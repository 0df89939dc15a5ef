"""Builds the CUDA kernels' source for the CPU and loads it: the ops of two more backends.

The result is kept under the user's cache folder, named by a hash of all that goes into it.
"""

import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from fastkd import ops

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ("kd_rows.cu", "scale_rows.cu")
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # Contraction to fma as nvcc has it, and what fma takes on this processor.
    *("-ffp-contract=fast", *(["-march=native"] if platform.machine() == "x86_64" else [])),
]
SANITIZERS = ["-O1", "-g1", "-fno-omit-frame-pointer"]


def _sources() -> list[Path]:
    return sorted(
        path
        for folder in (ROOT / "csrc", ROOT / "csrc" / "cuda", ROOT / "csrc" / "cpu", HERE)
        for path in folder.glob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".py")
    )


def _flags(defines: tuple[str, ...]) -> list[str]:
    sanitize = os.environ.get("FASTKD_SANITIZE_EMULATION")
    extra = [f"-fsanitize={sanitize}", *SANITIZERS] if sanitize else []
    return [*FLAGS, *extra, *(f"-D{name}" for name in defines)]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "".join(line for line in text.splitlines()[:30] if line.startswith(("model", "flags")))


def _cached(name: str, flags: list[str], build) -> Path:
    key = hashlib.sha256(repr((flags, sys.version, torch.__version__, _processor())).encode())
    for path in _sources():
        key.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastkd-emulation"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{name}-{key.hexdigest()[:24]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = build(Path(folder))
            built.replace(target)  # whole or not at all, whoever else builds it now
    return target


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _compile(source: Path, output: Path, flags: list[str], *more: str) -> None:
    kernel = ["-include", "cuda_emulation.h", "-x", "c++"] if source.suffix == ".cu" else []
    _run(["g++", *flags, f"-I{HERE}", *more, *kernel, "-c", str(source), "-o", str(output)])


def backends() -> list[str]:
    """Their names, after giving them to fastkd."""
    names = []
    for suffix in ("_cluster", "_ticket"):
        name = f"emulated{suffix}"
        if name not in ops._BACKENDS:
            ops._define(suffix)
            ops._BACKENDS[name] = ops.Backend(suffix, [], "cpu", float64=False)
        names.append(name)
    _load_ops()
    return names


def _load_ops() -> None:
    """Registers the kernels of fastkd::kd_rows and fastkd::scale_rows_ of these backends."""
    flags = _flags(())

    def build(folder: Path) -> Path:
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        includes.append(f"-I{sysconfig.get_paths()['include']}")
        sources = [ROOT / "csrc" / "cuda" / name for name in KERNELS]
        sources += [HERE / "cuda_emulation.cpp", HERE / "conversions.cpp", HERE / "ops.cpp"]
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(_compile, s, o, flags, *includes)
                for s, o in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        library = folder / "ops.so"
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run(["g++", *flags, "-shared", *map(str, objects), *libraries, "-Wl,--no-as-needed",
              "-ltorch", "-o", str(library)])  # fmt: skip
        return library

    torch.ops.load_library(_cached("ops", flags, build))
