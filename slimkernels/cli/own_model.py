"""Models of the user's own on the command line: ``--model my_model.py:build --input 1,3,224,224``.

`convert`, `bench`, `eval` and `explain` take them alike: ``--input`` is the shape of a whole batch everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import models
from slimkernels.cli.options import pair
from slimkernels.cli.weights import load_model, read_weights


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


@dataclass(frozen=True)
class Opened:
    """A model that a command was given: a packaged one with weights from a file, or one of the user's own.

    ``builder`` is what `slimkernels.save` writes so that the file loads by itself; None for a model of the user's own.
    ``stem`` is how a file of it is called.
    """

    network: nn.Module
    name: str
    own: bool
    num_classes: int | None
    builder: dict[str, Any] | None
    stem: str


def open_model(
    command: str,
    weights: Path | None,
    model: str | None,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Opened:
    """The model of ``weights`` and ``--model``, in eval mode on the CPU.

    Raises:
        ValueError: neither a file nor a model of the user's own; what `build_own` and `load_model` refuse.
        FileNotFoundError: no such file.
    """
    if is_own(model):
        assert model is not None
        stem = _stem(weights) if weights is not None else model.rpartition(":")[2]
        return Opened(build_own(model, options, weights), model, True, num_classes, None, stem)
    if weights is None:
        raise ValueError(f"{command}: expected a file of weights, or --model FILE.py:NAME, a model of your own")
    network, name, classes, description = load_model(weights, model, num_classes, options=options)
    builder = {"model": name, "num_classes": classes, "options": dict(description.options) or dict(options or {})}
    return Opened(network, name, False, classes, builder, _stem(weights))


def _stem(weights: Path) -> str:
    """The name of a file of weights without what the commands append; dots in the name itself stay."""
    return weights.stem.removesuffix(".compressed").removesuffix(".distilled")


def example_batches(
    command: str,
    opened: Opened,
    shapes: Sequence[str] | None,
    *,
    batches: Sequence[int] | None = None,
    size: str | None = None,
    without_shapes: bool = False,
    device: str = "cpu",
) -> list[tuple[Tensor]] | None:
    """Example inputs of ``--input``, or of ``--batch`` and ``--size`` for a packaged model; None without shapes.

    Raises:
        ValueError: a model of the user's own without ``--input``; sizes that are none.
    """
    if without_shapes:
        return None
    if shapes:
        return [(x,) for x in example_inputs(shapes, device)]
    if opened.own:
        raise ValueError(
            f"{command}: expected --input SHAPE, as in 1,3,224,224, or --without-shapes with a model of your own"
        )
    channels, height, width = models.input_shape(opened.name)
    if size is not None:
        height, width = pair("--size", size)
    return [(x,) for x in example_inputs([f"{n},{channels},{height},{width}" for n in batches or (1, 16)], device)]


def example_inputs(inputs: Sequence[str], device: str) -> list[Tensor]:
    """Random inputs of the shapes given as ``1,3,224,224``. Raises ValueError for anything else."""
    generator, found = torch.Generator().manual_seed(0), []
    for text in inputs:
        parts = text.lower().replace("x", ",").split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--input: expected positive sizes as in 1,3,224,224, got {text!r}")
        found.append(torch.randn([int(part) for part in parts], generator=generator).to(device))
    return found


@torch.no_grad()
def check_runs(command: str, network: nn.Module, text: str) -> None:
    """Raises ValueError where a model of the user's own does not run on a batch of the shape given as ``--input``."""
    try:
        network(*example_inputs([text], "cpu"))
    except Exception as error:  # the user's code runs here
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{command}: expected the model to run on --input {text}, whose first size is the batch's, got: {what}"
        ) from error
