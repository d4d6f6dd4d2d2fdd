"""A pytest plugin for the GPU tests: the most telling first, each result on disk at once.

Load it with ``-p gpu_check.telling``. ``--rows FILE`` appends one line a finished test, and first how many there are,
so that even a killed run says what passed, what failed and what was not reached. ``--again FILE`` runs what such a file
holds as failed, and then what it does not hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gpu_check import rows

# Patterns of test names: what decides whether the headline can be believed comes first, whatever takes several GPUs or
# repeats a case in another dtype last.
ORDER = (
    r"test_fused_gpu.*::test_every_configuration.*-stem",  # where nothing was compiled beforehand, half a minute each
    r"test_triton_gpu.*::test_conv_block_shapes",
    r"test_triton_gpu.*::test_conv_default_tiles_of_a_large_image.*bfloat16",
    r"test_triton_gpu.*::test_(split_and|captured|launch_follows_the_current|nonfinite|a_dropped)",
    r"test_triton_gpu.*::test_conv\[bfloat16",
    r"test_triton_backward_gpu.*::test_compiled_and_graphed",
    r"test_triton_backward_gpu.*bfloat16",
    r"test_graphs|test_graphed_steps",
    r"test_composition_gpu",
    r"test_cuda.*(captured|stream|bfloat16)",
    r"test_triton_gpu.*::test_(linear|low_rank)",
    r"test_cuda",
    r"test_engine",
    r"test_triton_gpu.*::test_every_configuration.*bfloat16",
    r"test_triton_gpu.*::test_conv_variants",
    r"test_triton_gpu",
)
_MESSAGE = 600


def rank(nodeid: str) -> int:
    """Place of a test in `ORDER`, behind all patterns where none fits."""
    return next((i for i, pattern in enumerate(ORDER) if re.search(pattern, nodeid)), len(ORDER))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, default=None, help="append every test's result to this JSON-lines file")
    parser.addoption("--again", type=Path, default=None, help="what failed by this file, then what it does not hold")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist: the controller sees all reports
        config.pluginmanager.register(_Writer(config.getoption("--rows")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.nodeid))
    before = config.getoption("--again")
    if before is not None:
        outcomes = {row["name"]: row["outcome"] for row in rows.of_suite(rows.read(before), "test")}
        failed = [item for item in items if outcomes.get(item.nodeid) == "failed"]
        fresh = [item for item in items if item.nodeid not in outcomes]
        config.hook.pytest_deselected(items=[item for item in items if outcomes.get(item.nodeid, "failed") != "failed"])
        items[:] = failed + fresh


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """That nothing is left to run again is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--again") is not None:
        session.exitstatus = pytest.ExitCode.OK


class _Writer:
    """Writes each test's outcome as it is known."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._collected = path, False

    def _collection(self, count: int) -> None:
        if not self._collected:
            self._collected = True
            rows.append(self._path, {"suite": "tests", "name": "collected", "count": count})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # empty in a controller of pytest-xdist
            self._collection(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._collection(len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, Any] = {
            "suite": "test", "name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)
        }  # fmt: skip
        if report.failed:
            row["message"] = str(report.longrepr)[-_MESSAGE:]
            crash = getattr(report.longrepr, "reprcrash", None)
            if crash is not None:  # a long error's first line is not in the end of the message
                row["error"] = (crash.message.strip().splitlines() or [""])[0][:_MESSAGE]
        rows.append(self._path, row)
