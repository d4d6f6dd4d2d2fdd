"""Loads slimkernels._C, whose OpenMP symbols come from the runtime torch has already loaded."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

# libgomp, and the two LLVM-family runtimes that export libgomp's interface as well; wheels add a hash to the name.
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.][^/]*$")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; empty where /proc does not exist."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {fields[5].rstrip("\n") for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    except OSError:
        return []
    return sorted(path for path in paths if _OPENMP.search(path))


def missing() -> dict[str, str]:
    """What the installation left out, and why: keys ``native``, ``avx2``, ``avx512``, ``openmp``, ``cuda``."""
    try:
        return dict(json.loads(Path(__file__).with_name("_build.json").read_text())["missing"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """``(module, None)``, or ``(None, reason)`` where the compiled kernels cannot be used. Never raises."""
    torch_folder = os.path.dirname(os.path.dirname(torch.__file__))
    # torch's own copy first: another package may have mapped a second runtime.
    runtimes = sorted(openmp_runtimes(), key=lambda path: not path.startswith(torch_folder + os.sep))
    try:
        if runtimes:
            # The runtime is in memory already (RTLD_NOLOAD); this makes its symbols visible to the import below.
            ctypes.CDLL(runtimes[0], mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL | os.RTLD_NOW)
        return importlib.import_module("slimkernels._C"), None
    except ModuleNotFoundError:
        return None, missing().get("native", "slimkernels._C was not built; reinstall with a C++ compiler (g++)")
    except (ImportError, OSError) as error:
        return None, " ".join(str(error).split())
