#!/usr/bin/env bash
# The tests over kernels built with AddressSanitizer and UBSan, in a copy of the tree: those of the
# CPU, and those of the GPU in their emulation.
#
#   bash tests/project/sanitize.sh [pytest options]          the tests of both backends
#   bash tests/project/sanitize.sh --few [pytest options]    every option and edge of the CPU's at its widest
#                                                    instruction set, and every kind of row in every
#                                                    layout of the GPU's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
few=
[ "${1:-}" != --few ] || { few=yes; shift; }
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
fail() { printf 'SANITIZERS: %s (%d s)\n' "$1" "$SECONDS" >&2; exit 1; }

export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$copy" FASTKD_SANITIZE= FASTKD_SANITIZE_EMULATION=address,undefined
run() {
  local parallel=()
  ! python -c 'import xdist' 2>/dev/null || parallel=(-n auto --dist loadgroup)
  python -m pytest -q -p no:cacheprovider "${parallel[@]}" --durations=5 "$@"
}
# Programs of their own, before there is a module that loads only beside the sanitizers' libraries:
# schedules, mistakes, every kind of row.
FASTKD_EMULATION=0 run tests/cuda_kernels/test_emulation.py -k "every or mistake" "$@" ||
  fail "FAILED in the emulation's own programs, see above"

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
python -c 'import fastkd, sys; print(fastkd.__file__); sys.exit(bool(fastkd.backends()["cpu"]))' ||
  fail "the kernel does not load"
if [ -n "$few" ]; then
  FASTKD_EMULATION=0 run tests/losses/test_edges.py tests/losses/test_options.py tests/losses/test_decoupled.py tests/losses/test_sparse.py -k "cpu and not cpu-avx2 and not cpu-baseline" "$@" ||
    fail "FAILED, see above"
else
  # Not what runs no kernel of ours. Without optimisation all instruction sets round alike, so that
  # "limiting" them does not show.
  FASTKD_EMULATION=0 run tests --ignore=tests/definition/test_spec.py --ignore=tests/cuda_kernels/test_emulation.py \
    -k "not reference and not compile and not limiting" "$@" || fail "FAILED, see above"
  run tests/losses/test_edges.py tests/losses/test_options.py tests/losses/test_decoupled.py tests/losses/test_sparse.py tests/losses/test_flat.py -k emulat "$@" ||
    fail "FAILED under emulation, see above"
fi
printf 'SANITIZERS: passed, nothing found (%d s)\n' "$SECONDS"
