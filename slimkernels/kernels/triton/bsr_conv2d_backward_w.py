"""Weight gradient of the block-sparse convolution, for the stored blocks only (a sampled dense-dense product).

    dvalues[b, o, c] = sum over output pixels (n, p, q) of
                       dy[n, p, q, i*block_out + o] *
                       x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, g*block_in + c]

for every stored block b = (i, tap (r, s), g). GEMM view: M = columns of one block row, its stored blocks side by side,
``flat = (b - first block of the row) * block_in + c``; N = the block row's output channels; K = output pixels. One
program computes BLOCK_M such columns, so one tile of dy serves BLOCK_M / block_in blocks and the arithmetic intensity
is that of the forward direction.

The pixels are cut into SPLITS ranges; each writes its partial sums to its own slice of a float32 workspace, which
`sums.add_partials` then reduces: a fixed order, no atomics. The grid depends on the capacity of ``values`` and the
number of block rows alone, never on the pattern, and each program finds its block row from ``crow_indices``: nothing is
read back from the device, and a captured CUDA graph stays right when the pattern changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from slimkernels.kernels.triton.sums import add_partials
from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done

# The workspace holds at most this many float32 copies of the values, and each copy sums at least this many K steps.
MAX_SPLITS, MIN_STEPS = 128, 8


@triton.jit
def bsr_conv2d_bwd_w_kernel(
    dy_ptr,
    x_ptr,
    crow_ptr,
    col_ptr,
    out_ptr,
    m_total,
    split_pixels,
    out_stride,
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
    step_n,
    step_p,
    step_q,
    block_rows,
    column_tiles,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    HAS_BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_TILE: tl.constexpr,
):
    await_last_kernel(OVERLAP)
    SUB_TILES: tl.constexpr = (BSR_OUT + BLOCK_N - 1) // BLOCK_N
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    # Programs of one range of pixels are neighbours: they share dy and x in L2.
    tile = tl.program_id(0) % column_tiles
    tile_n = tl.program_id(0) // column_tiles % SUB_TILES
    split = tl.program_id(0) // column_tiles // SUB_TILES

    # The block row of this tile of columns: rows before it hold `before` tiles.
    row = 0
    before = 0
    seen = 0
    for start in range(0, block_rows, ROWS_TILE):
        rows = start + tl.arange(0, ROWS_TILE)
        inside = rows < block_rows
        stored = tl.load(crow_ptr + rows + 1, mask=inside, other=0) - tl.load(crow_ptr + rows, mask=inside, other=0)
        tiles = (stored * BSR_IN + BLOCK_M - 1) // BLOCK_M
        passed = (seen + tl.cumsum(tiles, 0) <= tile) & inside
        row += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, tiles, 0), 0)
        seen += tl.sum(tiles, 0)
    if row >= block_rows:
        return

    # Stored columns, counted over all rows: the row's first would be one more number to keep through the loop.
    start_m = tl.load(crow_ptr + row).to(index_type) * BSR_IN + (tile - before) * BLOCK_M
    end_m = tl.load(crow_ptr + row + 1).to(index_type) * BSR_IN
    flat = start_m + tl.arange(0, BLOCK_M)
    stored_m = flat < end_m
    column = tl.load(col_ptr + flat // BSR_IN, mask=stored_m, other=0)
    tap = column // GROUPS
    channel = (column - tap * GROUPS) * BSR_IN + (flat % BSR_IN).to(tl.int32)
    tap_h = tap // S * dil_h
    tap_w = (tap - tap // S * S) * dil_w
    if RAGGED_IN:
        stored_m = stored_m & (channel < c_in)
    stored_m = tl.max_constancy(stored_m, SLICE)
    offs_x = (tap_h.to(index_type) * w + tap_w) * c_in + channel
    offs_x = tl.multiple_of(tl.max_contiguous(offs_x, SLICE), SLICE)

    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_channel = row * BSR_OUT + offs_n
    out_channel = tl.multiple_of(tl.max_contiguous(out_channel, ALIGN_OUT), ALIGN_OUT)
    mask_n = tl.max_constancy((offs_n < BSR_OUT) & (out_channel < c_out), ALIGN_OUT)

    # Pixel k is (image, out_h, out_w); a step adds (step_n, step_p, step_q) with carries instead of dividing again.
    begin = split.to(index_type) * split_pixels
    end = tl.minimum(begin + split_pixels, m_total)
    pixel = begin + tl.arange(0, BLOCK_K)
    out_w = (pixel % q).to(tl.int32)
    out_h = (pixel // q % p).to(tl.int32)
    image = pixel // q // p
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(begin, end, BLOCK_K):
        in_h = out_h * stride_h - pad_h
        in_w = out_w * stride_w - pad_w
        offs_k = tl.multiple_of(((image * h + in_h) * w + in_w) * c_in, SLICE)
        mask_k = pixel < end
        mask_x = stored_m[:, None] & mask_k[None, :]
        if HAS_BORDER:
            row_inside = (tap_h[:, None] + in_h[None, :]).to(tl.uint32) < h
            mask_x = mask_x & row_inside & ((tap_w[:, None] + in_w[None, :]).to(tl.uint32) < w)
        mask_x = tl.max_constancy(mask_x, [SLICE, 1])
        x_tile = tl.load(x_ptr + offs_x[:, None] + offs_k[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        offs_y = tl.multiple_of(pixel * c_out, ALIGN_OUT)
        mask_y = tl.max_constancy(mask_k[:, None] & mask_n[None, :], [1, ALIGN_OUT])
        dy_tile = tl.load(dy_ptr + offs_y[:, None] + out_channel[None, :], mask=mask_y, other=0.0)  # [BLOCK_K, BLOCK_N]

        out_w += step_q
        carry = out_w >= q
        out_w = tl.where(carry, out_w - q, out_w)
        out_h += step_p + carry.to(tl.int32)
        carry = out_h >= p
        out_h = tl.where(carry, out_h - p, out_h)
        image += step_n + carry.to(tl.int32)
        pixel += BLOCK_K
        acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    main_loop_done(OVERLAP)

    offs_v = (flat // BSR_IN).to(tl.int64) * (BSR_OUT * BSR_IN) + flat % BSR_IN
    out_tile = out_ptr + split.to(tl.int64) * out_stride + offs_v[:, None] + (offs_n * BSR_IN)[None, :]
    mask = (flat < end_m)[:, None] & (offs_n < BSR_OUT)[None, :]
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=mask)


def default_config(
    m_total: int,
    capacity: int,
    block_rows: int,
    block_shape: Sequence[int],
    channels: Sequence[int],
    dtype: torch.dtype,
    *,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> dict[str, int]:
    """Tile constants for one weight gradient, by arithmetic (nothing here is measured on a GPU).

    Args: m_total output pixels; capacity blocks of ``values``; channels (C_out, C_in); tensor_cores False for IEEE
    float32; shared_memory bytes one block may use; processors the number of SMs to keep busy, about twice over.
    Returns: BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, num_warps, num_stages.
    """
    block_out, block_in = block_shape
    block_m = min(128, max(16, next_power_of_2(cdiv(capacity, block_rows) * block_in)))
    block_n = min(max(next_power_of_2(block_out), 16), 128)
    block_k, stages = (64 if dtype.itemsize == 2 else 32), 4
    slice_bytes = min(power_of_2_divisor(channels[1], 16), power_of_2_divisor(block_in, 16)) * dtype.itemsize
    if not tensor_cores:
        block_m, block_n, block_k, stages = min(block_m, 64), min(block_n, 64), 16, 3
    elif slice_bytes < 16:
        # Slices below 16 bytes are gathered element by element into registers.
        block_m, block_n, block_k, stages = min(block_m, 64), min(block_n, 64), 32, 3
    warps = 8 if block_m * block_n == 128 * 128 else 4
    # On average half of a block row's last tile is empty. A tile of 128 x 128 fills a processor alone, smaller ones
    # share it by two: on an H200 twice the programs took 1.2 times as long.
    tiles = max(block_rows, round(capacity * block_in / block_m + block_rows / 2)) * cdiv(block_out, block_n)
    wanted = processors if block_m * block_n == 128 * 128 else 2 * processors
    splits = max(1, min(wanted // tiles, MAX_SPLITS, cdiv(m_total, MIN_STEPS * block_k)))
    while stages > 2 and stages * (block_m + block_n) * block_k * dtype.itemsize > shared_memory:
        stages -= 1
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": splits,
        "num_warps": warps,
        "num_stages": stages,
    }


class _Geometry(NamedTuple):
    """What a launch depends on beside the pointers and the device."""

    grad_shape: tuple[int, int, int, int]
    x_shape: tuple[int, int, int, int]
    values_shape: tuple[int, int, int]
    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    precision: str


@lru_cache(maxsize=4096)
def _plan(g: _Geometry, config_items: tuple[tuple[str, int], ...], device: Limits) -> tuple[Launch, int]:
    """The launch, and in how many parts it sums the pixels."""
    (n, c_out, p, q), (_, c_in, h, w), (capacity, block_out, block_in) = g.grad_shape, g.x_shape, g.values_shape
    m_total, block_rows = n * p * q, cdiv(c_out, block_out)
    config = dict(config_items) or default_config(
        m_total,
        capacity,
        block_rows,
        (block_out, block_in),
        (c_out, c_in),
        g.dtype,
        tensor_cores=g.dtype != torch.float32 or g.precision == "tf32",
        shared_memory=device.shared_memory,
        processors=device.processors,
    )
    block_m, block_n, block_k, splits = (config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS"))
    split_pixels = cdiv(cdiv(m_total, splits), block_k) * block_k
    splits = cdiv(m_total, split_pixels)
    column_tiles = cdiv(capacity * block_in, block_m) + block_rows
    elements = max(m_total * c_out, n * c_in * h * w, capacity * block_out * block_in)
    largest = elements + (block_k + block_m) * max(c_out, c_in) + (h * w + g.taps[0] * g.taps[1] * w) * c_in
    programs = column_tiles * cdiv(block_out, block_n) * splits
    overlap = device.overlap(programs)
    launch_ = Launch(
        bsr_conv2d_bwd_w_kernel,
        (programs, 1, 1),
        (
            m_total,
            split_pixels,
            capacity * block_out * block_in,
            c_in,
            h,
            w,
            c_out,
            p,
            q,
            *g.stride,
            *g.padding,
            *g.dilation,
            block_k // (p * q),
            block_k % (p * q) // q,
            block_k % q,
            block_rows,
            column_tiles,
        ),
        {
            "S": g.taps[1],
            "GROUPS": cdiv(c_in, block_in),
            "BSR_OUT": block_out,
            "BSR_IN": block_in,
            "SLICE": min(power_of_2_divisor(block_in, block_m), power_of_2_divisor(c_in, block_m)),
            "ALIGN_OUT": min(power_of_2_divisor(block_out, block_n), power_of_2_divisor(c_out, block_n)),
            "HAS_BORDER": g.padding[0] > 0 or g.padding[1] > 0,
            "RAGGED_IN": c_in % block_in != 0,
            "INDEX_64": largest > INT32_MAX or bool(config.get("INDEX_64", False)),
            "PRECISION": g.precision,
            "OVERLAP": overlap,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "ROWS_TILE": min(next_power_of_2(block_rows), 1024),
        },
        launch_options(config, overlap),
    )
    return launch_, splits


def launch(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """The gradient of ``values`` (spare blocks and padded entries exactly 0) before the epilogue, summed in float32.

    Args:
        grad: (N, C_out, P, Q) float32 | float16 | bfloat16.
        x: (N, C_in, H, W) of that dtype. Both are read as channels_last (converted when they are not).
        values: gives its shape and dtype alone.
        crow_indices: int32, of the pattern.
        col_indices: int32, of the pattern.
        weight_shape: (C_out, C_in, R, S).
        config: BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, num_warps, num_stages; None takes `default_config`. INDEX_64=1 forces
            64-bit addresses, which are otherwise used from 2^31 elements on.

    Deterministic: every split sums in a fixed order, and so does the reduction. float32 multiplies in IEEE precision
    unless torch's switch says "tf32" (that of convolutions; that of matrix products for a linear layer).
    """
    if grad.numel() == 0 or values.shape[0] == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    compute = interpreted_dtype(grad.dtype)
    grad = grad.to(compute).contiguous(memory_format=torch.channels_last)
    x = x.to(compute).contiguous(memory_format=torch.channels_last)
    r, s = weight_shape[2:]
    geometry = _Geometry(
        tuple(grad.shape),
        tuple(x.shape),
        tuple(values.shape),
        (r, s),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        compute,
        gradient_precision((r, s, *x.shape[2:])),
    )  # type: ignore[arg-type]  # tuples have the right length, which their types do not say
    out_dtype = interpreted_dtype(values.dtype)
    plan, splits = _plan(geometry, tuple(config.items()) if config else (), limits(x.get_device()))
    if splits == 1:
        # Zeroed, because spare blocks belong to no program.
        sums = torch.zeros(values.shape, dtype=out_dtype, device=x.device)
        plan(grad, x, crow_indices, col_indices, sums)
    else:
        partial = torch.empty((splits, *values.shape), dtype=torch.float32, device=x.device)
        plan(grad, x, crow_indices, col_indices, partial)
        sums = add_partials(partial, torch.empty(values.shape, dtype=out_dtype, device=x.device), crow_indices)
    return sums.to(values.dtype)
