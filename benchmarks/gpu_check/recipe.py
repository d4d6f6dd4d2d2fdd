"""A recipe's preset for one call on a GPU: train, prune, distil, convert, time, and a report with its checkpoints.

What it leaves in the folder of all results is one archive, such as ``slimnets-device.tar.gz``: ``report.md``,
``report.json``, pictures, the compact files of its rows, each under 2 MB, and the results of every step; of a run that
is cut off, what was done by then. ``slimkernels reproduce ... --only report`` makes the report from those results.
"""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gpu_check import options, rows
from slimkernels.recipes.runner import reproduce

_KEPT = ("*.md", "*.json", "*.png", "checkpoints/*.slim.safetensors", "rows/*/*/*.json")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of all results")
    parser.add_argument("--data", default=os.environ.get("DATA"), help="as of slimkernels reproduce (default: $DATA)")
    parser.add_argument("--recipe", default="slimnets", help="of the package (default: %(default)s)")
    parser.add_argument("--preset", default="device", help="of the recipe (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=(), help="as of slimkernels reproduce")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile as a baseline")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    out = parsed.state / f"{parsed.recipe}-device"
    begun = time.monotonic()
    torch.backends.cudnn.benchmark = parsed.device == "cuda"

    def pack() -> None:
        with tarfile.open(parsed.state / f"{out.name}.tar.gz", "w:gz") as archive:
            for path in sorted({path for pattern in _KEPT for path in out.glob(pattern)}):
                archive.add(path, path.relative_to(parsed.state))

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s {line}", flush=True)
        pack()  # at every line: one run was ended before it could do so at its end

    try:
        report = reproduce(
            parsed.recipe,
            preset=parsed.preset,
            out=out,
            data=parsed.data,
            only=parsed.only,
            device=parsed.device,
            compile=parsed.compile,
            progress=False,
            say=say,
        )
    finally:
        pack()
    for row in report["rows"]:
        own = row["measurement"] or {}
        latency = {batch: entry["speedup"] for batch, entry in own.get("latency", {}).items()}
        told = {key: row.get(key) for key in ("name", "points", "compression")}
        found = {**told, "accuracy": row["accuracy"]["mean"], "speedup": latency, "match": "error" not in own}
        rows.append(parsed.rows, {"op": "recipe", **found})
    for verdict in report["verdicts"]:
        print("yes" if verdict["holds"] else "no ", verdict["text"], flush=True)
    if report["unfit"]:
        raise SystemExit(f"gpu_check.recipe: no time for {', '.join(report['unfit'])}")


if __name__ == "__main__":
    main()
