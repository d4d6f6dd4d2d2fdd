"""Faults put into the low-rank kernels, each of which the emulation must see, and what it counts and compares."""

from __future__ import annotations

import ctypes
import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_emulation import ROOT, compiled, emulate_fault
from low_rank_device import BF16, Device, check_infinite, use
from tensor_core_device import MODES, fails
from torch import Tensor

from slimkernels.cases import LowRankConvCase, LowRankLinearCase
from slimkernels.kernels import cuda_low_rank
from slimkernels.kernels.low_rank_plan import VARIANTS
from slimkernels.testing import assert_close


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = use(compiled(), monkeypatch)
    found.set_mode(-1)
    return found


BREAKS = {
    "a wait for copies": ("hw::copy_async_wait_all_but(a.stages - 2);", "", "linear"),
    "a barrier": ("hw::synchronize();  // the stage", "// the stage", "linear"),
    "a row of an operand": ("(lane & 15) * kRowBytes", "((lane & 15) ^ (lane == 17)) * kRowBytes", "linear"),
    "a chunk of V": ("(chunk ^ right_key(r)) * 16", "(chunk ^ right_key(r) ^ (r == 9)) * 16", "linear"),
    "a chunk of U": ("(chunk ^ right_key(o)) * 16", "(chunk ^ right_key(o) ^ (o == 9)) * 16", "linear"),
    "the end of the rank": ("within & (r < a.rank)", "within", "ends"),
    "the end of the outputs": ("(at < a.u_row) & (column + o < a.c_out)", "(at < a.u_row)", "ends"),
    "the end of the rows": ("if (row < rows && column + at < a.c_out)", "if (column + at < a.c_out)", "ends"),
    "zeros that pad the rank": ("v[e] = column + e < a.rank ? v[e] : 0.0f;", "", "infinite"),
    "the bias": ("sum[i][j][e] = sum[i][j][2 + e] = v;", "sum[i][j][e] = v, sum[i][j][2 + e] = 0;", "linear"),
    "the last part of the depth": ("int64_t(depth_steps) * (split + 1) / a.depth_splits",
                                   "int64_t(depth_steps) * (split + 1) / a.depth_splits - (split == 1)", "two"),
    "a block's partial sums": ("if (first + b < blocks)", "if (first + b < blocks - 1)", "two"),
    "a row of the border": ("unsigned(y[i] + down) < unsigned(a.h)", "unsigned(y[i] + down) <= unsigned(a.h)", "conv"),
    "a column of the border": ("(unsigned(x[i] + right) < unsigned(a.w))", "(x[i] + right < int(a.w))", "conv"),
    "the next row of taps": ("++tap_y;", "", "conv"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    old, new, what = BREAKS[name]
    assert (ROOT / "csrc" / "cuda" / "low_rank.cuh").read_text().count(old) == 1
    device = use(emulate_fault(tmp_path, "low_rank.cuh", old, new, "low_rank"), monkeypatch)
    assert any(fails(device, mode, lambda: check_part(what, device)) for mode in MODES)


def test_what_the_breaks_are_seen_by_passes(device: Device):
    for what in sorted({what for _, _, what in BREAKS.values()}):
        assert not fails(device, -1, lambda what=what: check_part(what, device)), what


def before_a_gap(t: Tensor) -> Tensor:
    """A copy whose last byte is the last one before memory that nobody may touch."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0) == 0
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=whole - size)
    return raw.view(t.dtype).view(t.shape).copy_(t)


def check_ends(case: LowRankLinearCase, device: Device) -> None:
    """What lies behind x, V and U must not be read, and what lies behind y not be written."""
    x, U, V, bias = case.inputs()
    reference, bound = case.expected(x, U, V, bias)
    y = torch.full((case.m + 128, case.out_features), 7.0, dtype=case.dtype)
    one, work = (1, 1), cuda_low_rank.work_of(case.problem())
    cuda_low_rank._run(case.op, before_a_gap(x), y[: case.m], before_a_gap(V), before_a_gap(U), bias, (case.m, 1, 1),
                       one, one, (one, (0, 0), one), 0, work, {"variant": 3})  # fmt: skip
    assert_close(y[: case.m], reference, **bound)
    assert bool((y[case.m :] == 7.0).all())


def check_part(what: str, device: Device) -> None:
    case = LowRankLinearCase("broken", m=20, in_features=264, out_features=520, rank=60, dtype=BF16)
    if what == "linear":
        device.check(case, variant=0, stages=2, splits=1)
    elif what == "two":
        device.check(case, variant=0, depth_splits=2)
    elif what == "ends":
        check_ends(replace(case, in_features=72, out_features=72, rank=40), device)
    elif what == "infinite":
        check_infinite(device)
    else:
        conv = LowRankConvCase("broken", "svd", n=2, c_in=16, c_out=24, ranks=(12,), dtype=BF16)
        device.check(conv, variant=0)


def test_no_bank_conflicts(device: Device):
    assert device.emulator is not None
    before = device.emulator.library.get_conflicts()
    for variant, shape in enumerate(VARIANTS):
        case = LowRankLinearCase("conflicts", m=130, in_features=64, out_features=256, rank=shape.rank, dtype=BF16)
        device.check(case, variant=variant)
    assert device.emulator.library.get_conflicts() == before


def test_compiled_shapes_are_those_of_the_sources():
    text = (ROOT / "csrc" / "cuda" / "low_rank.cu").read_text()
    declared = dict(re.findall(r"using (\w+) = LowRankShape<(.*?)>;", text))
    listed = re.findall(r"case (\d): return launch<T, (\w+)>", text)
    assert [int(number) for number, _ in listed] == list(range(len(VARIANTS)))
    for (_, alias), shape in zip(listed, VARIANTS, strict=True):
        m, n, tiles, rank, columns = map(int, declared[alias].split(", "))
        assert tuple(shape)[:4] == (m * tiles * 16, rank, columns, m * n * 32)
