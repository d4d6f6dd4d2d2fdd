"""The multiply-add peak of this CPU, measured: what benchmarks divide by."""

from __future__ import annotations

import time

import torch

from slimkernels import _extension
from slimkernels.kernels.cpu.library import unavailable_reason


def peak_flops(isa: str | None = None, seconds: float = 0.2) -> float:
    """Measured fp32 multiply-add rate of this CPU at torch's thread count, FLOP/s (2 per multiply-add).

    The best of several bursts.

    Args:
        isa: instruction set, by default the highest that runs here.
        seconds: about how long to measure.

    Raises:
        ValueError: the native kernels of this instruction set cannot run here.
    """
    module, _ = _extension.load()
    isa = isa or (module.isas()[0] if module is not None else "scalar")
    reason = unavailable_reason(isa)
    if reason is not None:
        raise ValueError(f"peak_flops: {reason}")
    threads, best = torch.get_num_threads(), 0.0
    assert module is not None
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        done = module.multiply_adds_f32(isa, 200_000, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best
