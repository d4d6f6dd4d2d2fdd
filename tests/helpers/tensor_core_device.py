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
from slimkernels.testing import assert_close

MODES = range(8)
HOPPER_SHARED = 227 * 1024


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
