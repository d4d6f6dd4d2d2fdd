"""`export_onnx`: a converted model as an ONNX file, for other runtimes."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.conversion import to_dense
from slimkernels.conversion.graph import in_a_line, input_sets
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.files import atomic_path

_NEEDED = ("onnx", "onnxscript")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = False,
    merge_low_rank: bool = False,
    **options: Any,
) -> None:
    """Writes a converted model (or any other) as an ONNX file of standard operators, its weights inside.

    The model is made plain first (`to_dense`): zeros are stored as such, so the file has the size of the dense model,
    and a runtime that knows sparse weights, such as DeepSparse, finds them. The file appears under its name when it is
    complete.

    Args:
        model: in eval mode; it stays untouched.
        path: of the file, by convention ``*.onnx``.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        dynamic_batch: let the first size of every input tensor be any; else the file is for the example's sizes alone.
        merge_low_rank: as of `to_dense`.
        options: for `torch.onnx.export`, such as ``input_names``, ``output_names`` or ``opset_version``.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: a model in training mode; a model that torch cannot export, with torch's own reason.
        TypeError: not a module; example inputs of another form. OSError: the path cannot be written.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx: expected the packages {' and '.join(_NEEDED)}, got no {' and no '.join(missing)}; "
            "install them with: pip install 'slimkernels[onnx]'"
        )
    model = unwrapped("export_onnx", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_onnx: expected an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("export_onnx: expected a model in eval mode, got one in training mode; call model.eval()")
    sets = input_sets(example_inputs)
    if len(sets) != 1:
        raise ValueError(f"export_onnx: expected one example input, got {len(sets) or None}")
    args, kwargs = sets[0]
    if dynamic_batch and "dynamic_shapes" not in options:
        options["dynamic_shapes"] = _batch_dimensions(args, kwargs)
        options.setdefault("dynamo", True)
    plain = to_dense(model, merge_low_rank=merge_low_rank)
    options = {"verbose": False, "external_data": False, **options}
    with atomic_path(path) as temporary, torch.no_grad():
        try:
            torch.onnx.export(plain, args, str(temporary), kwargs=kwargs or None, **options)
        except OSError:
            raise
        except Exception as error:  # whatever the model's own code and torch's exporter raise
            raise ValueError(f"export_onnx: torch.onnx.export cannot export this model: {in_a_line(error)}") from error


def _batch_dimensions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first size of every tensor as torch's one symbolic size, in the form of ``dynamic_shapes``."""
    batch = torch.export.Dim("batch")

    def one(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() else None

    return _pytree.tree_map(one, kwargs) if kwargs else tuple(_pytree.tree_map(one, args))
