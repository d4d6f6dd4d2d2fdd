"""FLOP counts of the ops under torch's `FlopCounterMode`: those of the stored work, by the rules of torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slimkernels as sk
from slimkernels.ops.flops import FORMULAS
from slimkernels.ops.library import _SCHEMAS


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


def test_every_op_has_a_formula() -> None:
    assert {schema.split("(")[0] for schema in _SCHEMAS} == set(FORMULAS)


@pytest.mark.parametrize("epilogue", ["none", "relu", "relu_maxpool2"])
def test_a_block_sparse_convolution_counts_its_share_of_the_dense_one(epilogue: str) -> None:
    conv = nn.Conv2d(16, 32, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    mask = torch.zeros(2, 16 * 6, dtype=torch.bool)
    mask[0, :24] = mask[1, 5:29] = True  # a quarter of the blocks of each row
    sparse = sk.nn.BlockSparseConv2d.from_dense(conv, (16, 1), mask, epilogue)
    x = torch.randn(3, 16, 13, 11)
    assert counted(lambda: sparse(x)) * 4 == counted(lambda: conv(x))


def test_gradients_count_what_is_asked_for() -> None:
    conv = nn.Conv2d(16, 32, 3, padding=1)
    sparse = sk.nn.BlockSparseConv2d.from_dense(conv, (16, 1))
    for wants_x, wants_weight in ((True, True), (False, True), (True, False)):
        x = torch.randn(2, 16, 6, 6, requires_grad=wants_x)
        for module in (conv, sparse):
            module.requires_grad_(wants_weight)
        dense, ours = (counted(lambda m=m, x=x: m(x).sum().backward()) for m in (conv, sparse))
        assert ours == dense


def test_linear_layers_of_any_number_of_rows() -> None:
    linear = nn.Linear(24, 32)
    x = torch.randn(2, 5, 24, requires_grad=True)
    sparse = sk.nn.BlockSparseLinear.from_dense(linear, (16, 4))
    low_rank = sk.nn.LowRankLinear.from_dense(linear, 6)
    chain = nn.Sequential(nn.Linear(24, 6, bias=False), nn.Linear(6, 32))
    # The gradient of U computes x V^T again, which the forward did not keep.
    again = counted(lambda: chain[0](x))
    for ours, dense, more in ((sparse, linear, 0), (low_rank, chain, again)):
        assert counted(lambda m=ours: m(x)) == counted(lambda m=dense: m(x))
        assert counted(lambda m=ours: m(x).sum().backward()) == counted(lambda m=dense: m(x).sum().backward()) + more


@pytest.mark.parametrize("kind", ["svd", "tai", "tucker2"])
def test_low_rank_convolutions_count_their_factors(kind: str) -> None:
    ranks = (5, 7) if kind == "tucker2" else (5,)
    module = sk.nn.LowRankConv2d(12, 20, (3, 5), (2, 1), (1, 2), kind=kind, ranks=ranks)
    plain = sk.to_dense(nn.Sequential(copy.deepcopy(module)))
    x = torch.randn(2, 12, 9, 8, requires_grad=True)
    assert counted(lambda: module(x)) == counted(lambda: plain(x)) > 0
    # The backward computes what is between the factors again.
    again = counted(lambda: plain[0][:-1](x))
    assert counted(lambda: module(x).sum().backward()) == counted(lambda: plain(x).sum().backward()) + again


def test_a_fused_dense_convolution_counts_as_dense() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    fused = sk.nn.FusedConv2d.from_dense(conv, "relu_maxpool2")
    x = torch.randn(2, 4, 6, 6)
    assert counted(lambda: fused(x)) == counted(lambda: conv(x)) > 0
