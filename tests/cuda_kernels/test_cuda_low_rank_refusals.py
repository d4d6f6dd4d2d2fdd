"""What the low-rank launchers on tensor cores refuse, and what the kernel table and the cost model say of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_emulation import compiled
from low_rank_device import BF16, FP16, Device, use
from tensor_core_device import HOPPER_SHARED

from slimkernels.cases import LowRankConvCase, LowRankLinearCase
from slimkernels.dispatch import gpu_cost
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.dispatch.select import predicted_seconds
from slimkernels.kernels import KERNELS, cuda_low_rank, cuda_tensor_cores, low_rank_plan
from slimkernels.kernels.cuda_tensor_cores import Limits


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = use(compiled(), monkeypatch)
    found.set_mode(-1)
    return found


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
