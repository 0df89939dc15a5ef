"""Builds the CUDA kernels' source for the CPU and loads it: the ops of two more backends.

The result is kept under the user's cache folder, named by a hash of all that goes into it.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastkd import kernels
from fastkd.core.ops import define

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = tuple(ROOT / "csrc" / "cuda" / name for name in ("kernels.cu", "launch.cu"))
EMULATION = tuple(HERE / f"{name}.cpp" for name in ("cuda_emulation", "scheduler", "conversions"))
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # Contraction to fma as nvcc has it, and what fma takes on this processor.
    *("-ffp-contract=fast", *(["-march=native"] if platform.machine() == "x86_64" else [])),
]
SANITIZERS = ["-O1", "-g1", "-fno-omit-frame-pointer"]


def _used(sources: Iterable[Path], found: dict[Path, bytes] | None = None) -> dict[Path, bytes]:
    """The text of the sources and of all that they include of this repository."""
    found = {} if found is None else found
    for source in map(Path.resolve, sources):
        if source not in found and source.exists():  # else it is of the system
            found[source] = source.read_bytes()
            included = re.findall(rb'^#include ["<]([^">]+)', found[source], re.MULTILINE)
            for name in map(bytes.decode, included):
                _used([source.parent / name, HERE / name], found)
    return found


def _flags() -> list[str]:
    sanitize = os.environ.get("FASTKD_SANITIZE_EMULATION")
    return [*FLAGS, *([f"-fsanitize={sanitize}", *SANITIZERS] if sanitize else [])]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "".join(line for line in text.splitlines()[:30] if line.startswith(("model", "flags")))


def _cached(
    name: str, sources: Iterable[Path], flags: list[str], build: Callable[[Path], Path]
) -> Path:
    key = hashlib.sha256(repr((flags, sys.version, torch.__version__, _processor())).encode())
    for path, text in sorted(_used([*sources, Path(__file__)]).items()):
        key.update(path.name.encode() + text)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd-emulation"
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


def _own_object(source: Path, flags: list[str]) -> Path:
    def build(folder: Path) -> Path:
        _run(["g++", *flags, f"-I{HERE}", "-c", str(source), "-o", str(folder / "output")])
        return folder / "output"

    return _cached(f"{source.stem}.o", [source], flags, build)


def _link(folder: Path, sources: list[Path], flags: list[str], *link: str) -> None:
    def compile(source: Path) -> str:
        if source.parent == HERE:  # the same for every fault, and as long in the making
            return str(_own_object(source, flags))
        target = folder / f"{source.stem}.o"
        kernel = ["-include", "cuda_emulation.h", "-x", "c++"] if source.suffix == ".cu" else []
        _run(["g++", *flags, f"-I{HERE}", *kernel, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    _run(["g++", *flags, *objects, *link, "-o", str(folder / "output")])


def backends() -> list[str]:
    """Their names, after giving them to fastkd; their ops have no kernels before `load`."""
    names = []
    for suffix in ("_cluster", "_ticket"):
        name = f"emulated{suffix}"
        if name not in kernels.BACKENDS:
            define(suffix)
            kernels.register(name, kernels.Backend(suffix, [], "cpu", float64=False))
        names.append(name)
    return names


@functools.cache
def load() -> None:
    """Registers the kernels of the ops of these backends, built where they have changed."""
    from torch.utils import cpp_extension  # 0.4 s, that a test of another backend can do without

    flags = _flags()
    sources = [*KERNELS, *EMULATION, HERE / "ops.cpp"]

    def build(folder: Path) -> Path:
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        includes.append(f"-I{sysconfig.get_paths()['include']}")
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        _link(folder, sources, [*flags, *includes], "-shared", *libraries,
              "-Wl,--no-as-needed,-ltorch")  # fmt: skip
        return folder / "output"

    torch.ops.load_library(_cached("ops", sources, flags, build))


def program(name: str, fault: tuple[str, str, str] | None = None, level: str = "-O1") -> Path:
    """The executable of `name`.cpp; `fault`: a file of csrc/cuda, a text in it, and another."""
    flags = [*_flags(), level]
    of_cuda = KERNELS if name == "driver" else ()
    others = [*(() if name == "plan" else EMULATION), HERE / f"{name}.cpp"]

    def build(folder: Path) -> Path:
        copy = folder / "csrc"
        shutil.copytree(ROOT / "csrc", copy)
        if fault is not None:
            path, text, instead = copy / "cuda" / fault[0], fault[1], fault[2]
            source = path.read_text()
            assert source.count(text) == 1, f"{fault[0]} has {source.count(text)} times: {text}"
            path.write_text(source.replace(text, instead))
        _link(folder, [*(copy / "cuda" / kernel.name for kernel in of_cuda), *others], flags)
        return folder / "output"

    return _cached(name, [*of_cuda, *others], [*flags, repr(fault)], build)
