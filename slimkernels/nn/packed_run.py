"""Layers that follow each other, as they are now, and a chain of them for each shape of input."""

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
from slimkernels.kernels.cpu.pairs import bf16_allowed, engine
from slimkernels.kernels.cpu.steps import MovableSteps
from slimkernels.nn.packing import Prepacked
from slimkernels.nn.torch_linears import MOST_ROWS, TorchLinear, is_readable
from slimkernels.nn.torch_poolings import TorchPooling

# Shapes of inputs that a run remembers chains for.
_CACHED_SHAPES = 8
# A chain that needs more than this between its layers gains nothing over its modules: what Python and new memory cost
# is small beside the arithmetic of such images.
_MOST_BYTES = 64 << 20
# Below it, torch's allocator serves as well as huge pages.
_LEAST_HUGE = 2 << 20
_PLAIN_TYPES = {Tensor, nn.Parameter}
_Size = tuple[int, int, int]  # channels, height, width
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
    readable = bias is None or (is_readable(bias, 1) and bias.numel() == call.convs[-1].c_out)
    return call.convs if counted and readable else ()


class PackedRun:
    """Modules that follow each other, all convolutions or all linear layers, as chains of their packed layers.

    Args:
        modules: native layers of `slimkernels.nn`, in the order in which they run. Between and behind convolutions
            there may be torch's poolings; among linear layers torch's, each with its ``nn.ReLU`` behind it.
        images: whether they are convolutions.
    """

    def __init__(self, modules: Sequence[Any], images: bool) -> None:
        self._images = images
        self._order: list[Prepacked | TorchLinear | nn.Module] = []  # a module of torch's is a pooling
        for i, module in enumerate(modules):
            if type(module) is nn.Linear:
                module = TorchLinear(module, relu=any(type(behind) is nn.ReLU for behind in modules[i + 1 : i + 2]))
            if type(module) is not nn.ReLU:
                self._order.append(module)
        self._modules = tuple(module for module in self._order if isinstance(module, Prepacked))
        self._dense = [module for module in self._order if isinstance(module, TorchLinear)]
        self._layers: list[NativeLayer | TorchPooling] = []
        self._chains: dict[Any, _ShapedChain | None] = {}

    def is_ready(self) -> bool:
        """Whether every module has a pack of its present weight, and none wants a gradient.

        Chains of earlier packs, and of poolings with other attributes, are forgotten.
        """
        if not (self._layers and self._holds()) and not self._renew():
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors))

    def _renew(self) -> bool:
        """Takes the modules as they are packed now, if all of them are."""
        self._layers, self._chains = [], {}
        convs = {module: _convs_of(module) for module in self._modules}
        tensors = [t for module in self._modules for t in module.parameters()]
        types = {type(t) for t in (*tensors, *(t for dense in self._dense for t in dense.tensors()))}
        isas = {conv.isa for found in convs.values() for conv in found}
        if not all(convs.values()) or len(isas) > 1 or types - _PLAIN_TYPES:
            return False
        if not all(dense.is_readable() for dense in self._dense):
            return False
        (isa,) = isas
        layers: list[NativeLayer | TorchPooling] = []
        for module in self._order:
            if isinstance(module, TorchLinear):
                layers.append(module.native(isa))
            elif isinstance(module, Prepacked):
                for conv in convs[module]:
                    bias = module._parameters.get("bias") if conv is convs[module][-1] else None
                    # The alias keeps the memory for a call that runs while another thread puts other data into it.
                    layers.append(NativeLayer.of(conv, None if bias is None else bias.detach()))
            else:
                layers.append(TorchPooling(module))
        # What every call compares: the ready calls and the tensors by identity, writes to the tensors and to the packs
        # by their counts, the storages of weights and biases, since `.data` may be assigned to, the addresses that the
        # chains read, since sending a model to another process moves the memory of its storages, and the poolings.
        self._calls, self._tensors = self._present()
        native = [layer for layer in layers if isinstance(layer, NativeLayer)]
        packs = [t for layer in native for t in layer.packed]
        self._counted = [*self._tensors, *packs]
        self._counts = list(map(_VERSION, self._counted))
        self._read = [*packs, *(layer.bias for layer in native if layer.bias is not None)]
        self._addresses = list(map(Tensor.data_ptr, self._read))
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._poolings = [layer for layer in layers if isinstance(layer, TorchPooling)]
        # The layers first: another thread must not put a chain of the old ones among the new chains.
        self._layers, self._chains = layers, {}
        return True

    def _present(self) -> tuple[list[Any], list[Tensor]]:
        """The ready calls of the modules, and the tensors that their packs follow, with the biases and torch's."""
        calls, tensors = [], []
        for module in self._modules:
            calls.append(module.__dict__["_prepared"])
            tensors += module._pack_follows()
            bias = module._parameters.get("bias")
            if bias is not None:
                tensors.append(bias)
        for dense in self._dense:
            tensors += dense.tensors()
        return calls, tensors

    def _holds(self) -> bool:
        """Whether the modules, their packs, weights, biases and the attributes of poolings are what they were."""
        # Mapped, because every call asks this of every layer.
        calls, tensors = self._present()
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, calls, self._calls))
            and all(map(operator.is_, tensors, self._tensors))
            and list(map(_VERSION, self._counted)) == self._counts
            and all(map(Tensor.is_set_to, tensors, self._aliases))
            and list(map(Tensor.data_ptr, self._read)) == self._addresses
            and all(map(TorchPooling.holds, self._poolings))
        )

    def attempt(self, x: Tensor) -> Tensor | None:
        """The output of all modules for a plain float32 CPU tensor; None where they have to run one by one.

        Raises:
            RuntimeError: a native kernel failed (out of memory).
        """
        # Reading torch's switches takes 1 us.
        bf16 = engine() is not None and bf16_allowed()
        key, chains = (x.shape, torch.get_num_threads(), bf16), self._chains
        if key not in chains:
            if len(chains) >= _CACHED_SHAPES:
                chains.pop(next(iter(chains)), None)
            chains[key] = self._chain(x)
        chain = chains.get(key)
        return None if chain is None else chain(x)

    def _chain(self, x: Tensor) -> _ShapedChain | None:
        layers = self._layers  # none where another thread takes the modules anew meanwhile
        if not layers or x.numel() == 0 or (self._images and x.dim() != 4) or x.dim() == 0:
            return None
        size = (x.shape[1], x.shape[2], x.shape[3]) if self._images else (x.shape[-1], 1, 1)
        n = x.shape[0] if self._images else x.numel() // x.shape[-1]
        if self._dense and n > MOST_ROWS:
            return None
        links = _links(layers, size)
        if not links:
            return None
        form = forms(links, n, [size])[0]
        if form in (Form.VECTORS, Form.PARTS) and not _fit_innermost(links, size):
            return None  # among single weights, say, one of torch's linear layers, which is read channels last
        return _ShapedChain.of(Chain.of(links, n, [size], form), x, self._images)


def _links(layers: Sequence[NativeLayer | TorchPooling], size: _Size) -> list[Link]:
    """The layers for images of some size as links; none where one of them does not take what the one before writes."""
    (isa,) = {layer.isa for layer in layers if isinstance(layer, NativeLayer)}
    links: list[Link] = []
    for layer in layers:
        native = layer.native(isa, size) if isinstance(layer, TorchPooling) else layer
        if native is None or size[0] != native.conv.c_in or not native.conv.takes_images(*size[1:]):
            return []
        size = (native.conv.c_out, *native.output_size(*size[1:]))
        links.append(Link(native, len(links)))
    return links


def _fit_innermost(links: Sequence[Link], size: _Size) -> bool:
    """Whether every layer also takes its images with a vector of them innermost."""
    sizes = activation_sizes(links, [size])
    return all(link.layer.conv.takes_images_innermost(*h_w) for link, (_, *h_w) in zip(links, sizes))


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
        """The output for a plain float32 CPU tensor of the shape that this was made for."""
        x, y, memory = _laid_out(x, self.images), _empty(self.shape, self.images), _workspace(self.nbytes)
        self.steps.run_at([x.data_ptr(), y.data_ptr(), memory.data_ptr()])
        if not _SPARE or _SPARE[0].numel() < memory.numel():
            _SPARE[:] = [memory]
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
