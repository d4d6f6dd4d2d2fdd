"""Weights of named models on disk: what the commands hand to each other between training and conversion.

A file is a plain state_dict, as safetensors (written here) or as torch's zip read without pickled code. Files written
here carry the model's name, its number of classes and its low-rank layers, so the next command needs no flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import models
from slimkernels.conversion.container import FORMAT as CONVERTED_FORMAT
from slimkernels.files import atomic_path
from slimkernels.nn import LowRankConv2d, LowRankLinear
from slimkernels.nn.attributes import conv_geometry

_HEADER_KEY = "slimkernels.weights"


@dataclass(frozen=True)
class Description:
    """What a weight file says about itself: model, classes, layers that were factorized (name -> [kind, ranks])."""

    model: str | None = None
    num_classes: int | None = None
    low_rank: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def write_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str,
    num_classes: int,
    options: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model's state_dict as safetensors, atomically, with its description in the header.

    Args:
        model: masks must have been baked in (`finalize_`).
        name: of the model, as `models.build` takes it.
        options: the keyword arguments of `models.build` that it was built with.
        notes: further JSON-able facts, such as the accuracy.

    Raises:
        ValueError: a state that is not tensors alone.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    state = model.state_dict()
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"write_weights: expected a state_dict of tensors, got {foreign[0]!r}; finalize_ first")
    low_rank = {
        layer: [module.kind, list(module.ranks)] if isinstance(module, LowRankConv2d) else ["svd", [module.rank]]
        for layer, module in model.named_modules()
        if isinstance(module, (LowRankConv2d, LowRankLinear))
    }
    header = {"model": name, "num_classes": num_classes, "low_rank": low_rank, "notes": dict(notes or {})}
    header["options"] = dict(options or {})
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with atomic_path(path) as temporary:
        # Not save_file, whose failures on a full disk are no OSError.
        temporary.write_bytes(save(tensors, metadata={_HEADER_KEY: json.dumps(header)}))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Description]:
    """The state_dict in a ``.safetensors`` or torch file, and its description (empty unless `write_weights` wrote it).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither, is damaged, or holds a converted model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: expected a file, got {path}, which does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged zips, foreign pickles and text files raise a dozen types
        raise ValueError(f"read_weights: expected a state_dict, got the unreadable {path}: {_first(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"read_weights: expected a state_dict of tensors in {path}, got {type(state).__name__}")
    return {key.removeprefix("module."): value for key, value in state.items()}, Description()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Description]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    except SafetensorError as error:
        raise ValueError(f"read_weights: expected safetensors, got the damaged {path}: {_first(error)}") from error
    if metadata.get("format") == CONVERTED_FORMAT:
        raise ValueError(
            f"read_weights: expected weights of an unconverted model, got {path}, a converted one (slimkernels.load)"
        )
    try:
        header = json.loads(metadata.get(_HEADER_KEY, "{}"))
        low_rank = {name: (kind, tuple(ranks)) for name, (kind, ranks) in header.get("low_rank", {}).items()}
        facts = (dict(header.get(key, {})) for key in ("notes", "options"))
        return state, Description(header.get("model"), header.get("num_classes"), low_rank, *facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"read_weights: expected JSON under {_HEADER_KEY!r} in {path}, got {_first(error)}") from error


def load_model(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, str, int, Description]:
    """The model whose weights lie in ``path``, in eval mode on the CPU, with its name, number of classes, description.

    Args:
        name: needed where the file does not say; else it must agree.
        num_classes: likewise; without either, 10 for this package's models and 1000 for torchvision's.
        options: keywords of the model, where the file does not carry them; else they must agree.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`, and where name, classes or tensors do not fit.
    """
    state, description = read_weights(path)
    if name is None and description.model is None:
        raise ValueError(f"load_model: expected a model name, since {path} does not carry one")
    if name is not None and description.model not in (None, name):
        raise ValueError(f"load_model: expected model {description.model!r} as {path} says, got {name!r}")
    if num_classes is not None and description.num_classes not in (None, num_classes):
        raise ValueError(f"load_model: expected {description.num_classes} classes as {path} says, got {num_classes}")
    if options and description.options and dict(options) != dict(description.options):
        raise ValueError(
            f"load_model: expected options {dict(description.options)} as {path} says, got {dict(options)}"
        )
    name = name or description.model
    assert name is not None
    classes = num_classes or description.num_classes or models.default_classes(name)
    model = models.build(name, num_classes=classes, **(description.options or options or {}))
    for layer, (kind, ranks) in description.low_rank.items():
        _make_low_rank(model, layer, kind, ranks, path)
    _check_fit(model, state, name, path)
    model.load_state_dict(state)
    return model.eval(), name, classes, description


def _make_low_rank(model: nn.Module, layer: str, kind: str, ranks: tuple[int, ...], path: str | Path) -> None:
    """Replaces a dense layer by an empty low-rank one of the given ranks."""
    parent_name, _, child = layer.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        dense = parent.get_submodule(child)
    except AttributeError as error:
        raise ValueError(f"load_model: {path} names a low-rank layer {layer!r} that the model does not have") from error
    twin: nn.Module
    if isinstance(dense, nn.Linear):
        twin = LowRankLinear(dense.in_features, dense.out_features, ranks[0], bias=dense.bias is not None)
    elif isinstance(dense, nn.Conv2d):
        twin = LowRankConv2d(
            dense.in_channels,
            dense.out_channels,
            *conv_geometry(dense),
            dense.bias is not None,
            kind=kind,
            ranks=ranks,
        )
    else:
        raise ValueError(f"load_model: {path} names a low-rank layer {layer!r}, which is a {type(dense).__name__}")
    setattr(parent, child, twin)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], name: str, path: str | Path) -> None:
    expected = model.state_dict()
    problems = [f"missing {key!r}" for key in expected if key not in state]
    problems += [f"unknown {key!r}" for key in state if key not in expected]
    problems += [
        f"{key!r} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise ValueError(f"load_model: expected weights of {name} in {path}, got {problems[0]}{more}")


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
