"""The C++ sources as text: headers that open alone, formatting, and the plans of csrc/cpu/plan.h."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulation
import pytest
from places import ROOT

CSRC = ROOT / "csrc"

setup_spec = importlib.util.spec_from_file_location("slimkernels_setup", ROOT / "setup.py")
assert setup_spec is not None and setup_spec.loader is not None
setup = importlib.util.module_from_spec(setup_spec)
setup_spec.loader.exec_module(setup)


def output(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    cxx, version = setup.find_compiler()
    if cxx is None:
        pytest.skip(version)
    return cxx


# Headers


# Of every source of kernels in csrc/cpu its flags, and what a compiler that takes them compiles.
SOURCES = {
    **{f"conv2d_{isa}": (flags, setup.ISA_PROBES[isa]) for isa, flags in setup.ISA_FLAGS.items()},
    **{f"pairs_{engine}": (flags, setup.ENGINE_PROBES[engine]) for engine, flags in setup.ENGINE_FLAGS.items()},
}


def headers_of(compiler: list[str], name: str) -> set[Path]:
    """Headers of csrc/ that a source of kernels includes, directly or not."""
    rule = output(*compiler, "-std=c++17", *SOURCES[name][0], "-MM", CSRC / "cpu" / f"{name}.cpp")
    return {Path(word).resolve() for word in rule.replace("\\\n", " ").split() if word.endswith(".h")}


def test_every_header_compiles_alone(compiler: list[str], tmp_path: Path):
    """With the flags of each source that uses it, so that an editor can open it; and twice, for its guard."""
    uses: dict[Path, list[str]] = {path: ["conv2d_scalar"] for path in (CSRC / "tests").glob("*.h")}
    for name, (flags, probe) in SOURCES.items():
        if setup.try_compile(compiler, [*setup.CPU, *flags], probe) is None:
            for header in headers_of(compiler, name):
                uses.setdefault(header, []).append(name)
    assert set(CSRC.glob("*.h")) <= set(uses)
    if {name for names in uses.values() for name in names} == set(SOURCES):
        assert set((CSRC / "cpu").glob("*.h")) <= set(uses), "a header that no source of kernels includes"
        vectors = {"vec16.h", "pairs_vec16.h"}
        assert all({"pairs_avx512bf16", "pairs_amx"} <= set(uses[CSRC / "cpu" / name]) for name in vectors)

    def fault(header: Path, name: str) -> str | None:
        source = tmp_path / f"{header.stem}_{name}.cpp"
        source.write_text(f'#include "{header}"\n#include "{header}"\n')
        flags = [*setup.CPU, *SOURCES[name][0], "-fopenmp", "-Werror", "-fsyntax-only"]
        done = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True)
        return None if done.returncode == 0 else f"{header.name} with the flags of {name}:\n{done.stderr}"

    # Flags that are the same are tried once.
    tried = {(header, tuple(SOURCES[name][0])): (header, name) for header, names in uses.items() for name in names}
    with ThreadPoolExecutor(2) as pool:
        faults = list(pool.map(lambda use: fault(*use), tried.values()))
    assert [text for text in faults if text is not None] == []


@pytest.mark.slow
def test_headers_of_the_bindings_compile_alone(compiler: list[str], tmp_path: Path):
    """With Python's and pybind11's headers, as setup.py compiles csrc/bindings.cpp."""
    pybind11 = pytest.importorskip("pybind11")
    headers = sorted((CSRC / "bindings").glob("*.h"))
    assert len(headers) >= 3
    include = ["-I", CSRC, "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    source = tmp_path / "alone.cpp"
    for header in headers:
        source.write_text(f'#include "{header}"\n#include "{header}"\n')
        output(*compiler, *setup.COMMON, *include, "-Werror", "-fsyntax-only", source)


def test_cuda_headers_compile_alone(compiler: list[str], tmp_path: Path):
    """As the emulation compiles them, whose headers stand for CUDA's."""
    cuda_emulation.write_headers(tmp_path)
    headers = sorted(path.name for path in (CSRC / "cuda").glob("*.cuh"))
    assert len(headers) >= 5
    source = tmp_path / "alone.cpp"
    for header in headers:
        source.write_text(f'#include "{header}"\n#include "{header}"\n')
        output(*compiler, "-std=c++17", "-w", "-fsyntax-only", *cuda_emulation.include_flags(tmp_path), source)


def test_kernels_header_is_c(compiler: list[str], tmp_path: Path):
    (tmp_path / "user.c").write_text(f'#include "{CSRC / "kernels.h"}"\n')
    flags = ["-x", "c", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    output(*compiler, *flags, tmp_path / "user.c")


# Formatting


def clang_format() -> str:
    """The clang-format that `pip install -e '.[lint]'` brings; other versions format differently."""
    pinned = re.search(r'"clang-format==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    beside_python = Path(sys.executable).with_name("clang-format")
    found = str(beside_python) if beside_python.exists() else shutil.which("clang-format")
    if found is None:
        pytest.skip("clang-format is not installed (pip install -e '.[lint]')")
    version = output(found, "--version")
    if f"version {pinned[1]}" not in version:
        pytest.skip(f"clang-format {pinned[1]} is pinned in pyproject.toml, this is {version.strip()}")
    return found


def sources() -> list[Path]:
    return sorted(path for suffix in ("h", "cpp", "cu", "cuh") for path in CSRC.rglob(f"*.{suffix}"))


def test_sources_are_formatted():
    """All of csrc/."""
    output(clang_format(), "--dry-run", "--Werror", *sources())


def test_formatting_is_checked(tmp_path: Path):
    """A space too many in a source is an error."""
    tool = clang_format()
    shutil.copy(ROOT / ".clang-format", tmp_path / ".clang-format")
    copy = tmp_path / "csrc" / "cpu" / "plan.h"
    copy.parent.mkdir(parents=True)
    copy.write_text((CSRC / "cpu" / "plan.h").read_text().replace("int64_t ", "int64_t  ", 1))
    done = subprocess.run([tool, "--dry-run", "--Werror", copy], capture_output=True, text=True)
    assert done.returncode == 1 and "clang-format-violations" in done.stderr, done.stderr


# Plans


def test_plans_are_those_recorded(compiler: list[str], tmp_path: Path):
    """Every decision for VGG-19 and ResNet-50. After a deliberate change write plan_check's output to plans.txt."""
    output(*compiler, "-std=c++17", "-O1", CSRC / "tests" / "plan_check.cpp", "-o", tmp_path / "plan_check")
    got = output(tmp_path / "plan_check").splitlines()
    expected = (CSRC / "tests" / "plans.txt").read_text().splitlines()
    assert len(expected) == 251
    assert [line for line in got if line not in expected] == []
    assert got == expected
