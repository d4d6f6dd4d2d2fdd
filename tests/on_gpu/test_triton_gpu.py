"""The Triton kernels on a CUDA GPU, against float64 references: the interpreter's cases and layers of real size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from precision import fp32_precision
from triton_cases import (
    CONV_CASES,
    CORE_CASES,
    IMAGES_CASES,
    IMAGES_RAGGED_C_IN,
    LOW_RANK_CASES,
    MORE_BLOCK_SHAPES,
    ONE_SLICE_CASES,
    SPLIT_CASES,
    VARIANT_CASES,
    VARIANTS,
    ConvCase,
    build,
    check_conv,
    check_linear,
    check_low_rank,
    check_nonfinite,
    compare_conv,
    run_conv,
)

from slimkernels import testing
from slimkernels.kernels.problems import ConvProblem
from slimkernels.kernels.triton.bsr_conv2d_config import device_configs

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
shapes = pytest.mark.parametrize("block_shape", MORE_BLOCK_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize("name", [*CONV_CASES, *SPLIT_CASES])
@dtypes
def test_conv(dtype: torch.dtype, name: str) -> None:
    check_conv((CONV_CASES | SPLIT_CASES)[name], (16, 16), dtype, "cuda")


@pytest.mark.parametrize("block_shape", ((16, 16), (32, 32), (128, 32)), ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", [*ONE_SLICE_CASES, *IMAGES_CASES])
def test_conv_one_slice_a_stage(name: str, block_shape: tuple[int, int]) -> None:
    """Stages of one slice in both kinds of kernels; blocks of 32 channels hold two of them."""
    for dtype in DTYPES.values():
        check_conv((ONE_SLICE_CASES | IMAGES_CASES)[name], block_shape, dtype, "cuda")


@dtypes
def test_conv_one_position_a_tile(dtype: torch.dtype) -> None:
    """Half of the last block is no channel of the image; default tiles of two sizes of batch, the last one ragged."""
    check_conv(IMAGES_RAGGED_C_IN, (32, 32), dtype, "cuda")
    for block_shape in ((32, 16), (64, 64), (128, 16), (256, 16)):
        for image in ((3, 9, 7), (200, 8, 8)):
            case = ConvCase(image=image, sparsity=0.875, variant="images_on_m", block_m=None)
            check_conv(case, block_shape, dtype, "cuda")


@shapes
@pytest.mark.parametrize("name", CORE_CASES)
def test_conv_block_shapes(name: str, block_shape: tuple[int, int]) -> None:
    for dtype in DTYPES.values():
        check_conv(CONV_CASES[name], block_shape, dtype, "cuda")


@shapes
@pytest.mark.parametrize("variant", VARIANTS)
def test_conv_variants(variant: str, block_shape: tuple[int, int]) -> None:
    """The other kernels of the op, with small tiles and with their default for a large image."""
    if variant == "shared_input" and block_shape[0] > 64:
        pytest.skip("block rows of more than 64 outputs do not share input")
    for name in VARIANT_CASES:
        for dtype in DTYPES.values():
            check_conv(replace(CONV_CASES[name], variant=variant), block_shape, dtype, "cuda")
    large = ConvCase(image=(9, 45, 47), sparsity=0.875, block_m=None, variant=variant)
    check_conv(large, block_shape, torch.bfloat16, "cuda")


@pytest.mark.parametrize("image", ((1, 4, 4), (8, 32, 32)), ids=("small", "large"))
@pytest.mark.parametrize("variant", ("pixels_on_m", "images_on_m", *VARIANTS))
@dtypes
def test_every_configuration_the_tuner_may_try(dtype: torch.dtype, variant: str, image: tuple[int, int, int]) -> None:
    block_shape = (64, 16)
    case = ConvCase(image=image, sparsity=0.7, variant=variant)
    x, weight, bias = build(case, block_shape, dtype)
    n, c_in, h, w = x.shape
    c_out, _, r, s = weight.weight_shape
    geometry = n, c_in, h, w, c_out, r, s, case.stride, case.padding, case.dilation
    problem = ConvProblem(*geometry, block_shape, weight.nnz_blocks, dtype, "cuda", case.epilogue)
    for config in device_configs(variant, problem):
        with fp32_precision("ieee"):
            y = run_conv(case, x, weight, bias, "cuda", config)
        result = compare_conv(y, case, x, weight, bias)
        assert result.passed, f"{config}: {result.message}"


@shapes
@dtypes
def test_conv_default_tiles_of_a_large_image(dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """Enough pixels for the largest tile and several waves; the last tile is ragged."""
    for epilogue in ("relu", "relu_maxpool2"):
        case = ConvCase(image=(9, 45, 47), sparsity=0.875, epilogue=epilogue, block_m=None)
        check_conv(case, block_shape, dtype, "cuda")


@shapes
def test_conv_tf32(block_shape: tuple[int, int]) -> None:
    """With torch's switch at tf32 both factors lose their 13 low bits (dropped, not rounded), and no more."""
    case = ConvCase(image=(3, 17, 19), sparsity=0.8, epilogue="none", block_m=None)
    x, weight, bias = build(case, block_shape, torch.float32)
    with fp32_precision("tf32"):
        y = run_conv(case, x, weight, bias, "cuda")
    result = compare_conv(y, case, x, weight, bias, u_mul=2 * testing.TF32_DROPPED)
    assert result.passed, result.message
    assert not compare_conv(y, case, x, weight, bias).passed, "tf32 was asked for and IEEE arithmetic ran"


@shapes
def test_linear(block_shape: tuple[int, int]) -> None:
    for variant in ("pixels_on_m", "weights_on_m", "shared_input"):
        for dtype in DTYPES.values() if variant != "shared_input" or block_shape[0] <= 64 else ():
            check_linear(block_shape, dtype, "cuda", variant)


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


@pytest.mark.parametrize("case", (ConvCase(block_m=None), SPLIT_CASES["splits"]), ids=("whole", "split"))
def test_launch_follows_the_device_of_x(case: ConvCase) -> None:
    """Called with another device current; twice, because the second launch takes the remembered kernel."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    x, weight, bias = build(case, (64, 16), torch.float16)
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0", "cuda:1", "cuda:0"):
            y = run_conv(case, x, weight, bias, device)
            result = compare_conv(y, case, x, weight, bias)
            assert y.device == torch.device(device) and result.passed, result.message


@pytest.mark.parametrize("variant", ("pixels_on_m", "images_on_m", *VARIANTS))
def test_split_and_unsplit_kernels_repeat_bit_for_bit(variant: str) -> None:
    case = IMAGES_CASES["images"] if variant == "images_on_m" else replace(SPLIT_CASES["splits"], variant=variant)
    x, weight, bias = build(case, (64, 16), torch.float32)
    first = run_conv(case, x, weight, bias, "cuda")
    assert all(torch.equal(run_conv(case, x, weight, bias, "cuda"), first) for _ in range(5))


@pytest.mark.parametrize("ordered", (True, False), ids=("ordered", "storage_order"))
@pytest.mark.parametrize("variant", ("pixels_on_m", "images_on_m", *VARIANTS))
def test_captured_in_a_graph(variant: str, ordered: bool) -> None:
    case = IMAGES_CASES["images"] if variant == "images_on_m" else replace(SPLIT_CASES["splits"], variant=variant)
    case = replace(case, ordered=ordered)
    x, weight, bias = build(case, (64, 16), torch.float16)
    x, bias = x.cuda(), bias.cuda()
    parts = (t.cuda() for t in (weight.values, weight.crow_indices, weight.col_indices))
    weight = type(weight)(*parts, weight.weight_shape, weight.block_shape)
    warm = run_conv(case, x, weight, bias, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_conv(case, x, weight, bias, "cuda")
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, run_conv(case, x, weight, bias, "cuda")) and not torch.equal(y, warm)
