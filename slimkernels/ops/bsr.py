"""`bsr_conv2d` and `bsr_linear`: checks, implementation, fake, autograd and autocast of the block-sparse ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import launcher, resolve_gradient
from slimkernels.formats import block_grid, check_pattern
from slimkernels.kernels import KERNELS, reference
from slimkernels.kernels.packs import ForwardOrder, kind_of
from slimkernels.kernels.problems import (
    INT32_MAX,
    ConvProblem,
    LinearProblem,
    Request,
    check_geometry,
    conv_output_size,
)
from slimkernels.kernels.transposed import check_transposed, pack_size
from slimkernels.kernels.triton.bsr_conv2d_index import check_order
from slimkernels.ops.library import (
    LIBRARY,
    OPS,
    cast_floats,
    check_bias,
    check_epilogue,
    check_floating,
    has_tangent,
    register,
    register_autocast,
    runs_plainly,
    with_channels_last_strides,
)

_CHANNELS_LAST = torch.channels_last


def _check_weight(
    op: str, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, weight_shape: Sequence[int],
    block_shape: Sequence[int], epilogue: str, transposed: Tensor | None, stride: Sequence[int] = (1, 1),
) -> None:  # fmt: skip
    check_epilogue(op, epilogue)
    check_floating(op, x, values=values, bias=bias)
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
    indices = [("crow_indices", crow, rows + 1), ("col_indices", col, values.shape[0])]
    if transposed is not None:
        shape = (*weight_shape, 1, 1)[:4]
        indices.append(("transposed", transposed, pack_size(values.shape[0], shape, block_shape, stride)))
    for name, index, size in indices:
        if index.dtype != torch.int32:
            raise TypeError(f"{op}: expected {name} of dtype torch.int32, got {index.dtype}")
        if index.dim() != 1 or index.shape[0] != size:
            raise ValueError(f"{op}: expected {name} of shape ({size},), got {tuple(index.shape)}")
        if index.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {index.device}")
    check_bias(op, bias, weight_shape[0])


def _conv2d_output_shape(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, weight_shape: Sequence[int],
    block_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], epilogue: str,
    transposed: Tensor | None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The checked output shape of `bsr_conv2d`."""
    op = "bsr_conv2d"
    if len(weight_shape) != 4 or len(block_shape) != 2:
        raise ValueError(
            f"{op}: expected weight_shape (C_out, C_in, R, S) and block_shape (block_out, block_in), "
            f"got {tuple(weight_shape)}, {tuple(block_shape)}"
        )
    if x.dim() != 4 or x.shape[1] != weight_shape[1]:
        raise ValueError(f"{op}: expected x of shape (N, {weight_shape[1]}, H, W), got {tuple(x.shape)}")
    check_geometry(op, stride, padding, dilation)
    _check_weight(op, x, values, crow, col, bias, weight_shape, block_shape, epilogue, transposed, stride)
    p = conv_output_size(x.shape[2], weight_shape[2], stride[0], padding[0], dilation[0])
    q = conv_output_size(x.shape[3], weight_shape[3], stride[1], padding[1], dilation[1])
    if epilogue == "relu_maxpool2":
        p, q = p // 2, q // 2
    if p < 1 or q < 1:
        raise ValueError(f"{op}: expected an output of at least 1x1, got {p}x{q} from x of shape {tuple(x.shape)}")
    return x.shape[0], weight_shape[0], p, q


def _bsr_conv2d(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None, packed: Sequence[Tensor],
    weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], epilogue: str, kernel: str, transposed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _conv2d_output_shape(
        x, values, crow_indices, col_indices, bias, weight_shape, block_shape, stride, padding, dilation, epilogue,
        transposed,
    )  # fmt: skip
    block = (block_shape[0], block_shape[1])
    _check_contents("bsr_conv2d", crow_indices, col_indices, packed, weight_shape, block)
    launch = launcher(
        kernel, x.get_device(), ConvProblem, x.shape[0], x.shape[1], x.shape[2], x.shape[3], weight_shape[0],
        weight_shape[2], weight_shape[3], tuple(stride), tuple(padding), tuple(dilation), block, values.shape[0],
        x.dtype, x.device.type, epilogue,
    )  # fmt: skip
    x = x.contiguous(memory_format=_CHANNELS_LAST)
    y = launch(
        x, values, crow_indices.contiguous(), col_indices.contiguous(), bias, packed, weight_shape, block, stride,
        padding, dilation, epilogue,
    )  # fmt: skip
    return with_channels_last_strides(y)


def _check_contents(
    op: str,
    crow: Tensor,
    col: Tensor,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: tuple[int, int],
) -> None:
    """Reads the indices, and an order of the Triton kernels, unless these very tensors were read before.

    The kernels follow them without a check of their own. The CPU kernels' packs are checked by their launchers.
    """
    check_pattern(op, crow, col, weight_shape, block_shape)
    if kind_of(packed) is ForwardOrder:
        check_order(op, *packed, crow, col, weight_shape, block_shape)


def _bsr_conv2d_fake(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None, packed: Sequence[Tensor],
    weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], epilogue: str, kernel: str, transposed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    shape = _conv2d_output_shape(
        x, values, crow_indices, col_indices, bias, weight_shape, block_shape, stride, padding, dilation, epilogue,
        transposed,
    )  # fmt: skip
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)


def _bsr_conv2d_backward(
    grad: Tensor, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    y: Tensor | None, transposed: Tensor | None, weight_shape: Sequence[int], block_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], epilogue: str, kernel: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, values and bias; an empty tensor where ``output_mask`` is False.

    Both gradient kernels read every element of ``grad`` many times, so the epilogue's mask is applied once before them
    rather than in their main loops. ``relu_maxpool2`` kept no output: it is computed again and overwritten with the
    gradient. The bias gradient is a pass of its own: block rows without stored blocks have one too.
    """
    block = (block_shape[0], block_shape[1])
    op = "bsr_conv2d_backward"
    shape = _conv2d_output_shape(
        x, values, crow_indices, col_indices, bias, weight_shape, block_shape, stride, padding, dilation, epilogue,
        transposed,
    )  # fmt: skip
    check_floating(op, x, grad=grad, y=y)
    if tuple(grad.shape) != shape or (epilogue == "relu" and (y is None or tuple(y.shape) != shape)):
        raise ValueError(
            f"{op}: expected grad, and y with the epilogue 'relu', of shape {shape}, "
            f"got {tuple(grad.shape)} and {None if y is None else tuple(y.shape)}"
        )
    check_pattern(op, crow_indices, col_indices, weight_shape, block)
    if transposed is not None and output_mask[0]:
        check_transposed(op, transposed, crow_indices, col_indices, weight_shape, block, stride, dilation)

    def launch(op: str, *args: Any) -> Tensor:
        return resolve_gradient(kernel, Request(op, x.dtype, x.device.type, block, "none"), stride).launch(*args)

    grad = grad.contiguous(memory_format=_CHANNELS_LAST)
    if epilogue == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif epilogue == "relu_maxpool2":
        y = _bsr_conv2d(
            x, values, crow_indices, col_indices, bias, (), weight_shape, block_shape, stride, padding, dilation,
            "relu", kernel,
        )  # fmt: skip
        grad = launch("relu_maxpool2_backward", grad, y)
    need_x, need_values, need_bias = output_mask
    weight = (values.contiguous(), crow_indices.contiguous(), col_indices.contiguous())
    transposed = transposed if transposed is None else transposed.contiguous()
    geometry = (weight_shape, block, stride, padding, dilation)
    grad_x, grad_values = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = with_channels_last_strides(
            launch("bsr_conv2d_dgrad", grad, *weight, transposed, tuple(x.shape[2:]), *geometry)
        )
    if need_values:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
        grad_values = launch("bsr_conv2d_wgrad", grad, x, *weight, *geometry)
    return grad_x, grad_values, launch("bsr_conv2d_bias_grad", grad) if need_bias else x.new_empty(0)


def _bsr_conv2d_backward_fake(
    grad: Tensor, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    y: Tensor | None, transposed: Tensor | None, weight_shape: Sequence[int], block_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], epilogue: str, kernel: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_values, need_bias = output_mask
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)
        if need_x
        else x.new_empty(0),
        torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else x.new_empty(0),
        x.new_empty(weight_shape[0] if need_bias else 0),
    )


def _bsr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
    kernel: str,
    transposed: Tensor | None = None,
) -> Tensor:
    _check_linear(x, values, crow_indices, col_indices, bias, weight_shape, block_shape, epilogue, transposed)
    block = (block_shape[0], block_shape[1])
    _check_contents("bsr_linear", crow_indices, col_indices, packed, weight_shape, block)
    rows = x.numel() // weight_shape[1]
    launch = launcher(
        kernel, x.get_device(), LinearProblem, rows, weight_shape[1], weight_shape[0], block, values.shape[0], x.dtype,
        x.device.type, epilogue,
    )  # fmt: skip
    return launch(
        x.contiguous(),
        values,
        crow_indices.contiguous(),
        col_indices.contiguous(),
        bias,
        packed,
        weight_shape,
        block,
        epilogue,
    ).contiguous()


def _check_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
    transposed: Tensor | None,
) -> None:
    if len(weight_shape) != 2 or len(block_shape) != 2:
        raise ValueError(
            f"bsr_linear: expected weight_shape (out, in) and block_shape (block_out, block_in), "
            f"got {tuple(weight_shape)}, {tuple(block_shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != weight_shape[1]:
        raise ValueError(f"bsr_linear: expected x of shape (..., {weight_shape[1]}), got {tuple(x.shape)}")
    _check_weight("bsr_linear", x, values, crow, col, bias, weight_shape, block_shape, epilogue, transposed)


def _bsr_linear_fake(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
    kernel: str,
    transposed: Tensor | None = None,
) -> Tensor:
    _check_linear(x, values, crow_indices, col_indices, bias, weight_shape, block_shape, epilogue, transposed)
    return x.new_empty((*x.shape[:-1], weight_shape[0]))


register("bsr_conv2d", _bsr_conv2d, _bsr_conv2d_fake)
register("bsr_conv2d_backward", _bsr_conv2d_backward, _bsr_conv2d_backward_fake)
register("bsr_linear", _bsr_linear, _bsr_linear_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, bias, packed, *arguments, transposed = inputs
    epilogue = arguments[-2]
    ctx.save_for_backward(x, values, crow, col, bias, output if epilogue == "relu" else None, transposed)
    ctx.arguments, ctx.packed_count = arguments, len(packed)


def _gradients(ctx: Any, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
    """One gradient for each argument that reached autograd: torch's dispatcher leaves out a last one at its default,
    and up to torch 2.11 one gradient more than arguments is an error where an argument is a list of tensors.
    """
    need_x, need_values, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 4))
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
    return [ctx.needs_input_grad[i] for i in (0, 1, 4)]


def _bsr_conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = OPS.bsr_conv2d_backward(grad, *ctx.saved_tensors, *ctx.arguments, _output_mask(ctx))
    return _gradients(ctx, grads)


def _bsr_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weight, y, transposed = ctx.saved_tensors
    weight_shape, block_shape, epilogue, kernel = ctx.arguments
    grad = grad.reshape(-1, grad.shape[-1], 1, 1)
    rows, y = (None if t is None else t.reshape(-1, t.shape[-1], 1, 1) for t in (x, y))
    grad_x, grad_values, grad_bias = OPS.bsr_conv2d_backward(
        grad, rows, *weight, y, transposed, [*weight_shape, 1, 1], block_shape, [1, 1], [0, 0], [1, 1], epilogue,
        kernel, _output_mask(ctx),
    )  # fmt: skip
    if ctx.needs_input_grad[0]:
        grad_x = grad_x.reshape(x.shape)
    return _gradients(ctx, (grad_x, grad_values, grad_bias))


def _second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError("bsr_conv2d: expected to be differentiated once, got a second derivative")


torch.library.register_autograd(
    "slimkernels::bsr_conv2d", _bsr_conv2d_autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "slimkernels::bsr_linear", _bsr_linear_autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd("slimkernels::bsr_conv2d_backward", _second_derivative, lib=LIBRARY)


def _autocast(kernel_at: int, device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """On CUDA, cast to the autocast dtype unless an explicit kernel does not take it; elsewhere keep float32.

    The CPU kernels are float32: casting down would trade them for the reference.
    """
    kernel = args[kernel_at]
    dtype = torch.get_autocast_dtype(device) if device == "cuda" else torch.float32
    if kernel in KERNELS and dtype not in KERNELS[kernel].dtypes:
        dtype = torch.float32
    packed = list(args[5])
    if args[1].dtype != dtype and any(part.is_floating_point() for part in packed):
        packed = []  # a pack of weights in another dtype; an order of blocks holds for every dtype
    return cast_floats((*args[:5], packed, *args[6:]), dtype)


register_autocast("bsr_conv2d", partial(_autocast, 12))
register_autocast("bsr_linear", partial(_autocast, 9))
register_autocast("bsr_conv2d_backward", lambda device, args: args)


def bsr_conv2d(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None = None,
    packed: Sequence[Tensor] = (), *, weight_shape: Sequence[int], block_shape: Sequence[int],
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
    epilogue: str = "none", kernel: str = "auto", transposed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Block-sparse 2-D convolution (cross-correlation, as torch's), groups = 1.

    Inputs with tangents of forward-mode differentiation run the reference kernel, whose derivatives are torch's.

    Args:
        x: ``(N, C_in, H, W)`` floating point, any strides; converted to channels_last where it is not. N = 0 is legal.
        values, crow_indices, col_indices: the `slimkernels.formats.BSRWeight` in x's dtype, on x's device.
        bias: ``(C_out,)`` in x's dtype, or None.
        packed: prepacked weight of the kernel (`slimkernels.nn.BlockSparseConv2d` keeps it), or empty. Its numbers and
            those of the indices are checked, once for tensors that nobody writes to.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        stride, padding, dilation: two ints each (rows, columns).
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
    if has_tangent(x, values, bias):
        weight = (values, crow_indices, col_indices)
        sizes = (weight_shape, block_shape, stride, padding, dilation)
        _conv2d_output_shape(x, *weight, bias, *sizes, epilogue, transposed)
        check_pattern("bsr_conv2d", crow_indices, col_indices, weight_shape, block_shape)
        return reference.bsr_conv2d(x, *weight, bias, (), *sizes, epilogue)
    run = _bsr_conv2d if runs_plainly(x, values, crow_indices, col_indices, bias) else OPS.bsr_conv2d.default
    return run(
        x, values, crow_indices, col_indices, bias, list(packed), weight_shape, block_shape, stride, padding, dilation,
        epilogue, kernel, transposed,
    )  # fmt: skip


def bsr_linear(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None = None,
    packed: Sequence[Tensor] = (), *, weight_shape: Sequence[int], block_shape: Sequence[int], epilogue: str = "none",
    kernel: str = "auto", transposed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Block-sparse linear layer ``epilogue(x W^T + bias)``; forward-mode differentiation as `bsr_conv2d`.

    Args:
        x: ``(..., in)`` floating point.
        values, crow_indices, col_indices: the `slimkernels.formats.BSRWeight` in x's dtype, on x's device.
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
    if has_tangent(x, values, bias):
        weight = (values, crow_indices, col_indices)
        _check_linear(x, *weight, bias, weight_shape, block_shape, epilogue, transposed)
        check_pattern("bsr_linear", crow_indices, col_indices, weight_shape, block_shape)
        return reference.bsr_linear(x, *weight, bias, (), weight_shape, block_shape, epilogue)
    run = _bsr_linear if runs_plainly(x, values, crow_indices, col_indices, bias) else OPS.bsr_linear.default
    return run(
        x, values, crow_indices, col_indices, bias, list(packed), weight_shape, block_shape, epilogue, kernel,
        transposed,
    )  # fmt: skip
