"""Sparsity and block shape per layer for a wanted latency: the least importance lost that makes the model fast enough.

Every layer may stay dense or run block-sparse at one of several block shapes and sparsities. Each way has a time
(predicted by `slimkernels.dispatch.select`, or measured here) and a price, the importance of what would be pruned.
One way per layer is chosen so that the times add up to the target at the least total price: a multiple-choice
knapsack, solved exactly up to the rounding of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from slimkernels.compress.allocation import allocate_exactly, least_cost
from slimkernels.compress.pruning.granularity import Units
from slimkernels.compress.pruning.importance import Importance, check_importance, unit_scores
from slimkernels.compress.pruning.latency import ReachedLayer, predicted_dense, reached_layers
from slimkernels.compress.pruning.schedules import check_sparsity
from slimkernels.conversion import measure as stopwatch
from slimkernels.conversion.analysis import CANDIDATE_BLOCK_SHAPES, problems, usable_kernel
from slimkernels.conversion.candidates import dense_twin
from slimkernels.conversion.graph import InputSet, input_sets, scratch_copy
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.dispatch.select import predicted_seconds
from slimkernels.formats import block_shape_2d
from slimkernels.kernels import KERNELS
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear
from slimkernels.progress import counting_bar

DEFAULT_SPARSITIES = (0.5, 0.625, 0.75, 0.8125, 0.875, 0.90625, 0.9375, 0.96875)
_MEASURE_ROUNDS = 7
_MEASURE_BUDGET_S = 0.05
# A way that is not this much faster than dense is no way: conversion's own default asks for as much.
_MIN_SPEEDUP = 1.05


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is to run.

    Attributes:
        name: of the layer.
        sparsity: share of its blocks to mask; 0 leaves it dense.
        block_shape: ``(block_out, block_in)``; None where the layer stays dense.
        kernel: the name of its kernel; None where the layer stays dense.
        seconds: time per pass over the example inputs, as chosen.
        dense_s: time per pass over the example inputs, dense.
        lost: price of what is pruned, see `latency_budget`.
    """

    name: str
    sparsity: float
    block_shape: tuple[int, int] | None
    kernel: str | None
    seconds: float
    dense_s: float
    lost: float

    @property
    def cost(self) -> float:
        """``seconds``, which the target is a budget of."""
        return self.seconds


@dataclass(frozen=True)
class LatencyPlan:
    """What `latency_budget` chose: ``prune_(model, plan.sparsity, plan.block_shapes, granularity=plan.granularity)``.

    Attributes:
        layers: a choice for every prunable layer.
        target_s: wanted time.
        dense_s: of the unpruned model.
        rest_s: of what cannot be pruned, inside both.
        measured: whether times were measured; else they are predictions.
        granularity: "block" or "block_shared_taps".
    """

    layers: tuple[LayerChoice, ...]
    target_s: float
    dense_s: float
    rest_s: float
    measured: bool
    granularity: str

    @property
    def sparsity(self) -> dict[str, float]:
        """Sparsity of every layer to prune."""
        return {layer.name: layer.sparsity for layer in self.layers if layer.block_shape is not None}

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """Block shape of every layer to prune."""
        return {layer.name: layer.block_shape for layer in self.layers if layer.block_shape is not None}

    @property
    def seconds(self) -> float:
        """Time of the pruned model by the plan's own numbers, at most ``target_s``."""
        return self.rest_s + sum(layer.seconds for layer in self.layers)

    @property
    def speedup(self) -> float:
        """``dense_s / seconds``."""
        return self.dense_s / self.seconds

    @property
    def lost(self) -> float:
        """Price of all layers."""
        return sum(layer.lost for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return {**asdict(self), "seconds": self.seconds, "speedup": self.speedup, "lost": self.lost}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':<{width}}  sparsity  blocks       dense ms        ms      lost"]
        for layer in self.layers:
            shape = "dense" if layer.block_shape is None else "x".join(map(str, layer.block_shape))
            lines.append(
                f"{layer.name:<{width}}  {layer.sparsity:>8.2%}  {shape:<10} {1e3 * layer.dense_s:>10.4f} "
                f"{1e3 * layer.seconds:>9.4f} {layer.lost:>9.4g}"
            )
        how = "measured" if self.measured else "predicted"
        lines.append(
            f"{how}: {1e3 * self.dense_s:.4g} ms dense, {1e3 * self.seconds:.4g} ms pruned ({self.speedup:.2f}x), "
            f"target {1e3 * self.target_s:.4g} ms"
        )
        return "\n".join(lines)


def latency_budget(
    model: nn.Module,
    example_inputs: Any,
    target: float,
    *,
    unit: str = "speedup",
    measure: bool = False,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    block_shapes: Sequence[Sequence[int]] = CANDIDATE_BLOCK_SHAPES,
    granularity: str = "block",
    importance: str | Importance = "magnitude",
    weights: Mapping[str, float] | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
    backend: str = "auto",
    progress: bool = True,
) -> LatencyPlan:
    """Chooses sparsity and block shape of every layer so that the model reaches a latency at the least loss.

    Args:
        model: trained, on the device it will run on; it stays untouched.
        example_inputs: as in `slimkernels.convert`, at the batch size that matters; of several, times are added up.
        target: a speed-up over the dense model, or milliseconds, as ``unit`` says.
        unit: "speedup" or "ms". Predicted milliseconds count convolutions and linear layers alone.
        measure: time every layer dense and at the lowest and highest sparsity of every block shape (times between are
            interpolated in the number of stored blocks), and the whole dense model; else times are predicted.
        sparsities: to choose from, in (0, 1).
        block_shapes: to choose from; those that no kernel takes are left out layer by layer.
        granularity: "block" or "block_shared_taps".
        importance: as in `slimkernels.prune_`, without a dict. The price of a layer by "magnitude"
            ("magnitude_l1") is ``-ln`` of the share of its squared (absolute) weights that stays: a signal's power is
            multiplied by about that share in each layer, so prices add up, and no layer is starved. By anything else it
            is the sum of the scores that go, which makes "taylor" an estimate of the loss.
        weights: factors on the prices by layer name (1 where absent), for instance from a sensitivity scan.
        layers: as in `slimkernels.prune_`.
        exclude: as in `slimkernels.prune_`.
        skip_first: as in `slimkernels.prune_`.
        backend: ``auto``, or the backend whose kernels the layers are to run on.
        progress: shows a bar on stderr while measuring, if that is a terminal.

    Raises:
        ValueError: a bad argument, a target that even the fastest way misses (the message says what can be reached),
            or no layer that a kernel takes.

    Example:
        >>> import slimkernels as sk
        >>> plan = sk.latency_budget(model, images, 4.0)                                # doctest: +SKIP
        >>> sk.prune_(model, plan.sparsity, plan.block_shapes)                          # doctest: +SKIP
    """
    op = "latency_budget"
    model = unwrapped(op, model)
    if unit not in ("speedup", "ms"):
        raise ValueError(f"{op}: expected unit 'speedup' or 'ms', got {unit!r}")
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
        raise ValueError(f"{op}: expected target to be a positive number, got {target!r}")
    if granularity not in ("block", "block_shared_taps"):
        raise ValueError(f"{op}: expected granularity 'block' or 'block_shared_taps', got {granularity!r}")
    check_importance(op, importance)
    if isinstance(importance, Mapping):
        raise ValueError(f"{op}: expected importance by name or a callable, which fit every block shape, got a dict")
    tried = tuple(sorted({check_sparsity(op, "sparsities", share) for share in sparsities} - {0.0}))
    if not tried or not block_shapes:
        raise ValueError(
            f"{op}: expected at least one sparsity above 0 and one block shape, got {tried}, {block_shapes}"
        )
    sets = input_sets(example_inputs)
    if not sets:
        raise ValueError(f"{op}: expected example inputs, got None")
    found, others = reached_layers(op, model, sets, layers, exclude, skip_first)
    unknown = sorted(set(weights or ()) - {layer.name for layer in found})
    if unknown:
        raise ValueError(f"{op}: expected weights of prunable layers, got {unknown[0]!r}")
    shapes = [block_shape_2d(shape) for shape in block_shapes]
    times = _Times(measure, backend, tried)
    ways: list[list[LayerChoice]] = []
    with counting_bar(progress and measure, "latency", len(found) * (1 + 2 * len(shapes))) as advance:
        for layer in found:
            factor = (weights or {}).get(layer.name, 1.0)
            ways.append(_ways(op, layer, shapes, tried, granularity, importance, factor, times, advance))
    if all(len(choices) == 1 for choices in ways):
        raise ValueError(f"{op}: expected a layer that some kernel runs faster than dense, got none on {backend!r}")
    own = sum(choices[0].dense_s for choices in ways)
    if measure:
        rest = max(_model_seconds(model, sets) - own, 0.0)
    else:
        rest = sum(predicted_dense(weight, calls) for weight, calls in others)
    dense = rest + own
    wanted = dense / target if unit == "speedup" else target / 1e3
    chosen = _knapsack(op, ways, wanted - rest, wanted, dense)
    return LatencyPlan(tuple(chosen), wanted, dense, rest, measure, granularity)


def _ways(
    op: str,
    layer: ReachedLayer,
    shapes: list[tuple[int, int]],
    tried: tuple[float, ...],
    granularity: str,
    importance: str | Importance,
    factor: float,
    times: _Times,
    advance: Callable[[int, str], None],
) -> list[LayerChoice]:
    """Dense first, then every way that is faster than dense."""
    dense = times.dense(layer)
    advance(1, layer.name)
    out = [LayerChoice(layer.name, 0.0, None, None, dense, dense, 0.0)]
    seen: set[tuple[int, int]] = set()
    for asked in shapes:
        units = Units.of(layer.weight.weight.shape, asked, granularity)
        if units.block_shape not in seen:
            seen.add(units.block_shape)
            kernel, seconds, counts = times.sparse(layer, units)
            if kernel is not None:
                lost = _lost(op, layer, units, importance, counts)
                out += [
                    LayerChoice(layer.name, share, units.block_shape, kernel, time, dense, factor * price)
                    for share, time, price in zip(tried, seconds, lost, strict=True)
                    if dense >= _MIN_SPEEDUP * time
                ]
        advance(2, layer.name)
    return out


def _masked(units: Units, share: float) -> int:
    """How many units `slimkernels.prune_` masks."""
    count = math.prod(units.shape)
    return min(math.floor(share * count + 1e-9 * count), count - 1)


def _lost(
    op: str, layer: ReachedLayer, units: Units, importance: str | Importance, counts: Sequence[int]
) -> list[float]:
    """Price of the lowest units, for each number of them."""
    scores = unit_scores(op, layer.name, layer.weight.weight, layer.gradient, units, importance).reshape(-1).double()
    if importance == "magnitude":
        scores = scores.square()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{op}: expected finite importance in layer {layer.name!r}, got NaN or infinity")
    total = scores.sort().values.cumsum(0)
    lost = [float(total[count - 1]) if count else 0.0 for count in counts]
    if importance not in ("magnitude", "magnitude_l1"):
        return lost
    kept = [1.0 - value / max(float(total[-1]), 1e-300) for value in lost]
    return [-math.log(max(share, 1e-12)) for share in kept]


class _Times:
    """Seconds of layers per pass over the example inputs, equal layers looked at once."""

    def __init__(self, measured: bool, backend: str, tried: tuple[float, ...]) -> None:
        self.measured, self.backend, self.tried = measured, backend, tried
        self._known: dict[Any, float] = {}

    def dense(self, layer: ReachedLayer) -> float:
        if not self.measured:
            return predicted_dense(layer.weight, layer.calls)
        return self._once(layer, None, partial(dense_twin, layer.weight))

    def sparse(self, layer: ReachedLayer, units: Units) -> tuple[str | None, list[float], list[int]]:
        """Kernel (None: none takes it), seconds and number of masked units at every sparsity."""
        counts = [_masked(units, share) for share in self.tried]
        per_unit = math.prod(units.grid) // math.prod(units.shape)
        stored = [(math.prod(units.shape) - count) * per_unit for count in counts]
        sized = {nnz: problems(layer.weight, (units.block_shape, nnz), layer.shapes) for nnz in stored}
        kernel, _ = usable_kernel(sized[stored[0]][0], self.backend)
        if kernel is None:
            return None, [], counts
        if not self.measured:
            spec = KERNELS[kernel]
            return kernel, [sum(predicted_seconds(spec, p) for p in sized[nnz]) for nnz in stored], counts
        most, least = (
            self._once(layer, (units, count), partial(_module, layer, units, count, kernel))
            for count in (counts[0], counts[-1])
        )
        span = max(stored[0] - stored[-1], 1)
        return kernel, [least + (most - least) * (nnz - stored[-1]) / span for nnz in stored], counts

    def _once(self, layer: ReachedLayer, way: Any, build: Callable[[], nn.Module]) -> float:
        weight = layer.weight
        key = (tuple(weight.weight.shape), weight.stride, weight.padding, weight.dilation, layer.calls, way)
        if key not in self._known:
            module = build().eval()
            inputs = [stopwatch.example_input(call, weight.weight) for call in layer.calls]

            def run() -> None:
                with torch.no_grad():
                    for x in inputs:
                        module(x)

            self._known[key] = stopwatch.typical_seconds(
                [run], device=weight.weight.device.type, repeats=_MEASURE_ROUNDS, budget_s=_MEASURE_BUDGET_S
            )[0]
        return self._known[key]


def _module(layer: ReachedLayer, units: Units, masked: int, kernel: str) -> nn.Module:
    """The layer with so many units masked, at random: only the count matters for time."""
    alive = torch.ones(math.prod(units.shape), dtype=torch.bool)
    alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))[:masked]] = False
    mask = units.to_blocks(alive.view(units.shape)).to(layer.weight.weight.device)
    cls: Any = BlockSparseConv2d if layer.weight.is_conv else BlockSparseLinear
    return cls.from_dense(layer.weight.to_module(), units.block_shape, mask, "none", kernel)


def _model_seconds(model: nn.Module, sets: list[InputSet]) -> float:
    scratch = scratch_copy(model)
    device = next((p.device.type for p in scratch.parameters()), "cpu")

    def run() -> None:
        with torch.no_grad():
            for args, kwargs in sets:
                scratch(*args, **kwargs)

    return stopwatch.typical_seconds([run], device=device, repeats=_MEASURE_ROUNDS, budget_s=4 * _MEASURE_BUDGET_S)[0]


def _knapsack(op: str, ways: list[list[LayerChoice]], seconds: float, wanted: float, dense: float) -> list[LayerChoice]:
    """One way per layer, the least lost in total among those whose times fit into ``seconds``."""
    least = least_cost(ways)
    if least > seconds:
        reach = wanted - seconds + least
        raise ValueError(
            f"{op}: expected a target that can be reached, got {1e3 * wanted:.4g} ms ({dense / wanted:.3g}x); the "
            f"fastest ways give {1e3 * reach:.4g} ms ({dense / reach:.3g}x)"
        )
    return allocate_exactly(ways, seconds)
