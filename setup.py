"""Builds the compiled modules against libtorch's stable ABI; the rest is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# FASTKD_SANITIZE=address,undefined: a build for a test run under these sanitizers, by
# tests/sanitize.sh. At -O3 it takes three times as long, and finds the same.
sanitize = os.environ.get("FASTKD_SANITIZE")
sanitizers = [f"-fsanitize={sanitize}", "-O1", "-g1", "-fno-omit-frame-pointer"] if sanitize else []

compile_args = [
    "-std=c++20",
    "-O3",
    # The stable ABI of libtorch 2.10: one binary for it and for every later release.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-fvisibility=hidden",
    "-fopenmp-simd",  # honours `#pragma omp simd`; links no OpenMP
    "-fno-trapping-math",  # lets selections become blends; without it most loops stay scalar
    "-fno-thread-jumps",  # it followed both cases of a selection through a whole polynomial
    "-Wall",
    *sanitizers,
]
# Keep libtorch as a dependency: where torch has CUDA, it is what brings libtorch_cuda.
link_args = [
    "-Wl,--no-as-needed,-ltorch,--exclude-libs,ALL",
    *(sanitizers or ["-Wl,--strip-all"]),
]

setup(
    ext_modules=[
        CppExtension(
            "fastkd._C",
            sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
