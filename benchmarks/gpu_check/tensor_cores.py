"""The tensor-core kernels of CUDA C++, which `auto` does not choose, beside what it does choose.

Every distinct layer of the headline with the weights of a thread block in shared memory, on its compiled shapes and
with launches that overlap, and the fused stem; with --gradients the same layers in blocks of 32 x 32, and both
gradients of every layer at batch 512. All are replayed from CUDA graphs and checked against float64. Measured on an
H200: 64 us for conv1_2, 36 and 42 for conv2_1 and conv2_2, 37 for conv3_2, 153 for conv4_2, 41 for conv5_1, 108 for the
stem. Columns of 16 and 32 channels, half rows of 512 channels and the gradients have not run on a GPU; wanted are 30 us
for conv4_2, 12 for conv5_1, and for all gradients of VGG-19's layers 220 us (x) and 250 us (weights), where Triton
takes 587 and 328.
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
from slimkernels.dispatch.select import resolve_gradient
from slimkernels.formats import _to_blocks
from slimkernels.kernels import KERNELS, cuda, cuda_tensor_cores, resident_plan
from slimkernels.kernels.problems import ConvProblem, Request, problem_json
from slimkernels.kernels.transposed import transpose_index

STEM = "bsr_stem__cuda_tensor_cores"
_STEM_CHANNELS = 64
_CHECKED_IMAGES = 64
TRAINING_BATCH = 512


def configurations(block_out: int, c_out: int, wgmma: bool) -> Iterator[dict[str, int]]:
    """The shapes that run here, first those that may be chosen; then these overlapping, and one with two stages."""
    found = resident_plan.candidates(block_out, c_out, wgmma)
    portable = (0,) if block_out % 64 == 0 else ()
    for variant in dict.fromkeys((*found, *portable)):
        yield {"variant": variant}
    if wgmma:
        yield from ({"variant": variant, "overlap": 1} for variant in found)
        yield {"variant": found[0], "stages": 2, "overlap": 1}


def timed_row(
    p: ConvProblem, kernel: str, config: Mapping[str, int], call: Callable[[], Tensor],
    check: Callable[[Tensor], testing.Comparison],
) -> dict[str, Any]:  # fmt: skip
    """One row: whether the result is right, and its time; an error is a row as well."""
    name = layers.layer_name(p) + (" 32x32" if p.block_shape == (32, 32) else "")
    row = {"suite": "tensor_cores", "name": name, "problem": problem_json(p), "kernel": kernel,
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
    for config in configurations(p.block_shape[0], p.c_out, cuda_tensor_cores._limits(bench.x).wgmma):
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


def of_gradients(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a layer's gradients: what a training step runs, then the kernels of CUDA C++."""
    if reason is not None:
        return
    bench = layers.Bench(p)
    w = bench.layer.weight_bsr()
    parts = (w.values.detach(), w.crow_indices, w.col_indices)
    geometry = (w.weight_shape, w.block_shape, p.stride, p.padding, p.dilation)
    index = transpose_index(*parts[1:], w.weight_shape, w.block_shape, p.stride, p.dilation)
    x = bench.x
    grad = torch.randn(p.n, p.c_out, p.p, p.q, device=p.device, dtype=p.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    some = slice(0, _CHECKED_IMAGES)

    def exact(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (p.stride, p.padding, p.dilation, False, [0, 0], 1, [True, True, False])
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments)
        return grad_x, _to_blocks(grad_w, p.block_shape)[w.block_rows(), w.col_indices[: w.nnz_blocks].long()]

    few = grad[some].double(), x[some].double(), testing.densify(w).to(p.device)
    references, squares = exact(*few), exact(*(t.square() for t in few))
    terms = (w.nnz_blocks * p.block_shape[0] * p.block_shape[1] // p.c_in, few[0].numel() // p.c_out)

    for i, op in enumerate(("bsr_conv2d_dgrad", "bsr_conv2d_wgrad")):
        auto = resolve_gradient("auto", Request(op, p.dtype, p.device, p.block_shape, "none"), p.stride)
        for spec in (auto, KERNELS[f"{op}__cuda_tensor_cores"]):

            def call(
                grad: Tensor = grad, x: Tensor = x, i: int = i, launch: Callable[..., Tensor] = spec.launch
            ) -> Tensor:
                if i == 0:
                    return launch(grad, *parts, index, (p.h, p.w), *geometry)
                return launch(grad, x, *parts, *geometry)

            def check(_: Tensor, call: Callable[..., Tensor] = call, i: int = i, op: str = op) -> testing.Comparison:
                got = call(grad[some], x[some])
                scale = squares[i].clamp_min(0).sqrt()
                return testing.compare(got, references[i], scale=scale, terms=max(terms[i], 1), name=op)

            yield {**timed_row(p, spec.name, {}, call, check), "name": f"{layers.layer_name(p)} {op[-5:]}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--batch", type=int, default=None, help="instead of 1024 (for a rehearsal)")
    parser.add_argument("--layers", type=int, default=None, help="only so many layers")
    parser.add_argument(
        "--gradients", action="store_true", help="instead: blocks of 32 x 32, and gradients at batch 512"
    )
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    reason = cuda.available() if parsed.device == "cuda" else "no CUDA tensors"
    if reason is not None:
        print(f"the kernels of CUDA C++ do not run here: {reason}")
    problems = layers.HEADLINE.problems(parsed.device)[: parsed.layers]
    if parsed.gradients:
        narrow = layers.ROWS["blocks_32x32"].problems(parsed.device)[: parsed.layers]
        suites = [
            *(of_layer(layers.at_batch(p, parsed.batch), reason) for p in narrow),
            *(of_gradients(layers.at_batch(p, parsed.batch or TRAINING_BATCH), reason) for p in problems),
        ]
    else:
        problems = [layers.at_batch(p, parsed.batch) for p in problems]
        suites = [of_stem(problems[0], reason), *(of_layer(p, reason) for p in problems)]
    wrong = 0
    for found in suites:
        for row in found:
            rows.append(parsed.rows, row)
            print(tensor_core_line(row), flush=True)
            wrong += not row["match"]
    if wrong:
        raise SystemExit(f"gpu_check.tensor_cores: {wrong} rows are wrong or did not run")


if __name__ == "__main__":
    main()
