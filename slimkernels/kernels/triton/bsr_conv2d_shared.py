"""Block-sparse convolution, forward, one input tile for several block rows.

A program computes BLOCK_M pixels of ROWS block rows (2 or 4) that `bsr_conv2d_index.shared_input` put together. It
walks the union of their columns, loads each input tile once, and multiplies it with one weight block per row: input
traffic falls by the rows that share a column, and a row that does not store it multiplies zeros that are not loaded.

With b channels a block row and ROWS rows of equal columns the intensity is that of a block ROWS * b tall; with
independent random masks of density d the union is 1 - (1 - d)^ROWS columns, which at d = 1/8 and four rows saves a
sixth of the input loads for 3.3 times the multiplications (`bsr_conv2d_index.multiplied_share`). So it is for short
block rows whose columns agree: dead input channels, masks drawn for groups of rows.

Triton has accumulators in registers only, not to be indexed by a value, so ROWS is fixed when compiling and every row's
product is issued at every step; a branch around it would stop the pipelining of loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.triton.bsr_conv2d_config import grid_integers, group_m, shared_input_config
from slimkernels.kernels.triton.bsr_conv2d_geometry import Geometry
from slimkernels.kernels.triton.bsr_conv2d_index import remembered_shared_input, rows_sharing_input
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import Limits, cdiv
from slimkernels.kernels.triton.tiles import (
    await_last_kernel,
    gather_x,
    grouped_tile,
    store_tile,
    tile_rows,
)


@triton.jit
def _weights(
    values_ptr,
    slot,
    in_block,
    offs_n,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_w = slot.to(index_type) * (BSR_OUT * BSR_IN) + in_block
    offs_w = tl.multiple_of(tl.max_contiguous(offs_w, SLICE), SLICE)
    mask = tl.max_constancy(slot >= 0, SLICE)[:, None]
    if BSR_OUT % BLOCK_N != 0:
        mask = mask & (offs_n < BSR_OUT)[None, :]
    return tl.load((values_ptr + offs_n * BSR_IN)[None, :] + offs_w[:, None], mask=mask, other=0.0)


@triton.jit
def bsr_conv2d_fwd_kernel_shared(
    x_ptr,
    values_ptr,
    table_ptr,
    entries_ptr,
    bias_ptr,
    y_ptr,
    m_total,
    h,
    w,
    p,
    p_factor,
    p_shift,
    q,
    q_factor,
    q_shift,
    tiles_m,
    n_tiles,
    group_m,
    all_factor,
    all_shift,
    group_factor,
    group_shift,
    last_factor,
    last_shift,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # BLOCK_N covers a block row. table (n_tiles, ROWS + 2), entries (columns, ROWS + 1): see shared_input.
    tile_m, group = grouped_tile(
        tl.program_id(0),
        tiles_m,
        n_tiles,
        group_m,
        all_factor,
        all_shift,
        group_factor,
        group_shift,
        last_factor,
        last_shift,
    )
    FIELDS: tl.constexpr = ROWS + 1
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    table_ptr += group * (ROWS + 2)
    await_last_kernel(OVERLAP)
    first = tl.load(table_ptr + ROWS)
    end = tl.load(table_ptr + ROWS + 1) * BSR_IN
    entries_ptr += first.to(index_type) * FIELDS

    offs_m, bits, in_h, in_w = tile_rows(
        tile_m,
        m_total,
        h,
        w,
        p,
        p_factor,
        p_shift,
        q,
        q_factor,
        q_shift,
        C_IN,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DIL_H,
        DIL_W,
        BORDER,
        POOL,
        POOL_LOW,
        POOL_HIGH,
        INDEX_64,
        BLOCK_M,
    )
    offs_m = tl.multiple_of(offs_m, SLICE)
    offs_n = tl.arange(0, BLOCK_N)

    # Column and slots of step t+1 are loaded in step t: see bsr_conv2d_fwd_kernel.
    offs_k = tl.arange(0, BLOCK_K)
    entry_ptr = entries_ptr + offs_k // BSR_IN * FIELDS
    column = tl.load(entry_ptr, mask=offs_k < end, other=0)
    slot0 = tl.load(entry_ptr + 1, mask=offs_k < end, other=-1)
    slot1 = tl.load(entry_ptr + 2, mask=offs_k < end, other=-1)
    acc0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ROWS == 4:
        slot2 = tl.load(entry_ptr + 3, mask=offs_k < end, other=-1)
        slot3 = tl.load(entry_ptr + 4, mask=offs_k < end, other=-1)
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc3 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.maximum(end, 1), BLOCK_K):
        kk = k + offs_k
        in_block = (kk.to(tl.uint32) % BSR_IN).to(tl.int32)
        x_tile = gather_x(  # [BLOCK_M, BLOCK_K]
            x_ptr,
            offs_m,
            bits,
            in_h,
            in_w,
            column,
            kk < end,
            in_block,
            h,
            w,
            C_IN,
            S,
            DIL_H,
            DIL_W,
            GROUPS,
            BSR_IN,
            SLICE,
            BORDER,
            RAGGED_IN,
            INDEX_64,
            False,
            False,
        )
        w0 = _weights(values_ptr, slot0, in_block, offs_n, BSR_OUT, BSR_IN, SLICE, INDEX_64, BLOCK_N)
        w1 = _weights(values_ptr, slot1, in_block, offs_n, BSR_OUT, BSR_IN, SLICE, INDEX_64, BLOCK_N)
        if ROWS == 4:
            w2 = _weights(values_ptr, slot2, in_block, offs_n, BSR_OUT, BSR_IN, SLICE, INDEX_64, BLOCK_N)
            w3 = _weights(values_ptr, slot3, in_block, offs_n, BSR_OUT, BSR_IN, SLICE, INDEX_64, BLOCK_N)
        next_k = kk + BLOCK_K
        entry_ptr = entries_ptr + next_k.to(tl.uint32) // BSR_IN * FIELDS
        column = tl.load(entry_ptr, mask=next_k < end, other=0)  # [BLOCK_K]
        slot0 = tl.load(entry_ptr + 1, mask=next_k < end, other=-1)  # [BLOCK_K]
        slot1 = tl.load(entry_ptr + 2, mask=next_k < end, other=-1)
        acc0 = tl.dot(x_tile, w0, acc0, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        acc1 = tl.dot(x_tile, w1, acc1, input_precision=PRECISION)
        if ROWS == 4:
            slot2 = tl.load(entry_ptr + 3, mask=next_k < end, other=-1)
            slot3 = tl.load(entry_ptr + 4, mask=next_k < end, other=-1)
            acc2 = tl.dot(x_tile, w2, acc2, input_precision=PRECISION)
            acc3 = tl.dot(x_tile, w3, acc3, input_precision=PRECISION)

    for i in tl.static_range(ROWS):
        row = tl.load(table_ptr + i)
        out_channel = row * BSR_OUT + offs_n
        mask_n = (offs_n < BSR_OUT) & (out_channel >= 0) & (out_channel < C_OUT)
        if i == 0:
            acc = acc0
        elif i == 1:
            acc = acc1
        elif i == 2:
            acc = acc2
        else:
            acc = acc3
        if HAS_BIAS:
            bias = tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)
            acc += tl.gather(bias, tl.arange(0, BLOCK_N), 0)[None, :]
        store_tile(
            acc,
            y_ptr,
            tile_m,
            m_total,
            out_channel,
            mask_n,
            C_OUT,
            RELU,
            POOL,
            POOL_LOW,
            POOL_HIGH,
            INDEX_64,
            BLOCK_M,
            BLOCK_N,
        )


@lru_cache(maxsize=4096)
def _plan(geometry: Geometry, groups: int, config_items: tuple[tuple[str, int], ...], device: Limits) -> Launch:
    m_total = geometry.output[0]
    c_in = geometry.x_shape[1]
    config = dict(config_items) or shared_input_config(
        m_total,
        geometry.block_rows,
        geometry.block_shape,
        c_in,
        geometry.dtype,
        tensor_cores=geometry.tensor_cores,
        shared_memory=device.shared_memory,
        processors=device.processors,
    )
    tiles_m = cdiv(m_total, config["BLOCK_M"])
    group = group_m(config, c_in, geometry.stride, geometry.dtype.itemsize)
    overlap = device.overlap(tiles_m * groups)
    return Launch(
        bsr_conv2d_fwd_kernel_shared,
        (tiles_m * groups, 1, 1),
        (*geometry.integers(), *grid_integers(tiles_m, groups, group)),
        {
            **geometry.constants(config),
            "OVERLAP": overlap,
            "ROWS": rows_sharing_input(geometry.block_shape[0]),
            **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        },
        launch_options(config, overlap),
    )


def run(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    config: Mapping[str, int] | None,
    device: Limits,
) -> None:
    """Fills y (channels_last) of a checked convolution. The first call on a pattern groups its rows on the host.

    Raises: ValueError where a block row has more than 64 output channels.
    """
    block_out = geometry.block_shape[0]
    if block_out > 64:
        raise ValueError(f"bsr_conv2d: expected block rows of at most 64 outputs to share input, got {block_out}")
    rows = rows_sharing_input(block_out)
    groups = cdiv(geometry.block_rows, rows)
    table, entries = remembered_shared_input(crow_indices, col_indices, rows)
    plan = _plan(geometry, groups, tuple(config.items()) if config else (), device)
    plan(x, values, table, entries, values if bias is None else bias, y)
