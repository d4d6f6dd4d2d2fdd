"""convert: what it returns computes the same, leaves the original alone, and composes with the rest of torch."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from conversion_models import (
    BACKEND,
    FORCE,
    Tiny,
    assert_same_function,
    force,
    images,
    sparse_tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from slimkernels import Policy, convert, explain
from slimkernels.conversion.finish import EvalGuard
from slimkernels.formats import BlockMask, block_mask
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear


# What a converted model is: its layers, its function
def test_swaps_folds_and_fuses() -> None:
    model = sparse_tiny()
    fast = convert(model, policy=FORCE)
    assert type(fast) is Tiny and not fast.training
    kinds = [type(module).__name__ for module in fast.features]
    assert kinds == [
        "BlockSparseConv2d", "Identity", "Identity",
        "BlockSparseConv2d", "Identity", "Identity", "Identity",
        "BlockSparseConv2d", "Identity",
    ]  # fmt: skip
    assert [m.epilogue for m in fast.modules() if isinstance(m, BlockSparseConv2d)] == ["relu", "relu_maxpool2", "relu"]
    assert isinstance(fast.classifier[0], BlockSparseLinear) and fast.classifier[0].epilogue == "relu"
    assert_same_function(fast, model, images())
    plan = explain(fast).plan
    assert plan["features.4"].action == "fold" and plan["features.4"].into == "features.3"
    assert plan["features.6"].action == "fuse" and plan["features.6"].into == "features.3"
    assert plan["features.3"].block_sparsity > 0.5 and plan["features.3"].weight_shape == (32, 16, 3, 3)


@settings(max_examples=15)
@given(seed=st.integers(0, 50), size=st.integers(4, 17), n=st.integers(0, 3))
def test_computes_the_same_on_random_models_and_sizes(seed: int, size: int, n: int) -> None:
    model = sparse_tiny(seed)
    fast = convert(model, policy=FORCE)
    x = images(n, size=size, seed=seed)
    if n == 0:
        assert fast(x).shape == (0, 10)
    else:
        assert_same_function(fast, model, x)


def test_computes_the_same_after_training() -> None:
    model = sparse_tiny()
    masks = {n: m.weight != 0 for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = images(16), torch.arange(16) % 10
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_submodule(name).weight.mul_(mask)
    assert_same_function(convert(model, policy=FORCE), model, images())


def test_any_memory_format_in_and_channels_last_inside() -> None:
    fast = convert(sparse_tiny(), policy=force(exclude=("features.0",)))
    seen = []
    fast.features[7].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    a = fast(images())
    b = fast(images().contiguous(memory_format=torch.channels_last))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_kept_convolutions_beside_sparse_ones_hold_channels_last_weights() -> None:
    model = sparse_tiny()
    fast = convert(model, policy=force(dense_layers=False))
    assert type(fast.features[0]) is nn.Conv2d
    assert fast.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert explain(fast).plan["features.0"].channels_last
    assert_same_function(fast, model, images())


def test_original_is_untouched() -> None:
    model = sparse_tiny().train()
    model.classifier[0].register_forward_hook(lambda *a: None)
    prune.l1_unstructured(model.features[7], "weight", 0.5)
    parametrize.register_parametrization(
        model.features[3], "weight", BlockMask(block_mask(model.features[3].weight, (16, 1)), (32, 16, 3, 3), (16, 1))
    )
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    modules = {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    for kwargs in ({"policy": FORCE}, {"example_inputs": images()}, {"policy": FORCE, "training": True}):
        convert(model, **kwargs)
    assert torch.equal(rng, torch.get_rng_state())
    after = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert modules == {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(model.classifier[0]._forward_hooks) == 1
    assert "train" not in vars(model) and model.train().training


def test_example_inputs_are_untouched() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 16, 3))
    x = images()
    before = x.clone()
    convert(model, x, policy=Policy(repeats=1, budget_s=0))
    assert torch.equal(x, before)


def test_train_on_the_result_warns_once() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.eval()
    with pytest.warns(UserWarning, match="converted for inference"):
        assert fast.train() is fast
    assert fast.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.train().eval()
    assert not fast.training


def test_training_conversion_trains_the_stored_values() -> None:
    model = sparse_tiny().train()
    fast = convert(model, policy=FORCE, training=True)
    assert fast.training and not isinstance(vars(fast).get("train"), EvalGuard)
    assert type(fast.features[1]) is nn.BatchNorm2d and type(fast.features[2]) is nn.ReLU
    layer = fast.features[3]
    assert isinstance(layer, BlockSparseConv2d) and layer.values.requires_grad and layer.epilogue == "none"
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    x, y = images(8), torch.arange(8) % 10
    losses = []
    fast.classifier[2].p = 0.0
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(fast(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    zero = model.features[3].weight == 0
    assert (layer.to_dense().weight[zero] == 0).all()


def test_training_conversion_stores_declared_blocks_that_are_zero() -> None:
    layer = nn.Conv2d(16, 32, 3)
    mask = torch.zeros(2, 9 * 16, dtype=torch.bool)
    mask[:, :40] = True
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 0, 0] = 1.0
    parametrize.register_parametrization(layer, "weight", BlockMask(mask, layer.weight.shape, (16, 1)))
    model = nn.Sequential(layer)
    assert convert(model, policy=FORCE, training=True)[0].col_indices.numel() == 80
    assert convert(model, policy=FORCE)[0].col_indices.numel() == 1


# Using the result
def test_converting_again_keeps_what_is_converted() -> None:
    model = sparse_tiny()
    once = convert(model, policy=FORCE)
    twice = convert(once, policy=FORCE)
    assert_same_function(twice, model, images())
    assert explain(twice).plan["features.4"].into == "features.3"
    assert {layer.name for layer in explain(twice).plan.layers} == {layer.name for layer in explain(once).plan.layers}
    trained = convert(once, policy=FORCE, training=True)
    assert trained.training and trained.features[3].epilogue == "relu_maxpool2"


def test_copies_pickles_and_state_dicts() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    expected = fast(images())
    assert torch.equal(copy.deepcopy(fast)(images()), expected)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(images()), expected) and explain(again).plan == explain(fast).plan
    with pytest.warns(UserWarning, match="converted for inference"):
        again.train()
    assert not fast.training
    other = convert(sparse_tiny(), policy=FORCE)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(images()), expected)


def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    fast = convert(sparse_tiny(), policy=FORCE)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(images()), fast(images()), atol=1e-6)


def test_exports() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    exported = torch.export.export(fast, (images(),))
    assert torch.allclose(exported.module()(images()), fast(images()), atol=1e-6)
    assert any("bsr_conv2d" in str(node.target) for node in exported.graph.nodes)


def test_eight_threads_with_different_shapes() -> None:
    fast = convert(sparse_tiny(), policy=FORCE)
    inputs = [images(1 + i % 3, size=8 + i, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(fast(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_measured_conversion_runs_end_to_end() -> None:
    model = sparse_tiny()
    fast = convert(model, [images(1), (images(3),)], policy=Policy(repeats=1, budget_s=0, backend=BACKEND))
    assert_same_function(fast, model, images(1))
    plan = explain(fast).plan
    assert plan.decided == "measured" and len(plan["features.3"].dense_ms) == 2


def test_measured_training_conversion_times_forward_and_backward() -> None:
    fast = convert(sparse_tiny(), images(), policy=Policy(repeats=1, budget_s=0, backend=BACKEND), training=True)
    assert len(explain(fast).plan["features.3"].dense_ms) == 1 and fast.training


# Errors
def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"^convert: expected an nn\.Module, got int"):
        convert(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^convert: expected a Policy, got dict"):
        convert(nn.Linear(2, 2), policy={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^convert: expected example_inputs to be a tensor.*got int"):
        convert(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"^convert: expected at least one example input, got an empty list"):
        convert(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"^convert: the model does not run on example input 1: "):
        convert(nn.Linear(2, 2), [torch.ones(1, 2), torch.ones(1, 3)])
    with pytest.raises(ValueError, match=r"^convert: expected Policy.exclude to name layers of the model, got 'typo'"):
        convert(nn.Linear(2, 2), policy=Policy(exclude=("typo",)))
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"^convert: expected a model that can be copied, got Linear: "):
        convert(model)


def test_explain_takes_models_plans_and_paths_only() -> None:
    with pytest.raises(ValueError, match=r"^explain: expected a model from slimkernels\.convert, got a plain Linear"):
        explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^explain: expected a converted model, a ModelPlan or a path, got int"):
        explain(3)  # type: ignore[arg-type]
    fast = convert(sparse_tiny(), policy=FORCE)
    report = explain(fast)
    alone = str(explain(report.plan))
    assert alone == str(report).replace("the whole model: stored", "the listed layers: stored")
    assert [row["name"] for row in report.rows] == [layer.name for layer in report.plan.layers]
    stored = sum(t.numel() * t.element_size() for t in fast.state_dict().values())
    assert report.bytes_stored == stored
    text = str(report)
    assert "bsr" in text and "features.3" in text and f"{report.bytes_dense / stored:.2f}x smaller" in text
    import json

    assert json.loads(report.to_json())["bytes_stored"] == stored
