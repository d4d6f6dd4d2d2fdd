"""Environment variables: read in one place, unknown values refused with the valid ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import slimkernels
from slimkernels import env

NAMES = ("SLIMKERNELS_BACKEND", "SLIMKERNELS_ISA", "SLIMKERNELS_CACHE_DIR", "TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    assert env.backend() == "auto" and env.isa_cap() is None and env.triton_interpret() is False


@pytest.mark.parametrize("value", ["auto", "reference", "cpu", "triton", "cuda"])
def test_backend(monkeypatch, value) -> None:
    for spelling in (value, value.upper(), f" {value} "):
        monkeypatch.setenv("SLIMKERNELS_BACKEND", spelling)
        assert env.backend() == value


@pytest.mark.parametrize("value", ["scalar", "avx2", "avx512"])
def test_isa_cap(monkeypatch, value) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", value)
    assert env.isa_cap() == value


@pytest.mark.parametrize("name", ["SLIMKERNELS_BACKEND", "SLIMKERNELS_ISA"])
def test_empty_means_unset(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "")
    assert env.backend() == "auto" and env.isa_cap() is None


def test_unknown_values_are_refused_with_the_valid_ones(monkeypatch) -> None:
    monkeypatch.setenv("SLIMKERNELS_BACKEND", "opencl")
    message = r"^SLIMKERNELS_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'opencl'$"
    with pytest.raises(ValueError, match=message):
        env.backend()
    monkeypatch.setenv("SLIMKERNELS_ISA", "sse2")
    with pytest.raises(ValueError, match=r"^SLIMKERNELS_ISA: expected one of scalar, avx2, avx512, got 'sse2'$"):
        env.isa_cap()


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_triton_interpret(monkeypatch, value, expected) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert env.triton_interpret() is expected


def test_cache_dir_is_named_and_not_created(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_dir() == tmp_path / "xdg" / "slimkernels"
    monkeypatch.setenv("SLIMKERNELS_CACHE_DIR", str(tmp_path / "own"))
    assert env.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("SLIMKERNELS_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / ".cache" / "slimkernels"
    assert not list(tmp_path.iterdir())


def test_env_is_the_only_reader() -> None:
    """No other module reads the environment, and env.py documents what it reads."""
    package = Path(slimkernels.__file__).parent
    reads = re.compile(r"os\.environ(\.get|\[)|os\.getenv|from os import environ")
    writes = re.compile(r"os\.environ\[[^]]+\] = |os\.environ\.setdefault|os\.environ\.pop|del os\.environ")
    readers = {p.name for p in package.rglob("*.py") if reads.search(writes.sub("", p.read_text()))}
    assert readers == {"env.py"}
    for name in re.findall(r'"((?:SLIMKERNELS|TRITON|XDG)_[A-Z_]+)"', (package / "env.py").read_text()):
        assert name == "XDG_CACHE_HOME" or f"``{name}``" in (env.__doc__ or ""), f"{name} is not documented"
