"""Low-rank layers: every usable kernel against the two products or convolutions, and against the merged dense layer.

The dense side of a row is the faster of running the factors one after the other in torch and running the merged layer:
what a user has without these kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from slimkernels import nn
from slimkernels.cases import LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.dispatch.select import predicted_seconds
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import factor_geometry
from slimkernels.testing import assert_close
from slimkernels.tuning import captured

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE_TYPE == "cuda" else torch.float32
# (rows, in, out, rank)
LINEAR = (
    [(m, k, n, r) for m in (16, 128, 1024) for k, n, r in ((512, 512, 64), (1024, 1024, 128), (4096, 4096, 128))]
    + [(16384, 512, 512, 64), (16384, 1024, 1024, 128), (8192, 4096, 4096, 256)]
    if DEVICE_TYPE == "cuda"
    else [(m, k, n, r) for m in (1, 16, 128) for k, n, r in ((512, 512, 32), (512, 512, 128), (4096, 4096, 128))]
)
# (kind, images, in, out, size, ranks): VGG-19's layers with the ranks of Tai et al.; on a GPU a last factor of 1x1 too
LAYERS = ((64, 64, 32, 24), (256, 256, 8, 128), (512, 512, 4, 256))
CONVS = [("tai", n, c_in, c_out, size, (rank,)) for n in ((64, 1024) if DEVICE_TYPE == "cuda" else (1, 16))
         for c_in, c_out, size, rank in LAYERS]  # fmt: skip
if DEVICE_TYPE == "cuda":
    CONVS += [("svd", 64, c_in, c_out, size, (rank,)) for c_in, c_out, size, rank in LAYERS]
    CONVS += [("svd", 1024, 512, 512, 4, (256,)), ("tucker2", 64, 512, 512, 4, (256, 256))]
KERNEL_NAMES = {op: [n for n, s in KERNELS.items() if s.op == op and s.isa != "scalar" and DEVICE_TYPE in s.devices
                     and s.backend != "reference" and s.available() is None]
                for op in ("low_rank_linear", "low_rank_conv2d")}  # fmt: skip


def assert_right(y: torch.Tensor, case: Any, inputs: Any) -> None:
    """The very call that is timed, all its rows, against float64 on its own device."""
    expected, bound = case.expected(*inputs)
    assert_close(y, expected, **bound)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _row(
    race: Any, kernel: str, case: Any, run: Callable[[], Any], dense: dict[str, Callable[[], Any]], name: str
) -> None:
    problem = case.problem(DEVICE_TYPE)
    with torch.no_grad():  # on a GPU all are replayed from CUDA graphs
        replayed = {name: captured(call, DEVICE_TYPE) for name, call in dense.items()}
        timings = race.run(captured(run, DEVICE_TYPE), replayed)
    ours, best = timings["contender"], timings["best"]
    race.benchmark.extra_info.update(
        suite="low_rank", layer=name, kernel=kernel, match=True, **ours.as_ms(), dense_p50_ms=best.p50 * 1e3,
        baselines_p50_ms={k: timings[k].p50 * 1e3 for k in dense}, speedup=best.p50 / ours.p50,
        predicted_ms=1e3 * predicted_seconds(KERNELS[kernel], problem), threads=torch.get_num_threads(),
        sparse_flops_per_s=2 * problem.macs / ours.p50,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", KERNEL_NAMES["low_rank_linear"])
@pytest.mark.parametrize(("rows", "features", "out", "rank"), LINEAR)
def test_low_rank_linear(race: Any, smoke: bool, kernel: str, rows: int, features: int, out: int, rank: int) -> None:
    if smoke and (rows, features, out, rank) != LINEAR[0]:
        pytest.skip("not in the smoke run")
    case = LowRankLinearCase("row", rows, features, out, rank, epilogue="relu", dtype=DTYPE)
    inputs = to_device(case.inputs(), DEVICE_TYPE)
    x, u, v, bias = inputs
    layer = nn.LowRankLinear.from_factors(u, v, bias, "relu", kernel).eval().requires_grad_(False)
    merged = layer.to_dense().eval().requires_grad_(False)
    dense = {
        "two products": lambda: F.relu_(F.linear(F.linear(x, v), u, bias)),
        "merged": lambda: F.relu_(merged(x)),
    }
    assert_right(layer(x), case, inputs)
    _row(race, kernel, case, lambda: layer(x), dense, f"linear {rows}x{features}->{out} rank {rank}")


@pytest.mark.parametrize("kernel", KERNEL_NAMES["low_rank_conv2d"])
@pytest.mark.parametrize(("kind", "n", "c_in", "c_out", "size", "ranks"), CONVS)
def test_low_rank_conv2d(
    race: Any, smoke: bool, kernel: str, kind: str, n: int, c_in: int, c_out: int, size: int, ranks: tuple[int, ...]
) -> None:
    if smoke and (n, c_in) != (CONVS[0][1], CONVS[0][2]):
        pytest.skip("not in the smoke run")
    case = LowRankConvCase("row", kind, n, c_in, size, size, c_out, ranks=ranks, epilogue="relu", dtype=DTYPE)
    reason = KERNELS[kernel].supports(case.problem(DEVICE_TYPE))
    if reason is not None:
        pytest.skip(f"{kernel} does not take this: {reason}")
    x, factors, bias = inputs = to_device(case.inputs(), DEVICE_TYPE)
    x, factors = x.contiguous(memory_format=torch.channels_last), [_channels_last(f) for f in factors]
    layer = nn.LowRankConv2d.from_factors(factors, bias, kind=kind, padding=(1, 1), epilogue="relu", kernel=kernel)
    layer = layer.eval().requires_grad_(False)
    merged = layer.to_dense().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    geometry = factor_geometry(kind, len(factors), (1, 1), (1, 1), (1, 1))

    def chain() -> torch.Tensor:
        y = x
        for i, (factor, (stride, padding, dilation)) in enumerate(zip(factors, geometry, strict=True)):
            y = F.conv2d(y, factor, bias if i == len(factors) - 1 else None, stride, padding, dilation)
        return F.relu_(y)

    dense = {"two convolutions" if len(factors) == 2 else "three convolutions": chain,
             "merged": lambda: F.relu_(merged(x))}  # fmt: skip
    assert_right(layer(x), case, inputs)
    _row(race, kernel, case, lambda: layer(x), dense, f"{kind} {c_in}->{c_out} @ {n}x{size}x{size} rank {ranks[0]}")
