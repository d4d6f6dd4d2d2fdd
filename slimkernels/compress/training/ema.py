"""An exponential moving average of a model's weights, evaluated in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightAverage:
    """Average of every floating parameter and buffer (batch-norm statistics included): after update t,
    ``average = d average + (1 - d) value`` with ``d = min(decay, (1 + t) / (10 + t))``.

    The rising decay is that of TensorFlow's ``ExponentialMovingAverage(num_updates=t)``: a short run's average is not
    dominated by its initial weights. Integer and bool state (masks, counters) is never averaged: it is the model's own,
    and what a mask hides is zero in the average as well. Averages of 16-bit values are kept in float32, since a step of
    ``1 - d`` of the way is lost in 16 bits.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._averages = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in _floating(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = _floating(model)
        values = [now[name].detach().to(average.dtype) for name, average in self._averages.items()]
        torch._foreach_lerp_(list(self._averages.values()), values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into the model."""
        for name, value in _floating(model).items():
            value.detach().copy_(self._averages[name])
        for original, mask in _masked(model):
            original.detach().copy_(mask(original))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block and its own weights, bit for bit, afterwards."""
        own = {name: value.detach().clone() for name, value in _floating(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in _floating(model).items():
                    value.detach().copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by name and the number of updates."""
        return {"averages": dict(self._averages), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave for a model of the same structure."""
        self.updates = int(state["updates"])
        for name, value in self._averages.items():
            value.copy_(state["averages"][name])


def _floating(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value for name, value in named if value.is_floating_point()}


def _masked(model: nn.Module) -> Iterator[tuple[Tensor, nn.Module]]:
    """Every weight behind a mask (a parametrization that owns a bool tensor ``mask``), with the mask."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
            for parametrization in module.parametrizations.weight:  # type: ignore[union-attr]
                mask = getattr(parametrization, "mask", None)
                if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                    # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
                    yield module.parametrizations.weight.original, parametrization  # type: ignore[union-attr, misc]
