"""A linear layer takes rows, whatever their shape: ``(B, H, W, C)`` as in ConvNeXt and Swin is no batch of images."""

from __future__ import annotations

import math

import pytest
import torch
from conversion_models import BACKEND, FORCE, assert_same_function, force
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import Policy, analyze, convert
from slimkernels.compress.factorization import layer_costs
from slimkernels.conversion.analysis import problems
from slimkernels.conversion.layers import LayerWeight
from slimkernels.dispatch.select import choose, predicted_dense_seconds, predicted_seconds
from slimkernels.inference import problem_of, warm_up
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, LinearProblem, LowRankLinearProblem
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankLinear
from slimkernels.testing import random_tensor

FEATURES = 24
# The leading sizes of rows: none, one, those of sequences, of images with channels last, and more; some are empty.
LEADING = [(), (7,), (2, 5), (1, 4, 4), (2, 3, 3), (17, 1, 1), (2, 2, 3, 3), (0,), (0, 4, 4), (3, 0, 2)]
BLOCKS = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 8)]


def sparse_linear(block: tuple[int, int], out: int = 40) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, out)
    with torch.no_grad():
        layer.weight[:, ::3] = 0
        layer.weight[16:24] = 0
    return layer


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("leading", LEADING)
def test_a_block_sparse_layer_takes_rows_of_any_shape(leading: tuple[int, ...], block: tuple[int, int]) -> None:
    dense = sparse_linear(block)
    x = random_tensor(*leading, FEATURES, seed=3)
    expected = F.relu(dense(x)).detach()
    module = BlockSparseLinear.from_dense(dense, block, epilogue="relu")
    with torch.no_grad():
        for got in (module.eval()(x), module.train()(x)):  # packed beforehand, and in the call
            assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    other = x.clone().requires_grad_()
    F.relu(dense(other)).square().sum().backward()
    assert torch.allclose(leaf.grad, other.grad, atol=1e-4)


@pytest.mark.parametrize("leading", LEADING)
def test_a_low_rank_layer_takes_rows_of_any_shape(leading: tuple[int, ...]) -> None:
    module = LowRankLinear.from_dense(nn.Linear(256, 320), 32).eval()
    x = random_tensor(*leading, 256, seed=3)
    with torch.no_grad():
        assert torch.allclose(module(x), F.linear(F.linear(x, module.V), module.U, module.bias), atol=1e-4)


class Block(nn.Module):
    """The end of a ConvNeXt block: channels go last, linear layers work on pixels, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, FEATURES, 4, 4)
        self.wide, self.narrow = sparse_linear((1, 1), 96), nn.Linear(96, FEATURES)
        with torch.no_grad():
            self.narrow.weight[:, 16:] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        rows = y.permute(0, 2, 3, 1)
        return y + self.narrow(F.relu(self.wide(rows))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_linear_layers_on_images_with_channels_last_convert(block: tuple[int, int], training: bool) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), random_tensor(2, 3, 20, 20, seed=1)
    quick = {"repeats": 1, "budget_s": 0, "block_shapes": (block,)}
    for inputs, policy in (
        (None, force(**quick)),
        (x, force(**quick)),
        (x, Policy(min_speedup=0, backend=BACKEND, check_model=False, **quick)),
    ):
        fast = convert(model, inputs, policy=policy, training=training, strict=True)
        assert fast.wide.block_shape == fast.narrow.block_shape == block
        fast(x).sum().backward() if training else None
        assert_same_function(fast.eval(), model, x)


def test_the_default_policy_takes_such_a_model() -> None:
    model, x = Block().eval(), random_tensor(1, 3, 16, 16, seed=1)
    assert_same_function(convert(model, x, policy=Policy(repeats=1, budget_s=0)), model, x)


@pytest.mark.parametrize("leading", LEADING)
def test_every_account_of_a_layer_counts_its_rows(leading: tuple[int, ...]) -> None:
    dense, rows = sparse_linear((16, 1)), math.prod(leading)
    x = random_tensor(*leading, FEATURES, seed=3)
    (problem,) = problems(LayerWeight(dense.weight.detach(), None), ((16, 1), 3), [tuple(x.shape)])
    assert isinstance(problem, LinearProblem) and problem.m == rows
    sparse = problem_of(BlockSparseLinear.from_dense(dense, (16, 1)), x)
    assert isinstance(sparse, LinearProblem) and sparse.m == rows
    low_rank = problem_of(LowRankLinear.from_dense(dense, 4), x)
    assert isinstance(low_rank, LowRankLinearProblem) and low_rank.m == rows
    asked = layer_costs.problem(dense, "svd", (4,), x.shape)
    assert isinstance(asked, LowRankLinearProblem) and asked.m == rows
    if rows:
        assert analyze(nn.Sequential(dense), x)["0"].macs == rows * FEATURES * 40


@pytest.mark.parametrize("block", BLOCKS)
def test_no_images_are_no_work_but_a_call(block: tuple[int, int]) -> None:
    """The cost model of every kernel takes a batch of size 0."""
    conv = BlockSparseConv2d.from_dense(nn.Conv2d(16, 32, 3), block)
    empty = problem_of(conv, torch.empty(0, 16, 8, 8))
    assert isinstance(empty, ConvProblem) and (empty.n, empty.macs) == (0, 0)
    for problem in (empty, LinearProblem(0, FEATURES, 40, block, 3, torch.float32, "cpu")):
        assert predicted_dense_seconds(problem) > 0 and choose(problem).name
        for spec in (
            s for s in KERNELS.values() if s.op == problem.op and "cpu" in s.devices and s.backend != "triton"
        ):
            assert predicted_seconds(spec, problem) > 0, spec.name
    with torch.no_grad():
        found = warm_up(nn.Sequential(conv).eval(), torch.empty(0, 16, 8, 8)).kernels
    assert [kernel.problem for kernel in found] == [empty]


def test_the_stopwatch_of_budgets_lays_rows_out_as_rows() -> None:
    seen: list[bool] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous())
            return x

    call = layer_costs.Call(torch.Size((1, 4, 4, FEATURES)), 16)
    layer_costs.measured_seconds([Seen()], [call], sparse_linear((1, 1)).weight)
    assert all(seen)
    del seen[:]
    layer_costs.measured_seconds([Seen()], [call], nn.Conv2d(4, 8, 3).weight)
    assert not any(seen)  # images are channels_last


def test_forced_conversion_without_inputs_takes_any_rows() -> None:
    fast = convert(nn.Sequential(sparse_linear((1, 1))), policy=FORCE)
    dense = sparse_linear((1, 1))
    for leading in LEADING:
        x = random_tensor(*leading, FEATURES, seed=5)
        with torch.no_grad():
            assert torch.allclose(fast(x), dense(x), atol=1e-5)
