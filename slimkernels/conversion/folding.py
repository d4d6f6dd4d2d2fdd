"""Batch norm folded into the layer before it, and which ReLU and max-pool may move into a layer's epilogue.

In eval mode ``BN(W x + b) = (g W) x + (b - mean) g + beta`` with ``g = gamma / sqrt(var + eps)`` per output channel
(Jacob et al., arXiv 1712.05877, section 3.2). It is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimkernels.conversion.factor_chains import FactorChain
from slimkernels.conversion.graph import ModelGraph, ancestors, has_hooks
from slimkernels.conversion.layers import LayerWeight


def flush_subnormals(tensor: Tensor) -> Tensor:
    """The tensor with numbers below the smallest normal one replaced by 0: arithmetic on them is slow on CPUs."""
    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, torch.zeros_like(tensor), tensor)


def batch_norm_scale_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``(g, beta - mean g)`` of an eval-mode batch norm in float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -bn.running_mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.detach().double()


def fold_tensors(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight ``(C_out, ...)`` and bias ``(C_out,)`` of a layer with the batch norm after it, subnormals flushed."""
    scale, shift = batch_norm_scale_shift(bn)
    folded = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return flush_subnormals(folded.to(weight.dtype)), flush_subnormals(shift.to(weight.dtype))


def fold_weight(layer: LayerWeight, bn: nn.BatchNorm2d) -> LayerWeight:
    """`fold_tensors` on a layer."""
    weight, bias = fold_tensors(layer.weight, layer.bias, bn)
    return replace(layer, weight=weight, bias=bias)


def fold_chain(chain: FactorChain, bn: nn.BatchNorm2d) -> FactorChain:
    """`fold_tensors` on the last factor of a chain."""
    last, bias = fold_tensors(chain.factors[-1], chain.bias, bn)
    return replace(chain, factors=(*chain.factors[:-1], last), bias=bias)


@dataclass(frozen=True)
class Tail:
    """The modules behind a layer that conversion may take into it; None where there is none or it may not.

    Attributes:
        bn: batch norm.
        relu: ReLU behind it.
        pool: 2x2 stride-2 max-pool behind that.
    """

    bn: str | None = None
    relu: str | None = None
    pool: str | None = None


def batch_norm_obstacle(bn: nn.Module, channels: int) -> str | None:
    """Why a batch norm itself cannot be folded into a layer of so many output channels; None when it can."""
    if type(bn) is not nn.BatchNorm2d:
        return f"{type(bn).__name__} is not folded"
    if bn.running_mean is None or bn.running_var is None:
        return "it keeps no running statistics"
    if bn.num_features != channels:
        return f"it normalizes {bn.num_features} channels, the layer before it has {channels}"
    return None


def is_pool2(module: nn.Module) -> bool:
    """Whether a module is the max-pool of the ``relu_maxpool2`` epilogue: 2x2, stride 2, no padding, floor mode."""
    if type(module) is not nn.MaxPool2d:
        return False
    pairs = {name: _pair(getattr(module, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
    expected = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    return pairs == expected and not module.ceil_mode and not module.return_indices


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def hidden_reason(
    model: nn.Module, uniques: Mapping[str, nn.Module], readers: Mapping[str, str], a: str, b: str
) -> str | None:
    """Why ``b``, which alone takes the output of ``a``, may not disappear into ``a``; None when it may.

    A hook on ``b``, or on a container that ends between the two, would see another value.
    """
    if b not in uniques:
        return "it is registered under several names"
    if has_hooks(uniques[b]):
        return "it carries hooks"
    if b in readers:
        return readers[b]
    for name in set(ancestors(a)) ^ set(ancestors(b)):
        if has_hooks(model.get_submodule(name)):
            return f"{name} carries hooks"
    return None


def find_tail(
    model: nn.Module,
    graph: ModelGraph,
    uniques: Mapping[str, nn.Module],
    readers: Mapping[str, str],
    name: str,
    weight: Tensor,
) -> tuple[Tail, dict[str, str]]:
    """What follows a convolution or linear layer and may move into it, and why a batch norm that follows stays.

    Args:
        model: the model that holds the layer.
        graph: what was read of the model's calls.
        uniques: `slimkernels.conversion.graph.unique_names` of the model.
        readers: `slimkernels.conversion.readers.weight_readers` of the model.
        name: the layer.
        weight: its weight, 4-D for a convolution.
    """
    bn = relu = pool = None
    reasons: dict[str, str] = {}
    last = name
    for follower in graph.chain(name):
        module = model.get_submodule(follower)
        hidden = hidden_reason(model, uniques, readers, last, follower)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and bn is None and relu is None:
            why = batch_norm_obstacle(module, weight.shape[0]) or hidden
            if weight.dim() != 4:
                why = "the layer before it is not a convolution"
            if why is not None:
                reasons[follower] = why
                break
            bn = follower
        elif hidden is None and type(module) is nn.ReLU and relu is None:
            relu = follower
        elif hidden is None and relu is not None and is_pool2(module):
            pool = follower
            break
        else:
            break
        last = follower
    return Tail(bn, relu, pool), reasons
