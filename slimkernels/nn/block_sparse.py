"""Block-sparse twins of ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.formats import BSRWeight
from slimkernels.nn.attributes import conv_geometry, fx_call, int_pair, unsupported_conv_reason
from slimkernels.nn.stored_blocks import StoredBlocks
from slimkernels.ops import bsr_conv2d, bsr_linear


class BlockSparseConv2d(StoredBlocks):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding) that stores and multiplies the stored blocks only.

    Args:
        in_channels: as ``nn.Conv2d``.
        out_channels: as ``nn.Conv2d``.
        kernel_size: as ``nn.Conv2d``.
        stride: as ``nn.Conv2d``.
        padding: as ``nn.Conv2d``.
        dilation: as ``nn.Conv2d``.
        bias: as ``nn.Conv2d``.
        block_shape: ``(block_out, block_in)``.
        crow_indices: row pointers of the pattern, see `slimkernels.formats.BSRWeight`.
        col_indices: block columns of the pattern.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``, fused behind the bias.
        kernel: a kernel's name, or ``auto``.

    Parameters ``values (blocks, block_out, block_in)`` and ``bias (out_channels,)``, zero until assigned; `from_dense`
    fills them.

    Raises:
        ValueError, TypeError: an invalid pattern, epilogue or block shape.
    """

    _op = "bsr_conv2d"
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        block_shape: Sequence[int],
        crow_indices: Tensor,
        col_indices: Tensor,
        epilogue: str = "none",
        kernel: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        own = type(self).__name__
        self.kernel_size, self.stride = int_pair(own, "kernel_size", kernel_size), int_pair(own, "stride", stride)
        self.padding, self.dilation = int_pair(own, "padding", padding), int_pair(own, "dilation", dilation)
        self._init_weight(
            (out_channels, in_channels, *self.kernel_size),
            block_shape,
            (crow_indices, col_indices),
            bias,
            epilogue,
            kernel,
            device,
            dtype,
        )

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        block_shape: Sequence[int],
        mask: Tensor | None = None,
        epilogue: str = "none",
        kernel: str = "auto",
    ) -> BlockSparseConv2d:
        """The block-sparse twin of a convolution; ``mask`` (block_rows, block_cols) from its zeros if None.

        Raises:
            ValueError: groups, padding_mode or padding without a twin (named with its value), or a mask of the wrong
                shape.
        """
        reason = unsupported_conv_reason(conv)
        if reason is not None:
            raise ValueError(f"BlockSparseConv2d.from_dense: {reason}")
        weight = BSRWeight.from_dense(conv.weight, block_shape, mask)
        module = cls(
            conv.in_channels,
            conv.out_channels,
            *conv_geometry(conv),
            conv.bias is not None,
            block_shape=block_shape,
            crow_indices=weight.crow_indices,
            col_indices=weight.col_indices,
            epilogue=epilogue,
            kernel=kernel,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        module._assign(weight, conv)
        return module

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution with the same weight and bias; a fused epilogue is not part of it."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight_bsr().to_dense())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        return self.weight_shape, self.stride, self.padding, self.dilation

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt(x, self._parameters["bias"])
            if y is not None:
                return y
        if (node := fx_call(self, x)) is not None:
            return node
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return bsr_conv2d(
            x,
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            self._packed(),
            weight_shape=self.weight_shape,
            block_shape=self.block_shape,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            epilogue=self.epilogue,
            kernel=self.kernel,
            transposed=self._index_for_gradients(),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, {self._repr_tail()}"
        )


class BlockSparseLinear(StoredBlocks):
    """Drop-in for ``nn.Linear`` that stores and multiplies the stored blocks only.

    Args:
        in_features: as ``nn.Linear``.
        out_features: as ``nn.Linear``.
        bias: as ``nn.Linear``.
        block_shape: ``(block_out, block_in)``.
        crow_indices: row pointers of the pattern, see `slimkernels.formats.BSRWeight`.
        col_indices: block columns of the pattern.
        epilogue: ``none`` or ``relu``.
        kernel: a kernel's name, or ``auto``.

    Raises:
        ValueError, TypeError: an invalid pattern, epilogue or block shape.
    """

    _op = "bsr_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_shape: Sequence[int],
        crow_indices: Tensor,
        col_indices: Tensor,
        epilogue: str = "none",
        kernel: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight(
            (out_features, in_features), block_shape, (crow_indices, col_indices), bias, epilogue, kernel, device, dtype
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        block_shape: Sequence[int],
        mask: Tensor | None = None,
        epilogue: str = "none",
        kernel: str = "auto",
    ) -> BlockSparseLinear:
        """The block-sparse twin of a linear layer; ``mask`` (block_rows, block_cols) from its zeros if None.

        Raises:
            ValueError: a mask of the wrong shape. TypeError: a weight that is not floating point.
        """
        weight = BSRWeight.from_dense(linear.weight, block_shape, mask)
        module = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            block_shape=block_shape,
            crow_indices=weight.crow_indices,
            col_indices=weight.col_indices,
            epilogue=epilogue,
            kernel=kernel,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        module._assign(weight, linear)
        return module

    def to_dense(self) -> nn.Linear:
        """The dense linear layer with the same weight and bias; a fused epilogue is not part of it."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight_bsr().to_dense()[:, :, 0, 0])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _call_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        return (*self.weight_shape, 1, 1), (1, 1), (0, 0), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        if ready is not None:
            y = ready.attempt_rows(x, self._parameters["bias"])
            if y is not None:
                return y
        if (node := fx_call(self, x)) is not None:
            return node
        return bsr_linear(
            x,
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            self._packed(),
            weight_shape=self.weight_shape,
            block_shape=self.block_shape,
            epilogue=self.epilogue,
            kernel=self.kernel,
            transposed=self._index_for_gradients(),
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_tail()}"
