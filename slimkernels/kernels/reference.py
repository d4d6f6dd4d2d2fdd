"""Plain-torch kernels: the definition of every op, in the input's dtype, and the fallback where nothing faster runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.formats import BSRWeight, _to_blocks
from slimkernels.kernels.far_taps import convolution, convolution_backward
from slimkernels.kernels.problems import conv_output_image, factor_geometry


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """``none``, ``relu`` or ``relu_maxpool2`` (ReLU, then 2x2 max-pool of stride 2, floor mode) of ``y``."""
    if epilogue == "none":
        return y
    y = torch.relu(y)
    return F.max_pool2d(y, 2) if epilogue == "relu_maxpool2" else y


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> Tensor:
    """``epilogue(conv2d(x, W) + bias)`` where only stored blocks of W are read.

    With finite input it is the dense convolution. A non-finite input must reach exactly the outputs whose stored blocks
    read it, so there each block row multiplies its own stored columns only.
    """
    # For mypy: tuples have the right length, which their types do not say.
    weight = BSRWeight(values, crow_indices, col_indices, tuple(weight_shape), tuple(block_shape))  # type: ignore[arg-type]
    if bool(torch.isfinite(x).all()):
        y = convolution(x, weight.to_dense(), bias, stride, padding, dilation)
    else:
        y = _conv2d_stored_columns(x, weight, bias, stride, padding, dilation)
    return apply_epilogue(y, epilogue).contiguous(memory_format=torch.channels_last)


def _conv2d_stored_columns(
    x: Tensor,
    weight: BSRWeight,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    c_out, c_in, r, s = weight.weight_shape
    block_out, block_in = weight.block_shape
    p, q = conv_output_image(x.shape[2:], (r, s), stride, padding, dilation)
    columns = F.unfold(x, (r, s), tuple(dilation), tuple(padding), tuple(stride))
    columns = columns.reshape(x.shape[0], c_in, r * s, p * q).transpose(1, 2)
    groups = -(-c_in // block_in)
    columns = F.pad(columns, (0, 0, 0, groups * block_in - c_in)).reshape(x.shape[0], -1, block_in, p * q)
    crow = weight.crow_indices.tolist()
    y = x.new_empty(x.shape[0], c_out, p * q)
    for i, (begin, end) in enumerate(pairwise(crow)):
        rows = weight.values[begin:end].transpose(0, 1).reshape(block_out, -1)[: c_out - i * block_out]
        taken = columns[:, weight.col_indices[begin:end].long()].flatten(1, 2)
        y[:, i * block_out : i * block_out + rows.shape[0]] = rows @ taken
    y = y.reshape(x.shape[0], c_out, p, q)
    return y if bias is None else y + bias[:, None, None]


def bsr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
) -> Tensor:
    """``epilogue(x W^T + bias)`` over the last dimension of x: the 1x1 convolution of its rows."""
    rows = x.reshape(-1, weight_shape[1])[:, :, None, None]
    y = bsr_conv2d(
        rows,
        values,
        crow_indices,
        col_indices,
        bias,
        packed,
        (*weight_shape, 1, 1),
        block_shape,
        (1, 1),
        (0, 0),
        (1, 1),
        epilogue,
    )
    return y.reshape(*x.shape[:-1], weight_shape[0])


def _dense_weight(
    values: Tensor, crow: Tensor, col: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> Tensor:
    # For mypy: tuples have the right length, which their types do not say.
    return BSRWeight(values.detach(), crow, col, tuple(weight_shape), tuple(block_shape)).to_dense()  # type: ignore[arg-type]


def bsr_conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of `bsr_conv2d`'s input, ``image`` (H, W), through the dense weight; ``transposed`` is unused."""
    dense = _dense_weight(values, crow_indices, col_indices, weight_shape, block_shape)
    x = grad.new_empty((grad.shape[0], weight_shape[1], *image)).contiguous(memory_format=torch.channels_last)
    grad_x, _ = convolution_backward(
        grad.contiguous(memory_format=torch.channels_last), x, dense, stride, padding, dilation, (True, False)
    )
    assert grad_x is not None
    return grad_x.contiguous(memory_format=torch.channels_last)


def bsr_conv2d_wgrad(
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
    """The gradient of `bsr_conv2d`'s values, cut out of the dense weight's gradient; spare blocks get 0."""
    _, grad_w = convolution_backward(
        grad.contiguous(memory_format=torch.channels_last),
        x,
        x.new_empty(tuple(weight_shape)),
        stride,
        padding,
        dilation,
        (False, True),
    )
    assert grad_w is not None
    # For mypy: tuples have the right length, which their types do not say.
    weight = BSRWeight(values, crow_indices, col_indices, tuple(weight_shape), tuple(block_shape))  # type: ignore[arg-type]
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    rows, cols = weight.block_rows(), col_indices[: weight.nnz_blocks].long()
    grad_values[: weight.nnz_blocks] = _to_blocks(grad_w, block_shape)[rows, cols]
    return grad_values


def bsr_conv2d_bias_grad(grad: Tensor) -> Tensor:
    """The gradient of a convolution's bias: ``grad`` (N, C, P, Q) summed over images and pixels."""
    return grad.sum((0, 2, 3))


def relu_maxpool2_backward(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of the epilogue ``relu_maxpool2`` for the convolution's output ``y`` after its ReLU."""
    indices = torch.ops.aten.max_pool2d_with_indices(y, [2, 2], [2, 2])[1]
    grad = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(memory_format=torch.channels_last), y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
    )
    return torch.ops.aten.threshold_backward(grad, y, 0)


def batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, epilogue: str
) -> tuple[Tensor, Tensor]:
    """``(y, statistics)`` of a batch norm over what it is given, in training mode; x (N, C, P, Q).

    Returns: epilogue of the normalised x; (3, C), float64 for float64 x and else float32: the means, ``1 / sqrt(var +
        eps)`` and the unbiased variances.
    """
    wide = _wide(x)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    pixels = x.numel() // max(x.shape[1], 1)
    statistics = torch.stack([mean, (var + eps).rsqrt(), var * (pixels / max(pixels - 1, 1))])
    y = _scaled(_normalised(wide, statistics), weight, bias).to(x.dtype)
    return apply_epilogue(y, epilogue).contiguous(memory_format=torch.channels_last), statistics


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """``(grad_x, sums)`` of `batch_norm_forward`; sums (2, C) in the dtype of the statistics: of bias and of weight."""
    xhat = _normalised(_wide(x), statistics)
    if epilogue != "none":
        y = torch.relu(_scaled(xhat, weight, bias).to(x.dtype)).contiguous(memory_format=torch.channels_last)
        pooled = epilogue == "relu_maxpool2"
        grad = relu_maxpool2_backward(grad, y) if pooled else torch.ops.aten.threshold_backward(grad, y, 0)
    wide = _wide(grad)
    sums = torch.stack([wide.sum((0, 2, 3)), (wide * xhat).sum((0, 2, 3))])
    mean_grad, mean_product = (sums / max(x.numel() // max(x.shape[1], 1), 1))[:, :, None, None]
    grad_x = (wide - mean_grad - xhat * mean_product) * statistics[1][:, None, None]
    if weight is not None:
        grad_x = grad_x * weight.to(grad_x.dtype)[:, None, None]
    return grad_x.to(x.dtype).contiguous(memory_format=torch.channels_last), sums


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics[0][:, None, None], statistics[1][:, None, None]
    return (x - mean) * rstd


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or bias is None:
        return x
    return x * weight.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]


def low_rank_linear(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, packed: Sequence[Tensor], epilogue: str
) -> Tensor:
    """``epilogue((x V^T) U^T + bias)``; U (out, rank), V (rank, in)."""
    return apply_epilogue(F.linear(F.linear(x, V), U, bias), epilogue)


def low_rank_linear_dgrad(grad: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_z)`` of a low-rank linear layer, z = x V^T; grad (..., out), U (out, rank), V (rank, in)."""
    grad_z = grad @ U
    return grad_z @ V, grad_z


def low_rank_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    packed: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kind: str,
    epilogue: str,
) -> Tensor:
    """The chain of factor convolutions, bias after the last."""
    # For mypy: tuples have the right length, which their types do not say.
    geometry = factor_geometry(kind, len(factors), tuple(stride), tuple(padding), tuple(dilation))  # type: ignore[arg-type]
    for i, (factor, (stride_i, padding_i, dilation_i)) in enumerate(zip(factors, geometry)):
        x = convolution(x, factor, bias if i == len(factors) - 1 else None, stride_i, padding_i, dilation_i)
    return apply_epilogue(x, epilogue).contiguous(memory_format=torch.channels_last)


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> Tensor:
    """``epilogue(conv2d(x, weight) + bias)``: torch's convolution and the passes behind it."""
    y = convolution(x, weight, bias, stride, padding, dilation)
    return apply_epilogue(y, epilogue).contiguous(memory_format=torch.channels_last)
