"""Host planning of the tensor-core kernels of csrc/cuda: the packed weight, the tile, and what fits shared memory.

Plain arithmetic and tensor operations: nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.problems import Pair, conv_output_size

STEP_CHANNELS = 16  # input channels of one step: the depth of a tensor-core instruction


class Shape(NamedTuple):
    """A compiled shape of csrc/cuda: how a tile's pixels and channels are shared out.

    Attributes:
        pixels: of a tile. column: output channels that follow one list of steps. columns: of a thread block.
        groups: groups of four warps, each with a tile of its own. wgmma: whether it needs an sm_90a processor.
    """

    pixels: int
    column: int
    columns: int
    groups: int
    wgmma: bool


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

    def count(self, n: int, p: int, q: int) -> int:
        """Tiles of n output images of p x q pixels."""
        return -(-n // self.images) * -(-p // self.rows) * -(-q // self.cols)


def _even(size: int) -> int:
    return size + size % 2


def _with_patch(images: int, rows: int, cols: int, h: int, w: int, p: int, q: int, taps: Pair, stride: Pair,
                padding: Pair, dilation: Pair) -> Tile:  # fmt: skip
    """The tile of these output pixels, whose patch shares borders where the tile spans whole images."""
    high = (rows - 1) * stride[0] + (taps[0] - 1) * dilation[0] + 1
    wide = (cols - 1) * stride[1] + (taps[1] - 1) * dilation[1] + 1
    # The right border of a whole row is the left border of the next, the lower one of an image the next one's upper.
    left, load_cols, patch_row = (padding[1], w, padding[1] + w) if cols >= q else (0, wide, wide)
    top, load_rows, tall = (padding[0], h, padding[0] + h) if rows >= p else (0, high, high)
    patch_image = tall * patch_row
    if images > 1:
        windows = [(y * stride[0] * patch_row, x * stride[1]) for y in range(0, rows, 2) for x in range(0, cols, 2)]
        patch_image = min(
            range(patch_image, patch_image + 8), key=lambda size: (_conflicts(size, images, windows), size)
        )
    last = (max(high, top + load_rows) - 1) * patch_row + max(wide, left + load_cols)
    return Tile(images, rows, cols, patch_row, patch_image, (images - 1) * patch_image + last, top, left, load_rows,
                load_cols)  # fmt: skip


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
    pixels: int, h: int, w: int, taps: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tile:
    """The tile of at most ``pixels`` output pixels, even in both directions, that wastes and reads the least.

    Args: pixels of the compiled shape; h, w of an input image; taps (R, S).
    """
    p = conv_output_size(h, taps[0], stride[0], padding[0], dilation[0])
    q = conv_output_size(w, taps[1], stride[1], padding[1], dilation[1])
    best: tuple[float, Tile] | None = None
    for cols in range(2, min(_even(q), pixels // 2) + 1, 2):
        for rows in range(2, min(_even(p), pixels // cols) + 1, 2):
            images = pixels // (rows * cols) if rows >= p and cols >= q else 1
            tile = _with_patch(images, rows, cols, h, w, p, q, taps, stride, padding, dilation)
            used = p * q / (pixels * -(-p // rows) * -(-q // cols) / images)
            reads = images * tile.load_rows * tile.load_cols / (images * rows * cols * stride[0] * stride[1])
            score = used - 0.2 * reads
            if best is None or score > best[0]:
                best = score, tile
    assert best is not None
    return best[1]


class Packed(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        weights: ``(steps + 1, column * 16)`` in the order in which lanes hold them, the last step zero.
        group_start: int32 ``(columns, groups of 16 input channels + 1)``: first step of each group.
        taps: int32 ``(steps,)``: tap << 16 | group.
        most_steps: int32 ``(columns,)`` on the CPU: the most steps that 1, 2, ... neighbouring columns have together.
    """

    weights: Tensor
    group_start: Tensor
    taps: Tensor
    most_steps: Tensor


def pack(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int],
    column: int, wgmma: bool,
) -> Packed:  # fmt: skip
    """The steps of a BSR weight: a column of output channels times 16 input channels at one tap, by group and then tap.

    Args: values ... block_shape a valid `slimkernels.formats.BSRWeight` whose block is a multiple of ``(column, 16)``;
    wgmma whether a group of warps reads the weights from shared memory, instead of each warp into registers.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    device, capacity = col_indices.device, col_indices.numel()
    high, wide = block_out // column, block_in // STEP_CHANNELS
    columns, groups, column_groups = -(-c_out // block_out) * high, -(-c_in // STEP_CHANNELS), -(-c_in // block_in)
    slots = torch.arange(capacity, device=device)
    rows = torch.searchsorted(crow_indices[1:].contiguous(), slots.to(torch.int32), right=True)
    tap, group = col_indices.long() // column_groups, col_indices.long() % column_groups * wide
    # One key a step, (column, group, tap); what lies behind the stored blocks or the last channel comes last.
    column_of = (rows * high)[:, None, None] + torch.arange(high, device=device)[:, None]
    group_of = group[:, None, None] + torch.arange(wide, device=device)
    stored = (slots < crow_indices[-1])[:, None, None] & (group_of < groups)
    key = torch.where(stored, (column_of * groups + group_of) * (r * s) + tap[:, None, None], columns * groups * r * s)
    key, order = key.flatten().sort(stable=True)
    first = torch.arange(columns * groups, device=device).reshape(columns, groups) * (r * s)
    ends = torch.cat([first, first[:, -1:] + r * s], 1)
    group_start = torch.searchsorted(key, ends.flatten()).to(torch.int32).reshape(columns, groups + 1)
    taps = (key % (r * s) << 16) | (key // (r * s) % groups)
    blocks = values.reshape(capacity, high, column, wide, STEP_CHANNELS).transpose(2, 3)
    steps = blocks.reshape(capacity * high * wide, column, STEP_CHANNELS)[order]
    packed = values.new_zeros(steps.shape[0] + 1, column * STEP_CHANNELS)
    packed[:-1] = in_lane_order(steps, wgmma)
    counts = (group_start[:, -1] - group_start[:, 0]).cpu().to(torch.int32)
    most = [max(int(part.sum()) for part in counts.split(n)) for n in range(1, columns + 1)]
    return Packed(packed, group_start, taps.to(torch.int32), torch.tensor(most, dtype=torch.int32))


def in_lane_order(steps: Tensor, wgmma: bool) -> Tensor:
    """``(n, column, 16)`` weights, flattened in the order of csrc/cuda/tensor_cores.cuh.

    Column 8 j + 2 q + e of an instruction is output channel 32 (j // 4) + 8 q + 2 (j % 4) + e: a lane, which holds
    the columns of one q, then has eight neighbouring channels.
    """
    n, column, _ = steps.shape
    half = column // 32
    if wgmma:  # matrices of 8 columns x 8 depths
        parts = steps.reshape(n, half, 4, 4, 2, 2, 8)  # 32 channels, q, j % 4, e, depth // 8, depth % 8
        return parts.permute(0, 5, 1, 3, 2, 4, 6).reshape(n, -1)
    parts = steps.reshape(n, half, 4, 2, 2, 2, 2, 4, 2)  # 32 channels, q, j % 4 // 2, j % 2, e, depth // 8, pair, parity
    return parts.permute(0, 1, 3, 2, 5, 7, 4, 6, 8).reshape(n, -1)
