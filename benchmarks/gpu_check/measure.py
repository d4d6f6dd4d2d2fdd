"""Time of one call on the device, and the floors that explain it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from slimkernels import timing
from slimkernels.kernels.cost_model import GpuRates
from slimkernels.kernels.problems import ConvProblem
from slimkernels.tuning import captured

# Instructions of one warp of the 256x128x64 tile on 8 warps, read from its sm_90 code: outside the main loop, and in
# one of its steps. A smaller tile's step is taken to shrink with its multiply-adds.
FIXED_INSTRUCTIONS = 2000
STEP_INSTRUCTIONS = 162
_STEP_MACS_A_WARP = 256 * 128 * 64 // 8
_SCHEDULERS = 4


def replay_timing(call: Callable[[], Any], device: str, *, bursts: int = 9, burst_s: float = 0.002) -> timing.Timing:
    """Percentiles of a call, on CUDA replayed from a graph in bursts between two events. One reading is one burst."""
    replay = captured(call, device)

    def burst(calls: int) -> float:
        if device != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                replay()
            return (time.perf_counter() - start) / calls
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        for _ in range(calls):
            replay()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3 / calls

    calls = max(1, min(1000, int(burst_s / max(burst(2), 1e-7))))
    burst(calls)
    return timing.percentiles([burst(calls) for _ in range(bursts)])


def clock_hz() -> float:
    """The highest clock of the processors; 1.98 GHz where torch does not tell."""
    rate = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0) if torch.cuda.is_available() else 0
    return 1e3 * rate if rate else 1.98e9


def floors_us(p: ConvProblem, config: Mapping[str, int], rates: GpuRates, clock: float) -> dict[str, float]:
    """Microseconds that each limit alone would take: gathers from L2, device memory, matrix units, issue slots.

    All processors are taken to be busy to the end: neither waves nor launches are counted.

    Args:
        config: with ``BLOCK_M``, ``BLOCK_N``, ``BLOCK_K`` and ``num_warps``.
    """
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    pixels, item = p.n * p.p * p.q, p.dtype.itemsize
    block_rows = -(-p.c_out // p.block_shape[0])
    splits = config.get("SPLITS", 1)
    tiles = -(-pixels // block_m) * block_rows * -(-p.block_shape[0] // block_n) * splits
    depth = p.nnz_blocks * p.block_shape[1] / block_rows / splits
    steps = depth / block_k
    step = STEP_INSTRUCTIONS * block_m * block_n * block_k / config["num_warps"] / _STEP_MACS_A_WARP
    instructions = tiles * config["num_warps"] * (FIXED_INSTRUCTIONS + steps * step)
    stored = pixels // 4 if p.epilogue == "relu_maxpool2" else pixels
    nbytes = item * (p.n * p.h * p.w * p.c_in + stored * p.c_out + p.nnz_blocks * p.block_shape[0] * p.block_shape[1])
    return {
        "l2_us": 1e6 * tiles * depth * (block_m + block_n) * item / rates.l2_bytes_s,
        "dram_us": 1e6 * nbytes / rates.memory_bytes_s,
        "matrix_us": 1e6 * 2 * tiles * block_m * block_n * depth / rates.matrix_flops,
        "issue_us": 1e6 * instructions / _SCHEDULERS / rates.processors / clock,
    }
