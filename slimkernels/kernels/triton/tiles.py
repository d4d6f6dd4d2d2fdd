"""Device functions that the convolution kernels share: program order, pixels and taps of a tile, gather, epilogue.

M counts output pixels (N*P*Q). With POOL the four pixels of a 2x2 window are consecutive in M and (p, q) count windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How border masks are made: not at all, one bit a tap (at most MAX_TAP_BITS taps), by comparing coordinates.
NO_BORDER, TAP_BITS, COMPARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def maximum_nan(a, b):
    """The larger of two, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def grouped_tile(pid, tiles_m, n_tiles, group_m):
    """(tile_m, tile_n) of a program: group_m pixel tiles are a group, walked one tile_n after the other.

    A group's input is meant to fit L2; within it block rows keep their order, longest first where a table gives one.
    """
    in_group = group_m * n_tiles
    first_m = pid // in_group * group_m
    size_m = tl.minimum(tiles_m - first_m, group_m)
    rest = pid % in_group
    return first_m + rest % size_m, rest // size_m


@triton.jit
def input_pixel(m, p, q, stride_h, stride_w, pad_h, pad_w, POOL: tl.constexpr):
    """(image, in_h, in_w): the input pixel under tap (0, 0) of output pixels m, possibly outside the image."""
    if POOL:
        window = m // 4
        out_q = (window % q) * 2 + m % 2
        out_p = (window // q % p) * 2 + m // 2 % 2
        image = window // q // p
    else:
        out_q = m % q
        out_p = m // q % p
        image = m // q // p
    return image, (out_p * stride_h - pad_h).to(tl.int32), (out_q * stride_w - pad_w).to(tl.int32)


@triton.jit
def taps_inside(in_h, in_w, h, w, dil_h, dil_w, R: tl.constexpr, S: tl.constexpr):
    """Bit r * S + s of a pixel is set where tap (r, s) lies inside the image; needs R * S <= MAX_TAP_BITS."""
    columns = tl.zeros_like(in_w)
    for s in tl.static_range(S):
        columns |= tl.where((in_w + s * dil_w).to(tl.uint32) < w, 1 << s, 0)
    bits = tl.zeros_like(in_h)
    for r in tl.static_range(R):
        bits |= tl.where((in_h + r * dil_h).to(tl.uint32) < h, columns << (r * S), 0)
    return bits


@triton.jit
def gather_x(
    x_ptr,
    offs_m,
    bits,
    in_h,
    in_w,
    column,
    in_block,
    c_in,
    h,
    w,
    dil_h,
    dil_w,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    INDEX_64: tl.constexpr,
    KEEP_IN_L1: tl.constexpr,
):
    """The input tile (BLOCK_M, BLOCK_K) of block columns `column` (-1: none), `in_block` the channel inside a block.

    A column's tap and channel are decoded by constant divisors: a table of element offsets saves 10 of the mainloop's
    133 instructions (sm_90, 128 x 128 x 64) for a second load a step and a table per image size. The masks cost 16
    of them as one bit a tap, 47 as four comparisons.
    """
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    tap = column // GROUPS
    channel = (column - tap * GROUPS) * BSR_IN + in_block
    row = tap // S
    tap_h = row * dil_h
    tap_w = (tap - row * S) * dil_w
    offs_x = (tap_h.to(index_type) * w + tap_w) * c_in + channel
    offs_x = tl.multiple_of(tl.max_contiguous(offs_x, SLICE), SLICE)
    stored = column >= 0
    if RAGGED_IN:
        stored = stored & (channel < c_in)
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
    if KEEP_IN_L1:
        x_tile = tl.load(x_ptr + offs_m[:, None] + offs_x[None, :], mask=mask, other=0.0, cache_modifier=".ca")
    else:
        x_tile = tl.load(x_ptr + offs_m[:, None] + offs_x[None, :], mask=mask, other=0.0)
    return x_tile


@triton.jit
def store_tile(
    acc,
    y_ptr,
    bias_ptr,
    tile_m,
    m_total,
    c_out,
    out_channel,
    mask_n,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, ReLU and 2x2 max-pool of an accumulator (BLOCK_M, BLOCK_N), then the store in y's dtype."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)
    if POOL:
        acc = tl.reduce(tl.reshape(acc, (BLOCK_M // 4, 4, BLOCK_N)), 1, maximum_nan)
        offs_y = tile_m.to(tl.int64) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        mask_y = offs_y < m_total // 4
    else:
        offs_y = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_y = offs_y < m_total
    y_tile = y_ptr + offs_y[:, None] * c_out + out_channel[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mask_y[:, None] & mask_n[None, :])
