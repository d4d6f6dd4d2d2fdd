"""`low_rank_linear` and `low_rank_conv2d`: checks, implementation, fake, autograd and autocast of the low-rank ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.dispatch.select import choose, launcher, resolve_gradient
from slimkernels.formats import factor_obstacle
from slimkernels.kernels import KERNELS, reference
from slimkernels.kernels.far_taps import convolution, convolution_backward
from slimkernels.kernels.problems import (
    LowRankConvProblem,
    LowRankLinearProblem,
    Request,
    check_geometry,
    conv_output_image,
    factor_geometry,
)
from slimkernels.ops import transforms
from slimkernels.ops.calls import LowRankConv2dCall, LowRankLinearCall, LowRankLinearDgradCall
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


def _check_linear(call: LowRankLinearCall) -> None:
    op, x, U, V, bias = "low_rank_linear", call.x, call.U, call.V, call.bias
    check_epilogue(op, call.epilogue)
    check_floating(op, x, U=U, V=V, bias=bias)
    if U.dim() != 2 or V.dim() != 2 or U.shape[1] != V.shape[0] or min(*U.shape, *V.shape) < 1:
        raise ValueError(
            f"{op}: expected U of shape (out, rank) and V of shape (rank, in), all positive, "
            f"got {tuple(U.shape)} and {tuple(V.shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != V.shape[1]:
        raise ValueError(f"{op}: expected x of shape (..., {V.shape[1]}), got {tuple(x.shape)}")
    check_bias(op, bias, U.shape[0])


def _without_pack(op: str, call: LowRankLinearCall | LowRankConv2dCall) -> str:
    """The kernel, or torch's layers where ``auto`` would choose a CPU kernel and pack the weight in every call."""
    if call.kernel == "auto" and not call.packed and call.x.device.type == "cpu" and env.backend() == "auto":
        return f"{op}__reference"
    return call.kernel


def _low_rank_linear(call: LowRankLinearCall) -> Tensor:
    _check_linear(call)
    x, U, V, bias, packed, epilogue, _ = call
    rank, in_features = V.shape
    rows = x.numel() // max(in_features, 1)
    sizes = (rows, in_features, U.shape[0], rank, x.dtype, x.device.type, epilogue)
    launch = launcher(_without_pack("low_rank_linear", call), x.get_device(), LowRankLinearProblem, *sizes)
    return launch(x.contiguous(), U.contiguous(), V.contiguous(), bias, packed, epilogue).contiguous()


def _low_rank_linear_fake(call: LowRankLinearCall) -> Tensor:
    _check_linear(call)
    return call.x.new_empty((*call.x.shape[:-1], call.U.shape[0]))


def _conv2d_output_shape(call: LowRankConv2dCall) -> tuple[int, int, int, int]:
    """The checked output shape of `low_rank_conv2d`."""
    op, x, factors = "low_rank_conv2d", call.x, call.factors
    check_epilogue(op, call.epilogue)
    obstacle = factor_obstacle(call.kind, tuple(tuple(f.shape) for f in factors))
    if obstacle is not None:
        raise ValueError(f"{op}: {obstacle}")
    check_floating(op, x, **{f"factors[{i}]": f for i, f in enumerate(factors)}, bias=call.bias)
    positive = all(min(f.shape) > 0 for f in factors)
    if not positive or factors[0].dim() != 4 or x.dim() != 4 or x.shape[1] != factors[0].shape[1]:
        raise ValueError(
            f"{op}: expected x of shape (N, {factors[0].shape[1]}, H, W) and 4-D factors of positive sizes, "
            f"got {tuple(x.shape)} and {[tuple(f.shape) for f in factors]}"
        )
    check_geometry(op, call.stride, call.padding, call.dilation)
    check_bias(op, call.bias, factors[-1].shape[0])
    image: Sequence[int] = x.shape[2:]
    for factor, geometry in zip(factors, _geometry(call)):
        image = conv_output_image(image, factor.shape[2:], *geometry)
    h, w = image
    if h < 1 or w < 1:
        raise ValueError(f"{op}: expected an output of at least 1x1, got {h}x{w} from x of shape {tuple(x.shape)}")
    return x.shape[0], factors[-1].shape[0], h, w


def _geometry(call: LowRankConv2dCall) -> list[Any]:
    """Stride, padding and dilation of every factor."""
    geometry = tuple(call.stride), tuple(call.padding), tuple(call.dilation)
    # For mypy: pairs, as the schema says.
    return factor_geometry(call.kind, len(call.factors), *geometry)  # type: ignore[arg-type]


def _low_rank_conv2d(call: LowRankConv2dCall) -> Tensor:
    _conv2d_output_shape(call)
    x, factors, bias, packed, stride, padding, dilation, kind, epilogue, _ = call
    n, _, h, w = x.shape
    shapes = tuple(tuple(f.shape) for f in factors)
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    sizes = (n, h, w, kind, shapes, *geometry, x.dtype, x.device.type, epilogue)
    launch = launcher(_without_pack("low_rank_conv2d", call), x.get_device(), LowRankConvProblem, *sizes)
    x = x.contiguous(memory_format=torch.channels_last)
    return with_channels_last_strides(launch(x, factors, bias, packed, stride, padding, dilation, kind, epilogue))


def _low_rank_conv2d_fake(call: LowRankConv2dCall) -> Tensor:
    shape, x = _conv2d_output_shape(call), call.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _low_rank_linear_dgrad(call: LowRankLinearDgradCall) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_z)``, z = x V^T: the low-rank layer of grad with the factors' roles swapped, chosen as one."""
    op, (grad, U, V, kernel) = "low_rank_linear_dgrad", call
    check_floating(op, grad, U=U, V=V)
    if U.dim() != 2 or V.dim() != 2 or U.shape[1] != V.shape[0] or grad.shape[-1:] != U.shape[:1]:
        raise ValueError(
            f"{op}: expected grad (..., out), U (out, rank) and V (rank, in), "
            f"got {tuple(grad.shape)}, {tuple(U.shape)} and {tuple(V.shape)}"
        )
    (out_features, rank), in_features = U.shape, V.shape[1]
    if kernel == "auto":
        rows = grad.numel() // max(out_features, 1)
        swapped = LowRankLinearProblem(rows, out_features, in_features, rank, grad.dtype, grad.device.type)
        kernel = choose(swapped, index=grad.get_device()).name
    spec = resolve_gradient(kernel, Request("low_rank_linear_dgrad", grad.dtype, grad.device.type, (1, 1), "none"))
    grad_x, grad_z = spec.launch(grad.contiguous(), U.contiguous(), V.contiguous())
    return grad_x, grad_z


def _low_rank_linear_dgrad_fake(call: LowRankLinearDgradCall) -> tuple[Tensor, Tensor]:
    rows, (rank, in_features) = call.grad.shape[:-1], call.V.shape
    return call.grad.new_empty((*rows, in_features)), call.grad.new_empty((*rows, rank))


register("low_rank_linear", _low_rank_linear, _low_rank_linear_fake)
register("low_rank_linear_dgrad", _low_rank_linear_dgrad, _low_rank_linear_dgrad_fake)
register("low_rank_conv2d", _low_rank_conv2d, _low_rank_conv2d_fake)


def _linear_setup_context(ctx: Any, call: LowRankLinearCall, output: Tensor) -> None:
    ctx.save_for_backward(call.x, call.U, call.V, output if call.epilogue == "relu" else None)
    ctx.packed_count, ctx.kernel = len(call.packed), call.kernel


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, U, V, y = ctx.saved_tensors
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    need_x, need_u, need_v, need_bias = ctx.needs_input_grad[:4]
    grad2d, x2d = grad.reshape(-1, U.shape[0]), x.reshape(-1, V.shape[1])
    grad_x: Any = None
    grad_z: Any = None
    if need_x:
        call = LowRankLinearDgradCall(grad2d, U, V, ctx.kernel)
        grad_x, grad_z = run("low_rank_linear_dgrad", call, grad2d, U, V)
        grad_x = grad_x.reshape(x.shape)
    elif need_v:
        grad_z = grad2d @ U
    # z = x V^T is computed again: (rows, rank) values less to keep, for a fifth of the backward's multiply-adds.
    return (
        grad_x,
        grad2d.t() @ (x2d @ V.t()) if need_u else None,
        grad_z.t() @ x2d if need_v else None,
        grad2d.sum(0) if need_bias else None,
        [None] * ctx.packed_count,
        None,
        None,
    )


def _dgrad_setup_context(ctx: Any, call: LowRankLinearDgradCall, output: Any) -> None:
    ctx.save_for_backward(call.grad, call.U, call.V, output[1])


def _dgrad_autograd(ctx: Any, grad_grad_x: Tensor, grad_grad_z: Tensor) -> tuple[Any, ...]:
    grad, U, V, grad_z = (t.reshape(-1, t.shape[-1]) for t in ctx.saved_tensors)
    over_x, over_z = (t.reshape(-1, t.shape[-1]) for t in (grad_grad_x, grad_grad_z))
    inner = over_x @ V.t() + over_z
    shape = (*grad_grad_x.shape[:-1], U.shape[0])
    return (inner @ U.t()).reshape(shape), grad.t() @ inner, grad_z.t() @ over_x, None


def _conv2d_setup_context(ctx: Any, call: LowRankConv2dCall, output: Tensor) -> None:
    ctx.save_for_backward(call.x, output if call.epilogue == "relu" else None, *call.factors)
    ctx.packed_count, ctx.geometry = len(call.packed), _geometry(call)


def _conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, *factors = ctx.saved_tensors
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad = grad.contiguous(memory_format=torch.channels_last)
    inputs = [x]
    # Saved tensors have the dtype that the forward ran in, which autocast must not change again.
    with torch.autocast(x.device.type, enabled=False):
        for factor, (stride, padding, dilation) in zip(factors[:-1], ctx.geometry):
            inputs.append(convolution(inputs[-1], factor, None, stride, padding, dilation))
    need_x, need_factors, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    grad_bias = grad.sum((0, 2, 3)) if need_bias else None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    for i in reversed(range(len(factors))):
        stride, padding, dilation = ctx.geometry[i]
        need_input = i > 0 or need_x
        before, grad_factors[i] = convolution_backward(
            grad, inputs[i], factors[i], stride, padding, dilation, (need_input, bool(need_factors))
        )
        grad = grad if before is None else before  # None is the last one's, where x needs no gradient
    return grad if need_x else None, grad_factors, grad_bias, [None] * ctx.packed_count, *[None] * 6


register_gradient("low_rank_linear", _linear_autograd, _linear_setup_context)
register_gradient("low_rank_linear_dgrad", _dgrad_autograd, _dgrad_setup_context)
register_gradient("low_rank_conv2d", _conv2d_autograd, _conv2d_setup_context, lists_have_gradients=True)


def _autocast(device: str, call: LowRankLinearCall | LowRankConv2dCall) -> tuple[Any, ...]:
    """Cast to the autocast dtype, or to float32 where a pack or an explicit kernel does not take that."""
    dtype = torch.get_autocast_dtype(device)
    if call.packed or (call.kernel in KERNELS and dtype not in KERNELS[call.kernel].dtypes):
        dtype = torch.float32
    return cast_floats(call, dtype)


register_autocast("low_rank_linear_dgrad", lambda device, call: call)
register_autocast("low_rank_linear", _autocast)
register_autocast("low_rank_conv2d", _autocast)


def low_rank_linear(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    packed: Sequence[Tensor] = (),
    *,
    epilogue: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """Low-rank linear layer ``epilogue((x V^T) U^T + bias)``.

    Inputs with tangents of forward-mode differentiation run the reference kernel, whose derivatives are torch's. Under
    a transform of torch.func (vmap, grad, jacrev and others) torch's functions compute it factor by factor.

    Args:
        x: ``(..., in)`` floating point.
        U: ``(out, rank)`` in x's dtype, on x's device.
        V: ``(rank, in)`` in x's dtype, on x's device.
        bias: ``(out,)`` in x's dtype, on x's device, or None.
        packed: prepacked factors (`slimkernels.nn.LowRankLinear` keeps them), or empty. On a CPU ``auto`` runs torch's
            layers without them.
        epilogue: ``none`` or ``relu``.
        kernel: name of a kernel in `slimkernels.kernels.KERNELS`, or ``auto``.

    Returns:
        ``(..., out)`` contiguous.

    Raises:
        ValueError: wrong shapes, devices, epilogue; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    call = LowRankLinearCall(x, U, V, bias, list(packed), epilogue, kernel)
    if transforms.transformed():
        _check_linear(call)
        return transforms.low_rank_linear(call)
    if has_tangent(x, U, V, bias):
        _check_linear(call)
        return reference.low_rank_linear(x, U, V, bias, (), epilogue)
    return run("low_rank_linear", call, x, U, V, bias)


def low_rank_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    packed: Sequence[Tensor] = (),
    *,
    kind: str,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    epilogue: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """Low-rank 2-D convolution: the chain of its factor convolutions, bias and epilogue after the last.

    Forward mode and torch.func as `low_rank_linear`.

    Args:
        x: ``(N, C_in, H, W)`` floating point, any strides.
        factors: the ordered convolution weights of `slimkernels.formats.LowRankWeight` for ``kind``.
        bias: ``(C_out,)`` or None.
        packed: prepacked factors (`slimkernels.nn.LowRankConv2d` keeps them), or empty. On a CPU ``auto`` runs torch's
            convolutions without them.
        kind: ``svd`` (RxS then 1x1), ``tai`` (Rx1 then 1xS, arXiv 1511.06067) or ``tucker2`` (1x1, RxS, 1x1).
        stride: of the merged convolution, two ints (rows, columns).
        padding: of the merged convolution, two ints (rows, columns).
        dilation: of the merged convolution, two ints (rows, columns).
        epilogue: ``none`` or ``relu``.
        kernel: name of a kernel in `slimkernels.kernels.KERNELS`, or ``auto``.

    Returns:
        ``(N, C_out, P, Q)`` channels_last.

    Raises:
        ValueError: wrong shapes, devices, kind, epilogue; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    factors = list(factors)
    call = LowRankConv2dCall(x, factors, bias, list(packed), stride, padding, dilation, kind, epilogue, kernel)
    if transforms.transformed():
        _conv2d_output_shape(call)
        return transforms.low_rank_conv2d(call)
    if has_tangent(x, *factors, bias):
        _conv2d_output_shape(call)
        return reference.low_rank_conv2d(x, factors, bias, (), stride, padding, dilation, kind, epilogue)
    return run("low_rank_conv2d", call, x, *factors, bias)
