"""A pruned network at small batches as it is served: `graphed(one_launch=...)` beside the same model's CUDA graph.

The outputs of each way for 32 images, a batch after the other, are held to float64 beside those of the modules called
one by one. Its kernels are counted in a profile of calls. Two times: kernels alone, ten calls in a CUDA graph; and the
calls of the served model, with the copies of inputs and outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn

from gpu_check import measure
from slimkernels import graphed, timing
from slimkernels.inference.one_launch import OneLaunch

IMAGES = 32
MOST_ERROR = 2.0  # times the error of the modules
SPARSE = "bsr_conv2d"  # in the name of every kernel of `auto` for a block-sparse convolution


class Way(NamedTuple):
    """An argument of `graphed`, and how often a call launches what it asks for, by a part of the kernel's name."""

    one_launch: Any
    launches: Mapping[str, int]


WAYS = {
    "graph": Way(False, {"chain_conv2d": 0, "stem_conv2d": 0}),
    "chain": Way(True, {"chain_conv2d": 1, "stem_conv2d": 0, SPARSE: 0}),
    "stem": Way("stem", {"chain_conv2d": 0, "stem_conv2d": 1}),
    "chain, linear": Way(("chain", "linear"), {"chain_conv2d": 2, "stem_conv2d": 0, SPARSE: 0}),
    "auto": Way("auto", {}),
    "all": Way(("stem", "chain", "linear"), {"chain_conv2d": 2, "stem_conv2d": 1, SPARSE: 0}),
}


class Network:
    """A pruned network in 16 bits, converted, with images and what it should give for them.

    Args:
        pruned: before its conversion.
        fast: after it.
        images: ``(N, C, H, W)`` on its device, in its dtype.
    """

    def __init__(self, pruned: nn.Module, fast: nn.Module, images: Tensor) -> None:
        self.pruned, self.fast, self.images = pruned, fast, images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            self._exact = copy.deepcopy(pruned).double()(self.images.double())

    def batches(self, n: int) -> list[Tensor]:
        """The images, n at a time."""
        return list(self.images[: len(self.images) // n * n].split(n))

    def error(self, call: Any, n: int) -> float:
        """The root of the mean square of what the outputs of n images at a time are off."""
        with torch.no_grad():
            outputs = torch.cat([call(x).double() for x in self.batches(n)])
        return float((outputs - self._exact[: len(outputs)]).square().mean().sqrt())


def of_batch(network: Network, n: int, ways: Mapping[str, Way], device: str) -> Iterator[dict[str, Any]]:
    """The rows of one batch size."""
    own = network.error(network.fast, n)
    for name, way in ways.items():
        row: dict[str, Any] = {"suite": "one_launch", "name": f"b{n}", "way": name, "match": False}
        try:
            yield row | _measured(network, n, way, own, device)
        except Exception as error:  # the others go on
            yield row | {"errors": [f"{type(error).__name__}: {error}"[:500]]}


def dense(network: Network, n: int) -> dict[str, Any]:
    """The row of the network with its zeros, by the fastest dense engine that takes no compiler."""
    baselines = peers.gpu_dense(network.pruned, network.batches(n)[0], print, compile=None)
    times = {name: 1e3 * t.p50 for name, t in timing.interleaved(baselines, seconds=0.3).items()}
    return {"suite": "dense", "name": f"b{n}", "match": bool(times), "p50_ms": min(times.values(), default=None),
            "baselines_p50_ms": times}  # fmt: skip


def _measured(network: Network, n: int, way: Way, own: float, device: str) -> dict[str, Any]:
    x = network.batches(n)[0]
    served = graphed(network.fast, x, one_launch=way.one_launch)
    (recording,) = served.recordings.values()
    ratio = network.error(served, n) / own
    errors = [] if ratio <= MOST_ERROR else [f"{ratio:.3g} times as far from float64 as the modules are"]
    kernels, _ = peers.kernel_times(lambda: served(x))
    counts = {part: sum(k["calls"] for k in kernels if part in k["name"]) for part in way.launches}
    if counts != way.launches:
        errors.append(f"a call launches {counts}, expected {dict(way.launches)}: {recording!r}"[:500])
    recorded = OneLaunch(network.fast, way.one_launch).model if way.one_launch else network.fast

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = recorded(x)
        return y

    return {
        "match": not errors,
        **({"errors": errors} if errors else {}),
        "error_ratio": ratio,
        "in_one_launch": getattr(recording, "in_one_launch", []),
        "kernels": round(sum(k["calls"] for k in kernels)),
        "kernel_times": kernels,
        **measure.replay_timing(call, device, bursts=5).as_ms(),
        "served_p50_ms": 1e3 * timing.interleaved({"": lambda: served(x)}, seconds=0.05)[""].p50,
    }
