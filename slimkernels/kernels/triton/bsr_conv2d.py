"""`bsr_conv2d` and `bsr_linear`, forward: launches of the kernels of `bsr_conv2d_kernel` and `bsr_conv2d_split`.

What a launch needs beside pointers (grid, integers, constants) follows from shapes, pattern capacity and configuration
and is made once for each (`_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.packs import ForwardOrder, kind_of
from slimkernels.kernels.triton import bsr_conv2d_images, bsr_conv2d_shared
from slimkernels.kernels.triton.bsr_conv2d_config import default_config, grid_integers, group_m
from slimkernels.kernels.triton.bsr_conv2d_geometry import Geometry, check
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order, order_size
from slimkernels.kernels.triton.bsr_conv2d_kernel import bsr_conv2d_fwd_kernel
from slimkernels.kernels.triton.bsr_conv2d_split import BLOCK_CHANNELS, BLOCK_ROWS, bsr_conv2d_reduce_kernel
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import Limits, cdiv, interpreted_dtype, limits


class _Plan(NamedTuple):
    """Launches of a geometry with one configuration, and the workspace's shape where it is split."""

    forward: Launch
    reduce: Launch | None = None
    partial_shape: tuple[int, int, int] | None = None


@lru_cache(maxsize=4096)
def _plan(
    geometry: Geometry,
    row_table: bool,
    keep_in_l1: bool,
    weights_on_m: bool,
    config_items: tuple[tuple[str, int], ...],
    device: Limits,
) -> _Plan:
    m_total = geometry.output[0]
    c_in, c_out = geometry.x_shape[1], geometry.weight_shape[0]
    config = dict(config_items) or default_config(
        m_total,
        geometry.block_rows,
        geometry.block_shape,
        c_in,
        geometry.dtype,
        blocks=geometry.capacity,
        weights_on_m=weights_on_m,
        tensor_cores=geometry.tensor_cores,
        shared_memory=device.shared_memory,
        processors=device.processors,
    )
    tiles_m = cdiv(m_total, config["BLOCK_M"])
    group = group_m(config, c_in, geometry.stride, geometry.dtype.itemsize)
    n_tiles = geometry.block_rows * cdiv(geometry.block_shape[0], config["BLOCK_N"])
    splits = config.get("SPLITS", 1)
    constants = geometry.constants(config, weights_on_m)
    overlap = device.overlap(tiles_m * n_tiles * splits)
    forward = Launch(
        bsr_conv2d_fwd_kernel,
        (tiles_m * n_tiles, splits, 1),
        (*geometry.integers(), *grid_integers(tiles_m, n_tiles, group)),
        {
            **constants,
            "ROW_TABLE": row_table,
            "KEEP_IN_L1": keep_in_l1,
            "WEIGHTS_ON_M": weights_on_m,
            "SPLITS": splits,
            "OVERLAP": overlap,
            **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        },
        launch_options(config, overlap),
    )
    if splits == 1:
        return _Plan(forward)
    y_rows = m_total // 4 if constants["POOL"] else m_total
    grid = (cdiv(y_rows, BLOCK_ROWS), cdiv(c_out, BLOCK_CHANNELS), 1)
    overlap = device.overlap(math.prod(grid))
    reduce = Launch(
        bsr_conv2d_reduce_kernel,
        grid,
        (y_rows, c_out, splits),
        {
            **{name: constants[name] for name in ("HAS_BIAS", "RELU", "POOL")},
            "OVERLAP": overlap,
            "BLOCK_M": BLOCK_ROWS,
            "BLOCK_N": BLOCK_CHANNELS,
        },
        launch_options({"num_warps": 4, "num_stages": 2}, overlap),
    )
    return _Plan(forward, reduce, (splits, m_total, c_out))


@lru_cache(maxsize=4096)
def _output_shape(geometry: Geometry) -> tuple[int, int, int, int]:
    return geometry.x_shape[0], geometry.weight_shape[0], *geometry.output[1:]


def _order(packed: Sequence[Tensor], geometry: Geometry) -> Tensor | None:
    """The `forward_order` in `packed`; other kernels' packs come the same way and are passed over."""
    if kind_of(packed) is not ForwardOrder or packed[0].dtype != torch.int32:
        return None
    (order,) = packed
    size = order_size(geometry.block_rows, geometry.capacity, math.prod(geometry.weight_shape[2:]))
    return order if order.numel() == size else None


def _run(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    geometry: Geometry,
    variant: str,
    config: Mapping[str, int] | None,
) -> Tensor:
    dtype = geometry.dtype
    compute = interpreted_dtype(dtype)
    if compute != dtype:
        # For mypy: the same tensors in another dtype, None where there was none.
        x, values, bias = (None if t is None else t.to(compute) for t in (x, values, bias))  # type: ignore[assignment]
        geometry = geometry._replace(dtype=compute)
        return _run(x, values, crow_indices, col_indices, bias, packed, geometry, variant, config).to(dtype)
    values, bias = values.contiguous(), bias if bias is None else bias.contiguous()
    y = torch.empty(_output_shape(geometry), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    device = limits(x.get_device())
    if variant == "shared_input":
        bsr_conv2d_shared.run(x, values, crow_indices, col_indices, bias, y, geometry, config, device)
        return y
    keep_in_l1 = variant == "taps_together"
    order = _order(packed, geometry)
    if order is None and (keep_in_l1 or variant == "images_on_m"):
        order = forward_order(crow_indices, col_indices, geometry.weight_shape, geometry.block_shape)
        # The kernels read an order before they wait for the kernel in front, which here has just written it.
        device = device._replace(overlaps=False)
    if variant == "images_on_m":
        assert order is not None
        bsr_conv2d_images.run(x, values, order, col_indices, bias, y, geometry, config, device)
        return y
    rows = crow_indices if order is None else order
    columns = order[4 * geometry.block_rows :] if keep_in_l1 and order is not None else col_indices
    plan = _plan(
        geometry,
        order is not None,
        keep_in_l1,
        variant == "weights_on_m",
        tuple(config.items()) if config else (),
        device,
    )
    partial = None if plan.partial_shape is None else x.new_empty(plan.partial_shape, dtype=torch.float32)
    bias_or_any = values if bias is None else bias
    plan.forward(x, values, rows, columns, bias_or_any, y if partial is None else partial)
    if plan.reduce is not None and partial is not None:
        plan.reduce(partial, bias_or_any, y)
    return y


def launch(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
    config: Mapping[str, int] | None = None,
    variant: str = "pixels_on_m",
) -> Tensor:
    """y = epilogue(conv2d(x, BSR weight) + bias), channels_last, in x's dtype with float32 accumulation.

    Args:
        x: (N, C_in, H, W) float32 | float16 | bfloat16, converted to channels_last where it is not.
        values: (nnz_blocks, block_out, block_in) in x's dtype; crow_indices, col_indices: int32, the BSR of the
            tap-major weight matrix.
        bias: (C_out,) in x's dtype, or None.
        packed: one tensor, `bsr_conv2d_index.forward_order` (longest block rows first); anything else is passed over.
        weight_shape: (C_out, C_in, R, S).
        epilogue: "none", "relu" or "relu_maxpool2" (2x2, stride 2, floor mode).
        config: a configuration of `bsr_conv2d_config`; None or {} takes its `default_config`.
        variant: "pixels_on_m", "weights_on_m", "images_on_m", "taps_together" or "shared_input".

    float32 multiplies in IEEE precision unless torch.backends.cudnn.conv.fp32_precision is "tf32".

    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    check("bsr_conv2d", x, values, bias, epilogue)
    geometry = Geometry(
        tuple(x.shape),
        tuple(weight_shape),
        tuple(block_shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        epilogue,
        _precision(x, torch.backends.cudnn.conv),
        x.dtype,
        values.shape[0],
        bias is not None,
    )  # type: ignore[arg-type]  # tuples have the right length, which their types do not say
    x = x.contiguous(memory_format=torch.channels_last)
    return _run(x, values, crow_indices, col_indices, bias, packed, geometry, variant, config)


def _precision(x: Tensor, switch: Any) -> str:
    """How float32 is multiplied, by torch's switch; asking it takes 3 us, so other dtypes do not."""
    return "tf32" if x.dtype == torch.float32 and switch.fp32_precision == "tf32" else "ieee"


def launch_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
    config: Mapping[str, int] | None = None,
    variant: str = "pixels_on_m",
) -> Tensor:
    """y = epilogue(x W^T + bias) for x (..., in) and a BSR weight (out, in): the convolution at R = S = H = W = 1.

    Arguments as `launch`, with weight_shape (out, in), epilogue "none" or "relu" and variant "pixels_on_m",
    "weights_on_m" or "shared_input". float32 multiplies in IEEE precision unless
    torch.backends.cuda.matmul.fp32_precision is "tf32". Returns (..., out), contiguous.

    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    check("bsr_linear", x, values, bias, epilogue)
    if epilogue == "relu_maxpool2":
        raise ValueError("bsr_linear: expected epilogue in ('none', 'relu'), got 'relu_maxpool2'")
    out_features, in_features = weight_shape[:2]
    rows = x.reshape(-1, in_features, 1, 1).contiguous()
    geometry = Geometry(
        tuple(rows.shape),
        (out_features, in_features, 1, 1),
        tuple(block_shape),
        (1, 1),
        (0, 0),
        (1, 1),
        epilogue,
        _precision(x, torch.backends.cuda.matmul),
        x.dtype,
        values.shape[0],
        bias is not None,
    )  # type: ignore[arg-type]  # tuples have the right length, which their types do not say
    y = _run(rows, values, crow_indices, col_indices, bias, packed, geometry, variant, config)
    return y.reshape(*x.shape[:-1], out_features)
