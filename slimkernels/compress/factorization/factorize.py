"""Low-rank factorization of a model: Linear and Conv2d layers become two or three thin layers.

The arithmetic is in `decompositions` and `whitening`, the choice of ranks in `layer_ranks`; this module goes through
the model, carries the layers' arguments over and keeps the record that `factorization_report` returns.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.compress.factorization.decompositions import svd_conv, tai, truncated_svd, tucker2
from slimkernels.compress.factorization.layer_costs import Budget, factor_params
from slimkernels.compress.factorization.layer_ranks import FactorizableLayer, asked_ranks, ranks_within
from slimkernels.compress.factorization.ranks import check_energy, lost_shares, rank_by_energy
from slimkernels.compress.factorization.whitening import (
    match_batch_norms,
    output_moments,
    refit_last_factors,
    whitened_svd,
)
from slimkernels.compress.selection import SelectedLayer, select_layers
from slimkernels.compress.training.evaluation import device_of
from slimkernels.conversion.calls import capture
from slimkernels.conversion.graph import input_sets
from slimkernels.conversion.readers import weight_readers
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.formats import LOW_RANK_KINDS, LowRankWeight
from slimkernels.nn import (
    LowRankConv2d,
    LowRankLinear,
    guard_strided_pointwise_,
    resolved_padding,
    unsupported_conv_reason,
)
from slimkernels.nn.strided_pointwise import PixelsRead

Rank = int | Sequence[int]

__all__ = [
    "Budget",
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

    ``ranks`` is ``(rank,)``, or ``(rank_in, rank_out)`` for "tucker2"; ``relative_error`` is the Frobenius norm of
    the weight's change over that of the weight; parameters count the weight, not the bias. ``output_error`` is the same
    of the layer's outputs (without bias) on the calibration data, None where those did not count; ``batch_norm`` says
    that one was put behind the layer.
    """

    name: str
    kind: str | None
    ranks: tuple[int, ...]
    relative_error: float
    params_before: int
    params_after: int
    reason: str
    output_error: float | None = None
    batch_norm: bool = False


def factorize_(
    model: nn.Module,
    method: str = "svd",
    *,
    rank: int | str | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    multiple: int | None = None,
    batch_norm: bool = False,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Replaces Linear and Conv2d layers in place by `nn.LowRankLinear` and `nn.LowRankConv2d` with trainable factors.

    Linear layers and 1x1 convolutions are always split by the plain SVD. Stride, padding, dilation, bias, dtype,
    device, train mode and ``requires_grad`` carry over exactly. The factors are new Parameters: build the optimiser
    afterwards.

    A layer is left dense, with the reason in `factorization_report`, where the factors would hold no fewer
    parameters than the weight, where it is grouped, pads by other than zeros, is a sub-class, carries hooks or
    parametrizations, or where something else than its own call reads its weight (a tied embedding, torch's attention,
    a forward that uses ``layer.weight``; see `slimkernels.conversion.readers`). A layer given by its exact name is
    factorized even where it does not shrink; where it cannot be, the call raises.

    Ranks come from exactly one of ``rank``, ``energy`` and ``budget``. A rank that is named is taken as it is; one that
    is chosen is rounded up to what the kernels like, wherever that stays smaller than dense.

    Args:
        model: any module holding nn.Linear or nn.Conv2d below itself. Of a wrapper (DataParallel,
            DistributedDataParallel, AveragedModel, `torch.compile`) the model inside is factorized, by its own names.
        method: "svd" (kxk then 1x1), "tai" (kx1 then 1xk) or "tucker2" (1x1, kxk, 1x1).
        rank: one rank for all layers, capped for "tucker2" at the channel counts; or a dict from layer name or
            fnmatch pattern to a rank, ``(rank_in, rank_out)`` allowed for "tucker2", which then also says which
            layers are factorized; or "vbmf", see `ranks.vbmf_rank`.
        energy: the share of each weight's squared norm to keep, in (0, 1]; the rank is the smallest that does (for
            "tucker2" each of the two modes may lose half of the rest, which keeps at least this share).
        budget: what the whole model may cost at most: ``{"bytes": 2_000_000}``, ``{"parameters": 0.4}``,
            ``{"flops": 0.5}``, ``{"latency": 0.6}``, see `layer_costs.Budget`. Ranks are spread over the layers by
            energy kept per cost, see `ranks.rank_for_budget`; a layer may stay dense.
        layers: names or fnmatch patterns of the layers to factorize.
        exclude: names or fnmatch patterns of layers that stay as they are.
        multiple: chosen ranks are multiples of it; by default 8 on the CPU and 16 on a GPU. 1 does not round.
        batch_norm: puts a BatchNorm2d behind every factorized convolution that has none there yet, as SlimNets and Tai
            et al. do; the layer becomes a Sequential of ``low_rank`` and ``batch_norm``. It starts as the identity on
            the calibration data, or without them with mean 0 and variance 1.
        calibration: batches of images, or sequences that begin with them, such as a loader, which has to be iterable
            more than once. Layers split by the SVD then change their outputs on these data, rather than their weights,
            by as little as possible at their rank, and energy means that of their outputs; of "tai" and "tucker2" the
            last factor is fitted to the data (see `whitening`).
        calibration_batches: uses so many batches only.
        example_inputs: tensor, or tuple of arguments, whose sizes count for budgets of FLOPs and time. A run on them
            also shows which weights are read, where a model cannot be traced.

    Returns:
        What was passed as ``model``.

    Raises:
        ValueError: not exactly one of rank, energy and budget, one of them out of range, an unknown name (near matches
            are listed), a named layer that cannot be factorized, or calibration data that do not reach a layer. Nothing
            is changed then.
        TypeError: an argument of the wrong type.
    """
    given, model = model, unwrapped("factorize_", model)
    if method not in LOW_RANK_KINDS:
        raise ValueError(f"factorize_: expected method in {LOW_RANK_KINDS}, got {method!r}")
    if sum(way is not None for way in (rank, energy, budget)) != 1:
        raise ValueError(
            f"factorize_: expected one of rank, energy and budget, got rank={rank}, energy={energy}, budget={budget}"
        )
    if energy is not None:
        check_energy("factorize_", energy)
    if isinstance(rank, str) and rank != "vbmf":
        raise ValueError(f"factorize_: expected rank to be numbers or 'vbmf', got {rank!r}")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"factorize_: expected multiple to be a positive int, got {multiple!r}")
    allowed = None if budget is None else Budget.of(budget)
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
    todo: dict[str, FactorizableLayer] = {}
    keys = {layer.name: layer.key for layer in picked}
    readers = _weight_readers(model, example_inputs) if picked else {}
    for selected in picked:
        name, module, explicit = selected.name, selected.module, selected.explicit
        refusal = _refusal(selected, model, readers)
        if refusal is None:
            todo[name] = FactorizableLayer(name, module, _kind(module, method), explicit, asked_multiple=multiple)
            todo[name].check_finite()
            continue
        if explicit or module is model:
            raise ValueError(f"factorize_: layer {name!r}: {refusal}")
        records[name] = _kept(name, module, refusal)
    if calibration is not None:
        split = {name: layer.module for name, layer in todo.items() if layer.kind == "svd"}
        moments = output_moments("factorize_", model, split, calibration, calibration_batches) if split else {}
        for name, moment in moments.items():
            todo[name].moment = moment
    normed = _without_batch_norm(model, todo.values()) if batch_norm else set()

    chosen: dict[str, tuple[int, ...] | None] = {}
    if allowed is not None:
        extra = {name: _batch_norm_size(todo[name].module) for name in normed}
        chosen = ranks_within(model, list(todo.values()), allowed, example_inputs, _twin, extra)
    twins: dict[str, nn.Module] = {}
    for name, layer in todo.items():
        if allowed is not None:
            ranks = chosen[name]
        elif energy is not None:
            ranks = layer.by_energy(energy)
        elif rank == "vbmf":
            ranks = layer.by_vbmf()
        else:
            ranks = asked_ranks(layer, rank[keys[name] or name] if isinstance(rank, Mapping) else rank)
        records[name], twin = _factorize_layer(layer, method, ranks, name in normed)
        if twin is not None:
            twins[name] = twin
    if calibration is not None:
        chains = {
            name: (todo[name].module, _low_rank(twin)) for name, twin in twins.items() if records[name].kind != "svd"
        }
        errors = refit_last_factors("factorize_", model, chains, calibration, calibration_batches) if chains else {}
        for name, error in errors.items():
            change = _relative_error(todo[name].dense, chains[name][1].factors, todo[name].kind)
            records[name] = replace(records[name], relative_error=change, output_error=error)
    _replace(model, {id(todo[name].module): twin for name, twin in twins.items()})
    if calibration is not None and normed & set(twins):
        norms = {name: twins[name].batch_norm for name in twins if name in normed}
        match_batch_norms("factorize_", model, norms, calibration, calibration_batches)  # type: ignore[arg-type]
    guard_strided_pointwise_(model)
    in_order = {layer.name: records[layer.name] for layer in picked}
    object.__setattr__(model, _REPORT, {**getattr(model, _REPORT, {}), **in_order})
    return given


def factorization_report(model: nn.Module) -> tuple[LayerFactorization, ...]:
    """What `factorize_` did to each layer it looked at; empty where it was never called on this model."""
    return tuple(getattr(unwrapped("factorization_report", model), _REPORT, {}).values())


def _kind(module: nn.Module, method: str) -> str:
    return method if isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1 else "svd"


def _replace(model: nn.Module, twins: Mapping[int, nn.Module]) -> None:
    """Puts twins in the place of modules, wherever these are registered."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in twins:
                setattr(parent, child_name, twins[id(child)])


def _weight_readers(model: nn.Module, example_inputs: Any) -> dict[int, str]:
    """By the id of a module: why its weight is not its own alone, a module under several names being one."""
    seen = None
    if example_inputs is not None:
        device = device_of(model)
        sets = [
            (tuple(x.to(device) if isinstance(x, Tensor) else x for x in args), kwargs)
            for args, kwargs in input_sets(example_inputs)
        ]
        layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        seen = capture(model, sets, layers, op="factorize_").reads
    return {id(model.get_submodule(name)): why for name, why in weight_readers(model, seen=seen).items()}


def _kept(name: str, module: Any, reason: str) -> LayerFactorization:
    count = math.prod(module.weight.shape)
    return LayerFactorization(name, None, (), 0.0, count, count, reason)


def _refusal(layer: SelectedLayer, model: nn.Module, readers: Mapping[int, str]) -> str | None:
    """Why a layer cannot be replaced, or None. ``readers`` is `_weight_readers` of the model."""
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
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, PixelsRead)]
    if module._forward_hooks or before or module._backward_hooks or module._backward_pre_hooks:
        return "expected no hooks, got a layer that carries some, which would be lost"
    if id(module) in readers:
        return f"expected a weight that nothing else reads, but {readers[id(module)]}"
    return unsupported_conv_reason(module) if isinstance(module, nn.Conv2d) else None


def _factorize_layer(
    layer: FactorizableLayer, method: str, ranks: tuple[int, ...] | None, batch_norm: bool
) -> tuple[LayerFactorization, nn.Module | None]:
    module, kind, op = layer.module, layer.kind, f"factorize_: layer {layer.name!r}"
    weight = module.weight.detach()
    if ranks is None:
        return _kept(layer.name, module, "the budget has room for it as it is"), None
    if kind != "tucker2" and ranks[0] > layer.full_rank:
        if layer.explicit:
            raise ValueError(
                f"{op}: expected rank in [1, {layer.full_rank}] for a weight {tuple(weight.shape)}, got {ranks[0]}"
            )
        return _kept(layer.name, module, f"rank {ranks[0]} exceeds the full rank {layer.full_rank}"), None
    after = factor_params(layer.shape, kind, ranks)
    if after >= weight.numel() and not layer.explicit:
        reason = f"rank {ranks[::-1]} needs {after} parameters, the dense weight {weight.numel()}"
        return _kept(layer.name, module, reason), None

    factors = _decompose(layer, ranks)
    error = _relative_error(layer.dense, factors, kind)
    of_outputs = None if layer.moment is None else float(lost_shares(layer.spectra[0])[ranks[0]]) ** 0.5
    twin = _build(module, factors, kind)
    if batch_norm:
        twin = with_batch_norm(twin, module)
    reason = f"svd instead of {method}: one tap" if kind != method else ""
    record = LayerFactorization(
        layer.name, kind, ranks[::-1], error, weight.numel(), after, reason, of_outputs, batch_norm
    )
    return record, twin


def _relative_error(dense: Tensor, factors: Iterable[Tensor], kind: str) -> float:
    """Frobenius norm of what the factors change of a float64 weight, over that of the weight."""
    norm = float(torch.linalg.vector_norm(dense))
    product = LowRankWeight(kind, tuple(f.detach().double() for f in factors)).to_dense()
    return float(torch.linalg.vector_norm(dense - product)) / norm if norm > 0 else 0.0


def _low_rank(twin: Any) -> Any:
    """The low-rank layer of a twin, in front of its batch norm where it has one."""
    return twin.low_rank if isinstance(twin, nn.Sequential) else twin


def _decompose(layer: FactorizableLayer, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
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


def _twin(layer: FactorizableLayer, ranks: tuple[int, ...]) -> nn.Module:
    return _build(layer.module, _decompose(layer, ranks), layer.kind)


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


def _without_batch_norm(model: nn.Module, layers: Iterable[FactorizableLayer]) -> set[str]:
    """Convolutions that no BatchNorm2d follows directly; all of them where the model cannot be traced."""
    from slimkernels.conversion.graph import trace

    graph = trace(model)
    found = set()
    for layer in layers:
        if isinstance(layer.module, nn.Conv2d):
            follower = next(iter(graph.chain(layer.name)), None)
            if follower is None or not isinstance(model.get_submodule(follower), nn.BatchNorm2d):
                found.add(layer.name)
    return found


def _batch_norm_size(conv: nn.Conv2d) -> tuple[int, int]:
    """Parameters and bytes of a batch norm behind a convolution."""
    return 2 * conv.out_channels, 4 * conv.out_channels * conv.weight.element_size() + 8


def with_batch_norm(twin: nn.Module, conv: nn.Conv2d) -> nn.Sequential:
    """A low-rank convolution as ``low_rank`` with a fresh ``batch_norm`` behind it, in the mode of the dense one."""
    norm = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
    norm.requires_grad_(conv.weight.requires_grad)
    return nn.Sequential(OrderedDict(low_rank=twin, batch_norm=norm)).train(conv.training)
