"""Compiles the pruned layers of VGG-19 for sm_90 in their default configurations, and counts the instructions.

As a script it prints a Markdown table, or JSON lines with `--json`; test_sass.py runs it in a process of its own,
because a process with TRITON_INTERPRET=1 cannot compile. Nothing here runs on a GPU: the microseconds are predictions.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import sass
import torch
import triton
from triton_compile_check import DEVICES, LIMITS, compile_launch, resource_usage

from slimkernels.dispatch.gpu_cost import gpu_block_sparse
from slimkernels.dispatch.gpu_prediction import Tile
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.kernels.problems import ConvProblem
from slimkernels.kernels.triton import bsr_conv2d
from slimkernels.kernels.triton.bsr_conv2d_config import configs
from slimkernels.kernels.triton.bsr_conv2d_geometry import Geometry
from slimkernels.kernels.triton.runtime import cdiv

BATCH, SPARSITY = 1024, 0.875
# Channels in and out, side of the image, whether the 2x2 max-pool is part of the layer. The first convolution, of three
# input channels, stays dense.
LAYERS = {
    "conv1_2, pool": (64, 64, 32, True),
    "conv2_1": (64, 128, 16, False),
    "conv2_2, pool": (128, 128, 16, True),
    "conv3_1": (128, 256, 8, False),
    "conv3_2": (256, 256, 8, False),
    "conv3_4, pool": (256, 256, 8, True),
    "conv4_1": (256, 512, 4, False),
    "conv4_2": (512, 512, 4, False),
    "conv4_4, pool": (512, 512, 4, True),
    "conv5_1": (512, 512, 2, False),
    "conv5_4, pool": (512, 512, 2, True),
}
# Limits of the cost model that are printed.
PRINTED = ("loads", "issue", "l2", "matrix", "memory", "chain")


def layer(name: str, block_shape: tuple[int, int]) -> ConvProblem:
    """A layer of VGG-19 for CIFAR-10 with blocks no taller than it."""
    c_in, c_out, side, pool = LAYERS[name]
    block_out, block_in = min(block_shape[0], c_out), block_shape[1]
    blocks = round((1 - SPARSITY) * (c_out // block_out) * (c_in // block_in) * 9)
    epilogue = "relu_maxpool2" if pool else "relu"
    return ConvProblem(
        BATCH, c_in, side, side, c_out, 3, 3, (1, 1), (1, 1), (1, 1), (block_out, block_in), blocks, torch.bfloat16,
        "cuda", epilogue,
    )  # fmt: skip


def compiled(problem: ConvProblem, config: dict[str, int], arch: int = 90) -> Any:
    """Triton's compiled kernel of a convolution, as the op launches it."""
    geometry = Geometry(
        (problem.n, problem.c_in, problem.h, problem.w), (problem.c_out, problem.c_in, problem.r, problem.s),
        problem.block_shape, problem.stride, problem.padding, problem.dilation, problem.epilogue, "ieee", problem.dtype,
        problem.nnz_blocks, True,
    )  # fmt: skip
    launch = bsr_conv2d._plan(geometry, True, False, False, tuple(config.items()), DEVICES[arch]).forward
    return compile_launch(launch, ["*bf16", "*bf16", "*i32", "*i32", "*bf16", "*bf16"], arch)


def held(registers: int, shared: int, warps: int) -> int:
    """Programs that a processor of sm_90 holds: 64 K registers, 64 warps, 228 KB and one of them for each program."""
    by_registers = 65536 // (cdiv(registers, 8) * 8 * 32 * warps)
    return min(by_registers, 228 * 1024 // (shared + 1024), 64 // warps, 32)


def overlap(ptx: str) -> dict[str, int]:
    """What a kernel does before it waits for the kernel in front of it, and after which product the next may begin."""
    lines = [line.strip() for line in ptx.splitlines()]
    (wait,) = (i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait"))
    (begin,) = (i for i, line in enumerate(lines) if line.startswith("griddepcontrol.launch_dependents"))

    def count(word: str, end: int) -> int:
        return sum(word in line for line in lines[:end])

    return {
        "reads_before_waiting": count("ld.global", wait),
        "copies_before_waiting": count("cp.async.c", wait) + count("st.global", wait),
        "products_after_next_begins": count("wgmma.mma_async", len(lines)) - count("wgmma.mma_async", begin),
    }


def measure(target: tuple[str, tuple[int, int]]) -> dict[str, Any]:
    """Compiles one layer; what the machine code says, as plain data."""
    name, block_shape = target
    problem = layer(name, block_shape)
    shared_memory, processors = LIMITS[90]
    config = configs(problem, tensor_cores=True, shared_memory=shared_memory, processors=processors)[0]
    kernel = compiled(problem, config)
    usage, code = resource_usage(kernel.asm["cubin"]), sass.disassemble(kernel.asm["cubin"])
    tile = Tile(*(config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")))
    registers, shared = usage["REG"], kernel.metadata.shared + usage["SHARED"]
    prediction = gpu_block_sparse(problem, config, H200)
    return {
        **overlap(kernel.asm["ptx"]),
        "layer": name,
        "block_shape": block_shape,
        "pool": LAYERS[name][3],
        "config": config,
        "straight": len(code.straight),
        "loop": len(code.loop),
        "products": [i.name for i in code.loop if i.kind == "HGMMA"],
        "copies": [i.name for i in code.loop if i.kind == "LDGSTS"],
        "shuffles": sum(i.kind == "SHFL" for i in code.instructions),
        "spills": sum(i.kind in ("LDL", "STL") for i in code.instructions),
        "registers": registers,
        "shared": shared,
        "planned_registers": tile.registers,
        "planned": tile.resident(problem.dtype.itemsize, H200),
        "held": held(registers, shared, config["num_warps"]),
        "limits_us": {name: 1e6 * prediction.limits[name] for name in PRINTED},
        "predicted_us": 1e6 * prediction.seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| layer | blocks | tile, warps, stages | straight | loop | registers | KB shared | programs an SM | shuffles "
        f"| {', '.join(PRINTED)} | predicted |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        c, block = row["config"], "x".join(map(str, row["block_shape"]))
        tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']}, {c['num_warps']}, {c['num_stages']}"
        limits = ", ".join(f"{us:.0f}" for us in row["limits_us"].values())
        yield (
            f"| {row['layer']} | {block} | {tile} | {row['straight']} | {row['loop']} | {row['registers']} "
            f"| {row['shared'] / 1024:.0f} | {row['held']} | {row['shuffles']} "
            f"| {limits} | {row['predicted_us']:.0f} us |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), help="names of layers; default: all")
    parser.add_argument("--blocks", nargs="*", default=["128x16", "64x16"], help="block shapes; default: 128x16 64x16")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a Markdown table")
    arguments = parser.parse_args()
    shapes = [tuple(int(n) for n in text.split("x")) for text in arguments.blocks]
    targets = [(name, shape) for shape in shapes for name in arguments.layers]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = list(pool.map(measure, targets))
    print(json.dumps({"triton": triton.__version__, "rows": rows}) if arguments.json else "\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
