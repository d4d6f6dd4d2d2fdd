"""Predicted time of the vendor's dense layers and of the low-rank kernels on a GPU.

A vendor's dense kernel is the largest of arithmetic, device memory and chain (`gpu_prediction`), behind a start. The
constants of convolutions and pools are those of 76 kernels of dense VGG-19 at batch 1, 16 and 1024 and VGG-16 at 224,
batch 32, as profiled on an H200 (benchmarks/results/nvidia-h200, 712b384a8459 and 99c51651bcea). A network's
convolutions behind the first take within 8% of what is predicted, each large one within 21% (`test_cost_model.py`).
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
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    conv_output_size,
    factor_geometry,
)

# What a vendor's library may choose from: tiles, and into how many parts it splits the depth.
_DENSE_TILES = (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4))
_DENSE_SPLITS = (1, 2, 4, 8, 16)
# Measured, see above. A convolution takes so long beside its steps, and so long for each 64 channels of depth where
# its tiles leave processors idle: 11.6 us for 72 steps, 8.2 for 36, 6.4 for 18. Its depth was never split.
_CONV_START_S, _CONV_STEP_S = 4.7e-6, 0.096e-6
# Of the ceiling, which was measured on random data: activations of which half are zero take less power. With 64 output
# channels or fewer a tile reads as much as it computes.
_CONV_SHARE, _NARROW_CONV_SHARE = 1.09, 0.69
# Of fewer than 16 input channels, those that are stored as 8: they take 50 to 81 TFLOP/s (float32: 31).
_FEW_CHANNELS, _FEW_CHANNELS_SHARE = 16, 1 / 12
# A max-pool's start, and the share of the memory rate at which it reads and writes.
_POOL_START_S, _POOL_SHARE = 5.5e-6, 0.217
# And that of a pass over a tensor: bias and ReLU as kernels of their own made the network of batch 1024 1.13 ms slower.
_PASS_SHARE = 0.52


def dense_product(m: int, n: int, k: int, nbytes: int, dtype: torch.dtype, rates: GpuRates) -> Prediction:
    """The vendor's product of ``m`` rows, ``n`` columns and depth ``k`` that moves ``nbytes`` bytes.

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


def dense_convolution(m: int, n: int, k: int, nbytes: int, dtype: torch.dtype, rates: GpuRates) -> Prediction:
    """The vendor's convolution of ``m`` output pixels, ``n`` channels and depth ``k`` that moves ``nbytes`` bytes."""
    _, dense = matrix_flops(dtype, rates)
    share = _CONV_SHARE if n > 64 else _NARROW_CONV_SHARE
    tiles = ceil_div(m, 64) * ceil_div(n, 64)
    few = tiles <= rates.processors
    return Prediction(
        2 * m * n * k / (dense * share),
        0.0,
        traffic_s(nbytes, rates),
        rates.launch_s + (_CONV_START_S if tiles else 0.0),
        tiles=tiles,
        chain_s=ceil_div(k, 64) * _CONV_STEP_S if few and tiles else 0.0,
        nbytes=nbytes,
    )


def vendor_convolution(problem: ConvProblem | FusedConvProblem, rates: GpuRates) -> Prediction:
    """The vendor's convolution that a problem stands for, bias and ReLU inside; its pool is not."""
    (x_bytes, y_bytes), depth = problem.io_bytes(pooled=False), problem.c_in * problem.r * problem.s
    nbytes = x_bytes + y_bytes + problem.dense_work().weight_bytes
    found = dense_convolution(problem.rows, problem.c_out, depth, nbytes, problem.dtype, rates)
    if problem.c_in >= _FEW_CHANNELS:
        return found
    flops = 2.0 * problem.rows * problem.c_out * problem.r * problem.s * max(problem.c_in, 8)
    rate = rates.dense_flops * _FEW_CHANNELS_SHARE if problem.dtype.itemsize == 2 else rates.fma_flops / 2
    copied = Prediction(0.0, 0.0, traffic_s(2 * x_bytes, rates), rates.launch_s, chain_s=2 * rates.latency_s)
    return replace(found, matrix_s=flops / rate, passes=(copied,))


def max_pool(problem: SizedProblem, rates: GpuRates) -> Prediction:
    """torch's 2x2 max-pool behind a problem's layer."""
    _, y_bytes = problem.io_bytes(pooled=False)
    return Prediction(0.0, 0.0, 1.25 * y_bytes / (rates.memory_bytes_s * _POOL_SHARE), rates.launch_s + _POOL_START_S)


def gpu_dense(problem: SizedProblem, rates: GpuRates) -> Prediction:
    """The vendor's dense layer that a problem replaces, ReLU fused; a 2x2 max-pool is a pass of its own."""
    if isinstance(problem, ConvProblem | FusedConvProblem):
        found = vendor_convolution(problem, rates)
    else:
        work, (x_bytes, y_bytes) = problem.dense_work(), problem.io_bytes(pooled=False)
        columns = _output_channels(problem)
        depth = work.weight_bytes // problem.dtype.itemsize // max(columns, 1)
        kernel = dense_convolution if isinstance(problem, LowRankConvProblem) else dense_product
        nbytes = x_bytes + y_bytes + work.weight_bytes
        found = kernel(problem.rows, columns, depth, nbytes, problem.dtype, rates)
    if problem.epilogue == "relu_maxpool2":
        found = replace(found, passes=(*found.passes, max_pool(problem, rates)))
    return found


def _output_channels(problem: LinearProblem | LowRankLinearProblem | LowRankConvProblem) -> int:
    return problem.factor_shapes[-1][0] if isinstance(problem, LowRankConvProblem) else problem.out_features


def _factor_layers(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> list[Prediction]:
    """Each factor as a dense layer of its own, in order."""
    if isinstance(problem, LowRankLinearProblem):
        m, rank, dtype = problem.m, problem.rank, problem.dtype
        sizes = ((problem.in_features, rank), (rank, problem.out_features))
        return [dense_product(m, n, k, (m * k + k * n + m * n) * dtype.itemsize, dtype, rates) for k, n in sizes]
    layers, h, w = [], problem.h, problem.w
    geometry = factor_geometry(
        problem.kind, len(problem.factor_shapes), problem.stride, problem.padding, problem.dilation
    )
    for (out, c_in, r, s), (stride, padding, dilation) in zip(problem.factor_shapes, geometry):
        before = h * w * c_in
        h = conv_output_size(h, r, stride[0], padding[0], dilation[0])
        w = conv_output_size(w, s, stride[1], padding[1], dilation[1])
        nbytes = (problem.n * (before + h * w * out) + out * c_in * r * s) * problem.dtype.itemsize
        layers.append(dense_convolution(problem.n * h * w, out, c_in * r * s, nbytes, problem.dtype, rates))
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
    """The ReLU behind torch's layers."""
    if problem.epilogue == "none":
        return ()
    _, outputs = problem.io_bytes()
    return (elementwise(outputs, rates),)


def elementwise(nbytes: int, rates: GpuRates) -> Prediction:
    """A pass of torch's over a tensor of this size, which is read and written."""
    seconds = traffic_s(2 * nbytes, rates) / _PASS_SHARE
    return Prediction(0.0, 0.0, seconds, rates.launch_s, chain_s=2 * rates.latency_s)
