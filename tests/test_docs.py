"""The documentation's Python runs as written, its links lead somewhere, and docstring examples print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slimkernels

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
PYTHON_PAGES = [p for p in PAGES if BLOCK.search(p.read_text())]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=label)
def test_python_of_a_page_runs_as_written(page: Path, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, in a process of their own."""
    code = "\n".join(BLOCK.findall(page.read_text()))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{label(page)}:\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing, f"{label(page)}: {missing}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "api"], ids=label)
def test_names_of_the_reference_exist(page: Path) -> None:
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{label(page)}: {name}"


def test_files_of_the_contributors_map_exist() -> None:
    """``package/{one,two}.py`` in CONTRIBUTING's tables: every file is there, under slimkernels/ or the root."""
    named = re.findall(
        r"`([\w./*]*?(?:\{[\w,]+\})?[\w./]*\.(?:py|h|cpp|yaml))`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    files = []
    for name in named:
        found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        files += [f"{found[1]}{part}{found[3]}" for part in found[2].split(",")] if found else [name]
    assert len(files) > 50
    for file in files:
        assert any(ROOT.glob(file)) or any((ROOT / "slimkernels").glob(file)), f"CONTRIBUTING.md: no {file}"


def documented_modules() -> list[str]:
    """Modules with an example in a docstring."""
    names = [m.name for m in pkgutil.walk_packages(slimkernels.__path__, "slimkernels.") if m.name != "slimkernels._C"]
    folder = Path(slimkernels.__file__).parent.parent
    found = []
    for name in names:
        path = folder / (name.replace(".", "/") + ".py")
        path = path if path.exists() else folder / name.replace(".", "/") / "__init__.py"
        if ">>>" in path.read_text():
            found.append(name)
    return found


@pytest.mark.parametrize("name", documented_modules())
def test_docstring_examples_print_what_they_say(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=label)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(script), "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip(), "an example says what it reached"
