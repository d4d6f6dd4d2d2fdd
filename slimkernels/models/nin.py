"""Network in Network for CIFAR, the student that SlimNets distils VGG-19 into (arXiv 1808.00496, 1312.4400)."""

from __future__ import annotations

from torch import nn

from slimkernels.models.widths import scaled


def _conv(c_in: int, c_out: int, kernel_size: int, batch_norm: bool) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=not batch_norm)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
    return [conv, *norm, nn.ReLU(inplace=True)]


def _logits(c_in: int, num_classes: int, final_relu: bool) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, num_classes, 1)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=0.01)
    if not final_relu:
        nn.init.zeros_(conv.bias)
        return [conv]
    # A class map that is zero everywhere gets no gradient through the last ReLU: with He weights and zero bias, 2 of 3
    # classes died for good within an epoch of SGD at a learning rate of 0.01; from bias 1 all ten stay alive at 0.02.
    nn.init.ones_(conv.bias)
    return [conv, nn.ReLU(inplace=True)]


def nin_cifar(
    num_classes: int = 10,
    width: int | float = 192,
    batch_norm: bool = False,
    final_relu: bool = True,
    dropout: float = 0.5,
) -> nn.Module:
    """NIN for ``(N, 3, 32, 32)`` images, returning ``(N, num_classes)`` logits; nine convolutions, 0.967 M parameters.

    By default every convolution is followed by a ReLU, the last one included, so logits are never negative, as in the
    paper, which trained for 300 epochs. For a schedule of a few epochs ask for ``batch_norm=True, final_relu=False``.

    Args:
        width: channels of the first convolution, the others in proportion (192, 160, 96, then 192), or a float factor
            on all of them, rounded to multiples of 8.
        batch_norm: batch norm after every convolution but the last.
        final_relu: ReLU on the class maps before they are averaged.
        dropout: probability after each of the two pools.

    Raises:
        TypeError, ValueError: a bad ``width``, see `slimkernels.models.widths.scaled`.
    """
    a, b, c, d = scaled("nin_cifar", (192, 160, 96, 192), width)
    return nn.Sequential(
        *_conv(3, a, 5, batch_norm),
        *_conv(a, b, 1, batch_norm),
        *_conv(b, c, 1, batch_norm),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Dropout(dropout),
        *_conv(c, d, 5, batch_norm),
        *_conv(d, d, 1, batch_norm),
        *_conv(d, d, 1, batch_norm),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Dropout(dropout),
        *_conv(d, d, 3, batch_norm),
        *_conv(d, d, 1, batch_norm),
        *_logits(d, num_classes, final_relu),
        nn.AvgPool2d(8),
        nn.Flatten(),
    )
