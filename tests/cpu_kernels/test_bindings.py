"""slimkernels._C refuses every number that is out of its range, before anything reads memory by it."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import structure

from slimkernels import _extension
from slimkernels.formats import BSRWeight
from slimkernels.kernels.cpu.abi import BatchNormArguments, Conv2dArguments, WeightGradientArguments
from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.steps import Step
from slimkernels.kernels.strips import pack_strips

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
ADDRESSES = ("x", "y", "bias", "weights", "channels", "tap_ptr", "offsets", "residual")
PARTS, PAIRS = ("parts_h", "parts_w"), ("engine", "to_floats")
# Lowest and highest legal number of each member of SlimConv2dF32, as csrc/kernels.h states them.
CONV2D = {
    "n": (1, INT64_MAX),
    **dict.fromkeys(("h", "w", "pad_h", "pad_w"), (0, INT32_MAX)),
    **dict.fromkeys(("c_in", "c_out", "p", "q", "r", "s"), (1, INT32_MAX)),
    **dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w"), (1, INT32_MAX)),
    "strip": (1, 32),
    "depth": (1, 16),
    **dict.fromkeys(("lanes", *PARTS), (1, 16)),
    **dict.fromkeys(("relu", "pool", "to_floats"), (0, 1)),
    "engine": (0, 3),
}
LAYOUT = ("n", "h", "w", "c_in", "lanes", *PARTS, *PAIRS)  # what a copy between layouts reads


@pytest.fixture(scope="module")
def native() -> ModuleType:
    module, reason = _extension.load()
    if module is None:
        pytest.skip(f"slimkernels._C is not loaded: {reason}")
    return module


@pytest.fixture(scope="module")
def step() -> Step:
    """A legal convolution of channels-last images, with its tensors."""
    weight = BSRWeight.from_dense(torch.randn(8, 2, 1, 1), (8, 1))
    pack = pack_strips(weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, (8, 1), 8)
    packed = PackedConv2d("scalar", pack, weight.weight_shape, (1, 1), (0, 0), (1, 1), "none")
    x = torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    return packed.step(x, y, None, 1, packed.entry_offsets(4, 4))


def beyond(ranges: dict[str, tuple[int, int]]) -> list[Any]:
    """(name, number) for the first number below and above each range, as far as Python hands it over in 64 bits."""
    cases = [(name, number) for name, (low, high) in ranges.items() for number in (low - 1, high + 1)]
    return [pytest.param(*case, id=f"{case[0]}={case[1]}") for case in cases if case[1] <= INT64_MAX]


def test_every_number_of_a_convolution_has_a_range(native: ModuleType) -> None:
    assert {name for name, _, _ in native.conv2d_members()} == {*ADDRESSES, *CONV2D}


@pytest.mark.parametrize(("name", "number"), beyond(CONV2D))
def test_a_convolution_refuses(native: ModuleType, step: Step, name: str, number: int) -> None:
    members = step.arguments._replace(**{name: number})
    with pytest.raises(ValueError, match=f"conv2d_f32: {name} = {number} is out of range"):
        native.conv2d_f32("scalar", *members, 1)
    with pytest.raises(ValueError, match=f"Steps: {name} = {number} is out of range"):
        native.Steps("scalar", [(0, -1, *members)])


@pytest.mark.parametrize(("name", "number"), beyond({name: CONV2D[name] for name in LAYOUT}))
def test_a_copy_between_layouts_refuses(native: ModuleType, step: Step, name: str, number: int) -> None:
    kept = {member: getattr(step.arguments, member) for member in ("x", "y", "n", "h", "w", "c_in")}
    members = Conv2dArguments(**kept, lanes=4)
    native.Steps("scalar", [(1, -1, *members)])
    with pytest.raises(ValueError, match=f"Steps: {name} = {number} is out of range"):
        native.Steps("scalar", [(1, -1, *members._replace(**{name: number}))])


CUT = {"strip": 1, "lanes": 4, "n": 4, "h": 2, "w": 2, "p": 2, "q": 2, "parts_h": 2, "parts_w": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 3}, {"n": 2}, {"n": 16, "parts_w": 4}, {"n": 1, "lanes": 1}, {"strip": 2}, {"p": 1, "stride_h": 3},
        {"h": 33, "p": 1, "r": 33}, {"pool": 1, "h": 3, "p": 3}, {"q": 1, "w": 3, "stride_w": 2, "s": 2},
    ],
)  # fmt: skip
def test_images_that_cannot_be_cut_into_parts_are_refused(
    native: ModuleType, step: Step, wrong: dict[str, int]
) -> None:
    members = step.arguments._replace(**CUT)
    native.Steps("scalar", [(0, -1, *members)])
    with pytest.raises(ValueError, match=r"cut into parts|multiple of the parts"):
        native.Steps("scalar", [(0, -1, *members._replace(**wrong))])
    if not wrong.keys() - {"n", "parts_w"}:
        with pytest.raises(ValueError, match="multiple of the parts"):
            native.Steps("scalar", [(1, -1, *members._replace(**wrong))])


@pytest.mark.parametrize("member", ["x", "y", "tap_ptr"])
def test_a_convolution_refuses_a_missing_tensor(native: ModuleType, step: Step, member: str) -> None:
    with pytest.raises(ValueError, match="is NULL"):
        native.conv2d_f32("scalar", *step.arguments._replace(**{member: 0}), 1)


@pytest.mark.parametrize(
    "changes", [{"depth": 9}, {"depth": 8}, {"depth": 8, "strip": 1}, {"depth": 16, "strip": 1, "c_in": 8}], ids=str
)
def test_a_convolution_refuses_a_depth_without_a_kernel(
    native: ModuleType, step: Step, changes: dict[str, int]
) -> None:
    changes = {"c_in": 2, **changes}
    with pytest.raises(ValueError, match="depth"):
        native.conv2d_f32("scalar", *step.arguments._replace(**changes), 1)


# Gradients of weights

WEIGHT_GRADIENT = {name: bounds for name, bounds in CONV2D.items() if name not in ("strip", "depth", "lanes", *PAIRS)}
WEIGHT_GRADIENT |= dict.fromkeys(("h", "w", "block_out", "block_in"), (1, INT32_MAX))
WEIGHT_GRADIENT = {name: bounds for name, bounds in WEIGHT_GRADIENT.items() if name not in ("relu", "pool", *PARTS)}


@pytest.fixture(scope="module")
def gradient() -> WeightGradientArguments:
    """Members of a legal weight gradient, whose tensors do not exist."""
    sizes = {"n": 1, "h": 4, "w": 4, "c_in": 2, "c_out": 8, "p": 4, "q": 4, "r": 1, "s": 1}
    geometry = {"stride_h": 1, "stride_w": 1, "pad_h": 0, "pad_w": 0, "dil_h": 1, "dil_w": 1}
    addresses = dict.fromkeys(("x", "grad", "values_grad", "crow_indices", "col_indices"), 64)
    return WeightGradientArguments(**addresses, **sizes, **geometry, block_out=8, block_in=1)


def test_every_number_of_a_weight_gradient_has_a_range(native: ModuleType) -> None:
    names = {name for name, _, _ in native.weight_gradient_members()}
    assert names == {"x", "grad", "values_grad", "crow_indices", "col_indices", *WEIGHT_GRADIENT}


@pytest.mark.parametrize(("name", "number"), beyond(WEIGHT_GRADIENT))
def test_a_weight_gradient_refuses(
    native: ModuleType, gradient: WeightGradientArguments, name: str, number: int
) -> None:
    with pytest.raises(ValueError, match=f"^weight_gradient_f32: {name} = {number} is out of range"):
        native.weight_gradient_f32("scalar", gradient._replace(**{name: number}), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": 0}, "x, grad or values_grad is NULL"),
        ({"crow_indices": 0}, "crow_indices or col_indices is NULL"),
        ({"block_out": 12}, "block_out = 12 is no multiple of 8"),
        ({"p": 5}, "p or q is not the size of the output"),
        ({"h": 2**16, "w": 2**16}, "an image has 2\\^31 elements or more"),
        ({"block_out": 2**16, "block_in": 2**15}, "the weight has 2\\^31"),
        ({"n": 2**60}, "n is out of range"),
    ],
    ids=str,
)
def test_a_weight_gradient_refuses_what_does_not_fit(
    native: ModuleType, gradient: WeightGradientArguments, changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^weight_gradient_f32: {reason}"):
        native.weight_gradient_f32("scalar", gradient._replace(**changes), 1)


def test_a_weight_gradient_of_an_unknown_instruction_set(native: ModuleType, gradient: WeightGradientArguments) -> None:
    assert native.weight_gradient_f32("avx1024", gradient, 1) == 2  # SLIM_ERROR_UNSUPPORTED
    with pytest.raises(ValueError, match="at least one thread"):
        native.weight_gradient_f32("scalar", gradient, 0)


# Batch norms

BATCH_NORM = {"n": (1, INT64_MAX), **dict.fromkeys(("h", "w", "c"), (1, INT32_MAX))}
BATCH_NORM |= {"which": (0, 3), **dict.fromkeys(("relu", "pool"), (0, 1))}


@pytest.fixture(scope="module")
def norm() -> BatchNormArguments:
    """Members of a legal pass of a batch norm, whose tensors do not exist."""
    return BatchNormArguments(*[64] * 5, n=1, h=4, w=4, c=8, which=3, relu=1, pool=1)


def test_every_number_of_a_batch_norm_has_a_range(native: ModuleType) -> None:
    names = {name for name, _, _ in native.batch_norm_members()}
    assert names == {"x", "grad", "coefficients", "y", "sums", *BATCH_NORM}


@pytest.mark.parametrize(("name", "number"), beyond(BATCH_NORM))
def test_a_batch_norm_refuses(native: ModuleType, norm: BatchNormArguments, name: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"^batch_norm_f32: {name} = {number} is out of range"):
        native.batch_norm_f32("scalar", norm._replace(**{name: number}), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": 0}, "x or what is written is NULL"),
        ({"y": 0}, "x or what is written is NULL"),
        ({"which": 0, "sums": 0}, "x or what is written is NULL"),
        ({"coefficients": 0}, "coefficients is NULL"),
        ({"grad": 0}, "grad is NULL"),
        ({"relu": 0}, "a pool follows a ReLU"),
        ({"h": 1}, "a pool follows a ReLU and needs an image of 2x2"),
        ({"h": 2**16, "w": 2**16}, "an image has 2\\^31 elements or more"),
        ({"n": 2**50}, "n is out of range"),
    ],
    ids=str,
)
def test_a_batch_norm_refuses_what_does_not_fit(
    native: ModuleType, norm: BatchNormArguments, changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^batch_norm_f32: {reason}"):
        native.batch_norm_f32("scalar", norm._replace(**changes), 1)


def test_a_batch_norm_of_an_unknown_instruction_set(native: ModuleType, norm: BatchNormArguments) -> None:
    assert native.batch_norm_f32("avx1024", norm, 1) == 2  # SLIM_ERROR_UNSUPPORTED
    with pytest.raises(ValueError, match="at least one thread"):
        native.batch_norm_f32("scalar", norm, 0)


# CUDA. Nothing is launched: one number of a call without tensors is wrong.

DEVICE = {"device": (0, INT32_MAX), "dtype": (0, 2), "relu": (0, 1)}
BSR = {
    name: bounds for name, bounds in CONV2D.items() if name not in ("strip", "depth", "lanes", "pool", *PARTS, *PAIRS)
} | DEVICE
BSR |= dict.fromkeys(("block_out", "block_in"), (1, INT32_MAX))
LOW_RANK = {"m": (1, INT64_MAX), **dict.fromkeys(("in", "out"), (1, INT32_MAX)), "rank": (1, 640), **DEVICE}
PLACES = 65535
TWO_FACTORS = {
    **dict.fromkeys(("n", "h", "w", "c_in", "c_out", "p", "q"), (1, INT32_MAX)),
    **dict.fromkeys(("r", "s", "stride_h", "stride_w", "dil_h", "dil_w", "splits"), (1, PLACES)),
    **dict.fromkeys(("pad_h", "pad_w"), (0, PLACES)),
    **dict.fromkeys(("rank", "u_row"), (1, 256)),
    **{"variant": (0, 6), "stages": (2, 8), "depth_splits": (1, 64), "overlap": (0, 1)},
    **DEVICE,
    "dtype": (1, 2),
}
STRUCTS = {
    "bsr_conv2d": ("SlimCudaBsrConv2d", BSR),
    "low_rank_linear": ("SlimCudaLowRankLinear", LOW_RANK),
    "low_rank": ("SlimCudaLowRank", TWO_FACTORS),
}


@pytest.mark.parametrize(
    ("entry", "name", "number"),
    [
        pytest.param(entry, *case.values, id=f"{entry}-{case.id}")
        for entry, (_, ranges) in STRUCTS.items()
        for case in beyond(ranges)
    ],
)
def test_a_cuda_call_refuses(native: ModuleType, entry: str, name: str, number: int) -> None:
    if not native.build_info()["cuda"]:
        pytest.skip("the extension has no CUDA code")
    struct, ranges = STRUCTS[entry]
    members = [field for field, *_ in structure(struct)._fields_]
    numbers = {member: ranges.get(member, (0, 0))[0] for member in members} | {name: number}
    with pytest.raises(ValueError, match=f"^cuda_{entry}: {name} = {number} is out of range"):
        getattr(native, f"cuda_{entry}")(*numbers.values())


@pytest.mark.parametrize("entry", ["bsr_conv2d", "resident_conv2d", "stem_conv2d", "low_rank_linear", "low_rank"])
def test_a_cuda_call_refuses_what_is_no_list_of_integers(native: ModuleType, entry: str) -> None:
    if not native.build_info()["cuda"]:
        pytest.skip("the extension has no CUDA code")
    call = getattr(native, f"cuda_{entry}")
    with pytest.raises(TypeError, match=rf"^cuda_{entry}: expected \d+ arguments, got 1"):
        call(1)
    names = {"resident_conv2d": "SlimCudaResidentConv2d", "stem_conv2d": "SlimCudaStemConv2d"}
    count = len(structure(STRUCTS[entry][0] if entry in STRUCTS else names[entry])._fields_)
    with pytest.raises(TypeError):
        call(*[1.0] * count)
    with pytest.raises(OverflowError):
        call(*[2**63] * count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 8}, "an address is not a multiple of 16"),
        ({"c_in": 12}, "c_in, c_out and u_row are not multiples of 8"),
        ({"u_row": 12}, "c_in, c_out and u_row are not multiples of 8"),
        ({"rank": 9}, "rank is greater than u_row"),
        ({"rank": 65, "u_row": 72}, "rank is greater than the variant's"),
        ({"rank": 129, "u_row": 136, "variant": 6}, "rank is greater than the variant's"),
        ({"p": 2}, "p or q is not the size of the output"),
        ({"n": INT32_MAX, "w": 2, "q": 2}, "there are 2^31 - 128 rows or more"),
        ({"n": INT32_MAX - 127}, "there are 2^31 - 128 rows or more"),
        ({"c_in": 2**30}, "an image has 2^31 bytes or more"),
        (
            {"r": 2**14, "s": 2**13, "pad_h": 2**13, "pad_w": 2**12, "p": 2, "q": 2},
            "c_out or the numbers in a row of v are 2^30 or more",
        ),
        ({"c_out": 2**30}, "c_out or the numbers in a row of v are 2^30 or more"),
        ({"depth_splits": 2}, "depth_splits needs room for partial sums"),
    ],
    ids=str,
)
def test_two_factors_that_cannot_be_are_refused(native: ModuleType, changes: dict[str, int], message: str) -> None:
    if not native.build_info()["cuda"]:
        pytest.skip("the extension has no CUDA code")
    members = [field for field, *_ in structure("SlimCudaLowRank")._fields_]
    least = {member: TWO_FACTORS.get(member, (0, 0))[0] for member in members}
    numbers = least | {"c_in": 8, "c_out": 8, "u_row": 8} | changes
    with pytest.raises(ValueError, match=f"^cuda_low_rank: .*{re.escape(message)}"):
        native.cuda_low_rank(*numbers.values())
