"""Every stage of the GPU check without a GPU: imports, fixtures, command lines, grids, alignments, files.

The stages run as on a GPU, by the same runner and with the same commands, on a stand-in for one (`stand_in`) that every
Python process takes up by ``sitecustomize``; ncu, compute-sanitizer and nvidia-smi are scripts that run their command
and say what the tool would say. Networks have one image of 32x32, and the arguments in `EXTRA` come behind a stage's
own. Afterwards every stage must have ended well and left rows that match, and every kernel must have been launched.

Times mean nothing here, and neither do results: they are the references'. What a GPU alone can show is whether the
kernels compute what their references do, races, real streams, and speed. Not run are tests that look inside the
compiler or torch's own CUDA parts (`NOT_HERE`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from gpu_check import plan, rows
from gpu_check.__main__ import Runner
from gpu_check.plan import Stage
from gpu_check.results import Results

# Tests of torch.compile, export, opcheck, several GPUs, TF32's rounding, autograd by name of kernel: see above.
NOT_HERE = (
    "compile", "export", "opcheck", "ddp", "tf32", "channels_last_goes_through", "no_more_kernels", "cuda",
)  # fmt: skip
NOT = " and not ".join(NOT_HERE)


def _some(*names: str) -> tuple[str, ...]:
    """A few tests, by parts of their names; the others differ in sizes."""
    return ("-k", f"({' or '.join(names)}) and not {NOT}", "-n", "2", "--maxfail", "5")


_QUICK = ("--seconds", "0.01")
# Arguments that come behind those of a stage, and replace them: the machine here is small.
EXTRA = {
    "compile": ("--processes", "2", "--names", "batch_1", "--no-sweep"),
    "ceilings": ("--smoke",),
    "correctness": ("--names", "headline"),
    "vgg": _QUICK,
    "sweep": ("--layers", "1", "--names", "headline"),
    "tensor_cores": ("--layers", "1"),
    "chain": ("--batches", "1", "--layers", "3"),
    "tensor_cores_2": ("--layers", "1"),
    "tensor_cores_tf32": ("--layers", "1"),
    "narrow": ("--collect-only",),  # as "vgg" but for other kernels, which "sanitizer_cuda" launches
    "sanitizer_cuda": ("--tool", "memcheck"),
    "tests_cuda": ("--collect-only",),  # as "tests"
    "rows": (*_QUICK, "-k", "batch_1 and not batch_16"),
    "tests": _some("captured", "split", "training_matches", "autocast", "streams"),
    "autotune": ("--collect-only",),  # as "vgg" but for torch.compile, which returns the module here
    "compile_2": ("--processes", "2"),
    "vgg16": _QUICK,
    "swept": _QUICK,
    "training": (*_QUICK, "--smoke"),
    "training_torch": ("--collect-only",),  # as "training" but for torch's batch norm
    "training_compiled": ("--collect-only",),
    "sparse_compiled": ("--collect-only",),
    "networks": (*_QUICK, "--smoke", "--compile", "none"),
    "checkpoints": (*_QUICK, "--smoke"),
    "again": _some("m_lt_tile"),
    "low_rank": ("--smoke",),
    "trainer": ("--smoke", "--device", "cpu"),
    "recipe": ("--preset", "device_rehearsal", "--no-compile", "--device", "cpu"),  # the stand-in holds no memory
    "ranking": ("--preset", "device_rehearsal", "--only", "teacher", "--no-compile", "--device", "cpu"),
}
# Stages that find the kernels of CUDA C++ that the stand-in knows; the others find none.
WITH_EXTENSION = ("chain", "sanitizer_cuda")
# Kernels that must have been launched somewhere.
KERNELS = (
    "bsr_conv2d_fwd_kernel", "bsr_conv2d_reduce_kernel", "bsr_conv2d_bwd_x_kernel", "bsr_conv2d_bwd_w_kernel",
    "low_rank_linear_fwd_kernel", "low_rank_conv2d_fwd_kernel", "gather",
    "chain_conv2d_kernel", "stem_conv2d_kernel", "resident_conv2d_kernel", "weight_gradient_kernel", "low_rank_kernel",
)  # fmt: skip

_NCU = """#!{python}
import csv, subprocess, sys
arguments = sys.argv[1:]
metrics = {metrics!r}
if "--query-metrics" in arguments:
    print("\\n".join(name.split(".")[0] + "   a counter" for name in metrics))
    raise SystemExit(0)
at = arguments.index("-m") - 1
status = subprocess.run(arguments[at:]).returncode
asked = arguments[arguments.index("--metrics") + 1].split(",")
with open(arguments[arguments.index("--log-file") + 1], "w") as file:
    out = csv.writer(file, quoting=csv.QUOTE_ALL)
    out.writerow(["ID", "Kernel Name", *asked])
    out.writerow(["", "", *["unit"] * len(asked)])
    for launch in range(3):
        out.writerow([launch, "bsr_conv2d_fwd_kernel", *["1,000"] * len(asked)])
raise SystemExit(status)
"""
_SANITIZER = """#!{python}
import subprocess, sys
at = sys.argv.index("-m") - 1
status = subprocess.run(sys.argv[at:]).returncode
print("========= ERROR SUMMARY: 0 errors")
raise SystemExit(status)
"""
_SMI = """#!{python}
print("NVIDIA H100 80GB HBM3, 580.0, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 30, 81559 MiB")
"""
_SITE = "import stand_in\n\nstand_in.from_environment()\n"


def tools(folder: Path) -> None:
    """The scripts in the place of NVIDIA's tools, and the module that Python imports as it starts."""
    from gpu_check.counters import METRICS

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"ncu": _NCU, "compute-sanitizer": _SANITIZER, "nvidia-smi": _SMI}.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable, metrics=list(METRICS)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "sitecustomize.py").write_text(_SITE)


def environment(folder: Path) -> dict[str, str]:
    """Variables under which every Python process has the stand-in."""
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "SLIMKERNELS_STAND_IN_LAUNCHES": str(folder / "launches.jsonl"),
        "SLIMKERNELS_STAND_IN_IMAGES": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "OMP_NUM_THREADS": "1",
    }


def rehearsed(stage: Stage) -> Stage:
    """A stage with its arguments for here and more time."""
    variables = stage.variables | ({"SLIMKERNELS_STAND_IN_EXTENSION": "1"} if stage.name in WITH_EXTENSION else {})
    return replace(stage, command=(*stage.command, *EXTRA.get(stage.name, ())), seconds=300, variables=variables)


def faults(state: Path, stages: Sequence[Stage], ended: dict[str, str], launches: Path) -> list[str]:
    """What is wrong afterwards: stages that failed or left nothing, rows that do not match, kernels never launched."""
    found = []
    for stage in stages:
        if ended.get(stage.name) != "ok":
            found.append(f"{stage.name}: {ended.get(stage.name, 'did not run')}")
        kept = rows.read(state / "rows" / f"{stage.name}.jsonl")
        if not kept and stage.name != "again" and "--collect-only" not in stage.command:
            found.append(f"{stage.name}: no rows")
        found += [
            f"{stage.name}: {row.get('name')} does not match: {str(row)[:300]}"
            for row in kept
            if row.get("match") is False
        ]
    launched = (
        Counter(json.loads(line)["kernel"] for line in launches.read_text().splitlines()) if launches.exists() else {}
    )
    if len(stages) == len(plan.STAGES):
        found += [f"{kernel} was never launched" for kernel in KERNELS if not launched.get(kernel)]
    print(", ".join(f"{kernel} {count}" for kernel, count in sorted(launched.items())))
    return found


def run(runners: Sequence[Runner], stages: Sequence[Stage]) -> None:
    """Runs the stages in order, each on the first runner that is free.

    However it ends, the stages that run end with it.
    """
    waiting = list(reversed(stages))

    def take(runner: Runner) -> None:
        while waiting:
            try:
                runner.run([waiting.pop()])
            except IndexError:  # another one took the last
                return

    with ThreadPoolExecutor(len(runners)) as threads:
        ends = [threads.submit(take, runner) for runner in runners]
        try:
            for end in ends:
                end.result()
        finally:
            waiting.clear()
            while not all(end.done() for end in ends):  # again and again, for one may be about to begin a stage
                for runner in runners:
                    runner.end()
                time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="names; by default all")
    parser.add_argument("--state", type=Path, default=None, help="folder of everything (default: a temporary one)")
    parsed = parser.parse_args(arguments)
    scratch = tempfile.TemporaryDirectory()
    state = (parsed.state or Path(scratch.name)).resolve()
    tools(state / "tools")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(environment(state / "tools"))
    stages = [rehearsed(s) for s in plan.STAGES if not parsed.stages or s.name in parsed.stages]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    begun = time.monotonic()
    results = Results(state, state / "out")
    # Two at a time: most of a stage is one thread of Python, and times mean nothing here.
    run([Runner(state, state / "out", seconds=3600, results=results) for _ in range(2)], stages)
    ended = {row["stage"]: row["status"] for row in results.stages}
    wrong = faults(state, stages, ended, state / "tools" / "launches.jsonl")
    print("\n".join([*wrong, f"dry run: {len(stages)} stages, {len(wrong)} faults, {time.monotonic() - begun:.0f} s"]))
    for name in {text.split(":")[0] for text in wrong}:
        log = state / "logs" / f"{name}.txt"
        if log.exists():
            print(f"\n==> {name}\n" + log.read_text(errors="replace")[-3000:])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
