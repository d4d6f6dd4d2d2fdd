"""Torch's dense linear layers in the plain call of a converted model: a run of linear layers goes on over them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_chains import module_by_module, watch_chains
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import slimkernels as sk
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import LANES
from slimkernels.nn import BlockSparseLinear, ChainedSequential, LowRankLinear
from slimkernels.nn.chained import chain_sequentials_
from slimkernels.nn.torch_linears import MOST_ROWS, MOST_WEIGHTS

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


def sparse(c_in: int = 32, c_out: int = 32, epilogue: str = "relu") -> BlockSparseLinear:
    mask = torch.rand(-(-c_out // 16), c_in) < 0.5
    return BlockSparseLinear.from_dense(nn.Linear(c_in, c_out), (16, 1), mask, epilogue=epilogue)


def sequential(*modules: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*modules).requires_grad_(False).eval()
    chain_sequentials_(net)
    return net


def classifier(c_in: int = 32, width: int = 32, classes: int = 10) -> nn.Sequential:
    """Torch's layer, one of ours and torch's again, as in a VGG whose first and last layer stayed dense."""
    torch.manual_seed(0)
    return sequential(
        nn.Linear(c_in, width), nn.ReLU(inplace=True), nn.Dropout(1.0), sparse(width, width), nn.Identity(),
        nn.Dropout(1.0), nn.Linear(width, classes),
    )  # fmt: skip


def by_definition(net: nn.Sequential, x: Tensor) -> Tensor:
    """What the modules compute in float64."""
    x = x.double()
    for module in net:
        if isinstance(module, BlockSparseLinear):
            x = module.to_dense().double()(x)
            x = x.relu() if module.epilogue == "relu" else x
        else:
            x = copy.deepcopy(module).double()(x)
    return x


def agrees(net: nn.Sequential, x: Tensor) -> Tensor:
    """What the net computes is what its modules compute one by one."""
    got = net(x)
    torch.testing.assert_close(got, module_by_module(net, x), rtol=1e-4, atol=1e-5, equal_nan=True, check_stride=True)
    return got


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every chain that ran."""
    return watch_chains(monkeypatch)


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c_in", [8, 24, 48, 160])
@pytest.mark.parametrize("shape", [(1,), (3,), (8,), (2, 4), ()])
def test_a_run_goes_on_over_dense_layers(
    chains: list[int], monkeypatch: pytest.MonkeyPatch, isa: str, c_in: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    net, x = classifier(c_in), torch.randn(*shape, c_in)
    with torch.no_grad():
        got = net(x)
        torch.testing.assert_close(got.double(), by_definition(net, x), rtol=1e-4, atol=1e-5)
    assert chains == [3] and got.shape == (*shape, 10)


def test_rows_beyond_a_few_are_torchs(chains: list[int]) -> None:
    net = sequential(nn.Linear(32, 32), sparse(), sparse(), nn.Linear(32, 10))
    with torch.no_grad():
        agrees(net, torch.randn(MOST_ROWS, 32))
        agrees(net, torch.randn(MOST_ROWS + 1, 32))
    assert chains == [4, 2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [(1, 1), (4, 1)])
def test_single_weights_want_rows_innermost_and_dense_layers_do_not(
    chains: list[int], monkeypatch: pytest.MonkeyPatch, isa: str, block: tuple[int, int]
) -> None:
    """So a run ends at the dense layer."""
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    torch.manual_seed(0)
    mask = torch.rand(-(-32 // block[0]), 32) < 0.5
    narrow = [BlockSparseLinear.from_dense(nn.Linear(32, 32), block, mask, epilogue="relu") for _ in range(2)]
    net = sequential(*narrow, nn.Linear(32, 10))
    with torch.no_grad():
        for n in (1, MOST_ROWS, 40):
            x = torch.randn(n, 32)
            torch.testing.assert_close(agrees(net, x).double(), by_definition(net, x), rtol=1e-4, atol=1e-5)
    assert chains == [2, 2, 2]


def test_without_biases_and_with_low_rank_layers(chains: list[int]) -> None:
    torch.manual_seed(0)
    low_rank = LowRankLinear.from_dense(nn.Linear(800, 800), 256)  # large enough to be native
    net = sequential(nn.Linear(32, 800, bias=False), low_rank, nn.Linear(800, 16, bias=False), nn.ReLU())
    with torch.no_grad():
        agrees(net, torch.randn(2, 32))
    assert chains == [4]


def test_one_module_in_two_places(chains: list[int]) -> None:
    """Once with a ReLU behind it and once without."""
    twice = nn.Linear(32, 32)
    net = sequential(twice, nn.ReLU(), sparse(), twice)
    with torch.no_grad():
        agrees(net, torch.randn(2, 32))
    assert chains == [4 - 1]


def test_nan_passes_the_relu_and_other_numbers_do_not_become_one(chains: list[int]) -> None:
    net, x = classifier(), torch.randn(4, 32)
    x[1, 5], x[2, 7] = math.nan, math.inf
    with torch.no_grad():
        net[0].weight[3] = math.nan
        got = agrees(net, x)
        assert got.isnan().any()
        net[0].weight[3] = -0.0
        x = torch.full((2, 32), 1e-40)
        agrees(net, x)
    assert chains == [3, 3]


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(lambda: [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)], id="none of ours"),
        pytest.param(lambda: [nn.Linear(32, 32), nn.Sigmoid(), sparse()], id="another module between"),
        pytest.param(lambda: [sparse(), nn.ReLU(), nn.Linear(32, 10)], id="a ReLU behind ours"),
        pytest.param(lambda: [nn.Linear(20, 32), sparse()], id="channels that no vector takes"),
        pytest.param(lambda: [sparse(), nn.Linear(32, MOST_WEIGHTS // 32 + 1)], id="a large weight"),
        pytest.param(lambda: [nn.Bilinear(32, 32, 32), sparse()], id="another linear layer"),
    ],
)  # fmt: skip
def test_no_run(modules: Callable[[], list[nn.Module]]) -> None:
    assert type(sequential(*modules())) is nn.Sequential


def test_a_second_relu_ends_the_run(chains: list[int]) -> None:
    net = sequential(sparse(), nn.Linear(32, 32), nn.ReLU(), nn.ReLU(), sparse())
    with torch.no_grad():
        agrees(net, torch.randn(2, 32))
    assert chains == [2]


# ---------------------------------------------------------------- changes of the model


def _own_forward(net: nn.Sequential) -> None:
    net[0].forward = lambda x: x * 2


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "the weight written to": lambda net: net[0].weight.mul_(2),
    "the weight written to through data": lambda net: net[0].weight.data.mul_(2),
    "the bias written to through data": lambda net: net[6].bias.data.fill_(3),
    "the weight written to through NumPy": lambda net: net[0].weight.numpy().fill(0.5),
    "the data exchanged": lambda net: setattr(net[0].weight, "data", net[0].weight.data.flip(0).contiguous()),
    "another weight": lambda net: setattr(net[0], "weight", nn.Parameter(torch.randn(32, 32), requires_grad=False)),
    "another module": lambda net: net.__setitem__(0, nn.Linear(32, 32).requires_grad_(False)),
    "a state dict": lambda net: net.load_state_dict({name: value * (value.is_floating_point() or 1) + 0.5
        if value.is_floating_point() else value for name, value in net.state_dict().items()}),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_layer_is_seen_at_once(chains: list[int], what: str) -> None:
    net, x = classifier(), torch.randn(3, 32)
    with torch.no_grad():
        before = net(x)
        CHANGES[what](net)
        after = agrees(net, x)
        assert chains == [3, 3] and not torch.allclose(before, after)


DISTURBANCES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a hook on the layer": lambda net: net[0].register_forward_hook(lambda module, args, y: 2 * y),
    "a hook on the ReLU": lambda net: net[1].register_forward_hook(lambda module, args, y: y + 1),
    "a parametrization": lambda net: parametrize.register_parametrization(net[0], "weight", nn.Softsign()),
    "torch's pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "a forward of its own": _own_forward,
    "dropout in training mode": lambda net: net[2].train(),
    "a weight that is no parameter": lambda net: (
        net[0].__delattr__("weight"), net[0].__setattr__("weight", torch.ones(32, 32))
    ),
    "a weight whose rows lie apart": lambda net: setattr(net[0].weight, "data", torch.randn(32, 64)[:, ::2]),
    "a transposed weight": lambda net: setattr(net[0].weight, "data", net[0].weight.data.t()),
    "a weight of another shape": lambda net: setattr(net[6].weight, "data", torch.randn(7, 32)),
    "a bias whose numbers lie apart": lambda net: setattr(net[0].bias, "data", torch.randn(64)[::2]),
}  # fmt: skip


@pytest.mark.parametrize("what", DISTURBANCES)
def test_whoever_sees_a_module_gets_the_modules(chains: list[int], what: str) -> None:
    net, x = classifier(), torch.randn(3, 32)
    with torch.no_grad():
        before = net(x)
        DISTURBANCES[what](net)
        if what == "a weight of another shape":
            net[6].bias = None
        after, expected = net(x), module_by_module(net, x)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    assert chains == [3] and (before.shape != after.shape or not torch.allclose(before, after))


def test_a_weight_that_wants_a_gradient(chains: list[int]) -> None:
    net, x = classifier(), torch.randn(3, 32)
    net[6].weight.requires_grad_(True)
    net(x).sum().backward()
    assert net[6].weight.grad is not None and chains == []
    with torch.no_grad():
        agrees(net, x)
    assert chains == [3]


def test_weights_that_count_no_writes(chains: list[int]) -> None:
    net, x = classifier(), torch.randn(3, 32)
    with torch.inference_mode():
        net[0].weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
        agrees(net, x)
        net[0].weight.mul_(2)
        agrees(net, x)
    assert chains == []


def test_copies_have_weights_of_their_own(chains: list[int]) -> None:
    net, x = classifier(), torch.randn(3, 32)
    with torch.no_grad():
        expected = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(other) is ChainedSequential and torch.equal(other(x), expected)
            other[0].weight.mul_(2)
            agrees(other, x)
            assert torch.equal(net(x), expected)


def test_the_weight_is_no_copy() -> None:
    net = classifier()
    with torch.no_grad():
        net(torch.randn(1, 32))
    (run,) = net._program[1]  # type: ignore[union-attr, index]
    for place, layer in ((0, run._packed._layers[0]), (6, run._packed._layers[2])):  # type: ignore[attr-defined]
        assert layer.packed.weights.data_ptr() == net[place].weight.data_ptr()


def test_a_converted_classifier_is_one_call(chains: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sk.finalize_(sk.prune_(net, 0.5, (16, 1), layers=["3"]))
    fast, x = sk.convert(net.eval(), policy=sk.Policy(min_speedup=0)), torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert chains == [3]
