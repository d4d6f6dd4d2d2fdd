"""Linear layers that follow each other, as one CUDA launch for a few rows: a chain of 1x1 convolutions of one pixel.

A weight is cut into blocks that are all stored, and what is no multiple of eight is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slimkernels.formats import BSRWeight, block_grid
from slimkernels.inference.cuda_chain import CudaChain
from slimkernels.kernels import cuda_chain
from slimkernels.kernels.chain_plan import COLUMN
from slimkernels.kernels.resident_plan import STEP_CHANNELS

_BLOCK = (COLUMN, STEP_CHANNELS)
_EIGHT = 8
# Of a layer. The 16 processors of a cluster read 1.8 TB/s from L2, 64 bytes a clock each: 2 MB take 1.2 us, and there
# a kernel of cuBLAS, for which all processors read, takes 3 (measured on an H200 for 0.5 MB, which is latency).
MAX_WEIGHTS = 2**20
IDLE = (nn.Identity, nn.Dropout)


class CudaLinearChain(CudaChain):
    """A run of linear layers in one launch; `linear_chain_of` makes it. It holds a copy of their weights, packed."""

    def __init__(self, linears: Sequence[tuple[nn.Linear, bool]], config: dict[str, int]) -> None:
        found: list[Tensor | None] = [tensor for linear, _ in linears for tensor in (linear.weight, linear.bias)]
        tensors = [tensor for tensor in found if tensor is not None]
        super().__init__(tensors, _packed(linears), config)
        self._features = linears[-1][0].out_features

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, in)`` through all layers: ``(N, out)``, without a gradient.

        Raises:
            ValueError, TypeError, RuntimeError: as `slimkernels.inference.cuda_chain.CudaChain`.
        """
        return super().__call__(of_one_pixel(x)).flatten(1)[:, : self._features].contiguous()


def linear_chain_of(modules: Iterable[nn.Module], **config: int) -> CudaLinearChain:
    """The linear layers of ``modules``, one after the other, as one launch for 1 to 16 rows. Waits for the device.

    Args:
        modules: ``nn.Linear`` in bf16 or fp16, of at most 2**20 weights, the first one of a multiple of 8 features;
            ``nn.ReLU`` behind them; ``nn.Identity`` and ``nn.Dropout`` in eval mode.
        config: as `slimkernels.kernels.cuda_chain.launch_chain` has it.

    Raises:
        TypeError: another module among them.
        ValueError: no linear layer at all or a ReLU in front of them, dropout in training mode, or a layer that the
            kernel does not take.
    """
    linears: list[tuple[nn.Linear, bool]] = []
    for module in modules:
        if isinstance(module, nn.Linear):
            reason = linear_reason(module, linears[-1][0] if linears else None)
            if reason is not None:
                raise ValueError(f"linear_chain_of: {reason}")
            linears.append((module, False))
        elif isinstance(module, nn.ReLU):
            if not linears:
                raise ValueError("linear_chain_of: expected a Linear in front of a ReLU")
            linears[-1] = linears[-1][0], True
        elif not isinstance(module, IDLE):
            raise TypeError(f"linear_chain_of: expected Linear, ReLU, Identity, Dropout, got {type(module).__name__}")
        elif module.training:
            raise ValueError(f"linear_chain_of: expected eval mode, got a {type(module).__name__} in training mode")
    if not linears:
        raise ValueError("linear_chain_of: expected a Linear at least, got none")
    return CudaLinearChain(linears, config)


def linear_reason(linear: nn.Linear, before: nn.Linear | None) -> str | None:
    """Why a linear layer cannot be in a chain behind another one, or at its beginning; None where it can."""
    dtype = linear.weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it is in {dtype}"
    if before is None and linear.in_features % _EIGHT != 0:
        return f"the kernel takes features in multiples of {_EIGHT}, not {linear.in_features}"
    if before is not None and (before.out_features, before.weight.dtype) != (linear.in_features, dtype):
        return f"it takes {linear.in_features} features in {dtype}, not what is in front of it"
    if linear.weight.numel() > MAX_WEIGHTS:
        return f"a kernel of its own has all processors to read its {linear.weight.numel()} weights"
    return None


def of_one_pixel(x: Tensor) -> Tensor:
    """Rows (N, features) as images of one pixel."""
    return x[:, :, None, None]


def _packed(linears: Sequence[tuple[nn.Linear, bool]]) -> Iterator[cuda_chain.ChainLayer]:
    wide = linears[0][0].in_features
    for linear, relu in linears:
        features, taken = linear.weight.shape
        high = -(-features // _EIGHT) * _EIGHT
        weight = linear.weight.new_zeros(high, wide)
        weight[:features, :taken] = linear.weight.detach()
        bias = None
        if linear.bias is not None:
            bias = weight.new_zeros(high)
            bias[:features] = linear.bias.detach()
        every = torch.ones(block_grid((high, wide, 1, 1), _BLOCK), dtype=torch.bool, device=weight.device)
        blocks = BSRWeight.from_dense(weight, _BLOCK, every)
        parts = blocks.values, blocks.crow_indices, blocks.col_indices, bias, blocks.weight_shape, blocks.block_shape
        yield cuda_chain.pack_layer(*parts, epilogue="relu" if relu else "none")
        wide = high
