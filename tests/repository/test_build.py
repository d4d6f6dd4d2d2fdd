"""The compiled kernels as artefacts: symbols, instructions, spills, sanitizers; no GPU, AVX-512 or AMX needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
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
ENGINES = ("scalar", "avx512bf16", "amx")
SOURCES = (*(f"conv2d_{isa}" for isa in ISAS), *(f"pairs_{engine}" for engine in ENGINES))  # in csrc/cpu
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
PLAIN = ["-O1", "-fpermissive", "-w"]

setup_spec = importlib.util.spec_from_file_location("slimkernels_setup", ROOT / "setup.py")
assert setup_spec is not None and setup_spec.loader is not None
setup = importlib.util.module_from_spec(setup_spec)
setup_spec.loader.exec_module(setup)
SOURCE_FLAGS = {
    **{f"conv2d_{isa}": flags for isa, flags in setup.ISA_FLAGS.items()},
    **{f"pairs_{engine}": flags for engine, flags in setup.ENGINE_FLAGS.items()},
}
SOURCE_PROBES = {
    **{f"conv2d_{isa}": probe for isa, probe in setup.ISA_PROBES.items()},
    **{f"pairs_{engine}": probe for engine, probe in setup.ENGINE_PROBES.items()},
}


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
    """The flags setup.py gives every source of kernels that the compiler can compile."""
    return {
        name: flags
        for name, flags in SOURCE_FLAGS.items()
        if setup.try_compile(compiler, [*setup.CPU, *flags], SOURCE_PROBES[name]) is None
    }


@pytest.fixture(scope="session")
def objects(
    compiler: list[str], flags: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Object file of every source of kernels, compiled exactly as setup.py does."""
    folder = tmp_path_factory.mktemp("objects")
    running = {}
    for name, own in flags.items():
        path = folder / f"{name}.o"
        command = [
            *compiler,
            *setup.CPU,
            *own,
            "-fopenmp",
            "-I",
            str(ROOT / "csrc"),
            "-c",
            str(CPU / f"{name}.cpp"),
            "-o",
            str(path),
        ]
        running[path] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for path, process in running.items():
        assert process.wait() == 0, f"{path.name}: {process.communicate()[1]}"
    return {path.stem: path for path in running}


def compiled(objects: dict[str, Path], name: str) -> Path:
    if name not in objects:
        pytest.skip(f"the compiler cannot compile {name}")
    return objects[name]


# Symbols


def test_every_instruction_set_and_engine_has_its_source():
    assert set(setup.ISA_FLAGS) == set(setup.ISA_PROBES) == set(ISAS)
    assert set(setup.ENGINE_FLAGS) == set(setup.ENGINE_PROBES) == set(ENGINES)
    assert {path.stem for path in CPU.glob("*.cpp")} == set(SOURCES)


def entry_points(name: str) -> list[tuple[str, str]]:
    """(kind as nm has it, symbol) of what a source of kernels exports, by the headers."""
    part, kind = name.split("_")
    if part == "pairs":
        header = (CPU / "pairs_engine.h").read_text()
        # A struct of pointers to functions, weak because not every compiler takes these sources.
        symbol = ("T", "slim_pairs_engine") if kind == "scalar" else ("V", f"slim_pairs_engine_{kind}")
        assert re.search(rf"\b{symbol[1]}\b", header)
        return [symbol]
    declared = re.findall(rf"\b(slim_\w+_{kind})\(", (ROOT / "csrc" / "kernels.h").read_text())
    if kind == "scalar":  # plain integers, one copy for all
        declared += ["slim_entry_offsets", "slim_entry_offsets_count"]
    return [("T", symbol) for symbol in declared]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_object_exports_its_entry_points_only(name: str, objects: dict[str, Path]):
    """A weak function (an inline one, a template) could be linked into code for older CPUs."""
    symbols = [line.split() for line in output(tool("nm"), "--defined-only", compiled(objects, name)).splitlines()]
    shared = [(kind, symbol) for *_, kind, symbol in symbols if kind.isupper() or kind in "uvw"]
    assert shared and sorted(shared) == sorted(entry_points(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_object_needs_only_c_and_openmp(name: str, objects: dict[str, Path]):
    undefined = {
        line.split()[-1] for line in output(tool("nm"), "--undefined-only", compiled(objects, name)).splitlines()
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
    if name.startswith("conv2d_"):
        c.add("slim_pairs_engine")
    if name == "pairs_scalar":  # which looks once at what the machine runs
        c |= {"syscall", "__cxa_guard_acquire", "__cxa_guard_release"}
        c |= {f"slim_pairs_engine_{engine}" for engine in ENGINES}
    assert {symbol for symbol in undefined if not allowed.fullmatch(symbol)} <= c


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


def listing(objects: dict[str, Path], name: str) -> str:
    return output(tool("objdump"), "-d", "--no-show-raw-insn", compiled(objects, name))


def spills(loop: list[str], register: str) -> list[str]:
    """Instructions of a loop that move or read whole vectors on the stack."""
    return [i for i in loop if re.search(rf"^vmov.*%{register}\d+.*\(%rsp|\(%rsp.*%{register}", i)]


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_main_loops_use_wide_fma_and_do_not_spill(isa: str, register: str, objects: dict[str, Path]):
    fma = re.compile(rf"vfmadd\w+ps .*%{register}")
    codes = functions(listing(objects, f"conv2d_{isa}"))
    loops = [loop for code in codes for loop in innermost_loops(code) if any(map(fma.match, loop))]
    assert max(sum(bool(fma.match(i)) for i in loop) for loop in loops) >= 8
    assert [i for loop in loops for i in spills(loop, register)] == []


@pytest.mark.slow
def test_dot_products_of_pairs_do_not_spill(objects: dict[str, Path]):
    """A row of a group meets 16 weights: each is broadcast from memory, and its sums stay in a register."""
    codes = functions(listing(objects, "pairs_avx512bf16"))
    loops = [loop for code in codes for loop in innermost_loops(code) if any("vdpbf16ps" in i for i in loop)]
    assert loops
    for loop in loops:
        sums = [i.rpartition(",")[2] for i in loop if i.startswith("vdpbf16ps")]
        assert len(sums) == 16 == len(set(sums)) and all("%zmm" in register for register in sums)
        assert sum("{1to16}" in i or bool(re.match(r"vpbroadcastd .*\(.*\),%zmm", i)) for i in loop) == 16
        assert spills(loop, "zmm") == []


@pytest.mark.slow
def test_tiles_of_pairs_do_not_spill(objects: dict[str, Path]):
    """Four tiles of sums, which nothing but their own stores writes to memory; one of weights serves four products."""
    codes = [[i for _, i in code] for code in functions(listing(objects, "pairs_amx"))]
    codes = [code for code in codes if any("tdpbf16ps" in i for i in code)]
    assert codes
    for code in codes:
        products = [i for i in code if i.startswith("tdpbf16ps")]
        loads = [i.rpartition(",")[2] for i in code if i.startswith("tileloadd")]
        sums = {i.rpartition(",")[2] for i in products}
        stores = [i.split()[1].partition(",")[0] for i in code if i.startswith("tilestored")]
        assert len(products) == len(sums) == 4
        assert len(loads) == 5 and len(set(loads)) == 3 and not sums & set(loads)
        assert sorted(stores) == sorted(sums)
        names = [i.split()[0] for i in code if re.match(r"tile|ldtile|sttile|tdp", i)]
        assert names.count("ldtilecfg") == 1 and names.count("tilezero") == 4 and "sttilecfg" not in names
        assert "tilerelease" in names  # a tile in use makes every switch of threads save all of them
        weights = {i.split()[1].split(",")[1] for i in products}
        assert len(weights) == 1 and loads.count(weights.pop()) == 1


@pytest.mark.slow
def test_lower_instruction_sets_stay_low(objects: dict[str, Path]):
    assert not re.search(r"%[yz]mm", listing(objects, "conv2d_scalar"))
    assert not re.search(r"%[yz]mm", listing(objects, "pairs_scalar"))
    assert not re.search(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b", listing(objects, "conv2d_avx2"))
    if "pairs_avx512bf16" in objects:
        assert not re.search(r"%tmm", listing(objects, "pairs_avx512bf16"))


@pytest.mark.slow
def test_only_what_chooses_an_engine_asks_the_machine(objects: dict[str, Path]):
    """cpuid is slow in a virtual machine: the answer is kept."""
    asking = {name for name in objects if re.search(r"\t(cpuid|xgetbv|syscall)\b", listing(objects, name))}
    assert asking <= {"pairs_scalar"}


# Results, under the sanitizers


def compile_all(
    compiler: list[str], folder: Path, sources: dict[str, tuple[Path, list[str]]], flags: list[str]
) -> list[Path]:
    """One object per name of a source and its own flags, given flags everywhere."""
    base = [*compiler, "-std=c++17", "-fopenmp", *flags, "-I", str(ROOT / "csrc")]
    paths = {name: folder / f"{name}.o" for name in sources}
    jobs = [
        subprocess.Popen([*base, *own, "-c", str(source), "-o", str(paths[name])])
        for name, (source, own) in sources.items()
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    return list(paths.values())


def check_source(names: Iterable[str]) -> tuple[Path, list[str]]:
    """kernel_check, which is told of the instruction sets that it is linked with; engines it asks for."""
    have = [f"-DSLIM_HAVE_{isa.upper()}={int(f'conv2d_{isa}' in names)}" for isa in ISAS]
    return ROOT / "csrc" / "tests" / "kernel_check.cpp", have


def engines_here(flags: dict[str, list[str]]) -> set[str]:
    """Those that the compiler knows and this machine runs."""
    module = _extension.load()[0]
    found = {"scalar", *(name.replace("_", "") for name in (module.bf16_engines() if module else ()))}
    return {engine for engine in found if f"pairs_{engine}" in flags}


def link_check(compiler: list[str], folder: Path, objects: list[Path], flags: list[str]) -> Path:
    output(*compiler, "-fopenmp", *flags, *objects, "-o", folder / "kernel_check")
    return folder / "kernel_check"


@pytest.fixture(scope="session")
def sanitized_check(compiler: list[str], flags: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernel_check with all kernels."""
    why = setup.try_compile([*compiler, *SANITIZE], [], "int f() { return 0; }")
    if why is not None:
        pytest.skip(f"the compiler has no sanitizers: {why}")
    sources = {name: (CPU / f"{name}.cpp", own) for name, own in flags.items()}
    folder = tmp_path_factory.mktemp("sanitized")
    built = compile_all(compiler, folder, {"check": check_source(flags), **sources}, SANITIZE)
    return link_check(compiler, folder, built, SANITIZE)


@pytest.mark.slow
def test_kernels_against_double_precision_under_sanitizers(flags: dict[str, list[str]], sanitized_check: Path):
    done = subprocess.run([sanitized_check], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    for isa in ISAS:
        if f"conv2d_{isa}" in flags and KERNELS[f"bsr_conv2d_f32__{isa}"].available() is None:
            assert re.search(rf"^{isa} +ok: 400 cases, \d{{6,}} outputs, 0 mismatches", done.stdout, re.M), done.stdout
    for engine in engines_here(flags):
        line = rf"^pairs {engine} +ok: 400 cases, \d{{7,}} outputs, 0 mismatches"
        assert re.search(line, done.stdout, re.M), done.stdout


@pytest.fixture(scope="session")
def scalar_check(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The objects of a kernel_check with the scalar kernels alone, for mutants to replace one."""
    folder = tmp_path_factory.mktemp("scalar")
    names = ("conv2d_scalar", "pairs_scalar")
    sources = {"check": check_source(names), **{name: (CPU / f"{name}.cpp", []) for name in names}}
    return {path.stem: path for path in compile_all(compiler, folder, sources, PLAIN)}


def failed(done: subprocess.CompletedProcess) -> bool:
    """Whether kernel_check found mismatches."""
    return done.returncode == 1 and "FAILED" in done.stdout


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
def test_kernel_check_notices_wrong_kernels(
    name: str, compiler: list[str], scalar_check: dict[str, Path], tmp_path: Path
):
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
    built = compile_all(compiler, tmp_path, {"conv2d_scalar": (mutant, [])}, PLAIN)
    check = link_check(compiler, tmp_path, [scalar_check["check"], scalar_check["pairs_scalar"], *built], PLAIN)
    done = subprocess.run([check, "--isa", "scalar", "--cases", "40"], capture_output=True, text=True)
    assert failed(done), done.stdout


# Of an engine: a file of csrc/cpu, what stands there, and what stands there instead.
PAIRS_MUTANTS = {
    "one number off in its last place": (
        "scalar",
        "pairs_scalar.cpp",
        "((Bf16*)row)[2 * i + 1] = bf16_of(odd.v[i]);",
        "((Bf16*)row)[2 * i + 1] = (Bf16)(bf16_of(odd.v[i]) + (i == PAIR_IMAGES - 1));",
    ),
    "one float off by a hundred thousandth": (
        "scalar",
        "pairs.h",
        "V::store(y + o * PAIR_IMAGES, V::max_second_nan(least, v));",
        "V::store(y + o * PAIR_IMAGES, V::max_second_nan(least, v)); y[o * PAIR_IMAGES + 7] *= 1.00001f;",
    ),
    "ties away from zero": (
        "scalar",
        "pairs_scalar.cpp",
        "bits + 0x7fff + (bits >> 16 & 1)",
        "bits + 0x8000",
    ),
    "the last of three pixels not written": (
        "scalar",
        "pairs.h",
        "i < (POOL ? 1 : chunk.count)",
        "i < (POOL ? 1 : chunk.count - (chunk.count == 3))",
    ),
    "the last channel not written": (
        "scalar",
        "pairs.h",
        "for (int64_t o = 0; o < epilogue.channels; ++o) {",
        "for (int64_t o = 0; o < epilogue.channels - (epilogue.channels == 3); ++o) {",
    ),
    "one float before y": (
        "scalar",
        "pairs.h",
        "Engine engine;",
        "Engine engine; conv.y[-1] = 0.0f;",
    ),
    "one float after y": (
        "scalar",
        "pairs.h",
        "Engine engine;",
        "Engine engine; conv.y[plan.image_groups * (conv.pool ? conv.p / 2 * (conv.q / 2) : conv.p * conv.q) *"
        " (plan.to_floats ? conv.c_out : plan.pairs_out) * PAIR_IMAGES] = 0.0f;",
    ),
    "NaN of a column that is not stored": (
        "scalar",
        "pairs_scalar.cpp",
        "sum[n] += w0 * at(even, n, 0) + w1 * at(odd, n, 1);",
        "sum[n] += w0 * at(even, n, 0) + w1 * at(odd, n, 1) + 0.0f * at(chunk.pixels[i][0], n, 0);",
    ),
    "NaN of a place that is not there": (
        "scalar",
        "pairs.h",
        "chunk.pixels[i][SLIM_PAIRS_MAX_TAPS] = plan.zeros;",
        "chunk.pixels[i][SLIM_PAIRS_MAX_TAPS] = (const char*)conv.x;",
    ),
    "NaN lost": (
        "scalar",
        "pairs_scalar.cpp",
        "return a.v[i] > b.v[i] ? a.v[i] : b.v[i];",
        "return b.v[i] > a.v[i] ? b.v[i] : a.v[i];",
    ),
    "a group skipped": (
        "scalar",
        "pairs_scalar.cpp",
        "if ((group.taps & chunk.taps[i]) == 0) continue;",
        "if ((group.taps & chunk.taps[i] & ~1ull) == 0) continue;",
    ),
    "a border tap read": (
        "scalar",
        "pairs.h",
        "chunk.pixels[i][tap] = plan.zeros;",
        "chunk.pixels[i][tap] = (const char*)conv.x;",
    ),
    "a row that a group lacks": (
        "scalar",
        "pairs_scalar.cpp",
        "for (int r = 0; r < group.rows; ++r) {",
        "for (int r = 0; r < group.rows - (group.rows == 15); ++r) {",
    ),
    "a wrong strip's bias": (
        "scalar",
        "pairs.h",
        "conv.bias[first + o]",
        "conv.bias[o]",
    ),
    "a residual without its odd channels": (
        "scalar",
        "pairs.h",
        "o % 2 == 0 ? Engine::even(row) : Engine::odd(row)",
        "Engine::even(row)",
    ),
    "images beyond n": (
        "scalar",
        "pairs_scalar.cpp",
        "i < count ? from[i * distance] : 0.0f",
        "from[(i < count ? i : 0) * distance]",
    ),
    "the mean of a border": (
        "scalar",
        "pairs_layers.h",
        "max64(down.size() * right.size(), 1)",
        "(int64_t)conv.r * conv.s",
    ),
    "an unpadded mean": (
        "scalar",
        "pairs_layers.h",
        "plan.pool.kind == SLIM_STEP_PADDED_AVERAGE_POOL ?",
        "plan.pool.kind == SLIM_STEP_MAX_POOL ?",
    ),
    "the first strips in every unit": (
        "scalar",
        "pairs.h",
        "const int64_t strip0 = strip_part * plan.strips_per_unit,",
        "const int64_t strip0 = 0 * strip_part,",
    ),
    "pixels inside the image in the wrong order": (
        "scalar",
        "pairs.h",
        "*column = k < columns.begin ? k : k + width;",
        "*column = k <= columns.begin ? k : k + width;",
    ),
    "rows of an older group": (
        "amx",
        "pairs_amx.cpp",
        "for (int r = group.rows; r < GROUP_ROWS; ++r, buffer += PAIR_ROW) {",
        "for (int r = GROUP_ROWS; r < GROUP_ROWS; ++r, buffer += PAIR_ROW) {",
    ),
    "one buffer for two groups": (
        "amx",
        "pairs_amx.cpp",
        "buffers + (g + 1) % 2 * BUFFER",
        "buffers + g % 2 * BUFFER",
    ),
    "a tap of one pixel for all": (
        "amx",
        "pairs_amx.cpp",
        "return chunk.taps[0] | chunk.taps[1] | chunk.taps[2] | chunk.taps[3];",
        "return chunk.taps[0];",
    ),
    "an odd place left empty": (
        "avx512bf16",
        "pairs_vec16.h",
        "0xaaaaaaaa, odd)",
        "0xaaaaaaa8, odd)",
    ),
    "a tap of a neighbour": (
        "avx512bf16",
        "pairs_avx512bf16.cpp",
        "if ((group.taps & chunk.taps[i]) == 0) continue;",
        "if ((group.taps & chunk.taps[0]) == 0) continue;",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS_MUTANTS)
def test_kernel_check_notices_wrong_steps_in_pairs(
    name: str,
    compiler: list[str],
    flags: dict[str, list[str]],
    scalar_check: dict[str, Path],
    tmp_path: Path,
):
    engine, file, right, wrong = PAIRS_MUTANTS[name]
    if engine not in engines_here(flags):
        pytest.skip(f"no {engine} on this machine")
    shutil.copy(ROOT / "csrc" / "kernels.h", tmp_path)
    shutil.copytree(CPU, tmp_path / "cpu")
    text = (CPU / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "cpu" / file).write_text(text.replace(right, wrong))
    source = f"pairs_{engine}"
    mutant = compile_all(compiler, tmp_path, {source: (tmp_path / "cpu" / f"{source}.cpp", flags[source])}, PLAIN)
    others = [path for stem, path in scalar_check.items() if stem != source]
    check = link_check(compiler, tmp_path, [*others, *mutant], PLAIN)
    done = subprocess.run([check, "--engine", engine], capture_output=True, text=True)
    assert failed(done), done.stdout


@pytest.mark.slow
def test_kernel_check_options(compiler: list[str], scalar_check: dict[str, Path], tmp_path: Path):
    check = link_check(compiler, tmp_path, list(scalar_check.values()), PLAIN)
    assert output(check, "--isa", "scalar", "--cases", "3").startswith("scalar  ok: 3 cases")
    assert output(check, "--engine", "scalar", "--cases", "3").startswith("pairs scalar     ok: 3 cases")
    lines = output(check, "--cases", "3").splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["scalar  ok", "pairs scalar     ok"]
    assert [line.split()[1] for line in lines[2:]] == ["avx512bf16", "amx"]
    assert all(line.endswith("not compiled in") for line in lines[2:])
    both = output(check, "--isa", "scalar", "--engine", "scalar", "--cases", "3")
    assert len(both.splitlines()) == 2
    for bad in (["--isa", "avx2"], ["--engine", "avx2"], ["--cases", "0"], ["--what"], ["--cases"]):
        assert subprocess.run([check, *bad], capture_output=True).returncode == 2, bad
    assert subprocess.run([check, "--engine", "amx"], capture_output=True).returncode == 1


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
