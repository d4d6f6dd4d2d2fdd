"""The shape of the package: imports point one way, names do not collide, every public name is documented."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slimkernels

PACKAGE = Path(slimkernels.__file__).parent
MAX_LINES = 475

# Imports point only to the right; modules of one entry do not import each other. A package stands for all its modules.
CHAIN = (
    "__main__", "cli", "recipes", "data", "compress", "checkpoint, inference", "conversion, tuning",
    "pattern, builders", "models", "nn", "ops", "dispatch", "kernels", "_extension, formats",
    "capture, files, timing, progress", "tensors", "env",
)  # fmt: skip
LEVEL = {name: level for level, names in enumerate(CHAIN) for name in names.split(", ")}
# For tests and benchmarks: nothing else in the package imports them, and they import no more than this.
TEST_ONLY = {"testing": {"formats"}, "cases": {"testing", "formats", "kernels"}}
# Inside a package, by the same rule; a package in it stands for all its modules.
PACKAGES = {
    "cli": (
        "__main__", "__init__", "app", "training, compression, evaluation, experiments", "own_model", "options, tables",
        "demo, bench, tune", "plots, weights, info, comparison, peers",
    ),
    "recipes": (
        "runner", "measurement, report", "rows, figures, summary", "companions", "store, schema, sources, clock",
        "checks",
        "__init__",
    ),
    "data": ("__init__", "datasets", "decoded, tensor_loader"),
    "conversion": (
        "__init__", "convert_model, plain_model", "finish, output_layouts", "units, outputs", "decide", "candidates",
        "measure, report",
        "report_rows, container, placement, hub", "compact", "compact_index",
        "quantization, plan", "symbols, analysis, batch_norms", "folding", "factor_chains", "layers",
        "readers", "calls", "graph, spread", "wrappers",
    ),
    "compress": (
        "distillation, factorization, pruning, quantization", "training", "allocation, selection", "fake_quantization",
        "__init__",
    ),
    "compress/pruning": (
        "budget, gradual, sensitivity, shrink, sparse_training", "prune", "importance, latency",
        "granularity, schedules", "__init__",
    ),
    "compress/factorization": (
        "factorize", "twins", "layer_ranks", "layer_costs, whitening, ranks", "decompositions", "__init__",
    ),
    "compress/distillation": ("distill", "terms", "features, losses", "__init__"),
    "compress/training": (
        "train", "engine", "setup", "checkpoint, processes, trackers", "steps, ema, graphed_steps",
        "evaluation, config", "callbacks", "__init__",
    ),
    "inference": (
        "__init__", "graphed_model, onnx_export", "one_launch", "one_launch_runs",
        "cuda_linear_chain, cuda_stem", "cuda_chain, cuda_graph, cpu_replay, warming", "cpu_recording",
        "chain_forms",
        "cpu_passes", "native_nodes", "native_layers, concurrency, sampled_graph", "inputs, batches",
    ),
    "dispatch": (
        "select", "tables, fused_cost", "break_even, cpu_cost, devices, gpu_cost", "gpu_dense_cost", "gpu_prediction",
        "gpu_rates", "__init__",
    ),
    "kernels": (
        "__init__", "cuda_chain, cuda_input_gradient", "cuda_gradients", "peak, cudnn, cuda_low_rank",
        "cuda_tensor_cores",
        "cpu, cuda, triton", "reference, strips, chain_plan, low_rank_plan, gathered_packs", "resident_plan",
        "far_taps, image_parts, tensor_core_tiles, tf32, transposed", "packs, problems, strided_pointwise",
    ),
    "kernels/cpu": (
        "chain", "gradients, layer, layouts, low_rank", "batch_norm, conv2d, pooling, weight_gradient", "pairs",
        "steps", "library", "abi", "memory, pieces", "__init__",
    ),
    "kernels/triton": (
        "bsr_conv2d, bsr_conv2d_backward_w, bsr_conv2d_backward_x, low_rank_linear, low_rank_conv2d, "
        "relu_maxpool2_backward, fused_conv2d, batch_norm",
        "bsr_conv2d_images, bsr_conv2d_shared, bsr_conv2d_kernel, bsr_conv2d_split, fused_conv2d_kernel, "
        "batch_norm_kernel",
        "bsr_conv2d_geometry, bsr_conv2d_config, fused_conv2d_config",
        "sums", "bsr_conv2d_index, tiles, launcher", "runtime", "__init__",
    ),
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def unit(path: Path) -> str:
    """The entry of the chain that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name inside the package, line) of every import, inside functions too; type-only imports excepted."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "slimkernels":
                yield name.removeprefix("slimkernels").lstrip("."), node.lineno


def files_of(names: set[str]) -> set[str]:
    return {n for n in names if n != "__init__"}


def test_every_module_has_its_place_in_the_chain() -> None:
    found = files_of({unit(p) for p in modules()})
    listed = set(LEVEL) | set(TEST_ONLY)
    assert found == listed, f"not in the chain: {sorted(found - listed)}; gone: {sorted(listed - found)}"


@pytest.mark.parametrize("path", [p for p in modules() if unit(p) != "__init__"], ids=label)
def test_imports_point_only_to_the_right(path: Path) -> None:
    own = unit(path)
    for name, line in imports(path):
        target = name.split(".")[0]
        where = f"{path.relative_to(PACKAGE)}:{line}: {own} imports {target or 'slimkernels'}"
        if target in ("", "__version__", own):
            continue
        if own in TEST_ONLY:
            assert target in TEST_ONLY[own], where
            continue
        assert target not in TEST_ONLY, where
        assert target in LEVEL, f"{where}: no such module"
        assert LEVEL[own] < LEVEL[target], where


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_a_package_point_only_to_the_right(package: str) -> None:
    level = {n: i for i, names in enumerate(PACKAGES[package]) for n in names.split(", ")}
    folder, prefix = PACKAGE / package, package.replace("/", ".")
    found = {p.relative_to(folder).parts[0].removesuffix(".py") for p in folder.rglob("*.py")}
    assert found == set(level)
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        for name, line in imports(path):
            if name != prefix and not name.startswith(f"{prefix}."):
                continue
            target = name.removeprefix(prefix).lstrip(".").split(".")[0]
            target = target if target in level else "__init__"
            assert own == target or level[own] < level[target], f"{path.relative_to(PACKAGE)}:{line}: imports {target}"


def test_only_the_trust_boundaries_hand_out_addresses() -> None:
    """Addresses of tensors reach native code through these modules alone: whoever loads the extension and takes one."""
    cpu = ("batch_norm", "conv2d", "pairs", "pooling", "steps", "weight_gradient")
    doors = {f"kernels/cpu/{name}.py" for name in cpu}
    doors |= {
        f"kernels/{name}.py" for name in ("cuda", "cuda_tensor_cores", "cuda_chain", "cuda_gradients", "cuda_low_rank")
    }
    native = {"_extension", "kernels.cpu.abi", "kernels.cpu.library", "kernels.cuda"}
    found = set()
    for path in modules():
        names = {name for name, _ in imports(path)}
        loads = any(name == n or name.startswith(f"{n}.") for name in names for n in native)
        if loads and re.search(r"\.data_ptr\(\)|\baddress\(", path.read_text()):
            found.add(str(path.relative_to(PACKAGE)))
    assert found == doors


@pytest.mark.parametrize("path", modules(), ids=label)
def test_no_module_is_over_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(PACKAGE)} has {lines} lines"


# torch's own methods, documented there.
TORCH_METHODS = {"forward", "train", "extra_repr", "get_extra_state", "set_extra_state", "reset_parameters"}


def undocumented(node: ast.Module | ast.ClassDef, owner: str) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_") or child.name in TORCH_METHODS:
                continue
            # A Triton kernel is described by the docstring of its module, an accessor by its property's.
            described = (".setter", "overload", "triton.jit")
            exempt = any(ast.unparse(d).endswith(described) for d in child.decorator_list)
            if not ast.get_docstring(child) and not exempt:
                yield f"{owner}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{owner}.{child.name}")


@pytest.mark.parametrize("path", modules(), ids=label)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.relative_to(PACKAGE)} has no module docstring"
    assert list(undocumented(tree, path.stem)) == []


EVERYTHING = """
import importlib, json, pkgutil, types
import slimkernels
names = [m.name for m in pkgutil.walk_packages(slimkernels.__path__, "slimkernels.") if m.name != "slimkernels._C"]
submodules = {n.rsplit(".", 1)[-1] for n in names if n.count(".") == 1}
collisions = sorted(submodules & set(slimkernels._PUBLIC))
for name in names:
    importlib.import_module(name)
wrong = [n for n in slimkernels._PUBLIC if isinstance(getattr(slimkernels, n), types.ModuleType)]
missing = [n for n in slimkernels.__all__ if not hasattr(slimkernels, n)]
print(json.dumps({"collisions": collisions, "wrong": wrong, "missing": missing, "imported": len(names)}))
"""
LEAN = """
import json, sys, warnings
import torch
before = set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import slimkernels
    slimkernels.ops
added = {n.split(".")[0] for n in set(sys.modules) - before}
print(json.dumps({"added": sorted(added), "warnings": [str(w.message) for w in caught],
                  "cuda": torch.cuda.is_initialized(), "threads": torch.get_num_threads()}))
"""


def run(code: str) -> dict:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_no_public_name_is_a_submodule_and_all_exist() -> None:
    """With every submodule imported, each public name is still the function or class it stands for."""
    found = run(EVERYTHING)
    assert found["imported"] >= len([p for p in modules() if p.name != "__init__.py"])
    assert (found["collisions"], found["wrong"], found["missing"]) == ([], [], [])


def test_importing_is_free() -> None:
    found = run(LEAN)
    heavy = {"triton", "safetensors", "rich", "typer", "torchvision", "matplotlib", "sklearn", "numpy", "onnxruntime"}
    assert not heavy & set(found["added"]), found["added"]
    assert found["warnings"] == [] and found["cuda"] is False


def test_public_names_are_those_of_the_readme_interface() -> None:
    expected = {
        "prune_", "finalize_", "factorize_", "convert", "explain", "save", "load", "distill", "update_pattern",
        "analyze", "Policy", "ModelPlan", "LayerPlan",
    }  # fmt: skip
    assert expected <= set(slimkernels.__all__) and {"nn", "ops"} <= set(slimkernels.__all__)
    assert set(slimkernels.__all__) <= set(dir(slimkernels))
    with pytest.raises(AttributeError, match="module 'slimkernels' has no attribute 'no_such_name'"):
        slimkernels.no_such_name  # noqa: B018
