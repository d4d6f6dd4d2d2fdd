"""Builds slimkernels._C: pybind11 plus per-file instruction-set flags, driven by Ninja.

SLIMKERNELS_CUDA=auto|1|0 (default auto) decides on the CUDA C++ kernels: auto takes nvcc when it is found, 1 fails
without it. What was left out, and why, is written to slimkernels/_build.json, which `slimkernels info` prints.

SLIMKERNELS_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer, for the fuzzing of `.ci/run`: such a
module loads only into a process that has their runtimes preloaded.
"""

import glob
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# `vptr` wants the type information of Python's extension types, which pybind11 does not give.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-O1", "-g1"]
CPU = [*COMMON, "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"]
# Of csrc/cpu/conv2d_<isa>.cpp: its flags. The scalar file keeps the compiler's base instruction set.
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma"],
    # GCC 12 warns about its own _mm512_undefined_ps.
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-Wno-maybe-uninitialized"],
}
# The same of csrc/cpu/pairs_<engine>.cpp, convolutions in bf16.
ENGINE_FLAGS = {
    "scalar": [],
    "avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"],
    "amx": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
ISA_PROBES = {
    "scalar": "int f(int x) { return x; }",
    "avx2": "#include <immintrin.h>\n__m256 f(__m256 x) { return _mm256_fmadd_ps(x, x, x); }",
    "avx512": "#include <immintrin.h>\n__m512 f(__m512 x) { return _mm512_maskz_fmadd_ps(5, x, x, x); }",
}
ENGINE_PROBES = {
    "scalar": ISA_PROBES["scalar"],
    "avx512bf16": "#include <immintrin.h>\n__m512 f(__m512 s, __m512bh x) { return _mm512_dpbf16_ps(s, x, x); }",
    "amx": "#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }",
}
# compute_80 PTX is what GPUs without a cubin of their own compile at load time.
CUDA_GENCODE = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]
CUDA_ARCHS = "sm_80 sm_90a compute_80"


class CudaMissing(Exception):
    """The reason why the CUDA C++ kernels cannot be built here."""


def say(line: str) -> None:
    print(f"slimkernels: {line}", file=sys.stderr, flush=True)


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **kwargs)


def try_compile(cxx: list[str], flags: list[str], source: str) -> str | None:
    """None when `source` compiles, otherwise the last line the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source + "\n")
        try:
            done = run([*cxx, *flags, "-c", str(path), "-o", str(path.with_suffix(".o"))])
        except OSError as error:
            return str(error)
        if done.returncode == 0 and path.with_suffix(".o").exists():
            return None
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
        return (lines or [f"exit status {done.returncode}"])[0].replace(folder + os.sep, "")


def find_compiler() -> tuple[list[str] | None, str]:
    """The first C++ compiler that works, and its version line; or None and the reason."""
    named = os.environ.get("CXX", "").strip()
    tried = []
    for candidate in [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]:
        why = try_compile(candidate, COMMON, ISA_PROBES["scalar"])
        if why is None:
            return candidate, run([*candidate, "--version"]).stdout.partition("\n")[0]
        tried.append(f"{shlex.join(candidate)}: {why}")
    return None, "no working C++ compiler (" + "; ".join(tried) + ")"


def probe_openmp(cxx: list[str]) -> str | None:
    """None when `-fopenmp` makes calls into libgomp's interface, which torch's own OpenMP runtime provides."""
    source = "void g(int*); void f(int* x, int n) {\n#pragma omp parallel num_threads(n)\n  g(x); }"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        done = run([*cxx, "-fopenmp", "-S", str(path), "-o", "-"])
    if done.returncode != 0:
        return "the compiler has no -fopenmp, kernels run on one thread"
    if "GOMP_parallel" not in done.stdout:
        return "the compiler's OpenMP is not libgomp's interface (use g++), kernels run on one thread"
    return None


def find_nvcc() -> str:
    """nvcc from CUDA_HOME, PATH, or the nvidia-cuda-nvcc wheel of the interpreter that will run the package."""
    candidates = []
    home = os.environ.get("CUDA_HOME")
    if home:
        candidates.append(os.path.join(home, "bin", "nvcc"))
    candidates.append(shutil.which("nvcc"))
    for key in ("purelib", "platlib"):
        pattern = os.path.join(sysconfig.get_paths()[key], "nvidia", "*", "bin", "nvcc")
        candidates += sorted(glob.glob(pattern), reverse=True)
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise CudaMissing("nvcc not found (searched CUDA_HOME, PATH and the nvidia-cuda-nvcc wheel)")


def find_cuda() -> dict[str, str]:
    """nvcc, its version, and the folder of libcudart_static.a."""
    nvcc = find_nvcc()
    version = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]).stdout)
    if version is None:
        raise CudaMissing(f"{nvcc} --version says no release")
    # nvcc may be a wrapper script elsewhere, so its own dry run says where the toolkit is.
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        dry = run([nvcc, "--dryrun", "-c", empty.name, "-o", os.devnull]).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)
    folders = re.findall(r'-L"?([^"\s]+)', dry)
    if top:
        root = os.path.realpath(top.group(1).strip())
        folders += [os.path.join(root, name) for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "libcudart_static.a")):
            return {"nvcc": nvcc, "version": version.group(1), "lib": os.path.realpath(folder)}
    raise CudaMissing(f"{nvcc} is there, libcudart_static.a is not")


def find_ninja() -> str:
    try:
        import ninja

        path = os.path.join(ninja.BIN_DIR, "ninja")
        if os.path.exists(path):
            return path
    except ImportError:
        pass
    path = shutil.which("ninja")
    if path is None:
        raise SystemExit("slimkernels: the build needs ninja (pip install ninja, or drop --no-build-isolation)")
    return path


def cuda_wish() -> str:
    wish = os.environ.get("SLIMKERNELS_CUDA", "auto") or "auto"
    if wish not in ("auto", "1", "0"):
        raise SystemExit(f"slimkernels: SLIMKERNELS_CUDA: expected auto, 1 or 0, got {wish!r}")
    return wish


def sanitize_flags() -> list[str]:
    return SANITIZE if os.environ.get("SLIMKERNELS_SANITIZE", "0") == "1" else []


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps two builds out of one folder: together they corrupt Ninja's dependency log, and all is built anew."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class NinjaFile:
    """The text of one build.ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        self.objects: list[str] = []

    @staticmethod
    def path(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name: str, command: list[str], description: str) -> None:
        # $in, $out are Ninja's; everything else is quoted for the shell.
        own = ("$in", "$out", "$out.d")
        words = [word if word in own else shlex.quote(word).replace("$", "$$") for word in command]
        self.lines += [f"rule {name}", f"  command = {' '.join(words)}", f"  description = {description} $out"]
        if "$out.d" in command:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path) -> None:
        output = f"{source.stem}.o"
        self.lines.append(f"build {output}: {rule} {self.path(source)}")
        self.objects.append(output)

    def link(self, output: str) -> None:
        self.lines += [f"build {output}: link {' '.join(self.objects)}", f"default {output}", ""]


class BuildNative(build_ext):
    """Compiles the extension, or leaves it out with a reason."""

    user_options = build_ext.user_options

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        wish = cuda_wish()
        cxx, version = find_compiler()
        missing: dict[str, str] = {}
        if cxx is None:
            if wish == "1":
                raise SystemExit(f"slimkernels: SLIMKERNELS_CUDA=1, but {version}")
            say(f"{version}; installing with the reference kernels only")
            missing["native"] = version
            self.write_report(target, missing)
            return
        isas = self.compiled(cxx, version, ISA_FLAGS, ISA_PROBES, missing)
        engines = self.compiled(cxx, version, ENGINE_FLAGS, ENGINE_PROBES, missing)
        why = probe_openmp(cxx)
        if why:
            missing["openmp"] = why
            say(why)
        cuda = None
        try:
            if wish == "0":
                raise CudaMissing("SLIMKERNELS_CUDA=0 at build time")
            cuda = find_cuda()
        except CudaMissing as error:
            if wish == "1":
                raise SystemExit(f"slimkernels: SLIMKERNELS_CUDA=1, but {error}") from None
            missing["cuda"] = str(error)
            say(f"without CUDA C++ kernels: {error}")
        folder = self.build_folder()
        with alone(folder):
            output = self.ninja(folder, cxx, isas, engines, "openmp" not in missing, cuda)
            if output is None and cuda is not None and wish == "auto":
                output = self.ninja(folder, cxx, isas, engines, "openmp" not in missing, None)
                if output is not None:
                    missing["cuda"] = (
                        f"nvcc {cuda['version']} failed on csrc/cuda (SLIMKERNELS_CUDA=1 makes this an error)"
                    )
                    say(f"without CUDA C++ kernels: {missing['cuda']}")
            if output is None:
                raise SystemExit("slimkernels: compiling the kernels failed, see above")
            shutil.copyfile(output, target)
        self.write_report(target, missing)

    @staticmethod
    def compiled(
        cxx: list[str], version: str, flags_of: dict[str, list[str]], probes: dict[str, str], missing: dict[str, str]
    ) -> list[str]:
        """Those of some instruction sets that the compiler knows; why not is added to `missing`."""
        found = []
        for name, flags in flags_of.items():
            if name != "scalar" and platform.machine() not in ("x86_64", "AMD64"):
                missing[name] = f"not an x86-64 machine ({platform.machine()})"
                continue
            why = try_compile(cxx, [*CPU, *flags], probes[name])
            if why is None:
                found.append(name)
            else:
                missing[name] = f"{version} cannot compile {' '.join(flags)} ({why})"
                say(f"without {name} kernels: {missing[name]}")
        return found

    def ninja(
        self,
        folder: Path,
        cxx: list[str],
        isas: list[str],
        engines: list[str],
        openmp: bool,
        cuda: dict[str, str] | None,
    ) -> Path | None:
        """Compile in the build folder, locked by the caller; the module's path, or None when a compiler failed."""
        self.write_config(folder / "slim_build_config.h", isas, openmp, cuda)
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "slimkernels: the build needs pybind11 (pip install pybind11, or drop --no-build-isolation)"
            ) from None
        include = ["-I", str(ROOT / "csrc"), "-I", str(folder)]
        depfile = ["-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
        file = NinjaFile()
        python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
        file.rule("bindings", [*cxx, *COMMON, *sanitize_flags(), *include, *python, *depfile], "c++")
        file.compile("bindings", ROOT / "csrc" / "bindings.cpp")
        kernels = [(f"conv2d_{isa}", ISA_FLAGS[isa]) for isa in isas]
        kernels += [(f"pairs_{engine}", ENGINE_FLAGS[engine]) for engine in engines]
        for name, flags in kernels:
            flags = [*CPU, *sanitize_flags(), *flags, *(["-fopenmp"] if openmp else ["-Wno-unknown-pragmas"])]
            file.rule(name, [*cxx, *flags, *include, *depfile], "c++")
            file.compile(name, ROOT / "csrc" / "cpu" / f"{name}.cpp")
        link = [*cxx, *sanitize_flags(), "-shared", "-o", "$out", "$in"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            # The OpenMP symbols come from the runtime torch has loaded (slimkernels/_extension.py): linking libgomp
            # here would load a second one. With -z now a runtime that lacks a symbol fails the import, not a call.
            link += ["-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,now"]
        if cuda is not None:
            gencode = [word for code in CUDA_GENCODE for word in ("-gencode", code)]
            host = ["-ccbin", shlex.join(cxx), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            # Compressed, since line numbers are most of a kernel's bytes; the driver unpacks what it loads.
            flags = ["-std=c++17", "-O3", "-lineinfo", "-Xfatbin=-compress-all"]
            nvcc = [cuda["nvcc"], *flags, *gencode, *host, *include, *depfile]
            file.rule("cuda", nvcc, "nvcc")
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                file.compile("cuda", source)
            link += ["-L" + cuda["lib"], "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        file.rule("link", link, "link")
        file.link("_C.so")
        (folder / "build.ninja").write_text("\n".join(file.lines))
        jobs = [f"-j{self.parallel}"] if isinstance(self.parallel, int) else []
        done = subprocess.run([find_ninja(), "-C", str(folder), *jobs], stdout=sys.stderr)
        return folder / "_C.so" if done.returncode == 0 else None

    def build_folder(self) -> Path:
        """One folder per Python ABI, kept between builds so that only what changed is compiled again."""
        kind = "sanitized" if sanitize_flags() else "native"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def write_config(path: Path, isas: list[str], openmp: bool, cuda: dict[str, str] | None) -> None:
        have = {"OPENMP": openmp, "CUDA": cuda is not None, **{isa.upper(): isa in isas for isa in ISA_FLAGS}}
        lines = ["#pragma once", *(f"#define SLIM_HAVE_{name} {int(value)}" for name, value in have.items())]
        lines.append(f'#define SLIM_CUDA_ARCHS "{CUDA_ARCHS if cuda else ""}"')
        text = "\n".join([*lines, ""])
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    @staticmethod
    def write_report(target: Path, missing: dict[str, str]) -> None:
        (target.parent / "_build.json").write_text(json.dumps({"missing": missing}, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        outputs = [path for path in super().get_outputs() if self.inplace or os.path.exists(path)]
        if not self.inplace:
            outputs += [str(Path(self.get_ext_fullpath(ext.name)).with_name("_build.json")) for ext in self.extensions]
        return outputs

    def copy_extensions_to_source(self) -> None:
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = (Path(path) for path in self._get_inplace_equivalent(build_py, ext))
            if built.exists():
                fresh = inplace.with_suffix(".so.new")
                shutil.copyfile(built, fresh)
                os.replace(fresh, inplace)  # processes that run the old module keep it
            else:
                inplace.unlink(missing_ok=True)  # an older module must not survive a build that leaves it out
            shutil.copyfile(built.parent / "_build.json", inplace.parent / "_build.json")


if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        ext_modules=[Extension("slimkernels._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative},
    )
