"""Addresses of the Triton kernels at a GPU's sizes, replayed by Triton's interpreter without memory.

TRITON_INTERPRET is read where @triton.jit decorates, so the tests live in address_cases.py and two more files and
run in processes of their own; to see them one by one: `TRITON_INTERPRET=1 pytest tests/address_cases.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def passed(file: str, marker: str) -> int:
    """Tests of a file that passed; fails where one fails or is skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(TESTS / file),
        "-q",
        "-m",
        marker,
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary and "xfailed" not in summary, summary
    return int(re.search(r"(\d+) passed", summary)[1])


FILES = {"address_cases.py": (30, 120), "address_gradient_cases.py": (15, 90)}


@pytest.mark.parametrize("file", FILES)
def test_addresses(file: str) -> None:
    assert passed(file, "not slow") >= FILES[file][0]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_addresses_of_every_layer_and_block_shape(file: str) -> None:
    assert passed(file, "slow") >= FILES[file][1]


def test_real_tiles_in_values() -> None:
    assert passed("real_tile_cases.py", "not slow") >= 9
