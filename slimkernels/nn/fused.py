"""The twin of ``nn.Conv2d`` that stays dense and runs the bias, ReLU and pool behind it in the same kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.nn.attributes import AttributesInUse, conv_geometry, fx_call, int_pair, unsupported_conv_reason
from slimkernels.ops import fused_conv2d


class FusedConv2d(AttributesInUse):
    """Drop-in for ``nn.Conv2d`` (groups = 1, zero padding) and the ReLU and 2x2 max-pool behind it, of dense weight.

    Args:
        in_channels: as ``nn.Conv2d``.
        out_channels: as ``nn.Conv2d``.
        kernel_size: as ``nn.Conv2d``.
        stride: as ``nn.Conv2d``.
        padding: as ``nn.Conv2d``.
        dilation: as ``nn.Conv2d``.
        bias: as ``nn.Conv2d``.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``, fused behind the bias.
        kernel: a kernel's name, or ``auto``.

    Parameters ``weight (out_channels, in_channels, R, S)``, channels_last, and ``bias (out_channels,)``, zero until
    assigned; `from_dense` fills them. A state dict's keys are those of ``nn.Conv2d``. Nothing is kept beside the
    parameters, so writing to them is legal at any time.

    Raises:
        ValueError, TypeError: an invalid epilogue or geometry.
    """

    _op = "fused_conv2d"
    _fixed = frozenset({"in_channels", "out_channels", "kernel_size"})
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
        self.epilogue, self.kernel = epilogue, kernel
        self._check_attributes()
        weight = torch.zeros(out_channels, in_channels, *self.kernel_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self._prepared = None

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, epilogue: str = "none", kernel: str = "auto") -> FusedConv2d:
        """The twin of a convolution.

        Raises:
            ValueError: groups, padding_mode or padding without a twin (named with its value), or an unknown epilogue.
        """
        reason = unsupported_conv_reason(conv)
        if reason is not None:
            raise ValueError(f"FusedConv2d.from_dense: {reason}")
        module = cls(
            conv.in_channels,
            conv.out_channels,
            *conv_geometry(conv),
            conv.bias is not None,
            epilogue=epilogue,
            kernel=kernel,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        _copy(conv, module)
        return module.train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """The convolution with the same weight and bias; a fused epilogue is not part of it."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        _copy(self, conv)
        return conv.train(self.training)

    def _attributes_changed(self) -> None:
        """Nothing follows from the attributes before the call."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.weight.device.type, self.weight.dtype
        super()._apply(fn, recurse)
        if (self.weight.device.type, self.weight.dtype) != before:
            self.kernel = "auto"
        return self

    def forward(self, x: Tensor) -> Tensor:
        if (node := fx_call(self, x)) is not None:
            return node
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return fused_conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            epilogue=self.epilogue,
            kernel=self.kernel,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"epilogue={self.epilogue!r}, kernel={self.kernel!r}"
        )


def _copy(source: nn.Conv2d | FusedConv2d, target: nn.Conv2d | FusedConv2d) -> None:
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.weight.requires_grad_(source.weight.requires_grad)
        if target.bias is not None and source.bias is not None:
            target.bias.copy_(source.bias)
            target.bias.requires_grad_(source.bias.requires_grad)
