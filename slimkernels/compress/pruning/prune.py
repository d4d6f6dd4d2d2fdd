"""Pruning: single weights, blocks or whole filters of a weight are zeroed by importance and stay zero in training.

The mask is a `formats.BlockMask` registered through `torch.nn.utils.parametrize`; the Parameter object stays the
same, so optimisers that already hold it keep working. Pruning while a model trains is a repeated call of `prune_`
with the sparsity of a schedule: `slimkernels.compress.pruning.gradual`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.compress.fake_quantization import fake_quantized
from slimkernels.compress.pruning.granularity import Units, check_granularity, zero_masked_
from slimkernels.compress.pruning.importance import Importance, check_importance, unit_scores
from slimkernels.compress.pruning.schedules import check_sparsity, cubic_schedule, linear_schedule
from slimkernels.compress.selection import (
    PRUNABLE,
    SelectedLayer,
    as_patterns,
    block_shapes_of,
    lone_mask,
    match_layers,
    prunable_layers,
    readable_weight,
)
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.formats import BlockMask

__all__ = ["apply_masks_", "cubic_schedule", "finalize_", "linear_schedule", "mask_sparsity", "masks", "prune_"]


@dataclass
class _Layer:
    """A layer about to be pruned: the scores of its units (-inf where masked already), and which of them live."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    units: Units
    scores: Tensor
    alive: Tensor
    sparsity: float


def prune_(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.875,
    block_shape: Sequence[int] | Mapping[str, Sequence[int]] = (16, 1),
    *,
    granularity: str = "block",
    importance: str | Importance | Mapping[str, Tensor] = "magnitude",
    scope: str = "layer",
    costs: Mapping[str, float] | None = None,
    floor: float = 0.0,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
) -> nn.Module:
    """Zeroes the least important units of the model's weights in place and registers masks that keep them zero.

    A unit is a block, a single weight, a block at all taps of a filter, or a filter, as ``granularity`` says. Of a
    layer of n units, ``floor(sparsity * n)`` are masked, so the sparsity reached never exceeds the one asked for, and
    at least one unit always stays. Equal scores are pruned in row-major order, and ragged edge blocks count as
    blocks. Calling again prunes further from the current weights: masked units stay masked, and a lower sparsity
    than before changes nothing.

    By default every Conv2d with groups=1 except the first, and every Linear with at least 64 input and output
    features except the last layer of the model (the classifier) is pruned. Layers whose zeros `slimkernels.convert`
    could not use stay dense, and a warning says why: sub-classes with a forward of their own, padding by other than
    zeros, weights that something else reads too (attention projections, tied embeddings). An exact name in ``layers``
    or ``sparsity`` overrides these defaults; a pattern overrides those on the sizes of a Linear.

    Args:
        model: any module holding nn.Conv2d or nn.Linear, sub-classes included. Of a wrapper (DataParallel,
            DistributedDataParallel, AveragedModel, `torch.compile`) the model inside is pruned, by its own names.
        sparsity: share of units to mask, in [0, 1); or a dict from layer name or fnmatch pattern to such a share,
            which then also says which layers are pruned (a name beats a pattern, an earlier pattern a later one).
        block_shape: ``(block_out, block_in)``; blocks lie within one filter tap (`formats`). Or a dict of them by
            layer name or pattern, with an entry for every pruned layer. A side longer than a layer has channels is cut
            to the next power of two that covers them.
        granularity: "block"; "element" (single weights; ``block_shape`` is not used); "block_shared_taps" (a block
            position lives or dies at all taps together); "channel" (whole filters, or rows of a Linear;
            ``block_shape`` is not used, the mask's blocks are ``(1, C_in)``; biases and batch norm stay, see
            `slimkernels.compress.pruning.shrink.shrink_`).
        importance: "magnitude" (L2 norm), "magnitude_l1"; "taylor" or "movement" from the gradients that the weights
            hold now (`slimkernels.compress.pruning.importance`); a callable ``(weight, block_shape) -> scores`` of
            shape ``formats.block_grid(weight.shape, block_shape)``, added up where a unit is several blocks; or a dict
            from layer name to scores, one per unit. Higher is kept.
        scope: "layer" ranks the units of each layer against each other. "global" ranks the units of all selected
            layers together, each magnitude normalised to the unit's size (L2 divided by the square root of its number
            of weights, L1 by the number), so that ragged blocks compete fairly; other scores are ranked as they are.
        costs: of scope "global", what one unit of each pruned layer costs, such as seconds from
            `slimkernels.unit_costs`: units are ranked by importance per cost. The importance of "magnitude" is then the
            sum of squares, which adds up over units.
        floor: of scope "global", share of the units of each layer that stay whatever their rank, in [0, 1).
        layers: exact names or fnmatch patterns of the layers to prune.
        exclude: names or patterns left alone, whatever else selects them.
        skip_first: leaves the model's first Conv2d dense.

    Returns:
        What was passed as ``model``.

    Raises:
        ValueError: sparsity outside [0, 1), a name that matches no layer (near matches are listed), non-finite
            scores, a named layer with groups != 1, a weight that is shared, already parametrized by something else
            or masked with another block shape, no gradient where one is needed, no layer left to prune by these rules.
            Nothing is changed then.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch
        >>> from slimkernels.compress.pruning.prune import masks, prune_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3))
        >>> _ = prune_(net, sparsity=0.75, block_shape=(16, 1))
        >>> int(masks(net)["1"].mask.sum()), masks(net)["1"].mask.numel()
        (288, 1152)
    """
    given, model = model, unwrapped("prune_", model)
    if scope not in ("layer", "global"):
        raise ValueError(f"prune_: expected scope 'layer' or 'global', got {scope!r}")
    check_granularity("prune_", granularity)
    check_importance("prune_", importance)
    if scope == "layer" and (costs is not None or floor != 0.0):
        raise ValueError("prune_: expected costs and floor with scope='global' alone, got scope='layer'")
    check_sparsity("prune_", "floor", floor)
    selected = _selected(model, sparsity, layers, exclude, skip_first, scope)
    blocks = block_shapes_of("prune_", model, [layer for layer, _ in selected], block_shape)
    if isinstance(importance, Mapping):
        match_layers(
            "prune_",
            "importance",
            as_patterns("prune_", "importance", importance),
            dict(model.named_modules()),
            PRUNABLE,
        )
    prunable = [
        _prepare(layer, share, blocks[layer.name], granularity, importance, scope == "global" and costs is None)
        for layer, share in selected
    ]
    if not prunable:  # a warning said why
        return given
    _check_finite(prunable)
    _check_shared(model, prunable)
    if scope == "global":
        if costs is not None:
            _per_cost(prunable, costs, importance)
        _prune_global(prunable, floor)
    else:
        for layer in prunable:
            layer.alive &= _kept(
                layer.scores, min(_target(layer.sparsity, layer.alive.numel()), layer.alive.numel() - 1)
            )
    for layer in prunable:
        _install(layer)
    return given


def masks(model: nn.Module) -> dict[str, BlockMask]:
    """The `formats.BlockMask` of every masked layer, by layer name."""
    found: dict[str, BlockMask] = {}
    for name, module in unwrapped("masks", model).named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, BlockMask):
                    found[name] = parametrization
    return found


def mask_sparsity(model: nn.Module) -> float:
    """Share of the weights of all masked layers that their masks hide; 0 for a model without masks."""
    hidden, total = 0.0, 0
    for mask in masks(model).values():
        weights = math.prod(mask.weight_shape)
        units = Units(mask.weight_shape, mask.block_shape, "block")
        hidden += float(units.sizes(mask.mask.device)[~mask.mask].sum(dtype=torch.float64))
        total += weights
    return hidden / total if total else 0.0


def apply_masks_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Writes exact zeros into the Parameters under the masks, which momentum or an optimiser with state of its own
    moves although their gradient is zero.

    The masked weight that the model computes with is zero without this; the Parameter underneath is what a moving
    average, a norm over parameters or another tool sees.

    Args:
        optimizer: its state of these weights (every tensor of their shape: momentum, moments) is zeroed as well.

    Returns:
        The model itself.
    """
    inside = unwrapped("apply_masks_", model)
    for name, mask in masks(inside).items():
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        weight: Any = inside.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr]
        tensors = [weight]
        if optimizer is not None:
            state = optimizer.state.get(weight, {})
            tensors += [t for t in state.values() if isinstance(t, Tensor) and t.shape == weight.shape]
        for tensor in tensors:
            zero_masked_(tensor, mask, finite=True)
    return model


def finalize_(model: nn.Module) -> nn.Module:
    """Writes exact zeros into the masked weights and removes the masks; Parameters keep identity, storage and order.

    Weights that `QuantizationAware` rounds become the rounded ones, and what these layers add to their outputs, biases
    or the shifts of batch norms, is rounded to 16 bits.

    Returns:
        The model itself; without masks and rounding it is unchanged.

    Raises:
        ValueError: a masked weight carries another parametrization as well. Nothing is changed then.
    """
    inside = unwrapped("finalize_", model)
    found, rounded = masks(inside), fake_quantized(inside)
    for name in {**found, **rounded}:
        lone_mask("finalize_", name, inside.get_submodule(name))
    for name in {**found, **rounded}:
        module: Any = inside.get_submodule(name)
        original = module.parametrizations.weight.original
        if name in found:
            zero_masked_(original, found[name])
        if name in rounded:
            with torch.no_grad():
                original.copy_(rounded[name](original))
            rounded[name].round_shift_(getattr(module, "bias", None))
        # Not torch's remove_parametrizations: it deletes the property from a class that copies of the module share.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        # In front of the others, where every layer that is pruned has it: parameters are in the order they had.
        others = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update(weight=original, **others)
    return model


def _selected(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    layers: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    skip_first: bool,
    scope: str,
) -> list[tuple[SelectedLayer, float]]:
    """The layers to prune and the sparsity of each."""
    if isinstance(sparsity, Mapping):
        if layers is not None:
            raise ValueError(
                "prune_: expected either layers or a sparsity dict, got both; the dict's keys are the layers"
            )
        if scope == "global":
            raise ValueError("prune_: expected one sparsity for scope='global', got a dict")
        shares = {key: check_sparsity("prune_", f"sparsity[{key!r}]", value) for key, value in sparsity.items()}
        picked = prunable_layers("prune_", model, shares, exclude, skip_first, "sparsity")
        return [(layer, shares[layer.key]) for layer in picked if layer.key is not None]
    share = check_sparsity("prune_", "sparsity", sparsity)
    return [(layer, share) for layer in prunable_layers("prune_", model, layers, exclude, skip_first)]


def _prepare(
    layer: SelectedLayer,
    sparsity: float,
    block: tuple[int, int],
    granularity: str,
    importance: str | Importance | Mapping[str, Tensor],
    per_weight: bool,
) -> _Layer:
    """Checks a layer and scores its units."""
    module: Any = layer.module
    weight = readable_weight("prune_", layer.name, module)
    existing = lone_mask("prune_", layer.name, module)
    units = Units.of(weight.shape, block, granularity)
    if existing is not None and existing.block_shape != units.block_shape:
        raise ValueError(
            f"prune_: expected block_shape {existing.block_shape} of the mask on layer {layer.name!r}, got "
            f"{units.block_shape}; finalize_ the model first"
        )
    # Masked blocks rank last whatever their score, so the mask is applied only where it can change another score.
    plain = existing is None or (isinstance(importance, str) and units.shape == units.grid)
    with torch.no_grad():
        values = weight if plain else module.weight
        scores = unit_scores("prune_", layer.name, values, weight.grad, units, importance, per_weight=per_weight)
        if existing is None:
            alive = torch.ones(units.shape, dtype=torch.bool, device=weight.device)
        else:
            alive = units.from_blocks(existing.mask).to(weight.device, copy=True)
    return _Layer(layer.name, module, weight, units, scores, alive, sparsity)


def _check_finite(layers: list[_Layer]) -> None:
    """Refuses NaN and infinite scores, and turns those of masked units into -inf: the lowest rank of all."""
    flags = [torch.isfinite(layer.scores).all() for layer in layers]
    for layer, finite in zip(layers, flags, strict=True):
        if not bool(finite):
            raise ValueError(f"prune_: expected finite importance in layer {layer.name!r}, got NaN or infinity")
    for layer in layers:
        layer.scores = layer.scores.masked_fill(~layer.alive, -math.inf)


def _check_shared(model: nn.Module, layers: list[_Layer]) -> None:
    """Refuses a weight that another module uses as well: its zeros would appear there, unmasked."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        shared = owners.get(id(layer.weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"prune_: expected the weight of layer {layer.name!r} to be its own, got one shared by {shared}: "
                f"zeros would appear in both; leave it out with exclude=[{layer.name!r}]"
            )


def _target(sparsity: float, units: int) -> int:
    """floor(sparsity * units), safe against 0.29 * 100 = 28.999999999999996."""
    return math.floor(sparsity * units + 1e-9 * max(units, 1))


def _kept(scores: Tensor, count: int) -> Tensor:
    """All but the ``count`` lowest scores, equal ones in row-major order: bool of the same shape.

    A selection, not a sort: of 2.4 million scores the k-th smallest is found 11 times as fast as they are sorted. The
    host waits for nothing.
    """
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(count).values
    below, tied = flat < threshold, flat == threshold
    drop = below | (tied & (tied.cumsum(0) <= count - below.sum()))
    return ~drop.view_as(scores)


def _per_cost(layers: list[_Layer], costs: Mapping[str, float], importance: Any) -> None:
    """Turns the scores of units into importance per cost."""
    for layer in layers:
        cost = costs.get(layer.name, 0.0)
        if not 0.0 < cost < math.inf:
            raise ValueError(f"prune_: expected a positive cost of every layer, got {cost} of {layer.name!r}")
        alive = layer.scores.double()
        energy = alive.square() if importance == "magnitude" else alive
        layer.scores = (energy / cost).masked_fill(~layer.alive, -math.inf)


def _prune_global(layers: list[_Layer], floor: float) -> None:
    """One ranking over all layers, without the best units of each, at least one, which stay whatever their rank."""
    device = layers[0].scores.device
    flat = []
    for layer in layers:
        scores = layer.scores.reshape(-1).to(device, copy=True)
        count = _kept_at_least(layer, floor)
        scores[scores.argmax() if count == 1 else scores.argsort(descending=True, stable=True)[:count]] = math.inf
        flat.append(scores)
    sizes = [scores.numel() for scores in flat]
    dtype = max((scores.dtype for scores in flat), key=lambda d: d.itemsize)
    ranked = torch.cat([scores.to(dtype) for scores in flat])
    kept = sum(_kept_at_least(layer, floor) for layer in layers)
    count = min(_target(layers[0].sparsity, ranked.numel()), ranked.numel() - kept)
    for layer, kept in zip(layers, _kept(ranked, count).split(sizes), strict=True):
        layer.alive &= kept.view_as(layer.alive).to(layer.alive.device)


def _kept_at_least(layer: _Layer, floor: float) -> int:
    return max(1, math.ceil(floor * layer.scores.numel() - 1e-9))


def _install(layer: _Layer) -> None:
    mask = layer.units.to_blocks(layer.alive)
    existing = lone_mask("prune_", layer.name, layer.module)
    if existing is None:
        existing = BlockMask(mask, layer.weight.shape, layer.units.block_shape)
        parametrize.register_parametrization(layer.module, "weight", existing)
        _say_what_pickles(layer.module)
    else:
        existing.mask &= mask
    zero_masked_(layer.weight, existing)


def _say_what_pickles(module: nn.Module) -> None:
    """Torch refuses to pickle a parametrized module; its class, which is the module's own, then says the way out."""

    def refuse(self: nn.Module) -> NoReturn:
        raise RuntimeError(
            "torch.save: expected a model without masks, got a layer masked by prune_, which torch does not pickle; "
            "call slimkernels.finalize_(model) to bake the zeros in, or save model.state_dict()"
        )

    # For mypy: the class is the one that parametrization made for this module alone.
    type(module).__getstate__ = refuse  # type: ignore[method-assign]
