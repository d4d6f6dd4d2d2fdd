"""The Triton kernels run by Triton's interpreter on CPU tensors.

TRITON_INTERPRET is read where @triton.jit decorates, so the tests live in triton_interpret_cases.py and run in
a process of their own; to see them one by one: `TRITON_INTERPRET=1 pytest tests/triton_interpret_cases.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimkernels.kernels.problems import LowRankLinearProblem
from slimkernels.kernels.triton import runtime as triton_runtime

pytest.importorskip("triton")
CASES = Path(__file__).with_name("triton_interpret_cases.py")


def run_cases(marker: str) -> str:
    """Runs the cases with a marker expression; returns pytest's last line."""
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-m", marker, "-p", "no:cacheprovider", "--tb=short"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=CASES.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary and "xfailed" not in summary, summary
    return summary


def passed(summary: str) -> int:
    return int(re.search(r"(\d+) passed", summary)[1])


def test_interpreter() -> None:
    assert passed(run_cases("not slow")) > 100


@pytest.mark.slow
def test_interpreter_every_case_of_every_block_shape() -> None:
    assert passed(run_cases("slow")) > 280


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = LowRankLinearProblem(8, 8, 8, 4, torch.float32, "cpu")
    assert "TRITON_INTERPRET=1" in triton_runtime.shape_reason(problem)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.shape_reason(problem) is None
    assert triton_runtime.available() is None
