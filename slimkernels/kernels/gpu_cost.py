"""Predicted time of a kernel on a GPU: loads, arithmetic, issue slots, waves, latency and launches.

A block-sparse tile kernel gathers ``BLOCK_M`` pixels and ``BLOCK_N`` output channels a K step from L2. Four times are
computed, and the largest is the prediction, plus the launch:

* loads: what the pieces of the input, the bytes and device memory cost one after the other. On an H200 the time of 131
  configurations of eleven layers (8 to 80 us) follows the sum of three terms within 9% on average, 31% at worst: 0.83
  clocks a processor for every piece of consecutive input channels, 0.37 for every 32 bytes of input and weights, and
  the time of device memory in full; a constant 5.8 us, the launch included, comes on top. They do not overlap as a
  roofline would have it: the largest of L2 at its measured 9.8 TB/s, device memory and matrix units is half of the
  measured time. Measurements: benchmarks/results/nvidia-h200/layer-configurations.json;
* matrix units: work over rate, times how much more the busiest processor has than the average one;
* issue slots: instructions of the compiled kernels over the clock;
* the chain: one tile after another on one processor, each with its loads' latency. It decides for small batches, where
  few tiles run.

A vendor's dense kernel is the largest of arithmetic, device memory and chain. A prediction is only ever compared with
another prediction, or printed beside a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch

from slimkernels.kernels.gpu_rates import GpuRates
from slimkernels.kernels.problems import (
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    conv_output_size,
    factor_geometry,
)

Config: TypeAlias = Mapping[str, int]

# Of a streaming multiprocessor, compute capability 8.0 to 10.0.
_REGISTERS, _THREADS, _SCHEDULERS = 65536, 2048, 4
# Bytes a cycle that one multiprocessor can take from L2, when few of them ask (vendor's figure); bytes of an L1 line
# and of a sector, the least that L2 hands out.
_PORT_BYTES, _LINE_BYTES, _SECTOR_BYTES = 64, 128, 32
# Measured, see above: clocks of a processor for a piece of input and for a sector, and what a layer takes beside.
_PIECE_CLOCKS, _SECTOR_CLOCKS, _START_S = 0.83, 0.37, 4.8e-6
# Measured: stages of several slices and tiles of 256 pixels take longer than their loads say.
_SEVERAL_SLICES, _WIDE_TILE = 1.5, 1.25


@dataclass(frozen=True)
class Prediction:
    """Where the time of a kernel goes, in seconds.

    Attributes:
        matrix_s, l2_s, memory_s, issue_s, tags_s: each alone, all processors equally busy.
        loads_s: what the loads of a gathering kernel take one after the other, memory included.
        launch_s: kernel launches.
        imbalance: tiles of the busiest processor over the average, times the rows and columns that pad tiles.
        busiest: the first of these two factors.
        l2_share: the part of that imbalance that L2 sees, since a processor whose neighbours are idle takes more than
            its share of L2.
        tiles: programs launched. resident: tiles that run on one processor at once.
        chain_s: one processor's tiles, round after round, bound by latency.
        nbytes: bytes that the kernel reads and writes. passes: further kernels that run after this one.
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
        """Registers of a thread, as compiled for sm_90: 156 to 166 for 128 x 128 on 4 warps, 96 for 64 x 128."""
        return min(255, -(-int(36 + self.accumulators) // 8) * 8)

    def _copies(self, itemsize: int) -> float:
        """16-byte copies of a thread in one K step."""
        return (self.block_m + self.block_n) * self.block_k * itemsize / (16 * 32 * self.warps)

    def loop_instructions(self, itemsize: int) -> float:
        """Instructions a warp issues in one K step: 113 for 128 x 128 x 64 on 8 warps (sm_90), 148 for 256 x 128."""
        return 75 + 5.6 * self._copies(itemsize)

    def straight_instructions(self, itemsize: int) -> float:
        """Instructions a warp issues before and after the loop: 449 for 128 x 128 on 8 warps and 3 stages (sm_90)."""
        return 220 + 1.9 * self.accumulators + 7 * (self.stages - 1) * self._copies(itemsize)

    def resident(self, itemsize: int, rates: GpuRates) -> int:
        """Thread blocks that fit one processor, by shared memory, registers and threads."""
        shared = self.stages * (self.block_m + self.block_n) * self.block_k * itemsize + 1024
        threads = 32 * self.warps
        return max(1, min(rates.shared_memory // shared, int(_REGISTERS // (self.registers * threads)),
                          _THREADS // threads))  # fmt: skip


def gather_flops(block_m: int, block_n: int, itemsize: int, rates: GpuRates) -> float:
    """Bound of a kernel that gathers ``(block_m + block_n)`` elements a K step from L2, FLOP/s."""
    intensity = 2 * block_m * block_n / ((block_m + block_n) * itemsize)
    return min(rates.matrix_flops, intensity * rates.l2_bytes_s)


def _ceil(a: float, b: float) -> int:
    return -int(-a // b)


def _matrix_flops(dtype: torch.dtype, rates: GpuRates) -> tuple[float, float]:
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


def _port_bytes_s(tiles: float, rates: GpuRates) -> float:
    """What one processor takes from L2 while this many tiles run: its share, at most what its port lets through."""
    return min(_PORT_BYTES * rates.clock_hz, rates.l2_bytes_s / max(1, min(tiles, rates.processors)))


def _chain_s(
    tile: Tile, tiles: float, steps: float, itemsize: int, flops: float, l2_share: bool, rates: GpuRates
) -> tuple[float, int]:
    """``(seconds, resident)``: a processor's tiles in rounds, each with its latencies and its steps one by one.

    Three loads depend on each other before the first product: the block row, its columns, the pixels.
    """
    resident = tile.resident(itemsize, rates)
    rounds = _ceil(_ceil(tiles, rates.processors), resident)
    issue = tile.warps / _SCHEDULERS / rates.clock_hz
    port = _port_bytes_s(tiles, rates)
    step = max(
        2 * tile.block_m * tile.block_n * tile.block_k * rates.processors / flops,
        (tile.block_m + tile.block_n) * tile.block_k * itemsize / port if l2_share else 0.0,
        tile.loop_instructions(itemsize) * issue,
        rates.latency_s / max(1, tile.stages - 1),
    )
    return rounds * (tile.straight_instructions(itemsize) * issue + 3 * rates.latency_s + steps * step), resident


def _tile_of(config: Config, block_out: int) -> Tile:
    """The tile of a configuration; what it leaves open as the launcher's default would choose it on a large layer."""
    block_n = config.get("BLOCK_N", max(16, min(128, 1 << (block_out - 1).bit_length())))
    return Tile(
        config.get("BLOCK_M", 128), block_n, config.get("BLOCK_K", 64), config.get("num_warps", 8),
        config.get("num_stages", 3),
    )  # fmt: skip


def inside_share(problem: ConvProblem) -> float:
    """The share of taps inside the image, over all output pixels: 0.44 of a padded 3x3 kernel on 2x2 pixels."""

    def share(size: int, out: int, taps: int, stride: int, padding: int, dilation: int) -> float:
        inside = sum(0 <= o * stride - padding + t * dilation < size for o in range(out) for t in range(taps))
        return inside / max(out * taps, 1)

    sides = (problem.h, problem.p, problem.r), (problem.w, problem.q, problem.s)
    return math.prod(
        share(*side, *geometry)
        for side, geometry in zip(sides, zip(problem.stride, problem.padding, problem.dilation), strict=True)
    )


def gpu_block_sparse(
    problem: ConvProblem | LinearProblem, config: Config, rates: GpuRates, *, one_position: bool = False
) -> Prediction:
    """A Triton kernel over the stored blocks: tiles of ``BLOCK_M`` pixels x ``BLOCK_N`` channels of one block row.

    Args:
        config: ``BLOCK_M``, ``BLOCK_N``, ``BLOCK_K``, ``num_warps``, ``num_stages`` and ``SPLITS`` are read; by
            default 128 pixels x at most 128 channels, whole.
        one_position: the pixels of a tile are one position of many images, and taps outside the image are left out.
    """
    block_out, block_in = problem.block_shape
    c_out = problem.c_out if isinstance(problem, ConvProblem) else problem.out_features
    tile, split = _tile_of(config, block_out), config.get("SPLITS", 1)
    rows, block_rows, item = problem.rows, _ceil(c_out, block_out), problem.dtype.itemsize
    matrix, _ = _matrix_flops(problem.dtype, rates)
    # Columns past block_out and pixels past the last are multiplied too; every row of blocks is taken as average.
    tiles = _ceil(rows, tile.block_m) * block_rows * _ceil(block_out, tile.block_n) * split
    depth = problem.nnz_blocks * block_in / block_rows / split
    inside = 1.0
    if one_position and isinstance(problem, ConvProblem):
        inside = inside_share(problem)
        depth *= inside
        positions = max(rows // max(problem.n, 1), 1)
        tiles = tiles * _ceil(problem.n, tile.block_m) * positions // max(_ceil(rows, tile.block_m), 1)
    steps = _ceil(depth, tile.block_k)
    tile_flops = 2 * tile.block_m * tile.block_n * depth
    tile_bytes = (tile.block_m + tile.block_n) * depth * item
    exact = 2.0 * rows * problem.nnz_blocks * block_out * block_in * inside
    waste = tiles * tile_flops / max(exact, 1.0)
    pooled = problem.epilogue == "relu_maxpool2"
    nbytes = sum(problem.io_bytes(pooled=pooled)) + problem.nnz_blocks * (block_out * block_in * item + 4)
    busiest = _ceil(tiles, rates.processors) * rates.processors / max(tiles, 1)
    instructions = tile.straight_instructions(item) + steps * tile.loop_instructions(item)
    piece = min(block_in, tile.block_k, _LINE_BYTES // item)
    lines = tile.block_m * depth / piece + tile.block_n * depth * item / _LINE_BYTES
    slow = (_SEVERAL_SLICES if tile.block_k > block_in else 1.0) * (_WIDE_TILE if tile.block_m > 128 else 1.0)
    clocks = tiles * (_PIECE_CLOCKS * tile.block_m * depth / piece + _SECTOR_CLOCKS * tile_bytes / _SECTOR_BYTES)
    chain, resident = _chain_s(tile, tiles, steps, item, matrix, True, rates)
    passes = ()
    if split > 1:  # the partial sums are written, then read by a second kernel
        nbytes += 4 * rows * c_out * split
        partial = traffic_s(4 * rows * c_out * split, rates)
        passes = (Prediction(0.0, 0.0, partial, rates.launch_s, chain_s=2 * rates.latency_s),)
    loads = slow * busiest * clocks / rates.clock_hz / rates.processors + traffic_s(nbytes, rates)
    return Prediction(
        matrix_s=exact / matrix,
        loads_s=loads + min(_START_S, chain) if tiles else 0.0,
        l2_s=tiles * tile_bytes / max(waste, 1.0) / rates.l2_bytes_s,
        memory_s=traffic_s(nbytes, rates),
        launch_s=rates.launch_s,
        imbalance=busiest * waste,
        tiles=tiles,
        passes=passes,
        tags_s=tiles * lines / rates.clock_hz / rates.processors,
        issue_s=tiles * instructions * tile.warps / _SCHEDULERS / rates.clock_hz / rates.processors,
        chain_s=chain if tiles else 0.0,
        busiest=busiest,
        l2_share=rates.l2_bytes_s / rates.processors / _port_bytes_s(tiles, rates),
        resident=resident,
        nbytes=nbytes,
    )


# What a vendor's library may choose from: tiles, and into how many parts it splits the depth.
_DENSE_TILES = (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4))
_DENSE_SPLITS = (1, 2, 4, 8, 16)


def dense_kernel(m: int, n: int, k: int, nbytes: int, dtype: torch.dtype, rates: GpuRates) -> Prediction:
    """The vendor's product or convolution of ``m`` rows, ``n`` columns and depth ``k`` that moves ``nbytes`` bytes.

    Its sustained rate already holds what large layers lose to waves and instructions; small ones are bound by the
    chain of the best tile and split.
    """
    _, dense = _matrix_flops(dtype, rates)
    flops = 2 * m * n * k
    best: Prediction | None = None
    for tile in _DENSE_TILES:
        for split in _DENSE_SPLITS:
            tiles = _ceil(m, tile.block_m) * _ceil(n, tile.block_n) * split
            steps = _ceil(k, tile.block_k * split)
            chain, resident = _chain_s(tile, tiles, steps, dtype.itemsize, dense, False, rates)
            passes = ()
            if split > 1:
                partial = traffic_s(4 * m * n * (split + 1), rates)
                passes = (Prediction(0.0, 0.0, partial, rates.launch_s, chain_s=2 * rates.latency_s),)
            few = tiles < rates.processors
            busiest = rates.processors / max(tiles, 1) if few else 1.0
            found = Prediction(
                flops / dense, 0.0, traffic_s(nbytes, rates), rates.launch_s, busiest, tiles, passes,
                chain_s=chain if few else 0.0, busiest=busiest, resident=resident, nbytes=nbytes,
            )  # fmt: skip
            if best is None or found.seconds < best.seconds:
                best = found
    assert best is not None
    return best


def gpu_dense(problem: SizedProblem, rates: GpuRates) -> Prediction:
    """The vendor's dense layer that a problem replaces, ReLU fused; a 2x2 max-pool is a pass of its own."""
    work, (x_bytes, y_bytes) = problem.dense_work(), problem.io_bytes(pooled=False)
    columns = _output_channels(problem)
    depth = work.weight_bytes // problem.dtype.itemsize // max(columns, 1)
    nbytes = x_bytes + y_bytes + work.weight_bytes
    found = dense_kernel(problem.rows, columns, depth, nbytes, problem.dtype, rates)
    if problem.epilogue == "relu_maxpool2":
        pool = Prediction(0.0, 0.0, traffic_s(1.25 * y_bytes, rates), rates.launch_s, chain_s=2 * rates.latency_s)
        found = replace(found, passes=(*found.passes, pool))
    return found


def _output_channels(problem: SizedProblem) -> int:
    if isinstance(problem, ConvProblem):
        return problem.c_out
    return problem.factor_shapes[-1][0] if isinstance(problem, LowRankConvProblem) else problem.out_features


def _factor_layers(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> list[Prediction]:
    """Each factor as a dense layer of its own, in order."""
    if isinstance(problem, LowRankLinearProblem):
        m, rank, dtype = problem.m, problem.rank, problem.dtype
        sizes = ((problem.in_features, rank), (rank, problem.out_features))
        return [dense_kernel(m, n, k, (m * k + k * n + m * n) * dtype.itemsize, dtype, rates) for k, n in sizes]
    layers, h, w = [], problem.h, problem.w
    geometry = factor_geometry(
        problem.kind, len(problem.factor_shapes), problem.stride, problem.padding, problem.dilation
    )
    for (out, c_in, r, s), (stride, padding, dilation) in zip(problem.factor_shapes, geometry):
        before = h * w * c_in
        h = conv_output_size(h, r, stride[0], padding[0], dilation[0])
        w = conv_output_size(w, s, stride[1], padding[1], dilation[1])
        nbytes = (problem.n * (before + h * w * out) + out * c_in * r * s) * problem.dtype.itemsize
        layers.append(dense_kernel(problem.n * h * w, out, c_in * r * s, nbytes, problem.dtype, rates))
    return layers


def _in_a_row(layers: list[Prediction]) -> Prediction:
    return replace(layers[0], passes=(*layers[0].passes, *layers[1:]))


def gpu_factors(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> Prediction:
    """Every factor as a dense layer of its own, the intermediate through memory."""
    return _in_a_row(_factor_layers(problem, rates))


def gpu_low_rank(problem: LowRankLinearProblem | LowRankConvProblem, config: Config, rates: GpuRates) -> Prediction:
    """A Triton kernel: of a linear layer one launch, the rank-r intermediate computed again for each of ``SPLITS``.

    Of a convolution, svd and the last two factors of tucker2 are one launch whose intermediate stays on chip, every
    other factor is one of its own; an RxS factor gathers its pixels, which bounds it by L2 as the block-sparse kernel.
    Triton's products are taken to run at the vendor's dense rate, not at the ceiling.
    """
    if isinstance(problem, LowRankConvProblem):
        return _gpu_low_rank_conv(problem, config, rates)
    _, dense = _matrix_flops(problem.dtype, rates)
    size = problem.dtype.itemsize
    block_m, splits = config.get("BLOCK_M", 128), config.get("SPLITS", 1)
    m, k, n, rank = problem.m, problem.in_features, problem.out_features, problem.rank
    tiles_m = _ceil(m, block_m)
    tiles = tiles_m * splits
    wide = config.get("RANK", 1 << max(rank - 1, 15).bit_length())
    # A rank above the tile is computed again for every tile of outputs.
    times, padded = (splits, wide) if rank <= wide else (_ceil(n, config.get("BLOCK_N", 64)), _ceil(rank, wide) * wide)
    flops = 2.0 * tiles_m * block_m * padded * (k * times + n)
    l2 = tiles_m * times * (block_m + padded) * k * size + tiles_m * padded * n * size
    memory = traffic_s((m * (k + n) + rank * (k + n)) * size, rates)
    busiest = _ceil(tiles, rates.processors) * rates.processors / tiles if tiles else 1.0
    depth = config.get("BLOCK_K", 64)
    # A tile walks its inputs' depth, then its share of the outputs.
    steps = times * _ceil(k, depth) / splits + _ceil(n, config.get("BLOCK_N", 64) * splits)
    tile = Tile(block_m, min(wide, 256), depth, config.get("num_warps", 8), config.get("num_stages", 3))
    chain, resident = _chain_s(tile, tiles, steps, size, dense, True, rates)
    return Prediction(
        flops / dense, l2 / rates.l2_bytes_s, memory, rates.launch_s, busiest, tiles, chain_s=chain if tiles else 0.0,
        busiest=busiest, resident=resident,
    )  # fmt: skip


def _gpu_low_rank_conv(problem: LowRankConvProblem, config: Config, rates: GpuRates) -> Prediction:
    layers = _factor_layers(problem, rates)
    _, dense = _matrix_flops(problem.dtype, rates)
    for i, (out, _, r, s) in enumerate(problem.factor_shapes):
        if r * s > 1:
            tile = min(128, 1 << (out - 1).bit_length())
            gather = gather_flops(config.get("BLOCK_M", 128), tile, problem.dtype.itemsize, rates)
            layers[i] = replace(layers[i], l2_s=layers[i].matrix_s * dense / gather)
    if problem.kind != "tai" and problem.factor_shapes[-2][0] <= 256:
        last, before = layers.pop(), layers.pop()
        # What the 1x1 factor reads, and the factor before it writes, stays on chip.
        intermediate = problem.rows * problem.factor_shapes[-2][0] * problem.dtype.itemsize
        nbytes = before.nbytes + last.nbytes - 2 * intermediate
        layers.append(
            replace(before, matrix_s=before.matrix_s + last.matrix_s, memory_s=traffic_s(nbytes, rates),
                    chain_s=before.chain_s + last.chain_s / 2, passes=(), nbytes=nbytes)
        )  # fmt: skip
    return _in_a_row(layers)


def _relu_pass(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> tuple[Prediction, ...]:
    """The ReLU behind torch's layers: the output is read and written once more."""
    if problem.epilogue == "none":
        return ()
    _, outputs = problem.io_bytes()
    return (Prediction(0.0, 0.0, traffic_s(2 * outputs, rates), rates.launch_s, chain_s=2 * rates.latency_s),)


def predict_gpu(
    backend: str, problem: SizedProblem, config: Config, rates: GpuRates, *, one_position: bool = False
) -> Prediction:
    """A kernel of a backend (``triton``, ``cuda``, ``reference``) on a GPU problem; see `gpu_block_sparse`."""
    if isinstance(problem, LowRankLinearProblem | LowRankConvProblem):
        if backend == "triton":
            return gpu_low_rank(problem, config, rates)
        factors = gpu_factors(problem, rates)
        if backend == "cuda":  # sums on the plain cores; ReLU fused
            slower = rates.matrix_flops / rates.fma_flops
            passes = tuple(replace(step, matrix_s=step.matrix_s * slower) for step in factors.passes)
            return replace(factors, matrix_s=factors.matrix_s * slower, passes=passes)
        return replace(factors, passes=(*factors.passes, *_relu_pass(problem, rates)))
    if backend == "reference":  # writes the dense weight, reads it back, and multiplies zeros
        return replace(gpu_dense(problem, rates), launch_s=4 * rates.launch_s)
    sparse = gpu_block_sparse(problem, config, rates, one_position=one_position)
    if backend == "cuda":  # sums on the plain cores
        return replace(sparse, matrix_s=sparse.matrix_s * rates.matrix_flops / rates.fma_flops)
    return sparse
