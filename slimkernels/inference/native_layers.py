"""The layers of a captured graph that the C++ CPU kernels run, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimkernels.dispatch.select import resolve
from slimkernels.kernels.cpu.conv2d import pack_strips
from slimkernels.kernels.cpu.layer import Geometry, NativeLayer
from slimkernels.kernels.cpu.low_rank import pack_factor
from slimkernels.kernels.cpu.pooling import Pooling, adaptive_average_pooling, average_pooling, max_pooling
from slimkernels.kernels.problems import Request, factor_geometry, strip_width

_OPS = torch.ops.slimkernels
_LINEAR = torch.ops.aten.linear.default
_POOLINGS: dict[Any, Any] = {
    torch.ops.aten.max_pool2d.default: max_pooling,
    torch.ops.aten.avg_pool2d.default: average_pooling,
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_average_pooling,
}
_POINTWISE: Geometry = ((1, 1), (0, 0), (1, 1))


def reads_images(target: Any) -> bool:
    """Whether a native op is a convolution or a pooling; all others take rows of any shape."""
    return target in (_OPS.bsr_conv2d.default, _OPS.low_rank_conv2d.default, *_POOLINGS)


def laid_out(tensor: Tensor, images: bool) -> Tensor:
    """The tensor if it lies as native layers want their images or rows, else a new one that does."""
    layout = torch.channels_last if images else torch.contiguous_format
    return tensor if tensor.is_contiguous(memory_format=layout) else torch.empty_like(tensor, memory_format=layout)


def images_or_rows(tensor: Tensor, images: bool) -> Tensor:
    """The tensor as native layers take it: images for a convolution, ``(n, channels)`` for all others."""
    return tensor if images else tensor.view(-1, tensor.shape[-1])


def native_layers(target: Any, args: Sequence[Any]) -> Sequence[NativeLayer | Pooling]:
    """The native layers of an op call, in the order in which they run; none where it takes another kernel.

    Args:
        target: an op overload. Torch's dense linear layer and its poolings are taken, too: between native layers they
            cost less as one of them than as an op of their own.
        args: its positional arguments, with the values of all tensors.
    """
    if target in _POOLINGS:
        return _pooling(target, args)
    if target is _LINEAR:
        return _dense_linear(*args)
    builders = {
        _OPS.bsr_conv2d.default: _block_sparse,
        _OPS.bsr_linear.default: _block_sparse,
        _OPS.low_rank_conv2d.default: _low_rank_conv2d,
        _OPS.low_rank_linear.default: _low_rank_linear,
    }
    if target not in builders:
        return []
    given = {argument.name: value for argument, value in zip(target._schema.arguments, args)}
    x = given["x"]
    if x.numel() == 0:
        return []
    op = target._opname
    block_shape = tuple(given.get("block_shape", (1, 1)))
    # For mypy: a pair, as the op has checked.
    request = Request(op, x.dtype, x.device.type, block_shape, given["epilogue"])  # type: ignore[arg-type]
    spec = resolve(given["kernel"], request)
    if spec.backend != "cpu":
        return []
    assert spec.isa is not None
    layers = builders[target](spec.isa, op, given)
    # What follows the sum belongs to the last of several factors.
    layers = [*layers[:-1], replace(layers[-1], epilogue=given["epilogue"], bias=given["bias"])]
    return layers if _take(layers, x.shape[2:] if reads_images(target) else (1, 1)) else []


def _take(layers: Sequence[NativeLayer], size: Sequence[int]) -> bool:
    """Whether the kernels hold images of this size, one layer behind the other; where not, the op runs another one."""
    for layer in layers:
        if not layer.conv.takes_images(size[0], size[1]):
            return False
        size = layer.output_size(size[0], size[1])
    return True


def _pooling(target: Any, args: Sequence[Any]) -> list[Pooling]:
    x, *others = args
    if x.dim() != 4 or x.dtype is not torch.float32 or not x.is_cpu or x.numel() == 0:
        return []
    spec = resolve("auto", Request("bsr_conv2d", x.dtype, "cpu", (16, 1), "none"))
    if spec.backend != "cpu":
        return []
    assert spec.isa is not None
    found = _POOLINGS[target](spec.isa, tuple(x.shape[1:]), *others)
    return [] if found is None else [found]


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[NativeLayer]:
    """A dense linear layer as a pack of which every entry is stored."""
    if not all(t is None or (t.dtype is torch.float32 and t.device.type == "cpu") for t in (x, weight, bias)):
        return []
    spec = resolve("auto", Request("bsr_linear", x.dtype, "cpu", (16, 1), "none"))
    if spec.backend != "cpu" or x.numel() == 0 or weight.dim() != 2 or weight.numel() == 0:
        return []
    assert spec.isa is not None
    return [replace(_dense_factor(spec.isa, "linear", weight, _POINTWISE), bias=bias)]


def _block_sparse(isa: str, op: str, given: dict[str, Any]) -> list[NativeLayer]:
    block_shape, (c_out, c_in, *taps) = given["block_shape"], given["weight_shape"]
    r, s = taps or (1, 1)
    shape = (c_out, c_in, r, s)
    geometry = tuple(tuple(given[name]) for name in ("stride", "padding", "dilation")) if taps else _POINTWISE
    blocks = given["values"], given["crow_indices"], given["col_indices"]
    packed = pack_strips(*blocks, shape, block_shape, strip_width(block_shape[0], isa))
    # For mypy: four sizes, which its type does not say.
    return [NativeLayer(isa, op, packed, shape, geometry)]  # type: ignore[arg-type]


def _low_rank_linear(isa: str, op: str, given: dict[str, Any]) -> list[NativeLayer]:
    return [_dense_factor(isa, op, given[name], _POINTWISE) for name in ("V", "U")]


def _low_rank_conv2d(isa: str, op: str, given: dict[str, Any]) -> list[NativeLayer]:
    factors = given["factors"]
    stride, padding, dilation = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    geometries = factor_geometry(given["kind"], len(factors), stride, padding, dilation)
    return [_dense_factor(isa, op, *pair) for pair in zip(factors, geometries, strict=True)]


def _dense_factor(isa: str, op: str, factor: Tensor, geometry: Geometry) -> NativeLayer:
    c_out, c_in, r, s = (*factor.shape, 1, 1)[:4]
    return NativeLayer(isa, op, pack_factor(factor, isa), (c_out, c_in, r, s), geometry)
