"""What predictions for GPU kernels share: where a time goes, tiles and their needs of a processor, memory traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from slimkernels.dispatch.gpu_rates import GpuRates

# Of a streaming multiprocessor, compute capability 8.0 to 10.0.
_REGISTERS, _THREADS, SCHEDULERS = 65536, 2048, 4
# Bytes a cycle that one multiprocessor can take from L2, when few of them ask (vendor's figure).
_PORT_BYTES = 64

Config: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class Prediction:
    """Where the time of a kernel goes, in seconds.

    Attributes:
        matrix_s: the matrix units alone, all processors equally busy, as in the next four.
        l2_s: bytes from L2.
        memory_s: bytes from and to device memory.
        issue_s: instructions.
        tags_s: lookups in L1.
        loads_s: what the loads of a gathering kernel take one after the other, memory included.
        launch_s: kernel launches.
        imbalance: tiles of the busiest processor over the average, times the rows and columns that pad tiles.
        busiest: the first of these two factors.
        l2_share: the part of that imbalance that L2 sees, since a processor whose neighbours are idle takes more than
            its share of L2.
        tiles: programs launched.
        resident: tiles that run on one processor at once.
        chain_s: one processor's tiles, round after round, bound by latency.
        nbytes: bytes that the kernel reads and writes.
        passes: further kernels that run after this one.
    """

    matrix_s: float
    l2_s: float
    memory_s: float
    launch_s: float
    imbalance: float = 1.0
    tiles: int = 0
    passes: tuple[Prediction, ...] = ()
    issue_s: float = 0.0
    tags_s: float = 0.0
    chain_s: float = 0.0
    busiest: float = 1.0
    l2_share: float = 1.0
    resident: int = 1
    nbytes: float = 0.0
    loads_s: float = 0.0

    @property
    def ideal_s(self) -> float:
        """The largest of arithmetic, L2 and memory, with neither waves, instructions, latency nor launches."""
        return max(self.matrix_s, self.l2_s, self.memory_s) + sum(p.ideal_s for p in self.passes)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of every limit, by name; the kernel itself takes the largest."""
        return {
            "matrix": self.matrix_s * self.imbalance,
            "l2": max(self.l2_s * self.imbalance * self.l2_share, self.l2_s),
            "issue": self.issue_s * self.busiest,
            "loads": self.loads_s,
            "memory": self.memory_s,
            "chain": self.chain_s,
        }

    @property
    def seconds(self) -> float:
        """The prediction."""
        return max(self.limits.values()) + self.launch_s + sum(p.seconds for p in self.passes)

    @property
    def bound(self) -> str:
        """What takes longest: a limit's name, or ``launch``."""
        limits = {**self.limits, "launch": self.launch_s}
        return max(limits, key=lambda name: limits[name])


class Tile(NamedTuple):
    """The tile of one thread block, and what it needs of a processor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def accumulators(self) -> int:
        """Accumulator registers of a thread."""
        return max(1, self.block_m * self.block_n // (32 * self.warps))

    @property
    def registers(self) -> int:
        """Registers of a thread, in the eights that a processor hands out.

        As compiled for sm_90, stages of one slice: 156 to 162 for 128 x 128 on 4 warps, 90 to 94 for 64 x 128, 60 for
        64 x 64. Stages of several slices take 20 to 30 more.
        """
        return min(255, ceil_div(26 + 1.06 * self.accumulators, 8) * 8)

    def _copies(self, itemsize: int) -> float:
        """16-byte copies of a thread in one K step."""
        return (self.block_m + self.block_n) * self.block_k * itemsize / (16 * 32 * self.warps)

    def loop_instructions(self, itemsize: int) -> float:
        """Instructions a warp issues in one K step: 98 for 128 x 128 x 16 on 4 warps (sm_90), 74 for 64 x 64."""
        return 75 + 5.6 * self._copies(itemsize)

    def straight_instructions(self, itemsize: int) -> float:
        """Instructions a warp issues before and after the loop: 640 for 128 x 128 on 4 warps and 6 stages (sm_90)."""
        return 220 + 1.9 * self.accumulators + 7 * (self.stages - 1) * self._copies(itemsize)

    def resident(self, itemsize: int, rates: GpuRates) -> int:
        """Thread blocks that fit one processor, by shared memory, registers and threads."""
        shared = self.stages * (self.block_m + self.block_n) * self.block_k * itemsize + 1024
        threads = 32 * self.warps
        return max(
            1, min(rates.shared_memory // shared, int(_REGISTERS // (self.registers * threads)), _THREADS // threads)
        )


def gather_flops(block_m: int, block_n: int, itemsize: int, rates: GpuRates) -> float:
    """Bound of a kernel that gathers ``(block_m + block_n)`` elements a K step from L2, FLOP/s."""
    intensity = 2 * block_m * block_n / ((block_m + block_n) * itemsize)
    return min(rates.matrix_flops, intensity * rates.l2_bytes_s)


def ceil_div(a: float, b: float) -> int:
    """a / b, rounded up."""
    return -int(-a // b)


def matrix_flops(dtype: torch.dtype, rates: GpuRates) -> tuple[float, float]:
    """``(matrix, dense)`` rates for a dtype, FLOP/s."""
    if dtype.itemsize == 2:
        return rates.matrix_flops, rates.dense_flops
    share = rates.dense_flops / rates.matrix_flops
    return rates.fma_flops, rates.fma_flops * share


def traffic_s(nbytes: float, rates: GpuRates) -> float:
    """Reading and writing tensors of this size together: from device memory, or from L2 where half of it holds them.

    A layer's input was written by the layer before, so small activations and weights never leave L2.
    """
    return nbytes / (rates.memory_bytes_s if nbytes > rates.l2_capacity / 2 else rates.l2_bytes_s)


def port_bytes_s(tiles: float, rates: GpuRates) -> float:
    """What one processor takes from L2 while this many tiles run: its share, at most what its port lets through."""
    return min(_PORT_BYTES * rates.clock_hz, rates.l2_bytes_s / max(1, min(tiles, rates.processors)))


def chain_of(
    tile: Tile, tiles: float, steps: float, itemsize: int, flops: float, l2_share: bool, rates: GpuRates
) -> tuple[float, int]:
    """``(seconds, resident)``: a processor's tiles in rounds, each with its latencies and its steps one by one.

    Three loads depend on each other before the first product: the block row, its columns, the pixels.
    """
    resident = tile.resident(itemsize, rates)
    rounds = ceil_div(ceil_div(tiles, rates.processors), resident)
    issue = tile.warps / SCHEDULERS / rates.clock_hz
    port = port_bytes_s(tiles, rates)
    step = max(
        2 * tile.block_m * tile.block_n * tile.block_k * rates.processors / flops,
        (tile.block_m + tile.block_n) * tile.block_k * itemsize / port if l2_share else 0.0,
        tile.loop_instructions(itemsize) * issue,
        rates.latency_s / max(1, tile.stages - 1),
    )
    return rounds * (tile.straight_instructions(itemsize) * issue + 3 * rates.latency_s + steps * step), resident
