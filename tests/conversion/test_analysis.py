"""analyze: shapes, zero blocks, chains, multiply-adds and bytes of every layer; the structure that torch.fx sees."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conversion_models import block_sparse_, images, sparse_tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from slimkernels import analyze
from slimkernels.conversion.analysis import CANDIDATE_BLOCK_SHAPES, count_blocks, input_sets, problems, rank_patterns
from slimkernels.conversion.graph import bake, copy_model, trace
from slimkernels.conversion.layers import LayerWeight
from slimkernels.formats import BlockMask, BSRWeight, block_mask
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d, LowRankLinear

native_only = pytest.mark.skipif(unavailable_reason("scalar") is not None, reason="no native kernel is built")


@given(
    shape=st.sampled_from([(7, 5), (32, 16), (20, 6, 3, 3), (16, 1, 1, 5), (33, 17, 2, 1)]),
    block=st.sampled_from([*CANDIDATE_BLOCK_SHAPES, (3, 2), (5, 7)]),
    seed=st.integers(0, 5),
)
def test_count_blocks_is_the_sum_of_the_block_mask(shape: tuple[int, ...], block: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.9] = 0
    weight.view(-1)[:3] = torch.tensor([-0.0, float("nan"), -0.0])
    assert count_blocks(weight, block) == int(block_mask(weight, block).sum())


def test_layers_shapes_and_work() -> None:
    model = sparse_tiny()
    stats = analyze(model, [images(2), images(3, size=8)])
    conv = stats["features.3"]
    assert conv.type == "Conv2d" and conv.weight_shape == (32, 16, 3, 3) and conv.obstacle is None
    assert [c.input_shape for calls in conv.calls for c in calls] == [(2, 16, 12, 12), (3, 16, 8, 8)]
    assert [c.output_shape for calls in conv.calls for c in calls] == [(2, 32, 12, 12), (3, 32, 8, 8)]
    assert conv.macs == 2 * 32 * 12 * 12 * 16 * 9
    assert conv.bytes_dense == 32 * 16 * 9 * 4
    assert conv.sparsity == float((model.features[3].weight == 0).double().mean())
    linear = stats["classifier.0"]
    assert linear.macs == 2 * 32 * 32 and linear.calls[0][0].input_shape == (2, 32)
    assert stats["classifier.3"].sparsity == 0.0
    assert stats.untraceable is None
    with pytest.raises(KeyError):
        stats["features.1"]
    json.dumps(stats.to_json())


def test_without_inputs_there_are_no_shapes() -> None:
    conv = analyze(sparse_tiny())["features.3"]
    assert conv.calls == () and conv.macs is None and conv.patterns


def test_shared_calls_add_up() -> None:
    layer = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    assert analyze(Twice(), torch.ones(3, 8))["layer"].macs == 2 * 3 * 64


@native_only
def test_the_pattern_that_stores_least_work_wins_and_bytes_count_indices() -> None:
    layer = nn.Conv2d(64, 64, 3)
    block_sparse_(layer, (16, 1))
    best = rank_patterns(LayerWeight(layer.weight.detach(), None), None)[0]
    assert best.block_shape == (16, 1)
    stored = BSRWeight.from_dense(layer.weight, (16, 1))
    assert best.nnz_blocks == stored.nnz_blocks and best.nbytes == stored.nbytes
    assert best.block_sparsity == pytest.approx(stored.block_sparsity)
    conv = analyze(nn.Sequential(layer))["0"]
    assert conv.bytes_stored == stored.nbytes < conv.bytes_dense


@native_only
def test_ties_go_to_the_larger_block_and_narrow_ones_come_last() -> None:
    weight = torch.ones(128, 64)
    weight[:, 16:] = 0
    ranked = rank_patterns(LayerWeight(weight, None), None)
    assert ranked[0].block_shape == (128, 16)
    assert all(p.kernel is not None for p in ranked)
    # Nothing is gained by blocks of one channel here, and of those that store as little their kernel is the slowest.
    alike = [p.block_shape for p in ranked if p.nnz_blocks * math.prod(p.block_shape) == 128 * 16]
    assert len(alike) > 8 and alike[-1] == (1, 1)


def test_a_declared_block_shape_is_the_only_candidate() -> None:
    layer = nn.Conv2d(16, 32, 3)
    parametrize.register_parametrization(
        layer, "weight", BlockMask(torch.ones(4, 9 * 8, dtype=torch.bool), layer.weight.shape, (8, 2))
    )
    stats = analyze(nn.Sequential(layer))["0"]
    assert stats.type == "Conv2d" and stats.declared == (8, 2)
    assert [p.block_shape for p in stats.patterns] == [(8, 2)]


def test_reference_counts_as_no_kernel_unless_asked_for() -> None:
    weight = LayerWeight(torch.ones(16, 16, dtype=torch.float64), None)
    (none,) = rank_patterns(weight, None, block_shapes=((16, 1),))
    assert none.kernel is None and "no kernel takes it" in none.reason
    (asked,) = rank_patterns(weight, None, block_shapes=((16, 1),), backend="reference")
    assert asked.kernel == "bsr_linear__reference"
    (cuda,) = rank_patterns(weight, None, block_shapes=((16, 1),), backend="cuda")
    assert cuda.kernel is None and "runs on cuda tensors" in cuda.reason


def test_problems_at_common_sizes_fit_the_kernel() -> None:
    weight = LayerWeight(torch.ones(4, 3, 11, 5), None, dilation=(2, 1))
    for epilogue in ("none", "relu_maxpool2"):
        for problem in problems(weight, ((1, 1), 5), None, epilogue):
            assert problem.p >= (2 if epilogue == "relu_maxpool2" else 1) and problem.q >= 1
    (one,) = problems(LayerWeight(torch.ones(4, 3, 1, 1), None), ((1, 1), 5), [(3, 9, 8)])
    assert (one.n, one.h, one.w) == (1, 9, 8)


def test_drop_in_modules_report_format_and_rank() -> None:
    conv = nn.Conv2d(16, 32, 3)
    block_sparse_(conv)
    sparse = BlockSparseConv2d.from_dense(conv, (16, 1))
    tai = LowRankConv2d.from_factors([torch.randn(4, 32, 3, 1), torch.randn(8, 4, 1, 3)], kind="tai")
    stats = analyze(nn.Sequential(sparse, tai, nn.Flatten(), LowRankLinear(8, 6, 2)))
    assert stats["0"].declared == (16, 1) and stats["0"].sparsity > 0.5
    assert stats["1"].ranks == (4,) and stats["1"].weight_shape == (8, 32, 3, 3)
    assert stats["1"].bytes_stored == 4 * (4 * 32 * 3 + 8 * 4 * 3)
    assert stats["3"].ranks == (2,) and stats["3"].weight_shape == (6, 8)


def test_chains_are_found() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 3, 1, bias=False), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 4), nn.Linear(4, 20),
    )  # fmt: skip
    chains = {chain.names: chain for chain in analyze(model).chains}
    assert set(chains) == {("0", "1", "2"), ("5", "6")}
    tucker = chains["0", "1", "2"]
    assert tucker.kind == "tucker2" and tucker.ranks == (3, 4) and tucker.padding == (1, 1)
    merged = tucker.merged().to_module()
    x = images(channels=8, size=6)
    with torch.no_grad():
        assert torch.allclose(merged(x), model[2](model[1](model[0](x))), atol=1e-5)


def test_obstacles_and_untraceable_models_are_reported() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    stats = analyze(Branching(), images(channels=4))
    assert "groups=2" in (stats["conv"].obstacle or "") and stats["conv"].weight_shape == (4, 2, 3, 3)
    assert "torch.fx cannot trace it" in (stats.untraceable or "")


def test_the_model_is_untouched() -> None:
    model = sparse_tiny().train()
    prune.l1_unstructured(model.classifier[0], "weight", 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    analyze(model, images())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.training and prune.is_pruned(model)


# Structure


def test_followers_need_one_consumer_and_one_call() -> None:
    relu = nn.ReLU()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.relu, self.same = (
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                relu,
                nn.Identity(),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            z = self.relu(self.b(self.same(y)))
            return self.relu(self.c(z)), z

    graph = trace(Net())
    assert graph.reason is None
    assert graph.follower == {"a": "b", "same": "b"}
    assert graph.calls["relu"] == 2 and list(graph.chain("a")) == ["b"]


def test_too_many_optional_arguments_are_not_traced() -> None:
    class Net(nn.Module):
        def forward(self, x, a=1, b=1, c=1, d=1, e=1):  # type: ignore[no-untyped-def]
            return x

    class KeywordOnly(nn.Module):
        def forward(self, x, *, scale=1):  # type: ignore[no-untyped-def]
            return x * scale

    assert "5 optional arguments" in (trace(Net()).reason or "")
    assert "scale" in (trace(KeywordOnly()).reason or "")


def test_baking_a_copy_leaves_the_class_of_the_original() -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    parametrize.register_parametrization(layer, "bias", nn.Softplus())
    expected = layer(torch.ones(1, 4))
    copied = copy_model(layer)
    bake(copied)
    assert type(copied) is nn.Linear and set(copied.state_dict()) == {"weight", "bias"}
    assert torch.equal(copied(torch.ones(1, 4)), expected) and torch.equal(layer(torch.ones(1, 4)), expected)


def test_input_sets() -> None:
    x = torch.ones(1)
    assert input_sets(None) == []
    assert input_sets(x) == [((x,), {})]
    assert input_sets([(x, x), {"a": x}]) == [((x, x), {}), ((), {"a": x})]
    with pytest.raises(TypeError, match="got str"):
        input_sets(["x"])
