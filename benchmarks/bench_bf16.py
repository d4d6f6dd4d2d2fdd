"""Networks in bf16 on a CPU that multiplies it (AVX512_BF16, AMX): dense and block-sparse, in one run.

Dense is the fastest of eager PyTorch and torch.compile with the model and its input in bf16, and of OpenVINO with bf16
as its inference precision. Ours is a float32 model recorded under torch's switches
(``torch.backends.mkldnn.conv.fp32_precision`` and ``.matmul``), float32 outside; the same recorded in float32 is timed
beside it. Weights are random and pruned by magnitude.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import bench_networks
import pytest
import torch
from bench_networks import SAMPLES, Row, dense_model, images, pruned_model
from torch import Tensor, nn

from slimkernels import timing
from slimkernels.cli import bench
from slimkernels.cli.peers import first_line, openvino
from slimkernels.conversion import convert
from slimkernels.conversion.plan import Policy
from slimkernels.inference import graphed
from slimkernels.kernels.cpu.pairs import engine

BLOCKS = ((16, 1), (16, 2), (16, 16), (32, 32))
ROWS = (
    *(Row("vgg19_cifar", 0.875, block, batch) for batch in (16, 128) for block in BLOCKS),
    *(Row("vgg19_cifar", 0.95, (16, 1), batch) for batch in (16, 128)),
    *(Row(network, 0.9, block, 16) for network in ("resnet18", "resnet50") for block in ((16, 1), (32, 32))),
    Row("vgg16", 0.9, (16, 1), 16),
)
SMOKE = Row("nin_cifar", 0.875, (16, 1), 16)


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """What follows multiplies float32 on a CPU in ``bf16``, or in float32: ``ieee``."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.conv.fp32_precision, mkldnn.matmul.fp32_precision
    mkldnn.conv.fp32_precision = mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        mkldnn.conv.fp32_precision, mkldnn.matmul.fp32_precision = before


@lru_cache(maxsize=1)
def dense_in_bf16(network: str, batch: int, compile: bool) -> dict[str, Callable[[], Any]]:
    folded, x = timing.fold_batch_norm(dense_model(network)), images(network, batch)
    found: dict[str, Callable[[], Any]] = dict(
        timing.best_dense(copy.deepcopy(folded).bfloat16(), x.bfloat16(), compile=compile)
    )
    if compile:
        try:
            found["OpenVINO"] = openvino(folded, x, "bf16")
            found["OpenVINO"]()
        except Exception as error:  # optional packages fail in their own ways
            print(f"OpenVINO left out: {first_line(error)}")
    return found


def error_ratio(model: nn.Module, served: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """RMS error of the recording over that of torch with the model and its input in bf16, both against float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        theirs = copy.deepcopy(timing.fold_batch_norm(model)).bfloat16()(x.bfloat16())
        ours = served(x)
    own, usual = (float((y.double() - exact).square().mean().sqrt()) for y in (ours, theirs))
    return own / usual


@pytest.mark.parametrize("row", [*ROWS, SMOKE], ids=str)
def test_network_in_bf16(race: Any, smoke: bool, device: str, row: Row) -> None:
    if device != "cpu":
        pytest.skip("rows for the CPU")
    if smoke != (row == SMOKE):
        pytest.skip("in the smoke run alone" if row == SMOKE else "not in the smoke run")
    if engine() is None and not smoke:
        pytest.skip("this CPU multiplies no bf16")
    x = images(row.network, row.batch)
    model = pruned_model(row.network, row.sparsity, row.block_shape)
    fast = convert(model, example_inputs=(x,), policy=Policy(serve=graphed))
    ratio = bench.error_ratio(model, fast, images(row.network, SAMPLES))
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    in_float32 = graphed(fast, x)
    with multiplied_in("bf16"):
        served = graphed(fast, x)
    ratio = error_ratio(model, served, x)
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of torch in bf16"
    baselines = dense_in_bf16(row.network, row.batch, not smoke)
    timings = race.run(lambda: served(x), baselines, beside={"float32": lambda: in_float32(x)})
    timings["converted"] = timings["float32"]
    bench_networks.note(race, row, fast, ratio, timings, baselines)
    info = race.benchmark.extra_info
    info.update(suite="bf16", dtype="bfloat16", engine=engine(), float32_p50_ms=info.pop("converted_p50_ms"))
    for key in ("converted_p20_ms", "converted_p80_ms"):
        del info[key]
