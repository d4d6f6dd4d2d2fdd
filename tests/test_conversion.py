"""convert: what it swaps, folds, fuses and leaves alone, and that the result computes the same."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion_models import (
    BACKEND,
    FORCE,
    Tiny,
    assert_same_function,
    block_sparse_,
    force,
    images,
    randomize_batch_norm_,
    sparse_tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from slimkernels import Policy, convert, explain, measure
from slimkernels.conversion import EvalGuard
from slimkernels.folding import flush_subnormals, fold_tensors, is_pool2
from slimkernels.formats import BlockMask, block_mask
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear


class Clock:
    """A stopwatch that reads what it is told: ``dense`` for the first callable of a layer, else ``sparse``."""

    def __init__(
        self, dense: list[float], sparse: list[float], whole: list[float] | None = None, merged: float | None = None
    ) -> None:
        self.dense, self.sparse, self.whole, self.merged = dense, sparse, whole or [3.0, 2.0, 1.0], merged
        self.calls = 0

    def __call__(self, runs: list[Any], **kwargs: Any) -> list[float]:
        if not hasattr(runs[0], "module"):
            return self.whole
        i = self.calls % len(self.dense)
        self.calls += 1
        if self.merged is not None and len(runs) == 3:  # a chain, its low-rank module, its merged layer
            return [self.dense[i], self.sparse[i], self.merged]
        return [self.dense[i], *[self.sparse[i]] * (len(runs) - 1)]


# What a converted model is: its layers, its function


def test_swaps_folds_and_fuses() -> None:
    model = sparse_tiny()
    fast = convert(model, policy=FORCE)
    assert type(fast) is Tiny and not fast.training
    kinds = [type(module).__name__ for module in fast.features]
    assert kinds == [
        "BlockSparseConv2d", "Identity", "Identity",
        "BlockSparseConv2d", "Identity", "Identity", "Identity",
        "BlockSparseConv2d", "Identity",
    ]  # fmt: skip
    assert [m.epilogue for m in fast.modules() if isinstance(m, BlockSparseConv2d)] == ["relu", "relu_maxpool2", "relu"]
    assert isinstance(fast.classifier[0], BlockSparseLinear) and fast.classifier[0].epilogue == "relu"
    assert_same_function(fast, model, images())
    plan = explain(fast).plan
    assert plan["features.4"].action == "fold" and plan["features.4"].into == "features.3"
    assert plan["features.6"].action == "fuse" and plan["features.6"].into == "features.3"
    assert plan["features.3"].block_sparsity > 0.5 and plan["features.3"].weight_shape == (32, 16, 3, 3)


@settings(max_examples=15)
@given(seed=st.integers(0, 50), size=st.integers(4, 17), n=st.integers(0, 3))
def test_computes_the_same_on_random_models_and_sizes(seed: int, size: int, n: int) -> None:
    model = sparse_tiny(seed)
    fast = convert(model, policy=FORCE)
    x = images(n, size=size, seed=seed)
    if n == 0:
        assert fast(x).shape == (0, 10)
    else:
        assert_same_function(fast, model, x)


def test_computes_the_same_after_training() -> None:
    model = sparse_tiny()
    masks = {n: m.weight != 0 for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = images(16), torch.arange(16) % 10
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_submodule(name).weight.mul_(mask)
    assert_same_function(convert(model, policy=FORCE), model, images())


def test_any_memory_format_in_and_channels_last_inside() -> None:
    fast = convert(sparse_tiny(), policy=force(exclude=("features.0",)))
    seen = []
    fast.features[7].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    a = fast(images())
    b = fast(images().contiguous(memory_format=torch.channels_last))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_kept_convolutions_beside_sparse_ones_hold_channels_last_weights() -> None:
    model = sparse_tiny()
    fast = convert(model, policy=force(dense_layers=False))
    assert type(fast.features[0]) is nn.Conv2d
    assert fast.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert explain(fast).plan["features.0"].channels_last
    assert_same_function(fast, model, images())


def test_original_is_untouched() -> None:
    model = sparse_tiny().train()
    model.classifier[0].register_forward_hook(lambda *a: None)
    prune.l1_unstructured(model.features[7], "weight", 0.5)
    parametrize.register_parametrization(
        model.features[3], "weight", BlockMask(block_mask(model.features[3].weight, (16, 1)), (32, 16, 3, 3), (16, 1))
    )
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    modules = {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    for kwargs in ({"policy": FORCE}, {"example_inputs": images()}, {"policy": FORCE, "training": True}):
        convert(model, **kwargs)
    assert torch.equal(rng, torch.get_rng_state())
    after = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert modules == {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(model.classifier[0]._forward_hooks) == 1
    assert "train" not in vars(model) and model.train().training


def test_example_inputs_are_untouched() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 16, 3))
    x = images()
    before = x.clone()
    convert(model, x, policy=Policy(repeats=1, budget_s=0))
    assert torch.equal(x, before)


def test_train_on_the_result_warns_once() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.eval()
    with pytest.warns(UserWarning, match="converted for inference"):
        assert fast.train() is fast
    assert fast.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.train().eval()
    assert not fast.training


def test_training_conversion_trains_the_stored_values() -> None:
    model = sparse_tiny().train()
    fast = convert(model, policy=FORCE, training=True)
    assert fast.training and not isinstance(vars(fast).get("train"), EvalGuard)
    assert type(fast.features[1]) is nn.BatchNorm2d and type(fast.features[2]) is nn.ReLU
    layer = fast.features[3]
    assert isinstance(layer, BlockSparseConv2d) and layer.values.requires_grad and layer.epilogue == "none"
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    x, y = images(8), torch.arange(8) % 10
    losses = []
    fast.classifier[2].p = 0.0
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(fast(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    zero = model.features[3].weight == 0
    assert (layer.to_dense().weight[zero] == 0).all()


def test_training_conversion_stores_declared_blocks_that_are_zero() -> None:
    layer = nn.Conv2d(16, 32, 3)
    mask = torch.zeros(2, 9 * 16, dtype=torch.bool)
    mask[:, :40] = True
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 0, 0] = 1.0
    parametrize.register_parametrization(layer, "weight", BlockMask(mask, layer.weight.shape, (16, 1)))
    model = nn.Sequential(layer)
    assert convert(model, policy=FORCE, training=True)[0].col_indices.numel() == 80
    assert convert(model, policy=FORCE)[0].col_indices.numel() == 1


# Folding


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


# Structure: who calls what


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.b, self.bn_b = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.relu(self.bn_a(y))
        return self.relu(self.bn_b(self.b(z)) + y)


def test_a_convolution_with_two_consumers_is_not_folded_nor_a_relu_called_twice_fused() -> None:
    model = Residual()
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert type(fast.bn_a) is nn.BatchNorm2d and type(fast.bn_b) is nn.Identity and type(fast.relu) is nn.ReLU
    assert isinstance(fast.a, BlockSparseConv2d) and isinstance(fast.b, BlockSparseConv2d)
    assert "one convolution alone" in explain(fast).plan["bn_a"].reason
    assert_same_function(fast, model, images())


def test_torchvision_resnet() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=500)
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert fast.layer1[0].conv1.epilogue == "none"  # its block calls one ReLU twice
    assert fast.conv1.epilogue == "relu"
    assert_same_function(fast, model, images(2, size=32))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if float(x.sum()) > -1e9 else y


def test_an_untraceable_model_keeps_its_batch_norm_and_says_so() -> None:
    model = Branching()
    randomize_batch_norm_(model)
    fast = convert(model, policy=FORCE)
    assert isinstance(fast.conv, BlockSparseConv2d) and type(fast.bn) is nn.BatchNorm2d
    report = explain(fast)
    assert "torch.fx cannot trace it" in report.plan["bn"].reason
    assert any("nothing is folded or fused" in note for note in report.plan.notes)
    assert "note: nothing is folded" in str(report)
    assert_same_function(fast, model, images())


class OptionalSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if skip is None else self.bn(y) + y + skip


def test_an_optional_argument_that_adds_a_consumer_prevents_folding() -> None:
    model = OptionalSkip()
    randomize_batch_norm_(model)
    fast = convert(model, images(), policy=FORCE)
    assert type(fast.bn) is nn.BatchNorm2d
    assert_same_function(fast, model, images())
    assert_same_function(fast, model, images(), skip=torch.ones(1))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.late = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)

    def forward(self, image: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.late(input=self.conv(image)) * scale


def test_example_inputs_by_keyword_and_a_layer_called_by_keyword() -> None:
    model = Keyword()
    fast = convert(model, {"image": images(), "scale": 2.0}, policy=FORCE)
    assert isinstance(fast.conv, BlockSparseConv2d) and type(fast.late) is nn.Conv2d
    assert "something else than one tensor" in explain(fast).plan["late"].reason
    assert_same_function(fast, model, image=images(), scale=2.0)


class Recording(nn.Module):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 16, 3), seen
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x
        return self.conv(x)


def test_side_effects_of_forward_stay_in_scratch_copies() -> None:
    model = Recording([])
    fast = convert(model, images(), policy=Policy(repeats=1, budget_s=0))
    assert model.count == 0 and fast.count == 0 and not hasattr(fast, "last") and not hasattr(model, "last")


def test_hooks_are_kept_and_block_fusing() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
    )  # fmt: skip
    randomize_batch_norm_(model)
    model[0].register_forward_hook(lambda m, a, out: seen.append(out))
    model[3].register_forward_hook(lambda m, a, out: seen.append(out))
    model[4].register_forward_pre_hook(lambda m, a: None)
    fast = convert(model, images(), policy=FORCE)
    assert not seen
    assert fast[0][0].epilogue == "none" and type(fast[0][1]) is nn.Identity and type(fast[1]) is nn.ReLU
    assert fast[2].epilogue == "none" and type(fast[3]) is nn.ReLU
    assert type(fast[4]) is nn.Conv2d and explain(fast).plan["4"].reason == "it carries hooks"
    assert type(fast[5]) is nn.BatchNorm2d
    assert_same_function(fast, model, images())
    del seen[:]
    x = images()
    with torch.no_grad():
        expected = model.eval()(x), list(seen)
        del seen[:]
        got = fast(x), list(seen)
    for a, b in zip((expected[0], *expected[1]), (got[0], *got[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_shared_modules_and_shared_weights_stay() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    twice = nn.Sequential(nn.Conv2d(3, 16, 3), conv, nn.ReLU(), conv)
    fast = convert(twice, policy=FORCE)
    assert type(fast[1]) is nn.Conv2d and fast[1] is fast[3]
    assert "several names" in explain(fast).plan["1"].reason
    assert_same_function(fast, twice, images())
    tied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 32))
    tied[2].weight = tied[0].weight
    fast = convert(tied, policy=FORCE)
    assert fast[0].weight is fast[2].weight and isinstance(fast[3], BlockSparseLinear)
    assert "shared" in explain(fast).plan["2"].reason
    assert_same_function(fast, tied, torch.randn(4, 16))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(self.conv(x)))


def test_a_layer_called_twice_is_swapped_but_nothing_is_folded_into_it() -> None:
    model = CalledTwice()
    randomize_batch_norm_(model)
    fast = convert(model, images(channels=16), policy=FORCE)
    assert isinstance(fast.conv, BlockSparseConv2d) and type(fast.bn) is nn.BatchNorm2d
    assert_same_function(fast, model, images(channels=16))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.conv.weight) + self.conv(x)


def test_a_layer_whose_weight_the_forward_reads_stays() -> None:
    fast = convert(ReadsWeight(), policy=FORCE)
    assert type(fast.conv) is nn.Conv2d and "reads its weight" in explain(fast).plan["conv"].reason


def test_attention_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    fast = convert(model, policy=FORCE)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert torch.allclose(fast(x), model.eval()(x), atol=1e-5)
    nested = convert(nn.Sequential(model), policy=FORCE)
    assert "TransformerEncoderLayer" in explain(nested).plan["0.linear1"].reason


# Layers it cannot take


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Inherits(nn.Conv2d):
    pass


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), "groups=2"),
    "padding_mode": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    "same": (lambda: nn.Conv2d(4, 8, 2, padding="same"), "asymmetric"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d is not supported"),
    "own_forward": (lambda: OwnForward(4, 8, 3), "OwnForward has its own forward"),
    "complex": (lambda: nn.Conv2d(4, 8, 3, dtype=torch.complex64), "torch.complex64"),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), "Conv1d is not supported"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 8), "Bilinear is not supported"),
    "meta": (lambda: nn.Conv2d(4, 8, 3, device="meta"), "meta device"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "no weights yet"),
    "sparse_tensor": (lambda: _with_weight(nn.Linear(4, 8), torch.randn(8, 4).to_sparse()), "layout torch.sparse_coo"),
}


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_layer_stays_with_its_reason_and_strict_raises(name: str) -> None:
    make, reason = UNSUPPORTED[name]
    model = nn.Sequential(make())
    fast = convert(model, policy=FORCE)
    assert type(fast[0]) is type(model[0])
    layer = explain(fast).plan["0"]
    assert layer.action == "keep" and not layer.supported and reason in layer.reason
    with pytest.raises(ValueError, match=r"convert: strict=True, and these layers cannot be taken: 0: ") as error:
        convert(model, policy=FORCE, strict=True)
    assert reason in str(error.value)


def test_quantized_model_is_kept() -> None:
    model = torch.ao.nn.quantized.dynamic.Linear(4, 8)
    fast = convert(nn.Sequential(model, nn.Linear(8, 16)), policy=FORCE)
    assert isinstance(fast[1], BlockSparseLinear)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_exact_string_padding_is_taken(padding: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, (3, 5), padding=padding, dilation=(2, 1)))
    fast = convert(model, policy=FORCE, strict=True)
    assert isinstance(fast[0], BlockSparseConv2d)
    assert_same_function(fast, model, images())


def test_a_subclass_without_own_forward_is_taken() -> None:
    model = nn.Sequential(Inherits(3, 16, 3))
    assert isinstance(convert(model, policy=FORCE)[0], BlockSparseConv2d)


def test_float64_stays_dense_on_cpu_and_says_why() -> None:
    fast = convert(sparse_tiny().double(), policy=Policy(min_speedup=0, measure=False))
    if BACKEND == "auto":
        assert type(fast.features[3]) is nn.Conv2d
        assert "torch.float64" in explain(fast).plan["features.3"].reason


def test_a_layer_without_weights_to_keep_is_stored_without_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.zero_()
    fast = convert(model, policy=FORCE)
    assert fast[0].col_indices.numel() == 0
    assert_same_function(fast, model, images(channels=16))


# Zeros from other tools


def test_torch_prune_masks_are_taken() -> None:
    model = sparse_tiny()
    conv, linear = model.features[7], model.classifier[0]
    prune.l1_unstructured(linear, "weight", 0.5)
    prune.random_unstructured(linear, "bias", 0.5)
    mask = torch.zeros_like(conv.weight)
    mask[:16, ::4] = 1
    prune.custom_from_mask(conv, "weight", mask)
    prune.l1_unstructured(conv, "weight", 0.1)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    fast = convert(model, images(), policy=FORCE)
    assert isinstance(fast.features[7], BlockSparseConv2d) and fast.features[7].weight_bsr().block_sparsity >= 0.8
    with torch.no_grad():
        assert torch.allclose(fast(images()), model.eval()(images()), atol=1e-5)
    assert prune.is_pruned(conv) and not prune.is_pruned(fast)


def test_a_stale_pruned_weight_is_recomputed() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)  # an optimiser step; weight still holds the old product
    fast = convert(model, policy=FORCE)
    assert torch.equal(fast[0].to_dense().weight, model[0].weight_orig * model[0].weight_mask)


def test_masks_that_share_their_weight_do_not_mix() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    for layer, column in ((model[0], slice(0, 8)), (model[2], slice(8, 16))):
        mask = torch.zeros(16, 16)
        mask[:, column] = 1
        prune.custom_from_mask(layer, "weight", mask)
    fast = convert(model, policy=FORCE)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-6)


@pytest.mark.parametrize("method", ["weight_norm", "old_weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_are_computed_and_taken(method: str) -> None:
    conv = nn.Conv2d(3, 16, 3)
    if method == "weight_norm":
        parametrizations.weight_norm(conv)
    elif method == "old_weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight_norm(conv)
    elif method == "spectral_norm":
        parametrizations.spectral_norm(conv)
    else:
        parametrizations.orthogonal(conv)
    model = nn.Sequential(conv, nn.BatchNorm2d(16)).eval()
    randomize_batch_norm_(model)
    expected = model(images()).detach()
    for _ in range(2):  # torch's own removal of a parametrization from a copy breaks the original
        fast = convert(model, policy=FORCE)
        assert isinstance(fast[0], BlockSparseConv2d) and type(fast[1]) is nn.Identity
        assert torch.allclose(fast(images()), expected, atol=1e-5)
    assert torch.equal(model(images()), expected)


def test_block_masks_declare_the_block_shape_and_stay_on_kept_layers_while_training() -> None:
    model = sparse_tiny()
    conv = model.features[3]
    mask = block_mask(conv.weight, (16, 1))
    parametrize.register_parametrization(conv, "weight", BlockMask(mask, conv.weight.shape, (16, 1)))
    fast = convert(model, policy=FORCE)
    assert fast.features[3].block_shape == (16, 1)
    kept = convert(model, policy=force(exclude=("features",)), training=True)
    assert parametrize.is_parametrized(kept.features[3], "weight")
    assert not parametrize.is_parametrized(convert(model, policy=force(exclude=("features",))).features[3])


def test_minus_zero_is_zero_and_nan_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
        model[0].weight[:, 3] = float("nan")
    fast = convert(model, policy=force(block_shapes=((16, 1),)))
    assert fast[0].col_indices.tolist() == [3]
    assert fast(images(channels=16)).isnan().all()


# Chains of thin layers and low-rank modules


def chains() -> dict[str, tuple[nn.Sequential, Tensor, type[nn.Module], str]]:
    image = images(channels=12)
    return {
        "linear": (nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 24)), torch.randn(5, 32), LowRankLinear, "svd"),
        "svd": (nn.Sequential(nn.Conv2d(12, 4, 3, 2, 1, 2), nn.Conv2d(4, 20, 1)), image, LowRankConv2d, "svd"),
        "tai": (
            nn.Sequential(
                nn.Conv2d(12, 5, (3, 1), (2, 1), (1, 0), bias=False), nn.Conv2d(5, 20, (1, 5), (1, 1), (0, 2))
            ),
            image,
            LowRankConv2d,
            "tai",
        ),
        "tai_bias_without_padding": (
            nn.Sequential(nn.Conv2d(12, 5, (3, 1)), nn.Conv2d(5, 20, (1, 3), dilation=(1, 2))),
            image,
            LowRankConv2d,
            "tai",
        ),
        "tucker2": (
            nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 20, 1)),
            image,
            LowRankConv2d,
            "tucker2",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", chains())
@pytest.mark.parametrize("merge", [False, True])
def test_a_chain_becomes_one_layer_or_dense(name: str, merge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x, cls, kind = chains()[name]
    model = nn.Sequential(*chain, nn.ReLU()) if x.dim() == 2 else nn.Sequential(*chain, nn.BatchNorm2d(20), nn.ReLU())
    randomize_batch_norm_(model)
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5], merged=0.2 if merge else 0.8))
    fast = convert(model, x)
    first = fast[0]
    if merge:
        assert type(first) in (nn.Conv2d, nn.Linear) and type(fast[len(model) - 1]) is nn.ReLU
    else:
        assert isinstance(first, cls) and first.epilogue == "relu" and getattr(first, "kind", "svd") == kind
        assert type(fast[len(model) - 1]) is nn.Identity
    assert all(type(fast[i]) is nn.Identity for i in range(1, len(chain)))
    plan = explain(fast).plan
    assert plan["1"].action == "fold" and plan["1"].into == "0"
    assert f"{5 if merge else 2}.00x the speed of the chain" in plan["0"].reason
    assert_same_function(fast, model, x)


NOT_CHAINS = {
    "bias_before_padding": nn.Sequential(
        nn.Conv2d(12, 5, (3, 1), padding=(1, 0)), nn.Conv2d(5, 20, (1, 3), padding=(0, 1))
    ),
    "horizontal_first": nn.Sequential(nn.Conv2d(12, 5, (1, 3), bias=False), nn.Conv2d(5, 20, (3, 1))),
    "not_thin": nn.Sequential(nn.Conv2d(12, 40, 1), nn.Conv2d(40, 20, 1)),
    "two_3x3": nn.Sequential(nn.Conv2d(12, 2, 3), nn.Conv2d(2, 20, 3)),
    "strided_1x1": nn.Sequential(nn.Conv2d(12, 4, 3), nn.Conv2d(4, 20, 1, stride=2)),
    "relu_between": nn.Sequential(nn.Conv2d(12, 4, 3), nn.ReLU(), nn.Conv2d(4, 20, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CHAINS)
def test_other_layers_are_no_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NOT_CHAINS[name]
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.1]))
    fast = convert(model, images(channels=12))
    assert not any(isinstance(m, LowRankConv2d) for m in fast.modules())
    assert_same_function(fast, model, images(channels=12))


def test_a_slow_chain_stays_and_chains_are_not_touched_without_shapes() -> None:
    chain, x, *_ = chains()["svd"]
    fast = convert(chain, policy=Policy())
    assert [type(m) for m in fast] == [nn.Conv2d, nn.Conv2d]
    assert "decided without shapes" in explain(fast).plan["0"].reason
    assert_same_function(fast, chain, x)


def test_low_rank_modules_keep_their_rank_or_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(32, 24)
    conv = LowRankConv2d.from_factors(
        [torch.randn(4, 12, 3, 1), torch.randn(20, 4, 1, 3)], torch.randn(20), kind="tai", padding=1
    )
    model = nn.Sequential(conv, nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 32, bias=False))
    model.append(LowRankLinear.from_dense(linear, 4))
    randomize_batch_norm_(model)
    x = images(channels=12, size=6)
    fast = convert(model)
    assert isinstance(fast[0], LowRankConv2d) and fast[0].epilogue == "relu" and type(fast[1]) is nn.Identity
    assert isinstance(fast[5], LowRankLinear)
    assert_same_function(fast, model, x)
    for seconds, kind in (([1.0, 1.0], LowRankConv2d), ([1.0, 1.5], nn.Conv2d)):
        monkeypatch.setattr(measure, "typical_seconds", Clock(seconds[:1], seconds[1:]))
        fast = convert(model, x)
        assert type(fast[0]) is kind
        assert_same_function(fast, model, x)


# Decisions


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    block_sparse_(model[0])
    return model


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
@pytest.mark.parametrize(
    ("dense", "sparse", "swapped"),
    [([1.0, 1.0], [0.5, 0.9], True), ([1.0, 1.0], [0.1, 0.96], False), ([1.0, 1.0], [1.2, 0.1], False)],
)
def test_a_layer_is_swapped_only_where_it_is_faster_at_every_input(
    dense: list[float], sparse: list[float], swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "typical_seconds", Clock(dense, sparse))
    fast = convert(one_layer(), [images(1, 16), images(4, 16)])
    assert isinstance(fast[0], BlockSparseConv2d) == swapped
    layer = explain(fast).plan["0"]
    assert layer.dense_ms == (1000.0, 1000.0) and layer.sparse_ms == pytest.approx([1000 * s for s in sparse])
    assert ("the speed of dense" in layer.reason) == swapped
    assert ("is as fast or faster" in layer.reason) != swapped
    assert explain(fast).plan.decided == "measured"


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
@pytest.mark.parametrize(
    ("whole", "swapped"), [([3.0, 2.0, 1.9], True), ([3.0, 2.0, 2.1], False), ([2.0, 3.0, 2.1], False)]
)
def test_a_slower_whole_model_stays_dense(whole: list[float], swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5], whole))
    fast = convert(model, images(1, 16))
    assert isinstance(fast[0], BlockSparseConv2d) == swapped
    report = explain(fast)
    assert report.plan.dense_ms == (2000.0,)
    if swapped:
        assert "1.05x faster" in str(report)
    else:
        assert "the whole model is not faster" in report.plan["0"].reason and report.plan.converted_ms == ()
        relaid = fast[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert relaid == (whole[1] <= whole[0])
    assert_same_function(fast, model, images(1, 16))


def test_a_converted_model_that_differs_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    wrong = BlockSparseConv2d.from_dense

    def broken(*args: Any, **kwargs: Any) -> BlockSparseConv2d:
        module = wrong(*args, **kwargs)
        with torch.no_grad():
            module.values[0] += 1
        module.prepack()
        return module

    monkeypatch.setattr(BlockSparseConv2d, "from_dense", broken)
    fast = convert(model, images(1, 16), policy=Policy(min_speedup=0, repeats=1, budget_s=0, backend=BACKEND))
    assert type(fast[0]) is nn.Conv2d and "output at example input 0 differs" in explain(fast).plan["0"].reason
    assert torch.equal(fast(images(1, 16)), model(images(1, 16)))


class NeedsWeight(nn.Module):
    """Untraceable, and reads a weight past its layer: only running it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * float(self.conv.weight.sum())


def test_a_converted_model_that_fails_is_not_returned() -> None:
    model = NeedsWeight()
    policy = Policy(min_speedup=0, repeats=1, budget_s=0, backend=BACKEND)
    fast = convert(model, images(1, 16), policy=policy)
    assert type(fast.conv) is nn.Conv2d and "does not run on example input 0" in explain(fast).plan["conv"].reason
    assert torch.equal(fast(images(1, 16)), model(images(1, 16)))


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
def test_a_dense_layer_is_swapped_only_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    assert type(convert(model)[0]) is nn.Conv2d
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5]))
    fast = convert(model, images())
    assert isinstance(fast[0], BlockSparseConv2d) and "every block stored" in explain(fast).plan["0"].reason
    assert type(convert(model, images(), policy=Policy(dense_layers=False))[0]) is nn.Conv2d


def test_without_inputs_the_report_says_so() -> None:
    report = explain(convert(sparse_tiny()))
    assert report.plan.decided == "cost model, without shapes"
    assert "decided without shapes" in report.plan["features.3"].reason


def test_a_layer_that_the_inputs_do_not_reach_stays() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    fast = convert(Unused(), torch.randn(2, 16), policy=FORCE)
    assert type(fast.b) is nn.Linear and "do not reach it" in explain(fast).plan["b"].reason


def test_excluded_layers_stay() -> None:
    fast = convert(sparse_tiny(), policy=force(exclude=("features.3", "classifier")))
    assert type(fast.features[3]) is nn.Conv2d and type(fast.classifier[0]) is nn.Linear
    assert type(fast.features[4]) is nn.BatchNorm2d and isinstance(fast.features[7], BlockSparseConv2d)
    assert explain(fast).plan["classifier.0"].reason == "excluded by the policy"


# Using the result


def test_converting_again_keeps_what_is_converted() -> None:
    model = sparse_tiny()
    once = convert(model, policy=FORCE)
    twice = convert(once, policy=FORCE)
    assert_same_function(twice, model, images())
    assert explain(twice).plan["features.4"].into == "features.3"
    assert {layer.name for layer in explain(twice).plan.layers} == {layer.name for layer in explain(once).plan.layers}
    trained = convert(once, policy=FORCE, training=True)
    assert trained.training and trained.features[3].epilogue == "relu_maxpool2"


def test_copies_pickles_and_state_dicts() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    expected = fast(images())
    assert torch.equal(copy.deepcopy(fast)(images()), expected)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(images()), expected) and explain(again).plan == explain(fast).plan
    with pytest.warns(UserWarning, match="converted for inference"):
        again.train()
    assert not fast.training
    other = convert(sparse_tiny(), policy=FORCE)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(images()), expected)


def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    fast = convert(sparse_tiny(), policy=FORCE)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(images()), fast(images()), atol=1e-6)


def test_exports() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    exported = torch.export.export(fast, (images(),))
    assert torch.allclose(exported.module()(images()), fast(images()), atol=1e-6)
    assert any("bsr_conv2d" in str(node.target) for node in exported.graph.nodes)


def test_eight_threads_with_different_shapes() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    inputs = [images(1 + i % 3, size=8 + i, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(fast(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_measured_conversion_runs_end_to_end() -> None:
    model = sparse_tiny()
    fast = convert(model, [images(1), (images(3),)], policy=Policy(repeats=1, budget_s=0))
    assert_same_function(fast, model, images(1))
    plan = explain(fast).plan
    assert plan.decided == "measured" and len(plan["features.3"].dense_ms) == 2


def test_measured_training_conversion_times_forward_and_backward() -> None:
    fast = convert(sparse_tiny(), images(), policy=Policy(repeats=1, budget_s=0, backend=BACKEND), training=True)
    assert len(explain(fast).plan["features.3"].dense_ms) == 1 and fast.training


# Errors


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"^convert: expected an nn\.Module, got int"):
        convert(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^convert: expected a Policy, got dict"):
        convert(nn.Linear(2, 2), policy={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^convert: expected example_inputs to be a tensor.*got int"):
        convert(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"^convert: expected at least one example input, got an empty list"):
        convert(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"^convert: the model does not run on example input 1: "):
        convert(nn.Linear(2, 2), [torch.ones(1, 2), torch.ones(1, 3)])
    with pytest.raises(ValueError, match=r"^convert: expected Policy.exclude to name layers of the model, got 'typo'"):
        convert(nn.Linear(2, 2), policy=Policy(exclude=("typo",)))
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"^convert: expected a model that can be copied, got Linear: "):
        convert(model)


def test_explain_takes_models_plans_and_paths_only() -> None:
    with pytest.raises(ValueError, match=r"^explain: expected a model from slimkernels\.convert, got a plain Linear"):
        explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^explain: expected a converted model, a ModelPlan or a path, got int"):
        explain(3)  # type: ignore[arg-type]
    fast = convert(sparse_tiny(), policy=FORCE)
    report = explain(fast)
    assert str(explain(report.plan)) == str(report)
    assert [row["name"] for row in report.rows] == [layer.name for layer in report.plan.layers]
    stored = sum(t.numel() * t.element_size() for t in fast.state_dict().values())
    assert report.bytes_stored == stored
    text = str(report)
    assert "bsr" in text and "features.3" in text and f"{report.bytes_dense / stored:.2f}x smaller" in text
    import json

    assert json.loads(report.to_json())["bytes_stored"] == stored
