"""Block-sparse convolution, forward, one output position a tile: M = the images of a batch.

The pixels of a tile are the same position (p, q) of BLOCK_M images, so that a tap lies inside the image for all of them
or for none, and the taps outside are left out instead of loaded as zeros. Of a padded 3x3 convolution 84% of the taps
are inside at 8x8 pixels, 69% at 4x4, 44% at 2x2. No border mask is needed.

A block row stores its blocks tap after tap, so the blocks of the taps inside, (r, first_s) to (r, last_s) of every row
of taps r inside, are one run a row of taps: at most three runs for kernels of up to three rows, which are walked as
one sequence. `bsr_conv2d_index.tap_starts` says where they begin.

A 2x2 max-pool wants the four positions of a window in one tile; it is left to `bsr_conv2d_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.triton.bsr_conv2d_config import grid_integers, group_m, images_config
from slimkernels.kernels.triton.bsr_conv2d_geometry import Geometry
from slimkernels.kernels.triton.bsr_conv2d_index import tap_starts_offset
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import Limits, cdiv, division
from slimkernels.kernels.triton.tiles import await_last_kernel, divide, grouped_tile, main_loop_done, maximum_nan


@triton.jit
def bsr_conv2d_fwd_kernel_images(
    x_ptr,
    values_ptr,
    rows_ptr,
    starts_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    images,
    h,
    w,
    p,
    q,
    q_factor,
    q_shift,
    positions,
    positions_factor,
    positions_shift,
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
    RAGGED_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # rows: (block_rows, 4), longest first; starts: (block_rows, R * S + 1), first block of a row's tap.
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
    STEPS_A_BLOCK: tl.constexpr = BSR_IN // BLOCK_K
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    row = tl.load(rows_ptr + tile_n // SUB_TILES * 4)
    group = divide(tile_m, positions_factor, positions_shift)
    position = tile_m - group * positions
    out_p = divide(position, q_factor, q_shift)
    out_q = position - out_p * q
    in_h = out_p * STRIDE_H - PAD_H
    in_w = out_q * STRIDE_W - PAD_W

    # Taps s inside are first_s to end_s - 1, the same for every row of taps.
    first_s = tl.cast(S, tl.int32)
    end_s = tl.cast(0, tl.int32)
    for s in tl.static_range(S):
        inside = (in_w + s * DIL_W).to(tl.uint32) < w
        first_s = tl.minimum(first_s, tl.where(inside, s, S))
        end_s = tl.maximum(end_s, tl.where(inside, s + 1, 0))
    first_s = tl.minimum(first_s, end_s)
    starts_row_ptr = starts_ptr + row * (R * S + 1)
    # Steps of the first row of taps, of the first two, and of all; step t of a row of taps is block t + its shift.
    steps_1, shift_0 = _run(starts_row_ptr, 0, first_s, end_s, in_h, h, 0, R, S, DIL_H)
    steps_2, shift_1 = _run(starts_row_ptr, 1, first_s, end_s, in_h, h, steps_1, R, S, DIL_H)
    steps, shift_2 = _run(starts_row_ptr, 2, first_s, end_s, in_h, h, steps_2, R, S, DIL_H)

    image = tl.minimum(group * BLOCK_M + tl.arange(0, BLOCK_M), images - 1)
    offs_x = ((image.to(index_type) * h + in_h) * w + in_w) * C_IN
    offs_n = (tile_n % SUB_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_channel = row * BSR_OUT + offs_n
    mask_n = (out_channel < C_OUT) & (offs_n < BSR_OUT)
    in_slice = tl.arange(0, BLOCK_K)
    x_ptrs = (x_ptr + tl.multiple_of(offs_x, BLOCK_K))[:, None] + in_slice[None, :]
    w_ptrs = (values_ptr + offs_n * BSR_IN)[None, :] + in_slice[:, None]
    # The column of step t+1 is loaded in step t: see bsr_conv2d_fwd_kernel.
    block = _block_of(0, steps_1, steps_2, shift_0, shift_1, shift_2)
    column = tl.load(columns_ptr + block, mask=steps > 0, other=0)
    # The order of blocks was compared with the pattern before it came here, so both are older than the last kernel.
    await_last_kernel(OVERLAP)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)
        bias = tl.gather(bias, tl.arange(0, BLOCK_N), 0)
    acc = tl.broadcast_to(bias[None, :], (BLOCK_M, BLOCK_N))
    for k in range(0, tl.maximum(steps, 1) * STEPS_A_BLOCK):
        step = k // STEPS_A_BLOCK
        in_block = (k - step * STEPS_A_BLOCK) * BLOCK_K
        tap = (column.to(tl.uint32) // GROUPS).to(tl.int32)
        channel = (column - tap * GROUPS) * BSR_IN + in_block
        tap_h = (tap.to(tl.uint32) // S).to(tl.int32)
        tap_w = tap - tap_h * S
        offs_tap = (tap_h * DIL_H * tl.cast(w, index_type) + tap_w * DIL_W) * C_IN + channel
        stored = step < steps
        inside = stored
        if RAGGED_IN:
            inside = stored & (channel < C_IN)
        x_tile = tl.load(x_ptrs + tl.multiple_of(offs_tap, BLOCK_K), mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        block = _block_of(step, steps_1, steps_2, shift_0, shift_1, shift_2)
        offs_w = block.to(index_type) * (BSR_OUT * BSR_IN) + in_block
        mask_w = (stored & (offs_n < BSR_OUT))[None, :]
        w_tile = tl.load(w_ptrs + tl.multiple_of(offs_w, BLOCK_K), mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        next_step = (k + 1) // STEPS_A_BLOCK
        block = _block_of(next_step, steps_1, steps_2, shift_0, shift_1, shift_2)
        column = tl.load(columns_ptr + block, mask=next_step < steps, other=0)  # a scalar
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

    main_loop_done(OVERLAP)
    if RELU:
        acc = maximum_nan(acc, 0.0)
    image = group * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_y = ((image.to(tl.int64) * p + out_p) * q + out_q) * C_OUT
    y_tile = (y_ptr + offs_y)[:, None] + out_channel[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(image < images)[:, None] & mask_n[None, :])


@triton.jit
def _run(
    starts_row_ptr,
    r: tl.constexpr,
    first_s,
    end_s,
    in_h,
    h,
    steps_before,
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
):
    """(steps up to and with row of taps r, what a step of that row adds to be a block); an empty run outside."""
    steps = tl.cast(steps_before, tl.int32)
    shift = tl.cast(0, tl.int32)
    if r < R:
        begin = tl.load(starts_row_ptr + r * S + first_s)
        end = tl.load(starts_row_ptr + r * S + end_s)
        shift = begin - steps
        steps += tl.where((in_h + r * DIL_H).to(tl.uint32) < h, end - begin, 0)
    return steps, shift


@triton.jit
def _block_of(step, steps_1, steps_2, shift_0, shift_1, shift_2):
    return step + tl.where(step < steps_1, shift_0, tl.where(step < steps_2, shift_1, shift_2))


@lru_cache(maxsize=4096)
def _plan(geometry: Geometry, config_items: tuple[tuple[str, int], ...], device: Limits) -> Launch:
    images, c_in, h, w = geometry.x_shape
    _, p, q = geometry.output
    config = dict(config_items) or images_config(
        images,
        geometry.block_shape,
        c_in,
        geometry.dtype,
        tensor_cores=geometry.tensor_cores,
        shared_memory=device.shared_memory,
    )
    tiles_m = cdiv(images, config["BLOCK_M"]) * p * q
    n_tiles = geometry.block_rows * cdiv(geometry.block_shape[0], config["BLOCK_N"])
    group = group_m(config, c_in, geometry.stride, geometry.dtype.itemsize)
    overlap = device.overlap(tiles_m * n_tiles)
    constants = geometry.constants(config)
    unused = ("SLICE", "BORDER", "POOL", "POOL_LOW", "POOL_HIGH")
    return Launch(
        bsr_conv2d_fwd_kernel_images,
        (tiles_m * n_tiles, 1, 1),
        (images, h, w, p, q, *division(q), p * q, *division(p * q), *grid_integers(tiles_m, n_tiles, group)),
        {
            **{name: value for name, value in constants.items() if name not in unused},
            "OVERLAP": overlap,
            **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        },
        launch_options(config, overlap),
    )


def run(
    x: Tensor,
    values: Tensor,
    order: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    config: Mapping[str, int] | None,
    device: Limits,
) -> None:
    """Fills y (channels_last) of a checked convolution. order: `bsr_conv2d_index.forward_order`.

    Raises: ValueError for a kernel of more than three rows of taps, a max-pool, or slices narrower than a stage.
    """
    r = geometry.weight_shape[2]
    if r > 3 or geometry.epilogue == "relu_maxpool2":
        raise ValueError(
            "bsr_conv2d: expected at most 3 rows of taps and no max-pool for one position a tile, got "
            f"{r} rows and epilogue {geometry.epilogue!r}"
        )
    widths = c_in, block_in = geometry.x_shape[1], geometry.block_shape[1]
    block_k = (config or {}).get("BLOCK_K", 16)
    if any(width % block_k for width in widths):
        raise ValueError(
            f"bsr_conv2d: expected stages of channels that follow each other, got BLOCK_K {block_k} for "
            f"{c_in} channels in blocks of {block_in}"
        )
    plan = _plan(geometry, tuple(config.items()) if config else (), device)
    starts = order[tap_starts_offset(geometry.block_rows, geometry.capacity) :]
    plan(x, values, order, starts, col_indices, values if bias is None else bias, y)
