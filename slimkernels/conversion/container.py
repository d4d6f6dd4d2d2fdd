"""The ``.slim.safetensors`` file: safetensors whose metadata holds the plan and a SHA-256 of everything else.

Metadata fields: ``format`` (``slimkernels``), ``format_version``, ``plan`` (`ModelPlan.to_json`), ``extra_state``
(JSON: what modules keep besides tensors), ``sha256`` (JSON: of ``plan``, of ``extra_state`` and of every tensor as
``tensor:<name>``, over its dtype, shape and bytes). No pickle anywhere. Reading checks all of it before it is used.

That is format version 1, whose tensors are those of the model. In version 2 they are ``index``, ``plain`` and
``symbols``, bytes that `slimkernels.conversion.compact` describes; plan and extra state are in the index.

The hashes guard against accidents: a bad disk, a broken download, a file cut short. They are no signature: whoever can
write the file can write its hashes. So nothing that reads a file trusts it because its hashes hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from slimkernels.conversion import compact
from slimkernels.conversion.compact_index import Index, parse
from slimkernels.conversion.plan import ModelPlan, parse_json
from slimkernels.files import atomic_path

FORMAT, FORMAT_VERSION, COMPACT_VERSION = "slimkernels", "1", "2"
# Metadata of each version.
_FIELDS = {
    FORMAT_VERSION: ("format", "format_version", "plan", "extra_state", "sha256"),
    COMPACT_VERSION: ("format", "format_version", "sha256"),
}
_COMPACT = ("index", "plain", "symbols")
# safetensors' own names; its limit on the header is 100 MB.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
# Of a tensor. No size may be larger than this even where another is 0 and the tensor has no bytes at all.
_MAX_DIMENSIONS, _MAX_ELEMENTS = 64, 2**62


@dataclass(frozen=True)
class Contents:
    """What a file holds: its plan, its tensors by state-dict name, extra state, and its size.

    Of a compact file the tensors are outlines on the meta device, until `decoded`.
    """

    plan: ModelPlan
    tensors: dict[str, Tensor]
    extra_state: dict[str, Any]
    nbytes: int
    index: Index | None = None
    coded: tuple[bytes, bytes] = (b"", b"")

    def decoded(self) -> Contents:
        """With tensors in place of their outlines, which the caller has compared with the model.

        Raises:
            ValueError: what is coded does not belong to the index. ImportError: an extra is missing.
        """
        if self.index is None:
            return self
        return replace(self, tensors=compact.decode(self.index, *self.coded), index=None, coded=(b"", b""))


@dataclass(frozen=True)
class Header:
    """The plan of a file, the file's size, bytes of the model's tensors, and the index of a compact file."""

    plan: ModelPlan
    nbytes: int
    state_bytes: int
    index: Index | None = None


def write(
    path: str | os.PathLike[str],
    plan: ModelPlan,
    state: dict[str, Any],
    values: str = "fp32",
    weights: Collection[str] = (),
) -> None:
    """Writes a state dict and its plan, under a temporary name that is renamed when the file is complete.

    Args:
        path: of the file.
        plan: of the model.
        state: its tensors and what else its modules keep.
        values: ``fp32`` keeps the tensors as they are; see `slimkernels.conversion.compact` for the others.
        weights: names of the parameters that are rounded to ``values``.

    Raises:
        TypeError: a tensor or an extra state that the format cannot hold; named.
        ValueError: weights that cannot be rounded. ImportError: an extra is missing.
        OSError: the folder does not exist or cannot be written.
    """
    tensors, extra = {}, {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            try:
                extra[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                raise TypeError(f"save: expected extra state that JSON can hold, got {name!r}: {error}") from error
        elif value.layout != torch.strided or value.dtype not in _NAMES:
            raise TypeError(f"save: expected a dense tensor, got {name!r} of {value.dtype}, {value.layout}")
        elif values == "fp32":
            # A clone of its own: safetensors refuses tensors that share memory, such as tied weights.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if values == "fp32":
        version, fields = FORMAT_VERSION, {"plan": plan.to_json(), "extra_state": json.dumps(extra, sort_keys=True)}
    else:
        version, fields = COMPACT_VERSION, {}
        try:
            coded = compact.encode(plan, state, extra, weights, values)
        except ValueError as error:
            raise ValueError(f"save: {error}") from error
        # frombuffer takes no empty buffer.
        tensors = {
            name: torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            for name, raw in coded.items()
        }
    hashes = {name: _text_hash(text) for name, text in fields.items()}
    hashes.update((f"tensor:{name}", _tensor_hash(tensor)) for name, tensor in tensors.items())
    metadata = {"format": FORMAT, "format_version": version, **fields, "sha256": json.dumps(hashes)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(_safetensors(tensors, metadata, ordered=version == COMPACT_VERSION))


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], ordered: bool) -> bytes:
    """A safetensors file; ``ordered`` makes the same bytes each time, which safetensors does not with its metadata."""
    from safetensors.torch import save

    if not ordered:
        return save(tensors, metadata=metadata)
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensor.numpy().tobytes() for tensor in tensors.values())])


def read(path: str | os.PathLike[str]) -> Contents:
    """Reads and checks a whole file. The memory it asks for is a small multiple of the file's size.

    Raises:
        ValueError: the file is damaged or of another kind; the message names the field at fault. OSError: no such file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        metadata, plan, hashes = _metadata(header, path)
        entries = [(name, *_entry(name, entry, path)) for name, entry in header.items() if name != "__metadata__"]
        entries.sort(key=lambda entry: entry[3:])
        position = 0
        for name, _, _, begin, end in entries:
            if begin != position:
                _refuse(path, f"tensor {name!r}: data_offsets", f"begin at {position}", begin)
            position = end
            if start + end > size:
                _refuse(path, f"tensor {name!r}: data", f"{end - begin} bytes", max(size - start - begin, 0))
        if start + position != size:
            _refuse(path, "file size", f"{start + position} bytes", size)
        missing = sorted(set(hashes) - {"plan", "extra_state"} - {f"tensor:{entry[0]}" for entry in entries})
        if missing:
            _refuse(path, "metadata field 'sha256'", "a tensor for every entry", f"none for {reprlib.repr(missing[0])}")
        tensors = {}
        for name, dtype, shape, begin, end in entries:
            tensors[name] = tensor = _tensor(file, dtype, shape, end - begin, f"tensor {name!r}", path)
            _check_hash(path, f"tensor {name!r}", hashes.get(f"tensor:{name}"), _tensor_hash(tensor))
            if dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                _refuse(path, f"tensor {name!r}: data", "bytes 0 and 1 of a BOOL tensor", "another")
    if plan is None:
        raw = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        index = _index(raw.pop("index"), len(raw["plain"]), path)
        return Contents(index.plan, index.outlines, index.extra_state, size, index, (raw["plain"], raw["symbols"]))
    extra = _json_object(metadata["extra_state"], "metadata field 'extra_state'", path)
    return Contents(plan, tensors, extra, size)


def _index(raw: bytes, plain_bytes: int, path: Any) -> Index:
    try:
        return parse(raw, plain_bytes)
    except ValueError as error:
        raise ValueError(f"load: {path}: tensor 'index': {error}") from error


def _tensor(file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, field: str, path: Any) -> Tensor:
    """The next tensor of the file, on memory of its own."""
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(nbytes)
    got = file.readinto(raw)  # type: ignore[attr-defined]  # files opened for reading bytes have it
    if got != nbytes:
        _refuse(path, f"{field}: data", f"{nbytes} bytes", got)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says about itself; the model's tensors are not read. Raises like `read`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        _, plan, hashes = _metadata(header, path)
        if plan is not None:
            return Header(plan, size, size - start)
        entries = {name: _entry(name, header[name], path) for name in _COMPACT}
        dtype, shape, begin, end = entries["index"]
        if start + end > size:
            _refuse(path, "tensor 'index': data", f"{end - begin} bytes", max(size - start - begin, 0))
        file.seek(start + begin)
        tensor = _tensor(file, dtype, shape, end - begin, "tensor 'index'", path)
        _check_hash(path, "tensor 'index'", hashes.get("tensor:index"), _tensor_hash(tensor))
    _, _, begin, end = entries["plain"]
    index = _index(tensor.numpy().tobytes(), end - begin, path)
    return Header(index.plan, size, index.decoded_bytes, index)


def _refuse(path: Any, field: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"load: {path}: {field}: expected {expected}, got {got}")


def _header(file: BinaryIO, size: int, path: Any) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the tensors' bytes begin; the file is read up to there."""
    if size < 8:
        _refuse(path, "header length", "8 bytes", f"a file of {size}")
    length, longest = int.from_bytes(file.read(8), "little"), min(size - 8, _MAX_HEADER)
    if not 2 <= length <= longest:
        what = "; it may be no safetensors file at all, which is what slimkernels.save writes"
        _refuse(path, "header length", f"2 to {longest}", f"{length}{what}")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, "header", "UTF-8", error)
    if not text.rstrip(" ").endswith("}"):
        _refuse(path, "header", "a JSON object padded with spaces", repr(text[-16:]))
    return _json_object(text, "header", path), 8 + length


def _json_object(text: str, field: str, path: Any) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"load: {path}: {field}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        _refuse(path, field, "a JSON object", type(value).__name__)
    return value


def _metadata(header: dict[str, Any], path: Any) -> tuple[dict[str, str], ModelPlan | None, dict[str, Any]]:
    """The checked metadata fields, the plan (None where it is in the index of a compact file) and the hashes."""
    metadata = header.get("__metadata__")
    if metadata is None or (isinstance(metadata, dict) and "format_version" not in metadata and "plan" not in metadata):
        raise ValueError(
            f"load: {path}: header field '__metadata__': expected an object of slimkernels.save, got safetensors of "
            "something else; weights of a model become such a file by convert and save (or slimkernels convert)"
        )
    if not isinstance(metadata, dict):
        _refuse(path, "header field '__metadata__'", "an object", type(metadata).__name__)
    version = metadata.get("format_version")
    fields = _FIELDS.get(version if isinstance(version, str) else "", _FIELDS[FORMAT_VERSION])
    for name in fields:
        if not isinstance(metadata.get(name), str):
            _refuse(path, f"metadata field {name!r}", "a string", type(metadata.get(name)).__name__)
    unknown = sorted(set(metadata) - set(fields))
    if unknown:
        _refuse(path, "metadata", f"the fields {', '.join(fields)}", reprlib.repr(unknown[0]))
    for name, known in (("format", [FORMAT]), ("format_version", [*_FIELDS])):
        if metadata[name] not in known:
            expected = " or ".join(map(repr, known))
            _refuse(path, f"metadata field {name!r}", expected, reprlib.repr(metadata[name]))
    hashes = _json_object(metadata["sha256"], "metadata field 'sha256'", path)
    if version == COMPACT_VERSION:
        tensors = set(header) - {"__metadata__"}
        if tensors != set(_COMPACT):
            _refuse(path, "header", f"the tensors {', '.join(_COMPACT)}", reprlib.repr(sorted(tensors)))
        for name in _COMPACT:
            dtype, shape, _, _ = _entry(name, header[name], path)
            if dtype is not torch.uint8 or len(shape) != 1:
                _refuse(path, f"tensor {name!r}", "bytes", f"{dtype} of shape {shape}")
        return metadata, None, hashes
    for name in ("plan", "extra_state"):
        try:
            digest = _text_hash(metadata[name])
        except UnicodeEncodeError as error:
            _refuse(path, f"metadata field {name!r}", "text", error)
        _check_hash(path, f"metadata field {name!r}", hashes.get(name), digest)
    try:
        return metadata, ModelPlan.from_json(metadata["plan"]), hashes
    except ValueError as error:
        raise ValueError(f"load: {path}: metadata field 'plan': {error}") from error


def _check_hash(path: Any, field: str, expected: Any, got: str) -> None:
    if expected != got:
        _refuse(path, field, f"SHA-256 {expected[:64] if isinstance(expected, str) else reprlib.repr(expected)}", got)


def _entry(name: str, entry: Any, path: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape and byte range of a tensor's header entry."""
    field = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, field, "dtype, shape and data_offsets", reprlib.repr(entry))
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"{field}: dtype", f"one of {', '.join(_DTYPES)}", reprlib.repr(entry["dtype"]))
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(v) is not int or v < 0 for v in value):
            _refuse(path, f"{field}: {key}", "non-negative integers", reprlib.repr(value))
    if len(offsets) != 2:
        _refuse(path, f"{field}: data_offsets", "2 numbers", reprlib.repr(offsets))
    if len(shape) > _MAX_DIMENSIONS:
        _refuse(path, f"{field}: shape", f"at most {_MAX_DIMENSIONS} sizes", len(shape))
    # torch multiplies the sizes, in 64 bits, of empty tensors too.
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS // dtype.itemsize:
        _refuse(path, f"{field}: shape", f"at most {_MAX_ELEMENTS} bytes", reprlib.repr(shape))
    expected = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != expected:
        _refuse(path, f"{field}: data_offsets", f"{expected} bytes", reprlib.repr(end - begin))
    return dtype, tuple(shape), begin, end


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{_NAMES[tensor.dtype]}{tuple(tensor.shape)}".encode())
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    digest.update(raw.numpy().data)
    return digest.hexdigest()
