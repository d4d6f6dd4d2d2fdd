"""The transposed index of a block-sparse weight: for each input-channel group, the stored blocks that read it.

The input gradient of a convolution reads the same ``values`` in another order, so only an index is transposed, never
the weights. With stride s an input row h receives from tap r only where ``(h + padding - r * dilation)`` is a multiple
of s: the rows (and columns) of the input fall into ``s_h * s_w`` classes ``(h + padding) mod s``, and each class meets
only the taps with ``r * dilation mod s`` of the same value. Within its class a convolution of any stride is one of
stride 1, so the entries of one (group, class) are stored together and no work is spent on zeros between pixels.

Layout, one int32 tensor (`pack_size`): ``crow_t (groups * classes + 1)``, where the entries of group g and class k are
``crow_t[g * classes + k] .. crow_t[g * classes + k + 1]``; ``block_t (capacity)``, the block of ``values``; ``col_t
(capacity)``, ``tap * block_rows + block_row``. Entries of one list are ordered by tap, then block row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.problems import Pair
from slimkernels.tensors import Checked, is_capturing


def _sizes(weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int, int]:
    """``(block_rows, groups, taps, classes)``."""
    c_out, c_in, r, s = weight_shape
    return -(-c_out // block_shape[0]), -(-c_in // block_shape[1]), r * s, stride[0] * stride[1]


def pack_size(
    capacity: int, weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int] = (1, 1)
) -> int:
    """Length of the transposed index of a weight with room for ``capacity`` blocks."""
    _, groups, _, classes = _sizes(weight_shape, block_shape, stride)
    return groups * classes + 1 + 2 * capacity


def transpose_index(
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """The transposed index, ``(pack_size,)`` int32 on the indices' device; reads nothing back from the device.

    Args:
        crow_indices: int32 row pointers of the pattern, see `slimkernels.formats.BSRWeight`.
        col_indices: int32 block columns of the pattern, spare capacity included.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        stride: of the convolution; ``(1, 1)`` for a linear layer.
        dilation: of the convolution; ``(1, 1)`` for a linear layer.
    """
    rows, groups, taps, classes = _sizes(weight_shape, block_shape, stride)
    device, capacity = col_indices.device, col_indices.shape[0]
    block = torch.arange(capacity, device=device)
    crow = crow_indices.long()
    stored = block < crow[-1]
    row = torch.searchsorted(crow, block, right=True) - 1
    col = col_indices.long()
    tap, group = col // groups, col % groups
    tap_h, tap_w = tap // weight_shape[3], tap % weight_shape[3]
    kind = tap_h * dilation[0] % stride[0] * stride[1] + tap_w * dilation[1] % stride[1]
    column = group * classes + kind
    key = torch.where(stored, (column * taps + tap) * rows + row, groups * classes * taps * rows)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(groups * classes + 1, dtype=torch.int64, device=device)
    # Spare slots count into the last entry, which is the end of the lists and not counted itself.
    counts.index_add_(0, torch.where(stored, column, groups * classes), torch.ones_like(block))
    ends = counts[:-1].cumsum(0)
    entry = torch.where(stored, tap * rows + row, 0)[order]
    return torch.cat([ends.new_zeros(1), ends, order, entry]).to(torch.int32)


_CHECKED = Checked()


def check_transposed(
    op: str,
    transposed: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises ValueError, beginning with ``op``, unless ``transposed`` is the transposed index of this valid pattern.

    Compared once for tensors that stay as they are, and not while a CUDA graph is captured.
    """
    key = (*weight_shape, *block_shape, *stride, *dilation)
    if _CHECKED.knows(key, transposed, crow_indices, col_indices):
        return
    if is_capturing(transposed):
        return
    expected = transpose_index(crow_indices, col_indices, weight_shape, block_shape, stride, dilation)
    if not torch.equal(transposed, expected):
        raise ValueError(f"{op}: expected transposed to be the transposed index of crow_indices and col_indices")
    _CHECKED.remember(key, transposed, crow_indices, col_indices)


class PixelClass(NamedTuple):
    """Input pixels of one residue class, whose gradient is a convolution of stride 1 of the output's gradient.

    Every second row, say, of the input at a stride of 2 meets every second row of taps. Those taps, flipped, are the
    convolution's; its output is the class's pixels as an image of their own.

    Attributes:
        number: of the class, as the transposed index counts them.
        first: row and column of its first pixel; the next is the forward stride away.
        pixels: rows and columns of pixels, 0 where the image has none.
        taps: (R, S) of the convolution, 0 where no tap meets the pixels: their gradient is zero.
        last_tap: row and column of the last forward tap, which is the convolution's first.
        tap_step: forward taps from one to the next.
        padding: above and to the left of the output's gradient; negative where pixels there are not read.
        dilation: of the convolution.
    """

    number: int
    first: Pair
    pixels: Pair
    taps: Pair
    last_tap: Pair
    tap_step: Pair
    padding: Pair
    dilation: Pair


def _along_an_axis(kind: int, size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, ...]:
    """The parts of a `PixelClass` behind its number, along one axis.

    Pixel ``first + m * stride`` meets tap t in output ``m + (first + padding) // stride - t * dilation // stride``.
    """
    first = (kind - padding) % stride
    mine = [tap for tap in range(taps) if tap * dilation % stride == kind]
    last, common = mine[-1] if mine else 0, gcd(stride, dilation)
    before = last * dilation // stride - (first + padding) // stride
    return first, max(0, -(-(size - first) // stride)), len(mine), last, stride // common, before, dilation // common


def pixel_classes(
    image: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[PixelClass]:
    """All classes of an image of (H, W), in the order of the transposed index."""
    found: list[PixelClass] = []
    for kind_h in range(stride[0]):
        down = _along_an_axis(kind_h, image[0], kernel_size[0], stride[0], padding[0], dilation[0])
        for kind_w in range(stride[1]):
            right = _along_an_axis(kind_w, image[1], kernel_size[1], stride[1], padding[1], dilation[1])
            found.append(PixelClass(len(found), *zip(down, right, strict=True)))
    return found


def class_pattern(
    transposed: Tensor,
    capacity: int,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    of: PixelClass,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pattern of a class's convolution, whose weight is ``(C_in, C_out, *of.taps)``. Waits for the device.

    Args: transposed the transposed index of a pattern; capacity of its values.

    Returns:
        The stored block that each of its blocks is, its row pointers and its block columns, all int32. A row's columns
        are sorted by the forward tap, which falls.
    """
    rows, groups, _, classes = _sizes(weight_shape, block_shape, stride)
    crow, block, entry = split_index(transposed, capacity, weight_shape, block_shape, stride)
    starts = crow[:-1].view(groups, classes)[:, of.number].long()
    counts = crow.long().diff().view(groups, classes)[:, of.number]
    ends = counts.cumsum(0)
    at = torch.repeat_interleave(starts - ends + counts, counts)
    at = at + torch.arange(at.numel(), device=at.device)
    tap, row = entry[at] // rows, entry[at] % rows
    down = (of.last_tap[0] - tap // weight_shape[3]) // of.tap_step[0]
    right = (of.last_tap[1] - tap % weight_shape[3]) // of.tap_step[1]
    return block[at], torch.cat([ends.new_zeros(1), ends]).int(), ((down * of.taps[1] + right) * rows + row).int()


def split_index(
    transposed: Tensor, capacity: int, weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(crow_t, block_t, col_t)`` as views of a transposed index."""
    head = pack_size(0, weight_shape, block_shape, stride)
    return transposed[:head], transposed[head : head + capacity], transposed[head + capacity :]
