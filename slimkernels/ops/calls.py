"""The arguments of every op as one record, so that a schema is the only long list of them.

The fields of a record are the arguments of the op's schema in `slimkernels.ops.library`, in the same order, and the
public function of that name describes them. Implementation, fake, checks, autograd and autocast take the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BSRConv2dCall(NamedTuple):
    """The arguments of `slimkernels.ops.bsr_conv2d`."""

    x: Tensor
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    packed: Sequence[Tensor]
    weight_shape: Sequence[int]
    block_shape: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    epilogue: str
    kernel: str
    transposed: Tensor | None = None


class BSRConv2dBackwardCall(NamedTuple):
    """The arguments of ``bsr_conv2d_backward``: those of the forward, its output and the gradient of that.

    Attributes:
        grad: of the output.
        y: the output with the epilogue ``relu``, else None.
        output_mask: whether the gradients of x, values and bias are wanted.
        values_dtype: of the gradient of values, summed in float32; None for that of ``values``.
    """

    grad: Tensor
    x: Tensor
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    y: Tensor | None
    transposed: Tensor | None
    weight_shape: Sequence[int]
    block_shape: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    epilogue: str
    kernel: str
    output_mask: Sequence[bool]
    values_dtype: torch.dtype | None = None


class BSRLinearCall(NamedTuple):
    """The arguments of `slimkernels.ops.bsr_linear`."""

    x: Tensor
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    packed: Sequence[Tensor]
    weight_shape: Sequence[int]
    block_shape: Sequence[int]
    epilogue: str
    kernel: str
    transposed: Tensor | None = None


class LowRankLinearCall(NamedTuple):
    """The arguments of `slimkernels.ops.low_rank_linear`."""

    x: Tensor
    U: Tensor
    V: Tensor
    bias: Tensor | None
    packed: Sequence[Tensor]
    epilogue: str
    kernel: str


class LowRankLinearDgradCall(NamedTuple):
    """The arguments of ``low_rank_linear_dgrad``."""

    grad: Tensor
    U: Tensor
    V: Tensor
    kernel: str


class LowRankConv2dCall(NamedTuple):
    """The arguments of `slimkernels.ops.low_rank_conv2d`."""

    x: Tensor
    factors: Sequence[Tensor]
    bias: Tensor | None
    packed: Sequence[Tensor]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    kind: str
    epilogue: str
    kernel: str


class FusedConv2dCall(NamedTuple):
    """The arguments of `slimkernels.ops.fused_conv2d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    epilogue: str
    kernel: str


class BatchNormForwardCall(NamedTuple):
    """The arguments of ``batch_norm_forward``, which `slimkernels.ops.batch_norm` describes."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    epilogue: str
    kernel: str


class BatchNormBackwardCall(NamedTuple):
    """The arguments of ``batch_norm_backward``: those of the forward, its statistics and the gradient of its output."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor
    eps: float
    epilogue: str
    kernel: str


CALLS: dict[str, Any] = {
    "bsr_conv2d": BSRConv2dCall,
    "bsr_conv2d_backward": BSRConv2dBackwardCall,
    "bsr_linear": BSRLinearCall,
    "low_rank_linear": LowRankLinearCall,
    "low_rank_linear_dgrad": LowRankLinearDgradCall,
    "low_rank_conv2d": LowRankConv2dCall,
    "fused_conv2d": FusedConv2dCall,
    "batch_norm_forward": BatchNormForwardCall,
    "batch_norm_backward": BatchNormBackwardCall,
}
