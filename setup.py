"""Builds the compiled modules against libtorch's stable ABI; the rest is in pyproject.toml."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

# FASTKD_SANITIZE=address,undefined: a build for a test run under these sanitizers, by
# tests/project/sanitize.sh. At -O3 it takes three times as long, and finds the same.
sanitize = os.environ.get("FASTKD_SANITIZE")
sanitizers = [f"-fsanitize={sanitize}", "-O1", "-g1", "-fno-omit-frame-pointer"] if sanitize else []

common_args = [
    "-std=c++20",
    "-O3",
    # The stable ABI of libtorch 2.10: one binary for it and for every later release.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# FASTKD_LINEINFO=1: the CUDA kernels with the lines of their source, for profilers and for
# tests/cuda_kernels/gate.py. It changes no code, and makes the module 2.5 times as large.
line_info = ["-lineinfo"] if os.environ.get("FASTKD_LINEINFO") == "1" else []
# What an error message says of where it was raised must not be where this was built.
places = (Path(__file__).parent.resolve(), Path(torch.__file__).parent.parent)
anonymous = [f"-fmacro-prefix-map={place}/=" for place in places]
compile_args = [*common_args, *anonymous, "-fvisibility=hidden", "-Wall"]
# Keep libtorch as a dependency: where torch has CUDA, it is what brings libtorch_cuda.
link_args = ["-Wl,--no-as-needed,-ltorch,--exclude-libs,ALL"]
strip = ["-Wl,--strip-all"]


# FASTKD_ISA=avx512, avx2 or baseline: the CPU module with this instruction set's kernels alone,
# float64 included, for the time in which they are edited. It takes a third of the compiler's work,
# and its objects are in a folder of their own, so that those of the whole module are kept. At -O1,
# which takes a third less again, the kernels' loops are still vectorised, but their last bits may
# differ: it is for tests; what is measured or shipped is the whole module.
isa = os.environ.get("FASTKD_ISA")
one_set = ["-DFASTKD_ONE_SET", "-O1"] if isa else []


def cpu_sources() -> list[Path]:
    sources = sorted(Path("csrc/cpu").glob("*.cpp"))
    sets = {path.stem.removeprefix("isa_"): path for path in sources if path.match("isa_*")}
    if platform.machine() not in ("x86_64", "AMD64"):
        sets = {"baseline": sets["baseline"]}
    if isa and isa not in sets:
        raise SystemExit(f"FASTKD_ISA={isa}: must be one of {', '.join(sets)}, or not set")
    return [path for path in sources if not isa or path == sets[isa] or not path.match("isa_*")]


def cpu_module() -> Extension:
    return CppExtension(
        "fastkd._C",
        [str(path) for path in cpu_sources()],
        extra_compile_args=[
            *compile_args,
            "-fopenmp-simd",  # honours `#pragma omp simd`; links no OpenMP
            "-fno-trapping-math",  # lets selections become blends; else most loops stay scalar
            "-fno-thread-jumps",  # it followed both cases of a selection through a whole polynomial
            *one_set,
            *(sanitizers or ["-g0"]),  # the symbols that Python's own flags ask for are stripped
        ],
        extra_link_args=[*link_args, *(sanitizers or strip)],
        py_limited_api=True,
    )


def cuda_home() -> Path | None:
    """Where the CUDA toolkit is, unless FASTKD_CUDA=0 asks for a build without its kernels."""
    if os.environ.get("FASTKD_CUDA") == "0" or torch.version.hip is not None:
        return None
    nvcc = Path(shutil.which("nvcc") or "nvcc").resolve()  # may be a link into the toolkit
    for home in (os.environ.get("CUDA_HOME", "/usr/local/cuda"), nvcc.parents[1]):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / LIBRARIES).is_dir():
            return Path(home)
    return None


LIBRARIES = "lib64"  # in the toolkit
# One for every generation since Ampere that differs for these kernels; and PTX of the last, for
# what comes later. An nvcc that does not know the newest builds the others.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# What torch takes out of the headers of CUDA for the sake of its own.
KEPT = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")


def cuda_module(home: Path) -> Extension:
    """The CUDA kernels; neither a GPU nor a torch with CUDA is needed."""

    def nvcc(*args: str) -> str:
        return subprocess.check_output([home / "bin/nvcc", *args], text=True)

    cpp_extension.CUDA_HOME = str(home)  # a torch without CUDA leaves it unset
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = nvcc("--list-gpu-code").split()
        every = [x for x in ARCHITECTURES if f"sm_{x.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(every) + "+PTX"
    targets = [flag.rpartition("code=")[2] for flag in cpp_extension._get_cuda_arch_flags()]
    targets.sort(key=lambda name: (not name.startswith("sm_"), len(name), name))
    headers = b"".join(path.read_bytes() for path in sorted(Path("csrc").rglob("*.h")))
    build = [*re.findall(r"release ([\d.]+)", nvcc("--version")), *targets]
    return CppExtension(  # CUDAExtension would link the CUDA libraries of the torch at hand
        "fastkd._C_cuda",
        ["csrc/cuda/ops.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))],
        library_dirs=[str(home / LIBRARIES)],
        # Static: a shared one would have to be that of the torch at hand.
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            # USE_CUDA declares torch's current stream.
            "cxx": [*compile_args, "-DUSE_CUDA", f'-DFASTKD_CUDA_BUILD="{" ".join(build)}"'],
            "nvcc": [
                *common_args,
                *(f"-U__CUDA_NO_{what}__" for what in KEPT),
                "-Xcompiler=-fvisibility=hidden,-Wall",
                "--compress-mode=size",
                "--threads=0",
                *line_info,
                # Where torch has no CUDA, ninja is not told what a .cu includes: a command that
                # changes with the headers makes it compile again.
                f"-DFASTKD_HEADERS={hashlib.sha256(headers).hexdigest()[:16]}",
            ],
        },
        extra_link_args=[*link_args, *strip],
        py_limited_api=True,
    )


home = cuda_home()
setup(
    ext_modules=[cpu_module(), *([cuda_module(home)] if home else [])],
    cmdclass={"build_ext": BuildExtension},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "build_ext": {"build_temp": f"build/{isa}"} if isa else {},
    },
)
