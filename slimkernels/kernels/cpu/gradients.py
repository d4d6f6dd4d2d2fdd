"""Gradients of the block-sparse convolution on the CPU: the stored blocks only, by gathers, strips and matrix products.

The input gradient of a convolution of stride 1 is the convolution of ``grad`` with the transposed, flipped weight, so
the kernels of the forward direction compute it from a pack of that weight. The weight gradient has a kernel of its own;
without it, matrix products multiply, per block row, the row's stored columns of the im2col matrix with the row's
channels of ``grad``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.kernels.cpu.conv2d import PackedConv2d, pack_strips
from slimkernels.kernels.cpu.weight_gradient import takes_shapes, weight_gradient
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import Room, strip_width
from slimkernels.kernels.reference import bsr_conv2d_dgrad, bsr_conv2d_wgrad
from slimkernels.tensors import Derived

# Elements of the im2col matrix that one step holds: 16 MB of float32, of the order of a core's share of L3.
COLUMN_ELEMENTS = 2**22
# Input channels of a strip where a block has fewer than 8: two AVX registers, one of AVX-512.
NARROW_STRIP = 16
# Share of stored blocks above which it is faster to compute on all of them (Zen 3, one thread, VGG-19's layers): the
# pack of narrow blocks by copying the dense weight, the weight gradient by one product instead of one a block row.
DENSE_PACK_SHARE, DENSE_PRODUCT_SHARE = 0.125, 0.4
# Share of stored blocks up to which entries of several output channels, which multiply stored weights alone, are faster
# than strips of 16 input channels (Zen 4: 0.7 of the time at a share of 0.4, 0.95 at 0.6, 1.4 at 1).
DEEP_SHARE = 0.5
# Padded pixels over those of the image or the output, and least of them, from which the padding is not stored.
PADDED_SHARE, PADDED_PIXELS = 16, 2**10

# A training step meets the same pattern with other values: what follows from the pattern is kept with it.
_ENTRIES, _TRANSPOSED = Derived(), Derived()


def transposed_strips(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    isa: str,
) -> StripPack:
    """The strip pack of the weight ``(C_in, C_out, R, S)``, transposed and flipped in both directions.

    Blocks of 8 n input channels become strips by themselves. Narrower ones share strips of 16 input channels, whose
    entries are the union of their blocks' entries, zeros included: at 87.5% sparsity (16, 1) blocks leave 12% of them
    out, so what is gained is the padding that strips skip, not the sparsity.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    if block_in % 8 == 0:
        pattern, key = (crow_indices, col_indices), (tuple(weight_shape), tuple(block_shape))
        order, crow, columns = _TRANSPOSED.of(key, pattern, lambda: _transpose(*pattern, weight_shape, block_shape))
        blocks = values.detach().index_select(0, order).transpose(1, 2)
        shape, block = (c_in, c_out, r, s), (block_in, block_out)
        return pack_strips(blocks, crow, columns, shape, block, strip_width(block_in, isa))
    rows, groups, taps = -(-c_out // block_out), -(-c_in // block_in), r * s
    nnz = int(crow_indices[-1])
    values = values.detach()[:nnz]
    row, tap, group = _places(crow_indices, col_indices, groups, taps)
    strips = -(-c_in // NARROW_STRIP)
    if nnz > DENSE_PACK_SHARE * rows * taps * groups:
        blocks = values.new_zeros(rows * taps * groups, block_out, block_in)
        blocks[(row * taps + tap) * groups + group] = values
        dense = blocks.view(rows, taps, groups, block_out, block_in).permute(1, 0, 3, 2, 4)
        dense = dense.reshape(taps, rows * block_out, groups * block_in)[:, :c_out, :c_in]
        dense = F.pad(dense, (0, strips * NARROW_STRIP - c_in)).view(taps, c_out, strips, NARROW_STRIP)
        # A single tap and strip may be a view of transposed values, which the kernel does not take.
        weights = dense.permute(2, 0, 1, 3).reshape(-1, NARROW_STRIP).contiguous()
        channels = torch.arange(c_out, dtype=torch.int32).repeat(strips * taps)
        return StripPack(weights, channels, torch.arange(strips * taps + 1, dtype=torch.int32) * c_out)
    out = row[:, None, None] * block_out + torch.arange(block_out)[:, None]
    channel = group[:, None, None] * block_in + torch.arange(block_in)
    if c_out % block_out or c_in % block_in:  # padded entries are 0: put where they do no harm
        values = values * ((out < c_out) & (channel < c_in))
        out, channel = out.clamp(max=c_out - 1), channel.clamp(max=c_in - 1)
    entry = (channel // NARROW_STRIP * taps + tap[:, None, None]) * c_out + out
    present = torch.zeros(strips * taps * c_out, dtype=torch.bool)
    present[entry.reshape(-1)] = True
    position = present.cumsum(0)
    tap_ptr = torch.zeros(strips * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = position[c_out - 1 :: c_out]
    weights = values.new_zeros(int(position[-1]), NARROW_STRIP)
    place = (position[entry] - 1) * NARROW_STRIP + channel % NARROW_STRIP
    if c_out % block_out or c_in % block_in:
        weights.view(-1).index_add_(0, place.reshape(-1), values.reshape(-1))
    else:
        weights.view(-1)[place.reshape(-1)] = values.reshape(-1)
    channels = torch.arange(c_out, dtype=torch.int32).repeat(strips * taps)[present]
    return StripPack(weights, channels, tap_ptr)


def _places(crow_indices: Tensor, col_indices: Tensor, groups: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every stored block its block row, the tap that is opposite to its own, and its group of input channels."""
    col = col_indices[: int(crow_indices[-1])].long()
    row = torch.repeat_interleave(torch.arange(crow_indices.numel() - 1), (crow_indices[1:] - crow_indices[:-1]).long())
    return row, taps - 1 - col // groups, col % groups


def _transpose(
    crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the blocks in the transposed, flipped weight, and that weight's row pointers and block columns."""
    groups, taps, rows = -(-weight_shape[1] // block_shape[1]), math.prod(weight_shape[2:]), crow_indices.numel() - 1
    row, tap, group = _places(crow_indices, col_indices, groups, taps)
    order = torch.argsort((group * taps + tap) * rows + row)
    crow = torch.zeros(groups + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(group, minlength=groups).cumsum(0)
    return order, crow, (tap * rows + row)[order].to(torch.int32)


def deep_entries(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> StripPack | None:
    """The weight ``(C_in, C_out, R, S)``, transposed and flipped, in entries of 16 or 8 output channels of one block.

    Only stored blocks are multiplied: an input channel of the gradient is the sum of as many products of two vectors
    along output channels as there are entries.

    Returns:
        ``weights (entries, depth)``, their first output channel, and where the entries of every input channel and tap
        begin. None where blocks, or all output channels, are no multiple of 8, where strips of input channels do as
        well, or where most blocks are stored.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    rows, groups, taps = -(-c_out // block_out), -(-c_in // block_in), r * s
    nnz, depth = int(crow_indices[-1]), math.gcd(block_out, c_out, 16)
    if block_in % 8 == 0 or depth < 8 or nnz > DEEP_SHARE * rows * groups * taps:
        return None
    pattern = crow_indices, col_indices
    key = tuple(weight_shape), tuple(block_shape)
    order, first, tap_ptr = _ENTRIES.of(key, pattern, lambda: _entries_of(*pattern, weight_shape, block_shape, depth))
    entries = values.detach()[:nnz].view(nnz, block_out // depth, depth, block_in).permute(1, 0, 3, 2)
    return StripPack(entries.reshape(-1, depth).index_select(0, order), first, tap_ptr)


def _entries_of(
    crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int], depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For `deep_entries`: which part of a block's column each entry is, its first output channel, where runs begin."""
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    groups, taps, parts = -(-c_in // block_in), r * s, block_out // depth
    row, tap, group = _places(crow_indices, col_indices, groups, taps)
    # By input channel, tap, block row, and part of it. Blocks with several of them are taken apart first.
    channel = (group[:, None] * block_in + torch.arange(block_in)).expand(parts, -1, -1)
    first = (row * block_out + torch.arange(parts)[:, None] * depth)[:, :, None].expand(-1, -1, block_in)
    run = channel * taps + tap[:, None]
    order = torch.argsort((run * c_out + first).reshape(-1))
    if c_in % block_in or c_out % block_out:
        order = order[((channel < c_in) & (first < c_out)).reshape(-1)[order]]
    run, first = run.reshape(-1)[order], first.reshape(-1)[order]
    tap_ptr = torch.zeros(c_in * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = torch.bincount(run, minlength=c_in * taps).cumsum(0)
    return order, first.to(torch.int32), tap_ptr


def launch_dgrad(
    isa: str,
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The input gradient of a convolution of stride 1, float32 on the CPU, channels_last.

    Args: as the reference's; ``transposed`` is unused, because the strips want the taps in the opposite order.

    Where an offset does not fit int32, torch's convolution computes it.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    c_out, c_in, r, s = weight_shape
    if grad.numel() == 0 or min(image) == 0:
        return torch.zeros(grad.shape[0], c_in, *image).contiguous(memory_format=torch.channels_last)
    margin = dilation[0] * (r - 1) - padding[0], dilation[1] * (s - 1) - padding[1]
    pad, transposed_shape = (max(0, margin[0]), max(0, margin[1])), (c_in, c_out, r, s)
    if not Room.of(transposed_shape, (1, 1), pad, dilation).holds(*grad.shape[2:], *image):
        return bsr_conv2d_dgrad(
            grad,
            values,
            crow_indices,
            col_indices,
            transposed,
            image,
            weight_shape,
            block_shape,
            stride,
            padding,
            dilation,
        )
    deep = deep_entries(values, crow_indices, col_indices, weight_shape, block_shape)
    pack = deep or transposed_strips(values, crow_indices, col_indices, weight_shape, block_shape, isa)
    # More padding than the kernel reaches: the outermost outputs read no pixel.
    cut_h, cut_w = max(0, -margin[0]), max(0, -margin[1])
    if cut_h or cut_w:
        grad = grad[:, :, cut_h : grad.shape[2] - cut_h, cut_w : grad.shape[3] - cut_w]
    convolution = PackedConv2d(
        isa, pack, transposed_shape, (1, 1), pad, dilation, "none", op="bsr_conv2d_dgrad", deep=deep is not None
    )
    return convolution(grad.contiguous(memory_format=torch.channels_last), None)


def launch_wgrad(
    isa: str,
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of values by the C++ kernel, which computes that of the stored blocks alone; spare blocks get 0.

    It takes less time than matrix products even where every block is stored (Zen 4); those compute what it does not
    take.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    arguments = (grad, x, values, crow_indices, col_indices, weight_shape, block_shape, stride, padding, dilation)
    if takes_shapes(grad, x, weight_shape, block_shape, padding, dilation):
        return weight_gradient(isa, *arguments)
    return wgrad_by_products(*arguments)


def wgrad_by_products(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of values from im2col columns; spare blocks get 0.

    One matrix product a block row, of the row's gathered columns; where most blocks are stored, one product of all
    columns and channels, from which the stored blocks are taken.

    Where the padding outweighs the image, torch's convolution, which does not store it, computes the gradient of the
    dense weight.
    """
    padded = math.prod(x.shape[2 + i] + 2 * padding[i] for i in (0, 1))
    if padded > PADDED_SHARE * max(math.prod(x.shape[2:]), math.prod(grad.shape[2:]), PADDED_PIXELS):
        return bsr_conv2d_wgrad(
            grad, x, values, crow_indices, col_indices, weight_shape, block_shape, stride, padding, dilation
        )
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    groups, taps = -(-c_in // block_in), r * s
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    n, _, p, q = grad.shape
    if grad.numel() == 0:
        return out
    crow, col = crow_indices.tolist(), col_indices.long()
    per_row = taps * groups * block_in * q
    images = max(1, min(n, COLUMN_ELEMENTS // (per_row * p)))
    height = min(p, max(1, COLUMN_ELEMENTS // per_row))
    grad = grad.permute(2, 3, 0, 1)
    everything = crow[-1] > DENSE_PRODUCT_SHARE * (len(crow) - 1) * taps * groups
    dense = values.new_zeros(taps * groups * block_in, (len(crow) - 1) * block_out) if everything else None
    for first in range(0, n, images):
        # Images innermost: rows of the im2col matrix are copied in long runs however small the image is.
        part = x[first : first + images].permute(1, 2, 3, 0)
        part = F.pad(part, (0, 0, padding[1], padding[1], padding[0], padding[0]))
        for begin in range(0, p, height):
            rows = min(height, p - begin)
            columns = _columns(part, begin, rows, q, groups * block_in, weight_shape[2:], stride, dilation)
            pixels = grad[begin : begin + rows, :, first : first + images].reshape(-1, c_out)
            if dense is not None:
                dense[:, :c_out].addmm_(columns.view(taps * groups * block_in, -1), pixels)
                continue
            columns = columns.view(taps * groups, -1)
            for i, (start, end) in enumerate(pairwise(crow)):
                if start == end:
                    continue
                taken = columns.index_select(0, col[start:end]).view((end - start) * block_in, -1)
                channels = pixels[:, i * block_out : (i + 1) * block_out]
                product = (taken @ channels).view(end - start, block_in, -1)
                out[start:end, : channels.shape[1]] += product.transpose(1, 2)
    if dense is not None:
        nnz = crow[-1]
        row = torch.repeat_interleave(torch.arange(len(crow) - 1), (crow_indices[1:] - crow_indices[:-1]).long())
        blocks = dense.view(taps * groups, block_in, len(crow) - 1, block_out)[col[:nnz], :, row]
        out[:nnz] = blocks.transpose(1, 2)
    return out


def _columns(
    padded: Tensor,
    begin: int,
    rows: int,
    q: int,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """im2col ``(R, S, channels, rows, q, images)`` of output rows from ``begin``; padded ``(C_in, H, W, images)``."""
    c_in, images = padded.shape[0], padded.shape[3]
    make = padded.new_zeros if channels > c_in else padded.new_empty
    columns = make(*kernel, channels, rows, q, images)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0] + begin * stride[0], j * dilation[1]
            bottom, right = top + (rows - 1) * stride[0] + 1, left + (q - 1) * stride[1] + 1
            columns[i, j, :c_in] = padded[:, top : bottom : stride[0], left : right : stride[1]]
    return columns
