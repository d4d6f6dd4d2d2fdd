"""Files that are either complete or absent: written to a temporary name, flushed to the disk, then renamed.

And files that carry a SHA-256 of themselves: zip archives, torch's among them, and JSON objects.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An archive's comment is its last part, behind a record that ends with the comment's length.
_SEAL = b"slimkernels sha256 "
_DIGEST = 64
_CHUNK = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; leaving the block without an exception renames it to ``path``.

    A process killed at any moment leaves the previous ``path`` untouched. The temporary name is fixed
    (``.<name>.tmp<suffix>``), so what a killed process left is overwritten by the next one.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp{target.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask grants; safetensors would leave the file to its owner alone
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lives in the folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_obstacle(path: str | os.PathLike[str]) -> OSError | None:
    """Why a file cannot be written, None where it can; missing folders are made, and nothing else is left of the trial.

    For asking before the work whose result the file is to hold.
    """
    path = Path(path)
    trial = path.with_name(f".{path.name}.trial")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        return error
    return None


def file_sha256(path: str | os.PathLike[str], size: int | None = None) -> str:
    """SHA-256 of a file's bytes, or of its first ``size``."""
    digest, left = hashlib.sha256(), size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK if left is None else min(left, _CHUNK)):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.hexdigest()


def seal(path: str | os.PathLike[str]) -> None:
    """Writes a SHA-256 of a zip archive, such as `torch.save` makes, into the archive's comment; it stays a zip file.

    Raises:
        ValueError: no archive, or one that has a comment.
    """
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - 22, 0))
        end = file.read()
        if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
            raise ValueError(f"seal: expected a zip archive without a comment, got {path}")
        file.seek(size - 2)
        file.write((len(_SEAL) + _DIGEST).to_bytes(2, "little") + _SEAL)
        file.flush()
        file.write(file_sha256(path).encode())


def seal_obstacle(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not what `seal` left; None where every byte of it is.

    It tells accidents apart, a bad disk or a copy cut short, not forgeries: whoever can write the file can seal it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(size - _DIGEST - len(_SEAL), 0))
        tail = file.read()
    if size < len(_SEAL) + _DIGEST or not tail.startswith(_SEAL):
        return "it does not end with its SHA-256, so it was cut short or written by something else"
    found, expected = file_sha256(path, size - _DIGEST), tail[len(_SEAL) :].decode("latin-1")
    return None if found == expected else f"its bytes have the SHA-256 {found}, it says {expected!r}, so it is damaged"


def sealed_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The plain JSON form of an object with a SHA-256 of its values under ``sha256``."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return {**plain, "sha256": _json_digest(plain)}


def unsealed_json(text: str | bytes) -> dict[str, Any]:
    """The object that `sealed_json` made, from its JSON text.

    Raises:
        ValueError: not JSON, or values that are not those of their SHA-256.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or value.pop("sha256", None) != _json_digest(value):
        raise ValueError("its values are not those of its SHA-256, so it is damaged or written by something else")
    return value


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
