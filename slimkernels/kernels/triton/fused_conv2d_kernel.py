"""Dense convolution of few input channels, forward: the first layer of a network, bias, ReLU and pool fused.

    y[n, p, q, o] = epilogue(bias[o] + sum over k of x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[o, k])

with k = (r * S + s) * C_in + c. GEMM view: M = output pixels, N = output channels, K = R*S*C_in (27 of a 3x3 layer on
RGB, 147 of a 7x7 one).

A gathered tile of such an input has no two neighbours that a wide copy could take together. So one thread gathers whole
pixels: it loads the K elements of a pixel one after the other, each at a constant offset from an address that is worked
out once a pixel, under a mask that is worked out once a tap; neighbouring threads hold neighbouring pixels, whose
elements share cache lines. The loads are scalars of a pixel (tensors of one dimension), joined in registers to a row of
K, zeros behind the last.

A program walks over several tiles of pixels and keeps the weights of the first BLOCK_K elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done, store_tile, tile_pixels


@triton.jit
def load_elements(
    x_ptr,
    in_h,
    in_w,
    h,
    w,
    row_stride,
    channel_stride,
    C_IN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    BORDER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Elements FIRST, FIRST + STEP, ... of every pixel's patch, (pixels, COUNT): two halves, joined until one is left.

    x_ptr: of every pixel's tap (0, 0), channel 0, whose coordinates are (in_h, in_w).
    """
    if COUNT > 1:
        even = load_elements(
            x_ptr,
            in_h,
            in_w,
            h,
            w,
            row_stride,
            channel_stride,
            C_IN,
            R,
            S,
            DIL_H,
            DIL_W,
            BORDER,
            CHANNELS_LAST,
            FIRST,
            2 * STEP,
            COUNT // 2,
        )
        odd = load_elements(
            x_ptr,
            in_h,
            in_w,
            h,
            w,
            row_stride,
            channel_stride,
            C_IN,
            R,
            S,
            DIL_H,
            DIL_W,
            BORDER,
            CHANNELS_LAST,
            FIRST + STEP,
            2 * STEP,
            COUNT // 2,
        )
        found = tl.join(even, odd)
        if COUNT > 2:
            found = tl.reshape(found, (in_h.shape[0], COUNT))
    elif FIRST < R * S * C_IN:
        r: tl.constexpr = FIRST // (S * C_IN)
        s: tl.constexpr = FIRST // C_IN % S
        c: tl.constexpr = FIRST % C_IN
        if CHANNELS_LAST:
            address = x_ptr + r * DIL_H * row_stride + (s * DIL_W * C_IN + c)
        else:
            address = x_ptr + (c * channel_stride + r * DIL_H * row_stride) + s * DIL_W
        if BORDER:
            row_inside = (in_h + r * DIL_H).to(tl.uint32) < h
            found = tl.load(address, mask=row_inside & ((in_w + s * DIL_W).to(tl.uint32) < w), other=0.0)
        else:
            found = tl.load(address)
    else:
        found = tl.zeros((in_h.shape[0],), dtype=x_ptr.dtype.element_ty)
    return found


@triton.jit
def load_pixels(
    x_ptr,
    tile,
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
    CHANNELS_LAST: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Elements FIRST to FIRST + BLOCK_K of the patches of a tile's pixels: (BLOCK_M, BLOCK_K), zeros past the last."""
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    image, in_h, in_w = tile_pixels(
        tile,
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
    if CHANNELS_LAST:
        row_stride = w.to(index_type) * C_IN
        channel_stride = row_stride
        offset = ((image * h + in_h) * w + in_w) * C_IN
    else:
        row_stride = w.to(index_type)
        channel_stride = row_stride * h
        offset = image * (channel_stride * C_IN) + in_h * row_stride + in_w
    x_tile = load_elements(
        x_ptr + offset,
        in_h,
        in_w,
        h,
        w,
        row_stride,
        channel_stride,
        C_IN,
        R,
        S,
        DIL_H,
        DIL_W,
        BORDER,
        CHANNELS_LAST,
        FIRST,
        1,
        BLOCK_K,
    )
    stored = FIRST + tl.arange(0, BLOCK_K) < R * S * C_IN
    return tl.where(stored[None, :], x_tile, 0.0)


@triton.jit
def load_weights(
    w_ptr,
    out_channel,
    K: tl.constexpr,
    C_OUT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows FIRST to FIRST + BLOCK_K of the weights (K, C_out), zeros past the last."""
    k = FIRST + tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & (out_channel < C_OUT)[None, :]
    return tl.load(w_ptr + out_channel[None, :] * K + k[:, None], mask=mask, other=0.0)


# Nothing of the code depends on a divisor of the sizes: without a variant for each, a new batch compiles nothing.
_INTEGERS = ("m_total", "h", "w", "p", "p_factor", "p_shift", "q", "q_factor", "q_shift", "tiles_m", "programs")


@triton.jit(do_not_specialize=_INTEGERS)
def fused_conv2d_fwd_kernel(
    x_ptr,
    w_ptr,
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
    programs,
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
    BORDER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    POOL_LOW: tl.constexpr,
    POOL_HIGH: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    BIAS_LAST: tl.constexpr,
):
    """x: channels_last or contiguous; w: (C_out, R, S, C_in); y: channels_last.

    With PREFETCH the next tile's pixels are asked for before this one's are multiplied. BIAS_LAST: the bias is loaded
    and added behind the product of every tile, instead of held in registers, from which the sum then starts.
    """
    K: tl.constexpr = R * S * C_IN
    out_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = out_channel < C_OUT
    await_last_kernel(OVERLAP)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS and not BIAS_LAST:
        bias += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)
    first = tl.program_id(0)
    w_tile = load_weights(w_ptr, out_channel, K, C_OUT, 0, BLOCK_K)  # [BLOCK_K, BLOCK_N]
    if PREFETCH:
        x_tile = load_pixels(
            x_ptr,
            first,
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
            CHANNELS_LAST,
            POOL,
            POOL_LOW,
            POOL_HIGH,
            INDEX_64,
            BLOCK_M,
            0,
            BLOCK_K,
        )
    for done in tl.range(0, tiles_m - first, programs, num_stages=1):
        tile = first + done
        acc = tl.broadcast_to(bias[None, :], (BLOCK_M, BLOCK_N))
        loaded_x_tile = load_pixels(
            x_ptr,
            tile + programs if PREFETCH else tile,
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
            CHANNELS_LAST,
            POOL,
            POOL_LOW,
            POOL_HIGH,
            INDEX_64,
            BLOCK_M,
            0,
            BLOCK_K,
        )
        if not PREFETCH:
            x_tile = loaded_x_tile
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        for part in tl.static_range(1, (K + BLOCK_K - 1) // BLOCK_K):
            part_of_x = load_pixels(
                x_ptr,
                tile,
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
                CHANNELS_LAST,
                POOL,
                POOL_LOW,
                POOL_HIGH,
                INDEX_64,
                BLOCK_M,
                part * BLOCK_K,
                BLOCK_K,
            )
            part_of_w = load_weights(w_ptr, out_channel, K, C_OUT, part * BLOCK_K, BLOCK_K)
            acc = tl.dot(part_of_x, part_of_w, acc, input_precision=PRECISION)
        if HAS_BIAS and BIAS_LAST:
            acc += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        store_tile(
            acc,
            y_ptr,
            tile,
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
        if PREFETCH:
            x_tile = loaded_x_tile
    main_loop_done(OVERLAP)
