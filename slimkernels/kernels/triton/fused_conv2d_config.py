"""What `fused_conv2d` takes, and its launch configurations. Does not import Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from slimkernels.kernels.problems import FusedConvProblem, Problem, SizedProblem, conv_output_size
from slimkernels.kernels.triton.runtime import next_power_of_2
from slimkernels.kernels.triton.runtime import shape_reason as _device_reason

# Products of one output. A pixel's are held in registers, as many as BLOCK_K at once, and their loads are unrolled.
MAX_DEPTH = 256


class Geometry(NamedTuple):
    """Everything of a convolution but its tensors: two calls with equal geometry launch the same compiled kernel."""

    x_shape: tuple[int, int, int, int]
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    epilogue: str
    precision: str
    dtype: torch.dtype
    channels_last: bool
    has_bias: bool

    @property
    def output(self) -> tuple[int, int, int]:
        """(rows of M, P, Q): pooled P and Q, and M with the four pixels of every window, under relu_maxpool2."""
        p, q = (
            conv_output_size(*args)
            for args in zip(self.x_shape[2:], self.weight_shape[2:], self.stride, self.padding, self.dilation)
        )
        if self.epilogue == "relu_maxpool2":
            return self.x_shape[0] * (p // 2) * (q // 2) * 4, p // 2, q // 2
        return self.x_shape[0] * p * q, p, q

    @property
    def depth(self) -> int:
        """Products of one output: R * S * C_in."""
        _, c_in, r, s = self.weight_shape
        return c_in * r * s

    @property
    def tensor_cores(self) -> bool:
        """Whether the product runs on them: IEEE float32 does not."""
        return self.dtype != torch.float32 or self.precision == "tf32"


def default_config(geometry: Geometry) -> dict[str, int]:
    """Tile constants of a launch.

    Measured on an H200 (3 -> 64 channels of 1024 images 32x32 in bfloat16): 128 pixels on 4 warps take 47 to 50 us, of
    which writing the output alone is 41; 256 pixels on 8 warps 55, 64 pixels or fewer a warp 60 and more, and two
    threads for a pixel load everything twice. The same tile is the fastest of 1 and of 16 images. Pixels asked for
    ahead gain 2 us where a pixel's patch is held whole, and lose a fifth where a part of it is (7x7). Three programs
    share a processor's registers at 160 a thread.

    Returns: BLOCK_M, BLOCK_N, BLOCK_K, PROGRAMS (of a processor, which share the tiles), PREFETCH, BIAS_LAST,
        num_warps, num_stages, and maxnreg where a thread's registers are capped.
    """
    block_m = min(128 if geometry.tensor_cores else 64, max(16, next_power_of_2(geometry.output[0])))
    block_k = min(max(next_power_of_2(geometry.depth), 16), 32)
    ahead = geometry.tensor_cores and geometry.depth <= block_k
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": min(max(next_power_of_2(geometry.weight_shape[0]), 16), 64),
        "BLOCK_K": block_k,
        "PROGRAMS": 3 if geometry.tensor_cores else 4,
        "PREFETCH": int(ahead),
        "BIAS_LAST": 0,
        "num_warps": 4,
        "num_stages": 1,
    }
    return {**config, "maxnreg": 160} if ahead else config


def shape_reason(problem: Problem) -> str | None:
    """None when the kernel takes the problem, else why not."""
    if isinstance(problem, FusedConvProblem) and problem.c_in * problem.r * problem.s > MAX_DEPTH:
        return f"an output takes more than {MAX_DEPTH} products"
    return _device_reason(problem)


def device_configs(problem: SizedProblem) -> list[dict[str, int]]:
    """Launch configurations worth trying on a problem, as changes of `default_config`, which comes first.

    With the bias added last a thread needs 128 registers, so that four programs share a processor.
    """
    if problem.device != "cuda":
        return [{}]
    return [
        {},
        {"BIAS_LAST": 1, "PROGRAMS": 4, "maxnreg": 128},
        {"BIAS_LAST": 1},
        {"BIAS_LAST": 1, "PROGRAMS": 4, "maxnreg": 128, "PREFETCH": 0},
        {"PROGRAMS": 6},
        {"BLOCK_M": 256, "num_warps": 8, "PROGRAMS": 2, "PREFETCH": 0},
    ]
