"""Keeps a converted model from being published in a form that its own class would read wrongly.

``save_pretrained`` of huggingface_hub's mixins (and of libraries with the same interface) writes the state dict, and
``from_pretrained`` builds the class and loads what fits with ``strict=False``. A converted model's state does not fit
its class: swapped and folded layers would keep their random weights, without a warning. Nothing in the file could stop
that, since the reader is the class as it was written, so writing it is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from slimkernels.conversion.plan import ModelPlan

_METHODS = ("_save_pretrained", "save_pretrained", "push_to_hub")
# These write a state dict even for classes of their own package.
_LIBRARIES = frozenset({"huggingface_hub", "transformers", "diffusers"})
# What `from_pretrained` reads.
PRETRAINED_NAMES = frozenset({"model.safetensors", "pytorch_model.bin"})


class PublishGuard:
    """Stands in for a method of a converted model that would write its state dict for ``from_pretrained``."""

    def __init__(self, method: str, kind: str) -> None:
        self.method, self.kind = method, kind

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.method}: expected a {self.kind} with the layers of its class, got a converted one: from_pretrained "
            f"would build a plain {self.kind} and leave the converted layers random. Write it with "
            f"slimkernels.save(model, 'model.slim.safetensors') and read it with slimkernels.load(path, "
            f"into={self.kind}(...)); the file can be uploaded as it is. A _save_pretrained and a _from_pretrained of "
            f"{self.kind}'s own that do so are used as they are"
        )


def guard_publishing(model: nn.Module, plan: ModelPlan) -> None:
    """Puts a `PublishGuard` in place of inherited writers, of the model and of every part of it that was converted."""
    changed = {layer.name for layer in plan.layers if layer.action != "keep"}
    containers = {".".join(parts[:i]) for name in changed for parts in [name.split(".")] for i in range(len(parts))}
    for name, module in model.named_modules():
        if name in containers:
            for method in _inherited_writers(type(module)):
                module.__dict__[method] = PublishGuard(method, type(module).__name__)


def unguard_publishing(model: nn.Module) -> None:
    """Removes every `PublishGuard` of a model."""
    for module in model.modules():
        for method in _METHODS:
            if isinstance(module.__dict__.get(method), PublishGuard):
                del module.__dict__[method]


def has_from_pretrained(model: nn.Module) -> bool:
    """Whether a class of the model reads its weights by name from a folder."""
    return any(callable(getattr(type(module), "from_pretrained", None)) for module in model.modules())


def _inherited_writers(cls: type) -> list[str]:
    """Methods by which a class writes a state dict as its base classes do; none where it has a writer of its own."""
    found = [method for method in _METHODS if callable(getattr(cls, method, None))]
    guarded: list[str] = []
    for method in found:  # in the order in which they call each other, from the innermost
        package = str(getattr(getattr(cls, method), "__module__", "")).split(".")[0]
        own = package == cls.__module__.split(".")[0] and package not in _LIBRARIES
        if own and not guarded:
            return []
        if not own:
            guarded.append(method)
        elif method == "save_pretrained":
            break  # it may write what it likes; the stock writer below it is refused
    return guarded
