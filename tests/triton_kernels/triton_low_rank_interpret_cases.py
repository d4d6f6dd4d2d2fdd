"""The Triton low-rank convolution and gradients on CPU tensors: run by test_triton_low_rank.py with
TRITON_INTERPRET=1. The linear layer's forward is in triton_interpret_cases.py.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimkernels import ops, testing
from slimkernels.cases import LowRankConvCase, assert_matches_reference, launch
from slimkernels.kernels.triton import low_rank_conv2d as triton_low_rank_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.testing import UNIT_ROUNDOFF, assert_close, random_tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("triton_low_rank_interpret_cases.py needs TRITON_INTERPRET=1", returncode=2)

KERNEL = "low_rank_conv2d__triton"
KINDS = {"svd": (20,), "tai": (20,), "tucker2": (5, 20)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "RANK": 32, "SPLITS": 2, "num_warps": 4, "num_stages": 2}
# Named by the arithmetic of the tiles; base: 2 images 7x9, 6 -> 10 channels, 3x3, padding 1.
SIZES = {
    "m_lt_tile": {"n": 1, "h": 2, "w": 3},
    "relu_n_gt_tile": {"epilogue": "relu", "c_out": 83},
    "k_gt_tile": {"c_in": 70, "h": 3, "w": 3},
    "k_div_tile": {"c_in": 64, "h": 4, "w": 4, "bias": False},
    "strided": {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1), "h": 11, "w": 10},
    "padding_exceeds_image": {"n": 1, "h": 2, "w": 1, "padding": (3, 2), "dilation": (2, 2)},
    "kernel_5x1": {"kernel_size": (5, 1), "padding": (2, 0)},
    "one_channel": {"c_in": 1, "c_out": 1, "n": 1},
    "batch_0": {"n": 0},
}
CASES = [
    LowRankConvCase(f"{kind}_{name}", kind, ranks=ranks, **sizes)
    for kind, ranks in KINDS.items()
    for name, sizes in SIZES.items()
]
WIDE = [
    LowRankConvCase("svd_rank_above_tile", "svd", ranks=(300,), n=1, h=3, w=3, epilogue="relu"),
    LowRankConvCase("tucker2_rank_above_tile", "tucker2", ranks=(4, 290), n=1, h=3, w=3, epilogue="relu"),
    LowRankConvCase("svd_rank_256", "svd", ranks=(256,), n=1, h=3, w=3),
    LowRankConvCase("svd_rank_1", "svd", ranks=(1,)),
    LowRankConvCase("tai_rank_150", "tai", ranks=(150,), n=1, h=3, w=3, epilogue="relu"),
]


# One of each kind of code; the others differ in geometry alone.
CORE = ("relu_n_gt_tile", "strided", "batch_0", "svd_rank_above_tile", "svd_rank_256")


@pytest.mark.parametrize("case", [c for c in (*CASES, *WIDE) if c.name.endswith(CORE)], ids=lambda c: c.name)
def test_conv(case: LowRankConvCase) -> None:
    assert_matches_reference(KERNEL, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in (*CASES, *WIDE) if not c.name.endswith(CORE)], ids=lambda c: c.name)
def test_conv_every_case(case: LowRankConvCase) -> None:
    assert_matches_reference(KERNEL, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_conv_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    case = LowRankConvCase(kind, kind, ranks=KINDS[kind], epilogue="relu", dtype=dtype)
    assert_matches_reference(KERNEL, case)
    y = launch(KERNEL, case, case.inputs())
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [{}, {"SPLITS": 7}, {"INDEX_64": 1}], ids=str)
def test_conv_tiles(kind: str, extra: dict[str, int]) -> None:
    """Several tiles in every direction, more splits than tiles, 64-bit addresses."""
    case = LowRankConvCase(kind, kind, ranks=KINDS[kind], n=1, h=4, w=5, c_in=20, c_out=37, epilogue="relu")
    inputs = case.inputs()
    y = triton_low_rank_conv2d.launch(*case.launch_args(*inputs), config={**TILE, **extra})
    ref, bound = case.expected(*inputs)
    assert_close(y, ref, **bound)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_sees_one_dropped_weight(kind: str) -> None:
    case = LowRankConvCase(kind, kind, ranks=KINDS[kind])
    x, factors, bias = case.inputs()
    ref, bound = case.expected(x, factors, bias)
    for i in range(len(factors)):
        spoilt = [f.clone() for f in factors]
        spoilt[i].view(-1)[int(spoilt[i].abs().argmax())] = 0
        y = launch(KERNEL, case, (x, spoilt, bias))
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(y, ref, **bound)


def test_nan_passes_the_relu() -> None:
    case = LowRankConvCase("nan", "svd", ranks=(5,), epilogue="relu", kernel_size=(1, 1), padding=(0, 0))
    x, factors, bias = case.inputs()
    x[1, :, 3, 4] = torch.nan
    y = launch(KERNEL, case, (x, factors, bias))
    assert y[1, :, 3, 4].isnan().all() and int(y.isnan().sum()) == case.c_out


@pytest.mark.parametrize("kind", KINDS)
def test_conv_gradients(kind: str) -> None:
    """The backward is torch's, factor by factor; forward through Triton, non-contiguous gradient."""
    case = LowRankConvCase(kind, kind, ranks=KINDS[kind], n=1, epilogue="relu")
    x, factors, bias = case.inputs()
    leaves = [t.clone().requires_grad_(True) for t in (x, *factors, bias)]
    doubles = [t.detach().double().requires_grad_(True) for t in leaves]
    grads = []
    for inputs, kernel in ((leaves, KERNEL), (doubles, "low_rank_conv2d__reference")):
        y = ops.low_rank_conv2d(inputs[0], inputs[1:-1], inputs[-1], kind=kind, padding=(1, 1), epilogue="relu",
                                kernel=kernel)  # fmt: skip
        weights = random_tensor(*y.shape[:2], y.shape[3], y.shape[2], seed=9).to(y.dtype).transpose(2, 3)
        grads.append(torch.autograd.grad(y, inputs, weights))
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# Linear gradients
def check_dgrad(m: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype, config=None) -> None:
    grad = random_tensor(m, out_features, seed=1, dtype=dtype)
    u, v = random_tensor(out_features, rank, seed=2, dtype=dtype), random_tensor(rank, in_features, seed=3, dtype=dtype)
    grad_x, grad_z = triton_low_rank_linear.launch_dgrad(grad, u, v, config)
    assert grad_x.is_contiguous() and grad_z.is_contiguous() and grad_x.dtype == grad_z.dtype == dtype
    u_mul = UNIT_ROUNDOFF[dtype]
    scale, terms = testing.scale_low_rank_linear(grad, v.t(), u.t())
    assert_close(grad_x, grad.double() @ u.double() @ v.double(), scale=scale, terms=terms, u_mul=u_mul)
    scale = (grad.double().square() @ u.double().square()).sqrt()
    assert_close(grad_z, grad.double() @ u.double(), scale=scale, terms=out_features)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_dgrad(rank: int, dtype: torch.dtype) -> None:
    check_dgrad(37, 45, 70, rank, dtype)


@pytest.mark.parametrize(
    ("m", "sizes", "extra"),
    [
        (5, (33, 90, 20), {"SPLITS": 3}), (40, (16, 16, 32), {"SPLITS": 1}), (3, (17, 3, 7), {"SPLITS": 5}),
        (0, (8, 8, 4), {}), (20, (33, 20, 33), {}), (18, (20, 35, 9), {"INDEX_64": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_dgrad_tiles(m: int, sizes: tuple[int, int, int], extra: dict[str, int]) -> None:
    """Splits that write grad_z once, ragged tiles, an empty batch, a rank above the tile (torch's two products)."""
    check_dgrad(m, *sizes, torch.float32, {**TILE, **extra})


def test_dgrad_above_the_rank_tile() -> None:
    check_dgrad(6, 20, 24, 300, torch.float32)


def gradients(inputs: list[Tensor], kernel: str, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
    x, u, v, bias = inputs
    y = ops.low_rank_linear(x, u, v, bias, epilogue="relu", kernel=kernel)
    weights = random_tensor(y.shape[-1], *lead, seed=9).to(y.dtype).movedim(0, -1)
    return torch.autograd.grad(y, inputs, weights)


@pytest.mark.parametrize("lead", [(7,), (2, 3)], ids=str)
def test_linear_gradients_through_autograd(lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient against float64, through the fused kernel (it is seen to run), non-contiguous gradient."""
    calls: list[int] = []
    original = triton_low_rank_linear.launch_dgrad
    monkeypatch.setattr(triton_low_rank_linear, "launch_dgrad", lambda *a: calls.append(1) or original(*a))
    tensors = [random_tensor(*shape, seed=i) for i, shape in enumerate(((*lead, 24), (40, 6), (6, 24), (40,)))]
    got = gradients([t.requires_grad_(True) for t in tensors], "low_rank_linear__triton", lead)
    assert len(calls) == 1
    doubles = [t.detach().double().requires_grad_(True) for t in tensors]
    for a, b in zip(got, gradients(doubles, "low_rank_linear__reference", lead), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_opcheck() -> None:
    grad, u, v = random_tensor(5, 12, seed=0), random_tensor(12, 4, seed=1), random_tensor(4, 9, seed=2)
    op = torch.ops.slimkernels.low_rank_linear_dgrad.default
    torch.library.opcheck(op, (grad, u, v, "low_rank_linear__triton"))
    torch.library.opcheck(op, (*(t.requires_grad_(True) for t in (grad, u, v)), "low_rank_linear__reference"))
    case = LowRankConvCase(kind="svd", ranks=(3,), n=1, h=2, w=2, kernel_size=(1, 1), padding=(0, 0), epilogue="relu")
    inputs = (*case.launch_args(*case.inputs()), KERNEL)
    torch.library.opcheck(torch.ops.slimkernels.low_rank_conv2d.default, inputs)


def test_bad_input() -> None:
    case = LowRankConvCase()
    args = list(case.launch_args(*case.inputs()))
    with pytest.raises(ValueError, match=r"^low_rank_conv2d: expected epilogue in .*, got 'relu_maxpool2'"):
        triton_low_rank_conv2d.launch(*args[:-1], "relu_maxpool2")
    with pytest.raises(TypeError, match=r"^low_rank_conv2d: expected factors\[0\] of x's dtype torch\.float16"):
        triton_low_rank_conv2d.launch(args[0].half(), *args[1:])
    double = replace(case, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^low_rank_conv2d: expected x of dtype"):
        triton_low_rank_conv2d.launch(*double.launch_args(*double.inputs()))
