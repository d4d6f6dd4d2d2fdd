"""The low-rank kernels of csrc/cuda on tensor cores and their launchers, on a GPU where there is one and emulated."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import ROOT, Emulator, compiled, emulate
from torch import Tensor

from slimkernels import nn
from slimkernels.cases import LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.dispatch import gpu_cost
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.dispatch.select import predicted_seconds
from slimkernels.kernels import KERNELS, cuda, cuda_low_rank, cuda_tensor_cores, low_rank_plan
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.kernels.low_rank_plan import VARIANTS
from slimkernels.testing import assert_close

MODES = range(8)
HOPPER_SHARED = 227 * 1024
BF16, FP16 = torch.bfloat16, torch.float16
Case = LowRankLinearCase | LowRankConvCase


@dataclass
class Device:
    """Where the launchers run in a test."""

    name: str
    emulator: Emulator | None

    def set_mode(self, mode: int) -> None:
        if self.emulator is not None:
            self.emulator.library.set_mode(mode, HOPPER_SHARED)

    def launch(self, case: Case, inputs: Any, **config: int) -> Tensor:
        function = getattr(cuda_low_rank, f"launch_{case.op}")
        return function(*to_device(case.launch_args(*inputs), self.name), config=config)

    def check(self, case: Case, **config: int) -> Tensor:
        inputs = case.inputs()
        out = self.launch(case, inputs, **config)
        reference, bound = case.expected(*inputs)
        assert_close(out, reference, **{"name": case.name, **bound})
        return out


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, processors: int = 2) -> Device:
    monkeypatch.setattr(cuda, "_require", lambda op, x: emulator)
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: Limits(True, HOPPER_SHARED, processors))
    return Device("cpu", emulator)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "gpu":
        if cuda.available() is not None:
            pytest.skip(str(cuda.available()))
        yield Device("cuda", None)
        return
    found = use(compiled(), monkeypatch)
    found.set_mode(-1)
    yield found


def fits(variant: int) -> bool:
    """Whether the tile runs on the GPU there is; the emulation is of one that has room for all."""
    if not torch.cuda.is_available():
        return True
    limit: int = torch.cuda.get_device_properties(0).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return VARIANTS[variant].shared_bytes(2) <= limit


# Linear layers. A tile has 16, 64 or 128 rows and 64 to 256 columns, a stage 64 numbers of depth.
LINEAR = [
    LowRankLinearCase("m_lt_tile", m=3, in_features=48, out_features=40, rank=16, epilogue="relu"),
    LowRankLinearCase("m_div_tile", m=128, in_features=64, out_features=128, rank=64),
    LowRankLinearCase("m_tail_of_one", m=129, in_features=72, out_features=72, rank=40, epilogue="relu"),
    LowRankLinearCase("rank_1", m=5, in_features=24, out_features=40, rank=1, bias=False),
    LowRankLinearCase("rank_ragged", m=20, in_features=48, out_features=264, rank=61),
    LowRankLinearCase("k_ragged", m=18, in_features=136, out_features=64, rank=24, epilogue="relu"),
    LowRankLinearCase("n_lt_tile", m=33, in_features=64, out_features=8, rank=32, bias=False, epilogue="relu"),
    LowRankLinearCase("one_number_of_depth", m=4, in_features=8, out_features=16, rank=8),
    LowRankLinearCase("batch_0", m=0, in_features=8, out_features=16, rank=8),
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear(case: LowRankLinearCase, variant: int, device: Device):
    if device.emulator is None and not fits(variant):
        pytest.skip("the tile does not fit this GPU's shared memory")
    case = replace(case, dtype=BF16 if variant % 2 else FP16)
    device.check(case, variant=variant)
    if device.emulator is not None and case.m > 0:
        work = cuda_low_rank.work_of(case.problem())
        plan = low_rank_plan.plan(work, low_rank_plan.machine(2, HOPPER_SHARED), {"variant": variant})
        assert plan is not None and plan.shared_bytes == device.emulator.library.get_launch_shared()


@pytest.mark.parametrize(("rank", "variant"), [(128, 1), (100, 4), (77, 6), (256, 2), (256, 5), (130, 5)])
def test_linear_of_every_rank(rank: int, variant: int, device: Device):
    if device.emulator is None and not fits(variant):
        pytest.skip("the tile does not fit this GPU's shared memory")
    case = LowRankLinearCase("rank", m=70, in_features=80, out_features=144, rank=rank, epilogue="relu", dtype=BF16)
    device.check(case, variant=variant)


@pytest.mark.parametrize("depth_splits", [2, 3, 7])
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_linear_in_two_kernels(variant: int, depth_splits: int, device: Device):
    """More blocks than there are stages of depth too, which write zeros."""
    if device.emulator is None and not fits(variant):
        pytest.skip("the tile does not fit this GPU's shared memory")
    case = LowRankLinearCase("two", m=17, in_features=328, out_features=72, rank=50, epilogue="relu", dtype=BF16)
    before = device.emulator.launches if device.emulator else 0
    device.check(case, variant=variant, depth_splits=depth_splits, overlap=0)
    assert device.emulator is None or device.emulator.launches == before + 1


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 9])
def test_outputs_are_shared(splits: int, device: Device):
    """By fewer thread blocks than there are tiles of 64 outputs, by as many, and by more."""
    case = LowRankLinearCase("splits", m=20, in_features=64, out_features=328, rank=24, dtype=BF16)
    device.check(case, variant=0, splits=splits)


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_stages(stages: int, device: Device):
    case = LowRankLinearCase("stages", m=20, in_features=520, out_features=328, rank=24, dtype=BF16)
    device.check(case, variant=0, stages=stages, splits=1)
    device.check(case, variant=0, stages=stages, splits=2, depth_splits=2, overlap=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_every_order_of_threads_and_copies(variant: int, mode: int, device: Device):
    """The ring turns over in both products, in one kernel and in two."""
    if device.emulator is None and not fits(variant):
        pytest.skip("the tile does not fit this GPU's shared memory")
    device.set_mode(mode)
    case = LowRankLinearCase("orders", m=20, in_features=264, out_features=520, rank=60, epilogue="relu", dtype=BF16)
    device.check(case, variant=variant, stages=2, splits=1)
    device.check(replace(case, in_features=520), variant=variant, stages=2, splits=1, depth_splits=2, overlap=0)


def test_two_kernels_give_the_same_every_time(device: Device):
    case = LowRankLinearCase("again", m=33, in_features=1032, out_features=136, rank=24, dtype=BF16)
    inputs = case.inputs()
    first = device.launch(case, inputs, depth_splits=8)
    for _ in range(3):
        assert torch.equal(device.launch(case, inputs, depth_splits=8), first)


def test_the_intermediate_is_rounded_once(device: Device):
    """Of one depth and one rank the sums are exact: y is round(round(x v) u)."""
    x = torch.zeros(4, 8, dtype=BF16)
    x[:, 0] = torch.tensor([1.0, 1.0078125, 3.140625, 100.5])
    V, U = torch.zeros(1, 8, dtype=BF16), torch.full((8, 1), 1.0078125, dtype=BF16)
    V[0, 0] = 1.0078125
    out = cuda_low_rank.launch_low_rank_linear(*to_device((x, U, V, None), device.name), [], "none")
    assert torch.equal(out.cpu(), ((x[:, :1] * V[:, :1]) * U.t()).to(BF16))


def test_infinite_numbers_spoil_their_row_only(device: Device):
    """Columns that pad the rank would be infinity times zero."""
    case = LowRankLinearCase("infinite", m=18, in_features=24, out_features=16, rank=5, bias=False, dtype=BF16)
    x, U, V, bias = case.inputs()
    x[3, 7], V = torch.inf, V.abs() + 1
    out = device.launch(case, (x, U.abs() + 1, V, bias)).cpu()
    assert torch.equal(out.isinf().all(1), torch.arange(18) == 3) and not out.isnan().any()
    x[9, 2] = torch.nan
    case = replace(case, epilogue="relu")
    out = device.launch(case, (x, U, V, bias)).cpu()
    assert out[9].isnan().all() and not out[:3].isnan().any()


def test_leading_dimensions_strides_and_alignment(device: Device):
    case = LowRankLinearCase("lead", m=6, in_features=24, out_features=40, rank=6, dtype=BF16)
    x, U, V, bias = case.inputs()
    flat = device.launch(case, (x, U, V, bias))
    assert torch.equal(device.launch(case, (x.reshape(2, 3, -1), U, V, bias)), flat.reshape(2, 3, -1))
    assert torch.equal(device.launch(case, (x[0], U, V, bias)), flat[0])
    moved = torch.zeros(x.numel() + 1, dtype=BF16)[1:].view_as(x).copy_(x)
    turned = U.t().contiguous().t(), V.t().contiguous().t()
    assert torch.equal(device.launch(case, (moved, *turned, bias)), flat)


@pytest.mark.parametrize(
    ("changes", "launches"),
    [({}, 1), ({"dtype": torch.float32}, 1), ({"in_features": 33}, 1), ({"out_features": 50}, 1), ({"rank": 300}, 1)],
    ids=str,
)
def test_what_tensor_cores_do_not_take_runs_on_the_plain_cores(changes: dict[str, Any], launches: int, device: Device):
    case = replace(LowRankLinearCase("plain", m=5, in_features=24, out_features=40, rank=6, dtype=BF16), **changes)
    reason = cuda_low_rank.linear_reason(case.problem("cuda"))
    assert (reason is None) == (not changes)
    device.check(case)
    if device.emulator is not None:  # the plain kernel keeps its intermediate as fp32
        plain = case.rank * 33 * 4
        assert (device.emulator.library.get_launch_shared() == plain) == bool(changes)
    if changes:
        with pytest.raises(ValueError, match=r"^low_rank_linear: no configuration without tensor cores"):
            device.launch(case, case.inputs(), stages=3)


# Convolutions: the last factor is 1x1

SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "relu_n_gt_tile": {"epilogue": "relu", "c_out": 88},
    "k_gt_tile": {"c_in": 72, "h": 3, "w": 3},
    "k_div_tile": {"c_in": 64, "h": 4, "w": 4, "bias": False},
    "strided": {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1), "h": 11, "w": 10},
    "padding_exceeds_image": {"n": 1, "h": 2, "w": 1, "padding": (3, 2), "dilation": (2, 2)},
    "kernel_5x1": {"kernel_size": (5, 1), "padding": (2, 0)},
    "kernel_2x3": {"kernel_size": (2, 3), "padding": (0, 1), "c_in": 24},
    "pointwise": {"kernel_size": (1, 1), "padding": (0, 0)},
    "eight_channels": {"c_in": 8, "c_out": 8, "n": 1},
    "image_1x1": {"n": 5, "h": 1, "w": 1},
    "batch_0": {"n": 0},
}
CONVS = [
    LowRankConvCase(f"{kind}_{name}", kind, ranks=ranks, **{"c_in": 16, "c_out": 24, **sizes})
    for kind, ranks in (("svd", (12,)), ("tucker2", (8, 20)))
    for name, sizes in SIZES.items()
] + [
    LowRankConvCase("svd_rank_256", "svd", c_in=8, c_out=16, ranks=(256,), n=1, h=3, w=3),
    LowRankConvCase("svd_rank_1", "svd", c_in=8, c_out=16, ranks=(1,)),
    LowRankConvCase("tucker2_rank_100", "tucker2", c_in=10, c_out=16, ranks=(16, 100), n=1, epilogue="relu"),
]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_conv(case: LowRankConvCase, dtype: torch.dtype, device: Device):
    out = device.check(replace(case, dtype=dtype))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_conv_tiles(variant: int, device: Device):
    """Pixels of several images in a tile, several tiles, and the depth of 216 shared by two kernels."""
    if device.emulator is None and not fits(variant):
        pytest.skip("the tile does not fit this GPU's shared memory")
    case = LowRankConvCase("tiles", "svd", n=3, c_in=24, c_out=72, ranks=(40,), stride=(1, 2), dtype=BF16)
    device.check(case, variant=variant, stages=3)
    device.check(case, variant=variant, depth_splits=3, overlap=0)


@pytest.mark.parametrize("mode", MODES)
def test_conv_in_every_order(mode: int, device: Device):
    device.set_mode(mode)
    case = LowRankConvCase("orders", "svd", n=1, c_in=24, c_out=136, ranks=(60,), padding=(2, 1), dtype=BF16)
    device.check(case, variant=0, stages=2, splits=1)


def test_conv_takes_any_strides(device: Device):
    case = LowRankConvCase("strides", "svd", c_in=16, c_out=24, ranks=(12,), dtype=BF16)
    x, factors, bias = case.inputs()
    expected = device.launch(case, (x, factors, bias))
    for other in (x.contiguous(), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(device.launch(case, (other, factors, bias)), expected)
    last = [f.contiguous(memory_format=torch.channels_last) for f in factors]
    assert torch.equal(device.launch(case, (x, last, bias)), expected)


def test_conv_nan_passes_the_relu(device: Device):
    case = LowRankConvCase("nan", "svd", c_in=8, c_out=16, ranks=(5,), epilogue="relu", kernel_size=(1, 1),
                           padding=(0, 0), dtype=BF16)  # fmt: skip
    x, factors, bias = case.inputs()
    x[1, :, 3, 4] = torch.nan
    y = device.launch(case, (x, factors, bias)).cpu()
    assert y[1, :, 3, 4].isnan().all() and int(y.isnan().sum()) == case.c_out


@pytest.mark.parametrize("case", [LowRankLinearCase("linear", in_features=24, out_features=40, rank=6, dtype=BF16),
                                  LowRankConvCase("svd", "svd", c_in=8, c_out=16, dtype=BF16),
                                  LowRankConvCase("tucker2", "tucker2", c_in=8, c_out=16, ranks=(8, 4), dtype=BF16)],
                         ids=lambda case: case.name)  # fmt: skip
def test_the_comparison_sees_one_dropped_weight(case: Case, device: Device):
    inputs: list[Any] = list(case.inputs())
    reference, bound = case.expected(*inputs)
    linear = isinstance(case, LowRankLinearCase)
    for i in range(2 if linear else len(inputs[1])):
        factors = [t.clone() for t in (inputs[1:3] if linear else inputs[1])]
        factors[i].view(-1)[int(factors[i].abs().argmax())] = 0
        spoilt = (inputs[0], *factors, inputs[3]) if linear else (inputs[0], factors, inputs[2])
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(device.launch(case, spoilt), reference, **bound)


# Refusals

CONV_REFUSALS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "tai": (ValueError, "does not take this: its last factor is no 1x1", {"kind": "tai"}),
    "float32": (ValueError, "does not take this: float32", {"dtype": torch.float32}),
    "rank": (ValueError, "at most 256 channels lies in shared memory, not 264", {"ranks": (264,)}),
    "input channels": (ValueError, "copied eight at a time, not 12 to 16", {"c_in": 12}),
    "output channels": (ValueError, "copied eight at a time, not 8 to 20", {"c_out": 20}),
    "middle channels": (ValueError, "copied eight at a time, not 12 to 16", {"kind": "tucker2", "ranks": (12, 8)}),
    "epilogue": (ValueError, "expected epilogue 'none' or 'relu'", {"epilogue": "relu_maxpool2"}),
    "stride": (ValueError, "padding or dilation is above 65535", {"stride": (65536, 1)}),
    "padding": (ValueError, "expected stride >= 1, dilation >= 1, padding >= 0", {"padding": (-1, 0)}),
    "image": (ValueError, "expected an output of at least 1x1, got 0x1", {"h": 2, "w": 3, "padding": (0, 0)}),
}


@pytest.mark.parametrize("name", CONV_REFUSALS)
def test_conv_refuses(name: str, device: Device):
    error, message, changes = CONV_REFUSALS[name]
    case = LowRankConvCase(**{"kind": "svd", "c_in": 8, "c_out": 16, "dtype": BF16, **changes})
    with pytest.raises(error, match=f"^low_rank_conv2d: .*{message}"):
        device.launch(case, case.inputs())


def test_conv_refuses_tensors_that_do_not_fit(device: Device):
    case = LowRankConvCase(kind="svd", c_in=8, c_out=16, dtype=BF16)
    x, factors, bias = case.inputs()
    for inputs, message in (
        ((x[:, 1:], factors, bias), r"expected x of shape \(N, 8, H, W\), got \(2, 7, 7, 9\)"),
        ((x, [factors[0], factors[1][:, 1:]], bias), "expected factors that follow each other, the last one 1x1"),
        ((x, factors[::-1], bias), "expected factors that follow each other, the last one 1x1"),
        ((x, factors, bias[1:]), r"expected bias of shape \(16,\), got \(15,\)"),
    ):
        with pytest.raises(ValueError, match=f"^low_rank_conv2d: {message}"):
            device.launch(case, inputs)
    with pytest.raises(TypeError, match=r"^low_rank_conv2d: expected factors\[1\] of torch.bfloat16, got torch.float"):
        device.launch(case, (x, [factors[0], factors[1].float()], bias))


def test_linear_refuses(device: Device):
    case = LowRankLinearCase(in_features=24, out_features=40, rank=6, dtype=BF16)
    x, U, V, bias = case.inputs()
    for inputs, message in (
        ((x[:, 1:], U, V, bias), r"expected x \(..., in\) and V \(rank, in\)"),
        ((x, U[:, 1:], V, bias), r"expected U of shape \(out, 6\)"),
        ((x, U, V, bias[1:]), r"expected bias of shape \(40,\)"),
    ):
        with pytest.raises(ValueError, match=f"^low_rank_linear: {message}"):
            device.launch(case, inputs)
    with pytest.raises(TypeError, match=r"^low_rank_linear: expected V of torch.bfloat16, got torch.float16"):
        device.launch(case, (x, U, V.half(), bias))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": 7}, "expected variant in 0 to 6, got 7"),
        ({"stages": 9}, "expected stages in 2 to 8, got 9"),
        ({"depth_splits": 0}, "expected depth_splits in 1 to 32, got 0"),
        ({"tile": 1}, "expected config of depth_splits, overlap, splits, stages, variant, got"),
        ({"variant": 3, "rank": 72}, "variant 3 takes a rank of at most 64, not 72"),
        ({"variant": 5, "stages": 8}, r"expected a plan within \d+ bytes of shared memory, got"),
    ],
    ids=str,
)
def test_refuses_configurations(config: dict[str, int], message: str, device: Device):
    case = LowRankLinearCase(in_features=24, out_features=40, rank=config.pop("rank", 6), dtype=BF16)
    with pytest.raises(ValueError, match=f"^low_rank_linear: {message}"):
        device.launch(case, case.inputs(), **config)


def test_overlap_needs_hopper(device: Device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: Limits(False, HOPPER_SHARED, 2))
    case = LowRankLinearCase(in_features=136, out_features=40, rank=6, dtype=BF16)
    with pytest.raises(ValueError, match=r"^low_rank_linear: overlap needs a GPU of compute capability 9.0"):
        device.launch(case, case.inputs(), depth_splits=2, overlap=1)
    device.check(case, depth_splits=2)


# What keeps it right

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
    text = (ROOT / "csrc" / "cuda" / "low_rank.cuh").read_text()
    assert text.count(old) == 1
    (tmp_path / "low_rank.cuh").write_text(text.replace(old, new))
    device = use(emulate(tmp_path, only="low_rank"), monkeypatch)
    assert any(fails(what, device, mode) for mode in MODES)


def test_what_the_breaks_are_seen_by_passes(device: Device):
    if device.emulator is None:
        pytest.skip("of the emulation")
    for what in sorted({what for _, _, what in BREAKS.values()}):
        assert not fails(what, device, -1), what


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


def fails(what: str, device: Device, mode: int) -> bool:
    """Whether a check fails in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            device.set_mode(mode)
            case = LowRankLinearCase("broken", m=20, in_features=264, out_features=520, rank=60, dtype=BF16)
            if what == "linear":
                device.check(case, variant=0, stages=2, splits=1)
            elif what == "two":
                device.check(case, variant=0, depth_splits=2)
            elif what == "ends":
                check_ends(replace(case, in_features=72, out_features=72, rank=40), device)
            elif what == "infinite":
                test_infinite_numbers_spoil_their_row_only(device)
            else:
                conv = LowRankConvCase("broken", "svd", n=2, c_in=16, c_out=24, ranks=(12,), dtype=BF16)
                device.check(conv, variant=0)
        except AssertionError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_no_bank_conflicts(device: Device):
    if device.emulator is None:
        pytest.skip("counted by the emulation")
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


def test_device_and_stream_are_those_of_the_tensor(device: Device, monkeypatch: pytest.MonkeyPatch):
    case = LowRankLinearCase("stream", in_features=24, out_features=40, rank=8, dtype=BF16)
    if device.emulator is None:
        x, U, V, bias = to_device(case.inputs(), "cuda")
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            out = cuda_low_rank.launch_low_rank_linear(*case.launch_args(x * 2, U, V, bias), {"depth_splits": 2})
        stream.synchronize()
        x, U, V, bias = case.inputs()
        reference, bound = case.expected(x * 2, U, V, bias)
        assert_close(out, reference, **bound)
        return
    monkeypatch.setattr(cuda, "_target", lambda x: (1, 0x1234))
    device.check(case)
    assert device.emulator.library.get_launch_device() == 1 and device.emulator.library.get_current_device() == 0
    monkeypatch.setattr(cuda, "_target", lambda x: (7, 0))
    with pytest.raises(RuntimeError, match=r"low_rank_linear: the CUDA C\+\+ kernel failed with status 3: invalid dev"):
        device.check(case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 2**31 - 128}, r"2\*\*31 - 128 rows"),
        ({"in_features": 2**30}, r"2\*\*31 bytes or more"),
        ({"out_features": 2**30}, r"2\*\*30 or more"),
        ({"rank": 257}, "at most 256 channels"),
        ({"dtype": torch.float32}, "tensor cores multiply float16 and bfloat16"),
    ],
    ids=str,
)
def test_limits_of_a_linear_layer(changes: dict[str, Any], message: str):
    problem = LowRankLinearCase("limit", m=4, in_features=64, out_features=64, rank=8, dtype=BF16).problem("cuda")
    assert cuda_low_rank.linear_reason(problem) is None
    assert re.search(message, str(cuda_low_rank.linear_reason(replace(problem, **changes))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2**24, "h": 16, "w": 16}, r"2\*\*31 - 128 rows"),
        ({"n": 1, "h": 2**14, "w": 2**14}, r"2\*\*31 bytes or more"),
        ({"factor_shapes": ((8, 8, 2**14, 2**14), (16, 8, 1, 1)), "padding": (2**13, 2**13)}, r"2\*\*30 or more"),
    ],
    ids=str,
)
def test_limits_of_a_convolution(changes: dict[str, Any], message: str):
    problem = LowRankConvCase("limit", "svd", c_in=8, c_out=16, ranks=(8,), dtype=BF16).problem("cuda")
    assert cuda_low_rank.conv_reason(problem) is None
    assert re.search(message, str(cuda_low_rank.conv_reason(replace(problem, **changes))))


def test_never_a_choice_of_auto():
    for name in ("low_rank_linear__cuda", cuda_low_rank.CONV_NAME):
        assert KERNELS[name].explicit_only
    assert KERNELS[cuda_low_rank.CONV_NAME].dtypes == {BF16, FP16}
    tai = LowRankConvCase("tai", "tai", c_in=8, c_out=16, dtype=BF16).problem("cuda")
    assert "no 1x1 convolution" in str(KERNELS[cuda_low_rank.CONV_NAME].supports(tai))
    assert (
        KERNELS[cuda_low_rank.CONV_NAME].supports(replace(tai, kind="svd", factor_shapes=((8, 8, 3, 3), (16, 8, 1, 1))))
        is None
    )


def test_predictions_are_those_of_the_plan():
    """Far below the fp32 sums of the plain cores, which take what tensor cores do not."""
    linear = LowRankLinearCase("p", 8192, 4096, 4096, 256, dtype=BF16).problem("cuda")
    spec = KERNELS["low_rank_linear__cuda"]
    plan = low_rank_plan.plan(cuda_low_rank.work_of(linear), low_rank_plan.machine(H200.processors, H200.shared_memory))
    assert plan is not None
    predicted = gpu_cost.predict_gpu(spec.backend, linear, {}, H200, tensor_cores=spec.on_tensor_cores(linear))
    assert predicted.seconds == pytest.approx(plan.seconds) and predicted.seconds > predicted.matrix_s
    plain = replace(linear, in_features=4097)
    assert not spec.on_tensor_cores(plain)
    assert gpu_cost.predict_gpu(spec.backend, plain, {}, H200, tensor_cores=False).seconds > 4 * predicted.seconds
    conv = LowRankConvCase("p", "svd", 64, 256, 8, 8, 256, ranks=(128,), dtype=BF16).problem("cuda")
    fused, factors = KERNELS[cuda_low_rank.CONV_NAME], KERNELS["low_rank_conv2d__cuda"]
    assert predicted_seconds(fused, conv) < predicted_seconds(factors, conv)
    tucker = LowRankConvCase("p", "tucker2", 64, 256, 8, 8, 256, ranks=(256, 128), dtype=BF16).problem("cuda")
    assert predicted_seconds(fused, tucker) > predicted_seconds(fused, conv)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"depth_splits": 4}], ids=str)
def test_a_cuda_graph_replays_it(config: dict[str, int]):
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    case = LowRankLinearCase("graph", m=16, in_features=512, out_features=512, rank=60, dtype=BF16)
    arguments = to_device(case.launch_args(*case.inputs()), "cuda")
    expected = cuda_low_rank.launch_low_rank_linear(*arguments, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda_low_rank.launch_low_rank_linear(*arguments, config)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_modules_run_it_by_name():
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    case = LowRankConvCase("module", "tucker2", c_in=16, c_out=24, ranks=(8, 20), epilogue="relu", dtype=BF16)
    x, factors, bias = to_device(case.inputs(), "cuda")
    layer = nn.LowRankConv2d.from_factors(
        factors, bias, kind="tucker2", padding=1, epilogue="relu", kernel=cuda_low_rank.CONV_NAME
    )
    reference, bound = case.expected(*case.inputs())
    assert_close(layer(x), reference, **bound)
