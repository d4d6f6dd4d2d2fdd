"""How much a unit of a weight matters: magnitude, first-order Taylor, movement, or the caller's own score.

With ``w`` a unit's weights and ``g`` the loss gradient by them:

- magnitude: ``sqrt(sum w^2)``; magnitude_l1: ``sum |w|``.
- taylor: ``(sum g w)^2``, averaged over steps: the squared first-order change of the loss when the unit is removed
  (Molchanov et al., arXiv 1906.10771, eq. 8 summed over the group before squaring).
- movement: ``-sum g w`` added up over steps: positive where training moves weights away from zero (Sanh et al.,
  arXiv 2005.07683, section 4). Their masked weights keep training; ours stay masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.pruning.granularity import Units
from slimkernels.compress.selection import block_shapes_of, prunable_layers, readable_weight
from slimkernels.compress.training.evaluation import device_of, mode_of
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.nn.strided_pointwise import strided_pointwise_guarded

Importance = Callable[[Tensor, tuple[int, int]], Tensor]
Loss = Callable[[Any, Tensor], Tensor]

GRADIENT_IMPORTANCES = ("taylor", "movement")
IMPORTANCES = ("magnitude", "magnitude_l1", *GRADIENT_IMPORTANCES)


def check_importance(op: str, importance: Any) -> None:
    """Raises ValueError unless ``importance`` is a known name, a callable or a dict of scores."""
    if callable(importance) or isinstance(importance, Mapping):
        return
    if importance not in IMPORTANCES:
        raise ValueError(
            f"{op}: expected importance {', '.join(map(repr, IMPORTANCES))}, a callable(weight, block_shape) or a dict "
            f"of scores by layer, got {importance!r}"
        )


def unit_scores(
    op: str,
    name: str,
    weight: Tensor,
    gradient: Tensor | None,
    units: Units,
    importance: str | Importance | Mapping[str, Tensor],
    *,
    per_weight: bool = False,
) -> Tensor:
    """Scores of a layer's units, higher is kept: floating point of shape ``units.shape``, on the weight's device.

    Args:
        op: public function's name, which begins every message.
        name: the layer's.
        weight: masked weight.
        gradient: of the loss by it, for "taylor" and "movement".
        importance: as in `slimkernels.prune_`.
        per_weight: divide magnitudes by what a unit of equal weights would grow with its size (L2 by the square root of
            its number of weights, L1 by the number), so that units of different sizes compare.

    Raises:
        ValueError: no gradient where one is needed, no scores for this layer, or scores of another shape.
    """
    weight = weight.detach()
    if isinstance(importance, Mapping):
        if name not in importance:
            known = ", ".join(map(repr, list(importance)[:5])) or "none"
            raise ValueError(f"{op}: expected importance scores for layer {name!r}, got scores for {known}")
        return _shaped(op, name, importance[name], units).to(weight.device)
    if callable(importance):
        return _shaped(op, name, importance(weight, units.block_shape), units).to(weight.device)
    if importance in GRADIENT_IMPORTANCES:
        if gradient is None:
            raise ValueError(
                f"{op}: expected a gradient on the weight of layer {name!r} for importance {importance!r}, got none; "
                "run backward first, or pass the scores of importance.taylor_scores or movement_scores"
            )
        return _step_scores(weight, gradient, units, importance)
    wide = weight.float() if weight.dtype.itemsize < 4 else weight
    if importance == "magnitude":
        squares = units.sums(wide.square())
        return ((squares / units.sizes(weight.device)) if per_weight else squares).sqrt_()
    scores = units.sums(wide.abs())
    return scores / units.sizes(weight.device) if per_weight else scores


def _step_scores(weight: Tensor, gradient: Tensor, units: Units, importance: str) -> Tensor:
    wide = weight.float() if weight.dtype.itemsize < 4 else weight
    products = units.sums(wide * gradient.detach())
    return products.square_() if importance == "taylor" else products.neg_()


def _shaped(op: str, name: str, scores: Any, units: Units) -> Tensor:
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else None
    if shape == units.shape:
        return scores.detach()
    if shape == units.grid:
        return units.reduce(scores.detach())
    expected = f"{units.shape}" if units.shape == units.grid else f"{units.shape} or {units.grid}"
    got = shape if shape is not None else type(scores).__name__
    raise ValueError(f"{op}: expected importance scores of shape {expected} for layer {name!r}, got {got}")


class GradientScores:
    """Taylor or movement scores gathered over training steps.

    Attributes:
        kind: "taylor" or "movement".
        steps: how many steps the sums hold.
    """

    def __init__(self, kind: str) -> None:
        if kind not in GRADIENT_IMPORTANCES:
            raise ValueError(f"GradientScores: expected kind 'taylor' or 'movement', got {kind!r}")
        self.kind, self.steps = kind, 0
        self._sums: dict[str, Tensor] = {}

    def add(self, layers: Iterable[tuple[str, Tensor, Tensor | None, Units]]) -> None:
        """Adds one step: per layer its name, weight, gradient (None counts as zero) and units."""
        self.steps += 1
        with torch.no_grad():
            for name, weight, gradient, units in layers:
                total = self._sums.get(name)
                if total is None:
                    dtype = torch.promote_types(weight.dtype, torch.float32)
                    total = self._sums[name] = torch.zeros(units.shape, dtype=dtype, device=weight.device)
                elif total.device != weight.device:
                    total = self._sums[name] = total.to(weight.device)
                if gradient is not None:
                    total += _step_scores(weight.detach(), gradient, units, self.kind)

    def scores(self) -> dict[str, Tensor]:
        """Mean over the steps (taylor) or sum (movement), by layer.

        Raises:
            ValueError: no step was added.
        """
        if self.steps == 0:
            raise ValueError(f"{self.kind} importance: expected gradients of at least one step, got none; prune later")
        scale = 1.0 / self.steps if self.kind == "taylor" else 1.0
        return {name: total * scale for name, total in self._sums.items()}

    def forget(self) -> None:
        """Starts anew."""
        self.steps = 0
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers of a checkpoint."""
        return {"kind": self.kind, "steps": self.steps, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back `state_dict`. Raises ValueError where it holds scores of the other kind."""
        if state["kind"] != self.kind:
            raise ValueError(f"GradientScores: expected scores of kind {self.kind!r}, got {state['kind']!r}")
        self.steps, self._sums = int(state["steps"]), dict(state["sums"])


def taylor_scores(model: nn.Module, loader: Iterable[Any], **options: Any) -> dict[str, Tensor]:
    """First-order Taylor scores of every prunable layer over a loader, for ``prune_(model, ..., importance=scores)``.

    The model runs in eval mode and is left as it was: parameters, gradients, buffers and modes.

    Args:
        model: returns what ``loss`` takes; masks on it are applied.
        loader: batches ``(inputs, labels)`` or ``(inputs, labels, ...)``.
        options: ``loss`` (``loss(outputs, labels)``, cross-entropy by default), ``batches`` (how many to read at most),
            and ``block_shape, granularity, layers, exclude, skip_first`` as in `slimkernels.prune_`, to be given
            alike there.

    Returns:
        layer name -> scores with one entry per unit (`slimkernels.compress.pruning.granularity.Units.shape`).

    Raises:
        ValueError: an empty loader, no layer to score. TypeError: an unknown option.

    Example:
        >>> import torch
        >>> from slimkernels.compress.pruning.importance import taylor_scores
        >>> from slimkernels.compress.pruning.prune import masks, prune_
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
        >>> batches = [(torch.randn(8, 64), torch.arange(8) % 4)]
        >>> scores = taylor_scores(net, batches, block_shape=(16, 1))
        >>> tuple(scores["0"].shape)
        (4, 64)
        >>> _ = prune_(net, 0.5, (16, 1), importance=scores)
    """
    return _scores("taylor_scores", "taylor", model, loader, **options)


def movement_scores(model: nn.Module, loader: Iterable[Any], **options: Any) -> dict[str, Tensor]:
    """Movement scores (minus the sum of weight times gradient) over a loader at fixed weights; see `taylor_scores`.

    While a model trains, `slimkernels.compress.pruning.gradual.GradualPruning` gathers them along the path instead.
    """
    return _scores("movement_scores", "movement", model, loader, **options)


def _scores(
    op: str,
    kind: str,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss = F.cross_entropy,
    batches: int | None = None,
    block_shape: Sequence[int] | Mapping[str, Sequence[int]] = (16, 1),
    granularity: str = "block",
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
) -> dict[str, Tensor]:
    model = unwrapped(op, model)
    picked = prunable_layers(op, model, layers, exclude, skip_first, verb="score")
    blocks = block_shapes_of(op, model, picked, block_shape)
    weights = {layer.name: readable_weight(op, layer.name, layer.module) for layer in picked}
    units = {name: Units.of(weight.shape, blocks[name], granularity) for name, weight in weights.items()}
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    found = GradientScores(kind)
    if not weights:
        raise ValueError(f"{op}: expected at least one Conv2d or Linear to score, got none after the exclusions")
    device = device_of(model)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with mode_of(model, training=False), torch.enable_grad(), strided_pointwise_guarded(model):
            for i, (inputs, labels, *_) in enumerate(loader):
                if batches is not None and i >= batches:
                    break
                value = loss(model(inputs.to(device)), labels.to(device))
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                found.add(
                    (name, weight, gradient, units[name])
                    for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
                )
    finally:
        for name in frozen:
            weights[name].requires_grad_(False)
    if found.steps == 0:
        raise ValueError(f"{op}: expected at least one batch, got an empty loader")
    result = found.scores()
    bad = next((name for name, score in result.items() if not math.isfinite(float(score.sum()))), None)
    if bad is not None:
        raise ValueError(f"{op}: expected finite gradients in layer {bad!r}, got NaN or infinity")
    return result
