"""The environment variables of slimkernels: every one of them is read here and nowhere else.

| variable | values | meaning |
| --- | --- | --- |
| ``SLIMKERNELS_BACKEND`` | auto, reference, cpu, triton, cuda | force where ``kernel="auto"`` runs |
| ``SLIMKERNELS_ISA`` | scalar, avx2, avx512 | highest CPU instruction set that ``auto`` may choose |
| ``SLIMKERNELS_CACHE_DIR`` | a folder | where tuned tables of this machine are kept |
| ``TRITON_INTERPRET`` | 0, 1 | Triton's own switch: run Triton kernels on the CPU |
| ``RANK``, ``LOCAL_RANK`` | set by torchrun | this process's number, in all and on its machine |

``SLIMKERNELS_CUDA`` (auto, 1, 0) is read by ``setup.py`` while building.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ISAS = ("scalar", "avx2", "avx512")


def _choice(name: str, default: str, valid: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
    return value


def backend() -> str:
    """The forced backend, or ``"auto"``. Raises ValueError on an unknown value."""
    return _choice("SLIMKERNELS_BACKEND", "auto", BACKENDS)


def isa_cap() -> str | None:
    """Highest instruction set that ``auto`` may choose; None without a cap. Raises ValueError on an unknown value."""
    if not os.environ.get("SLIMKERNELS_ISA", "").strip():
        return None
    return _choice("SLIMKERNELS_ISA", "avx512", ISAS)


def triton_interpret() -> bool:
    """Whether Triton kernels run through Triton's interpreter on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").strip() in ("1", "true", "True")


def cache_dir() -> Path:
    """Folder of files that slimkernels writes for this user (nothing is created here)."""
    explicit = os.environ.get("SLIMKERNELS_CACHE_DIR", "").strip()
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "slimkernels"


def rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int | None:
    """This process's number on its machine under torchrun; None without it."""
    value = os.environ.get("LOCAL_RANK")
    return None if value is None else int(value)


@contextmanager
def fixed_cublas_workspace() -> Iterator[None]:
    """``CUBLAS_WORKSPACE_CONFIG`` set inside the block, unless it is: cuBLAS is deterministic with it alone."""
    if "CUBLAS_WORKSPACE_CONFIG" in os.environ:
        yield
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    try:
        yield
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
