"""What the cost model expects of every layer of a network on a GPU, before any was measured there.

    python benchmarks/predict_gpu.py --out benchmarks/results/predicted-gpu.md

Each layer's row holds the dense layer, our kernel with the configuration that the model takes, and the model's limits,
in microseconds: the largest limit plus the launch is the prediction. `benchmarks/gpu_check.sh` prints measurements of
the same layers; where the two differ, the limit that was taken for the largest is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from slimkernels.kernels.gpu_cost import Prediction, gpu_block_sparse, gpu_dense
from slimkernels.kernels.gpu_rates import H100, H200, GpuRates
from slimkernels.kernels.problems import ConvProblem
from slimkernels.kernels.triton.bsr_conv2d_config import configs


class Layer(NamedTuple):
    """A 3x3 convolution of a network, stride 1, padding 1; ``count`` layers of this kind."""

    c_in: int
    c_out: int
    size: int
    pool: bool
    count: int = 1

    def __str__(self) -> str:
        pool, count = ", pool" if self.pool else "", f" (x{self.count})" if self.count > 1 else ""
        return f"{self.c_in} -> {self.c_out} @ {self.size}{pool}{count}"


# The first layer of either network stays dense.
VGG19_CIFAR = (
    Layer(3, 64, 32, False), Layer(64, 64, 32, True), Layer(64, 128, 16, False), Layer(128, 128, 16, True),
    Layer(128, 256, 8, False), Layer(256, 256, 8, False, 2), Layer(256, 256, 8, True), Layer(256, 512, 4, False),
    Layer(512, 512, 4, False, 2), Layer(512, 512, 4, True), Layer(512, 512, 2, False, 3), Layer(512, 512, 2, True),
)  # fmt: skip
VGG16_IMAGENET = (
    Layer(3, 64, 224, False), Layer(64, 64, 224, True), Layer(64, 128, 112, False), Layer(128, 128, 112, True),
    Layer(128, 256, 56, False), Layer(256, 256, 56, False), Layer(256, 256, 56, True), Layer(256, 512, 28, False),
    Layer(512, 512, 28, False), Layer(512, 512, 28, True), Layer(512, 512, 14, False, 2), Layer(512, 512, 14, True),
)  # fmt: skip


def problem(layer: Layer, batch: int, sparsity: float, block: tuple[int, int]) -> ConvProblem:
    """The layer at a batch size; blocks are at most as high as the layer has output channels."""
    height, width = min(block[0], layer.c_out), block[1]
    stored = round((1 - sparsity) * 9 * -(-layer.c_in // width) * -(-layer.c_out // height))
    return ConvProblem(
        batch, layer.c_in, layer.size, layer.size, layer.c_out, 3, 3, (1, 1), (1, 1), (1, 1), (height, width),
        max(stored, 1), torch.bfloat16, "cuda", "relu_maxpool2" if layer.pool else "relu",
    )  # fmt: skip


def best(problem: ConvProblem, rates: GpuRates) -> tuple[Prediction, dict[str, int]]:
    """The configuration of the listed ones that the model takes."""
    listed = configs(problem, shared_memory=rates.shared_memory, processors=rates.processors)
    found = [(gpu_block_sparse(problem, config, rates), config) for config in listed]
    return min(found, key=lambda pair: pair[0].seconds)


def us(seconds: float) -> str:
    """Microseconds in three digits."""
    return f"{1e6 * seconds:.3g}"


LIMITS = ("matrix", "l2", "issue", "tags", "memory", "chain")


def layer_table(
    network: Sequence[Layer], batch: int, sparsity: float, block: tuple[int, int], rates: GpuRates
) -> Iterator[str]:
    """Lines of a Markdown table, a layer a row."""
    columns = ("layer", "dense", "ours", *LIMITS, "tile, warps, stages", "tiles", "resident")

    def row(*cells: object) -> str:
        return f"| {' | '.join(map(str, cells))} |" + " |" * (len(columns) - len(cells))

    yield row(*columns)
    yield row(*["---"] * len(columns))
    dense_total = ours_total = 0.0
    for layer in network:
        at = problem(layer, batch, sparsity, block)
        dense = gpu_dense(at, rates).seconds
        dense_total += layer.count * dense
        if layer.c_in < 16:
            ours_total += layer.count * dense
            yield row(layer, us(dense), "stays dense")
            continue
        ours, c = best(at, rates)
        ours_total += layer.count * ours.seconds
        tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']}, {c['num_warps']}, {c['num_stages']}"
        split = f", {c['SPLITS']} splits" if c.get("SPLITS", 1) > 1 else ""
        limits = [us(ours.limits[name]) for name in LIMITS]
        yield row(layer, us(dense), us(ours.seconds), *limits, tile + split, ours.tiles, ours.resident)
    yield row("**whole**", f"**{us(dense_total)}**", f"**{us(ours_total)}**, {dense_total / ours_total:.2f}x")


def document() -> str:
    """The whole prediction as Markdown."""
    lines = [
        "# What the cost model expects on a GPU",
        "",
        "Nothing here was measured: these are predictions of the cost model, made by",
        "`python benchmarks/predict_gpu.py`, to be held against the first measurement. Microseconds, bf16. ReLU and",
        "2x2 max-pool are fused on our side, ReLU on the dense side; the first layer stays dense. With perfect overlap",
        "and no fixed costs, kernels that gather both operands would take 390 us (H100) and 340 us (H200) for VGG-19",
        "at batch 1024 and 87.5% zeros; dense takes 1500.",
    ]
    rows = (
        ("VGG-19/CIFAR", VGG19_CIFAR, 1024, 0.875, (128, 16)), ("VGG-19/CIFAR", VGG19_CIFAR, 1024, 0.95, (128, 16)),
        ("VGG-19/CIFAR", VGG19_CIFAR, 1024, 0.875, (64, 16)), ("VGG-19/CIFAR", VGG19_CIFAR, 16, 0.875, (128, 16)),
        ("VGG-19/CIFAR", VGG19_CIFAR, 1, 0.875, (128, 16)), ("VGG-16 at 224", VGG16_IMAGENET, 32, 0.875, (128, 16)),
    )  # fmt: skip
    for rates in (H100, H200):
        for name, network, batch, sparsity, block in rows:
            head = f"## {name}, batch {batch}, {sparsity:.1%} zeros in {block[0]}x{block[1]} blocks, {rates.name}"
            lines += ["", head, "", *layer_table(network, batch, sparsity, block, rates)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; the terminal by default")
    out = parser.parse_args().out
    if out is None:
        print(document(), end="")
    else:
        out.write_text(document())
