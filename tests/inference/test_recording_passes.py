"""The passes that make a recording, each alone on graphs of a few nodes built by hand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx import Node

import slimkernels as sk
from slimkernels.inference.cpu_passes import find_chains, lifetimes
from slimkernels.inference.cpu_recording import bind
from slimkernels.inference.sampled_graph import SampledGraph, sample
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.cpu.memory import Lifetime, place
from slimkernels.kernels.problems import LANES

ATEN = torch.ops.aten
ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
native_only = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


class Built:
    """A graph with one input ``x``, to which nodes are added one by one."""

    def __init__(self, x: Tensor) -> None:
        self.graph = fx.Graph()
        self.inputs, self.constants = {"x": x}, {}
        self.x = self.graph.placeholder("x")

    def op(self, target: Any, *args: Any) -> Node:
        """An op that torch runs."""
        return self.graph.call_function(target, args)

    def constant(self, value: Tensor) -> Node:
        """A weight; all of them have to stand before the first op, as in a captured graph."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(self.x):
            node = self.graph.placeholder(f"weight_{len(self.constants)}")
        self.constants[node.name] = value
        return node

    def conv(self, x: Node, channels: int = 16) -> Node:
        """A block-sparse 1x1 convolution, which a native kernel runs."""
        layer = sk.nn.BlockSparseConv2d.from_dense(nn.Conv2d(channels, channels, 1), (16, 1))
        stored = (layer.values, layer.crow_indices, layer.col_indices, layer.bias)
        weights = [self.constant(tensor.detach()) for tensor in stored]
        sizes = [channels, channels, 1, 1], [16, 1], [1, 1], [0, 0], [1, 1]
        return self.op(torch.ops.slimkernels.bsr_conv2d.default, x, *weights, [], *sizes, "none", "auto")

    def returning(self, *outputs: Node) -> SampledGraph:
        """The graph with these outputs, sampled."""
        self.graph.output(outputs)
        return sample(self.graph, self.inputs, self.constants)


def ticks_of(graph: SampledGraph, *nodes: Node) -> list[tuple[int, int]]:
    """First and last tick of nodes."""
    found = lifetimes(graph, find_chains(graph))
    return [(found[node].first, found[node].last) for node in nodes]


def images(n: int = 1) -> Tensor:
    return torch.randn(n, 16, 4, 4).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def two_threads(monkeypatch, innermost_first):
    """Full vectors of images innermost, on two threads."""
    monkeypatch.setenv("SLIMKERNELS_ISA", ISAS[-1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- sample


def test_sample_knows_values_constants_and_whose_memory_they_lie_in() -> None:
    built = Built(torch.tensor([[1.0, -2.0]]))
    weight = built.constant(torch.tensor([10.0, 20.0]))
    total = built.op(ATEN.add.Tensor, built.x, weight)
    view = built.op(ATEN.view.default, total, [2])
    of_view = built.op(ATEN.unsqueeze.default, view, 1)
    in_place = built.op(ATEN.neg_.default, of_view)
    copied = built.op(ATEN.clone.default, of_view)
    graph = built.returning(copied)
    assert graph.constants == {weight}
    assert graph.values[copied].tolist() == [[-11.0], [-18.0]]
    assert [graph.owners[n] for n in (built.x, total, view, of_view, in_place)] == [built.x, total, total, total, total]
    assert graph.owners[copied] is copied


# ---------------------------------------------------------------- find_chains


@native_only
def test_a_chain_ends_where_something_else_reads_its_value() -> None:
    built = Built(images())
    a = built.conv(built.x)
    b = built.conv(a)
    c = built.conv(b)
    product = built.op(ATEN.mul.Tensor, b, c)  # of b, too, so b has memory of its own
    last = built.conv(product)
    chains = find_chains(built.returning(last))
    assert [chain.nodes for chain in chains] == [(a, b), (c,), (last,)]
    assert [chain.sources for chain in chains] == [(built.x,), (b,), (product,)]
    assert [chain.inside for chain in chains] == [{a}, set(), set()]


@native_only
def test_a_residual_and_its_relu_are_a_part_of_the_convolution_in_front() -> None:
    """As in a ResNet: a block with a convolution in its short cut, and one without."""
    built = Built(images())
    a = built.conv(built.x)
    inner = built.op(ATEN.relu.default, built.conv(a))
    first, short_cut = built.conv(inner), built.conv(a)
    total = built.op(ATEN.add.Tensor, first, short_cut)
    b = built.op(ATEN.relu.default, total)
    second = built.conv(built.op(ATEN.relu.default, built.conv(b)))
    last = built.op(ATEN.relu.default, built.op(ATEN.add.Tensor, b, second))
    (chain,) = find_chains(graph := built.returning(last))
    assert chain.sources == (built.x,) and chain.nodes[-1] == last and chain.nodes[:2] == (a, inner)
    # Activation 0 is the input; a, inner, first, b, ... are 1, 2, 3, 4, ...
    links = chain.chain.links
    assert [(link.source, link.residual) for link in links] == [
        (0, None),
        (1, None),
        (2, None),
        (1, 3),
        (4, None),
        (5, 4),
    ]
    assert [link.layer.epilogue for link in links] == ["none", "relu", "none", "relu", "relu", "relu"]
    assert {total, short_cut, second} < chain.inside
    found = lifetimes(graph, [chain])
    # a is written in tick 2 (tick 1 is that of copied inputs) and read in ticks 3 and 5; first lives from 4 to 5.
    assert [(found[last, i].first, found[last, i].last) for i in (1, 3, 4)] == [(2, 5), (4, 5), (5, 7)]


@native_only
@pytest.mark.parametrize("how", ["alpha", "broadcast", "twice", "constant", "read elsewhere"])
def test_additions_that_no_kernel_does(how: str) -> None:
    built = Built(images(2))
    other = built.op(ATEN.exp.default, built.x)
    conv = built.conv(built.x)
    if how == "alpha":
        total = built.graph.call_function(ATEN.add.Tensor, (conv, other), {"alpha": 2})
    elif how == "broadcast":
        total = built.op(ATEN.add.Tensor, conv, built.op(ATEN.mean.dim, other, [2, 3], True))
    elif how == "twice":
        total = built.op(ATEN.add.Tensor, conv, conv)
    elif how == "constant":
        total = built.op(ATEN.add.Tensor, conv, built.constant(torch.randn(2, 16, 4, 4)))
    else:
        total = built.op(ATEN.add.Tensor, conv, other)
    outputs = (total, conv) if how == "read elsewhere" else (total,)
    (chain,) = find_chains(built.returning(*outputs))
    assert chain.nodes == (conv,) and chain.chain.links[0].residual is None


@native_only
def test_a_dense_linear_layer_joins_a_chain_with_its_relu_and_makes_none_alone() -> None:
    built = Built(torch.randn(3, 16))
    weight = built.constant(torch.randn(16, 16))
    alone = built.op(ATEN.relu.default, built.op(ATEN.linear.default, built.x, weight))
    assert find_chains(built.returning(alone)) == []

    built = Built(torch.randn(3, 16, 1, 1).contiguous(memory_format=torch.channels_last))
    weight = built.constant(torch.randn(16, 16))
    conv = built.conv(built.x)
    linear = built.op(ATEN.linear.default, built.op(ATEN.view.default, conv, [3, 16]), weight)
    relu = built.op(ATEN.relu.default, linear)
    (chain,) = find_chains(built.returning(relu))
    assert chain.nodes == (conv, relu) and chain.inside == {conv, linear}
    assert [layer.epilogue for layer in chain.chain.layers] == ["none", "relu"]


@native_only
def test_a_weight_that_is_the_layers_own_input_is_not_packed() -> None:
    built = Built(torch.randn(16, 16, 1, 1).contiguous(memory_format=torch.channels_last))
    conv = built.conv(built.x)
    rows = built.op(ATEN.view.default, conv, [16, 16])
    squared = built.op(ATEN.linear.default, rows, rows)
    (chain,) = find_chains(built.returning(squared))
    assert chain.nodes == (conv,)


# ---------------------------------------------------------------- lifetimes


def test_a_residual_lives_until_the_addition() -> None:
    built = Built(torch.randn(64))
    a = built.op(ATEN.relu.default, built.x)
    b = built.op(ATEN.neg.default, a)
    c = built.op(ATEN.add.Tensor, b, a)
    d = built.op(ATEN.exp.default, c)
    graph = built.returning(d)
    assert ticks_of(graph, built.x, a, b, c, d) == [(0, 1), (1, 3), (2, 3), (3, 4), (4, 5)]
    # While the addition runs, three values of 256 bytes are needed.
    assert place(lifetimes(graph, [])).nbytes == 3 * 256


def test_an_output_that_is_read_later_lives_until_the_end() -> None:
    built = Built(torch.randn(64))
    a = built.op(ATEN.relu.default, built.x)
    b = built.op(ATEN.neg.default, a)
    c = built.op(ATEN.exp.default, b)
    assert ticks_of(built.returning(a, c), a, b, c) == [(1, 4), (2, 3), (3, 4)]


def test_a_value_lives_as_long_as_its_views_and_ops_in_place() -> None:
    built = Built(torch.randn(8, 8))
    a = built.op(ATEN.relu.default, built.x)
    changed = built.op(ATEN.add_.Tensor, a, 1)
    flat = built.op(ATEN.view.default, changed, [64])
    b = built.op(ATEN.neg.default, built.x)
    c = built.op(ATEN.exp.default, flat)
    graph = built.returning(b, c)
    assert set(lifetimes(graph, [])) == {built.x, a, b, c}
    assert ticks_of(graph, built.x, a, b, c) == [(0, 4), (1, 5), (4, 6), (5, 6)]


@native_only
def test_a_chain_takes_a_tick_for_each_layer_and_each_end() -> None:
    built = Built(images())
    a = built.op(ATEN.relu.default, built.x)
    b = built.conv(built.conv(built.conv(a)))
    c = built.op(ATEN.neg.default, b)
    found = lifetimes(graph := built.returning(c), find_chains(graph))
    # The chain starts in tick 2; its layers run in ticks 3, 4 and 5, and tick 6 is that of the copy at its end.
    nbytes = 16 * 4 * 4 * 4
    assert found == {
        built.x: Lifetime(nbytes, 0, 1),
        a: Lifetime(nbytes, 1, 3),
        b: Lifetime(nbytes, 5, 7),
        c: Lifetime(nbytes, 7, 8),
        (b, 1): Lifetime(nbytes, 3, 4),
        (b, 2): Lifetime(nbytes, 4, 5),
    }


@native_only
def test_slots_of_a_chain_share_no_memory_and_need_its_ends_throughout(two_threads) -> None:
    lanes = LANES[ISAS[-1]]
    built = Built(images(2 * lanes))
    b = built.conv(built.conv(built.x))
    (chain,) = find_chains(graph := built.returning(b))
    assert [piece.slot for piece in chain.chain.pieces] == [0, 1]
    image = 16 * 4 * 4 * 4
    # Each slot holds one vector of images twice: of three activations the first and the last share their memory.
    assert lifetimes(graph, [chain]) == {
        built.x: Lifetime(2 * lanes * image, 0, 4),
        b: Lifetime(2 * lanes * image, 1, 5),
        (b, 0): Lifetime(2 * 2 * lanes * image, 1, 4),
    }


# ---------------------------------------------------------------- place


def test_places_by_value() -> None:
    lived = {
        "long": Lifetime(64, 0, 9),
        "large": Lifetime(256, 0, 1),
        "next": Lifetime(128, 2, 3),
        "both": Lifetime(64, 1, 2),
    }
    ranges, nbytes = place(lived)
    assert ranges == {"large": slice(0, 256), "next": slice(0, 128), "long": slice(256, 320), "both": slice(320, 384)}
    assert nbytes == 384 and place({}).nbytes == 0


LIFETIMES = st.builds(
    lambda nbytes, first, ticks: Lifetime(64 * nbytes, first, first + ticks),
    st.integers(0, 5),
    st.integers(0, 12),
    st.integers(0, 6),
)


@given(st.lists(LIFETIMES, max_size=12))
@settings(max_examples=200, deadline=None)
def test_what_is_needed_in_the_same_tick_shares_no_memory(lived: list[Lifetime]) -> None:
    ranges, nbytes = place(dict(enumerate(lived)))
    for tick in range(20):
        needed = [i for i, own in enumerate(lived) if own.first <= tick <= own.last]
        used = [line for i in needed for line in range(ranges[i].start, ranges[i].stop, 64)]
        assert len(used) == len(set(used))
    assert all(ranges[i].stop - ranges[i].start == own.nbytes for i, own in enumerate(lived))
    assert all(0 <= r.start <= r.stop <= nbytes for r in ranges.values())


# ---------------------------------------------------------------- bind


@native_only
@pytest.mark.parametrize("vectors", [0, 2, 3])
def test_a_bound_graph_computes_what_the_graph_does(vectors: int, two_threads) -> None:
    """With ops between chains, a view, a residual and an output in the middle; on inputs that it was not made with."""
    built = Built(images(max(1, vectors * LANES[ISAS[-1]])))
    a = built.conv(built.conv(built.x))
    b = built.conv(built.op(ATEN.relu.default, a))
    c = built.conv(built.op(ATEN.add.Tensor, b, a))
    pair = built.op(ATEN.max.dim, built.op(ATEN.flatten.using_ints, c, 1), 1)
    largest = built.op(operator.getitem, pair, 0)
    graph = built.returning(b, built.op(ATEN.neg.default, c), largest)
    chains = find_chains(graph)
    recording = bind(graph, chains, placement := place(lifetimes(graph, chains)))
    assert recording.workspace_bytes == placement.nbytes and recording.weight_bytes > 0
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn_like(built.inputs["x"])
        recording.inputs[0].copy_(x)
        for step in recording.steps:
            step()
        expected = sample(built.graph, {"x": x}, built.constants)
        outputs = graph.nodes[-1].args[0]
        for got, node in zip(recording.outputs, outputs, strict=True):
            torch.testing.assert_close(got, expected.values[node], rtol=1e-4, atol=1e-4)
