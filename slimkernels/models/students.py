"""The smaller students of SlimNets (arXiv 1808.00496, table of students) for ``(N, 3, 32, 32)`` images.

The paper names them by hidden units and parameter counts alone. Their layers are those of its authors' published
program (github.com/ChristopherSweeney/SlimNets), whose parameters come out as the paper's:

=========  ==========================================  =======  ==========
paper      here                                         paper    parameters
=========  ==========================================  =======  ==========
SNN-1k     ``snn_cifar(hidden=1000)``                   415 k       413 882
SNN-10k    ``snn_cifar(hidden=10000)``                  4 M       4 112 882
CNN-1k     ``cnn_cifar(hidden=1000)``                   490 k       488 806
CNN-10k    ``cnn_cifar(hidden=10000)``                  4.9 M     4 853 806
AlexNet    ``alexnet_cifar()``                          2.5 M     2 472 266
=========  ==========================================  =======  ==========

No dropout and torch's own initialisation, as there; that these are the weights of the paper's rows is inferred from
the counts. ``width`` is an int, the channels of the first convolution, or a float, a factor on all convolutions.
"""

from __future__ import annotations

from torch import nn

from slimkernels.models.widths import scaled


def _lenet(c1: int, c2: int) -> list[nn.Module]:
    """Two 5x5 convolutions with 2x2 max-pools: 32x32 pixels to ``25 c2`` features."""
    return [
        nn.Conv2d(3, c1, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(c1, c2, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
    ]


def _check_hidden(name: str, hidden: int) -> None:
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise ValueError(f"{name}: expected hidden to be a positive int, got {hidden!r}")


def snn_cifar(num_classes: int = 10, hidden: int = 1000, width: int | float = 6) -> nn.Module:
    """The paper's shallow net: two small convolutions and one hidden layer, returning ``(N, num_classes)`` logits.

    Raises:
        TypeError, ValueError: a bad ``width`` or ``hidden``.
    """
    _check_hidden("snn_cifar", hidden)
    c1, c2 = scaled("snn_cifar", (6, 16), width)
    return nn.Sequential(
        *_lenet(c1, c2), nn.Linear(25 * c2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes)
    )


def cnn_cifar(num_classes: int = 10, hidden: int = 1000, width: int | float = 6) -> nn.Module:
    """`snn_cifar` with a second hidden layer of 84 units, returning ``(N, num_classes)`` logits.

    Raises:
        TypeError, ValueError: a bad ``width`` or ``hidden``.
    """
    _check_hidden("cnn_cifar", hidden)
    c1, c2 = scaled("cnn_cifar", (6, 16), width)
    return nn.Sequential(
        *_lenet(c1, c2),
        nn.Linear(25 * c2, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, num_classes),
    )


def alexnet_cifar(num_classes: int = 10, width: int | float = 64) -> nn.Module:
    """AlexNet's five convolutions (torchvision's channels) for 32x32 images and one linear layer.

    The first convolution is 11x11 with stride 4, as for ImageNet: 8x8 positions are left for the other four.

    Raises:
        TypeError, ValueError: a bad ``width``.
    """
    c1, c2, c3, c4 = scaled("alexnet_cifar", (64, 192, 384, 256), width)
    return nn.Sequential(
        nn.Conv2d(3, c1, 11, stride=4, padding=5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(c1, c2, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(c2, c3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(c3, c4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(c4, c4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(c4, num_classes),
    )
