"""How sure a measured speed-up is: ratios of two callables' times with their spread, and what may be concluded."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

# The same two layers, timed again later or in another process, come out a few per cent apart: other addresses, other
# neighbours in the caches. No number of readings shows this, so the spread is widened by it.
REPEATABILITY = 1.05
_RESAMPLINGS = 200
# A speed-up of so many times what the saved work explains is believed: sparse and dense kernels reach different rates,
# and calls take time too. One beyond it is the machine's doing.
EXPLAINED = 4.0


class Seconds(float):
    """The typical time of one call, and the readings that it comes from; none where it is exact (a stopwatch of tests).

    The typical time is the median of the faster half of the readings: other work on the machine only ever adds time.
    """

    readings: tuple[float, ...]

    def __new__(cls, readings: Sequence[float]) -> Seconds:
        made = super().__new__(cls, typical(readings))
        made.readings = tuple(readings)
        return made


def typical(readings: Sequence[float]) -> float:
    """The median of the faster half of some readings."""
    return statistics.median(sorted(readings)[: (len(readings) + 1) // 2])


class Ratio(NamedTuple):
    """How many times as fast one callable is as another: between ``low`` and ``high`` with 99 % confidence."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.middle:.2f}x"
        return f"{self.middle:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"

    def verdict(self, needed: float) -> bool | None:
        """Whether it is at least ``needed``; None where that is not clear."""
        if self.low >= needed:
            return True
        return None if self.high >= needed else False


def ratio(slow: float, fast: float) -> Ratio:
    """The time ``slow`` over the time ``fast``.

    Times with readings have a spread: the rounds are drawn again at random, many times, which shows how much the
    typical times depend on chance (bootstrap), and `REPEATABILITY` is added. Equal readings give equal spreads.
    """
    pairs = list(zip(getattr(slow, "readings", ()), getattr(fast, "readings", ()), strict=False))
    return _with_spread(slow / max(fast, 1e-12), pairs, typical)


def ratio_of_medians(slow: float, fast: float, slow_rounds: Sequence[float], fast_rounds: Sequence[float]) -> Ratio:
    """The same for two medians, and the medians of the rounds in which both were measured in turn."""
    middle = slow / max(fast, 1e-12)
    low, _, high = _with_spread(middle, list(zip(slow_rounds, fast_rounds, strict=True)), statistics.median)
    return Ratio(min(low, middle), middle, max(high, middle))


def _with_spread(
    middle: float, pairs: Sequence[tuple[float, float]], typical_of: Callable[[Sequence[float]], float]
) -> Ratio:
    if not pairs:
        return Ratio(middle, middle, middle)
    draw, found = random.Random(len(pairs)), []
    for _ in range(_RESAMPLINGS):
        drawn = draw.choices(pairs, k=len(pairs))
        found.append(typical_of([a for a, _ in drawn]) / max(typical_of([b for _, b in drawn]), 1e-12))
    return Ratio(min(found) / REPEATABILITY, middle, max(found) * REPEATABILITY)


def in_ms(seconds: float) -> str:
    """A time in milliseconds with three digits."""
    ms = 1e3 * seconds
    return f"{ms:.0f} ms" if ms >= 1000 else f"{ms:.3g} ms"


def worst(ratios: Sequence[Ratio]) -> Ratio:
    """The least favourable of several sizes."""
    return min(ratios, key=lambda r: r.middle)


def everywhere(ratios: Sequence[Ratio], needed: float) -> bool | None:
    """Whether every ratio is at least ``needed``: False where one clearly is not, None where that is not clear."""
    verdicts = [r.verdict(needed) for r in ratios]
    if False in verdicts or not verdicts:
        return False
    return None if None in verdicts else True
