"""The convolution of csrc/cuda/streamed_conv2d.cuh: its plan, and what keeps it right, on a CPU emulation and a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulate_fault, structure
from tensor_core_device import HOPPER_SHARED, MODES, Device, device, fails, use

from slimkernels.cases import ConvCase
from slimkernels.kernels import cuda_tensor_cores, resident_plan
from slimkernels.kernels.resident_plan import VARIANTS, Convolution

__all__ = ["device"]  # a fixture, which its users name

WIDE, NARROW = 1, 2
BF16 = torch.bfloat16
# Several tiles, columns and slabs, of one to four steps.
CASE = ConvCase("streamed", n=9, c_in=64, h=8, w=8, c_out=256, block_shape=(128, 16), sparsity=0.7, dtype=BF16)


def convolution(n: int, c_in: int, size: int, c_out: int) -> Convolution:
    return Convolution(n, c_in, size, size, c_out, (3, 3), (1, 1), (1, 1), (1, 1), (size, size))


@pytest.mark.parametrize("slots", [3, 4])
@pytest.mark.parametrize("variant", [WIDE, NARROW])
def test_few_places_for_weights(variant: int, slots: int, device: Device):
    """Both rings turn over many times; three places are the fewest: see `LEAST_SLOTS`."""
    for mode in (0, 5):
        device.set_mode(mode)
        device.check(replace(CASE, block_shape=(VARIANTS[variant].column, 16)), variant, slab=16, stages=2, slots=slots)


@pytest.mark.parametrize("pattern", ["zero_block_row", "no_blocks"])
def test_columns_without_steps(pattern: str, device: Device):
    device.check(replace(CASE, pattern=pattern, sparsity=0.5), WIDE)


def test_many_columns(device: Device):
    """More than a warp's lanes, whose order is then their number."""
    case = ConvCase(n=2, c_in=16, h=4, w=4, c_out=64 * 33, block_shape=(64, 16), sparsity=0.8, dtype=BF16)
    device.check(case, NARROW)


def test_the_last_taps_and_one_too_many(device: Device):
    """A bit of a word for each of 32 taps; where a kernel has more, another shape takes it."""
    case = ConvCase(n=2, c_in=32, h=9, w=11, c_out=128, block_shape=(128, 16), sparsity=0.6, dtype=BF16)
    device.check(replace(case, kernel_size=(4, 8), padding=(2, 4)), WIDE)
    seven = replace(case, kernel_size=(7, 7), padding=(3, 3))
    with pytest.raises(ValueError, match=r"^bsr_conv2d: variant 1 takes 32 taps at most, .* got 7 x 7 with"):
        device.launch(seven, seven.inputs(), WIDE)
    weight = seven.weight()
    parts = (weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    assert cuda_tensor_cores.chosen_variant(*parts) in (0, 4)


def test_images_wider_than_a_tensor_copy(device: Device):
    case = ConvCase(n=1, c_in=16, h=4, w=300, c_out=128, block_shape=(128, 16), sparsity=0.6, dtype=BF16)
    device.check(case, WIDE)
    device.check(replace(case, h=2, w=600, stride=(1, 3)), WIDE)


def test_plans_of_vgg19():
    """Whole images in a tile where they fit, 64 channels of them in a copy, and places for ten steps or more."""
    for c_in, size, c_out, images in ((64, 16, 128, 1), (128, 16, 128, 1), (256, 8, 256, 4), (512, 4, 512, 16)):
        steps = c_out // 128 * c_in * 9 // 16 // 8
        plan = resident_plan.fitting_plan(WIDE, convolution(1024, c_in, size, c_out), (steps,), HOPPER_SHARED, 132)
        assert plan is not None and plan.shared_bytes <= HOPPER_SHARED
        assert (plan.tile.images, plan.tile.rows, plan.tile.cols) == (images, size, size)
        assert plan.slab == 64 and plan.stages >= 3 and plan.slots * VARIANTS[WIDE].chunk >= 10
        assert plan.blocks % (c_out // 128) == 0 and plan.blocks > 126  # a round takes all columns of a tile
    first = resident_plan.fitting_plan(NARROW, convolution(1024, 64, 32, 64), (5,), HOPPER_SHARED, 132)
    assert first is not None and first.tile.rows * first.tile.cols == 512 and first.blocks == 132


def test_who_had_much_has_little_next():
    """`Pairs` of the kernel: of four columns every thread block of two rounds has the heaviest and the lightest, or the
    two between."""
    steps, columns, blocks = [52, 35, 32, 25], 4, 8
    of_block = [0] * blocks
    for turn in range(2):
        for block in range(blocks):
            number = turn * blocks + (blocks - 1 - block if turn % 2 else block)
            of_block[block] += steps[number % columns]
    assert sorted(set(of_block)) == [67, 77]


def test_numbers_that_would_wrap_are_left_to_others():
    conv = convolution(1, 16, 64, 128)
    plan = resident_plan.fitting_plan(WIDE, conv, (9,), HOPPER_SHARED, 2)
    assert plan is not None and resident_plan.in_range(conv, plan, 64 * 64 * 128) is None
    assert resident_plan.in_range(conv._replace(n=2**27), plan, 64 * 64 * 128) == "too many pixels"
    many = conv._replace(taps=(7, 7), padding=(3, 3))
    assert resident_plan.fitting_plan(WIDE, many, (9,), HOPPER_SHARED, 2) is None
    wide = conv._replace(dilation=(2**14, 2**14), padding=(2**14, 2**14))  # its taps meet no pixel but their own
    plan = resident_plan.fitting_plan(WIDE, wide, (9,), HOPPER_SHARED, 2)
    assert plan is None or plan.tile.reach(wide.taps, wide.dilation) * plan.slab * 2 < 2**24


HEADER = "streamed_conv2d.cuh"
BREAKS = {
    "a wait for pixels": ("        hw::mbarrier_wait(x.full(x_barriers), x.phase);\n", ""),
    "a wait for weights": ("      hw::mbarrier_wait(w.full(w_barriers), w.phase);\n", ""),
    "a wait for a place of pixels": ("      hw::mbarrier_wait(x.free(barriers), x.phase ^ 1);\n", ""),
    "a wait for a place of weights": ("      hw::mbarrier_wait(w.free(barriers), w.phase ^ 1);\n", ""),
    "a wait for products": ("hw::multiply_group_wait<1>();\n      release();", "release();"),
    "the wait for the last products": ("hw::multiply_group_wait<0>();\n    product.settle();", "product.settle();"),
    "the turn of a ring": ("phase ^= 1;", "phase ^= 0;"),
    "the barrier behind the tables": ("hw::synchronize();\n  if (thread < Shape::THREADS) {", "if (thread < 256) {"),
    "zeros outside": ("product.inside[i] >> tap & 1 ? begin + place", "true ? begin + place"),
    "the rows that come first": ("this->flipped |= (rows >> (lane >> 2) & 1) << t;", ""),
    "the columns that come first": ("this->swapped |= (columns >> (lane >> 2) & 1) << t;", ""),
    "a lane": ("* pitch + (lane >> 4) * 16;", "* pitch + ((lane >> 4) ^ (lane == 17)) * 16;"),
    "the place of a chunk": ("place ^ ((place >> 3) & mask)", "place"),
    "the second step of a chunk": ("weights + k * Shape::STEP_BYTES", "weights"),
    "the order of columns": ("before += theirs > mine || (theirs == mine && other < lane);", "before = 0;"),
    "the other half of a tile": ("base + at.windows + group * Shape::WINDOWS * 16", "base + at.windows"),
    "the head start's end": ("hw::mbarrier_arrive(head_start);", ";"),
    "an arrival too few": ("Shape::GROUPS * 4);  // a lane of each warp", "4);  // a lane of each warp"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    old, new = BREAKS[name]
    broken = use(emulate_fault(tmp_path, HEADER, old, new, "resident_conv2d", "streamed_conv2d"), monkeypatch)
    assert any(fails(broken, mode, lambda: check_orders(broken)) for mode in MODES)


def check_orders(device: Device) -> None:
    device.check(replace(CASE, h=4, w=4, n=40), WIDE, slab=32, stages=2, slots=3)


def test_captured_launches_overlap(device: Device, monkeypatch: pytest.MonkeyPatch):
    """Of a pack that came along and so was made before; elsewhere the kernel in front may have written it."""
    if device.emulator is None:
        pytest.skip("the launch is looked at in the emulation")
    found: list[int] = []
    launch, at = device.emulator.cuda_resident_conv2d, [n for n, _ in structure("SlimCudaResidentConv2d")._fields_]
    monkeypatch.setattr(
        device.emulator,
        "cuda_resident_conv2d",
        lambda *members: found.append(members[at.index("overlap")]) or launch(*members),
    )
    arguments = list(CASE.launch_args(*CASE.inputs()))
    packed = list(cuda_tensor_cores.pack(*arguments[1:4], *arguments[6:8]))
    for capturing in (False, True):
        monkeypatch.setattr(cuda_tensor_cores, "is_capturing", lambda tensor, now=capturing: now)
        for arguments[5] in ([], packed):
            cuda_tensor_cores.launch_bsr_conv2d(*arguments)
            cuda_tensor_cores.launch_bsr_conv2d(*arguments, config={"overlap": 0})
    assert found == [0, 0, 0, 0, 0, 0, 1, 0]
