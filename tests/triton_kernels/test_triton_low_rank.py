"""The Triton low-rank kernels without a GPU: by Triton's interpreter, and compiled for sm_80, sm_90 and sm_100.

Both happen in processes of their own, because TRITON_INTERPRET is read where @triton.jit decorates; to see the cases
one by one: `TRITON_INTERPRET=1 pytest tests/triton_kernels/triton_low_rank_interpret_cases.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton_processes
from triton_processes import REGISTER_FILE, SHARED_LIMIT, TENSOR_CORE

from slimkernels.dispatch import gpu_dense_cost
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.dispatch.select import predicted_seconds
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import LowRankConvProblem, LowRankLinearProblem
from slimkernels.kernels.triton.low_rank_linear import RANK_TILE, default_config, device_configs

CASES = "triton_low_rank_interpret_cases.py"
CHECK = "triton_low_rank_compile_check.py"


@pytest.mark.parametrize("name", triton_processes.names(CASES))
def test_interpreter(name: str) -> None:
    triton_processes.check(CASES, name)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", triton_processes.names(CASES, slow=True))
def test_interpreter_every_case(name: str) -> None:
    triton_processes.check(CASES, name, slow=True)


def compiled(cache: Path, *flags: str) -> list[dict[str, Any]]:
    """Rows of triton_low_rank_compile_check.py, compiled afresh."""
    return triton_processes.printed(CHECK, cache, "--json", *flags)["rows"]


def check_resources(row: dict[str, Any]) -> None:
    """Fits the device, keeps everything in registers, and runs on the unit it was written for."""
    target, name, warps = row["target"], row["target"]["name"], row["config"]["num_warps"]
    blackwell_tf32 = (target["arch"], target["kind"], target["precision"]) == (100, "dgrad", "tf32")
    # Of that one kernel Triton 3.9 spills 8 bytes (rank 256) and 24 (rank 64), Triton 3.8 8 and 16, before the loops.
    assert row["stack"] <= (24 if blackwell_tf32 else 0) and row["local"] == 0, f"{name}: spills {row['stack']} bytes"
    assert row["shared"] <= SHARED_LIMIT[target["arch"]], f"{name}: {row['shared']} bytes of shared memory"
    assert row["registers"] * 32 * warps <= REGISTER_FILE, f"{name}: {row['registers']} registers, {warps} warps"
    if target["dtype"] == "fp32" and target["precision"] == "ieee":
        assert row["instructions"] == [] and row["fma"], f"{name}: {row['instructions']} would round factors to TF32"
    elif row["config"]["BLOCK_M"] >= 64:
        assert row["instructions"] == [TENSOR_CORE[target["arch"]]], f"{name}: {row['instructions']}"
    else:
        assert len(row["instructions"]) == 1, f"{name}: {row['instructions']}"  # wgmma and tcgen05 start at 64 rows


@pytest.mark.slow
def test_default_kernels_fit_every_architecture(tmp_path: Path) -> None:
    rows = compiled(tmp_path)
    assert {row["target"]["arch"] for row in rows} == {80, 90, 100}
    assert {row["target"]["kind"] for row in rows} == {"fused", "alone", "dgrad"}
    for row in rows:
        check_resources(row)


@pytest.mark.slow
@pytest.mark.matrix
def test_every_rank_dtype_and_branch(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--all")
    assert len(rows) > 100
    for row in rows:
        check_resources(row)


# Choice on a GPU, from the ceilings of an H200
def seconds(problem: LowRankLinearProblem | LowRankConvProblem) -> dict[str, float]:
    """The least predicted time by backend."""
    found = {}
    for backend in ("triton", "reference"):
        spec = KERNELS[f"{problem.op}__{backend}"]
        found[backend] = min(predicted_seconds(spec, problem, config) for config in spec.configs(problem))
    return found


@pytest.mark.parametrize(
    ("m", "in_features", "out_features", "rank", "fused"),
    [
        (1, 512, 512, 64, True),  # two launches and a ReLU against one
        (65536, 512, 512, 64, True),  # bound by memory: the intermediate and the ReLU's pass are saved
        (1024, 4096, 4096, 128, False),  # 8 row tiles leave the processors idle, or compute h again in each split
        (65536, 4096, 4096, 512, False),  # above the rank tile h is computed again for every tile of outputs
    ],
)
def test_two_products_win_where_the_intermediate_is_computed_again(
    m: int, in_features: int, out_features: int, rank: int, fused: bool
) -> None:
    times = seconds(LowRankLinearProblem(m, in_features, out_features, rank, torch.bfloat16, "cuda", "relu"))
    assert (times["triton"] < times["reference"]) == fused, times


def test_a_fused_convolution_saves_its_intermediate() -> None:
    shapes = ((64, 256, 3, 3), (256, 64, 1, 1))
    common = ((1, 1), (1, 1), (1, 1), torch.bfloat16, "cuda")
    problem = LowRankConvProblem(2048, 8, 8, "svd", shapes, *common)
    fused, factors = gpu_dense_cost.gpu_low_rank(problem, {}, H200), gpu_dense_cost.gpu_factors(problem, H200)
    intermediate = 2 * 2048 * 64 * 64 * 2  # 2048 images of 8x8 pixels and 64 channels in bf16, written and read
    memory = factors.memory_s + factors.passes[0].memory_s
    assert memory - fused.memory_s == pytest.approx(intermediate / H200.memory_bytes_s) and not fused.passes
    wide = LowRankConvProblem(2048, 8, 8, "svd", ((512, 256, 3, 3), (256, 512, 1, 1)), *common)
    tai = LowRankConvProblem(2048, 8, 8, "tai", ((64, 256, 3, 1), (256, 64, 1, 3)), *common)
    assert [len(gpu_dense_cost.gpu_low_rank(p, {}, H200).passes) for p in (wide, tai)] == [1, 1]


def test_configurations_keep_the_rank_in_one_tile() -> None:
    problem = LowRankLinearProblem(64, 512, 512, 200, torch.bfloat16, "cuda")
    listed = device_configs(problem)
    assert listed[0]["SPLITS"] > 1 and listed[-1]["SPLITS"] == 1
    assert all(c["RANK"] == RANK_TILE for c in listed)
    assert len({tuple(c.items()) for c in listed}) == len(listed)
    assert device_configs(LowRankLinearProblem(64, 512, 512, 200, torch.float32, "cpu")) == [{}]
    assert default_config(64, 512, 200, torch.bfloat16, processors=1)["SPLITS"] == 1
