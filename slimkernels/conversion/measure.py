"""The stopwatch of conversion: callables timed in turns, so that a change of clock rate hits all of them.

`LayerRun` is such a callable: the calls that example inputs make of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.capture import capture
from slimkernels.conversion.calls import Call
from slimkernels.conversion.spread import Seconds
from slimkernels.nn.strided_pointwise import StridedPointwiseGuard
from slimkernels.timing import cuda_seconds_a_call, seconds_a_call

# A reading is repeated calls of at least this long: perf_counter and a CUDA event cost about 0.1 us and 2 us.
_MIN_READING_S = 100e-6
_MIN_ROUNDS = 3
# A comparison that is not clear is measured for up to so many times the rounds and the time.
_PATIENCE, _LEAST_PATIENT_ROUNDS = 4, 5
# The other callables have evicted a callable's weights: reading them back, at most some 10 MB, takes about 1 ms, so
# shorter calls are made once untimed before each reading.
_CACHE_SHARE_S = 20e-3
_MAX_CALLS = 64


def typical_seconds(
    runs: Sequence[Callable[[], Any]],
    *,
    device: str,
    repeats: int,
    budget_s: float,
    clear: Callable[[list[Seconds]], bool] | None = None,
    held: int = 1,
) -> list[Seconds]:
    """Seconds of one call of each callable: the median of the faster half of its readings, which come with it.

    Other work on the machine only ever adds time, and one slow reading of three would decide a plain median. Every
    callable is called twice first (the first call may pack weights or compile), then all take turns, in an order that
    rotates, until ``budget_s`` is spent or ``repeats`` rounds are done, and for at least three rounds.

    Args:
        runs: callables without arguments.
        device: ``cuda`` times with events, anything else with the clock.
        clear: whether the times found so far say what they are to say. While they do not, the measurement goes on, for
            up to four times the rounds and the budget, or five rounds where the budget is long spent.
        held: how many calls each callable makes at once, as a `GraphRun` does; the seconds are those of one of them.
    """

    def reading(run: Callable[[], Any], calls: int) -> float:
        return (cuda_seconds_a_call if device == "cuda" else seconds_a_call)(run, calls) / held

    first, calls = [], []
    for run in runs:
        run()
        first.append(reading(run, 1))
        calls.append(max(1, min(_MAX_CALLS, int(_MIN_READING_S / max(held * first[-1], 1e-9)))))
    short = [held * seconds < _CACHE_SHARE_S for seconds in first]
    done = 0 if any(short) else 1  # long calls: the first reading is as good as any other
    samples = [[seconds] if done else [] for seconds in first]

    def measured(least: int, most: int, end: float) -> None:
        for round_ in range(len(samples[0]) if samples else 0, most):
            if round_ >= least and time.perf_counter() >= end:
                return
            for i in range(len(runs)):
                j = (i + round_) % len(runs)
                if short[j]:
                    runs[j]()
                samples[j].append(reading(runs[j], calls[j]))

    start, most = time.perf_counter(), max(repeats, _MIN_ROUNDS)
    measured(_MIN_ROUNDS, most, start + budget_s)
    for times in range(2, _PATIENCE + 1):
        if clear is None or clear([Seconds(s) for s in samples]):
            break
        measured(_LEAST_PATIENT_ROUNDS, times * most, start + times * budget_s)
    return [Seconds(s) for s in samples]


def example_input(call: Call, weight: Tensor) -> Tensor:
    """A normal random input of a call's shape, channels_last for an image; torch's global generator is left alone."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(call.input_shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and weight.dim() == 4 else x


class RunError(RuntimeError):
    """A timed module raised an error, which is the cause of this one."""

    def __init__(self, run: LayerRun) -> None:
        super().__init__("a timed module failed")
        self.run = run


class LayerRun:
    """One call of a module on all inputs, forward and, while training, backward; an error of it is a `RunError`."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], training: bool) -> None:
        self.module, self.training = module, training
        self.inputs = [x.requires_grad_(True) for x in inputs] if training else inputs
        self.wanted = [p for p in module.parameters() if p.requires_grad]

    def __call__(self) -> None:
        try:
            self._call()
        except Exception as error:
            raise RunError(self) from error

    def _call(self) -> None:
        if not self.training:
            with torch.no_grad():
                for x in self.inputs:
                    self.module(x)
            return
        for x in self.inputs:
            with StridedPointwiseGuard():
                y = self.module(x)
            torch.autograd.grad(y, [x, *self.wanted], torch.ones_like(y))


class GraphRun:
    """A `LayerRun` without gradients, so many calls of it in a CUDA graph: the time of its kernels, not of Python.

    A call from Python takes 20 to 100 us, longer than most layers take a GPU, and longer for a layer of ours than for
    one of torch's: a model that is served as a CUDA graph would keep layers dense for a time that it never spends.

    Raises: RunError.
    """

    HELD = 10

    def __init__(self, run: LayerRun) -> None:
        try:
            self._graph, _ = capture(run, calls=self.HELD)
        except RunError:
            raise
        except Exception as error:
            raise RunError(run) from error
        self._run = run  # whose tensors the graph reads

    def __call__(self) -> None:
        self._graph.replay()
