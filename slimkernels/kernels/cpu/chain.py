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
from slimkernels.kernels.cpu.layouts import CHANNELS_LAST, IN_PAIRS, Layout
from slimkernels.kernels.cpu.memory import Lifetime, Placement, place
from slimkernels.kernels.cpu.pairs import IMAGES, PairPack, bf16_allowed, engine, is_measured_faster, to_pairs_step
from slimkernels.kernels.cpu.pieces import FULL_ENOUGH, Piece, image_by_image, pieces
from slimkernels.kernels.cpu.pooling import Pooling
from slimkernels.kernels.cpu.steps import Step, layout_step
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import LANES

# With AVX2, of the multiply-adds of dense layers the share from which channels last are faster than images innermost.
# VGG-19 in 16x1 blocks, 64 images, two Zen 3 cores, first quartiles in ms with images innermost and channels last: 49.1
# and 41.5 at 87.5% zeros (12.9% stored), 44.5 and 39.3 at 90% (10.4%), 42.3 and 40.8 at 92% (8.4%), 29.0 and 31.3 at
# 93.5% (6.9%). Where a strip has fewer entries, what begins and ends each tile of 6 pixels weighs more.
_STORED_SHARE_WHOLE = 0.08
# Multiply-adds per copied element below which the two copies cost more than the layout saves.
_MACS_PER_COPY = 150
# Bytes of a batch's activations around one layer above which they come from memory layer after layer, so that a chain
# rather takes image by image. A third-level cache of 16 MB holds less beside the weights.
_BYTES_IN_CACHE = 12 << 20


class Form(Enum):
    """How a chain runs its layers.

    Attributes:
        BF16: piece by piece in pairs of channels, with numbers of bf16 and sums in float32.
        VECTORS: piece by piece with a vector of images innermost.
        PARTS: layer by layer with the parts of few images innermost, as many of them as fill one vector.
        WHOLE: the whole batch layer by layer, channels last.
        IMAGES: image by image through all layers, channels last.
        MODULES: as the modules do: a native call for each layer, into new memory.
    """

    BF16 = "bf16"
    VECTORS = "vectors of images"
    PARTS = "parts of images"
    WHOLE = "whole batch"
    IMAGES = "image by image"
    MODULES = "module by module"


class Link(NamedTuple):
    """A layer of a chain, and which of the chain's activations it takes.

    Attributes:
        layer: what runs: a convolution or a pooling.
        source: the activation that it reads.
        residual: the activation that is added to its sums, in front of the ReLU; None for none.
    """

    layer: NativeLayer | Pooling
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
        activations: the bytes of the largest piece of each; None for inputs that are read, and an output that is
            written, as they lie.
        form: how the layers run.
        layouts: for every layer, how images lie for it in pieces that have images innermost. Of cut images a layer that
            does not take parts has channels last, where it can, instead of a vector that one image does not fill.
        sizes: channels, height and width of the activations.
    """

    links: tuple[Link, ...]
    offsets: tuple[dict[int, Tensor], ...]
    pieces: tuple[Piece, ...]
    activations: tuple[int | None, ...]
    form: Form
    layouts: tuple[Layout, ...]
    sizes: tuple[tuple[int, int, int], ...]

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
        threads, isa = torch.get_num_threads(), links[0].layer.isa
        layouts = [CHANNELS_LAST] * len(links)
        if form is Form.PARTS:
            cut, layouts = [Piece(0, n, LANES[isa], -1)], _layouts_of_parts(links, n, sizes)
        elif form is Form.IMAGES:
            cut = image_by_image(n, threads)
        elif form is Form.BF16:
            cut, layouts = pieces(n, IMAGES, threads, 0.0), [IN_PAIRS] * len(links)
        elif form is Form.VECTORS:
            full_enough = 0.0 if any(link.layer.conv.narrow for link in links) else FULL_ENOUGH
            cut, layouts = pieces(n, LANES[isa], threads, full_enough), [Layout(LANES[isa], WHOLE)] * len(links)
        else:
            cut = pieces(n, 1, threads)
        offsets: list[dict[int, Tensor]] = []
        for (layer, source, _), own in zip(links, layouts):
            used = {own.lanes if piece.lanes > 1 else 1 for piece in cut}
            if form in (Form.MODULES, Form.BF16):
                used = set()
            offsets.append(layer.offsets(*sizes[source][1:], used, own.parts))
        activations: list[int | None] = []
        for i, size in enumerate(sizes):
            # What lies channels last is read from the chain's inputs and written to its output directly.
            at_an_end, layout = i < len(inputs) or i == len(sizes) - 1, _layout_of(i, links, layouts, len(inputs))
            numbers = [0]
            for piece in cut if form is not Form.MODULES else []:
                own = layout if piece.lanes > 1 else CHANNELS_LAST
                if own.lanes > 1 or not at_an_end:
                    numbers.append(own.nbytes(piece.count, *size))
            activations.append(max(numbers) or None)
        return cls(tuple(links), tuple(offsets), tuple(cut), tuple(activations), form, tuple(layouts), tuple(sizes))

    @property
    def layers(self) -> list[NativeLayer | Pooling]:
        """The layers in the order in which they run."""
        return [link.layer for link in self.links]

    @property
    def _inputs(self) -> int:
        """The number of inputs."""
        return len(self.activations) - len(self.links)

    def _layout_of(self, activation: int, piece: Piece) -> Layout:
        """How an activation lies in a piece."""
        return CHANNELS_LAST if piece.lanes == 1 else _layout_of(activation, self.links, self.layouts, self._inputs)

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
        for i, nbytes in enumerate(self.activations):
            if nbytes is not None:
                last = self.ticks - 1 if i == output else self._read_until(i)
                found[i] = Lifetime(nbytes, first + max(0, i - self._inputs + 1), first + last)
        for i, copies in self._copied.items():
            for name, layout in zip(_names_of_copies(i), copies):
                nbytes = layout.nbytes(self.pieces[0].count, *self.sizes[self.links[i].source])
                found[name] = Lifetime(nbytes, first + 1 + i, first + 1 + i)
        return found

    @cached_property
    def _copied(self) -> dict[int, list[Layout]]:
        """The layers that read an activation which lies in another way than they want, and how its copies lie.

        From parts to other parts there are two of them, the first one channels last.
        """
        found: dict[int, list[Layout]] = {}
        for i, (link, wanted) in enumerate(zip(self.links, self.layouts)):
            layout = self._layout_of(link.source, self.pieces[0])
            if self.pieces[0].lanes > 1 and layout != wanted:
                found[i] = [other for other in dict.fromkeys((CHANNELS_LAST, wanted)) if other != layout]
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
        """Every tensor that kernels read beside the activations, in the order in which they are read."""
        found: list[Tensor] = []
        for layer, offsets in zip(self.layers, self.offsets):
            bias = () if layer.bias is None else (layer.bias,)
            found += [*self._pack_of(layer), *bias, *offsets.values()]
        return found

    def _pack_of(self, layer: NativeLayer | Pooling) -> Sequence[Tensor]:
        """The pack of a layer that this form reads."""
        if self.form is Form.BF16:
            return layer.pairs.packed if isinstance(layer, NativeLayer) else ()
        return layer.packed

    def with_weights(self, tensors: Iterable[Tensor]) -> Chain:
        """The same chain with its `weights` replaced by copies, given in the same order."""
        copies = iter(tensors)
        links, offsets = [], []
        for link, own in zip(self.links, self.offsets):
            layer = link.layer
            if isinstance(layer, NativeLayer):
                pack = islice(copies, len(self._pack_of(layer)))
                if self.form is Form.BF16:
                    layer = replace(layer, pair_pack=PairPack(*pack))
                else:
                    layer = replace(layer, packed=StripPack(*pack))
                layer = replace(layer, bias=None if layer.bias is None else next(copies))
            links.append(link._replace(layer=layer))
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
            *sources, target = (_as_images(t[piece.start : piece.start + piece.count]) for t in (*inputs, y))
            memory_of_piece, values = self._memory_of(piece, memory), dict[int, Tensor]()
            own: list[Step] = []
            for i, layout in enumerate(self._layout_of(i, piece) for i in range(len(self.sizes))):
                at_an_end = sources[i] if i < len(sources) else target if i == len(self.sizes) - 1 else None
                if at_an_end is not None and layout.lanes == 1:
                    values[i] = at_an_end
                else:
                    values[i] = self._tensor(i, piece, layout, memory_of_piece[i])
                    if i < len(sources):
                        own.append(_to_innermost(sources[i], values[i], piece.count, layout))
            for i, (layer, source, residual) in enumerate(self.links):
                x, layout = values[source], self._layout_of(source, piece)
                for name, other in zip(_names_of_copies(i), self._copied.get(i, ())):
                    copy = self._tensor(source, piece, other, memory_of_piece[name])
                    own.append(layout_step(x, copy, piece.count, (other if other.lanes > 1 else layout).parts))
                    x, layout = copy, other
                added = None if residual is None else values[residual]
                y_own = values[self._inputs + i]
                own.append(layer.step(x, y_own, piece.count, self.offsets[i], added, layout.parts))
            output, layout = len(self.sizes) - 1, self._layout_of(len(self.sizes) - 1, piece)
            if layout.lanes > 1:
                own.append(layout_step(values[output], target, piece.count, layout.parts))
            found += [step._replace(slot=piece.slot) for step in own]
        return found

    def _memory_of(self, piece: Piece, memory: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The bytes of the activations and copies of a piece, by their names."""
        if self._slots == 1:
            return memory
        ranges, slot_bytes = self._slot_memory
        part = memory[0][max(piece.slot, 0) * slot_bytes :]
        return {name: part[where] for name, where in ranges.items()}

    def _tensor(self, activation: int, piece: Piece, layout: Layout, memory: Tensor) -> Tensor:
        """An activation of a piece, or a copy of it, in its memory."""
        return layout.tensor(memory, piece.count, *self.sizes[activation])


def _to_innermost(x: Tensor, y: Tensor, n: int, layout: Layout) -> Step:
    """The copy of an input into the layout of the chain."""
    if not layout.pairs:
        return layout_step(x, y, n, layout.parts)
    fastest = engine()
    assert fastest is not None
    return to_pairs_step(fastest, x, y, n)


def _as_images(x: Tensor) -> Tensor:
    """Images, or rows as images of one pixel, as which they lie inside of a chain."""
    return x if x.dim() == 4 else x[:, :, None, None]


def _names_of_copies(layer: int) -> tuple[int, int]:
    """The names under which a chain keeps the copies of what a layer reads; activations have those from 0 on."""
    return -1 - 2 * layer, -2 - 2 * layer


def forms(links: Sequence[Link], n: int, inputs: Sequence[tuple[int, int, int]]) -> list[Form]:
    """The forms that a chain may take for n images, the one first that is taken unless another is measured faster."""
    sizes = activation_sizes(links, inputs)
    found = _forms_in_float32(links, n, sizes, len(inputs))
    if not takes_bf16(links, n, sizes):
        return found
    return [Form.BF16, *found] if is_measured_faster() else [found[0], Form.BF16, *found[1:]]


def _forms_in_float32(links: Sequence[Link], n: int, sizes: Sequence[tuple[int, int, int]], inputs: int) -> list[Form]:
    if any(link.layer.conv.narrow for link in links):
        few = _takes_parts(links, _layouts_of_parts(links, n, sizes), inputs)
        return [*([Form.PARTS] if few else []), Form.VECTORS, Form.MODULES]
    if _is_faster_innermost(links, n, sizes):
        found = [Form.VECTORS, Form.WHOLE, Form.MODULES]
        if links[0].layer.isa == "avx2" and _stored_share(links, sizes) >= _STORED_SHARE_WHOLE:
            found[:2] = found[1::-1]
        return found
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


def _layouts_of_parts(links: Sequence[Link], n: int, sizes: Sequence[tuple[int, int, int]]) -> list[Layout]:
    """For each layer, how n images lie that are cut into parts where the layer takes parts."""
    found = []
    for link in links:
        conv = link.layer.conv
        parts = conv.parts(n, *sizes[link.source][1:])
        found.append(CHANNELS_LAST if parts == WHOLE and not conv.narrow else Layout(LANES[link.layer.isa], parts))
    return found


def _layout_of(activation: int, links: Sequence[Link], layouts: Sequence[Layout], inputs: int) -> Layout:
    """How an activation lies: as for the layer that writes it, or for an input's first reader.

    In pairs the last layer writes float32.
    """
    if activation == inputs + len(links) - 1 and layouts[-1].pairs:
        return Layout(layouts[-1].lanes, WHOLE)
    if activation >= inputs:
        return layouts[activation - inputs]
    return next(own for own, link in zip(layouts, links) if activation in link.reads)


def _takes_parts(links: Sequence[Link], layouts: Sequence[Layout], inputs: int) -> bool:
    """Whether parts of images are of use, and residuals lie as the sums that they are added to."""
    added = [(own, link.residual) for own, link in zip(layouts, links) if link.residual is not None]
    fits = all(own == _layout_of(residual, links, layouts, inputs) for own, residual in added)
    return fits and any(own.parts != WHOLE for own in layouts)


def _bytes_around_a_layer(links: Sequence[Link], sizes: Sequence[tuple[int, int, int]]) -> int:
    """The most bytes of one image that a layer reads and writes."""
    first = len(sizes) - len(links)
    return max(4 * sum(math.prod(sizes[a]) for a in (*link.reads, first + i)) for i, link in enumerate(links))


def takes_bf16(links: Sequence[Link], n: int, sizes: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a chain may run in bf16, and fills most of each vector of images.

    Args:
        sizes: channels, heights and widths of the chain's activations.
    """
    vectors, output = -(-n // IMAGES), len(sizes) - 1
    if engine() is None or n < FULL_ENOUGH * IMAGES * vectors or not bf16_allowed():
        return False
    if any(output in link.reads for link in links):
        return False
    return all(link.layer.takes_pairs(*sizes[link.source][1:]) for link in links)


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


def _stored_share(links: Sequence[Link], sizes: Sequence[tuple[int, int, int]]) -> float:
    """The multiply-adds of a chain's convolutions over those of dense ones."""
    stored = dense = 0
    for layer, source, _ in links:
        if isinstance(layer, NativeLayer):
            pixels = math.prod(layer.conv.output_size(*sizes[source][1:]))
            stored += layer.conv.macs * pixels
            dense += math.prod(layer.shape) * pixels
    return stored / max(dense, 1)


def _macs(links: Sequence[Link], sizes: Sequence[tuple[int, int, int]]) -> int:
    """Multiply-adds of one image, those at the border counted whole."""
    outputs = [layer.conv.output_size(*sizes[source][1:]) for layer, source, _ in links]
    return sum(link.layer.conv.macs * p * q for link, (p, q) in zip(links, outputs))
