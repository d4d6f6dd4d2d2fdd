"""Take zeros that another tool left: ``torch.nn.utils.prune`` masks and a plain checkpoint with zeros.

    python examples/zeros_of_another_tool.py

`convert` looks at the zeros themselves. It tries block shapes on them, from wide ones down to single weights, and says
what it found.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.utils import prune

import slimkernels as sk


def main(quick: bool) -> None:
    torch.manual_seed(0)
    channels = 64 if quick else 256
    model = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
    ).eval()
    # torch's own pruning keeps a mask and the original weight; convert reads the product.
    prune.ln_structured(model[0], "weight", amount=0.75, n=2, dim=1)
    # A checkpoint of another tool simply holds zeros; here in groups of 16 output channels.
    weight = model[2].weight.detach()
    alive = torch.rand(channels // 16, 1, channels, 3, 3) < 0.125
    weight *= alive.expand(-1, 16, -1, -1, -1).reshape(weight.shape)

    x = torch.randn(16, channels, 16, 16)
    fast = sk.convert(model, example_inputs=x)
    print(sk.explain(fast))
    with torch.no_grad():
        difference = (fast(x) - model(x)).abs().max() / model(x).abs().max()
    print(f"largest relative difference: {difference:.1e}")
    assert difference < 1e-3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network")
    main(parser.parse_args().quick)
