"""Every `type: ignore` of the package names its error, and says why mypy is wrong there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "slimkernels"
IGNORE = re.compile(r"# type: ignore(?P<code>\[[a-z, -]+\])?(?P<reason>  # \w.+)?")
MODULES = sorted(PACKAGE.rglob("*.py"))


def faults(source: str) -> list[str]:
    """Ignored lines without a code, or without a reason behind it or in the comment above."""
    found, above = [], ""
    for number, line in enumerate(source.splitlines(), 1):
        match = IGNORE.search(line)
        if match and not (match["code"] and (match["reason"] or above.strip().startswith("# For mypy: "))):
            found.append(f"line {number}: {line.strip()}")
        above = line
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_ignored_type_error_has_a_reason(module: Path) -> None:
    assert faults(module.read_text()) == []


def test_ignored_errors_without_a_reason_are_found() -> None:
    assert faults("x = f()  # type: ignore[arg-type]  # f takes more than it says") == []
    assert faults("# For mypy: g takes more than it says.\nx = g()  # type: ignore[misc]") == []
    assert faults("x = f()  # type: ignore[arg-type]") == ["line 1: x = f()  # type: ignore[arg-type]"]
    assert len(faults("x = f()  # type: ignore  # f takes more than it says\nx = g()  # type: ignore[misc]")) == 2
