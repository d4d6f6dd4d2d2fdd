"""slimkernels._C refuses every number that is out of its range, before anything reads memory by it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import structure

from slimkernels import _extension
from slimkernels.formats import BSRWeight
from slimkernels.kernels.cpu.abi import Conv2dArguments
from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.steps import Step
from slimkernels.kernels.strips import pack_strips

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
ADDRESSES = ("x", "y", "bias", "weights", "channels", "tap_ptr", "offsets", "residual")
# Lowest and highest legal number of each member of SlimConv2dF32, as csrc/kernels.h states them.
CONV2D = {
    "n": (1, INT64_MAX),
    **dict.fromkeys(("h", "w", "pad_h", "pad_w"), (0, INT32_MAX)),
    **dict.fromkeys(("c_in", "c_out", "p", "q", "r", "s"), (1, INT32_MAX)),
    **dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w"), (1, INT32_MAX)),
    "strip": (1, 32),
    "lanes": (1, 16),
    **dict.fromkeys(("relu", "pool"), (0, 1)),
}
LAYOUT = ("n", "h", "w", "c_in", "lanes")  # what a copy between layouts reads


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


@pytest.mark.parametrize("member", ["x", "y", "tap_ptr"])
def test_a_convolution_refuses_a_missing_tensor(native: ModuleType, step: Step, member: str) -> None:
    with pytest.raises(ValueError, match="is NULL"):
        native.conv2d_f32("scalar", *step.arguments._replace(**{member: 0}), 1)


# CUDA. Nothing is launched: one number of a call without tensors is wrong.

DEVICE = {"device": (0, INT32_MAX), "dtype": (0, 2), "relu": (0, 1)}
BSR = {name: bounds for name, bounds in CONV2D.items() if name not in ("strip", "lanes", "pool")} | DEVICE
BSR |= dict.fromkeys(("block_out", "block_in"), (1, INT32_MAX))
LOW_RANK = {"m": (1, INT64_MAX), **dict.fromkeys(("in", "out"), (1, INT32_MAX)), "rank": (1, 640), **DEVICE}
STRUCTS = {"bsr_conv2d": ("SlimCudaBsrConv2d", BSR), "low_rank_linear": ("SlimCudaLowRankLinear", LOW_RANK)}


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


@pytest.mark.parametrize("entry", ["bsr_conv2d", "resident_conv2d", "stem_conv2d", "low_rank_linear"])
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
