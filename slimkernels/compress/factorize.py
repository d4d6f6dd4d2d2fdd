"""Low-rank factorization of a model: Linear and Conv2d layers become two or three thin layers.

The arithmetic is in `decompositions`; this module decides layer by layer, carries the layer's arguments over and
keeps the record that `factorization_report` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.compress.decompositions import (
    check_energy,
    energy_rank,
    float64,
    rank_by_energy,
    svd_conv,
    tai,
    tai_matrix,
    truncated_svd,
    tucker2,
    unfold_in,
    unfold_out,
)
from slimkernels.compress.selection import SelectedLayer, select_layers
from slimkernels.formats import LOW_RANK_KINDS, LowRankWeight
from slimkernels.nn import LowRankConv2d, LowRankLinear, resolved_padding, unsupported_conv_reason

Rank = int | Sequence[int]

__all__ = [
    "LayerFactorization",
    "factorization_report",
    "factorize_",
    "rank_by_energy",
    "svd_conv",
    "tai",
    "truncated_svd",
    "tucker2",
]

_REPORT = "_slimkernels_factorization"


@dataclass(frozen=True)
class LayerFactorization:
    """What `factorize_` did to one layer; ``kind`` is None where it was left dense, for ``reason``.

    ``ranks`` is ``(rank,)``, or ``(rank_out, rank_in)`` for "tucker2"; ``relative_error`` is the Frobenius norm of
    the weight's change over that of the weight; parameters count the weight, not the bias.
    """

    name: str
    kind: str | None
    ranks: tuple[int, ...]
    relative_error: float
    params_before: int
    params_after: int
    reason: str


def factorize_(
    model: nn.Module,
    method: str = "svd",
    *,
    rank: int | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> nn.Module:
    """Replaces Linear and Conv2d layers in place by `nn.LowRankLinear` and `nn.LowRankConv2d` with trainable factors.

    Linear layers and 1x1 convolutions are always split by the plain SVD. Stride, padding, dilation, bias, dtype,
    device, train mode and ``requires_grad`` carry over exactly. The factors are new Parameters: build the optimiser
    afterwards.

    A layer is left dense, with the reason in `factorization_report`, where the factors would hold no fewer
    parameters than the weight, where it is grouped, pads by other than zeros, is a sub-class, carries hooks or
    parametrizations, or shares its weight. A layer given by its exact name is factorized even where it does not
    shrink; where it cannot be, the call raises.

    Args:
        model: any module holding nn.Linear or nn.Conv2d below itself.
        method: "svd", "tai" or "tucker2".
        rank: one rank for all layers, capped for "tucker2" at the channel counts; or a dict from layer name or
            fnmatch pattern to a rank, ``(rank_out, rank_in)`` allowed for "tucker2", which then also says which
            layers are factorized.
        energy: instead of a rank, the share of each weight's squared norm to keep, in (0, 1]; the rank is the
            smallest that does (for "tucker2" each of the two modes may lose half of the rest, which keeps at least
            this share).
        layers: exact names or patterns; exclude: names or patterns left alone.

    Returns:
        The model itself.

    Raises:
        ValueError: neither or both of rank and energy, a rank or energy out of range, an unknown name (near matches
            are listed), or a named layer that cannot be factorized. Nothing is changed then.
        TypeError: an argument of the wrong type.
    """
    if method not in LOW_RANK_KINDS:
        raise ValueError(f"factorize_: expected method in {LOW_RANK_KINDS}, got {method!r}")
    if (rank is None) == (energy is None):
        raise ValueError(f"factorize_: expected either rank or energy, got rank={rank}, energy={energy}")
    if energy is not None:
        check_energy("factorize_", energy)
    types = (nn.Linear, nn.Conv2d)
    if isinstance(rank, Mapping):
        if layers is not None:
            raise ValueError(
                "factorize_: expected either layers or a rank dict, got both; the dict's keys are the layers"
            )
        picked = select_layers("factorize_", model, types, rank, exclude, "rank")
    else:
        picked = select_layers("factorize_", model, types, layers, exclude)

    records: dict[str, LayerFactorization] = {}
    twins: dict[int, nn.Module] = {}
    shared = _shared_parameters(model)
    for layer in picked:
        refusal = _refusal(layer, model, shared)
        if refusal is not None:
            if layer.explicit or layer.module is model:
                raise ValueError(f"factorize_: layer {layer.name!r}: {refusal}")
            records[layer.name] = _kept(layer, refusal)
            continue
        asked = rank[layer.key] if isinstance(rank, Mapping) else rank  # type: ignore[index]
        record, twin = _factorize_layer(layer, method, asked, energy)
        records[layer.name] = record
        if twin is not None:
            twins[id(layer.module)] = twin
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in twins:
                setattr(parent, child_name, twins[id(child)])
    object.__setattr__(model, _REPORT, {**getattr(model, _REPORT, {}), **records})
    return model


def factorization_report(model: nn.Module) -> tuple[LayerFactorization, ...]:
    """What `factorize_` did to each layer it looked at; empty where it was never called on this model."""
    return tuple(getattr(model, _REPORT, {}).values())


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        own = {id(p) for p in module._parameters.values() if p is not None}
        shared |= own & seen
        seen |= own
    return shared


def _kept(layer: SelectedLayer, reason: str) -> LayerFactorization:
    module: Any = layer.module
    count = math.prod(module.weight.shape)
    return LayerFactorization(layer.name, None, (), 0.0, count, count, reason)


def _refusal(layer: SelectedLayer, model: nn.Module, shared: set[int]) -> str | None:
    """Why a layer cannot be replaced, or None."""
    module: Any = layer.module
    if module is model:
        return f"expected a layer inside a model, got the model itself, a {type(module).__name__}; use from_dense"
    if parametrize.is_parametrized(module):
        found = sorted(module.parametrizations)
        return f"expected a plain weight, got parametrizations on {found}; finalize_ or remove them"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"expected nn.Linear or nn.Conv2d, got the sub-class {type(module).__name__}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "expected weight to be a Parameter, got a computed one (torch.nn.utils.prune?)"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "expected no hooks, got a layer that carries some, which would be lost"
    if any(id(p) in shared for p in module._parameters.values() if p is not None):
        return "expected parameters of its own, got some shared with another layer"
    return unsupported_conv_reason(module) if isinstance(module, nn.Conv2d) else None


def _factorize_layer(
    layer: SelectedLayer, method: str, rank: Rank | None, energy: float | None
) -> tuple[LayerFactorization, nn.Module | None]:
    module: Any = layer.module
    weight = module.weight.detach()
    op = f"factorize_: layer {layer.name!r}"
    kind = method if isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1 else "svd"
    dense = float64(op, weight, weight.dim())
    if energy is not None:
        ranks = _ranks_by_energy(dense, kind, energy, weight.dtype)
    else:
        ranks = _ranks_asked(op, weight, kind, rank)
    limit = min((tai_matrix(weight) if kind == "tai" else weight.flatten(1)).shape)
    if kind != "tucker2" and ranks[0] > limit:
        if layer.explicit:
            raise ValueError(f"{op}: expected rank in [1, {limit}] for a weight {tuple(weight.shape)}, got {ranks[0]}")
        return _kept(layer, f"rank {ranks[0]} exceeds the full rank {limit}"), None
    after = _factor_params(weight, kind, ranks)
    if after >= weight.numel() and not layer.explicit:
        return _kept(layer, f"rank {ranks} needs {after} parameters, the dense weight {weight.numel()}"), None

    factors = _decompose(weight, kind, ranks)
    double = LowRankWeight(kind, tuple(f.double() for f in factors)).to_dense()
    norm = float(torch.linalg.vector_norm(dense))
    error = float(torch.linalg.vector_norm(dense - double)) / norm if norm > 0 else 0.0
    twin = _build(module, factors, kind)
    reason = f"svd instead of {method}: one tap" if kind != method else ""
    return LayerFactorization(layer.name, kind, ranks, error, weight.numel(), after, reason), twin


def _ranks_by_energy(weight: Tensor, kind: str, energy: float, dtype: torch.dtype) -> tuple[int, ...]:
    if kind == "tai":
        return (energy_rank(tai_matrix(weight), energy, dtype),)
    if kind == "svd":
        return (energy_rank(weight.flatten(1), energy, dtype),)
    per_mode = 0.5 * (1.0 + energy)  # the squared error of the HOSVD is at most the sum of what the modes lose
    pair = energy_rank(unfold_out(weight), per_mode, dtype), energy_rank(unfold_in(weight), per_mode, dtype)
    return _feasible(weight, *pair)


def _ranks_asked(op: str, weight: Tensor, kind: str, rank: Rank | None) -> tuple[int, ...]:
    rank = tuple(rank) if isinstance(rank, list) else rank
    pair: Any = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or any(isinstance(r, bool) or not isinstance(r, int) for r in pair):
        raise TypeError(f"{op}: expected rank to be an int or, for 'tucker2', (rank_out, rank_in), got {rank!r}")
    if min(pair) < 1:
        raise ValueError(f"{op}: expected rank of at least 1, got {rank}")
    if kind == "tucker2":
        return pair if isinstance(rank, tuple) else _feasible(weight, *pair)
    if isinstance(rank, tuple):
        raise ValueError(f"{op}: expected one rank for {kind!r}, got {rank}")
    return pair[:1]


def _feasible(weight: Tensor, rank_out: int, rank_in: int) -> tuple[int, int]:
    """Ranks capped at the channels, and at the rank that the other mode leaves; that loses nothing."""
    n, c, kh, kw = weight.shape
    rank_out, rank_in = min(rank_out, n), min(rank_in, c)
    rank_out = min(rank_out, rank_in * kh * kw)
    return rank_out, min(rank_in, rank_out * kh * kw)


def _factor_params(weight: Tensor, kind: str, ranks: tuple[int, ...]) -> int:
    if weight.dim() == 2:
        return ranks[0] * sum(weight.shape)
    n, c, kh, kw = weight.shape
    if kind == "tai":
        return ranks[0] * (c * kh + n * kw)
    if kind == "svd":
        return ranks[0] * (c * kh * kw + n)
    rank_out, rank_in = ranks
    return rank_in * c + rank_out * rank_in * kh * kw + n * rank_out


def _decompose(weight: Tensor, kind: str, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Factors in the order of `formats.LowRankWeight`."""
    if weight.dim() == 2:
        u, v = truncated_svd(weight, *ranks)
        return v, u
    if kind == "tucker2":
        return tucker2(weight, *ranks)
    return tai(weight, *ranks) if kind == "tai" else svd_conv(weight, *ranks)


def _build(module: Any, factors: tuple[Tensor, ...], kind: str) -> nn.Module:
    bias = None if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        v, u = factors
        twin: nn.Module = LowRankLinear.from_factors(u, v, bias)
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
