"""What layers cost: the calls that example inputs make, and the predicted time of one unit of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimkernels.compress.pruning.granularity import Units, check_granularity
from slimkernels.compress.selection import block_shapes_of, prunable_layers, readable_weight
from slimkernels.conversion.analysis import problems, usable_kernel, weight_layer_names
from slimkernels.conversion.calls import Call, capture
from slimkernels.conversion.graph import InputSet, input_sets
from slimkernels.conversion.layers import LayerWeight, layer_weight, type_obstacle, weight_obstacle
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.dispatch.select import predicted_dense_seconds, predicted_seconds
from slimkernels.kernels import KERNELS


@dataclass(frozen=True)
class ReachedLayer:
    """A prunable layer that example inputs reach: its weight, what scores it, and its calls over all example inputs."""

    name: str
    weight: LayerWeight
    gradient: Tensor | None
    calls: tuple[Call, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its inputs."""
        return [call.input_shape for call in self.calls]


def unit_costs(
    model: nn.Module,
    example_inputs: Any,
    block_shape: Sequence[int] | Mapping[str, Sequence[int]] = (16, 1),
    *,
    granularity: str = "block",
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
    backend: str = "auto",
) -> dict[str, float]:
    """Predicted seconds that one stored unit of each layer costs, from the cost tables of the model's device.

    For ``prune_(..., scope="global", costs=...)``, which then ranks units by importance per second: a block of an early
    layer, which is multiplied with every pixel of a large image, has to be worth more than one of a late layer.

    Args:
        model: on the device it will run on; it stays untouched.
        example_inputs: as in `slimkernels.convert`, at the batch size that matters; of several, times are added up.
        block_shape: as in `slimkernels.prune_`.
        granularity: as in `slimkernels.prune_`.
        layers: as in `slimkernels.prune_`.
        exclude: as in `slimkernels.prune_`.
        skip_first: as in `slimkernels.prune_`.
        backend: ``auto``, or the backend whose kernels the layers are to run on.

    Returns:
        Layer name -> seconds, of every layer that `slimkernels.prune_` would prune and some kernel takes.

    Raises:
        ValueError: no example inputs, no layer that they reach or that a kernel takes.
    """
    op = "unit_costs"
    model = unwrapped(op, model)
    check_granularity(op, granularity)
    sets = input_sets(example_inputs)
    if not sets:
        raise ValueError(f"{op}: expected example inputs, got None")
    blocks = block_shapes_of(op, model, prunable_layers(op, model, layers, exclude, skip_first), block_shape)
    found, _ = reached_layers(op, model, sets, layers, exclude, skip_first)
    costs = {}
    for layer in found:
        units = Units.of(layer.weight.weight.shape, blocks[layer.name], granularity)
        count, stored = math.prod(units.shape), math.prod(units.grid)
        whole = problems(layer.weight, (units.block_shape, stored), layer.shapes)
        kernel, _ = usable_kernel(whole[0], backend)
        if kernel is None:
            continue
        # The slope between every unit and one: what a call costs at any sparsity is no unit's.
        least = problems(layer.weight, (units.block_shape, stored // count), layer.shapes)
        spec = KERNELS[kernel]
        seconds = [sum(predicted_seconds(spec, p) for p in sized) for sized in (whole, least)]
        costs[layer.name] = max(seconds[0] - seconds[1], seconds[0] * 1e-3) / max(count - 1, 1)
    if not costs:
        raise ValueError(f"{op}: expected a layer that some kernel takes, got none on {backend!r}")
    return costs


def reached_layers(
    op: str, model: nn.Module, sets: list[InputSet], layers: Any, exclude: Any, skip_first: bool
) -> tuple[list[ReachedLayer], list[tuple[LayerWeight, tuple[Call, ...]]]]:
    """The prunable layers that the example inputs reach, and the weights and calls of all other ones."""
    picked = {layer.name: layer for layer in prunable_layers(op, model, layers, exclude, skip_first)}
    names = weight_layer_names(model)
    calls = {name: sum(per_input, ()) for name, per_input in capture(model, sets, names, op=op).calls.items()}
    found, others = [], []
    for name in names:
        module: Any = model.get_submodule(name)
        if not calls.get(name) or type_obstacle(module) is not None:
            continue
        weight = layer_weight(module)
        if weight_obstacle(weight.weight) is not None:
            continue
        if name in picked:
            parameter = readable_weight(op, name, module)
            found.append(ReachedLayer(name, weight, parameter.grad, calls[name]))
        else:
            others.append((weight, calls[name]))
    if not found:
        raise ValueError(f"{op}: expected at least one prunable layer that the example inputs reach, got none")
    return found, others


def predicted_dense(weight: LayerWeight, calls: Sequence[Call]) -> float:
    """Seconds of the layer's calls, dense, by the cost tables."""
    return sum(
        predicted_dense_seconds(p)
        for p in problems(weight, ((1, 1), weight.weight.numel()), [c.input_shape for c in calls])
    )
