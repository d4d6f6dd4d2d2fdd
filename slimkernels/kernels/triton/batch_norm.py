"""Launches of a training step's batch norm with what is behind it, and of its gradients (`batch_norm_kernel`).

Results do not depend on the device's size: the pixels are cut in parts by the problem and added in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.triton.batch_norm_kernel import (
    batch_norm_apply_kernel,
    batch_norm_input_gradient_kernel,
    batch_norm_moments_kernel,
    batch_norm_reduce_kernel,
    batch_norm_statistics_kernel,
)
from slimkernels.kernels.triton.launcher import Launch
from slimkernels.kernels.triton.runtime import INT32_MAX, cdiv, interpreted_dtype, next_power_of_2
from slimkernels.kernels.triton.sums import STAGES, add_partials

# Elements of a tile: 16 a thread of 4 warps, two loads of 16 bytes in 16-bit dtypes. A tile of windows has half of
# them: four pixels each.
_TILE = 2048
# Parts that sums over pixels are cut in, at most: eight programs for each of the 132 processors of an H100.
_PARTS = 1056
_EPILOGUES = {"none": 0, "relu": 1, "relu_maxpool2": 2}
_OPTIONS = {"num_warps": 4, "num_stages": 2}


class _Plan(NamedTuple):
    moments: Launch
    statistics: Launch
    apply: Launch
    reduce: Launch
    input_gradient: Launch
    parts: int
    """Of x, in the forward."""
    grad_parts: int
    """Of the gradient of y, in the backward."""


def _parts(rows: int, block_m: int, tiles: int) -> tuple[int, int]:
    """(rows of a part, number of parts): four tiles or more a part, so that partial sums are few beside their sums."""
    parts = max(1, min(_PARTS // tiles, cdiv(rows, 4 * block_m)))
    part_rows = cdiv(cdiv(rows, parts), block_m) * block_m
    return part_rows, cdiv(rows, part_rows)


@lru_cache(maxsize=4096)
def _plan(n: int, c: int, p: int, q: int, epilogue: int, has_weight: bool, eps: float) -> _Plan:
    pixels, windows = n * p * q, n * cdiv(p, 2) * cdiv(q, 2)
    pooled = n * (p // 2) * (q // 2)
    pool = epilogue == 2
    block_n = min(max(next_power_of_2(c), 16), 128)
    block_m = _TILE // block_n
    own_m = block_m // 2 if pool else block_m
    tiles = cdiv(c, block_n)
    part_pixels, parts = _parts(pixels, block_m, tiles)
    rows = pooled if pool else pixels
    part_rows, grad_parts = _parts(rows, own_m, tiles)
    index_64 = (pixels + _TILE + 2 * q) * c > INT32_MAX
    tile = {"INDEX_64": index_64, "BLOCK_M": block_m, "BLOCK_N": block_n}
    own: dict[str, Any] = {"HAS_WEIGHT": has_weight, "EPILOGUE": epilogue, **tile, "BLOCK_M": own_m}
    # A tile of 16 channels for the statistics: they are few, and every program reads all parts.
    few = {"EPS": eps, "BLOCK_M": 256, "BLOCK_N": 16}
    all_rows = windows if pool else pixels
    return _Plan(
        Launch(
            batch_norm_moments_kernel,
            (parts, tiles, 1),
            (pixels, c, part_pixels),
            {**tile, "STAGES": STAGES},
            _OPTIONS,
        ),
        Launch(batch_norm_statistics_kernel, (cdiv(c, 16), 1, 1), (pixels, c, part_pixels, parts), few, _OPTIONS),
        Launch(batch_norm_apply_kernel, (cdiv(rows, own_m), tiles, 1), (rows, c, p, q), own, _OPTIONS),
        Launch(
            batch_norm_reduce_kernel,
            (grad_parts, tiles, 1),
            (rows, c, p, q, part_rows),
            {**own, "STAGES": STAGES},
            _OPTIONS,
        ),
        Launch(
            batch_norm_input_gradient_kernel,
            (cdiv(all_rows, own_m), tiles, 1),
            (all_rows, pixels, c, p, q, cdiv(p, 2), cdiv(q, 2)),
            own,
            _OPTIONS,
        ),
        parts,
        grad_parts,
    )


def launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, epilogue: str
) -> tuple[Tensor, Tensor]:
    """``(y, statistics)`` of a batch norm over what it is given.

    Args:
        x: (N, C, P, Q) float32 | float16 | bfloat16, read as channels_last (converted where it is not), with a pixel.
        weight: (C,) of any floating dtype, or None with ``bias``.
        bias: (C,) of that dtype.
        eps: added to the variance.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.

    Returns: y (N, C, P, Q) or (N, C, P // 2, Q // 2) channels_last in x's dtype; (3, C) float32, the means,
        ``1 / sqrt(var + eps)`` and the unbiased variances.
    """
    n, c, p, q = x.shape
    dtype, compute = x.dtype, interpreted_dtype(x.dtype)
    plan = _plan(n, c, p, q, _EPILOGUES[epilogue], weight is not None, eps)
    x = x.to(compute).contiguous(memory_format=torch.channels_last)
    partial = torch.empty((plan.parts, 2, c), dtype=torch.float32, device=x.device)
    statistics = torch.empty((3, c), dtype=torch.float32, device=x.device)
    plan.moments(x, partial)
    plan.statistics(partial, statistics)
    image = (p // 2, q // 2) if epilogue == "relu_maxpool2" else (p, q)
    y = torch.empty((n, c, *image), dtype=compute, device=x.device, memory_format=torch.channels_last)
    plan.apply(x, *_affine(weight, bias, statistics), statistics, y)
    return y.to(dtype), statistics


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """``(grad_x, sums)``: the gradient of x, and (2, C) float32, the gradients of bias and weight.

    Args:
        grad: of y, in x's dtype.
        x: as for `launch_forward`, with which the others go.
        weight: as there.
        bias: as there.
        statistics: what it returned.
        eps: as there.
        epilogue: as there.
    """
    n, c, p, q = x.shape
    dtype, compute = x.dtype, interpreted_dtype(x.dtype)
    plan = _plan(n, c, p, q, _EPILOGUES[epilogue], weight is not None, eps)
    x, grad = (t.to(compute).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    affine = _affine(weight, bias, statistics)
    partial = torch.empty((plan.grad_parts, 2, c), dtype=torch.float32, device=x.device)
    plan.reduce(grad, x, *affine, statistics, partial)
    sums = add_partials(partial, torch.empty((2, c), dtype=torch.float32, device=x.device))
    grad_x = torch.empty_like(x)
    plan.input_gradient(grad, x, *affine, statistics, sums, grad_x)
    return grad_x.to(dtype), sums


def _affine(weight: Tensor | None, bias: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias as kernels take them; ``other`` stands in for what is not read."""
    if weight is None or bias is None:
        return other, other
    return weight.to(interpreted_dtype(weight.dtype)).contiguous(), bias.to(interpreted_dtype(bias.dtype)).contiguous()
