"""Input gradient of the block-sparse convolution: an implicit GEMM over the transposed index, weights read in place.

    dx[n, h, w, c] = sum over taps (r, s), block rows i and outputs o of
                     dy[n, (h + pad - r*dil) / stride, (w + pad - s*dil) / stride, o] * values[b(i, tap, g), o, c]

over the stored blocks b of the channel group g of c, where both quotients are whole and inside the output. GEMM view:
M = input pixels of one residue class ``(h + pad, w + pad) mod stride`` (`slimkernels.kernels.transposed`), N = channels
of one group, K = the stored blocks of that group and class times block_out. Within a class the quotient is
``(h + pad) // stride - r*dil // stride``, so any stride runs as stride 1 and nothing is multiplied by inserted zeros.

dy and dx are NHWC (channels_last). The arithmetic intensity is ``BLOCK_M * block_in / (BLOCK_M + block_in)`` FLOP a
byte (N is block_in here as it is block_out in the forward direction), so narrow blocks are bound by L2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.transposed import split_index, transpose_index
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import (
    INT32_MAX,
    SHARED_MEMORY_SM80,
    Limits,
    cdiv,
    gradient_precision,
    interpreted_dtype,
    limits,
    next_power_of_2,
    power_of_2_divisor,
)
from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done

# A pixel's taps inside the output are the bits of one int32.
MAX_TAP_BITS = 31
MAX_BLOCK_M = 128


@triton.jit
def bsr_conv2d_bwd_x_kernel(
    dy_ptr,
    values_ptr,
    crow_ptr,
    block_ptr,
    col_ptr,
    dx_ptr,
    images,
    c_in,
    h,
    w,
    c_out,
    p,
    q,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    n_tiles,
    m_tiles,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    ALIGN_IN: tl.constexpr,
    TAP_BITS: tl.constexpr,
    RAGGED_OUT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    await_last_kernel(OVERLAP)
    # Programs of one pixel tile are neighbours: they read the same part of dy, from L2 after the first.
    tile_n = tl.program_id(0) % n_tiles
    tile_m = tl.program_id(0) // n_tiles % m_tiles
    kind = tl.program_id(0) // n_tiles // m_tiles
    SUB_TILES: tl.constexpr = (BSR_IN + BLOCK_N - 1) // BLOCK_N
    group = tile_n // SUB_TILES
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32

    # Rows h = first_h, first_h + stride, ... are those of the class, and (h + pad) // stride = start_h + their number.
    kind_h = kind // STRIDE_W
    kind_w = kind % STRIDE_W
    first_h = (kind_h + STRIDE_H - pad_h % STRIDE_H) % STRIDE_H
    first_w = (kind_w + STRIDE_W - pad_w % STRIDE_W) % STRIDE_W
    rows = (h - first_h + STRIDE_H - 1) // STRIDE_H
    columns = (w - first_w + STRIDE_W - 1) // STRIDE_W
    # An argument that is 1 arrives as a constant, which has no method `to`.
    m_total = tl.cast(images, index_type) * rows * columns
    start_m = tile_m.to(index_type) * BLOCK_M
    if start_m >= m_total:
        return
    m = tl.minimum(start_m + tl.arange(0, BLOCK_M), m_total - 1)
    m_w = (m % columns).to(tl.int32)
    m_h = (m // columns % rows).to(tl.int32)
    image = m // columns // rows
    out_h = m_h + (first_h + pad_h) // STRIDE_H
    out_w = m_w + (first_w + pad_w) // STRIDE_W
    offs_m = tl.multiple_of(((image * p + out_h) * q + out_w) * c_out, SLICE)

    # Bit r * S + s of a pixel: tap (r, s) leads to an output inside the image. With one bit a tap the mainloop has 176
    # instructions, with comparisons 240 (sm_90, 128 x 32 x 64; 165 with ONE_BLOCK). A 1x1 weight needs neither.
    if TAP_BITS:
        bits = tl.zeros((BLOCK_M,), dtype=tl.int32)
        bits_w = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for s in tl.static_range(S):
            bits_w |= tl.where((out_w - s * dil_w // STRIDE_W).to(tl.uint32) < q, 1 << s, 0)
        for r in tl.static_range(R):
            bits |= tl.where((out_h - r * dil_h // STRIDE_H).to(tl.uint32) < p, bits_w << (r * S), 0)

    list_index = group * (STRIDE_H * STRIDE_W) + kind
    first = tl.load(crow_ptr + list_index)
    count = (tl.load(crow_ptr + list_index + 1) - first) * BSR_OUT
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = (tile_n % SUB_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)

    # The entries of step t+1 are loaded in step t and carried in registers: loaded where they are used, the gathers
    # below become indirect and Triton divides its pipeline depth by the levels of indirection.
    # A step that lies in one block carries one entry instead of BLOCK_K.
    ONE_BLOCK: tl.constexpr = BSR_OUT % BLOCK_K == 0
    # Equal values need no hint, and Triton 3.9 fails on one that it moves to the scalar behind them.
    HINTED: tl.constexpr = RAGGED_OUT or not ONE_BLOCK
    lane = 0 if ONE_BLOCK else offs_k
    next_column = tl.load(col_ptr + first + lane // BSR_OUT, mask=lane < count, other=-1)
    next_block = tl.load(block_ptr + first + lane // BSR_OUT, mask=lane < count, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, count, BLOCK_K):
        column, block = next_column, next_block
        if ONE_BLOCK:
            column = tl.full((BLOCK_K,), 0, tl.int32) + column
            block = tl.full((BLOCK_K,), 0, tl.int32) + block
        tap = column // BLOCK_ROWS
        in_block = (k + offs_k) % BSR_OUT
        channel = (column - tap * BLOCK_ROWS) * BSR_OUT + in_block
        back_h = tap // S * dil_h // STRIDE_H
        back_w = (tap - tap // S * S) * dil_w // STRIDE_W
        offs_y = channel - (back_h.to(index_type) * q + back_w) * c_out
        offs_y = tl.multiple_of(tl.max_contiguous(offs_y, SLICE), SLICE)
        stored = column >= 0
        if RAGGED_OUT:
            stored = stored & (channel < c_out)
        if TAP_BITS:
            tap_bit = tl.where(stored, 1 << tap, 0)
            if HINTED:
                tap_bit = tl.max_constancy(tap_bit, SLICE)
            mask_y = (bits[:, None] & tap_bit[None, :]) != 0
            if HINTED:
                mask_y = tl.max_constancy(mask_y, [1, SLICE])
        else:
            mask_y = tl.max_constancy(stored, SLICE)[None, :] if HINTED else stored[None, :]
            if R * S > 1:
                row_inside = (out_h[:, None] - back_h[None, :]).to(tl.uint32) < p
                mask_y = mask_y & row_inside & ((out_w[:, None] - back_w[None, :]).to(tl.uint32) < q)
            if HINTED:
                mask_y = tl.max_constancy(mask_y, [1, SLICE])
        dy_tile = tl.load(dy_ptr + offs_m[:, None] + offs_y[None, :], mask=mask_y, other=0.0)  # [BLOCK_M, BLOCK_K]

        offs_w = tl.multiple_of(block.to(index_type) * (BSR_OUT * BSR_IN) + in_block * BSR_IN, ALIGN_IN)
        mask_w = (column >= 0)[:, None]
        if BSR_IN % BLOCK_N != 0:
            mask_w = mask_w & (offs_n < BSR_IN)[None, :]
            mask_w = tl.max_constancy(mask_w, [1, ALIGN_IN])
        w_tile = tl.load(values_ptr + offs_w[:, None] + offs_n[None, :], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]

        next_k = k + BLOCK_K + lane
        next_column = tl.load(col_ptr + first + next_k // BSR_OUT, mask=next_k < count, other=-1)
        next_block = tl.load(block_ptr + first + next_k // BSR_OUT, mask=next_k < count, other=0)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    main_loop_done(OVERLAP)

    channel_in = group * BSR_IN + offs_n
    mask_n = (offs_n < BSR_IN) & (channel_in < c_in)
    in_h = first_h + m_h * STRIDE_H
    in_w = first_w + m_w * STRIDE_W
    offs_dx = ((image * h + in_h) * w + in_w) * c_in
    mask_m = start_m + tl.arange(0, BLOCK_M) < m_total
    dx_tile = dx_ptr + offs_dx[:, None] + channel_in[None, :]
    tl.store(dx_tile, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def default_config(
    m_total: int,
    groups: int,
    block_shape: Sequence[int],
    c_out: int,
    dtype: torch.dtype,
    *,
    tensor_cores: bool = True,
    index_64: bool = False,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> dict[str, int]:
    """Tile constants for one input gradient, by arithmetic (nothing here is measured on a GPU).

    Args: m_total input pixels of one class; groups channel groups times classes; c_out output channels; tensor_cores
    False for IEEE float32; index_64 addresses of 64 bits; shared_memory bytes one block may use; processors the number
    of SMs to keep busy.
    Returns: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """
    block_out, block_in = block_shape
    block_n = min(max(next_power_of_2(block_in), 16), 128)
    block_k = 64 if dtype.itemsize == 2 else 32
    slice_bytes = min(power_of_2_divisor(c_out, 16), power_of_2_divisor(block_out, 16)) * dtype.itemsize
    if not tensor_cores:
        # FMA units take both operands from registers: on 4 warps a 64 x 64 tile at K = 16 spills on sm_80 and sm_100.
        block_m, block_n, block_k, stages = 64, min(block_n, 64), 16, 3
        warps = 8 if block_n == 64 else 4
    elif slice_bytes < 16:
        # Slices below 16 bytes are gathered element by element into registers.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 32, 4, 3
    else:
        # Twice the registers for addresses: four warps would spill at 128 x 32.
        # Three stages leave room for one more program a processor: on an H200 5% to 16% faster than four.
        block_m, warps, stages = MAX_BLOCK_M, 8 if block_n == 128 or index_64 else 4, 3
    floor = min(64, max(16, next_power_of_2(m_total)))
    tiles_n = groups * cdiv(block_in, block_n)
    while block_m > floor and (block_m >= 2 * m_total or cdiv(m_total, block_m) * tiles_n < processors):
        block_m //= 2
    if block_m < (128 if tensor_cores else 64):
        warps = 4
    while stages > 2 and stages * (block_m + block_n) * block_k * dtype.itemsize > shared_memory:
        stages -= 1
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


class _Geometry(NamedTuple):
    """What a launch depends on beside the pointers and the device."""

    grad_shape: tuple[int, int, int, int]
    image: tuple[int, int]
    weight_shape: tuple[int, int, int, int]
    values_shape: tuple[int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    precision: str


@lru_cache(maxsize=4096)
def _plan(g: _Geometry, config_items: tuple[tuple[str, int], ...], device: Limits) -> Launch:
    (n, c_out, p, q), (h, w) = g.grad_shape, g.image
    (_, c_in, r, s), (capacity, block_out, block_in) = g.weight_shape, g.values_shape
    block_rows, groups, classes = cdiv(c_out, block_out), cdiv(c_in, block_in), g.stride[0] * g.stride[1]
    m_largest = n * cdiv(h, g.stride[0]) * cdiv(w, g.stride[1])
    elements = max(n * c_out * p * q, n * c_in * h * w, capacity * block_out * block_in)
    config = dict(config_items)
    index_64 = elements + (MAX_BLOCK_M + p * q) * c_out > INT32_MAX or bool(config.get("INDEX_64", False))
    config = config or default_config(
        m_largest,
        groups * classes,
        (block_out, block_in),
        c_out,
        g.dtype,
        tensor_cores=g.dtype != torch.float32 or g.precision == "tf32",
        index_64=index_64,
        shared_memory=device.shared_memory,
        processors=device.processors,
    )
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    n_tiles, m_tiles = groups * cdiv(block_in, block_n), cdiv(m_largest, block_m)
    programs = n_tiles * m_tiles * classes
    overlap = device.overlap(programs)
    return Launch(
        bsr_conv2d_bwd_x_kernel,
        (programs, 1, 1),
        (n, c_in, h, w, c_out, p, q, *g.padding, *g.dilation, n_tiles, m_tiles),
        {
            "STRIDE_H": g.stride[0],
            "STRIDE_W": g.stride[1],
            "R": r,
            "S": s,
            "BLOCK_ROWS": block_rows,
            "BSR_OUT": block_out,
            "BSR_IN": block_in,
            "SLICE": min(power_of_2_divisor(block_out, block_k), power_of_2_divisor(c_out, block_k)),
            "ALIGN_IN": power_of_2_divisor(block_in, 16),
            "TAP_BITS": 1 < r * s <= MAX_TAP_BITS,
            "RAGGED_OUT": c_out % block_out != 0,
            "INDEX_64": index_64,
            "PRECISION": g.precision,
            "OVERLAP": overlap,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        launch_options(config, overlap),
    )


def launch(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """dx of `bsr_conv2d` before its epilogue, channels_last, in grad's dtype with float32 accumulation.

    Args:
        grad: (N, C_out, P, Q) float32 | float16 | bfloat16; read as channels_last (converted when it is not).
        values: (capacity, block_out, block_in) in grad's dtype; crow_indices, col_indices: int32.
        transposed: `transpose_index` of the pattern at this stride and dilation; None builds it here.
        image: (H, W) of the input.
        weight_shape: (C_out, C_in, R, S).
        config: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages; None takes `default_config`. INDEX_64=1 forces 64-bit
            addresses, which are otherwise used from 2^31 elements on.

    Deterministic: one program sums one tile in a fixed order. float32 multiplies in IEEE precision unless torch's
    switch says "tf32" (that of convolutions; that of matrix products for a linear layer, R = S = H = W = 1).
    """
    c_in, r, s = weight_shape[1:]
    h, w = image
    dtype = grad.dtype
    compute = interpreted_dtype(dtype)
    dx = torch.empty((grad.shape[0], c_in, h, w), dtype=compute, device=grad.device, memory_format=torch.channels_last)
    if dx.numel() == 0:
        return dx.to(dtype)
    if grad.numel() == 0:
        return dx.zero_().to(dtype)
    grad = grad.to(compute).contiguous(memory_format=torch.channels_last)
    values = values.to(compute).contiguous()
    if transposed is None:
        transposed = transpose_index(crow_indices, col_indices, weight_shape, block_shape, stride, dilation)
    lists = split_index(transposed, values.shape[0], weight_shape, block_shape, stride)
    geometry = _Geometry(
        tuple(grad.shape),
        (h, w),
        tuple(weight_shape),
        tuple(values.shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        compute,
        gradient_precision((r, s, h, w)),
    )  # type: ignore[arg-type]  # tuples have the right length, which their types do not say
    plan = _plan(geometry, tuple(config.items()) if config else (), limits(grad.get_device()))
    plan(grad, values, *lists, dx)
    return dx.to(dtype)
