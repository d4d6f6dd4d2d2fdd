"""csrc/cuda compiled for the CPU (csrc/tests/cuda_on_cpu.h, tensor_cores_on_cpu.h), in the place of slimkernels._C."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import ROOT

LAUNCH = re.compile(r"(\w+<[\w, ]+>)<<<(.*?)>>>\((.*?)\);", re.S)
SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
LIBRARY = "libcuda_on_cpu.so"
CTYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}


def structure(name: str) -> type[ctypes.Structure]:
    """A struct of csrc/kernels.h, read from it: a launcher's argument order is checked against the header."""
    text = re.search(rf"typedef struct {name} \{{(.*?)\}}", (ROOT / "csrc" / "kernels.h").read_text(), re.S)
    assert text is not None
    fields: list[tuple[str, Any]] = []
    for declaration in re.sub(r"//.*", "", text.group(1)).split(";")[:-1]:
        parsed = re.fullmatch(r"\s*(?:const )?(\w+)(\*?) (\w+(?:, \w+)*)", declaration)
        assert parsed is not None, declaration
        kind, star, names = parsed.groups()
        fields += [(n, ctypes.c_void_p if star else CTYPES[kind]) for n in names.split(", ")]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Emulator(SimpleNamespace):
    """The CUDA functions of slimkernels._C over the emulated library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        rank = re.search(r"SLIM_CUDA_MAX_FUSED_RANK = (\d+)", (ROOT / "csrc" / "kernels.h").read_text())
        assert rank is not None
        super().__init__(library=library, CUDA_MAX_FUSED_RANK=int(rank.group(1)), launches=0)
        library.error_message.restype = ctypes.c_char_p
        self.cuda_bsr_conv2d = self.entry("bsr_conv2d", structure("SlimCudaBsrConv2d"))
        self.cuda_low_rank_linear = self.entry("low_rank_linear", structure("SlimCudaLowRankLinear"))
        self.cuda_low_rank = self.entry("low_rank", structure("SlimCudaLowRank"))
        self.cuda_resident_conv2d = self.entry("resident_conv2d", structure("SlimCudaResidentConv2d"))
        self.cuda_stem_conv2d = self.entry("stem_conv2d", structure("SlimCudaStemConv2d"))
        self.chain_layer, self.chain = structure("SlimCudaChainLayer"), structure("SlimCudaChain")
        self.cuda_weight_gradient = self.entry("weight_gradient", structure("SlimCudaWeightGradient"))

    def entry(self, name: str, kind: type[ctypes.Structure]) -> Callable[..., int]:
        function = getattr(self.library, name, None)  # None where it was left out

        def call(*arguments: int) -> int:
            assert function is not None and len(arguments) == len(kind._fields_)
            self.launches += 1
            return int(function(ctypes.byref(kind(*arguments))))

        return call

    def cuda_chain_conv2d(self, layers: Sequence[Sequence[int]], *arguments: int) -> int:
        assert all(len(layer) == len(self.chain_layer._fields_) for layer in layers)
        structs = (self.chain_layer * len(layers))(*(self.chain_layer(*layer) for layer in layers))
        members = (ctypes.addressof(structs), *arguments[:2], len(layers), *arguments[2:])
        assert len(members) == len(self.chain._fields_)
        self.launches += 1
        return int(self.library.chain_conv2d(ctypes.byref(self.chain(*members))))

    def cuda_chain_groups(self, group: int, barrier: int, dtype: int, device: int) -> int:
        groups = ctypes.c_int32()
        status = int(self.library.chain_groups(group, barrier, dtype, device, ctypes.byref(groups)))
        return -status if status else groups.value

    def cuda_error_message(self) -> str:
        return bytes(self.library.error_message()).decode()


def write_headers(folder: Path) -> None:
    """CUDA's headers and those of csrc/cuda as the emulation takes them, but for those that the folder has already."""
    for header in ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).write_text('#include "cuda_on_cpu.h"\n')
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        if not (folder / path.name).exists():
            emulated = path.name == "tensor_cores.cuh"
            (folder / path.name).write_text('#include "tensor_cores_on_cpu.h"\n' if emulated else path.read_text())


def include_flags(folder: Path) -> list[str | Path]:
    return ["-I", folder, "-I", ROOT / "csrc" / "tests", "-I", ROOT / "csrc", "-I", ROOT / "csrc" / "cuda"]


# What a test calls; those whose kernels are not compiled are left out.
ENTRIES = (
    "int bsr_conv2d(const SlimCudaBsrConv2d* a) { return slim_cuda_bsr_conv2d(a); }",
    "int low_rank_linear(const SlimCudaLowRankLinear* a) { return slim_cuda_low_rank_linear(a); }",
    "int low_rank(const SlimCudaLowRank* a) { return slim_cuda_low_rank(a); }",
    "int resident_conv2d(const SlimCudaResidentConv2d* a) { return slim_cuda_resident_conv2d(a); }",
    "int tf32_conv2d(const SlimCudaResidentConv2d* a) { return slim::launch_tf32(*a); }",  # of float32 alone
    "int stem_conv2d(const SlimCudaStemConv2d* a) { return slim_cuda_stem_conv2d(a); }",
    "int chain_conv2d(const SlimCudaChain* a) { return slim_cuda_chain_conv2d(a); }",
    "int chain_groups(int group, int barrier, int dtype, int device, int32_t* groups) {\n"
    "  return slim_cuda_chain_groups(group, barrier, dtype, device, groups);\n}",
    "int weight_gradient(const SlimCudaWeightGradient* a) { return slim_cuda_weight_gradient(a); }",
    "const char* error_message() { return slim_cuda_error_message(); }",
    "int get_launch_device() { return emulated::launch_device; }",
    "void* get_launch_stream() { return emulated::launch_stream; }",
    "int get_launch_shared() { return emulated::launch_shared; }",
    "void set_mode(int mode, int shared_limit) { emulated::mode = mode; emulated::shared_limit = shared_limit; }",
    "unsigned get_launch_cluster() { return emulated::launch_cluster; }",
    "void refuse_large_clusters(int when_allowed, int when_counted) {\n"
    "  emulated::when_allowed = when_allowed, emulated::when_counted = when_counted;\n}",
    "int take_last_error() { return cudaGetLastError(); }",
    "long get_conflicts() { return emulated::conflicts; }",
    "int get_current_device() { return emulated::current_device; }",
)


def emulate(folder: Path, *only: str) -> Emulator:
    """csrc/cuda compiled for the CPU; a header in ``folder`` goes before that of csrc/cuda or csrc/tests.

    ``only``: the files of csrc/cuda to compile, without their suffix; all of them by default.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++")
    write_headers(folder)
    sources, defined = [], set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if only and path.stem not in (*only, "runtime"):
            continue
        defined |= set(re.findall(r'extern "C" [^(]*\b(slim_cuda_\w+)\(', path.read_text()))
        text, launches = LAUNCH.subn(r"emulate([=] { \1(\3); }, \2);", path.read_text())
        assert launches == len(re.findall("<<<", path.read_text()))
        text = SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulated::dynamic_shared.data());", text)
        sources.append(folder / f"{path.stem}.cpp")
        sources[-1].write_text(text)
    # A call of shapes that are left out finds that they are unsupported.
    unsupported = "(const SlimCudaResidentConv2d&) { return SLIM_ERROR_UNSUPPORTED; }"
    left_out = f"namespace slim {{\n__attribute__((weak)) int launch_tf32{unsupported}\n"
    for name in ("launch_narrow_columns", "launch_streamed_columns"):
        left_out += f"template <typename T> int {name}(const SlimCudaResidentConv2d&);\n"
        for kind in ("__half", "__nv_bfloat16"):
            left_out += f"template <> __attribute__((weak)) int {name}<{kind}>{unsupported}\n"
    left_out += "}"
    entries = [entry for entry in ENTRIES if set(re.findall(r"slim_cuda_\w+", entry)) <= defined]
    state = folder / "state.cpp"
    headers = ['#include "tensor_cores_on_cpu.h"', '#include "kernels.h"']
    state.write_text("\n".join([*headers, left_out, 'extern "C" {', *entries, "}\n"]))

    def run(*words: str | Path) -> None:
        done = subprocess.run([compiler, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> Path:
        run("-std=c++17", "-O1", "-fPIC", "-w", *include_flags(folder), "-c", source, "-o", source.with_suffix(".o"))
        return source.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, state]))
    run("-shared", *objects, "-o", folder / LIBRARY)
    return Emulator(ctypes.CDLL(str(folder / LIBRARY)))


def emulate_fault(folder: Path, header: str, old: str, new: str, *only: str) -> Emulator:
    """The emulation with other words in a header of csrc/cuda, in an empty folder; ``only`` as `emulate` has it."""
    text = (ROOT / "csrc" / "cuda" / header).read_text()
    assert old in text
    (folder / header).write_text(text.replace(old, new))
    return emulate(folder, *only)


@lru_cache(maxsize=1)
def compiled() -> Emulator:
    """csrc/cuda as it stands, compiled by the first of the test processes that asks for it."""
    folder = Path(os.environ["SLIMKERNELS_TEST_BUILDS"]) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # closed, it is open to the next
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            emulator = emulate(folder)
            done.touch()
            return emulator
    return Emulator(ctypes.CDLL(str(folder / LIBRARY)))
