"""The compiled kernels as artefacts: symbols, instructions, spills, sanitizers; no GPU and no AVX-512 needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

from slimkernels import _extension
from slimkernels.cli import info
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import abi
from slimkernels.kernels.cpu.abi import Conv2dArguments

CPU = ROOT / "csrc" / "cpu"
ISAS = ("scalar", "avx2", "avx512")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]

setup_spec = importlib.util.spec_from_file_location("slimkernels_setup", ROOT / "setup.py")
assert setup_spec is not None and setup_spec.loader is not None
setup = importlib.util.module_from_spec(setup_spec)
setup_spec.loader.exec_module(setup)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def native() -> ModuleType:
    module, reason = _extension.load()
    if module is None:
        pytest.skip(f"slimkernels._C is not built: {reason}")
    return module


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    cxx, version = setup.find_compiler()
    if cxx is None:
        pytest.skip(version)
    return cxx


@pytest.fixture(scope="session")
def flags(compiler: list[str]) -> dict[str, list[str]]:
    """The flags setup.py gives every instruction set that the compiler knows."""
    return {
        isa: flags
        for isa, flags in setup.ISA_FLAGS.items()
        if setup.try_compile(compiler, [*setup.CPU, *flags], setup.ISA_PROBES[isa]) is None
    }


@pytest.fixture(scope="session")
def objects(
    compiler: list[str], flags: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Object file per instruction set, compiled exactly as setup.py does."""
    folder = tmp_path_factory.mktemp("objects")
    running = {}
    for isa, own in flags.items():
        path = folder / f"conv2d_{isa}.o"
        command = [
            *compiler,
            *setup.CPU,
            *own,
            "-fopenmp",
            "-I",
            str(ROOT / "csrc"),
            "-c",
            str(CPU / f"conv2d_{isa}.cpp"),
            "-o",
            str(path),
        ]
        running[path] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for path, process in running.items():
        assert process.wait() == 0, f"{path.name}: {process.communicate()[1]}"
    return {path.stem.removeprefix("conv2d_"): path for path in running}


def compiled(objects: dict[str, Path], isa: str) -> Path:
    if isa not in objects:
        pytest.skip(f"the compiler has no {isa}")
    return objects[isa]


# Symbols


def test_every_instruction_set_has_its_source():
    assert {path.stem for path in CPU.glob("*.cpp")} == {f"conv2d_{isa}" for isa in ISAS}


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_object_exports_its_entry_points_only(isa: str, objects: dict[str, Path]):
    """A weak symbol (an inline function, a template) could be linked into code for older CPUs."""
    symbols = [line.split() for line in output(tool("nm"), "--defined-only", compiled(objects, isa)).splitlines()]
    shared = [(kind, name) for *_, kind, name in symbols if kind.isupper() or kind in "uvw"]
    declared = re.findall(rf"\b(slim_\w+_{isa})\(", (ROOT / "csrc" / "kernels.h").read_text())
    if isa == "scalar":  # plain integers, one copy for all
        declared += ["slim_entry_offsets", "slim_entry_offsets_count"]
    assert declared and sorted(shared) == sorted(("T", name) for name in declared)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_object_needs_only_c_and_openmp(isa: str, objects: dict[str, Path]):
    undefined = {
        line.split()[-1] for line in output(tool("nm"), "--undefined-only", compiled(objects, isa)).splitlines()
    }
    allowed = re.compile(r"GOMP_\w+|omp_\w+|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|__tls_get_addr")
    c = {
        "malloc",
        "calloc",
        "free",
        "aligned_alloc",
        "posix_memalign",
        "memcpy",
        "memset",
        "memmove",
        "abort",
        "nanosleep",
        "sched_yield",
    }
    assert {name for name in undefined if not allowed.fullmatch(name)} <= c


def test_extension_links_no_openmp_runtime(native: ModuleType):
    dynamic = output(tool("readelf"), "-dW", native.__file__)
    needed = re.findall(r"NEEDED\).*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if re.search("gomp|iomp|libomp|cudart|torch|c10", name)]


def test_extension_leaves_only_python_and_openmp_to_the_process(native: ModuleType):
    """`--unresolved-symbols=ignore-all` would hide a forgotten source file; what has no version must be known."""
    undefined = output(tool("nm"), "-D", "--undefined-only", native.__file__)
    unversioned = [name for name in re.findall(r"^\s+U (\S+)$", undefined, re.M) if "@" not in name]
    assert unversioned
    assert not [name for name in unversioned if not re.match(r"_?Py|GOMP_|omp_", name)]


def test_extension_exports_its_init_function_only(native: ModuleType):
    exported = re.findall(r" [TtWV] (\S+)$", output(tool("nm"), "-D", "--defined-only", native.__file__), re.M)
    assert [name for name in exported if "slim" in name] == []
    assert "PyInit__C" in exported


# Instructions


def functions(listing: str) -> Iterator[list[tuple[int, str]]]:
    """(address, instruction) of every function of an objdump listing."""
    for text in re.split(r"\n\n(?=[0-9a-f]+ <)", listing):
        yield [(int(a, 16), i.strip()) for a, i in re.findall(r"^\s*([0-9a-f]+):\t(.*)$", text, re.M)]


def innermost_loops(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Instructions between a backward jump and its target, where no other such range lies inside."""
    ranges = []
    for address, instruction in code:
        jump = re.match(r"j\w+\s+([0-9a-f]+)", instruction)
        if jump and int(jump.group(1), 16) <= address:
            ranges.append((int(jump.group(1), 16), address))
    for low, high in ranges:
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b in ranges):
            yield [instruction for address, instruction in code if low <= address <= high]


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_main_loops_use_wide_fma_and_do_not_spill(isa: str, register: str, objects: dict[str, Path]):
    listing = output(tool("objdump"), "-d", "--no-show-raw-insn", compiled(objects, isa))
    fma = re.compile(rf"vfmadd\w+ps .*%{register}")
    loops = [loop for code in functions(listing) for loop in innermost_loops(code) if any(map(fma.match, loop))]
    assert max(sum(bool(fma.match(i)) for i in loop) for loop in loops) >= 8
    spills = [i for loop in loops for i in loop if re.search(rf"^vmov.*%{register}\d+.*\(%rsp|\(%rsp.*%{register}", i)]
    assert spills == []


@pytest.mark.slow
def test_lower_instruction_sets_stay_low(objects: dict[str, Path]):
    scalar = output(tool("objdump"), "-d", "--no-show-raw-insn", compiled(objects, "scalar"))
    avx2 = output(tool("objdump"), "-d", "--no-show-raw-insn", compiled(objects, "avx2"))
    assert not re.search(r"%[yz]mm", scalar)
    assert not re.search(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b", avx2)


# Results, under the sanitizers


def build_check(compiler: list[str], folder: Path, sources: dict[str, Path], flags: list[str]) -> Path:
    """kernel_check linked with one source per instruction set, given flags everywhere."""
    base = [*compiler, "-std=c++17", "-fopenmp", *flags, "-I", str(ROOT / "csrc")]
    have = [f"-DSLIM_HAVE_{isa.upper()}={int(isa in sources)}" for isa in ISAS]
    jobs, outputs = [], []
    check = ROOT / "csrc" / "tests" / "kernel_check.cpp"
    for name, source, extra in [("check", check, have), *((i, s, setup.ISA_FLAGS[i]) for i, s in sources.items())]:
        outputs.append(str(folder / f"{name}.o"))
        jobs.append(subprocess.Popen([*base, *extra, "-c", str(source), "-o", outputs[-1]]))
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    output(*base, *outputs, "-o", folder / "kernel_check")
    return folder / "kernel_check"


@pytest.mark.slow
def test_kernels_against_double_precision_under_sanitizers(
    compiler: list[str], flags: dict[str, list[str]], tmp_path: Path
):
    sources = {isa: CPU / f"conv2d_{isa}.cpp" for isa in flags}
    why = setup.try_compile([*compiler, *SANITIZE], [], "int f() { return 0; }")
    if why is not None:
        pytest.skip(f"the compiler has no sanitizers: {why}")
    check = build_check(compiler, tmp_path, sources, SANITIZE)
    done = subprocess.run([check], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    for isa in flags:
        if KERNELS[f"bsr_conv2d_f32__{isa}"].available() is None:
            assert re.search(rf"^{isa} +ok: 400 cases, \d{{6,}} outputs, 0 mismatches", done.stdout, re.M), done.stdout


MUTANTS = {
    "one value off by a hundred thousandth": "a->y[count - 1] *= 1.00001f;",
    "one value not written": "((unsigned*)a->y)[count / 2] = 0x7fc0dead;",
    "one float before y": "a->y[-1] = 0.0f;",
    "one float after y": "a->y[count] = 0.0f;",
    "an error status": "return 1;",
    "NaN lost": "for (int64_t i = 0; i < count; ++i) a->y[i] = a->y[i] == a->y[i] ? a->y[i] : 0.0f;",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_kernel_check_notices_wrong_kernels(name: str, compiler: list[str], tmp_path: Path):
    mutant = tmp_path / "mutant.cpp"
    mutant.write_text(
        "#define slim_run_steps_f32_scalar right\n"
        f'#include "{CPU / "conv2d_scalar.cpp"}"\n'
        "#undef slim_run_steps_f32_scalar\n"
        'extern "C" __attribute__((visibility("hidden")))\n'
        "int slim_run_steps_f32_scalar(const SlimStepF32* steps, int64_t n, int32_t threads) {\n"
        "  const SlimConv2dF32* a = &steps[n - 1].conv;  // a convolution, or the copy of its output to channels last\n"
        "  const int64_t pixels = (a->pool ? a->p / 2 : a->p) * (a->pool ? a->q / 2 : a->q);\n"
        "  const int64_t count = a->n * (n == 1 ? pixels * a->c_out : a->h * a->w * a->c_in);\n"
        f"  const int status = right(steps, n, threads);\n  (void)count;\n  {MUTANTS[name]}\n  return status;\n}}\n"
    )
    check = build_check(compiler, tmp_path, {"scalar": mutant}, ["-O1", "-fpermissive", "-w"])
    done = subprocess.run([check, "--cases", "40"], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout


@pytest.mark.slow
def test_kernel_check_options(compiler: list[str], tmp_path: Path):
    check = build_check(compiler, tmp_path, {"scalar": CPU / "conv2d_scalar.cpp"}, ["-O1", "-w"])
    assert output(check, "--isa", "scalar", "--cases", "3").startswith("scalar  ok: 3 cases")
    for bad in (["--isa", "avx2"], ["--cases", "0"], ["--what"], ["--cases"]):
        assert subprocess.run([check, *bad], capture_output=True).returncode == 2, bad


# The bindings


def test_build_info_agrees_with_the_build_report(native: ModuleType):
    built, missing = native.build_info(), _extension.missing()
    assert {isa for isa in ISAS if isa not in missing} == set(built["isas"])
    assert set(native.isas()) <= set(built["isas"]) and native.isas()[-1] == "scalar"
    assert built["openmp"] == ("openmp" not in missing)
    assert built["cuda"] == ("cuda" not in missing) == bool(built["cuda_archs"])


def test_conv2d_f32_refuses_what_would_crash(native: ModuleType):
    arguments = [0] * (len(Conv2dArguments._fields) + 1)  # and the threads
    with pytest.raises(TypeError, match=f"expected {len(arguments) + 1} arguments, got 2"):
        native.conv2d_f32("scalar", 0)
    with pytest.raises(TypeError):
        native.conv2d_f32(3, *arguments)
    with pytest.raises(TypeError):
        native.conv2d_f32("scalar", *arguments[:-1], "1")
    unsupported = 2  # SLIM_ERROR_UNSUPPORTED
    assert native.conv2d_f32("avx1024", *arguments) == unsupported
    for isa in {*ISAS, "avx1024"} - set(native.isas()):
        assert native.conv2d_f32(isa, *arguments) == unsupported
        assert native.Steps(isa, [[0, -1, *arguments[:-1]]]).run(1) == unsupported
    with pytest.raises(TypeError):
        native.Steps("scalar", [[0, -1, *arguments]])


def test_the_record_is_the_struct(native: ModuleType):
    """Name, offset and size of every member of SlimConv2dF32 are those of Conv2dArguments."""
    count = len(Conv2dArguments._fields)
    assert abi.mismatch(native) is None and len(native.conv2d_members()) == count > 20
    assert len(native.weight_gradient_members()) == len(abi.WeightGradientArguments._fields) > 20
    assert len(native.batch_norm_members()) == len(abi.BatchNormArguments._fields) > 10
    other = ModuleType("other")
    other.conv2d_members = native.conv2d_members
    assert f"SlimWeightGradientF32 has 0, expected {len(abi.WeightGradientArguments._fields)}" in abi.mismatch(other)
    other.conv2d_members = lambda: [("x", 0, 8), ("bias", 8, 8), *native.conv2d_members()[2:]]
    assert "expected ('y', 8, 8)" in abi.mismatch(other)
    other.conv2d_members = lambda: native.conv2d_members()[:-1]
    assert f"has {count - 1}, expected {count}" in abi.mismatch(other)


def test_header_documents_the_argument_order(native: ModuleType):
    """The members of SlimConv2dF32 and the order stated for Python are the same list."""
    header = (ROOT / "csrc" / "kernels.h").read_text()
    struct = re.search(r"typedef struct SlimConv2dF32 \{(.*?)\}", header, re.S)
    stated = re.search(r"_C\.conv2d_f32\(isa, ([^)]*)\)", header)
    assert struct and stated
    members = re.findall(r"[\w*]+(?=[,;])", re.sub(r"//.*", "", struct.group(1)))
    assert [*(m.strip("*") for m in members), "threads"] == re.sub(r"[\s/]+", " ", stated.group(1)).split(", ")
    assert tuple(m.strip("*") for m in members) == Conv2dArguments._fields


# CUDA C++, from the compiled module


@pytest.fixture(scope="session")
def cuda_code(native: ModuleType) -> tuple[str, str]:
    """Path of cuobjdump, and of the module that holds CUDA code."""
    if not native.build_info()["cuda"]:
        pytest.skip(f"built without CUDA C++: {_extension.missing().get('cuda')}")
    candidates = [shutil.which("cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    found = [path for path in candidates if path and os.access(path, os.X_OK)]
    if not found:
        pytest.skip("cuobjdump is in neither PATH nor Triton's wheel")
    return found[0], str(native.__file__)


def test_cuda_architectures(cuda_code: tuple[str, str], native: ModuleType):
    cuobjdump, module = cuda_code
    listed = output(cuobjdump, "--list-elf", "--list-ptx", module)
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        kinds = set(re.findall(rf"{source.stem}\.(\w+\.(?:cubin|ptx))", listed))
        assert kinds == {"sm_80.cubin", "sm_90a.cubin", "sm_80.ptx"}, source
    assert native.build_info()["cuda_archs"].split() == ["sm_80", "sm_90a", "compute_80"]


def test_cuda_kernels_do_not_spill(cuda_code: tuple[str, str]):
    cuobjdump, module = cuda_code
    text = output(cuobjdump, "--dump-resource-usage", module)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    # 2 architectures. 3 dtypes: 3 tile widths of bsr_conv2d and one low_rank_linear. 2 dtypes: 5 shapes of
    # resident_conv2d, 2 of streamed_conv2d, 2 of stem_conv2d, 4 of weight_gradient and the sum of its parts, 2 barriers
    # of chain_conv2d and 7 of low_rank. Float32: 3 shapes of resident_conv2d.
    assert len(rows) == 2 * (3 * (3 + 1) + 2 * (5 + 2 + 2 + 4 + 1 + 2 + 7) + 3)
    for name, registers, stack, shared, local in rows:
        assert (int(stack), int(local)) == (0, 0), name
        # 65 536 registers in a multiprocessor: at 128 two CTAs of 256 threads still share it. On tensor cores the sums
        # of one CTA fill it.
        wide = any(part in name for part in ("TileShape", "GradientShape", "chain_conv2d", "LowRankShape"))
        assert int(registers) <= (255 if wide else 128), name
        assert int(shared) <= 16 * 1024, name


def test_fused_rank_fits_every_gpu(cuda_code: tuple[str, str], native: ModuleType):
    """Dynamic (rank x 33 floats) and static shared memory stay within the 99 KB of the smallest supported GPUs."""
    cuobjdump, module = cuda_code
    text = output(cuobjdump, "--dump-resource-usage", module)
    static = [int(n) for n in re.findall(r"Function \S*low_rank_linear\S+:\s+REG:\d+ STACK:\d+ SHARED:(\d+)", text)]
    assert static
    assert max(static) + native.CUDA_MAX_FUSED_RANK * 33 * 4 <= 99 * 1024


# info


def test_one_openmp_runtime_is_loaded():
    """In a process of its own: scikit-learn, which other tests import, brings a second one."""
    code = "from slimkernels.cli import info; import json; print(json.dumps(info.report()['openmp']))"
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert found["single"] is not False, found


def test_info_reports_what_is_there():
    data = info.report()
    text = info.render(data)
    assert list(data["kernels"]) == list(KERNELS)
    for name, spec in KERNELS.items():
        assert data["kernels"][name] == spec.available()
    for line in (f"torch {data['packages']['torch']}", data["slimkernels"], data["cpu"]["model"]):
        assert line in text
    if data["native"]["loaded"]:
        assert data["native"]["compiler"] in text and data["native"]["usable_isas"]


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((7, 5), "below sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "compute_80 PTX"),
        ((12, 0), "compute_80 PTX"),
    ],
)
def test_info_names_the_code_a_gpu_runs(capability: tuple[int, int], code: str):
    assert code in info._code_for(*capability, setup.CUDA_ARCHS.split())


def test_info_shows_a_bad_environment_and_a_missing_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIMKERNELS_BACKEND", "quantum")
    monkeypatch.setattr(_extension, "load", lambda: (None, "no working C++ compiler (g++: not found)"))
    text = info.render()
    assert "SLIMKERNELS_BACKEND=INVALID" in text and "'quantum'" in text
    assert "native       missing: no working C++ compiler" in text
