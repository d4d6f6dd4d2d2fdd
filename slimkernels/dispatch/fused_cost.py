"""Predicted time on a GPU of a dense convolution with what follows it, by the kernels of `fused_conv2d`."""

from __future__ import annotations

from dataclasses import replace

from slimkernels.dispatch.gpu_dense_cost import elementwise, max_pool, vendor_convolution
from slimkernels.dispatch.gpu_prediction import Config, Prediction, traffic_s
from slimkernels.dispatch.gpu_rates import GpuRates
from slimkernels.kernels.problems import FusedConvProblem

# Of a streaming multiprocessor.
_SCHEDULERS = 4


def predict_fused(backend: str, problem: FusedConvProblem, config: Config, rates: GpuRates) -> Prediction:
    """A kernel of a backend: ``triton`` (few input channels), ``cuda`` (cuDNN) or ``reference``."""
    if backend == "triton":
        return gpu_few_channels(problem, config, rates)
    return gpu_fused_layers(problem, backend, rates)


def gpu_few_channels(problem: FusedConvProblem, config: Config, rates: GpuRates) -> Prediction:
    """The Triton kernel of few input channels: a load an element of a pixel's patch, 6 cycles for 32 pixels (H200)."""
    depth, cycle = problem.c_in * problem.r * problem.s, 1 / rates.clock_hz / rates.processors
    block_m, block_n = config.get("BLOCK_M", 128), config.get("BLOCK_N", 64)
    tiles = -(-problem.rows // block_m) * -(-problem.c_out // block_n)
    warps, padded = tiles * block_m / 32, -(-depth // 32) * 32
    nbytes = sum(problem.io_bytes(pooled=problem.epilogue == "relu_maxpool2"))
    # IEEE float32 reaches a sixth of the plain cores' rate.
    matrix = rates.matrix_flops if problem.dtype.itemsize == 2 else rates.fma_flops / 6
    return Prediction(
        2.0 * warps * 32 * block_n * padded / matrix,
        0.0,
        traffic_s(nbytes, rates),
        rates.launch_s,
        tiles=tiles,
        issue_s=warps * (200 + 4 * depth + 2 * block_n) / _SCHEDULERS * cycle,
        loads_s=6 * warps * depth * cycle,
        chain_s=4 * rates.latency_s if tiles else 0.0,
        nbytes=nbytes,
    )


def gpu_fused_layers(problem: FusedConvProblem, backend: str, rates: GpuRates) -> Prediction:
    """The vendor's convolution, with its ReLU inside (``cuda``), or with bias and ReLU as passes (``reference``)."""
    found, (_, y_bytes) = vendor_convolution(problem, rates), problem.io_bytes(pooled=False)
    passes = list(found.passes)
    if backend == "reference" and problem.epilogue != "none":  # for the bias, and for ReLU
        passes += [elementwise(y_bytes, rates)] * 2
    if problem.epilogue == "relu_maxpool2":
        passes.append(max_pool(problem, rates))
    return replace(found, passes=tuple(passes))
