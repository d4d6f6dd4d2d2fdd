"""Weights as small integers: symmetric, with one scale for each output channel, the one that gives the least error.

A scale is ``2 ** (k / 8)`` with an integer ``k``: that is fine enough (a scale that is off by 4% costs under 0.5% more
error than the best one) and takes about 5 bits where a float16 takes 16. It is computed without rounding differences
between machines, and rounding weights that are rounded already changes none of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slimkernels.conversion.symbols import Symbols

LEVELS = {"int8": 127, "int4": 7}
EXPONENTS = (-1008, 1015)  # of scales that are normal float32 numbers
# 2 ** (j / 8) in units of 2 ** -23.
_EIGHTHS = np.array([8388608, 9147842, 9975792, 10878679, 11863283, 12937002, 14107901, 15384775], dtype=np.float32)
# Candidates around the scale that just holds the largest weight. Below it, the largest weights are clipped. Above it
# none is better, except that weights which were rounded before find their scale again.
_BELOW, _ABOVE = {"int8": 8, "int4": 12}, 7


def scales_of(exponents: Symbols) -> Tensor:
    """The scales of these ``k``, float32."""
    fraction, power = exponents & 7, exponents >> 3
    return torch.from_numpy(np.ldexp(_EIGHTHS[fraction], power - 23))


def quantize(weights: Tensor, groups: Tensor, count: int, values: str) -> tuple[Symbols, Symbols]:
    """``(k of each group's scale, integer of each weight)``, the latter ``(rows, n)``.

    Args:
        weights: finite, floating point, ``(rows, n)``.
        groups: int64, the group of each row, in ``[0, count)``.
        count: number of groups.
        values: ``int8`` or ``int4``.
    """
    levels, exact = LEVELS[values], weights.float()
    nonzero = exact != 0
    if int(nonzero.sum()) < exact.numel() // 2:  # zeros have no error at any scale
        exact = exact[nonzero][:, None]
        best = _best_scales(exact, weights.dtype, groups[nonzero.nonzero()[:, 0]], count, values)
    else:
        best = _best_scales(exact, weights.dtype, groups, count, values)
    codes = (weights.float() / scales_of(best)[groups][:, None]).round_().clamp_(-levels, levels)
    return best, codes.numpy().astype(np.int32)


def _best_scales(exact: Tensor, dtype: torch.dtype, groups: Tensor, count: int, values: str) -> Symbols:
    levels, index = LEVELS[values], groups.numpy()
    largest = np.zeros(count, dtype=np.float32)
    if exact.numel():
        np.maximum.at(largest, index, exact.abs().amax(1).numpy())
    with np.errstate(divide="ignore"):
        holding = np.where(largest > 0, np.ceil(8 * np.log2(largest.astype(np.float64) / levels)), 0)
    # Errors are measured in the group's largest weight: squares of very large and very small numbers are none.
    unit = torch.from_numpy(np.where(largest > 0, largest, np.float32(1)))[groups][:, None]
    best, least = np.zeros(count, dtype=np.int32), np.full(count, np.inf)
    for offset in range(-_BELOW[values], _ABOVE + 1):
        exponents = np.clip(holding + offset, *EXPONENTS).astype(np.int32)
        scale = scales_of(exponents)[groups][:, None]
        rounded = (exact / scale).round_().clamp_(-levels, levels).mul_(scale)
        # The error that is left in the dtype of the weights: what was rounded before has none at its own scale.
        # NumPy adds up in an order that does not depend on the number of threads.
        difference = rounded.to(dtype).float().sub_(exact).div_(unit).square_().numpy().sum(axis=1)
        error = np.bincount(index, weights=difference, minlength=count)
        better = error < least
        best[better], least[better] = exponents[better], error[better]
    # A group of zeros takes any scale: one that occurs.
    best[largest == 0] = best[largest > 0].min(initial=EXPONENTS[1]) if (largest > 0).any() else 0
    return best


def dequantize(exponents: Symbols, codes: Symbols, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights ``(rows, n)`` that these integers stand for."""
    return torch.from_numpy(codes).float().mul_(scales_of(exponents)[groups][:, None]).to(dtype)


def to_planes(weights: Tensor) -> tuple[Symbols, Symbols]:
    """Weights in bfloat16 as exponents, which hold most of the redundancy, and the signs with mantissas that follow.

    Both are in [0, 255]. An exponent of 0 is a zero and has no second part; numbers below 2 ** -126 become zeros.
    """
    bits = weights.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype(np.int32) & 0xFFFF
    exponents = (bits >> 7) & 0xFF
    bits = bits[exponents > 0]
    return exponents, ((bits >> 8) & 0x80) | (bits & 0x7F)


def from_planes(exponents: Symbols, mantissas: Symbols, dtype: torch.dtype) -> Tensor:
    """The weights of `to_planes`, one-dimensional."""
    bits = exponents << 7
    bits[exponents > 0] |= ((mantissas & 0x80) << 8) | (mantissas & 0x7F)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16).to(dtype)


def half_dtype(tensor: Tensor) -> torch.dtype:
    """The 16-bit dtype in which a tensor loses least; its own where it has 16 bits."""
    if tensor.dtype.itemsize <= 2:
        return tensor.dtype
    finite = tensor[torch.isfinite(tensor)].double()

    def error(dtype: torch.dtype) -> float:
        return float((finite.to(dtype).double() - finite).square().sum())

    return torch.float16 if error(torch.float16) <= error(torch.bfloat16) else torch.bfloat16
