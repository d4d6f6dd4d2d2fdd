"""torchvision's networks as a new user meets them: prune, convert, and the same outputs as the pruned network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion_models import BACKEND, assert_same_function, force, images, randomize_batch_norm_
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, ResNet

from slimkernels import Policy, convert, explain, finalize_, prune_
from slimkernels.compress.pruning.prune import masks

QUICK = Policy(repeats=1, budget_s=0, measured_candidates=1, backend=BACKEND)


def small_convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)], num_classes=10)


def small_swin() -> nn.Module:
    sizes: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    return models.SwinTransformer(**sizes, window_size=[4, 4], num_classes=10)


def small_vit() -> nn.Module:
    return models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def by_name(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, **options)


# The network, the size of its images, and layers of it that prune_ and convert both leave alone.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 32, 0),
    "mobilenet_v3_small": (by_name("mobilenet_v3_small"), 32, 0),
    "convnext": (small_convnext, 32, 0),
    "swin": (small_swin, 32, 4),  # qkv and proj of its attention; those of the first stage are narrower than 64
    "vit": (small_vit, 32, 2),  # out_proj of its attention
}
LARGE: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    name: (by_name(name), size, alone)
    for name, size, alone in (
        ("convnext_tiny", 64, 0),
        ("densenet121", 32, 0),
        ("efficientnet_b0", 32, 0),
        ("maxvit_t", 224, 0),
        ("mnasnet0_5", 32, 0),
        ("mobilenet_v2", 32, 0),
        ("regnet_y_400mf", 32, 0),
        ("resnet18", 32, 0),
        ("resnext50_32x4d", 32, 0),
        ("shufflenet_v2_x0_5", 32, 0),
        ("squeezenet1_1", 64, 0),
        ("swin_t", 64, 24),
        ("swin_v2_t", 64, 24),
        ("vgg11_bn", 32, 0),
        ("vit_b_16", 224, 12),
    )
}
LARGE["googlenet"] = by_name("googlenet", init_weights=False), 64, 0
LARGE["inception_v3"] = by_name("inception_v3", init_weights=False), 80, 0


def sensitive_(model: nn.Module) -> nn.Module:
    """Weights under which no branch is nearly switched off, as some are when training begins."""
    randomize_batch_norm_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.5)
            elif parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.05)
    return model.eval()


def check(make: Callable[[], nn.Module], size: int, alone: int) -> None:
    torch.manual_seed(0)
    model, x = sensitive_(make()), images(2, size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune_(model, 0.75, (16, 1))
    told = [str(w.message) for w in caught if "could not use zeros there" in str(w.message)]
    assert [text.split(" ")[1] for text in told] == ([str(alone)] if alone else [])
    pruned = set(masks(model))
    finalize_(model)
    for name, inputs, policy in (
        ("without inputs", None, Policy(backend=BACKEND)),
        ("forced", None, force()),
        ("measured", x, QUICK),
    ):
        fast = convert(model, inputs, policy=policy)
        plan = explain(fast).plan
        assert not any("put back" in note for note in plan.notes), name
        assert not any("failed" in layer.reason or "built" in layer.reason for layer in plan.layers), name
        assert_same_function(fast, model, x)
        if name == "forced":  # whatever was zeroed runs sparse
            assert pruned and pruned <= set(plan.swapped)
        del fast


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_network_converts_and_computes_the_same(name: str) -> None:
    check(*MODELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_pruned_large_network_converts_and_computes_the_same(name: str) -> None:
    check(*LARGE[name])


def check_detector(name: str, policies: tuple[Policy, ...]) -> None:
    """With a threshold that no box reaches, so that its last layers see an empty batch."""
    torch.manual_seed(0)
    model = getattr(models.detection, name)(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.99,
        rpn_post_nms_top_n_test=20,
    )  # fmt: skip
    sensitive_(model)
    prune_(model, 0.75, (16, 1))
    pruned = set(masks(model))
    finalize_(model)
    batch = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        expected, features = model(batch)[0], model.backbone(torch.stack(batch))
    for policy in policies:
        fast = convert(model, (batch,), policy=policy)
        plan = explain(fast).plan
        assert not any("differs" in note or "does not run" in note for note in plan.notes)
        with torch.no_grad():
            got, same = fast(copy.deepcopy(batch))[0], fast.backbone(torch.stack(batch))
        assert got.keys() == expected.keys()
        for key in got:
            assert got[key].shape == expected[key].shape
        for key in same:
            scale = features[key].abs().max()
            assert (same[key] - features[key]).abs().max() <= 1e-5 * scale
    assert pruned <= {la.name for la in plan.layers if la.action == "swap" or "empty batch" in la.reason}


def test_a_detector_that_finds_nothing_converts() -> None:
    check_detector("fasterrcnn_mobilenet_v3_large_320_fpn", (force(),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_a_detector_with_a_head_for_each_box_converts(name: str) -> None:
    check_detector(name, (QUICK, force()))
