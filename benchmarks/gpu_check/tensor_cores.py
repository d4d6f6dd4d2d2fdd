"""The tensor-core kernels of CUDA C++, which `auto` does not choose, beside what it does choose.

Every distinct layer of the headline with the weights of a thread block in shared memory, on both compiled shapes and
with launches that overlap, and the fused stem, all replayed from CUDA graphs and checked against float64. Measured on
an H200 before their borders of a tile were made cheap: 90 us for conv1_2, 46 and 59 for conv2_1 and conv2_2, 49 for
conv3_2, 50 for conv4_2, 22 for conv5_1. The kernels as they stand, and the stem, have not run on a GPU; wanted are
30, 25, 28, 24, 22, 9, and 40 us for the stem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_check import layers, measure, options, rows
from gpu_check.summary import tensor_core_line
from slimkernels import testing
from slimkernels.kernels import cuda, cuda_tensor_cores, resident_plan
from slimkernels.kernels.problems import ConvProblem, problem_json

STEM = "bsr_stem__cuda_tensor_cores"
_STEM_CHANNELS = 64
_CHECKED_IMAGES = 64


def configurations(block_out: int, wgmma: bool) -> Iterator[dict[str, int]]:
    """The shapes that run here, the chosen one first; then that one with overlapping launches, and two stages."""
    chosen = resident_plan.variant_for(block_out, wgmma)
    for variant in dict.fromkeys((chosen, 0)):
        yield {"variant": variant}
    if wgmma:
        yield {"variant": chosen, "overlap": 1}
        yield {"variant": chosen, "stages": 2, "overlap": 1}


def timed_row(
    p: ConvProblem, kernel: str, config: Mapping[str, int], call: Callable[[], Tensor],
    check: Callable[[Tensor], testing.Comparison],
) -> dict[str, Any]:  # fmt: skip
    """One row: whether the result is right, and its time; an error is a row as well."""
    row = {"suite": "tensor_cores", "name": layers.layer_name(p), "problem": problem_json(p), "kernel": kernel,
           "config": dict(config), "match": False}  # fmt: skip
    try:
        result = check(call())
        row |= {"match": result.passed, "worst_over_bound": result.worst_over_bound}
        if not result.passed:
            row["errors"] = [result.message]
        row |= measure.replay_timing(call, p.device, bursts=5).as_ms()
    except Exception as error:  # the others go on
        row |= {"match": False, "errors": [f"{type(error).__name__}: {error}"[:500]]}
    return row


def of_layer(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one layer; with a reason, why the kernels do not run here, that of ``auto`` alone."""
    bench = layers.Bench(p)
    auto = layers.choice_of(p)
    yield timed_row(p, auto.name, auto.config, lambda: bench.call(auto), bench.compare)
    if reason is not None:
        return
    w, bias = bench.layer.weight_bsr(), bench.layer.bias
    parts = (w.values.detach(), w.crow_indices, w.col_indices)
    for config in configurations(p.block_shape[0], cuda_tensor_cores._limits(bench.x).wgmma):
        packed = resident_plan.pack(*parts, w.weight_shape, w.block_shape, resident_plan.VARIANTS[config["variant"]])

        def call(config: Mapping[str, int] = config, packed: Sequence[Tensor] = packed) -> Tensor:
            return cuda_tensor_cores.launch_bsr_conv2d(
                bench.x, *parts, None if bias is None else bias.detach(), packed, w.weight_shape, w.block_shape,
                p.stride, p.padding, p.dilation, p.epilogue, config,
            )  # fmt: skip

        yield timed_row(p, cuda_tensor_cores.NAME, config, call, bench.compare)


def of_stem(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of the stem: a dense first convolution in front of layer ``p``."""
    if reason is not None:
        return
    bench = layers.Bench(replace(p, n=1))
    w, bias = bench.layer.weight_bsr(), bench.layer.bias
    parts = (w.values.detach(), w.crow_indices, w.col_indices)
    first = nn.Conv2d(3, _STEM_CHANNELS, 3, padding=1, device=p.device, dtype=p.dtype).requires_grad_(False)
    x = torch.randn(p.n, 3, p.h, p.w, device=p.device, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    some = x[:_CHECKED_IMAGES].double()
    assert first.bias is not None
    middle = F.conv2d(some, first.weight.double(), first.bias.double(), padding=1).relu().to(p.dtype)
    arguments = (middle, w, None if bias is None else bias.detach(), p.stride, p.padding, p.dilation, p.epilogue)
    reference = testing.reference_bsr_conv2d(*arguments)
    scale, terms = testing.scale_bsr_conv2d(*arguments)

    def check(y: Tensor) -> testing.Comparison:
        # What lies between is rounded from fp32 sums, here and there to the number beside that of the double.
        roundoff = 2 * testing.UNIT_ROUNDOFF[p.dtype]
        return testing.compare(y[:_CHECKED_IMAGES], reference, scale=scale, terms=terms, u_mul=roundoff, name="stem")

    best = int(cuda_tensor_cores._limits(x).wgmma)
    overlapping = [{"variant": 1, "overlap": 1}] * best
    for config in (*({"variant": v} for v in dict.fromkeys((best, 0))), *overlapping):
        pack = cuda_tensor_cores.pack_stem(first.weight, *parts, w.weight_shape, w.block_shape, config["variant"])

        def call(config: Mapping[str, int] = config, packed: Sequence[Tensor] = pack) -> Tensor:
            return cuda_tensor_cores.launch_stem_conv2d(
                x, first.weight, first.bias, *parts, None if bias is None else bias.detach(), packed, w.weight_shape,
                w.block_shape, p.epilogue, config,
            )  # fmt: skip

        yield {**timed_row(p, STEM, config, call, check), "name": "stem"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--batch", type=int, default=None, help="instead of 1024 (for a rehearsal)")
    parser.add_argument("--layers", type=int, default=None, help="only so many layers")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    reason = cuda.available() if parsed.device == "cuda" else "no CUDA tensors"
    if reason is not None:
        print(f"the kernels of CUDA C++ do not run here: {reason}")
    problems = [layers.at_batch(p, parsed.batch) for p in layers.HEADLINE.problems(parsed.device)[: parsed.layers]]
    wrong = 0
    for found in (of_stem(problems[0], reason), *(of_layer(p, reason) for p in problems)):
        for row in found:
            rows.append(parsed.rows, row)
            print(tensor_core_line(row), flush=True)
            wrong += not row["match"]
    if wrong:
        raise SystemExit(f"gpu_check.tensor_cores: {wrong} rows are wrong or did not run")


if __name__ == "__main__":
    main()
