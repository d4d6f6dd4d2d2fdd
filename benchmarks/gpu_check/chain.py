"""VGG-19's block-sparse convolutions at small batches: one launch for all of them, beside a CUDA graph of `auto`'s.

First the whole network as it is served (`gpu_check.served`), then its 15 convolutions alone. Each configuration of the
chain is checked layer by layer against float64: the input of a layer is what the layers in
front of it give alone, which is bit for bit what they give inside the chain. On an H200, at 4eb6e67, the plain graph
took 98.5 us at batch 1 and 102.6 at 16, with chain and classifier in one launch each 40.2 and 72.8; the chain alone
31.4 and 60.8, by a counter 48.4 at batch 16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from bench_vgg import all_swapped, gpu_pruned_model
from torch import Tensor, nn

from gpu_check import layers, options, rows, served
from gpu_check.summary import one_launch_lines, tensor_core_line
from gpu_check.tensor_cores import timed_row
from slimkernels import models, testing
from slimkernels.inference.cuda_chain import CudaChain, chain_of
from slimkernels.kernels import cuda, cuda_chain
from slimkernels.kernels.chain_plan import COUNTER

KERNEL = f"{cuda_chain.OP}__cuda"
CONFIGURATIONS: tuple[dict[str, int], ...] = (
    {}, {"overlap": 1}, {"group": 16}, {"group": 8}, {"barrier": COUNTER}, {"barrier": COUNTER, "group": 16},
)  # fmt: skip


def benches(batch: int, device: str, most: int | None) -> list[layers.Bench]:
    """The network's pruned convolutions in their order; layers that are alike share a weight."""
    row = layers.ROWS["batch_1"]
    found = []
    for layer, problem in zip(layers.NETWORKS[row.network], row.problems(device), strict=True):
        bench = layers.Bench(replace(problem, n=batch))
        found += [(name, bench) for name in layer.names]
    return [bench for _, bench in sorted(found, key=lambda item: item[0])][:most]


def worst(
    chained: Sequence[layers.Bench], packed: Sequence[cuda_chain.ChainLayer], config: Mapping[str, int]
) -> testing.Comparison:
    """Of all layers, each on what the ones in front of it give, the one furthest from float64."""
    found: list[testing.Comparison] = []
    given = chained[0].x
    for i, bench in enumerate(chained):
        y = cuda_chain.launch_chain(chained[0].x, packed[: i + 1], config)
        reference, bound = replace_input(bench, given).reference()
        found.append(testing.compare(y, reference, **bound, name=f"{layers.layer_name(bench.problem)} ({i})"))
        given = y
    return max(found, key=lambda result: (not result.passed, result.worst_over_bound))


def replace_input(bench: layers.Bench, x: Tensor) -> layers.Bench:
    """The same layer on another input."""
    other = object.__new__(layers.Bench)
    other.__dict__.update(bench.__dict__ | {"x": x, "_reference": None})
    return other


def of_batch(chained: Sequence[layers.Bench], reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one batch size; with a reason, why the kernel does not run here, that of ``auto`` alone."""
    first = chained[0].problem
    choices = [layers.choice_of(bench.problem) for bench in chained]

    def graph() -> Tensor:
        y = chained[0].x
        for bench, choice in zip(chained, choices, strict=True):
            y = replace_input(bench, y).call(choice)
        return y

    name = f"b{first.n}"
    yield {**timed_row(first, "auto", {}, graph, finite), "name": name}
    if reason is not None:
        return
    modules = [bench.layer.eval() for bench in chained]
    for config in CONFIGURATIONS:
        chain = chain_of(modules, **config)
        plan = cuda_chain.plan_for(chained[0].x, chain.layers, config)
        fixed = {**config, "group": plan.group, "images": plan.images}

        def check(y: Tensor, chain: CudaChain = chain, fixed: Mapping[str, int] = fixed) -> testing.Comparison:
            return worst(chained, chain.layers, fixed)

        row = timed_row(first, KERNEL, fixed, lambda chain=chain: chain(chained[0].x), check)
        yield {**row, "name": name, "expected_us": plan.microseconds}


def network(device: str, most: int | None = None) -> served.Network:
    """The network in bf16, its convolutions but the first pruned, and all of these converted.

    Args: most: only so many of the pruned ones, and a small classifier.
    """
    row = layers.ROWS["batch_1"]
    images = torch.randn(served.IMAGES, *models.input_shape(row.network), generator=torch.Generator().manual_seed(1))
    images = images.to(device, torch.bfloat16)
    pruned = gpu_pruned_model(row.network, row.sparsity, row.block_shape, device)
    if most is not None:
        features: Any = pruned.features
        convolutions = [(i, module) for i, module in enumerate(features) if isinstance(module, nn.Conv2d)]
        linears = nn.Linear(convolutions[most][1].out_channels, 64), nn.ReLU(), nn.Linear(64, 10)
        tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linears).to(device)
        pruned = nn.Sequential(*features[: convolutions[most + 1][0]], *tail).eval().requires_grad_(False)
        images = images[:1]
    pruned = copy.deepcopy(pruned).bfloat16()
    return served.Network(pruned, all_swapped(pruned, images[:1], row.block_shape), images)


def finite(y: Tensor) -> testing.Comparison:
    """Whether the graph's result is a number everywhere: its kernels are checked by the stage `correctness`."""
    zeros = torch.zeros_like(y, dtype=torch.float64)
    return testing.compare(torch.where(y.isfinite(), 0, y), zeros, scale=zeros + 1, terms=1, name="auto")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 16, 4))
    parser.add_argument("--layers", type=int, default=None, help="only so many layers, for a rehearsal at batch 1")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    reason = cuda.available() if parsed.device == "cuda" else "no CUDA tensors"
    if reason is not None:
        print(f"the kernels of CUDA C++ do not run here: {reason}")
    wrong = 0

    def keep(row: dict[str, Any], line: str) -> None:
        nonlocal wrong
        rows.append(parsed.rows, row)
        print(line, flush=True)
        wrong += not row["match"]

    if parsed.device == "cuda":
        whole = network(parsed.device, parsed.layers)
        ways = {name: way for name, way in served.WAYS.items() if reason is None or not way.one_launch}
        for batch in parsed.batches:
            of_one: list[dict[str, Any]] = []
            for row in served.of_batch(whole, batch, ways, parsed.device):
                of_one.append(row)
                keep(row, one_launch_lines(of_one)[-1])
            row = served.dense(whole, batch)
            keep(row, f"{row['name']} dense: {row['baselines_p50_ms']} ms")
    for batch in parsed.batches:
        for row in of_batch(benches(batch, parsed.device, parsed.layers), reason):
            keep(row, tensor_core_line(row))
    if wrong:
        raise SystemExit(f"gpu_check.chain: {wrong} rows are wrong or did not run")


if __name__ == "__main__":
    main()
