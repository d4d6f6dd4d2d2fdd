"""Index packs of the forward convolution: orders of the stored blocks that the kernels read, from the pattern alone.

Importing this module imports no Triton.

All are int32 on the pattern's device, valid as long as `crow_indices` and `col_indices` keep their contents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slimkernels.kernels.triton.runtime import cdiv
from slimkernels.tensors import Checked, is_capturing, keep_for_graphs, version


def _block_rows(crow_indices: Tensor, capacity: int) -> Tensor:
    """Block row of every slot of `values`; slots past the stored blocks get the last row."""
    slots = torch.arange(capacity, device=crow_indices.device, dtype=crow_indices.dtype)
    return torch.searchsorted(crow_indices[1:].contiguous(), slots, right=True).clamp_(max=crow_indices.numel() - 2)


def row_table(crow_indices: Tensor) -> Tensor:
    """(block_rows, 4): block row, its first block, its number of blocks, 0; the longest row first.

    A program of a long row that starts last runs alone at the end. Nothing waits for the device.
    """
    counts = crow_indices[1:] - crow_indices[:-1]
    order = torch.argsort(counts, descending=True, stable=True)
    table = torch.stack([order.to(torch.int32), crow_indices[:-1][order], counts[order], torch.zeros_like(counts)], 1)
    return table.contiguous()


def taps_together(crow_indices: Tensor, col_indices: Tensor, groups: int) -> Tensor:
    """(capacity, 2): block column and slot in `values`, within a row by channel group and then tap.

    groups: column groups a tap. The taps of a channel group read nearly the same pixels one after the other.
    Slots past the stored blocks come last, as they are. Nothing waits for the device.
    """
    capacity = col_indices.numel()
    rows = _block_rows(crow_indices, capacity).long()
    taps, channel_groups = col_indices.long() // groups, col_indices.long() % groups
    stored = torch.arange(capacity, device=col_indices.device) < crow_indices[-1]
    key = torch.where(stored, (rows * groups + channel_groups) * 2**24 + taps, torch.iinfo(torch.int64).max)
    order = torch.argsort(key, stable=True)
    return torch.stack([col_indices[order], order.to(torch.int32)], 1).contiguous()


def tap_starts(crow_indices: Tensor, col_indices: Tensor, groups: int, taps: int) -> Tensor:
    """(block_rows, taps + 1): the first block of every tap of a row, and the row's end.

    groups: column groups a tap. Columns of a row ascend, so a tap's blocks follow each other. Nothing waits for the
    device.
    """
    capacity, block_rows = col_indices.numel(), crow_indices.numel() - 1
    keys = _block_rows(crow_indices, capacity).long() * taps + col_indices.long() // groups
    stored = torch.arange(capacity, device=col_indices.device) < crow_indices[-1]
    keys = torch.where(stored, keys, torch.iinfo(torch.int64).max)
    rows = torch.arange(block_rows, device=col_indices.device)[:, None]
    wanted = rows * taps + torch.arange(taps + 1, device=col_indices.device)
    return torch.searchsorted(keys, wanted.contiguous()).to(torch.int32)


def tap_starts_offset(block_rows: int, capacity: int) -> int:
    """Where `tap_starts` begins in a `forward_order`."""
    return 4 * block_rows + 2 * capacity


def order_size(block_rows: int, capacity: int, taps: int) -> int:
    """Elements of a `forward_order`."""
    return tap_starts_offset(block_rows, capacity) + block_rows * (taps + 1)


def rows_sharing_input(block_out: int) -> int:
    """Block rows a program of the input-sharing kernel computes: 4, or 2 where four would pass 128 channels."""
    return 4 if block_out <= 32 else 2


def shared_input(crow_indices: Tensor, col_indices: Tensor, rows: int) -> list[Tensor]:
    """[table (n, rows + 2), entries (columns, rows + 1)]: groups of `rows` block rows that share input columns.

    table: the group's block rows (-1: none), its first entry, its number of entries; the longest group first. entries:
    block column, then per row of the group the slot in `values`, -1 where the row does not store that column.
    Rows are taken greedily: the longest free row, then the free rows that add the fewest columns to the union.
    Runs on the host, and waits for the device.
    """
    crow, col = crow_indices.tolist(), col_indices.long().cpu()
    columns = int(col.max()) + 1 if crow[-1] else 0
    slots = torch.full((len(crow) - 1, columns), -1, dtype=torch.int32)
    for i, (begin, end) in enumerate(pairwise(crow)):
        slots[i, col[begin:end]] = torch.arange(begin, end, dtype=torch.int32)
    stored = slots >= 0
    free = torch.argsort(stored.sum(1), descending=True, stable=True).tolist()
    groups = []
    while free:
        members = [free.pop(0)]
        union = stored[members[0]].clone()
        while free and len(members) < rows:
            members.append(free.pop(int((stored[free] & ~union).sum(1).argmin())))
            union |= stored[members[-1]]
        groups.append((members, union.nonzero().flatten()))
    groups.sort(key=lambda group: -len(group[1]))
    table = torch.full((len(groups), rows + 2), -1, dtype=torch.int32)
    entries = torch.full((sum(len(union) for _, union in groups), rows + 1), -1, dtype=torch.int32)
    first = 0
    for i, (members, union) in enumerate(groups):
        table[i, : len(members)] = torch.tensor(members, dtype=torch.int32)
        table[i, rows], table[i, rows + 1] = first, len(union)
        part = entries[first : first + len(union)]
        part[:, 0] = union
        part[:, 1 : 1 + len(members)] = slots[members][:, union].T
        first += len(union)
    return [table.to(crow_indices.device), entries.to(crow_indices.device)]


def multiplied_share(crow_indices: Tensor, col_indices: Tensor, block_out: int) -> float:
    """Blocks the input-sharing kernel multiplies, over stored blocks: 1 where the rows of every group agree."""
    rows = rows_sharing_input(block_out)
    _, entries = shared_input(crow_indices, col_indices, rows)
    return entries.shape[0] * rows / max(int(crow_indices[-1]), 1)


def column_groups(weight_shape: Sequence[int], block_shape: Sequence[int]) -> int:
    """Column groups a tap: ceil(C_in / block_in)."""
    return cdiv(weight_shape[1], block_shape[1])


def forward_order(
    crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> Tensor:
    """What the launches take as a `ForwardOrder`: `row_table`, `taps_together`, `tap_starts` one after the other.

    Its size, `order_size`, does not change with the pattern. Most launches also run without, in storage order.
    """
    groups, taps = column_groups(weight_shape, block_shape), math.prod(weight_shape[2:])
    entries = taps_together(crow_indices, col_indices, groups)
    starts = tap_starts(crow_indices, col_indices, groups, taps)
    return torch.cat([row_table(crow_indices).flatten(), entries.flatten(), starts.flatten()])


_CHECKED = Checked()


def check_order(
    op: str,
    order: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
) -> None:
    """Raises ValueError, beginning with ``op``, unless ``order`` is the `forward_order` of this valid pattern.

    Compared once for tensors that stay as they are, and not while a CUDA graph is captured.
    """
    key = (*weight_shape, *block_shape)
    if _CHECKED.knows(key, order, crow_indices, col_indices):
        return
    if is_capturing(order):
        return
    shape = (*weight_shape, 1, 1)[:4]
    if order.device != crow_indices.device or not torch.equal(
        order, forward_order(crow_indices, col_indices, shape, block_shape)
    ):
        raise ValueError(f"{op}: expected packed to be the forward order of crow_indices and col_indices")
    _CHECKED.remember(key, order, crow_indices, col_indices)


_SHARED = WeakIdKeyDictionary()


def remembered_shared_input(crow_indices: Tensor, col_indices: Tensor, rows: int) -> list[Tensor]:
    """`shared_input`, built once for a `col_indices` tensor that lives on unchanged.

    Raises:
        RuntimeError: it would have to be built while a CUDA graph is captured.
    """
    state = (rows, crow_indices.data_ptr(), version(crow_indices), col_indices.data_ptr(), version(col_indices))
    known = _SHARED.get(col_indices)
    if known is None or known[0] != state:
        if is_capturing(col_indices):
            raise RuntimeError(
                "bsr_conv2d: the order of the input-sharing kernel must be made before a CUDA graph is captured: call "
                "the layer once with this pattern"
            )
        known = state, shared_input(crow_indices, col_indices, rows)
        _SHARED[col_indices] = known
    keep_for_graphs(col_indices, known[1])
    return known[1]
