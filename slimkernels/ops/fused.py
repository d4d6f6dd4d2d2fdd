"""`fused_conv2d`: checks, implementation, fake, autograd and autocast of dense convolutions with a fused epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import launcher
from slimkernels.kernels import KERNELS, reference
from slimkernels.kernels.far_taps import convolution, convolution_backward
from slimkernels.kernels.problems import FusedConvProblem, check_geometry, conv_output_image
from slimkernels.ops import transforms
from slimkernels.ops.calls import FusedConv2dCall
from slimkernels.ops.library import (
    cast_floats,
    check_bias,
    check_epilogue,
    check_floating,
    has_tangent,
    register,
    register_autocast,
    register_gradient,
    run,
    with_channels_last_strides,
)

_OP = "fused_conv2d"


def _output_shape(call: FusedConv2dCall) -> tuple[int, int, int, int]:
    """The checked output shape."""
    x, weight, bias = call.x, call.weight, call.bias
    check_epilogue(_OP, call.epilogue)
    check_floating(_OP, x, weight=weight, bias=bias)
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(f"{_OP}: expected weight of shape (C_out, C_in, R, S), got {tuple(weight.shape)}")
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{_OP}: expected x of shape (N, {weight.shape[1]}, H, W), got {tuple(x.shape)}")
    geometry = call.stride, call.padding, call.dilation
    check_geometry(_OP, *geometry)
    check_bias(_OP, bias, weight.shape[0])
    p, q = conv_output_image(x.shape[2:], weight.shape[2:], *geometry)
    if call.epilogue == "relu_maxpool2":
        p, q = p // 2, q // 2
    if p < 1 or q < 1:
        raise ValueError(f"{_OP}: expected an output of at least 1x1, got {p}x{q} from x of shape {tuple(x.shape)}")
    return x.shape[0], weight.shape[0], p, q


def _fused_conv2d(call: FusedConv2dCall) -> Tensor:
    _output_shape(call)
    x, weight, bias, stride, padding, dilation, epilogue, kernel = call
    n, c_in, h, w = x.shape
    c_out, _, r, s = weight.shape
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    sizes = (n, c_in, h, w, c_out, r, s, *geometry, x.dtype, x.device.type, epilogue)
    launch = launcher(kernel, x.get_device(), FusedConvProblem, *sizes)
    return with_channels_last_strides(launch(x, weight, bias, stride, padding, dilation, epilogue))


def _fused_conv2d_fake(call: FusedConv2dCall) -> Tensor:
    shape, x = _output_shape(call), call.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


register(_OP, _fused_conv2d, _fused_conv2d_fake)


def _setup_context(ctx: Any, call: FusedConv2dCall, output: Tensor) -> None:
    ctx.geometry, ctx.epilogue = (call.stride, call.padding, call.dilation), call.epilogue
    ctx.save_for_backward(call.x, call.weight, call.bias, output if call.epilogue == "relu" else None)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, y = ctx.saved_tensors
    stride, padding, dilation = ctx.geometry
    # Saved tensors have the dtype that the forward ran in, which autocast must not change again.
    with torch.autocast(x.device.type, enabled=False):
        if ctx.epilogue == "relu_maxpool2":  # the pooled output does not tell which pixel of a window it came from
            y = torch.relu(convolution(x, weight, bias, stride, padding, dilation)).detach()
            grad = reference.relu_maxpool2_backward(grad, y.contiguous(memory_format=torch.channels_last))
        elif y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.contiguous(memory_format=torch.channels_last)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight = convolution_backward(grad, x, weight, stride, padding, dilation, (need_x, need_weight))
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if need_bias else None, *[None] * 5


register_gradient(_OP, _autograd, _setup_context)


def _autocast(device: str, call: FusedConv2dCall) -> tuple[Any, ...]:
    """Cast to the autocast dtype, or to float32 where an explicit kernel does not take that."""
    dtype = torch.get_autocast_dtype(device)
    if call.kernel in KERNELS and dtype not in KERNELS[call.kernel].dtypes:
        dtype = torch.float32
    return cast_floats(call, dtype)


register_autocast(_OP, _autocast)


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    epilogue: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """Dense 2-D convolution ``epilogue(conv2d(x, weight) + bias)`` with the epilogue in the same kernel.

    Inputs with tangents of forward-mode differentiation run the reference kernel, whose derivatives are torch's. Under
    a transform of torch.func (vmap, grad, jacrev and others) torch's functions compute it.
    Gradients are those of torch's convolution.

    Args:
        x: ``(N, C_in, H, W)`` floating point, any strides.
        weight: ``(C_out, C_in, R, S)``, best in channels_last.
        bias: ``(C_out,)`` or None. In x's dtype, on its device.
        stride: two ints (rows, columns).
        padding: two ints (rows, columns).
        dilation: two ints (rows, columns).
        epilogue: ``none``, ``relu`` or ``relu_maxpool2`` (2x2, stride 2, floor mode).
        kernel: name of a kernel in `slimkernels.kernels.KERNELS`, or ``auto``.

    Returns:
        ``(N, C_out, P, Q)`` channels_last.

    Raises:
        ValueError: wrong shapes, devices, epilogue; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    call = FusedConv2dCall(x, weight, bias, stride, padding, dilation, epilogue, kernel)
    if transforms.transformed():
        _output_shape(call)
        return transforms.fused_conv2d(call)
    if has_tangent(x, weight, bias):
        _output_shape(call)
        return reference.fused_conv2d(x, weight, bias, stride, padding, dilation, epilogue)
    return run(_OP, call, x, weight, bias)
