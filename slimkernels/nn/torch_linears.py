"""Torch's dense linear layers as layers of a chain, which reads their weights where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.strips import DEPTHS
from slimkernels.tensors import is_plain

# Two layers take, in a chain and by torch, 46 and 54 us of 256 features at one row, 279 and 284 of 1024 (two Zen 3
# cores, behind a read of 1 MB): a larger weight gains nothing. More rows run faster with a vector of them innermost,
# as this package's layers do then, and this kernel does not.
MOST_WEIGHTS, MOST_ROWS = 1 << 20, 8


def is_native(module: nn.Module) -> bool:
    """Whether a chain goes on over a module: a dense linear layer of a size that gains by it."""
    if type(module) is not nn.Linear:
        return False
    return 0 < module.in_features * module.out_features <= MOST_WEIGHTS and module.in_features % min(DEPTHS) == 0


class TorchLinear:
    """An ``nn.Linear``, and the ``nn.ReLU`` behind it, as native layer.

    The kernel takes the sum of one output channel from runs of 8 or 16 neighbouring weights, which lie in the weight
    ``(out, in)`` as they lie in a pack. So there is no copy that writes, those through ``.data`` included, could miss.

    Args:
        module: `is_native` says yes to it.
        relu: whether the ReLU belongs to it.
    """

    def __init__(self, module: nn.Linear, relu: bool) -> None:
        self.module, self._epilogue = module, "relu" if relu else "none"

    def tensors(self) -> list[Tensor]:
        """Weight and bias; without what is no parameter."""
        parameters = self.module._parameters
        return [t for t in (parameters.get("weight"), parameters.get("bias")) if t is not None]

    def is_readable(self) -> bool:
        """Whether the kernel can read weight and bias where they lie."""
        module, parameters = self.module, self.module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or "bias" not in parameters or not (is_native(module) and is_readable(weight, 2)):
            return False
        fits = bias is None or (is_readable(bias, 1) and bias.numel() == module.out_features)
        return fits and tuple(weight.shape) == (module.out_features, module.in_features)

    def native(self, isa: str) -> NativeLayer:
        """The layer on the present weight and bias, which are readable."""
        weight, bias = self.module.weight.detach(), self.module.bias
        c_out, c_in = weight.shape
        depth = math.gcd(c_in, max(DEPTHS))
        first = torch.arange(0, c_in, depth, dtype=torch.int32).repeat(c_out)
        ends = torch.arange(c_out + 1, dtype=torch.int32) * (c_in // depth)
        pack, shape, one = StripPack(weight.view(-1, depth), first, ends), (c_out, c_in, 1, 1), (1, 1)
        conv = PackedConv2d(isa, pack, shape, one, (0, 0), one, self._epilogue, op="linear", deep=True)
        return NativeLayer.of(conv, None if bias is None else bias.detach())


def is_readable(tensor: Tensor, dims: int) -> bool:
    """Whether kernels can read a float32 tensor of so many dimensions where it lies, and torch counts writes to it."""
    plain = tensor.dtype is torch.float32 and tensor.is_cpu and is_plain(tensor) and not tensor.is_inference()
    return plain and tensor.dim() == dims and tensor.is_contiguous()
