"""Quantization-aware training: a `callbacks.Callback` under which a model trains with the weights that it is saved
with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slimkernels.compress.fake_quantization import QUANTIZED_VALUES, FakeQuantize, fake_quantized
from slimkernels.compress.training.callbacks import Callback, check_settings
from slimkernels.conversion.layers import DROP_IN_LAYERS
from slimkernels.conversion.plan import Policy
from slimkernels.conversion.units import survey
from slimkernels.formats import BlockMask

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


class QuantizationAware(Callback):
    """Trains the last part of a run with weights rounded as ``save(..., values=...)`` will round them.

    From ``begin`` on every convolution, linear layer and embedding computes with rounded weights, and the gradient
    passes to the full-precision weights underneath as if there were no rounding (the straight-through estimator, arXiv
    1308.3432). The grid is that of the file: a scale for each output channel, chosen by the least error, on the weights
    with batch norm folded in, for that is what `slimkernels.convert` leaves. Batch norm itself trains on, on batch
    statistics; the running statistics are what is folded. Scales are chosen anew ``times`` times, evenly spaced.

    Afterwards `slimkernels.finalize_` writes the rounded weights into the model, and rounds biases and the shifts of
    folded batch norms to 16 bits, as the file does. What `slimkernels.save` of the converted model with the same
    ``values`` writes are then exactly those weights. `convert` without `finalize_` takes the rounded weights as well.
    Two things are rounded at saving without having been trained for it: parameters of two dimensions or more of other
    modules (embeddings of torch's attention, recurrent layers), and factorized layers that conversion multiplies out.

    With `GradualPruning` in the same run masked weights stay exactly zero. An average of weights (``ema_decay``) is one
    of the full-precision weights, evaluated rounded. Under torchrun rank 0's scales are broadcast. State is in the
    model, and so in every checkpoint of the run.

    Args:
        values: ``int8``, ``int4`` or ``bf16``, as in `slimkernels.save`.
        begin: share of the run after which weights are rounded; after the last pruning is a good time.
        times: how often scales are chosen between there and the end.

    Raises:
        ValueError: other values, not ``0 <= begin < 1``, ``times < 1``; a model that is rounded to other values
            already, a model that was converted, weights that are not finite.

    Example:
        >>> import slimkernels as sk
        >>> callback = sk.QuantizationAware("int4", begin=0.6)  # fine_tune(..., callbacks=[callback])
    """

    def __init__(self, values: str = "int4", *, begin: float = 0.6, times: int = 5) -> None:
        if values not in QUANTIZED_VALUES:
            raise ValueError(f"QuantizationAware: expected values in {', '.join(QUANTIZED_VALUES)}, got {values!r}")
        if not 0.0 <= begin < 1.0 or times < 1:
            raise ValueError(
                f"QuantizationAware: expected 0 <= begin < 1 and times >= 1, got begin={begin}, times={times}"
            )
        self.values, self.begin, self.times = values, begin, times
        self._active = False

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        """Registers the parametrizations, which round nothing yet, so that a checkpoint of any step fits."""
        known = fake_quantized(model)
        for name, rounding in known.items():
            if rounding.values != self.values:
                raise ValueError(
                    f"QuantizationAware: expected layer {name!r} to be rounded to {self.values} or not at all, got "
                    f"{rounding.values}; finalize_ the model first"
                )
        converted = [name for name, module in model.named_modules() if isinstance(module, DROP_IN_LAYERS)]
        if converted:
            raise ValueError(f"QuantizationAware: expected a model before convert, got {converted[0]!r} converted")
        folded = _folded_norms(model)
        for name, module in list(model.named_modules()):
            if name in known or not isinstance(module, _LAYERS) or not _is_readable(module):
                continue
            norm: Any = model.get_submodule(folded[name]) if name in folded else None
            # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
            weight: Any = module.weight
            parametrize.register_parametrization(module, "weight", FakeQuantize(self.values, weight, norm))

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Chooses scales where it is time to."""
        first = min(int(self.begin * total_steps), total_steps - 1)
        self._active = step >= first
        if not self._active:
            return
        round_, before = ((s - first) * self.times // (total_steps - first) for s in (step, step - 1))
        if round_ == before:
            return
        for name, rounding in fake_quantized(model).items():
            try:
                rounding.set_scales_(_unrounded(model.get_submodule(name)))
            except ValueError as error:
                raise ValueError(f"QuantizationAware: layer {name!r}: {error}") from error
        _same_scales_on_all_ranks(model)

    def variant(self) -> bool:
        """Whether weights are rounded."""
        return self._active

    def metrics(self) -> dict[str, float]:
        """Whether weights are rounded: 1 or 0."""
        return {"quantized": float(self._active)}

    def state_dict(self) -> dict[str, Any]:
        """The settings; the rest is in the model."""
        return {"settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compares the settings of `state_dict` with its own."""
        check_settings(self, self._settings(), state.get("settings", {}))

    def _settings(self) -> dict[str, str]:
        return {"values": self.values, "begin": str(self.begin), "times": str(self.times)}


def _folded_norms(model: nn.Module) -> dict[str, str]:
    """Layer -> the batch norm that `slimkernels.convert` folds into it."""
    found = survey(model, [], Policy(), training=False)
    ends = {unit.names[-1]: unit.tail.bn for unit in found.units if unit.tail.bn is not None}
    return ends | {layer: norm for norm, layer in found.foldable.items()}


def _is_readable(module: Any) -> bool:
    """Whether the layer has a floating-point Parameter as its weight, under a mask or nothing."""
    if parametrize.is_parametrized(module, "weight"):
        return all(isinstance(part, BlockMask) for part in module.parametrizations.weight)
    weight = module._parameters.get("weight")
    return weight is not None and not is_lazy(weight) and weight.is_floating_point()


@torch.no_grad()
def _unrounded(module: Any) -> torch.Tensor:
    """The masked weight in full precision."""
    weight: torch.Tensor = module.parametrizations.weight.original
    for part in module.parametrizations.weight:
        if isinstance(part, BlockMask):
            weight = part(weight)
    return weight


def _same_scales_on_all_ranks(model: nn.Module) -> None:
    """Rank 0's scales everywhere: running statistics, which they are chosen by, differ between ranks."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    for rounding in fake_quantized(model).values():
        distributed.broadcast(rounding.exponents, src=0)
