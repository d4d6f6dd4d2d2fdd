"""Chains of thin layers that a factorizer left behind, and what they merge into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from slimkernels.conversion.graph import ModelGraph
from slimkernels.conversion.layers import LayerWeight, Pair
from slimkernels.formats import LowRankWeight


@dataclass(frozen=True)
class FactorChain:
    """Two or three consecutive layers that together are one low-rank layer.

    Attributes:
        names: the layers, in the order they run.
        kind: ``svd``, ``tai`` or ``tucker2``, see `slimkernels.formats.LowRankWeight`.
        factors: their weights in that order.
        bias: of the whole: biases of the earlier layers are carried through the later ones.
        stride: of the merged convolution.
        padding: of the merged convolution.
        dilation: of the merged convolution.
        requires_grad: whether the layers' parameters are trainable.
    """

    names: tuple[str, ...]
    kind: str
    factors: tuple[Tensor, ...] = field(repr=False)
    bias: Tensor | None = field(repr=False)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    requires_grad: bool = True

    @property
    def ranks(self) -> tuple[int, ...]:
        """Inner channel counts."""
        return tuple(f.shape[0] for f in self.factors[:-1])

    def merged(self) -> LayerWeight:
        """The dense layer with the product of the factors, computed in float64 and rounded once."""
        product = LowRankWeight(self.kind, tuple(f.double() for f in self.factors)).to_dense()
        return LayerWeight(
            product.to(self.factors[0].dtype),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            None,
            self.requires_grad,
        )


def find_chains(
    graph: ModelGraph, weights: Mapping[str, LayerWeight], *, training: bool = False
) -> Iterator[FactorChain]:
    """Chains among layers that feed each other alone; three layers (Tucker-2) before two.

    Only thin chains count: fewer weights than their product. While training, a bias before the last layer rules a
    chain out, because carrying it through would change what is trained.
    """
    taken: set[str] = set()
    for name in weights:
        if name in taken:
            continue
        following: list[str] = []
        for follower in graph.chain(name):
            if follower not in weights or follower in taken or len(following) == 2:
                break
            following.append(follower)
        for length in (2, 1):
            if len(following) < length:
                continue
            names = (name, *following[:length])
            chain = _chain(names, [weights[n] for n in names])
            early_bias = any(weights[n].bias is not None for n in names[:-1])
            if chain is not None and not (training and early_bias):
                taken.update(names)
                yield chain
                break


def _chain(names: tuple[str, ...], layers: list[LayerWeight]) -> FactorChain | None:
    first, last = layers[0], layers[-1]
    tensors = [layer.weight for layer in layers]
    if len({(t.dim(), t.dtype, t.device) for t in tensors}) != 1 or any(layer.block_shape for layer in layers):
        return None
    if any(a.shape[0] != b.shape[1] for a, b in itertools.pairwise(tensors)):
        return None
    geometry = merged_geometry(layers)
    if geometry is None:
        return None
    kind, stride, padding, dilation = geometry
    kernel = [max(t.shape[i] for t in tensors) if first.is_conv else 1 for i in (-2, -1)]
    merged = last.weight.shape[0] * first.weight.shape[1] * math.prod(kernel)
    if sum(t.numel() for t in tensors) >= merged:
        return None
    bias = None
    for i, layer in enumerate(layers):
        if bias is not None and layer.is_conv and max(layer.padding) > 0:
            return None  # zero padding would have to be padding by the earlier bias
        if bias is not None:
            bias = layer.weight.double().reshape(*layer.weight.shape[:2], -1).sum(-1) @ bias
        if layer.bias is not None and (i == len(layers) - 1 or bool(layer.bias.any())):
            bias = layer.bias.double() if bias is None else bias + layer.bias.double()
    if bias is not None:
        bias = bias.to(first.weight.dtype)
    grad = any(layer.requires_grad for layer in layers)
    return FactorChain(names, kind, tuple(tensors), bias, stride, padding, dilation, grad)


def _is_pointwise(layer: LayerWeight) -> bool:
    return tuple(layer.weight.shape[2:]) == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def merged_geometry(layers: list[LayerWeight]) -> tuple[str, Pair, Pair, Pair] | None:
    """``(kind, stride, padding, dilation)`` of the merged layer; None where the layers are no known factorization."""
    if not layers[0].is_conv:
        return ("svd", (1, 1), (0, 0), (1, 1)) if len(layers) == 2 else None
    if len(layers) == 3:
        outer = _is_pointwise(layers[0]) and _is_pointwise(layers[2])
        core = layers[1]
        return ("tucker2", core.stride, core.padding, core.dilation) if outer and not _is_pointwise(core) else None
    first, last = layers
    if _is_pointwise(last):
        return "svd", first.stride, first.padding, first.dilation
    vertical = first.weight.shape[3] == 1 and first.stride[1] == 1 and first.padding[1] == 0
    horizontal = last.weight.shape[2] == 1 and last.stride[0] == 1 and last.padding[0] == 0
    if vertical and horizontal:
        pairs = [(getattr(first, a)[0], getattr(last, a)[1]) for a in ("stride", "padding", "dilation")]
        return "tai", pairs[0], pairs[1], pairs[2]
    return None
