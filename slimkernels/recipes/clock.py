"""Time of a run: what is left of it by the epochs measured so far, and the seconds that a row may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from slimkernels.compress.training.callbacks import Callback

# A row is not begun where its predicted time exceeds what is left by so much: other networks predict it roughly.
_SLACK = 1.3


class OutOfTime(Exception):
    """A row did not fit into its seconds; what it has trained is lost unless it keeps checkpoints."""


class Clock:
    """Counts the work of a run, in multiply-adds, against seconds.

    Args:
        seconds: that all trainings together may take; None: any.
        say: called with a line after the first epoch of every training, with the time that is left by then.
        work: multiply-adds of all trainings that are to come.
    """

    def __init__(self, seconds: float | None, say: Callable[[str], None], work: float = 0.0) -> None:
        self.work, self._say = work, say
        self._done = self._seconds = 0.0
        self._ends = math.inf if seconds is None else time.monotonic() + seconds

    def predicted(self, work: float) -> float | None:
        """Seconds that so many multiply-adds take at the rate so far; None before the first epoch."""
        return work * self._seconds / self._done if self._done else None

    def check(self, row: str, work: float) -> None:
        """Raises OutOfTime where a training of ``work`` is surely not done in what is left."""
        predicted, left = self.predicted(work), self._ends - time.monotonic()
        if left <= 0 or (predicted is not None and predicted > _SLACK * left):
            needs = "" if predicted is None else f", of which it needs about {predicted:.0f}"
            raise OutOfTime(f"{row}: not begun, {max(left, 0.0):.0f} s of training are left{needs}")

    def callback(self, row: str, seconds: float | None, work: float, images: int) -> Callback:
        """What measures a training of ``work`` multiply-adds an epoch, and ends it when its time is over."""
        deadline = min(self._ends, math.inf if seconds is None else time.monotonic() + seconds)
        return _Watch(self, row, deadline, work, images)

    def epoch(self, work: float, seconds: float) -> None:
        """An epoch of so much work is done."""
        self._done, self._seconds, self.work = self._done + work, self._seconds + seconds, self.work - work

    def tell(self, images_per_s: float) -> None:
        """Says what is left, by the multiply-adds and the rate of all epochs so far."""
        left = self.predicted(max(self.work, 0.0)) or 0.0
        shown = (
            f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.0f} minutes" if left > 90 else f"{left:.0f} s"
        )
        self._say(f"    {images_per_s:,.0f} images/s; by their multiply-adds about {shown} of training are left")


class _Watch(Callback):
    """Of one training, see `Clock.callback`."""

    def __init__(self, clock: Clock, row: str, deadline: float, work: float, images: int) -> None:
        self._clock, self._row, self._deadline, self._work, self._images = clock, row, deadline, work, images
        self._begun: float | None = None
        self._told = False

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        now = time.monotonic()
        if now > self._deadline:
            raise OutOfTime(f"{self._row}: its time was over at step {step} of {total_steps}")
        self._begun = now if self._begun is None else self._begun

    def on_epoch_end(self, epoch: int, model: nn.Module) -> None:
        now = time.monotonic()
        seconds = max(now - (now if self._begun is None else self._begun), 1e-9)
        self._begun = now
        self._clock.epoch(self._work, seconds)
        if not self._told:
            self._told = True
            self._clock.tell(self._images / seconds)


def work_of(macs: Any, epochs: float, images: int, taught_by: float = 0.0) -> float:
    """Multiply-adds of a training: forward, and twice as much backward, and the teacher's forward."""
    return epochs * images * (3.0 * float(macs) + taught_by)
