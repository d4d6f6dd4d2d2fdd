"""Device functions that the convolution kernels share: program order, pixels and taps of a tile, gather, epilogue.

M counts output pixels (N*P*Q). With POOL it counts those of whole 2x2 windows, (p, q) count windows, and a tile's rows
are the four pixels of BLOCK_M / 4 windows in the order of `window_of_row`.

Every instruction outside the main loop counts here: a pruned layer's loop takes 2 to 9 steps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# How border masks are made: not at all, one bit a tap (at most MAX_TAP_BITS taps), by comparing coordinates.
NO_BORDER, TAP_BITS, COMPARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# When a kernel lets the next one of its stream begin (programmatic dependent launch, from Hopper on): never, as soon as
# it begins itself, or once its main loop is done. What has begun finds its place and its blocks and then waits.
NO_OVERLAP, EARLY, LATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def await_last_kernel(OVERLAP: tl.constexpr):
    """Waits until the kernel in front of this one has ended and its results can be read.

    Every program must come here before it reads what a kernel may just have written, and before it writes: the memory
    may be one that the kernel in front still reads. A program that did not would also let a third kernel overtake it.
    """
    if OVERLAP != NO_OVERLAP:
        gdc_wait()
    if OVERLAP == EARLY:
        gdc_launch_dependents()


@triton.jit
def main_loop_done(OVERLAP: tl.constexpr):
    """Where the next kernel may begin when it begins late."""
    if OVERLAP == LATE:
        gdc_launch_dependents()


@triton.jit
def maximum_nan(a, b):
    """The larger of two, NaN where either is: one instruction, as a ReLU none behind which a conversion follows."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(n, factor, shift):
    """n // divisor for n below 2^31: three instructions, where a division by an argument is twelve.

    factor and shift: `runtime.division` of the divisor. As a constant it would compile a kernel for each image size.
    """
    return (tl.umulhi(n.to(tl.uint32) << 1, tl.cast(factor, tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def grouped_tile(
    pid, tiles_m, n_tiles, group_m, all_factor, all_shift, group_factor, group_shift, last_factor, last_shift
):
    """(tile_m, tile_n) of a program: group_m pixel tiles are a group, walked one tile_n after the other.

    A group's input is meant to fit L2; within it block rows keep their order, longest first where a table gives one.
    The factors and shifts divide by the programs of a group, by group_m, and by the pixel tiles of the last group.
    """
    first_m = divide(pid, all_factor, all_shift) * group_m
    rest = pid - first_m * n_tiles
    is_last = first_m + group_m >= tiles_m
    size_m = tl.where(is_last, tiles_m - first_m, group_m)
    factor = tl.where(is_last, last_factor, group_factor)
    tile_n = divide(rest, factor, tl.where(is_last, last_shift, group_shift))
    return first_m + rest - tile_n * size_m, tile_n


@triton.jit
def window_of_row(BLOCK_M: tl.constexpr, POOL_LOW: tl.constexpr, POOL_HIGH: tl.constexpr):
    """(window, dp, dq) of a tile's rows under POOL: row i is pixel (dp, dq) of a 2x2 window of the tile.

    dq and dp are the bits POOL_LOW < POOL_HIGH of i, the window its other bits. They are chosen (`pool_bits`) so that
    one thread's part of the accumulator holds all four pixels of a window, and their maximum needs no other thread.
    """
    i = tl.arange(0, BLOCK_M)
    LOW: tl.constexpr = 1 << POOL_LOW
    HIGH: tl.constexpr = 1 << POOL_HIGH
    BETWEEN: tl.constexpr = HIGH // (2 * LOW)
    window = (i // (2 * HIGH) * BETWEEN + i // (2 * LOW) % BETWEEN) * LOW + i % LOW
    return window, i // HIGH % 2, i // LOW % 2


@triton.jit
def row_of_m(tile_m, POOL: tl.constexpr, POOL_LOW: tl.constexpr, POOL_HIGH: tl.constexpr, BLOCK_M: tl.constexpr):
    """The number in M of every row of a tile: a window's four pixels are consecutive in M."""
    if POOL:
        window, dp, dq = window_of_row(BLOCK_M, POOL_LOW, POOL_HIGH)
        rows = window * 4 + dp * 2 + dq
    else:
        rows = tl.arange(0, BLOCK_M)
    return tile_m.to(tl.int64) * BLOCK_M + rows


@triton.jit
def tile_pixels(
    tile_m,
    m_total,
    p,
    p_factor,
    p_shift,
    q,
    q_factor,
    q_shift,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(image, in_h, in_w) of a tile's rows: the image, and its input pixel under tap (0, 0)."""
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    if POOL:
        window, dp, dq = window_of_row(BLOCK_M, POOL_LOW, POOL_HIGH)
        pixel = tl.minimum(tile_m.to(index_type) * (BLOCK_M // 4) + window, m_total // 4 - 1)
    else:
        pixel = tl.minimum(tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M), m_total - 1)
    if INDEX_64:
        line = pixel // q
        image = line // p
    else:
        line = divide(pixel, q_factor, q_shift)
        image = divide(line, p_factor, p_shift)
    out_p = (line - image * p).to(tl.int32)
    out_q = (pixel - line * q).to(tl.int32)
    if POOL:
        out_p = out_p * 2 + dp
        out_q = out_q * 2 + dq
    in_h = out_p * STRIDE_H - PAD_H
    in_w = out_q * STRIDE_W - PAD_W
    return image, in_h, in_w


@triton.jit
def tile_rows(
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
    C_IN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    BORDER: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(offs_m, bits, in_h, in_w) of a tile's rows: element offset, taps inside, and input pixel under tap (0, 0)."""
    image, in_h, in_w = tile_pixels(
        tile_m,
        m_total,
        p,
        p_factor,
        p_shift,
        q,
        q_factor,
        q_shift,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        POOL,
        POOL_LOW,
        POOL_HIGH,
        INDEX_64,
        BLOCK_M,
    )
    # One thread works out a row and hands it to those that load parts of it: left to itself, Triton lets each of them
    # (8 a row in a tile of 64 channels) work it out again.
    rows = tl.arange(0, BLOCK_M)
    offs_m = tl.gather((image * h + in_h) * w + in_w, rows, 0) * C_IN
    bits = in_h
    if BORDER == TAP_BITS:
        bits = tl.gather(taps_inside(in_h, in_w, h, w, R, S, DIL_H, DIL_W), rows, 0)
    if BORDER == COMPARE:
        in_h = tl.gather(in_h, rows, 0)
        in_w = tl.gather(in_w, rows, 0)
    return offs_m, bits, in_h, in_w


@triton.jit
def taps_inside(in_h, in_w, h, w, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr):
    """Bit r * S + s of a pixel is set where tap (r, s) lies inside the image; needs R * S <= MAX_TAP_BITS."""
    columns = tl.zeros_like(in_w)
    for s in tl.static_range(S):
        columns |= tl.where((in_w + s * DIL_W).to(tl.uint32) < w, 1 << s, 0)
    rows = tl.zeros_like(in_h)
    for r in tl.static_range(R):
        rows |= tl.where((in_h + r * DIL_H).to(tl.uint32) < h, 1 << (r * S), 0)
    # A copy of the columns for every row of taps that is inside.
    return rows * columns


@triton.jit
def gather_x(
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
    C_IN: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    INDEX_64: tl.constexpr,
    KEEP_IN_L1: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """The input tile (BLOCK_M, BLOCK_K) of block columns `column`, 0 where not `stored`; `in_block` a block's channel.

    With ONE_SLICE the stage is SLICE consecutive channels of one tap: column, stored and in_block, the first channel's,
    are scalars. Otherwise each is a vector of BLOCK_K.

    A column's tap and channel are decoded by constant divisors: a table of element offsets saves 10 instructions of the
    main loop (sm_90, 128 x 128 x 64) for a second load a step and a table per image size. The masks cost 16 as one bit
    a tap, 47 as four comparisons. Columns are unsigned, as signed divisions by constants take two instructions more.
    """
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    tap = (column.to(tl.uint32) // GROUPS).to(tl.int32)
    channel = (column - tap * GROUPS) * BSR_IN + in_block
    row = (tap.to(tl.uint32) // S).to(tl.int32)
    tap_h = row * DIL_H
    tap_w = (tap - row * S) * DIL_W
    offs_x = (tap_h.to(index_type) * w + tap_w) * C_IN + channel
    if RAGGED_IN:
        stored = stored & (channel < C_IN)
    if ONE_SLICE:
        inside = bits == bits
        if BORDER == TAP_BITS:
            inside = (bits & (1 << tap)) != 0
        elif BORDER == COMPARE:
            inside = ((in_h + tap_h).to(tl.uint32) < h) & ((in_w + tap_w).to(tl.uint32) < w)
        mask = (inside & stored)[:, None]
        # The sum of the first two terms stays the same from stage to stage.
        x_ptrs = (x_ptr + offs_m)[:, None] + tl.arange(0, SLICE)[None, :] + tl.multiple_of(offs_x, SLICE)
    else:
        offs_x = tl.multiple_of(tl.max_contiguous(offs_x, SLICE), SLICE)
        if BORDER == TAP_BITS:
            tap_bit = tl.max_constancy(tl.where(stored, 1 << tap, 0), SLICE)
            mask = (bits[:, None] & tap_bit[None, :]) != 0
            mask = tl.max_constancy(mask, [1, SLICE])
        else:
            mask = tl.max_constancy(stored, SLICE)[None, :]
            if BORDER == COMPARE:
                row_inside = (in_h[:, None] + tap_h[None, :]).to(tl.uint32) < h
                mask = mask & row_inside & ((in_w[:, None] + tap_w[None, :]).to(tl.uint32) < w)
                mask = tl.max_constancy(mask, [1, SLICE])
        x_ptrs = (x_ptr + offs_m)[:, None] + offs_x[None, :]
    if KEEP_IN_L1:
        x_tile = tl.load(x_ptrs, mask=mask, other=0.0, cache_modifier=".ca")
    else:
        x_tile = tl.load(x_ptrs, mask=mask, other=0.0)
    return x_tile


@triton.jit
def store_tile(
    acc,
    y_ptr,
    tile_m,
    m_total,
    out_channel,
    mask_n,
    C_OUT: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """2x2 max-pool and ReLU of an accumulator (BLOCK_M, BLOCK_N), then the store in y's dtype.

    The accumulator started from the bias. The maximum comes first: ReLU keeps the order, and runs on a quarter then.
    """
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    ROWS: tl.constexpr = BLOCK_M // 4 if POOL else BLOCK_M
    rows_left = m_total - tile_m.to(index_type) * BLOCK_M
    if POOL:
        HIGH: tl.constexpr = 1 << POOL_HIGH
        LOW: tl.constexpr = 1 << POOL_LOW
        acc = tl.reshape(acc, (BLOCK_M // (2 * HIGH), 2, HIGH // (2 * LOW), 2, LOW, BLOCK_N))
        acc = tl.reduce(tl.reduce(acc, 3, maximum_nan), 1, maximum_nan)
        acc = tl.reshape(acc, (ROWS, BLOCK_N))
        rows_left = rows_left // 4
    if RELU:
        acc = maximum_nan(acc, 0.0)
    row = tl.arange(0, ROWS)
    y_ptr += tile_m.to(tl.int64) * (ROWS * C_OUT)
    y_tile = (y_ptr + out_channel)[None, :] + (row * C_OUT)[:, None]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(row < rows_left)[:, None] & mask_n[None, :])
