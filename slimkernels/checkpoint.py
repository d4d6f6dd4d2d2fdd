"""`save` and `load`: a converted model's tensors and plan in one safetensors file, and back into the architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.builders import builder_text, built_on_meta
from slimkernels.conversion import compact, container, placement
from slimkernels.conversion.compact_index import VALUES
from slimkernels.conversion.container import Contents
from slimkernels.conversion.finish import finish
from slimkernels.conversion.graph import replace_module
from slimkernels.conversion.hub import PRETRAINED_NAMES, has_from_pretrained
from slimkernels.conversion.layers import dense_module
from slimkernels.conversion.placement import adds_bias, adds_mask, bias_size
from slimkernels.conversion.plan import LayerPlan, ModelPlan
from slimkernels.conversion.units import PLAN_ATTRIBUTE, drop_in_plan, prepare
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.dispatch.select import resolve
from slimkernels.formats import BlockMask, block_grid
from slimkernels.kernels.problems import Request
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, FusedConv2d, LowRankConv2d, LowRankLinear

_DROP_IN = {
    ("bsr", True): BlockSparseConv2d,
    ("bsr", False): BlockSparseLinear,
    ("low_rank", True): LowRankConv2d,
    ("low_rank", False): LowRankLinear,
    ("fused", True): FusedConv2d,
    ("dense", True): nn.Conv2d,
    ("dense", False): nn.Linear,
}

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Bytes of all tensors for each byte of a file that says itself how large its model is. Weights of which 99.9% are zeros
# come to a third of it; without a limit, a file of a few bytes could fill any memory with them.
_MOST_PER_BYTE = 1024


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    values: str = "fp32",
    builder: Mapping[str, Any] | None = None,
) -> None:
    """Writes a converted model: tensors, the `ModelPlan` and a SHA-256 of what is stored, no pickle.

    The file appears under its name when it is complete; an interrupted call leaves what was there before. The hashes
    let `load` see accidents (a bad disk, a broken download), not attacks: they are no signature.

    With other ``values`` than ``fp32`` the file is compact. Weights, those of dense layers too, are rounded to
    bfloat16, or to integers in [-127, 127] (``int8``) or [-7, 7] (``int4``) with a scale for each output channel, the
    scale that leaves the least error. Other floating point is kept in 16 bits. Values and block patterns are entropy
    coded. `quantize_` rounds the model in memory alike, and `explain` of the file says how near it is to the bound.
    The same model gives the same bytes.

    Args:
        model: from `convert` or `load`, possibly trained since. Of a wrapper (DataParallel, AveragedModel,
            `torch.compile`) the model inside is saved.
        path: by convention ``*.slim.safetensors``.
        values: ``fp32``, which writes every tensor as it is, ``bf16``, ``int8`` or ``int4``.
        builder: how `slimkernels.models.build` makes the architecture, so that ``load(path)`` needs no ``into``:
            ``{"model": "vgg19_cifar", "num_classes": 10, "options": {"width": 0.5}}``, the last two as needed. By
            default what the model was loaded with.

    Raises:
        TypeError: not a module; a tensor or an extra state that the format cannot hold.
        ValueError: the model was not converted, or a swapped layer was replaced or changed since; unknown ``values``,
            or a weight that cannot be rounded.
        ImportError: compact files need the extra ``slimkernels[compact]``.
        OSError: the path cannot be written.
    """
    model, plan = _converted("save", model, values)
    if Path(path).name in PRETRAINED_NAMES and has_from_pretrained(model):
        raise ValueError(f"save: expected a name that from_pretrained does not read as plain weights, got {path}")
    state = model.state_dict()
    try:
        plan = replace(plan, layers=tuple(_present(model, layer) for layer in plan.layers))
        placement.check_tensors(plan, state)
    except ValueError as error:
        raise ValueError(f"save: {error}") from error
    if builder is not None:
        plan = replace(plan, builder=builder_text(builder))
    container.write(path, plan, state, values, _weights(model))


def quantize_(model: nn.Module, values: str) -> nn.Module:
    """Rounds a converted model in place as ``save(model, path, values=values)`` would write it.

    Its outputs are then those of the model that is loaded from the file, so accuracy can be measured before anything is
    written. A second call changes nothing.

    Args:
        model: from `convert` or `load`.
        values: ``bf16``, ``int8`` or ``int4``; ``fp32`` leaves the model as it is.

    Returns:
        The same model.

    Raises:
        TypeError: not a module; a tensor that no file holds.
        ValueError: the model was not converted; unknown ``values``; a weight that is not finite.
    """
    model, plan = _converted("quantize_", model, values)
    if values != "fp32":
        state = model.state_dict()
        try:
            tensors = compact.rounded(plan, state, _weights(model), values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize_: {error}") from error
        model.load_state_dict({**state, **tensors})
    return model


def _converted(where: str, model: nn.Module, values: str) -> tuple[nn.Module, ModelPlan]:
    """The model inside of any wrapper, and its plan."""
    model = unwrapped(where, model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected an nn.Module, got {type(model).__name__}")
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not isinstance(plan, ModelPlan):
        raise ValueError(f"{where}: expected a model from slimkernels.convert, got a plain {type(model).__name__}")
    if values not in VALUES:
        raise ValueError(f"{where}: expected values in {', '.join(VALUES)}, got {values!r}")
    return model, plan


def _weights(model: nn.Module) -> set[str]:
    """Names of what is rounded: parameters, not buffers."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


# Of a swapped layer: what `load` builds it from. Its dtype may have changed since, by ``model.half()``.
_FIXED = ("weight_shape", "block_shape", "kind", "ranks", "bias", "stride", "padding", "dilation", "epilogue")


def _present(model: nn.Module, layer: LayerPlan) -> LayerPlan:
    """The plan of a layer with its present dtype. Raises ValueError where the layer is no longer that of its plan."""
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        raise ValueError(f"expected the model to have {layer.name!r}, as in its plan, got no such module") from None
    expected = nn.Identity if layer.action in ("fold", "fuse") else type(module)
    if layer.action == "swap":
        expected = _DROP_IN[layer.format or "", len(layer.weight_shape or ()) == 4]
    if not isinstance(module, expected):
        got = type(module).__name__
        raise ValueError(f"expected {layer.name} to be the {expected.__name__} of its plan, got {got}")
    if layer.action == "swap":
        now = drop_in_plan(layer.name, module, layer.reason)
        for name in _FIXED:
            if getattr(now, name) != getattr(layer, name):
                words = f"{name} {getattr(layer, name)} of its plan, got {getattr(now, name)}"
                raise ValueError(f"expected {layer.name} to have {words}")
        return replace(layer, dtype=now.dtype)
    weight = getattr(module, "weight", None)
    if layer.dtype is None or not isinstance(weight, Tensor):
        return layer
    return replace(layer, dtype=str(weight.dtype).removeprefix("torch."))


@torch.inference_mode(False)  # as `convert`
def load(path: str | os.PathLike[str], into: nn.Module | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a file, in a copy of ``into``.

    Everything is checked before anything is built: the file's structure and version, a SHA-256 of the plan and of every
    tensor, dtypes, shapes, block patterns, and that ``into`` has the layers of the plan with the same geometry. Until
    then the memory asked for is a small multiple of the file's size; a compact file is decoded when the shapes that it
    claims are known to be those of ``into``. Kernels are those of this device; dtypes are those of the saved model,
    also where the file holds its values in fewer bits.

    The hashes guard against accidents. Against an attacker they do not: whoever can write the file can write its
    hashes, and with them any weights. Yet a file from anyone is safe to load: it holds no code, none is run, and no
    number in it reaches a kernel unchecked. (A module of ``into`` with a ``set_extra_state`` of its own is given what
    the file holds for it, as JSON.) Where it matters who made the weights, compare the whole file with a hash from a
    source that you trust.

    Args:
        path: from `save`.
        into: a model of the architecture that was converted (fresh, trained, masked or converted, on any device); it
            stays untouched. A model on the meta device is filled on the CPU, a wrapper is taken off. May be left out
            where the file names a model of `slimkernels.models` (see `save`).
        dtype: of all floating-point tensors instead, such as ``torch.bfloat16``.

    Returns:
        The converted model, in eval mode unless it was converted with ``training=True``.

    Raises:
        ValueError: the file is damaged, ``into`` is missing or of another architecture; file and field are named.
        TypeError: ``into`` is no module, ``dtype`` no floating-point dtype. OSError: no such file.
        ImportError: a compact file, which needs the extra ``slimkernels[compact]``.
    """
    into = unwrapped("load", into)
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(f"load: expected into to be an nn.Module, got {type(into).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"load: expected dtype to be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    contents = container.read(path)
    plan, given = contents.plan, into is not None
    if into is None and plan.builder is not None:
        with _naming(path):
            into = built_on_meta(plan.builder)
    if into is None:
        raise ValueError(
            "load: expected into=<a model of the architecture that was converted>, such as into=vgg19(); "
            f"{path} holds weights and a plan of {len(plan.layers)} layers, no code, and names no model of "
            "slimkernels.models (save(..., builder=...) writes such a name)"
        )
    with _naming(path):
        placement.check_tensors(plan, contents.tensors)
        placement.check_places(plan, into)
        model = prepare(into, training=plan.training)
        placement.check_state(model, plan, contents.tensors, contents.extra_state)
        if contents.index is not None:
            contents.index.check_sizes(None if given else _MOST_PER_BYTE * contents.nbytes)
            contents = contents.decoded()
            placement.check_tensors(plan, contents.tensors)
            placement.check_state(model, plan, contents.tensors, contents.extra_state)
    if dtype is not None:
        contents = _in_dtype(contents, dtype)
        plan = contents.plan
    devices = {t.device for t in model.parameters()}
    device = next(iter(devices)) if devices else torch.device("cpu")
    if device.type == "meta":
        model, device = model.to_empty(device="cpu"), torch.device("cpu")
    for layer in plan.layers:
        _replay(model, layer, contents.tensors, plan, device)
    with _naming(path):
        _fill(model, contents)
    return finish(model, plan)


def _in_dtype(contents: Contents, dtype: torch.dtype) -> Contents:
    """With all floating point in another dtype, in the plan as well."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in contents.tensors.items()}
    word = str(dtype).removeprefix("torch.")
    layers = tuple(layer if layer.dtype is None else replace(layer, dtype=word) for layer in contents.plan.layers)
    return replace(contents, tensors=tensors, plan=replace(contents.plan, layers=layers))


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name in front of what a check says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error


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
        if adds_bias(layer, module):
            assert isinstance(weight, Tensor)
            module.bias = nn.Parameter(torch.zeros(bias_size(module), dtype=weight.dtype, device=weight.device))
        if layer.channels_last and isinstance(weight, nn.Parameter):
            module.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
        if adds_mask(layer, module, training=plan.training):
            assert isinstance(weight, Tensor) and layer.mask_block_shape is not None
            mask = torch.ones(block_grid(weight.shape, layer.mask_block_shape), dtype=torch.bool, device=weight.device)
            parametrize.register_parametrization(
                module, "weight", BlockMask(mask, weight.shape, layer.mask_block_shape)
            )


def _empty(layer: LayerPlan, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The swapped module with the pattern of the file and no values."""
    shape = layer.weight_shape
    assert shape is not None and layer.dtype is not None
    dtype = getattr(torch, layer.dtype)
    conv = len(shape) == 4
    geometry = (shape[2:], layer.stride, layer.padding, layer.dilation) if conv else ()
    common = {"device": device, "dtype": dtype}
    if layer.format == "dense":
        # For mypy: tuples have the right length, which their types do not say.
        module = dense_module(shape, layer.bias, *(geometry[1:] or ((1, 1), (0, 0), (1, 1))))  # type: ignore[arg-type]
        module = module.to(dtype).to_empty(device=device)
        return module.to(memory_format=torch.channels_last) if layer.channels_last else module
    kernel = _kernel(layer, dtype, device)
    cls: Any = _DROP_IN[layer.format or "", conv]
    common |= {"epilogue": layer.epilogue, "kernel": kernel}
    if layer.format == "bsr":
        indices = {k: tensors[f"{layer.name}.{k}"].clone() for k in ("crow_indices", "col_indices")}
        return cls(shape[1], shape[0], *geometry, layer.bias, block_shape=layer.block_shape, **indices, **common)
    if layer.format == "fused":
        return cls(shape[1], shape[0], *geometry, layer.bias, **common)
    if conv:
        return cls(shape[1], shape[0], *geometry, layer.bias, kind=layer.kind, ranks=layer.ranks, **common)
    assert layer.ranks is not None
    return cls(shape[1], shape[0], layer.ranks[0], layer.bias, **common)


def _kernel(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that the model was tied to where it runs here, else ``auto``."""
    if not layer.tied or layer.kernel is None:
        return "auto"
    op = f"{layer.format}_{'conv2d' if len(layer.weight_shape or ()) == 4 else 'linear'}"
    try:
        resolve(layer.kernel, Request(op, dtype, device.type, layer.block_shape or (1, 1), layer.epilogue))
    except ValueError:
        return "auto"
    return layer.kernel


def _fill(model: nn.Module, contents: Contents) -> None:
    """Loads every tensor of the file. Raises ValueError where a module refuses its state."""
    with torch.no_grad():
        _cast(model, contents.tensors)
        try:
            model.load_state_dict({**contents.tensors, **contents.extra_state}, strict=True)
        except Exception as error:  # modules of the model read their own extra state here
            raise ValueError(f"expected a state that into takes, got {type(error).__name__}: {error}") from error


def _cast(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter and buffer the dtype that it has in the file; what is shared stays shared."""
    done: dict[int, Any] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                saved = tensors.get(f"{prefix}.{key}" if prefix else key)
                if value is None or saved is None or saved.dtype == value.dtype:
                    continue
                if id(value) not in done:
                    cast = value.detach().to(saved.dtype)
                    parameter = store is module._parameters
                    done[id(value)] = value, nn.Parameter(cast, value.requires_grad) if parameter else cast
                store[key] = done[id(value)][1]
