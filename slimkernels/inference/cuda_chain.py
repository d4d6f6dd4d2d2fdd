"""Block-sparse convolutions that follow each other, as one CUDA launch for a few images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from slimkernels.kernels import cuda_chain
from slimkernels.kernels.chain_plan import ChainPlan
from slimkernels.nn import BlockSparseConv2d
from slimkernels.tensors import Snapshots


class CudaChain:
    """A run of modules in one launch; `chain_of` makes it. It holds a copy of their weights, packed.

    Attributes:
        layers: what the launcher takes.
        tensors: of the modules, which were packed.
        config: as `slimkernels.kernels.cuda_chain.launch_chain` has it.
    """

    def __init__(self, tensors: list[Tensor], packed: Iterable[cuda_chain.ChainLayer], config: dict[str, int]) -> None:
        self.config, self.tensors = config, tensors
        self._packed_from = Snapshots(tensors)
        self.layers = list(packed)
        # A plan takes Python a millisecond, and a chain of VGG-19's layers 31 us on an H200.
        self._plans: dict[Any, ChainPlan] = {}

    def plan(self, x: Tensor) -> ChainPlan:
        """How the layers run on a batch like this one, with an image at least. Raises ValueError where they do not."""
        key = (x.shape, x.dtype, x.device, *sorted(self.config.items()))
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = cuda_chain.plan_for(x, self.layers, self.config)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` through all layers: ``(N, C_out, P, Q)``, channels_last, without a gradient.

        Raises:
            ValueError, TypeError: as `slimkernels.kernels.cuda_chain.launch_chain`.
            RuntimeError: a weight was written since the chain was made, or the kernel cannot run here.
        """
        if not self._packed_from.hold():
            raise RuntimeError("chain_of: a weight was written since the chain was made: make it anew")
        return cuda_chain.launch_chain(x.detach(), self.layers, self.config, self.plan)


def chain_of(modules: Iterable[nn.Module], **config: int) -> CudaChain:
    """The block-sparse convolutions of ``modules``, one after the other, as one launch.

    For 1 to 16 images, whose layers are latency rather than work. The modules are in eval mode; what was fused into
    them (bias, ReLU, 2x2 max-pool) stays so. Waits for the device.

    Args:
        modules: `BlockSparseConv2d` in blocks of multiples of 32 x 16, in bf16 or fp16; ``nn.Identity``, dropout, and
            ``nn.Sequential`` of such modules.
        config: as `slimkernels.kernels.cuda_chain.launch_chain` has it.

    Raises:
        TypeError: another module among them, or a dtype that the kernel does not take.
        ValueError: a module in training mode, none at all, or a layer that the kernel does not take.
    """
    convolutions = list(_convolutions(modules))
    if not convolutions:
        raise ValueError("chain_of: expected a BlockSparseConv2d at least, got none")
    tensors = [tensor for conv in convolutions for tensor in _tensors(conv)]
    return CudaChain(tensors, map(_layer, convolutions), config)


def _convolutions(modules: Iterable[nn.Module]) -> Iterator[BlockSparseConv2d]:
    for module in modules:
        if module.training:
            raise ValueError(f"chain_of: expected modules in eval mode, got a {type(module).__name__} in training mode")
        if isinstance(module, nn.Sequential):
            yield from _convolutions(module)
        elif isinstance(module, BlockSparseConv2d):
            yield module
        elif not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            raise TypeError(
                f"chain_of: expected BlockSparseConv2d, Identity, Dropout and Sequential of them, "
                f"got {type(module).__name__}"
            )


def _tensors(conv: BlockSparseConv2d) -> list[Tensor]:
    tensors = [conv.values, conv.crow_indices, conv.col_indices]
    return tensors if conv.bias is None else [*tensors, conv.bias]


def _layer(conv: BlockSparseConv2d) -> cuda_chain.ChainLayer:
    weight = conv.weight_bsr()
    return cuda_chain.pack_layer(
        weight.values,
        weight.crow_indices,
        weight.col_indices,
        conv.bias,
        weight.weight_shape,
        weight.block_shape,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.epilogue,
    )
