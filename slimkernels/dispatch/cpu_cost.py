"""Predicted time of a layer on a CPU: multiply-adds inside the image over a fitted rate, plus a fixed cost a call.

A prediction is only ever compared with another prediction, or printed beside a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimkernels.kernels.image_parts import image_parts
from slimkernels.kernels.problems import (
    LANES,
    NARROWEST_CHANNELS_LAST,
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
    conv_output_image,
    strip_width,
)


@dataclass(frozen=True)
class CpuRates:
    """Fitted rates of one CPU and instruction set, in FLOP/s per thread (two per multiply-add).

    Attributes:
        isa: instruction set of the sparse kernels.
        dense_flops: torch's dense convolution, taps in the padding included.
        dense_call_s: its fixed cost a call, seconds.
        dense_bytes_s: reading its weights, bytes/s over all threads; infinite where that does not show.
        sparse_flops: stored multiply-adds inside the image, in strips of 16 channels and more.
        sparse_flops_strip8: the same where ``block_out`` leaves strips of 8.
        sparse_call_s: fixed cost a call.
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
# Strips of one channel over images of two rows and columns and more, in tiles of up to 16 pixels: an entry costs one
# cycle for each pixel and two more. The rate without those two over that of strips of 16: Zen 4, AVX-512, measured.
_SLABS, _TILE_PIXELS, _ENTRY_CYCLES = 0.73, 16, 2


# First layers: of an image's three channels torch fills less than a vector, and sparse kernels with every block stored
# ran 1.2 to 1.9 times as fast on Zen 3 with AVX2, 1.2 to 1.6 times on another EPYC with AVX-512.
_NARROW_INPUT, _NARROW_INPUT_RATE = 8, 0.5


_BLOCK_SPARSE = ConvProblem | LinearProblem
# A layer with more bytes of stored weights than this, such as single weights stored in full blocks, takes at least as
# long as reading them.
_WEIGHTS_IN_CACHE = 4 << 20


def cpu_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """A native kernel on a CPU problem."""
    rate, copied = rates.sparse_flops, 0.0
    if isinstance(problem, _BLOCK_SPARSE):
        strip = strip_width(problem.block_shape[0], rates.isa)
        if strip == NARROWEST_CHANNELS_LAST:
            rate = rates.sparse_flops_strip8
        elif strip < NARROWEST_CHANNELS_LAST:
            rate *= _narrow_rate(problem, strip, LANES[rates.isa])
            copied = sum(problem.io_bytes(pooled=problem.epilogue == "relu_maxpool2")) / _COPY_BYTES_S
    streamed = 4 * problem.nnz_blocks * math.prod(problem.block_shape) if isinstance(problem, _BLOCK_SPARSE) else 0
    streamed = streamed if streamed > _WEIGHTS_IN_CACHE else 0
    arithmetic = (2 * problem.macs / rate + copied) / threads
    return max(arithmetic, streamed / rates.dense_bytes_s) + problem.native_calls * rates.sparse_call_s


def _narrow_rate(problem: ConvProblem | LinearProblem, strip: int, lanes: int) -> float:
    """The rate of a strip of 1, 2 or 4 channels over that of 16. Lanes that hold no image, or part of one, are lost."""
    images, rate = problem.n if isinstance(problem, ConvProblem) else problem.m, _NARROW_STRIPS[strip]
    if not images:  # no work, at any rate
        return rate
    if isinstance(problem, ConvProblem) and strip == 1:
        size, taps, stride = (problem.h, problem.w), (problem.r, problem.s), problem.stride
        p, q = conv_output_image(size, taps, stride, problem.padding, problem.dilation)
        rows, columns = image_parts(images, lanes, taps, stride, size, (p, q), problem.epilogue == "relu_maxpool2")
        images *= rows * columns
        if rows * columns > 1 or min(p, q) > 1:
            pixels = min(_TILE_PIXELS, (p // rows) * (q // columns))
            rate = _SLABS * pixels / (pixels + _ENTRY_CYCLES)
    return rate * images / (-(-images // lanes) * lanes)


def cpu_dense_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """Torch's dense layer that a CPU problem replaces."""
    dense = problem.dense_work()
    rate = rates.dense_flops
    if isinstance(problem, ConvProblem) and problem.c_in < _NARROW_INPUT and problem.r * problem.s > 1:
        rate *= _NARROW_INPUT_RATE
    arithmetic = 2 * dense.macs / (rate * threads)
    return arithmetic + dense.weight_bytes / rates.dense_bytes_s + rates.dense_call_s


def cpu_reference_seconds(problem: SizedProblem, rates: CpuRates, threads: int) -> float:
    """A reference kernel on a CPU problem: a dense layer, or the factors as dense layers."""
    if isinstance(problem, LowRankLinearProblem | LowRankConvProblem):
        return 2 * problem.macs / (rates.dense_flops * threads) + problem.native_calls * rates.dense_call_s
    return cpu_dense_seconds(problem, rates, threads)
