#!/usr/bin/env bash
# Everything a machine with a CUDA GPU should show, in one call: build, GPU tests, sanitizers on a small subset, benchmarks.
# Results go under $OUT (default: ./gpu-results). Nothing is downloaded; torch, triton, nvcc, ninja and pybind11 must be there.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/gpu-results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
failures=0

step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "==> $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  tail -n 15 "$OUT/$name.log"
  [ $status -eq 0 ] || { echo "FAILED: $name (status $status)"; failures=$((failures + 1)); }
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv || failures=$((failures + 1))
step build 240 env SLIMKERNELS_CUDA=1 python3 -m pip install -e . --no-build-isolation --no-deps
step info 60 python3 -m slimkernels.cli info --json
step pytest-gpu 240 python3 -m pytest -m gpu -q -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest tests/test_cuda.py -m gpu -q -x \
      -p no:cacheprovider -k "test_bsr_linear or any_strides or keep_leading"
  done
else
  echo "compute-sanitizer is not on this machine"
fi
step bench-ops 240 python3 -m pytest benchmarks/bench_ops.py -q -p no:cacheprovider --seconds 0.3 --benchmark-json "$OUT/ops.json"
python3 benchmarks/report.py "$OUT/ops.json" --out "$OUT/report" | head -60
echo "$failures step(s) failed"
exit "$failures"
