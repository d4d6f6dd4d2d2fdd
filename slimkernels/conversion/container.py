"""The ``.slim.safetensors`` file: safetensors whose metadata holds the plan and a SHA-256 of everything else.

Metadata fields: ``format`` (``slimkernels``), ``format_version``, ``plan`` (`ModelPlan.to_json`), ``extra_state``
(JSON: what modules keep besides tensors), ``sha256`` (JSON: of ``plan``, of ``extra_state`` and of every tensor as
``tensor:<name>``, over its dtype, shape and bytes). No pickle anywhere. Reading checks all of it before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from slimkernels.conversion.plan import ModelPlan
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
    """Reads and checks a whole file.

    Raises:
        ValueError: the file is damaged or of another kind; the message names the field at fault. OSError: no such file.
    """
    data = Path(path).read_bytes()
    header, start = _header(data, str(path))
    metadata, plan = _metadata(header, str(path))
    hashes = _json_object(metadata["sha256"], "metadata field 'sha256'", str(path))
    tensors = {}
    position = 0
    spans = sorted(
        ((name, *_entry(name, entry, str(path))) for name, entry in header.items() if name != "__metadata__"),
        key=lambda span: (span[3], span[4]),
    )
    for name, dtype, shape, begin, end in spans:
        if begin != position:
            _refuse(path, f"tensor {name!r}: data_offsets", f"begin at {position}", begin)
        position = end
        if start + end > len(data):
            _refuse(path, f"tensor {name!r}: data", f"{end - begin} bytes", f"{max(len(data) - start - begin, 0)}")
        raw = bytearray(data[start + begin : start + end])
        tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = tensor.reshape(shape)
    if start + position != len(data):
        _refuse(path, "file size", f"{start + position} bytes", len(data))
    for name, tensor in tensors.items():
        _check_hash(path, f"tensor {name!r}", hashes.get(f"tensor:{name}"), _tensor_hash(tensor))
    missing = sorted(set(hashes) - {"plan", "extra_state"} - {f"tensor:{name}" for name in tensors})
    if missing:
        _refuse(path, "metadata field 'sha256'", "a tensor for every entry", f"none for {missing[0]!r}")
    extra = _json_object(metadata["extra_state"], "metadata field 'extra_state'", str(path))
    return Contents(plan, tensors, extra, len(data))


def read_plan(path: str | os.PathLike[str]) -> tuple[ModelPlan, int]:
    """The plan of a file and the file's size; tensors are not read. Raises like `read`."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        data = head + file.read(min(length, _MAX_HEADER))
    header, _ = _header(data, str(path))
    return _metadata(header, str(path))[1], size


def _refuse(path: Any, field: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"load: {path}: {field}: expected {expected}, got {got}")


def _header(data: bytes, path: str) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the tensors' bytes begin."""
    if len(data) < 8:
        _refuse(path, "header length", "8 bytes", f"a file of {len(data)}")
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
        _refuse(path, "header length", f"2 to {min(len(data) - 8, _MAX_HEADER)}", length)
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, "header", "UTF-8", error)
    if not text.rstrip(" ").endswith("}"):
        _refuse(path, "header", "a JSON object padded with spaces", repr(text[-16:]))
    return _json_object(text, "header", path), 8 + length


def _json_object(text: Any, field: str, path: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"load: {path}: {field}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        _refuse(path, field, "a JSON object", type(value).__name__)
    return value


def _metadata(header: dict[str, Any], path: str) -> tuple[dict[str, str], ModelPlan]:
    """The checked metadata fields and the plan."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict):
        _refuse(path, "header field '__metadata__'", "an object", type(metadata).__name__)
    for name in _FIELDS:
        if not isinstance(metadata.get(name), str):
            _refuse(path, f"metadata field {name!r}", "a string", type(metadata.get(name)).__name__)
    unknown = sorted(set(metadata) - set(_FIELDS))
    if unknown:
        _refuse(path, "metadata", f"the fields {', '.join(_FIELDS)}", repr(unknown[0]))
    for name, value in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if metadata[name] != value:
            _refuse(path, f"metadata field {name!r}", repr(value), repr(metadata[name]))
    hashes = _json_object(metadata["sha256"], "metadata field 'sha256'", path)
    for name in ("plan", "extra_state"):
        _check_hash(path, f"metadata field {name!r}", hashes.get(name), _text_hash(metadata[name]))
    try:
        return metadata, ModelPlan.from_json(metadata["plan"])
    except ValueError as error:
        raise ValueError(f"load: {path}: metadata field 'plan': {error}") from error


def _check_hash(path: Any, field: str, expected: Any, got: str) -> None:
    if expected != got:
        _refuse(path, field, f"SHA-256 {expected}", got)


def _entry(name: str, entry: Any, path: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape and byte range of a tensor's header entry."""
    field = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, field, "dtype, shape and data_offsets", entry)
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"{field}: dtype", f"one of {', '.join(_DTYPES)}", entry["dtype"])
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or any(type(v) is not int or v < 0 for v in entry[key]):
            _refuse(path, f"{field}: {key}", "non-negative integers", entry[key])
    if len(entry["data_offsets"]) != 2:
        _refuse(path, f"{field}: data_offsets", "2 numbers", entry["data_offsets"])
    expected = math.prod(entry["shape"]) * dtype.itemsize
    begin, end = entry["data_offsets"]
    if end - begin != expected:
        _refuse(path, f"{field}: data_offsets", f"{expected} bytes", end - begin)
    return dtype, tuple(entry["shape"]), begin, end


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{_NAMES[tensor.dtype]}{tuple(tensor.shape)}".encode())
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    digest.update(raw.numpy().data)
    return digest.hexdigest()
