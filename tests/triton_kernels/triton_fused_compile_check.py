"""Compiles the Triton kernel of `fused_conv2d` for GPUs that need not be present, as triton_compile_check.py does.

test_triton_fused.py runs it in a process of its own, because a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sass
from triton_compile_check import DEVICES, DTYPES, LIMITS, artefacts, compile_launch, main

from slimkernels.kernels.triton.fused_conv2d import plan
from slimkernels.kernels.triton.fused_conv2d_config import Geometry

# (C_in, kernel, stride, padding, image, batch) of first layers.
LAYERS = {
    "vgg": (3, (3, 3), (1, 1), (1, 1), 32, 1024),
    "stem": (3, (7, 7), (2, 2), (3, 3), 224, 64),
    "grey": (1, (3, 3), (1, 1), (0, 0), 28, 512),
    "deepest": (28, (3, 3), (1, 1), (1, 1), 32, 128),
}


@dataclass(frozen=True)
class Target:
    """One kernel to compile."""

    arch: int
    dtype: str = "bf16"
    layer: str = "vgg"
    epilogue: str = "relu"
    precision: str = "ieee"
    contiguous: bool = False
    index_64: bool = False
    bias_last: bool = False

    @property
    def name(self) -> str:
        extras = [self.precision] if self.dtype == "fp32" else []
        extras += ["64-bit"] if self.index_64 else []
        extras += ["contiguous"] if self.contiguous else []
        extras += ["bias last"] if self.bias_last else []
        return f"sm_{self.arch} {self.dtype} {', '.join([f'fused {self.layer} {self.epilogue}', *extras])}"

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32" or self.precision == "tf32"


def quick() -> list[Target]:
    """The kernels of the default test run."""
    return [
        *(Target(arch) for arch in LIMITS),
        Target(90, bias_last=True),
        Target(90, epilogue="relu_maxpool2"),
        Target(90, layer="stem", contiguous=True),
    ]


def everything() -> list[Target]:
    """Every kind of kernel, dtype and compile-time branch, on every GPU."""
    targets = []
    for arch in LIMITS:
        targets.append(Target(arch, layer="deepest"))  # ten seconds and more, for its many loads
        for layer in ("vgg", "stem", "grey"):
            targets += [Target(arch, dtype, layer, contiguous=c) for dtype in ("bf16", "fp16") for c in (False, True)]
            targets += [Target(arch, "fp32", layer, precision=precision) for precision in ("ieee", "tf32")]
            targets += [Target(arch, dtype, layer, "relu_maxpool2") for dtype in ("bf16", "fp32")]
            targets += [Target(arch, layer=layer, epilogue="none", index_64=True)]
            targets += [Target(arch, layer=layer, bias_last=True)]
    return targets


def compile_target(target: Target) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel and its tile constants, as a launch on the device would compile it."""
    c_in, kernel, stride, padding, image, batch = LAYERS[target.layer]
    geometry = Geometry(
        (batch, c_in, image, image), (64, c_in, *kernel), stride, padding, (1, 1), target.epilogue, target.precision,
        DTYPES[target.dtype], not target.contiguous, True,
    )  # fmt: skip
    changes = {"INDEX_64": 1} if target.index_64 else {}
    if target.bias_last:
        changes |= {"BIAS_LAST": 1, "PROGRAMS": 4, "maxnreg": 128}
    launch, config = plan(geometry, changes, DEVICES[target.arch])
    return compile_launch(launch, [f"*{target.dtype}"] * 4, target.arch), config


def measure(target: Target) -> dict[str, Any]:
    """Compiles one target; what the artefacts say, as plain data, the machine code counted."""
    kernel, config = compile_target(target)
    loop, outside = sass.disassemble(kernel.asm["cubin"]).kinds()
    names: dict[str, int] = {}
    for instruction in sass.disassemble(kernel.asm["cubin"]).loop:
        names[instruction.name] = names.get(instruction.name, 0) + 1
    counts = {"loop": loop.total(), "outside": outside.total(), "names": names}
    return {**artefacts(target, kernel, config), "sass": counts}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, quick, everything)
