"""What the tests of plain calls share: layers to chain, the chains that ran, and the modules one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimkernels.nn import BlockSparseConv2d, packed_run

C = 32  # channels


def conv(c_in: int = C, c_out: int = C, epilogue: str = "relu", block: tuple[int, int] = (16, 1)) -> BlockSparseConv2d:
    """A 3x3 convolution with half of its blocks."""
    dense = nn.Conv2d(c_in, c_out, 3, padding=1)
    mask = torch.rand(-(-c_out // block[0]), -(-c_in // block[1]) * 9) < 0.5
    return BlockSparseConv2d.from_dense(dense, block, mask, epilogue=epilogue)


def watch_chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of layers of every chain that runs."""
    ran: list[int] = []
    attempt = packed_run.PackedRun.attempt

    def watched(self: packed_run.PackedRun, x: Tensor) -> Tensor | None:
        y = attempt(self, x)
        if y is not None:
            ran.append(len(self._layers))
        return y

    monkeypatch.setattr(packed_run.PackedRun, "attempt", watched)
    return ran


def module_by_module(net: nn.Sequential, x: Any) -> Any:
    """What the modules compute one by one."""
    for module in net:
        x = module(x)
    return x
