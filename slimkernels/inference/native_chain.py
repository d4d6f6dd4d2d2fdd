"""A chain of native layers, each read by the next alone: run piece by piece of the batch, in the layout that is faster.

Images innermost, a vector of the CPU holds one channel of 8 or 16 images: the kernels then reach about 85% of the
multiply-add peak on an AVX-512 machine, where channels last they reach 55 to 60%, and a piece's activations stay in the
caches. It takes a vector full of images, and two copies at the ends of the chain.
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
from slimkernels.kernels.cpu.conv2d import Step, images_innermost, layout_step
from slimkernels.kernels.problems import LANES

# Share of a vector's images that must be there: below it, half-empty vectors cost more than the other layout.
_FULL_ENOUGH = 0.75
# Multiply-adds per copied element below which the two copies cost more than the layout saves.
_MACS_PER_COPY = 150


class Piece(NamedTuple):
    """Images ``start .. start + count`` of a batch, and how they run.

    ``lanes`` images lie innermost, 1: channels last. Pieces of different slots from 0 on run at the same time, each on
    one thread; one of slot -1 has all threads.
    """

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a piece for
    lanes: int
    slot: int


def pieces(n: int, lanes: int, threads: int, full_enough: float = _FULL_ENOUGH) -> list[Piece]:
    """A batch in pieces: a vector of images for every thread as long as there are enough, then the rest.

    What runs on one thread needs no barriers, and no data leaves its core. The last images fill a vector nearly, or run
    channels last.

    Args:
        n: images. lanes: images of a vector, 1 to keep the batch whole and channels last.
        full_enough: share of a vector that the last images must fill to become one, 0 where they have to.
    """
    if lanes == 1:
        return [Piece(0, n, 1, -1)]
    rest = n % lanes
    vectors = n // lanes + (rest > 0 and rest >= full_enough * lanes)
    alone = vectors // threads * threads if threads > 1 else 0
    cut = [Piece(i * lanes, min(lanes, n - i * lanes), lanes, i % threads) for i in range(alone)]
    # Several vectors a piece give many threads enough to do in the smallest layers.
    step = -(-threads // 2)
    for i in range(alone, vectors, step):
        cut.append(Piece(i * lanes, min(step * lanes, vectors * lanes - i * lanes, n - i * lanes), lanes, -1))
    done = min(vectors * lanes, n)
    return cut if done == n else [*cut, Piece(done, n - done, 1, -1)]


@dataclass(frozen=True)
class _Activation:
    """What lies between two layers of a chain, or at one of its ends with images innermost: its sizes for one image.

    Attributes:
        nbytes: for the largest piece.
    """

    channels: int
    h: int
    w: int
    nbytes: int


@dataclass(frozen=True)
class Chain:
    """Native layers of one instruction set in a row (`Chain.of` makes one).

    A chain of so many layers takes two ticks more: in the first its input may be copied to images innermost, in the
    last its output is copied back. Activation i is written in the chain's tick i and read in the one behind.

    Attributes:
        layers: in the order in which they run.
        offsets: of every layer, the entry offsets that its kernel reads, by the images innermost (1: channels last).
        pieces: how the batch is cut.
        activations: behind the first tick, every layer's, one more than layers; None at an end that needs no memory
            since the chain's input or output is used as it lies.
    """

    layers: tuple[NativeLayer, ...]
    offsets: tuple[dict[int, Tensor], ...]
    pieces: tuple[Piece, ...]
    activations: tuple[_Activation | None, ...]

    @classmethod
    def of(cls, layers: Sequence[NativeLayer], n: int, h: int, w: int) -> Chain:
        """The chain for n images of a height and width (1 x 1 for rows), on torch's present number of threads."""
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
            inner = 0 < i < len(layers)  # ends that lie channels last are the chain's input and output themselves
            images = [-(-piece.count // piece.lanes) * piece.lanes for piece in cut if inner or piece.lanes > 1]
            nbytes = whole_lines(4 * max(images, default=0) * c * p * q)
            activations.append(_Activation(c, p, q, nbytes) if images else None)
        return cls(tuple(layers), tuple(offsets), tuple(cut), tuple(activations))

    # ------------------------------------------------------------ time and memory

    @property
    def ticks(self) -> int:
        """How many ticks the chain takes."""
        return len(self.layers) + 2

    @property
    def input_read_until(self) -> int:
        """The chain's tick in which its input is read for the last time: by the last piece, where there are several."""
        return 1 if len(self.pieces) == 1 else self.ticks - 1

    @property
    def output_written_from(self) -> int:
        """The chain's tick in which its output is written first: by the first piece, where there are several."""
        return self.ticks - 2 if len(self.pieces) == 1 else 0

    @property
    def _slots(self) -> int:
        """Parts of the batch that run at the same time, each in its own memory."""
        return 1 + max(0, *(piece.slot for piece in self.pieces))

    def _activation_lifetimes(self, first: int) -> dict[int, Lifetime]:
        return {
            i: Lifetime(a.nbytes, first + i, first + i + 1) for i, a in enumerate(self.activations) if a is not None
        }

    def lifetimes(self, first: int) -> dict[int, Lifetime]:
        """What the chain needs of the workspace if it starts in the tick ``first``; any names.

        Slots are at different layers at the same time, so that nothing is known of when each needs what: all of them
        have their own memory for as long as the chain runs.
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
        """Every tensor that a kernel reads but for biases, in the order in which layers run."""
        return [t for layer, offsets in zip(self.layers, self.offsets) for t in (*layer.packed, *offsets.values())]

    def with_weights(self, tensors: Iterable[Tensor]) -> Chain:
        """The same chain on copies of its `weights`, in the same order."""
        copies = iter(tensors)
        moved = [
            (replace(layer, packed=tuple(islice(copies, len(layer.packed)))), dict(zip(offsets, copies)))
            for layer, offsets in zip(self.layers, self.offsets)
        ]
        return replace(self, layers=tuple(layer for layer, _ in moved), offsets=tuple(found for _, found in moved))

    # ------------------------------------------------------------ kernels

    def steps(self, x: Tensor, y: Tensor, memory: Mapping[int, Tensor]) -> list[Step]:
        """The steps from x to y, piece by piece.

        Args:
            x, y: images channels_last, or rows ``(n, channels)``.
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
            shape = images_innermost(piece.count, a.h, a.w, a.channels, self.layers[0].isa)
            return memory[: math.prod(shape)].view(shape)
        shape = (piece.count, a.h, a.w, a.channels)
        return memory[: math.prod(shape)].view(shape).permute(0, 3, 1, 2)


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
