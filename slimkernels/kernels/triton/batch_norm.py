"""Launches of a training step's batch norm with what is behind it, and of its gradients (`batch_norm_kernel`).

Results do not depend on the device's size: the pixels are cut in parts by the problem and added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import INT32_MAX, Limits, cdiv, interpreted_dtype, limits, next_power_of_2
from slimkernels.kernels.triton.sums import add_partials

# Rows that addresses may go past the last one by: those of the largest tile, of 16 channels.
_LARGEST_TILE = 2048
_EPILOGUES = {"none": 0, "relu": 1, "relu_maxpool2": 2}


class Cut(NamedTuple):
    """How a kernel's work is cut.

    Attributes:
        elements: of a tile, for each of its threads; half as many windows of 2x2 pixels.
        warps: of a program.
        programs: at most, of a kernel that sums. All of them should run at once, and a sum of their sums read them at
            once: 1056 programs of 71 and 96 registers a thread were two rounds on the 132 processors of an H200.
        stages: tiles of a sum in work and on their way; 1 loads without copies to shared memory.
    """

    elements: int
    warps: int
    programs: int = 0
    stages: int = 1


class Cuts(NamedTuple):
    """Those of all kernels; ``pooled`` ones with the epilogue ``relu_maxpool2``."""

    moments: Cut = Cut(16, 8, 256, 4)
    apply: Cut = Cut(16, 4)
    apply_pooled: Cut = Cut(16, 4)
    reduce: Cut = Cut(16, 8, 256, 4)
    reduce_pooled: Cut = Cut(16, 8, 256, 3)
    input_gradient: Cut = Cut(16, 4)
    input_gradient_pooled: Cut = Cut(16, 4)
    backwards: bool = True
    """Whether the sums of the backward begin at the last rows, which the gradient in front wrote last, and the gradient
    of x then at the first rows, which the sums read last; otherwise the other way around."""
    statistics_channels: int = 8
    """Channels of a program."""


CUTS = Cuts()


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


class _Tiles(NamedTuple):
    """The tiles of a kernel over ``rows`` rows of ``channels``: constants, and how many there are."""

    block_m: int
    block_n: int
    rows: int
    columns: int

    @classmethod
    def of(cls, cut: Cut, rows: int, channels: int, pool: bool = False) -> _Tiles:
        block_n = min(max(next_power_of_2(channels), 16), 128)
        block_m = cut.elements * 32 * cut.warps // block_n // (2 if pool else 1)
        return cls(block_m, block_n, cdiv(rows, block_m), cdiv(channels, block_n))

    def parts(self, cut: Cut) -> int:
        """How many programs share the rows of one column of tiles."""
        return max(1, min(cut.programs // self.columns, self.rows))


@lru_cache(maxsize=4096)
def _plan(
    n: int,
    c: int,
    p: int,
    q: int,
    epilogue: int,
    has_weight: bool,
    eps: float,
    device: Limits,
    cuts: Cuts = CUTS,
) -> _Plan:
    pool = epilogue == 2
    pixels, windows, pooled = n * p * q, n * cdiv(p, 2) * cdiv(q, 2), n * (p // 2) * (q // 2)
    rows, all_rows = (pooled, windows) if pool else (pixels, pixels)
    apply, reduce, input_gradient = cuts.apply, cuts.reduce, cuts.input_gradient
    if pool:
        apply, reduce, input_gradient = cuts.apply_pooled, cuts.reduce_pooled, cuts.input_gradient_pooled
    index_64 = (pixels + 2 * q + _LARGEST_TILE) * c > INT32_MAX

    def launch(
        kernel: Any, programs: tuple[int, int], integers: tuple[int, ...], tile: Sequence[int], cut: Cut, **own: Any
    ) -> Launch:
        overlap = device.overlap(programs[0] * programs[1])
        constants = {"INDEX_64": index_64, "OVERLAP": overlap, "BLOCK_M": tile[0], "BLOCK_N": tile[1], **own}
        constants |= {"HAS_WEIGHT": has_weight, "EPILOGUE": epilogue, "STAGES": cut.stages}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        options = launch_options({"num_warps": cut.warps, "num_stages": 2}, overlap)
        return Launch(kernel, (*programs, 1), integers, constants, options)

    x_tiles = _Tiles.of(cuts.moments, pixels, c)
    parts = x_tiles.parts(cuts.moments)
    y_tiles = _Tiles.of(apply, rows, c, pool)
    grad_tiles = _Tiles.of(reduce, rows, c, pool)
    grad_parts = grad_tiles.parts(reduce)
    dx_tiles = _Tiles.of(input_gradient, all_rows, c, pool)
    few = (next_power_of_2(parts), cuts.statistics_channels)
    return _Plan(
        launch(
            batch_norm_moments_kernel,
            (parts, x_tiles.columns),
            (pixels, c, x_tiles.rows, parts),
            x_tiles,
            cuts.moments,
        ),
        launch(
            batch_norm_statistics_kernel,
            (cdiv(c, few[1]), 1),
            (pixels, c, x_tiles.rows, parts),
            few,
            Cut(0, 4),
            EPS=eps,
            PART_M=x_tiles.block_m,
        ),
        launch(batch_norm_apply_kernel, (y_tiles.rows, y_tiles.columns), (rows, c, p, q), y_tiles, apply),
        launch(
            batch_norm_reduce_kernel,
            (grad_parts, grad_tiles.columns),
            (rows, c, p, q, grad_tiles.rows, grad_parts),
            grad_tiles,
            reduce,
            EVEN=rows % grad_tiles.block_m == 0,
            BACKWARDS=cuts.backwards,
        ),
        launch(
            batch_norm_input_gradient_kernel,
            (dx_tiles.rows, dx_tiles.columns),
            (all_rows, pixels, c, p, q, cdiv(p, 2), cdiv(q, 2)),
            dx_tiles,
            input_gradient,
            BACKWARDS=not cuts.backwards,
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
    plan = _plan(n, c, p, q, _EPILOGUES[epilogue], weight is not None, eps, limits(x.get_device()), CUTS)
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
    plan = _plan(n, c, p, q, _EPILOGUES[epilogue], weight is not None, eps, limits(x.get_device()), CUTS)
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
