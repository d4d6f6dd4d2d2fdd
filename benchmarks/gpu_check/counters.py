"""Why the kernels take their time: hardware counters of three of the headline's kernels, read by Nsight Compute.

An early, a middle and a late layer run under ``ncu`` in a process of their own, clocks left as they are. Expected: L2
sectors near ``tiles * depth * (BLOCK_M + BLOCK_N) * 2 / 32``, DRAM bytes near one read of the input and one write of
the output, about 1 024 tag lookups an input tile, and 1 800 to 2 300 instructions of a warp outside its main loop.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from gpu_check import layers, options, rows
from gpu_check.summary import counter_lines

LAYERS = ("conv1_2", "conv3_2", "conv5_1")
METRICS = (
    "gpu__time_duration.sum", "sm__cycles_elapsed.max", "lts__t_sectors.sum", "lts__t_sectors_op_read.sum",
    "lts__t_sector_hit_rate.pct", "lts__t_sectors.avg.pct_of_peak_sustained_elapsed", "l1tex__t_requests.sum",
    "l1tex__t_sectors.sum", "l1tex__t_set_accesses.sum", "l1tex__m_xbar2l1tex_read_sectors.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum", "smsp__inst_executed.sum", "smsp__inst_issued.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active", "smsp__cycles_active.avg",
    "sm__inst_executed_pipe_tensor.sum", "sm__warps_active.avg.pct_of_peak_sustained_active", "dram__bytes_read.sum",
    "dram__bytes_write.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread",
    "launch__shared_mem_per_block", "launch__occupancy_limit_shared_mem", "launch__grid_size",
    "launch__waves_per_multiprocessor",
)  # fmt: skip
# What a scheduler's warps wait for: as many of them, on average, each time it issues. Which reasons there are depends
# on the chip and on ncu, so they are taken from the query. `summary.STALL` is the part that their names share.
STALL_REASON = re.compile(r"smsp__average_warps_issue_stalled_(?!\w*_not_issued_)\w+_per_issue_active")
# The launch figures are no counters of the chip, and the query does not list them.
_ALWAYS = "launch__"


def known_metrics(wanted: Iterable[str], listing: str) -> list[str]:
    """Those of the wanted metrics that ncu's query lists: one unknown name would make it refuse them all.

    Args:
        listing: the output of ``ncu --query-metrics``: one metric a line, its name first, without suffixes.
    """
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    return [m for m in wanted if m.startswith(_ALWAYS) or m.split(".")[0] in names]


def stall_metrics(listing: str) -> list[str]:
    """The reasons of waiting that ncu's query lists, each as the ratio that ncu's own report of warp states shows."""
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    return [f"{name}.ratio" for name in sorted(names) if STALL_REASON.fullmatch(name)]


def parsed_csv(text: str, metrics: Collection[str]) -> list[dict[str, float]]:
    """These metrics of each profiled launch in order, from ``ncu --csv --page raw``.

    The text is a header, a line of units, then data. Its columns also hold every attribute of the device, and each
    metric's other statistics; those are left out.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        return []
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    found = []
    for record in table:
        if not (record.get("ID") or "").isdigit():  # the line of units
            continue
        numbers: dict[str, float] = {}
        for name, value in record.items():
            try:
                numbers[name] = float((value or "").replace(",", ""))
            except ValueError:
                continue
        found.append({name: numbers[name] for name in metrics if name in numbers})
    return found


def target() -> None:
    """What is profiled: one launch of each layer, compiled and warm before the profiler starts."""
    problems = {layers.layer_name(p): p for p in layers.HEADLINE.problems()}
    for name in LAYERS:
        p = problems[name]
        bench, choice = layers.Bench(p), layers.choice_of(p)
        bench.call(choice)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        bench.call(choice)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, default=Path("."), help="the report goes to STATE/counters.csv")
    parser.add_argument("--target", action="store_true", help="run what is profiled")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    if parsed.target:
        target()
        return
    if shutil.which("ncu") is None:
        raise SystemExit("counters: ncu is not on this machine")
    listing = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, timeout=20).stdout
    metrics = known_metrics(METRICS, listing) + stall_metrics(listing)
    report = parsed.state / "counters.csv"
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
               "--print-units", "base", "--log-file", str(report), "--kernel-name", "regex:bsr_conv2d",
               "--metrics", ",".join(metrics), sys.executable, "-m", "gpu_check.counters", "--target"]  # fmt: skip
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:  # out of time: what was profiled so far is in the report
        status = 130
    text = report.read_text(errors="replace") if report.exists() else ""
    launches = parsed_csv(text, metrics)
    problems = {layers.layer_name(p): p for p in layers.HEADLINE.problems()}
    for name, numbers in zip(LAYERS, launches):
        choice = layers.choice_of(problems[name])
        row = {"suite": "counters", "name": name, "match": True, "kernel": choice.name, "config": dict(choice.config)}
        rows.append(parsed.rows, row | {"metrics": numbers})
        print("\n".join(counter_lines([row | {"metrics": numbers}])))
    if status or len(launches) < len(LAYERS):
        print(text[-3000:])
        raise SystemExit(f"counters: ncu ended with status {status} and {len(launches)} of {len(LAYERS)} launches")


if __name__ == "__main__":
    main()
