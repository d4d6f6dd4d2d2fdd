"""The low-rank kernels of csrc/cuda on tensor cores and their launchers, on a GPU where there is one and emulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_emulation import compiled
from low_rank_device import BF16, FP16, Case, Device, check_infinite, use
from tensor_core_device import HOPPER_SHARED, MODES

from slimkernels import nn
from slimkernels.cases import LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.kernels import cuda, cuda_low_rank, low_rank_plan
from slimkernels.kernels.low_rank_plan import VARIANTS
from slimkernels.testing import assert_close


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


def test_nonfinite_numbers_spoil_their_row_only(device: Device):
    check_infinite(device)
    case = LowRankLinearCase("nan", m=18, in_features=24, out_features=16, rank=5, epilogue="relu", dtype=BF16)
    x, U, V, bias = case.inputs()
    x[9, 2] = torch.nan
    out = device.launch(case, (x, U, V, bias)).cpu()
    assert torch.equal(out.isnan().all(1), torch.arange(18) == 9) and int(out.isnan().sum()) == case.out_features


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
    "changes",
    [{}, {"dtype": torch.float32}, {"in_features": 33}, {"out_features": 50}, {"rank": 300}],
    ids=str,
)
def test_what_tensor_cores_do_not_take_runs_on_the_plain_cores(changes: dict[str, Any], device: Device):
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
