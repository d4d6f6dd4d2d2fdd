"""The documentation's Python runs as written, its links lead somewhere, and docstring examples print what they say."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import ROOT, TESTS

import slimkernels

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Every name in the `__all__` of these has a place in the reference.
PUBLIC_MODULES = ("", ".compress", ".data", ".inference", ".models", ".nn", ".ops")
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


def in_the_reference(page: Path) -> list[Any]:
    """What the ``::: name`` lines of a page name: modules, classes, functions."""
    found = []
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{label(page)}: {name}"
            found.append(getattr(importlib.import_module(module), attribute))
    return found


REFERENCE = [p for p in PAGES if p.parent.name == "api"]


@pytest.mark.parametrize("page", REFERENCE, ids=label)
def test_names_of_the_reference_exist(page: Path) -> None:
    assert in_the_reference(page)


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    named = [value for page in REFERENCE for value in in_the_reference(page)]
    home = importlib.import_module(f"slimkernels{module}")
    values = {name: getattr(home, name) for name in home.__all__ if not name.startswith("__")}
    values = {name: value for name, value in values.items() if not isinstance(value, ModuleType)}
    assert values
    if home in named:  # whole: what has a docstring is shown
        folder = Path(home.__file__ or "").parent
        text = "\n".join(path.read_text() for path in sorted(folder.glob("*.py")))
        missing = [
            name
            for name, value in values.items()
            if not re.search(rf'^{name} = .*\n"""', text, re.MULTILINE)
            and not (callable(value) and vars(value).get("__doc__", getattr(value, "__doc__", None)))
        ]
    else:
        missing = [name for name, value in values.items() if not any(value is other for other in named)]
    assert not missing, f"slimkernels{module}: {missing}"


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


def test_rooms_of_the_tests_are_in_the_contributors_map() -> None:
    named = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text().partition("| room in `tests`")[2], re.M
    )
    rooms = {path.parent.name for path in TESTS.glob("*/*.py")} - {"helpers"}
    assert set(named) >= rooms and len(set(named)) == len(named)


@pytest.mark.parametrize("page", [page for page in PAGES if "`slimkernels/" in page.read_text()], ids=label)
def test_files_named_by_a_page_exist(page: Path) -> None:
    """`slimkernels/...` and `csrc/...`, and file names that follow one in the same folder: ``a/b.py`, `c.py``."""
    missing = []
    for first, others in re.findall(
        r"`((?:slimkernels|csrc|benchmarks|examples)/[\w./-]+)`((?:, `[\w]+\.\w+`)*)", page.read_text()
    ):
        folder = (ROOT / first).parent if Path(first).suffix else ROOT / first
        names = [ROOT / first, *(folder / name for name in re.findall(r"`(.*?)`", others))]
        missing += [str(path.relative_to(ROOT)) for path in names if not path.exists()]
    assert not missing, f"{label(page)}: {missing}"


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


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=label)
def test_examples_run_as_notebooks(notebook: Path, tmp_path: Path) -> None:
    """In a kernel of this interpreter; a cell that raises fails the test, and the pictures are drawn."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[examples]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[examples]'")
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=label)
def test_notebooks_are_small(notebook: Path) -> None:
    """Committed without times, which would be those of whoever committed them."""
    assert notebook.stat().st_size < 80_000
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    texts = [text for cell in cells for output in cell["outputs"] for text in output.get("text", [])]
    assert not re.search(r"\bms\b|second", "".join(texts))


def recorded(batch: int, sparsity: float, block: str) -> dict[str, float]:
    """The committed measurement that README and docs/measuring.md quote."""
    record = json.loads((ROOT / "benchmarks/results/amd-epyc-zen5-2c/2e2017bdf1f0.json").read_text())
    shape = [int(side) for side in block.split("x")]
    (row,) = [
        row
        for row in record["rows"]
        if (row.get("network"), row.get("batch"), row.get("sparsity"), row.get("block_shape"))
        == ("vgg19_cifar", batch, sparsity, shape)
    ]
    return row


@pytest.mark.parametrize("page", ["README.md", "docs/measuring.md"])
def test_quoted_rows_are_those_measured(page: str) -> None:
    """``| 16 | 87.5%, 16x1 | dense | DeepSparse | ours | speed-up |``, rounded to the digits shown."""
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+)%, (\w+) \| ([\d.]+) \| \**([\d.]+)\** \| ([\d.]+) \| \**([\d.]+)x",
        (ROOT / page).read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 4
    for batch, percent, block, *shown in rows:
        row = recorded(int(batch), float(percent) / 100, "1x1" if block == "unstructured" else block)
        keys = ("dense_p50_ms", "deepsparse_p50_ms", "p50_ms", "speedup")
        for key, text in zip(keys, shown, strict=True):
            digits = len(text.partition(".")[2])
            assert abs(row[key] - float(text)) <= 0.51 * 10**-digits, f"{page}: {key} of {batch}, {percent}%, {block}"


@pytest.mark.parametrize("picture", ["vgg19", "vgg19-dark"])
def test_the_picture_shows_what_was_measured(picture: str) -> None:
    """docs/pictures/draw.py has been run since the record was made."""
    text = (ROOT / f"docs/pictures/{picture}.svg").read_text()
    for batch in (1, 16, 128):
        row = recorded(batch, 0.875, "16x1")
        assert f">{row['speedup']:.1f}x<" in text
        for key in ("dense_p50_ms", "deepsparse_p50_ms", "p50_ms"):
            assert any(f">{row[key]:.{digits}f} ms<" in text for digits in (0, 1, 2)), (batch, key)
