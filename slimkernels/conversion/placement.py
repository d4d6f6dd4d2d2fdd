"""Whether a plan, the tensors of its file and the model it is to be put into belong together.

A file's hashes hold for whatever somebody wrote, so every number of the plan is compared with the tensors that the file
holds, and with the layers of the model, before anything is built from it. Nothing here allocates more than a mask of a
layer's blocks. Errors begin with the layer and the field; the caller names the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from slimkernels.conversion.factor_chains import merged_geometry
from slimkernels.conversion.folding import batch_norm_obstacle, is_pool2
from slimkernels.conversion.graph import ancestors, parametrized_type, unique_names
from slimkernels.conversion.layers import (
    DROP_IN_LAYERS,
    WEIGHT_LAYERS,
    LayerWeight,
    type_obstacle,
)
from slimkernels.conversion.plan import LayerPlan, ModelPlan
from slimkernels.formats import BSRWeight, LowRankWeight, block_grid, weight_shape_4d
from slimkernels.nn import resolved_padding

_DROP_INS = frozenset(kind.__name__ for kind in DROP_IN_LAYERS)
# A block beyond its layer is legal, most of it being padding; but a file without a single block could claim any size.
_LARGEST_EMPTY_BLOCK = 2**16
_EXTRA_STATE = "_extra_state"


def check_tensors(plan: ModelPlan, tensors: Mapping[str, Any]) -> None:
    """Raises ValueError where the tensors of a swapped or kept layer do not fit its plan; layer and field are named."""
    for layer in plan.layers:
        try:
            if layer.action == "swap":
                _check_swapped(layer, tensors)
            elif layer.action == "keep":
                weight = tensors.get(_key(layer, "weight"))
                if isinstance(weight, Tensor) and layer.dtype is not None:
                    _check_dtype(layer, "weight", weight)
        except (ValueError, TypeError) as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from error


def swapped_names(layer: LayerPlan) -> list[str]:
    """The tensors of a swapped layer, by their names in the module."""
    if layer.format == "bsr":
        names = ["values", "crow_indices", "col_indices"]
    elif layer.format in ("dense", "fused"):
        names = ["weight"]
    elif len(layer.weight_shape or ()) == 2:
        names = ["V", "U"]
    else:
        names = [f"factors.{i}" for i in range(len(layer.ranks or ()) + 1)]
    return [*names, "bias"] if layer.bias else names


def _check_swapped(layer: LayerPlan, tensors: Mapping[str, Any]) -> None:
    shape = layer.weight_shape
    assert shape is not None
    found = {}
    for name in swapped_names(layer):
        tensor = tensors.get(_key(layer, name))
        if not isinstance(tensor, Tensor):
            raise ValueError(f"expected tensor {_key(layer, name)!r} of the plan, got none")
        found[name] = tensor
    for name, tensor in found.items():
        if "indices" not in name:
            _check_dtype(layer, name, tensor)
    if layer.bias:
        _check_shape(layer, "bias", found.pop("bias"), shape[:1])
    if layer.format == "bsr":
        assert layer.block_shape is not None
        values = found["values"]
        block, weights = math.prod(layer.block_shape), math.prod(shape[:2])
        if values.numel() == 0 and block > max(_LARGEST_EMPTY_BLOCK, weights):
            raise ValueError(f"expected block_shape of a layer of shape {shape}, got {layer.block_shape}")
        if not values.is_meta:  # while a pattern is still coded, its file's index has been checked
            BSRWeight(**found, weight_shape=weight_shape_4d(shape), block_shape=layer.block_shape).validate()
    elif layer.format in ("dense", "fused"):
        _check_shape(layer, "weight", found["weight"], shape)
    else:
        for name, expected in _factor_shapes(layer).items():
            _check_shape(layer, name, found[name], expected)
        LowRankWeight(layer.kind or "", tuple(found.values())).validate()


def _factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """What `LowRankLinear` and `LowRankConv2d` of this plan hold."""
    shape, ranks = layer.weight_shape, layer.ranks
    assert shape is not None and ranks is not None
    if len(shape) == 2:
        if ranks[0] > min(shape):
            raise ValueError(f"expected ranks up to {min(shape)}, got {ranks}")
        return {"V": (ranks[0], shape[1]), "U": (shape[0], ranks[0])}
    c_out, c_in, r, s = shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "svd": [(ranks[0], c_in, r, s), (c_out, ranks[0], 1, 1)],
        "tai": [(ranks[0], c_in, r, 1), (c_out, ranks[0], 1, s)],
        "tucker2": [(ranks[0], c_in, 1, 1), (ranks[-1], ranks[0], r, s), (c_out, ranks[-1], 1, 1)],
    }
    return {f"factors.{i}": expected for i, expected in enumerate(shapes[layer.kind or ""])}


def _check_dtype(layer: LayerPlan, name: str, tensor: Tensor) -> None:
    if str(tensor.dtype) != f"torch.{layer.dtype}":
        raise ValueError(f"expected tensor {_key(layer, name)!r} of dtype torch.{layer.dtype}, got {tensor.dtype}")


def _check_shape(layer: LayerPlan, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected tensor {_key(layer, name)!r} of shape {shape}, got {tuple(tensor.shape)}")


def _key(layer: LayerPlan, name: str) -> str:
    return f"{layer.name}.{name}" if layer.name else name


# Plan and model


def check_places(plan: ModelPlan, model: nn.Module) -> None:
    """Raises ValueError where the model has not the layers that the plan was made from; layer and field are named.

    The model may be fresh, masked, pruned or converted already.
    """
    taken: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.into is not None:
            taken.setdefault(layer.into, []).append(layer)
    plans = {layer.name: layer for layer in plan.layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.contiguous_outputs:
        if name not in modules:
            raise ValueError(f"contiguous_outputs: expected into to have a module {name!r}, got none")
    places = _Places(modules, unique_names(model), plans, taken)
    # All are there, then what went into others, since a swap looks at the factors that it stands for.
    swaps_last = sorted(plan.layers, key=lambda layer: layer.action == "swap")
    for layers, check in ((plan.layers, places.present), (swaps_last, places.check)):
        for layer in layers:
            try:
                check(layer)
            except ValueError as error:
                raise ValueError(f"layer {layer.name!r}: {error}") from error


class _Geometry(NamedTuple):
    """A convolution's or linear layer's numbers, as the plan has them."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Places:
    """A model's modules by name, those with one name alone, the plan of each, and which layers went into which."""

    modules: Mapping[str, nn.Module]
    uniques: Mapping[str, nn.Module]
    plans: Mapping[str, LayerPlan]
    taken: Mapping[str, list[LayerPlan]]

    def inside(self, name: str) -> list[LayerPlan]:
        """The layers that went into a layer, directly or by way of a factor."""
        direct = self.taken.get(name, [])
        return [*direct, *itertools.chain.from_iterable(self.inside(layer.name) for layer in direct)]

    def present(self, layer: LayerPlan) -> None:
        if layer.name not in self.modules:
            raise ValueError(f"expected into to have a {layer.type} there, got no such module")
        if layer.action != "keep" and layer.name not in self.uniques:
            raise ValueError("expected into to have it under one name, got a module with several")

    def check(self, layer: LayerPlan) -> None:
        by_action = {"keep": self.keep, "swap": self.swap, "fold": self.fold, "fuse": self.fuse}
        by_action[layer.action](layer, self.modules[layer.name])

    def keep(self, layer: LayerPlan, module: nn.Module) -> None:
        _check_type(layer, module, (*WEIGHT_LAYERS, nn.modules.batchnorm._BatchNorm))
        if layer.weight_shape is not None:
            got = _weight_shape(module)
            if got is not None and got != layer.weight_shape:
                raise ValueError(f"expected into to have a weight of shape {layer.weight_shape}, got {got}")
        if isinstance(module, WEIGHT_LAYERS):
            self.bias(layer, [getattr(module, "bias", None) is not None])
        if layer.channels_last and not isinstance(module, nn.Conv2d):
            raise ValueError(f"expected channels_last of a Conv2d alone, got {type(module).__name__}")
        if layer.mask_block_shape is not None:
            block_grid(layer.weight_shape or (), layer.mask_block_shape)

    def swap(self, layer: LayerPlan, module: nn.Module) -> None:
        _check_type(layer, module, (nn.Conv2d, nn.Linear, *DROP_IN_LAYERS), may_be=_DROP_INS)
        obstacle = type_obstacle(module)
        if obstacle is not None:
            raise ValueError(f"expected into to have a layer that can be replaced there, but {obstacle}")
        factors = [f for f in self.inside(layer.name) if f.action == "fold" and f.type != "BatchNorm2d"]
        members = [m for f in factors if type(m := self.modules[f.name]) is not nn.Identity]
        expected = _Geometry(layer.weight_shape or (), layer.stride, layer.padding, layer.dilation)
        if members:
            self.chain(layer, expected, [module, *members])
        else:
            got = _geometry(module)
            for name in ("weight_shape", "stride", "padding", "dilation"):
                if getattr(got, name) != getattr(expected, name):
                    raise ValueError(
                        f"expected into to have {name} {getattr(expected, name)} there, got {getattr(got, name)}"
                    )
            self.bias(layer, [module.bias is not None])
        self.epilogue(layer, module)

    def chain(self, layer: LayerPlan, expected: _Geometry, modules: list[nn.Module]) -> None:
        """Thin layers, the first of which stands for all: in some order they are the planned layer."""
        if len(modules) > 3 or any(isinstance(m, DROP_IN_LAYERS) for m in modules):
            raise ValueError(f"expected into to have 2 or 3 factors for it, got {len(modules)} layers")
        for later in itertools.permutations(modules[1:]):
            order = [modules[0], *later]
            merged = _merged(order)
            ranks = tuple(_geometry(m).weight_shape[0] for m in order[:-1])
            if merged is None or merged[1] != expected:
                continue
            if layer.format == "low_rank" and (layer.kind, layer.ranks) != (merged[0], ranks):
                continue
            # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
            self.bias(layer, [m.bias is not None for m in order])  # type: ignore[union-attr]
            return
        raise ValueError(
            f"expected into to have factors of a layer of {expected}, got {[_geometry(m) for m in modules]}"
        )

    def bias(self, layer: LayerPlan, has: list[bool]) -> None:
        """``has``: whether each layer that became this one has a bias; those before the last may have had zeros."""
        batch_norm = any(f.type == "BatchNorm2d" and f.action == "fold" for f in self.inside(layer.name))
        may, must = any(has) or batch_norm, has[-1]
        if layer.bias and not may:
            raise ValueError("expected into to have a bias there, or a batch norm that was folded, got neither")
        if must and not layer.bias:
            raise ValueError("expected into to have no bias there, got one")

    def epilogue(self, layer: LayerPlan, module: nn.Module) -> None:
        fused = sorted(f.type for f in self.taken.get(layer.name, []) if f.action == "fuse")
        expected = {(): "none", ("ReLU",): "relu", ("MaxPool2d", "ReLU"): "relu_maxpool2"}.get(tuple(fused))
        own = module.epilogue if isinstance(module, DROP_IN_LAYERS) and not fused else expected
        if expected is None or layer.epilogue not in (expected, own):
            raise ValueError(f"expected an epilogue of what was fused into it, {fused}, got {layer.epilogue!r}")

    def fold(self, layer: LayerPlan, module: nn.Module) -> None:
        assert layer.into is not None
        if type(module) is nn.Identity:
            return
        target = self.modules.get(layer.into)
        if layer.type == "BatchNorm2d":
            _check_type(layer, module, (nn.BatchNorm2d,))
            if not isinstance(target, (nn.Conv2d, *DROP_IN_LAYERS)) or len(_geometry(target).weight_shape) != 4:
                raise ValueError(f"expected into to have a convolution at {layer.into!r}, which the batch norm follows")
            # Behind a chain it has the channels of the whole, which the plan gives to the first layer.
            whole = self.plans[layer.into].weight_shape or (0,)
            channels = {whole[0], _geometry(target).weight_shape[0]}
            obstacle = batch_norm_obstacle(module, next((c for c in channels if c == module.num_features), whole[0]))
        else:
            _check_type(layer, module, (nn.Conv2d, nn.Linear))
            obstacle = type_obstacle(module)
        if obstacle is not None:
            raise ValueError(f"expected into to have a {layer.type} that can be folded there, but {obstacle}")

    def fuse(self, layer: LayerPlan, module: nn.Module) -> None:
        if type(module) is nn.Identity:
            return
        _check_type(layer, module, (nn.ReLU, nn.MaxPool2d))
        if isinstance(module, nn.MaxPool2d) and not is_pool2(module):
            raise ValueError(f"expected into to have a 2x2 max-pool of stride 2 there, got {module}")


def _check_type(
    layer: LayerPlan, module: nn.Module, kinds: tuple[type, ...], may_be: frozenset[str] = frozenset()
) -> None:
    """The module is what the plan says and of a kind that conversion takes; ``may_be``: a converted model's layers."""
    kind = parametrized_type(module).__name__
    if kind != layer.type and not {kind, layer.type} & may_be:
        raise ValueError(f"expected into to have a {layer.type} there, got {kind}")
    if not isinstance(module, kinds):
        raise ValueError(f"expected into to have a {' or '.join(k.__name__ for k in kinds)} there, got {kind}")


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return None
    return tuple(weight.shape)


def _geometry(module: Any) -> _Geometry:
    """Of a layer without a `type_obstacle`, or a kept convolution whose weight shape alone is wanted."""
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        return _Geometry(_weight_shape(module) or (module.out_features, module.in_features))
    shape = _weight_shape(module) or (module.out_channels, module.in_channels, *module.kernel_size)
    padding = _pair(module.padding) if type_obstacle(module) is not None else resolved_padding(module)
    return _Geometry(shape, _pair(module.stride), padding, _pair(module.dilation))


def _merged(modules: list[nn.Module]) -> tuple[str, _Geometry] | None:
    """``(kind, geometry)`` of the layer that a chain of layers amounts to; None where they are none."""
    layers = []
    for geometry in map(_geometry, modules):
        weight = torch.empty(geometry.weight_shape, device="meta")
        conv = weight.dim() == 4
        # For mypy: tuples have the right length, which their types do not say.
        layers.append(LayerWeight(weight, None, *(geometry[1:] if conv else ())))  # type: ignore[arg-type]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    if len({len(shape) for shape in shapes}) != 1 or any(a[0] != b[1] for a, b in itertools.pairwise(shapes)):
        return None
    found = merged_geometry(layers)
    if found is None:
        return None
    kind, stride, padding, dilation = found
    if len(shapes[0]) == 2:
        return kind, _Geometry((shapes[-1][0], shapes[0][1]))
    kernel = (max(shape[i] for shape in shapes) for i in (2, 3))
    return kind, _Geometry((shapes[-1][0], shapes[0][1], *kernel), stride, padding, dilation)


# File and model


def check_state(
    model: nn.Module, plan: ModelPlan, tensors: Mapping[str, Tensor], extra_state: Mapping[str, Any]
) -> None:
    """Raises ValueError where the file does not hold exactly the state that the model will have; the name is given.

    Args:
        model: a prepared copy of ``into`` for which `check_places` holds; nothing is put into it yet.
        plan: of the file.
        tensors: of the file. On the meta device, while they are still coded, shapes and dtypes alone are compared.
        extra_state: of the file.
    """
    expected, swapped = _expected_state(model, plan)
    got, names = {*tensors, *extra_state}, {*expected, *swapped}
    missing, unexpected = sorted(names - got), sorted(got - names)
    if missing:
        raise ValueError(f"expected tensor {missing[0]!r} of into in the file, got none")
    if unexpected:
        raise ValueError(f"expected into to have tensor {unexpected[0]!r} of the file, got none")
    for name in extra_state:
        if name in tensors or name.rpartition(".")[2] != _EXTRA_STATE:
            raise ValueError(f"expected extra_state of what is no tensor, got {name!r}")
    holders: dict[int, str] = {}
    for name, own in expected.items():
        if name.rpartition(".")[2] == _EXTRA_STATE:
            continue  # a module's own business, a tensor or not
        if isinstance(own, nn.UninitializedParameter):
            raise ValueError(f"expected into to have tensor {name!r}, got one without a shape yet")
        value = tensors[name]
        if tuple(own.shape) != tuple(value.shape):
            raise ValueError(
                f"expected tensor {name!r} of shape {tuple(own.shape)} as in into, got {tuple(value.shape)}"
            )
        if own.dtype != value.dtype and not (own.is_floating_point() and value.is_floating_point()):
            raise ValueError(f"expected tensor {name!r} of dtype {own.dtype} as in into, got {value.dtype}")
        first = holders.setdefault(id(own), name)
        if first != name and not value.is_meta and not _same_bytes(value, tensors[first]):
            raise ValueError(f"expected tensors {first!r} and {name!r}, which are one in into, to be equal in the file")


def _expected_state(model: nn.Module, plan: ModelPlan) -> tuple[dict[str, Tensor], set[str]]:
    """The state that stays or is added, and the names that swapped layers will have."""
    replaced = {layer.name for layer in plan.layers if layer.action != "keep"}
    state = model.state_dict(keep_vars=True)
    expected = {name: value for name, value in state.items() if replaced.isdisjoint(ancestors(name))}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state and replaced.isdisjoint(ancestors(name)):
            raise ValueError(f"expected into off the meta device, since {name!r} is a buffer that no file holds")
    for layer in plan.layers:
        if layer.action != "keep":
            continue
        module = model.get_submodule(layer.name)
        if adds_bias(layer, module):
            # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
            expected[_key(layer, "bias")] = torch.empty(bias_size(module), dtype=module.weight.dtype, device="meta")  # type: ignore[arg-type]
        if adds_mask(layer, module, training=plan.training):
            weight = expected.pop(_key(layer, "weight"))
            grid = block_grid(tuple(weight.shape), layer.mask_block_shape or ())
            prefix = _key(layer, "parametrizations.weight")
            expected[f"{prefix}.original"] = weight
            expected[f"{prefix}.0.mask"] = torch.empty(grid, dtype=torch.bool, device="meta")
            expected[f"{prefix}.0.{_EXTRA_STATE}"] = weight
    swapped = {_key(layer, n) for layer in plan.layers if layer.action == "swap" for n in swapped_names(layer)}
    return expected, swapped


def adds_bias(layer: LayerPlan, module: nn.Module) -> bool:
    """Whether a kept layer has a bias only since a batch norm was folded into it."""
    readable = isinstance(getattr(module, "weight", None), Tensor)
    return layer.action == "keep" and layer.bias and getattr(module, "bias", None) is None and readable


def adds_mask(layer: LayerPlan, module: nn.Module, *, training: bool) -> bool:
    """Whether a kept layer gets the training mask that the file holds for it."""
    masked = layer.mask_block_shape is not None and not parametrize.is_parametrized(module, "weight")
    return masked and training and isinstance(getattr(module, "weight", None), Tensor)


def bias_size(module: nn.Module) -> int:
    """Entries of a layer's bias."""
    # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
    return int(getattr(module, "out_channels", module.weight.shape[0]))  # type: ignore[arg-type, index, union-attr]


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
