"""The ``.slim.safetensors`` file: safetensors whose metadata holds the plan and a SHA-256 of everything else.

Metadata fields: ``format`` (``slimkernels``), ``format_version``, ``plan`` (`ModelPlan.to_json`), ``extra_state``
(JSON: what modules keep besides tensors), ``sha256`` (JSON: of ``plan``, of ``extra_state`` and of every tensor as
``tensor:<name>``, over its dtype, shape and bytes). No pickle anywhere. Reading checks all of it before it is used.

The hashes guard against accidents: a bad disk, a broken download, a file cut short. They are no signature: whoever can
write the file can write its hashes. So nothing that reads a file trusts it because its hashes hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from slimkernels.conversion.plan import ModelPlan, parse_json
from slimkernels.files import atomic_path

FORMAT, FORMAT_VERSION = "slimkernels", "1"
_FIELDS = ("format", "format_version", "plan", "extra_state", "sha256")
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
    """What a file holds: its plan, its tensors by state-dict name, extra state, and its size."""

    plan: ModelPlan
    tensors: dict[str, Tensor]
    extra_state: dict[str, Any]
    nbytes: int


def write(path: str | os.PathLike[str], plan: ModelPlan, state: dict[str, Any]) -> None:
    """Writes a state dict and its plan, under a temporary name that is renamed when the file is complete.

    Raises:
        TypeError: a tensor or an extra state that the format cannot hold; named.
        OSError: the folder does not exist or cannot be written.
    """
    from safetensors.torch import save

    tensors, extra = {}, {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            try:
                extra[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                raise TypeError(f"save: expected extra state that JSON can hold, got {name!r}: {error}") from error
        elif value.layout != torch.strided or value.dtype not in _NAMES:
            raise TypeError(f"save: expected a dense tensor, got {name!r} of {value.dtype}, {value.layout}")
        else:
            # A clone of its own: safetensors refuses tensors that share memory, such as tied weights.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    fields = {"plan": plan.to_json(), "extra_state": json.dumps(extra, sort_keys=True)}
    hashes = {name: _text_hash(text) for name, text in fields.items()}
    hashes.update((f"tensor:{name}", _tensor_hash(tensor)) for name, tensor in tensors.items())
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "sha256": json.dumps(hashes)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=metadata))


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
    extra = _json_object(metadata["extra_state"], "metadata field 'extra_state'", path)
    return Contents(plan, tensors, extra, size)


def _tensor(file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, field: str, path: Any) -> Tensor:
    """The next tensor of the file, on memory of its own."""
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(nbytes)
    got = file.readinto(raw)  # type: ignore[attr-defined]  # files opened for reading bytes have it
    if got != nbytes:
        _refuse(path, f"{field}: data", f"{nbytes} bytes", got)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def read_header(path: str | os.PathLike[str]) -> tuple[ModelPlan, int, int]:
    """The plan of a file, the file's size, and the bytes of its tensors, which are not read. Raises like `read`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        return _metadata(header, path)[1], size, size - start


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


def _metadata(header: dict[str, Any], path: Any) -> tuple[dict[str, str], ModelPlan, dict[str, Any]]:
    """The checked metadata fields, the plan and the hashes."""
    metadata = header.get("__metadata__")
    if metadata is None or (isinstance(metadata, dict) and "format_version" not in metadata and "plan" not in metadata):
        raise ValueError(
            f"load: {path}: header field '__metadata__': expected an object of slimkernels.save, got safetensors of "
            "something else; weights of a model become such a file by convert and save (or slimkernels convert)"
        )
    if not isinstance(metadata, dict):
        _refuse(path, "header field '__metadata__'", "an object", type(metadata).__name__)
    for name in _FIELDS:
        if not isinstance(metadata.get(name), str):
            _refuse(path, f"metadata field {name!r}", "a string", type(metadata.get(name)).__name__)
    unknown = sorted(set(metadata) - set(_FIELDS))
    if unknown:
        _refuse(path, "metadata", f"the fields {', '.join(_FIELDS)}", reprlib.repr(unknown[0]))
    for name, value in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if metadata[name] != value:
            _refuse(path, f"metadata field {name!r}", repr(value), reprlib.repr(metadata[name]))
    hashes = _json_object(metadata["sha256"], "metadata field 'sha256'", path)
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
