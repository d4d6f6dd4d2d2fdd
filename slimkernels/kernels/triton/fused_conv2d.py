"""`fused_conv2d`, forward, for few input channels: launches of the kernel of `fused_conv2d_kernel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from slimkernels.kernels.triton.fused_conv2d_config import Geometry, default_config
from slimkernels.kernels.triton.fused_conv2d_kernel import fused_conv2d_fwd_kernel
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import (
    DTYPES,
    INT32_MAX,
    Limits,
    cdiv,
    division,
    interpreted_dtype,
    limits,
)


def plan(geometry: Geometry, config: Mapping[str, int], device: Limits) -> tuple[Launch, dict[str, int]]:
    """The launch of a geometry and its configuration: `default_config`'s with what ``config`` has in its place."""
    config = {**default_config(geometry), **config}
    (n, c_in, h, w), (c_out, _, r, s) = geometry.x_shape, geometry.weight_shape
    m_total, p, q = geometry.output
    tiles_m = cdiv(m_total, config["BLOCK_M"])
    n_tiles = cdiv(c_out, config["BLOCK_N"])
    # Every program takes the same number of tiles, but for the last ones.
    rounds = cdiv(tiles_m * n_tiles, config["PROGRAMS"] * device.processors)
    programs = cdiv(tiles_m, rounds)
    # A step beyond the last tile is worked out, though not taken.
    index_64 = max(n * c_in * h * w, m_total + 2 * programs * config["BLOCK_M"]) > INT32_MAX
    low, high = (3, config["BLOCK_M"].bit_length() - 2)
    if config["BLOCK_M"] < 32 * config["num_warps"]:
        low, high = 0, 3
    overlap = device.overlap(programs * n_tiles)
    launch = Launch(
        fused_conv2d_fwd_kernel,
        (programs, n_tiles, 1),
        (m_total, h, w, p, *division(p), q, *division(q), tiles_m, programs),
        {
            "C_IN": c_in,
            "C_OUT": c_out,
            "R": r,
            "S": s,
            "STRIDE_H": geometry.stride[0],
            "STRIDE_W": geometry.stride[1],
            "PAD_H": geometry.padding[0],
            "PAD_W": geometry.padding[1],
            "DIL_H": geometry.dilation[0],
            "DIL_W": geometry.dilation[1],
            "BORDER": max(geometry.padding) > 0,
            "CHANNELS_LAST": geometry.channels_last,
            "HAS_BIAS": geometry.has_bias,
            "RELU": geometry.epilogue != "none",
            "POOL": geometry.epilogue == "relu_maxpool2",
            "POOL_LOW": low,
            "POOL_HIGH": high,
            "INDEX_64": index_64 or bool(config.get("INDEX_64", 0)),
            "PRECISION": geometry.precision,
            "OVERLAP": overlap,
            **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
            "PREFETCH": bool(config["PREFETCH"]),
            "BIAS_LAST": bool(config["BIAS_LAST"]),
        },
        launch_options(config, overlap),
    )
    return launch, config


@lru_cache(maxsize=4096)
def _plan(geometry: Geometry, config_items: tuple[tuple[str, int], ...], device: Limits) -> Launch:
    return plan(geometry, dict(config_items), device)[0]


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """y = epilogue(conv2d(x, weight) + bias), channels_last, in x's dtype with float32 accumulation.

    Args:
        x: (N, C_in, H, W) float32 | float16 | bfloat16; contiguous and channels_last are read as they are.
        weight: (C_out, C_in, R, S) in x's dtype, read as it is where it is channels_last.
        bias: (C_out,) or None.
        epilogue: "none", "relu" or "relu_maxpool2" (2x2, stride 2, floor mode).
        config: what takes the place of `default_config`'s constants. INDEX_64=1 forces 64-bit addresses, which are
            otherwise used from 2^31 elements on.

    float32 multiplies in IEEE precision unless torch.backends.cudnn.conv.fp32_precision is "tf32".

    Raises: TypeError for another dtype or mixed dtypes.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"fused_conv2d: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"fused_conv2d: expected {name} of x's dtype {x.dtype}, got {tensor.dtype}")
    compute = interpreted_dtype(x.dtype)
    if compute != x.dtype:
        y = launch(
            x.to(compute),
            weight.to(compute),
            None if bias is None else bias.to(compute),
            stride,
            padding,
            dilation,
            epilogue,
            config,
        )
        return y.to(x.dtype)
    channels_last = not x.is_contiguous()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    switch = torch.backends.cudnn.conv
    # For mypy: torch 2.9 has it, torch's annotations do not.
    precision = "tf32" if x.dtype == torch.float32 and switch.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    geometry = Geometry(
        tuple(x.shape),
        tuple(weight.shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        epilogue,
        precision,
        x.dtype,
        channels_last,
        bias is not None,
    )  # type: ignore[arg-type]  # tuples have the right length, which their types do not say
    _, p, q = geometry.output
    y = torch.empty(
        (x.shape[0], weight.shape[0], p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if y.numel() > 0:
        run = _plan(geometry, tuple(config.items()) if config else (), limits(x.get_device()))
        run(x, weight, weight if bias is None else bias.contiguous(), y)
    return y
