"""Low-rank layers on the C++ CPU kernels: dense factors as strip packs, run one after the other.

A dense factor is a block-sparse weight with every entry stored, so the strip kernel of csrc/kernels.h runs it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.packs import StripPack, factor_packs
from slimkernels.kernels.problems import Pair, factor_geometry

# Relative time of one strip of so many output channels, per pixel and entry. avx2: measured on Zen 3 over VGG-19's
# factors (50, 75 and 80 GFLOP/s of 103). avx512: loads and multiply-adds a tile needs, counted. Rank 24 takes one strip
# of 24 rather than two of 16: 1.5x there.
_STRIP_COST = {
    "scalar": {8: 1.0, 16: 2.0, 24: 3.0},
    "avx2": {8: 0.16, 16: 0.213, 24: 0.30},
    "avx512": {8: 0.6, 16: 0.6, 24: 1.5, 32: 1.0},
}


def factor_strip(out_channels: int, isa: str) -> int:
    """Output channels of one strip of a dense factor: the least time, padded channels included; ties to the wider."""
    costs = _STRIP_COST[isa]
    return min(costs, key=lambda strip: (-(-out_channels // strip) * costs[strip], -strip))


def pack_factor(factor: Tensor, isa: str) -> StripPack:
    """The strip pack of a dense weight; padded channels weigh 0.

    Args:
        factor: ``(C_out, C_in, R, S)``, or ``(out, in)``, float32 on the CPU.
    """
    weight = factor.detach()
    c_out, c_in = weight.shape[:2]
    taps, strip = weight[0, 0].numel(), factor_strip(c_out, isa)
    strips = -(-c_out // strip)
    padded = weight.new_zeros((strips * strip, taps, c_in))
    padded[:c_out] = weight.reshape(c_out, c_in, taps).transpose(1, 2)
    weights = padded.reshape(strips, strip, taps * c_in).transpose(1, 2).reshape(-1, strip).contiguous()
    channels = torch.arange(c_in, dtype=torch.int32).repeat(strips * taps)
    return StripPack(weights, channels, torch.arange(strips * taps + 1, dtype=torch.int32) * c_in)


def pack_factors(factors: Sequence[Tensor], isa: str) -> list[Tensor]:
    """The packs of all factors, one after the other, in the order in which they run."""
    return [tensor for factor in factors for tensor in pack_factor(factor, isa)]


class PackedLowRank:
    """A packed chain of factors with its geometry: a native low-rank layer that only waits for its input.

    Immutable, as `PackedConv2d` is.

    Args:
        op: ``low_rank_conv2d`` or ``low_rank_linear``, named in errors.
        isa: instruction set of the kernel.
        packed: what `pack_factors` returned.
        shapes: ``(C_out, C_in, R, S)`` of every factor.
        geometry: ``(stride, padding, dilation)`` of every factor.
        epilogue: of the last factor.

    Raises:
        ValueError, TypeError: packs of other factors, or as `PackedConv2d`.
    """

    __slots__ = ("c_out", "convs")

    def __init__(
        self,
        op: str,
        isa: str,
        packed: Sequence[Tensor],
        shapes: Sequence[Sequence[int]],
        geometry: Sequence[tuple[Pair, Pair, Pair]],
        epilogue: str,
    ) -> None:
        packs = factor_packs(op, packed, len(shapes))
        if any(after[1] != before[0] for before, after in pairwise(shapes)):
            got = [tuple(shape) for shape in shapes]
            raise ValueError(f"{op}: expected factors that take each other's channels, got {got}")
        last = len(shapes) - 1
        self.convs = tuple(
            PackedConv2d(isa, pack, shape, *step, epilogue if i == last else "none", op=op)
            for i, (pack, shape, step) in enumerate(zip(packs, shapes, geometry, strict=True))
        )
        self.c_out = shapes[-1][0]

    def attempt(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for a non-empty float32 CPU image batch that every factor takes; None where one does not.

        Raises:
            ValueError, TypeError: the bias does not fit. RuntimeError: a native kernel failed (out of memory).
        """
        if x.dim() != 4:
            return None
        h, w = x.shape[2:]
        for factor in self.convs:
            if not factor.takes_images(h, w):
                return None
            h, w = factor.output_size(h, w)
        y = self.convs[0].attempt(x, None)
        return y if y is None else self._rest(y, bias)

    def _rest(self, y: Tensor, bias: Tensor | None) -> Tensor:
        for factor in self.convs[1:-1]:
            y = factor(y, None)
        return self.convs[-1](y, bias)

    def attempt_rows(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for float32 CPU rows ``(..., in)``; None for others. Raises as `attempt`."""
        y = self.convs[0].attempt_rows(x, None)
        if y is None:
            return None
        for factor in self.convs[1:-1]:
            y = factor.rows(y, None)
        return self.convs[-1].rows(y, bias)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output for float32 CPU images that the op has checked, possibly none. Raises as `PackedConv2d`."""
        return self._rest(self.convs[0](x, None), bias)

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `attempt_rows`, for rows that the op has checked. Raises as `PackedConv2d`."""
        for factor in self.convs[:-1]:
            x = factor.rows(x, None)
        return self.convs[-1].rows(x, bias)


_POINTWISE: tuple[Pair, Pair, Pair] = ((1, 1), (0, 0), (1, 1))


def prepare_linear(isa: str, packed: Sequence[Tensor], U: Tensor, V: Tensor, epilogue: str) -> PackedLowRank:
    """The ready call of a packed low-rank linear layer, ``packed`` being that of ``(V, U)``."""
    shapes = [(*V.shape, 1, 1), (*U.shape, 1, 1)]
    return PackedLowRank("low_rank_linear", isa, packed, shapes, [_POINTWISE, _POINTWISE], epilogue)


def prepare_conv2d(
    isa: str,
    packed: Sequence[Tensor],
    factors: Sequence[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    kind: str,
    epilogue: str,
) -> PackedLowRank:
    """The ready call of a packed low-rank convolution."""
    geometry = factor_geometry(kind, len(factors), stride, padding, dilation)
    return PackedLowRank("low_rank_conv2d", isa, packed, [f.shape for f in factors], geometry, epilogue)


def launch_low_rank_linear(
    isa: str, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, packed: Sequence[Tensor], epilogue: str
) -> Tensor:
    """Low-rank linear layer of a contiguous float32 CPU tensor (..., in). Without ``packed`` it is packed in this call.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    return prepare_linear(isa, packed or pack_factors((V, U), isa), U, V, epilogue).rows(x, bias)


def launch_low_rank_conv2d(
    isa: str,
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
    """Low-rank convolution of a float32 CPU tensor; x channels_last. Without ``packed`` it is packed in this call.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    steps = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    packed = packed or pack_factors(factors, isa)
    return prepare_conv2d(isa, packed, factors, *steps, kind, epilogue)(x, bias)
