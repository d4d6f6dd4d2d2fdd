"""Predicted time of a kernel on a GPU: loads, arithmetic, issue slots, waves, latency and launches.

A block-sparse tile kernel gathers ``BLOCK_M`` pixels and ``BLOCK_N`` output channels a K step from L2. Four times are
computed, and the largest is the prediction, plus the launch:

* loads: what the pieces of the input, the bytes and device memory cost one after the other. On an H200 the time of 104
  configurations of eleven layers (8 to 80 us), their stages one slice each and 64 to 128 channels in flight, follows
  the sum of three terms within 13% on average, 38% at worst (`test_cost_model.py`): 0.83 clocks a processor for
  every piece of consecutive input channels, 0.37 for every 32 bytes of input and weights, and the time of device memory
  in full; a constant 5.8 us, the launch included, comes on top. They do not overlap as a roofline would have it: the
  largest of L2 at its measured 9.8 TB/s, device memory and matrix units is half of the measured time. Measurements:
  benchmarks/results/nvidia-h200/layer-configurations.json;
* matrix units: work over rate, times how much more the busiest processor has than the average one;
* issue slots: instructions of the compiled kernels over the clock;
* the chain: one tile after another on one processor, each with its loads' latency. For small batches, where few tiles
  run, it takes the place of the constant among the loads.

A prediction is only ever compared with another prediction, or printed beside a measurement.
"""

from __future__ import annotations

import math
from dataclasses import replace

from slimkernels.dispatch.gpu_dense_cost import gpu_dense, gpu_factors, gpu_low_rank, relu_pass
from slimkernels.dispatch.gpu_prediction import (
    SCHEDULERS,
    Config,
    Prediction,
    Tile,
    ceil_div,
    chain_of,
    matrix_flops,
    port_bytes_s,
    traffic_s,
)
from slimkernels.dispatch.gpu_rates import GpuRates
from slimkernels.kernels import cuda_low_rank, low_rank_plan
from slimkernels.kernels.problems import (
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    taps_in_image,
)

# Bytes of an L1 line and of a sector, the least that L2 hands out.
_LINE_BYTES, _SECTOR_BYTES = 128, 32
# Measured, see above: clocks of a processor for a piece of input and for a sector, and what a layer takes beside.
_PIECE_CLOCKS, _SECTOR_CLOCKS, _START_S = 0.83, 0.37, 4.8e-6
# Measured: stages of several slices and tiles of 256 pixels take longer than their loads say.
_SEVERAL_SLICES, _WIDE_TILE = 1.5, 1.25


def _tile_of(config: Config, block_out: int) -> Tile:
    """The tile of a configuration; what it leaves open as the launcher's default would choose it on a large layer."""
    block_n = config.get("BLOCK_N", max(16, min(128, 1 << (block_out - 1).bit_length())))
    return Tile(
        config.get("BLOCK_M", 128),
        block_n,
        config.get("BLOCK_K", 64),
        config.get("num_warps", 8),
        config.get("num_stages", 3),
    )


def inside_share(problem: ConvProblem) -> float:
    """The share of taps inside the image, over all output pixels: 0.44 of a padded 3x3 kernel on 2x2 pixels."""
    sides = (problem.h, problem.r), (problem.w, problem.s)
    geometry = zip(problem.stride, problem.padding, problem.dilation)
    inside = math.prod(taps_in_image(*side, *numbers) for side, numbers in zip(sides, geometry))
    return inside / max(problem.p * problem.q * problem.r * problem.s, 1)


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
    rows, block_rows, item = problem.rows, ceil_div(c_out, block_out), problem.dtype.itemsize
    matrix, _ = matrix_flops(problem.dtype, rates)
    # Columns past block_out and pixels past the last are multiplied too; every row of blocks is taken as average.
    tiles = ceil_div(rows, tile.block_m) * block_rows * ceil_div(block_out, tile.block_n) * split
    depth = problem.nnz_blocks * block_in / block_rows / split
    inside = 1.0
    if one_position and isinstance(problem, ConvProblem):
        inside = inside_share(problem)
        depth *= inside
        positions = max(rows // max(problem.n, 1), 1)
        tiles = tiles * ceil_div(problem.n, tile.block_m) * positions // max(ceil_div(rows, tile.block_m), 1)
    steps = ceil_div(depth, tile.block_k)
    tile_flops = 2 * tile.block_m * tile.block_n * depth
    tile_bytes = (tile.block_m + tile.block_n) * depth * item
    exact = 2.0 * rows * problem.nnz_blocks * block_out * block_in * inside
    waste = tiles * tile_flops / max(exact, 1.0)
    pooled = problem.epilogue == "relu_maxpool2"
    nbytes = sum(problem.io_bytes(pooled=pooled)) + problem.nnz_blocks * (block_out * block_in * item + 4)
    busiest = ceil_div(tiles, rates.processors) * rates.processors / max(tiles, 1)
    instructions = tile.straight_instructions(item) + steps * tile.loop_instructions(item)
    piece = min(block_in, tile.block_k, _LINE_BYTES // item)
    lines = tile.block_m * depth / piece + tile.block_n * depth * item / _LINE_BYTES
    slow = (_SEVERAL_SLICES if tile.block_k > block_in else 1.0) * (_WIDE_TILE if tile.block_m > 128 else 1.0)
    clocks = tiles * (_PIECE_CLOCKS * tile.block_m * depth / piece + _SECTOR_CLOCKS * tile_bytes / _SECTOR_BYTES)
    chain, resident = chain_of(tile, tiles, steps, item, matrix, True, rates)
    passes: tuple[Prediction, ...] = ()
    if split > 1:  # the partial sums are written, then read by a second kernel
        nbytes += 4 * rows * c_out * split
        partial = traffic_s(4 * rows * c_out * split, rates)
        passes = (Prediction(0.0, 0.0, partial, rates.launch_s, chain_s=2 * rates.latency_s),)
    memory = traffic_s(nbytes, rates)
    loads = slow * busiest * clocks / rates.clock_hz / rates.processors + memory
    return Prediction(
        matrix_s=exact / matrix,
        loads_s=loads + min(_START_S, chain) if tiles else 0.0,
        l2_s=tiles * tile_bytes / max(waste, 1.0) / rates.l2_bytes_s,
        memory_s=memory,
        launch_s=rates.launch_s,
        imbalance=busiest * waste,
        tiles=tiles,
        passes=passes,
        tags_s=tiles * lines / rates.clock_hz / rates.processors,
        issue_s=tiles * instructions * tile.warps / SCHEDULERS / rates.clock_hz / rates.processors,
        chain_s=chain if tiles else 0.0,
        busiest=busiest,
        l2_share=rates.l2_bytes_s / rates.processors / port_bytes_s(tiles, rates),
        resident=resident,
        nbytes=nbytes,
    )


def _gpu_low_rank_on_tensor_cores(
    problem: LowRankLinearProblem | LowRankConvProblem, config: Config, rates: GpuRates
) -> Prediction:
    """The fused kernel of CUDA C++ as its plan predicts it, the first factor of tucker2 a dense layer before it."""
    work = cuda_low_rank.work_of(problem)
    machine = low_rank_plan.Machine(
        rates.processors,
        rates.shared_memory,
        rates.clock_hz,
        low_rank_plan.MMA_SYNC_SHARE * rates.matrix_flops / 2,
        rates.l2_bytes_s,
        rates.memory_bytes_s,
        rates.latency_s,
        rates.launch_s,
    )
    plan = low_rank_plan.plan(work, machine, config)
    if plan is None:
        return Prediction(math.inf, 0.0, 0.0, rates.launch_s)
    launches = rates.launch_s * (1 if plan.depth_splits == 1 else 2)
    found = Prediction(
        work.rows * work.rank * (work.depth + work.columns) / machine.macs_s,
        0.0,
        traffic_s(work.nbytes, rates),
        launches,
        chain_s=plan.seconds - launches,
        nbytes=work.nbytes,
    )
    if isinstance(problem, LowRankConvProblem) and problem.kind == "tucker2":
        found = replace(found, passes=(replace(gpu_factors(problem, rates), passes=()),))
    return found


def predict_gpu(
    backend: str,
    problem: SizedProblem,
    config: Config,
    rates: GpuRates,
    *,
    one_position: bool = False,
    tensor_cores: bool = False,
) -> Prediction:
    """A kernel of a backend (``triton``, ``cuda``, ``reference``) on a GPU problem; see `gpu_block_sparse`.

    ``tensor_cores``: of a low-rank problem on ``cuda``, as `KernelSpec.on_tensor_cores` says.
    """
    if isinstance(problem, LowRankLinearProblem | LowRankConvProblem):
        if backend == "triton":
            return gpu_low_rank(problem, config, rates)
        if backend == "cuda" and tensor_cores:
            return _gpu_low_rank_on_tensor_cores(problem, config, rates)
        factors = gpu_factors(problem, rates)
        if backend == "cuda":  # sums on the plain cores; ReLU fused
            slower = rates.matrix_flops / rates.fma_flops
            passes = tuple(replace(step, matrix_s=step.matrix_s * slower) for step in factors.passes)
            return replace(factors, matrix_s=factors.matrix_s * slower, passes=passes)
        return replace(factors, passes=(*factors.passes, *relu_pass(problem, rates)))
    if backend == "reference":  # writes the dense weight, reads it back, and multiplies zeros
        return replace(gpu_dense(problem, rates), launch_s=4 * rates.launch_s)
    assert not isinstance(problem, FusedConvProblem), "fused_cost predicts those"
    sparse = gpu_block_sparse(problem, config, rates, one_position=one_position)
    if backend == "cuda":  # sums on the plain cores
        return replace(sparse, matrix_s=sparse.matrix_s * rates.matrix_flops / rates.fma_flops)
    return sparse
