"""How the activations of a chain lie in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.cpu.memory import whole_lines
from slimkernels.kernels.cpu.pairs import IMAGES, pairs_shape
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.problems import Pair


class Layout(NamedTuple):
    """How images lie.

    Attributes:
        lanes: how many images, or parts of images, lie innermost; 1 means channels last.
        parts: rows and columns of parts that each image is cut into.
        pairs: whether they lie in pairs of channels, as bf16.
    """

    lanes: int
    parts: Pair
    pairs: bool = False

    def shape(self, n: int, channels: int, h: int, w: int) -> tuple[int, ...]:
        """Of n images: ``(n, h, w, channels)``, or with a vector of them or of their parts innermost, or in pairs."""
        if self.pairs:
            return pairs_shape(n, h, w, channels)
        if self.lanes == 1:
            return n, h, w, channels
        rows, columns = self.parts
        return -(-n * rows * columns // self.lanes), h // rows, w // columns, channels, self.lanes

    def nbytes(self, n: int, channels: int, h: int, w: int) -> int:
        """Bytes of n images, in whole cache lines."""
        return whole_lines((2 if self.pairs else 4) * math.prod(self.shape(n, channels, h, w)))

    def tensor(self, memory: Tensor, n: int, channels: int, h: int, w: int) -> Tensor:
        """The first of some bytes as n images."""
        shape, dtype = self.shape(n, channels, h, w), torch.bfloat16 if self.pairs else torch.float32
        tensor = memory.view(dtype)[: math.prod(shape)].view(shape)
        return tensor if self.lanes > 1 else tensor.permute(0, 3, 1, 2)


CHANNELS_LAST = Layout(1, WHOLE)
IN_PAIRS = Layout(IMAGES, WHOLE, pairs=True)
