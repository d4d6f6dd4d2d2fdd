#!/usr/bin/env bash
# What a machine with a CUDA GPU should show, in calls of at most 540, 230 and 540 seconds: is it right, how fast is it,
# why, and what the paper's recipe comes to on it.
#
#   benchmarks/gpu_check.sh --plan       stages, seconds and their sums; runs nothing
#   benchmarks/gpu_check.sh --dry-run    every stage without a GPU, on a stand-in that computes nothing on one: four minutes
#   benchmarks/gpu_check.sh 1            ceilings, correctness, VGG-19, configurations, counters, GPU tests, sanitizer
#   benchmarks/gpu_check.sh 2            VGG-16, VGG-19 as tuned by call 1, a training step, what failed in call 1, low rank
#   benchmarks/gpu_check.sh 3            the recipe's preset "device": trained, compressed, timed; by itself, on any machine;
#                                        DATA=FOLDER or archive with the images of CIFAR-10, as --data of reproduce
#   benchmarks/gpu_check.sh STAGE...     stages by name; --seconds N: no more than so many in all
#
# On a machine that is rented by the minute: copy the repository and, where it exists, .gpu-cache/ (a Triton cache made without
# a GPU, triton-cache.tar.*) to the machine and run, one after the other on the same machine,
#
#   OUT=results benchmarks/gpu_check.sh 1
#   OUT=results benchmarks/gpu_check.sh 2
#
# On another machine the second call takes over what the first one brought home: benchmarks/gpu_check.sh 2 --from FOLDER.
#
# Needs torch, triton, pytest, pytest-benchmark and pytest-xdist; for the CUDA C++ kernels nvcc, ninja and pybind11; ncu and
# compute-sanitizer for the stages of that name; constriction for compact files (call 3 and the stage checkpoints). Nothing
# is downloaded or installed. OUT (or --out) is the folder to take home, at most eight files: results.json, log.txt,
# plan.txt, tests.xml, again.xml, counters.csv, tuned.json, build.txt; of call 3 slimnets-device.tar.gz (report, pictures,
# compact checkpoints), of the stage ranking ranking-device.tar.gz. All else stays under build/gpu-check. The last 11 000
# characters of the output are a table of everything important.
#
# From a run to a committed result:
#
#   python benchmarks/report.py OUT/results.json --commit "$(git rev-parse HEAD)" --out benchmarks/results/<device>
#   cp OUT/tuned.json slimkernels/tuned/<device>.json
#
# <device> is the table's own name for itself, such as nvidia-h200; --commit only where the machine had no .git folder.
#
# gpu_check/plan.py holds the stages. PYTHON: the interpreter (default python3). TRITON_CACHE_TARBALL: another cache file.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m gpu_check "$@"
