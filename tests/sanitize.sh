#!/usr/bin/env bash
# The tests of the cpu backend over a kernel built with AddressSanitizer and UBSan, in a copy of the
# tree: bash tests/sanitize.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
fail() { printf 'SANITIZERS: %s (%d s)\n' "$1" "$SECONDS" >&2; exit 1; }

FASTKD_CUDA=0 FASTKD_SANITIZE=address,undefined python setup.py --quiet build_ext --inplace >build.log 2>&1 ||
  { cat build.log; fail "the build failed"; }
printf 'built in %d s\n' "$SECONDS"
nm -D fastkd/_C*.so >symbols
for check in __asan_report_load4 __asan_report_store4 __ubsan_handle_; do
  grep -q "$check" symbols || fail "the kernel is not instrumented: no $check"
done

# The sanitizers' libraries have to come before Python's own; Python and torch leak by design.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export LD_PRELOAD="$LD_PRELOAD $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$copy" FASTKD_SANITIZE=
python -c 'import fastkd, sys; print(fastkd.__file__); sys.exit(bool(fastkd.backends()["cpu"]))' ||
  fail "the kernel does not load"
# Not what runs no kernel of ours. Without optimisation all instruction sets round alike, so that
# "limiting" them does not show.
python -m pytest tests -q -p no:cacheprovider \
  -k "not reference and not compile and not limiting and not emulat" \
  --ignore=tests/test_spec.py --durations=15 "$@" || fail "FAILED, see above"
# The CUDA kernels, emulated: every option and every edge in both layouts.
export FASTKD_SANITIZE_EMULATION=address,undefined
python -m pytest tests/test_edges.py tests/test_backends.py -q -p no:cacheprovider -k emulat \
  --durations=15 "$@" || fail "FAILED under emulation, see above"
printf 'SANITIZERS: passed, nothing found (%d s)\n' "$SECONDS"
