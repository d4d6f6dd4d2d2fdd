"""The low-rank twin of one layer: its factors, the module that runs them, and the batch norm behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.compress.factorization.decompositions import svd_conv, tai, truncated_svd, tucker2
from slimkernels.compress.factorization.layer_ranks import FactorizableLayer, Ranks
from slimkernels.compress.factorization.whitening import whitened_svd
from slimkernels.formats import LowRankWeight
from slimkernels.nn import LowRankConv2d, LowRankLinear, resolved_padding


def decomposed(layer: FactorizableLayer, ranks: Ranks) -> tuple[Tensor, ...]:
    """Factors in the order of `formats.LowRankWeight`."""
    weight, kind = layer.module.weight.detach(), layer.kind
    if kind == "tucker2":
        return tucker2(weight, *ranks)
    if kind == "tai":
        return tai(weight, *ranks)
    if layer.moment is not None:
        u, v = whitened_svd(weight.flatten(1), ranks[0], layer.moment)
    elif weight.dim() == 2:
        u, v = truncated_svd(weight, *ranks)
    else:
        return svd_conv(weight, *ranks)
    return (v, u) if weight.dim() == 2 else (v.reshape(-1, *weight.shape[1:]), u.reshape(*u.shape, 1, 1))


def low_rank_twin(module: Any, factors: tuple[Tensor, ...], kind: str) -> LowRankConv2d | LowRankLinear:
    """A layer's factors as a module with its bias, arguments, mode and ``requires_grad``."""
    bias = None if module.bias is None else module.bias.detach()
    twin: LowRankConv2d | LowRankLinear
    if isinstance(module, nn.Linear):
        v, u = factors
        twin = LowRankLinear.from_factors(u, v, bias)
    else:
        twin = LowRankConv2d.from_factors(
            factors,
            bias,
            kind=kind,
            stride=module.stride,
            padding=resolved_padding(module),
            dilation=module.dilation,
        )
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_((module.bias if name == "bias" else module.weight).requires_grad)
    return twin.train(module.training)


def relative_error(dense: Tensor, factors: Iterable[Tensor], kind: str) -> float:
    """Frobenius norm of what the factors change of a float64 weight, over that of the weight."""
    norm = float(torch.linalg.vector_norm(dense))
    product = LowRankWeight(kind, tuple(f.detach().double() for f in factors)).to_dense()
    return float(torch.linalg.vector_norm(dense - product)) / norm if norm > 0 else 0.0


def with_batch_norm(twin: nn.Module, conv: nn.Conv2d) -> nn.Sequential:
    """A low-rank convolution as ``low_rank`` with a fresh ``batch_norm`` behind it, in the mode of the dense one."""
    norm = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
    norm.requires_grad_(conv.weight.requires_grad)
    return nn.Sequential(OrderedDict(low_rank=twin, batch_norm=norm)).train(conv.training)


def batch_norm_size(conv: nn.Conv2d) -> tuple[int, int]:
    """Parameters and bytes of a batch norm behind a convolution."""
    return 2 * conv.out_channels, 4 * conv.out_channels * conv.weight.element_size() + 8


def low_rank_part(twin: Any) -> Any:
    """The low-rank layer of a twin, in front of its batch norm where it has one."""
    return twin.low_rank if isinstance(twin, nn.Sequential) else twin
