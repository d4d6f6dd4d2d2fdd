"""Milliseconds of a step of the training loop, launched from Python and as a CUDA graph, and where they go.

VGG-19 on random images, as the recipe's preset for a device trains it: plain, then pruned while a teacher teaches it
and rounded to four bits. What the GPU spends on a step is the sum of all kernels by torch's profiler.
"""

from __future__ import annotations

import copy
import cProfile
import io
import pstats
from collections.abc import Sequence
from typing import Any

import peers
import torch

import slimkernels as sk
from gpu_check import options, rows
from slimkernels.data import TensorLoader
from slimkernels.models import vgg19_cifar

STEPS, BATCH = 40, 512
_WIDTH_OF_SMOKE = 0.0625


def loader(steps: int, batch: int, device: str) -> TensorLoader:
    """Random images, augmented as the preset does."""
    images = torch.randint(0, 256, (steps * batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    augmented: dict[str, Any] = {"crop_padding": 4, "padding_mode": "reflect", "flip": "alternating", "cutout": 8}
    return TensorLoader(images, labels, batch_size=batch, shuffle=True, device=device, **augmented)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small network, two steps an epoch")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    torch.backends.cudnn.benchmark = True
    steps, batch = (2, 2) if parsed.smoke else (STEPS, BATCH)
    images = loader(steps, batch, parsed.device)
    teacher = vgg19_cifar(width=_WIDTH_OF_SMOKE if parsed.smoke else 1.0).to(parsed.device)
    config: dict[str, Any] = {
        "lr": 0.01,
        "precision": "bf16",
        "ema_decay": 0.98,
        "fuse_batch_norm": True,
        "progress": False,
    }

    def plain(epochs: int, graph: bool) -> Any:
        return sk.fine_tune(copy.deepcopy(teacher), images, epochs=epochs, cuda_graph=graph, **config)

    def taught(epochs: int, graph: bool) -> Any:
        callbacks = [
            sk.GradualPruning(0.875, (16, 16) if parsed.smoke else (128, 16), end=0.5, times=8),
            sk.QuantizationAware("int4", begin=0.6, times=2),
        ]
        student = copy.deepcopy(teacher)
        return sk.distill(
            student, teacher, images, epochs=epochs, callbacks=callbacks, cuda_graph=graph, **config
        )  # fmt: skip

    for name, train in {"plain": plain, "pruned, distilled, rounded": taught}.items():
        row: dict[str, Any] = {"suite": "trainer", "name": name, "batch": batch, "match": True}
        for how, graph in (("from_python", False), ("graph", True)):
            spent = [epoch.seconds for epoch in train(2 if parsed.smoke else 3, graph)]
            # The first epoch chooses algorithms and compiles; of the others the faster one.
            row[f"{how}_ms"] = min(spent[1:]) / steps * 1e3
            row[f"{how}_images_per_s"] = batch * steps / min(spent[1:])
        print({k: v for k, v in row.items() if "ms" in k or "per_s" in k or k == "name"}, flush=True)
        if not parsed.smoke:
            profile = cProfile.Profile()
            profile.runcall(train, 2, True)
            report = io.StringIO()
            pstats.Stats(profile, stream=report).sort_stats("tottime").print_stats(25)
            print(report.getvalue(), flush=True)
        if parsed.device == "cuda":
            kernels, _ = peers.kernel_times(lambda train=train: train(1, False), calls=1)  # type: ignore[misc]
            row["kernel_times"] = [
                {"name": k["name"], "us": k["us"] / steps, "calls": k["calls"] / steps} for k in kernels[:30]
            ]
            row["gpu_ms"] = sum(kernel["us"] for kernel in kernels) / steps / 1e3
        rows.append(parsed.rows, row)


if __name__ == "__main__":
    main()
