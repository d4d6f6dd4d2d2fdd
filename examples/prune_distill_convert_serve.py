"""From a trained network to a fast one: prune while distilling, convert, check, serve, save.

    python examples/prune_distill_convert_serve.py

Trains on scikit-learn's images of handwritten digits, so it needs no download and no GPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch

import slimkernels as sk
from slimkernels import timing
from slimkernels.data import digits_loaders


def main(quick: bool) -> None:
    train, test = digits_loaders(batch_size=64)
    teacher = sk.models.build("vgg_digits", 10)
    sk.fine_tune(teacher, train, epochs=2 if quick else 12, lr=0.05)

    student = copy.deepcopy(teacher)
    gradual = sk.GradualPruning(0.875, block_shape=(16, 1), schedule="cubic")
    sk.distill(student, teacher, train, epochs=2 if quick else 20, lr=0.02, callbacks=[gradual])
    sk.finalize_(student)
    for name, model in (("teacher", teacher), ("student, 87.5% of its blocks zero", student)):
        print(f"{name}: {100 * sk.evaluate(model, test):.1f}% correct")

    x = torch.randn(64, *sk.models.input_shape("vgg_digits"))
    fast = sk.convert(student.eval(), example_inputs=x)
    print(sk.explain(fast))
    with torch.no_grad():
        difference = (fast(x) - student(x)).abs().max() / student(x).abs().max()
    print(f"largest relative difference after conversion: {difference:.1e}")

    served = sk.graphed(fast, x)
    dense = timing.best_dense(teacher.eval(), x, compile=not quick)
    times = timing.interleaved({**dense, "slimkernels": lambda: served(x)}, seconds=0.1 if quick else 1.0)
    for name, seconds in times.items():
        print(f"{name}: {1e3 * seconds.p50:.2f} ms for {len(x)} images")

    path = Path(tempfile.mkdtemp()) / "digits.slim.safetensors"
    sk.save(fast, path)
    loaded = sk.load(path, into=sk.models.build("vgg_digits", 10))
    with torch.no_grad():
        assert torch.allclose(loaded(x), fast(x), atol=1e-4)
    print(f"saved to {path}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for seconds, to see that everything runs")
    main(parser.parse_args().quick)
