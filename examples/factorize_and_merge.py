"""Low-rank factorization: choose ranks by energy, train the factors, and let convert fuse or merge them.

    python examples/factorize_and_merge.py

A layer whose factors run no faster than the dense layer is merged back to dense. ``Policy(merge_low_rank=False)`` keeps
the factors, and with them the smaller file.
"""

from __future__ import annotations

import argparse
import copy

import torch

import slimkernels as sk
from slimkernels.data import digits_loaders


def main(quick: bool) -> None:
    train, test = digits_loaders(batch_size=64)
    model = sk.models.build("vgg_digits", 10)
    sk.fine_tune(model, train, epochs=1 if quick else 10, lr=0.05)
    thin = copy.deepcopy(model)
    sk.factorize_(thin, method="tai", energy=0.9)
    sk.fine_tune(thin, train, epochs=1 if quick else 5, lr=0.01)
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, thin)]
    print(f"{parameters[0]} parameters, factorized {parameters[1]}")
    print(f"accuracy {100 * sk.evaluate(model, test):.1f}%, factorized {100 * sk.evaluate(thin, test):.1f}%")

    x = torch.randn(16, *sk.models.input_shape("vgg_digits"))
    for name, policy in (("may merge", sk.Policy()), ("keeps the factors", sk.Policy(merge_low_rank=False))):
        fast = sk.convert(thin.eval(), example_inputs=x, policy=policy)
        print(f"{name}: {sum(p.numel() for p in fast.parameters())} parameters")
        print(sk.explain(fast))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for seconds, to see that everything runs")
    main(parser.parse_args().quick)
