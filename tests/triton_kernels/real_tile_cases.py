"""The forward kernels at a GPU's own tile sizes, in values: run by test_addresses.py with TRITON_INTERPRET=1.

The other interpreter cases take small tiles, which are quick; here a program computes 256 x 128 or 128 x 64 outputs in
K stages of 64, as on an H100, on a few images: several groups of pixel tiles, a last group and a last tile that are not
full, K ranges that end inside a stage, 2x2 max-pool. float16, because the interpreter computes bfloat16 as float32.
"""

from __future__ import annotations

import os

import pytest
import torch
from address_replay import reduce_by_slices
from triton.runtime import interpreter
from triton_cases import ConvCase, build, compare_conv, run_conv

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("real_tile_cases.py needs TRITON_INTERPRET=1 before the kernels are decorated", returncode=2)

WIDE = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
NARROW = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
TALL, HALF = (128, 16), (64, 16)
CASES = {
    "relu": (ConvCase(image=(3, 17, 19), sparsity=0.5, group_m=3), TALL, WIDE),
    "relu_maxpool2": (ConvCase(image=(1, 32, 32), sparsity=0.5, epilogue="relu_maxpool2", group_m=3), TALL, WIDE),
    "whole_pool": (ConvCase(image=(300, 2, 2), sparsity=0.6, epilogue="relu_maxpool2", group_m=2), TALL, WIDE),
    "half_blocks": (ConvCase(image=(2, 16, 16), sparsity=0.5, epilogue="relu_maxpool2", group_m=3), HALF, NARROW),
    "wide_slices": (ConvCase(image=(5, 8, 8), sparsity=0.5, group_m=2), (64, 32), NARROW),
    "splits": (ConvCase(image=(2, 14, 14), epilogue="relu_maxpool2", group_m=1), TALL, {**WIDE, "SPLITS": 2}),
    "weights_on_m": (ConvCase(image=(2, 14, 14), sparsity=0.5, group_m=1, variant="weights_on_m"), TALL, WIDE),
    "taps_together": (ConvCase(image=(2, 14, 14), sparsity=0.5, group_m=1, variant="taps_together"), TALL, WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_real_tile(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The combining function itself, called on slices: once an element takes seconds a program.
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_slices)
    case, block_shape, tile = CASES[name]
    x, weight, bias = build(case, block_shape, torch.float16)
    y = run_conv(case, x, weight, bias, config={**tile, "GROUP_M": case.group_m})
    result = compare_conv(y, case, x, weight, bias)
    assert result.passed, result.message


def test_reduction_by_slices_is_the_interpreters() -> None:
    """The quick reduction of these cases against Triton's own, NaN included, on the smallest tile with a pool."""
    case = ConvCase(image=(1, 4, 4), sparsity=0.5, epilogue="relu_maxpool2", block_m=16, block_k=64)
    x, weight, bias = build(case, (16, 16), torch.float16)
    x[0, 3, 1, 1] = torch.nan
    plain = run_conv(case, x, weight, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_slices)
        assert torch.equal(run_conv(case, x, weight, bias).nan_to_num(7), plain.nan_to_num(7))
    assert plain.isnan().any() and not plain.isnan().all()
