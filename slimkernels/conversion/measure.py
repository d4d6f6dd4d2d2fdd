"""The stopwatch of conversion: callables timed in turns, so that a change of clock rate hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# A reading is repeated calls of at least this long: perf_counter and a CUDA event cost about 0.1 us and 2 us.
_MIN_READING_S = 100e-6
_MIN_ROUNDS = 3
# The other callables have evicted a callable's weights: reading them back, at most some 10 MB, takes about 1 ms, so
# shorter calls are made once untimed before each reading.
_CACHE_SHARE_S = 20e-3
_MAX_CALLS = 64


def typical_seconds(runs: Sequence[Callable[[], Any]], *, device: str, repeats: int, budget_s: float) -> list[float]:
    """Seconds of one call of each callable: the median of the faster half of its readings.

    Other work on the machine only ever adds time, and one slow reading of three would decide a plain median. Every
    callable is called twice first (the first call may pack weights or compile), then all take turns, in an order that
    rotates, until ``budget_s`` is spent or ``repeats`` rounds are done, and for at least three rounds.

    Args:
        runs: callables without arguments. device: ``cuda`` times with events, anything else with the clock.
    """
    reading = _cuda_reading if device == "cuda" else _cpu_reading
    first, calls = [], []
    for run in runs:
        run()
        first.append(reading(run, 1))
        calls.append(max(1, min(_MAX_CALLS, int(_MIN_READING_S / max(first[-1], 1e-9)))))
    short = [seconds < _CACHE_SHARE_S for seconds in first]
    done = 0 if any(short) else 1  # long calls: the first reading is as good as any other
    samples = [[seconds] if done else [] for seconds in first]
    end = time.perf_counter() + budget_s
    for round_ in range(done, max(repeats, _MIN_ROUNDS)):
        if round_ >= _MIN_ROUNDS and time.perf_counter() >= end:
            break
        for i in range(len(runs)):
            j = (i + round_) % len(runs)
            if short[j]:
                runs[j]()
            samples[j].append(reading(runs[j], calls[j]))
    return [statistics.median(sorted(s)[: (len(s) + 1) // 2]) for s in samples]


def _cpu_reading(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _cuda_reading(run: Callable[[], Any], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
