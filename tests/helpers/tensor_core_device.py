"""The tensor-core launchers in a test: on a GPU where there is one and on a CPU emulation."""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_emulation import Emulator, compiled
from torch import Tensor

from slimkernels.cases import ConvCase, to_device
from slimkernels.kernels import cuda, cuda_tensor_cores
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.testing import assert_close, naive_bsr_conv2d

MODES = range(8)
HOPPER_SHARED = 227 * 1024
BF16, FP16 = torch.bfloat16, torch.float16
# A tile has 128 or 256 pixels in windows of 2 x 2, a column 16 to 128 channels, a slab 16 to 64.
CASES = [
    ConvCase("two_images_a_tile", n=3, c_in=64, h=8, w=8, c_out=128, epilogue="relu", dtype=BF16),
    ConvCase("eight_images_a_tile", n=9, c_in=64, h=4, w=4, c_out=128, epilogue="relu_maxpool2", dtype=BF16),
    ConvCase("many_images_a_tile", n=5, c_in=40, h=2, w=2, c_out=128, dtype=FP16),
    ConvCase("strips", n=1, c_in=32, h=16, w=16, c_out=64, epilogue="relu_maxpool2", dtype=BF16),
    ConvCase("blocks_of_a_wide_image", n=1, c_in=16, h=6, w=70, c_out=64, epilogue="relu", dtype=BF16),
    ConvCase("odd_pool", n=2, c_in=16, h=7, w=9, c_out=64, epilogue="relu_maxpool2", dtype=FP16),
    ConvCase("stride_2", n=2, c_in=32, h=11, w=9, c_out=72, stride=(2, 2), sparsity=0.6, dtype=BF16),
    ConvCase("dilation", n=2, c_in=16, h=7, w=30, c_out=64, padding=(2, 2), dilation=(2, 2), sparsity=0.6, dtype=BF16),
    ConvCase("mixed", c_in=16, h=9, w=11, c_out=64, stride=(2, 3), padding=(3, 1), dilation=(2, 1),
             kernel_size=(3, 2), sparsity=0.5, dtype=FP16),
    ConvCase("pointwise", n=2, c_in=48, h=5, w=4, c_out=128, kernel_size=(1, 1), padding=(0, 0), sparsity=0.5,
             dtype=BF16),
    ConvCase("no_padding", n=2, c_in=16, h=6, w=5, c_out=64, padding=(0, 0), sparsity=0.5, dtype=BF16),
    ConvCase("image_1x1", n=5, c_in=32, h=1, w=1, c_out=64, sparsity=0.3, dtype=BF16),
    ConvCase("ragged_channels", n=2, c_in=24, c_out=200, sparsity=0.5, dtype=BF16),
    ConvCase("no_blocks", c_in=32, c_out=128, pattern="no_blocks", epilogue="relu", dtype=BF16),
    ConvCase("zero_block_row", c_in=32, c_out=256, pattern="zero_block_row", sparsity=0.5, dtype=BF16),
    ConvCase("no_bias", c_in=32, c_out=64, bias=False, epilogue="relu", dtype=BF16),
    ConvCase("batch_0", n=0, c_in=16, c_out=64, dtype=BF16),
]  # fmt: skip


@dataclass
class Place:
    """Where launchers run in a test: a device's name, and the emulation that stands for a GPU."""

    name: str
    emulator: Emulator | None

    def set_mode(self, mode: int) -> None:
        if self.emulator is not None:
            self.emulator.library.set_mode(mode, HOPPER_SHARED)


class Device(Place):
    """Where the convolutions run."""

    def launch(self, case: ConvCase, inputs: Any, variant: int, **config: int) -> Tensor:
        arguments = to_device(case.launch_args(*inputs), self.name)
        return cuda_tensor_cores.launch_bsr_conv2d(*arguments, config={"variant": variant, **config})

    def check(self, case: ConvCase, variant: int, **config: int) -> Tensor:
        inputs = case.inputs()
        out = self.launch(case, inputs, variant, **config)
        reference, bound = case.expected(*inputs)
        assert_close(out, reference, **{"name": case.name, **bound})
        return out


def stand_in(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, processors: int = 2, hopper: bool = True) -> Emulator:
    """Launchers take CPU tensors to the emulation, as to a GPU of so many processors."""
    monkeypatch.setattr(cuda, "_require", lambda op, x: emulator)
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: Limits(hopper, HOPPER_SHARED, processors))
    return emulator


def fails(place: Place, mode: int, check: Callable[[], object]) -> bool:
    """Whether a check's assertions fail in a mode, or the emulation ends the process: it runs in a forked one.

    Raises:
        RuntimeError: the check raised another error, which says nothing of what it checks.
    """
    child = os.fork()
    if child == 0:
        status = 0
        try:
            faulthandler.disable()
            torch.set_num_threads(1)
            place.set_mode(mode)
            check()
        except AssertionError:
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 2
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
        raise RuntimeError("the check of a deliberate fault did not run, see its error above")
    return status != 0


def check_nonfinite(device: Device, case: ConvCase, variant: int) -> None:
    """A NaN and an infinite input of the first image make NaN of the outputs that read them, and of no others."""
    x, weight, bias = case.inputs()
    x[0, 3, 2, 2], x[0, 17, 0, 4] = torch.nan, torch.inf
    out = device.launch(case, (x, weight, bias), variant).cpu()
    expected = naive_bsr_conv2d(x, weight, bias, *case.geometry())
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not out.isnan().all()


def skip_without_hopper() -> None:
    """Skips the test unless CUDA C++ runs on a GPU of compute capability 9.0."""
    reason = cuda.available()
    if reason is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU has neither wgmma nor clusters")


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, processors: int = 2) -> Device:
    return Device("cpu", stand_in(emulator, monkeypatch, processors))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "gpu":
        skip_without_hopper()
        yield Device("cuda", None)
        return
    found = use(compiled(), monkeypatch)
    found.set_mode(-1)
    yield found
