"""Network in Network for CIFAR, the student that SlimNets distils VGG-19 into (arXiv 1808.00496, 1312.4400)."""

from __future__ import annotations

from torch import nn


def _conv(c_in: int, c_out: int, kernel_size: int) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return [conv, nn.ReLU(inplace=True)]


def nin_cifar(num_classes: int = 10) -> nn.Module:
    """NIN for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits; nine convolutions, 0.967 M parameters.

    Every convolution is followed by a ReLU, the last one included, so logits are never negative (as in the paper).
    """
    logits = _conv(192, num_classes, 1)
    # A class map that is zero everywhere gets no gradient through the last ReLU: with He weights and zero bias, 2 of 3
    # classes died for good within an epoch of SGD at a learning rate of 0.01; from bias 1 all ten stay alive at 0.02.
    nn.init.normal_(logits[0].weight, std=0.01)  # type: ignore[arg-type]
    nn.init.ones_(logits[0].bias)  # type: ignore[arg-type]
    return nn.Sequential(
        *_conv(3, 192, 5),
        *_conv(192, 160, 1),
        *_conv(160, 96, 1),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Dropout(0.5),
        *_conv(96, 192, 5),
        *_conv(192, 192, 1),
        *_conv(192, 192, 1),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Dropout(0.5),
        *_conv(192, 192, 3),
        *_conv(192, 192, 1),
        *logits,
        nn.AvgPool2d(8),
        nn.Flatten(),
    )
