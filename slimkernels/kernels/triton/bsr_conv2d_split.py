"""The second half of a split convolution: sums the partial accumulators in a fixed order, then the epilogue.

    y[m, o] = epilogue(bias[o] + sum over splits of partial[split, m, o]),   partial (splits, M, C_out) float32

Every partial sum is written by one program and read by one, so the result does not depend on the order of programs.
With POOL four consecutive rows m are the pixels of one 2x2 window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done, maximum_nan

BLOCK_ROWS, BLOCK_CHANNELS = 16, 128


@triton.jit
def bsr_conv2d_reduce_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    rows,
    c_out,
    splits,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # rows counts rows of y. An element's splits are rows_of_partial * c_out apart.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < c_out
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    PIXELS: tl.constexpr = 4 if POOL else 1
    await_last_kernel(OVERLAP)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    # An argument that is 1 arrives as a constant, which has no method `to`.
    stride = tl.cast(rows, tl.int64) * PIXELS * c_out
    result = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for pixel in tl.static_range(PIXELS):
        first_ptr = partial_ptr + (offs_m * PIXELS + pixel)[:, None] * c_out + offs_n[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for split in range(splits):
            acc += tl.load(first_ptr + split * stride, mask=mask, other=0.0)
        acc += bias[None, :]
        if RELU:
            acc = maximum_nan(acc, 0.0)
        result = acc if pixel == 0 else maximum_nan(result, acc)
    main_loop_done(OVERLAP)
    tl.store(y_ptr + offs_m[:, None] * c_out + offs_n[None, :], result.to(y_ptr.dtype.element_ty), mask=mask)
