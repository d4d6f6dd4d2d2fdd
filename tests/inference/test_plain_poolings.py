"""Poolings in the plain call of a converted model: a run of convolutions goes on over them, as they are set."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_chains import C, conv, module_by_module, watch_chains
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import LANES
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, ChainedSequential, LowRankConv2d, packed_run
from slimkernels.nn.chained import _Run, chain_sequentials_

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")

# Of 8 x 9 images.
NATIVE: dict[str, Callable[[], nn.Module]] = {
    "max 2": lambda: nn.MaxPool2d(2),
    "max 3 of stride 2, padded": lambda: nn.MaxPool2d(3, 2, 1),
    "max (3, 2) of stride (1, 3)": lambda: nn.MaxPool2d((3, 2), (1, 3), (1, 0)),
    "max with gaps": lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    "max, rounded up to the same": lambda: nn.MaxPool2d((2, 3), ceil_mode=True),
    "max, lists": lambda: nn.MaxPool2d([2, 3], [2, 1], [1, 1], [1, 2]),  # type: ignore[arg-type]
    "max, no stride": lambda: _with(nn.MaxPool2d(2), "stride", None),
    "mean 3 of stride 2, padded": lambda: nn.AvgPool2d(3, 2, 1),
    "mean of the pixels inside": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean (2, 5)": lambda: nn.AvgPool2d((2, 5), padding=(1, 2)),
    "mean, one number a list": lambda: nn.AvgPool2d([3], []),  # type: ignore[arg-type]
    "global mean": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive (4, all)": lambda: nn.AdaptiveAvgPool2d((4, None)),
    "adaptive (8, 3)": lambda: nn.AdaptiveAvgPool2d([8, 3]),  # type: ignore[arg-type]
    "adaptive, as large": lambda: nn.AdaptiveAvgPool2d((8, 9)),
}
TORCHS: dict[str, Callable[[], nn.Module]] = {
    "max, rounded up": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "mean, rounded up": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "a divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive windows that overlap": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "larger than the image": lambda: nn.AdaptiveAvgPool2d((16, 9)),
    "a size that is a tensor": lambda: _with(nn.MaxPool2d(2), "kernel_size", torch.tensor(2)),
}


def _with(module: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(module, name, value)
    return module


def sequential(*modules: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*modules).requires_grad_(False).eval()
    chain_sequentials_(net)
    return net


def pooled(pool: nn.Module, block: tuple[int, int] = (16, 1)) -> nn.Sequential:
    """Two convolutions on either side of a pooling."""
    torch.manual_seed(0)
    return sequential(conv(block=block), conv(block=block), pool, nn.Dropout(1.0), conv(block=block), conv(block=block))


def images(n: int = 2, h: int = 8, w: int = 9) -> Tensor:
    return torch.randn(n, C, h, w)


def by_definition(net: nn.Sequential, x: Tensor) -> Tensor:
    """What torch's modules compute in float64."""
    x = x.double()
    for module in net:
        x = module.to_dense().double()(x) if isinstance(module, (BlockSparseConv2d, LowRankConv2d)) else module(x)
        epilogue = getattr(module, "epilogue", "none")
        x = x.relu() if epilogue != "none" else x
        x = torch.nn.functional.max_pool2d(x, 2) if epilogue == "relu_maxpool2" else x
    return x


def agrees(net: nn.Sequential, x: Any) -> Any:
    """What the net computes is what its modules compute one by one, also where that is an error."""
    try:
        expected = module_by_module(net, x)
    except Exception as error:
        with pytest.raises(type(error)) as got:
            net(x)
        assert str(got.value) == str(error)
        return None
    got = net(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True, check_stride=True)
    return got


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every chain that ran."""
    torch.set_num_threads(2)
    return watch_chains(monkeypatch)


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pool", NATIVE)
@pytest.mark.parametrize(("n", "block"), [(1, (16, 1)), (3, (1, 1)), (16, (16, 1))])
def test_a_run_goes_on_over_a_pooling(
    chains: list[int], monkeypatch: pytest.MonkeyPatch, isa: str, pool: str, n: int, block: tuple[int, int]
) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    net, x = pooled(NATIVE[pool](), block), images(n)
    with torch.no_grad():
        expected = by_definition(net, x)
        for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
            got = agrees(net, given_x)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(net(given_x), got)
        torch.set_num_threads(1)
        torch.testing.assert_close(net(x), got, rtol=1e-5, atol=1e-6)
    assert chains == [5] * 5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [(16, 1), (1, 1)])
def test_full_batches(chains: list[int], monkeypatch: pytest.MonkeyPatch, isa: str, block: tuple[int, int]) -> None:
    """Of 128 images, which run in vectors; of 3 and 131, in vectors that are not full, or without."""
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    torch.manual_seed(0)
    layers = [conv(block=block), nn.MaxPool2d(3, 2, 1), conv(block=block), nn.AvgPool2d(3, 2, 1), conv(block=block)]
    net = sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        for n in (128, 3, 131):
            x = images(n, 6, 7)
            torch.testing.assert_close(agrees(net, x).double(), by_definition(net, x), rtol=1e-4, atol=1e-5)
    assert chains == [6] * 3


def test_what_a_run_is(chains: list[int]) -> None:
    """At least two native layers; a pooling may stand between and behind them, not in front."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2)
    for modules, layers in (
        ([conv(), pool, conv()], 3), ([conv(), pool, pool, conv(), nn.Identity(), pool, pool], 6),
        ([pool, conv(), conv(), pool], 3), ([pool, nn.Sigmoid(), conv(), pool, conv()], 3),
        ([conv(), pool, nn.ReLU(), conv(), conv()], 2),
    ):  # fmt: skip
        net = sequential(*modules)
        with torch.no_grad():
            agrees(net, images(2, 32, 32))
        assert chains.pop() == layers and not chains
    shared = conv()
    for few in (
        [conv(), pool],
        [pool, conv()],
        [shared, pool, shared],
        [pool, pool],
        [conv(), nn.MaxPool1d(2), conv()],
    ):
        assert type(sequential(*few)) is nn.Sequential
    rows = [BlockSparseLinear.from_dense(nn.Linear(C, C), (16, 1)) for _ in range(3)]
    net = sequential(*rows[:2], nn.AdaptiveAvgPool2d((2, C)), rows[2])  # which rows may be images of, too
    with torch.no_grad():
        agrees(net, torch.randn(3, 4, C))
    assert chains == [2]


def test_layers_of_low_rank(chains: list[int]) -> None:
    torch.manual_seed(0)
    factors = torch.randn(8, C, 3, 1) / 8, torch.randn(C, 8, 1, 3) / 4
    thin = [LowRankConv2d.from_factors(factors, kind="tai", padding=1, epilogue="relu") for _ in range(2)]
    net = sequential(thin[0], nn.MaxPool2d(2), conv(epilogue="relu_maxpool2"), nn.AvgPool2d(2), thin[1])
    x = images(3, 16, 16)
    with torch.no_grad():
        got = agrees(net, x)
    assert chains == [len(thin[0]._prepared.convs) * 2 + 3]
    torch.testing.assert_close(got.double(), by_definition(net, x), rtol=1e-4, atol=1e-5)


def test_numbers_that_are_not_finite(chains: list[int]) -> None:
    """The kernels keep and pass on what is not a number, as torch's do."""
    for pool in (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)):
        net, x = pooled(pool), images(3)
        x[0, 3, 2, 2], x[1, 0, 7, 8], x[2, 5, 0, 0] = torch.nan, torch.inf, -torch.inf
        with torch.no_grad():
            assert agrees(net, x).isnan().any()
    assert chains == [5, 5, 5]


def test_nin_is_one_chain(chains: list[int]) -> None:
    torch.manual_seed(0)
    model = sk.models.nin_cifar(width=16).eval()
    sk.finalize_(sk.prune_(model, 0.5, (8, 1), skip_first=False))
    fast, x = sk.convert(model, policy=sk.Policy(min_speedup=0, measure=False)), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        got = agrees(fast, x)
        assert type(fast) is ChainedSequential and chains == [12]
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sk.graphed(fast, x)(x), got, rtol=1e-5, atol=1e-6)
        dense = sk.to_dense(fast)
        assert type(dense) is nn.Sequential
        torch.testing.assert_close(dense(x), got, rtol=1e-4, atol=1e-5)


SIDES = st.integers(1, 12)
LAYERS = st.one_of(
    st.sampled_from(["conv", "single", "conv", "single", "stride", "maxpool", "identity"]),
    st.builds(nn.MaxPool2d, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    st.builds(
        lambda size, stride, padding, inside: nn.AvgPool2d(size, stride, padding, count_include_pad=inside),
        st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from([None, 1, 2, (1, 3)]), st.integers(0, 2),
        st.booleans(),
    ),
    st.builds(nn.AdaptiveAvgPool2d, st.tuples(st.none() | st.integers(1, 3), st.none() | st.integers(1, 3))),
)  # fmt: skip


def _layer(layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    if layer == "identity":
        return nn.Identity()
    made = conv(epilogue="relu_maxpool2" if layer == "maxpool" else "relu", block=(1 if layer == "single" else 16, 1))
    if layer == "stride":
        made.stride = 2
    return made


@given(st.lists(LAYERS, min_size=2, max_size=7), st.sampled_from([1, 2, 5, 16, 19]), SIDES, SIDES, st.integers(1, 3))
@settings(max_examples=80)
def test_any_stack(layers: list[Any], n: int, h: int, w: int, threads: int) -> None:
    """Also of images that a layer leaves nothing of, and of windows that torch refuses."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net, x = sequential(*(_layer(layer) for layer in ["conv", *layers])), images(n, h, w)
    with torch.no_grad():
        got = agrees(net, x)
        if got is not None:
            assert torch.equal(net(x), got)
            assert agrees(net, x[0]).shape == got.shape[1:]


# ---------------------------------------------------------------- what the poolings are set to


CHANGES: dict[str, tuple[Callable[[], nn.Module], str, Any, list[int]]] = {
    "a max's size": (lambda: nn.MaxPool2d(2), "kernel_size", 3, [5]),
    "a max's sizes": (lambda: nn.MaxPool2d(2), "kernel_size", (2, 3), [5]),
    "a max's stride": (lambda: nn.MaxPool2d(2), "stride", (2, 1), [5]),
    "a max's padding": (lambda: nn.MaxPool2d(2), "padding", 1, [5]),
    "a max's dilation": (lambda: nn.MaxPool2d(2), "dilation", 2, [5]),
    "a max's ceil_mode": (lambda: nn.MaxPool2d(2), "ceil_mode", True, [2, 2]),
    "a mean's size": (lambda: nn.AvgPool2d(2), "kernel_size", 3, [5]),
    "a mean's stride": (lambda: nn.AvgPool2d(2), "stride", None, [5]),
    "a mean's padding": (lambda: nn.AvgPool2d(2), "padding", (1, 0), [5]),
    "a mean's ceil_mode": (lambda: nn.AvgPool2d(2), "ceil_mode", True, [2, 2]),
    "a mean's count_include_pad": (lambda: nn.AvgPool2d(2, padding=1), "count_include_pad", False, [5]),
    "a mean's divisor_override": (lambda: nn.AvgPool2d(2), "divisor_override", 3, [2, 2]),
    "an adaptive size": (lambda: nn.AdaptiveAvgPool2d(1), "output_size", (2, 3), [5]),
    "an adaptive size of unequal windows": (lambda: nn.AdaptiveAvgPool2d(1), "output_size", (3, 3), [2, 2]),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_attribute_is_seen_at_once(chains: list[int], what: str) -> None:
    make, name, value, after = CHANGES[what]
    net, x = pooled(make()), images(3)
    net[2].stride = (2, 1) if what == "a mean's stride" else getattr(net[2], "stride", None)
    before = getattr(net[2], name)
    with torch.no_grad():
        first = agrees(net, x)
        assert chains == [5]
        setattr(net[2], name, value)
        changed = agrees(net, x)
        assert chains == [5, *after]
        assert changed.shape != first.shape or not torch.allclose(changed, first)
        setattr(net[2], name, before)
        assert torch.equal(net(x), first)
    assert chains == [5, *after, 5]


def test_a_list_that_is_written_into(chains: list[int]) -> None:
    net, x = pooled(nn.MaxPool2d([2, 2], [2, 2])), images(3)  # type: ignore[arg-type]
    with torch.no_grad():
        first = agrees(net, x)
        net[2].kernel_size[1] = 3
        assert not torch.allclose(agrees(net, x), first)
        net[2].stride.pop()
        agrees(net, x)
    assert chains == [5, 5, 5]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel_size", 9), ("kernel_size", 2.0), ("kernel_size", (2, 2.0)), ("kernel_size", (2, 2, 2)),
        ("kernel_size", "2"), ("kernel_size", True), ("kernel_size", 0), ("stride", 0), ("stride", (1, 2, 3)),
        ("padding", 2), ("padding", -1), ("padding", None), ("dilation", 0), ("dilation", ()), ("ceil_mode", 1),
        ("ceil_mode", None), ("count_include_pad", 0), ("divisor_override", 0), ("divisor_override", 2.0),
        ("output_size", (1,)), ("output_size", -1), ("output_size", (1, 2, 3)), ("output_size", 2.0),
    ],
)  # fmt: skip
def test_errors_are_torchs(chains: list[int], name: str, value: Any) -> None:
    """In the first call and behind a good one; and the next good one is a chain again."""
    seen = 0
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 3))):
        if not hasattr(pool, name):
            continue
        net, x, before = pooled(pool), images(), getattr(pool, name)
        with torch.no_grad():
            for _ in range(2):
                setattr(pool, name, value)
                seen += agrees(net, x) is None
                setattr(pool, name, before)
                chains.clear()
                agrees(net, x)
                assert chains == [5]
            delattr(pool, name)
            assert agrees(net, x) is None
    assert seen > 0


def test_indices_are_returned(chains: list[int]) -> None:
    net, x = sequential(conv(), conv(), nn.MaxPool2d(2, return_indices=True)), images()
    with torch.no_grad():
        values, indices = net(x)
        expected = module_by_module(net, x)
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(values, expected[0], rtol=1e-4, atol=1e-5)
        assert chains == [2]
        net[2].return_indices = False
        assert type(agrees(net, x)) is Tensor
        net[2].return_indices = True
        assert len(net(x)) == 2
        net.append(conv())
        assert agrees(net, x) is None  # the convolution takes no tuple
    assert chains == [2, 3, 2, 2]


# ---------------------------------------------------------------- reasons against the whole run


@pytest.mark.parametrize("pool", TORCHS)
def test_layers_between_poolings_of_torch_are_chains(chains: list[int], pool: str) -> None:
    net = pooled(TORCHS[pool]())
    with torch.no_grad():
        for _ in range(2):
            agrees(net, images(3, 9, 9))
    assert chains == [2, 2] * 2


def test_a_size_that_only_some_images_have(chains: list[int]) -> None:
    """Whether sizes that are rounded up differ depends on the image."""
    net = pooled(nn.MaxPool2d(2, ceil_mode=True))
    with torch.no_grad():
        for size in (8, 9, 8):
            agrees(net, images(2, size, size))
    assert chains == [5, 2, 2, 5]


class LouderPool(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def _own_forward(pool: nn.Module) -> None:
    pool.forward = lambda x: x[:, :, ::2, :8:2]  # type: ignore[assignment, method-assign]


DISTURBANCES: dict[str, Callable[[nn.Module], Any]] = {
    "a forward hook": lambda pool: pool.register_forward_hook(lambda module, args, output: output * 2),
    "a forward pre-hook": lambda pool: pool.register_forward_pre_hook(lambda module, args: (args[0] / 2,)),
    "a forward of its own": _own_forward,
    "another class": lambda pool: setattr(pool, "__class__", LouderPool),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_whoever_sees_a_pooling_gets_it(chains: list[int], what: str) -> None:
    net, x = pooled(nn.MaxPool2d(2)), images(3)
    with torch.no_grad():
        before = net(x)
        DISTURBANCES[what](net[2])
        after = agrees(net, x)
    assert chains == [5, 2, 2]
    assert not torch.allclose(before, after)


def test_what_stops_one_part_stops_that_part_alone(chains: list[int]) -> None:
    net, x = pooled(nn.MaxPool2d(2)), images(3)
    with torch.no_grad():
        net[4].drop_packed()
        agrees(net, x)
        assert chains == [2]
        net[4].prepack()
        agrees(net, x)
        net[3].train()
        assert agrees(net, x)[0, :, 0, 0].equal(net[4:](torch.zeros(1, C, 4, 4))[0, :, 0, 0])  # all is dropped
        assert chains == [2, 5, 2, 2, 2]
    net.eval()
    net[5].values.requires_grad_()
    net(x).sum().backward()
    assert chains == [2, 5, 2, 2, 2, 2] and net[5].values.grad is not None


def test_gradients_and_training_as_through_the_modules(chains: list[int]) -> None:
    net, x = pooled(nn.MaxPool2d(2)), images()
    results = []
    for run in (module_by_module, lambda net, x: net(x)):
        given_x = x.clone().requires_grad_()
        run(net, given_x).square().sum().backward()
        results.append(given_x.grad)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        agrees(net, x)
    net[3].p = 0.0
    net.train()
    with torch.no_grad():
        agrees(net, x)
        net.eval().double()
        agrees(net, x.double())
    assert chains == []


def test_a_pooling_that_holds_a_parameter_of_its_own(chains: list[int]) -> None:
    """Which nobody would see, and which changes nothing."""
    net, x = pooled(nn.MaxPool2d(2)), images()
    net[2].scale = nn.Parameter(torch.ones(1))
    agrees(net, x)
    assert chains == [5]
    net[2].kernel_size = nn.Parameter(torch.tensor(2), requires_grad=False)
    agrees(net, x)
    assert chains == [5, 2, 2]


def test_inputs_that_only_the_modules_take(chains: list[int]) -> None:
    net = pooled(nn.MaxPool2d(2))
    with torch.no_grad():
        assert agrees(net, torch.randn(C, 8, 8)).shape == (C, 4, 4)
        assert agrees(net, torch.randn(0, C, 8, 8)).shape == (0, C, 4, 4)
        for wrong in (torch.randn(2, 16, 8, 8), torch.randn(2, C, 1, 1), torch.randn(2, 8), torch.randn(C, 0, 8)):
            assert agrees(net, wrong) is None
    # The two convolutions in front of the pooling take an image of one pixel.
    assert chains == [2]


def test_a_run_that_wants_too_much_memory_is_cut_at_its_poolings(
    chains: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = pooled(nn.MaxPool2d(2)), images(1)
    with torch.no_grad():
        whole = agrees(net, x)
        run = net._program[1][0]
        assert isinstance(run, _Run)
        nbytes = run._packed._chains[x.shape, 2, False].nbytes
        monkeypatch.setattr(packed_run, "_MOST_BYTES", nbytes - 1)
        other = copy.deepcopy(net)
        torch.testing.assert_close(agrees(other, x), whole, rtol=1e-5, atol=1e-6)
        assert chains == [5, 2, 2]


def test_threads_that_call_first_at_once(chains: list[int]) -> None:
    x, wrong = images(3), []
    expected = module_by_module(pooled(nn.AvgPool2d(2)), x)
    for _ in range(10):
        net, ready = pooled(nn.AvgPool2d(2)), threading.Barrier(4)

        def serve(net: nn.Module = net, ready: threading.Barrier = ready) -> None:
            ready.wait()
            with torch.no_grad():
                for _ in range(3):
                    try:
                        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
                    except BaseException as error:
                        wrong.append(error)

        callers = [threading.Thread(target=serve) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong and 5 in chains
