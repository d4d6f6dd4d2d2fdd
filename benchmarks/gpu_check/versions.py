"""What runs here: the device and its clocks, versions of all that was compiled, and a Triton cache made beforehand.

Such a cache (TRITON_CACHE_TARBALL, else ``.gpu-cache/triton-cache.tar.*``) is unpacked into TRITON_CACHE_DIR; it hits
where Triton, the minor version of Python and that folder are those it was made with. A miss costs nothing but time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_check import options, rows
from slimkernels import timing

_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"


def first_line(*command: str) -> str | None:
    """The line of a tool's answer that names its version, or its first; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=8).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in answer if "release" in line or "Version" in line), (answer or [""])[0])


def tarball() -> Path | None:
    """The Triton cache to unpack, if there is one."""
    named = os.environ.get("TRITON_CACHE_TARBALL", "")
    if named:
        return Path(named)
    return next(iter(sorted(Path(".gpu-cache").glob("triton-cache.tar.*"))), None)


def unpack(archive: Path, folder: Path) -> int:
    """Unpacks a Triton cache; the number of compiled kernels in the folder afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return sum(1 for _ in folder.rglob("*.cubin"))


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = options.parser(__doc__).parse_args(arguments)
    rows.append(parsed.rows, {"environment": timing.environment()})
    found: dict[str, Any] = {"suite": "versions", "match": True, "name": "versions"}
    archive, folder = tarball(), os.environ.get("TRITON_CACHE_DIR", "")
    if archive is not None and folder:
        begun = time.monotonic()
        try:
            found["cached_kernels"] = unpack(archive, Path(folder))
        except (OSError, tarfile.TarError) as error:
            found["cached_kernels"] = f"{type(error).__name__}: {error}"
        found["unpack_s"] = round(time.monotonic() - begun, 1)
    found["nvidia_smi"] = first_line("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    found["nvcc"] = first_line("nvcc", "--version")
    found["ncu"] = first_line("ncu", "--version")
    found["compute_sanitizer"] = first_line("compute-sanitizer", "--version")
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"processors": p.multi_processor_count, "l2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory,
                  "capability": list(torch.cuda.get_device_capability())}  # fmt: skip
    rows.append(parsed.rows, found)
    print("\n".join(f"{k}: {v}" for k, v in found.items() if k not in ("suite", "match", "name")))
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("versions: torch sees no CUDA device")


if __name__ == "__main__":
    main()
