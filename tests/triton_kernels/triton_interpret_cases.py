"""The Triton kernels on CPU tensors: run by test_triton_interpret.py in a process with TRITON_INTERPRET=1.

bfloat16 is checked here through the float32 route that launches take under the interpreter, and as compiled code on a
GPU (tests/on_gpu/test_triton_gpu.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from precision import fp32_precision
from triton.runtime import interpreter
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
    tile,
)

from slimkernels import ops, testing
from slimkernels.kernels import KERNELS
from slimkernels.kernels.triton import bsr_conv2d as triton_bsr_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton import runtime as triton_runtime

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("triton_interpret_cases.py needs TRITON_INTERPRET=1 before the kernels are decorated", returncode=2)

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def named(shapes: Iterable[tuple[int, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block_shape", list(shapes), ids=lambda s: f"{s[0]}x{s[1]}")


# A vector, narrow, odd and tall blocks, one of two tiles: one for every way the kernel's constants differ.
shapes = named(((1, 1), (16, 1), (24, 24), (64, 16), (256, 16)))
every_shape = named(MORE_BLOCK_SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
variants = pytest.mark.parametrize("variant", VARIANTS)


def height_shared(block_shape: tuple[int, int], variant: str) -> bool:
    """Whether the variant takes blocks of this height."""
    return variant != "shared_input" or block_shape[0] <= 64


@pytest.mark.parametrize("name", [*CONV_CASES, *SPLIT_CASES])
def test_conv(name: str) -> None:
    check_conv((CONV_CASES | SPLIT_CASES)[name], (16, 16), torch.float32)


@pytest.mark.parametrize("block_shape", ((16, 16), (32, 32)), ids=("16x16", "32x32"))
@pytest.mark.parametrize("name", ONE_SLICE_CASES)
def test_conv_one_slice_a_stage(name: str, block_shape: tuple[int, int]) -> None:
    check_conv(ONE_SLICE_CASES[name], block_shape, torch.float32)


@pytest.mark.parametrize("name", IMAGES_CASES)
def test_conv_one_position_a_tile(name: str) -> None:
    check_conv(IMAGES_CASES[name], (16, 16), torch.float32)


@pytest.mark.parametrize(
    ("block_shape", "dtype"), [((32, 32), torch.float32), ((64, 16), torch.float16), ((24, 16), torch.bfloat16)]
)
def test_conv_one_position_a_tile_of_other_blocks(block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    for name in ("images_ragged", "images_stride", "images_default_tile"):
        check_conv(IMAGES_CASES[name], block_shape, dtype)
    if block_shape == (32, 32):
        check_conv(IMAGES_RAGGED_C_IN, block_shape, dtype)


def test_conv_one_position_a_tile_says_what_it_does_not_take() -> None:
    for change, words in (
        ({"epilogue": "relu_maxpool2"}, "no max-pool"),
        ({"kernel": (5, 5), "padding": (2, 2)}, "at most 3 rows of taps"),
        ({"block_k": 32}, "stages of channels that follow each other"),
    ):
        case = replace(IMAGES_CASES["images"], **change)
        x, weight, bias = build(case, (16, 16), torch.float32)
        with pytest.raises(ValueError, match=f"^bsr_conv2d: expected .*{words}"):
            run_conv(case, x, weight, bias)


@shapes
@pytest.mark.parametrize("name", ("m_gt_tile", "ragged_half_block"))
def test_conv_block_shapes(name: str, block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES[name], block_shape, torch.float32)


@named(((16, 1), (64, 16)))
def test_conv_float16(block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES["ragged_half_block"], block_shape, torch.float16)


@variants
@pytest.mark.parametrize("name", VARIANT_CASES)
def test_conv_variants(name: str, variant: str) -> None:
    check_conv(replace(CONV_CASES[name], variant=variant), (16, 16), torch.float32)


@variants
def test_conv_variants_narrow_and_default(variant: str) -> None:
    check_conv(replace(CONV_CASES["ragged_c_in"], variant=variant, block_m=None), (16, 1), torch.float16)
    check_conv(replace(CONV_CASES["storage_order"], variant=variant), (24, 24), torch.float32)
    if variant != "shared_input":
        check_conv(replace(SPLIT_CASES["splits_ragged_maxpool"], variant=variant), (16, 16), torch.float32)


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("name", [*CONV_CASES, *SPLIT_CASES])
def test_conv_every_case(name: str, block_shape: tuple[int, int]) -> None:
    check_conv((CONV_CASES | SPLIT_CASES)[name], block_shape, torch.float32)


@pytest.mark.slow
@every_shape
@pytest.mark.parametrize("name", CORE_CASES)
def test_conv_every_shape(name: str, block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES[name], block_shape, torch.float16 if name == "ragged_half_block" else torch.float32)


@pytest.mark.slow
@every_shape
@variants
def test_conv_variants_every_shape(variant: str, block_shape: tuple[int, int]) -> None:
    for name in VARIANT_CASES if height_shared(block_shape, variant) else ():
        check_conv(replace(CONV_CASES[name], variant=variant), block_shape, torch.float32)
    if variant != "shared_input":
        check_conv(replace(SPLIT_CASES["splits"], variant=variant), block_shape, torch.float16)


@pytest.mark.parametrize("name", ("m_gt_tile", "maxpool_odd"))
def test_conv_bfloat16(name: str) -> None:
    check_conv(CONV_CASES[name], (16, 16), torch.bfloat16)


@shapes
def test_linear(block_shape: tuple[int, int]) -> None:
    check_linear(block_shape, torch.float32)


@pytest.mark.parametrize("variant", ("weights_on_m", "shared_input"))
def test_linear_variants(variant: str) -> None:
    check_linear((64, 16), torch.float16, variant=variant)
    if variant == "weights_on_m":
        check_linear((64, 16), torch.float32, "cpu", variant, tile((64, 16), 16, "cpu") | {"BLOCK_K": 16, "SPLITS": 2})


@pytest.mark.slow
@every_shape
@dtypes
def test_linear_every_shape(dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    for variant in ("pixels_on_m", "weights_on_m", "shared_input"):
        if height_shared(block_shape, variant):
            check_linear(block_shape, dtype, variant=variant)


def test_launching_shared_input_again_regroups_a_changed_pattern() -> None:
    """The groups of rows are remembered for the index tensor, until it is written to."""
    case = replace(CONV_CASES["m_lt_tile"], variant="shared_input")
    x, weight, bias = build(case, (16, 16), torch.float32)
    moved = testing.wrong_block(weight)
    assert not torch.equal(moved.col_indices, weight.col_indices)
    assert compare_conv(run_conv(case, x, weight, bias), case, x, weight, bias).passed
    weight.col_indices.copy_(moved.col_indices)
    assert compare_conv(run_conv(case, x, weight, bias), case, x, moved, bias).passed


@pytest.mark.parametrize("name", LOW_RANK_CASES)
def test_low_rank(name: str) -> None:
    check_low_rank(LOW_RANK_CASES[name], torch.float32)


@pytest.mark.parametrize("name", ("m_gt_tile", "rank_ragged", "splits"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_low_rank_16_bit(dtype: torch.dtype, name: str) -> None:
    check_low_rank(LOW_RANK_CASES[name], dtype)


@pytest.mark.parametrize("epilogue", ("none", "relu_maxpool2"))
@named(((8, 1), (16, 16)))
def test_nonfinite_inputs_reach_what_reads_them(block_shape: tuple[int, int], epilogue: str) -> None:
    check_nonfinite(block_shape, epilogue)


@named(((16, 1), (64, 16)))
@dtypes
@pytest.mark.parametrize("variant", ("pixels_on_m", *VARIANTS))
def test_a_dropped_block_or_term_is_seen(variant: str, dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """The bound is tight enough: the right result fails against a reference that lacks one term or moves one block."""
    case = ConvCase(image=(1, 4, 4), epilogue="none", variant=variant)
    x, weight, bias = build(case, block_shape, dtype)
    with fp32_precision("ieee"):
        y = run_conv(case, x, weight, bias)
    assert compare_conv(y, case, x, weight, bias).passed
    values = weight.values.clone()
    values[len(values) // 2] = 0
    lacking = type(weight)(values, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    for mutant in (lacking, testing.drop_term(weight), testing.wrong_block(weight)):
        assert not compare_conv(y, case, x, mutant, bias).passed


def test_addresses_beyond_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third image of 2^30 elements lies past int32. Only the pages that the kernel reads come into being."""
    # The interpreter copies every argument's storage back onto itself, which would touch all 6 GiB.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    case = ConvCase(image=(3, 8192, 8192), kernel=(1, 1), stride=(4096, 4096), padding=(0, 0), epilogue="none")
    weight = testing.random_bsr((16, 16), (16, 16), 0.0, dtype=torch.float16, pattern="all_dense")
    x = torch.empty((3, 16, 8192, 8192), dtype=torch.float16, memory_format=torch.channels_last)
    x[:, :, ::4096, ::4096] = testing.random_tensor(3, 16, 2, 2, seed=1, dtype=torch.float16)
    y = run_conv(case, x, weight, None)
    seen = x[:, :, ::4096, ::4096].clone()
    result = compare_conv(y, ConvCase(kernel=(1, 1), padding=(0, 0), epilogue="none"), seen, weight, None)
    assert result.passed, result.message


def test_ops_run_the_triton_kernels() -> None:
    assert triton_runtime.available() is None
    case = replace(CONV_CASES["ragged_half_block"], block_m=None)
    x, weight, bias = build(case, (16, 16), torch.float32)
    y = ops.bsr_conv2d(
        x,
        *(weight.values, weight.crow_indices, weight.col_indices, bias),
        weight_shape=weight.weight_shape,
        block_shape=weight.block_shape,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        epilogue=case.epilogue,
        kernel="bsr_conv2d__triton",
    )
    assert torch.equal(y, run_conv(case, x, weight, bias))
    for op in ("bsr_conv2d", "bsr_linear", "low_rank_linear"):
        assert KERNELS[f"{op}__triton"].available() is None


def test_refusals_name_what_was_expected() -> None:
    case = ConvCase()
    x, weight, bias = build(case, (16, 16), torch.float32)
    with pytest.raises(TypeError, match=r"^bsr_conv2d: expected x of dtype .*, got torch\.float64"):
        run_conv(case, x.double(), weight, bias)
    with pytest.raises(TypeError, match=r"^bsr_conv2d: expected values and bias of x's dtype torch\.float16"):
        run_conv(case, x.half(), weight, bias)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        run_conv(case, x, weight, bias.double())
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected epilogue in .*, got 'gelu'"):
        run_conv(ConvCase(epilogue="gelu"), x, weight, bias)
    u, v = torch.ones(4, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^bsr_linear: expected epilogue in .*, got 'relu_maxpool2'"):
        triton_bsr_conv2d.launch_linear(
            torch.ones(2, 32), weight.values, weight.crow_indices, weight.col_indices, None, [], (32, 32), (16, 16),
            "relu_maxpool2",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^low_rank_linear: expected epilogue in .*, got 'relu_maxpool2'"):
        triton_low_rank_linear.launch(torch.ones(2, 3), u, v, None, [], "relu_maxpool2")
    with pytest.raises(TypeError, match=r"^low_rank_linear: expected U of x's dtype torch\.float32"):
        triton_low_rank_linear.launch(torch.ones(2, 3), u.half(), v, None, [], "none")
    with pytest.raises(TypeError, match=r"^low_rank_linear: expected x of dtype"):
        triton_low_rank_linear.launch(torch.ones(2, 3).double(), u.double(), v.double(), None, [], "none")
