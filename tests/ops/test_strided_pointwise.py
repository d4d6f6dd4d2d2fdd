"""oneDNN never computes the weight gradient of a strided 1x1 convolution of few channels in channels_last.

Two kinds of test: child processes that the fault kills, and a look at every call of the gradient, which finds it on any
CPU.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import slimkernels as sk
from slimkernels.compress.pruning.importance import taylor_scores
from slimkernels.formats import BSRWeight
from slimkernels.kernels import reference
from slimkernels.kernels.strided_pointwise import pixels_read
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d, guard_strided_pointwise_
from slimkernels.nn.strided_pointwise import PixelsRead

SIZE = 12


def batches(channels: int = 3, size: int = SIZE, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    labels = torch.tensor([0, 1, 2, 3])
    return [(torch.randn(4, channels, size, size), labels) for _ in range(count)]


class Standardised(nn.Conv2d):
    """A layer whose forward calls the function with a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, "valid", self.dilation)


class Net(nn.Module):
    """Strided 1x1 convolutions as layers, as a function, and inside an activation checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, 2)
        self.own = Standardised(3, 8, 1, (2, 1))
        self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
        self.again = nn.Conv2d(8, 8, 1, stride=(1, 2), bias=False)
        self.wide = nn.Conv2d(8, 64, 3, 1, 1)
        self.shortcut = nn.Conv2d(64, 16, 1, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x) + F.conv2d(input=x, weight=self.weight, stride=2))
        y = y + F.avg_pool2d(self.own(x), (1, 2))
        y = checkpoint(self.again, y, use_reentrant=False)
        return self.head(self.shortcut(torch.relu(self.wide(y))).mean((2, 3)))


class Gradients(TorchDispatchMode):
    """Counts the gradients of strided 1x1 convolutions of few channels, and those that oneDNN must not be asked for.

    The latter are computed in float64, which oneDNN does not take: some machines end the process with a bus error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.faulty = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            grad, x, weight, _, stride, padding = args[:6]
            strided = max(stride) > 1 and set(weight.shape[2:]) == {1} and not any(padding)
            if strided and weight.shape[1] < 16 and any(args[10][1:]):
                self.seen += 1
                image, output = x.shape[2:], grad.shape[2:]
                if all(i == o * s for i, o, s in zip(image, output, stride, strict=True)):
                    self.faulty += 1
                    gradients = func(grad.double(), x.double(), weight.double(), *args[3:], **(kwargs or {}))
                    return tuple(None if g is None else g.to(x.dtype) for g in gradients)
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor) -> None:
    """A step of the user's own, in channels_last."""
    model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()


def test_the_fault_is_found_in_a_plain_loop():
    """The look at the gradients sees what it is for: without a guard these are the calls that corrupt the heap."""
    with Gradients() as found:
        step(Net(), batches()[0][0])
    assert (found.seen, found.faulty) == (4, 4)


@pytest.mark.parametrize("how", ["fine_tune", "own optimizer", "bf16", "channels_last", "frozen weights", "distill"])
def test_training_never_asks_for_a_faulty_gradient(how):
    model = Net()
    settings = {"epochs": 1, "lr": 1e-3, "progress": False}
    with Gradients() as found:
        if how == "own optimizer":
            sk.fine_tune(model, batches(), optimizer=torch.optim.SGD(model.parameters(), 1e-3), **settings)
        elif how == "bf16":
            sk.fine_tune(model, batches(), precision="bf16", **settings)
        elif how == "channels_last":
            sk.fine_tune(model.to(memory_format=torch.channels_last), batches(), accumulate=2, **settings)
        elif how == "frozen weights":
            for parameter in (model.stem.weight, model.own.weight):
                parameter.requires_grad_(False)
            sk.fine_tune(model, batches(), **settings)
        elif how == "distill":
            sk.distill(model, Net(), batches(), **settings)
        else:
            sk.fine_tune(model, batches(), **settings)
    assert (found.seen, found.faulty) == (8, 0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_by_gradient_never_ask_for_a_faulty_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model.to(memory_format=torch.channels_last)
    with Gradients() as found:
        taylor_scores(model, batches(), block_shape=(8, 1), skip_first=False)
    assert (found.seen, found.faulty) == (2, 0) and not model[0]._forward_pre_hooks


def strided_modules() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    dense = nn.Conv2d(6, 16, 1, 2)
    low_rank = [
        LowRankConv2d(6, 16, 1, 2, kind="svd", ranks=(3,)),
        LowRankConv2d(6, 16, 1, 2, kind="tai", ranks=(3,)),
        LowRankConv2d(6, 16, 1, 2, kind="tucker2", ranks=(3, 4)),
        LowRankConv2d(6, 16, (1, 3), (2, 1), (0, 1), kind="tai", ranks=(5,)),
    ]
    mask = torch.rand(1, 6, generator=generator) < 0.5
    sparse = [
        BlockSparseConv2d.from_dense(dense, (16, 1), mask, kernel=kernel)
        for kernel in ("auto", "bsr_conv2d__reference")
    ]
    return [*low_rank, *sparse]


@pytest.mark.parametrize("index", range(6))
def test_our_modules_never_ask_for_a_faulty_gradient_and_have_the_right_one(index):
    model = strided_modules()[index]
    x = torch.randn(2, 6, SIZE, SIZE, requires_grad=True)
    with Gradients() as found:
        step(model, x)
    assert found.faulty == 0 and (found.seen > 0) == (index < 4)  # a block-sparse gradient is one operator: below
    exact, x64 = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    step(exact, x64)
    for got, expected in zip((x, *model.parameters()), (x64, *exact.parameters()), strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_the_reference_gradient_of_block_sparse_values_is_no_faulty_one():
    weight = BSRWeight.from_dense(torch.randn(16, 6, 1, 1), (16, 1))
    indices = weight.values, weight.crow_indices, weight.col_indices
    x = torch.randn(2, 6, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 16, SIZE // 2, SIZE // 2)
    with Gradients() as found:
        got = reference.bsr_conv2d_wgrad(grad, x, *indices, (16, 6, 1, 1), (16, 1), (2, 2), (0, 0), (1, 1))
    assert (found.seen, found.faulty) == (1, 0)
    expected = torch.einsum("nopq,ncpq->co", grad.double(), x[:, :, ::2, ::2].double())
    torch.testing.assert_close(got[..., 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_models_to_train_in_a_loop_of_one_s_own_are_guarded():
    """A layer that stays dense behind one that returns channels_last."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1, 2)
        )

    x = torch.randn(2, 32, SIZE, SIZE)
    factorized = sk.factorize_(net(), rank=4, layers="0")
    pruned = sk.prune_(net(), 0.75, (16, 1), layers="0")
    converted = sk.convert(pruned, policy=sk.Policy(min_speedup=0, exclude=("1", "3")), training=True)
    measured = sk.Policy(min_speedup=0, repeats=1, budget_s=0.01)
    with Gradients() as found:
        sk.convert(pruned, x, policy=measured, training=True)
    assert found.faulty == 0
    assert isinstance(factorized[0], LowRankConv2d) and isinstance(converted[0], BlockSparseConv2d)
    for model in (factorized, converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(model[3]) is nn.Conv2d and model.training
        with Gradients() as found:
            step(model, x)
        assert (found.seen, found.faulty) == (1, 0)


def test_the_guard_s_hook_is_set_once_and_is_no_hook_of_the_user_s():
    model = nn.Sequential(nn.Conv2d(8, 32, 1, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    assert guard_strided_pointwise_(guard_strided_pointwise_(model)) is model
    (hook,) = model[0]._forward_pre_hooks.values()
    assert isinstance(hook, PixelsRead) and not model[3]._forward_pre_hooks
    x = torch.randn(1, 8, SIZE, SIZE)
    torch.testing.assert_close(model[0](input=x), F.conv2d(x, model[0].weight, model[0].bias, 2))
    assert isinstance(sk.factorize_(copy.deepcopy(model), rank=4, layers="0")[0], LowRankConv2d)
    pruned = sk.finalize_(sk.prune_(copy.deepcopy(model), 0.5, (16, 1), layers=["0", "3"]))
    fast = sk.convert(pruned, policy=sk.Policy(min_speedup=0))
    assert {p.name: p.action for p in fast.slimkernels_plan.layers} == {
        "0": "swap",
        "1": "fold",
        "2": "fuse",
        "3": "swap",
    }
    torch.testing.assert_close(fast(x), pruned(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [2, (1, 2), (3, 2), [4]])
@pytest.mark.parametrize("size", [1, 2, 3, 11, 12])
def test_pixels_read_changes_no_result(stride, size):
    weight = torch.randn(4, 3, 1, 1)
    for x in (torch.randn(2, 3, size, size + 1), torch.randn(3, size, size)):
        read = pixels_read(x, weight, stride)
        assert torch.equal(F.conv2d(read, weight, None, stride), F.conv2d(x, weight, None, stride))
        if size > 1:
            assert read.shape[-1] < x.shape[-1] or (x.shape[-1] - 1) % torch.tensor(stride).flatten()[-1] == 0
    x = torch.randn(2, 3, 12)
    assert pixels_read(x, weight[..., 0], 2).shape == (2, 3, 11)
    for other, options in ((torch.randn(4, 32, 1, 1), {}), (torch.randn(4, 3, 3, 1), {}), (weight, {"padding": 1})):
        x = torch.randn(2, other.shape[1], 12, 12)
        assert pixels_read(x, other, 2, **options) is x


CHILD = """
    import sys
    import torch
    from torch import nn
    import slimkernels as sk
    from slimkernels.nn import LowRankConv2d

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    batches = [(images, torch.tensor([0, 1, 2, 3]))] * 4

    def layers(*first):
        return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

    def loop(model, x=images):
        for _ in range(8):
            model(x).square().mean().backward()

    how = sys.argv[1]
    if how in ("fine_tune", "compile"):
        sk.fine_tune(layers(nn.Conv2d(3, 32, 1, 2)), batches, epochs=2, progress=False, compile=how == "compile")
    elif how == "low rank":
        loop(layers(LowRankConv2d(3, 32, 1, 2, kind="svd", ranks=(3,))))
    else:
        model = layers(nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(3, 32, 1, 2))
        if how == "factorize_":
            sk.factorize_(model, rank=3, layers="0")
        else:
            sk.prune_(model, 0.5, (1, 1), layers="0")
            model = sk.convert(model, policy=sk.Policy(min_speedup=0, exclude=("1",)), training=True)
        assert type(model[0]) is not nn.Conv2d and type(model[1]) is nn.Conv2d
        loop(model, torch.randn(4, 16, 96, 96))
    print("finished", how)
"""


@pytest.mark.parametrize(
    "how", ["fine_tune", "low rank", "factorize_", "convert", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_the_heap_stays_whole(how):
    """Unguarded, every one of these processes is killed by a signal (on AVX-512 and on AVX2)."""
    code = textwrap.dedent(CHILD)
    result = subprocess.run(
        [sys.executable, "-c", code, how],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0 and f"finished {how}" in result.stdout, (result.returncode, result.stderr[-2000:])
