"""`save` and `load`: a converted model's tensors and plan in one safetensors file, and back into the architecture."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.conversion import container
from slimkernels.conversion.container import Contents
from slimkernels.conversion.convert_model import finish
from slimkernels.conversion.graph import parametrized_type, replace_module
from slimkernels.conversion.layers import dense_module
from slimkernels.conversion.plan import LayerPlan, ModelPlan
from slimkernels.conversion.units import PLAN_ATTRIBUTE, prepare
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.formats import BlockMask, BSRWeight, LowRankWeight, block_grid, weight_shape_4d
from slimkernels.kernels.problems import Request
from slimkernels.kernels.select import resolve
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear

_DROP_IN = {
    ("bsr", True): BlockSparseConv2d,
    ("bsr", False): BlockSparseLinear,
    ("low_rank", True): LowRankConv2d,
    ("low_rank", False): LowRankLinear,
    ("dense", True): nn.Conv2d,
    ("dense", False): nn.Linear,
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a converted model: tensors, the `ModelPlan` and a SHA-256 of each, no pickle.

    The file appears under its name when it is complete; an interrupted call leaves what was there before.

    Args:
        model: from `convert` or `load`, possibly trained since. Of a wrapper (DataParallel, AveragedModel,
            `torch.compile`) the model inside is saved.
        path: by convention ``*.slim.safetensors``.

    Raises:
        TypeError: not a module; a tensor or an extra state that the format cannot hold.
        ValueError: the model was not converted, or a swapped layer was replaced since.
        OSError: the path cannot be written.
    """
    model = unwrapped("save", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: expected an nn.Module, got {type(model).__name__}")
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not isinstance(plan, ModelPlan):
        raise ValueError(f"save: expected a model from slimkernels.convert, got a plain {type(model).__name__}")
    for layer in plan.layers:
        if layer.action == "swap":
            module = model.get_submodule(layer.name)
            expected = _DROP_IN[layer.format or "", len(layer.weight_shape or ()) == 4]
            if not isinstance(module, expected):
                got = type(module).__name__
                raise ValueError(f"save: expected {layer.name} to be the {expected.__name__} of its plan, got {got}")
    container.write(path, plan, model.state_dict())


@torch.inference_mode(False)  # as `convert`
def load(path: str | os.PathLike[str], into: nn.Module | None = None) -> nn.Module:
    """The model of a file, in a copy of ``into``.

    Everything is checked before anything is built: the file's structure and version, a SHA-256 of the plan and of every
    tensor, shapes, block patterns, and that ``into`` has the layers of the plan. Kernels are those of this device.

    Args:
        path: from `save`.
        into: a model of the architecture that was converted (fresh, trained, masked or converted, on any device); it
            stays untouched. A model on the meta device is filled on the CPU, a wrapper is taken off.

    Returns:
        The converted model, in eval mode unless it was converted with ``training=True``.

    Raises:
        ValueError: the file is damaged (the field at fault is named), ``into`` is missing or of another architecture.
        TypeError: ``into`` is no module. OSError: no such file.
    """
    into = unwrapped("load", into)
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(f"load: expected into to be an nn.Module, got {type(into).__name__}")
    contents = container.read(path)
    plan = contents.plan
    if into is None:
        raise ValueError(
            "load: expected into=<a model of the architecture that was converted>, such as into=vgg19(); "
            f"{path} holds weights and a plan of {len(plan.layers)} layers, no code"
        )
    tensors = dict(contents.tensors)
    for layer in plan.layers:
        if layer.action == "swap":
            _check_tensors(layer, tensors)
    model = prepare(into, training=plan.training)
    devices = {t.device for t in model.parameters()}
    device = next(iter(devices)) if devices else torch.device("cpu")
    if device.type == "meta":
        model, device = model.to_empty(device="cpu"), torch.device("cpu")
    for layer in plan.layers:
        _check_place(model, layer)
    for layer in plan.layers:
        _replay(model, layer, tensors, plan, device)
    _fill(model, contents)
    return finish(model, plan)


def _tensor(layer: LayerPlan, tensors: dict[str, Tensor], key: str, shape: tuple[int, ...] | None = None) -> Tensor:
    name = f"{layer.name}.{key}" if layer.name else key
    if name not in tensors:
        raise ValueError(f"load: expected tensor {name!r} of the plan, got none")
    tensor = tensors[name]
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"load: expected tensor {name!r} of shape {shape}, got {tuple(tensor.shape)}")
    return tensor


def _check_tensors(layer: LayerPlan, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where the tensors of a swapped layer do not fit its plan; the layer is named."""
    shape = layer.weight_shape
    assert shape is not None
    if layer.bias:
        _tensor(layer, tensors, "bias", shape[:1])
    try:
        if layer.format == "bsr":
            assert layer.block_shape is not None
            values, crow, col = (_tensor(layer, tensors, k) for k in ("values", "crow_indices", "col_indices"))
            block_grid(shape, layer.block_shape)
            BSRWeight(values, crow, col, weight_shape_4d(shape), layer.block_shape).validate()
        elif layer.format == "low_rank":
            factors = _factors(layer, tensors)
            LowRankWeight(layer.kind or "", factors).validate()
            if (factors[-1].shape[0], factors[0].shape[1]) != tuple(shape[:2]):
                raise ValueError(f"expected factors from {shape[1]} to {shape[0]} channels")
        else:
            _tensor(layer, tensors, "weight", shape)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith("load: ") else f"load: layer {layer.name!r}: {text}") from error


def _factors(layer: LayerPlan, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    if len(layer.weight_shape or ()) == 2:
        return _tensor(layer, tensors, "V"), _tensor(layer, tensors, "U")
    count = len(layer.ranks or ()) + 1
    return tuple(_tensor(layer, tensors, f"factors.{i}") for i in range(count))


def _check_place(model: nn.Module, layer: LayerPlan) -> None:
    """Raises ValueError where the architecture has not the module that the plan was made from."""
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        raise ValueError(f"load: expected into to have a {layer.type} at {layer.name!r}, got no such module") from None
    kind = parametrized_type(module).__name__
    already = {"BlockSparseConv2d", "BlockSparseLinear", "LowRankConv2d", "LowRankLinear"}
    if layer.action in ("fold", "fuse"):
        already |= {"Identity"}
    if kind != layer.type and kind not in already and layer.type not in already:
        raise ValueError(f"load: expected into to have a {layer.type} at {layer.name!r}, got {kind}")
    weight = getattr(module, "weight", None)
    one_to_one = layer.format == "bsr" or layer.action == "keep"
    if not one_to_one or layer.weight_shape is None or not isinstance(weight, Tensor):
        return
    if tuple(weight.shape) != layer.weight_shape:
        raise ValueError(
            f"load: expected into to have a weight of shape {layer.weight_shape} at {layer.name!r}, "
            f"got {tuple(weight.shape)}"
        )


def _replay(
    model: nn.Module, layer: LayerPlan, tensors: dict[str, Tensor], plan: ModelPlan, device: torch.device
) -> None:
    """Puts the plan's module in the layer's place, still without its values."""
    module = model.get_submodule(layer.name)
    if layer.action in ("fold", "fuse"):
        replace_module(model, layer.name, nn.Identity())
    elif layer.action == "swap":
        new = _empty(layer, tensors, device)
        replace_module(model, layer.name, new.requires_grad_(plan.training).train(plan.training))
    else:
        weight = getattr(module, "weight", None)
        if layer.bias and getattr(module, "bias", None) is None and isinstance(weight, Tensor):
            module.bias = nn.Parameter(
                torch.zeros(_bias_size(module, weight), dtype=weight.dtype, device=weight.device)
            )
        if layer.channels_last and isinstance(weight, nn.Parameter):
            module.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
        masked = layer.mask_block_shape is not None and not parametrize.is_parametrized(module, "weight")
        if masked and plan.training and isinstance(weight, Tensor) and layer.mask_block_shape is not None:
            grid = block_grid(weight.shape, layer.mask_block_shape)
            mask = torch.ones(grid, dtype=torch.bool, device=weight.device)
            parametrize.register_parametrization(
                module, "weight", BlockMask(mask, weight.shape, layer.mask_block_shape)
            )


def _bias_size(module: nn.Module, weight: Tensor) -> int:
    return int(getattr(module, "out_channels", weight.shape[0]))


def _empty(layer: LayerPlan, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The swapped module with the pattern of the file and no values."""
    shape = layer.weight_shape
    assert shape is not None and layer.dtype is not None
    dtype = getattr(torch, layer.dtype)
    conv = len(shape) == 4
    geometry = (shape[2:], layer.stride, layer.padding, layer.dilation) if conv else ()
    common = {"device": device, "dtype": dtype}
    if layer.format == "dense":
        module = dense_module(shape, layer.bias, *(geometry[1:] or ((1, 1), (0, 0), (1, 1))))  # type: ignore[arg-type]
        module = module.to(dtype).to_empty(device=device)
        return module.to(memory_format=torch.channels_last) if layer.channels_last else module
    kernel = _kernel(layer, dtype, device)
    cls: Any = _DROP_IN[layer.format or "", conv]
    common |= {"epilogue": layer.epilogue, "kernel": kernel}
    if layer.format == "bsr":
        indices = {k: _tensor(layer, tensors, k).clone() for k in ("crow_indices", "col_indices")}
        return cls(shape[1], shape[0], *geometry, layer.bias, block_shape=layer.block_shape, **indices, **common)
    if conv:
        return cls(shape[1], shape[0], *geometry, layer.bias, kind=layer.kind, ranks=layer.ranks, **common)
    assert layer.ranks is not None
    return cls(shape[1], shape[0], layer.ranks[0], layer.bias, **common)


def _kernel(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that the model was tied to where it runs here, else ``auto``."""
    if not layer.tied or layer.kernel is None:
        return "auto"
    op = {"bsr": "bsr", "low_rank": "low_rank"}[layer.format or ""] + (
        "_conv2d" if len(layer.weight_shape or ()) == 4 else "_linear"
    )
    try:
        resolve(layer.kernel, Request(op, dtype, device.type, layer.block_shape or (1, 1), layer.epilogue))
    except ValueError:
        return "auto"
    return layer.kernel


def _fill(model: nn.Module, contents: Contents) -> None:
    """Loads every tensor of the file. Raises ValueError where names or shapes differ."""
    expected = model.state_dict()
    got = {**contents.tensors, **contents.extra_state}
    missing, unexpected = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing:
        raise ValueError(f"load: expected tensor {missing[0]!r} of into in the file, got none")
    if unexpected:
        raise ValueError(f"load: expected into to have tensor {unexpected[0]!r} of the file, got none")
    with torch.no_grad():
        for name, value in contents.tensors.items():
            if tuple(expected[name].shape) != tuple(value.shape):
                shape = tuple(expected[name].shape)
                raise ValueError(
                    f"load: expected tensor {name!r} of shape {shape} as in into, got {tuple(value.shape)}"
                )
        _cast(model, contents.tensors)
        model.load_state_dict(got, strict=True)


def _cast(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter and buffer the dtype that it has in the file."""
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                saved = tensors.get(f"{prefix}.{key}" if prefix else key)
                if value is None or saved is None or saved.dtype == value.dtype:
                    continue
                cast = value.detach().to(saved.dtype)
                store[key] = (
                    nn.Parameter(cast, requires_grad=value.requires_grad) if store is module._parameters else cast
                )  # type: ignore[assignment]
