"""The layers of a captured graph that the C++ CPU kernels run, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import resolve
from slimkernels.kernels.cpu.conv2d import PackedConv2d, pack_strips
from slimkernels.kernels.cpu.low_rank import pack_factor
from slimkernels.kernels.problems import Pair, Request, factor_geometry, strip_width

_OPS = torch.ops.slimkernels
_LINEAR = torch.ops.aten.linear.default
_POINTWISE: tuple[Pair, Pair, Pair] = ((1, 1), (0, 0), (1, 1))


@dataclass
class NativeLayer:
    """One native convolution (a linear layer is one of one-pixel images): its strip pack, geometry and bias.

    Attributes:
        tensors: the pack, then the entry offsets by ``(width, lanes)`` in the order of ``offsets``.
    """

    isa: str
    op: str
    tensors: list[Tensor]
    shape: tuple[int, int, int, int]
    geometry: tuple[Pair, Pair, Pair]
    epilogue: str
    bias: Tensor | None
    offsets: dict[tuple[int, int], int] = field(default_factory=dict)

    @cached_property
    def conv(self) -> PackedConv2d:
        """The native convolution on the tensors as they are when first asked."""
        return PackedConv2d(self.isa, self.tensors[:3], self.shape, *self.geometry, self.epilogue, self.op)

    def want_offsets(self, w: int, lanes: int) -> None:
        """Adds the entry offsets for images of this width and layout to the tensors."""
        if (w, lanes) not in self.offsets:
            self.offsets[w, lanes] = len(self.tensors)
            self.tensors.append(self.conv.entry_offsets(w, lanes))

    def move(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors by copies."""
        self.tensors = list(tensors)
        self.__dict__.pop("conv", None)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of what the layer writes for images of this height and width."""
        p, q = self.conv.output_size(h, w)
        return (p // 2, q // 2) if self.epilogue == "relu_maxpool2" else (p, q)


def native_layers(target: Any, args: Sequence[Any]) -> list[NativeLayer]:
    """The native layers of an op call, in the order in which they run; none where it takes another kernel.

    Args:
        target: an op overload, torch's dense linear layer among them: between native layers it costs less as one of
            them than as an op of its own. args: its arguments, every tensor's value among them.
    """
    if target is _LINEAR:
        return _dense_linear(args)
    makers = {
        _OPS.bsr_conv2d.default: _block_sparse, _OPS.bsr_linear.default: _block_sparse,
        _OPS.low_rank_conv2d.default: _low_rank_conv2d, _OPS.low_rank_linear.default: _low_rank_linear,
    }  # fmt: skip
    if target not in makers or args[0].numel() == 0:
        return []
    x, epilogue, kernel = args[0], args[-2], args[-1]
    block_shape = tuple(args[7]) if makers[target] is _block_sparse else (1, 1)
    spec = resolve(kernel, Request(target._opname, x.dtype, x.device.type, block_shape, epilogue))  # type: ignore[arg-type]
    if spec.backend != "cpu":
        return []
    assert spec.isa is not None
    return makers[target](args, spec.isa, target._opname)


def _block_sparse(args: Sequence[Any], isa: str, op: str) -> list[NativeLayer]:
    _, values, crow, col, bias, _, shape, block_shape = args[:8]
    geometry = tuple(tuple(pair) for pair in args[8:11]) if len(shape) == 4 else _POINTWISE
    shape = (*shape, 1, 1)[:4]
    packed = pack_strips(values, crow, col, shape, block_shape, strip_width(block_shape[0], isa))
    return [NativeLayer(isa, op, packed, shape, geometry, args[-2], bias)]  # type: ignore[arg-type]


def _dense_linear(args: Sequence[Any]) -> list[NativeLayer]:
    """A dense linear layer as a pack of which every entry is stored."""
    x, weight, bias = (*args, None)[:3]
    if not all(t is None or (t.dtype is torch.float32 and t.device.type == "cpu") for t in (x, weight, bias)):
        return []
    spec = resolve("auto", Request("bsr_linear", x.dtype, "cpu", (16, 1), "none"))
    if spec.backend != "cpu" or x.numel() == 0 or weight.dim() != 2 or weight.numel() == 0:
        return []
    assert spec.isa is not None
    return _factors((weight,), [_POINTWISE], bias, "none", spec.isa, "linear")


def _low_rank_linear(args: Sequence[Any], isa: str, op: str) -> list[NativeLayer]:
    _, U, V, bias = args[:4]
    return _factors((V, U), [_POINTWISE, _POINTWISE], bias, args[-2], isa, op)


def _low_rank_conv2d(args: Sequence[Any], isa: str, op: str) -> list[NativeLayer]:
    _, factors, bias, _, stride, padding, dilation, kind, epilogue, _ = args
    steps = factor_geometry(kind, len(factors), tuple(stride), tuple(padding), tuple(dilation))
    return _factors(factors, steps, bias, epilogue, isa, op)


def _factors(
    factors: Sequence[Tensor], geometry: Sequence[tuple[Pair, Pair, Pair]], bias: Tensor | None, epilogue: str,
    isa: str, op: str,
) -> list[NativeLayer]:  # fmt: skip
    last = len(factors) - 1
    return [
        NativeLayer(
            isa, op, pack_factor(factor, isa), (*factor.shape, 1, 1)[:4], step, epilogue if i == last else "none",
            bias if i == last else None,
        )
        for i, (factor, step) in enumerate(zip(factors, geometry, strict=True))
    ]  # fmt: skip
