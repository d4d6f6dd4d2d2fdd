"""`batch_norm`: checks, implementation, fake and autograd of a training step's batch norm with what is behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import resolve_gradient
from slimkernels.kernels import reference
from slimkernels.kernels.problems import Request
from slimkernels.ops import transforms
from slimkernels.ops.calls import BatchNormBackwardCall, BatchNormForwardCall
from slimkernels.ops.library import check_bias, check_epilogue, has_tangent, register, register_gradient, run

_OP = "batch_norm"


def _output_shape(call: BatchNormForwardCall | BatchNormBackwardCall) -> tuple[int, int, int, int]:
    """The checked output shape."""
    x, weight, bias = call.x, call.weight, call.bias
    check_epilogue("batch_norm_forward", call.epilogue)
    if not x.is_floating_point():
        raise TypeError(f"{_OP}: expected floating-point x, got {x.dtype}")
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"{_OP}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError(f"{_OP}: expected weight and bias or neither, got one of them")
    n, c, p, q = x.shape
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (c,):
            raise ValueError(f"{_OP}: expected {name} of shape ({c},), got {tuple(tensor.shape)}")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(
                f"{_OP}: expected {name} of a floating-point dtype on {x.device} like x, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if call.epilogue == "relu_maxpool2":
        p, q = p // 2, q // 2
    if p < 1 or q < 1:
        raise ValueError(f"{_OP}: expected an output of at least 1x1, got {p}x{q} from x of shape {tuple(x.shape)}")
    return n, c, p, q


def _kernel(op: str, call: BatchNormForwardCall | BatchNormBackwardCall) -> Any:
    request = Request(op, call.x.dtype, call.x.device.type, (1, 1), call.epilogue)
    return resolve_gradient(call.kernel, request).launch


def _batch_norm_forward(call: BatchNormForwardCall) -> tuple[Tensor, Tensor]:
    n, _, _, _ = _output_shape(call)
    if n * call.x.shape[2] * call.x.shape[3] < 2:
        raise ValueError(f"{_OP}: expected more than one value a channel, got x of shape {tuple(call.x.shape)}")
    return _kernel("batch_norm_forward", call)(*call[:-1])


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(call: BatchNormForwardCall) -> tuple[Tensor, Tensor]:
    shape, x = _output_shape(call), call.x
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty((3, x.shape[1]), dtype=_statistics_dtype(x), device=x.device)


def _batch_norm_backward(call: BatchNormBackwardCall) -> tuple[Tensor, Tensor]:
    shape, x, statistics = _output_shape(call), call.x, call.statistics
    if tuple(call.grad.shape) != shape or call.grad.dtype != x.dtype or call.grad.device != x.device:
        raise ValueError(
            f"batch_norm_backward: expected grad of shape {shape} and {x.dtype} on {x.device}, "
            f"got {tuple(call.grad.shape)} and {call.grad.dtype} on {call.grad.device}"
        )
    if statistics.shape != (3, x.shape[1]) or statistics.dtype != _statistics_dtype(x):
        raise ValueError(
            f"batch_norm_backward: expected statistics of shape {(3, x.shape[1])} and {_statistics_dtype(x)}, "
            f"got {tuple(statistics.shape)} and {statistics.dtype}"
        )
    return _kernel("batch_norm_backward", call)(*call[:-1])


def _backward_fake(call: BatchNormBackwardCall) -> tuple[Tensor, Tensor]:
    _output_shape(call)
    x = call.x
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return grad_x, torch.empty((2, x.shape[1]), dtype=_statistics_dtype(x), device=x.device)


register("batch_norm_forward", _batch_norm_forward, _forward_fake)
register("batch_norm_backward", _batch_norm_backward, _backward_fake)


def _setup_context(ctx: Any, call: BatchNormForwardCall, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(call.x, call.weight, call.bias, output[1])
    ctx.settings = (call.eps, call.epilogue, call.kernel)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """The statistics have no gradient: running averages are made of them."""
    x, weight, bias, statistics = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    eps, epilogue, kernel = ctx.settings
    kernel = kernel.replace("_forward", "_backward")
    call = BatchNormBackwardCall(grad, x, weight, bias, statistics, eps, epilogue, kernel)
    grad_x, sums = run("batch_norm_backward", call, grad, x, weight, bias, statistics)
    of_bias = of_weight = None
    if weight is not None and ctx.needs_input_grad[1]:
        of_weight = sums[1].to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[2]:
        of_bias = sums[0].to(bias.dtype)
    return grad_x if ctx.needs_input_grad[0] else None, of_weight, of_bias, None, None, None


register_gradient("batch_norm_forward", _autograd, _setup_context)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    epilogue: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """Batch norm of a training step, and the ReLU and max-pool behind it: ``epilogue(batch_norm(x))``.

    The statistics are those of ``x`` (Ioffe and Szegedy, arXiv 1502.03167, algorithm 1), in float32. Gradients are
    those of torch's ops one after the other, the choice of equals in a pool's window included; the gradient of a
    gradient is not there. Inputs with tangents of forward-mode differentiation run the reference kernel, and under
    a transform of torch.func torch's functions compute it, without running statistics.

    Args:
        x: ``(N, C, H, W)`` floating point, any strides, more than one value a channel.
        weight: ``(C,)`` of any floating-point dtype, or None.
        bias: ``(C,)``, or None with ``weight``.
        running_mean: ``(C,)`` in float32 (float64 for float64 x), updated in place; None to leave it out.
        running_var: as ``running_mean``, of the unbiased variance.
        momentum: the share of ``x`` in the new running statistics.
        eps: added to the variance.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2`` (2x2, stride 2, floor mode).
        kernel: name of a ``batch_norm_forward`` kernel in `slimkernels.kernels.KERNELS`, or ``auto``.

    Returns:
        ``(N, C, H, W)``, or ``(N, C, H // 2, W // 2)`` behind a max-pool, channels_last, in x's dtype.

    Raises:
        ValueError: wrong shapes, devices, epilogue; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    call = BatchNormForwardCall(x, weight, bias, eps, epilogue, kernel)
    if transforms.transformed():
        _output_shape(call)
        if running_mean is not None or running_var is not None:
            raise ValueError(f"{_OP}: expected no running statistics under a transform of torch.func, got some")
        return transforms.batch_norm(call)
    if has_tangent(x, weight, bias):
        _output_shape(call)
        y, statistics = reference.batch_norm_forward(x, weight, bias, eps, epilogue)
    else:
        y, statistics = run("batch_norm_forward", call, x, weight, bias)
    if running_mean is not None and running_var is not None:
        for name, running in (("running_mean", running_mean), ("running_var", running_var)):
            check_bias(_OP, running, x.shape[1])
            if running.dtype != statistics.dtype:
                raise TypeError(f"{_OP}: expected {name} of dtype {statistics.dtype}, got {running.dtype}")
        with torch.no_grad():
            mean, _, var = statistics.detach()
            torch._foreach_lerp_([running_mean, running_var], [mean, var], momentum)
    return y
