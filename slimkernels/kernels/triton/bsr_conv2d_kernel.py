"""Block-sparse convolution, forward, as an implicit GEMM over the stored blocks only.

    y[n, p, q, o] = epilogue(bias[o] + sum over stored blocks (i, j) and k of
                             x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * values[b, o - i*block_out, k])

with block row i = o // block_out, block column j = tap * G + g, tap = r * S + s, c = g * block_in + k < C_in. GEMM
view: M = output pixels (N*P*Q), N = output channels of one block row, K = the row's stored blocks times block_in, in
storage order (tap-major) or in the order of an index pack (`bsr_conv2d_index`).

x is NHWC (channels_last), y is NHWC. One program computes BLOCK_M pixels x BLOCK_N channels of one block row. A K
stage is BLOCK_K / SLICE gathered slices, each SLICE consecutive channels of one tap; SLICE divides both block_in and
C_in, so a slice lies entirely inside one stored block and entirely inside or outside the image's channels: columns
past C_in are never read. Without padding (1x1, or an input that carries its own zero ring) no border mask is compiled;
with at most 31 taps it is one bit a tap, found once a program.

Three kernels are this one with other constants:
* pixels on M: the MMA's M is pixels, its N output channels; a block row of 16 or 32 channels wastes nothing.
* WEIGHTS_ON_M: the MMA's M is output channels and its N pixels, of which 16 suffice: few pixels (small batch, 2x2
  images) fill wgmma's 64 rows with the channels of a tall block instead.
* KEEP_IN_L1: a row's blocks are visited by channel group and then tap, and the copies of x go through L1. The taps of
  one group read the same pixels but for a shift, so with a mask shared by all taps eight of nine reads can hit L1.
  Triton cannot keep the halo tile itself and shift it: it has no view of shared memory at an odd offset, and a
  `tl.gather` of 128 pixels x 16 channels out of 256 becomes 256 shuffles a tap and spills (2296 bytes on sm_80, 232 on
  sm_90; 4 warps, compiled), where two 16-byte copies a thread fetch the same from L1.

SPLITS > 1 gives a tile's stored blocks to several programs; each writes its float32 partial sums to a workspace of its
own, which `bsr_conv2d_split` adds in a fixed order. Backward is not here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.kernels.triton.tiles import TAP_BITS, gather_x, grouped_tile, input_pixel, store_tile, taps_inside


@triton.jit
def bsr_conv2d_fwd_kernel(
    x_ptr,
    values_ptr,
    rows_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    m_total,
    c_in,
    h,
    w,
    c_out,
    p,
    q,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    tiles_m,
    n_tiles,
    group_m,
    R: tl.constexpr,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    ROW_TABLE: tl.constexpr,
    KEEP_IN_L1: tl.constexpr,
    WEIGHTS_ON_M: tl.constexpr,
    SPLITS: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # rows: crow_indices, or with ROW_TABLE (block_rows, 4); columns: col_indices, or with KEEP_IN_L1 (nnz_blocks, 2).
    # With SPLITS y is the workspace (SPLITS, M, C_out), float32.
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, n_tiles, group_m)
    SUB_TILES: tl.constexpr = (BSR_OUT + BLOCK_N - 1) // BLOCK_N
    BLOCK: tl.constexpr = BSR_OUT * BSR_IN
    FIELDS: tl.constexpr = 2 if KEEP_IN_L1 else 1
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    row = tile_n // SUB_TILES
    if ROW_TABLE:
        first = tl.load(rows_ptr + row * 4 + 1)
        end = tl.load(rows_ptr + row * 4 + 2) * BSR_IN
        row = tl.load(rows_ptr + row * 4)
    else:
        first = tl.load(rows_ptr + row)
        end = (tl.load(rows_ptr + row + 1) - first) * BSR_IN
    begin = 0
    if SPLITS > 1:
        share = (end + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
        begin = tl.program_id(1) * share
        end = tl.minimum(end, begin + share)

    m = tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(m, m_total - 1)
    image, in_h, in_w = input_pixel(m, p, q, stride_h, stride_w, pad_h, pad_w, POOL)
    offs_m = tl.multiple_of(((image * h + in_h) * w + in_w) * c_in, SLICE)
    bits = in_h
    if BORDER == TAP_BITS:
        bits = taps_inside(in_h, in_w, h, w, dil_h, dil_w, R, S)
    offs_k = begin + tl.arange(0, BLOCK_K)
    offs_n = (tile_n % SUB_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_row_ptr = columns_ptr + first.to(index_type) * FIELDS
    w_row_ptr = values_ptr
    if not KEEP_IN_L1:
        w_row_ptr += first.to(index_type) * BLOCK

    # The column of step t+1 is loaded in step t and carried in a register: loaded where it is used, the gather below
    # becomes indirect and Triton divides its pipeline depth by the levels of indirection.
    column = tl.load(columns_row_ptr + offs_k // BSR_IN * FIELDS, mask=offs_k < end, other=-1)
    slot = column
    if KEEP_IN_L1:
        slot = tl.load(columns_row_ptr + offs_k // BSR_IN * FIELDS + 1, mask=offs_k < end, other=0)
    if WEIGHTS_ON_M:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        in_block = kk % BSR_IN
        x_tile = gather_x(
            x_ptr, offs_m, bits, in_h, in_w, column, in_block, c_in, h, w, dil_h, dil_w,
            S, GROUPS, BSR_IN, SLICE, BORDER, RAGGED_IN, INDEX_64, KEEP_IN_L1,
        )  # fmt: skip
        offs_w = (slot.to(index_type) if KEEP_IN_L1 else kk // BSR_IN) * BLOCK + in_block
        offs_w = tl.multiple_of(tl.max_contiguous(offs_w, SLICE), SLICE)
        mask_w = tl.max_constancy(kk < end, SLICE)[:, None]
        if BSR_OUT % BLOCK_N != 0:
            mask_w = mask_w & (offs_n < BSR_OUT)[None, :]
        w_tile = tl.load(w_row_ptr + offs_w[:, None] + (offs_n * BSR_IN)[None, :], mask=mask_w, other=0.0)

        next_k = kk + BLOCK_K
        column = tl.load(columns_row_ptr + next_k // BSR_IN * FIELDS, mask=next_k < end, other=-1)
        if KEEP_IN_L1:
            slot = tl.load(columns_row_ptr + next_k // BSR_IN * FIELDS + 1, mask=next_k < end, other=0)
        if WEIGHTS_ON_M:
            acc = tl.dot(tl.trans(w_tile), tl.trans(x_tile), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    if WEIGHTS_ON_M:
        acc = tl.trans(acc)
    out_channel = row * BSR_OUT + offs_n
    mask_n = (offs_n < BSR_OUT) & (out_channel < c_out)
    if SPLITS > 1:
        offs_y = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        part_ptr = y_ptr + tl.program_id(1).to(tl.int64) * m_total * c_out
        y_tile = part_ptr + offs_y[:, None] * c_out + out_channel[None, :]
        tl.store(y_tile, acc, mask=(offs_y < m_total)[:, None] & mask_n[None, :])
    else:
        store_tile(
            acc, y_ptr, bias_ptr, tile_m, m_total, c_out, out_channel, mask_n,
            HAS_BIAS, RELU, POOL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
