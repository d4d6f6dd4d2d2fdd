"""Runs stages of the GPU check, each a process of its own with a time limit; ``benchmarks/gpu_check.sh`` says how.

At its limit a stage gets an interrupt, on which pytest prints its summary, and ten seconds later it and all that it
started are killed. What it found is on disk before the next begins; a stage that fails or hangs stops only itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import plan
from gpu_check.plan import Stage
from gpu_check.results import Results
from gpu_check.summary import summary

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "build" / "gpu-check"
# A stage is not begun with less.
_LEAST_SECONDS = 8
# Left of a call for the last files and the table.
_CLOSING_SECONDS = 5


class Runner:
    """Runs the stages of one call one after the other.

    Args:
        state: folder of all results, kept between calls. out: folder of the few files that are taken home.
        seconds: of the whole call. grace: between interrupt and kill. closing: kept for the last files and the table.
        results: where they go, if runners share them.
    """

    def __init__(
        self, state: Path, out: Path, seconds: float, python: str = sys.executable, grace: float = plan.GRACE_SECONDS,
        closing: float = _CLOSING_SECONDS, results: Results | None = None,
    ) -> None:  # fmt: skip
        self.results = results or Results(state, out)
        self._state, self._python, self._grace, self._closing = state, python, grace, closing
        self._deadline = time.monotonic() + seconds
        self._current: subprocess.Popen[bytes] | None = None
        self._build: subprocess.Popen[bytes] | None = None

    def run(self, stages: Sequence[Stage]) -> bool:
        """Runs stages in order; whether all of them ended well. What there is no time for is recorded so."""
        # A shell's background job ignores interrupts and hands that on to the stages, which could then not be stopped.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for stage in stages:
                self._stage(stage)
                self.results.write()
        finally:
            for process in (self._current, self._build):
                if process is not None:
                    _end(process, signal.SIGKILL)
            self._build_row()
            self.results.write()
        return all(row["status"] == "ok" for row in self.results.stages if row["stage"] in {s.name for s in stages})

    def end(self) -> None:
        """Ends the stage that runs, from another thread; none begins after it."""
        self._deadline = 0.0
        current = self._current
        if current is not None:
            _end(current, signal.SIGKILL)

    def build(self, command: Sequence[str]) -> None:
        """Begins the build of the extension at low priority; stages that need it wait for it."""
        nice = ["nice", "-n", "15"] if shutil.which("nice") else []
        with open(self._state / "build.txt", "wb") as log:
            self._build = subprocess.Popen(
                [*nice, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "SLIMKERNELS_CUDA": "1"},
            )  # fmt: skip

    def _build_row(self) -> None:
        if self._build is not None:
            status = self._build.poll()
            words = (
                "unfinished" if status is None or status < 0 else "ok" if status == 0 else f"failed: status {status}"
            )
            self.results.note("build", words)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _stage(self, stage: Stage) -> None:
        # An overrun of the limit by the grace period must not cost a later stage more than the call has to spare.
        limit = min(stage.seconds, self._left() - self._closing - self._grace)
        if limit < min(_LEAST_SECONDS, stage.seconds / 2):
            self.results.stage(stage, "no time", 0.0)
            return
        begun = time.monotonic()
        if self._build is not None and stage.build_wait:
            try:
                self._build.wait(min(stage.build_wait, limit / 2))
            except subprocess.TimeoutExpired:
                self.results.note(stage.name, "began before the extension was built")
        self.results.begin(stage)
        log = self.results.log(stage)
        with open(log, "wb") as output:
            self._current = subprocess.Popen(
                [self._python, *self._filled(stage)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, env=self._environment(stage),
            )  # fmt: skip
            status = self._wait(self._current, limit - (time.monotonic() - begun))
            _end(self._current, signal.SIGKILL)  # workers, profilers and compilers that outlived it
            self._current = None
        self.results.stage(stage, status, time.monotonic() - begun)

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        """``ok``, ``failed: status N`` or ``out of time``, the latter after an interrupt and perhaps a kill."""
        try:
            status = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # to pytest alone: it ends its workers and prints its summary
            try:
                process.wait(self._grace)
            except subprocess.TimeoutExpired:
                _end(process, signal.SIGKILL)
                return "out of time, killed"
            return "out of time"
        return "ok" if status == 0 else f"failed: status {status}"

    def _filled(self, stage: Stage) -> list[str]:
        return [self._fill(part, stage) for part in stage.command]

    def _fill(self, text: str, stage: Stage) -> str:
        return text.replace("{rows}", str(self.results.rows_path(stage.name))).replace("{state}", str(self._state))

    def _environment(self, stage: Stage) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", plan.TRITON_CACHE),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "SLIMKERNELS_CACHE_DIR": str(self._state / "measured"),
            **{name: self._fill(value, stage) for name, value in stage.variables.items()},
        }


def _end(process: subprocess.Popen[bytes], how: int) -> None:
    """Sends a signal to a process and all that it started, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def chosen(names: Sequence[str]) -> tuple[list[Stage], float]:
    """Stages and seconds for the number of a call, or names of stages.

    Raises:
        ValueError: an unknown name.
    """
    if list(names) in ([str(call)] for call in plan.CALL_SECONDS):
        call = int(names[0])
        return plan.stages_of(call), plan.CALL_SECONDS[call]
    known = {s.name: s for s in plan.STAGES}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"gpu_check: expected 1, 2, 3 or stages among {', '.join(known)}, got {' '.join(names) or 'none'}"
        )
    stages = [known[name] for name in names]
    return stages, sum(s.seconds + plan.GRACE_SECONDS for s in stages) + _CLOSING_SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("what", nargs="*", help="1, 2, 3, or names of stages")
    parser.add_argument("--plan", action="store_true", help="print stages, seconds and sums; run nothing")
    parser.add_argument("--dry-run", action="store_true", help="all stages, or those named, on a stand-in for a GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or STATE / "out"), help="what to keep")
    parser.add_argument("--state", type=Path, default=STATE, help="everything, kept from call to call")
    parser.add_argument("--from", dest="before", type=Path, default=None, help="an --out folder of an earlier call")
    parser.add_argument("--seconds", type=float, default=None, help="of the whole call, instead of the plan's")
    parser.add_argument("--no-build", action="store_true", help="do not build the extension")
    parsed = parser.parse_args(arguments)
    if parsed.plan:
        print(plan.plan_text())
        return 0
    if parsed.dry_run:
        from gpu_check import dry_run

        return dry_run.main(parsed.what)
    try:
        stages, seconds = chosen(parsed.what)
    except ValueError as error:
        parser.error(str(error))
    runner = Runner(parsed.state, parsed.out, parsed.seconds or seconds)
    if parsed.before is not None:
        runner.results.restore(parsed.before)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    well = False
    try:
        if not parsed.no_build and any(s.build_wait or s.name == "versions" for s in stages):
            runner.build([sys.executable, "setup.py", "build_ext", "--inplace"])
        well = runner.run(stages)
    except KeyboardInterrupt:
        print("gpu_check: stopped from outside")
    print(summary(runner.results.merged()))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
