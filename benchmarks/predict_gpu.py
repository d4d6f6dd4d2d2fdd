"""What the cost model expects of every layer of a network on a GPU.

    python benchmarks/predict_gpu.py --out benchmarks/results/predicted-gpu.md

Each layer's row holds the dense layer, our kernel with the configuration that the model takes, and the model's limits,
in microseconds: the largest limit plus the launch is the prediction. `benchmarks/gpu_check.sh` prints measurements of
the same layers; where the two differ, the limit that was taken for the largest is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu_check import layers

from slimkernels.dispatch.fused_cost import gpu_few_channels
from slimkernels.dispatch.gpu_cost import gpu_block_sparse
from slimkernels.dispatch.gpu_dense_cost import gpu_dense
from slimkernels.dispatch.gpu_prediction import Prediction
from slimkernels.dispatch.gpu_rates import H100, H200, GpuRates
from slimkernels.kernels.problems import ConvProblem
from slimkernels.kernels.triton.bsr_conv2d_config import configs, images_reason


def first_layer(network: str) -> layers.Layer:
    """The first convolution of a network, which reads the image and stays dense."""
    return replace(layers.NETWORKS[network][0], c_in=3, epilogue="relu", names=("conv1_1",))


def title(layer: layers.Layer) -> str:
    """``256 -> 256 @ 8, pool (x2)``."""
    pool = ", pool" if layer.epilogue == "relu_maxpool2" else ""
    count = f" (x{len(layer.names)})" if len(layer.names) > 1 else ""
    return f"{layer.c_in} -> {layer.c_out} @ {layer.size}{pool}{count}"


def best(problem: ConvProblem, rates: GpuRates) -> tuple[Prediction, dict[str, int], str]:
    """The likeliest configuration of the kernels that the model tells apart, and what its tiles hold."""
    found = []
    for variant in ("pixels_on_m", "images_on_m"):
        one_position = variant == "images_on_m"
        if one_position and images_reason(problem) is not None:
            continue
        listed = configs(problem, variant, shared_memory=rates.shared_memory, processors=rates.processors)
        for config in listed:
            prediction = gpu_block_sparse(problem, config, rates, one_position=one_position)
            found.append((prediction, config, ", images" if one_position else ""))
    return min(found, key=lambda choice: choice[0].seconds)


def us(seconds: float) -> str:
    """Microseconds in three digits."""
    return f"{1e6 * seconds:.3g}"


# Of `gpu_check.layers.ROWS`, and what their networks are called.
ROWS = ("headline", "sparsity_95", "blocks_64x16", "batch_16", "batch_1", "vgg16_224")
NAMES = {"vgg19_cifar": "VGG-19/CIFAR", "vgg16_bn": "VGG-16 at 224"}
LIMITS = ("loads", "matrix", "l2", "issue", "memory", "chain")


def layer_table(network: layers.NetworkRow, rates: GpuRates) -> Iterator[str]:
    """Lines of a Markdown table, a layer a row."""
    columns = ("layer", "dense", "ours", *LIMITS, "tile, warps, stages", "tiles", "resident")

    def row(*cells: object) -> str:
        return f"| {' | '.join(map(str, cells))} |" + " |" * (len(columns) - len(cells))

    yield row(*columns)
    yield row(*["---"] * len(columns))
    first = first_layer(network.network)
    image = network.first()
    dense_total, ours_total = gpu_dense(image, rates).seconds, gpu_few_channels(image, {}, rates).seconds
    yield row(title(first), us(dense_total), us(ours_total), "no zeros")
    for layer, at in zip(layers.NETWORKS[network.network], network.problems(), strict=True):
        count, dense = len(layer.names), gpu_dense(at, rates).seconds
        ours, c, kind = best(at, rates)
        dense_total += count * dense
        ours_total += count * ours.seconds
        tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']}, {c['num_warps']}, {c['num_stages']}"
        split = f", {c['SPLITS']} splits" if c.get("SPLITS", 1) > 1 else ""
        limits = [us(ours.limits[name]) for name in LIMITS]
        yield row(title(layer), us(dense), us(ours.seconds), *limits, tile + split + kind, ours.tiles, ours.resident)
    yield row("**whole**", f"**{us(dense_total)}**", f"**{us(ours_total)}**, {dense_total / ours_total:.2f}x")


def document() -> str:
    """The whole prediction as Markdown."""
    lines = [
        "# What the cost model expects on a GPU",
        "",
        "These are predictions of the cost model, made by `python benchmarks/predict_gpu.py`, with the ceilings of",
        "`slimkernels/dispatch/gpu_rates.py`: those of the H200 were measured. Microseconds, bf16. ReLU and 2x2",
        "max-pool are fused on our side, ReLU on the dense side, whose pool is a kernel of its own. The first layer",
        "has no zeros: on our side it is the kernel of `fused_conv2d`.",
        "",
        "A tile holds pixels, or where `images` stands one position of as many images. Its time is the largest of its",
        "limits plus the launch. The loads were fitted to timed configurations of an H200 at batch 256 and 1024",
        "(`benchmarks/results/nvidia-h200/layer-configurations.json`), which they meet within 13% on average where",
        "stages are one slice. The dense column was fitted to the kernels of dense networks as profiled on the same",
        "card (712b384a8459, 99c51651bcea): a network's convolutions are met within 8%. Whole networks as measured",
        "there: at batch 1 200 us dense and 84.7 ours, at 16 217 and 97.8, at 1024 1760 and 482 (blocks of 64x16 571,",
        "95% zeros 339), VGG-16 2320 and 694, their linear layers included, which are not here.",
    ]
    for rates in (H100, H200):
        for row in (layers.ROWS[name] for name in ROWS):
            height, width = row.block_shape
            where = f"{NAMES[row.network]}, batch {row.batch}, {row.sparsity:.1%} zeros in {height}x{width} blocks"
            lines += ["", f"## {where}, {rates.name}", "", *layer_table(row, rates)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; the terminal by default")
    out = parser.parse_args().out
    if out is None:
        print(document(), end="")
    else:
        out.write_text(document())
