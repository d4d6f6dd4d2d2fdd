"""What can be one CUDA launch in `slimkernels.inference.one_launch`: the runs of layers, and why a layer is in none."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slimkernels.inference.cuda_chain import CudaChain, chain_of
from slimkernels.inference.cuda_linear_chain import IDLE, CudaLinearChain, linear_chain_of, linear_reason, of_one_pixel
from slimkernels.inference.cuda_stem import MOST_CHANNELS, CudaStem, stem_of, stem_reason
from slimkernels.kernels import cuda_chain
from slimkernels.nn import BlockSparseConv2d, FusedConv2d

CHAIN, STEM, LINEAR = "chain", "stem", "linear"
KINDS = (CHAIN, STEM, LINEAR)
AUTO = "auto"
# What is tried: of VGG-19 on an H200 (4eb6e67) these two took 40 us at batch 1 where the plain graph took 98, 44 of 102
# at batch 4 and 73 of 103 at batch 16; with a stem in front it was 44, 46 and 71.
AUTO_KINDS = (CHAIN, LINEAR)
MAX_IMAGES = 16  # of a chain: with more, a layer's own kernel has work enough
# What hands its input on in eval mode, between the layers of each kind.
IDLE_OF_IMAGES = (*IDLE, nn.Dropout2d)
_OF_IMAGES = (nn.Conv2d, FusedConv2d)
Leaf: TypeAlias = tuple[str, nn.Module]  # a module with its name


class Run:
    """Modules that follow each other: one launch where the kernel takes the input, else one after the other.

    Args:
        modules: all of them.
        names: of the layers among them.
        launch: what runs them in one launch.
    """

    dimensions = 4  # of an input

    def __init__(self, modules: list[nn.Module], names: list[str], launch: CudaChain | CudaStem) -> None:
        self.modules, self.names, self.launch = modules, names, launch
        # What the calls since the last recording began were: None for one launch, else why not.
        self.outcomes: dict[str | None, None] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """What was packed of the layers."""
        return self.launch.tensors

    def __call__(self, x: Any) -> Any:
        reason = self._obstacle(x)
        self.outcomes[reason] = None
        if reason is None:
            return self.launch(x)
        for module in self.modules:
            x = module(x)
        return x

    def _obstacle(self, x: Any) -> str | None:
        dtype = self.tensors[0].dtype
        if type(x) is not Tensor or x.dim() != self.dimensions or x.dtype != dtype:
            return f"its input is no batch of {'images' if self.dimensions == 4 else 'rows'} in {dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast"
        return self._refusal(x)

    def _refusal(self, x: Tensor) -> str | None:
        """Why the kernel does not take an input of these dimensions; None where it does."""
        raise NotImplementedError


class Chain(Run):
    """Block-sparse convolutions."""

    launch: CudaChain

    def __init__(self, modules: list[nn.Module], names: list[str]) -> None:
        super().__init__(modules, names, chain_of(modules))

    def _refusal(self, x: Tensor) -> str | None:
        return _chain_refusal(x, self.launch, "images")

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]} ({len(self.names)} layers)"


class LinearChain(Run):
    """Linear layers, with what stands between them."""

    launch: CudaLinearChain
    dimensions = 2

    def __init__(self, modules: list[nn.Module], names: list[str]) -> None:
        super().__init__(modules, names, linear_chain_of(modules))

    def _refusal(self, x: Tensor) -> str | None:
        return _chain_refusal(of_one_pixel(x), self.launch, "rows")

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]} ({len(self.names)} linear layers)"


class Stem(Run):
    """A dense convolution of images, its ReLU, and a block-sparse convolution."""

    launch: CudaStem

    def __init__(self, modules: list[nn.Module], names: list[str]) -> None:
        first, second = (module for module in modules if isinstance(module, (*_OF_IMAGES, BlockSparseConv2d)))
        # For mypy: the kinds of modules that `why_no_stem` found nothing against.
        super().__init__(modules, names, stem_of(first, second))  # type: ignore[arg-type]

    def _refusal(self, x: Tensor) -> str | None:
        return self.launch.obstacle(x)

    def __str__(self) -> str:
        return f"the stem {self.names[0]} and {self.names[1]}"


def _chain_refusal(x: Tensor, chain: CudaChain, what: str) -> str | None:
    if not 1 <= x.shape[0] <= MAX_IMAGES:
        return f"{x.shape[0]} {what}, not 1 to {MAX_IMAGES}"
    try:
        chain.plan(x)
    except ValueError as error:
        return str(error)
    return None


def disturbance(module: nn.Module) -> str | None:
    """Why a call of a module may do more, or other things, than its class says; None where it does not."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a hook"
    if "forward" in own:
        return "has a forward of its own"
    return "is a script module" if isinstance(module, torch.jit.ScriptModule) else None


def is_of_images(module: nn.Module) -> bool:
    """Whether a module is a dense convolution of few channels."""
    return isinstance(module, _OF_IMAGES) and module.in_channels <= MOST_CHANNELS


def layer_reason(layer: nn.Module) -> str | None:
    """Why no run takes a layer, as what is said of it; None where one may."""
    found = disturbance(layer)
    if found is not None:
        return found
    if type(layer) not in (*_OF_IMAGES, BlockSparseConv2d, nn.Linear):
        return f"is a {type(layer).__name__}"
    return "is in training mode" if layer.training else None


def chain_kind(module: nn.Module) -> str | None:
    """The kind of chain that a module is a layer of."""
    if isinstance(module, BlockSparseConv2d):
        return CHAIN
    return LINEAR if isinstance(module, nn.Linear) else None


def chain_reason(layer: nn.Module, before: Any) -> str | None:
    """Why a chain does not take a layer behind another one, or as its first; None where it does."""
    reason = layer_reason(layer)
    if reason is not None:
        return f"it {reason}"
    if isinstance(layer, nn.Linear):
        return linear_reason(layer, before)
    assert isinstance(layer, BlockSparseConv2d)
    if layer.values.dtype not in (torch.float16, torch.bfloat16):
        return f"it is in {layer.values.dtype}"
    reason = cuda_chain.shape_reason(layer.weight_shape, layer.block_shape)
    return None if reason is None else f"the kernel takes {reason}"


def why_no_stem(first: Leaf, between: list[Leaf], behind: list[Leaf]) -> str | None:
    """Why a layer is no stem with what follows it."""
    layer: Any = first[1]
    if not behind:
        return "no block-sparse convolution follows it"
    if not isinstance(behind[0][1], BlockSparseConv2d):
        return f"{behind[0][0]} follows it, which is no block-sparse convolution"
    reason = layer_reason(layer)
    if reason is not None:
        return f"it {reason}"
    for name, module in between:
        if disturbance(module) is not None or module.training:
            return f"{name} {disturbance(module) or 'is in training mode'}"
    second: Any = behind[0][1]
    reason = layer_reason(second)
    if reason is not None:
        return f"{behind[0][0]} {reason}"
    return stem_reason(layer, second, any(type(module) is nn.ReLU for _, module in between))
