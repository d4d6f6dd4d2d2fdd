"""The convolutions of the networks as problems, without a network: what is compiled, checked, swept and profiled.

`prune_` masks ``floor(sparsity * n)`` of a layer's n blocks, so sizes and the number of stored blocks, all that a
kernel's choice and its compilation depend on, follow from the layer alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimkernels import testing, tuning
from slimkernels.cases import FusedConvCase
from slimkernels.dispatch.select import KernelChoice, choose, forced
from slimkernels.formats import block_grid
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem, problem_json
from slimkernels.kernels.triton.bsr_conv2d_config import device_configs, images_reason


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of padding 1 on square images, its epilogue, and the names of the layers that are alike."""

    c_in: int
    c_out: int
    size: int
    epilogue: str
    names: tuple[str, ...]


def vgg_layers(image: int, stages: tuple[tuple[int, int], ...]) -> tuple[Layer, ...]:
    """The distinct convolutions of a VGG but the first, each with its ReLU, the last of a stage with its max-pool.

    Args:
        image: height and width of the input. stages: (output channels, convolutions) of each stage.
    """
    found: dict[tuple[int, int, int, str], list[str]] = {}
    c_in = 3
    for i, (c_out, convolutions) in enumerate(stages, start=1):
        for j in range(1, convolutions + 1):
            epilogue = "relu_maxpool2" if j == convolutions else "relu"
            if c_in != 3:
                found.setdefault((c_in, c_out, image, epilogue), []).append(f"conv{i}_{j}")
            c_in = c_out
        image //= 2
    return tuple(Layer(*key, tuple(names)) for key, names in found.items())


NETWORKS = {
    "vgg19_cifar": vgg_layers(32, ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))),
    "vgg16_bn": vgg_layers(224, ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))),
}


@dataclass(frozen=True)
class NetworkRow:
    """A pruned network to be timed: its name in `NETWORKS`, images, share of zero blocks, block shape, and the kernel
    of its pruned layers.
    """

    network: str
    batch: int
    sparsity: float
    block_shape: tuple[int, int]
    kernel: str = "auto"

    def problems(self, device: str = "cuda") -> list[ConvProblem]:
        """The distinct problems of the network's pruned convolutions."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return [
            problem(layer, self.batch, self.sparsity, self.block_shape, dtype, device)
            for layer in NETWORKS[self.network]
        ]

    def first(self, device: str = "cuda") -> FusedConvProblem:
        """The problem of the network's first convolution, 3 -> 64 channels, which stays dense."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        size = NETWORKS[self.network][0].size
        return FusedConvProblem(
            self.batch, 3, size, size, 64, 3, 3, (1, 1), (1, 1), (1, 1), dtype, device, "relu"
        )  # fmt: skip

    def every(self, device: str = "cuda") -> list[ConvProblem | FusedConvProblem]:
        """The first convolution's problem, then those of `problems`."""
        return [self.first(device), *self.problems(device)]


# By value: the headline, other blocks, the higher sparsity, small batches, large images; then what completes the table.
ROWS = {
    "headline": NetworkRow("vgg19_cifar", 1024, 0.875, (128, 16)),
    "blocks_64x16": NetworkRow("vgg19_cifar", 1024, 0.875, (64, 16)),
    "sparsity_95": NetworkRow("vgg19_cifar", 1024, 0.95, (128, 16)),
    "batch_1": NetworkRow("vgg19_cifar", 1, 0.875, (64, 16)),
    "batch_16": NetworkRow("vgg19_cifar", 16, 0.875, (64, 16)),
    "vgg16_224": NetworkRow("vgg16_bn", 32, 0.875, (128, 16)),
    "sparsity_75": NetworkRow("vgg19_cifar", 1024, 0.75, (128, 16)),
    "sparsity_60": NetworkRow("vgg19_cifar", 1024, 0.6, (128, 16)),
    "blocks_64x32": NetworkRow("vgg19_cifar", 1024, 0.875, (64, 32)),
    "blocks_32x32": NetworkRow("vgg19_cifar", 1024, 0.875, (32, 32)),
    "tensor_cores_32x32": NetworkRow("vgg19_cifar", 1024, 0.875, (32, 32), "bsr_conv2d__cuda_tensor_cores"),
    "tensor_cores_128x16": NetworkRow("vgg19_cifar", 1024, 0.875, (128, 16), "bsr_conv2d__cuda_tensor_cores"),
    "batch_128": NetworkRow("vgg19_cifar", 128, 0.875, (128, 16)),
    "vgg16_224_95": NetworkRow("vgg16_bn", 32, 0.95, (128, 16)),
}
HEADLINE = ROWS["headline"]
_CUT_OFF = 2.0**-20  # of a sum by the matrix units in TF32, see `Bench.compare`
# Rows whose layers are swept for their fastest configuration.
SWEPT_ROWS = ("headline", "batch_1")
# Rows of call 1, in the order in which their layers are checked.
FIRST_ROWS = ("headline", "blocks_64x16", "sparsity_95", "batch_16", "batch_1")


def problem(
    layer: Layer, batch: int, sparsity: float, block_shape: tuple[int, int], dtype: torch.dtype, device: str
) -> ConvProblem:
    """A layer as the dispatcher sees it; blocks are no higher than the layer has output channels."""
    block = (min(block_shape[0], layer.c_out), block_shape[1])
    rows, columns = block_grid((layer.c_out, layer.c_in, 3, 3), block)
    stored = rows * columns - math.floor(sparsity * rows * columns)
    return ConvProblem(
        batch, layer.c_in, layer.size, layer.size, layer.c_out, 3, 3, (1, 1), (1, 1), (1, 1), block, stored, dtype,
        device, layer.epilogue,
    )  # fmt: skip


def layer_name(p: ConvProblem | FusedConvProblem) -> str:
    """``conv3_4`` for a problem of one of the networks, its sizes elsewhere."""
    if isinstance(p, FusedConvProblem) and (p.c_in, p.c_out) == (3, 64):
        return "conv1_1"
    for layers in NETWORKS.values():
        for layer in layers:
            if (p.c_in, p.c_out, p.h, p.epilogue) == (layer.c_in, layer.c_out, layer.size, layer.epilogue):
                return layer.names[0]
    return f"{p.c_in}-{p.c_out}@{p.h}"


def choice_of(p: ConvProblem | FusedConvProblem) -> KernelChoice:
    """What ``kernel="auto"`` runs on a problem: the kernel and configuration that the networks' rows time."""
    return choose(p, index=torch.cuda.current_device() if p.device == "cuda" else -1)


def choices_of(p: ConvProblem | FusedConvProblem) -> list[KernelChoice]:
    """`choice_of`, and the default of the kernel of one position a tile where that takes the layer and is not it."""
    found = [choice_of(p)]
    name = "bsr_conv2d__triton_images_on_m"
    if isinstance(p, ConvProblem) and p.device == "cuda" and found[0].name != name and images_reason(p) is None:
        found.append(KernelChoice(name, device_configs("images_on_m", p)[0]))
    return found


def at_batch(p: Any, batch: int | None) -> Any:
    """The same layer with so many images; None leaves it as it is."""
    return p if batch is None else replace(p, n=batch)


def choice_key(p: ConvProblem | FusedConvProblem, kernel: str, config: Mapping[str, int]) -> str:
    """One line that says exactly which kernel ran on what: two rows with the same key launched the same code."""
    return json.dumps({"problem": problem_json(p), "kernel": kernel, "config": dict(config)}, sort_keys=True)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out holds NaN inside the block, in CUDA graphs captured there at every replay too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Bench:
    """One layer on the device with seeded random values, and its float64 result, computed at the first check."""

    problem: ConvProblem | FusedConvProblem

    def __post_init__(self) -> None:
        self.layer, self.dense, self.x = tuning.build(self.problem)
        self._reference: tuple[torch.Tensor, dict[str, Any]] | None = None

    def call(self, choice: KernelChoice) -> torch.Tensor:
        """The layer's output by this kernel and configuration."""
        with torch.no_grad(), forced(choice):
            return self.layer(self.x)

    def reference(self, images: Any = slice(None), device: str | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        """The float64 output of some images and the bound on their errors, computed on a device (by default x's)."""
        p, layer = self.problem, self.layer
        x = self.x[images].to(device or self.x.device)
        bias = None if layer.bias is None else layer.bias.detach().to(x.device)
        if isinstance(p, FusedConvProblem):
            case = FusedConvCase(
                stride=p.stride, padding=p.padding, dilation=p.dilation, epilogue=p.epilogue, dtype=p.dtype
            )
            return case.expected(x, layer.weight.detach().to(x.device), bias)
        arguments = (x, layer.weight_bsr(), bias, p.stride, p.padding, p.dilation, p.epilogue)
        scale, terms = testing.scale_bsr_conv2d(*arguments)
        return testing.reference_bsr_conv2d(*arguments), {"scale": scale, "terms": terms, "block_shape": p.block_shape}

    def compare(self, y: torch.Tensor) -> testing.Comparison:
        """The whole output against float64, on the device.

        Where the matrix units multiply float32, from numbers of TF32, their sums are cut off, not rounded. On an
        H200 up to 353 of 8 million sums, of Triton's kernel and of that in CUDA C++, were up to 1.5 times as far off as
        rounded sums may be. Factors that were not rounded are off by hundreds of times more.
        """
        if self._reference is None:
            self._reference = self.reference()
        reference, bound = self._reference
        p = self.problem
        if p.dtype == torch.float32 and p.device == "cuda" and torch.backends.cudnn.allow_tf32:
            bound = bound | {"u_mul": _CUT_OFF}
        return testing.compare(y, reference, **bound, name=layer_name(self.problem))
