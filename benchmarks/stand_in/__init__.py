"""A stand-in for a CUDA GPU: what would run on one runs as Python on the CPU, to its end.

`install` makes torch find one H100. Tensors on it are CPU tensors behind `DeviceTensor`, which says that it is on
``cuda:0``; what a GPU would refuse is refused (mixed devices, a value read while a graph is captured, launches on CPU
tensors or on addresses that the kernel was not compiled for). ``torch.cuda.graph`` records ops and replays them.
Triton's launches are checked and recorded, not run: what they would have computed is filled in by the references. By
default nothing is compiled, and no time that is measured means anything.

`gpu_check.dry_run` runs every stage of the GPU check on it.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path


def install(
    launches: Path | None = None, compiling: bool = False, values: bool = True, extension: bool = False
) -> None:
    """Takes the place of CUDA in this process, for its whole life.

    Args:
        launches: a file to which every launch of a Triton kernel is appended as a line of JSON.
        compiling: Triton compiles what it would launch, into its cache.
        values: results of kernels are those of the references; without, they are not written at all.
        extension: the kernels of CUDA C++ that `stand_in.extension` knows run too; without, there are none.
    """
    from stand_in import cuda, device_tensor
    from stand_in import launches as triton_launches

    cuda.install()
    device_tensor.install()
    if extension:
        from stand_in.extension import AFTER_IMPORT

        triton_launches.after_import.update(AFTER_IMPORT)
    triton_launches.install(launches, compiling, values)


def from_environment() -> None:
    """`install`, launches to the file SLIMKERNELS_STAND_IN_LAUNCHES, for ``sitecustomize``.

    SLIMKERNELS_STAND_IN_COMPILING: kernels are compiled into Triton's cache, and what launches them.
    SLIMKERNELS_STAND_IN_EXTENSION: kernels of CUDA C++ too.
    SLIMKERNELS_STAND_IN_PLUGIN names a module that is imported afterwards: to break something on purpose.
    """
    name, compiling, extension = (
        os.environ.get(f"SLIMKERNELS_STAND_IN_{what}", "") for what in ("LAUNCHES", "COMPILING", "EXTENSION")
    )
    install(Path(name) if name else None, compiling=bool(compiling), extension=bool(extension))
    if compiling:
        from stand_in import launches

        launches.make_launchers()
    plugin = os.environ.get("SLIMKERNELS_STAND_IN_PLUGIN", "")
    if plugin:
        importlib.import_module(plugin)
