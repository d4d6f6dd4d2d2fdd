"""Strip packs: the weight of csrc/kernels.h as three tensors, how one is made, and what must be true of any of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.kernels.packs import StripPack, kind_of
from slimkernels.tensors import Checked, Derived, is_plain

# Output channels of a strip that the kernels have tiles for.
STRIP_WIDTHS = frozenset({1, 2, 4, 8, 16, 24, 32})
# Input channels of an entry that they have tiles for, beside 1.
DEPTHS = frozenset({8, 16})


def pack_strips(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    strip: int,
) -> StripPack:
    """The strip pack of a block-sparse weight.

    Args:
        values: the stored blocks of a valid BSR weight on the CPU; blocks beyond the last one in use are left out.
        crow_indices: its row pointers.
        col_indices: its block columns.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        strip: output channels per strip, a divisor of ``block_out``.
    """
    block_out, block_in = block_shape
    pattern = crow_indices, col_indices
    key = tuple(weight_shape), tuple(block_shape), strip
    order, inside, channels, tap_ptr = _ENTRIES.of(
        key, pattern, lambda: _entries_of(*pattern, weight_shape, block_shape, strip)
    )
    per_block, nnz = block_out // strip, int(crow_indices[-1])
    weights = values.detach()[:nnz].reshape(nnz, per_block, strip, block_in).transpose(2, 3)
    weights = weights.reshape(nnz * per_block, block_in, strip)
    if order is not None:
        weights = weights[order]
    weights = weights.reshape(-1, strip)
    if inside is not None:
        weights = weights[inside]
    return StripPack(weights.contiguous(), channels, tap_ptr)


# A training step packs the same pattern with other values: the indices of the pack are kept with the pattern.
_ENTRIES = Derived()


def _entries_of(
    crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int], strip: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """What of a strip pack follows from the pattern.

    Returns:
        The order of the blocks' parts and which of their entries exist, None where all of them stay as they are; then
        ``channels`` and ``tap_ptr``.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    taps, groups, per_block = r * s, -(-c_in // block_in), block_out // strip
    strips = -(-c_out // strip)
    crow = crow_indices.long()
    counts = crow[1:] - crow[:-1]
    nnz = int(crow[-1])
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    tap = torch.div(col_indices[:nnz], groups, rounding_mode="floor").long()
    first_channel = (col_indices[:nnz].long() - tap * groups) * block_in
    channels = first_channel[:, None, None] + torch.arange(block_in)
    channels = channels.expand(nnz, per_block, block_in).reshape(nnz * per_block, block_in)
    sub = torch.arange(per_block)
    key = ((row[:, None] * per_block + sub) * taps + tap[:, None]).reshape(-1)
    order = inside = None
    if per_block > 1:
        # Order of the entries: strip, then block column, then channel inside the block.
        position = crow[:-1][row][:, None] * (per_block - 1) + sub * counts[row][:, None] + torch.arange(nnz)[:, None]
        order = torch.empty(nnz * per_block, dtype=torch.long)
        order[position.reshape(-1)] = torch.arange(nnz * per_block)
        channels, key = channels[order], key[order]
    key = key[:, None].expand(-1, block_in).reshape(-1)
    channels = channels.reshape(-1)
    if strips * strip != counts.numel() * block_out or groups * block_in != c_in:
        inside = (channels < c_in) & (key < strips * taps)
        channels, key = channels[inside], key[inside]
    tap_ptr = torch.zeros(strips * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = torch.bincount(key, minlength=strips * taps).cumsum(0)
    return order, inside, channels.to(torch.int32), tap_ptr


_CHECKED_PACKS = Checked()


def check_pack(op: str, packed: Sequence[Tensor], weight_shape: Sequence[int], deep: bool = False) -> None:
    """Raises unless ``packed`` is a strip pack of a weight of this shape, so that no kernel reads outside its tensors.

    Every number in the tensors is read, once for tensors that stay as they are.

    Args:
        op: named in errors.
        packed: what `pack_strips` returns.
        weight_shape: ``(C_out, C_in, R, S)`` of positive sizes.
        deep: each entry has weights of neighbouring input channels and one output channel instead.

    Raises:
        TypeError: a tensor of another dtype. ValueError: anything else.
    """
    c_out, c_in, r, s = weight_shape
    if kind_of(packed) is not StripPack:
        raise ValueError(f"{op}: expected a strip pack of {len(StripPack._fields)} tensors, got {len(packed)}")
    for name, tensor, dtype, dims in zip(
        StripPack._fields, packed, (torch.float32, torch.int32, torch.int32), (2, 1, 1), strict=True
    ):
        if tensor.dtype is not dtype:
            raise TypeError(f"{op}: expected {name} of the strip pack of dtype {dtype}, got {tensor.dtype}")
        if not tensor.is_cpu or not is_plain(tensor):
            got = f"a {type(tensor).__name__} on {tensor.device} of layout {tensor.layout}"
            raise ValueError(f"{op}: expected {name} of the strip pack to be a plain CPU tensor, got {got}")
        if tensor.dim() != dims or not tensor.is_contiguous():
            got = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            raise ValueError(f"{op}: expected contiguous {name} of the strip pack with {dims} dimensions, got {got}")
    weights, channels, tap_ptr = packed
    entries, strip = weights.shape
    depth = 1
    if deep:
        depth, strip = strip, 1
        if depth not in DEPTHS:
            raise ValueError(f"{op}: expected {sorted(DEPTHS)} input channels an entry, got {depth}")
    if strip not in STRIP_WIDTHS:
        raise ValueError(f"{op}: expected a strip pack of {sorted(STRIP_WIDTHS)} output channels a strip, got {strip}")
    if entries >= 2**31:
        raise ValueError(f"{op}: expected fewer than 2**31 entries of the strip pack, got {entries}")
    strips = -(-c_out // strip)
    if tap_ptr.numel() != strips * r * s + 1 or channels.numel() != entries:
        raise ValueError(
            f"{op}: expected a strip pack of {strips} strips and {r * s} taps, got tap_ptr of length "
            f"{tap_ptr.numel()} and {channels.numel()} channels for {entries} entries"
        )
    if _CHECKED_PACKS.knows((c_in, depth), channels, tap_ptr):
        return
    ends = (int(tap_ptr[0]), int(tap_ptr[-1]))
    if ends != (0, entries) or bool((tap_ptr[1:] < tap_ptr[:-1]).any()):
        raise ValueError(f"{op}: expected tap_ptr of the strip pack to rise from 0 to {entries}, got {ends}")
    if entries:
        low, high = (int(end) for end in channels.aminmax())
        end = c_in - depth + 1
        if low < 0 or high >= end:
            raise ValueError(f"{op}: expected channels of the strip pack in [0, {end}), got {low} to {high}")
    _CHECKED_PACKS.remember((c_in, depth), channels, tap_ptr)


def readable_bias(op: str, bias: Tensor, size: int) -> Tensor:
    """A bias ``(size,)`` in memory as the kernels read it. Raises TypeError or ValueError as the op does."""
    if bias.dtype is not torch.float32:
        raise TypeError(f"{op}: expected bias of dtype torch.float32 like x, got {bias.dtype}")
    if not bias.is_cpu:
        raise ValueError(f"{op}: expected bias on cpu like x, got {bias.device}")
    if bias.dim() != 1 or bias.numel() != size:
        raise ValueError(f"{op}: expected bias of shape ({size},), got {tuple(bias.shape)}")
    if not bias.is_contiguous() or bias.is_neg():
        return bias.contiguous().resolve_neg()
    return bias
