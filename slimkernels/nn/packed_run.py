"""Native layers that follow each other, as they are packed now, and a chain of them for each shape of input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.kernels.cpu.chain import Chain, Form, Link, activation_sizes, forms
from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.memory import huge_pages, place
from slimkernels.kernels.cpu.steps import MovableSteps
from slimkernels.nn.packing import Prepacked
from slimkernels.tensors import is_plain

# Shapes of inputs that a run remembers chains for.
_CACHED_SHAPES = 8
# A chain that needs more than this between its layers gains nothing over its modules: what Python and new memory cost
# is small beside the arithmetic of such images.
_MOST_BYTES = 64 << 20
# Below it, torch's allocator serves as well as huge pages.
_LEAST_HUGE = 2 << 20
_PLAIN_TYPES = {Tensor, nn.Parameter}
_VERSION = operator.attrgetter("_version")
# The workspace that the next chain takes. One for the whole process: a call that finds it taken brings its own.
_SPARE: list[Tensor] = []


def _convs_of(module: Prepacked) -> tuple[PackedConv2d, ...]:
    """The native convolutions of a module; none where it has no pack of its present weight, or one without counts."""
    call = module._prepared
    if call is None or "bias" not in module._parameters or not module._pack_is_current():
        return ()
    bias = module._parameters["bias"]
    counted = not any(tensor.is_inference() for tensor in module._pack_follows())
    readable = bias is None or _is_readable(bias, call.convs[-1].c_out)
    return call.convs if counted and readable else ()


def _is_readable(bias: Tensor, size: int) -> bool:
    """Whether kernels can read a bias where it lies."""
    plain = bias.dtype is torch.float32 and bias.is_cpu and is_plain(bias) and not bias.is_inference()
    return plain and bias.dim() == 1 and bias.numel() == size and bias.is_contiguous()


class PackedRun:
    """Modules that follow each other, all convolutions or all linear layers, as chains of their packed layers.

    Args:
        modules: native layers of `slimkernels.nn`, in the order in which they run.
        images: whether they are convolutions.
    """

    def __init__(self, modules: Sequence[Any], images: bool) -> None:
        self._modules, self._images = tuple(modules), images
        self._links: list[Link] = []
        self._chains: dict[Any, _ShapedChain | None] = {}

    def is_ready(self) -> bool:
        """Whether every module has a pack of its present weight, and none wants a gradient.

        Chains of earlier packs are forgotten.
        """
        if not (self._links and self._holds()) and not self._renew():
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors))

    def _renew(self) -> bool:
        """Takes the modules as they are packed now, if all of them are."""
        self._links, self._chains = [], {}
        convs = [_convs_of(module) for module in self._modules]
        types = {type(t) for module in self._modules for t in module.parameters()}
        if not all(convs) or len({conv.isa for found in convs for conv in found}) > 1 or types - _PLAIN_TYPES:
            return False
        links: list[Link] = []
        for module, found in zip(self._modules, convs):
            for conv in found:
                bias = module._parameters.get("bias") if conv is found[-1] else None
                links.append(Link(NativeLayer.of(conv, bias), len(links)))
        # What every call compares: the ready calls and the tensors by identity, writes to the tensors and to the packs
        # by their counts, and where the weights and biases lie, since `.data` may be assigned to.
        self._calls, self._tensors = self._present()
        self._counted = [*self._tensors, *(t for link in links for t in link.layer.packed)]
        self._counts = list(map(_VERSION, self._counted))
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._links = links
        return True

    def _present(self) -> tuple[list[Any], list[Tensor]]:
        """The ready calls of the modules, and the tensors that their packs follow, with the biases."""
        calls, tensors = [], []
        for module in self._modules:
            calls.append(module.__dict__["_prepared"])
            tensors += module._pack_follows()
            bias = module._parameters.get("bias")
            if bias is not None:
                tensors.append(bias)
        return calls, tensors

    def _holds(self) -> bool:
        """Whether the modules, their packs, their weights and their biases are what they were."""
        # Mapped, because every call asks this of every layer.
        calls, tensors = self._present()
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, calls, self._calls))
            and all(map(operator.is_, tensors, self._tensors))
            and list(map(_VERSION, self._counted)) == self._counts
            and all(map(Tensor.is_set_to, tensors, self._aliases))
        )

    def attempt(self, x: Tensor) -> Tensor | None:
        """The output of all modules for a plain float32 CPU tensor; None where they have to run one by one.

        Raises:
            RuntimeError: a native kernel failed (out of memory).
        """
        key, chains = (x.shape, torch.get_num_threads()), self._chains
        if key not in chains:
            if len(chains) >= _CACHED_SHAPES:
                chains.pop(next(iter(chains)), None)
            chains[key] = self._chain(x)
        chain = chains.get(key)
        return None if chain is None else chain(x)

    def _chain(self, x: Tensor) -> _ShapedChain | None:
        links = self._links
        if x.numel() == 0 or (self._images and x.dim() != 4) or x.dim() == 0:
            return None
        size = (x.shape[1], x.shape[2], x.shape[3]) if self._images else (x.shape[-1], 1, 1)
        n = x.shape[0] if self._images else x.numel() // x.shape[-1]
        if not _fit(links, size):
            return None
        form = forms(links, n, [size])[0]
        chain = Chain.of(links, n, [size], form)
        if form in (Form.VECTORS, Form.PARTS) and not _fit(links, size, innermost=True):
            return None
        return _ShapedChain.of(chain, x, self._images)


def _fit(links: Sequence[Link], size: tuple[int, int, int], *, innermost: bool = False) -> bool:
    """Whether every layer takes what the one before it writes, and has something to write."""
    for layer, *_ in links:
        c, h, w = size
        takes = layer.conv.takes_images_innermost if innermost else layer.conv.takes_images
        if c != layer.conv.c_in or not takes(h, w):
            return False
        size = (layer.conv.c_out, *layer.output_size(h, w))
    return True


@dataclass(frozen=True)
class _ShapedChain:
    """A chain for inputs of one shape, on memory that every call brings.

    Attributes:
        steps: from the input to the output.
        nbytes: of the workspace.
        shape: of the output.
        images: whether input and output are images.
    """

    steps: MovableSteps
    nbytes: int
    shape: tuple[int, ...]
    images: bool

    @classmethod
    def of(cls, chain: Chain, x: Tensor, images: bool) -> _ShapedChain | None:
        """None where the chain needs too much memory."""
        placement = place(chain.lifetimes(0))
        if placement.nbytes > _MOST_BYTES:
            return None
        size = (x.shape[1], x.shape[2], x.shape[3]) if images else (x.shape[-1], 1, 1)
        c, p, q = activation_sizes(chain.links, [size])[-1]
        shape = (x.shape[0], c, p, q) if images else (*x.shape[:-1], c)
        x, y = _end(_laid_out(x, images), images), _end(_empty(shape, images), images)
        workspace = _workspace(placement.nbytes)[: placement.nbytes]
        memory = {name: workspace[where] for name, where in placement.ranges.items()}
        steps = chain.steps([x], y, memory)
        return cls(MovableSteps(chain.layers[0].isa, steps, [x, y, workspace]), placement.nbytes, shape, images)

    def __call__(self, x: Tensor) -> Tensor:
        y, memory = _empty(self.shape, self.images), _workspace(self.nbytes)
        images = self.images
        self.steps(_end(_laid_out(x, images), images), _end(y, images), memory[: self.nbytes])
        _SPARE[:] = [max([memory, *_SPARE], key=Tensor.numel)]
        return y


def _laid_out(x: Tensor, images: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if images else x.contiguous()


def _end(tensor: Tensor, images: bool) -> Tensor:
    """An input or output as the steps take it: images, or rows ``(n, channels)``."""
    return tensor if images else tensor.view(-1, tensor.shape[-1])


def _empty(shape: tuple[int, ...], images: bool) -> Tensor:
    layout = torch.channels_last if images else torch.contiguous_format
    return torch.empty(shape, dtype=torch.float32, memory_format=layout)


def _workspace(nbytes: int) -> Tensor:
    """Memory of at least so many bytes: the spare one, if it is there and large enough."""
    try:
        memory = _SPARE.pop()
    except IndexError:
        pass
    else:
        if memory.numel() >= nbytes:
            return memory
    return huge_pages(nbytes) if nbytes >= _LEAST_HUGE else torch.empty(nbytes, dtype=torch.uint8)
