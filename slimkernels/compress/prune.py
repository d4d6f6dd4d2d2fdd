"""Block pruning: whole blocks of a weight are zeroed by importance and stay zero through training.

The mask is a `formats.BlockMask` registered through `torch.nn.utils.parametrize`; the Parameter object stays the
same, so optimisers that already hold it keep working. Gradual pruning (Zhu & Gupta, arXiv 1710.01878) is a repeated
call of `prune_` with the sparsity of `cubic_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slimkernels.compress.selection import SelectedLayer, select_layers
from slimkernels.formats import BlockMask, block_grid, block_norms, block_shape_2d

Importance = Callable[[Tensor, tuple[int, int]], Tensor]

MIN_LINEAR_FEATURES = 64  # a default call leaves smaller Linears dense: they hold few weights and few whole blocks


@dataclass
class _Layer:
    """A layer about to be pruned: its scores and the mask that shrinks block by block."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    scores: Tensor  # (block_rows, block_cols), float64, cpu
    mask: Tensor  # bool, same shape, cpu
    sparsity: float


def prune_(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.875,
    block_shape: Sequence[int] = (16, 1),
    *,
    scope: str = "layer",
    importance: str | Importance = "magnitude",
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
) -> nn.Module:
    """Zeroes the least important blocks of the model's weights in place and registers masks that keep them zero.

    Of a layer of n blocks, ``floor(sparsity * n)`` are masked, so the block sparsity reached never exceeds the one
    asked for, and at least one block always stays. Equal scores are pruned in row-major block order, and ragged edge
    blocks count as blocks. Calling again prunes further from the current weights: masked blocks stay masked, and a
    lower sparsity than before changes nothing.

    By default every Conv2d with groups=1 except the first, and every Linear with at least 64 input and output
    features except the last layer of the model (the classifier) is pruned. An exact name in ``layers`` or
    ``sparsity`` overrides these defaults; a pattern overrides all but ``skip_first``.

    Args:
        model: any module holding nn.Conv2d or nn.Linear, sub-classes included.
        sparsity: share of blocks to mask, in [0, 1); or a dict from layer name or fnmatch pattern to such a share,
            which then also says which layers are pruned (a name beats a pattern, an earlier pattern a later one).
        block_shape: ``(block_out, block_in)``; blocks lie within one filter tap (`formats`).
        scope: "layer" ranks the blocks of each layer against each other. "global" ranks the blocks of all selected
            layers together, each block norm normalised to the block's size (L2 divided by the square root of its
            number of elements, L1 by the number), so that ragged blocks compete fairly; scores of a callable are
            ranked as they are.
        importance: "magnitude" (L2 norm), "magnitude_l1", or a callable ``(weight, block_shape) -> scores`` of shape
            ``formats.block_grid(weight.shape, block_shape)``, higher is kept.
        layers: exact names or fnmatch patterns of the layers to prune.
        exclude: names or patterns left alone, whatever else selects them.
        skip_first: leaves the model's first Conv2d dense.

    Returns:
        The model itself.

    Raises:
        ValueError: sparsity outside [0, 1), a name that matches no layer (near matches are listed), non-finite
            scores, a named layer with groups != 1, a weight that is shared, already parametrized by something else
            or masked with another block shape, no layer left to prune. Nothing is changed then.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch
        >>> from slimkernels.compress.prune import masks, prune_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3))
        >>> _ = prune_(net, sparsity=0.75, block_shape=(16, 1))
        >>> int(masks(net)["1"].mask.sum()), masks(net)["1"].mask.numel()
        (288, 1152)
    """
    block = block_shape_2d(block_shape)
    if scope not in ("layer", "global"):
        raise ValueError(f"prune_: expected scope 'layer' or 'global', got {scope!r}")
    if not callable(importance) and importance not in ("magnitude", "magnitude_l1"):
        raise ValueError(
            "prune_: expected importance 'magnitude', 'magnitude_l1' or a callable(weight, block_shape), "
            f"got {importance!r}"
        )
    prunable = [
        _prepare(layer, share, block, scope, importance)
        for layer, share in _selected(model, sparsity, layers, exclude, skip_first, scope)
    ]
    if not prunable:
        raise ValueError("prune_: expected at least one Conv2d or Linear to prune, got none after the exclusions")
    _check_shared(model, prunable)
    if scope == "global":
        _prune_global(prunable)
    else:
        for layer in prunable:
            _prune_one(layer)
    for layer in prunable:
        _install(layer, block)
    return model


def masks(model: nn.Module) -> dict[str, BlockMask]:
    """The `formats.BlockMask` of every masked layer, by layer name."""
    found: dict[str, BlockMask] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, BlockMask):
                    found[name] = parametrization
    return found


def finalize_(model: nn.Module) -> nn.Module:
    """Writes exact zeros into the masked weights and removes the masks; Parameters keep their identity and storage.

    Returns:
        The model itself; without masks it is unchanged.

    Raises:
        ValueError: a masked weight carries another parametrization as well. Nothing is changed then.
    """
    found = masks(model)
    for name in found:
        _lone_mask("finalize_", name, model.get_submodule(name))
    for name, mask in found.items():
        module: Any = model.get_submodule(name)
        _zero_masked(module.parametrizations.weight.original, mask)
        original = module.parametrizations.weight.original
        # Not torch's remove_parametrizations: it deletes the property from a class that copies of the module share.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        module._parameters["weight"] = original
    return model


def cubic_schedule(step: int, *, final: float, begin: int = 0, end: int, initial: float = 0.0) -> float:
    """Sparsity at ``step`` by Zhu & Gupta (arXiv 1710.01878, eq. 1): fast at first, slow as few weights are left.

    ``final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3`` between ``begin`` and ``end``;
    ``initial`` before, ``final`` after.

    Raises:
        ValueError: end <= begin, or a sparsity outside [0, 1).
    """
    return final + (initial - final) * (1.0 - _progress("cubic_schedule", step, final, begin, end, initial)) ** 3


def linear_schedule(step: int, *, final: float, begin: int = 0, end: int, initial: float = 0.0) -> float:
    """Sparsity at ``step`` on the straight line from ``initial`` at ``begin`` to ``final`` at ``end``, constant
    outside.

    Raises:
        ValueError: end <= begin, or a sparsity outside [0, 1).
    """
    return final + (initial - final) * (1.0 - _progress("linear_schedule", step, final, begin, end, initial))


def _progress(op: str, step: int, final: float, begin: int, end: int, initial: float) -> float:
    _check_sparsity(op, "final", final)
    _check_sparsity(op, "initial", initial)
    if end <= begin:
        raise ValueError(f"{op}: expected end > begin, got begin={begin}, end={end}")
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def _check_sparsity(op: str, argument: str, sparsity: float) -> float:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{op}: expected {argument} to be a number in [0, 1), got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{op}: expected {argument} in [0, 1), got {sparsity}")
    return float(sparsity)


def _selected(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    layers: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    skip_first: bool,
    scope: str,
) -> list[tuple[SelectedLayer, float]]:
    """The layers to prune and the sparsity of each."""
    types = (nn.Conv2d, nn.Linear)
    if isinstance(sparsity, Mapping):
        if layers is not None:
            raise ValueError(
                "prune_: expected either layers or a sparsity dict, got both; the dict's keys are the layers"
            )
        if scope == "global":
            raise ValueError("prune_: expected one sparsity for scope='global', got a dict")
        shares = {key: _check_sparsity("prune_", f"sparsity[{key!r}]", value) for key, value in sparsity.items()}
        picked = select_layers("prune_", model, types, shares, exclude, "sparsity")
    else:
        share = _check_sparsity("prune_", "sparsity", sparsity)
        picked = select_layers("prune_", model, types, layers, exclude)
        shares = {key: share for layer in picked if (key := layer.key) is not None}
    by_default = layers is None and not isinstance(sparsity, Mapping)

    every = [module for module in model.modules() if isinstance(module, types)]
    first = next((module for module in every if isinstance(module, nn.Conv2d)), None)
    out = []
    for layer in picked:
        module = layer.module
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            if layer.explicit:
                raise ValueError(f"prune_: expected groups=1 in layer {layer.name!r}, got groups={module.groups}")
            continue
        if not layer.explicit:
            if skip_first and module is first:
                continue
            if by_default and isinstance(module, nn.Linear):
                narrow = min(module.in_features, module.out_features) < MIN_LINEAR_FEATURES
                if narrow or (module is every[-1] and len(every) > 1):
                    continue
        out.append((layer, share if layer.key is None else shares[layer.key]))
    return out


def _prepare(
    layer: SelectedLayer, sparsity: float, block: tuple[int, int], scope: str, importance: str | Importance
) -> _Layer:
    """Checks a layer and scores its blocks."""
    module: Any = layer.module
    name = layer.name
    existing = _lone_mask("prune_", name, module)
    if existing is not None:
        if existing.block_shape != block:
            raise ValueError(
                f"prune_: expected block_shape {existing.block_shape} of the mask on layer {name!r}, got {block}; "
                "finalize_ the model first"
            )
        weight = module.parametrizations.weight.original
    else:
        weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or is_lazy(weight):
        raise ValueError(
            f"prune_: expected the weight of layer {name!r} to be a Parameter, got one that is "
            "computed (torch.nn.utils.prune?) or not initialised yet; remove that first or exclude the layer"
        )
    grid = block_grid(weight.shape, block)
    dense = (module.weight if existing is not None else weight).detach()
    if callable(importance):
        scores = importance(dense, block)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != grid:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"prune_: expected importance scores of shape {grid} for layer {name!r}, got {got}")
    else:
        p = 2.0 if importance == "magnitude" else 1.0
        scores = block_norms(dense.float() if dense.dtype.itemsize < 4 else dense, block, p)
        if scope == "global":
            sizes = block_norms(torch.ones(weight.shape, dtype=scores.dtype, device=scores.device), block, 1.0)
            scores = scores / sizes ** (1.0 / p)
    scores = scores.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"prune_: expected finite importance in layer {name!r}, got NaN or infinity")
    mask = torch.ones(grid, dtype=torch.bool) if existing is None else existing.mask.cpu().clone()
    return _Layer(name, module, weight, scores, mask, sparsity)


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
                f"prune_: expected the weight of layer {layer.name!r} to be its own, got one shared by {shared}; "
                "exclude it"
            )


def _target(sparsity: float, blocks: int) -> int:
    """floor(sparsity * blocks), safe against 0.29 * 100 = 28.999999999999996."""
    return math.floor(sparsity * blocks + 1e-9 * max(blocks, 1))


def _prune_one(layer: _Layer) -> None:
    mask, blocks = layer.mask.view(-1), layer.mask.numel()
    alive = mask.nonzero().squeeze(1)
    drop = min(_target(layer.sparsity, blocks) - (blocks - alive.numel()), alive.numel() - 1)
    if drop > 0:
        order = torch.sort(layer.scores.reshape(-1)[alive], stable=True).indices
        mask[alive[order[:drop]]] = False


def _prune_global(layers: list[_Layer]) -> None:
    """One ranking over all layers, without the best living block of each, which stays whatever its rank."""
    flat = torch.cat([layer.mask.reshape(-1) for layer in layers])
    scores = torch.cat([layer.scores.reshape(-1) for layer in layers])
    candidate = flat.clone()
    start = 0
    for layer in layers:
        living = layer.mask.reshape(-1)
        best = layer.scores.reshape(-1).masked_fill(~living, -math.inf).argmax() if bool(living.any()) else None
        if best is not None:
            candidate[start + int(best)] = False
        start += living.numel()
    rest = candidate.nonzero().squeeze(1)
    drop = min(_target(layers[0].sparsity, flat.numel()) - int((~flat).sum()), rest.numel())
    if drop > 0:
        order = torch.sort(scores[rest], stable=True).indices
        flat[rest[order[:drop]]] = False
    for layer, mask in zip(layers, flat.split([layer.mask.numel() for layer in layers]), strict=True):
        layer.mask = mask.view_as(layer.mask)


def _install(layer: _Layer, block: tuple[int, int]) -> None:
    existing = _lone_mask("prune_", layer.name, layer.module)
    if existing is None:
        existing = BlockMask(layer.mask.to(layer.weight.device), layer.weight.shape, block)
        parametrize.register_parametrization(layer.module, "weight", existing)
    else:
        existing.mask.copy_(layer.mask)
    _zero_masked(layer.weight, existing)


def _zero_masked(weight: nn.Parameter, mask: BlockMask) -> None:
    """Zeroes what the mask hides, which momentum or an old checkpoint may have filled."""
    with torch.no_grad():
        weight.copy_(mask(weight))


def _lone_mask(op: str, name: str, module: Any) -> BlockMask | None:
    """The BlockMask on the weight of a layer, None where it is not parametrized at all."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = list(module.parametrizations.weight)
    if len(chain) == 1 and isinstance(chain[0], BlockMask):
        return chain[0]
    raise ValueError(
        f"{op}: expected no parametrization but a BlockMask on the weight of layer {name!r}, "
        f"got {[type(p).__name__ for p in chain]}; remove the others first"
    )
