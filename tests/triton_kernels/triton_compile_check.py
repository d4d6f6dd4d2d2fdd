"""Compiles the Triton kernels for GPUs that need not be present, and reads what came out.

As a script it prints a Markdown table (`--all` for every kernel, `--summary` for one line, `--json` for machines);
test_triton_compile.py runs it in a process of its own, because a process with TRITON_INTERPRET=1 cannot compile.
The scripts for the gradients and for low rank share what is not about a convolution's forward. Any Triton will do:
`PYTHONPATH=<folder holding another Triton> python tests/triton_kernels/triton_compile_check.py --all`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slimkernels.kernels.problems import ConvProblem
from slimkernels.kernels.triton import bsr_conv2d as triton_bsr_conv2d
from slimkernels.kernels.triton import bsr_conv2d_images, bsr_conv2d_shared
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton.bsr_conv2d_config import configs
from slimkernels.kernels.triton.bsr_conv2d_geometry import Geometry
from slimkernels.kernels.triton.bsr_conv2d_index import rows_sharing_input
from slimkernels.kernels.triton.launcher import Launch
from slimkernels.kernels.triton.runtime import Limits, cdiv

# Shared memory a block may use (bytes) and processors of A100, H100/H200 and B200.
LIMITS = {80: (163 * 1024, 108), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}
DEVICES = {arch: Limits(*limits, arch >= 90) for arch, limits in LIMITS.items()}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Named(Protocol):
    """A target of any of the scripts, which is also a dataclass."""

    @property
    def name(self) -> str: ...

    @property
    def tensor_cores(self) -> bool: ...


@dataclass(frozen=True)
class Target:
    """One kernel to compile. shape: the block shape of a convolution, or (rank,) of a low-rank linear layer.

    choice: which of the configurations listed for the convolution; None: the launcher's default.
    """

    arch: int
    dtype: str
    shape: tuple[int, ...]
    precision: str = "ieee"
    epilogue: str = "relu"
    m_total: int = 65536
    border: bool = True
    index_64: bool = False
    c_in: int = 256
    variant: str = "pixels_on_m"
    choice: int | None = None
    taps: int = 3

    @property
    def name(self) -> str:
        kind = f"conv {self.shape[0]}x{self.shape[1]}" if len(self.shape) == 2 else f"low_rank r={self.shape[0]}"
        extras = [self.precision] if self.dtype == "fp32" else []
        extras += [] if self.variant == "pixels_on_m" else [self.variant]
        extras += [] if self.epilogue == "relu" else [self.epilogue]
        extras += [] if self.border else ["no border"]
        extras += [] if self.taps == 3 else [f"{self.taps}x{self.taps} taps"]
        extras += ["64-bit"] if self.index_64 else []
        extras += [] if self.c_in == 256 else [f"c_in={self.c_in}"]
        extras += [] if self.m_total == 65536 else [f"M={self.m_total}"]
        return f"sm_{self.arch} {self.dtype} {', '.join([kind, *extras])}"

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32" or self.precision == "tf32"

    @property
    def problem(self) -> ConvProblem:
        """A layer of 256 output channels and M pixels in 2x2 or 32x32 images, at 87.5% sparsity."""
        side = 32 if self.m_total >= 4096 else 2
        c_out, pad = max(256, self.shape[0]), self.taps // 2 if self.border else 0
        side += 0 if self.border else self.taps - 1
        blocks = cdiv(c_out * self.c_in * self.taps**2, 8 * self.shape[0] * self.shape[1])
        pixels = side - 2 * (self.taps // 2) + 2 * pad
        return ConvProblem(
            self.m_total // pixels**2, self.c_in, side, side, c_out, self.taps, self.taps, (1, 1), (pad, pad), (1, 1),
            self.shape, blocks, DTYPES[self.dtype], "cuda", self.epilogue,
        )  # fmt: skip

    def listed(self) -> list[dict[str, int]]:
        """The configurations that the tuner would try."""
        shared_memory, processors = LIMITS[self.arch]
        return configs(
            self.problem, self.variant, tensor_cores=self.tensor_cores, shared_memory=shared_memory,
            processors=processors,
        )  # fmt: skip


def quick() -> list[Target]:
    """The kernels of the default test run: a tall block on every GPU, every variant and dtype, low rank."""
    return [
        Target(80, "bf16", (128, 16)),
        Target(90, "bf16", (128, 16), epilogue="relu_maxpool2", index_64=True, c_in=200),
        Target(100, "fp16", (128, 16), variant="taps_together"),
        Target(90, "bf16", (64, 16), variant="weights_on_m", m_total=16),
        Target(80, "bf16", (32, 32), variant="shared_input"),
        *(Target(arch, "bf16", (128, 16), variant="images_on_m") for arch in LIMITS),
        Target(90, "bf16", (16, 1)),
        Target(80, "fp32", (64, 16), precision="tf32"),
        Target(90, "fp32", (64, 16)),
        Target(90, "bf16", (64,)),
        Target(80, "fp32", (256,)),
    ]


SHAPES = (
    (1, 1), (8, 1), (16, 1), (16, 16), (24, 24), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64), (128, 16),
    (128, 32), (128, 64), (128, 128), (256, 16),
)  # fmt: skip


def everything() -> list[Target]:
    """The default configuration of every block shape, rank, dtype, variant and compile-time branch, on every GPU."""
    targets = []
    for arch in LIMITS:
        targets += [Target(arch, "bf16", shape) for shape in SHAPES]
        targets += [Target(arch, "fp16", shape) for shape in ((64, 16), (128, 16))]
        targets += [Target(arch, "fp32", shape) for shape in ((1, 1), (16, 1), (16, 16), (64, 16), (128, 128))]
        targets += [Target(arch, "fp32", shape, precision="tf32") for shape in ((16, 1), (16, 16), (128, 16))]
        targets += [Target(arch, "bf16", (128, 16), epilogue=e) for e in ("none", "relu_maxpool2")]
        targets += [Target(arch, "bf16", (128, 16), border=False), Target(arch, "bf16", (128, 16), index_64=True)]
        targets += [Target(arch, "bf16", (128, 16), epilogue="relu_maxpool2", index_64=True, c_in=200)]
        targets += [Target(arch, "bf16", (128, 16), m_total=64), Target(arch, "bf16", (24, 24), c_in=48)]
        targets += [Target(arch, "bf16", (128, 16), taps=7)]
        for shape in ((16, 1), (32, 32), (64, 16), (128, 16), (256, 16)):
            targets += [Target(arch, "bf16", shape, variant="weights_on_m", m_total=m) for m in (16, 64, 65536)]
        targets += [Target(arch, "bf16", shape, variant="taps_together") for shape in ((16, 1), (64, 16), (128, 16))]
        targets += [Target(arch, "bf16", s, variant="shared_input") for s in ((16, 1), (16, 16), (32, 32), (64, 16))]
        targets += [Target(arch, "bf16", s, variant="images_on_m") for s in ((16, 16), (32, 32), (64, 64), (256, 16))]
        targets += [Target(arch, "fp16", (64, 16), variant="images_on_m", m_total=64)]
        targets += [Target(arch, "bf16", (128, 16), variant="images_on_m", index_64=True, epilogue="none")]
        targets += [Target(arch, "bf16", (128, 32), variant="images_on_m", c_in=240)]
        for variant in ("weights_on_m", "images_on_m", "taps_together", "shared_input"):
            targets += [Target(arch, "fp32", (64, 16), variant=variant, precision=p) for p in ("ieee", "tf32")]
        targets += [Target(arch, "bf16", (rank,)) for rank in (16, 64, 128, 256, 512)]
        targets += [Target(arch, "fp32", (rank,)) for rank in (64, 256, 512)]
        targets += [Target(arch, "fp32", (256,), precision="tf32"), Target(arch, "bf16", (64,), m_total=32)]
    return targets


def listed(arch: int) -> list[Target]:
    """Every other configuration that the tuner may try on a GPU, one for each compiled kernel that differs.

    Block shapes with the same tile and the same slice width compile to the same code but for constants: the tall
    shapes stand for the squares of their height.
    """
    targets = []
    shapes = ((16, 1), (16, 16), (32, 32), (64, 16), (128, 16))
    bases = [Target(arch, "bf16", shape, m_total=m) for shape in shapes for m in (64, 65536)]
    bases += [Target(arch, "fp32", shape, precision="tf32") for shape in ((32, 32), (128, 16))]
    bases += [Target(arch, "fp32", (64, 16)), Target(arch, "bf16", (128, 16), epilogue="relu_maxpool2")]
    bases += [Target(arch, "bf16", (s, 16), variant="weights_on_m", m_total=m) for s in (64, 128) for m in (64, 65536)]
    bases += [
        Target(arch, "bf16", (64, 16), variant="shared_input"),
        Target(arch, "bf16", (32, 32), variant="shared_input"),
    ]
    bases += [Target(arch, "bf16", (128, 16), variant="taps_together")]
    bases += [Target(arch, "bf16", s, variant="images_on_m") for s in ((16, 16), (32, 32), (64, 16), (128, 16))]
    bases += [Target(arch, "fp32", (128, 16), variant="images_on_m", precision="tf32")]
    for base in bases:
        seen = set()
        for i, config in enumerate(base.listed()):
            key = tuple(sorted((k, v) for k, v in config.items() if k not in ("GROUP_M", "SPLITS")))
            if key not in seen and i > 0:
                targets.append(replace(base, choice=i))
            seen.add(key)
    return targets


def conv_launch(target: Target) -> tuple[Launch, dict[str, int]]:
    """The launch, as the op makes it, of a convolution, and its configuration."""
    problem, limits = target.problem, DEVICES[target.arch]
    config = target.listed()[target.choice or 0]
    if target.index_64:
        config = {**config, "INDEX_64": 1}
    geometry = Geometry(
        (problem.n, problem.c_in, problem.h, problem.w), (problem.c_out, problem.c_in, problem.r, problem.s),
        problem.block_shape, problem.stride, problem.padding, problem.dilation, problem.epilogue, target.precision,
        problem.dtype, problem.nnz_blocks, True,
    )  # fmt: skip
    items = tuple(config.items())
    if target.variant == "shared_input":
        groups = cdiv(geometry.block_rows, rows_sharing_input(problem.block_shape[0]))
        return bsr_conv2d_shared._plan(geometry, groups, items, limits), config
    if target.variant == "images_on_m":
        return bsr_conv2d_images._plan(geometry, items, limits), config
    variants = target.variant == "taps_together", target.variant == "weights_on_m"
    return triton_bsr_conv2d._plan(geometry, True, *variants, items, limits).forward, config


def compile_launch(launch: Launch, pointers: list[str], arch: int) -> Any:
    """Triton's compiled kernel of a launch whose pointers have these types and are aligned."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    hints: dict[tuple[int, ...], Any] = {}
    whatever = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    for i, name in enumerate(launch.kernel.arg_names):
        if i < len(pointers):
            signature[name], hints[(i,)] = pointers[i], [["tt.divisibility", 16]]
        elif i < len(pointers) + len(launch.integers):
            value = launch.integers[i - len(pointers)]
            signature[name] = "i32" if value < 2**31 else "i64"
            if name in whatever:
                continue
            if value == 1:
                signature[name] = "constexpr"
                constants[name] = 1
            elif value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def _conv(target: Target) -> tuple[Any, dict[str, int]]:
    launch, config = conv_launch(target)
    pointer = f"*{target.dtype}"
    y = "*fp32" if launch.constants.get("SPLITS", 1) > 1 else pointer
    index = ["*i32"] * (3 if target.variant == "images_on_m" else 2)
    return compile_launch(launch, [pointer, pointer, *index, pointer, y], target.arch), config


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    pointers: Mapping[str, str],
    aligned: Collection[str],
    config: Mapping[str, int],
    arch: int,
) -> Any:
    """Triton's compiled kernel; arguments are these constants, these pointers, else 32-bit integers.

    aligned: the arguments that a launch would find divisible by 16.
    """
    assert constants.keys() >= {kernel.arg_names[i] for i in kernel.constexprs}, kernel
    signature: dict[str, str] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in aligned and name not in constants:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=hints)
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _low_rank(target: Target) -> tuple[Any, dict[str, int]]:
    shared_memory, processors = LIMITS[target.arch]
    config = triton_low_rank_linear.default_config(
        target.m_total,
        1024,
        target.shape[0],
        DTYPES[target.dtype],
        tensor_cores=target.tensor_cores,
        shared_memory=shared_memory,
        processors=processors,
    )
    constants = {
        "ONE_TILE": target.shape[0] <= config["RANK"],
        "EVEN_K": True,
        "ALIGN": 16,
        "HAS_BIAS": True,
        "RELU": target.epilogue == "relu",
        "STORE_INNER": False,
        "INDEX_64": target.index_64,
        "PRECISION": target.precision,
        **{name: config[name] for name in ("RANK", "BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }
    pointers = dict.fromkeys(("x_ptr", "u_ptr", "v_ptr", "bias_ptr", "y_ptr", "h_ptr"), f"*{target.dtype}")
    aligned = {*pointers, "in_features", "out_features", "rank"}
    kernel = triton_low_rank_linear.low_rank_linear_fwd_kernel
    return compile_kernel(kernel, constants, pointers, aligned, config, target.arch), config


def compile_target(target: Target) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel and its tile constants, with the argument hints that a launch derives."""
    return _conv(target) if len(target.shape) == 2 else _low_rank(target)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the kernel in a cubin, from the cuobjdump in Triton's wheel; spills are stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def measure(target: Target) -> dict[str, Any]:
    """Compiles one target; what the artefacts say, as plain data."""
    return artefacts(target, *compile_target(target))


def artefacts(target: Named, kernel: Any, config: Mapping[str, int]) -> dict[str, Any]:
    """What a compiled kernel's artefacts say."""
    usage = resource_usage(kernel.asm["cubin"])
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    loop = ttgir.partition("scf.for")[2].partition("scf.yield")[0]
    # Pipelined tiles are allocated once, outside the loop, with the number of buffers as their leading dimension.
    buffers = [int(n) for n in re.findall(r"local_alloc[^\n]*!ttg\.memdesc<(\d+)x\d+x\d+x(?:f32|f16|bf16)", ttgir)]
    return {
        "target": {**asdict(target), "name": target.name, "tensor_cores": target.tensor_cores},
        "config": config,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": kernel.metadata.shared + usage["SHARED"],
        "instructions": [name for name in TENSOR_CORE.values() if name in ptx],
        "fma": "fma.rn.f32" in ptx,
        "buffers": buffers,
        "copy_bytes": sorted({int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.[^;]*\], (0x\w+|\d+)", ptx)}),
        "loop_layout_conversions": loop.count("ttg.convert_layout"),
    }


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| kernel | M x N x K tile | warps, stages | registers | KB shared | spilled | instruction | buffers | copy |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        c = row["config"]
        instruction = ", ".join(row["instructions"]) or ("fma.rn.f32" if row["fma"] else "-")
        tile = "x".join(str(c[side]) for side in ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K") if side in c)
        tile = f"{tile} | {c['num_warps']}, {c['num_stages']}"
        memory = f"{row['shared'] / 1024:.0f} | {row['stack'] + row['local']}"
        yield (
            f"| {row['target']['name']} | {tile} | {row['registers']} | {memory} | {instruction} "
            f"| {'/'.join(map(str, row['buffers'])) or '-'} | {', '.join(f'{n} B' for n in row['copy_bytes']) or '-'} |"
        )


def summary(rows: list[dict[str, Any]]) -> str:
    spills = [(row["target"]["name"], row["stack"] + row["local"]) for row in rows if row["stack"] + row["local"]]
    named = f" ({'; '.join(f'{name}: {count} bytes' for name, count in spills)})" if spills else ""
    worst = max(rows, key=lambda row: row["registers"])
    return (
        f"Triton {triton.__version__}: {len(rows)} kernels, {len(spills)} spill{named}, "
        f"at most {worst['registers']} registers a thread ({worst['target']['name']})."
    )


def main(
    description: str,
    measure: Callable[[Any], dict[str, Any]],
    quick: Callable[[], list[Any]],
    everything: Callable[[], list[Any]],
    listed: Callable[[int], list[Any]] | None = None,
) -> None:
    """The command line of a script; the callables are those of its own module."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--all", action="store_true", help="every kernel, not only those of the default test run")
    if listed is not None:
        text = "every configuration the tuner may try on 80, 90 or 100"
        parser.add_argument("--listed", type=int, metavar="ARCH", help=text)
    parser.add_argument("--summary", action="store_true", help="one line instead of a Markdown table")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a Markdown table")
    arguments = parser.parse_args()
    if listed is not None and arguments.listed:
        targets = listed(arguments.listed)
    else:
        targets = everything() if arguments.all else quick()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = list(pool.map(measure, targets))
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    else:
        print(summary(rows) if arguments.summary else "\n".join(markdown(rows)))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, quick, everything, listed)
