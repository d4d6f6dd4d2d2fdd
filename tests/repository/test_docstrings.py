"""Docstrings in the form that mkdocstrings and readers can take apart: Google's sections, one name an entry."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT

PACKAGE = ROOT / "slimkernels"
SECTIONS = ("Args", "Attributes")
ENTRY = re.compile(r"\*{0,2}(\w+):( |$)")  # `name: what it is`; types are in the signature
# `a: this. b: that.` in one entry; a colon in a sentence does not follow a name alone.
SECOND_ENTRY = re.compile(r"[.;] `?([A-Za-z_]\w*)`?: ")


class Documented(NamedTuple):
    """A class or function with the names that its docstring may describe: parameters, fields, attributes."""

    name: str
    docstring: str
    names: frozenset[str]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]
    return {argument.arg for argument in given}


def names_of(node: ast.AST) -> set[str]:
    """Parameters of a function; of a class those of ``__init__``, its fields, methods and what it assigns to self."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return parameters(node)
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(child.name)
            names |= parameters(child) if child.name in ("__init__", "__new__", "__call__") else set()
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        elif isinstance(child, ast.Assign):  # members of an enumeration
            names |= {target.id for target in child.targets if isinstance(target, ast.Name)}
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
    return names


def documented(source: str) -> Iterator[Documented]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            yield Documented(node.name, ast.get_docstring(node) or "", frozenset(names_of(node)))


def entries(docstring: str) -> Iterator[str]:
    """The entries of the Args and Attributes sections, each with its continuation lines joined."""
    inside, entry = False, ""
    for line in [*docstring.splitlines(), "end"]:
        starts_at = len(line) - len(line.lstrip())
        if entry and line.strip() and starts_at <= 4:
            yield entry
            entry = ""
        if line.strip() and starts_at == 0:
            inside = line.strip().rstrip(":") in SECTIONS and line.endswith(":")
        elif inside and line.strip():
            entry = f"{entry} {line.strip()}" if entry else line.strip()


def faults(source: str) -> list[str]:
    found = []
    for item in documented(source):
        for entry in entries(item.docstring):
            match, second = ENTRY.match(entry), SECOND_ENTRY.search(entry)
            if match is None:
                found.append(f"{item.name}: no entry of one name: {entry!r}")
            elif match[1] not in item.names:
                found.append(f"{item.name}: describes {match[1]!r}, which it does not have")
            elif second is not None and second[1] in item.names:
                found.append(f"{item.name}: {second[1]!r} is described in the entry of {match[1]!r}")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_have_one_name_an_entry(module: Path) -> None:
    assert faults(module.read_text()) == []


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("a, b: two numbers.", "f: no entry of one name: 'a, b: two numbers.'"),
        ("a (int): a number.", "f: no entry of one name: 'a (int): a number.'"),
        ("a: a number. b: another.", "f: 'b' is described in the entry of 'a'"),
        ("c: a number.", "f: describes 'c', which it does not have"),
    ],
    ids=["two names", "type in the entry", "second entry in a sentence", "unknown name"],
)
def test_other_forms_are_found(described: str, message: str) -> None:
    source = 'def f(a, b):\n    """Adds.\n\n    Args:\n        {}\n\n    Returns:\n        The sum.\n    """\n'
    assert faults(source.format(described)) == [message]
    assert faults(source.format("a: a number, one of:\n            several.\n        b: another.")) == []
