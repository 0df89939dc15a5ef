#!/usr/bin/env bash
# Whether what includes torch's headers compiles with those of the oldest torch that is promised:
#
#   bash tests/project/old_torch_headers.sh              2.10.0 and 2.11.0
#   bash tests/project/old_torch_headers.sh VERSION...   others
#
# TORCH_TARGET_VERSION does not answer that: with a newer torch at hand, a macro that only its headers
# have is there for every target. The headers are taken from the wheels for macOS, where they are the
# same, in 80 MB instead of the 900 of a build with CUDA. They are fetched once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -gt 0 ] || set -- 2.10.0 2.11.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastkd-headers
mkdir -p "$cache"
work=$(mktemp -d "$cache/fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT

fetch() {  # VERSION
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 \
    --platform macosx_11_0_arm64 --platform macosx_14_0_arm64 --dest "$work/$1" "torch==$1"
  python3 - "$work/$1" <<'END'
import sys
from pathlib import Path
from zipfile import ZipFile

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(folder, [name for name in names if name.startswith("torch/include/")])
END
  # A rename: whole or not at all. Where another run was faster, its copy will do.
  mv -T "$work/$1/torch" "$cache/$1" || [ -d "$cache/$1" ]
}

# The language and the target are those of setup.py.
mapfile -t flags < <(grep -oE -- '-(std=c\+\+[0-9]+|DTORCH_TARGET_VERSION=0x[0-9a-f]+)' setup.py)
[ ${#flags[@]} -eq 2 ] || { echo "setup.py has other flags: ${flags[*]}"; exit 1; }
python=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
for version; do
  [ -d "$cache/$version" ] || fetch "$version"
  include=(-isystem "$cache/$version/include" -isystem "$python")
  g++ -fsyntax-only -Wall "${flags[@]}" "${include[@]}" csrc/cpu/ops.cpp
  # It includes torch's declarations for CUDA, and no header of CUDA's.
  g++ -fsyntax-only -Wall "${flags[@]}" "${include[@]}" \
    -DUSE_CUDA '-DFASTKD_CUDA_BUILD="13.0 sm_80"' csrc/cuda/ops.cpp
  echo "torch $version: csrc/cpu/ops.cpp and csrc/cuda/ops.cpp compile"
done
