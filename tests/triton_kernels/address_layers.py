"""The layers that a GPU will see and tensors of their sizes without storage, for the address cases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.vgg import cfgs

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels.triton import low_rank_conv2d, low_rank_linear, runtime

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("the address cases need TRITON_INTERPRET=1 before the kernels are decorated", returncode=2)

H100 = {"shared_memory": 227 * 1024, "processors": 132}
# float16 takes bfloat16's configurations; the interpreter would convert bfloat16 to float32 first.
DTYPE = torch.float16


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of stride 1 and padding 1 on square images, with or without a 2x2 max-pool behind it."""

    c_in: int
    c_out: int
    size: int
    pool: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.c_in}-{self.c_out}@{self.size}{'-pool' if self.pool else ''}-batch{self.batch}"

    @property
    def epilogue(self) -> str:
        return "relu_maxpool2" if self.pool else "relu"


def vgg_layers(letter: str, size: int, batch: int) -> list[Layer]:
    """The distinct convolutions behind the first of torchvision's VGG of that letter, in order."""
    layers, channels = [], 3
    plan = cfgs[letter]
    for step, following in zip(plan, [*plan[1:], 0]):
        if step == "M":
            size //= 2
        else:
            layers.append(Layer(channels, step, size, following == "M", batch))
            channels = step
    return list(dict.fromkeys(layers[1:]))


CIFAR = vgg_layers("E", 32, 1024)
IMAGENET = vgg_layers("D", 224, 32)
BLOCK_SHAPES = ((128, 16), (64, 16), (64, 32), (32, 32))
# The default run: layers with and without a pool at both ends of both networks.
DEFAULT = {
    (CIFAR[0], (64, 16)), (CIFAR[3], (128, 16)), (CIFAR[-2], (128, 16)), (CIFAR[-1], (32, 32)), (IMAGENET[0], (64, 16)),
    (IMAGENET[-2], (64, 32)),
}  # fmt: skip


def every(layers: list[Layer]) -> pytest.MarkDecorator:
    """Layers and block shapes; those that are not in DEFAULT are slow."""
    pairs = [
        pytest.param(
            *pair, id=f"{pair[0]}-{pair[1][0]}x{pair[1][1]}", marks=() if pair in DEFAULT else pytest.mark.slow
        )
        for pair in product(layers, BLOCK_SHAPES)
    ]
    return pytest.mark.parametrize(("layer", "block_shape"), pairs)


every_layer = every(CIFAR + IMAGENET)
# The gradient of the pool comes before the others and has a kernel of its own.
every_unpooled_layer = every([layer for layer in CIFAR + IMAGENET if not layer.pool])


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Defaults are chosen for an H100, though tensors are on no device."""
    for module in (runtime, low_rank_conv2d, low_rank_linear):
        monkeypatch.setattr(module, "device_limits", lambda x: H100)
    runtime.limits.cache_clear()
    yield
    runtime.limits.cache_clear()


def weight_of(layer: Layer, block_shape: tuple[int, int], sparsity: float = 0.875) -> BSRWeight:
    """A random pattern; block rows taller than the layer are as tall as the layer."""
    shape = min(block_shape[0], layer.c_out), block_shape[1]
    return testing.random_bsr((layer.c_out, layer.c_in, 3, 3), shape, sparsity, seed=1, dtype=DTYPE)


def virtual(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """An activation without storage, channels_last where it has four axes."""
    channels_last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=channels_last)


def unravelled(offsets: np.ndarray, *sizes: int) -> tuple[np.ndarray, ...]:
    return np.unravel_index(offsets, sizes)


def nhwc(layer: Layer, n: np.ndarray, h: np.ndarray, w: np.ndarray, channels: np.ndarray, of: int) -> np.ndarray:
    """Sorted element offsets of these channels of the pixels that lie inside the image (int64)."""
    inside = (h >= 0) & (h < layer.size) & (w >= 0) & (w < layer.size)
    pixels = ((n.astype(np.int64) * layer.size + h) * layer.size + w)[inside]
    return np.unique((pixels[:, None] * of + channels[None, :]).ravel())
