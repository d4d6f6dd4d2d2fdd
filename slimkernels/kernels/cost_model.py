"""Predicted time of a kernel from bytes, FLOPs, waves and launches, and the ceilings it divides them by.

On a GPU a kernel that gathers, per tile and K step, ``BLOCK_M`` pixels and ``BLOCK_N`` output channels from L2 does
``2 BLOCK_M BLOCK_N`` FLOPs for ``BLOCK_M + BLOCK_N`` elements, whatever the block's width in input channels: the
intensity ``BLOCK_M BLOCK_N / (BLOCK_M + BLOCK_N)`` FLOPs a byte (16-bit) bounds its rate. Three times are computed,
matrix units, L2 and device memory; the largest is the prediction, after the tiles are rounded up to whole tiles a
processor. On a CPU the multiply-adds inside the image are divided by a rate fitted to measurements.

A prediction is only ever compared with another prediction, or printed beside a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from slimkernels.kernels.problems import (
    LANES,
    NARROWEST_CHANNELS_LAST,
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    conv_output_size,
    factor_geometry,
    strip_width,
)

Config: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class GpuRates:
    """Ceilings of one GPU.

    Attributes:
        name: the device, as `slimkernels.kernels.devices.device_name` spells it.
        matrix_flops: 16-bit matrix product on random data, FLOP/s.
        dense_flops: what the vendor's dense convolutions and products reach, FLOP/s.
        fma_flops: IEEE float32 on the plain cores, FLOP/s.
        memory_bytes_s, l2_bytes_s: device memory (read plus written) and L2 to all processors, bytes/s.
        processors: streaming multiprocessors. launch_s: one kernel inside a CUDA graph, seconds.
    """

    name: str
    matrix_flops: float
    dense_flops: float
    fma_flops: float
    memory_bytes_s: float
    l2_bytes_s: float
    processors: int
    launch_s: float


# Matrix rate and memory rate were measured on one H200 (matrix product of 8192^3 in bf16 on random data: 769 to 798
# TFLOP/s; device copy 4.3 TB/s). The L2 rate, the dense convolution's share, the float32 rate (the vendor's 67 TFLOP/s,
# at 0.9) and the launch are leads: benchmarks/bench_ceilings.py measures them.
H200 = GpuRates("nvidia-h200", 790e12, 600e12, 60e12, 4.3e12, 5.5e12, 132, 2e-6)


@dataclass(frozen=True)
class CpuRates:
    """Fitted rates of one CPU and instruction set, in FLOP/s per thread (two per multiply-add).

    Attributes:
        isa: instruction set of the sparse kernels.
        dense_flops: torch's dense convolution, taps in the padding included. dense_call_s: its fixed cost a call,
            seconds. dense_bytes_s: reading its weights, bytes/s over all threads; infinite where that does not show.
        sparse_flops: stored multiply-adds inside the image, in strips of 16 channels and more.
        sparse_flops_strip8: the same where ``block_out`` leaves strips of 8. sparse_call_s: fixed cost a call.
    """

    isa: str
    dense_flops: float
    dense_call_s: float
    dense_bytes_s: float
    sparse_flops: float
    sparse_flops_strip8: float
    sparse_call_s: float


# Where no table was measured: avx2 near what two Zen 3 cores reach on VGG-19's layers, avx512 what two Zen 5 cores do,
# scalar a guess.
CPU_RATES = {
    "scalar": CpuRates("scalar", 40e9, 8e-6, 2e10, 6e9, 6e9, 8e-6),
    "avx2": CpuRates("avx2", 75e9, 8e-6, 2e10, 70e9, 52e9, 8e-6),
    "avx512": CpuRates("avx512", 220e9, 8e-6, 2e10, 165e9, 85e9, 8e-6),
}


# Rate of strips of 1, 2 and 4 channels over that of 16, and the copies they need, bytes/s a thread: Zen 5, AVX-512,
# measured.
_NARROW_STRIPS = {1: 0.4, 2: 0.6, 4: 1.0}
_COPY_BYTES_S = 1e10


@dataclass(frozen=True)
class Prediction:
    """Where the time of a kernel goes, in seconds.

    Attributes:
        matrix_s, l2_s, memory_s: each limit alone, all processors busy. launch_s: kernel launches.
        imbalance: tiles of the busiest processor over the average, times the rows and columns that pad tiles.
        tiles: programs launched. passes: further kernels that run after this one.
    """

    matrix_s: float
    l2_s: float
    memory_s: float
    launch_s: float
    imbalance: float = 1.0
    tiles: int = 0
    passes: tuple[Prediction, ...] = ()

    @property
    def ideal_s(self) -> float:
        """The largest limit, with neither waves nor launches."""
        return max(self.matrix_s, self.l2_s, self.memory_s) + sum(p.ideal_s for p in self.passes)

    @property
    def seconds(self) -> float:
        """The prediction."""
        own = max(max(self.matrix_s, self.l2_s) * self.imbalance, self.memory_s) + self.launch_s
        return own + sum(p.seconds for p in self.passes)

    @property
    def bound(self) -> str:
        """The limit that decides: ``matrix``, ``l2``, ``memory`` or ``launch``."""
        limits = {
            "matrix": self.matrix_s * self.imbalance,
            "l2": self.l2_s * self.imbalance,
            "memory": self.memory_s,
            "launch": self.launch_s,
        }
        return max(limits, key=lambda name: limits[name])


def gather_flops(block_m: int, block_n: int, itemsize: int, rates: GpuRates) -> float:
    """Bound of a kernel that gathers ``(block_m + block_n)`` elements a K step from L2, FLOP/s."""
    intensity = 2 * block_m * block_n / ((block_m + block_n) * itemsize)
    return min(rates.matrix_flops, intensity * rates.l2_bytes_s)


def _ceil(a: float, b: float) -> int:
    return -int(-a // b)


def _rows(problem: ConvProblem | LinearProblem) -> int:
    """Output pixels or rows, before pooling."""
    return problem.m if isinstance(problem, LinearProblem) else problem.n * problem.p * problem.q


def _image_bytes(problem: ConvProblem | LinearProblem, *, pooled: bool) -> tuple[int, int]:
    """``(input, output)`` bytes of a layer's activations, each counted once."""
    size = problem.dtype.itemsize
    if isinstance(problem, LinearProblem):
        return problem.m * problem.in_features * size, problem.m * problem.out_features * size
    rows = problem.n * (problem.p // 2) * (problem.q // 2) if pooled else _rows(problem)
    return problem.n * problem.c_in * problem.h * problem.w * size, rows * problem.c_out * size


def _matrix_flops(dtype: torch.dtype, rates: GpuRates) -> tuple[float, float]:
    """``(matrix, dense)`` rates for a dtype, FLOP/s."""
    if dtype.itemsize == 2:
        return rates.matrix_flops, rates.dense_flops
    share = rates.dense_flops / rates.matrix_flops
    return rates.fma_flops, rates.fma_flops * share


def gpu_block_sparse(problem: ConvProblem | LinearProblem, config: Config, rates: GpuRates) -> Prediction:
    """A Triton kernel over the stored blocks: tiles of ``BLOCK_M`` pixels x ``BLOCK_N`` channels of one block row.

    Args:
        config: ``BLOCK_M``, ``BLOCK_N`` and ``SPLITS`` are read; by default 128 pixels x at most 128 channels, whole.
    """
    block_out, block_in = problem.block_shape
    c_out = problem.c_out if isinstance(problem, ConvProblem) else problem.out_features
    block_m = config.get("BLOCK_M", 128)
    block_n = config.get("BLOCK_N", max(16, min(128, 1 << (block_out - 1).bit_length())))
    split = config.get("SPLITS", 1)
    rows, block_rows, item = _rows(problem), _ceil(c_out, block_out), problem.dtype.itemsize
    matrix, _ = _matrix_flops(problem.dtype, rates)
    # Columns past block_out and pixels past the last are multiplied too; every row of blocks is taken as average.
    tiles = _ceil(rows, block_m) * block_rows * _ceil(block_out, block_n) * split
    depth = problem.nnz_blocks * block_in / block_rows / split
    tile_flops, tile_bytes = 2 * block_m * block_n * depth, (block_m + block_n) * depth * item
    exact = 2.0 * rows * problem.nnz_blocks * block_out * block_in
    waste = tiles * tile_flops / max(exact, 1.0)
    x_bytes, y_bytes = _image_bytes(problem, pooled=problem.epilogue == "relu_maxpool2")
    memory = x_bytes + y_bytes + problem.nnz_blocks * (block_out * block_in * item + 4)
    busiest = _ceil(tiles, rates.processors) * rates.processors / max(tiles, 1)
    workspace = 4 * rows * c_out * (2 if split > 1 else 0) * split
    return Prediction(
        exact / matrix,
        tiles * tile_bytes / max(waste, 1.0) / rates.l2_bytes_s,
        (memory + workspace) / rates.memory_bytes_s,
        rates.launch_s * (2 if split > 1 else 1),
        busiest * waste,
        tiles,
    )


def gpu_dense(problem: SizedProblem, rates: GpuRates) -> Prediction:
    """The vendor's dense layer that a problem replaces, ReLU fused; a 2x2 max-pool is a pass of its own."""
    _, dense = _matrix_flops(problem.dtype, rates)
    size = problem.dtype.itemsize
    if isinstance(problem, LowRankLinearProblem):
        return _gemm(problem.m, problem.in_features, problem.out_features, size, dense, rates)
    if isinstance(problem, LowRankConvProblem):
        shape, kernel = problem.factor_shapes, problem.kernel_size
        p = conv_output_size(problem.h, kernel[0], problem.stride[0], problem.padding[0], problem.dilation[0])
        q = conv_output_size(problem.w, kernel[1], problem.stride[1], problem.padding[1], problem.dilation[1])
        nbytes = problem.n * size * (problem.h * problem.w * shape[0][1] + p * q * shape[-1][0])
        return Prediction(2 * problem.macs_dense / dense, 0.0, nbytes / rates.memory_bytes_s, rates.launch_s)
    if isinstance(problem, LinearProblem):
        return _gemm(problem.m, problem.in_features, problem.out_features, size, dense, rates)
    x_bytes, y_bytes = _image_bytes(problem, pooled=False)
    weights = problem.c_in * problem.c_out * problem.r * problem.s
    passes = ()
    if problem.epilogue == "relu_maxpool2":
        passes = (Prediction(0.0, 0.0, 1.25 * y_bytes / rates.memory_bytes_s, rates.launch_s),)
    memory = (x_bytes + y_bytes + weights * size) / rates.memory_bytes_s
    return Prediction(2 * _rows(problem) * weights / dense, 0.0, memory, rates.launch_s, passes=passes)


def _gemm(m: int, k: int, n: int, size: int, flops: float, rates: GpuRates) -> Prediction:
    memory = (m * k + k * n + m * n) * size / rates.memory_bytes_s
    return Prediction(2 * m * k * n / flops, 0.0, memory, rates.launch_s)


def gpu_factors(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> Prediction:
    """Every factor as a dense layer of its own, the intermediate through memory."""
    _, dense = _matrix_flops(problem.dtype, rates)
    size = problem.dtype.itemsize
    if isinstance(problem, LowRankLinearProblem):
        first = _gemm(problem.m, problem.in_features, problem.rank, size, dense, rates)
        return replace(first, passes=(_gemm(problem.m, problem.rank, problem.out_features, size, dense, rates),))
    steps, h, w = [], problem.h, problem.w
    geometry = factor_geometry(
        problem.kind, len(problem.factor_shapes), problem.stride, problem.padding, problem.dilation
    )
    for (out, c_in, r, s), (stride, padding, dilation) in zip(problem.factor_shapes, geometry):
        before = h * w * c_in
        h = conv_output_size(h, r, stride[0], padding[0], dilation[0])
        w = conv_output_size(w, s, stride[1], padding[1], dilation[1])
        flops, nbytes = 2 * problem.n * h * w * out * c_in * r * s, problem.n * (before + h * w * out) * size
        steps.append(Prediction(flops / dense, 0.0, nbytes / rates.memory_bytes_s, rates.launch_s))
    return replace(steps[0], passes=tuple(steps[1:]))


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
    memory = (m * (k + n) + rank * (k + n)) * size / rates.memory_bytes_s
    busiest = _ceil(tiles, rates.processors) * rates.processors / tiles if tiles else 1.0
    return Prediction(flops / dense, l2 / rates.l2_bytes_s, memory, rates.launch_s, busiest, tiles)


def _gpu_low_rank_conv(problem: LowRankConvProblem, config: Config, rates: GpuRates) -> Prediction:
    factors = gpu_factors(problem, rates)
    steps = [replace(factors, passes=()), *factors.passes]
    _, dense = _matrix_flops(problem.dtype, rates)
    for i, (out, _, r, s) in enumerate(problem.factor_shapes):
        if r * s > 1:
            tile = min(128, 1 << (out - 1).bit_length())
            gather = gather_flops(config.get("BLOCK_M", 128), tile, problem.dtype.itemsize, rates)
            steps[i] = replace(steps[i], l2_s=steps[i].matrix_s * dense / gather)
    if problem.kind != "tai" and problem.factor_shapes[-2][0] <= 256:
        last, before = steps.pop(), steps.pop()
        inner = problem.factor_shapes[-2][0] / (problem.factor_shapes[-2][0] + problem.factor_shapes[-1][0])
        # The 1x1 factor reads (inner) and writes (outer) pixels of equal number: its reads stay on chip, as do the
        # writes of the factor before it.
        kept = last.memory_s * inner
        steps.append(
            Prediction(
                before.matrix_s + last.matrix_s, before.l2_s, before.memory_s + last.memory_s - 2 * kept, rates.launch_s
            )
        )
    return replace(steps[0], passes=tuple(steps[1:]))


def _relu_pass(problem: LowRankLinearProblem | LowRankConvProblem, rates: GpuRates) -> tuple[Prediction, ...]:
    """The ReLU behind torch's layers: the output is read and written once more."""
    if problem.epilogue == "none":
        return ()
    if isinstance(problem, LowRankLinearProblem):
        outputs = problem.m * problem.out_features
    else:
        shape, kernel = problem.factor_shapes, problem.kernel_size
        outputs = problem.macs_dense // (shape[0][1] * kernel[0] * kernel[1])
    return (Prediction(0.0, 0.0, 2 * outputs * problem.dtype.itemsize / rates.memory_bytes_s, rates.launch_s),)


def predict_gpu(backend: str, problem: SizedProblem, config: Config, rates: GpuRates) -> Prediction:
    """A kernel of a backend (``triton``, ``cuda``, ``reference``) on a GPU problem."""
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
    sparse = gpu_block_sparse(problem, config, rates)
    if backend == "cuda":  # sums on the plain cores
        return replace(sparse, matrix_s=sparse.matrix_s * rates.matrix_flops / rates.fma_flops)
    return sparse


def cpu_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """A native kernel on a CPU problem."""
    rate, calls, copied = rates.sparse_flops, 1, 0.0
    if isinstance(problem, ConvProblem | LinearProblem):
        strip = strip_width(problem.block_shape[0], rates.isa)
        if strip == NARROWEST_CHANNELS_LAST:
            rate = rates.sparse_flops_strip8
        elif strip < NARROWEST_CHANNELS_LAST:
            images = problem.n if isinstance(problem, ConvProblem) else problem.m
            lanes = LANES[rates.isa]
            rate *= _NARROW_STRIPS[strip] * images / max(1, _ceil(images, lanes) * lanes)
            copied = sum(_image_bytes(problem, pooled=problem.epilogue == "relu_maxpool2")) / _COPY_BYTES_S
    if isinstance(problem, LowRankLinearProblem | LowRankConvProblem):
        calls = 2 if isinstance(problem, LowRankLinearProblem) else len(problem.factor_shapes)
    return (2 * problem.macs / rate + copied) / threads + calls * rates.sparse_call_s


def dense_work(problem: SizedProblem) -> tuple[int, int]:
    """``(multiply-adds, weight bytes)`` of the dense layer on a CPU, taps in the padding included."""
    size = problem.dtype.itemsize
    if isinstance(problem, LinearProblem | LowRankLinearProblem):
        return problem.macs_dense, problem.in_features * problem.out_features * size
    if isinstance(problem, LowRankConvProblem):
        first, last = problem.factor_shapes[0], problem.factor_shapes[-1]
        return problem.macs_dense, first[1] * last[0] * problem.kernel_size[0] * problem.kernel_size[1] * size
    weights = problem.c_in * problem.c_out * problem.r * problem.s
    return problem.n * problem.p * problem.q * weights, weights * size


def cpu_dense_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """Torch's dense layer that a CPU problem replaces."""
    macs, nbytes = dense_work(problem)
    return 2 * macs / (rates.dense_flops * threads) + nbytes / rates.dense_bytes_s + rates.dense_call_s


def cpu_reference_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """A reference kernel on a CPU problem: a dense layer, or the factors as dense layers."""
    if isinstance(problem, LowRankLinearProblem | LowRankConvProblem):
        count = 2 if isinstance(problem, LowRankLinearProblem) else len(problem.factor_shapes)
        return 2 * problem.macs / (rates.dense_flops * threads) + count * rates.dense_call_s
    return cpu_dense_seconds(problem, rates, threads)
