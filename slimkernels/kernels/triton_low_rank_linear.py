"""Fused low-rank linear layer, forward.

    y = epilogue((x V^T) U^T + bias),   x (M, in), V (rank, in), U (out, rank), y (M, out)

One program computes BLOCK_M rows of h = x V^T for the whole rank in registers (float32), rounds them once to x's dtype, as the
unfused pair of layers does, and multiplies them with its share of U's rows: h never leaves the chip. The rows of U are dealt to
`splits` programs per row tile, each of which recomputes h: that costs (splits - 1) * in * rank FLOPs a row, and is used only
while the device has processors that would otherwise idle (small M).

rank <= MAX_RANK: a wider h does not fit the registers beside the output tile. The caller keeps two GEMMs there; at such ranks
they are compute-bound and fusion saves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.triton_runtime import DTYPES, cdiv, device_guard, interpreted_dtype, next_power_of_2

EPILOGUES = ("none", "relu")
MAX_RANK = 256
_INT32_MAX = 2**31 - 1


@triton.jit
def low_rank_linear_fwd_kernel(
    x_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    y_ptr,
    m_total,
    in_features,
    out_features,
    rank,
    splits,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # RANK is rank rounded up to a power of two; the rows past rank are read as zeros.
    split = tl.program_id(0) % splits
    tile_m = tl.program_id(0) // splits
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_m = tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m_total
    mask_r = offs_r < rank

    x_row_ptr = x_ptr + offs_m[:, None] * in_features
    v_row_ptr = v_ptr + offs_r[None, :] * in_features
    h = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        kk = k + offs_k
        mask_x = mask_m[:, None]
        mask_v = mask_r[None, :]
        if not EVEN_K:
            mask_x = mask_x & (kk < in_features)[None, :]
            mask_v = mask_v & (kk < in_features)[:, None]
        x_tile = tl.load(x_row_ptr + kk[None, :], mask=mask_x, other=0.0)
        v_tile = tl.load(v_row_ptr + kk[:, None], mask=mask_v, other=0.0)
        h = tl.dot(x_tile, v_tile, h, input_precision=PRECISION)
    h_tile = h.to(x_ptr.dtype.element_ty)

    for first in range(split * BLOCK_N, out_features, splits * BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < out_features
        u_tile = tl.load(
            u_ptr + offs_n[None, :] * rank + offs_r[:, None], mask=mask_r[:, None] & mask_n[None, :], other=0.0
        )
        acc = tl.dot(h_tile, u_tile, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc = tl.where(acc < 0.0, 0.0, acc)
        y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * out_features + offs_n[None, :]
        tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
