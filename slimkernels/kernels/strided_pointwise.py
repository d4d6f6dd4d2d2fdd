"""Strided 1x1 convolutions of few channels, computed so that oneDNN does not write outside its memory.

For the weight's (or bias') gradient of such a convolution in channels_last, oneDNN first gathers the pixels it reads
into a buffer, a whole vector of channels at a time. With fewer channels than the vector has lanes it writes past the
end of that buffer and corrupts the heap (uxlfoundation/oneDNN, issue 6035; seen in torch 2.14 with 2 to 15 channels on
AVX-512 and 2 to 7 on AVX2, in float32 and bfloat16). It does so where input or weight are channels_last and the image's
size is the output's size times the stride.

The rows and columns behind the last pixel read take part in nothing. Without them the size is no longer the output's
times the stride, oneDNN computes the gradient by another kernel, and every result stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# The widest vectors have 16 float32 or 32 bfloat16 lanes. Wider layers keep oneDNN's kernel: it is up to twice as fast.
_LANES = 32


def pixels_read(
    x: Tensor, weight: Tensor, stride: int | Sequence[int], padding: int | str | Sequence[int] = 0
) -> Tensor:
    """What a convolution reads of its input: ``x`` without the borders behind the last pixel read.

    Args:
        x: ``(N, C_in, *image)`` or ``(C_in, *image)``, with one to three image dimensions.
        weight: ``(C_out, C_in / groups, *kernel)``.
        stride: as ``torch.nn.functional.conv2d`` takes it.
        padding: as ``torch.nn.functional.conv2d`` takes it.

    Returns:
        A view of ``x``; ``x`` itself unless it is on a CPU and the convolution is a strided 1x1 one of few channels.
    """
    image = weight.dim() - 2
    strides = [stride] * image if isinstance(stride, int) else [*stride] * (image if len(stride) == 1 else 1)
    if (
        x.device.type != "cpu"
        or weight.shape[1] >= _LANES
        or max(strides) == 1
        or any(size != 1 for size in weight.shape[2:])
        or not _is_zero(padding)
    ):
        return x
    for dim, step in enumerate(strides, start=x.dim() - image):
        last = (x.shape[dim] - 1) // step * step
        if last + 1 < x.shape[dim]:
            x = x.narrow(dim, 0, last + 1)
    return x


def _is_zero(padding: int | str | Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding == "valid"
    return padding == 0 if isinstance(padding, int) else not any(padding)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input ``(N, C_in, H, W)`` and weight, groups = 1; None where not asked for."""
    read = pixels_read(x, weight, stride, padding)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, read, weight, None, list(stride), list(padding), list(dilation), False, [0, 0], 1, [*output_mask, False]
    )
    if output_mask[0] and read is not x:
        grad_x = F.pad(grad_x, (0, x.shape[3] - read.shape[3], 0, x.shape[2] - read.shape[2]))
    return grad_x, grad_weight
