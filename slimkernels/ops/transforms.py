"""The ops under torch.func's transforms (vmap, grad, jvp, jacrev, jacfwd, hessian and what is built of them).

A kernel sees memory, and under a transform a tensor is more than its memory: a batch, a tangent, a recorded history.
There the ops are computed by torch's own functions from the dense weight, without writing in place and without reading
values, so that every transform and every nesting of them holds. It costs what the dense layer costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.formats import _from_blocks, block_grid
from slimkernels.kernels.problems import factor_geometry
from slimkernels.kernels.reference import apply_epilogue
from slimkernels.ops.calls import (
    BatchNormForwardCall,
    BSRConv2dCall,
    BSRLinearCall,
    FusedConv2dCall,
    LowRankConv2dCall,
    LowRankLinearCall,
)

_active = torch._C._functorch.peek_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def transformed() -> bool:
    """Whether a transform of torch.func is active. Under torch.compile, which traces transforms itself: no."""
    return _active() is not None and not torch.compiler.is_compiling()


def is_wrapped(*tensors: Tensor) -> bool:
    """Whether a transform holds one of the tensors, whose values cannot be read then."""
    return any(_is_wrapped(tensor) for tensor in tensors)


def bsr_conv2d(call: BSRConv2dCall) -> Tensor:
    """`slimkernels.ops.bsr_conv2d` of the dense weight: a non-finite input reaches what it reaches there."""
    weight = _dense(call.values, call.crow_indices, call.col_indices, call.weight_shape, call.block_shape)
    y = F.conv2d(call.x, weight, call.bias, list(call.stride), list(call.padding), list(call.dilation))
    return apply_epilogue(y, call.epilogue)


def bsr_linear(call: BSRLinearCall) -> Tensor:
    """`slimkernels.ops.bsr_linear` of the dense weight."""
    weight = _dense(call.values, call.crow_indices, call.col_indices, call.weight_shape, call.block_shape)
    return apply_epilogue(F.linear(call.x, weight, call.bias), call.epilogue)


def low_rank_linear(call: LowRankLinearCall) -> Tensor:
    """`slimkernels.ops.low_rank_linear`, factor by factor."""
    return apply_epilogue(F.linear(F.linear(call.x, call.V), call.U, call.bias), call.epilogue)


def low_rank_conv2d(call: LowRankConv2dCall) -> Tensor:
    """`slimkernels.ops.low_rank_conv2d`, factor by factor."""
    pairs: list[Any] = [tuple(call.stride), tuple(call.padding), tuple(call.dilation)]
    y, last = call.x, len(call.factors) - 1
    for i, (factor, geometry) in enumerate(zip(call.factors, factor_geometry(call.kind, last + 1, *pairs))):
        stride, padding, dilation = geometry
        y = F.conv2d(y, factor, call.bias if i == last else None, list(stride), list(padding), list(dilation))
    return apply_epilogue(y, call.epilogue)


def fused_conv2d(call: FusedConv2dCall) -> Tensor:
    """`slimkernels.ops.fused_conv2d`: torch's convolution and what follows."""
    y = F.conv2d(call.x, call.weight, call.bias, list(call.stride), list(call.padding), list(call.dilation))
    return apply_epilogue(y, call.epilogue)


def batch_norm(call: BatchNormForwardCall) -> Tensor:
    """`slimkernels.ops.batch_norm` without running statistics."""
    y = F.batch_norm(call.x, None, None, call.weight, call.bias, training=True, eps=call.eps)
    return apply_epilogue(y, call.epilogue)


def _dense(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> Tensor:
    """The dense weight as a differentiable function of the stored blocks; the indices may be batched too."""
    rows, columns = block_grid(weight_shape, block_shape)
    count = values.shape[0]
    numbers = torch.arange(count, device=values.device)
    # The block row of each stored block: how many rows end before it. Spare blocks lie in a row behind the last.
    row = (crow_indices[1:, None] <= numbers).sum(0)
    place = row * columns + torch.where(row < rows, col_indices.long(), 0)
    empty = torch.full(((rows + 1) * columns,), count, device=values.device)
    stored_at = empty.scatter(0, place, numbers)[: rows * columns]
    blocks = torch.cat([values, values.new_zeros(1, *block_shape)])[stored_at]
    return _from_blocks(blocks, weight_shape, block_shape).reshape(tuple(weight_shape))
