"""`bsr_conv2d` and `bsr_linear`: checks, implementation, fake, autograd and autocast of the block-sparse ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import launcher, resolve_gradient
from slimkernels.formats import block_grid, check_pattern
from slimkernels.kernels import KERNELS, KernelSpec, reference
from slimkernels.kernels.packs import ForwardOrder, kind_of
from slimkernels.kernels.problems import (
    INT32_MAX,
    ConvProblem,
    LinearProblem,
    Request,
    check_geometry,
    conv_output_image,
)
from slimkernels.kernels.transposed import check_transposed, pack_size
from slimkernels.kernels.triton.bsr_conv2d_index import check_order
from slimkernels.ops import transforms
from slimkernels.ops.calls import BSRConv2dBackwardCall, BSRConv2dCall, BSRLinearCall
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
from slimkernels.tensors import keep_for_graphs

_CHANNELS_LAST = torch.channels_last
_BSRCall = BSRConv2dCall | BSRConv2dBackwardCall | BSRLinearCall


# Checks


def _check_weight(op: str, call: _BSRCall, stride: Sequence[int]) -> None:
    x, values, weight_shape, block_shape = call.x, call.values, call.weight_shape, call.block_shape
    check_epilogue(op, call.epilogue)
    check_floating(op, x, values=values, bias=call.bias)
    if max(*weight_shape, *block_shape) > INT32_MAX:
        raise ValueError(
            f"{op}: expected weight_shape and block_shape below 2**31, got {tuple(weight_shape)}, {tuple(block_shape)}"
        )
    rows, _ = block_grid(weight_shape, block_shape)
    if values.dim() != 3 or values.shape[1] != block_shape[0] or values.shape[2] != block_shape[1]:
        raise ValueError(
            f"{op}: expected values of shape (nnz_blocks, {block_shape[0]}, {block_shape[1]}), "
            f"got {tuple(values.shape)}"
        )
    indices = [("crow_indices", call.crow_indices, rows + 1), ("col_indices", call.col_indices, values.shape[0])]
    if call.transposed is not None:
        shape = (*weight_shape, 1, 1)[:4]
        indices.append(("transposed", call.transposed, pack_size(values.shape[0], shape, block_shape, stride)))
    for name, index, size in indices:
        if index.dtype != torch.int32:
            raise TypeError(f"{op}: expected {name} of dtype torch.int32, got {index.dtype}")
        if index.dim() != 1 or index.shape[0] != size:
            raise ValueError(f"{op}: expected {name} of shape ({size},), got {tuple(index.shape)}")
        if index.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {index.device}")
    check_bias(op, call.bias, weight_shape[0])


def _conv2d_output_shape(call: BSRConv2dCall | BSRConv2dBackwardCall) -> tuple[int, int, int, int]:
    """The checked output shape of `bsr_conv2d`."""
    op, x, weight_shape, block_shape = "bsr_conv2d", call.x, call.weight_shape, call.block_shape
    if len(weight_shape) != 4 or len(block_shape) != 2:
        raise ValueError(
            f"{op}: expected weight_shape (C_out, C_in, R, S) and block_shape (block_out, block_in), "
            f"got {tuple(weight_shape)}, {tuple(block_shape)}"
        )
    if x.dim() != 4 or x.shape[1] != weight_shape[1]:
        raise ValueError(f"{op}: expected x of shape (N, {weight_shape[1]}, H, W), got {tuple(x.shape)}")
    stride, padding, dilation = call.stride, call.padding, call.dilation
    check_geometry(op, stride, padding, dilation)
    _check_weight(op, call, stride)
    n, _, h, w = x.shape
    c_out, _, r, s = weight_shape
    p, q = conv_output_image((h, w), (r, s), stride, padding, dilation)
    if call.epilogue == "relu_maxpool2":
        p, q = p // 2, q // 2
    if p < 1 or q < 1:
        raise ValueError(f"{op}: expected an output of at least 1x1, got {p}x{q} from x of shape {tuple(x.shape)}")
    return n, c_out, p, q


def _check_linear(call: BSRLinearCall) -> None:
    op, x, weight_shape = "bsr_linear", call.x, call.weight_shape
    if len(weight_shape) != 2 or len(call.block_shape) != 2:
        raise ValueError(
            f"{op}: expected weight_shape (out, in) and block_shape (block_out, block_in), "
            f"got {tuple(weight_shape)}, {tuple(call.block_shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != weight_shape[1]:
        raise ValueError(f"{op}: expected x of shape (..., {weight_shape[1]}), got {tuple(x.shape)}")
    _check_weight(op, call, (1, 1))


def _check_contents(op: str, call: BSRConv2dCall | BSRLinearCall) -> None:
    """Reads the indices, and an order of the Triton kernels, unless these very tensors were read before.

    The kernels follow them without a check of their own. Other packs are checked by the launchers of their kernels. A
    module drops and makes packs anew, so what a captured CUDA graph reads of them is kept here.
    """
    pattern = call.crow_indices, call.col_indices, call.weight_shape, (call.block_shape[0], call.block_shape[1])
    check_pattern(op, *pattern)
    if kind_of(call.packed) is ForwardOrder:
        check_order(op, call.packed[0], *pattern)
    keep_for_graphs(call.crow_indices, call.packed)


def _check_known_pattern(op: str, call: BSRConv2dCall | BSRLinearCall) -> None:
    """`check_pattern`, unless a transform of torch.func holds the indices: then they cannot be read."""
    if not transforms.is_wrapped(call.crow_indices, call.col_indices):
        check_pattern(op, call.crow_indices, call.col_indices, call.weight_shape, call.block_shape)


# The ops


def _bsr_conv2d(call: BSRConv2dCall) -> Tensor:
    _conv2d_output_shape(call)
    _check_contents("bsr_conv2d", call)
    x, values, crow, col, bias, packed, weight_shape, block_shape, stride, padding, dilation, epilogue, kernel, _ = call
    block = (block_shape[0], block_shape[1])
    n, c_in, h, w = x.shape
    c_out, _, r, s = weight_shape
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    sizes = (n, c_in, h, w, c_out, r, s, *geometry, block, values.shape[0], x.dtype, x.device.type, epilogue)
    launch = launcher(kernel, x.get_device(), ConvProblem, *sizes)
    x = x.contiguous(memory_format=_CHANNELS_LAST)
    weight = (values, crow.contiguous(), col.contiguous())
    y = launch(x, *weight, bias, packed, weight_shape, block, stride, padding, dilation, epilogue)
    return with_channels_last_strides(y)


def _bsr_conv2d_fake(call: BSRConv2dCall) -> Tensor:
    shape, x = _conv2d_output_shape(call), call.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)


def _bsr_linear(call: BSRLinearCall) -> Tensor:
    _check_linear(call)
    _check_contents("bsr_linear", call)
    x, values, crow, col, bias, packed, weight_shape, block_shape, epilogue, kernel, _ = call
    block = (block_shape[0], block_shape[1])
    out_features, in_features = weight_shape
    rows = x.numel() // in_features
    sizes = (rows, in_features, out_features, block, values.shape[0], x.dtype, x.device.type, epilogue)
    launch = launcher(kernel, x.get_device(), LinearProblem, *sizes)
    weight = (values, crow.contiguous(), col.contiguous())
    return launch(x.contiguous(), *weight, bias, packed, weight_shape, block, epilogue).contiguous()


def _bsr_linear_fake(call: BSRLinearCall) -> Tensor:
    _check_linear(call)
    return call.x.new_empty((*call.x.shape[:-1], call.weight_shape[0]))


def _bsr_conv2d_backward(call: BSRConv2dBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values and bias; an empty tensor where ``output_mask`` is False.

    Both gradient kernels read every element of ``grad`` many times, so the epilogue's mask is applied once before them
    rather than in their main loops. ``relu_maxpool2`` kept no output: it is computed again and overwritten with the
    gradient. The bias gradient is a pass of its own: block rows without stored blocks have one too.
    """
    op = "bsr_conv2d_backward"
    shape = _conv2d_output_shape(call)
    grad, x, y, epilogue = call.grad, call.x, call.y, call.epilogue
    check_floating(op, x, grad=grad, y=y)
    if tuple(grad.shape) != shape or (epilogue == "relu" and (y is None or tuple(y.shape) != shape)):
        raise ValueError(
            f"{op}: expected grad, and y with the epilogue 'relu', of shape {shape}, "
            f"got {tuple(grad.shape)} and {None if y is None else tuple(y.shape)}"
        )
    block = (call.block_shape[0], call.block_shape[1])
    pattern = call.crow_indices, call.col_indices, call.weight_shape, block
    need_x, need_values, need_bias = call.output_mask
    check_pattern(op, *pattern)
    if call.transposed is not None and need_x:
        check_transposed(op, call.transposed, *pattern, call.stride, call.dilation)
        keep_for_graphs(call.crow_indices, [call.transposed])

    def kernel(op: str, *args: Any) -> KernelSpec:
        return resolve_gradient(call.kernel, Request(op, x.dtype, x.device.type, block, "none"), call.stride, args)

    def launch(op: str, *args: Any) -> Tensor:
        return kernel(op, *args).launch(*args)

    grad = grad.contiguous(memory_format=_CHANNELS_LAST)
    if epilogue == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif epilogue == "relu_maxpool2":
        grad = launch("relu_maxpool2_backward", grad, _bsr_conv2d(_forward_of(call, "relu")))
    weight = (call.values.contiguous(), call.crow_indices.contiguous(), call.col_indices.contiguous())
    transposed = None if call.transposed is None else call.transposed.contiguous()
    geometry = (call.weight_shape, block, call.stride, call.padding, call.dilation)
    grad_x, grad_values = x.new_empty(0), x.new_empty(0)
    if need_values:
        arguments = (grad, x.contiguous(memory_format=_CHANNELS_LAST), *weight, *geometry)
        spec, dtype = kernel("bsr_conv2d_wgrad", *arguments), call.values_dtype or call.values.dtype
        if spec.backend == "triton" and dtype != call.values.dtype:
            # It rounds to the dtype of the values that it is given, whose contents it does not read.
            arguments = (*arguments[:2], torch.empty_like(weight[0], dtype=dtype), *arguments[3:])
        grad_values = spec.launch(*arguments).to(dtype)
    grad_bias = launch("bsr_conv2d_bias_grad", grad) if need_bias else x.new_empty(0)
    if need_x:  # last: the layer in front reads it next, while a GPU's L2 has it
        grad_x = launch("bsr_conv2d_dgrad", grad, *weight, transposed, tuple(x.shape[2:]), *geometry)
        grad_x = with_channels_last_strides(grad_x)
    return grad_x, grad_values, grad_bias


def _forward_of(call: BSRConv2dBackwardCall, epilogue: str) -> BSRConv2dCall:
    """The forward that a backward belongs to, with another epilogue and without a pack."""
    tensors = (call.x, call.values, call.crow_indices, call.col_indices, call.bias)
    return BSRConv2dCall(*tensors, packed=(), **{**_settings(call), "epilogue": epilogue})


def _bsr_conv2d_backward_fake(call: BSRConv2dBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    x, values = call.x, call.values
    need_x, need_values, need_bias = call.output_mask
    grad_x = grad_values = x.new_empty(0)
    if need_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)
    if need_values:
        grad_values = torch.empty_like(values, dtype=call.values_dtype, memory_format=torch.contiguous_format)
    return grad_x, grad_values, x.new_empty(call.weight_shape[0] if need_bias else 0)


register("bsr_conv2d", _bsr_conv2d, _bsr_conv2d_fake)
register("bsr_conv2d_backward", _bsr_conv2d_backward, _bsr_conv2d_backward_fake)
register("bsr_linear", _bsr_linear, _bsr_linear_fake)


# Autograd

_SETTINGS = ("weight_shape", "block_shape", "stride", "padding", "dilation", "epilogue", "kernel")


def _settings(call: _BSRCall) -> dict[str, Any]:
    """The arguments of a call that are no tensors, by name."""
    return {name: getattr(call, name) for name in _SETTINGS if name in call._fields}


def _setup_context(ctx: Any, call: BSRConv2dCall | BSRLinearCall, output: Tensor) -> None:
    y = output if call.epilogue == "relu" else None
    weight = call.values, call.crow_indices, call.col_indices
    ctx.save_for_backward(call.x, *weight, call.bias, y, call.transposed)
    ctx.settings, ctx.packed_count = _settings(call), len(call.packed)


def _gradients(ctx: Any, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
    """One gradient for each argument that reached autograd: torch's dispatcher leaves out a last one at its default,
    and up to torch 2.11 one gradient more than arguments is an error where an argument is a list of tensors.
    """
    need_x, need_values, need_bias = _output_mask(ctx)
    grad_x, grad_values, grad_bias = grads
    first = (
        grad_x if need_x else None,
        grad_values if need_values else None,
        None,
        None,
        grad_bias if need_bias else None,
        [None] * ctx.packed_count,
    )
    return (*first, *[None] * (len(ctx.needs_input_grad) - len(first)))


def _output_mask(ctx: Any) -> list[bool]:
    needs = BSRConv2dCall._fields.index
    return [ctx.needs_input_grad[needs(name)] for name in ("x", "values", "bias")]


def _values_dtype(ctx: Any) -> torch.dtype | None:
    """That of the values before autocast: their gradient is then rounded once, and cast by no kernel of its own."""
    return getattr(ctx, "dtypes", {}).get("values")


def _bsr_conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    settings = {**ctx.settings, "output_mask": _output_mask(ctx), "values_dtype": _values_dtype(ctx)}
    call = BSRConv2dBackwardCall(grad, *ctx.saved_tensors, **settings)
    return _gradients(ctx, _run_backward(call))


def _run_backward(call: BSRConv2dBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    return run("bsr_conv2d_backward", call, call.grad, call.x, call.values, call.bias, call.y)


def _bsr_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """That of the 1x1 convolution of images of one pixel, one image a row."""
    x, values, crow, col, bias, y, transposed = ctx.saved_tensors
    pixels: list[Any] = [None if t is None else t.reshape(-1, t.shape[-1], 1, 1) for t in (grad, x, y)]
    rows_of_grad, rows, rows_of_y = pixels
    settings = {
        **ctx.settings,
        "weight_shape": [*ctx.settings["weight_shape"], 1, 1],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "output_mask": _output_mask(ctx),
        "values_dtype": _values_dtype(ctx),
    }
    call = BSRConv2dBackwardCall(rows_of_grad, rows, values, crow, col, bias, rows_of_y, transposed, **settings)
    grad_x, grad_values, grad_bias = _run_backward(call)
    if ctx.needs_input_grad[0]:
        grad_x = grad_x.reshape(x.shape)
    return _gradients(ctx, (grad_x, grad_values, grad_bias))


def _second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError("bsr_conv2d: expected to be differentiated once, got a second derivative")


register_gradient("bsr_conv2d", _bsr_conv2d_autograd, _setup_context, casts_inside=True)
register_gradient("bsr_linear", _bsr_linear_autograd, _setup_context, casts_inside=True)
register_gradient("bsr_conv2d_backward", _second_derivative)


# Autocast


def _autocast(device: str, call: BSRConv2dCall | BSRLinearCall) -> tuple[Any, ...]:
    """On CUDA, cast to the autocast dtype unless an explicit kernel does not take it; elsewhere keep float32.

    The CPU kernels are float32: casting down would trade them for the reference.
    """
    dtype = torch.get_autocast_dtype(device) if device == "cuda" else torch.float32
    if call.kernel in KERNELS and dtype not in KERNELS[call.kernel].dtypes:
        dtype = torch.float32
    packed = list(call.packed)
    if call.values.dtype != dtype and kind_of(packed) is not ForwardOrder:
        packed = []  # weights in another dtype; an order of blocks holds for every dtype
    return cast_floats(call._replace(packed=packed), dtype)


register_autocast("bsr_conv2d", _autocast)
register_autocast("bsr_linear", _autocast)
register_autocast("bsr_conv2d_backward", lambda device, call: call)


# The functions


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    packed: Sequence[Tensor] = (),
    *,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    epilogue: str = "none",
    kernel: str = "auto",
    transposed: Tensor | None = None,
) -> Tensor:
    """Block-sparse 2-D convolution (cross-correlation, as torch's), groups = 1.

    Inputs with tangents of forward-mode differentiation run the reference kernel, whose derivatives are torch's. Under
    a transform of torch.func (vmap, grad, jacrev and others) torch's functions compute it from the dense weight.

    Args:
        x: ``(N, C_in, H, W)`` floating point, any strides; converted to channels_last where it is not. N = 0 is legal.
        values: ``(nnz_blocks, block_out, block_in)``, the stored blocks of a `slimkernels.formats.BSRWeight`, in x's
            dtype, on x's device.
        crow_indices: int32 row pointers of its pattern, on x's device.
        col_indices: int32 block columns of its pattern, on x's device.
        bias: ``(C_out,)`` in x's dtype, or None.
        packed: prepacked weight of the kernel (`slimkernels.nn.BlockSparseConv2d` keeps it), or empty. Its numbers and
            those of the indices are checked, once for tensors that nobody writes to.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        stride: two ints (rows, columns).
        padding: two ints (rows, columns).
        dilation: two ints (rows, columns).
        epilogue: ``none``, ``relu``, or ``relu_maxpool2`` (ReLU, then 2x2 max-pool of stride 2, floor mode).
        kernel: name of a kernel in `slimkernels.kernels.KERNELS`, or ``auto``; the gradients run on the same backend.
        transposed: `slimkernels.kernels.transposed.transpose_index` of the pattern at this stride and dilation, for the
            gradient of x; None has it built in each backward that needs it.

    Returns:
        ``(N, C_out, P, Q)`` channels_last; P, Q halved by ``relu_maxpool2``. A non-finite input reaches exactly the
        outputs whose stored blocks read it.

    Raises:
        ValueError: wrong shapes, devices, epilogue, indices, pack; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    weight, geometry = (values, crow_indices, col_indices), (weight_shape, block_shape, stride, padding, dilation)
    call = BSRConv2dCall(x, *weight, bias, list(packed), *geometry, epilogue, kernel, transposed)
    if transforms.transformed():
        _conv2d_output_shape(call)
        _check_known_pattern("bsr_conv2d", call)
        return transforms.bsr_conv2d(call)
    if has_tangent(x, values, bias):
        _conv2d_output_shape(call)
        check_pattern("bsr_conv2d", crow_indices, col_indices, weight_shape, block_shape)
        return reference.bsr_conv2d(x, *weight, bias, (), *geometry, epilogue)
    return run("bsr_conv2d", call, x, *weight, bias)


def bsr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    packed: Sequence[Tensor] = (),
    *,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str = "none",
    kernel: str = "auto",
    transposed: Tensor | None = None,
) -> Tensor:
    """Block-sparse linear layer ``epilogue(x W^T + bias)``; forward mode and torch.func as `bsr_conv2d`.

    Args:
        x: ``(..., in)`` floating point.
        values: ``(nnz_blocks, block_out, block_in)``, the stored blocks of a `slimkernels.formats.BSRWeight`, in x's
            dtype, on x's device.
        crow_indices: int32 row pointers of its pattern, on x's device.
        col_indices: int32 block columns of its pattern, on x's device.
        bias: ``(out,)`` in x's dtype, or None.
        packed: prepacked weight of the kernel, or empty.
        weight_shape: ``(out, in)``.
        block_shape: ``(block_out, block_in)``.
        epilogue: ``none`` or ``relu``.
        kernel: name of a kernel in `slimkernels.kernels.KERNELS`, or ``auto``; the gradients run on the same backend.
        transposed: `slimkernels.kernels.transposed.transpose_index` of the pattern, or None.

    Returns:
        ``(..., out)`` contiguous.

    Raises:
        ValueError: wrong shapes, devices, epilogue, indices, pack; a kernel that is unknown or cannot run here.
        TypeError: wrong dtypes.
    """
    weight, sizes = (values, crow_indices, col_indices), (weight_shape, block_shape)
    call = BSRLinearCall(x, *weight, bias, list(packed), *sizes, epilogue, kernel, transposed)
    if transforms.transformed():
        _check_linear(call)
        _check_known_pattern("bsr_linear", call)
        return transforms.bsr_linear(call)
    if has_tangent(x, values, bias):
        _check_linear(call)
        check_pattern("bsr_linear", crow_indices, col_indices, weight_shape, block_shape)
        return reference.bsr_linear(x, *weight, bias, (), *sizes, epilogue)
    return run("bsr_linear", call, x, *weight, bias)
