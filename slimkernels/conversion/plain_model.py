"""`to_dense`: the way back from a converted model to one of torch's own layers alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.conversion.graph import copy_model, replace_module
from slimkernels.conversion.hub import unguard_publishing
from slimkernels.conversion.layers import DROP_IN_LAYERS, LOW_RANK_LAYERS, SPARSE_LAYERS
from slimkernels.conversion.plan import ModelPlan
from slimkernels.conversion.units import GUARD_ATTRIBUTE, PLAN_ATTRIBUTE
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.formats import BlockMask
from slimkernels.kernels.problems import factor_geometry
from slimkernels.nn import LowRankConv2d
from slimkernels.nn.chained import unchain_sequentials_
from slimkernels.nn.contiguous_output import keep_contiguous_


@torch.inference_mode(False)  # as `convert`
def to_dense(model: nn.Module, *, merge_low_rank: bool = False) -> nn.Module:
    """A copy of a converted model made of torch's own layers alone; it runs wherever a plain model runs.

    Block-sparse layers become nn.Conv2d and nn.Linear with zeros, low-rank layers the thin layers that they stand for,
    and what was fused into a layer returns to its own place: ReLUs, max-pools, and the second of two thin layers. Where
    there is no such place (a module of `slimkernels.nn` that was there before `convert`, three factors) the layer
    becomes an nn.Sequential. Batch norm stays inside the layer before it, with nn.Identity in its place.

    A model that was converted with ``training=True`` comes back with masks on its sparse layers, as `prune_` leaves
    them; `finalize_` makes them plain.

    Args:
        model: from `convert` or `load`, or any model with modules of `slimkernels.nn` inside; it stays untouched. Of a
            wrapper (DataParallel, AveragedModel, `torch.compile`) the model inside is taken.
        merge_low_rank: multiply the factors of every low-rank layer into one dense layer.

    Returns:
        A model of the same class in the same mode, whose outputs differ by rounding alone.

    Raises:
        TypeError: not a module, or one that cannot be copied.
    """
    model = unwrapped("to_dense", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense: expected an nn.Module, got {type(model).__name__}")
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    plain = copy_model(model)
    for name in (PLAN_ATTRIBUTE, GUARD_ATTRIBUTE):
        plain.__dict__.pop(name, None)
    unguard_publishing(plain)
    unchain_sequentials_(plain)
    names: dict[int, list[str]] = {}
    modules = dict(plain.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, DROP_IN_LAYERS):
            names.setdefault(id(module), []).append(name)
    masked = isinstance(plan, ModelPlan) and plan.training
    for places in names.values():
        module = modules[places[0]]
        layers = _layers(module, merge_low_rank, masked)
        after = _epilogue(module)
        free = _free_places(plan, places, modules)
        if free.factor is not None and len(layers) == 2:
            replace_module(plain, free.factor, layers.pop())
        if len(free.epilogue) == len(after):
            for name, layer in zip(free.epilogue, after, strict=True):
                replace_module(plain, name, layer.train(module.training))
            after = []
        new = layers[0] if len(layers) + len(after) == 1 else nn.Sequential(*layers, *after)
        if places == [""]:
            return new.train(module.training)
        for name in places:
            replace_module(plain, name, new.train(module.training))
    return keep_contiguous_(plain, plan.contiguous_outputs if isinstance(plan, ModelPlan) else ())


class _Free(NamedTuple):
    """The places whose modules went into a layer: its second factor, and its ReLU and max-pool in this order."""

    factor: str | None = None
    epilogue: tuple[str, ...] = ()


def _free_places(plan: Any, places: list[str], modules: dict[str, nn.Module]) -> _Free:
    if not isinstance(plan, ModelPlan) or len(places) != 1:
        return _Free()
    taken = [layer for layer in plan.layers if layer.into == places[0]]
    if any(type(modules.get(layer.name)) is not nn.Identity for layer in taken):
        return _Free()
    fused = {layer.type: layer.name for layer in taken if layer.action == "fuse"}
    # Of two factors behind the first, the plan does not say which one runs first.
    factors = [layer.name for layer in taken if layer.action == "fold" and layer.type != "BatchNorm2d"]
    return _Free(
        factors[0] if len(factors) == 1 else None,
        tuple(fused[kind] for kind in ("ReLU", "MaxPool2d") if kind in fused),
    )


def _epilogue(module: Any) -> list[nn.Module]:
    """ReLU and max-pool that run inside the module, as modules of their own."""
    count = {"none": 0, "relu": 1, "relu_maxpool2": 2}[module.epilogue]
    return [nn.ReLU(), nn.MaxPool2d(2)][:count]


def _layers(module: Any, merge_low_rank: bool, masked: bool) -> list[nn.Module]:
    """The dense layers that a drop-in module stands for, its epilogue left out."""
    if isinstance(module, LOW_RANK_LAYERS) and not merge_low_rank:
        return _factors(module)
    layer = module.to_dense()
    wants = {"weight": any(p.requires_grad for n, p in module.named_parameters() if n != "bias")}
    wants["bias"] = module.bias is not None and module.bias.requires_grad
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(wants[name])
    if masked and isinstance(module, SPARSE_LAYERS):
        weight = module.weight_bsr()
        parametrize.register_parametrization(
            layer, "weight", BlockMask(weight.mask(), tuple(module.weight_shape), module.block_shape)
        )
    return [layer]


def _factors(module: Any) -> list[nn.Module]:
    if isinstance(module, LowRankConv2d):
        tensors: list[Tensor] = list(module.factors)
        geometries: Iterable[Any] = factor_geometry(
            module.kind, len(tensors), module.stride, module.padding, module.dilation
        )
    else:
        tensors, geometries = [module.V, module.U], itertools.repeat(None)
    layers = []
    for i, (factor, geometry) in enumerate(zip(tensors, geometries)):
        bias = module.bias if i == len(tensors) - 1 else None
        options: Any = {"bias": bias is not None, "device": factor.device, "dtype": factor.dtype}
        if geometry is None:
            layer: Any = nn.Linear(factor.shape[1], factor.shape[0], **options)
        else:
            kernel_size: Any = tuple(factor.shape[2:])
            layer = nn.Conv2d(factor.shape[1], factor.shape[0], kernel_size, *geometry, **options)
        layer.weight = nn.Parameter(factor.detach().clone(), factor.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        layers.append(layer)
    return layers
