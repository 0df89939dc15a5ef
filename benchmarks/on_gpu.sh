#!/usr/bin/env bash
# Everything a GPU has to show, from a clean checkout and without network:
#
#   bash benchmarks/on_gpu.sh OUT             all stages, in the order below
#   bash benchmarks/on_gpu.sh OUT STAGE...    some of them
#
#   build       the modules, for this GPU only, and python -m fastkd
#   suite       the tests of the backend; compile: those that go through torch.compile
#   variants    every kernel variant against the cpu backend; bits: two runs give the same bits;
#               graph: captured in a CUDA graph
#   memcheck    the variants under compute-sanitizer; racecheck, synccheck: the same
#   timing      against the device's copy, eager PyTorch and torch.compile; then the other losses
#               beside kd_loss
#
# Needs nvcc, g++, torch >= 2.10 with CUDA, setuptools and pytest; ninja, hypothesis and
# compute-sanitizer are used where they are. A stage ends within 8 minutes; what it prints goes to
# OUT/STAGE.log, its outcome to OUT/summary.txt. "unfinished": there was no time for all of it;
# timing goes on where it stopped when it is called again. BACKEND=triton: the other backend, also
# on AMD's GPUs and without nvcc; its first calls compile, so that a stage called again goes further.
# REHEARSE=1: all of it on the CPU with tiny inputs, to try the script; the numbers mean nothing.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BACKEND=${BACKEND:-cuda}
REHEARSE=${REHEARSE:-}
[ -z "$REHEARSE" ] || BACKEND=cpu
export OUT BACKEND REHEARSE PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 FASTKD_EMULATION=0

build() {
  if [ -z "$REHEARSE" ]; then
    nvidia-smi || rocm-smi
    local capability='import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
    TORCH_CUDA_ARCH_LIST=$(python3 -c "$capability") || return
    export TORCH_CUDA_ARCH_LIST
    [ "$BACKEND" = cuda ] || export FASTKD_CUDA=0
  fi
  # Beside pyproject.toml, which a setuptools older than 77 refuses.
  mkdir -p "$OUT/build" && cp -r setup.py csrc "$OUT/build" &&
    (cd "$OUT/build" && python3 setup.py build_ext --build-lib lib) &&
    cp "$OUT"/build/lib/fastkd/*.so fastkd && python3 -m fastkd
}

tests() {
  local marks="gpu and $1"
  [ -z "$REHEARSE" ] || marks=$1
  local only=triton
  [ "$BACKEND" = triton ] || only="not triton"
  [ -z "$REHEARSE" ] || only=$2
  python3 -m pytest tests -q -p no:cacheprovider --durations=10 -m "$marks" -k "$only"
}
suite() { tests "not slow" "cpu and test_accuracy"; }
compile() { tests slow "cpu and test_compile_of_half"; }

checks() { "${@:2}" python3 -m benchmarks.gpu_checks "$1" --backend "$BACKEND" --seconds 400; }
variants() { checks variants; }
bits() { checks bits; }
graph() { checks graph; }

sanitize() {
  local tool=compute-sanitizer
  command -v $tool >/dev/null || tool=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
  local kernels=fastkd
  [ "$BACKEND" != triton ] || kernels=_rows_kernel  # as Triton names them
  local under=("$tool" --tool "$1" --error-exitcode 99 --kernel-name "kns=$kernels")
  [ -z "$REHEARSE" ] || under=(env)
  # Without torch's cache of memory, so that what lies beyond a tensor is no other tensor's.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 checks variants "${under[@]}"
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }

timing() { python3 -m benchmarks.gpu_timing "$OUT" --backend "$BACKEND"; }

every=(build suite compile variants bits graph memcheck racecheck synccheck timing)
stages=("${@:-${every[@]}}")
export -f "${every[@]}" tests checks sanitize
failed=0
for stage in "${stages[@]}"; do
  [[ " ${every[*]} " == *" $stage "* ]] || { echo "no stage $stage: ${every[*]}"; exit 2; }
  again=yes
  while [ -n "$again" ]; do
    printf '\n== %s\n' "$stage"
    begin=$SECONDS
    timeout -k 10 470 bash -uo pipefail -c "$stage" 2>&1 | tee "$OUT/$stage.log"
    status=${PIPESTATUS[0]}
    case $status in
      0) outcome=passed ;;
      75) outcome=unfinished ;;
      124) outcome="out of time" ;;
      *) outcome="FAILED, status $status" ;;
    esac
    printf '%-10s %s, %d s\n' "$stage" "$outcome" $((SECONDS - begin)) | tee -a "$OUT/summary.txt"
    # Asked for by name, a stage runs once.
    [ $# -eq 0 ] && [ "$stage" = timing ] && [ "$status" -eq 75 ] || again=
  done
  [ "$status" -eq 0 ] || failed=1
  [ "$stage" != build ] || [ "$status" -eq 0 ] || break
done
exit "$failed"
