"""Torch's pooling modules as layers of a chain, with the attributes that they have at the moment."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.kernels.cpu.pooling import Pooling, adaptive_average_pooling, average_pooling, max_pooling

# What reads the arguments of each module, and the attributes that are those arguments, in order.
_READERS: dict[type[nn.Module], tuple[Callable[..., Pooling | None], tuple[str, ...]]] = {
    nn.MaxPool2d: (max_pooling, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.AvgPool2d: (
        average_pooling,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: (adaptive_average_pooling, ("output_size",)),
}
POOLINGS = tuple(_READERS)
# What else decides what a module returns.
_FURTHER: dict[type[nn.Module], tuple[str, ...]] = {nn.MaxPool2d: ("return_indices",)}
_MISSING = object()  # stands for an attribute that a module does not have


class TorchPooling:
    """A pooling module of torch, as its attributes were when this was made.

    Anybody may assign to an attribute at any time, or write into a list that is one; `holds` says whether somebody has.

    Args:
        module: of one of the types `POOLINGS`.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = type(module)
        self._module, (self._reader, names) = module, _READERS[kind]
        self._names = (*names, *_FURTHER.get(kind, ()))
        self._values = self._present()
        self._arguments = self._values[: len(names)]
        # With what is in them: they stay the same objects when somebody writes into them.
        self._lists = [(value, list(value)) for value in self._values if isinstance(value, list)]

    def _present(self) -> list[Any]:
        # From the dictionary, without nn.Module's look-up: every call of a chain asks for all of them.
        return list(map(self._module.__dict__.get, self._names, repeat(_MISSING)))

    def holds(self) -> bool:
        """Whether the module has the attributes that it had."""
        return _are(self._present(), self._values) and all(_are(*pair) for pair in self._lists)

    def native(self, isa: str, image: tuple[int, int, int]) -> Pooling | None:
        """The module as a native layer for images of these channels, height and width; None where torch has to run it.

        What is an error decides torch's answer to one such image of one channel: then the modules have to raise it.
        """
        if not all(map(_is_read, self._values)):
            return None
        _, h, w = image
        try:
            y = self._module(torch.zeros(1, 1, h, w, dtype=torch.float32, device="cpu"))
        except Exception:  # whatever torch raises
            return None
        found = self._reader(isa, image, *self._arguments) if isinstance(y, Tensor) else None
        return found if found is not None and found.output_size(h, w) == tuple(y.shape[2:]) else None


def _are(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all of them are the same objects: of equal numbers, torch may take one and refuse the other."""
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _is_read(value: Any) -> bool:
    """Whether a value is a number, a flag, None or several of them: what nobody can change unseen."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return all(type(v) in (int, bool, type(None)) for v in values)
