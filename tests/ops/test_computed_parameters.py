"""Weights and biases that torch computes before a call: parametrizations and the hooks of `torch.nn.utils.prune`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankLinear


# Torch's parametrizations take no tensor that is named like a method of nn.ModuleDict, as ``values`` is.
@pytest.mark.parametrize(
    ("how", "kind", "name"),
    [
        (how, kind, name)
        for how in ("parametrized", "pruned")
        for kind in ("conv", "linear", "low-rank")
        for name in ("bias", "weight")
        if (how, name) != ("parametrized", "weight") or kind == "low-rank"
    ],
)
def test_a_computed_weight_or_bias_is_used_in_eval_mode(how: str, kind: str, name: str) -> None:
    """A tensor that torch computes before a call is no parameter of the module, and its pack is out of date."""

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    torch.manual_seed(0)
    if kind == "conv":
        module: nn.Module = BlockSparseConv2d.from_dense(nn.Conv2d(16, 16, 3), (16, 1))
        x = torch.randn(2, 16, 5, 5)
    elif kind == "linear":
        module, x = BlockSparseLinear.from_dense(nn.Linear(16, 16), (16, 1)), torch.randn(2, 16)
    else:
        module, x = LowRankLinear.from_dense(nn.Linear(800, 800), 256), torch.randn(2, 800)
    module.requires_grad_(False).eval()
    before, zero = module(x), module.bias.detach().view(*([16] if kind != "low-rank" else [800]))
    zero = zero[:, None, None] if kind == "conv" else zero
    tensor = name if name == "bias" else "U" if kind == "low-rank" else "values"
    if how == "parametrized":
        parametrize.register_parametrization(module, tensor, Doubled())
        expected = before + zero if name == "bias" else 2 * before - zero
    else:
        prune.custom_from_mask(module, tensor, torch.zeros_like(getattr(module, tensor)))
        expected = before - zero if name == "bias" else zero.expand_as(before)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
