"""Where results lie: a folder that is kept from call to call, and a folder of few files to take home.

``results.json``, written anew after every stage, holds everything: environment, stages, and all rows with the stage
that measured them. ``python benchmarks/report.py results.json --out benchmarks/results/<device>`` turns it into the
record that is committed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from gpu_check import rows
from gpu_check.plan import TRITON_CACHE, Stage, plan_text

FORMAT = 1
# At most eight files come home, none deeper than two folders; these are results.json, log.txt, plan.txt and these.
_COPIED = ("tests.xml", "again.xml", "counters.csv", "build.txt", "slimnets-device.tar.gz", "ranking-device.tar.gz")
_LOG_BYTES = 12 * 2**20
_STAGE_LOG_BYTES = 2 * 2**20


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)


class Results:
    """The results of this call and of earlier ones in the same folder. Several threads may add to them.

    Attributes:
        stages: one object a stage that was run or had no time: ``stage``, ``call``, ``status``, ``seconds``, ``limit``,
            ``compiled`` (kernels that Triton's cache gained), ``note``.
    """

    def __init__(self, state: Path, out: Path) -> None:
        self._state, self._out = state, out
        for folder in (state / "rows", state / "logs", out):
            folder.mkdir(parents=True, exist_ok=True)
        known = state / "stages.json"
        self.stages: list[dict[str, Any]] = json.loads(known.read_text()) if known.exists() else []
        self._notes: dict[str, str] = {}
        self._cubins = 0
        self._lock = threading.Lock()

    def rows_path(self, stage: str) -> Path:
        """The file of a stage's rows."""
        return self._state / "rows" / f"{stage}.jsonl"

    def log(self, stage: Stage) -> Path:
        """The file of a stage's output."""
        return self._state / "logs" / f"{stage.name}.txt"

    def note(self, stage: str, text: str) -> None:
        """A remark that goes with a stage."""
        self._notes[stage] = text

    def begin(self, stage: Stage) -> None:
        """Forgets what an earlier run of the stage left."""
        self.rows_path(stage.name).unlink(missing_ok=True)
        self._cubins = self._compiled()

    def stage(self, stage: Stage, status: str, seconds: float) -> None:
        """Records how a stage ended, and prints it."""
        row = {"stage": stage.name, "call": stage.call, "status": status, "seconds": round(seconds, 1),
               "limit": stage.seconds, "compiled": max(0, self._compiled() - self._cubins)}  # fmt: skip
        if stage.name in self._notes:
            row["note"] = self._notes.pop(stage.name)
        with self._lock:
            self.stages = [s for s in self.stages if s["stage"] != stage.name] + [row]
        print(f"{row['seconds']:7.1f} s of {stage.seconds:3d}  {stage.name:<12} {status}", flush=True)

    def _compiled(self) -> int:
        folder = Path(os.environ.get("TRITON_CACHE_DIR", TRITON_CACHE))
        return sum(1 for _ in folder.rglob("*.cubin")) if folder.is_dir() else 0

    def merged(self) -> dict[str, Any]:
        """Everything as one object."""
        environment: dict[str, Any] | None = None
        found: list[dict[str, Any]] = []
        for stage in self.stages:
            for row in rows.read(self.rows_path(stage["stage"])):
                if "environment" in row:
                    environment = environment or row["environment"]
                else:
                    found.append({"stage": stage["stage"], **row})
        return {"format": FORMAT, "environment": environment, "notes": dict(self._notes), "stages": self.stages,
                "rows": found}  # fmt: skip

    def write(self) -> None:
        """Writes what is kept and what is taken home."""
        with self._lock:
            _replace(self._state / "stages.json", json.dumps(self.stages, indent=1))
            _replace(self._out / "results.json", json.dumps(self.merged(), indent=1) + "\n")
            _replace(self._out / "plan.txt", plan_text())
            _replace(self._out / "log.txt", self._log_text())
            for name in _COPIED:
                if (self._state / name).exists():
                    shutil.copyfile(self._state / name, self._out / name)
            for table in sorted((self._state / "swept" / "tuned").glob("*.json"))[:1]:
                shutil.copyfile(table, self._out / "tuned.json")

    def _log_text(self) -> str:
        parts = []
        for stage in self.stages:
            path = self._state / "logs" / f"{stage['stage']}.txt"
            text = path.read_bytes()[-_STAGE_LOG_BYTES:].decode(errors="replace") if path.exists() else ""
            parts.append(f"\n==> {stage['stage']}: {stage['status']}, {stage['seconds']} s of {stage['limit']}\n{text}")
        return "".join(parts)[-_LOG_BYTES:]

    def restore(self, folder: Path) -> None:
        """Takes over what an earlier call brought home, on a machine that has not kept it.

        Raises:
            ValueError: no results in the folder.
        """
        source = folder / "results.json"
        if not source.exists():
            raise ValueError(f"gpu_check: expected a folder with results.json, got {folder}")
        data = json.loads(source.read_text())
        for stage in data["stages"]:
            path = self.rows_path(stage["stage"])
            path.unlink(missing_ok=True)
            own = [row for row in data["rows"] if row["stage"] == stage["stage"]]
            if stage["stage"] == "versions" and data["environment"]:
                own.insert(0, {"environment": data["environment"]})
            rows.append(path, *own)
        self.stages = data["stages"]
        table = folder / "tuned.json"
        if table.exists():
            device = json.loads(table.read_text())["device"]
            for cache in ("swept", "measured"):
                target = self._state / cache / "tuned" / f"{device}.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                if cache == "swept":
                    shutil.copyfile(table, target)
                else:
                    rates_only = {**json.loads(table.read_text()), "entries": [], "break_even": []}
                    target.write_text(json.dumps(rates_only, indent=1) + "\n")
