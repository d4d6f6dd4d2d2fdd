"""Fills Triton's cache for the GPU check, without a GPU: ``python benchmarks/warm_triton_cache.py``.

The kernels are launched as on the device, through Triton's own path, on a stand-in for one H100 (`stand_in`), so that
Triton compiles them for sm_90 and keeps them under the keys that it will look up there. What it keeps beside machine
code is left out, and the rest packed into ``.gpu-cache/triton-cache.tar.xz``; the first stage of the check unpacks it
into the folder where it was made (`gpu_check.plan.TRITON_CACHE`): Triton writes absolute paths into its cache.

A key holds Triton's version and code, its compiler's, ptxas's version, the kernel's source and constants, and
TRITON_DEFAULT_FP_FUSION. So use the device's Python minor version and Triton, and make the cache again after every
change of a kernel; a miss costs the time of one compilation. ``--check`` looks every kernel up in a new process
that cannot compile.

The C code that launches a kernel is compiled once a signature; it is made here too, against an empty libcuda. Where it
cannot be loaded (an older C library) Triton makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_check import plan  # noqa: E402

KEPT = (".cubin", ".json", ".so")
# What the stages of the check launch: `gpu_check.layers.ROWS` by name.
ROWS = ("headline", "blocks_64x16", "blocks_32x32", "sparsity_95", "batch_16", "batch_1", "vgg16_224")
CHAIN_BATCH = 4  # of the stage "chain", beside those of the rows
# The rows of the recipe's preset for a device whose blocks a GPU multiplies, at every batch that is evaluated (512, and
# what is left of 10 000 images), compared or timed. Compiled there they took 9 s a row of its time.
RECIPE_BLOCKS, RECIPE_BATCHES = (128, 16), (1, 256, 272, 512, 1024)


class Job(NamedTuple):
    """One call of a launching function: its kernel in `KERNELS`, problem and configuration, and whether with a bias."""

    kernel: str
    problem: Any
    config: dict[str, int]
    biased: bool = True


def prepare(folder: str, libcuda: str) -> None:
    """In every process before Triton is imported: where its cache is, and the stand-in."""
    os.environ.update(TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1", TRITON_LIBCUDA_PATH=libcuda)
    os.environ["CC"] = os.path.join(libcuda, "cc")
    os.environ.pop("TRITON_INTERPRET", None)
    # Under its name nothing else is loaded any more, so that the launching code finds what it was linked against.
    ctypes.CDLL(os.path.join(libcuda, "libcuda.so.1"))
    import stand_in

    stand_in.install(compiling=True, values=False)


def jobs() -> Iterator[Job]:
    """Everything to be compiled, each job once: forward layers of the rows and the sweep, the layers of a training
    step, what the tables that are shipped choose, and what `convert` times for other networks; of each card, since
    their choices differ.
    """
    from gpu_check import conversions, layers
    from stand_in import cuda

    from slimkernels.dispatch import select

    seen: set[str] = set()

    def new(found: Iterable[Job]) -> Iterator[Job]:
        for job in found:
            # A library's kernels are compiled already.
            if "__triton" in job.kernel and repr(job) not in seen:
                seen.add(repr(job))
                yield job

    for card in cuda.CARDS:
        cuda.become(card)
        select.forget()
        yield from new(jobs_of_rows())
    networks = list(conversions.every())
    for card in cuda.CARDS:
        cuda.become(card)
        select.forget()
        problems = [p for network in networks for p in network.problems()]
        yield from new(Job(c.name, p, dict(c.config)) for p in problems for c in [layers.choice_of(p)])


def jobs_of_rows() -> list[Job]:
    """Of the networks in `gpu_check.layers`, the recipe and the tables."""
    from gpu_check import layers, precompile

    from slimkernels.dispatch.tables import Table
    from slimkernels.recipes.schema import load_recipe

    entries = [e for path in sorted((ROOT / "slimkernels" / "tuned").glob("*.json")) for e in Table.load(path).entries]
    # Low-rank layers have tests that launch them.
    ours = [e for e in entries if e.problem.device == "cuda" and e.kernel.startswith(("bsr_conv2d", "fused_conv2d"))]
    found = [Job(e.kernel, e.problem, dict(e.config)) for e in ours]
    recipe = load_recipe("slimnets", "device")
    sparsities = sorted({row.labels["sparsity"] for row in recipe.rows if row.group == "combination"})
    for batch in RECIPE_BATCHES:
        for sparsity in sparsities:
            for p in layers.NetworkRow("vgg19_cifar", batch, sparsity, RECIPE_BLOCKS).every("cuda"):
                choice = layers.choice_of(p)
                found.append(Job(choice.name, p, dict(choice.config)))
    found += [job for row in recipe.rows if row.model is not None for job in batch_norms(row.model, recipe.batch_size)]
    small = replace(layers.ROWS["batch_1"], batch=CHAIN_BATCH).every("cuda")
    found += [Job(choice.name, p, dict(choice.config)) for p in small for choice in [layers.choice_of(p)]]
    for p, chosen in precompile.jobs(ROWS, "cuda", training=True):
        forward = chosen or layers.choice_of(p)
        found.append(Job(forward.name, p, dict(forward.config)))
        if chosen is None:
            plain = replace(p, epilogue="none")  # the batch norm behind it runs the rest
            forward = layers.choice_of(plain)
            found.append(Job(forward.name, plain, dict(forward.config), biased=False))
            found += [Job(f"{op}__triton", p, {}) for op in ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad", "batch_norm")]
    return found


class NormProblem(NamedTuple):
    """What `launch` needs to know of a batch norm."""

    n: int
    c_out: int
    h: int
    w: int
    epilogue: str
    dtype: Any


def batch_norms(spec: Any, batch: int) -> list[Job]:
    """The batch norms of a network that a recipe trains on images of 32x32, each kind once."""
    import torch

    import slimkernels as sk
    from slimkernels.nn import FusedBatchNorm2d
    from slimkernels.recipes import rows

    model, found = rows.build(spec, 10, 0), []
    for norm in sk.fuse_batch_norm_(model).modules():
        if isinstance(norm, FusedBatchNorm2d):
            norm.register_forward_pre_hook(
                lambda norm, args: found.append(NormProblem(batch, *args[0].shape[1:], norm.epilogue, torch.bfloat16))
            )
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return [Job("batch_norm__triton", p, {}) for p in dict.fromkeys(found)]


def launch(job: Job) -> None:
    """Launches a job's kernels on tensors that have sizes and no values."""
    import torch
    from stand_in.device_tensor import DeviceTensor

    from slimkernels import testing
    from slimkernels.kernels import KERNELS, FusedConvProblem, LinearProblem
    from slimkernels.kernels.triton import batch_norm, sums
    from slimkernels.kernels.triton.bsr_conv2d_index import forward_order

    p = job.problem

    def sized(*shape: int) -> Any:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return DeviceTensor(torch.empty(shape, dtype=p.dtype, device="meta", memory_format=layout))

    def stored(shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """Values and indices, and the order of a forward launch. How many blocks decides, not which they are."""
        pattern = testing.random_bsr(shape, p.block_shape, 1 - p.stored_share, dtype=p.dtype)
        columns = pattern.col_indices.new_zeros(p.nnz_blocks)
        columns[: len(pattern.col_indices)] = pattern.col_indices[: p.nnz_blocks]
        index = pattern.crow_indices.clamp(max=p.nnz_blocks).cuda(), columns.cuda()
        return (sized(p.nnz_blocks, *p.block_shape), *index), [forward_order(*index, shape, p.block_shape)]

    if job.kernel.startswith("batch_norm"):  # behind a convolution that keeps the image's size, and its bias gradient
        x, affine = sized(p.n, p.c_out, p.h, p.w), [DeviceTensor(torch.empty(p.c_out, device="meta")) for _ in range(2)]
        y, statistics = batch_norm.launch_forward(x, *affine, 1e-5, p.epilogue)
        batch_norm.launch_backward(y, x, *affine, statistics, 1e-5, p.epilogue)
        sums.launch(x)
        return
    call = KERNELS[job.kernel].launch
    config = {"config": job.config} if job.config else {}
    if isinstance(p, LinearProblem):
        shape: tuple[int, ...] = (p.out_features, p.in_features)
        weight, order = stored(shape)
        call(
            sized(p.m, p.in_features), *weight, sized(p.out_features), order, shape, p.block_shape, p.epilogue, **config
        )
        return
    shape = (p.c_out, p.c_in, p.r, p.s)
    if isinstance(p, FusedConvProblem):
        x, weight, bias = sized(p.n, p.c_in, p.h, p.w), sized(*shape), sized(p.c_out)
        call(x, weight, bias, p.stride, p.padding, p.dilation, p.epilogue, **config)
        return
    grad = sized(p.n, p.c_out, p.p, p.q)
    weight, order = stored(shape)
    geometry = (shape, p.block_shape, p.stride, p.padding, p.dilation)
    x = sized(p.n, p.c_in, p.h, p.w)
    if job.kernel.startswith("bsr_conv2d_dgrad"):
        call(grad, *weight, None, (p.h, p.w), *geometry)
    elif job.kernel.startswith("bsr_conv2d_wgrad"):
        call(grad, x, *weight, *geometry)
    else:
        call(x, *weight, sized(p.c_out) if job.biased else None, order, *geometry, p.epilogue, **config)


def compiled(job: Job) -> str | None:
    """Compiles a job and the C code that launches it; the error's text if there was one."""
    from stand_in import launches

    try:
        launches.make_launchers()
        launch(job)
    except Exception as error:  # compilers raise whatever they like
        return f"{job.kernel} {job.problem} {job.config}: {type(error).__name__}: {error}"[:600]
    return None


def empty_libcuda(folder: Path) -> None:
    """A libcuda.so.1 without contents, and the compiler ``cc`` that links against it.

    A library that offers no symbol is one that nothing needs, and some linkers leave those out. What they make has no
    way to the device's own libcuda, which torch loads for itself alone, and cannot be loaded there.
    """
    source, compiler = folder / "empty.c", folder / "cc"
    source.write_text("")
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True)
    compiler.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n')
    compiler.chmod(0o755)


def utilities() -> None:
    """Triton's C code that loads kernels and reads properties of the device."""
    from triton.backends.nvidia import driver as nvidia

    with contextlib.suppress(ImportError):
        nvidia.CudaUtils()


def refuse_to_compile() -> None:
    """From here on a kernel that is not in the cache raises."""
    from triton.compiler import ASTSource

    def make_ir(self: Any, *args: Any) -> None:
        raise RuntimeError("not in the cache")

    ASTSource.make_ir = make_ir


def looked_up(job: Job) -> str | None:
    """None where all kernels of a job are in the cache."""
    try:
        launch(job)
    except Exception as error:
        return f"{job.kernel} {job.problem} {job.config}: {type(error).__name__}: {error}"[:600]
    return None


def prune(folder: Path) -> list[Path]:
    """Removes what a launch does not read, from the lists of files too; the files that stay."""
    for path in folder.rglob("__grp__*.json"):
        listed = json.loads(path.read_text())["child_paths"]
        kept_paths = {name: place for name, place in listed.items() if name.endswith(KEPT)}
        path.write_text(json.dumps({"child_paths": kept_paths}))
    kept = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        if path.suffix in KEPT:
            kept.append(path)
        else:
            path.unlink()
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    return kept


def pack(folder: Path, files: Iterable[Path], archive: Path) -> None:
    """Packs the cache with paths relative to its folder."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in files:
            tar.add(path, path.relative_to(folder))


def in_processes(work: list[Job], processes: int, setting: tuple[str, str]) -> list[str]:
    """Compiles all jobs; errors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, prepare, setting) as pool:
        return [error for error in pool.map(compiled, work) if error is not None]


def of_tests(folder: str, libcuda: str, processes: int, seconds: float, select: str | None = None) -> str:
    """Compiles what the GPU tests launch, by running them on the stand-in; pytest's last line.

    Some tests fail here, where neither torch's own CUDA parts nor a device's results are; what they launched until
    then is in the cache.

    Args: select: only tests whose names fit it, as ``pytest -k`` has it.
    """
    from gpu_check import dry_run

    selected = f"not {dry_run.NOT}" + (f" and ({select})" if select else "")
    tools = Path(libcuda) / "tools"
    dry_run.tools(tools)
    variables = {**os.environ, **dry_run.environment(tools), "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1",
                 "SLIMKERNELS_STAND_IN_COMPILING": "1", "TRITON_LIBCUDA_PATH": libcuda}  # fmt: skip
    variables["PYTHONPATH"] = os.pathsep.join((str(tools), str(ROOT), str(ROOT / "benchmarks")))
    variables.pop("SLIMKERNELS_STAND_IN_IMAGES")  # tests have sizes of their own
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_check.telling", "--tb=no",
               "-m", "gpu and not slow", "-k", selected, "-n", str(processes), "--maxschedchunk", "1",
               *plan.GPU_TESTS]  # fmt: skip
    with open(Path(libcuda) / "tests.txt", "w+") as log:
        # In a session of its own: its workers end with it, and a shell's background job would ignore an interrupt.
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return (log.read().strip().splitlines() or ["no tests ran"])[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-cache" / "triton-cache.tar.xz")
    parser.add_argument("--folder", type=Path, default=Path(plan.TRITON_CACHE), help="the device's must be the same")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--add", action="store_true", help="to what the folder holds, instead of making all of it")
    parser.add_argument("--tests", action="store_true", help="what the GPU tests launch too: a quarter of an hour")
    parser.add_argument("--seconds", type=float, default=1500, help="no longer than this for --tests")
    parser.add_argument("--select", default=None, help="of the tests, only those that fit this, as pytest -k has it")
    parser.add_argument("--limit", type=int, default=None, help="only so many jobs")
    parser.add_argument("--check", action="store_true", help="look every kernel up; nothing is compiled")
    parsed = parser.parse_args(arguments)
    scratch = tempfile.TemporaryDirectory()
    empty_libcuda(Path(scratch.name))
    setting = str(parsed.folder), scratch.name
    prepare(*setting)
    begun = time.monotonic()
    work = list(islice(jobs(), parsed.limit))
    if parsed.check:
        refuse_to_compile()
        misses = [error for error in map(looked_up, work) if error is not None]
        print(
            "\n".join([*misses, f"{len(work)} jobs, {len(misses)} not in the cache, {time.monotonic() - begun:.0f} s"])
        )
        raise SystemExit(bool(misses))
    if not parsed.add:
        shutil.rmtree(parsed.folder, ignore_errors=True)
    errors = in_processes(work, parsed.processes, setting)
    utilities()
    if parsed.tests:
        print(f"tests: {of_tests(*setting, parsed.processes, parsed.seconds, parsed.select)}", flush=True)
    files = prune(parsed.folder)
    pack(parsed.folder, files, parsed.out)
    count = {suffix: sum(path.suffix == suffix for path in files) for suffix in KEPT}
    size = sum(path.stat().st_size for path in files)
    print("\n".join(errors))
    print(
        f"{len(work)} jobs, {len(errors)} errors, {count['.cubin']} kernels and {count['.so']} launchers, "
        f"{size / 2**20:.1f} MB, packed {parsed.out.stat().st_size / 2**20:.1f} MB, {time.monotonic() - begun:.0f} s"
    )
    raise SystemExit(bool(errors))


if __name__ == "__main__":
    main()
