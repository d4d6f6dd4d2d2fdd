"""The Triton kernel of `fused_conv2d` on CPU tensors: run by test_triton_fused.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace

import fused_cases
import pytest
import torch
from fused_cases import CASES, CONFIGS, KERNEL, STEM, TILE, VGG
from torch import nn

import slimkernels as sk
from slimkernels.cases import FusedConvCase, assert_matches_reference
from slimkernels.kernels import KERNELS
from slimkernels.kernels.triton.fused_conv2d import launch
from slimkernels.kernels.triton.fused_conv2d_config import Geometry, default_config
from slimkernels.nn import FusedConv2d
from slimkernels.testing import assert_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("triton_fused_interpret_cases.py needs TRITON_INTERPRET=1", returncode=2)


def check(case: FusedConvCase, config: dict[str, int] | None = None, **bound: float) -> None:
    """One launch against float64; the output is channels_last."""
    inputs = case.inputs()
    y = launch(*case.launch_args(*inputs), config)
    reference, arguments = case.expected(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == case.dtype
    assert_close(y, reference, name=f"{case.name} {config}", **{**arguments, **bound})


# One of each kind of code; the others differ in geometry alone.
CORE = (
    "vgg",
    "stem",
    "pool_contiguous",
    "ragged_outputs",
    "no_padding",
    "strided_dilated",
    "dilated_contiguous",
    "batch_0",
)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in CORE], ids=lambda c: c.name)
def test_conv(case: FusedConvCase) -> None:
    assert_matches_reference(KERNEL, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in CORE], ids=lambda c: c.name)
def test_conv_every_case(case: FusedConvCase) -> None:
    assert_matches_reference(KERNEL, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [VGG, STEM, CASES[5]], ids=lambda c: c.name)
def test_half(case: FusedConvCase, dtype: torch.dtype) -> None:
    assert_matches_reference(KERNEL, replace(case, dtype=dtype))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tiles(config: dict[str, int]) -> None:
    """Several tiles a program, ragged in both directions; pooled windows; depths of more than one part."""
    for name in ("many_tiles", "pool"):
        check(next(c for c in CASES if c.name == name), config)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tiles_of_more_cases(config: dict[str, int]) -> None:
    for name in ("pool_contiguous", "strided_dilated"):
        check(next(c for c in CASES if c.name == name), config)


@pytest.mark.parametrize("epilogue", ["none", "relu", "relu_maxpool2"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_nonfinite_inputs_reach_what_reads_them(epilogue: str, contiguous: bool) -> None:
    fused_cases.check_nonfinite(epilogue, "cpu", contiguous=contiguous)


def test_input_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a contiguous nor a channels_last image is copied, whatever its strides of single pixels say."""
    for case in (VGG, replace(VGG, contiguous=True), replace(VGG, c_in=1), replace(VGG, n=1)):
        x, weight, bias = case.inputs()
        seen: list[int] = []

        def record(_: object, x: torch.Tensor, *others: torch.Tensor, seen: list[int] = seen) -> None:
            seen.append(x.data_ptr())

        monkeypatch.setattr("slimkernels.kernels.triton.launcher.Launch.__call__", record)
        launch(*case.launch_args(x, weight, bias))
        assert seen == [x.data_ptr()], case
        monkeypatch.undo()


def test_other_strides_are_copied() -> None:
    x, weight, bias = VGG.inputs()
    wide = torch.stack([x, torch.full_like(x, torch.nan)], 4).flatten(3, 4)[..., ::2]
    expected = launch(*VGG.launch_args(x, weight, bias))
    assert torch.equal(launch(*VGG.launch_args(wide, weight, bias)), expected)
    assert torch.equal(launch(*VGG.launch_args(x, weight.contiguous(), bias)), expected)


def test_a_wrong_weight_is_seen() -> None:
    inputs = VGG.inputs()
    y = launch(*VGG.launch_args(*inputs))
    inputs[1][5, 1, 2, 0] += 0.05
    reference, arguments = VGG.expected(*inputs)
    with pytest.raises(AssertionError):
        assert_close(y, reference, **arguments)


def test_bad_input() -> None:
    x, weight, bias = VGG.inputs()
    with pytest.raises(TypeError, match=r"^fused_conv2d: expected x of dtype float32, float16 or bfloat16, got"):
        launch(*VGG.launch_args(x.double(), weight, bias))
    with pytest.raises(TypeError, match=r"^fused_conv2d: expected weight of x's dtype torch\.float16, got"):
        launch(*VGG.launch_args(x.half(), weight, bias))
    with pytest.raises(TypeError, match=r"^fused_conv2d: expected bias of x's dtype torch\.float32, got"):
        launch(*VGG.launch_args(x, weight, bias.half()))


def test_deeper_layers_are_left_to_others() -> None:
    problem = replace(VGG, c_in=29).problem()
    assert KERNELS[KERNEL].supports(problem) == "an output takes more than 256 products"
    assert KERNELS[KERNEL].supports(replace(VGG, c_in=28).problem()) is None


def test_op() -> None:
    case = replace(VGG, n=1, h=2, w=2, c_out=4, kernel_size=(1, 1), padding=(0, 0))
    torch.library.opcheck(torch.ops.slimkernels.fused_conv2d.default, (*case.launch_args(*case.inputs()), KERNEL))


def test_convert_takes_the_kernel_where_a_backend_is_asked_for() -> None:
    """The first layer, its batch norm folded, in the kernel with ReLU and pool; a deep one stays as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 40, 7, padding=3), nn.ReLU(),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    policy = sk.Policy(backend="triton", min_speedup=0, measure=False, block_shapes=((7, 5),), dense_layers=False)
    fast = sk.convert(model, x, policy=policy)
    first = fast[0]
    assert isinstance(first, FusedConv2d) and first.epilogue == "relu_maxpool2" and first.kernel == KERNEL
    assert type(fast[4]) is nn.Conv2d
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_tile_of_these_tests_is_one_of_the_launcher() -> None:
    shape = (2, 3, 9, 9), (16, 3, 3, 3), (1, 1), (1, 1), (1, 1)
    found = default_config(Geometry(*shape, "relu", "ieee", torch.bfloat16, True, True))
    assert set(TILE) == set(found) - {"maxnreg"}
