"""A chain of native layers, whose values only the chain sees: run piece by piece of the batch, in the faster layout.

With images innermost, a vector of the CPU holds one channel of 8 or 16 images. On an AVX-512 machine the kernels then
reach about 85% of the multiply-add peak, against 55 to 60% with channels last, and a piece's activations stay in the
caches. This needs a vector full of images, and two copies at the ends of the chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.memory import Lifetime, Placement, place, whole_lines
from slimkernels.kernels.cpu.pieces import FULL_ENOUGH, Piece, image_by_image, pieces
from slimkernels.kernels.cpu.steps import Step, images_innermost, layout_step
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import LANES, Pair

# Multiply-adds per copied element below which the two copies cost more than the layout saves.
_MACS_PER_COPY = 150
# Bytes of a batch's activations around one layer above which they come from memory layer after layer, so that a chain
# rather takes image by image. A third-level cache of 16 MB holds less beside the weights.
_BYTES_IN_CACHE = 12 << 20


class Form(Enum):
    """How a chain runs its layers.

    Attributes:
        VECTORS: piece by piece with a vector of images innermost.
        PARTS: layer by layer with the parts of few images innermost, as many of them as fill one vector.
        WHOLE: the whole batch layer by layer, channels last.
        IMAGES: image by image through all layers, channels last.
        MODULES: as the modules do: a native call for each layer, into new memory.
    """

    VECTORS = "vectors of images"
    PARTS = "parts of images"
    WHOLE = "whole batch"
    IMAGES = "image by image"
    MODULES = "module by module"


@dataclass(frozen=True)
class _Activation:
    """What one layer of a chain hands to the next: the sizes of one image, and the bytes of the largest piece."""

    channels: int
    h: int
    w: int
    nbytes: int


class Link(NamedTuple):
    """A layer of a chain, and which of the chain's activations it takes.

    Attributes:
        layer: what runs.
        source: the activation that it reads.
        residual: the activation that is added to its sums, in front of the ReLU; None for none.
    """

    layer: NativeLayer
    source: int
    residual: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The activations that it reads."""
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True)
class Chain:
    """Native layers of one instruction set that follow each other (`Chain.of` makes one).

    The activations are the chain's inputs, and behind them what each layer writes; a layer reads any of those before
    it. The last one is the output.

    A chain counts its time in ticks, one for each kernel. Tick 0 copies the inputs to images innermost, ticks 1, 2, ...
    run the layers, and the last tick copies the output back. Where no copy is needed, its tick passes unused.

    Attributes:
        links: the layers in the order in which they run.
        offsets: for every layer, the entry offsets that its kernel reads, by the number of images that lie innermost
            (1: channels last).
        pieces: how the batch is cut.
        activations: None stands for inputs that are read, and an output that is written, as they lie.
        form: how the layers run.
        parts: for every layer, the rows and columns of parts that each image is cut into.
    """

    links: tuple[Link, ...]
    offsets: tuple[dict[int, Tensor], ...]
    pieces: tuple[Piece, ...]
    activations: tuple[_Activation | None, ...]
    form: Form
    parts: tuple[Pair, ...]

    @classmethod
    def of(
        cls, links: Sequence[Link], n: int, inputs: Sequence[tuple[int, int, int]], form: Form | None = None
    ) -> Chain:
        """The chain for n images.

        It is cut for the number of threads that torch uses now, and can be run with another one.

        Args:
            links: the layers, in the order in which they run.
            n: the number of images.
            inputs: channels, height and width of each input (rows are images of 1 x 1 pixel).
            form: one of `forms`; None takes the first of them.
        """
        form, sizes = form or forms(links, n, inputs)[0], activation_sizes(links, inputs)
        threads = torch.get_num_threads()
        parts = _parts(links, n, sizes) if form is Form.PARTS else [WHOLE] * len(links)
        if form is Form.PARTS:
            cut = [Piece(0, n, LANES[links[0].layer.isa], -1)]
        elif form is Form.IMAGES:
            cut = image_by_image(n, threads)
        elif form is Form.VECTORS:
            full_enough = 0.0 if any(link.layer.conv.narrow for link in links) else FULL_ENOUGH
            cut = pieces(n, LANES[links[0].layer.isa], threads, full_enough)
        else:
            cut = pieces(n, 1, threads)
        used = {piece.lanes for piece in cut} if form is not Form.MODULES else set()
        offsets = [
            {k: layer.conv.known_offsets(*sizes[source][1:], k, own) for k in used}
            for (layer, source, _), own in zip(links, parts)
        ]
        activations: list[_Activation | None] = []
        for i, (c, p, q) in enumerate(sizes):
            # Pieces that lie channels last read the chain's inputs and write its output themselves.
            at_an_end = i < len(inputs) or i == len(sizes) - 1
            images = [piece.padded_count for piece in cut if piece.lanes > 1 or not at_an_end]
            images = [] if form is Form.MODULES else images
            rows, columns = _parts_of(i, links, parts, len(inputs))
            nbytes = whole_lines(4 * max(images, default=0) * c * (p // rows) * (q // columns))
            activations.append(_Activation(c, p, q, nbytes) if images else None)
        return cls(tuple(links), tuple(offsets), tuple(cut), tuple(activations), form, tuple(parts))

    @property
    def layers(self) -> list[NativeLayer]:
        """The layers in the order in which they run."""
        return [link.layer for link in self.links]

    @property
    def _inputs(self) -> int:
        """The number of inputs."""
        return len(self.activations) - len(self.links)

    def _parts_of(self, activation: int) -> Pair:
        return _parts_of(activation, self.links, self.parts, self._inputs)

    # ------------------------------------------------------------ time and memory

    @property
    def ticks(self) -> int:
        """The number of ticks that the chain takes."""
        return len(self.links) + 2

    def _read_until(self, activation: int) -> int:
        """The tick in which the last layer reads an activation."""
        return max((1 + i for i, link in enumerate(self.links) if activation in link.reads), default=0)

    def input_read_until(self, which: int) -> int:
        """The tick in which an input is read last. Where the batch is cut, the last piece may read it at any time."""
        in_order = len(self.pieces) == 1 and self.form is not Form.MODULES
        return self._read_until(which) if in_order else self.ticks - 1

    @property
    def output_written_from(self) -> int:
        """The tick in which the output is written first. Where the batch is cut, the first piece may do so at once."""
        return self.ticks - 2 if len(self.pieces) == 1 else 0

    @property
    def _slots(self) -> int:
        """How many pieces run at the same time, each in memory of its own."""
        return 1 + max(0, *(piece.slot for piece in self.pieces))

    def _activation_lifetimes(self, first: int) -> dict[int, Lifetime]:
        found, output = {}, len(self.activations) - 1
        for i, a in enumerate(self.activations):
            if a is not None:
                last = self.ticks - 1 if i == output else self._read_until(i)
                found[i] = Lifetime(a.nbytes, first + max(0, i - self._inputs + 1), first + last)
        for i, shapes in self._cut_anew.items():
            for name, shape in zip(_names_of_cut(i), shapes):
                found[name] = Lifetime(whole_lines(4 * math.prod(shape)), first + 1 + i, first + 1 + i)
        return found

    @cached_property
    def _cut_anew(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The layers that read an activation whose images lie in other parts than they want.

        Of each, the shapes of the two copies that it reads instead: channels last, and in its own parts.
        """
        found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for i, (link, parts) in enumerate(zip(self.links, self.parts)):
            if parts == self._parts_of(link.source):
                continue
            a, n = self.activations[link.source], self.pieces[0].count
            assert a is not None
            found[i] = (n, a.h, a.w, a.channels), images_innermost(n, a.h, a.w, a.channels, link.layer.isa, parts)
        return found

    def lifetimes(self, first: int) -> dict[int, Lifetime]:
        """What the chain needs of the workspace if it starts in the tick ``first``, each under a name of its own.

        Threads of different slots are at different layers at the same time. So each slot has its own memory, and all of
        it is needed for as long as the chain runs.
        """
        if self._slots == 1:
            return self._activation_lifetimes(first)
        return {0: Lifetime(self._slots * self._slot_memory.nbytes, first, first + self.ticks - 1)}

    @cached_property
    def _slot_memory(self) -> Placement:
        """Where the activations lie in the memory of a slot."""
        return place(self._activation_lifetimes(0))

    # ------------------------------------------------------------ weights

    def weights(self) -> list[Tensor]:
        """Every tensor that kernels read but biases, in the order in which they are read."""
        return [t for layer, offsets in zip(self.layers, self.offsets) for t in (*layer.packed, *offsets.values())]

    def with_weights(self, tensors: Iterable[Tensor]) -> Chain:
        """The same chain with its `weights` replaced by copies, given in the same order."""
        copies = iter(tensors)
        links, offsets = [], []
        for link, own in zip(self.links, self.offsets):
            packed = StripPack(*islice(copies, len(link.layer.packed)))
            links.append(link._replace(layer=replace(link.layer, packed=packed)))
            offsets.append(dict(zip(own, copies)))
        return replace(self, links=tuple(links), offsets=tuple(offsets))

    # ------------------------------------------------------------ kernels

    def steps(self, inputs: Sequence[Tensor], y: Tensor, memory: Mapping[int, Tensor]) -> list[Step]:
        """The steps from the inputs to y, piece by piece.

        Args:
            inputs: images channels_last, or rows ``(n, channels)``.
            y: the output, likewise.
            memory: the bytes of each of the `lifetimes`, by name.
        """
        found: list[Step] = []
        for piece in self.pieces:
            *sources, target = (t[piece.start : piece.start + piece.count] for t in (*inputs, y))
            values = self._activation_tensors(piece, memory)
            output = len(self.activations) - 1
            own = []
            if piece.lanes > 1:
                own += [layout_step(x, values[i], piece.count, self._parts_of(i)) for i, x in enumerate(sources)]
            else:
                values |= {**dict(enumerate(sources)), output: target}
            for i, (layer, source, residual) in enumerate(self.links):
                x, y_own = values[source], values[self._inputs + i]
                if i in self._cut_anew:
                    near, cut = (
                        _tensor(memory[name], shape) for name, shape in zip(_names_of_cut(i), self._cut_anew[i])
                    )
                    near = near.permute(0, 3, 1, 2)
                    own.append(layout_step(x, near, piece.count, self._parts_of(source)))
                    own.append(layout_step(near, cut, piece.count, self.parts[i]))
                    x = cut
                added = None if residual is None else values[residual]
                offsets = self.offsets[i][piece.lanes]
                own.append(layer.conv.step(x, y_own, layer.bias, piece.count, offsets, added, self.parts[i]))
            if piece.lanes > 1:
                own.append(layout_step(values[output], target, piece.count, self._parts_of(output)))
            found += [step._replace(slot=piece.slot) for step in own]
        return found

    def _activation_tensors(self, piece: Piece, memory: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The activations of a piece that the chain has memory for, by their index."""
        if self._slots > 1:
            ranges, slot_bytes = self._slot_memory
            part = memory[0][max(piece.slot, 0) * slot_bytes :]
            memory = {i: part[r] for i, r in ranges.items()}
        used = range(len(self.activations))
        if piece.lanes == 1:
            used = range(self._inputs, len(self.activations) - 1)
        return {i: self._as_tensor(i, piece, memory[i]) for i in used}

    def _as_tensor(self, index: int, piece: Piece, memory: Tensor) -> Tensor:
        a = self.activations[index]
        assert a is not None
        if piece.lanes > 1:
            isa, parts = self.layers[0].isa, self._parts_of(index)
            return _tensor(memory, images_innermost(piece.count, a.h, a.w, a.channels, isa, parts))
        return _tensor(memory, (piece.count, a.h, a.w, a.channels)).permute(0, 3, 1, 2)


def _tensor(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """The first of some bytes as a contiguous float32 tensor."""
    return memory.view(torch.float32)[: math.prod(shape)].view(shape)


def _names_of_cut(layer: int) -> tuple[int, int]:
    """The names under which a chain keeps the two copies of what a layer reads; activations have those from 0 on."""
    return -1 - 2 * layer, -2 - 2 * layer


def forms(links: Sequence[Link], n: int, inputs: Sequence[tuple[int, int, int]]) -> list[Form]:
    """The forms that a chain may take for n images, the one first that is taken unless another is measured faster."""
    sizes = activation_sizes(links, inputs)
    if any(link.layer.conv.narrow for link in links):
        cut = _takes_parts(links, _parts(links, n, sizes), len(inputs))
        return [*([Form.PARTS] if cut else []), Form.VECTORS, Form.MODULES]
    if _is_faster_innermost(links, n, sizes):
        return [Form.VECTORS, Form.WHOLE, Form.MODULES]
    if n < max(2, torch.get_num_threads()):
        return [Form.WHOLE, Form.MODULES]
    found = [Form.WHOLE, Form.IMAGES, Form.MODULES]
    if n * _bytes_around_a_layer(links, sizes) > _BYTES_IN_CACHE:
        found[:2] = found[1::-1]
    return found


def activation_sizes(links: Sequence[Link], inputs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Channels, height and width of the activations of a chain with these inputs."""
    sizes = list(inputs)
    for link in links:
        sizes.append((link.layer.conv.c_out, *link.layer.output_size(*sizes[link.source][1:])))
    return sizes


def _parts(links: Sequence[Link], n: int, sizes: Sequence[tuple[int, int, int]]) -> list[Pair]:
    """For each layer, how n images are cut into parts."""
    return [link.layer.conv.parts(n, *sizes[link.source][1:]) for link in links]


def _parts_of(activation: int, links: Sequence[Link], parts: Sequence[Pair], inputs: int) -> Pair:
    """The parts that an activation lies in: those of the layer that writes it, or of an input's first reader."""
    if activation >= inputs:
        return parts[activation - inputs]
    return next((own for own, link in zip(parts, links) if activation == link.source), WHOLE)


def _takes_parts(links: Sequence[Link], parts: Sequence[Pair], inputs: int) -> bool:
    """Whether parts of images are of use, and residuals lie in those of the sums that they are added to."""
    added = [(own, link.residual) for own, link in zip(parts, links) if link.residual is not None]
    fits = all(own == _parts_of(residual, links, parts, inputs) for own, residual in added)
    return fits and any(own != WHOLE for own in parts)


def _bytes_around_a_layer(links: Sequence[Link], sizes: Sequence[tuple[int, int, int]]) -> int:
    """The most bytes of one image that a layer reads and writes."""
    first = len(sizes) - len(links)
    return max(4 * sum(math.prod(sizes[a]) for a in (*link.reads, first + i)) for i, link in enumerate(links))


def _is_faster_innermost(links: Sequence[Link], n: int, sizes: Sequence[tuple[int, int, int]]) -> bool:
    """Whether images innermost save more than the copies at both ends cost.

    Args:
        sizes: channels, heights and widths of the chain's activations.
    """
    lanes = LANES[links[0].layer.isa]
    inputs = len(sizes) - len(links)
    copied = sum(c * h * w for c, h, w in (*sizes[:inputs], sizes[-1]))
    if n < FULL_ENOUGH * lanes or _macs(links, sizes) < _MACS_PER_COPY * copied:
        return False
    return all(layer.conv.takes_images_innermost(*sizes[source][1:]) for layer, source, _ in links)


def _macs(links: Sequence[Link], sizes: Sequence[tuple[int, int, int]]) -> int:
    """Multiply-adds of one image, those at the border counted whole."""
    outputs = [layer.conv.output_size(*sizes[source][1:]) for layer, source, _ in links]
    return sum(link.layer.conv.macs * p * q for link, (p, q) in zip(links, outputs))
