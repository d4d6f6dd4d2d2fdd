"""Options and the record of the speed suites.

``pytest benchmarks`` measures; ``pytest benchmarks --smoke`` runs one small case of every suite, to show that they
work. ``--rows FILE`` appends every row to a file as soon as it is measured, so that a run that is killed leaves what it
had; ``--benchmark-json FILE`` (pytest-benchmark's own) writes the record at the end. ``python benchmarks/report.py
FILE`` turns either into tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import rows

from slimkernels import timing
from slimkernels.cli.comparison import PAUSE_S, SETTLE_S, near_the_fastest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="one small case of every suite, hardly timed")
    parser.addoption("--rows", type=Path, default=None, help="append every measured row to this JSON-lines file")
    parser.addoption("--compile", default="default", help="mode of torch.compile for dense baselines on a GPU, or none")
    parser.addoption(
        "--checks",
        type=Path,
        action="append",
        default=[],
        help="rows of gpu_check.correctness or gpu_check.sweep: what they found right is taken as right",
    )
    parser.addoption("--state", type=Path, default=None, help="a folder for the table of measured ceilings")
    parser.addoption("--deepsparse", default=None, help="a Python with deepsparse, to race at the same sparsity")
    parser.addoption("--seconds", type=float, default=3.0, help="time budget per row")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the rows")


def pytest_configure(config: pytest.Config) -> None:
    # Before any side is captured in a CUDA graph: cuDNN picks its kernels while it is recorded.
    torch.backends.cudnn.benchmark = torch.cuda.is_available()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["slimkernels"] = timing.environment()


def _repeated(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


@dataclass
class Race:
    """Times a contender against baselines, burst by burst in turn, and records the contender with pytest-benchmark.

    All sides see the same clock rate and neighbours. Pauses, untimed calls and which baselines are left out after a
    first, quick reading: as in `slimkernels bench` (`slimkernels.cli.comparison`).
    """

    benchmark: Any
    seconds: float
    smoke: bool
    samples: dict[str, list[float]] = field(default_factory=dict)

    def run(
        self,
        contender: Callable[[], Any],
        baselines: dict[str, Callable[[], Any]],
        beside: dict[str, Callable[[], Any]] | None = None,
    ) -> dict[str, timing.Timing]:
        """Timings of a call by name, the contender's under ``"contender"``, the fastest baseline's under ``"best"``.

        ``beside`` is timed in the same bursts and is no baseline, such as another way of calling the contender; it gets
        as many calls as the contender, since behind a dense network the first ones find none of its weights in a cache.
        On a GPU a reading is as many calls as take four milliseconds, then one synchronisation.
        """
        calls = 1
        if torch.cuda.is_available():
            with torch.inference_mode():
                contender()
                calls = max(1, min(1000, int(4e-3 / max(self._seconds_of(contender), 1e-6))))
            contender = _repeated(contender, calls)
            baselines = {name: _repeated(call, calls) for name, call in baselines.items()}
            beside = {name: _repeated(call, calls) for name, call in (beside or {}).items()}
        quick = timing.interleaved(
            baselines, seconds=0.0 if self.smoke else self.seconds / 4, min_rounds=1 if self.smoke else 2
        )
        fastest = min(t.p50 for t in quick.values())
        near = near_the_fastest(quick)
        taking_part = {name: call for name, call in baselines.items() if name in near} | (beside or {})
        self.samples = {name: [] for name in taking_part}
        with torch.inference_mode():
            self._settle(contender)
            once = self._seconds_of(contender)
        rounds = 3 if self.smoke else max(7, min(2000, int(self.seconds / 2 / max(once, 1e-6))))
        # At most 25 turns: a dense network takes many times as long as the contender.
        burst = max(1, min(20, int(0.02 / max(once, 1e-6))), -(-rounds // 25))
        baseline_burst_calls = max(1, min(5, int(0.02 / max(fastest, 1e-6))))
        turn = 0

        def baseline_burst() -> None:
            nonlocal turn
            if turn % burst == 0:
                with torch.inference_mode():
                    for name, call in taking_part.items():
                        self._settle(call)
                        count = burst if name in (beside or {}) else baseline_burst_calls
                        self.samples[name] += [self._seconds_of(call) for _ in range(count)]
                    self._settle(contender)
            turn += 1

        with torch.inference_mode():
            self.benchmark.pedantic(self._synchronised(contender), setup=baseline_burst, rounds=rounds, iterations=1)
        own = timing.percentiles(list(self.benchmark.stats.stats.data))
        final = {name: timing.percentiles(samples) for name, samples in self.samples.items()}
        # One that was left out may turn out to have had the fastest reading: then that is what ours has to beat.
        dense = {**quick, **{name: final[name] for name in near}}
        found = {**dense, **final, "contender": own, "best": min(dense.values(), key=lambda t: t.p50)}
        return {k: timing.Timing(t.p20 / calls, t.p50 / calls, t.p80 / calls, t.n) for k, t in found.items()}

    def _settle(self, call: Callable[[], Any]) -> None:
        if torch.cuda.is_available() or self.smoke:
            # To its end: the reading that follows must not wait for it.
            self._synchronised(call)()
            return
        time.sleep(PAUSE_S)
        end = time.perf_counter() + SETTLE_S
        while True:
            call()
            if time.perf_counter() >= end:
                return

    @staticmethod
    def _synchronised(call: Callable[[], Any]) -> Callable[[], Any]:
        if not torch.cuda.is_available():
            return call

        def synchronised() -> None:
            call()
            torch.cuda.synchronize()

        return synchronised

    def _seconds_of(self, call: Callable[[], Any]) -> float:
        call = self._synchronised(call)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """Appends the row that the test leaves in ``benchmark.extra_info`` to ``--rows``, flushed."""
    yield
    path = request.config.getoption("--rows")
    if path is None or "match" not in benchmark.extra_info:
        return
    if not path.exists():
        rows.append(path, {"environment": timing.environment()})
    rows.append(path, {"name": request.node.name, **benchmark.extra_info})


@pytest.fixture(scope="session")
def afterwards() -> Iterator[list[Callable[[], None]]]:
    """Calls for the end of the session: torch's profiler, once used, slows down what is timed after it."""
    calls: list[Callable[[], None]] = []
    yield calls
    for call in calls:
        call()


@pytest.fixture
def race(benchmark: Any, record: None, request: pytest.FixtureRequest) -> Race:
    return Race(benchmark, request.config.getoption("--seconds"), request.config.getoption("--smoke"))


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))
