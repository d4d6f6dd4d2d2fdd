"""One layer of a chain: a packed convolution, in float32 or in bf16, and the bias that it adds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.pairs import PairPack, PairsConv2d, engine, pack_pairs, takes_pairs
from slimkernels.kernels.cpu.steps import Step
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import Pair

Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation


@dataclass(frozen=True)
class NativeLayer:
    """One native convolution (a linear layer is one of one-pixel images): its strip pack, geometry and bias.

    Attributes:
        op: which op the layer comes from; named in errors.
        packed: of the weight.
        shape: of the weight, ``(C_out, C_in, R, S)``.
        pair_pack: the pack for bf16, where it has been made.
    """

    isa: str
    op: str
    packed: StripPack
    shape: tuple[int, int, int, int]
    geometry: Geometry
    epilogue: str = "none"
    bias: Tensor | None = None
    pair_pack: PairPack | None = None

    @classmethod
    def of(cls, conv: PackedConv2d, bias: Tensor | None) -> NativeLayer:
        """The layer that runs this very convolution, whose pack is not checked again."""
        layer = cls(conv.isa, conv.op, conv.packed, conv.weight_shape, conv.geometry, conv.epilogue, bias)
        layer.__dict__["conv"] = conv  # where the property below keeps its value
        return layer

    @cached_property
    def conv(self) -> PackedConv2d:
        """The native convolution of this layer. Making one checks the pack."""
        return PackedConv2d(self.isa, self.packed, self.shape, *self.geometry, self.epilogue, self.op)

    @cached_property
    def pairs(self) -> PairsConv2d:
        """The same convolution in bf16, on the machine's `pairs.engine`. Making one packs the weight, and checks it."""
        fastest = engine()
        assert fastest is not None
        packed = self.pair_pack or pack_pairs(self.packed, self.shape)
        return PairsConv2d(fastest, packed, self.shape, *self.geometry, self.epilogue, self.op)

    def takes_pairs(self, h: int, w: int) -> bool:
        """Whether it runs in bf16 on images of this size."""
        return not self.conv.deep and takes_pairs(
            *self.shape[1::-1], self.shape[2:], (h, w), self.conv.output_size(h, w)
        )

    def offsets(self, h: int, w: int, lanes: set[int], parts: Pair) -> dict[int, Tensor]:
        """What the kernel reads of its entries on images of this size, by the number of images that lie innermost."""
        return {k: self.conv.known_offsets(h, w, k, parts) for k in lanes}

    def step(
        self, x: Tensor, y: Tensor, n: int, offsets: dict[int, Tensor], residual: Tensor | None, parts: Pair
    ) -> Step:
        """The layer of n images from x to y, as `PackedConv2d.step` says; ``offsets`` as `offsets` returned them.

        Images in pairs, bfloat16, run as `PairsConv2d.step` says.
        """
        if x.dtype is torch.bfloat16:
            return self.pairs.step(x, y, self.bias, n, residual)
        lanes = x.shape[4] if x.dim() == 5 else 1
        return self.conv.step(x, y, self.bias, n, offsets[lanes], residual, parts)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of what the layer writes for images of this height and width."""
        p, q = self.conv.output_size(h, w)
        return (p // 2, q // 2) if self.epilogue == "relu_maxpool2" else (p, q)
