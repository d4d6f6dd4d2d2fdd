"""Compiles the Triton kernels for GPUs that need not be present, and reads what came out.

As a script it prints a Markdown table (`--all` for every kernel, `--json` for machines); tests/test_triton_compile.py
runs it in a process of its own, because a process with TRITON_INTERPRET=1 cannot compile. Any Triton will do:
`PYTHONPATH=<folder holding another Triton> python tests/triton_compile_check.py --all`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slimkernels.kernels.triton import bsr_conv2d as triton_bsr_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton.runtime import cdiv, power_of_2_divisor

# Shared memory a block may use (bytes) and processors of A100, H100/H200 and B200.
LIMITS = {80: (163 * 1024, 108), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """One kernel to compile. shape: the block shape of a convolution, or (rank,) of a low-rank linear layer."""

    arch: int
    dtype: str
    shape: tuple[int, ...]
    precision: str = "ieee"
    epilogue: str = "relu"
    m_total: int = 65536
    border: bool = True
    index_64: bool = False
    c_in: int = 256

    @property
    def name(self) -> str:
        kind = f"conv {self.shape[0]}x{self.shape[1]}" if len(self.shape) == 2 else f"low_rank r={self.shape[0]}"
        extras = [self.precision] if self.dtype == "fp32" else []
        extras += [] if self.epilogue == "relu" else [self.epilogue]
        extras += [] if self.border else ["no border"]
        extras += ["64-bit"] if self.index_64 else []
        extras += [] if self.c_in == 256 else [f"c_in={self.c_in}"]
        extras += [] if self.m_total == 65536 else [f"M={self.m_total}"]
        return f"sm_{self.arch} {self.dtype} {', '.join([kind, *extras])}"

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32" or self.precision == "tf32"


def quick() -> list[Target]:
    """The kernels of the default test run: both tall blocks and the low-rank layer on every architecture."""
    targets = []
    for arch in LIMITS:
        targets += [Target(arch, "bf16", (128, 16)), Target(arch, "fp16", (64, 16)), Target(arch, "bf16", (64,))]
    return [
        *targets,
        Target(90, "bf16", (16, 1)),
        Target(90, "fp32", (64, 16)),
        Target(80, "fp32", (128, 16), precision="tf32"),
        Target(80, "fp32", (256,)),
        Target(90, "bf16", (128, 16), epilogue="relu_maxpool2", index_64=True, c_in=200),
    ]


def everything() -> list[Target]:
    """Every block shape, rank, dtype and compile-time branch on every architecture."""
    targets = []
    for arch in LIMITS:
        shapes = [(1, 1), (8, 1), (16, 1), (16, 16), (32, 32), (64, 16), (64, 64), (128, 16), (128, 32), (128, 128)]
        targets += [Target(arch, "bf16", shape) for shape in shapes]
        targets += [Target(arch, "fp16", shape) for shape in ((64, 16), (128, 16))]
        targets += [Target(arch, "fp32", shape) for shape in ((1, 1), (16, 1), (16, 16), (64, 16), (128, 128))]
        targets += [Target(arch, "fp32", shape, precision="tf32") for shape in ((16, 1), (16, 16), (128, 16))]
        targets += [Target(arch, "bf16", (128, 16), epilogue=e) for e in ("none", "relu_maxpool2")]
        targets += [Target(arch, "bf16", (128, 16), border=False), Target(arch, "bf16", (128, 16), index_64=True)]
        targets += [Target(arch, "bf16", (128, 16), epilogue="relu_maxpool2", index_64=True, c_in=200)]
        targets += [Target(arch, "bf16", (128, 16), m_total=64), Target(arch, "bf16", (24, 24), c_in=48)]
        targets += [Target(arch, "bf16", (rank,)) for rank in (16, 64, 128, 256, 512)]
        targets += [Target(arch, "fp32", (rank,)) for rank in (64, 256, 512)]
        targets += [Target(arch, "fp32", (256,), precision="tf32"), Target(arch, "bf16", (64,), m_total=32)]
    return targets


def _conv(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_out, block_in = target.shape
    shared_memory, processors = LIMITS[target.arch]
    config = triton_bsr_conv2d.default_config(
        target.m_total,
        cdiv(256, block_out),
        (block_out, block_in),
        target.c_in,
        DTYPES[target.dtype],
        tensor_cores=target.tensor_cores,
        shared_memory=shared_memory,
        processors=processors,
    )
    pad = 1 if target.border else 0
    constants = {
        **dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w"), 1),
        **dict.fromkeys(("pad_h", "pad_w"), pad),
        "S": 3,
        "GROUPS": cdiv(target.c_in, block_in),
        "BSR_OUT": block_out,
        "BSR_IN": block_in,
        "SLICE": min(power_of_2_divisor(n, config["BLOCK_K"]) for n in (block_in, target.c_in)),
        "HAS_BORDER": target.border,
        "RAGGED_IN": target.c_in % block_in != 0,
        "HAS_BIAS": True,
        "RELU": target.epilogue != "none",
        "POOL": target.epilogue == "relu_maxpool2",
        "INDEX_64": target.index_64,
        "PRECISION": target.precision,
    }
    return triton_bsr_conv2d.bsr_conv2d_fwd_kernel, constants, config


def _low_rank(target: Target) -> tuple[Any, dict[str, Any], dict[str, int]]:
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
        "HAS_BIAS": True,
        "RELU": target.epilogue == "relu",
        "INDEX_64": target.index_64,
        "PRECISION": target.precision,
        "RANK": config["RANK"],
    }
    return triton_low_rank_linear.low_rank_linear_fwd_kernel, constants, config


def compile_target(target: Target) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel and its tile constants, with the argument hints that a launch derives."""
    kernel, constants, config = _conv(target) if len(target.shape) == 2 else _low_rank(target)
    constants.update({name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")})
    pointers = dict.fromkeys(("x_ptr", "values_ptr", "u_ptr", "v_ptr", "bias_ptr", "y_ptr"), f"*{target.dtype}")
    pointers.update(crow_ptr="*i32", col_ptr="*i32")
    aligned = {"c_out", "in_features", "out_features", "rank"} | ({"c_in"} if target.c_in % 16 == 0 else set())
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and (name in pointers or name in aligned):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return triton.compile(source, target=GPUTarget("cuda", target.arch, 32), options=options), config


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
    kernel, config = compile_target(target)
    usage = resource_usage(kernel.asm["cubin"])
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    # Pipelined tiles are allocated once, outside the loop, with the number of buffers as their leading dimension.
    buffers = [int(n) for n in re.findall(r"local_alloc[^\n]*!ttg\.memdesc<(\d+)x\d+x\d+x(?:f32|f16|bf16)", ttgir)]
    return {
        "target": {**asdict(target), "name": target.name},
        "config": config,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": kernel.metadata.shared + usage["SHARED"],
        "instructions": [name for name in TENSOR_CORE.values() if name in ptx],
        "fma": "fma.rn.f32" in ptx,
        "buffers": buffers,
        "copy_bytes": sorted({int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.[^;]*\], (0x\w+|\d+)", ptx)}),
        "loop_layout_conversions": loop[: loop.index("scf.yield")].count("ttg.convert_layout"),
    }


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| kernel | M x N x K tile | warps, stages | registers | KB shared | spilled | instruction | buffers | copy |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        c = row["config"]
        instruction = ", ".join(row["instructions"]) or "fma.rn.f32"
        tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']} | {c['num_warps']}, {c['num_stages']}"
        memory = f"{row['shared'] / 1024:.0f} | {row['stack'] + row['local']}"
        yield (
            f"| {row['target']['name']} | {tile} | {row['registers']} | {memory} | {instruction} "
            f"| {'/'.join(map(str, row['buffers'])) or '-'} | {', '.join(f'{n} B' for n in row['copy_bytes']) or '-'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every kernel, not only those of the default test run")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a Markdown table")
    arguments = parser.parse_args()
    rows = [measure(target) for target in (everything() if arguments.all else quick())]
    print(json.dumps({"triton": triton.__version__, "rows": rows}) if arguments.json else "\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
