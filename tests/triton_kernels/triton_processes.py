"""Triton kernels in processes of their own, because TRITON_INTERPRET is read where @triton.jit decorates.

A file of cases runs once under the interpreter, and every test function in it becomes a test of the suite. To see its
cases one by one: ``TRITON_INTERPRET=1 pytest`` of that file. Compiling scripts print JSON.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from places import PYTHONPATH, ROOT

CASES = Path(__file__).resolve().parent
# What a block may use: A100, H100/H200, B200.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
REGISTER_FILE = 64 * 1024


def names(file: str, *, slow: bool = False) -> list[str]:
    """The test functions of a file that are, or are not, marked slow as a whole."""
    functions = [node for node in ast.parse((CASES / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    return [
        function.name
        for function in functions
        if function.name.startswith("test_")
        and slow == any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in function.decorator_list)
    ]


@cache
def outcomes(file: str, marker: str) -> dict[str, dict[str, str]]:
    """Test function -> case -> what went wrong, "" where nothing did. The file runs once, with a marker expression."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(CASES / file), "-q", "-m", marker, "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "interpreter_speed", f"--junitxml={report}"]
        path = os.pathsep.join([str(CASES), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1) and report.exists(), (done.stdout + done.stderr)[-8000:]
        found: dict[str, dict[str, str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "")
            wrong = "\n".join(f"{child.tag}: {child.get('message')}\n{child.text or ''}" for child in case)
            found.setdefault(name.partition("[")[0], {})[name] = wrong
    return found


def check(file: str, name: str, *, slow: bool = False) -> None:
    """Every case of a test function passed, none was skipped, and there is at least one."""
    cases = outcomes(file, "slow" if slow else "not slow").get(name, {})
    wrong = {case: text for case, text in cases.items() if text}
    assert not wrong, f"{file}: " + "\n".join(f"{case}\n{text[-2000:]}" for case, text in wrong.items())
    assert cases, f"{file}: {name} has no case"


def printed(script: str, cache: Path, *flags: str) -> Any:
    """The JSON that a script prints which compiles kernels, with a Triton cache of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "ignore", str(CASES / script), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)
