"""Block pruning: exact counts, nothing revived, Parameter identity, selection by name, messages."""

from __future__ import annotations

import copy
import io
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from slimkernels.compress.pruning.granularity import GRANULARITIES, Units, zero_masked_
from slimkernels.compress.pruning.prune import cubic_schedule, finalize_, mask_sparsity, masks, prune_
from slimkernels.formats import BlockMask, block_grid, block_mask, block_norms, expand_mask


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def small_net() -> nn.Sequential:
    """Two convolutions after the first one, a wide Linear and a classifier."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 40, 3, padding=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(160, 64),
            nn.Linear(64, 10),
        )
    )


def original(module: nn.Module) -> nn.Parameter:
    return module.parametrizations.weight.original


@settings(max_examples=60, deadline=None)
@given(
    c_out=st.integers(1, 40),
    c_in=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.tuples(st.sampled_from([1, 3, 8, 16, 64]), st.sampled_from([1, 2, 5, 16])),
    sparsity=st.integers(0, 99).map(lambda percent: percent / 100),
    seed=st.integers(0, 2**16),
)
def test_one_shot_masks_exactly_the_lowest_floor_of_the_blocks(c_out, c_in, kernel, block, sparsity, seed):
    conv = nn.Conv2d(c_in, c_out, kernel, bias=False)
    seeded(conv, seed)
    dense = conv.weight.detach().clone()
    prune_(conv, sparsity, block, skip_first=False)
    mask = conv.parametrizations.weight[0].mask
    blocks = math.prod(block_grid(dense.shape, block))
    expected = min(math.floor(Fraction(sparsity).limit_denominator(100) * blocks), blocks - 1)
    assert int((~mask).sum()) == expected
    norms = block_norms(dense, block)
    if expected:
        assert norms[~mask].max() <= norms[mask].min()
    keep = expand_mask(mask, dense.shape, block)
    assert torch.equal(conv.weight, torch.where(keep, dense, 0.0))
    assert torch.equal(original(conv), conv.weight)


@settings(max_examples=30, deadline=None)
@given(
    sparsities=st.lists(st.floats(0, 0.99), min_size=2, max_size=5),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 2**16),
)
def test_repruning_never_revives_and_reaches_the_highest_target(sparsities, scope, seed):
    net = nn.Sequential(nn.Conv2d(4, 20, 3), nn.Conv2d(20, 12, (1, 2)))
    previous: dict[str, torch.Tensor] = {}
    for step, sparsity in enumerate(sparsities):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + step)
            for module in net:
                weight = original(module) if parametrize.is_parametrized(module) else module.weight
                weight.copy_(torch.randn(weight.shape, generator=generator))
        prune_(net, sparsity, (8, 1), scope=scope, skip_first=False)
        now = {name: m.mask.clone() for name, m in masks(net).items()}
        for name, mask in previous.items():
            assert not bool((now[name] & ~mask).any())
        if previous and sparsity <= max(sparsities[:step]):
            assert all(torch.equal(now[name], previous[name]) for name in now)
        previous = now
    blocks = sum(m.numel() for m in previous.values())
    assert sum(int((~m).sum()) for m in previous.values()) <= math.floor(max(sparsities) * blocks + 1e-6)
    assert all(bool(m.any()) for m in previous.values())


def test_parameter_stays_the_same_object_in_the_same_storage():
    net = small_net()
    before = [net[i].weight for i in (2, 4, 7)]
    pointers = [p.untyped_storage()._cdata for p in before]
    prune_(net, 0.5)
    assert list(masks(net)) == ["2", "4", "7"]
    assert all(original(net[i]) is p for i, p in zip((2, 4, 7), before, strict=True))
    finalize_(net)
    assert masks(net) == {} and not parametrize.is_parametrized(net[2])
    assert all(net[i].weight is p for i, p in zip((2, 4, 7), before, strict=True))
    assert [p.untyped_storage()._cdata for p in before] == pointers
    assert type(net[2]) is nn.Conv2d


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    ],
    ids=["sgd", "adam"],
)
def test_running_optimizer_trains_survivors_and_cannot_revive(make):
    net = small_net()
    optimizer = make(net.parameters())
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x) / 100, y).backward()
        optimizer.step()

    for _ in range(3):  # momentum is non-zero for every weight before the mask comes
        step()
    prune_(net, 0.75, (8, 1))
    start = {name: net.get_submodule(name).weight.detach().clone() for name in masks(net)}
    for _ in range(3):
        step()
    for name, mask in masks(net).items():
        module = net.get_submodule(name)
        hidden = ~expand_mask(mask.mask, module.weight.shape, (8, 1))
        assert bool((module.weight[hidden] == 0).all())
        assert bool((original(module).grad[hidden] == 0).all())
        assert bool((module.weight[~hidden] != start[name][~hidden]).any())
    finalize_(net)
    for name, weight in start.items():
        module = net.get_submodule(name)
        assert torch.equal(block_mask(module.weight, (8, 1)), block_mask(weight, (8, 1)))


def test_finalize_clears_what_momentum_left_under_the_mask():
    conv = seeded(nn.Conv2d(8, 16, 3))
    prune_(conv, 0.5, (8, 1), skip_first=False)
    hidden = ~expand_mask(masks(conv)[""].mask, conv.weight.shape, (8, 1))
    with torch.no_grad():
        original(conv).add_(1.0)
    finalize_(conv)
    assert bool((conv.weight[hidden] == 0).all()) and bool((conv.weight[~hidden] != 0).all())
    assert conv.weight.requires_grad and conv.weight.is_leaf


def test_default_selection_skips_first_conv_small_linears_and_classifier():
    net = nn.Sequential(
        nn.Linear(128, 128), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(32, 512), nn.Linear(512, 100)
    )
    prune_(net, 0.5, (4, 1))
    assert list(masks(net)) == ["0", "2"]
    prune_(net, 0.5, (4, 1), skip_first=False)
    assert list(masks(net)) == ["0", "1", "2"]


def test_names_and_patterns_select():
    net = nn.ModuleDict({"features": small_net(), "head": seeded(nn.Linear(10, 10))})
    prune_(net, 0.5, (4, 1), layers=["features.?", "head"], exclude="features.7")
    assert list(masks(net)) == ["features.2", "features.4", "features.8", "head"]
    net = small_net()
    prune_(net, 0.5, (4, 1), layers="0")
    assert list(masks(net)) == ["0"]


def test_sparsity_dict_name_beats_pattern():
    net = small_net()
    prune_(net, {"*": 0.25, "4": 0.5}, (8, 1), exclude=["7", "8"])
    found = {name: float((~m.mask).float().mean()) for name, m in masks(net).items()}
    assert found == {"2": 0.25, "4": 0.5}


def test_grouped_conv_is_left_alone_unless_named():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    prune_(net, 0.5, (4, 1))
    assert list(masks(net)) == ["2"]
    with pytest.raises(ValueError, match=r"prune_: expected groups=1 in layer '1', got groups=2"):
        prune_(net, 0.5, (4, 1), layers=["1"])


@pytest.mark.parametrize(("sparsity", "left"), [(0.29, 71), (0.999, 1), (1 - 1e-12, 1)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_survive_rounding_and_the_last_block_stays(scope, sparsity, left):
    conv = seeded(nn.Conv2d(100, 8, 1))  # 0.29 * 100 is 28.999999999999996 in floating point
    prune_(conv, sparsity, (8, 1), scope=scope, skip_first=False)
    assert int(masks(conv)[""].mask.sum()) == left


def test_equal_scores_are_pruned_in_row_major_order():
    conv = nn.Conv2d(8, 16, 1, bias=False)
    nn.init.constant_(conv.weight, 0.5)
    prune_(conv, 0.3, (4, 1), skip_first=False)
    mask = masks(conv)[""].mask.flatten()
    assert mask.tolist() == [False] * 9 + [True] * 23


def test_masked_blocks_count_before_blocks_that_are_zero():
    conv = nn.Conv2d(8, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, 9.0).repeat(4, 1)[:, :, None, None])
    prune_(conv, 0.25, (4, 1), skip_first=False)
    with torch.no_grad():
        original(conv)[:, 5] = 0
    prune_(conv, 0.375, (4, 1), skip_first=False)
    assert masks(conv)[""].mask[0].tolist() == [False, False, True, True, True, False, True, True]


def test_global_scope_ranks_layers_together_and_keeps_one_block_each():
    big, tiny = seeded(nn.Conv2d(16, 16, 3, bias=False), 1), seeded(nn.Conv2d(16, 16, 3, bias=False), 2)
    with torch.no_grad():
        tiny.weight.mul_(1e-3)
    net = nn.Sequential(big, tiny)
    prune_(net, 0.5, (8, 1), scope="global", skip_first=False)
    found = masks(net)
    assert int(found["1"].mask.sum()) == 1
    assert int(found["0"].mask.sum()) == 2 * 288 - 288 - 1
    best = block_norms(tiny.weight, (8, 1)).argmax()
    assert bool(found["1"].mask.flatten()[best])


@pytest.mark.parametrize("importance", ["magnitude", "magnitude_l1"])
def test_costs_rank_units_by_importance_per_cost(importance):
    net = nn.Sequential(*(seeded(nn.Conv2d(16, 16, 3, bias=False), seed) for seed in (1, 2)))
    costs, power = {"0": 1.3e-6, "1": 1e-6}, 2 if importance == "magnitude" else 1
    worth = [block_norms(net[i].weight, (8, 1), power) ** power / costs[f"{i}"] for i in (0, 1)]
    prune_(net, 0.5, (8, 1), scope="global", importance=importance, costs=costs, skip_first=False)
    threshold = torch.cat([w.flatten() for w in worth]).kthvalue(288).values
    for i, mask in enumerate(masks(net).values()):
        assert torch.equal(mask.mask, worth[i] > threshold)
    assert masks(net)["0"].mask.sum() < 0.8 * masks(net)["1"].mask.sum()
    before = [mask.mask.clone() for mask in masks(net).values()]
    prune_(net, 0.75, (8, 1), scope="global", importance=importance, costs=costs, skip_first=False)
    threshold = torch.cat([w.flatten() for w in worth]).kthvalue(432).values
    for i, mask in enumerate(masks(net).values()):
        assert torch.equal(mask.mask, worth[i] > threshold) and not (mask.mask & ~before[i]).any()


def test_a_floor_keeps_the_best_units_of_every_layer():
    big, tiny = seeded(nn.Conv2d(16, 16, 3, bias=False), 1), seeded(nn.Conv2d(16, 16, 3, bias=False), 2)
    with torch.no_grad():
        tiny.weight.mul_(1e-3)
    net = nn.Sequential(big, tiny)
    prune_(net, 0.5, (8, 1), scope="global", floor=0.1, skip_first=False)
    found, norms = masks(net), block_norms(tiny.weight, (8, 1))
    assert int(found["1"].mask.sum()) == 29 and int(found["0"].mask.sum()) == 288 - 29
    assert norms[found["1"].mask].min() > norms[~found["1"].mask].max()
    prune_(net, 0.99, (8, 1), scope="global", floor=0.1, skip_first=False)
    assert int(found["0"].mask.sum()) == int(found["1"].mask.sum()) == 29


@pytest.mark.parametrize("importance", ["magnitude", "magnitude_l1"])
def test_global_scope_normalises_ragged_blocks(importance):
    conv = nn.Conv2d(4, 9, 1, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    with torch.no_grad():
        conv.weight[8] = 1.5  # the ragged block row: a quarter of the norm of a full one before normalisation
    prune_(conv, 0.5, (8, 1), scope="global", importance=importance, skip_first=False)
    assert masks(conv)[""].mask.tolist() == [[False] * 4, [True] * 4]
    layer = nn.Conv2d(4, 9, 1, bias=False)
    layer.load_state_dict({"weight": torch.ones(9, 4, 1, 1)})
    prune_(layer, 0.5, (8, 1), scope="layer", importance=importance, skip_first=False)
    assert masks(layer)[""].mask.tolist() == [[True] * 4, [False] * 4]


def test_l1_and_l2_rank_differently_and_a_callable_decides_itself():
    weight = torch.tensor([[3.0, 2.0], [0.0, 2.0]])[:, :, None, None]  # L2: 3 > 2.83; L1: 3 < 4

    def pruned(importance) -> list[list[bool]]:
        conv = nn.Conv2d(2, 2, 1, bias=False)
        conv.load_state_dict({"weight": weight})
        prune_(conv, 0.5, (2, 1), importance=importance, skip_first=False)
        return masks(conv)[""].mask.tolist()

    assert pruned("magnitude") == [[True, False]]
    assert pruned("magnitude_l1") == [[False, True]]
    assert pruned(lambda w, block: -block_norms(w, block)) == [[False, True]]


def test_half_precision_norms_do_not_overflow():
    conv = nn.Conv2d(4, 16, 1, bias=False).half()
    with torch.no_grad():
        conv.weight.fill_(3e4)
        conv.weight[:, 1] = 2e4
    prune_(conv, 0.25, (16, 1), skip_first=False)
    assert masks(conv)[""].mask.tolist() == [[True, False, True, True]]


def test_state_dict_resumes_a_masked_model():
    net = small_net()
    prune_(net, 0.75, (8, 1))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = prune_(seeded(small_net(), 99), 0.75, (8, 1))
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, mask in masks(net).items():
        assert torch.equal(masks(other)[name].mask, mask.mask)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    prune_(other, 0.875, (8, 1))
    assert all(not bool((masks(other)[n].mask & ~m.mask).any()) for n, m in masks(net).items())


def test_masked_model_deepcopies_with_its_own_mask():
    net = prune_(small_net(), 0.5, (8, 1))
    twin = copy.deepcopy(net)
    prune_(twin, 0.9, (8, 1))
    assert int(masks(net)["2"].mask.sum()) == int(masks(net)["2"].mask.numel() * 0.5)
    assert int(masks(twin)["2"].mask.sum()) < int(masks(net)["2"].mask.sum())


def test_gradual_schedule_composes():
    net = small_net()
    counts = []
    for step in range(0, 11, 2):
        prune_(net, cubic_schedule(step, final=0.875, end=10), (8, 1), layers="2")
        counts.append(int((~masks(net)["2"].mask).sum()))
    blocks = masks(net)["2"].mask.numel()
    assert counts == [math.floor((0.875 - 0.875 * (1 - s / 10) ** 3) * blocks + 1e-6) for s in range(0, 11, 2)]
    assert counts[-1] == blocks * 7 // 8


def test_shared_module_is_pruned_once_under_either_name():
    conv = seeded(nn.Conv2d(8, 8, 3, padding=1))
    net = nn.ModuleDict({"a": conv, "b": conv})
    prune_(net, 0.5, (8, 1), layers=["b"])
    assert len(masks(net)) == 1
    assert len(conv.parametrizations.weight) == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"prune_: expected sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"prune_: expected sparsity in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, r"prune_: expected sparsity in \[0, 1\), got nan"),
        ({"sparsity": "0.5"}, TypeError, r"prune_: expected sparsity to be a number in \[0, 1\), got '0.5'"),
        ({"sparsity": {"2": 2}}, ValueError, r"prune_: expected sparsity\['2'\] in \[0, 1\), got 2"),
        ({"sparsity": {"2": 0.5}, "layers": ["2"]}, ValueError, r"either layers or a sparsity dict"),
        ({"sparsity": {"2": 0.5}, "scope": "global"}, ValueError, r"one sparsity for scope='global', got a dict"),
        ({"floor": 0.1}, ValueError, r"prune_: expected costs and floor with scope='global' alone"),
        ({"scope": "global", "floor": 1.0}, ValueError, r"prune_: expected floor in \[0, 1\), got 1.0"),
        ({"scope": "global", "costs": {}}, ValueError, r"prune_: expected a positive cost of every layer, got 0.0 of"),
        ({"scope": "net"}, ValueError, r"prune_: expected scope 'layer' or 'global', got 'net'"),
        ({"importance": "fisher"}, ValueError, r"prune_: expected importance 'magnitude', .*, got 'fisher'"),
        ({"importance": "taylor"}, ValueError, r"expected a gradient on the weight of layer '2' for importance 'tay"),
        (
            {"importance": {"2": torch.ones(2, 144)}},
            ValueError,
            r"expected importance scores for layer '4', got .* '2'",
        ),
        ({"importance": {"22": torch.ones(1)}}, ValueError, r"expected importance to match .* '22'; near matches: 2"),
        ({"importance": 3}, ValueError, r"prune_: expected importance .* a callable.* or a dict of scores .*, got 3"),
        ({"granularity": "row"}, ValueError, r"prune_: expected granularity 'block', .*, got 'row'"),
        ({"sparsity": {"22": 0.5}}, ValueError, r"prune_: expected sparsity to match .*, got '22'; near matches: 2"),
        ({"block_shape": {"2": (8, 1)}}, ValueError, r"expected block_shape to have an entry for layer '4', got '2'"),
        ({"block_shape": {"44": (8, 1)}}, ValueError, r"expected block_shape to match .*, got '44'; near matches: 4"),
        ({"importance": lambda w, b: w}, ValueError, r"importance scores of shape \(2, 144\) for layer '2', got \(32"),
        ({"layers": ["22"]}, ValueError, r"prune_: expected layers to match .*, got '22'; near matches: 2"),
        (
            {"exclude": ["conv*"]},
            ValueError,
            r"expected exclude to match Conv2d or Linear layers, got 'conv\*'",
        ),
        ({"layers": ["1"]}, ValueError, r"expected layers to name Conv2d or Linear layers, got '1', which is a ReLU"),
        ({"layers": [3]}, TypeError, r"prune_: expected layers to hold layer names or patterns, got 3"),
        ({"layers": "2", "exclude": "2"}, ValueError, r"expected at least one Conv2d or Linear to prune, got none"),
        ({"block_shape": (16, 0)}, ValueError, r"expected block_shape"),
    ],
)
def test_bad_input_raises_and_changes_nothing(kwargs, error, message):
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        prune_(net, **kwargs)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_weights_that_cannot_be_masked_raise():
    net = small_net()
    with torch.no_grad():
        net[4].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"prune_: expected finite importance in layer '4', got NaN or infinity"):
        prune_(net, 0.5)
    assert masks(net) == {}

    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"weight of layer '0' to be its own, got one shared by \['0', '1'\]"):
        prune_(net, 0.5, layers=["0", "1"])

    net = small_net()
    torch_prune.l1_unstructured(net[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune_: expected the weight of layer '2' to be a Parameter"):
        prune_(net, 0.5)

    net = small_net()
    torch.nn.utils.parametrizations.weight_norm(net[2])
    with pytest.raises(ValueError, match=r"expected no parametrization but a BlockMask on .* '2', got \['_Weig"):
        prune_(net, 0.5)

    with pytest.raises(ValueError, match=r"layer '' to be a Parameter, got one that is computed .* or not initialised"):
        prune_(nn.LazyConv2d(8, 3), 0.5, skip_first=False)
    with pytest.raises(TypeError, match=r"prune_: expected model to be an nn.Module, got Tensor"):
        prune_(torch.zeros(3), 0.5)


def test_another_block_shape_on_a_masked_layer_raises():
    net = prune_(small_net(), 0.5, (16, 1))
    with pytest.raises(ValueError, match=r"expected block_shape \(16, 1\) of the mask on layer '2', got \(8, 1\)"):
        prune_(net, 0.75, (8, 1))
    prune_(finalize_(net), 0.75, (8, 1))
    assert masks(net)["2"].block_shape == (8, 1)


def test_finalize_refuses_a_stacked_parametrization_and_changes_nothing():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = prune_(small_net(), 0.5, (16, 1))
    parametrize.register_parametrization(net[4], "weight", Double())
    with pytest.raises(ValueError, match=r"finalize_: expected no parametrization but a BlockMask .* '4', got"):
        finalize_(net)
    assert set(masks(net)) == {"2", "4", "7"} and isinstance(net[2].parametrizations.weight[0], BlockMask)


def test_finalizing_leaves_parameters_in_their_order():
    """Optimisers and hand-written averages go through parameters by place."""
    net = small_net()
    before = [(name, id(parameter)) for name, parameter in net.named_parameters()]
    finalize_(prune_(net, 0.5, (8, 1)))
    assert [(name, id(parameter)) for name, parameter in net.named_parameters()] == before
    assert list(net.state_dict()) == [name for name, _ in before]


def test_finalizing_a_copy_leaves_the_original_masked():
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 32, 3))
    prune_(model, sparsity=0.5, block_shape=(16, 1))
    copied = finalize_(copy.deepcopy(model))
    assert masks(model) and not masks(copied)
    assert torch.equal(model[1].weight, copied[1].weight)
    finalize_(model)
    assert type(model[1]) is nn.Conv2d and torch.equal(model[1].weight, copied[1].weight)


@settings(max_examples=60, deadline=None)
@given(
    c_out=st.integers(1, 20),
    c_in=st.integers(1, 12),
    kernel=st.sampled_from([None, (1, 1), (3, 3), (2, 3)]),
    block=st.tuples(st.sampled_from([1, 3, 8, 64]), st.sampled_from([1, 2, 5, 16])),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 2**16),
)
def test_units_cover_each_weight_once_and_agree_with_their_mask(c_out, c_in, kernel, block, granularity, seed):
    """sums() against a mask of a single unit, for every unit: what the mask keeps is what the sum adds."""
    shape = (c_out, c_in) if kernel is None else (c_out, c_in, *kernel)
    units = Units.of(shape, block, granularity)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    sums, sizes = units.sums(weight), units.sizes()
    assert tuple(sums.shape) == units.shape and int(sizes.sum()) == weight.numel()
    for index in torch.randint(math.prod(units.shape), (3,), generator=generator).tolist():
        one = torch.zeros(math.prod(units.shape), dtype=torch.bool)
        one[index] = True
        one = one.view(units.shape)
        keep = expand_mask(units.to_blocks(one), shape, units.block_shape)
        assert torch.equal(units.from_blocks(units.to_blocks(one)), one)
        assert int(keep.sum()) == int(sizes[one])
        torch.testing.assert_close(weight[keep].sum(), sums[one].sum(), rtol=1e-12, atol=1e-12)
        copied = weight.clone()
        zero_masked_(copied, BlockMask(units.to_blocks(one), shape, units.block_shape))
        assert torch.equal(copied, torch.where(keep, weight, 0.0))
        zero_masked_(weight := weight.clone(), BlockMask(units.to_blocks(one), shape, units.block_shape), finite=True)
        assert torch.equal(copied, weight)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        sums = units.sums(weight)


@pytest.mark.parametrize("shape", [(32, 12, 3, 3), (32, 12, 1, 1), (16, 24, 2, 3), (30, 12, 3, 3), (32, 12)])
@pytest.mark.parametrize("block", [(16, 1), (8, 4), (16, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_a_mask_hides_the_same_weights_in_every_layout(shape, block, layout):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 4 and layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "neither":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    mask = BlockMask(torch.rand(block_grid(shape, block)) < 0.4, shape, block)
    expected = torch.where(expand_mask(mask.mask, shape, block), weight, 0.0)
    gradient = torch.autograd.grad(mask(weight.requires_grad_()).sum(), weight)[0]
    assert torch.equal(gradient, expand_mask(mask.mask, shape, block).float())
    with torch.no_grad():
        assert torch.equal(mask(weight), expected) and mask(weight).shape == weight.shape
        if layout != "neither" and shape[0] % block[0] == 0:
            assert mask(weight).is_contiguous() == weight.is_contiguous()
        zero_masked_(weight, mask, finite=True)
        assert torch.equal(weight, expected)
        weight.fill_(torch.nan)
        zero_masked_(weight, mask)
        assert torch.equal(weight == 0, expected == 0)


def test_shared_taps_share_one_mask_that_keeps_the_strongest_positions():
    conv = seeded(nn.Conv2d(12, 32, 3, bias=False))
    dense = conv.weight.detach().clone()
    prune_(conv, 0.75, (16, 4), granularity="block_shared_taps", skip_first=False)
    mask = masks(conv)[""].mask.view(2, 9, 3)
    assert torch.equal(mask, mask[:, :1].expand_as(mask)) and int(mask[:, 0].sum()) == 2
    norms = dense.view(2, 16, 3, 4, 9).square().sum((1, 3, 4))
    assert torch.equal(mask[:, 0], norms >= norms.flatten().topk(2).values[-1])


def test_shared_taps_with_equal_scores_never_empty_a_layer():
    conv = nn.Conv2d(4, 8, 3, bias=False)
    nn.init.constant_(conv.weight, 0.5)
    prune_(conv, 0.99, (8, 1), granularity="block_shared_taps", skip_first=False)
    mask = masks(conv)[""].mask.view(9, 4)
    assert mask.tolist() == [[False, False, False, True]] * 9


def test_channels_are_whole_filters_and_rows():
    net = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 64)))
    prune_(net, 0.25, granularity="channel", layers=["0", "1", "3"])
    for layer, count in ((net[0], 2), (net[1], 4), (net[3], 16)):
        dense = original(layer).flatten(1)
        dead = (dense == 0).all(1)
        assert int(dead.sum()) == count and bool((dense[~dead] != 0).all())
    prune_(net, 0.5, granularity="channel", layers=["1"])
    assert int((net[1].weight.flatten(1) == 0).all(1).sum()) == 8
    assert finalize_(net)[1].weight.eq(0).float().mean() == 0.5


def test_elements_are_the_smallest_weights_whatever_the_block_shape():
    net = small_net()
    dense = net[2].weight.detach().clone()
    prune_(net, 0.4, (16, 1), granularity="element")
    found = masks(net)["2"]
    assert found.block_shape == (1, 1)
    threshold = dense.abs().flatten().sort().values[math.floor(0.4 * dense.numel() + 1e-9) - 1]
    assert torch.equal(net[2].weight == 0, dense.abs() <= threshold)


@pytest.mark.parametrize(
    ("asked", "given"), [((128, 16), (32, 16)), ((24, 1), (24, 1)), ((128, 128), (32, 16)), ((40, 1), (32, 1))]
)
def test_a_block_larger_than_the_layer_is_cut_to_cover_it(asked, given):
    conv = seeded(nn.Conv2d(10, 30, 3))
    prune_(conv, 0.5, asked, skip_first=False)
    mask = masks(conv)[""]
    assert mask.block_shape == given
    blocks = math.prod(block_grid(conv.weight.shape, asked))
    assert mask.mask.numel() == blocks and int((~mask.mask).sum()) == blocks // 2
    prune_(conv, 0.75, asked, skip_first=False)  # the shape asked for again names the same mask
    assert int((~masks(conv)[""].mask).sum()) == math.floor(0.75 * blocks)


def test_block_shapes_by_layer_and_sparsity_in_weights():
    net = small_net()
    prune_(net, 0.5, {"*": (16, 1), "4": (8, 2)})
    assert {name: mask.block_shape for name, mask in masks(net).items()} == {"2": (16, 1), "4": (8, 2), "7": (16, 1)}
    zeros = sum(int((net.get_submodule(name).weight == 0).sum()) for name in masks(net))
    total = sum(net.get_submodule(name).weight.numel() for name in masks(net))
    assert mask_sparsity(net) == pytest.approx(zeros / total)
    assert mask_sparsity(nn.Linear(2, 2)) == 0.0


def test_scores_given_by_layer_decide():
    net = small_net()
    scores = {name: torch.rand(Units.of(net[int(name)].weight.shape, (8, 1), "block").shape) for name in ("2", "4")}
    prune_(net, 0.5, (8, 1), layers=["2", "4"], importance=scores)
    for name, score in scores.items():
        kept = masks(net)[name].mask
        assert score[kept].min() >= score[~kept].max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_converts_and_keeps_the_outputs(granularity, tmp_path):
    import slimkernels as sk

    net = small_net().eval()
    prune_(net, 0.5, (16, 1), granularity=granularity)
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    fast = sk.convert(net, x, policy=sk.Policy(measure=False, min_speedup=0, backend="reference", check_model=False))
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-3)
    assert "2" in fast.slimkernels_plan.swapped
    sk.save(fast, tmp_path / "net.slim.safetensors")
    again = sk.load(tmp_path / "net.slim.safetensors", into=small_net())
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_torchvision_models_prune_train_and_finalize(name):
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(num_classes=10)
    if name == "vgg11":
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    prune_(net, 0.75, (32, 4), granularity="block_shared_taps")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(masks(net)) == len(convs) - 1
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    nn.functional.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
    optimizer.step()
    finalize_(net)
    zeros = sum(int((conv.weight == 0).sum()) for conv in convs[1:])
    assert zeros == pytest.approx(0.75 * sum(conv.weight.numel() for conv in convs[1:]), rel=0.01)
