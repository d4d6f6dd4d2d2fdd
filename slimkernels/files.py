"""Files that are either complete or absent: written to a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
