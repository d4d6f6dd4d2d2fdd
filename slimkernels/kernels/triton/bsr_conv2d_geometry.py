"""Everything of a forward convolution but its tensors, and the arguments of the kernels that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.problems import conv_output_size
from slimkernels.kernels.triton.bsr_conv2d_index import column_groups
from slimkernels.kernels.triton.runtime import DTYPES, INT32_MAX, cdiv, division, power_of_2_divisor

EPILOGUES = ("none", "relu", "relu_maxpool2")
# `tiles.NO_BORDER`, `TAP_BITS`, `COMPARE`, whose module imports Triton.
NO_BORDER, TAP_BITS, COMPARE = 0, 1, 2
# A pixel's taps inside the image are the bits of one int32.
MAX_TAP_BITS = 31


class Geometry(NamedTuple):
    """Everything of a convolution but its tensors: two calls with equal geometry launch the same compiled kernels."""

    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    block_shape: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    epilogue: str
    precision: str
    dtype: torch.dtype
    capacity: int
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
    def tensor_cores(self) -> bool:
        """Whether the product runs on them: IEEE float32 does not."""
        return self.dtype != torch.float32 or self.precision == "tf32"

    @property
    def block_rows(self) -> int:
        """Rows of the BSR."""
        return cdiv(self.weight_shape[0], self.block_shape[0])

    def integers(self) -> tuple[int, ...]:
        """The integer arguments m_total ... q_shift of the kernels: what follows from the images' number and size."""
        m_total, p, q = self.output
        return (m_total, *self.x_shape[2:], p, *division(p), q, *division(q))

    def constants(self, config: Mapping[str, int], weights_on_m: bool = False) -> dict[str, int | bool | str]:
        """The constexpr arguments that both forward kernels share."""
        (_, c_in, r, s), (block_out, block_in), block_k = self.weight_shape, self.block_shape, config["BLOCK_K"]
        elements = max(torch.Size(self.x_shape).numel(), self.capacity * block_out * block_in)
        index_64 = max(elements, self.output[0] + config["BLOCK_M"]) > INT32_MAX or bool(config.get("INDEX_64", 0))
        low, high = pool_bits(config, weights_on_m)
        border = TAP_BITS if r * s <= MAX_TAP_BITS else COMPARE
        return {
            "C_IN": c_in,
            "C_OUT": self.weight_shape[0],
            "R": r,
            "S": s,
            "STRIDE_H": self.stride[0],
            "STRIDE_W": self.stride[1],
            "PAD_H": self.padding[0],
            "PAD_W": self.padding[1],
            "DIL_H": self.dilation[0],
            "DIL_W": self.dilation[1],
            "GROUPS": column_groups(self.weight_shape, self.block_shape),
            "BSR_OUT": block_out,
            "BSR_IN": block_in,
            # Columns past C_in of the last group are stored as zeros; slices that divide C_in are never read there.
            "SLICE": min(power_of_2_divisor(block_in, block_k), power_of_2_divisor(c_in, block_k)),
            "BORDER": border if max(self.padding) > 0 else NO_BORDER,
            "RAGGED_IN": c_in % block_in != 0,
            "HAS_BIAS": self.has_bias,
            "RELU": self.epilogue != "none",
            "POOL": self.epilogue == "relu_maxpool2",
            "POOL_LOW": low,
            "POOL_HIGH": high,
            "INDEX_64": index_64,
            "PRECISION": self.precision,
        }


def pool_bits(config: Mapping[str, int], weights_on_m: bool) -> tuple[int, int]:
    """POOL_LOW and POOL_HIGH: the bits of a tile's row that tell a 2x2 window's pixels apart (`tiles.window_of_row`).

    A thread of a matrix product holds rows 8 apart of its accumulator and, where a tile has more than 16 rows a warp,
    rows half a tile apart; with weights on M, pixels are the accumulator's columns, of which it holds neighbours.
    """
    if weights_on_m or config["BLOCK_M"] < 32 * config["num_warps"]:
        return 0, 3
    return 3, config["BLOCK_M"].bit_length() - 2


def check(op: str, x: Tensor, values: Tensor, bias: Tensor | None, epilogue: str) -> None:
    """Raises TypeError for a dtype the kernels do not take or mixed dtypes, ValueError for an unknown epilogue."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        # For mypy: if the values fit, the bias is there and does not.
        got = values.dtype if values.dtype != x.dtype else bias.dtype  # type: ignore[union-attr]
        raise TypeError(f"{op}: expected values and bias of x's dtype {x.dtype}, got {got}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"{op}: expected epilogue in {EPILOGUES}, got {epilogue!r}")
