"""Models of the user's own on the command line: ``--model my_model.py:build --input 1,3,224,224``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.cli.weights import read_weights


def is_own(model: str | None) -> bool:
    """Whether a ``--model`` names a function of the user's own, as ``FILE.py:NAME`` or ``package.module:NAME``."""
    return model is not None and ":" in model


def build_own(spec: str, options: Mapping[str, Any] | None = None, weights: Path | None = None) -> nn.Module:
    """The model that ``FILE.py:NAME`` returns for the given keywords, in eval mode, with the weights of a file.

    NAME may also be a model itself. The file's code runs, as in ``python FILE.py``.

    Raises:
        ValueError: no such file, module or name; something that is no module; weights that do not fit.
    """
    where, _, name = spec.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise ValueError(f"--model: expected FILE.py:NAME or package.module:NAME, got {spec!r}: {error}") from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")][:5]
        raise ValueError(f"--model: expected {where} to define {name!r}, got {', '.join(known) or 'nothing to call'}")
    found = getattr(module, name)
    model = found if isinstance(found, nn.Module) else found(**(options or {}))
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {spec} to return an nn.Module, got {type(model).__name__}")
    if weights is not None:
        state = read_weights(weights)[0]
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"--model: expected weights of {spec} in {weights}, got {' '.join(lines[1:2])}") from error
    return model.eval()


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # what lies beside the file can be imported, as in python FILE.py
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def example_inputs(inputs: Sequence[str], device: str) -> list[Tensor]:
    """Random inputs of the shapes given as ``1,3,224,224``. Raises ValueError for anything else."""
    generator, found = torch.Generator().manual_seed(0), []
    for text in inputs:
        parts = text.lower().replace("x", ",").split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"--input: expected positive sizes as in 1,3,224,224, got {text!r}")
        found.append(torch.randn([int(part) for part in parts], generator=generator).to(device))
    return found
