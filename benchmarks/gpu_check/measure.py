"""Time of one call on the device, and the floors that explain it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from slimkernels import timing
from slimkernels.dispatch.gpu_cost import gpu_block_sparse
from slimkernels.dispatch.gpu_rates import GpuRates
from slimkernels.kernels.problems import ConvProblem
from slimkernels.tuning import captured

_CALLS_A_GRAPH = 10


def replay_timing(call: Callable[[], Any], device: str, *, bursts: int = 9, burst_s: float = 0.002) -> timing.Timing:
    """Percentiles of a call, on CUDA replayed from a graph in bursts between two events. One reading is one burst."""
    # One graph of several calls: replaying a graph takes the CPU longer than a small kernel takes the GPU.
    held = _CALLS_A_GRAPH if device == "cuda" else 1
    replay = captured(call, device, held)

    def burst(calls: int) -> float:
        if device != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                replay()
            return (time.perf_counter() - start) / calls / held
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        for _ in range(calls):
            replay()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3 / calls / held

    calls = max(1, min(1000, int(burst_s / max(held * burst(2), 1e-7))))
    burst(calls)
    return timing.percentiles([burst(calls) for _ in range(bursts)])


def floors_us(
    p: ConvProblem, config: Mapping[str, int], rates: GpuRates, *, one_position: bool = False
) -> dict[str, float | str]:
    """Microseconds that each limit alone would take: L2, memory, matrix units, issue slots, L1 tags; the prediction.

    The limits take all processors to be busy to the end; waves, latency and launches are in the prediction only, whose
    largest part ``bound`` names. ``loads`` is the largest for most: what the loads take one after the other.

    one_position: the kernel's tiles hold one output position each, and it leaves out the taps outside the image.
    """
    found = gpu_block_sparse(p, config, rates, one_position=one_position)
    limits = {"loads": found.loads_s, "l2": found.l2_s, "memory": found.memory_s, "matrix": found.matrix_s,
              "issue": found.issue_s, "tags": found.tags_s}  # fmt: skip
    micro = {f"{name}_us": 1e6 * seconds for name, seconds in limits.items()}
    return {**micro, "predicted_us": 1e6 * found.seconds, "bound": found.bound}
