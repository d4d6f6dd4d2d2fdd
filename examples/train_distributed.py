"""Pruning while training on several processes.

    torchrun --nproc-per-node 2 examples/train_distributed.py

The same script runs alone: ``python examples/train_distributed.py``. Every rank calls the same functions; the batch is
shared out, gradients are averaged, and all ranks end with the same weights and the same masks.
"""

from __future__ import annotations

import argparse
import os

import torch

import slimkernels as sk
from slimkernels.data import digits_loaders


def main(quick: bool) -> None:
    torch.manual_seed(0)
    train, test = digits_loaders(batch_size=64)
    model = sk.models.build("vgg_digits", 10)
    gradual = sk.GradualPruning(0.75, block_shape=(16, 1))
    history = sk.fine_tune(
        model, train, test, epochs=2 if quick else 15, lr=0.05, callbacks=[gradual],
        checkpoint="digits.ckpt", resume=True,
    )  # fmt: skip
    sk.finalize_(model)
    if int(os.environ.get("RANK", 0)) == 0:
        zeros = sum(int((p == 0).sum()) for p in model.parameters()) / sum(p.numel() for p in model.parameters())
        print(f"{len(history)} epochs, validation accuracy {100 * history[-1].val_accuracy:.1f}%, {zeros:.0%} zeros")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for seconds, to see that everything runs")
    main(parser.parse_args().quick)
