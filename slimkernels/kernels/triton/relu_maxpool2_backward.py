"""Gradient of the epilogue ``relu_maxpool2``: each pooled gradient goes to the largest element of its 2x2 window.

    dy[n, 2i + a, 2j + b, c] = grad[n, i, j, c] where (a, b) is the place of the window's maximum and y > 0 there
                             0 elsewhere

with y the convolution's output, before or after its ReLU. Ties go to the first element in row-major order and a NaN
counts as the largest, the last one of several, as in torch's max-pool; a NaN in y passes the gradient on. Odd last rows
and columns get 0. Elementwise: bound by memory, y is read once and overwritten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.triton.runtime import INT32_MAX, cdiv, device_guard, interpreted_dtype

BLOCK = 512


@triton.jit
def relu_maxpool2_bwd_kernel(
    grad_ptr, y_ptr, windows, channels, p, q, windows_h, windows_w, INDEX_64: tl.constexpr, BLOCK: tl.constexpr
):
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    i = tl.program_id(0).to(index_type) * BLOCK + tl.arange(0, BLOCK)
    inside = i < windows
    channel = i % channels
    j = i // channels % windows_w
    row = i // channels // windows_w % windows_h
    image = i // channels // windows_w // windows_h
    # Windows are counted rounded up; one that the image's edge cuts has no pooled output.
    whole = inside & (2 * row + 1 < p) & (2 * j + 1 < q)
    grad = tl.load(grad_ptr + ((image * (p // 2) + row) * (q // 2) + j) * channels + channel, mask=whole, other=0.0)
    corner = y_ptr + ((image * p + 2 * row) * q + 2 * j) * channels + channel
    below = corner + q * channels
    a = tl.load(corner, mask=inside, other=0.0)
    b = tl.load(corner + channels, mask=whole, other=0.0)
    c = tl.load(below, mask=whole, other=0.0)
    d = tl.load(below + channels, mask=whole, other=0.0)
    best = a
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    take = (b > best) | (b != b)
    best, place = tl.where(take, b, best), tl.where(take, 1, place)
    take = (c > best) | (c != c)
    best, place = tl.where(take, c, best), tl.where(take, 2, place)
    take = (d > best) | (d != d)
    best, place = tl.where(take, d, best), tl.where(take, 3, place)
    grad = tl.where(best <= 0.0, 0.0, grad).to(y_ptr.dtype.element_ty)
    zero = tl.zeros((BLOCK,), dtype=y_ptr.dtype.element_ty)
    has_right, has_below = 2 * j + 1 < q, 2 * row + 1 < p
    tl.store(corner, tl.where(place == 0, grad, zero), mask=inside)
    tl.store(corner + channels, tl.where(place == 1, grad, zero), mask=inside & has_right)
    tl.store(below, tl.where(place == 2, grad, zero), mask=inside & has_below)
    tl.store(below + channels, tl.where(place == 3, grad, zero), mask=inside & has_right & has_below)


def launch(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of the convolution's output, written over ``y``.

    Args:
        grad: (N, C, P // 2, Q // 2) float32 | float16 | bfloat16.
        y: (N, C, P, Q) channels_last, of that dtype.

    Returns: y's storage, (N, C, P, Q) channels_last.
    """
    n, c, p, q = y.shape
    if y.numel() == 0:
        return y
    dtype, compute = y.dtype, interpreted_dtype(y.dtype)
    grad = grad.to(compute).contiguous(memory_format=torch.channels_last)
    out = y.to(compute)
    windows = n * c * cdiv(p, 2) * cdiv(q, 2)
    with device_guard(y):
        relu_maxpool2_bwd_kernel[(cdiv(windows, BLOCK),)](
            grad, out, windows, c, p, q, cdiv(p, 2), cdiv(q, 2), INDEX_64=y.numel() + 4 * BLOCK > INT32_MAX, BLOCK=BLOCK
        )
    return out.to(dtype)
