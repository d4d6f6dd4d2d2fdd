"""Layer by layer: every usable block-sparse convolution kernel against torch's dense one with the same epilogue.

Each case is checked against the float64 reference before it is timed, on a GPU at the full batch. Rates count the
multiply-adds of stored blocks that lie inside the image, two FLOPs each; ``share_of_peak`` divides by the rate measured
on this machine in this run: multiply-adds of a CPU, the matrix product of a GPU. `test_images_innermost` times the
kernel alone, as recordings call it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_check import correctness, layers, measure
from shapes import CPU_BLOCK_SHAPES, GPU_BLOCK_SHAPES, SPARSITIES, VGG19_CIFAR, LayerShape
from torch.nn import functional as F

from slimkernels import nn
from slimkernels.cases import ConvCase, assert_matches_reference
from slimkernels.dispatch.select import KernelChoice, configurations, predicted_seconds
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.peak import peak_flops as measured_peak
from slimkernels.kernels.problems import LANES, ConvProblem, strip_width
from slimkernels.tuning import captured

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE_TYPE == "cuda" else torch.float32
BATCHES = (1024, 64) if DEVICE_TYPE == "cuda" else (1, 16)
BLOCK_SHAPES = GPU_BLOCK_SHAPES if DEVICE_TYPE == "cuda" else CPU_BLOCK_SHAPES
FAST = [n for n, s in KERNELS.items() if s.op == "bsr_conv2d" and s.backend != "reference" and s.isa != "scalar"
        and DEVICE_TYPE in s.devices and s.available() is None]  # fmt: skip


@pytest.fixture(scope="session")
def peak_flops() -> float:
    """Multiply-add peak of the CPU at torch's thread count, or the GPU's bf16 matrix product of 8192^3; FLOP/s."""
    if DEVICE_TYPE == "cpu":
        return measured_peak()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure.replay_timing(lambda: a @ b, "cuda").p50


def cases() -> list[Any]:
    """Every layer at 87.5% in the natural block shape, and one layer over all block shapes and sparsities.

    On a GPU, where every case costs compilations, all kernels run on the former at the larger batch alone; what is
    swept runs the first kernel.
    """
    natural = BLOCK_SHAPES[0]
    layers = [(layer, natural, 0.0 if layer.c_in < 16 else 0.875) for layer in VGG19_CIFAR]
    middle = VGG19_CIFAR[5]
    sweep = [
        (middle, block, s)
        for block in BLOCK_SHAPES
        for s in SPARSITIES
        if block[0] <= middle.c_out and (block, s) != (natural, 0.875)
    ]
    found: list[tuple[Any, ...]] = []
    for batch in BATCHES:
        first = batch == BATCHES[0]
        for case in layers + (sweep if first or DEVICE_TYPE == "cpu" else []):
            everywhere = DEVICE_TYPE == "cpu" or (first and case in layers)
            found += [(*case, batch, kernel) for kernel in (FAST if everywhere else FAST[:1])]
    return [pytest.param(*case, id=f"{case[0].name}.b{case[3]}-{case[1][0]}x{case[1][1]}-{case[2]:.1%}-{case[4]}")
            for case in found]  # fmt: skip


@pytest.mark.parametrize(("layer", "block_shape", "sparsity", "batch", "kernel"), cases())
def test_bsr_conv2d(
    race: Any, smoke: bool, peak_flops: float, kernel: str, layer: LayerShape, block_shape: tuple[int, int],
    sparsity: float, batch: int,
) -> None:  # fmt: skip
    if smoke and (batch, layer, block_shape, sparsity) != (BATCHES[0], VGG19_CIFAR[5], BLOCK_SHAPES[0], 0.875):
        pytest.skip("not in the smoke run")
    case = ConvCase(
        layer.name, batch, layer.c_in, layer.size, layer.size, layer.c_out, block_shape=block_shape, sparsity=sparsity,
        epilogue="relu", dtype=DTYPE, pattern="all_dense" if sparsity == 0 else "random",
    )  # fmt: skip
    problem: ConvProblem = case.problem(DEVICE_TYPE)
    reason = KERNELS[kernel].supports(problem)
    if reason is not None:
        pytest.skip(reason)
    if DEVICE_TYPE == "cuda":
        choice = choose_for(kernel, problem)
        check = correctness.check(problem, choice)
        assert check["match"], check["errors"]
        worst = check["worst_over_bound"]
        bench = layers.Bench(problem)
        conv, x = bench.dense, bench.x

        def sparse(x: torch.Tensor) -> torch.Tensor:
            return bench.call(choice)

    else:
        small = ConvCase(**{**case.__dict__, "n": min(batch, 2)})
        worst = assert_matches_reference(kernel, small, DEVICE_TYPE).worst_over_bound
        x, weight, bias = case.inputs()
        conv = torch.nn.Conv2d(layer.c_in, layer.c_out, 3, padding=1, dtype=DTYPE).eval()
        with torch.no_grad():
            conv.weight.copy_(weight.to_dense())
            conv.bias.copy_(bias)
        conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)
        sparse = nn.BlockSparseConv2d.from_dense(conv, block_shape, weight.mask(), epilogue="relu", kernel=kernel)
    # On a GPU both sides are replayed from CUDA graphs.
    with torch.no_grad():
        dense_call = captured(lambda: F.relu_(conv(x)), DEVICE_TYPE)
        timings = race.run(captured(lambda: sparse(x), DEVICE_TYPE), {"eager conv2d + relu_": dense_call})

    ours, dense = timings["contender"], timings["best"]
    rate = 2 * problem.macs / ours.p50
    race.benchmark.extra_info.update(
        suite="ops", layer=layer.name, batch=batch, block_shape=block_shape, sparsity=sparsity, kernel=kernel,
        match=True, worst_over_bound=worst, **ours.as_ms(), dense_p50_ms=dense.p50 * 1e3,
        speedup=dense.p50 / ours.p50, sparse_flops_per_s=rate,
        dense_equiv_flops_per_s=2 * problem.macs_dense / ours.p50,
        share_of_peak=rate / peak_flops, threads=torch.get_num_threads(),
        predicted_ms=1e3 * predicted_seconds(KERNELS[kernel], problem),
    )  # fmt: skip


def choose_for(kernel: str, problem: ConvProblem) -> KernelChoice:
    """The configuration of a kernel that the cost model likes best."""
    best = min(configurations(problem, [KERNELS[kernel]]), key=lambda way: predicted_seconds(way[0], problem, way[1]))
    return KernelChoice(kernel, best[1])


ISAS = [isa for isa in ("avx512", "avx2") if unavailable_reason(isa) is None] if DEVICE_TYPE == "cpu" else []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", VGG19_CIFAR[1:], ids=lambda layer: layer.name)
@pytest.mark.parametrize(
    ("block_shape", "sparsity"), [((16, 1), 0.875), ((16, 1), 0.95), ((4, 1), 0.875), ((1, 1), 0.875)]
)
def test_images_innermost(
    race: Any, smoke: bool, isa: str, layer: LayerShape, block_shape: tuple[int, int], sparsity: float
) -> None:
    if smoke and (layer is not VGG19_CIFAR[5] or sparsity != 0.95):
        pytest.skip("not in the smoke run")
    n = 16
    case = ConvCase(layer.name, n, layer.c_in, layer.size, layer.size, layer.c_out, block_shape=block_shape,
                    sparsity=sparsity, epilogue="relu")  # fmt: skip
    x, weight, bias = case.inputs()
    shape = (layer.c_out, layer.c_in, 3, 3)
    packed = native.pack_strips(
        weight.values, weight.crow_indices, weight.col_indices, shape, block_shape, strip_width(block_shape[0], isa)
    )
    conv = native.PackedConv2d(isa, packed, shape, (1, 1), (1, 1), (1, 1), "relu")
    inner, outer = (
        torch.empty(native.images_innermost(n, layer.size, layer.size, c, isa)) for c in (layer.c_in, layer.c_out)
    )
    native.Steps(isa, [native.layout_step(x.contiguous(memory_format=torch.channels_last), inner, n)])()
    run = native.Steps(isa, [conv.step(inner, outer, bias, n, conv.entry_offsets(layer.size, layer.size, LANES[isa]))])
    dense = weight.to_dense().contiguous(memory_format=torch.channels_last)
    timings = race.run(run, {"eager conv2d + relu_": lambda: F.relu_(F.conv2d(x, dense, bias, padding=1))})
    expected = F.relu_(F.conv2d(x.double(), dense.double(), None if bias is None else bias.double(), padding=1))
    got = outer.permute(0, 4, 3, 1, 2).reshape(-1, layer.c_out, layer.size, layer.size)[:n]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    problem: ConvProblem = case.problem(DEVICE_TYPE)
    ours, best = timings["contender"], timings["best"]
    rate, peak = 2 * problem.macs / ours.p50, measured_peak(isa)
    race.benchmark.extra_info.update(
        suite="ops", layer=layer.name, batch=n, block_shape=block_shape, sparsity=sparsity,
        kernel=f"{isa}, images innermost", match=True, **ours.as_ms(), dense_p50_ms=best.p50 * 1e3,
        speedup=best.p50 / ours.p50, sparse_flops_per_s=rate,
        dense_equiv_flops_per_s=2 * problem.macs_dense / ours.p50, share_of_peak=rate / peak,
        threads=torch.get_num_threads(),
    )  # fmt: skip
