"""Layer shapes of the benchmarks, one place for all of them; names read ``vgg19.conv3_2@cifar``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """A 3x3 convolution, stride 1, padding 1, on square images."""

    name: str
    c_in: int
    c_out: int
    size: int
    count: int = 1  # layers of this shape in the network


VGG19_CIFAR = (
    LayerShape("vgg19.conv1_1@cifar", 3, 64, 32),
    LayerShape("vgg19.conv1_2@cifar", 64, 64, 32),
    LayerShape("vgg19.conv2_1@cifar", 64, 128, 16),
    LayerShape("vgg19.conv2_2@cifar", 128, 128, 16),
    LayerShape("vgg19.conv3_1@cifar", 128, 256, 8),
    LayerShape("vgg19.conv3_2@cifar", 256, 256, 8, 3),
    LayerShape("vgg19.conv4_1@cifar", 256, 512, 4),
    LayerShape("vgg19.conv4_2@cifar", 512, 512, 4, 3),
    LayerShape("vgg19.conv5_1@cifar", 512, 512, 2, 4),
)

VGG16_IMAGENET = (
    LayerShape("vgg16.conv1_2@imagenet", 64, 64, 224),
    LayerShape("vgg16.conv2_2@imagenet", 128, 128, 112),
    LayerShape("vgg16.conv3_2@imagenet", 256, 256, 56, 2),
    LayerShape("vgg16.conv4_2@imagenet", 512, 512, 28, 2),
    LayerShape("vgg16.conv5_1@imagenet", 512, 512, 14, 3),
)

CPU_BLOCK_SHAPES = ((16, 1), (32, 1), (8, 1), (16, 4), (16, 16), (32, 32))
GPU_BLOCK_SHAPES = ((64, 16), (128, 16), (256, 16), (128, 32), (32, 32), (64, 64))
SPARSITIES = (0.5, 0.75, 0.875, 0.95)
