"""Where a run's numbers go: CSV files and TensorBoard in a log folder, and a progress bar on the terminal."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from slimkernels.compress.training.config import EpochStats
from slimkernels.files import atomic_path

_EPOCH_FIELDS = tuple(field.name for field in fields(EpochStats))


class RunLog:
    """``epochs.csv`` (one row an epoch, the fields of `EpochStats`) and ``steps.csv`` (step, loss, lr and what the
    callbacks' ``metrics`` give, one row an optimiser step), and the same for TensorBoard where that is installed.

    Rows are written at the end of an epoch, before its checkpoint; rows of epochs that no checkpoint holds are dropped
    when the run is resumed, so that none appears twice. A folder belongs to one run: a run that starts anew empties
    both files.

    Args:
        folder: created if missing.
        done: epochs restored from a checkpoint.
        steps_done: optimiser steps restored.
    """

    def __init__(self, folder: str | Path, done: Sequence[EpochStats], steps_done: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._new: list[dict[str, Any]] = []
        self._columns, kept = _whole_rows(self.folder / "steps.csv", steps_done)
        with atomic_path(self.folder / "steps.csv") as temporary:
            temporary.write_text("".join(kept))
        self._write_epochs(done)
        self._board = _tensorboard(self.folder, steps_done)

    def step(self, step: int, loss: float, lr: float, metrics: Mapping[str, float]) -> None:
        """One optimiser step, counted from 0."""
        self._new.append({"step": step, "loss": loss, "lr": lr, **metrics})
        if self._board is not None:
            for key, value in {"loss": loss, "lr": lr, **metrics}.items():
                self._board.add_scalar(f"train/{key}", value, step)

    def epoch(self, history: Sequence[EpochStats]) -> None:
        """The end of an epoch, the last of ``history``; TensorBoard has it at the epoch's last step."""
        last_step = int(self._new[-1]["step"])
        with open(self.folder / "steps.csv", "a", newline="") as file:
            if not self._columns:
                self._columns = list(dict.fromkeys(key for row in self._new for key in row))
                csv.writer(file, lineterminator="\n").writerow(self._columns)
            writer = csv.DictWriter(file, self._columns, lineterminator="\n", restval="", extrasaction="ignore")
            writer.writerows(self._new)
        self._new.clear()
        self._write_epochs(history)
        if self._board is not None:
            for key, value in asdict(history[-1]).items():
                if value is not None:
                    self._board.add_scalar(f"epoch/{key}", value, last_step)
            self._board.flush()

    def close(self) -> None:
        """Ends the TensorBoard file."""
        if self._board is not None:
            self._board.close()

    def _write_epochs(self, history: Sequence[EpochStats]) -> None:
        with atomic_path(self.folder / "epochs.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, _EPOCH_FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(stats) for stats in history)


def _whole_rows(path: Path, steps_done: int) -> tuple[list[str], list[str]]:
    """Columns and lines (header included) of the steps before ``steps_done``; a line cut short ends them."""
    if steps_done == 0 or not path.exists():
        return [], []
    header, *lines = path.read_text().splitlines(keepends=True) or [""]
    kept: list[str] = []
    for line in lines:
        step = line.split(",")[0]
        in_order = not kept or step == str(int(kept[-1].split(",")[0]) + 1)
        if not (line.endswith("\n") and step.isdigit() and int(step) < steps_done and in_order):
            break
        kept.append(line)
    return (header.strip().split(","), [header, *kept]) if kept else ([], [])


def _tensorboard(folder: Path, steps_done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=steps_done)


@contextmanager
def progress_bar(
    enabled: bool, epochs: int, steps: int, epochs_done: int
) -> Iterator[Callable[[int, float | None], None]]:
    """A function ``advance(epoch, loss)`` for each finished step; it does nothing without a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda epoch, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"epoch {epochs_done + 1}/{epochs}", total=epochs * steps, completed=epochs_done * steps)

        def advance(epoch: int, loss: float | None) -> None:
            text = f"epoch {epoch + 1}/{epochs}" + (f"  loss {loss:.3f}" if loss is not None else "")
            bar.update(task, advance=1, description=text)

        yield advance
