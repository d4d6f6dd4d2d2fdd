"""The Triton gradient kernels without a GPU: by Triton's interpreter, and compiled for sm_80, sm_90 and sm_100.

Both happen in processes of their own, because TRITON_INTERPRET is read where @triton.jit decorates; to see the cases
one by one: `TRITON_INTERPRET=1 pytest tests/triton_kernels/triton_backward_interpret_cases.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton_processes
from triton_processes import REGISTER_FILE, SHARED_LIMIT, TENSOR_CORE

CASES = "triton_backward_interpret_cases.py"
CHECK = "triton_backward_compile_check.py"
Row = dict[str, Any]


@pytest.mark.parametrize("name", triton_processes.names(CASES))
def test_interpreter(name: str) -> None:
    triton_processes.check(CASES, name)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", triton_processes.names(CASES, slow=True))
def test_interpreter_every_block_shape(name: str) -> None:
    triton_processes.check(CASES, name, slow=True)


def compiled(cache: Path, *flags: str) -> list[Row]:
    """Rows of triton_backward_compile_check.py, compiled afresh."""
    return triton_processes.printed(CHECK, cache, "--json", *flags)["rows"]


def check_row(row: Row) -> None:
    """Fits the device, keeps everything in registers, runs on the unit it was written for, and stays pipelined."""
    target, name, config = row["target"], row["target"]["name"], row["config"]
    assert row["stack"] == row["local"] == 0, f"{name}: spills {row['stack']} + {row['local']} bytes"
    assert row["shared"] <= SHARED_LIMIT[target["arch"]], f"{name}: {row['shared']} bytes of shared memory"
    assert row["registers"] * 32 * config["num_warps"] <= REGISTER_FILE, f"{name}: {row['registers']} registers"
    if target["kind"] not in ("dgrad", "wgrad"):
        return
    if not target["tensor_cores"]:
        assert row["instructions"] == [] and row["fma"], f"{name}: {row['instructions']} would round factors to TF32"
        return
    if config["BLOCK_M"] >= 64:
        assert row["instructions"] == [TENSOR_CORE[target["arch"]]], f"{name}: {row['instructions']}"
    else:
        assert len(row["instructions"]) == 1, f"{name}: {row['instructions']}"  # wgmma and tcgen05 start at 64 rows
    if min(target["shape"]) >= 16 and target["dtype"] != "fp32" and target["channels"] % 16 == 0:
        buffers = config["num_stages"] - (target["arch"] == 80)
        assert row["buffers"] == [buffers] * 2, f"{name}: {row['buffers']} buffers of {config['num_stages']} stages"
        assert row["copy_bytes"] == [16], f"{name}: copies of {row['copy_bytes']} bytes"


def test_default_tiles_of_every_architecture(tmp_path: Path) -> None:
    rows = compiled(tmp_path)
    assert {(row["target"]["arch"], row["target"]["kind"]) for row in rows} >= {
        (arch, kind) for arch in SHARED_LIMIT for kind in ("dgrad", "wgrad")
    }
    for row in rows:
        check_row(row)


@pytest.mark.slow
@pytest.mark.matrix
def test_every_shape_dtype_and_branch(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--all")
    assert len(rows) > 120
    for row in rows:
        check_row(row)
