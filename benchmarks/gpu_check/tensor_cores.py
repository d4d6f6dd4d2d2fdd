"""The tensor-core kernels of CUDA C++, which `auto` does not choose, beside what it does choose.

Every distinct layer of the headline on its compiled shapes, with launches that overlap and with other rings, some
layers at a batch of eight images, which gives each thread block one tile or two (the time of a launch and of its
steps), and the fused stem; with --gradients the same layers in blocks of 32 x 32, and both gradients of every layer at
batch 512; with --tf32 the layers in float32, multiplied in TF32. All are replayed from CUDA graphs and checked against
float64. Measured on an H200, all 15 layers: 395 us of an earlier form of the streamed kernel, where Triton's takes 383
(493c819). At 0ed802f: 108 us for the stem, 724 for the layers in (32, 32) blocks, 689 for input gradients and 574 for
weight gradients, where Triton takes 510, 567 and 312; float32 takes 748 to 755 us in conv4_2 and conv4_4 alone
(docs/gpu.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
from slimkernels.kernels.tf32 import round_to_tf32
from slimkernels.kernels.transposed import transpose_index

STEM = "bsr_stem__cuda_tensor_cores"
_STEM_CHANNELS = 64
_CHECKED_IMAGES = 64
TRAINING_BATCH = 512
FEW_IMAGES = 8


def configurations(p: ConvProblem, wgmma: bool) -> Iterator[dict[str, int]]:
    """The shapes that run here, first those that may be chosen; then these overlapping, and one with two stages."""
    tf32 = p.dtype == torch.float32
    found = resident_plan.candidates(p.block_shape[0], p.c_out, wgmma, tf32)
    portable = (0,) if p.block_shape[0] % 64 == 0 else ()
    for variant in dict.fromkeys((*found, *portable)):
        yield {"variant": variant}
    if wgmma:
        yield from ({"variant": variant, "overlap": 1} for variant in found)
        yield {"variant": found[0], "stages": 2, "overlap": 1}
    if wgmma and resident_plan.VARIANTS[found[0]].streamed:
        yield {"variant": found[0], "slab": 32, "stages": 4, "overlap": 1}
        yield {"variant": found[0], "slots": 5, "overlap": 1}


def timed_row(
    p: ConvProblem, kernel: str, config: Mapping[str, int], call: Callable[[], Tensor],
    check: Callable[[Tensor], testing.Comparison],
) -> dict[str, Any]:  # fmt: skip
    """One row: whether the result is right, and its time; an error is a row as well."""
    name = layers.layer_name(p) + (" 32x32" if p.block_shape == (32, 32) else "")
    name += f" of {p.n} images" if p.n <= FEW_IMAGES else ""
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


class Launch(NamedTuple):
    """A kernel in one configuration, ready to be called on a layer's tensors."""

    kernel: str
    config: Mapping[str, int]
    call: Callable[[], Tensor]


def launches(bench: layers.Bench) -> Iterator[Launch]:
    """A layer's forward kernel in each of its `configurations`, weights packed."""
    p, w, bias = bench.problem, bench.layer.weight_bsr(), bench.layer.bias
    assert isinstance(p, ConvProblem)
    parts = (w.values.detach(), w.crow_indices, w.col_indices)
    for config in configurations(p, cuda_tensor_cores._limits(bench.x).wgmma):
        packed = resident_plan.pack(*parts, w.weight_shape, w.block_shape, resident_plan.VARIANTS[config["variant"]])
        arguments = (*parts, None if bias is None else bias.detach(), packed, w.weight_shape, w.block_shape,
                     p.stride, p.padding, p.dilation, p.epilogue, config)  # fmt: skip
        call = functools.partial(cuda_tensor_cores.launch_bsr_conv2d, bench.x, *arguments)
        yield Launch(cuda_tensor_cores.NAME, config, call)


def of_layer(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one layer; with a reason, why the kernels do not run here, that of ``auto`` alone.

    Input and weights in float32 are numbers of TF32, so that one reference holds for whoever rounds and who does not.
    """
    bench = layers.Bench(p)
    if p.dtype == torch.float32:
        bench.x = round_to_tf32(bench.x)
        with torch.no_grad():
            bench.layer.values.copy_(round_to_tf32(bench.layer.values.detach()))
    auto = layers.choice_of(p)
    yield timed_row(p, auto.name, auto.config, lambda: bench.call(auto), bench.compare)
    if reason is not None:
        return
    for kernel, config, call in launches(bench):
        yield timed_row(p, kernel, config, call, bench.compare)


class Stem:
    """A dense first convolution of 64 channels in front of the layer of a problem, with random images."""

    def __init__(self, p: ConvProblem) -> None:
        self.problem, self.layer = p, layers.Bench(replace(p, n=1)).layer
        self.first = nn.Conv2d(3, _STEM_CHANNELS, 3, padding=1, device=p.device, dtype=p.dtype).requires_grad_(False)
        x = torch.randn(p.n, 3, p.h, p.w, device=p.device, dtype=p.dtype)
        self.x = x.contiguous(memory_format=torch.channels_last)

    def launches(self) -> Iterator[Launch]:
        """The fused kernel on the shapes that run here, and letting launches overlap."""
        w, bias, first = self.layer.weight_bsr(), self.layer.bias, self.first
        parts = (w.values.detach(), w.crow_indices, w.col_indices)
        best = int(cuda_tensor_cores._limits(self.x).wgmma)
        overlapping = [{"variant": 1, "overlap": 1}] * best
        for config in (*({"variant": v} for v in dict.fromkeys((best, 0))), *overlapping):
            pack = cuda_tensor_cores.pack_stem(first.weight, *parts, w.weight_shape, w.block_shape, config["variant"])
            call = functools.partial(
                cuda_tensor_cores.launch_stem_conv2d, self.x, first.weight, first.bias, *parts,
                None if bias is None else bias.detach(), pack, w.weight_shape, w.block_shape, self.problem.epilogue,
                config,
            )  # fmt: skip
            yield Launch(STEM, config, call)


def of_stem(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of the stem: a dense first convolution in front of layer ``p``."""
    if reason is not None:
        return
    stem = Stem(p)
    bias, first = stem.layer.bias, stem.first
    some = stem.x[:_CHECKED_IMAGES].double()
    assert first.bias is not None
    middle = F.conv2d(some, first.weight.double(), first.bias.double(), padding=1).relu().to(p.dtype)
    arguments = (middle, stem.layer.weight_bsr(), None if bias is None else bias.detach(), p.stride, p.padding,
                 p.dilation, p.epilogue)  # fmt: skip
    reference = testing.reference_bsr_conv2d(*arguments)
    scale, terms = testing.scale_bsr_conv2d(*arguments)

    def check(y: Tensor) -> testing.Comparison:
        # What lies between is rounded from fp32 sums, here and there to the number beside that of the double.
        roundoff = 2 * testing.UNIT_ROUNDOFF[p.dtype]
        return testing.compare(y[:_CHECKED_IMAGES], reference, scale=scale, terms=terms, u_mul=roundoff, name="stem")

    for kernel, config, call in stem.launches():
        yield {**timed_row(p, kernel, config, call, check), "name": "stem"}


def gradient_launches(bench: layers.Bench) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """A layer's two gradients, each by what a training step runs and by the kernel of CUDA C++.

    The calls take the gradient of the output and the input, here those of the layer's size where none are given.
    """
    p, w, x = bench.problem, bench.layer.weight_bsr(), bench.x
    assert isinstance(p, ConvProblem)
    parts = (w.values.detach(), w.crow_indices, w.col_indices)
    geometry = (w.weight_shape, w.block_shape, p.stride, p.padding, p.dilation)
    index = transpose_index(*parts[1:], w.weight_shape, w.block_shape, p.stride, p.dilation)
    own = torch.randn(p.n, p.c_out, p.p, p.q, device=p.device, dtype=p.dtype)
    own = own.contiguous(memory_format=torch.channels_last)
    for op in ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad"):
        auto = resolve_gradient("auto", Request(op, p.dtype, p.device, p.block_shape, "none"), p.stride)
        for spec in (auto, KERNELS[f"{op}__cuda_tensor_cores"]):

            def call(
                grad: Tensor = own, x: Tensor = x, op: str = op, launch: Callable[..., Tensor] = spec.launch
            ) -> Tensor:
                if op == "bsr_conv2d_dgrad":
                    return launch(grad, *parts, index, (p.h, p.w), *geometry)
                return launch(grad, x, *parts, *geometry)

            yield spec.name, call


def of_gradients(p: ConvProblem, reason: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a layer's gradients: what a training step runs, then the kernels of CUDA C++."""
    if reason is not None:
        return
    bench = layers.Bench(p)
    w, x = bench.layer.weight_bsr(), bench.x[:_CHECKED_IMAGES]
    grad = torch.randn(len(x), p.c_out, p.p, p.q, device=p.device, dtype=p.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)

    def exact(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (p.stride, p.padding, p.dilation, False, [0, 0], 1, [True, True, False])
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments)
        return grad_x, _to_blocks(grad_w, p.block_shape)[w.block_rows(), w.col_indices[: w.nnz_blocks].long()]

    few = grad.double(), x.double(), testing.densify(w).to(p.device)
    references, squares = exact(*few), exact(*(t.square() for t in few))
    terms = (w.nnz_blocks * p.block_shape[0] * p.block_shape[1] // p.c_in, few[0].numel() // p.c_out)
    for kernel, call in gradient_launches(bench):
        i = int("wgrad" in kernel)

        def check(
            _: Tensor, kernel: str = kernel, call: Callable[..., Tensor] = call, i: int = i
        ) -> testing.Comparison:
            scale = squares[i].clamp_min(0).sqrt()
            return testing.compare(call(grad, x), references[i], scale=scale, terms=max(terms[i], 1), name=kernel)

        yield {**timed_row(p, kernel, {}, call, check), "name": f"{layers.layer_name(p)} {('dgrad', 'wgrad')[i]}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--batch", type=int, default=None, help="instead of 1024 (for a rehearsal)")
    parser.add_argument("--layers", type=int, default=None, help="only so many layers")
    parser.add_argument(
        "--gradients", action="store_true", help="instead: blocks of 32 x 32, and gradients at batch 512"
    )
    parser.add_argument("--tf32", action="store_true", help="instead: the layers in float32")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    reason = cuda.available() if parsed.device == "cuda" else "no CUDA tensors"
    if reason is not None:
        print(f"the kernels of CUDA C++ do not run here: {reason}")
    problems = layers.HEADLINE.problems(parsed.device)[: parsed.layers]
    suites: list[Iterator[dict[str, Any]]]
    if parsed.tf32:
        torch.backends.cudnn.allow_tf32 = True
        single = [replace(layers.at_batch(p, parsed.batch), dtype=torch.float32) for p in problems]
        suites = [of_layer(p, reason) for p in single]
    elif parsed.gradients:
        narrow = layers.ROWS["blocks_32x32"].problems(parsed.device)[: parsed.layers]
        suites = [
            *(of_layer(layers.at_batch(p, parsed.batch), reason) for p in narrow),
            *(of_gradients(layers.at_batch(p, parsed.batch or TRAINING_BATCH), reason) for p in problems),
        ]
    else:
        problems = [layers.at_batch(p, parsed.batch) for p in problems]
        few = [layers.at_batch(p, min(parsed.batch or FEW_IMAGES, FEW_IMAGES)) for p in problems[2::3]]
        suites = [of_stem(problems[0], reason), *(of_layer(p, reason) for p in (*problems, *few))]
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
