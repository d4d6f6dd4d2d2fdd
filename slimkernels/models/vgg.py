"""VGG networks for small images: the CIFAR variants of SlimNets (arXiv 1808.00496) and one for 8x8 digits.

The layer lists, the builder and the forward pass are torchvision's (Simonyan and Zisserman, arXiv 1409.1556); only the
average pool and the classifier differ, because a 32x32 image is already 1x1 after the fifth max-pool.

Everywhere ``width`` is an int, the channels of the first stage (64 at full size), or a float, a factor on every stage
and on the classifier, whose results are rounded to multiples of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimkernels.models.widths import scaled


def _initialise(model: nn.Module) -> None:
    """He initialisation by fan-out for convolutions (arXiv 1502.01852), torch's own for linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _vgg(features: nn.Sequential, classifier: nn.Sequential) -> nn.Module:
    from torchvision.models.vgg import VGG

    with torch.device("meta"):  # the ImageNet classifier, 124 million weights, is replaced below
        model = VGG(features, init_weights=False)
    model.avgpool = nn.Identity()
    model.classifier = classifier
    _initialise(model)
    return model


def _vgg_cifar(letter: str, num_classes: int, batch_norm: bool, width: int | float) -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers

    stages = (64, 128, 256, 512)
    narrow = dict(zip(stages, scaled(f"{_NAMES[letter]}_cifar", stages, width), strict=True))
    # For mypy: whatever is not "M" is a number of channels.
    plan: list[Any] = [stage if stage == "M" else narrow[stage] for stage in cfgs[letter]]  # type: ignore[index]
    hidden = narrow[512]
    classifier = nn.Sequential(
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )
    return _vgg(make_layers(plan, batch_norm=batch_norm), classifier)


_NAMES = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}  # torchvision's letter: ours


def vgg11_cifar(num_classes: int = 10, batch_norm: bool = True, width: int | float = 64) -> nn.Module:
    """VGG-11 for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits: 8 convolutions, 9.8 M weights."""
    return _vgg_cifar("A", num_classes, batch_norm, width)


def vgg13_cifar(num_classes: int = 10, batch_norm: bool = True, width: int | float = 64) -> nn.Module:
    """VGG-13 for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits: 10 convolutions, 9.9 M weights."""
    return _vgg_cifar("B", num_classes, batch_norm, width)


def vgg16_cifar(num_classes: int = 10, batch_norm: bool = True, width: int | float = 64) -> nn.Module:
    """VGG-16 for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits: 13 convolutions, 15.3 M weights."""
    return _vgg_cifar("D", num_classes, batch_norm, width)


def vgg19_cifar(num_classes: int = 10, batch_norm: bool = True, width: int | float = 64) -> nn.Module:
    """VGG-19 for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits: the reference net of SlimNets.

    16 convolutions and a 512-512-classes classifier with dropout; 20.57 M parameters, 78.4 MiB, 0.40 GMAC an image.

    Raises:
        TypeError, ValueError: a bad ``width``, see `slimkernels.models.widths.scaled`.
    """
    return _vgg_cifar("E", num_classes, batch_norm, width)


def vgg_digits(num_classes: int = 10, width: int | float = 64) -> nn.Module:
    """A small VGG for one-channel 8x8 images ``(N, 1, 8, 8)``, returning ``(N, num_classes)`` logits.

    Six batch-normalised convolutions of ``width``, ``2 width`` and ``4 width`` channels, two of each, then two linear
    layers. At the default width (1.2 M parameters) even the narrowest pruned layer has four (16, 1) block rows.

    Raises:
        TypeError, ValueError: a bad ``width``, see `slimkernels.models.widths.scaled`.
    """
    from torchvision.models.vgg import make_layers

    a, b, c = scaled("vgg_digits", (64, 128, 256), width)
    plan: list[Any] = [a, a, "M", b, b, "M", c, c, "M"]
    features = make_layers(plan, batch_norm=True)
    features[0] = nn.Conv2d(1, a, kernel_size=3, padding=1)  # torchvision's builder starts from three channels
    classifier = nn.Sequential(
        nn.Linear(c, c),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(c, num_classes),
    )
    return _vgg(features, classifier)
