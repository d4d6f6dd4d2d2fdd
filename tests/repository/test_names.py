"""What is said is said in full: a search finds every kernel by its name, and errors begin with who raises them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.nn import Conv2d

import slimkernels
from slimkernels.kernels import KERNELS
from slimkernels.nn import BlockSparseConv2d, FusedConv2d, LowRankConv2d

PACKAGE = Path(slimkernels.__file__).parent

# Where a message is only half of one: what catches it puts the function, and most often a file, in front.
COMPLETED_BY = {
    "builders.py": "`built_on_meta`: by `load`",
    "cli/own_model.py": "`_import_file`: by `build_own`",
    "checkpoint.py": "`_present`: by `save`",
    "compress/pruning/sensitivity.py": "`_read`, by itself",
    "conversion/compact.py": "by `save`, `quantize_` and `load`",
    "conversion/compact_index.py": "by `load`",
    "conversion/graph.py": "`traced_graph`: by the report",
    "conversion/placement.py": "by `load`",
    "conversion/plan.py": "`parse_json`: by `ModelPlan.from_json`",
    "conversion/symbols.py": "by `load`",
    "data/decoded.py": "`_eight_bits`: by `_pixels`",
    "dispatch/tables.py": "by `Table.load`",
    "files.py": "`unsealed_json`: by its callers",
    "kernels/problems.py": "`problem_from_json`: by `Table.load`",
    "nn/attributes.py": "`resolved_padding`: by `unsupported_conv_reason`",
}
# A function, class or module, an option of the command line, or what is put in for one of them.
BEGINNING = re.compile(r"(?!expected\b)(\{\}( importance)?|[A-Za-z_][\w.]*|--[a-z-]+( cuda)?): ")


@pytest.mark.parametrize("name", KERNELS)
def test_a_search_finds_a_kernel_by_its_full_name(name: str) -> None:
    """In the table, and only once there: where it says what the kernel is."""
    table = (PACKAGE / "kernels" / "__init__.py").read_text()
    assert table.count(f'"{name}"') == 1


def template(message: ast.expr) -> str | None:
    """The text of a literal with ``{}`` for what is put in; None where it is no literal."""
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if isinstance(message, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in message.values)
    return None


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and template of what is raised in a file. Accessors of modules speak as Python does."""
    tree = ast.parse(path.read_text())
    own = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__getattr__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args and id(node) not in own:
            text = template(node.exc.args[0])
            if text is not None:
                yield node.lineno, text


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_begin_with_who_raises_them(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    wrong = [f"{name}:{line}: {text!r}" for line, text in messages(path) if not BEGINNING.match(text)]
    assert bool(wrong) == (name in COMPLETED_BY), wrong or f"{name} completes its messages: take it off the list"


def test_the_rule_for_errors_is_one() -> None:
    for good in ("bsr_conv2d: expected x", "{}: expected x", "factorize_: layer {}: no", "--data: expected a folder"):
        assert BEGINNING.match(good), good
    for bad in ("expected x: {}", "no such kernel: {}", "its weight is {}", "{} is no kernel: no"):
        assert not BEGINNING.match(bad), bad


@pytest.mark.parametrize("cls", [BlockSparseConv2d, FusedConv2d, LowRankConv2d], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("value, error", [((1, 2, 3), ValueError), ("two", TypeError), (1.5, TypeError)])
def test_pairs_of_a_module_are_refused_by_its_name(cls: type, value: object, error: type[Exception]) -> None:
    made = {
        BlockSparseConv2d: lambda: BlockSparseConv2d.from_dense(Conv2d(8, 8, 3), (8, 1)),
        FusedConv2d: lambda: FusedConv2d.from_dense(Conv2d(8, 8, 3)),
        LowRankConv2d: lambda: LowRankConv2d(8, 8, 3, kind="svd", ranks=(2,)),
    }
    module = made[cls]()
    with pytest.raises(error, match=rf"^{cls.__name__}: expected stride to be one int or two, got "):
        module.stride = value
    assert module.stride == (1, 1)
