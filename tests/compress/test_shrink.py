"""Physically removed channels: the same outputs, and nothing removed where that would not hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimkernels as sk
from slimkernels.compress.pruning.prune import prune_
from slimkernels.compress.pruning.shrink import shrink_


def seeded(model: nn.Module) -> nn.Module:
    """Random weights and, for batch norm, random statistics, in eval mode and float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.double().eval()


def kill(layer: nn.Module, *filters: int) -> None:
    with torch.no_grad():
        layer.weight[list(filters)] = 0


def shrunk(model: nn.Module, shape: tuple[int, ...], **options):
    """The report, after checking that the outputs stay what they were."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = copy.deepcopy(model)(x)
    report = shrink_(model, x, **options)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    return report


def vgg() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
                nn.Conv2d(16, 12, 3), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            )  # fmt: skip
            self.classifier = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 5))

        def forward(self, x):
            return self.classifier(torch.flatten(self.features(x), 1))

    return seeded(Net())


def test_a_pruned_vgg_loses_its_channels_and_keeps_its_outputs():
    model = vgg()
    prune_(model, 0.5, granularity="channel", layers=["features.*", "classifier.0"], skip_first=False)
    with torch.no_grad():  # the constant of a dead channel: 0 after ReLU where the shift is negative
        for i in (1, 5):
            model.features[i].bias.copy_(model.features[i].running_mean * 0 - 5)
    report = shrunk(model, (2, 3, 8, 8))
    assert report.channels == {
        "features.0": (8, 4), "features.4": (16, 8), "features.7": (12, 6), "classifier.0": (20, 10),
    }  # fmt: skip
    assert model.features[1].num_features == 4 and tuple(model.features[4].weight.shape) == (8, 4, 3, 3)
    assert (model.classifier[0].in_features, model.classifier[0].out_features) == (24, 10)
    assert report.kept == {"classifier.3": "its output is the model's"}
    assert report.parameters[1] < 0.4 * report.parameters[0]
    model.train()
    F.cross_entropy(model(torch.randn(2, 3, 8, 8).double()), torch.arange(2)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_constant_moves_into_the_bias_of_a_reader_without_padding_only():
    model = vgg()
    for layer, bn in ((0, 1), (4, 5), (7, 8)):
        kill(model.features[layer], 1, 2)
        with torch.no_grad():
            model.features[bn].bias[1:3] = 4.0  # positive after ReLU
            model.features[bn].weight[1:3] = 0.0
    kill(model.classifier[0], 3)
    report = shrunk(model, (2, 3, 8, 8))
    # features.4 pads and keeps what it reads; features.7 does not, the flattened Linear neither.
    assert report.channels == {"features.4": (16, 14), "features.7": (12, 10), "classifier.0": (20, 19)}
    assert report.kept["features.0"] == "2 all-zero filters stay: their constant is not 0 and features.4 pads"


def test_fold_borders_trades_the_border_for_the_channel():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1))
    seeded(model)
    kill(model[0], 1)
    x = torch.randn(1, 2, 6, 6).double()
    expected = model(x)
    report = shrink_(model, x, fold_borders=True)
    assert report.channels == {"0": (4, 3)}
    torch.testing.assert_close(model(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(x), expected)


def test_an_average_that_counts_padding_keeps_a_constant_channel():
    def net(pool):
        return seeded(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), pool, nn.Conv2d(4, 3, 1)))

    for pool, removed in ((nn.AvgPool2d(3, 2, 1), 1), (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 2)):
        model = net(pool)
        kill(model[0], 0, 1)
        with torch.no_grad():
            model[0].bias[:2] = torch.tensor([-1.0, 2.0])
        report = shrunk(model, (1, 2, 7, 7))
        assert report.channels == {"0": (4, 4 - removed)}
        stays = "1 all-zero filters stay: their constant is not 0 and 2 pads"
        assert report.kept.get("0") == (stays if removed == 1 else None)


def test_a_constant_that_a_padded_average_hides_at_the_end_is_not_taken_for_zero():
    """With c = 1, relu(0.9 - avg(c)) is 0 inside the image, where the average is 1, and positive along its border."""
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(),
                                 nn.Conv2d(2, 1, 1)))  # fmt: skip
    kill(model[0], 0)
    with torch.no_grad():
        model[0].bias[0], model[2].weight[0], model[2].bias[0], model[2].running_mean[0] = 1.0, -1.0, -0.1, 1.0
    assert shrunk(model, (1, 1, 5, 5)).channels == {}


def test_channels_that_nobody_reads_go_and_the_effect_travels_back():
    model = seeded(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1)))
    with torch.no_grad():
        model[3].weight[:, :2] = 0  # channels 0 and 1 of layer 2 are read by nobody
        model[2].weight[2:, 3] = 0  # of the others, none reads channel 3 of layer 0
    report = shrunk(model, (1, 2, 7, 7))
    assert report.channels == {"0": (6, 5), "2": (5, 3)}


def test_the_last_channel_stays():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    kill(model[0], 0, 1, 2)
    report = shrunk(model, (5, 4))
    assert report.channels == {"0": (3, 1)} and report.kept["0"].startswith("1 all-zero filters stay: 2 needs one")


def test_a_residual_network_loses_inner_channels_only():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 1, 1)

        def forward(self, x):
            return x + self.conv2(F.relu(self.bn(self.conv1(x))))

    model = seeded(nn.Sequential(nn.Conv2d(1, 4, 1), Block(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[1].bn.bias.fill_(-9.0)
    for layer in (model[0], model[1].conv1, model[1].conv2):
        kill(layer, 0, 1)
    report = shrunk(model, (1, 1, 5, 5))
    assert report.channels == {"1.conv1": (8, 6)}
    assert report.kept["0"] == "its output goes to 2 places" and "add" in report.kept["1.conv2"]


@pytest.mark.parametrize("change", ["hook", "shared", "twice", "groups", "norm"])
def test_layers_that_something_else_depends_on_keep_their_channels(change):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    if change == "groups":
        model[3] = nn.Conv2d(4, 4, 1, groups=2)
    if change == "norm":
        model[1] = nn.BatchNorm2d(4, track_running_stats=False)
    seeded(model)
    kill(model[0], 1)
    if change == "hook":
        model[3].register_forward_hook(lambda *a: None)
    elif change == "shared":
        model[3].weight = model[0].weight
    elif change == "twice":
        model = nn.Sequential(*model[:4], model[0], *model[4:])
    report = shrunk(model, (2, 4, 3, 3))
    assert "0" not in report.channels and "0" in report.kept


def test_a_pool_over_the_features_of_a_linear_layer_mixes_its_channels():
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.MaxPool2d(3, stride=1, padding=1), nn.Linear(6, 2)))
    kill(model[0], 1, 2)
    report = shrunk(model, (2, 3, 5, 4))
    assert report.channels == {} and report.kept["0"] == "its output goes through MaxPool2d (1)"


def test_what_cannot_be_shrunk_raises_and_stays():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"shrink_: expected a model that can be traced: torch.fx cannot trace"):
        shrink_(nn.Sequential(nn.Linear(2, 2), Branch()))
    with pytest.raises(TypeError, match=r"shrink_: expected model to be an nn.Module, got int"):
        shrink_(3)
    model = prune_(seeded(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), 0.5, granularity="channel", layers="0")
    with pytest.raises(ValueError, match=r"shrink_: the model does not run on example input 0"):
        shrink_(model, torch.randn(1, 3).double())
    assert model[0].weight.shape == (4, 4) and sk.masks(model)


def test_a_shrunk_network_converts(tmp_path):
    model = sk.models.vgg_digits(width=16).eval()
    prune_(model, 0.5, granularity="channel", exclude="classifier.*", skip_first=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(-0.01)
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    report = shrink_(model, x)
    assert all(after == before // 2 for before, after in report.channels.values()) and len(report.channels) == 6
    fast = sk.convert(model, x, policy=sk.Policy(measure=False))
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    sk.save(fast, tmp_path / "small.slim.safetensors")
    again = sk.load(tmp_path / "small.slim.safetensors", into=model)
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "small.slim.safetensors").stat().st_size < 4 * report.parameters[0] * 0.4
