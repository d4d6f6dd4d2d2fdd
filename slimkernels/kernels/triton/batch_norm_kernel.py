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


@triton.jit
def batch_norm_moments_kernel(
    x_ptr,
    partial_ptr,
    pixels,
    channels,
    part_pixels,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # x: (pixels, channels); partial: (parts, 2, channels) float32, the mean of a part and its sum of squared distances.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    part = tl.program_id(0).to(index_type)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    begin = part * part_pixels
    end = tl.minimum(begin + part_pixels, pixels)
    pixel = begin + tl.arange(0, BLOCK_M)
    mask = (pixel < end)[:, None] & mask_n[None, :]
    tile = tl.load(x_ptr + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    # Near enough to the mean that the squares below lose no digits, however large it is beside the deviation.
    shift = tl.sum(tile, 0) / tl.minimum(end - begin, BLOCK_M).to(tl.float32)
    away = tl.where(mask, tile - shift[None, :], 0.0)  # [BLOCK_M, BLOCK_N]
    sums, squares = away, away * away
    # Every thread adds up its own elements: with sums over a tile's rows in each step, and half as many programs, the
    # moments of a training step of VGG-19 took 617 us on an H200, and so 225.
    for first in tl.range(begin + BLOCK_M, end, BLOCK_M, num_stages=STAGES):
        pixel = first + tl.arange(0, BLOCK_M)
        mask = (pixel < end)[:, None] & mask_n[None, :]
        tile = tl.load(x_ptr + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        away = tl.where(mask, tile - shift[None, :], 0.0)
        sums += away
        squares += away * away
    count = (end - begin).to(tl.float32)
    distance = tl.sum(sums, 0) / count
    total = tl.sum(squares, 0) - distance * distance * count
    total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial_ptr + 2 * part * channels + channel, shift + distance, mask=mask_n)
    tl.store(partial_ptr + (2 * part + 1) * channels + channel, total, mask=mask_n)


@triton.jit
def batch_norm_statistics_kernel(
    partial_ptr,
    statistics_ptr,
    pixels,
    channels,
    part_pixels,
    parts,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # partial: as above; statistics: (3, channels) float32, the mean, 1 / sqrt(var + eps), and the unbiased variance.
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, parts, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)
        mask = (part < parts)[:, None] & mask_n[None, :]
        count = tl.minimum(pixels - part * part_pixels, part_pixels).to(tl.float32)
        mean = tl.load(partial_ptr + 2 * part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += mean * count[:, None]
    whole_mean = tl.sum(total, 0) / pixels
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, parts, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)
        mask = (part < parts)[:, None] & mask_n[None, :]
        count = tl.minimum(pixels - part * part_pixels, part_pixels).to(tl.float32)
        mean = tl.load(partial_ptr + 2 * part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        distances = tl.load(partial_ptr + (2 * part[:, None] + 1) * channels + channel[None, :], mask=mask, other=0.0)
        away = tl.where(mask, mean - whole_mean[None, :], 0.0)
        total += distances + away * away * count[:, None]
    distances = tl.sum(total, 0)
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # x: (N, p, q, channels), y: of that shape, or (N, p // 2, q // 2, channels). rows: of y.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    row = tl.program_id(0).to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    mask = (row < rows)[:, None] & mask_n[None, :]
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
    part_rows,
    HAS_WEIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grad: (rows, channels), the gradient of y; partial: (parts, 2, channels) float32, a part's sums of dz and dz xhat.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(0).to(index_type)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    mean, rstd, weight, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & mask_n[None, :]
        tile = row[:, None] * channels + channel[None, :]
        dz = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if EPILOGUE == 2:
            _, corner, _, _ = _window(row, p, q, p // 2, q // 2)
            x_tile = corner[:, None] * channels + channel[None, :]
            xhat, xhat_1, xhat_2, xhat_3, place, z = _chosen(
                x_ptr, x_tile, channels, q, mask, mask, mask, mean, rstd, weight, bias, dtype
            )
            xhat = tl.where(place == 1, xhat_1, xhat)
            xhat = tl.where(place == 2, xhat_2, xhat)
            xhat = tl.where(place == 3, xhat_3, xhat)
        else:
            xhat = _normalised(x_ptr, tile, mask, mean, rstd)
            z = (xhat * weight + bias).to(dtype).to(tl.float32)
        if EPILOGUE > 0:
            dz = tl.where(z <= 0.0, 0.0, dz)
        sum_dz += dz
        sum_dz_xhat += tl.where(mask, dz * xhat, 0.0)
    tl.store(partial_ptr + 2 * part * channels + channel, tl.sum(sum_dz, 0), mask=mask_n)
    tl.store(partial_ptr + (2 * part + 1) * channels + channel, tl.sum(sum_dz_xhat, 0), mask=mask_n)


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
    INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # sums: (2, channels) float32, dbias and dweight; dx: as x. rows: pixels, or windows, those at odd edges included.
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < channels
    mask = (row < rows)[:, None] & mask_n[None, :]
    mean, rstd, weight, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, channel, channels, mask_n, HAS_WEIGHT)
    mean_dz = tl.load(sums_ptr + channel, mask=mask_n, other=0.0)[None, :] / pixels
    mean_dz_xhat = tl.load(sums_ptr + channels + channel, mask=mask_n, other=0.0)[None, :] / pixels
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
            dz = tl.where((xhat * weight + bias).to(dtype).to(tl.float32) <= 0.0, 0.0, dz)
        dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)
        tl.store(dx_ptr + tile, dx.to(dtype), mask=mask)
