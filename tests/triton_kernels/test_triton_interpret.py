"""The Triton kernels run by Triton's interpreter on CPU tensors.

TRITON_INTERPRET is read where @triton.jit decorates, so the tests live in triton_interpret_cases.py and run in
a process of their own; to see them one by one: `TRITON_INTERPRET=1 pytest` of that file.
"""

from __future__ import annotations

import pytest
import torch
import triton_processes

from slimkernels.kernels.problems import LowRankLinearProblem
from slimkernels.kernels.triton import runtime as triton_runtime

pytest.importorskip("triton")
CASES = "triton_interpret_cases.py"


@pytest.mark.parametrize("name", triton_processes.names(CASES))
def test_interpreter(name: str) -> None:
    triton_processes.check(CASES, name)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", triton_processes.names(CASES, slow=True))
def test_interpreter_every_case_of_every_block_shape(name: str) -> None:
    triton_processes.check(CASES, name, slow=True)


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = LowRankLinearProblem(8, 8, 8, 4, torch.float32, "cpu")
    assert "TRITON_INTERPRET=1" in triton_runtime.shape_reason(problem)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.shape_reason(problem) is None
    assert triton_runtime.available() is None
