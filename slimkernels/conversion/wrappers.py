"""Modules that wrap a whole model to run it (data parallelism, compilation, averaging), and the model inside."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrapped(op: str, model: Any) -> Any:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel or what `torch.compile` returned.

    Layers then have the names of the plain model, and a file saved from a wrapper loads into the plain model. Wrappers
    around wrappers are taken off too. Any other module, and what is no module, is returned as it is.

    Args:
        op: the public function's name, which begins the message.

    Raises:
        TypeError: a scripted or traced model of torch.jit, whose layers cannot be replaced.
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod
        elif isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"{op}: expected a model as it was before torch.jit, got a {type(model).__name__}; use torch.jit on "
                "the result instead"
            )
        else:
            return model


def is_compiled(module: Any) -> bool:
    """Whether `torch.compile` returned this module."""
    # Importing torch._dynamo takes seconds, and where nobody has imported it nothing was compiled.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def without_compiled_parts(model: nn.Module) -> nn.Module:
    """The model with every compiled module inside it replaced by the original of that module, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if is_compiled(child):
                parent._modules[name] = unwrapped("convert", child)
    return model


def plain_name(name: str) -> str:
    """The name that a module has after `without_compiled_parts`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
