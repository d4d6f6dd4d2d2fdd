"""Channels that pruning left without effect, physically removed: narrower layers with the same outputs.

A channel can go when the layer that reads it has only zeros for it, or when its own filter is all zeros and the
constant that it then carries (its bias, through batch norm and activation) is 0 or can move into the reader's bias.
That move is exact for a Linear and for a convolution without padding. With padding the reader sees the constant
inside the image and 0 around it, so the channel stays (or, with ``fold_borders=True``, goes at the price of the outputs
along the border).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from slimkernels.compress.pruning.prune import finalize_
from slimkernels.compress.training.evaluation import mode_of
from slimkernels.conversion.folding import batch_norm_scale_shift
from slimkernels.conversion.graph import fx_graph, has_hooks, input_sets, trace, unique_names
from slimkernels.conversion.layers import (
    structure_obstacle,
    type_obstacle,
    weight_obstacle,
)
from slimkernels.conversion.readers import shared_tensor_layers, weight_readers
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.nn import resolved_padding

# Layers that act on each number alone, so that a constant channel stays constant. Dropout is one in eval mode.
_POINTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Dropout,
    nn.Dropout2d,
)
_POINTWISE_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: F.relu,
    torch.relu: F.relu,
    torch.relu_: F.relu,
    F.relu6: F.relu6,
    F.silu: F.silu,
    torch.sigmoid: torch.sigmoid,
    torch.tanh: torch.tanh,
    F.dropout: lambda v: v,
}
_POOLS = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_POOL_FUNCTIONS = (F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
_FLATTENS = ((1,), (1, -1), (("start_dim", 1),))
# Removing zero terms changes the order of a sum, nothing else.
_SAME = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_` did.

    Attributes:
        channels: layer -> (output channels before, after), of every layer that lost some.
        kept: layer -> why channels with an all-zero filter stay, or why its channels cannot be removed at all.
        parameters: of the whole model, before and after.
    """

    channels: dict[str, tuple[int, int]]
    kept: dict[str, str]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        lines = [f"{name}: {before} -> {after} channels" for name, (before, after) in self.channels.items()]
        lines += [f"{name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, f"parameters: {self.parameters[0]} -> {self.parameters[1]}"])


@dataclass
class _Path:
    """From a layer to the one layer that reads its output.

    ``steps`` change a vector with one constant per channel as the path does, NaN where the image is constant no more;
    ``counted_padding`` is a pool of which that is so; ``positions`` is how many inputs of a Linear belong to one
    channel.
    """

    reader: str = ""
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    counted_padding: str = ""
    flattened: bool = False
    positions: int = 1


def shrink_(model: nn.Module, example_inputs: Any = None, *, fold_borders: bool = False) -> ShrinkReport:
    """Removes channels without effect from a model in place; in eval mode its outputs stay the same.

    Looked at is every Conv2d (groups=1) and Linear whose output goes, through batch norm, activations, pools, dropout
    and flatten, to exactly one other Conv2d (groups=1) or Linear: VGG, NIN, the inner convolutions of residual
    blocks. Anything else keeps its channels, and the report says why. At least one channel always stays. A Linear in
    front of batch norm is taken to have inputs ``(N, C)``: of longer ones the norm has another axis as its channels.

    Masks are removed first (`slimkernels.finalize_`), so shrink at the end of training. Changed layers hold new
    Parameters: build optimisers afterwards. `slimkernels.convert` takes the result like any dense model.

    Args:
        model: pruned, for instance by ``prune_(..., granularity="channel")``; any zeros will do.
        example_inputs: as in `slimkernels.convert`; where given, outputs before and after are compared on a copy
            first.
        fold_borders: also remove a channel whose constant is not 0 and whose reader pads. The outputs then differ
            along the image border, and the comparison is left out.

    Returns:
        What was removed, and what stays and why.

    Raises:
        ValueError: the model cannot be traced, does not run on the inputs, or would give other outputs. Nothing is
            changed then.

    Example:
        >>> import torch
        >>> from slimkernels.compress.pruning.prune import prune_
        >>> from slimkernels.compress.pruning.shrink import shrink_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> _ = prune_(net, 0.5, granularity="channel", layers="0")
        >>> shrink_(net).channels
        {'0': (8, 4)}
    """
    model = unwrapped("shrink_", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink_: expected model to be an nn.Module, got {type(model).__name__}")
    try:
        graph = fx_graph(model)
    except ValueError as error:
        raise ValueError(f"shrink_: expected a model that can be traced: {error}") from error
    sets = input_sets(example_inputs)
    if sets and not fold_borders:
        probe = copy.deepcopy(model)
        _shrink(probe, graph, fold_borders)
        _compare(model, probe, sets)
    return _shrink(model, graph, fold_borders)


def _shrink(model: nn.Module, graph: fx.Graph, fold_borders: bool) -> ShrinkReport:
    finalize_(model)
    parameters = sum(p.numel() for p in model.parameters())
    structure = trace(model)
    uniques, shared = unique_names(model), shared_tensor_layers(model)
    readers = weight_readers(model, [structure])

    def obstacle(name: str) -> str | None:
        if structure.calls.get(name, 0) != 1:
            return f"it is called {structure.calls.get(name, 0)} times"
        found = type_obstacle(model.get_submodule(name))
        return (
            found
            or structure_obstacle(name, uniques, readers)
            or weight_obstacle(
                # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
                model.get_submodule(name).weight  # type: ignore[arg-type]
            )
        )

    def norm_obstacle(name: str) -> str | None:
        module: Any = model.get_submodule(name)
        if structure.calls.get(name) != 1 or name not in uniques or name in shared or has_hooks(module):
            return f"{name} behind it is shared or carries hooks"
        return None if module.running_mean is not None else f"{name} behind it keeps no running statistics"

    kept: dict[str, str] = {}
    paths: dict[str, _Path] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(str(node.target)), (nn.Conv2d, nn.Linear)):
            continue
        name = str(node.target)
        found = obstacle(name) or _follow(model, node)
        if isinstance(found, _Path):
            blocked = obstacle(found.reader)
            reason = f"{found.reader} reads it, and {blocked}" if blocked else None
            reason = reason or next((why for bn in found.norms if (why := norm_obstacle(bn)) is not None), None)
            if reason is None:
                paths[name] = found
                continue
            found = reason
        kept[name] = found

    def width(name: str) -> int:
        module: Any = model.get_submodule(name)
        return int(module.weight.shape[0])

    widths = {name: width(name) for name in paths}
    changed = True
    while changed:  # a filter may become all zeros, or unread, when a neighbour loses channels
        changed = False
        for name, path in paths.items():
            keep, text = _plan(model, name, path, fold_borders)
            kept.pop(name, None)
            if text:
                kept[name] = text
            if not bool(keep.all()):
                _narrow(model, name, path, keep)
                changed = True
    channels = {name: (before, width(name)) for name, before in widths.items() if before != width(name)}
    return ShrinkReport(channels, kept, (parameters, sum(p.numel() for p in model.parameters())))


def _follow(model: nn.Module, node: fx.Node) -> _Path | str:
    """The path from a layer to its reader, or why there is none."""
    path, producer = _Path(), model.get_submodule(str(node.target))
    images = isinstance(producer, nn.Conv2d)  # behind a Linear pools go over the features, the channels
    norm = nn.BatchNorm2d if images else nn.BatchNorm1d
    # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
    channels: int = producer.weight.shape[0]  # type: ignore[union-attr, index, assignment]
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"its output goes to {len(users)} places"
        node = users[0]
        if node.op == "output":
            return "its output is the model's"
        if node.op == "call_module":
            module: Any = model.get_submodule(str(node.target))
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                return _read(path, str(node.target), producer, module, channels)
            if type(module) is norm and not path.flattened:
                path.norms.append(str(node.target))
                path.steps.append(_norm_step(module))
            elif type(module) in _POINTWISE:
                path.steps.append(_pointwise_step(module))
            elif type(module) in _POOLS and images and not path.flattened:
                if not _keeps_constant(module):
                    path.counted_padding = str(node.target)
                    path.steps.append(lambda values: torch.where(values == 0, values, math.nan))
            elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                path.flattened = True
            else:
                return f"its output goes through {type(module).__name__} ({node.target})"
            continue
        target = node.target
        if target in _POINTWISE_FUNCTIONS:
            path.steps.append(_POINTWISE_FUNCTIONS[target])
        elif node.op == "call_method" and target in ("relu", "relu_"):
            path.steps.append(F.relu)
        elif target in _POOL_FUNCTIONS and images and not path.flattened:
            pass
        elif target in (torch.flatten, "flatten") and (*node.args[1:], *node.kwargs.items()) in _FLATTENS:
            path.flattened = True
        else:
            return f"its output goes through {getattr(target, '__name__', target)}"


def _read(path: _Path, name: str, producer: nn.Module, reader: nn.Module, channels: int) -> _Path | str:
    path.reader = name
    weight: Any = reader.weight
    if isinstance(reader, nn.Conv2d):
        fits = isinstance(producer, nn.Conv2d) and not path.flattened and weight.shape[1] == channels
    elif isinstance(producer, nn.Linear):
        fits = weight.shape[1] == channels
    else:
        fits = path.flattened and weight.shape[1] % channels == 0
        path.positions = weight.shape[1] // channels
    return path if fits else f"{name} reads it in another layout"


def _norm_step(bn: nn.Module) -> Callable[[Tensor], Tensor]:
    def step(values: Tensor) -> Tensor:
        scale, shift = batch_norm_scale_shift(bn)  # type: ignore[arg-type]  # a batch norm, as the caller has found out
        return values * scale + shift

    return step


def _pointwise_step(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def step(values: Tensor) -> Tensor:
        with mode_of(module, training=False):
            return module(values.clone())

    return step


def _keeps_constant(pool: Any) -> bool:
    """Whether a pool maps a constant image to the same constant: an average that counts padding does not."""
    if type(pool) is not nn.AvgPool2d:
        return not getattr(pool, "return_indices", False)
    padded = max(_pair(pool.padding)) > 0 and pool.count_include_pad
    return not padded and pool.divisor_override is None


@torch.no_grad()
def _plan(model: nn.Module, name: str, path: _Path, fold_borders: bool) -> tuple[Tensor, str]:
    """Which channels of a layer stay, and why all-zero filters are among them; constants go into the reader's bias."""
    layer: Any = model.get_submodule(name)
    reader: Any = model.get_submodule(path.reader)
    dead = (layer.weight == 0).flatten(1).all(1)
    # (out, channels, inputs of one channel): taps, or positions of a flattened image
    columns = reader.weight.detach().reshape(reader.weight.shape[0], len(dead), -1)
    unread = (columns == 0).all(2).all(0)
    values = torch.zeros(len(dead), dtype=torch.float64, device=layer.weight.device)
    if layer.bias is not None:
        values = layer.bias.detach().double().clone()
    for step in path.steps:
        values = step(values)
    padded = isinstance(reader, nn.Conv2d) and max(resolved_padding(reader)) > 0
    silent = values == 0
    gone = unread | (dead & (silent | (torch.isfinite(values) & (fold_borders or not padded))))
    if bool(gone.all()):
        gone[int((~dead).float().argmax())] = False  # a layer without channels cannot run
    moved = gone & dead & ~silent & ~unread
    if bool(moved.any()):
        shift = (columns[:, moved].double().sum(2) * values[moved]).sum(1)
        old = 0.0 if reader.bias is None else reader.bias.detach().double()
        reader.bias = nn.Parameter((old + shift).to(reader.weight.dtype), requires_grad=reader.weight.requires_grad)
    stuck = int((dead & ~gone).sum())
    text = ""
    if stuck:
        why = f"{path.reader} needs one channel"
        if padded or path.counted_padding:
            why = f"their constant is not 0 and {path.reader if padded else path.counted_padding} pads"
        text = f"{stuck} all-zero filters stay: {why}"
    return ~gone, text


@torch.no_grad()
def _narrow(model: nn.Module, name: str, path: _Path, keep: Tensor) -> None:
    """Drops channels from a layer, the batch norms behind it and its reader."""
    layer: Any = model.get_submodule(name)
    reader: Any = model.get_submodule(path.reader)
    count = int(keep.sum())
    _assign(layer, "weight", layer.weight[keep])
    if layer.bias is not None:
        _assign(layer, "bias", layer.bias[keep])
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", count)
    for bn_name in path.norms:
        bn: Any = model.get_submodule(bn_name)
        bn.num_features = count
        for parameter in ("weight", "bias"):
            if getattr(bn, parameter) is not None:
                _assign(bn, parameter, getattr(bn, parameter)[keep])
        bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
    inputs = keep.repeat_interleave(path.positions)
    _assign(reader, "weight", reader.weight[:, inputs])
    setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", int(inputs.sum()))


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    trainable = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=trainable))


def _compare(model: nn.Module, shrunk: nn.Module, sets: list[Any]) -> None:
    """Raises ValueError where the two models differ on an input by more than rounding."""
    for i, (args, kwargs) in enumerate(sets):
        outputs = []
        for net in (model, shrunk):
            try:
                with mode_of(net, training=False), torch.no_grad():
                    outputs.append(net(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            except Exception as error:  # the model's own code runs here
                raise ValueError(f"shrink_: the model does not run on example input {i}: {error}") from error
        a, b = outputs
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        scale = float(a.double().square().mean().sqrt())
        rms = float((a.double() - b.double()).square().mean().sqrt()) if a.shape == b.shape else math.inf
        if not rms <= _SAME.get(a.dtype, 1e-1) * scale:
            raise ValueError(f"shrink_: outputs at example input {i} would differ: RMS {rms:.3g} of {scale:.3g}")
