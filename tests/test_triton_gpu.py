"""The Triton kernels on a CUDA GPU, against float64 references: the interpreter's cases and layers of real size."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import (
    BLOCK_SHAPES,
    CONV_CASES,
    CORE_CASES,
    LOW_RANK_CASES,
    ConvCase,
    build,
    check_conv,
    check_linear,
    check_low_rank,
    check_nonfinite,
    compare_conv,
    fp32_precision,
    run_conv,
)

from slimkernels import testing

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
shapes = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize("name", CONV_CASES)
@dtypes
def test_conv(dtype: torch.dtype, name: str) -> None:
    check_conv(CONV_CASES[name], (16, 16), dtype, "cuda")


@shapes
@pytest.mark.parametrize("name", CORE_CASES)
@dtypes
def test_conv_block_shapes(dtype: torch.dtype, name: str, block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES[name], block_shape, dtype, "cuda")


@shapes
@dtypes
@pytest.mark.parametrize("epilogue", ("relu", "relu_maxpool2"))
def test_conv_default_tiles_of_a_large_image(epilogue: str, dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """Enough pixels for the largest tile and several waves; the last tile is ragged."""
    case = ConvCase(image=(9, 45, 47), sparsity=0.875, epilogue=epilogue, block_m=None)
    check_conv(case, block_shape, dtype, "cuda")


@shapes
def test_conv_tf32(block_shape: tuple[int, int]) -> None:
    """With torch's switch at tf32 the factors lose 13 bits (dropped, not rounded: 2^-10 each), and no more."""
    case = ConvCase(image=(3, 17, 19), sparsity=0.8, epilogue="none", block_m=None)
    x, weight, bias = build(case, block_shape, torch.float32)
    with fp32_precision("tf32"):
        y = run_conv(case, x, weight, bias, "cuda")
    result = compare_conv(y, case, x, weight, bias, u_mul=2.0**-10)
    assert result.passed, result.message
    assert not compare_conv(y, case, x, weight, bias).passed, "tf32 was asked for and IEEE arithmetic ran"


@shapes
@dtypes
def test_linear(dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    check_linear(block_shape, dtype, "cuda")


@pytest.mark.parametrize("name", LOW_RANK_CASES)
@dtypes
def test_low_rank(dtype: torch.dtype, name: str) -> None:
    check_low_rank(LOW_RANK_CASES[name], dtype, "cuda")


@pytest.mark.parametrize("rank", (16, 64, 128, 256, 320))
@pytest.mark.parametrize("m", (1, 100, 5000))
@dtypes
def test_low_rank_default_tiles(dtype: torch.dtype, m: int, rank: int) -> None:
    case = next(iter(LOW_RANK_CASES.values()))
    check_low_rank(type(case)(lead=(m,), features=(520, 776), rank=rank), dtype, "cuda")


def test_low_rank_tf32() -> None:
    case = next(iter(LOW_RANK_CASES.values()))
    check_low_rank(type(case)(lead=(300,), features=(512, 256), rank=64), torch.float32, "cuda", "tf32")


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
@pytest.mark.parametrize("block_shape", ((1, 1), (8, 1), (16, 16)), ids=lambda s: f"{s[0]}x{s[1]}")
def test_nonfinite_inputs_reach_what_reads_them(block_shape: tuple[int, int], epilogue: str) -> None:
    check_nonfinite(block_shape, epilogue, "cuda")


@shapes
def test_a_dropped_term_is_seen(block_shape: tuple[int, int]) -> None:
    case = ConvCase(epilogue="none", block_m=None)
    x, weight, bias = build(case, block_shape, torch.bfloat16)
    y = run_conv(case, x, weight, bias, "cuda")
    assert compare_conv(y, case, x, weight, bias).passed
    assert not compare_conv(y, case, x, testing.wrong_block(weight), bias).passed


def test_launch_follows_the_current_stream() -> None:
    """x is written on a side stream after a long wait there; a launch on another stream would read the old x."""
    case = ConvCase(image=(4, 16, 16), block_m=None)
    x, weight, bias = build(case, (64, 16), torch.float16)
    moved = torch.zeros_like(x, device="cuda")
    source = x.cuda()
    side = torch.cuda.Stream()
    run_conv(case, moved, weight, bias, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        moved.copy_(source)
        y = run_conv(case, moved, weight, bias, "cuda")
    side.synchronize()
    result = compare_conv(y, case, x, weight, bias)
    assert result.passed, result.message
