"""Timing that a sceptic can repeat: interleaved bursts, percentiles, strong dense baselines, and where it ran.

Callables are timed in turn, in one process, so a change of clock rate or a noisy neighbour hits all of them. Each turn
is a burst that starts with one untimed call: the previous callable has just evicted the caches (VGG-19 alone holds
80 MB of weights), and the steady state is what a server sees.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# A burst must outlast the untimed first call by enough calls to matter; 20 ms holds 20 calls of a 1 ms network.
_BURST_S = 0.02
# On CUDA one reading: a synchronisation takes some 10 us, as long as a small layer.
_CUDA_READING_S = 1e-3


@dataclass(frozen=True)
class Timing:
    """Percentiles of one callable's duration, in seconds, over ``n`` timed calls.

    ``rounds`` holds the median of each round of `interleaved`: what was timed in one round saw the same machine.
    """

    p20: float
    p50: float
    p80: float
    n: int
    rounds: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def as_ms(self) -> dict[str, float | int]:
        """The same in milliseconds, keyed ``p20_ms``, ``p50_ms``, ``p80_ms``, and ``n``."""
        return {"p20_ms": self.p20 * 1e3, "p50_ms": self.p50 * 1e3, "p80_ms": self.p80 * 1e3, "n": self.n}


def percentiles(samples: list[float]) -> Timing:
    """Timing of a non-empty list of durations in seconds; percentiles interpolate linearly."""
    values = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(p20, p50, p80, len(samples))


def _clock() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_a_call(call: Callable[[], Any], calls: int, clock: Callable[[], float] | None = None) -> float:
    """One reading of a stopwatch, by default `time.perf_counter`: seconds of one of so many calls in a row."""
    clock = clock or time.perf_counter
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def cuda_seconds_a_call(call: Callable[[], Any], calls: int) -> float:
    """The same by the device's clock, between two events; what the host does meanwhile does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _calls_a_reading(call: Callable[[], Any]) -> int:
    """Calls between two looks at the clock: 1, on CUDA as many as take a millisecond."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 1
    return max(1, min(1000, int(_CUDA_READING_S / max(seconds_a_call(call, 1, _clock), 1e-6))))


def interleaved(
    callables: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    min_rounds: int = 5,
    *,
    pause: float = 0.0,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Times every callable in turns, for ``seconds`` each on average and for ``min_rounds`` turns at least.

    A turn is one untimed call, then timed calls for 20 ms (at least one). The order rotates from round to round.
    Gradients are off during the calls. On CUDA a reading is the mean of as many calls as take a millisecond, between
    two device synchronisations.

    Args:
        callables: name -> function without arguments.
        seconds: time budget per callable.
        min_rounds: rounds run even when the budget is spent.
        pause: seconds without work before a turn, in which the threads of another engine come to rest.
        settle: seconds of untimed calls at the beginning of a turn, at least one call.

    Returns:
        name -> Timing, in the order given.

    Raises:
        ValueError: nothing to time, a negative budget, or ``min_rounds < 1``.
    """
    if not callables:
        raise ValueError("interleaved: expected at least one callable, got none")
    if seconds < 0 or min_rounds < 1:
        raise ValueError(
            f"interleaved: expected seconds >= 0 and min_rounds >= 1, got seconds={seconds}, min_rounds={min_rounds}"
        )
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for name in names:  # the first call may compile, pack weights or start threads
            callables[name]()
        repeats = {name: _calls_a_reading(callables[name]) for name in names}
        deadline = _clock() + seconds * len(names)
        rounds = 0
        while rounds < min_rounds or _clock() < deadline:
            shift = rounds % len(names)
            for name in names[shift:] + names[:shift]:
                call, record, before = callables[name], samples[name], len(samples[name])
                time.sleep(pause)
                settled = _clock() + settle
                call()
                while settle and _clock() < settled:
                    call()
                burst_end = _clock() + _BURST_S
                while True:
                    record.append(seconds_a_call(call, repeats[name], _clock))
                    if time.perf_counter() >= burst_end:
                        break
                medians[name].append(statistics.median(record[before:]))
            rounds += 1
    return {name: replace(percentiles(samples[name]), rounds=tuple(medians[name])) for name in names}


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """An eval-mode copy of ``model`` with every BatchNorm2d that follows a Conv2d folded into it by torch.fx.

    A model that torch.fx cannot trace comes back as an unfolded eval-mode copy.
    """
    import copy

    from torch.fx.experimental.optimization import fuse

    copied = copy.deepcopy(model).eval()
    try:
        return fuse(copied)
    except (torch.fx.proxy.TraceError, TypeError, NotImplementedError):
        return copied


def best_dense(
    model: nn.Module,
    x: Tensor,
    *,
    compile: bool = True,
    max_autotune: bool = False,
    note: Callable[[str], None] | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """The dense baselines of ``model`` on ``x``: the fastest of them is what a sparse kernel has to beat.

    ``eager channels_last`` and ``eager contiguous``: batch norm folded, in either memory format. ``compile``:
    torch.compile with freezing, which folds batch norm and prepacks weights itself. A baseline that cannot run is left
    out, and ``note`` is told why.

    Args:
        model: dense network; it is copied, not changed.
        x: ``(N, C, H, W)`` input on the model's device.
        compile: whether to try torch.compile (it takes seconds to a minute, and needs a C++ compiler).
        max_autotune: let inductor time its own GEMM templates too.
        note: called with one line of text for each baseline left out.

    Returns:
        name -> function that runs the model on ``x`` without gradients.
    """
    folded = fold_batch_norm(model)
    out = {
        "eager channels_last": _eager(folded, x, torch.channels_last),
        "eager contiguous": _eager(folded, x, torch.contiguous_format),
    }
    if compile:
        try:
            out["compile"] = _compiled(model, x, max_autotune)
        except Exception as error:  # a missing or broken compiler surfaces as any of a dozen exception types
            if note is not None:
                first_line = (str(error).strip().splitlines() or ["no message"])[0]
                note(f"torch.compile baseline left out: {type(error).__name__}: {first_line}")
    return out


def _in_format(model: nn.Module, x: Tensor, memory_format: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """A copy of the model in eval mode, and the input, both in ``memory_format`` where they have four dimensions."""
    import copy

    # For mypy: torch's overloads of `to` leave out memory_format alone.
    copied = copy.deepcopy(model).eval().to(memory_format=memory_format)  # type: ignore[call-overload]
    return copied, x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def _eager(model: nn.Module, x: Tensor, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    copied, x = _in_format(model, x, memory_format)

    def eager() -> Tensor:
        with torch.inference_mode():
            return copied(x)

    return eager


def _compiled(model: nn.Module, x: Tensor, max_autotune: bool) -> Callable[[], Tensor]:
    import torch._inductor.config as inductor

    frozen, x = _in_format(model, x, torch.channels_last)
    with inductor.patch(freezing=True, max_autotune=max_autotune), torch.no_grad():
        # inference_mode would hand inductor inference tensors, which freezing cannot constant-fold.
        run = torch.compile(frozen, dynamic=False)
        run(x)

    def compiled() -> Tensor:
        # Under inference_mode the guards fail, and it would be compiled again, without freezing.
        with torch.inference_mode(False), torch.no_grad():
            return run(x)

    return compiled


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed copy may lie inside some other project's repository
        return None
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Where and with what a measurement ran: versions, processor, threads, device, commit and whether it is modified.

    ``commit`` and ``dirty`` are None outside a git checkout.
    """
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for package in ("slimkernels", "torch", "torchvision", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    status = _git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "argv": sys.argv[1:],
    }
