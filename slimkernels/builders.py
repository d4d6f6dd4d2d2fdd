"""How a file names the architecture of a packaged model, and that architecture without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimkernels import models

_PARTS = ("model", "num_classes", "options")
# What would fetch or read files while a model is built.
_FORBIDDEN = ("weights", "progress")


def builder_text(builder: Mapping[str, Any]) -> str:
    """The JSON text of ``{"model": name, "num_classes": n, "options": {...}}``, the last two as needed.

    Raises:
        ValueError: another part or value, named, or a model that `slimkernels.models.build` does not make.
    """
    text = json.dumps({key: value for key, value in builder.items() if value is not None})
    built_on_meta(text)
    return text


def built_on_meta(text: str) -> nn.Module:
    """The model that a text of `builder_text` describes, on the meta device: it takes no memory.

    Raises:
        ValueError: what `builder_text` refuses. The text may come from anyone; it names packaged models alone.
    """
    try:
        builder = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected builder to be JSON, got {error}") from error
    if not isinstance(builder, dict) or not isinstance(builder.get("model"), str) or set(builder) - set(_PARTS):
        raise ValueError(f"expected builder to have a model's name and {' and '.join(_PARTS[1:])}, got {text[:200]}")
    name, classes, options = builder["model"], builder.get("num_classes"), builder.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"expected the builder's options to be an object, got {type(options).__name__}")
    for key, value in options.items():
        if any(word in key for word in _FORBIDDEN) or not isinstance(value, (str, int, float, bool)):
            raise ValueError(f"expected the builder's options to be plain values of the architecture, got {key!r}")
    try:
        with torch.device("meta"):
            model = models.build(name, models.default_classes(name) if classes is None else classes, **options)
    except Exception as error:  # whatever the architecture's code raises for these numbers
        raise ValueError(f"expected a builder of slimkernels.models, got {text[:200]}: {error}") from error
    return model.eval()
