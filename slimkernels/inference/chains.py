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

from slimkernels.inference.memory import Buffer, rounded
from slimkernels.inference.native_layers import NativeLayer
from slimkernels.kernels.native import LANES, Step, images_innermost, layout_step

# Share of a vector's images that must be there: below it, half-empty vectors cost more than the other layout.
_FULL_ENOUGH = 0.75
# Multiply-adds per copied element below which the two copies cost more than the layout saves.
_MACS_PER_COPY = 150


class Piece(NamedTuple):
    """Images ``start .. start + count`` of a batch and their layout: ``lanes`` innermost, or 1 for channels last."""

    start: int
    count: int
    lanes: int


def pieces(n: int, lanes: int, vectors: int = 1) -> list[Piece]:
    """A batch in pieces: whole vectors of images, then the rest, padded where it nearly fills one.

    Args:
        n: images. lanes: images of a vector, 1 to keep the batch whole and channels last.
        vectors: of images in one piece.
    """
    if lanes == 1:
        return [Piece(0, n, 1)]
    rest = n % lanes
    full = n if rest >= _FULL_ENOUGH * lanes else n - rest
    cut = [Piece(i, min(vectors * lanes, full - i), lanes) for i in range(0, full, vectors * lanes)]
    return cut if full == n else [*cut, Piece(full, n - full, 1)]


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
        self.layers, self.n, self.h, self.w = list(layers), n, h, w
        sizes = [(h, w)]
        for layer in self.layers:
            sizes.append(layer.output_size(*sizes[-1]))
        self._sizes = sizes
        lanes = LANES[self.layers[0].isa] if self._is_faster_innermost() else 1
        vectors = -(-torch.get_num_threads() // 2)  # so that every thread finds work in the smallest layers
        self.pieces = pieces(n, lanes, vectors)
        for layer, (_, width) in zip(self.layers, sizes):
            for _, _, used in self.pieces:
                layer.want_offsets(width, used)
        # Place i is written at times[i] and read at times[i + 1].
        step = (end - begin) / (len(self.layers) + 1)
        times = [begin + step * i for i in range(len(self.layers) + 2)]
        whole = len(self.pieces) == 1
        self.input_last, self.output_born = (times[1], times[-2]) if whole else (end, begin)
        innermost = any(piece.lanes > 1 for piece in self.pieces)
        channels = [self.layers[0].conv.c_in, *(layer.conv.c_out for layer in self.layers)]
        self._places: list[_Place | None] = []
        for i, (c, (p, q)) in enumerate(zip(channels, sizes)):
            at_an_end = i in (0, len(self.layers))
            if at_an_end and not innermost:
                self._places.append(None)
                continue
            # At the ends a piece lies here only images innermost.
            used = [piece for piece in self.pieces if piece.lanes > 1 or not at_an_end]
            images = max(-(-piece.count // piece.lanes) * piece.lanes for piece in used)
            last = end if i == len(self.layers) else times[i + 1]
            self._places.append(_Place(c, p, q, Buffer(rounded(4 * images * c * p * q), times[i], last)))
        self.buffers = [place.buffer for place in self._places if place is not None]

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
            inner = [place and self._tensor(place, piece, workspace) for place in self._places]
            if piece.lanes > 1:
                assert inner[0] is not None
                found.append(layout_step(source, inner[0], piece.count))
            else:
                inner[0], inner[-1] = source, target
            for layer, (_, width), a, b in zip(self.layers, self._sizes, inner, inner[1:]):
                assert a is not None and b is not None
                offsets = layer.tensors[layer.offsets[width, piece.lanes]]
                found.append(layer.conv.step(a, b, layer.bias, piece.count, offsets))
            if piece.lanes > 1:
                assert inner[-1] is not None
                found.append(layout_step(inner[-1], target, piece.count))
        return found

    def _tensor(self, place: _Place, piece: Piece, workspace: Tensor) -> Tensor:
        memory = workspace[place.buffer.offset : place.buffer.offset + place.buffer.nbytes].view(torch.float32)
        if piece.lanes > 1:
            shape = images_innermost(piece.count, place.h, place.w, place.channels, self.layers[0].isa)
            return memory[: torch.Size(shape).numel()].view(shape)
        count = piece.count * place.channels * place.h * place.w
        # At the ends of the chain the buffer may be too small for it; the caller puts input and output there.
        if count > memory.numel():
            return memory
        return memory[:count].view(piece.count, place.h, place.w, place.channels).permute(0, 3, 1, 2)
