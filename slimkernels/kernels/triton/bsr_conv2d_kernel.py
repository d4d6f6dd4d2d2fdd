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

from slimkernels.kernels.triton.tiles import (
    await_last_kernel,
    gather_x,
    grouped_tile,
    main_loop_done,
    row_of_m,
    store_tile,
    tile_rows,
)


@triton.jit
def bsr_conv2d_fwd_kernel(
    x_ptr,
    values_ptr,
    rows_ptr,
    columns_ptr,
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
    ROW_TABLE: tl.constexpr,
    KEEP_IN_L1: tl.constexpr,
    WEIGHTS_ON_M: tl.constexpr,
    SPLITS: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # rows: crow_indices, or with ROW_TABLE (block_rows, 4); columns: col_indices, or with KEEP_IN_L1 (nnz_blocks, 2).
    # With SPLITS y is the workspace (SPLITS, M, C_out), float32.
    tile_m, tile_n = grouped_tile(
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
    SUB_TILES: tl.constexpr = (BSR_OUT + BLOCK_N - 1) // BLOCK_N
    BLOCK: tl.constexpr = BSR_OUT * BSR_IN
    FIELDS: tl.constexpr = 2 if KEEP_IN_L1 else 1
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    row = tile_n // SUB_TILES
    # An order of block rows was compared with the pattern before it came here, so both are older than the last kernel.
    if not ROW_TABLE:
        await_last_kernel(OVERLAP)
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
    # Where a stage is one slice, its place in the row, block and tap are scalars.
    ONE_SLICE: tl.constexpr = SLICE == BLOCK_K
    offs_k = tl.cast(begin, tl.int32)
    if not ONE_SLICE:
        offs_k += tl.arange(0, BLOCK_K)
    offs_n = (tile_n % SUB_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_channel = row * BSR_OUT + offs_n
    mask_n = out_channel < C_OUT
    if BSR_OUT % BLOCK_N != 0:
        mask_n = mask_n & (offs_n < BSR_OUT)
    columns_row_ptr = columns_ptr + first.to(index_type) * FIELDS
    w_row_ptr = values_ptr
    if not KEEP_IN_L1:
        w_row_ptr += first.to(index_type) * BLOCK

    # The column of step t+1 is loaded in step t and carried in a register: loaded where it is used, the gather below
    # becomes indirect and Triton divides its pipeline depth by the levels of indirection; loaded two steps before, it
    # does not pipeline the loop at all.
    entry = offs_k.to(tl.uint32) // BSR_IN * FIELDS
    column = tl.load(columns_row_ptr + entry, mask=offs_k < end, other=0)
    slot = column
    if KEEP_IN_L1:
        slot = tl.load(columns_row_ptr + entry + 1, mask=offs_k < end, other=0)
    # A pointer for every output channel saves an addition a load; an offset is half the registers, which float32 and
    # slices below 16 bytes are short of.
    POINTERS: tl.constexpr = SLICE * values_ptr.dtype.element_ty.primitive_bitwidth >= 128 and (
        values_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    offs_channel = offs_n * BSR_IN
    channel_ptrs = w_row_ptr + offs_channel
    if ROW_TABLE:
        await_last_kernel(OVERLAP)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS and SPLITS == 1:
        bias += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)
        bias = tl.gather(bias, tl.arange(0, BLOCK_N), 0)
    if WEIGHTS_ON_M:
        acc = tl.broadcast_to(bias[:, None], (BLOCK_N, BLOCK_M))
    else:
        acc = tl.broadcast_to(bias[None, :], (BLOCK_M, BLOCK_N))
    # An empty row takes a step of nothing: a loop that is entered in any case needs no second copy of the accumulator.
    for k in range(begin, tl.maximum(end, 1) if SPLITS == 1 else end, BLOCK_K):
        kk = k
        if not ONE_SLICE:
            kk += tl.arange(0, BLOCK_K)
        stored = kk < end
        in_block = (kk.to(tl.uint32) % BSR_IN).to(tl.int32)
        x_tile = gather_x(  # [BLOCK_M, BLOCK_K]
            x_ptr,
            offs_m,
            bits,
            in_h,
            in_w,
            column,
            stored,
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
            KEEP_IN_L1,
            ONE_SLICE,
        )
        if not KEEP_IN_L1:
            slot = (kk.to(tl.uint32) // BSR_IN).to(tl.int32)
        offs_w = slot.to(index_type) * BLOCK + in_block
        if ONE_SLICE:
            w_tile_ptrs = channel_ptrs[None, :] + tl.arange(0, BLOCK_K)[:, None] + tl.multiple_of(offs_w, SLICE)
            mask_w = (stored & (offs_n < BSR_OUT))[None, :]
        else:
            offs_w = tl.multiple_of(tl.max_contiguous(offs_w, SLICE), SLICE)
            mask_w = tl.max_constancy(stored, SLICE)[:, None]
            if BSR_OUT % BLOCK_N != 0:
                mask_w = mask_w & (offs_n < BSR_OUT)[None, :]
            if POINTERS:
                w_tile_ptrs = channel_ptrs[None, :] + offs_w[:, None]
            else:
                w_tile_ptrs = w_row_ptr + (offs_channel[None, :] + offs_w[:, None])
        w_tile = tl.load(w_tile_ptrs, mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]

        next_k = kk + BLOCK_K
        entry = next_k.to(tl.uint32) // BSR_IN * FIELDS
        column = tl.load(columns_row_ptr + entry, mask=next_k < end, other=0)  # [BLOCK_K], or a scalar
        if KEEP_IN_L1:
            slot = tl.load(columns_row_ptr + entry + 1, mask=next_k < end, other=0)
        if WEIGHTS_ON_M:
            acc = tl.dot(tl.trans(w_tile), tl.trans(x_tile), acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        else:
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

    main_loop_done(OVERLAP)
    if WEIGHTS_ON_M:
        acc = tl.trans(acc)
    if SPLITS > 1:
        rows = row_of_m(tile_m, POOL, POOL_LOW, POOL_HIGH, BLOCK_M)
        part_ptr = y_ptr + tl.program_id(1).to(tl.int64) * m_total * C_OUT
        y_tile = part_ptr + rows[:, None] * C_OUT + out_channel[None, :]
        tl.store(y_tile, acc, mask=(rows < m_total)[:, None] & mask_n[None, :])
    else:
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
