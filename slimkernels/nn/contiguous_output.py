"""Hands on outputs in the layout that a model's own code asks for, where that code takes no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree


class ContiguousOutput:
    """Forward hook of a module: its output, or the tensors in it, are contiguous."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.contiguous()
        return _pytree.tree_map_only(Tensor, Tensor.contiguous, output)


def keep_contiguous_(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Gives the named modules of the model a `ContiguousOutput` hook, in place, once; returns the model."""
    for name in names:
        module = model.get_submodule(name)
        if not any(isinstance(hook, ContiguousOutput) for hook in module._forward_hooks.values()):
            module.register_forward_hook(ContiguousOutput())
    return model
