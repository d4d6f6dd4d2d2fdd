"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU, and what the artefacts promise.

Compiling happens in a process of its own (triton_compile_check.py): a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton_processes
from triton_processes import REGISTER_FILE, SHARED_LIMIT, TENSOR_CORE

pytest.importorskip("triton")
CHECK = "triton_compile_check.py"
ONES = "triton_ones_check.py"
Row = dict[str, Any]


def compiled(cache: Path, *flags: str) -> list[Row]:
    """Rows of triton_compile_check.py, compiled afresh."""
    return triton_processes.printed(CHECK, cache, "--json", *flags)["rows"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return compiled(tmp_path_factory.mktemp("triton"))


def check_resources(row: Row) -> None:
    """Fits the device, keeps everything in registers, and runs on the unit it was written for."""
    target, name, warps = row["target"], row["target"]["name"], row["config"]["num_warps"]
    assert row["stack"] == row["local"] == 0, f"{name}: spills {row['stack']} + {row['local']} bytes"
    assert row["shared"] <= SHARED_LIMIT[target["arch"]], f"{name}: {row['shared']} bytes of shared memory"
    assert row["registers"] * 32 * warps <= REGISTER_FILE, f"{name}: {row['registers']} registers, {warps} warps"
    if target["dtype"] == "fp32" and target["precision"] == "ieee":
        assert row["instructions"] == [] and row["fma"], f"{name}: {row['instructions']} would round factors to TF32"
    elif mma_rows(row) >= 64:
        assert row["instructions"] == [TENSOR_CORE[target["arch"]]], f"{name}: {row['instructions']}"
    else:
        assert len(row["instructions"]) == 1, f"{name}: {row['instructions']}"  # wgmma and tcgen05 start at 64 rows


def mma_rows(row: Row) -> int:
    """Rows of the matrix product: pixels, or output channels where weights are on M."""
    return row["config"]["BLOCK_N" if row["target"]["variant"] == "weights_on_m" else "BLOCK_M"]


def check_pipeline(row: Row) -> None:
    """Every tile of the mainloop stays pipelined: buffers, 16-byte copies, no exchange between threads."""
    target, name, stages = row["target"], row["target"]["name"], row["config"]["num_stages"]
    tiles = 2 if target["variant"] != "shared_input" else 5 if target["shape"][0] <= 32 else 3
    expected = stages if row["instructions"] != ["mma.sync"] else stages - 1
    assert row["buffers"] == [expected] * tiles, f"{name}: {row['buffers']} buffers of {stages} stages"
    # A tile of fewer than 16 bytes a thread is copied in smaller pieces.
    itemsize, threads = 4 if target["dtype"] == "fp32" else 2, 32 * row["config"]["num_warps"]
    elements = [row["config"][side] * row["config"]["BLOCK_K"] for side in ("BLOCK_M", "BLOCK_N")]
    pieces = sorted({min(16, n * itemsize // threads) for n in elements})
    assert row["copy_bytes"] == pieces, f"{name}: copies of {row['copy_bytes']} bytes, not {pieces}"
    assert row["loop_layout_conversions"] == 0, f"{name}: {row['loop_layout_conversions']} conversions in the mainloop"


def is_tall(row: Row) -> bool:
    """A convolution on tensor cores whose slices are at least 16 bytes."""
    target = row["target"]
    shape, tensor_cores = target["shape"], target["dtype"] != "fp32" or target["precision"] == "tf32"
    return tensor_cores and len(shape) == 2 and shape[1] >= 16


def stages(row: Row) -> tuple[int, int]:
    """(channels of a stage, stages) of the quick run's tall blocks, whose slices are 16 channels but for c_in = 200."""
    target = row["target"]
    if target["variant"] == "shared_input":
        return 64, 4
    if target["c_in"] == 200:
        return 64, 3
    in_flight = 64 if target["variant"] == "images_on_m" else 96
    return 16, in_flight // 16 // (2 if target["dtype"] == "fp32" else 1)


def test_default_tiles_of_every_architecture_and_kernel(quick: list[Row]) -> None:
    conv = {(row["target"]["arch"], row["target"]["variant"]) for row in quick if len(row["target"]["shape"]) == 2}
    variants = {"pixels_on_m", "weights_on_m", "images_on_m", "taps_together", "shared_input"}
    assert {arch for arch, _ in conv} == set(SHARED_LIMIT) and {variant for _, variant in conv} == variants
    for row in quick:
        check_resources(row)


def test_tall_blocks_keep_their_pipeline(quick: list[Row]) -> None:
    tall = [row for row in quick if is_tall(row)]
    assert {row["target"]["arch"] for row in tall} == set(SHARED_LIMIT)
    for row in tall:
        check_pipeline(row)
        assert (row["config"]["BLOCK_K"], row["config"]["num_stages"]) == stages(row), row["target"]["name"]
    assert {row["arch"] for row in (r["target"] for r in tall) if row["variant"] == "images_on_m"} == set(SHARED_LIMIT)


@pytest.mark.slow
def test_every_integer_argument_may_be_one(tmp_path: Path) -> None:
    found = triton_processes.printed(ONES, tmp_path)
    kernels, rows = found["kernels"], found["rows"]
    assert len(kernels) >= 8 and {kernel for kernel, _, _ in rows} == set(kernels)
    assert {len(ones) > 1 for _, ones, _ in rows} == {True, False} and len(rows) > 200
    errors = [f"{kernel} with {', '.join(ones)} = 1: {error}" for kernel, ones, error in rows if error is not None]
    assert not errors, "\n".join(errors)


@pytest.mark.slow
@pytest.mark.matrix
def test_every_shape_dtype_and_branch(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--all")
    assert len(rows) > 200
    for row in rows:
        check_resources(row)
        if is_tall(row):
            check_pipeline(row)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_configuration_the_tuner_may_try(arch: int, tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--listed", str(arch))
    assert len(rows) > 60
    for row in rows:
        check_resources(row)
        if is_tall(row):
            check_pipeline(row)
