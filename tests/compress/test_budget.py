"""Latency budgets: the knapsack against brute force, the plan against what conversion then sees."""

from __future__ import annotations

import inspect
import itertools
import json
import math

import pytest
import torch
from torch import nn

import slimkernels as sk
from slimkernels.compress.pruning import budget, latency
from slimkernels.compress.pruning.budget import LayerChoice, latency_budget
from slimkernels.compress.pruning.granularity import Units
from slimkernels.compress.pruning.prune import masks, prune_
from slimkernels.conversion.analysis import analyze
from slimkernels.formats import block_norms
from slimkernels.kernels.cpu.library import unavailable_reason

pytestmark = pytest.mark.skipif(unavailable_reason("scalar") is not None, reason="no native kernel is built")

OPTIONS = {"sparsities": (0.5, 0.75, 0.875), "block_shapes": ((16, 1), (32, 1), (16, 4))}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 128),
        nn.ReLU(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_unit_costs_add_up_to_the_predicted_time():
    model = net()
    costs = sk.unit_costs(model, X, (16, 1))
    assert list(costs) == ["2", "5", "9"]

    found, _ = latency.reached_layers("op", model, [((X,), {})], None, None, True)
    for layer in found:
        units = Units.of(layer.weight.weight.shape, (16, 1), "block")
        _, (more, less), (few, many) = budget._Times(False, "auto", (0.25, 0.75)).sparse(layer, units)
        assert more - less == pytest.approx(costs[layer.name] * (many - few), rel=0.02)
    # A block of "2" is multiplied at 256 places of an image, one of "5" at 64, one of "9" at one.
    assert costs["2"] > 3 * costs["5"] > 9 * costs["9"]
    assert sk.unit_costs(model, [X, X], (16, 1)) == pytest.approx({name: 2 * cost for name, cost in costs.items()})
    with pytest.raises(ValueError, match="unit_costs: expected example inputs, got None"):
        sk.unit_costs(model, None)


def test_the_knapsack_is_as_good_as_trying_everything():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ways = []
        for layer in range(4):
            times, losses = torch.rand(2, 5, generator=generator).tolist()
            ways.append([LayerChoice(f"{layer}", 0.0, None, None, 1.0, 1.0, 0.0)])
            ways[-1] += [
                LayerChoice(f"{layer}", 0.5, (8, 1), "k", t, 1.0, v) for t, v in zip(times, losses, strict=True)
            ]
        for seconds in (2.0, 3.0, 3.7, 5.0):
            fitting = [c for c in itertools.product(*ways) if sum(x.seconds for x in c) <= seconds]
            if not fitting:
                continue
            chosen = budget._knapsack("op", ways, seconds, seconds, 4.0)
            assert [c.name for c in chosen] == ["0", "1", "2", "3"]
            assert sum(c.seconds for c in chosen) <= seconds + 1e-9
            slack = 1 - 4 / 4096  # what rounding four times up to whole steps may cost
            best = min(sum(x.lost for x in c) for c in fitting)
            nearly = min(
                (sum(x.lost for x in c) for c in fitting if sum(x.seconds for x in c) <= slack * seconds),
                default=math.inf,
            )
            assert best - 1e-12 <= sum(c.lost for c in chosen) <= nearly + 1e-12


@pytest.mark.parametrize("granularity", ["block", "block_shared_taps"])
def test_the_pruned_model_is_predicted_to_be_as_fast_as_the_plan_says(granularity):
    model = net()
    before = [p.clone() for p in model.parameters()]
    plan = latency_budget(model, X, 2.5, granularity=granularity, **OPTIONS)
    assert plan.speedup >= 2.5 and plan.seconds <= plan.target_s == pytest.approx(plan.dense_s / 2.5)
    assert [layer.name for layer in plan.layers] == ["2", "5", "9"] and not plan.measured
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and masks(model) == {}
    prune_(model, plan.sparsity, plan.block_shapes, granularity=plan.granularity)
    assert {name: mask.block_shape for name, mask in masks(model).items()} == plan.block_shapes
    stats = analyze(model, X)
    for layer in plan.layers:
        if layer.block_shape is None:
            assert not stats[layer.name].sparsity
            continue
        seen = stats[layer.name].patterns[0]
        assert (seen.block_shape, seen.kernel) == (layer.block_shape, layer.kernel)
        assert sum(seen.predicted_s) == pytest.approx(layer.seconds) and sum(seen.dense_s) == pytest.approx(
            layer.dense_s
        )
    fast = sk.convert(model, X, policy=sk.Policy(measure=False))
    assert set(plan.sparsity) <= set(fast.slimkernels_plan.swapped)
    torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


def test_the_price_is_minus_the_log_of_the_energy_kept():
    model = net()
    plan = latency_budget(model, X, 2.5, **OPTIONS)
    for layer in plan.layers:
        if layer.block_shape is None:
            assert layer.lost == 0
            continue
        energy = (
            block_norms(model.get_submodule(layer.name).weight.double(), layer.block_shape)
            .square()
            .flatten()
            .sort()
            .values
        )
        count = math.floor(layer.sparsity * energy.numel())
        assert layer.lost == pytest.approx(-math.log(1 - float(energy[:count].sum() / energy.sum())), rel=1e-4)
    assert plan.lost == pytest.approx(sum(layer.lost for layer in plan.layers)) and plan.lost > 0


def test_a_faster_target_costs_more_and_a_target_of_one_costs_nothing():
    model = net()
    plans = [latency_budget(model, X, target, **OPTIONS) for target in (1.0, 1.5, 2.5, 3.0)]
    assert plans[0].sparsity == {} and plans[0].speedup == pytest.approx(1)
    assert [p.lost for p in plans] == sorted(p.lost for p in plans) and plans[1].lost > 0
    by_time = latency_budget(model, X, 1e3 * plans[2].target_s, unit="ms", **OPTIONS)
    assert by_time.sparsity == plans[2].sparsity and by_time.block_shapes == plans[2].block_shapes


def test_a_precious_layer_is_spared():
    plain = latency_budget(net(), X, 1.2, **OPTIONS)
    first = next(iter(plain.sparsity))
    careful = latency_budget(net(), X, 1.2, weights={first: 1e3}, **OPTIONS)
    assert careful.sparsity.get(first, 0.0) < plain.sparsity[first] and careful.speedup >= 1.2


def test_measured_times_are_taken_at_both_ends_and_interpolated_between(monkeypatch):
    def stored(runs, *, device, repeats, budget_s):
        """A stopwatch that reads 1 ns per stored weight."""
        runs[0]()
        module = inspect.getclosurevars(runs[0]).nonlocals.get("module")
        if module is None:
            return [1e-3]  # the whole model
        values = getattr(module, "values", None)
        return [1e-9 * (module.weight if values is None else values).numel()]

    monkeypatch.setattr(budget.stopwatch, "typical_seconds", stored)
    model = net()
    plan = latency_budget(model, X, 1.03, measure=True, **OPTIONS)
    assert plan.measured and plan.dense_s == 1e-3
    weights = {layer.name: model.get_submodule(layer.name).weight.numel() for layer in plan.layers}
    assert plan.rest_s == pytest.approx(1e-3 - 1e-9 * sum(weights.values()))
    for layer in plan.layers:
        assert layer.dense_s == pytest.approx(1e-9 * weights[layer.name])
        assert layer.seconds == pytest.approx(layer.dense_s * (1 - layer.sparsity))
    assert len({layer.sparsity for layer in plan.layers}) > 1


def test_taylor_prices_are_the_scores_that_go():
    model = net()
    nn.functional.cross_entropy(model(X), torch.arange(4)).backward()
    plan = latency_budget(model, X, 2.0, importance="taylor", block_shapes=[(16, 1)], sparsities=(0.5, 0.875))
    name = next(iter(plan.sparsity))
    weight = model.get_submodule(name).weight
    products = weight.detach() * weight.grad
    if products.dim() == 4:
        products = products.permute(0, 2, 3, 1).reshape(len(weight), -1)
    scores = products.view(-1, 16, products.shape[1]).sum(1).square().flatten().sort().values.double()
    lost = next(layer.lost for layer in plan.layers if layer.name == name)
    assert lost == pytest.approx(float(scores[: int(plan.sparsity[name] * len(scores))].sum()), rel=1e-4)


def test_the_plan_prints_and_serialises():
    plan = latency_budget(net(), X, 2.0, **OPTIONS)
    text = str(plan)
    assert text.count("\n") == 4 and "predicted" in text and "target" in text
    assert json.loads(json.dumps(plan.to_json()))["speedup"] == pytest.approx(plan.speedup)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target": 1000.0},
            r"latency_budget: expected a target that can be reached, got .* ms \(1e\+03x\); the fastest",
        ),
        ({"target": 0}, r"latency_budget: expected target to be a positive number, got 0"),
        ({"target": 2.0, "unit": "s"}, r"expected unit 'speedup' or 'ms', got 's'"),
        ({"target": 2.0, "granularity": "channel"}, r"expected granularity 'block' or 'block_shared_taps', got 'ch"),
        ({"target": 2.0, "sparsities": (0.5, 1.0)}, r"expected sparsities in \[0, 1\), got 1.0"),
        ({"target": 2.0, "sparsities": ()}, r"expected at least one sparsity above 0 and one block shape, got \(\)"),
        ({"target": 2.0, "example_inputs": None}, r"latency_budget: expected example inputs, got None"),
        ({"target": 2.0, "weights": {"3": 1.0}}, r"latency_budget: expected weights of prunable layers, got '3'"),
        ({"target": 2.0, "layers": "nine"}, r"latency_budget: expected layers to match .*, got 'nine'"),
        (
            {"target": 2.0, "backend": "cuda"},
            r"that some kernel runs faster than dense, got none on 'cuda'",
        ),
        ({"target": 2.0, "importance": {}}, r"expected importance by name or a callable, .* got a dict"),
        ({"target": 2.0, "importance": "taylor"}, r"latency_budget: expected a gradient on the weight of layer '2'"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        latency_budget(**{"model": net(), "example_inputs": X, **OPTIONS, **arguments})
