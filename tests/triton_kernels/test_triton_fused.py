"""The Triton kernel of `fused_conv2d` without a GPU: by Triton's interpreter, and compiled for sm_80, sm_90 and sm_100.

Both happen in processes of their own, because TRITON_INTERPRET is read where @triton.jit decorates; to see the cases
one by one: `TRITON_INTERPRET=1 pytest tests/triton_kernels/triton_fused_interpret_cases.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton_processes
from triton_processes import REGISTER_FILE, SHARED_LIMIT, TENSOR_CORE

CASES = "triton_fused_interpret_cases.py"
CHECK = "triton_fused_compile_check.py"


@pytest.mark.parametrize("name", triton_processes.names(CASES))
def test_interpreter(name: str) -> None:
    triton_processes.check(CASES, name)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", triton_processes.names(CASES, slow=True))
def test_interpreter_every_case(name: str) -> None:
    triton_processes.check(CASES, name, slow=True)


def compiled(cache: Path, *flags: str) -> list[dict[str, Any]]:
    """Rows of triton_fused_compile_check.py, compiled afresh."""
    return triton_processes.printed(CHECK, cache, "--json", *flags)["rows"]


def check_resources(row: dict[str, Any]) -> None:
    """Fits the device, keeps everything in registers, and runs on the unit it was written for."""
    target, name, warps = row["target"], row["target"]["name"], row["config"]["num_warps"]
    # The cap on registers is that of an H200; on sm_100, where the sums lie in a memory of their own, 48 to 56 bytes of
    # the addresses spill under it.
    allowed = 64 if target["arch"] == 100 and "maxnreg" in row["config"] and not target["bias_last"] else 0
    assert row["stack"] <= allowed and row["local"] == 0, f"{name}: spills {row['stack']} + {row['local']} bytes"
    assert row["shared"] <= SHARED_LIMIT[target["arch"]], f"{name}: {row['shared']} bytes of shared memory"
    assert row["registers"] * 32 * warps <= REGISTER_FILE, f"{name}: {row['registers']} registers, {warps} warps"
    if not target["tensor_cores"]:
        assert row["instructions"] == [] and row["fma"], f"{name}: {row['instructions']} would round factors to TF32"
    elif row["config"]["BLOCK_M"] >= 64:
        assert row["instructions"] == [TENSOR_CORE[target["arch"]]], f"{name}: {row['instructions']}"
    else:
        assert len(row["instructions"]) == 1, f"{name}: {row['instructions']}"  # wgmma and tcgen05 start at 64 rows


@pytest.mark.slow
def test_default_kernels_fit_every_architecture(tmp_path: Path) -> None:
    rows = compiled(tmp_path)
    assert {row["target"]["arch"] for row in rows} == {80, 90, 100}
    for row in rows:
        check_resources(row)
        check_loads(row)
    last, first = (
        next(r for r in rows if (r["target"]["arch"], r["target"]["layer"], r["target"]["bias_last"]) == (90, "vgg", b))
        for b in (True, False)
    )
    # Of the 65536 registers of a processor, three programs of 128 threads get 170 a thread each, four get 128.
    assert first["registers"] <= 160 and first["config"]["PROGRAMS"] == 3
    assert last["registers"] <= 128 and last["config"]["PROGRAMS"] == 4
    # 356 and 417 for a tile of 128 pixels by 64 channels on 4 warps.
    assert first["sass"]["loop"] <= 400 and last["sass"]["loop"] <= 460, (first["sass"], last["sass"])


DEPTHS = {"vgg": 27, "stem": 147, "grey": 9, "deepest": 252}


def check_loads(row: dict[str, Any]) -> None:
    """A thread loads every element of its pixels once, none of the padding behind them, and stores 16 bytes at once."""
    target, config, names = row["target"], row["config"], row["sass"]["names"]
    if not target["tensor_cores"]:  # the product is no matrix instruction, by which the loop is found
        return
    half = target["dtype"] != "fp32"
    loads = sum(n for name, n in names.items() if name.startswith("LDG") and (".U16" in name) == half)
    depth, threads = DEPTHS[target["layer"]], 32 * config["num_warps"]
    pixels = max(1, config["BLOCK_M"] // threads)
    parts = -(-depth // config["BLOCK_K"])
    # Beside them: the weights of every part but the first, and the bias.
    weights = (parts - 1) * config["BLOCK_K"] * config["BLOCK_N"] // threads
    most = pixels * depth + weights + (config["BLOCK_N"] if not half else 0)
    assert pixels * depth <= loads <= most, f"{target['name']}: {loads} loads of {depth} elements, {names}"
    stores = {name for name in names if name.startswith("STG")}
    assert stores and all(name.endswith(".128") for name in stores), f"{target['name']}: {stores}"


@pytest.mark.slow
@pytest.mark.matrix
def test_every_dtype_and_branch(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--all")
    assert len(rows) > 80
    for row in rows:
        check_resources(row)
