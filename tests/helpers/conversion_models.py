"""Small networks that the conversion and checkpoint tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import Policy
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.testing import random_tensor

BACKEND = "auto" if unavailable_reason("scalar") is None else "reference"
# Swaps every layer that a kernel takes, without a stopwatch.
FORCE = Policy(min_speedup=0, measure=False, backend=BACKEND)


def force(**changes: Any) -> Policy:
    """`FORCE` with some fields changed."""
    return Policy(**{"min_speedup": 0, "measure": False, "backend": BACKEND, **changes})


def block_sparse_(layer: nn.Module, block: tuple[int, int] = (16, 1), keep: float = 0.25, seed: int = 0) -> None:
    """Zeroes whole blocks of a Conv2d or Linear weight."""
    out, cols = layer.weight.shape[0], layer.weight[0].numel() // layer.weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows, groups = -(-out // block[0]), -(-layer.weight.shape[1] // block[1])
    mask = torch.rand(rows, groups, cols, generator=generator) < keep
    mask[:, 0, 0] = True
    grown = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out, : layer.weight.shape[1]]
    with torch.no_grad():
        layer.weight.mul_(grown.reshape(layer.weight.shape))


def randomize_batch_norm_(model: nn.Module, seed: int = 0) -> None:
    """Gives every batch norm statistics and an affine map as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.weight is not None:
                    module.weight.normal_(1, 0.3, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)


class Tiny(nn.Module):
    """Convolutions with and without batch norm, a fusable and an average pool, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def sparse_tiny(seed: int = 0) -> Tiny:
    """`Tiny` with 16x1 blocks zeroed in all layers but the first convolution and the last linear layer."""
    torch.manual_seed(seed)
    model = Tiny()
    for i, layer in enumerate((model.features[3], model.features[7], model.classifier[0])):
        block_sparse_(layer, seed=seed + i)
    randomize_batch_norm_(model, seed)
    return model


def images(n: int = 2, channels: int = 3, size: int = 12, seed: int = 7) -> Tensor:
    """Normal random images."""
    return random_tensor(n, channels, size, size, seed=seed)


def assert_same_function(fast: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The converted float32 model errs at most twice as much as the dense one, both against float64 (RMS).

    A few outputs estimate the dense error badly, by luck it is near 0: hence the floor of four units in the last place.
    """
    dense = copy.deepcopy(model).eval()
    exact = copy.deepcopy(dense).double()

    def doubled(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        expected = dense(*args, **kwargs)
        ref = exact(*[doubled(a) for a in args], **{k: doubled(v) for k, v in kwargs.items()})
        got = fast(*args, **kwargs)
    assert got.shape == ref.shape
    error = (got.double() - ref).square().mean().sqrt()
    allowed = 2 * (expected.double() - ref).square().mean().sqrt() + 2.0**-22 * ref.square().mean().sqrt()
    assert error <= allowed, f"RMS error {error:.3e}, allowed {allowed:.3e}"


class Clock:
    """A stopwatch that reads what it is told: ``dense`` for the first callable of a layer, else ``sparse``."""

    def __init__(
        self, dense: list[float], sparse: list[float], whole: list[float] | None = None, merged: float | None = None
    ) -> None:
        self.dense, self.sparse, self.whole, self.merged = dense, sparse, whole or [3.0, 2.0, 1.0], merged
        self.calls = 0

    def __call__(self, runs: list[Any], **kwargs: Any) -> list[float]:
        if not hasattr(runs[0], "module"):
            return self.whole
        i = self.calls % len(self.dense)
        self.calls += 1
        if self.merged is not None and len(runs) == 3:  # a chain, its low-rank module, its merged layer
            return [self.dense[i], self.sparse[i], self.merged]
        return [self.dense[i], *[self.sparse[i]] * (len(runs) - 1)]
