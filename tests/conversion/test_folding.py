"""Batch norm folded into convolutions, ReLU and max-pool fused into epilogues."""

from __future__ import annotations

import pytest
import torch
from conversion_models import (
    FORCE,
    assert_same_function,
    force,
    images,
    randomize_batch_norm_,
    sparse_tiny,
)
from torch import nn

from slimkernels import convert, explain
from slimkernels.conversion.folding import flush_subnormals, fold_tensors, is_pool2


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_to_its_closed_form(affine: bool, bias: bool) -> None:
    conv, bn = nn.Conv2d(5, 7, 3, bias=bias), nn.BatchNorm2d(7, affine=affine, eps=1e-3)
    randomize_batch_norm_(bn)
    weight, shift = fold_tensors(conv.weight, conv.bias, bn)
    scale = 1 / (bn.running_var.double() + 1e-3).sqrt() * (bn.weight.double() if affine else 1)
    start = (conv.bias.double() if bias else 0) - bn.running_mean.double()
    assert torch.equal(weight, (conv.weight.double() * scale[:, None, None, None]).float())
    expected = start * scale + (bn.bias.double() if affine else 0)
    assert torch.allclose(shift.double(), expected, rtol=2.0**-23, atol=1e-12)


def test_folded_subnormals_are_flushed_and_nan_is_not() -> None:
    tiny = torch.finfo(torch.float32).tiny
    values = torch.tensor([tiny, tiny / 2, -tiny / 4, 0.0, float("nan"), float("-inf")])
    got = flush_subnormals(values)
    assert got[:4].tolist() == [tiny, 0.0, 0.0, 0.0] and got[4].isnan() and got[5] == float("-inf")
    model = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1e-40)
        model[1].bias.fill_(1e-41)
    fast = convert(model)
    assert fast[0].weight.count_nonzero() == 0 and fast[0].bias.count_nonzero() == 0


def test_zero_batch_norm_scale_adds_zero_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32))
    with torch.no_grad():
        model[1].weight[16:] = 0
    fast = convert(model, policy=force(block_shapes=((16, 1),)))
    assert fast[0].weight_bsr().block_sparsity == 0.5
    assert_same_function(fast, model, images(channels=8))


def test_batch_norm_without_statistics_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False))
    fast = convert(model, policy=FORCE)
    assert type(fast[1]) is nn.BatchNorm2d
    assert "running statistics" in explain(fast).plan["1"].reason


def test_batch_norm_behind_a_grouped_or_reflecting_convolution_folds() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8),
    )  # fmt: skip
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert type(fast[1]) is nn.Identity and type(fast[3]) is nn.Identity and fast[0].bias is not None
    assert_same_function(fast, model, images(channels=4))


def test_batch_norm_behind_a_linear_layer_stays() -> None:
    """BatchNorm2d normalizes dimension 1, a linear layer's outputs are the last dimension."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm2d(5))
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert type(fast[1]) is nn.BatchNorm2d
    assert_same_function(fast, model, images(channels=5, size=6))


POOLS = {
    "exact": (nn.MaxPool2d(2), True),
    "pairs": (nn.MaxPool2d((2, 2), (2, 2), (0, 0), (1, 1)), True),
    "kernel3": (nn.MaxPool2d(3, 2), False),
    "stride1": (nn.MaxPool2d(2, 1), False),
    "padding": (nn.MaxPool2d(2, 2, padding=1), False),
    "dilation": (nn.MaxPool2d(2, 2, dilation=2), False),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), False),
    "average": (nn.AvgPool2d(2), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_only_the_exact_pool_is_fused(name: str) -> None:
    pool, fused = POOLS[name]
    assert is_pool2(pool) == fused
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(16, 16, 3))
    fast = convert(model, policy=FORCE)
    assert (type(fast[2]) is nn.Identity) == fused
    assert_same_function(fast, model, images(size=11))


def test_pool_without_relu_and_relu_before_batch_norm_are_not_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.BatchNorm2d(16))
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert type(fast[1]) is nn.MaxPool2d and type(fast[4]) is nn.BatchNorm2d and type(fast[3]) is nn.Identity
    assert_same_function(fast, model, images())


def test_policy_switches_off_folding_and_fusing() -> None:
    model = sparse_tiny()
    fast = convert(model, policy=force(fold_bn=False))
    assert type(fast.features[1]) is nn.BatchNorm2d and fast.features[0].epilogue == "none"
    assert explain(fast).plan["features.1"].reason == "not folded: Policy.fold_bn is off"
    assert convert(model, policy=force(fuse_pool=False)).features[3].epilogue == "relu"
    assert convert(model, policy=force(fuse_relu=False)).features[3].epilogue == "none"
