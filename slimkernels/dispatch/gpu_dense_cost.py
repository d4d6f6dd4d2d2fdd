"""Predicted time of the vendor's dense layers and of the low-rank kernels on a GPU.

A vendor's dense kernel is the largest of arithmetic, device memory and chain (`gpu_prediction`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimkernels.dispatch.gpu_prediction import (
    Config,
    Prediction,
    Tile,
    ceil_div,
    chain_of,
    gather_flops,
    matrix_flops,
    traffic_s,
)
from slimkernels.dispatch.gpu_rates import GpuRates
from slimkernels.kernels.problems import (
    ConvProblem,
    FusedConvProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    conv_output_size,
    factor_geometry,
)

# What a vendor's library may choose from: tiles, and into how many parts it splits the depth.
_DENSE_TILES = (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4))
_DENSE_SPLITS = (1, 2, 4, 8, 16)


def dense_kernel(m: int, n: int, k: int, nbytes: int, dtype: torch.dtype, rates: GpuRates) -> Prediction:
    """The vendor's product or convolution of ``m`` rows, ``n`` columns and depth ``k`` that moves ``nbytes`` bytes.

    Its sustained rate already holds what large layers lose to waves and instructions; small ones are bound by the
    chain of the best tile and split.
    """
    _, dense = matrix_flops(dtype, rates)
    flops = 2 * m * n * k
    best: Prediction | None = None
    for tile in _DENSE_TILES:
        for split in _DENSE_SPLITS:
            tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n) * split
            steps = ceil_div(k, tile.block_k * split)
            chain, resident = chain_of(tile, tiles, steps, dtype.itemsize, dense, False, rates)
            passes: tuple[Prediction, ...] = ()
            if split > 1:
                partial = traffic_s(4 * m * n * (split + 1), rates)
                passes = (Prediction(0.0, 0.0, partial, rates.launch_s, chain_s=2 * rates.latency_s),)
            few = tiles < rates.processors
            busiest = rates.processors / max(tiles, 1) if few else 1.0
            found = Prediction(
                flops / dense,
                0.0,
                traffic_s(nbytes, rates),
                rates.launch_s,
                busiest,
                tiles,
                passes,
                chain_s=chain if few else 0.0,
                busiest=busiest,
                resident=resident,
                nbytes=nbytes,
            )
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
    if isinstance(problem, ConvProblem | FusedConvProblem):
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
    _, dense = matrix_flops(problem.dtype, rates)
    size = problem.dtype.itemsize
    block_m, splits = config.get("BLOCK_M", 128), config.get("SPLITS", 1)
    m, k, n, rank = problem.m, problem.in_features, problem.out_features, problem.rank
    tiles_m = ceil_div(m, block_m)
    tiles = tiles_m * splits
    wide = config.get("RANK", 1 << max(rank - 1, 15).bit_length())
    # A rank above the tile is computed again for every tile of outputs.
    if rank <= wide:
        times, padded = splits, wide
    else:
        times, padded = ceil_div(n, config.get("BLOCK_N", 64)), ceil_div(rank, wide) * wide
    flops = 2.0 * tiles_m * block_m * padded * (k * times + n)
    l2 = tiles_m * times * (block_m + padded) * k * size + tiles_m * padded * n * size
    memory = traffic_s((m * (k + n) + rank * (k + n)) * size, rates)
    busiest = ceil_div(tiles, rates.processors) * rates.processors / tiles if tiles else 1.0
    depth = config.get("BLOCK_K", 64)
    # A tile walks its inputs' depth, then its share of the outputs.
    steps = times * ceil_div(k, depth) / splits + ceil_div(n, config.get("BLOCK_N", 64) * splits)
    tile = Tile(block_m, min(wide, 256), depth, config.get("num_warps", 8), config.get("num_stages", 3))
    chain, resident = chain_of(tile, tiles, steps, size, dense, True, rates)
    return Prediction(
        flops / dense,
        l2 / rates.l2_bytes_s,
        memory,
        rates.launch_s,
        busiest,
        tiles,
        chain_s=chain if tiles else 0.0,
        busiest=busiest,
        resident=resident,
    )


def _gpu_low_rank_conv(problem: LowRankConvProblem, config: Config, rates: GpuRates) -> Prediction:
    layers = _factor_layers(problem, rates)
    _, dense = matrix_flops(problem.dtype, rates)
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
            replace(
                before,
                matrix_s=before.matrix_s + last.matrix_s,
                memory_s=traffic_s(nbytes, rates),
                chain_s=before.chain_s + last.chain_s / 2,
                passes=(),
                nbytes=nbytes,
            )
        )
    return _in_a_row(layers)


def relu_pass(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> tuple[Prediction, ...]:
    """The ReLU behind torch's layers: the output is read and written once more."""
    if problem.epilogue == "none":
        return ()
    _, outputs = problem.io_bytes()
    return (Prediction(0.0, 0.0, traffic_s(2 * outputs, rates), rates.launch_s, chain_s=2 * rates.latency_s),)
