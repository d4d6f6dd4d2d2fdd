"""`slimkernels tune`: measures this machine's kernels and writes its tuned table, resumable, after every layer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slimkernels.dispatch.tables import Entry, Table
    from slimkernels.tuning import Family


def tune(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    op: Annotated[list[str] | None, typer.Option(help="Only this op (repeatable), such as bsr_conv2d.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size (repeatable).")] = None,
    block_shape: Annotated[list[str] | None, typer.Option(help="Block shape as in 16x1 (repeatable).")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share of zero blocks (repeatable).")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Timing budget per kernel and sparsity.")] = 0.05,
    limit: Annotated[float | None, typer.Option(min=0.0, help="Stop after about this many seconds; run again.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Table to write or continue; the user's cache by default.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what the table holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")] = False,
) -> None:
    """Measure the kernels on this machine; `auto` and `convert` without example inputs then follow its table."""
    import torch

    from slimkernels import timing
    from slimkernels.dispatch import select
    from slimkernels.dispatch.devices import device_name
    from slimkernels.dispatch.tables import Table, user_path
    from slimkernels.tuning import standard_families
    from slimkernels.tuning import tune as measure

    if device not in ("cpu", "cuda"):
        raise ValueError(f"tune: expected --device cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("tune: --device cuda: torch sees no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    name = device_name(device)
    path = out or user_path(name)
    table = Table.load(path) if path.exists() else Table(name)
    if table.device != name:
        raise ValueError(f"tune: {path} is the table of {table.device}, and this is {name}")
    families = standard_families(
        device,
        batches=batch,
        block_shapes=[_pair(b) for b in block_shape] if block_shape else None,
        sparsities=sparsity,
        ops=op,
    )
    table.environment = {k: v for k, v in timing.environment().items() if k not in ("argv", "platform")}
    begun, measured, refused = time.monotonic(), 0, {}
    with _progress(len(families), hidden=as_json) as advance:

        def save(family: Family, entries: list[Entry]) -> None:
            nonlocal measured
            measured += 1
            table.save(path)

        for family, found in measure(table, families, seconds=seconds, redo=redo, done=save):
            if isinstance(found, str):
                refused[family.label] = found
            advance(family.label)
            if limit is not None and time.monotonic() - begun > limit:
                break
    select.forget()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "file": str(path),
                    "device": name,
                    "measured": measured,
                    "entries": len(table.entries),
                    "families": len(families),
                    "refused": refused,
                },
                indent=2,
            )
        )
        return
    for line in _summary(table, families):
        typer.echo(line)
    for label, reason in refused.items():
        typer.echo(f"not measured: {label}: {reason}")
    left = sum(not all(table.entry(p) for p in f.problems) for f in families) - len(refused)
    typer.echo(f"{measured} layers measured, {left} left; wrote {path}" if measured else f"nothing new for {path}")


def _pair(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--block-shape: expected two positive numbers as in 16x1, got {text!r}")
    return int(parts[0]), int(parts[1])


def _progress(total: int, *, hidden: bool) -> Any:
    """A context that yields ``advance(label)``: a bar on stderr with the time left."""
    if hidden:
        return nullcontext(lambda label: None)
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=sys.stderr)) as progress:
            task = progress.add_task("tune", total=total)
            yield lambda label: progress.update(task, advance=1, description=label)

    return bar()


def _summary(table: Table, families: Sequence[Family]) -> list[str]:
    """Break-even sparsity per op and block shape over the measured sizes, and the fitted rates."""
    from slimkernels.dispatch.break_even import curves

    wanted = {p for f in families for p in f.problems}
    lines: list[str] = []
    groups: dict[tuple[str, tuple[int, int]], list[float | None]] = {}
    for curve in curves(e for e in table.entries if e.problem in wanted):
        groups.setdefault((curve.problem.op, curve.problem.block_shape), []).append(curve.break_even())
    for (op, block), found in groups.items():
        known = sorted(f for f in found if f is not None)
        middle = f"{known[len(known) // 2]:.0%}" if known else "none"
        never = f", never at {len(found) - len(known)} sizes" if len(known) < len(found) else ""
        worst = f", {known[-1]:.0%} at the least favourable" if known else ""
        lines.append(
            f"{op} {block[0]}x{block[1]}: break-even at {middle} zero blocks{worst}{never} ({len(found)} sizes)"
        )
    if table.rates is not None:
        rates = vars(table.rates)
        lines.append("rates: " + ", ".join(f"{k} {v:.3g}" for k, v in rates.items() if isinstance(v, float)))
    return lines
