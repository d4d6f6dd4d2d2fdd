"""Float32 in TF32, as tensor cores multiply it: 10 bits behind the point of a number and the exponent of float32."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.kernels.problems import Problem

STEP_BYTES = 32  # of a channel's weights in a step: how deep an instruction of the tensor cores multiplies


def step_channels(dtype: torch.dtype) -> int:
    """Input channels of one step: 16 of 16-bit numbers, 8 of float32."""
    return STEP_BYTES // dtype.itemsize


def precision_reason(problem: Problem) -> str | None:
    """None when torch's switch for convolutions lets tensor cores multiply the problem's dtype, else why not."""
    if problem.dtype != torch.float32:
        return None  # reading the switch takes 3 us
    # For mypy: torch's stub lacks the switch.
    switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    if switch == "tf32":
        return None
    return f"it multiplies float32 in TF32, and torch.backends.cudnn.conv.fp32_precision is {switch!r}, not 'tf32'"


def round_to_tf32(values: Tensor) -> Tensor:
    """Float32 rounded to TF32: the nearest number, from the middle the one further from zero."""
    rounded = ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
