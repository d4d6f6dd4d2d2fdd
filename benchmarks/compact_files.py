"""Bytes of compact files of VGG-19 for CIFAR-10, beside their bound and beside gzip and zstd of the fp32 file.

    pip install 'slimkernels[compact]' zstandard
    python benchmarks/compact_files.py --out benchmarks/results/compact-files.md

The weights are those of the initialization with small differences between channels, batch norms have random statistics,
and blocks or single weights go by magnitude: nobody trained, so nothing is said about accuracy. The error is that of
all weights together, ``|rounded - weights| / |weights|``.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkernels as sk
from slimkernels.conversion.compact_index import VALUES, SizeBound

SPARSITIES = (0.875, 0.95, 0.98)
SHAPES = {"16x1": (16, 1), "128x16": (128, 16), "single weights": (1, 1)}
COLUMNS = (
    "zeros", "in", "values", "bytes", "bound", "above", "of it patterns", "times smaller than dense fp32", "error",
)  # fmt: skip


def network() -> nn.Module:
    """VGG-19 with weights that differ in scale from channel to channel, as trained ones do."""
    torch.manual_seed(0)
    model = sk.models.build("vgg19_cifar", 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                scale = torch.exp(0.3 * torch.randn(module.weight.shape[0]))
                module.weight.mul_(scale.reshape(-1, *[1] * (module.weight.dim() - 1)))
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model.eval()


def converted(dense: nn.Module, sparsity: float, shape: tuple[int, int]) -> nn.Module:
    """Pruned, and every layer swapped that the kernels take; single weights stay in dense layers."""
    model = copy.deepcopy(dense)
    sk.prune_(model, sparsity, shape, granularity="element" if shape == (1, 1) else "block")
    sk.finalize_(model)
    swap = {"min_speedup": 0, "measure": False, "dense_layers": False}
    kept = {"exclude": ("*",)} if shape == (1, 1) else {"block_shapes": (shape,)}
    return sk.convert(model, policy=sk.Policy(**swap, **kept))


def error(model: nn.Module, rounded: nn.Module) -> float:
    """Of all parameters with two dimensions or more."""
    others = dict(rounded.named_parameters())
    pairs = [(a, others[name]) for name, a in model.named_parameters() if a.dim() > 1]
    difference = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
    return math.sqrt(difference / sum(float(a.detach().double().square().sum()) for a, _ in pairs))


def rows(dense: nn.Module, sparsity: float, name: str, dense_bytes: int, folder: Path) -> list[tuple[Any, ...]]:
    """One row for each way to write a model: the fp32 file, that compressed, and compact files."""
    import zstandard

    model, path, found = converted(dense, sparsity, SHAPES[name]), folder / "x.slim.safetensors", []
    for values in VALUES:
        sk.save(model, path, values=values)
        written = [(values, path.stat().st_size)]
        if values == "fp32":
            data = path.read_bytes()
            written.append(("fp32, gzip -9", len(gzip.compress(data, 9))))
            written.append(("fp32, zstd -19", len(zstandard.ZstdCompressor(19).compress(data))))
        bound: SizeBound | None = sk.explain(path).file_bound
        for how, size in written:
            cells = (f"{sparsity:.1%}", name, how, f"{size:,}")
            if bound is None:
                cells += ("", "", "")
            else:
                cells += (f"{bound.total:,}", f"{size / bound.total - 1:.1%}", f"{bound.patterns:,}")
            rounding = "" if bound is None else f"{error(model, sk.load(path, into=dense)):.2%}"
            found.append((*cells, f"{dense_bytes / size:.1f}", rounding))
    return found


def main() -> None:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dense = network()
    nbytes = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    lines = ["| " + " | ".join(COLUMNS) + " |", "| ---: | --- | --- |" + " ---: |" * (len(COLUMNS) - 3)]
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            for sparsity in SPARSITIES:
                for row in rows(dense, sparsity, name, nbytes, Path(folder)):
                    lines.append("| " + " | ".join(row) + " |")
                    print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
