"""Tiles of output pixels of the tensor-core convolutions of csrc/cuda, and the patches of input pixels that they read.

Plain arithmetic: nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from slimkernels.kernels.problems import Pair, conv_output_image

MAX_PLACES = 65535  # of a patch: kMaxPlaces of csrc/bindings.cpp


class Tile(NamedTuple):
    """A tile and its patch, the members of the same names in csrc/kernels.h."""

    images: int
    rows: int
    cols: int
    patch_row: int
    patch_image: int
    patch: int
    load_top: int
    load_left: int
    load_rows: int
    load_cols: int

    def tiles(self, n: int, p: int, q: int) -> int:
        """Tiles of n output images of p x q pixels."""
        return -(-n // self.images) * -(-p // self.rows) * -(-q // self.cols)

    def reach(self, taps: Pair, dilation: Pair) -> int:
        """Places behind that of a pixel's first tap, at most."""
        return (taps[0] - 1) * dilation[0] * self.patch_row + (taps[1] - 1) * dilation[1] + 1


def up(size: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-size // unit) * unit


def even(size: int) -> int:
    """The next even number."""
    return size + size % 2


def with_patch(
    images: int,
    rows: int,
    cols: int,
    h: int,
    w: int,
    p: int,
    q: int,
    taps: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tile:
    """The tile of these output pixels, whose patch shares borders where the tile spans whole images."""
    high = (rows - 1) * stride[0] + (taps[0] - 1) * dilation[0] + 1
    wide = (cols - 1) * stride[1] + (taps[1] - 1) * dilation[1] + 1
    # The right border of a whole row is the left border of the next, the lower one of an image the next one's upper:
    # of the two the larger. In an input gradient it may be the right or the lower one.
    right, lower = (
        (size - 1) * step + (count - 1) * apart + 1 - pad - inner
        for size, step, count, apart, pad, inner in zip((q, p), stride[::-1], taps[::-1], dilation[::-1],
                                                        padding[::-1], (w, h), strict=True)
    )  # fmt: skip
    left, load_cols, patch_row = (padding[1], w, max(padding[1], right) + w) if cols >= q else (0, wide, wide)
    top, load_rows, tall = (padding[0], h, max(padding[0], lower) + h) if rows >= p else (0, high, high)
    patch_image = tall * patch_row
    if images > 1:
        windows = [(y * stride[0] * patch_row, x * stride[1]) for y in range(0, rows, 2) for x in range(0, cols, 2)]
        patch_image = min(
            range(patch_image, patch_image + 8), key=lambda size: (_conflicts(size, images, windows), size)
        )
    last = (max(high, top + load_rows) - 1) * patch_row + max(wide, left + load_cols)
    return Tile(
        images, rows, cols, patch_row, patch_image, (images - 1) * patch_image + last, top, left, load_rows, load_cols
    )


def without_borders(tile: Tile) -> Tile:
    """The tile with a patch of nothing but the pixels that are loaded, side by side as a tensor copy leaves them."""
    patch_image = tile.load_rows * tile.load_cols
    return tile._replace(patch_row=tile.load_cols, patch_image=patch_image, patch=tile.images * patch_image)


def _conflicts(patch_image: int, images: int, windows: Sequence[tuple[int, int]]) -> int:
    """How many of the places that one instruction reads at once share banks of shared memory with another one.

    Places with the same remainder modulo 8 do. Two windows with the same one take different columns first, which moves
    one of them by a place.
    """
    places = [image * patch_image + y + x for image in range(images) for y, x in windows]
    found = 0
    for i in range(0, len(places), 8):
        counts = [0] * 8
        for place in places[i : i + 8]:
            counts[place % 8] += 1
        found += sum(max(0, count - (1 if counts[k ^ 1] else 2)) for k, count in enumerate(counts))
    return found


@lru_cache(maxsize=1024)
def choose_tile(
    pixels: int, h: int, w: int, taps: Pair, stride: Pair, padding: Pair, dilation: Pair, out: Pair | None = None
) -> Tile:
    """The tile of at most ``pixels`` output pixels, even in both directions, that wastes and reads the least.

    Args: pixels of the compiled shape; h, w of an input image; taps (R, S); out (P, Q) where it is not what these give.
    """
    p, q = out or conv_output_image((h, w), taps, stride, padding, dilation)
    best: tuple[tuple[float, int], Tile] | None = None
    for cols in range(2, min(even(q), pixels // 2) + 1, 2):
        for rows in range(2, min(even(p), pixels // cols) + 1, 2):
            images = pixels // (rows * cols) if rows >= p and cols >= q else 1
            tile = with_patch(images, rows, cols, h, w, p, q, taps, stride, padding, dilation)
            used = p * q / (pixels * -(-p // rows) * -(-q // cols) / images)
            reads = images * tile.load_rows * tile.load_cols / (images * rows * cols * stride[0] * stride[1])
            score = round(used - 0.2 * reads, 9), cols  # of equal ones the widest, whose rows are longest in memory
            if best is None or score > best[0]:
                best = score, tile
    assert best is not None
    return best[1]
