"""The ceilings that everything else is divided by: matrix rate, memory rate, and on a GPU the rate of gathers from L2.

The gather is the block-sparse kernels' access pattern alone: tiles of 128 pixels, a few contiguous channels of each,
from an input that fits L2, past L1. Whether 32 contiguous bytes a pixel run at the rate of 128 decides how narrow a
block may be. With ``--state FOLDER`` the ceilings of a GPU go into the table ``FOLDER/measured/tuned/<device>.json``:
where SLIMKERNELS_CACHE_DIR is ``FOLDER/measured``, the cost model divides by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimkernels import timing
from slimkernels.dispatch import select
from slimkernels.dispatch.devices import device_name
from slimkernels.dispatch.gpu_rates import GpuRates
from slimkernels.dispatch.tables import Table, gpu_rates
from slimkernels.kernels.peak import peak_flops as measured_peak
from slimkernels.tuning import captured

GATHER_BYTES = (32, 64, 128)
_PIXELS, _CHANNELS, _STEPS, _TILE = 1 << 15, 256, 256, 128  # 16 MB of 2-byte channels: Hopper's L2 may hold it twice


def gather_kernel() -> Any:
    """The Triton kernel; Triton is imported here."""
    import triton
    import triton.language as tl

    @triton.jit
    def gather(x_ptr, out_ptr, steps, tiles, ROW: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
        # 32-bit words; every step reads SLICES slices of SLICE words of each of TILE consecutive rows.
        pid = tl.program_id(0)
        rows = tl.arange(0, TILE)
        words = tl.arange(0, SLICE * SLICES)
        total = tl.zeros((TILE, SLICE * SLICES), dtype=tl.int32)
        for step in range(steps):
            tile = (pid * 7919 + step * 104729) % tiles
            offset = ((step * 31 + words // SLICE * 17 + pid) % (ROW // SLICE)) * SLICE + words % SLICE
            offset = tl.multiple_of(tl.max_contiguous(offset, SLICE), SLICE)
            start = x_ptr + (tile * TILE + rows) * ROW
            total += tl.load(start[:, None] + offset[None, :], cache_modifier=".cg")
        tl.store(out_ptr + pid * TILE + rows, tl.sum(total, 1))

    return gather


def compiled_gather(bytes_per_pixel: int, arch: int = 90) -> str:
    """PTX of the gather for a GPU that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"ROW": _CHANNELS // 2, "SLICE": bytes_per_pixel // 4, "SLICES": 128 // bytes_per_pixel, "TILE": _TILE}
    signature = {
        "x_ptr": "*i32",
        "out_ptr": "*i32",
        "steps": "i32",
        "tiles": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(gather_kernel(), signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm["ptx"]


def gather_rate(bytes_per_pixel: int, repeats: int = 20) -> tuple[float, timing.Timing]:
    """``(bytes/s, timing)`` of the gather on the current GPU; its sums are checked against torch's first."""
    generator = torch.Generator("cuda").manual_seed(0)
    row = _CHANNELS // 2
    x = torch.randint(-1000, 1000, (_PIXELS, row), dtype=torch.int32, device="cuda", generator=generator)
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.full((programs, _TILE), -1, dtype=torch.int32, device="cuda")
    kernel, slice_words, tiles = gather_kernel(), bytes_per_pixel // 4, _PIXELS // _TILE
    slices = 32 // slice_words

    def run(steps: int = _STEPS) -> None:
        kernel[(programs,)](x, out, steps, tiles, ROW=row, SLICE=slice_words, SLICES=slices, TILE=_TILE, num_warps=4)

    run(3)
    pid = programs - 1
    expected = torch.zeros(_TILE, dtype=torch.int64, device="cuda")
    for step in range(3):
        tile = (pid * 7919 + step * 104729) % tiles
        for s in range(slices):
            first = (step * 31 + s * 17 + pid) % (row // slice_words) * slice_words
            expected += x[tile * _TILE : (tile + 1) * _TILE, first : first + slice_words].sum(1)
    assert torch.equal(out[pid].long(), expected), "the gather read something else"
    measured = cuda_timing(run, repeats)
    return programs * _STEPS * _TILE * 128 / measured.p50, measured


def cuda_timing(call: Callable[[], Any], repeats: int = 20) -> timing.Timing:
    """Percentiles of a call by CUDA events, after three calls."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return timing.percentiles(samples)


def put_rate(state: Path | None, name: str, rate: float) -> None:
    """Replaces one ceiling in the table of measured ceilings of this GPU; a name that `GpuRates` lacks is passed over.

    Args:
        state: folder of the table; None leaves it.
    """
    if state is None or name not in {f.name for f in fields(GpuRates)}:
        return
    device = device_name("cuda")
    path = state / "measured" / "tuned" / f"{device}.json"
    table = Table.load(path) if path.exists() else Table(device, timing.environment() | {"argv": None})
    rates = table.rates if isinstance(table.rates, GpuRates) else gpu_rates()
    table.rates = replace(rates, name=device, **{name: rate})
    table.save(path)
    select.forget()


def clock_under_load(call: Callable[[], Any]) -> float | None:
    """Clock of the processors while calls are running, Hz; None where the driver's library does not tell."""
    for _ in range(50):
        call()
    try:
        return 1e6 * torch.cuda.clock_rate()
    except (RuntimeError, ModuleNotFoundError, AttributeError):
        return None
    finally:
        torch.cuda.synchronize()


def _record(
    benchmark: Any, what: str, rate: float, unit: str, predicted: float | None, measured: timing.Timing
) -> None:
    benchmark.extra_info.update(suite="ceilings", what=what, rate=rate, unit=unit, predicted_rate=predicted, match=True,
                                **measured.as_ms())  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.fixture
def state(request: pytest.FixtureRequest) -> Path | None:
    return request.config.getoption("--state")


@pytest.mark.parametrize("bytes_per_pixel", GATHER_BYTES)
def test_l2_gather(benchmark: Any, record: Any, device: str, state: Path | None, bytes_per_pixel: int) -> None:
    if device != "cuda":
        pytest.importorskip("triton")
        ptx = compiled_gather(bytes_per_pixel)
        assert "ld.global.cg" in ptx and ".v4.b32" in ptx, "the gather's loads are not 16 bytes wide, past L1"
        pytest.skip("the gather was compiled for sm_90; running it needs a GPU")
    rate, measured = gather_rate(bytes_per_pixel)
    _record(benchmark, f"L2 gather, {bytes_per_pixel} contiguous bytes a pixel", rate, "B/s", gpu_rates().l2_bytes_s,
            measured)  # fmt: skip
    if bytes_per_pixel == GATHER_BYTES[0]:  # a (128, 16) block's slice of a pixel
        put_rate(state, "l2_bytes_s", rate)


def test_matrix_rate(benchmark: Any, record: Any, device: str, smoke: bool, state: Path | None) -> None:
    """bf16 matrix product of random data on a GPU, the multiply-add peak of the native kernels on a CPU."""
    if device == "cuda":
        size = 128 if smoke else 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        measured = cuda_timing(lambda: a @ b)
        rate, predicted = 2 * size**3 / measured.p50, gpu_rates().matrix_flops
        put_rate(state, "matrix_flops", rate)
        clock = clock_under_load(lambda: a @ b)
        if clock is not None:
            benchmark.extra_info["clock_hz"] = clock
            put_rate(state, "clock_hz", clock)
    else:
        start = time.perf_counter()
        rate, predicted = measured_peak(seconds=0.05 if smoke else 0.5), None
        measured = timing.percentiles([time.perf_counter() - start])
    _record(benchmark, "matrix product, bf16" if device == "cuda" else "multiply-add peak, float32", rate, "FLOP/s",
            predicted, measured)  # fmt: skip


def test_dense_convolution_rate(benchmark: Any, record: Any, device: str, smoke: bool, state: Path | None) -> None:
    """The vendor's 3x3 convolution, bf16, channels_last, on 256 channels at 56x56: what sparse kernels race."""
    if device != "cuda":
        pytest.skip("the rate of a GPU's library")
    n, c, size = (1, 32, 8) if smoke else (64, 256, 56)
    x = torch.randn(n, c, size, size, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(c, c, 3, 3, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        measured = cuda_timing(lambda: torch.nn.functional.conv2d(x, w, padding=1))
    rate = 2 * n * size**2 * c**2 * 9 / measured.p50
    _record(benchmark, "dense 3x3 convolution, bf16", rate, "FLOP/s", gpu_rates().dense_flops, measured)
    put_rate(state, "dense_flops", rate)


def test_launch_in_a_graph(benchmark: Any, record: Any, device: str, state: Path | None) -> None:
    """Seconds of one dependent, tiny kernel inside a CUDA graph of 200."""
    if device != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    kernels = 200
    x = torch.zeros(64, device="cuda")

    def call() -> None:
        for _ in range(kernels):
            x.add_(1)

    with torch.no_grad():
        measured = cuda_timing(captured(call, "cuda"))
    one = timing.Timing(*(t / kernels for t in (measured.p20, measured.p50, measured.p80)), measured.n)
    _record(benchmark, "launches in a CUDA graph", 1 / one.p50, "kernels/s", 1 / gpu_rates().launch_s, one)
    put_rate(state, "launch_s", one.p50)


def test_copy_rate(benchmark: Any, record: Any, device: str, smoke: bool, state: Path | None) -> None:
    """Copying a large buffer; bytes read plus bytes written."""
    count = (1 << 20) if smoke else (1 << 30 if device == "cuda" else 1 << 26)
    a = torch.ones(count, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    if device == "cuda":
        measured, predicted = cuda_timing(lambda: b.copy_(a)), gpu_rates().memory_bytes_s
    else:
        measured, predicted = timing.interleaved({"copy": lambda: b.copy_(a)}, 0.0 if smoke else 0.5, 3)["copy"], None
    assert torch.equal(a[-100:], b[-100:])
    if device == "cuda":
        put_rate(state, "memory_bytes_s", 8 * count / measured.p50)
    _record(benchmark, "memory copy, read plus written", 8 * count / measured.p50, "B/s", predicted, measured)
