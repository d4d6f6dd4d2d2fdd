#!/usr/bin/env bash
# What a machine with a CUDA GPU should show, in one call of about ten minutes, the most valuable first: ceilings, quick
# correctness, whole networks, all GPU tests, layers, backward, low rank, tuning, sanitizers. The extension is built meanwhile.
#
#   benchmarks/gpu_check.sh [STEP...]     only these steps (names below; build installs the checkout), such as: tune sanitizer
#
# LIMIT: seconds for everything (default 570); each step has its own limit too. OUT: folder of the results (default
# ./gpu-results): log.txt, steps.txt, rows.jsonl (written row by row), the tuned table, report/. They survive a kill.
# Nothing is downloaded; torch, triton, pytest, pytest-benchmark and, for the CUDA C++ kernels, nvcc and ninja must be there.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/gpu-results}
LIMIT=${LIMIT:-570}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TRITON_DEFAULT_FP_FUSION=1
wanted=" $* "
python=${PYTHON:-python3}
failures=0
: >"$OUT/log.txt"
: >"$OUT/steps.txt"

left() { echo $((LIMIT - SECONDS)); }

step() { # name, seconds, command...
  local name=$1 limit=$2 from=$SECONDS status=0
  shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 10 ]; then
    echo "no time  $name" | tee -a "$OUT/steps.txt"
    return 0
  fi
  printf '\n==> %s (at most %d s)\n' "$name" "$limit" >>"$OUT/log.txt"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/.step" 2>&1 || status=$?
  cat "$OUT/.step" >>"$OUT/log.txt"
  [ $status -eq 0 ] || failures=$((failures + 1))
  printf '%4d s  %s  %s\n' $((SECONDS - from)) "$name" "$([ $status -eq 0 ] || echo "FAILED with status $status")" | tee -a "$OUT/steps.txt"
  tail -n 12 "$OUT/.step" | cut -c 1-200
  rm -f "$OUT/.step"
}

report() {
  [ -s "$OUT/rows.jsonl" ] && "$python" benchmarks/report.py "$OUT/rows.jsonl" --out "$OUT/report" 2>&1 | tail -n 80
  cat "$OUT/steps.txt"
}
trap 'report; exit 143' TERM INT

bench() { "$python" -m pytest -q -p no:cacheprovider --benchmark-disable-gc --benchmark-columns=median --rows "$OUT/rows.jsonl" "$@"; }
export -f bench
export OUT python
suite() { bash -c 'bench "$@"' bench "$@"; }
export -f suite

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv 2>&1 | tee -a "$OUT/log.txt"
build=
if [[ $wanted == "  " || $wanted == *" build "* ]]; then
  (env SLIMKERNELS_CUDA=1 timeout 240 "$python" -m pip install -e . --no-build-isolation --no-deps >"$OUT/.build" 2>&1
   echo "build: status $?, $SECONDS s" >>"$OUT/.build") &
  build=$!
fi

step ceilings 60 bash -c 'suite benchmarks/bench_ceilings.py'
step quick 100 "$python" -m pytest tests/test_triton_gpu.py -m gpu -q -x -p no:cacheprovider -k "bfloat16 and (test_conv_block_shapes or default_tiles)"
if [ -n "$build" ]; then
  wait "$build"
  { printf '\n==> build\n'; cat "$OUT/.build"; } >>"$OUT/log.txt"
  tail -n 1 "$OUT/.build" | tee -a "$OUT/steps.txt"
  rm -f "$OUT/.build"
fi
step info 30 "$python" -m slimkernels.cli info
step vgg 170 bash -c 'suite benchmarks/bench_vgg.py -k test_vgg_gpu --seconds 0.5'
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8) # most of a GPU test is compiling its kernel
step pytest 200 "$python" -m pytest -m "gpu and not slow" -q -p no:cacheprovider --durations=10 "${parallel[@]}"
step backward 60 bash -c 'suite benchmarks/bench_backward.py --seconds 0.3'
step ops 100 bash -c 'suite benchmarks/bench_ops.py --seconds 0.2'
step low_rank 60 bash -c 'suite benchmarks/bench_low_rank.py --seconds 0.2'
step tune 120 "$python" -m slimkernels.cli tune --device cuda --op bsr_conv2d --batch 1024 --batch 16 --limit 100 --out "$OUT/nvidia.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step sanitizer 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest tests/test_triton_gpu.py tests/test_cuda.py \
      -m gpu -q -x -p no:cacheprovider -k "test_bsr_linear or (test_linear and 64x16)"
  done
else
  echo "compute-sanitizer is not on this machine" | tee -a "$OUT/steps.txt"
fi
report
echo "$failures step(s) failed, $SECONDS s"
exit "$failures"
