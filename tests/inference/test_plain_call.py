"""The plain call of a converted model: runs of modules in an nn.Sequential as chains, and every reason against it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain_chains import C, conv, module_by_module, watch_chains
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import slimkernels as sk
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.problems import LANES
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, ChainedSequential, LowRankLinear, packed_run
from slimkernels.nn.chained import chain_sequentials_, unchain_sequentials_

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


def linear(epilogue: str = "none") -> BlockSparseLinear:
    return BlockSparseLinear.from_dense(nn.Linear(C, C), (16, 1), torch.rand(C // 16, C) < 0.5, epilogue=epilogue)


def network() -> nn.Sequential:
    """Runs of four convolutions and a pooling and of two linear layers, with torch's modules around and between."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), conv(), nn.Identity(), conv(), nn.Dropout(1.0), conv(epilogue="relu_maxpool2"),
        conv(epilogue="none"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear("relu"), nn.Dropout(1.0), linear(),
    )  # fmt: skip
    net.requires_grad_(False).eval()
    chain_sequentials_(net)
    assert type(net) is ChainedSequential
    return net


def images(n: int = 2, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every chain that ran."""
    return watch_chains(monkeypatch)


def agrees(net: nn.Sequential, x: Any) -> None:
    """What the net computes is what its modules compute one by one."""
    torch.testing.assert_close(net(x), module_by_module(net, x), rtol=1e-4, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "threads"), [(1, 1), (2, 2), (16, 2), (21, 1), (33, 2)])
def test_runs_are_chains(chains: list[int], monkeypatch: pytest.MonkeyPatch, isa: str, n: int, threads: int) -> None:
    monkeypatch.setenv("SLIMKERNELS_ISA", isa)
    torch.set_num_threads(threads)
    net = network()
    x = images(n)
    with torch.no_grad():
        agrees(net, x)
        first = net(x)
        assert chains == [5, 2, 5, 2]
        assert torch.equal(net(x), first)
        assert first.stride() == module_by_module(net, x).stride()


def test_chains_need_no_special_mode(chains: list[int]) -> None:
    """Not even no_grad, as long as nothing wants a gradient."""
    net, x = network(), images()
    agrees(net, x)
    with torch.inference_mode():
        agrees(net, x)
    assert chains == [5, 2, 5, 2]


def test_single_weights_and_low_rank_layers_are_chains(chains: list[int]) -> None:
    torch.manual_seed(0)
    narrow = nn.Sequential(conv(block=(1, 1)), conv(), conv(block=(1, 1), epilogue="none")).requires_grad_(False).eval()
    factors = [LowRankLinear.from_dense(nn.Linear(800, 800), 256) for _ in range(2)]
    thin = nn.Sequential(*factors).requires_grad_(False).eval()
    for net, x, layers in ((narrow, torch.randn(5, C, 6, 7), 3), (thin, torch.randn(2, 3, 800), 4)):
        chain_sequentials_(net)
        with torch.no_grad():
            agrees(net, x)
        assert chains.pop() == layers


@pytest.mark.parametrize("shape", [(C,), (3, C), (2, 3, C), (2, 3, 2, C), (2, 5, C, C)])
def test_rows_have_any_shape(chains: list[int], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(linear("relu"), linear()).requires_grad_(False).eval()
    chain_sequentials_(net)
    x = torch.randn(shape)
    with torch.no_grad():
        agrees(net, x)
        if len(shape) > 2:
            agrees(net, torch.randn(shape).transpose(0, 1))
    assert set(chains) == {2}


def test_images_may_lie_in_any_order(chains: list[int]) -> None:
    net = network()[1:]
    with torch.no_grad():
        for x in (torch.randn(2, C, 8, 8), torch.randn(8, 2, C, 8).permute(1, 2, 0, 3), torch.randn(1, C, 8, 8)[:, :]):
            agrees(net, x)
    assert chains == [5, 2] * 3


def test_one_layer_is_no_run() -> None:
    net = nn.Sequential(conv(), nn.Identity(), nn.Sigmoid(), conv()).eval()
    chain_sequentials_(net)
    assert type(net) is nn.Sequential
    again = conv()
    shared = nn.Sequential(again, again).eval()
    chain_sequentials_(shared)
    assert type(shared) is nn.Sequential


def test_memory_is_bounded(chains: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    with torch.no_grad():
        for size in range(4, 4 + 2 * packed_run._CACHED_SHAPES):
            agrees(net, images(1, size))
        run = next(part for part in net._program[1] if not isinstance(part, nn.Module))
        assert len(run._packed._chains) == packed_run._CACHED_SHAPES
        assert len(packed_run._SPARE) == 1
        monkeypatch.setattr(packed_run, "_MOST_BYTES", 0)
        chains.clear()
        agrees(net, images(3))
        assert chains == []


def test_threads_that_call_at_once_do_not_meet() -> None:
    net = network()
    inputs = [images(n) for n in (1, 16, 5)]
    wrong: list[int] = []
    with torch.no_grad():
        expected = [net(x) for x in inputs]

    def serve(which: int) -> None:
        with torch.no_grad():
            wrong.extend(which for _ in range(40) if not torch.equal(net(inputs[which]), expected[which]))

    callers = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_call_while_another_thread_takes_the_modules_runs_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = packed_run.PackedRun([conv(c_in=3).eval(), conv().eval()], images=True)
    x, convs_of, meanwhile = images().contiguous(), packed_run._convs_of, []

    def interrupted(module: Any) -> Any:
        meanwhile.append(run.attempt(x))
        return convs_of(module)

    monkeypatch.setattr(packed_run, "_convs_of", interrupted)
    with torch.no_grad():
        assert run.is_ready() and meanwhile == [None, None]
        assert run.attempt(x) is not None


# ---------------------------------------------------------------- reasons to run module by module


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _halve_input(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LouderConv(BlockSparseConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class LouderLinear(BlockSparseLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def _louder(net: nn.Sequential) -> None:
    net[3].__class__, net[9].__class__ = LouderConv, LouderLinear


def _own_forward(net: nn.Sequential) -> None:
    net[3].forward = lambda x: x * 3
    net[9].forward = lambda x: x * 3


def _dropout(net: nn.Sequential) -> None:
    net[4].train()
    net[10].train()


DISTURBANCES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a forward hook": lambda net: [net[i].register_forward_hook(_double) for i in (3, 11)],
    "a forward hook on an idle module": lambda net: [net[i].register_forward_hook(_double) for i in (2, 10)],
    "a forward pre-hook": lambda net: [net[i].register_forward_pre_hook(_halve_input) for i in (5, 11)],
    "a parametrization": lambda net: [
        parametrize.register_parametrization(net[i], "bias", Doubled()) for i in (3, 11)
    ],
    "a forward of its own": _own_forward,
    "another class": _louder,
    "dropout in training mode": _dropout,
    "training mode": lambda net: net.train(),
    "packs that were dropped": lambda net: [net[i].drop_packed() for i in (6, 9)],
    "weights written to since they were packed": lambda net: [net[i].values.mul_(2) for i in (6, 9)],
    "weights whose data was exchanged": lambda net: [
        setattr(net[i].values, "data", net[i].values.data.flip(0)) for i in (6, 9)
    ],
    "another kernel": lambda net: [setattr(net[i], "kernel", f"{net[i]._op}__reference") for i in (6, 9)],
    "another dtype": lambda net: net.double(),
}  # fmt: skip


@pytest.mark.parametrize("what", DISTURBANCES)
def test_whoever_sees_a_module_gets_the_modules(chains: list[int], what: str) -> None:
    net, x = network(), images(3)
    with torch.no_grad():
        before = net(x)
        assert chains == [5, 2]
        DISTURBANCES[what](net)
        after = net(x.double() if what == "another dtype" else x)
        assert chains == [5, 2]
        expected = module_by_module(net, x.double() if what == "another dtype" else x)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    unchanged = ("packs that were dropped", "another kernel", "another dtype")
    if what not in unchanged:
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_sees_all_modules(chains: list[int], register: str) -> None:
    net, seen = network(), []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        net(images())
    finally:
        handle.remove()
    assert chains == [] and set(seen) >= set(net)
    net(images())
    assert chains == [5, 2]


class Subclass(Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_whoever_sees_ops_gets_the_modules(chains: list[int]) -> None:
    net, x = network(), images(3)
    with torch.no_grad():
        agrees(net, x.as_subclass(Subclass))
        assert isinstance(net(x.as_subclass(Subclass)), Subclass)
        with torch.autocast("cpu", torch.bfloat16):
            agrees(net, x)
        with Mode():
            agrees(net, x)
        with FlopCounterMode(display=False) as counter:
            net(x)
        with FlopCounterMode(display=False) as expected:
            module_by_module(net, x)
        assert counter.get_total_flops() == expected.get_total_flops() > 0
    assert chains == []


def test_gradients_flow_as_through_the_modules(chains: list[int]) -> None:
    net = network()
    given, expected = images().requires_grad_(), None
    for run in (module_by_module, lambda net, x: net(x)):
        given.grad = None
        run(net, given).square().sum().backward()
        expected, got = given.grad.clone(), expected
    assert chains == []
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    x = images()
    net[11].values.requires_grad_()  # the last run alone
    net(x).sum().backward()
    assert chains == [5] and net[11].values.grad is not None
    with torch.no_grad():
        net(x)
    assert chains == [5, 5, 2]
    net[11].values.requires_grad_(False)
    net[11].bias = nn.Parameter(net[11].bias.data)  # another parameter in the same memory
    net(x).sum().backward()
    assert chains == [5, 5, 2, 5] and net[11].bias.grad is not None


def test_tangents_flow_as_through_the_modules(chains: list[int]) -> None:
    net, x, tangent = network(), images(), images()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got, expected = (torch.autograd.forward_ad.unpack_dual(y) for y in (net(dual), module_by_module(net, dual)))
    assert chains == [] and got.tangent.abs().sum() > 0
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["compile", "export", "jit.trace", "fx"])
def test_what_is_captured_are_the_modules(chains: list[int], how: str) -> None:
    net, x = network(), images(3)
    with torch.no_grad():
        expected = module_by_module(net, x)
        net(x)
        chains.clear()
        if how == "compile":
            captured: Any = torch.compile(net, backend="eager", fullgraph=True)
        elif how == "export":
            captured = torch.export.export(net, (x,)).module()
        elif how == "jit.trace":
            captured = torch.jit.trace(net, x, check_trace=False)
        else:
            captured = fx.symbolic_trace(net)
            called = [node.target for node in captured.graph.nodes if node.op == "call_module"]
            assert called == [str(i) for i in range(len(net))]
        got = captured(x)
    assert chains == []
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_inputs_that_only_the_modules_take(chains: list[int]) -> None:
    net = network()
    with torch.no_grad():
        run = net[1:7]
        assert run(torch.randn(0, C, 8, 8)).shape == (0, C, 4, 4)
        torch.testing.assert_close(run(torch.ones(C, 8, 8)), module_by_module(run, torch.ones(C, 8, 8)))
        for wrong in (torch.randn(2, 16, 8, 8), torch.randn(2, C, 1, 1), torch.randn(2, 8)):
            with pytest.raises((ValueError, IndexError)) as expected:
                module_by_module(run, wrong)
            with pytest.raises(type(expected.value)) as got:
                run(wrong)
            assert str(got.value) == str(expected.value)
        empty = net[9:](torch.randn(0, C))
        assert empty.shape == (0, C)
    assert chains == []


# ---------------------------------------------------------------- changes of the model


def _exchange(net: nn.Sequential) -> None:
    net[3] = conv().requires_grad_(False).eval()


def _new_bias(net: nn.Sequential) -> None:
    net[3].bias = nn.Parameter(torch.full((C,), 3.0), requires_grad=False)


def _exchange_bias_data(net: nn.Sequential) -> None:
    net[3].bias.data = torch.full((C,), 3.0)


def _new_values(net: nn.Sequential) -> None:
    net[3].values.mul_(2)
    net[3].prepack()


def _new_state(net: nn.Sequential) -> None:
    net.load_state_dict(
        {name: value * 2 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    )


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a module exchanged": _exchange,
    "a module deleted": lambda net: net.__delitem__(3),
    "a module inserted": lambda net: net.insert(3, conv().requires_grad_(False).eval()),
    "a module of torch in between": lambda net: net.insert(3, nn.Sigmoid()),
    "the bias written to": lambda net: net[3].bias.fill_(3.0),
    "the bias exchanged": _new_bias,
    "the data of the bias exchanged": _exchange_bias_data,
    "the weight written to and packed": _new_values,
    "a stride": lambda net: setattr(net[3], "stride", 2),
    "an epilogue": lambda net: setattr(net[3], "epilogue", "none"),
    "a state dict loaded": _new_state,
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_is_seen_at_once(chains: list[int], what: str) -> None:
    net, x = network(), images(3)
    with torch.no_grad():
        before = net(x)
        CHANGES[what](net)
        chains.clear()
        agrees(net, x)
        assert not torch.allclose(before, net(x))
    assert chains


def test_memory_that_torch_moves_is_read_where_it_is(chains: list[int]) -> None:
    """Sending a model to another process moves the memory of its tensors, which keep their storages."""
    net, x = network(), images(3)
    net[11] = nn.Linear(C, C).requires_grad_(False)
    with torch.no_grad():
        expected = net(x)
        runs = [part._packed for part in net._program[1] if not isinstance(part, nn.Module)]
        for module in net:
            moved = [t for t in (*module.parameters(), *module.buffers()) if t.numel()]
            for tensor in moved:
                tensor.share_memory_()
            # Asked before it is called: a chain would read memory that is no longer there.
            ours = isinstance(module, (BlockSparseConv2d, BlockSparseLinear)) or module is net[11]
            assert all(run._holds() for run in runs) != ours
            chains.clear()
            assert torch.equal(net(x), expected)
            assert chains == [5, 2]


def test_a_bias_that_kernels_cannot_read_where_it_lies(chains: list[int]) -> None:
    net, x = network(), images(3)
    net[3].bias = nn.Parameter(torch.randn(2 * C)[::2], requires_grad=False)
    net[9].bias.data = torch.randn(C + 1)
    with torch.no_grad():
        agrees(net[:9], x)
        with pytest.raises(ValueError, match=r"expected bias of shape \(32,\)"):
            net(x)
    assert chains == []


def test_weights_that_count_no_writes(chains: list[int]) -> None:
    """Of inference tensors torch counts no writes, so a chain could not see them."""
    with torch.inference_mode():
        net = nn.Sequential(conv(), conv()).eval()
        chain_sequentials_(net)
        x = torch.randn(2, C, 6, 6)
        agrees(net, x)
        net[0].bias.fill_(3.0)
        agrees(net, x)
        net[0].bias = net[1].bias = None
        agrees(net, x)
        net[0].values.mul_(2)
        agrees(net, x)
    assert chains == []


def test_copies_and_parts_have_chains_of_their_own(chains: list[int]) -> None:
    net, x = network(), images(3)
    with torch.no_grad():
        expected = net(x)
        saved = io.BytesIO()
        torch.save(net, saved)
        saved.seek(0)
        copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False), net[:]]
        chains.clear()
        for other in copies:
            assert type(other) is ChainedSequential
            assert torch.equal(other(x), expected)
        assert chains == [5, 2] * len(copies)
        copies[0][3].bias.fill_(3.0)
        agrees(copies[0], x)
        assert torch.equal(net(x), expected)


def test_names_and_state_dict_are_those_of_a_sequential() -> None:
    net = network()
    net(images())
    plain = copy.deepcopy(net)
    unchain_sequentials_(plain)
    assert type(plain) is nn.Sequential
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_modules()] == [name for name, _ in plain.named_modules()]


# ---------------------------------------------------------------- convert


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU(), nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, C, 3))
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["2", "4"]))
    return model.eval()


def test_convert_chains_and_to_dense_undoes_it(pruned: nn.Module, chains: list[int], tmp_path: Any) -> None:
    fast = sk.convert(pruned, policy=sk.Policy(min_speedup=0))
    x = images(2, 12)
    with torch.no_grad():
        got = fast(x)
        assert type(fast) is ChainedSequential and chains == [3]
        torch.testing.assert_close(got, pruned(x), rtol=1e-4, atol=1e-5)
        dense = sk.to_dense(fast)
        assert {type(module) for module in dense.modules()} == {nn.Sequential, nn.Conv2d, nn.ReLU}
        torch.testing.assert_close(dense(x), got, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sk.graphed(fast, x)(x), got, rtol=1e-5, atol=1e-6)
    assert type(pruned) is nn.Sequential


def test_a_loaded_model_is_chained(pruned: nn.Module, chains: list[int], tmp_path: Any) -> None:
    fast = sk.convert(nn.Sequential(pruned), policy=sk.Policy(min_speedup=0))
    sk.save(fast, tmp_path / "model.safetensors")
    loaded = sk.load(tmp_path / "model.safetensors", nn.Sequential(copy.deepcopy(pruned)))
    x = images(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))
    assert type(loaded[0]) is ChainedSequential and chains == [3, 3]


def test_a_model_to_train_is_not_chained(pruned: nn.Module) -> None:
    fast = sk.convert(pruned, policy=sk.Policy(min_speedup=0), training=True)
    assert type(fast) is nn.Sequential


def test_warm_up_makes_the_chains(chains: list[int]) -> None:
    net = network()
    warm = sk.warm_up(net, [images(1), images(4)], calls=2)
    assert chains == [5, 2, 5, 2]
    assert {kernel.layer for kernel in warm.kernels} == {"1", "3", "5", "6", "9", "11"}
