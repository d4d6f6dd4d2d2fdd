"""Packs made in a call, by a gather that waits for nothing: a training step can be captured as a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensor_core_device import Device, device
from torch import Tensor, nn

from slimkernels import tensors
from slimkernels.cases import ConvCase, to_device
from slimkernels.compress.training.graphed_steps import EAGER_STEPS
from slimkernels.kernels import cuda, cuda_tensor_cores, gathered_packs, resident_plan
from slimkernels.kernels.resident_plan import TF32_VARIANTS, VARIANTS
from slimkernels.nn import BlockSparseConv2d
from slimkernels.testing import assert_close, random_bsr

__all__ = ["device"]  # a fixture, which its users name

BF16 = torch.bfloat16


KINDS = [
    *((variant, BF16) for variant in range(len(VARIANTS))),
    *((variant, torch.float32) for variant in TF32_VARIANTS),
]


@pytest.mark.parametrize(("variant", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("shape", [(256, 40, 3, 3), (200, 16, 1, 1), (72, 24, 3, 2)], ids=str)
def test_a_gathered_pack_is_the_pack(variant: int, dtype: torch.dtype, shape: tuple[int, int, int, int]):
    """Ragged channels and room for more blocks among them; float32 rounded to TF32 in either."""
    column = VARIANTS[variant].column
    for block in ((column, 16), (2 * column, 32)):
        weight = random_bsr(shape, block, 0.5, seed=variant, dtype=dtype)
        values = torch.cat([weight.values, torch.ones(3, *block, dtype=dtype)])
        col = torch.cat([weight.col_indices, torch.zeros(3, dtype=torch.int32)])
        parts = (values, weight.crow_indices, col, shape, block, VARIANTS[variant])
        expected = resident_plan.pack(*parts)
        got = gathered_packs.pack("bsr_conv2d", *parts)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        again = gathered_packs.pack("bsr_conv2d", values * 2, *parts[1:])
        assert torch.equal(again.weights, expected.weights * 2) and again.taps is got.taps


def test_values_change_and_the_pattern_is_read_once(device: Device, monkeypatch: pytest.MonkeyPatch):
    """The second call may be captured; a pattern that was written to may not be met in a capture first."""
    case = ConvCase("gather", n=1, c_in=32, c_out=128, h=4, w=4, block_shape=(64, 16), sparsity=0.5, dtype=BF16)
    x, weight, bias = case.inputs()
    arguments: list[Any] = list(to_device(case.launch_args(x, weight, bias), device.name))
    read: list[Any] = []
    index = resident_plan.pack_index
    monkeypatch.setattr(resident_plan, "pack_index", lambda *a: read.append(a) or index(*a))

    def run(values: Tensor) -> Tensor:
        return cuda_tensor_cores.launch_bsr_conv2d(arguments[0], values, *arguments[2:])

    run(arguments[1])
    met = len(read)
    assert met > 0
    for module in (gathered_packs, tensors):
        monkeypatch.setattr(module, "is_capturing", lambda tensor: True)
    new = weight.values * 3
    out = run(new.to(device.name))
    assert len(read) == met
    changed = type(weight)(new, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    reference, bound = case.expected(x, changed, bias)
    assert_close(out, reference, **bound)
    arguments[3].add_(0)  # counted as a write
    with pytest.raises(RuntimeError, match=r"^bsr_conv2d: the weight must be packed before a CUDA graph is captured"):
        run(arguments[1])


def test_a_pack_made_in_the_call_does_not_overlap_it(device: Device, monkeypatch: pytest.MonkeyPatch):
    case = ConvCase("late", n=1, c_in=16, c_out=64, h=2, w=2, block_shape=(64, 16), sparsity=0.5, dtype=BF16)
    arguments: list[Any] = list(to_device(case.launch_args(*case.inputs()), device.name))
    overlaps: list[int] = []
    monkeypatch.setattr(cuda_tensor_cores, "run", lambda *a: overlaps.append(a[-1]))
    cuda_tensor_cores.launch_bsr_conv2d(*arguments, config={"overlap": 1})
    arguments[5] = list(cuda_tensor_cores.pack(*arguments[1:4], *arguments[6:8]))
    cuda_tensor_cores.launch_bsr_conv2d(*arguments, config={"overlap": 1})
    assert overlaps == [0, 1]


@pytest.mark.gpu
def test_a_training_step_runs_in_a_cuda_graph():
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, padding=1).to("cuda", BF16)
    module = BlockSparseConv2d.from_dense(conv, (128, 16), torch.rand(1, 36) < 0.3)
    module.kernel = cuda_tensor_cores.NAME
    x = torch.randn(4, 64, 8, 8, device="cuda", dtype=BF16, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).square().sum(), [x, module.values])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(EAGER_STEPS):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        got = step()
    with torch.no_grad():
        module.values.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))
