"""A stand-in for a CUDA GPU: what would run on one runs as Python on the CPU, to its end.

`install` makes torch find one H100. Tensors on it are CPU tensors behind `DeviceTensor`, whose device is ``cuda:0`` to
torch's C++ too; ops that a GPU would refuse are refused (mixed devices, a CPU generator, a read of a value while a graph
is captured). ``torch.cuda.graph`` records ops and replays them. Triton's launches are checked and recorded, not run:
the ops of slimkernels run their host code up to the launch, and then take the reference's result. Nothing is compiled,
and no time that is measured means anything.

`gpu_check.dry_run` runs every stage of the GPU check on it.
"""

from __future__ import annotations

import os
from pathlib import Path


def install(launches: Path | None = None, compiling: bool = False, values: bool = True) -> None:
    """Takes the place of CUDA in this process, for its whole life.

    Args:
        launches: a file to which every launch of a Triton kernel is appended as a line of JSON.
        compiling: Triton compiles what it would launch, into its cache.
        values: results of kernels are those of the references; without, they are not written at all.
    """
    from stand_in import cuda, device_tensor, launches as triton_launches

    cuda.install()
    device_tensor.install()
    triton_launches.install(launches, compiling, values)


def from_environment() -> None:
    """`install`, the file named by SLIMKERNELS_STAND_IN_LAUNCHES: for ``sitecustomize``."""
    name = os.environ.get("SLIMKERNELS_STAND_IN_LAUNCHES", "")
    install(Path(name) if name else None)
