"""Compact contents of a file: values rounded to bfloat16 or small integers, block patterns, all entropy coded.

Three byte strings: ``index`` says what there is, ``plain`` holds what is not coded, ``symbols`` is one stream of the
range coder. How a tensor is stored:

- ``plain``: its bytes, floating point in 16 bits.
- ``same``: it is another tensor of the file.
- ``mask``: a bool tensor, its elements coded.
- ``pattern``: ``crow_indices`` and ``col_indices`` of a block-sparse layer, as one bit for each block of its grid.
- ``integers``: a scale for each output channel and an integer for each weight, of stored blocks alone.
- ``bfloat16``: exponents, and signs with mantissas.

Lengths come from the index (`slimkernels.conversion.compact_index`), which the loader has compared with the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkernels.conversion.compact_index import DTYPES, Entry, Index, check_size, grid_of, index_bytes
from slimkernels.conversion.plan import LayerPlan, ModelPlan
from slimkernels.conversion.quantization import dequantize, from_planes, half_dtype, quantize, to_planes
from slimkernels.conversion.symbols import Decoder, Encoder, Symbols, Table


@dataclass(frozen=True)
class _Piece:
    """A tensor taken apart: its entry, its runs of symbols, one for each table, and its plain bytes."""

    entry: Entry
    runs: tuple[Symbols, ...] = ()
    plain: bytes = b""


# Taking apart


def pieces(plan: ModelPlan, state: Mapping[str, Any], weights: Collection[str], values: str) -> Iterator[_Piece]:
    """The tensors of a state dict, taken apart one after another.

    Args:
        plan: of the model.
        state: tensors on any device; what is no tensor is passed over.
        weights: names of the parameters that are rounded to ``values``; what else is floating point keeps 16 bits.
        values: ``bf16``, ``int8`` or ``int4``.

    Raises:
        ValueError: a weight that is not finite, or blocks that are mostly padding; named.
        TypeError: a dtype that no file holds.
    """
    sparse = {layer.name: layer for layer in plan.layers if layer.format == "bsr"}
    indices = {f"{name}.{part}" for name in sparse for part in ("crow_indices", "col_indices")}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or name in indices:
            continue
        if value.layout != torch.strided or str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise TypeError(f"expected a dense tensor, got {name!r} of {value.dtype}, {value.layout}")
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        place = (value.data_ptr(), value.dtype, shape, value.stride())
        if value.numel() and seen.setdefault(place, name) != name:
            yield _Piece(Entry(name, "same", dtype, shape, same=seen[place]))
            continue
        value = value.detach().cpu()
        layer = sparse.get(name.removesuffix(".values")) if name.endswith(".values") else None
        if layer is not None:
            crow, col = (state[f"{layer.name}.{part}"].detach().cpu() for part in ("crow_indices", "col_indices"))
            check_size(layer, name, value)
            pattern = _pattern_symbols(layer, crow, col)
            entry = Entry(layer.name, "pattern", "int32", tuple(col.shape), (Table.of(pattern),))
            yield _Piece(entry, (pattern,))
            yield _weights(name, value, *_block_rows(layer, crow, value), values)
        elif value.dtype == torch.bool:
            bits = value.reshape(-1).numpy().astype(np.int32)
            yield _Piece(Entry(name, "mask", dtype, shape, (Table.of(bits),)), (bits,))
        elif name in weights and value.is_floating_point() and value.dim() > 1:
            yield _weights(name, value, *_channels(value), values)
        else:
            stored = half_dtype(value) if value.is_floating_point() else value.dtype
            raw = value.to(stored).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            yield _Piece(Entry(name, "plain", dtype, shape, stored=str(stored).removeprefix("torch.")), (), raw)


def _weights(name: str, value: Tensor, rows: Tensor, groups: Tensor, count: int, values: str) -> _Piece:
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if values == "bf16":
        how, runs = "bfloat16", to_planes(rows.reshape(-1))
    else:
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"expected finite weights for values={values!r}, got inf or nan in {name!r}")
        how, (scales, codes) = "integers", quantize(rows, groups, count, values)
        runs = scales, codes.reshape(-1)
    return _Piece(Entry(name, how, dtype, shape, tuple(Table.of(run) for run in runs)), runs)


def _channels(value: Tensor) -> tuple[Tensor, Tensor, int]:
    """A weight as rows, one for each output channel."""
    return value.reshape(value.shape[0], -1) if value.numel() else value.reshape(0, 1), *_one_each(value.shape)


def _one_each(shape: Any) -> tuple[Tensor, int]:
    count = shape[0] if math.prod(shape) else 0
    return torch.arange(count), count


def _block_rows(layer: LayerPlan, crow: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Stored blocks as rows, one for each output channel of each block, and the channel of each row."""
    block_out, block_in = value.shape[1:]
    return value[: int(crow[-1])].reshape(-1, block_in), *_block_groups(layer, crow, block_out)


def _block_groups(layer: LayerPlan, crow: Tensor, block_out: int) -> tuple[Tensor, int]:
    assert layer.weight_shape is not None
    counts = (crow[1:] - crow[:-1]).long()
    block_rows = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    # Channels past the last are padding, all zeros, which any scale suits.
    channels = (block_rows[:, None] * block_out + torch.arange(block_out)).clamp_(max=layer.weight_shape[0] - 1)
    return channels.reshape(-1), layer.weight_shape[0]


def _pattern_symbols(layer: LayerPlan, crow: Tensor, col: Tensor) -> Symbols:
    """One for each block of the grid, row by row: 1 where it is stored."""
    rows, cols = grid_of(layer)
    grid = np.zeros((rows, cols), dtype=np.int32)
    counts = (crow[1:] - crow[:-1]).long()
    grid[torch.repeat_interleave(torch.arange(rows), counts).numpy(), col[: int(crow[-1])].long().numpy()] = 1
    return grid.reshape(-1)


def _pattern_tensors(layer: LayerPlan, symbols: Symbols, capacity: int) -> tuple[Tensor, Tensor]:
    """``(crow_indices, col_indices)`` of `_pattern_symbols`."""
    grid = torch.from_numpy(symbols).reshape(grid_of(layer))
    crow = torch.zeros(grid.shape[0] + 1, dtype=torch.int32)
    crow[1:] = grid.sum(1).cumsum(0)
    col = torch.zeros(capacity, dtype=torch.int32)
    used = grid.nonzero()[:, 1]
    col[: used.numel()] = used.int()
    return crow, col


# Writing


def encode(
    plan: ModelPlan, state: Mapping[str, Any], extra_state: Mapping[str, Any], weights: Collection[str], values: str
) -> dict[str, bytes]:
    """``index``, ``plain`` and ``symbols`` of a state dict. Raises as `pieces`, and as `Encoder`."""
    encoder, entries, plain = Encoder(), [], []
    for piece in pieces(plan, state, weights, values):
        for run, table in zip(piece.runs, piece.entry.tables, strict=True):
            encoder.add(run, table)
        entries.append(piece.entry)
        plain.append(piece.plain)
    index = index_bytes(plan, extra_state, entries, values)
    return {"index": index, "plain": b"".join(plain), "symbols": encoder.finish()}


def rounded(plan: ModelPlan, state: Mapping[str, Any], weights: Collection[str], values: str) -> dict[str, Tensor]:
    """The tensors that a file of this state dict decodes to. Raises as `pieces`."""
    restorer = _Restorer(plan)
    for piece in pieces(plan, state, weights, values):
        restorer.add(piece)
    return restorer.tensors


# Reading


class _Restorer:
    """Puts tensors together again, in the order in which `pieces` took them apart."""

    def __init__(self, plan: ModelPlan) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._sparse = {layer.name: layer for layer in plan.layers if layer.format == "bsr"}

    def add(self, piece: _Piece) -> None:
        """The next tensor. Raises ValueError where its runs are of other lengths than it needs."""
        entry, how = piece.entry, piece.entry.how
        if how == "pattern":
            crow, col = _pattern_tensors(self._sparse[entry.name], piece.runs[0], entry.shape[0])
            self.tensors[f"{entry.name}.crow_indices"], self.tensors[f"{entry.name}.col_indices"] = crow, col
        elif how == "same":
            self.tensors[entry.name] = self.tensors[entry.same or ""]
        elif how == "mask":
            self.tensors[entry.name] = torch.from_numpy(piece.runs[0]).bool().reshape(entry.shape)
        elif how == "plain":
            stored = torch.frombuffer(bytearray(piece.plain), dtype=DTYPES[entry.stored or ""]) if piece.plain else None
            empty = torch.empty(entry.shape, dtype=entry.torch_dtype)
            self.tensors[entry.name] = empty if stored is None else stored.to(entry.torch_dtype).reshape(entry.shape)
        else:
            self.tensors[entry.name] = self._weights(entry, piece.runs)

    def _weights(self, entry: Entry, runs: tuple[Symbols, ...]) -> Tensor:
        layer = self._sparse.get(entry.name.removesuffix(".values")) if entry.name.endswith(".values") else None
        if layer is None:
            (groups, count), columns = _one_each(entry.shape), math.prod(entry.shape[1:])
        else:
            crow = self.tensors[f"{layer.name}.crow_indices"]
            (groups, count), columns = _block_groups(layer, crow, entry.shape[1]), entry.shape[2]
        rows = groups.numel()
        first, second = (run.size for run in runs)
        if (first, second) != (count, rows * columns) if entry.how == "integers" else first != rows * columns:
            raise ValueError(f"expected symbols of {rows * columns} weights, got {first} and {second}")
        if entry.how == "integers":
            weights = dequantize(runs[0], runs[1].reshape(rows, columns), groups, entry.torch_dtype)
        else:
            weights = from_planes(runs[0], runs[1], entry.torch_dtype)
        spare = math.prod(entry.shape) - weights.numel()  # blocks that are stored for a pattern to come
        return torch.cat([weights.reshape(-1), weights.new_zeros(spare)]).reshape(entry.shape)


def decode(index: Index, plain: bytes, symbols: bytes) -> dict[str, Tensor]:
    """The tensors of a file. Whether ``index.outlines`` fit the model has to be checked before.

    Raises:
        ValueError: bytes that do not belong to the index; the tensor is named. ImportError: no `constriction`.
    """
    decoder, restorer, position = Decoder(symbols), _Restorer(index.plan), 0
    for entry in index.entries:
        end = position + entry.plain_bytes
        try:
            runs = tuple(decoder.take(table) for table in entry.tables)
            restorer.add(_Piece(entry, runs, plain[position:end]))
        except ValueError as error:
            raise ValueError(f"tensor {entry.name!r}: {error}") from error
        position = end
    decoder.finish()
    return restorer.tensors
