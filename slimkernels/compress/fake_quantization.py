"""Fake quantization: a parametrization under which a layer computes with the weights that a compact file would hold.

`slimkernels.save` rounds what conversion leaves, and conversion folds batch norm into the layer before it, which scales
each output channel by ``g = gamma / sqrt(running_var + eps)``. So the grid belongs to ``g * weight``: of int8 and int4
it is ``code * scale``, with the scales of `slimkernels.conversion.quantization`, and the layer computes with
``code * scale / g``. Folding then gives ``code * scale`` again, up to the last bit, and rounding what lies on a grid
finds that grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkernels.conversion.folding import batch_norm_scale_shift, flush_subnormals
from slimkernels.conversion.quantization import LEVELS, half_dtype, quantize, scales_of

QUANTIZED_VALUES = ("bf16", *LEVELS)


class _PassThrough(torch.autograd.Function):
    """The second tensor, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class FakeQuantize(nn.Module):
    """Parametrization that rounds a weight to the values of a compact file; gradients pass as if it did not.

    It is the identity until `set_scales_` is called for the first time. The scales are a buffer and stay until that is
    called again; the batch norm is read at every call.

    Args:
        values: ``bf16``, ``int8`` or ``int4``.
        weight: the weight that it will round, ``(C_out, ...)``.
        norm: the batch norm that conversion folds into the layer; None where there is none.
    """

    exponents: Tensor
    eighths: Tensor

    def __init__(self, values: str, weight: Tensor, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.values, self.active = values, False
        # In a tuple, because as a submodule it would have its state in the file of the model twice.
        self._norm = (norm,)
        exponents = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        self.register_buffer("exponents", exponents)
        # As the integers of their bits, which no average of weights takes for its own; on the device before a CUDA
        # graph is captured, which cannot copy it there.
        eighths = torch.tensor(_EIGHTHS, device=weight.device).view(torch.int32)
        self.register_buffer("eighths", eighths, persistent=False)

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """The batch norm that it reads."""
        return self._norm[0]

    def read_(self, norm: Any) -> None:
        """Lets it read another batch norm, one that stands where its own was."""
        self._norm = (norm,)

    def forward(self, weight: Tensor) -> Tensor:
        # For mypy: apply is untyped.
        return _PassThrough.apply(weight, self._rounded(weight)) if self.active else weight  # type: ignore[no-untyped-call, no-any-return]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the rounded weight stores the tensor as it is; it is rounded on reading."""
        return weight

    @torch.no_grad()
    def set_scales_(self, weight: Tensor) -> None:
        """Begins to round, with the scales that a file of this weight would have. Raises ValueError for inf or nan."""
        self.active = True
        if self.values == "bf16":
            return
        rows = self._folded(weight).flatten(1).cpu()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("FakeQuantize: expected finite weights and statistics of batch norm, got inf or nan")
        exponents, _ = quantize(rows, torch.arange(len(rows)), len(rows), self.values)
        self.exponents.copy_(torch.from_numpy(exponents))

    @torch.no_grad()
    def stored(self, weight: Tensor) -> Tensor:
        """What a file holds of the layer, batch norm folded: float32, of the weight's shape."""
        if self.values == "bf16":
            found = self._folded(weight).bfloat16().float()
        else:
            found = self._codes(weight).mul_(_by_channel(self._scales(), weight))
        norm = self._norm[0]
        if norm is not None:
            found = torch.where(_by_channel(batch_norm_scale_shift(norm)[0] != 0, weight), found, 0.0)
        return flush_subnormals(found)

    @torch.no_grad()
    def round_shift_(self, bias: Tensor | None) -> None:
        """Rounds what the layer adds to its output, its bias or the shift of its batch norm, to the file's 16 bits."""
        norm = self._norm[0]
        if not self.active:
            return
        if norm is None:
            if bias is not None:
                bias.copy_(bias.to(half_dtype(bias)))
        elif norm.bias is not None:
            gain, shift = batch_norm_scale_shift(norm)
            if bias is not None:
                shift = shift + bias.double() * gain
            single = shift.float()
            norm.bias.add_((single.to(half_dtype(single)).double() - shift).to(norm.bias.dtype))

    @torch.no_grad()
    def _rounded(self, weight: Tensor) -> Tensor:
        gain = self._gain(weight)
        if self.values == "bf16":
            rounded = self._folded(weight).bfloat16().float()
            rounded = rounded if gain is None else rounded / gain
        else:
            scales = _by_channel(self._scales(), weight)
            rounded = self._codes(weight).mul_(scales if gain is None else scales / gain)
        return rounded.to(weight.dtype)

    def _codes(self, weight: Tensor) -> Tensor:
        """The integers of a file, in float32; few passes over the weight, since every training step makes them."""
        gain, scales = self._gain(weight), _by_channel(self._scales(), weight)
        levels, exact = LEVELS[self.values], weight.detach().float()
        codes = exact / scales if gain is None else exact * (gain / scales)
        return codes.round_().clamp_(-levels, levels)

    def _folded(self, weight: Tensor) -> Tensor:
        gain = self._gain(weight)
        return weight.float() if gain is None else weight.float() * gain

    def _gain(self, weight: Tensor) -> Tensor | None:
        """The factor of each output channel that folding applies, float32, to be broadcast over ``weight``.

        1 in place of 0: such a channel is zero in the file, yet batch norm may give it a gain again.
        """
        norm = self._norm[0]
        if norm is None:
            return None
        gain = batch_norm_scale_shift(norm)[0].float()
        return _by_channel(torch.where(gain == 0, 1.0, gain), weight)

    def _scales(self) -> Tensor:
        """`scales_of` without NumPy, so that the loop may compile it."""
        power_of_two = (((self.exponents >> 3) + 127) << 23).view(torch.float32)
        return self.eighths.view(torch.float32)[(self.exponents & 7).long()] * power_of_two

    def get_extra_state(self) -> dict[str, Any]:
        return {"values": self.values, "active": self.active}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["values"] != self.values:
            raise ValueError(f"FakeQuantize: expected values {self.values!r}, got {state['values']!r}")
        self.active = bool(state["active"])

    def extra_repr(self) -> str:
        return f"values={self.values!r}, active={self.active}"


def _by_channel(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (weight.dim() - 1))


# 2 ** (j / 8)
_EIGHTHS = scales_of(torch.arange(8, dtype=torch.int32).numpy()).tolist()


def fake_quantized(model: nn.Module) -> dict[str, FakeQuantize]:
    """The `FakeQuantize` of every layer that has one, by layer name."""
    found: dict[str, FakeQuantize] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
            chain: Any = module.parametrizations.weight  # type: ignore[union-attr]
            found.update((name, part) for part in chain if isinstance(part, FakeQuantize))
    return found
