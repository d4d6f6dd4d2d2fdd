"""A chain of native layers, each read by the next alone: run piece by piece of the batch, in the layout that is faster.

Images innermost, a vector of the CPU holds one channel of 8 or 16 images: the kernels then reach about 85% of the
multiply-add peak on an AVX-512 machine, where channels last they reach 55 to 60%, and a piece's activations stay in the
caches. It takes a vector full of images, and two copies at the ends of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.inference.memory import Buffer, place, rounded
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


@dataclass
class _Place:
    """Where the output of a layer lies, or the chain's input images innermost: channels and size, and the buffer."""

    channels: int
    h: int
    w: int
    buffer: Buffer


class Chain:
    """Native layers of one instruction set in a row.

    Args:
        layers: in the order in which they run.
        n, h, w: images of the chain's input, and their size (1 x 1 for rows).
        begin, end: the times between which the chain runs.

    Attributes:
        input_last, output_born: the times until and from which the chain's input and output are needed.
        buffers: what the chain needs of the workspace.
    """

    def __init__(self, layers: Sequence[NativeLayer], n: int, h: int, w: int, begin: float, end: float) -> None:
        self.layers, self.n, self._sizes = list(layers), n, [(h, w)]
        for layer in self.layers:
            self._sizes.append(layer.output_size(*self._sizes[-1]))
        narrow = any(layer.conv.narrow for layer in self.layers)
        lanes = LANES[self.layers[0].isa] if narrow or self._is_faster_innermost() else 1
        self.pieces = pieces(n, lanes, torch.get_num_threads(), 0.0 if narrow else _FULL_ENOUGH)
        for layer, (_, width) in zip(self.layers, self._sizes):
            for used in {piece.lanes for piece in self.pieces}:
                layer.want_offsets(width, used)
        self._lay_out(begin, end)

    def _lay_out(self, begin: float, end: float) -> None:
        # Place i is written at times[i] and read at times[i + 1].
        step = (end - begin) / (len(self.layers) + 1)
        times = [begin + step * i for i in range(len(self.layers) + 2)]
        slots = 1 + max(piece.slot for piece in self.pieces)
        whole = len(self.pieces) == 1
        self.input_last, self.output_born = (times[1], times[-2]) if whole else (end, begin)
        channels = [self.layers[0].conv.c_in, *(layer.conv.c_out for layer in self.layers)]
        self._places: list[_Place | None] = []
        for i, (c, (p, q)) in enumerate(zip(channels, self._sizes)):
            # At the ends of the chain only what lies images innermost has a place here.
            inner = 0 < i < len(self.layers)
            images = [-(-piece.count // piece.lanes) * piece.lanes for piece in self.pieces if inner or piece.lanes > 1]
            buffer = Buffer(rounded(4 * max(images, default=0) * c * p * q), times[i], times[i + 1])
            self._places.append(_Place(c, p, q, buffer) if images else None)
        self.buffers = [p.buffer for p in self._places if p is not None]
        self._slot_bytes = 0
        self._arena: Buffer | None = None
        if slots > 1:  # which are at different layers at the same time
            self._slot_bytes = place(self.buffers)
            self._arena = Buffer(slots * self._slot_bytes, begin, end)
            self.buffers = [self._arena]

    @property
    def macs(self) -> int:
        """Multiply-adds of one image, those at the border counted whole."""
        sizes = [layer.conv.output_size(*size) for layer, size in zip(self.layers, self._sizes)]
        return sum(layer.conv.macs * p * q for layer, (p, q) in zip(self.layers, sizes))

    def _is_faster_innermost(self) -> bool:
        lanes = LANES[self.layers[0].isa]
        (h, w), (p, q) = self._sizes[0], self._sizes[-1]
        copied = self.layers[0].conv.c_in * h * w + self.layers[-1].conv.c_out * p * q
        if self.n < _FULL_ENOUGH * lanes or self.macs < _MACS_PER_COPY * copied:
            return False
        return all(layer.conv.takes_images_innermost(*size) for layer, size in zip(self.layers, self._sizes))

    def steps(self, x: Tensor, y: Tensor, workspace: Tensor) -> list[Step]:
        """The steps from x to y: images channels_last, or rows ``(n, channels)``; the buffers lie in the workspace."""
        found: list[Step] = []
        for piece in self.pieces:
            source, target = (t[piece.start : piece.start + piece.count] for t in (x, y))
            inner = [self._tensor(p, piece, workspace) for p in self._places[1:-1]]
            if piece.lanes > 1:
                inner = [self._tensor(self._places[0], piece, workspace), *inner]
                inner.append(self._tensor(self._places[-1], piece, workspace))
                own = [layout_step(source, inner[0], piece.count)]
            else:
                inner, own = [source, *inner, target], []
            for layer, (_, width), a, b in zip(self.layers, self._sizes, inner, inner[1:]):
                offsets = layer.tensors[layer.offsets[width, piece.lanes]]
                own.append(layer.conv.step(a, b, layer.bias, piece.count, offsets))
            if piece.lanes > 1:
                own.append(layout_step(inner[-1], target, piece.count))
            found += [step._replace(slot=piece.slot) for step in own]
        return found

    def _tensor(self, at: _Place | None, piece: Piece, workspace: Tensor) -> Tensor:
        assert at is not None
        start = at.buffer.offset
        if self._arena is not None:
            start += self._arena.offset + max(piece.slot, 0) * self._slot_bytes
        memory = workspace[start : start + at.buffer.nbytes].view(torch.float32)
        if piece.lanes > 1:
            shape = images_innermost(piece.count, at.h, at.w, at.channels, self.layers[0].isa)
            return memory[: torch.Size(shape).numel()].view(shape)
        count = piece.count * at.channels * at.h * at.w
        return memory[:count].view(piece.count, at.h, at.w, at.channels).permute(0, 3, 1, 2)
