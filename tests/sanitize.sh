#!/usr/bin/env bash
# The tests of the cpu backend over a kernel built with AddressSanitizer and UBSan, in a copy of the
# tree: bash tests/sanitize.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
FASTKD_SANITIZE=address,undefined python setup.py --quiet build_ext --inplace
# The sanitizers' libraries have to come before Python's own; Python and torch leak by design.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$copy"
python -m pytest tests -p no:cacheprovider -k "not reference and not compile" "$@"
