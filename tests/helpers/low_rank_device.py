"""Where the launchers of slimkernels.kernels.cuda_low_rank run in a test: on a GPU, or on the CPU emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emulation import Emulator
from tensor_core_device import Place, stand_in
from torch import Tensor

from slimkernels.cases import LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.kernels import cuda_low_rank
from slimkernels.testing import assert_close

BF16, FP16 = torch.bfloat16, torch.float16
Case = LowRankLinearCase | LowRankConvCase


class Device(Place):
    """Where the low-rank layers run."""

    def launch(self, case: Case, inputs: Any, **config: int) -> Tensor:
        function = getattr(cuda_low_rank, f"launch_{case.op}")
        return function(*to_device(case.launch_args(*inputs), self.name), config=config)

    def check(self, case: Case, **config: int) -> Tensor:
        inputs = case.inputs()
        out = self.launch(case, inputs, **config)
        reference, bound = case.expected(*inputs)
        assert_close(out, reference, **{"name": case.name, **bound})
        return out


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, processors: int = 2) -> Device:
    return Device("cpu", stand_in(emulator, monkeypatch, processors))


def check_infinite(device: Device) -> None:
    """An infinite number of x spoils its row: columns that pad the rank must not be infinity times zero."""
    case = LowRankLinearCase("infinite", m=18, in_features=24, out_features=16, rank=5, bias=False, dtype=BF16)
    x, U, V, bias = case.inputs()
    x[3, 7], V = torch.inf, V.abs() + 1
    out = device.launch(case, (x, U.abs() + 1, V, bias)).cpu()
    assert torch.equal(out.isinf().all(1), torch.arange(18) == 3) and not out.isnan().any()
