"""Sums that end the gradients: of partial results, and of a gradient over its pixels (the gradient of a bias).

    sums[e] = sum over parts of partial[part, e]        channel_sums[c] = sum over pixels m of grad[m, c]

Both are bound by memory and add in a fixed order. torch's sum over the pixels of a channels_last gradient took 684 us
of a training step of VGG-19 at batch 512 on an H200, where reading the gradients once takes 75.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import (
    INT32_MAX,
    Limits,
    cdiv,
    interpreted_dtype,
    limits,
    next_power_of_2,
)
from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done

# Elements of a tile: 16 a thread of 4 warps, two loads of 16 bytes in 16-bit dtypes.
_TILE = 2048
# Tiles on their way to a program while it adds up another. For a training step of VGG-19 on an H200 the bias gradients
# took 120 us without and 111 us with them.
STAGES = 4


@triton.jit
def add_partials_kernel(
    partial_ptr,
    crow_ptr,
    out_ptr,
    elements,
    parts,
    block_rows,
    block_elements,
    HAS_SPARE: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # partial: (parts, elements) float32; out: (elements,). With HAS_SPARE the elements past the crow[block_rows]
    # stored blocks were written by nobody and are 0.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < elements
    await_last_kernel(OVERLAP)
    if HAS_SPARE:
        mask_n = mask_n & (offs_n < tl.load(crow_ptr + block_rows).to(tl.int64) * block_elements)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, parts, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)
        tile_ptr = partial_ptr + part.to(tl.int64)[:, None] * elements + offs_n[None, :]
        acc += tl.load(tile_ptr, mask=(part < parts)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
    main_loop_done(OVERLAP)
    total = tl.sum(acc, 0)
    tl.store(out_ptr + offs_n, total.to(out_ptr.dtype.element_ty), mask=offs_n < elements)


@triton.jit
def channel_sums_kernel(
    grad_ptr,
    partial_ptr,
    pixels,
    channels,
    part_pixels,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grad: (pixels, channels); partial: (parts, channels) float32, part_pixels of them in a part.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    part = tl.program_id(0).to(index_type)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    begin = part * part_pixels
    end = tl.minimum(begin + part_pixels, pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        pixel = first + tl.arange(0, BLOCK_M)
        tile_ptr = grad_ptr + pixel[:, None] * channels + channel[None, :]
        tile = tl.load(tile_ptr, mask=(pixel < end)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        acc += tile.to(tl.float32)
    tl.store(partial_ptr + part * channels + channel, tl.sum(acc, 0), mask=mask_n)


@lru_cache(maxsize=4096)
def _add_plan(elements: int, parts: int, block_rows: int, block_elements: int, device: Limits) -> Launch:
    # Few elements are channels of hundreds of parts, one program's steps after each other: all sums of a training step
    # of VGG-19 took 219 us on an H200 with 32 parts a step, and 141 with 128 and twice the parts.
    block_m = min(32 if elements > _TILE else 256, next_power_of_2(parts))
    block_n = _TILE // block_m
    programs = cdiv(elements, block_n)
    overlap = device.overlap(programs)
    return Launch(
        add_partials_kernel,
        (programs, 1, 1),
        (elements, parts, block_rows, block_elements),
        {"HAS_SPARE": block_rows > 0, "OVERLAP": overlap, "BLOCK_M": block_m, "BLOCK_N": block_n},
        launch_options({"num_warps": 4, "num_stages": 2}, overlap),
    )


def add_partials(partial: Tensor, out: Tensor, crow_indices: Tensor | None = None) -> Tensor:
    """``out`` filled with the sums of ``partial`` (parts, *out.shape), float32, over its parts.

    Args:
        crow_indices: of the pattern whose ``values`` out has the shape of, to leave 0 in the blocks past the stored
            ones, whatever partial holds there; None where all of it counts.
    """
    rows = 0 if crow_indices is None else crow_indices.numel() - 1
    block = out[0].numel() if rows else 1
    plan = _add_plan(out.numel(), partial.shape[0], rows, block, limits(partial.get_device()))
    plan(partial, partial if crow_indices is None else crow_indices, out)
    return out


@lru_cache(maxsize=4096)
def _channel_plan(pixels: int, channels: int, index_64: bool, processors: int) -> tuple[Launch, int]:
    """The launch, and its number of parts."""
    block_n = min(max(next_power_of_2(channels), 16), 128)
    block_m = _TILE // block_n
    tiles = cdiv(channels, block_n)
    # Eight programs of 128 threads a processor, at least four tiles each.
    parts = max(1, min(8 * processors // tiles, cdiv(pixels, 4 * block_m)))
    part_pixels = cdiv(cdiv(pixels, parts), block_m) * block_m
    parts = cdiv(pixels, part_pixels)
    launch_ = Launch(
        channel_sums_kernel,
        (parts, tiles, 1),
        (pixels, channels, part_pixels),
        {"INDEX_64": index_64, "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": STAGES},
        {"num_warps": 4, "num_stages": 2},
    )
    return launch_, parts


def launch(grad: Tensor) -> Tensor:
    """The gradient of a convolution's bias: ``grad`` summed over images and pixels, in float32, rounded once.

    Args:
        grad: (N, C, P, Q) float32 | float16 | bfloat16, read as channels_last (converted where it is not).

    Returns: (C,) in grad's dtype.
    """
    n, c, p, q = grad.shape
    dtype, compute = grad.dtype, interpreted_dtype(grad.dtype)
    if grad.numel() == 0:
        return grad.new_zeros(c)
    grad = grad.to(compute).contiguous(memory_format=torch.channels_last)
    plan, parts = _channel_plan(
        n * p * q, c, grad.numel() + _TILE * c > INT32_MAX, limits(grad.get_device()).processors
    )
    partial = torch.empty((parts, c), dtype=torch.float32, device=grad.device)
    plan(grad, partial)
    return add_partials(partial, torch.empty(c, dtype=compute, device=grad.device)).to(dtype)
