"""The convolution of the reference kernels, and its gradients, whatever padding, dilation and stride."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.kernels import strided_pointwise
from slimkernels.kernels.problems import conv_output_image

# Pixels that a kernel reaches, pads or strides over, from which torch's convolution is not asked. Of such geometries a
# run under sanitizers crashed once in generated code, which is oneDNN's, and nearly no tap meets the image anyway. Nor
# is it asked where an output lies so far in the padding that no tap of it meets the image: oneDNN then reads and writes
# outside its memory (uxlfoundation/oneDNN, issue 5942; seen in torch 2.14 in float32 with channels_last images).
_FAR = 4096


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``F.conv2d``; where the geometry reaches far past the image, tap by tap."""
    if not _reaches_far(x, weight, stride, padding, dilation):
        return F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation))
    p, q = conv_output_image(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = x.new_zeros(x.shape[0], weight.shape[0], p, q)
    for i, j, inside, outside in _taps_inside(x.shape, (p, q), weight.shape, stride, padding, dilation):
        y[outside] += torch.einsum("oc,nchw->nohw", weight[:, :, i, j], x[inside])
    return y if bias is None else y + bias[:, None, None]


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolution`'s input and weight; None where ``output_mask`` is False."""
    if not _reaches_far(x, weight, stride, padding, dilation):
        return strided_pointwise.convolution_backward(grad, x, weight, stride, padding, dilation, output_mask)
    need_x, need_weight = output_mask
    grad_x = torch.zeros_like(x) if need_x else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    taps = _taps_inside(x.shape, grad.shape[2:], weight.shape, stride, padding, dilation)
    for i, j, inside, outside in taps:
        if grad_x is not None:
            grad_x[inside] += torch.einsum("oc,nohw->nchw", weight[:, :, i, j], grad[outside])
        if grad_weight is not None:
            grad_weight[:, :, i, j] = torch.einsum("nohw,nchw->oc", grad[outside], x[inside])
    return grad_x, grad_weight


def _reaches_far(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        reach = d * (k - 1)
        if max(s, p, reach) >= _FAR:
            return True
        # The last tap of the first output lies before the image, or the whole image between two taps of an output.
        if p > reach or (p > 0 and size < d and k > 1):
            return True
    return False


def _taps_inside(
    x_shape: Sequence[int],
    out: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[tuple[int, int, tuple[slice, ...], tuple[slice, ...]]]:
    """``(row, column, pixels, outputs)`` of every tap that meets the image: the outputs read the pixels there."""

    def seen(axis: int, tap: int) -> tuple[slice, slice] | None:
        step, shift = stride[axis], tap * dilation[axis] - padding[axis]
        first, last = max(0, -(shift // step)), min(out[axis] - 1, (x_shape[2 + axis] - 1 - shift) // step)
        if first > last:
            return None
        start = first * step + shift
        return slice(start, start + (last - first) * step + 1, step), slice(first, last + 1)

    every = slice(None)
    columns = [(j, found) for j in range(weight_shape[3]) if (found := seen(1, j)) is not None]
    for i in range(weight_shape[2]):
        rows = seen(0, i)
        if rows is not None:
            for j, (pixels, outputs) in columns:
                yield i, j, (every, every, rows[0], pixels), (every, every, rows[1], outputs)
