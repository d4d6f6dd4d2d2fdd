"""Results as tables for people, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        times = [f"{entry.latency[b]['p50_ms']:.3f}  {entry.speedup[b]:.2f}x" for b in batches]
        difference = "" if entry.max_abs_difference is None else f"{entry.max_abs_difference:.1e}"
        words = {"bsr": "block-sparse", "low_rank": "low-rank", "fused": "fused dense", "dense": "merged"}
        swapped = ", ".join(f"{count} {words[name]}" for name, count in entry.swapped.items())
        table.add_row(entry.name, f"{entry.accuracy:.2%}", f"{entry.bytes / 1e3:,.0f} kB", *times, swapped, difference)
    console = _console()
    console.print(table)
    console.print(
        "Latency: median, interleaved. Dense and masked: eager, batch norm folded, the faster memory format. "
        "Merged: low-rank layers that ran faster as one dense layer at these sizes. "
        "Max difference: of the logits, converted against unconverted.",
        highlight=False,
    )
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
    block = "x".join(str(size) for size in result.block_shape)
    table = Table(title=f"{result.model}, {block} blocks, weights {result.weights}\n{where}")
    table.add_column("batch", justify="right")
    table.add_column("sparsity", justify="right")
    table.add_column("dense baseline")
    for heading in ("dense ms p20/p50/p80", "converted ms p20/p50/p80", "n", "speed-up", "images/s", "swapped"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            str(row.batch),
            f"{row.sparsity:.1%}",
            row.baseline,
            _percentiles(row.dense),
            _percentiles(row.converted),
            f"{row.dense['n']}/{row.converted['n']}",
            f"{row.speedup:.2f}x",
            f"{row.images_per_s:,.0f}",
            str(row.swapped_layers),
        )
    console = _console()
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _percentiles(timing: Mapping[str, float | int]) -> str:
    return "/".join(f"{timing[key]:.3g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
