"""Converts one network many times beside busy processes and prints how far the decisions agree.

    python benchmarks/noisy_convert.py --conversions 10 --neighbours 1

Every conversion runs in this process; the neighbours are processes that compute without a pause. Printed are the layers
that were not decided alike each time, with their measured speed-ups and the rule that decided, and the spread of the
whole model's speed-up. Ends with status 1 where any layer was swapped in some conversions alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time

import torch

import slimkernels as sk
from slimkernels import models


def compute(stop: float) -> None:
    """Keeps one core busy until a time."""
    x = 0
    while time.time() < stop:
        x = (x * 1664525 + 1013904223) % 2**32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg19_cifar", help="a model of slimkernels.models")
    parser.add_argument("--sparsity", type=float, default=0.875)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--conversions", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = models.build(options.model, models.default_classes(options.model)).eval()
    sk.finalize_(sk.prune_(model, options.sparsity, (16, 1)))
    x = torch.randn(options.batch, *models.input_shape(options.model))
    context = multiprocessing.get_context("spawn")
    neighbours = [context.Process(target=compute, args=(time.time() + 3600,)) for _ in range(options.neighbours)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        plans = []
        for i in range(options.conversions):
            start = time.time()
            plan = sk.convert(model, x).slimkernels_plan
            plans.append(plan)
            whole = ""
            if plan.speedup_low:
                ratio = plan.dense_ms[0] / plan.converted_ms[0]
                whole = f"; {ratio:.2f}x as a whole ({plan.speedup_low[0]:.2f}x to {plan.speedup_high[0]:.2f}x)"
            print(f"{i + 1}: {len(plan.swapped)} layers swapped in {time.time() - start:.0f} s{whole}", flush=True)
    finally:
        for neighbour in neighbours:
            neighbour.terminate()
    differing = 0
    for name in [layer.name for layer in plans[0].layers if layer.weight_shape is not None]:
        layers = [plan[name] for plan in plans]
        swapped = sum(layer.action == "swap" for layer in layers)
        if 0 < swapped < len(plans):
            differing += 1
            ratios = [layer.dense_ms[0] / layer.sparse_ms[0] for layer in layers if layer.sparse_ms]
            print(f"{name}: swapped in {swapped} of {len(plans)}; {min(ratios):.2f}x to {max(ratios):.2f}x")
            for reason in sorted({layer.reason for layer in layers}):
                print(f"  {reason}")
    whole = [plan.dense_ms[0] / plan.converted_ms[0] for plan in plans if plan.converted_ms]
    if whole:
        low, high = min(whole), max(whole)
        print(f"whole model: median {statistics.median(whole):.2f}x, {low:.2f}x to {high:.2f}x")
    count, beside = len(plans), options.neighbours
    print(f"{differing} layers were not decided alike in {count} conversions beside {beside} busy processes")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
