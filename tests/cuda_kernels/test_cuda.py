"""The CUDA C++ kernels and their launchers: on a GPU where there is one, and everywhere on a CPU emulation of CUDA.

The emulation (csrc/tests/cuda_on_cpu.h) runs the same csrc/cuda sources, compiled by the C++ compiler, behind the same
launchers: indexing, borders, barriers, shared memory, devices and streams are checked without a GPU.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulation import ROOT, Emulator, compiled, emulate
from torch import Tensor

from slimkernels import _extension
from slimkernels.cases import Case, ConvCase, LinearCase, LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.kernels import KERNELS, OPS, cuda
from slimkernels.testing import assert_close, drop_term, naive_bsr_conv2d, wrong_block


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return compiled()


@dataclass
class Device:
    """Where the launchers run in a test."""

    name: str
    emulator: Emulator | None

    def launch(self, case: Case, inputs: Any) -> Tensor:
        out = getattr(cuda, f"launch_{case.op}")(*to_device(case.launch_args(*inputs), self.name))
        if self.name == "cuda":
            torch.cuda.synchronize()
        return out

    def check(self, case: Case) -> Tensor:
        inputs = case.inputs()
        out = self.launch(case, inputs)
        reference, bound = case.expected(*inputs)
        assert_close(out, reference, **{"name": case.name, **bound})
        return out


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "gpu":
        reason = cuda.available()
        if reason is not None:
            pytest.skip(reason)
        yield Device("cuda", None)
        return
    emulator = request.getfixturevalue("emulator")
    monkeypatch.setattr(cuda, "_require", lambda op, x: emulator)
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    yield Device("cpu", emulator)


BLOCKS = [(16, 1), (32, 1), (1, 1), (4, 4), (5, 3), (32, 32), (64, 16), (128, 16), (96, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# 64 pixels and 16, 32 or 64 output channels are one CTA, 16 stored input columns one stage.
CONV_CASES = [
    ConvCase("m_lt_tile", n=1, h=3, w=5),
    ConvCase("m_div_tile", n=1, h=8, w=8),
    ConvCase("m_tail_of_one", n=1, h=13, w=5),
    ConvCase("n_gt_tile", c_out=80, block_shape=(80, 4), sparsity=0.5),
    ConvCase("depth_div_stage", c_in=16, kernel_size=(1, 1), padding=(0, 0), sparsity=0.0),
    ConvCase("depth_lt_stage", c_in=3, kernel_size=(1, 1), padding=(0, 0), sparsity=0.0),
    ConvCase("ragged_channels", c_in=19, c_out=37, block_shape=(16, 4), sparsity=0.5),
    ConvCase("no_blocks", pattern="no_blocks"),
    ConvCase("zero_block_row", c_out=64, pattern="zero_block_row", sparsity=0.5),
    ConvCase("no_bias_relu", bias=False, epilogue="relu"),
    ConvCase("stride_padding_dilation", h=9, w=11, stride=(2, 3), padding=(3, 1), dilation=(2, 1), kernel_size=(3, 2)),
    ConvCase("image_1x1", n=5, h=1, w=1),
    ConvCase("batch_0", n=0),
]


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_bsr_conv2d(case: ConvCase, device: Device):
    out = device.check(case)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_bsr_conv2d_block_shapes_and_dtypes(block_shape: tuple[int, int], dtype: torch.dtype, device: Device):
    device.check(ConvCase("blocks", c_in=24, c_out=130, h=5, w=4, block_shape=block_shape, sparsity=0.6, dtype=dtype))


def test_bsr_conv2d_takes_any_strides(device: Device):
    case = ConvCase("strides", h=6, w=5)
    x, weight, bias = case.inputs()
    expected = device.launch(case, (x, weight, bias))
    for other in (x.contiguous(), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(device.launch(case, (other, weight, bias)), expected)


def test_bsr_conv2d_nonfinite_inputs_reach_what_reads_them(device: Device):
    case = ConvCase("nan", n=1, h=5, w=5, sparsity=0.7, block_shape=(16, 4), epilogue="relu")
    x, weight, bias = case.inputs()
    x[0, 3, 2, 2], x[0, 7, 0, 4] = torch.nan, torch.inf
    out = device.launch(case, (x, weight, bias)).cpu()
    expected = naive_bsr_conv2d(x, weight, bias, *case.geometry())
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
def test_the_comparison_sees_a_wrong_weight(mutate: Callable[..., Any], device: Device):
    case = ConvCase("mutant", block_shape=(16, 4))
    x, weight, bias = case.inputs()
    out = device.launch(case, (x, mutate(weight), bias))
    reference, bound = case.expected(x, weight, bias)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close(out, reference, **bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LinearCase("base"),
        LinearCase("m_gt_tile", m=130, block_shape=(64, 16), out_features=128, in_features=64, epilogue="relu"),
        LinearCase("ragged", m=3, in_features=33, out_features=50, block_shape=(8, 5), bias=False),
        LinearCase("batch_0", m=0),
    ],
    ids=lambda case: case.name,
)
def test_bsr_linear(case: LinearCase, dtype: torch.dtype, device: Device):
    device.check(replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LowRankLinearCase("base"),
        LowRankLinearCase("m_gt_tile", m=70, in_features=65, out_features=130, rank=67, epilogue="relu"),
        LowRankLinearCase("rank_1", m=33, rank=1, bias=False),
        LowRankLinearCase("largest_fused_rank", m=2, in_features=9, out_features=5, rank=640),
        LowRankLinearCase("two_launches", m=2, in_features=9, out_features=5, rank=641, epilogue="relu"),
        LowRankLinearCase("batch_0", m=0),
    ],
    ids=lambda case: case.name,
)
def test_low_rank_linear(case: LowRankLinearCase, dtype: torch.dtype, device: Device):
    before = device.emulator.launches if device.emulator else 0
    device.check(replace(case, dtype=dtype))
    if device.emulator is not None:
        assert device.emulator.launches - before == {"two_launches": 2, "batch_0": 0}.get(case.name, 1)


def test_linear_layers_keep_leading_dimensions(device: Device):
    linear, low_rank = LinearCase(m=6), LowRankLinearCase(m=6)
    for case in (linear, low_rank):
        x, *rest = case.inputs()
        flat = device.launch(case, (x, *rest))
        assert torch.equal(device.launch(case, (x.reshape(2, 3, -1), *rest)), flat.reshape(2, 3, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LowRankConvCase("tai"),
        LowRankConvCase("tai_strided", stride=(2, 1), padding=(0, 2), dilation=(1, 2), epilogue="relu", bias=False),
        LowRankConvCase("svd", kind="svd", stride=(2, 2)),
        LowRankConvCase("tucker2", kind="tucker2", ranks=(3, 5), epilogue="relu"),
        LowRankConvCase("batch_0", n=0),
    ],
    ids=lambda case: case.name,
)
def test_low_rank_conv2d(case: LowRankConvCase, dtype: torch.dtype, device: Device):
    out = device.check(replace(case, dtype=dtype))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [0, 1])
def test_the_emulation_sees_a_missing_barrier(barrier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between staging and multiplying, and between multiplying and staging anew: without either, results are wrong."""
    parts = (ROOT / "csrc" / "cuda" / "common.cuh").read_text().split("__syncthreads();")
    assert len(parts) == 3
    parts[barrier : barrier + 2] = ["".join(parts[barrier : barrier + 2])]
    (tmp_path / "common.cuh").write_text("__syncthreads();".join(parts))
    emulator = emulate(tmp_path, "bsr_conv2d", "low_rank_linear")
    monkeypatch.setattr(cuda, "_require", lambda op, x: emulator)
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    with pytest.raises(AssertionError, match="out of bounds"):
        Device("cpu", emulator).check(ConvCase(sparsity=0.5))


# Refusals

REFUSALS: dict[str, tuple[type[Exception], str, Callable[[list[Any]], None]]] = {
    "channels": (ValueError, r"expected x of shape \(N, 16, H, W\), got", lambda a: a.__setitem__(0, a[0][:, :9])),
    "dtype": (TypeError, "expected x of float32, float16 or bfloat16", lambda a: a.__setitem__(0, a[0].double())),
    "mixed": (
        TypeError,
        "expected values of torch.float32, got torch.float16",
        lambda a: a.__setitem__(1, a[1].half()),
    ),
    "indices": (TypeError, "expected col_indices of torch.int32", lambda a: a.__setitem__(3, a[3].long())),
    "blocks": (ValueError, r"expected values \(nnz_blocks, 16, 2\)", lambda a: a.__setitem__(7, [16, 2])),
    "rows": (ValueError, "4 crow_indices", lambda a: a.__setitem__(2, a[2][:-1])),
    "bias": (ValueError, r"expected bias of shape \(48,\)", lambda a: a.__setitem__(4, a[4][:-1])),
    "pool": (ValueError, "epilogue 'none' or 'relu'", lambda a: a.__setitem__(11, "relu_maxpool2")),
    "image": (ValueError, "an image that the kernel fits into", lambda a: a.__setitem__(9, [-4, -4])),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bsr_conv2d_refuses(name: str, device: Device):
    error, message, change = REFUSALS[name]
    case = ConvCase(c_out=48)
    arguments = list(to_device(case.launch_args(*case.inputs()), device.name))
    change(arguments)
    with pytest.raises(error, match=f"^bsr_conv2d: .*{message}"):
        cuda.launch_bsr_conv2d(*arguments)


def test_low_rank_linear_refuses(device: Device):
    x, U, V, bias = to_device(LowRankLinearCase().inputs(), device.name)
    for arguments, message in (
        ((x[:, 1:], U, V, bias), r"expected x \(..., in\) and V \(rank, in\)"),
        ((x, U[:, 1:], V, bias), r"expected U of shape \(out, 6\)"),
        ((x, U, V, bias[1:]), r"expected bias of shape \(40,\)"),
    ):
        with pytest.raises(ValueError, match=f"^low_rank_linear: {message}"):
            cuda.launch_low_rank_linear(*arguments, [], "none")


def test_device_and_stream_are_those_of_the_tensor(device: Device, monkeypatch: pytest.MonkeyPatch):
    case = ConvCase()
    if device.emulator is None:
        stream = torch.cuda.Stream()
        inputs = to_device(case.inputs(), "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            x = inputs[0] * 2
            out = cuda.launch_bsr_conv2d(*case.launch_args(x, *inputs[1:]))
        stream.synchronize()
        x, weight, bias = case.inputs()
        assert_close(out, case.expected(x * 2, weight, bias)[0], **case.expected(x * 2, weight, bias)[1])
        return
    library = device.emulator.library
    library.get_launch_stream.restype = ctypes.c_void_p
    monkeypatch.setattr(cuda, "_target", lambda x: (1, 0x1234))
    device.check(case)
    assert (library.get_launch_device(), library.get_launch_stream()) == (1, 0x1234)
    assert library.get_current_device() == 0
    monkeypatch.setattr(cuda, "_target", lambda x: (7, 0))
    with pytest.raises(
        RuntimeError, match=r"bsr_conv2d: the CUDA C\+\+ kernel failed with status 3: invalid device ordinal"
    ):
        device.check(case)
    assert library.get_current_device() == 0


@pytest.mark.gpu
def test_kernels_can_be_captured_in_a_cuda_graph():
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    case = ConvCase()
    arguments = to_device(case.launch_args(*case.inputs()), "cuda")
    expected = cuda.launch_bsr_conv2d(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.launch_bsr_conv2d(*arguments)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


# Why it cannot run here


def test_every_op_has_a_row():
    assert [name for name in KERNELS if name.endswith("__cuda")] == [f"{op}__cuda" for op in OPS]


@pytest.fixture
def fresh_reason(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    cuda._static_reason.cache_clear()
    yield monkeypatch
    cuda._static_reason.cache_clear()


def build(**extra: Any) -> SimpleNamespace:
    info = {"cuda": True, "cuda_version": 13000}
    return SimpleNamespace(build_info=lambda: info, cuda_unavailable_reason=lambda: extra.get("driver"))


@pytest.mark.parametrize(
    ("module", "gpu", "capability", "reason"),
    [
        (None, True, (9, 0), "slimkernels._C is not loaded: no compiler"),
        (SimpleNamespace(build_info=lambda: {"cuda": False}), True, (9, 0), "built without CUDA C"),
        (build(), False, (9, 0), "no CUDA GPU|this torch is built without CUDA"),
        (build(driver="driver too old"), True, (9, 0), "CUDA runtime 13.0: driver too old"),
        (build(), True, (7, 5), "compute capability 7.5 is below 8.0"),
        (build(), True, (8, 0), None),
        (build(), True, (12, 0), None),
    ],
)
def test_available_gives_the_reason(
    module: Any, gpu: bool, capability: tuple[int, int], reason: str | None, fresh_reason: pytest.MonkeyPatch
):
    fresh_reason.setattr(_extension, "load", lambda: (module, None if module else "no compiler"))
    fresh_reason.setattr(torch.cuda, "is_available", lambda: gpu)
    fresh_reason.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = cuda.available()
    assert found is None if reason is None else re.match(reason, str(found))


def test_explicit_request_where_it_cannot_run_raises():
    if cuda.available() is None:
        pytest.skip("the kernels run here")
    case = ConvCase()
    with pytest.raises(RuntimeError, match=r"bsr_conv2d: the CUDA C\+\+ kernel cannot run: "):
        cuda.launch_bsr_conv2d(*case.launch_args(*case.inputs()))
