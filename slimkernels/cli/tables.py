"""Results as tables for people, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimkernels.conversion.spread import Ratio

if TYPE_CHECKING:
    from slimkernels.cli.bench import BenchResult
    from slimkernels.cli.demo import DemoResult


def _console() -> Any:
    from rich.console import Console

    # Without a terminal rich assumes 80 columns and would cut the tables.
    return Console() if sys.stdout.isatty() else Console(width=120)


def demo_table(result: DemoResult) -> None:
    """Prints accuracy, size, latency and speed-up of the demo's models."""
    from rich.table import Table

    batches = list(result.entries[0].latency)
    table = Table(
        title=f"{result.settings['data']}; {result.environment['threads']} threads, {result.environment['cpu']}"
    )
    table.add_column("model", no_wrap=True)
    for heading in (
        "accuracy",
        "on disk",
        *(f"batch {b}: ms, speed-up" for b in batches),
        "swapped layers",
        "max difference",
    ):
        table.add_column(heading, justify="right")
    for entry in result.entries:
        gains = {b: Ratio(entry.speedup_low[b], entry.speedup[b], entry.speedup_high[b]) for b in batches}
        times = [f"{entry.latency[b]['p50_ms']:.3f}  {gains[b]}" for b in batches]
        difference = "" if entry.max_abs_difference is None else f"{entry.max_abs_difference:.1e}"
        words = {"bsr": "block-sparse", "low_rank": "low-rank", "fused": "fused dense", "dense": "merged"}
        swapped = ", ".join(f"{count} {words[name]}" for name, count in entry.swapped.items())
        table.add_row(entry.name, f"{entry.accuracy:.2%}", f"{entry.bytes / 1e3:,.0f} kB", *times, swapped, difference)
    console = _console()
    console.print(table)
    console.print(
        "Latency: median, interleaved; speed-up: in brackets its limits with 99 % confidence. "
        "Dense and masked: eager, batch norm folded, the faster memory format. "
        "Merged: low-rank layers that ran faster as one dense layer at these sizes. "
        "Max difference: of the logits, converted against unconverted.",
        highlight=False,
    )
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"Files and picture: {result.out}/ (look at {result.figure})", highlight=False)


def bench_table(result: BenchResult) -> None:
    """Prints every measured row, with the machine, the versions and the commit above them."""
    from rich.table import Table

    environment = result.environment
    where = (
        f"{environment['gpu'] or environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}"
    )
    commit = environment["commit"]
    if commit:
        where += f", commit {commit[:12]}" + (" (modified)" if environment["dirty"] else "")
    table = Table(title=f"{result.model}, weights {result.weights}\n{where}")
    table.add_column("batch", justify="right")
    table.add_column("zero blocks")
    table.add_column("fastest dense")
    for heading in ("its ms p20/p50/p80", "ours ms p20/p50/p80", "speed-up (spread)", "images/s", "swapped"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            str(row.batch),
            row.compression,
            row.baseline,
            _percentiles(row.dense),
            _percentiles(row.converted),
            str(Ratio(row.speedup_low, row.speedup, row.speedup_high)),
            f"{row.images_per_s:,.0f}",
            str(row.swapped_layers),
        )
    console = _console()
    console.print(table)
    how = {True: "recorded by slimkernels.graphed", False: "called module by module"}
    served = " or ".join(how[recorded] for recorded in sorted({row.recorded for row in result.rows}, reverse=True))
    console.print(
        f"Medians, timed in turn; ours is {served}. Dense, p50 in ms, the fastest of each batch size first:",
        highlight=False,
    )
    for row in {row.batch: row for row in result.rows}.values():
        ordered = sorted(row.baselines.items(), key=lambda item: item[1])
        console.print(
            f"  batch {row.batch}: " + ", ".join(f"{name} {ms:.3g}" for name, ms in ordered),
            highlight=False,
            markup=False,
        )
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _percentiles(timing: Mapping[str, float | int]) -> str:
    return "/".join(f"{timing[key]:.3g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
