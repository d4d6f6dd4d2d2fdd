"""The Triton kernels on CPU tensors: run by tests/test_triton_interpret.py in a process with TRITON_INTERPRET=1.

bfloat16 is checked here through the float32 route that launches take under the interpreter, and as compiled code on a
GPU (tests/test_triton_gpu.py).
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from triton.runtime import interpreter
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

from slimkernels import ops, testing
from slimkernels.kernels import KERNELS
from slimkernels.kernels.triton import bsr_conv2d as triton_bsr_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton import runtime as triton_runtime

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("triton_interpret_cases.py needs TRITON_INTERPRET=1 before the kernels are decorated", returncode=2)

DTYPES = {"float32": torch.float32, "float16": torch.float16}
shapes = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize("name", CONV_CASES)
def test_conv(name: str) -> None:
    check_conv(CONV_CASES[name], (16, 16), torch.float32)


@shapes
@pytest.mark.parametrize("name", CORE_CASES)
@dtypes
def test_conv_block_shapes(dtype: torch.dtype, name: str, block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES[name], block_shape, dtype)


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("name", [name for name in CONV_CASES if name not in CORE_CASES])
def test_conv_every_case(name: str, block_shape: tuple[int, int]) -> None:
    check_conv(CONV_CASES[name], block_shape, torch.float32)


@pytest.mark.parametrize("name", ("m_gt_tile", "ragged_half_block", "maxpool_odd"))
def test_conv_bfloat16(name: str) -> None:
    check_conv(CONV_CASES[name], (16, 16), torch.bfloat16)


@shapes
@dtypes
def test_linear(dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    check_linear(block_shape, dtype)


@pytest.mark.parametrize("name", LOW_RANK_CASES)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.bfloat16], ids=[*DTYPES, "bfloat16"])
def test_low_rank(dtype: torch.dtype, name: str) -> None:
    check_low_rank(LOW_RANK_CASES[name], dtype)


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
@pytest.mark.parametrize("block_shape", ((1, 1), (8, 1), (16, 16)), ids=lambda s: f"{s[0]}x{s[1]}")
def test_nonfinite_inputs_reach_what_reads_them(block_shape: tuple[int, int], epilogue: str) -> None:
    check_nonfinite(block_shape, epilogue)


@shapes
@dtypes
def test_a_dropped_block_or_term_is_seen(dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """The bound is tight enough: the right result fails against a reference that lacks one term or moves one block."""
    case = ConvCase(epilogue="none")
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
