"""The GPU check's rehearsal without a GPU, the stand-in that it runs on, and the Triton cache made beforehand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import PYTHONPATH, ROOT

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")


def run(*command: str, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the repository and its benchmarks on the path.

    It is no worker of this suite's: pytest-benchmark measures nothing in one.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    env |= {"PYTHONPATH": os.pathsep.join([PYTHONPATH, str(ROOT / "benchmarks")]), **variables}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_stand_in(tmp_path: Path) -> None:
    """In a process of its own, without this suite's fixtures: they would initialise CUDA."""
    flags = ("-q", "-p", "no:cacheprovider", "--noconftest", "--tb=short", "-W", "ignore")
    done = run(
        "-m", "pytest", "tests/device_check/stand_in_cases.py", *flags, seconds=240, TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 9 and "skipped" not in done.stdout


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = run("-m", "gpu_check", "--dry-run", seconds=1500, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r"dry run: (\d+) stages, 0 faults", done.stdout), done.stdout[-2000:]


@pytest.mark.slow
def test_dry_run_finds_a_failing_stage(tmp_path: Path) -> None:
    """A kernel that refuses to launch fails the stage that launches it, and the dry run with it."""
    (tmp_path / "broken.py").write_text(
        "import stand_in.launches as launches\n"
        "launches.LARGEST_GRID = (1, 1, 1)\n"
    )  # fmt: skip
    done = run("-m", "gpu_check", "--dry-run", "correctness", seconds=300, SLIMKERNELS_STAND_IN_PLUGIN="broken",
               PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(tmp_path)]))  # fmt: skip
    assert done.returncode == 1, done.stdout[-4000:]
    assert "correctness: failed" in done.stdout and "cannot be launched" in done.stdout


@pytest.mark.slow
def test_warm_cache_is_hit_by_a_new_process(tmp_path: Path) -> None:
    """Two kernels compiled, packed and found again where nothing can be compiled; a removed one is missed."""
    folder, archive = tmp_path / "cache", tmp_path / "cache.tar.xz"
    script = ("benchmarks/warm_triton_cache.py", "--folder", str(folder), "--out", str(archive), "--limit", "2")
    made = run(*script, "--processes", "1", seconds=300)
    assert made.returncode == 0, (made.stdout + made.stderr)[-4000:]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".cubin", ".json", ".so"}
    found = run(*script, "--check", seconds=300)
    assert found.returncode == 0 and "2 jobs, 0 not in the cache" in found.stdout, found.stdout + found.stderr
    import shutil

    from gpu_check.versions import unpack

    shutil.rmtree(folder)
    assert unpack(archive, folder) >= 1
    assert run(*script, "--check", seconds=300).returncode == 0
    for path in folder.rglob("*.json"):
        path.unlink()
    missed = run(*script, "--check", seconds=300)
    assert missed.returncode == 1 and "not in the cache" in missed.stdout
