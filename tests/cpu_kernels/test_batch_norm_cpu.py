"""The C++ batch norm of a training step: each instruction set against float64 and against torch's choices."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batch_norm_cases import EPS, SHAPES, check_batch_norm, plain
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import batch_norm
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import LANES

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
EPILOGUES = ("none", "relu", "relu_maxpool2")


def kernels(isa: str) -> Any:
    names = ("launch_forward", "launch_backward")
    return SimpleNamespace(**{name: partial(getattr(batch_norm, name), isa) for name in names})


# Beside those of the Triton kernels: fewer channels than a vector and one more than a vector, many parts.
@pytest.mark.parametrize("shape", [*SHAPES, (130, 24, 5, 5), (7, 9, 32, 31), (1, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("isa", ISAS)
def test_batch_norm(isa: str, epilogue: str, shape: tuple[int, int, int, int]) -> None:
    for affine in (True, False):
        check_batch_norm(shape, torch.float32, epilogue, affine=affine, kernels=kernels(isa))


def results(isa: str, x: Tensor, grad: Tensor, affine: list[Tensor], epilogue: str) -> list[Tensor]:
    y, statistics = batch_norm.launch_forward(isa, x, *affine, EPS, epilogue)
    grad_x, sums = batch_norm.launch_backward(isa, grad, x, *affine, statistics, EPS, epilogue)
    return [y, statistics, grad_x, sums]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_and_the_layout_change_no_bit(isa: str, epilogue: str) -> None:
    x, affine = torch.randn(9, 40, 15, 16), [torch.randn(40), torch.randn(40)]
    grad = torch.randn(plain(x, *affine, epilogue).shape)
    expected = results(isa, x, grad, affine, epilogue)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        other = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
        for own, want in zip(results(isa, *other, affine, epilogue), expected, strict=True):
            assert torch.equal(own, want), threads


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("isa", ISAS)
def test_ties_and_nan_go_where_torch_sends_them(isa: str, epilogue: str) -> None:
    """Few different values, so that windows have equal pixels; a NaN makes its whole channel NaN."""
    x = torch.randint(-2, 3, (8, 6, 6, 7)).float().requires_grad_()
    weight, bias = (t.requires_grad_() for t in (torch.ones(6), torch.full((6,), 0.3)))
    expected = plain(x, weight, bias, epilogue)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, bias, weight), grad)
    y, _, grad_x, sums = results(isa, x, grad, [weight, bias], epilogue)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for own, want in zip((grad_x, *sums), wanted, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        x[1, 2, 3, 3] = torch.nan
    y, statistics, grad_x, _ = results(isa, x, grad, [weight, bias], epilogue)
    for found in (y, grad_x):
        assert found[:, 2].isnan().all() and not found[:, [0, 1, 3, 4, 5]].isnan().any()
    assert statistics[:, 2].isnan().all()


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Of values around 1000 with a deviation of 0.01, whose squares a sum in float32 could not tell apart."""
    x = 1000 + 0.01 * torch.randn(64, 8, 16, 16)
    for isa in ISAS:
        _, statistics = batch_norm.launch_forward(isa, x, None, None, 0.0, "none")
        exact = torch.var_mean(x.double(), (0, 2, 3))
        torch.testing.assert_close(statistics[0].double(), exact[1], rtol=1e-7, atol=0)
        torch.testing.assert_close(statistics[2].double(), exact[0], rtol=1e-5, atol=0)


def test_training_on_a_cpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    fused, launched = sk.fuse_batch_norm_(net.train())[1], []
    original = batch_norm._Pass.run

    def seen(self: Any, which: int, **outputs: Any) -> None:
        launched.append((self.op, self.isa, self.epilogue, which))
        original(self, which, **outputs)

    monkeypatch.setattr(batch_norm._Pass, "run", seen)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    fused(x).sum().backward()
    forward, backward = "batch_norm_forward", "batch_norm_backward"
    passes = [(forward, 0), (forward, 1), (backward, 2), (backward, 3)]
    assert launched == [(op, ISAS[-1], "relu_maxpool2", which) for op, which in passes]
    launched.clear()
    fused(x.double().float().bfloat16().float())
    fused.eval()(x)
    assert len(launched) == 2, "eval mode reads running statistics"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.float64)}, "expected float32 x of shape"),
        ({"x": torch.zeros(0, 4, 3, 3)}, "expected float32 x of shape"),
        ({"x": torch.zeros(4, 3, 3)}, "expected float32 x of shape"),
        ({"x": torch.zeros(2, 4, 1, 3)}, "expected an image of at least 2x2 in front of a pool, got 1x3"),
        ({"weight": torch.ones(3)}, "expected weight and bias of 4 values"),
        ({"bias": None}, "expected weight and bias of 4 values"),
        ({"statistics": torch.zeros(2, 4)}, "expected float32 statistics of shape"),
        ({"grad": torch.zeros(2, 4, 2, 2)}, "expected float32 grad of shape"),
        ({"grad": torch.zeros(2, 4, 1, 1, dtype=torch.float16)}, "expected float32 grad of shape"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "grad": torch.zeros(2, 4, 1, 1),
        "x": torch.zeros(2, 4, 3, 3),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "statistics": torch.zeros(3, 4),
        **change,
    }
    with pytest.raises(ValueError, match=f"^batch_norm_backward: {message}"):
        batch_norm.launch_backward("scalar", *arguments.values(), EPS, "relu_maxpool2")


def test_every_instruction_set_has_both_directions() -> None:
    for isa in LANES:
        assert {f"batch_norm_{way}_f32__{isa}" for way in ("forward", "backward")} <= set(KERNELS)
