"""Installing and importing: what an import brings, wheels, sdists, machines without a compiler, nvcc or AVX-512."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, TESTS

WHEEL = ("-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check", "-v")
LOCAL = ("--no-build-isolation", "--no-index")


def python(*arguments: str | Path, check: bool = True, cwd: Path | None = None, **env: str) -> str:
    """stdout and stderr of a Python process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout if check else f"{done.stdout}\nexit status {done.returncode}"


def answer(code: str, cwd: Path, **env: str) -> Any:
    """What `code` prints as its last line, read as JSON."""
    return json.loads(python("-c", code, cwd=cwd, **env).splitlines()[-1])


# Importing

LEAN = """
import json, os, sys, warnings
import torch
warnings.simplefilter("error")
before, environment = set(sys.modules), dict(os.environ)
{imports}
new = sorted(m for m in set(sys.modules) - before
             if m.partition(".")[0] not in ("slimkernels", *sys.stdlib_module_names))
heavy = [m for m in ("triton", "safetensors", "rich", "torchvision", "matplotlib", "sklearn", "typer")
         if m in sys.modules and m not in before]
print(json.dumps({{"new": new, "heavy": heavy, "cuda": torch.cuda.is_initialized(),
                   "same_environment": environment == dict(os.environ)}}))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import slimkernels",
        "import slimkernels.ops, slimkernels.nn, slimkernels.kernels, slimkernels.formats",
        "from slimkernels import _extension; _extension.load()",
    ],
)
def test_import_is_free(imports: str, tmp_path: Path):
    """torch alone: no other package, no CUDA start-up, no warning (an error here), no file, no changed environment."""
    home = tmp_path / "home"
    home.mkdir()
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR", "TRITON_CACHE_DIR"), str(home))
    result = answer(LEAN.format(imports=imports), home, PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(ROOT), **places)
    assert result == {"new": [], "heavy": [], "cuda": False, "same_environment": True}
    assert list(home.iterdir()) == []


ONE_RUNTIME = """
import json, os
import torch
from slimkernels import _extension, nn
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512); torch.randn(2**20).exp_()
tasks = len(os.listdir("/proc/self/task"))
conv = torch.nn.Conv2d(32, 64, 3, padding=1)
module, reason = _extension.load()
if module is not None:
    sparse = nn.BlockSparseConv2d.from_dense(conv, (16, 1)).eval()
    with torch.no_grad():
        sparse(torch.randn(4, 32, 16, 16))
print(json.dumps({"reason": reason, "runtimes": _extension.openmp_runtimes(),
                  "new_threads": len(os.listdir("/proc/self/task")) - tasks}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_kernels_run_on_the_threads_of_torch(tmp_path: Path):
    result = answer(ONE_RUNTIME, tmp_path, PYTHONPATH=str(ROOT), SLIMKERNELS_BACKEND="auto")
    if result["reason"]:
        pytest.skip(f"slimkernels._C is not built: {result['reason']}")
    assert len(result["runtimes"]) == 1
    assert result["new_threads"] == 0


# Building


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout, made from a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns(
        "build", "dist", ".git", "*.so", "_build.json", "__pycache__", "*.egg-info", "results"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    python("setup.py", "-q", "sdist", "-d", folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def tree(sdist: Path) -> Path:
    """The unpacked sdist: what every build below starts from, so that a file missing in it is noticed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


def wheel(tree: Path, out: Path, *options: str, **env: str) -> tuple[Path, str]:
    text = python(*WHEEL, *(options or LOCAL), "-w", out, tree, **env)
    (path,) = out.glob("*.whl")
    return path, text


def unpack(path: Path, into: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(into)
    return into


@pytest.fixture(scope="session")
def compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def cpu_wheel(compiler: None, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(tree, tmp_path_factory.mktemp("wheel"), SLIMKERNELS_CUDA="0")[0]


def test_sdist_holds_sources_and_no_products(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/kernels.h",
        "csrc/bindings.cpp",
        "slimkernels/py.typed",
    ):
        assert needed in names
    rooms = sorted({path.parent.relative_to(ROOT) for path in TESTS.rglob("*.py")})
    for folder in ("csrc/cpu", "csrc/cuda", "csrc/bindings", "slimkernels", *rooms):
        files = {
            p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob("*.*") if p.suffix not in (".so", ".json")
        }
        assert files <= names, folder
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc", "_build.json")) or n.startswith("build/")]


# An editable installation's import hook would find a missing submodule in the checkout.
INSTALLED = """
import json, sys, torch
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import slimkernels
from slimkernels import _extension, kernels, ops
module, reason = _extension.load()
x, w = torch.randn(2, 16, 6, 6), torch.randn(32, 16, 3, 3)
from slimkernels import nn
conv = torch.nn.Conv2d(16, 32, 3, padding=1)
with torch.no_grad():
    error = (nn.BlockSparseConv2d.from_dense(conv, (16, 1)).eval()(x) - conv(x)).abs().max().item()
print(json.dumps({"file": slimkernels.__file__, "version": slimkernels.__version__, "reason": reason,
                  "build": module.build_info() if module else None, "missing": _extension.missing(), "error": error,
                  "usable": [n for n, k in kernels.KERNELS.items() if k.backend == "cpu" and k.available() is None]}))
"""


@pytest.mark.slow
def test_wheel_installs_and_runs_from_anywhere(cpu_wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check")
    python(*pip, "--target", target, cpu_wheel)
    result = answer(INSTALLED, tmp_path, PYTHONPATH=str(target))
    assert Path(result["file"]).is_relative_to(target)
    assert result["reason"] is None and result["error"] < 1e-4
    assert "bsr_conv2d_f32__scalar" in result["usable"]
    assert result["build"]["cuda"] is False
    assert result["missing"]["cuda"] == "SLIMKERNELS_CUDA=0 at build time"
    assert (target / "bin" / "slimkernels").exists()


@pytest.mark.slow
def test_wheel_holds_what_the_package_needs(cpu_wheel: Path):
    with zipfile.ZipFile(cpu_wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "slimkernels").rglob("*.py")}
    tuned = {p.relative_to(ROOT).as_posix() for p in (ROOT / "slimkernels" / "tuned").glob("*.json")}
    assert sources | tuned | {"slimkernels/py.typed", "slimkernels/_build.json"} <= names
    assert len([n for n in names if re.fullmatch(r"slimkernels/_C\..*\.so", n)]) == 1
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "benchmarks/", "build/"))]
    version = re.search(r'__version__ = "(.*)"', (ROOT / "slimkernels" / "__init__.py").read_text())
    assert version and f"\nVersion: {version.group(1)}\n" in metadata
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.M)
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M))
    assert required == {
        "torch", "torchvision", "triton", "safetensors", "accelerate", "pyyaml", "rich", "typer", "scikit-learn",
        "matplotlib",
    }  # fmt: skip
    extras = {"train", "compact", "test", "bench", "docs", "lint", "onnx", "examples", "gpu-check"}
    assert set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M)) == extras


@pytest.mark.slow
def test_second_build_compiles_nothing(cpu_wheel: Path, tree: Path, tmp_path: Path):
    assert "ninja: no work to do" in wheel(tree, tmp_path, SLIMKERNELS_CUDA="0")[1]


def test_without_a_compiler_the_reference_kernels_remain(tree: Path, tmp_path: Path):
    path, text = wheel(tree, tmp_path, CXX="/bin/false")
    assert "no working C++ compiler (/bin/false" in text and "reference kernels only" in text
    site = unpack(path, tmp_path / "site")
    result = answer(INSTALLED, tmp_path, PYTHONPATH=str(site))
    assert Path(result["file"]).is_relative_to(site)
    assert result["build"] is None and result["usable"] == ["bsr_conv2d_wgrad_f32__cpu"] and result["error"] < 1e-4
    assert "no working C++ compiler (/bin/false" in result["reason"]


def compiler_without(flag: str, folder: Path) -> str:
    """A C++ compiler that refuses one flag."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("needs g++")
    script = folder / "old-g++"
    script.write_text(
        f'#!/bin/sh\nfor word; do\n  if [ "$word" = {flag} ]; then\n    echo "error: unrecognized option $word" >&2\n'
        f'    exit 1\n  fi\ndone\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


# CUDA wishes


def path_without_nvcc(folder: Path) -> str:
    """PATH with every nvcc left out: folders that hold one are replaced by links to everything else in them."""
    if any(
        glob.glob(os.path.join(sysconfig.get_paths()[k], "nvidia", "*", "bin", "nvcc")) for k in ("purelib", "platlib")
    ):
        pytest.skip("this environment has the nvidia-cuda-nvcc wheel")
    folders = []
    for number, entry in enumerate(os.environ["PATH"].split(os.pathsep)):
        if os.path.exists(os.path.join(entry, "nvcc")):
            links = folder / f"path{number}"
            links.mkdir()
            for file in Path(entry).iterdir():
                if file.name != "nvcc":
                    (links / file.name).symlink_to(file)
            entry = str(links)
        folders.append(entry)
    return os.pathsep.join(folders)


def test_cuda_1_without_nvcc_is_an_error(compiler: None, tree: Path, tmp_path: Path):
    env = {"SLIMKERNELS_CUDA": "1", "PATH": path_without_nvcc(tmp_path), "CUDA_HOME": str(tmp_path / "none")}
    text = python(*WHEEL, *LOCAL, "-w", tmp_path, tree, check=False, **env)
    assert "SLIMKERNELS_CUDA=1, but nvcc not found" in text and "exit status 1" in text
    assert not list(tmp_path.glob("*.whl"))


def test_unknown_cuda_wish_is_an_error(tree: Path, tmp_path: Path):
    text = python(*WHEEL, *LOCAL, "-w", tmp_path, tree, check=False, SLIMKERNELS_CUDA="yes")
    assert "SLIMKERNELS_CUDA: expected auto, 1 or 0, got 'yes'" in text and "exit status 1" in text


@pytest.mark.slow
def test_without_nvcc_and_avx512_the_rest_is_built(compiler: None, tree: Path, tmp_path: Path):
    env = {
        "CXX": compiler_without("-mavx512f", tmp_path),
        "SLIMKERNELS_CUDA": "auto",
        "PATH": path_without_nvcc(tmp_path),
        "CUDA_HOME": str(tmp_path / "none"),
    }
    path, text = wheel(tree, tmp_path, **env)
    assert "without avx512 kernels:" in text and "without CUDA C++ kernels: nvcc not found" in text
    result = answer(INSTALLED, tmp_path, PYTHONPATH=str(unpack(path, tmp_path / "site")))
    assert "scalar" in result["build"]["isas"] and "avx512" not in result["build"]["isas"]
    assert "unrecognized option -mavx512f" in result["missing"]["avx512"]
    assert result["build"]["cuda"] is False and result["missing"]["cuda"].startswith("nvcc not found")


@pytest.mark.slow
def test_cuda_auto_survives_an_nvcc_that_fails(compiler: None, tree: Path, tmp_path: Path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in\n--version) echo "release 9.9";;\n'
        f'*--dryrun*) echo "#$ TOP={home}" >&2;;\n*) echo "unsupported host compiler" >&2; exit 1;;\nesac\n'
    )
    nvcc.chmod(0o755)
    path, text = wheel(tree, tmp_path, SLIMKERNELS_CUDA="auto", CUDA_HOME=str(home))
    assert "unsupported host compiler" in text and "without CUDA C++ kernels: nvcc 9.9 failed" in text
    result = answer(INSTALLED, tmp_path, PYTHONPATH=str(unpack(path, tmp_path / "site")))
    assert result["build"]["cuda"] is False and "nvcc 9.9 failed" in result["missing"]["cuda"]


@pytest.mark.slow
def test_build_isolation(compiler: None, tree: Path, tmp_path: Path):
    """The declared build requirements suffice: a build in a fresh environment holding only those."""
    text = python(*WHEEL, "-w", tmp_path, tree, check=False, SLIMKERNELS_CUDA="0")
    if re.search(r"No matching distribution found for (setuptools|pybind11|ninja)|Temporary failure in name", text):
        pytest.skip("no package index is reachable")
    assert text.endswith("exit status 0"), text
    assert len(list(tmp_path.glob("slimkernels-*.whl"))) == 1
