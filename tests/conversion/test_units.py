"""Which layers conversion takes: by who calls them, by what they are, by where their zeros come from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion_models import (
    BACKEND,
    FORCE,
    assert_same_function,
    force,
    images,
    randomize_batch_norm_,
    sparse_tiny,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from slimkernels import Policy, convert, explain
from slimkernels.formats import BlockMask, block_mask
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear


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


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_layers_are_left_alone() -> None:
    model = torch.ao.nn.quantized.dynamic.Linear(4, 8)
    fast = convert(nn.Sequential(model, nn.Linear(8, 16)), policy=FORCE)
    assert type(fast[0]) is type(model) and isinstance(fast[1], BlockSparseLinear)


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
