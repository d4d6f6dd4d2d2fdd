"""A chain of native layers, each read by the next alone: run piece by piece of the batch, in the layout that is faster.

With images innermost, a vector of the CPU holds one channel of 8 or 16 images. On an AVX-512 machine the kernels then
reach about 85% of the multiply-add peak, against 55 to 60% with channels last, and a piece's activations stay in the
caches. This needs a vector full of images, and two copies at the ends of the chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.inference.memory import Lifetime, Placement, place, whole_lines
from slimkernels.inference.native_layers import NativeLayer
from slimkernels.kernels.cpu.steps import Step, images_innermost, layout_step
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import LANES

# Share of a vector's images that must be there: below it, half-empty vectors cost more than the other layout.
_FULL_ENOUGH = 0.75
# Multiply-adds per copied element below which the two copies cost more than the layout saves.
_MACS_PER_COPY = 150


class Piece(NamedTuple):
    """The images from ``start`` to ``start + count`` of a batch, and how they run.

    Attributes:
        lanes: the number of images that lie innermost; 1 means channels last.
        slot: pieces with different slots from 0 on run at the same time, each on one thread. A piece with slot -1 runs
            on all threads.
    """

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a piece for
    lanes: int
    slot: int

    @property
    def padded_count(self) -> int:
        """Images that memory is needed for: the last vector of images may not be full."""
        return -(-self.count // self.lanes) * self.lanes


def pieces(n: int, lanes: int, threads: int, full_enough: float = _FULL_ENOUGH) -> list[Piece]:
    """A batch in pieces: a vector of images for every thread as long as there are enough, then the rest.

    A piece that runs on one thread needs no barriers, and its data stays on one core. If the last images do not nearly
    fill a vector, they run channels last.

    Args:
        n: the number of images.
        lanes: the number of images in a vector; 1 keeps the batch whole and channels last.
        threads: the number of threads.
        full_enough: the share of a vector that the last images must fill to become one; 0 if they always have to.
    """
    if lanes == 1:
        return [Piece(0, n, 1, -1)]
    rest = n % lanes
    vectors = n // lanes + (rest > 0 and rest >= full_enough * lanes)
    covered = min(vectors * lanes, n)  # images in vectors; the others run channels last
    one_thread_each = vectors // threads * threads if threads > 1 else 0
    cut = [Piece(i * lanes, min(lanes, n - i * lanes), lanes, i % threads) for i in range(one_thread_each)]
    # Several vectors a piece give many threads enough to do in the smallest layers.
    together = -(-threads // 2)
    for i in range(one_thread_each, vectors, together):
        cut.append(Piece(i * lanes, min(together * lanes, covered - i * lanes), lanes, -1))
    return cut if covered == n else [*cut, Piece(covered, n - covered, 1, -1)]


@dataclass(frozen=True)
class _Activation:
    """What one layer of a chain hands to the next: the sizes of one image, and the bytes of the largest piece."""

    channels: int
    h: int
    w: int
    nbytes: int


@dataclass(frozen=True)
class Chain:
    """Native layers of one instruction set in a row (`Chain.of` makes one).

    A chain counts its time in ticks, one for each kernel. Tick 0 copies the input to images innermost, ticks 1, 2, ...
    run the layers, and the last tick copies the output back. Where no copy is needed, its tick passes unused.
    Activation i is written in tick i and read in tick i + 1: activation 0 is the copied input, the last one the output
    before it is copied back.

    Attributes:
        layers: in the order in which they run.
        offsets: for every layer, the entry offsets that its kernel reads, by the number of images that lie innermost
            (1: channels last).
        pieces: how the batch is cut.
        activations: one more than layers. The first and the last are None where the chain reads its input and writes
            its output as they lie.
    """

    layers: tuple[NativeLayer, ...]
    offsets: tuple[dict[int, Tensor], ...]
    pieces: tuple[Piece, ...]
    activations: tuple[_Activation | None, ...]

    @classmethod
    def of(cls, layers: Sequence[NativeLayer], n: int, h: int, w: int) -> Chain:
        """The chain for n images of this height and width (rows are images of 1 x 1 pixel).

        It is cut for the number of threads that torch uses now, and can be run with another one.
        """
        sizes = [(h, w)]
        for layer in layers:
            sizes.append(layer.output_size(*sizes[-1]))
        narrow = any(layer.conv.narrow for layer in layers)
        lanes = LANES[layers[0].isa] if narrow or _is_faster_innermost(layers, n, sizes) else 1
        cut = pieces(n, lanes, torch.get_num_threads(), 0.0 if narrow else _FULL_ENOUGH)
        used = {piece.lanes for piece in cut}
        offsets = [{k: layer.conv.entry_offsets(width, k) for k in used} for layer, (_, width) in zip(layers, sizes)]
        channels = [layers[0].conv.c_in, *(layer.conv.c_out for layer in layers)]
        activations: list[_Activation | None] = []
        for i, (c, (p, q)) in enumerate(zip(channels, sizes)):
            # Pieces that lie channels last read the chain's input and write its output themselves.
            at_an_end = i in (0, len(layers))
            images = [piece.padded_count for piece in cut if piece.lanes > 1 or not at_an_end]
            nbytes = whole_lines(4 * max(images, default=0) * c * p * q)
            activations.append(_Activation(c, p, q, nbytes) if images else None)
        return cls(tuple(layers), tuple(offsets), tuple(cut), tuple(activations))

    # ------------------------------------------------------------ time and memory

    @property
    def ticks(self) -> int:
        """The number of ticks that the chain takes."""
        return len(self.layers) + 2

    @property
    def input_read_until(self) -> int:
        """The tick in which the input is read last. Where the batch is cut, the last piece may read it at any time."""
        return 1 if len(self.pieces) == 1 else self.ticks - 1

    @property
    def output_written_from(self) -> int:
        """The tick in which the output is written first. Where the batch is cut, the first piece may do so at once."""
        return self.ticks - 2 if len(self.pieces) == 1 else 0

    @property
    def _slots(self) -> int:
        """How many pieces run at the same time, each in memory of its own."""
        return 1 + max(0, *(piece.slot for piece in self.pieces))

    def _activation_lifetimes(self, first: int) -> dict[int, Lifetime]:
        return {
            i: Lifetime(a.nbytes, first + i, first + i + 1) for i, a in enumerate(self.activations) if a is not None
        }

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
        moved = [
            (replace(layer, packed=StripPack(*islice(copies, len(layer.packed)))), dict(zip(offsets, copies)))
            for layer, offsets in zip(self.layers, self.offsets)
        ]
        return replace(self, layers=tuple(layer for layer, _ in moved), offsets=tuple(found for _, found in moved))

    # ------------------------------------------------------------ kernels

    def steps(self, x: Tensor, y: Tensor, memory: Mapping[int, Tensor]) -> list[Step]:
        """The steps from x to y, piece by piece.

        Args:
            x: the input: images channels_last, or rows ``(n, channels)``.
            y: the output, likewise.
            memory: the bytes of each of the `lifetimes`, by name.
        """
        found: list[Step] = []
        for piece in self.pieces:
            source, target = (t[piece.start : piece.start + piece.count] for t in (x, y))
            values = self._activation_tensors(piece, memory)
            own = []
            if piece.lanes > 1:
                own.append(layout_step(source, values[0], piece.count))
            else:
                values |= {0: source, len(self.layers): target}
            for i, layer in enumerate(self.layers):
                offsets = self.offsets[i][piece.lanes]
                own.append(layer.conv.step(values[i], values[i + 1], layer.bias, piece.count, offsets))
            if piece.lanes > 1:
                own.append(layout_step(values[len(self.layers)], target, piece.count))
            found += [step._replace(slot=piece.slot) for step in own]
        return found

    def _activation_tensors(self, piece: Piece, memory: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The activations of a piece that the chain has memory for, by their index."""
        if self._slots > 1:
            ranges, slot_bytes = self._slot_memory
            part = memory[0][max(piece.slot, 0) * slot_bytes :]
            memory = {i: part[r] for i, r in ranges.items()}
        used = range(len(self.layers) + 1) if piece.lanes > 1 else range(1, len(self.layers))
        return {i: self._as_tensor(i, piece, memory[i]) for i in used}

    def _as_tensor(self, index: int, piece: Piece, memory: Tensor) -> Tensor:
        a, memory = self.activations[index], memory.view(torch.float32)
        assert a is not None
        if piece.lanes > 1:
            innermost = images_innermost(piece.count, a.h, a.w, a.channels, self.layers[0].isa)
            return memory[: math.prod(innermost)].view(innermost)
        channels_last = (piece.count, a.h, a.w, a.channels)
        return memory[: math.prod(channels_last)].view(channels_last).permute(0, 3, 1, 2)


def _is_faster_innermost(layers: Sequence[NativeLayer], n: int, sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether images innermost save more than the copies at both ends cost.

    Args:
        sizes: heights and widths of the chain's input and of what every layer writes.
    """
    lanes = LANES[layers[0].isa]
    (h, w), (p, q) = sizes[0], sizes[-1]
    copied = layers[0].conv.c_in * h * w + layers[-1].conv.c_out * p * q
    if n < _FULL_ENOUGH * lanes or _macs(layers, sizes) < _MACS_PER_COPY * copied:
        return False
    return all(layer.conv.takes_images_innermost(*size) for layer, size in zip(layers, sizes))


def _macs(layers: Sequence[NativeLayer], sizes: Sequence[tuple[int, int]]) -> int:
    """Multiply-adds of one image, those at the border counted whole."""
    outputs = [layer.conv.output_size(*size) for layer, size in zip(layers, sizes)]
    return sum(layer.conv.macs * p * q for layer, (p, q) in zip(layers, outputs))
