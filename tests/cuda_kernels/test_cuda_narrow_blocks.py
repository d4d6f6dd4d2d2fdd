"""Blocks of 16 and 32 output channels, and the choice of a compiled shape, on the tensor-core convolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulate_fault
from tensor_core_device import HOPPER_SHARED, MODES, Device, device, fails, use

from slimkernels.cases import ConvCase, to_device
from slimkernels.kernels import cuda_tensor_cores, resident_plan
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.kernels.resident_plan import VARIANTS
from slimkernels.testing import assert_close

__all__ = ["device"]  # a fixture, which its users name

BF16, FP16 = torch.bfloat16, torch.float16
NARROW = [v for v, shape in enumerate(VARIANTS) if shape.column < 64]
CASE = ConvCase("narrow", n=2, c_in=48, h=7, w=6, c_out=168, sparsity=0.7, dtype=BF16)


def most_steps(case: ConvCase, column: int) -> torch.Tensor:
    w = case.weight()
    return resident_plan.pack_index(w.crow_indices, w.col_indices, w.weight_shape, w.block_shape, column).most_steps


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (32, 16), (16, 64), (48, 16), (96, 32), (80, 48)], ids=str)
def test_block_shapes(block: tuple[int, int], device: Device):
    case = replace(CASE, block_shape=block, c_in=-(-48 // block[1]) * block[1], epilogue="relu")
    for variant in NARROW:
        if block[0] % VARIANTS[variant].column == 0:
            device.check(case, variant)


@pytest.mark.parametrize("epilogue", ["none", "relu", "relu_maxpool2"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_epilogues_and_the_shape_that_is_chosen(epilogue: str, dtype: torch.dtype, device: Device):
    for block in ((16, 16), (32, 16)):
        case = replace(CASE, block_shape=block, epilogue=epilogue, dtype=dtype)
        for c_out in (40, 168):
            sized = replace(case, c_out=c_out)
            inputs = sized.inputs()
            arguments = list(to_device(sized.launch_args(*inputs), device.name))
            out = cuda_tensor_cores.launch_bsr_conv2d(*arguments)
            assert torch.equal(out, device.check(sized, chosen(sized)))
            arguments[5] = list(cuda_tensor_cores.pack(*arguments[1:4], *arguments[6:8]))
            assert torch.equal(cuda_tensor_cores.launch_bsr_conv2d(*arguments), out)


def chosen(case: ConvCase, wgmma: bool = True, limit: int = HOPPER_SHARED) -> int:
    found = resident_plan.candidates(case.block_shape[0], case.c_out, wgmma)
    return resident_plan.choose_variant(found, lambda column: most_steps(case, column), limit)


def test_candidates():
    """Wide columns first; 64 channels a thread block where a layer has no more."""
    for block_out, c_out, wgmma, expected in (
        (128, 512, True, (1,)), (128, 64, True, (2,)), (64, 512, True, (2,)), (192, 384, True, (2,)),
        (128, 512, False, (0, 4)), (64, 64, False, (4,)), (32, 256, True, (3, 4)), (96, 64, False, (4,)),
        (16, 256, True, (5, 6)), (16, 64, True, (6,)), (48, 96, False, (5, 6)),
    ):  # fmt: skip
        assert resident_plan.candidates(block_out, c_out, wgmma) == expected
        for variant in expected:
            assert block_out % VARIANTS[variant].column == 0 and VARIANTS[variant].wgmma <= wgmma
    layer = ConvCase("sparse", c_in=512, c_out=512, h=4, w=4, block_shape=(128, 16), sparsity=0.875, dtype=BF16)
    assert chosen(layer) == 1  # whatever its weights take
    assert resident_plan.candidates(128, 512, True, taps=(7, 7)) == (0, 4)  # more taps than a step's word tells
    assert chosen(layer, wgmma=False, limit=163 * 1024) == 4
    assert chosen(replace(layer, block_shape=(16, 16))) == 6


def test_wide_blocks_take_a_narrow_column_on_another_gpu(device: Device, monkeypatch: pytest.MonkeyPatch):
    """Without wgmma and with less shared memory, where 128 channels' weights do not fit, 64 do."""
    case = ConvCase("a100", n=1, c_in=256, h=4, w=4, c_out=128, block_shape=(128, 16), sparsity=0.75, dtype=BF16)
    if device.emulator is not None:
        monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: Limits(False, 163 * 1024, 2))
        device.check(case, chosen(case, wgmma=False, limit=163 * 1024))
    assert chosen(case, wgmma=False, limit=163 * 1024) == 4


def test_no_row_of_a_matrix_waits_for_another(device: Device):
    """VGG-19's image sizes."""
    if device.emulator is None:
        pytest.skip("counted by the emulation")
    for size in (2, 4, 8, 16, 32):
        for variant in NARROW:
            block = (VARIANTS[variant].column, 16)
            case = ConvCase("conflicts", n=1, c_in=16, h=size, w=size, c_out=64, block_shape=block, sparsity=0.5,
                            dtype=BF16)  # fmt: skip
            before = device.emulator.library.get_conflicts()
            device.check(case, variant)
            assert device.emulator.library.get_conflicts() == before, (size, variant)


def test_the_convolution_of_the_second_column_is_its_own(device: Device):
    """A warp's second column of 16 channels has steps of its own: with no block in one, the other stays right."""
    for row in (0, 1):
        case = replace(CASE, c_out=32, block_shape=(16, 16), sparsity=0.0)
        x, weight, bias = case.inputs()
        kept = slice(0, weight.nnz_blocks // 2) if row == 0 else slice(weight.nnz_blocks // 2, None)
        half = weight.nnz_blocks // 2
        crow = torch.tensor([0, half, half] if row == 0 else [0, 0, half], dtype=torch.int32)
        weight = replace(weight, values=weight.values[kept], col_indices=weight.col_indices[kept], crow_indices=crow)
        out = device.launch(case, (x, weight, bias), 6)
        reference, bound = case.expected(x, weight, bias)
        assert_close(out, reference, **bound)


BREAKS = {
    "the slab that a tile begins with": ("resident_conv2d.cuh", "int l = first_slab(tile, live_count);", "int l = 0;"),
    "the second column's steps": ("resident_conv2d.cuh", "start + (slabs + 1) * 4;", "start;"),
    "the second column's sums": ("sparse_tile.cuh", "auto& sum = sums[C];", "auto& sum = sums[0];"),
    "a lane's channels": ("sparse_tile.cuh", "(lane & 3) * 2 * RUN;", "(lane & 3) * 8;"),
    "the bias of a run": ("sparse_tile.cuh", "(lane & 3) * RUN + j % RUN;", "(lane & 3) * 4 + j % RUN;"),
    "a wait for copies": ("resident_conv2d.cuh", "hw::copy_async_wait_all_but(a.stages - 2);", ""),
    "a barrier": ("resident_conv2d.cuh", "hw::synchronize(1 + group, 128);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    header, old, new = BREAKS[name]
    broken = use(emulate_fault(tmp_path, header, old, new, "resident_conv2d", "narrow_conv2d"), monkeypatch)
    assert any(fails(broken, mode, lambda: check_orders(broken)) for mode in MODES)


def check_orders(device: Device) -> None:
    device.check(replace(CASE, n=9, c_in=64, c_out=64, block_shape=(16, 16)), 6, slab=16, stages=2)
