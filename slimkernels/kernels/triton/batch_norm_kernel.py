"""Batch norm of a training step with the ReLU and the 2x2 max-pool behind it (Ioffe and Szegedy, arXiv 1502.03167).

    mean[c], var[c] = over all pixels m of x[m, c]
    z[m, c] = (x[m, c] - mean[c]) rstd[c] weight[c] + bias[c],     rstd = 1 / sqrt(var + eps)
    y = z, relu(z) or the largest of relu(z) in windows of 2x2

and of its gradients, with dz the gradient of y where z made it, 0 elsewhere:

    dbias[c] = sum over m of dz[m, c],     dweight[c] = sum over m of dz[m, c] xhat[m, c],     xhat = (x - mean) rstd
    dx[m, c] = weight[c] rstd[c] (dz[m, c] - dbias[c] / M - xhat[m, c] dweight[c] / M)

Bound by memory: forward reads x twice and writes y once, backward reads x and the gradient of y twice and writes dx.
What is in between, z and its ReLU, is computed again from x and never stored. One after the other, torch's kernels for
a batch norm, a ReLU and a pool read and write the activation thirteen times; they took 2.5 of 4.8 ms of a training step
of VGG-19 with sparse convolutions at batch 512 on an H200.

Images are channels_last: a row of M pixels by C channels. A variance is a sum of squared distances from the mean of the
first pixels of a part, merged from part to part (Chan, Golub and LeVeque 1983), so no digits are lost where the mean is
large beside the deviation.
`batch_norm` launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.kernels.triton.tiles import await_last_kernel, main_loop_done


@triton.jit
def batch_norm_moments_kernel(
    x_ptr,
    partial_ptr,
    pixels,
    channels,
    tiles,
    parts,
    INDEX_64: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # x: (pixels, channels); partial: (parts, 2, channels) float32, the mean of a part and its sum of squared distances.
    # A part is every parts-th tile of pixels, the last ones first: those the kernel in front wrote last, and L2 has.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    lines = tl.arange(0, BLOCK_M)
    first = (tiles - 1 - part).to(index_type) * BLOCK_M + lines
    await_last_kernel(OVERLAP)
    # Every element of the tile has a shift of its own, the first it meets: near enough to the mean that the squares
    # below lose no digits, and nothing waits for a sum over the tile. Lines past the end take the last pixel's.
    tile = tl.minimum(first, pixels - 1)[:, None] * channels + channel[None, :]
    shift = tl.load(x_ptr + tile, mask=mask_n[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Every thread adds up its own elements: with sums over a tile's rows in each step, and half as many programs, the
    # moments of a training step of VGG-19 took 617 us on an H200, and so 225.
    for step in tl.range(part + parts, tiles, parts, num_stages=STAGES):
        pixel = (tiles - 1 - step).to(index_type) * BLOCK_M + lines
        tile = pixel[:, None] * channels + channel[None, :]
        away = tl.load(x_ptr + tile, mask=mask_n[None, :], other=0.0).to(tl.float32) - shift
        sums += away
        squares += away * away
    main_loop_done(OVERLAP)
    # Of every line: how many pixels, their mean's distance from that of all shifts, and their squares about it.
    count = (tiles - 1 - part) // parts + (first < pixels).to(tl.int32)
    count = tl.cast(count, tl.float32)[:, None]
    centre = tl.sum(shift, 0) / BLOCK_M
    mean = sums / tl.maximum(count, 1.0)
    inside = tl.maximum(squares - sums * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    away = tl.where(count > 0.0, shift - centre[None, :] + mean, 0.0)
    distance = tl.sum(away * count, 0) / tl.sum(count, 0)
    away -= distance[None, :]
    total = tl.sum(inside + away * away * count, 0)
    partial_ptr += 2 * part.to(tl.int64) * channels + channel
    tl.store(partial_ptr, centre + distance, mask=mask_n)
    tl.store(partial_ptr + channels, total, mask=mask_n)


@triton.jit
def batch_norm_statistics_kernel(
    partial_ptr,
    statistics_ptr,
    pixels,
    channels,
    tiles,
    parts,
    EPS: tl.constexpr,
    PART_M: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # partial: as above, of tiles of PART_M pixels and at most BLOCK_M parts; statistics: (3, channels) float32, the
    # mean, 1 / sqrt(var + eps), and the unbiased variance. All is read at once: the time of this kernel is its waits.
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    part = tl.arange(0, BLOCK_M)
    mask = (part < parts)[:, None] & mask_n[None, :]
    # The first part has the last tile, which may be cut.
    count = ((tiles - 1 - part) // parts + 1) * PART_M - tl.where(part == 0, tiles * PART_M - pixels, 0)
    count = count.to(tl.float32)[:, None]
    partial_ptr += 2 * part[:, None] * channels + channel[None, :]
    await_last_kernel(OVERLAP)
    mean = tl.load(partial_ptr, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    distances = tl.load(partial_ptr + channels, mask=mask, other=0.0)
    whole_mean = tl.sum(tl.where(mask, mean * count, 0.0), 0) / pixels
    away = mean - whole_mean[None, :]
    distances = tl.sum(tl.where(mask, distances + away * away * count, 0.0), 0)
    tl.store(statistics_ptr + channel, whole_mean, mask=mask_n)
    tl.store(statistics_ptr + channels + channel, 1.0 / tl.sqrt(distances / pixels + EPS), mask=mask_n)
    tl.store(statistics_ptr + 2 * channels + channel, distances / tl.maximum(pixels - 1, 1), mask=mask_n)


@triton.jit
def _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT: tl.constexpr):
    # mean, rstd, weight and bias of a tile's channels, [1, BLOCK_N] each, float32.
    mean = tl.load(statistics_ptr + channel, mask=mask_n, other=0.0)
    rstd = tl.load(statistics_ptr + channels + channel, mask=mask_n, other=0.0)
    weight = rstd * 0.0 + 1.0
    bias = rstd * 0.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=mask_n, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=mask_n, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def _normalised(x_ptr, offset, mask, mean, rstd):
    # xhat of one tile, [BLOCK_M, BLOCK_N].
    return (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd


@triton.jit
def _window(index, p, q, windows_h, windows_w):
    # Of a window of 2x2 pixels: its row of the pooled image, its first pixel's row of x, and whether it has a lower and
    # a right half. Windows are counted in lines of windows_w, which may be one more than the pooled image has.
    column = index % windows_w
    line = index // windows_w % windows_h
    image = index // windows_w // windows_h
    pooled = (image * (p // 2) + line) * (q // 2) + column
    corner = (image * p + 2 * line) * q + 2 * column
    return pooled, corner, 2 * line + 1 < p, 2 * column + 1 < q


@triton.jit
def _larger(value, place: tl.constexpr, best, best_place):
    # As torch's max-pool: the first of equals in row-major order, and a NaN before any number.
    take = (value > best) | (value != value)
    return tl.where(take, value, best), tl.where(take, place, best_place)


@triton.jit
def batch_norm_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    y_ptr,
    rows,
    channels,
    p,
    q,
    HAS_WEIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INDEX_64: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # x: (N, p, q, channels), y: of that shape, or (N, p // 2, q // 2, channels). rows: of y.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    row = tl.program_id(0).to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    mask = (row < rows)[:, None] & mask_n[None, :]
    await_last_kernel(OVERLAP)
    mean, rstd, weight, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT)
    if EPILOGUE == 2:
        _, corner, _, _ = _window(row, p, q, p // 2, q // 2)
        corner = corner[:, None] * channels + channel[None, :]
        z = _normalised(x_ptr, corner, mask, mean, rstd) * weight + bias  # [BLOCK_M, BLOCK_N]
        right = _normalised(x_ptr, corner + channels, mask, mean, rstd) * weight + bias
        z = tl.maximum(z, right, propagate_nan=tl.PropagateNan.ALL)
        corner += q * channels
        below = _normalised(x_ptr, corner, mask, mean, rstd) * weight + bias
        z = tl.maximum(z, below, propagate_nan=tl.PropagateNan.ALL)
        below = _normalised(x_ptr, corner + channels, mask, mean, rstd) * weight + bias
        z = tl.maximum(z, below, propagate_nan=tl.PropagateNan.ALL)
    else:
        z = _normalised(x_ptr, row[:, None] * channels + channel[None, :], mask, mean, rstd) * weight + bias
    if EPILOGUE > 0:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    main_loop_done(OVERLAP)
    y_tile_ptr = y_ptr + row[:, None] * channels + channel[None, :]
    tl.store(y_tile_ptr, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chosen(x_ptr, x_tile, channels, q, mask, below, right, mean, rstd, weight, bias, dtype: tl.constexpr):
    # xhat of the four pixels of every window, the place of the largest z, and that z, each [BLOCK_M, BLOCK_N]. z is
    # rounded as the forward stores it: what rounding makes equal is equal here.
    lower = x_tile + q * channels
    xhat_0 = _normalised(x_ptr, x_tile, mask, mean, rstd)
    xhat_1 = _normalised(x_ptr, x_tile + channels, mask & right, mean, rstd)
    xhat_2 = _normalised(x_ptr, lower, mask & below, mean, rstd)
    xhat_3 = _normalised(x_ptr, lower + channels, mask & below & right, mean, rstd)
    best = (xhat_0 * weight + bias).to(dtype).to(tl.float32)
    place = tl.zeros(best.shape, dtype=tl.int32)
    best, place = _larger((xhat_1 * weight + bias).to(dtype).to(tl.float32), 1, best, place)
    best, place = _larger((xhat_2 * weight + bias).to(dtype).to(tl.float32), 2, best, place)
    best, place = _larger((xhat_3 * weight + bias).to(dtype).to(tl.float32), 3, best, place)
    return xhat_0, xhat_1, xhat_2, xhat_3, place, best


@triton.jit
def _cut(z, dz, dtype: tl.constexpr):
    # The gradient behind a ReLU: none where z, rounded as the forward stores it, is not above 0. Rounding makes 0 of
    # half the smallest number of a dtype and of what is below: to compare with that takes two instructions less.
    half: tl.constexpr = 2.0**-134 if dtype == tl.bfloat16 else 2.0**-25 if dtype == tl.float16 else 0.0
    # As a plain number, one below float32's normal ones would be float64, and so the comparison.
    return tl.where(z <= tl.full((1, 1), half, tl.float32), 0.0, dz)


@triton.jit
def _larger_of(x_ptr, offset, mask, mean, rstd, weight, bias, best, best_xhat, dtype: tl.constexpr):
    # `_larger`, with one pixel's xhat in place of its number.
    xhat = _normalised(x_ptr, offset, mask, mean, rstd)
    value = (xhat * weight + bias).to(dtype).to(tl.float32)
    take = (value > best) | (value != value)
    return tl.where(take, value, best), tl.where(take, xhat, best_xhat)


@triton.jit
def batch_norm_reduce_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    partial_ptr,
    rows,
    channels,
    p,
    q,
    tiles,
    parts,
    HAS_WEIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EVEN: tl.constexpr,
    BACKWARDS: tl.constexpr,
    INDEX_64: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grad: (rows, channels), the gradient of y; partial: (parts, 2, channels) float32, a part's sums of dz and dz xhat.
    # A part is every parts-th tile of rows, the last ones first with BACKWARDS. EVEN: all tiles are full.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    await_last_kernel(OVERLAP)
    mean, rstd, weight, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(part, tiles, parts, num_stages=STAGES):
        index = tiles - 1 - step if BACKWARDS else step
        row = index.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = mask_n[None, :] if EVEN else (row < rows)[:, None] & mask_n[None, :]
        tile = row[:, None] * channels + channel[None, :]
        dz = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if EPILOGUE == 2:
            _, corner, _, _ = _window(row, p, q, p // 2, q // 2)
            x_tile = corner[:, None] * channels + channel[None, :]
            xhat = _normalised(x_ptr, x_tile, mask, mean, rstd)
            z = (xhat * weight + bias).to(dtype).to(tl.float32)
            z, xhat = _larger_of(x_ptr, x_tile + channels, mask, mean, rstd, weight, bias, z, xhat, dtype)
            x_tile += q * channels
            z, xhat = _larger_of(x_ptr, x_tile, mask, mean, rstd, weight, bias, z, xhat, dtype)
            z, xhat = _larger_of(x_ptr, x_tile + channels, mask, mean, rstd, weight, bias, z, xhat, dtype)
            dz = tl.where(z <= 0.0, 0.0, dz)
        else:
            xhat = _normalised(x_ptr, tile, mask, mean, rstd)
            if EPILOGUE == 1:
                dz = _cut(xhat * weight + bias, dz, dtype)
        sum_dz += dz
        sum_dz_xhat += dz * xhat if EVEN else tl.where(mask, dz * xhat, 0.0)
    main_loop_done(OVERLAP)
    partial_ptr += 2 * part.to(tl.int64) * channels + channel
    tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=mask_n)
    tl.store(partial_ptr + channels, tl.sum(sum_dz_xhat, 0), mask=mask_n)


@triton.jit
def batch_norm_input_gradient_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    sums_ptr,
    dx_ptr,
    rows,
    pixels,
    channels,
    p,
    q,
    windows_h,
    windows_w,
    HAS_WEIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BACKWARDS: tl.constexpr,
    INDEX_64: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # sums: (2, channels) float32, dbias and dweight; dx: as x. rows: pixels, or windows, those at odd edges included.
    # With BACKWARDS the first programs take the last rows.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    index = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    row = index.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    mask = (row < rows)[:, None] & mask_n[None, :]
    await_last_kernel(OVERLAP)
    mean, rstd, weight, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT)
    share = 1.0 / tl.cast(pixels, tl.float32)
    mean_dz = tl.load(sums_ptr + channel, mask=mask_n, other=0.0)[None, :] * share
    mean_dz_xhat = tl.load(sums_ptr + channels + channel, mask=mask_n, other=0.0)[None, :] * share
    scale = weight * rstd
    if EPILOGUE == 2:
        pooled, corner, below, right = _window(row, p, q, windows_h, windows_w)
        below, right = mask & below[:, None], mask & right[:, None]
        x_tile = corner[:, None] * channels + channel[None, :]
        xhat_0, xhat_1, xhat_2, xhat_3, place, z = _chosen(
            x_ptr, x_tile, channels, q, mask, below, right, mean, rstd, weight, bias, dtype
        )
        grad_tile = pooled[:, None] * channels + channel[None, :]
        dz = tl.load(grad_ptr + grad_tile, mask=below & right, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        dz = tl.where(z <= 0.0, 0.0, dz)
        main_loop_done(OVERLAP)
        dx = scale * (tl.where(place == 0, dz, 0.0) - mean_dz - xhat_0 * mean_dz_xhat)
        tl.store(dx_ptr + x_tile, dx.to(dtype), mask=mask)
        dx = scale * (tl.where(place == 1, dz, 0.0) - mean_dz - xhat_1 * mean_dz_xhat)
        tl.store(dx_ptr + x_tile + channels, dx.to(dtype), mask=right)
        x_tile += q * channels
        dx = scale * (tl.where(place == 2, dz, 0.0) - mean_dz - xhat_2 * mean_dz_xhat)
        tl.store(dx_ptr + x_tile, dx.to(dtype), mask=below)
        dx = scale * (tl.where(place == 3, dz, 0.0) - mean_dz - xhat_3 * mean_dz_xhat)
        tl.store(dx_ptr + x_tile + channels, dx.to(dtype), mask=below & right)
    else:
        tile = row[:, None] * channels + channel[None, :]
        xhat = _normalised(x_ptr, tile, mask, mean, rstd)
        dz = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if EPILOGUE == 1:
            dz = _cut(xhat * weight + bias, dz, dtype)
        main_loop_done(OVERLAP)
        dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)
        tl.store(dx_ptr + tile, dx.to(dtype), mask=mask)
