"""Launcher of the C++ gradient of stored weights: what the kernel trusts is checked here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import WeightGradientArguments, address
from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.problems import INT32_MAX, conv_output_image

# A vector of 8 floats holds output channels of one block.
BLOCK_MULTIPLE = 8
# Floats at most that the kernel copies of one output row and of what it reads: far more than any cache holds.
_MOST_COPIED = 2**24


def takes_shapes(
    grad: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether the kernel runs on this problem, which the op has checked."""
    (c_out, c_in, r, s), (block_out, block_in) = weight_shape, block_shape
    rows, groups = -(-c_out // block_out), -(-c_in // block_in)
    if block_out % BLOCK_MULTIPLE or min(grad.numel(), x.numel()) == 0:
        return False
    image, output = math.prod(x.shape[2:]) * groups * block_in, math.prod(grad.shape[2:]) * rows * block_out
    largest = max(image, output, r * s * groups, block_out * block_in, *padding, *dilation)
    read = min(x.shape[2], dilation[0] * (r - 1) + 1) * x.shape[3] * groups * block_in
    return largest <= INT32_MAX and max(read, grad.shape[3] * rows * block_out) <= _MOST_COPIED


def weight_gradient(
    isa: str,
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
) -> Tensor:
    """The gradient of ``values`` for a valid pattern and a problem that `takes_shapes`; spare blocks get 0.

    Raises:
        ValueError: tensors of another shape, dtype or device. RuntimeError: the native kernel failed (out of memory).
    """
    c_out, c_in, r, s = weight_shape
    n, _, h, w = x.shape
    p, q = conv_output_image((h, w), (r, s), stride, padding, dilation)
    floats = all(t.dtype is torch.float32 and t.is_cpu for t in (grad, x, values))
    indices = all(t.dtype is torch.int32 and t.is_cpu for t in (crow_indices, col_indices))
    fits = grad.shape == (n, c_out, p, q) and x.shape[1] == c_in and values.shape[1:] == tuple(block_shape)
    fits = fits and crow_indices.shape == (-(-c_out // block_shape[0]) + 1,)
    fits = (
        fits
        and col_indices.shape == values.shape[:1]
        and takes_shapes(grad, x, weight_shape, block_shape, padding, dilation)
    )
    if not (floats and indices and fits):
        raise ValueError(
            f"bsr_conv2d_wgrad: expected float32 grad, x and values of one convolution on the CPU, got "
            f"{tuple(grad.shape)} {grad.dtype}, {tuple(x.shape)} {x.dtype} and {tuple(values.shape)} {values.dtype} "
            f"for a weight of shape {tuple(weight_shape)}"
        )
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad.detach(), x.detach()))
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    out = torch.zeros(values.shape)
    if out.numel() == 0:  # no block is stored
        return out
    addresses = (address(t) for t in (x, grad, out, crow_indices, col_indices))
    sizes = (n, h, w, c_in, c_out, p, q, r, s)
    arguments = WeightGradientArguments._make((*addresses, *sizes, *stride, *padding, *dilation, *block_shape))
    module = library()[0]
    assert module is not None
    status = module.weight_gradient_f32(isa, arguments, torch.get_num_threads())
    if status != 0:
        raise RuntimeError(f"bsr_conv2d_wgrad: native kernel {isa} failed with status {status}")
    return out
