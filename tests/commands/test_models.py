"""The reference networks: shapes, sizes known from the literature, traceability, names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from slimkernels import models

CIFAR_VGGS = {"vgg11_cifar": 8, "vgg13_cifar": 10, "vgg16_cifar": 13, "vgg19_cifar": 16}
# SlimNets: parameters of the students, as printed there (415 k, 4 M, 490 k, 4.9 M, 2.5 M) and as counted by hand.
STUDENTS = {
    ("snn_cifar", 1000): 413_882,
    ("snn_cifar", 10_000): 4_112_882,
    ("cnn_cifar", 1000): 488_806,
    ("cnn_cifar", 10_000): 4_853_806,
    ("alexnet_cifar", None): 2_472_266,
}
ALL = [*CIFAR_VGGS, "nin_cifar", "vgg_digits", "snn_cifar", "cnn_cifar", "alexnet_cifar"]


def unfilled(name: str, **options) -> nn.Module:
    """A model without storage: initialising 20 million weights costs a second."""
    with torch.device("meta"):
        return models.build(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def channels(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", ALL)
def test_forward_shape_and_fx(name):
    model = models.build(name, num_classes=7, width=8).eval()  # full width takes a second to initialise
    assert channels(model)[0] == 8
    x = torch.randn(2, *models.input_shape(name))
    with torch.no_grad():
        y = model(x)
        traced = torch.fx.symbolic_trace(model)(x)
    assert y.shape == (2, 7) and torch.isfinite(y).all()
    torch.testing.assert_close(traced, y)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("name", "convs"), CIFAR_VGGS.items())
def test_cifar_vgg_layers(name, convs):
    model = unfilled(name)
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == convs
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) for c in found)
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [
        (512, 512),
        (512, 512),
        (512, 10),
    ]
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 2


def test_vgg19_size_is_that_of_the_paper():
    # SlimNets, table 1: 78.4 MB (of 2^20 bytes) in float32, without batch norm.
    assert parameters(unfilled("vgg19_cifar", batch_norm=False)) * 4 / 2**20 == pytest.approx(78.4, abs=0.05)


def test_batch_norm_is_optional():
    assert not any(isinstance(m, nn.BatchNorm2d) for m in unfilled("vgg11_cifar", batch_norm=False).modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in unfilled("vgg11_cifar").modules()) == 8


def test_nin_has_the_paper_s_parameters():
    assert parameters(unfilled("nin_cifar")) == pytest.approx(965_000, rel=0.01)


def test_nin_starts_with_every_class_alive():
    torch.manual_seed(1)
    model = models.nin_cifar(num_classes=100).eval()
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 32, 32))
    assert (logits > 0).all()  # a class that the last ReLU silences has no gradient


@pytest.mark.parametrize(("student", "count"), STUDENTS.items())
def test_students_have_the_paper_s_parameters(student, count):
    name, hidden = student
    assert parameters(unfilled(name, **({} if hidden is None else {"hidden": hidden}))) == count


def test_digits_width():
    assert parameters(unfilled("vgg_digits", width=32)) < parameters(unfilled("vgg_digits")) / 3
    with pytest.raises(ValueError, match=r"vgg_digits: expected width >= 4 channels, or a factor .* got 0"):
        models.vgg_digits(width=0)


@pytest.mark.parametrize("name", ALL)
def test_width_scales_every_stage(name):
    full, half, same = (channels(unfilled(name, **kw)) for kw in ({}, {"width": 0.5}, {"width": 1.0}))
    logits = 1 if name == "nin_cifar" else 0  # its last convolution holds the classes
    assert half[: len(half) - logits] == [c // 2 for c in full[: len(full) - logits]] and same == full


def test_width_factor_keeps_multiples_of_eight():
    assert set(channels(unfilled("vgg19_cifar", width=0.3))) == {16, 40, 80, 152}  # 19.2, 38.4, 76.8, 153.6
    assert [m.out_features for m in unfilled("vgg19_cifar", width=0.3).classifier if isinstance(m, nn.Linear)] == [
        152,
        152,
        10,
    ]
    assert channels(unfilled("vgg19_cifar", width=0.01))[0] == 8 and channels(models.snn_cifar(width=0.5)) == [3, 8]


@pytest.mark.parametrize(
    ("width", "error", "message"),
    [
        (2, ValueError, "expected width >= 4 channels, or a factor written as a float, got 2"),
        (0.0, ValueError, "expected a width factor > 0 and finite, got 0.0"),
        (float("nan"), ValueError, "expected a width factor > 0 and finite, got nan"),
        (True, TypeError, "expected width to be an int .* got True"),
        ("0.5", TypeError, "expected width to be an int .* got '0.5'"),
    ],
)
def test_width_refuses(width, error, message):
    for name in ("vgg19_cifar", "nin_cifar", "cnn_cifar"):
        with pytest.raises(error, match=f"{name}: {message}"):
            models.build(name, width=width)


def test_the_fast_nin_normalises_and_gives_signed_logits():
    torch.manual_seed(0)
    model = models.nin_cifar(width=16, batch_norm=True, final_relu=False)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 8
    assert [m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d)] == [True] * 8 + [False]
    logits = model(torch.randn(8, 3, 32, 32))
    assert (logits < 0).any() and (logits > 0).any()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in models.nin_cifar(width=16).modules())


def test_build_refuses_unknown_options():
    with pytest.raises(
        TypeError, match=r"models\.build: expected options of vgg11_cifar among batch_norm, width, got 'wdth'"
    ):
        models.build("vgg11_cifar", wdth=0.5)
    with pytest.raises(ValueError, match="cnn_cifar: expected hidden to be a positive int, got 0"):
        models.build("cnn_cifar", hidden=0)


def test_build_takes_torchvision_names():
    model = models.build("squeezenet1_1", num_classes=5)
    assert model.classifier[1].out_channels == 5
    assert models.input_shape("squeezenet1_1") == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "classes", "message"), [("vgg20", 10, "near matches: .*vgg1"), ("vgg11", 0, "classes >= 1")]
)
def test_build_refuses(name, classes, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes=classes)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="vgg20"):
        _ = models.vgg20


def test_importing_the_package_leaves_torchvision_alone():
    code = "import sys, slimkernels.models as m; assert 'torchvision' not in sys.modules; m.nin_cifar(); m.vgg11_cifar"
    subprocess.run([sys.executable, "-c", code + "; assert 'torchvision' not in sys.modules"], check=True)
