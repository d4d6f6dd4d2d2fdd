"""The index of a compact file: what is stored of each tensor and how, checked before anything is decoded.

It is deflated JSON: the plan without what is default, extra state, and for every tensor its dtype, shape, how it is
stored (`slimkernels.conversion.compact`) and the tables that its symbols are coded by. The index alone says how long
everything is when decoded. `Index.outlines` gives these shapes without memory, to be compared with the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkernels.conversion.plan import LayerPlan, ModelPlan, parse_json
from slimkernels.conversion.quantization import EXPONENTS, LEVELS
from slimkernels.conversion.symbols import Table, choices
from slimkernels.formats import block_grid, weight_shape_4d

VALUES = ("fp32", "bf16", "int8", "int4")
# How a tensor is stored, and how many tables it has.
_TABLES = {"plain": 0, "same": 0, "mask": 1, "pattern": 1, "integers": 2, "bfloat16": 2}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MAX_DIMENSIONS, _MAX_ELEMENTS = 64, 2**62
# JSON deflates to a tenth or so; an index of more than this many times its bytes was made to fill memory.
_DEFLATED, _SMALL_TEXT = 24, 2**16
# Elements of a swapped layer's tensors beyond its weights: blocks that reach over its edge, ranks beyond its rank.
_MOST_PER_WEIGHT, _SMALL_TENSOR = 64, 2**16


@dataclass(frozen=True)
class SizeBound:
    """Least bytes of a compact file's contents, where nothing is known but how often each symbol occurs.

    Attributes:
        values: zeroth-order entropy of the integers, or of bfloat16's exponents and of its signs with mantissas.
        patterns: log2 of the number of patterns with as many blocks, for each layer; of masks likewise.
        scales: zeroth-order entropy of the scales.
        plain: what is stored as it is: biases and norms in 16 bits, integers.
    """

    values: int
    patterns: int
    scales: int
    plain: int

    @property
    def total(self) -> int:
        """All four."""
        return self.values + self.patterns + self.scales + self.plain


@dataclass(frozen=True)
class Entry:
    """How one tensor is stored; of how ``pattern``, the two index tensors of the layer ``name``."""

    name: str
    how: str
    dtype: str
    shape: tuple[int, ...]
    tables: tuple[Table, ...] = ()
    stored: str | None = None
    same: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """As the index holds it."""
        plain: dict[str, Any] = {"name": self.name, "how": self.how, "dtype": self.dtype, "shape": self.shape}
        if self.tables:
            plain["tables"] = [[table.lowest, *table.counts] for table in self.tables]
        for key in ("stored", "same"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        return plain

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the tensor in the model."""
        return DTYPES[self.dtype]

    @property
    def plain_bytes(self) -> int:
        """Bytes that are stored as they are."""
        return math.prod(self.shape) * DTYPES[self.stored].itemsize if self.stored is not None else 0


@dataclass(frozen=True)
class Index:
    """What a compact file holds, decoded or not.

    Attributes:
        plan: of the model.
        extra_state: what modules keep besides tensors.
        values: ``bf16``, ``int8`` or ``int4``.
        outlines: every tensor by its name, on the meta device.
        bound: least bytes of what is stored.
        entries: how each tensor is stored, in the order in which they are decoded.
    """

    plan: ModelPlan
    extra_state: dict[str, Any]
    values: str
    outlines: dict[str, Tensor]
    bound: SizeBound
    entries: tuple[Entry, ...]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all tensors when decoded, each once."""
        shared = {entry.name for entry in self.entries if entry.how == "same"}
        return sum(t.numel() * t.element_size() for name, t in self.outlines.items() if name not in shared)

    def check_sizes(self, most: int | None = None) -> None:
        """Raises ValueError where tensors of swapped layers are far larger than their layers, or all than ``most``.

        Args:
            most: bytes, where the file itself says how large the model is that it goes into.
        """
        for layer in self.plan.layers:
            for name, tensor in self.outlines.items():
                if layer.action == "swap" and name.startswith(f"{layer.name}."):
                    check_size(layer, name, tensor)
        cells = sum(entry.tables[0].total for entry in self.entries if entry.how == "pattern")
        if most is not None and self.decoded_bytes + cells > most:
            raise ValueError(
                f"expected tensors of at most {most} bytes where the file names its model, got "
                f"{self.decoded_bytes + cells}; load it with into=<the model>"
            )


def grid_of(layer: LayerPlan) -> tuple[int, int]:
    """Block rows and block columns of a block-sparse layer."""
    assert layer.weight_shape is not None and layer.block_shape is not None
    return block_grid(weight_shape_4d(layer.weight_shape), layer.block_shape)


def check_size(layer: LayerPlan, name: str, tensor: Tensor) -> None:
    """Raises ValueError where a swapped layer's tensor is so much larger than the layer that no kernel wants it."""
    most = _MOST_PER_WEIGHT * math.prod(layer.weight_shape or ()) + _SMALL_TENSOR
    if tensor.numel() > most:
        raise ValueError(
            f"expected tensor {name!r} of at most {most} elements in a compact file, which its layer's shape "
            f"{layer.weight_shape} allows, got {tensor.numel()}"
        )


# Writing


def index_bytes(plan: ModelPlan, extra_state: Mapping[str, Any], entries: list[Entry], values: str) -> bytes:
    """The index as it is stored."""
    tensors = [entry.to_plain() for entry in entries]
    return _deflated(
        json.dumps({"values": values, "plan": _brief(plan), "extra_state": extra_state, "tensors": tensors})
    )


def _deflated(text: str) -> bytes:
    data = text.encode()
    small = zlib.compress(data, 9)
    # What deflates further than a reader believes is stored without: rare, and a few KiB.
    return small if len(data) <= _most_text(len(small)) else zlib.compress(data, 0)


def _most_text(nbytes: int) -> int:
    return _DEFLATED * nbytes + _SMALL_TEXT


def _brief(plan: ModelPlan) -> dict[str, Any]:
    """The plan's JSON form without fields that have their default."""

    def brief(part: Any) -> dict[str, Any]:
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "layers"}
        defaults = {f.name: f.default for f in dataclasses.fields(part)}
        return {name: value for name, value in fields.items() if value != defaults[name]}

    version = json.loads(dataclasses.replace(plan, layers=()).to_json())["plan_version"]
    return {"plan_version": version, **brief(plan), "layers": [brief(layer) for layer in plan.layers]}


# Reading


def parse(index: bytes, plain_bytes: int) -> Index:
    """The checked index of a file.

    Args:
        index: as it is stored.
        plain_bytes: length of ``plain``.

    Raises:
        ValueError: not an index, a field that is missing, unknown or out of range, named.
    """
    data = _index_object(index)
    plan = ModelPlan.from_json(json.dumps(data["plan"]))
    layers = {layer.name: layer for layer in plan.layers if layer.format == "bsr"}
    entries: list[Entry] = []
    outlines: dict[str, Tensor] = {}
    for plain in data["tensors"]:
        entry = _entry(plain, data["values"])
        for name, dtype, shape in _outlines(entry, layers, outlines):
            if name in outlines:
                raise ValueError(f"expected each tensor once, got {name!r} twice")
            outlines[name] = torch.empty(shape, dtype=dtype, device="meta")
        entries.append(entry)
    expected = sum(entry.plain_bytes for entry in entries)
    if expected != plain_bytes:
        raise ValueError(f"expected {expected} bytes of what is stored plainly, got {plain_bytes}")
    return Index(plan, data["extra_state"], data["values"], outlines, _bound(entries), tuple(entries))


def _index_object(index: bytes) -> dict[str, Any]:
    inflate, most = zlib.decompressobj(), _most_text(len(index))
    try:
        text = inflate.decompress(index, most + 1)
    except zlib.error as error:
        raise ValueError(f"expected deflated JSON, got {error}") from error
    if len(text) > most:
        raise ValueError(f"expected at most {most} bytes of JSON, got more")
    if not inflate.eof or inflate.unused_data:
        raise ValueError("expected deflated JSON of this length, got another")
    try:
        data = parse_json(text.decode())
    except ValueError as error:
        raise ValueError(f"expected JSON, got {error}") from error
    kinds = {"values": str, "plan": dict, "extra_state": dict, "tensors": list}
    if not isinstance(data, dict) or {key: type(value) for key, value in data.items()} != kinds:
        got = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"expected an object of {', '.join(kinds)}, got {reprlib.repr(got)}")
    if data["values"] not in VALUES[1:]:
        raise ValueError(f"expected values in {', '.join(VALUES[1:])}, got {reprlib.repr(data['values'])}")
    return data


def _entry(plain: Any, values: str) -> Entry:
    """One tensor of the index, whose fields fit each other."""
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str):
        raise ValueError(f"expected a tensor to be an object with a name, got {reprlib.repr(plain)}")
    where, how = f"tensor {reprlib.repr(plain['name'])}", plain.get("how")
    if not isinstance(how, str) or how not in _TABLES:
        raise ValueError(f"{where}: expected how in {', '.join(_TABLES)}, got {reprlib.repr(how)}")
    own = {"plain": {"stored"}, "same": {"same"}}.get(how, {"tables"})
    if set(plain) != {"name", "how", "dtype", "shape", *own}:
        raise ValueError(f"{where}: expected the fields of {how!r}, got {reprlib.repr(sorted(plain))}")
    for key in ("dtype", "stored", "same"):
        known = isinstance(plain.get(key, ""), str) and (key == "same" or plain.get(key, "bool") in DTYPES)
        if not known:
            raise ValueError(f"{where}: expected {key} to name a dtype or a tensor, got {reprlib.repr(plain[key])}")
    dtype, shape = DTYPES[plain["dtype"]], plain["shape"]
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{where}: expected shape of non-negative integers, got {reprlib.repr(shape)}")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS // dtype.itemsize:
        raise ValueError(f"{where}: expected shape of at most {_MAX_ELEMENTS} bytes, got {reprlib.repr(shape)}")
    fits = {"mask": dtype == torch.bool, "pattern": dtype == torch.int32 and len(shape) == 1}
    weights = dtype.is_floating_point and len(shape) > 1
    stored = DTYPES[plain.get("stored", "bool")]
    fits |= {"integers": weights and values in LEVELS, "bfloat16": weights and values == "bf16"}
    fits |= {"plain": stored == dtype or (stored.is_floating_point and dtype.is_floating_point)}
    if not fits.get(how, True) or (how == "plain" and stored == torch.bool):
        raise ValueError(f"{where}: expected {how!r} of another dtype or shape, got {plain['dtype']}, {shape}")
    tables = _tables(where, how, plain.get("tables", []), values)
    return Entry(plain["name"], how, plain["dtype"], tuple(shape), tables, plain.get("stored"), plain.get("same"))


def _tables(where: str, how: str, tables: Any, values: str) -> tuple[Table, ...]:
    """The tables of a tensor, their symbols those of its kind."""
    if not isinstance(tables, list) or len(tables) != _TABLES[how]:
        raise ValueError(f"{where}: expected {_TABLES[how]} tables, got {reprlib.repr(tables)}")
    level = LEVELS.get(values, 0)
    ranges = {"integers": (EXPONENTS, (-level, level)), "bfloat16": ((0, 255), (0, 255))}.get(how, ((0, 1),))
    found = []
    for numbers, (least, most) in zip(tables, ranges):
        if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
            raise ValueError(f"{where}: expected a table of integers, got {reprlib.repr(numbers)}")
        table = Table(numbers[0], tuple(numbers[1:]))
        if table.counts and not (least <= table.lowest and table.lowest + len(table.counts) - 1 <= most):
            raise ValueError(f"{where}: expected symbols in [{least}, {most}], got {reprlib.repr(numbers)}")
        # As `Table.of` writes it; the coder wants no empty table, and none that ends beyond what occurs.
        if any(count < 0 for count in table.counts) or not all(table.counts[:1] + table.counts[-1:]):
            raise ValueError(f"{where}: expected counts of symbols that occur, got {reprlib.repr(numbers)}")
        if table.total > _MAX_ELEMENTS:
            raise ValueError(f"{where}: expected at most {_MAX_ELEMENTS} symbols, got {table.total}")
        found.append(table)
    return tuple(found)


def _outlines(
    entry: Entry, sparse: Mapping[str, LayerPlan], before: Mapping[str, Tensor]
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors of an entry, whose tables are as long as these shapes want."""
    where, size = f"tensor {reprlib.repr(entry.name)}", math.prod(entry.shape)
    lengths = [table.total for table in entry.tables]
    if entry.how == "pattern":
        layer = sparse.get(entry.name)
        if layer is None:
            raise ValueError(f"{where}: expected a pattern of a block-sparse layer of the plan, got one of none")
        rows, cols = grid_of(layer)
        blocks = sum(count * (entry.tables[0].lowest + i) for i, count in enumerate(entry.tables[0].counts))
        if lengths != [rows * cols]:
            raise ValueError(f"{where}: expected a pattern of {rows * cols} blocks, got {lengths[0]}")
        if not blocks <= size <= rows * cols:
            raise ValueError(f"{where}: expected room for {blocks} to {rows * cols} blocks, got {size}")
        yield f"{entry.name}.crow_indices", torch.int32, (rows + 1,)
        yield f"{entry.name}.col_indices", torch.int32, entry.shape
        return
    if entry.how == "same":
        first = before.get(entry.same or "")
        if first is None or (first.dtype, tuple(first.shape)) != (entry.torch_dtype, entry.shape):
            raise ValueError(f"{where}: expected to be the same as a tensor before it, got {reprlib.repr(entry.same)}")
    owner, _, part = entry.name.rpartition(".")
    blocks_of = sparse.get(owner) if part in ("values", "crow_indices", "col_indices") else None
    if blocks_of is not None:
        col = before.get(f"{owner}.col_indices")
        if part != "values" or entry.how not in ("integers", "bfloat16") or col is None:
            raise ValueError(f"{where}: expected a pattern and then values of blocks, got {entry.how!r}")
        shape = (col.numel(), *(blocks_of.block_shape or ()))
        if entry.shape != shape:
            raise ValueError(f"{where}: expected shape {shape} of its pattern and plan, got {entry.shape}")
    channels = (entry.shape or (0,))[0] if size else 0
    if blocks_of is not None:
        channels = (blocks_of.weight_shape or (0,))[0]
    # Zeros in bfloat16 have no second symbol.
    nonzero = lengths[0] - entry.tables[0].count_of(0) if lengths else 0
    expected = {"mask": [size], "integers": [channels, size], "bfloat16": [size, nonzero]}.get(entry.how, [])
    # Spare blocks have no symbols; how many there are is known when the pattern is.
    fewer = blocks_of is not None and all(n <= most for n, most in zip(lengths, expected))
    if lengths != expected and not fewer:
        raise ValueError(f"{where}: expected {expected} symbols, got {lengths}")
    yield entry.name, entry.torch_dtype, entry.shape


def _bound(entries: list[Entry]) -> SizeBound:
    values = patterns = scales = 0.0
    for entry in entries:
        if entry.how in ("mask", "pattern"):
            counts = entry.tables[0].counts
            patterns += choices(sum(counts), counts[0]) if counts else 0
        elif entry.how == "integers":
            scales += entry.tables[0].entropy
            values += entry.tables[1].entropy
        else:
            values += sum(table.entropy for table in entry.tables)
    plain = sum(entry.plain_bytes for entry in entries)
    in_bytes = [math.ceil(bits / 8) for bits in (values, patterns, scales)]
    return SizeBound(in_bytes[0], in_bytes[1], in_bytes[2], plain)
