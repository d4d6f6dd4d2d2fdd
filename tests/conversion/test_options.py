"""The decision of each layer and of the whole model: chains of thin layers, stopwatch, cost model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conversion_models import (
    BACKEND,
    FORCE,
    Clock,
    assert_same_function,
    block_sparse_,
    force,
    images,
    randomize_batch_norm_,
    sparse_tiny,
)
from precision import fp32_precision
from torch import Tensor, nn

from slimkernels import Policy, convert, explain, graphed
from slimkernels.conversion import candidates, decide, measure
from slimkernels.conversion.folding import Tail
from slimkernels.conversion.layers import LayerWeight
from slimkernels.conversion.units import drop_in_plan
from slimkernels.kernels import KERNELS, cuda_tensor_cores
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d, LowRankLinear


# Chains of thin layers and low-rank modules
def chains() -> dict[str, tuple[nn.Sequential, Tensor, type[nn.Module], str]]:
    image = images(channels=12)
    return {
        "linear": (nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 24)), torch.randn(5, 32), LowRankLinear, "svd"),
        "svd": (nn.Sequential(nn.Conv2d(12, 4, 3, 2, 1, 2), nn.Conv2d(4, 20, 1)), image, LowRankConv2d, "svd"),
        "tai": (
            nn.Sequential(
                nn.Conv2d(12, 5, (3, 1), (2, 1), (1, 0), bias=False), nn.Conv2d(5, 20, (1, 5), (1, 1), (0, 2))
            ),
            image,
            LowRankConv2d,
            "tai",
        ),
        "tai_bias_without_padding": (
            nn.Sequential(nn.Conv2d(12, 5, (3, 1)), nn.Conv2d(5, 20, (1, 3), dilation=(1, 2))),
            image,
            LowRankConv2d,
            "tai",
        ),
        "tucker2": (
            nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 20, 1)),
            image,
            LowRankConv2d,
            "tucker2",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", chains())
@pytest.mark.parametrize("merge", [False, True])
def test_a_chain_becomes_one_layer_or_dense(name: str, merge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x, cls, kind = chains()[name]
    model = nn.Sequential(*chain, nn.ReLU()) if x.dim() == 2 else nn.Sequential(*chain, nn.BatchNorm2d(20), nn.ReLU())
    randomize_batch_norm_(model)
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5], merged=0.4 if merge else 0.8))
    fast = convert(model, x)
    first = fast[0]
    if merge:
        assert type(first) in (nn.Conv2d, nn.Linear) and type(fast[len(model) - 1]) is nn.ReLU
    else:
        assert isinstance(first, cls) and first.epilogue == "relu" and getattr(first, "kind", "svd") == kind
        assert type(fast[len(model) - 1]) is nn.Identity
    assert all(type(fast[i]) is nn.Identity for i in range(1, len(chain)))
    plan = explain(fast).plan
    assert plan["1"].action == "fold" and plan["1"].into == "0"
    assert f"{2.5 if merge else 2:.2f}x the speed of the chain" in plan["0"].reason
    assert_same_function(fast, model, x)


NOT_CHAINS = {
    "bias_before_padding": nn.Sequential(
        nn.Conv2d(12, 5, (3, 1), padding=(1, 0)), nn.Conv2d(5, 20, (1, 3), padding=(0, 1))
    ),
    "horizontal_first": nn.Sequential(nn.Conv2d(12, 5, (1, 3), bias=False), nn.Conv2d(5, 20, (3, 1))),
    "not_thin": nn.Sequential(nn.Conv2d(12, 40, 1), nn.Conv2d(40, 20, 1)),
    "two_3x3": nn.Sequential(nn.Conv2d(12, 2, 3), nn.Conv2d(2, 20, 3)),
    "strided_1x1": nn.Sequential(nn.Conv2d(12, 4, 3), nn.Conv2d(4, 20, 1, stride=2)),
    "relu_between": nn.Sequential(nn.Conv2d(12, 4, 3), nn.ReLU(), nn.Conv2d(4, 20, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CHAINS)
def test_other_layers_are_no_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NOT_CHAINS[name]
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.1]))
    fast = convert(model, images(channels=12))
    assert not any(isinstance(m, LowRankConv2d) for m in fast.modules())
    assert_same_function(fast, model, images(channels=12))


def test_a_slow_chain_stays_and_chains_are_not_touched_without_shapes() -> None:
    chain, x, *_ = chains()["svd"]
    fast = convert(chain, policy=Policy())
    assert [type(m) for m in fast] == [nn.Conv2d, nn.Conv2d]
    assert "decided without shapes" in explain(fast).plan["0"].reason
    assert_same_function(fast, chain, x)


def test_low_rank_modules_keep_their_rank_or_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(32, 24)
    conv = LowRankConv2d.from_factors(
        [torch.randn(4, 12, 3, 1), torch.randn(20, 4, 1, 3)], torch.randn(20), kind="tai", padding=1
    )
    model = nn.Sequential(conv, nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 32, bias=False))
    model.append(LowRankLinear.from_dense(linear, 4))
    randomize_batch_norm_(model)
    x = images(channels=12, size=6)
    fast = convert(model)
    assert isinstance(fast[0], LowRankConv2d) and fast[0].epilogue == "relu" and type(fast[1]) is nn.Identity
    assert isinstance(fast[5], LowRankLinear)
    assert_same_function(fast, model, x)
    for seconds, kind in (([1.0, 1.0], LowRankConv2d), ([1.0, 1.5], nn.Conv2d)):
        monkeypatch.setattr(measure, "typical_seconds", Clock(seconds[:1], seconds[1:]))
        fast = convert(model, x)
        assert type(fast[0]) is kind
        assert_same_function(fast, model, x)


# Decisions
def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    block_sparse_(model[0])
    return model


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
@pytest.mark.parametrize(
    ("dense", "sparse", "swapped"),
    [([1.0, 1.0], [0.5, 0.9], True), ([1.0, 1.0], [0.1, 0.96], False), ([1.0, 1.0], [1.2, 0.1], False)],
)
def test_a_layer_is_swapped_only_where_it_is_faster_at_every_input(
    dense: list[float], sparse: list[float], swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "typical_seconds", Clock(dense, sparse))
    fast = convert(one_layer(), [images(1, 16), images(4, 16)])
    assert isinstance(fast[0], BlockSparseConv2d) == swapped
    layer = explain(fast).plan["0"]
    assert layer.dense_ms == (1000.0, 1000.0) and layer.sparse_ms == pytest.approx([1000 * s for s in sparse])
    rules = {
        0.9: "measured 1.11x the speed of dense at the least favourable input",
        0.96: "too small a gain over dense: 1000 ms against 960 ms, 1.04x at the least favourable input; "
        "Policy.min_speedup asks for 1.05x",
        1.2: "dense is as fast or faster: 1000 ms against 1200 ms at the least favourable input",
    }
    assert layer.reason == rules[max(sparse)]
    assert layer.speedup_low == layer.speedup_high == pytest.approx([d / s for d, s in zip(dense, sparse, strict=True)])
    assert explain(fast).plan.decided == "measured"


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
@pytest.mark.parametrize(
    ("whole", "swapped"), [([3.0, 2.0, 1.9], True), ([3.0, 2.0, 2.1], False), ([2.0, 3.0, 2.1], False)]
)
def test_a_slower_whole_model_stays_dense(whole: list[float], swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5], whole))
    fast = convert(model, images(1, 16))
    assert isinstance(fast[0], BlockSparseConv2d) == swapped
    report = explain(fast)
    assert report.plan.dense_ms == (2000.0,)
    if swapped:
        assert "1.05x faster" in str(report)
    else:
        assert "the whole model is not faster" in report.plan["0"].reason and report.plan.converted_ms == ()
        relaid = fast[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert relaid == (whole[1] <= whole[0])
    assert_same_function(fast, model, images(1, 16))


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
@pytest.mark.parametrize(
    ("sparse", "whole", "swapped"),
    [
        ([0.5, 1.2], [3.0, 2.0, 1.9, 1.0], 2),
        ([0.5, 1.2], [3.0, 2.0, 1.9, 1.95], 1),
        ([1.2, 1.2], [3.0, 2.0, 2.0, 1.0], 2),
        ([1.2, 1.2], [3.0, 2.0, 2.0, 2.1], 0),
    ],
)
def test_a_layer_that_is_slower_alone_is_swapped_where_the_whole_model_is_faster_so(
    sparse: list[float], whole: list[float], swapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1))
    for layer in (model[0], model[2]):
        block_sparse_(layer)
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0, 1.0], sparse, whole))
    fast = convert(model, images(1, 16))
    assert sum(isinstance(layer, BlockSparseConv2d) for layer in fast) == swapped
    plan = explain(fast).plan
    assert plan.converted_ms == {2: (1000.0,), 1: (1900.0,), 0: ()}[swapped]
    words = f"among its neighbours it is swapped: the whole model is {whole[2] / whole[3]:.2f}x as fast so"
    assert [words in plan[name].reason for name in ("0", "2")] == [swapped == 2 and s > 1 for s in sparse]
    assert_same_function(fast, model, images(1, 16))


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
def test_the_whole_model_is_timed_as_it_will_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``serve`` makes of the model as it was, of its relaid twin and of the converted one is what is called."""
    served: list[Any] = []
    called: list[int] = []

    def serve(model: nn.Module, inputs: list[Any]) -> Any:
        assert len(inputs) == 1 and len(inputs[0]) == 1 and inputs[0][0].shape == images(1, 16).shape
        served.append(model)
        number = len(served)

        def call(*args: Any) -> Any:
            called.append(number)
            return model(*args)

        return call

    clock = Clock([1.0], [0.5], [3.0, 2.0, 1.9])

    def typical_seconds(runs: Any, **options: Any) -> Any:
        if len(runs) == 3:  # the whole model
            for run in runs:
                run()
        return clock(runs, **options)

    monkeypatch.setattr(measure, "typical_seconds", typical_seconds)
    fast = convert(one_layer(), images(1, 16), policy=Policy(serve=serve))
    assert [type(model[0]) for model in served] == [nn.Conv2d, nn.Conv2d, BlockSparseConv2d] and called == [1, 2, 3]
    assert "the whole model was timed as Policy.serve serves it" in explain(fast).plan.notes
    with pytest.raises(ValueError, match=r"^Policy: expected serve to be a function or None, got 'graphed'"):
        Policy(serve="graphed")


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
def test_graphed_serves() -> None:
    fast = convert(one_layer(), images(1, 16), policy=Policy(serve=graphed, min_speedup=0, repeats=1, budget_s=0))
    assert len(explain(fast).plan.dense_ms) == 1


def test_a_converted_model_that_differs_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    wrong = BlockSparseConv2d.from_dense

    def broken(*args: Any, **kwargs: Any) -> BlockSparseConv2d:
        module = wrong(*args, **kwargs)
        with torch.no_grad():
            module.values[0] += 1
        module.prepack()
        return module

    monkeypatch.setattr(BlockSparseConv2d, "from_dense", broken)
    fast = convert(model, images(1, 16), policy=Policy(min_speedup=0, repeats=1, budget_s=0, backend=BACKEND))
    assert type(fast[0]) is nn.Conv2d and "output at example input 0 differs" in explain(fast).plan["0"].reason
    assert torch.equal(fast(images(1, 16)), model(images(1, 16)))


@pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")
def test_a_dense_layer_is_swapped_only_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    assert type(convert(model)[0]) is nn.Conv2d
    monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5]))
    fast = convert(model, images())
    assert isinstance(fast[0], BlockSparseConv2d) and "every block stored" in explain(fast).plan["0"].reason
    assert type(convert(model, images(), policy=Policy(dense_layers=False))[0]) is nn.Conv2d


def test_without_inputs_the_report_says_so() -> None:
    report = explain(convert(sparse_tiny(), policy=Policy(backend=BACKEND)))
    assert report.plan.decided == "cost model, without shapes"
    assert "decided without shapes" in report.plan["features.3"].reason


def test_a_layer_that_the_inputs_do_not_reach_stays() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    fast = convert(Unused(), torch.randn(2, 16), policy=FORCE)
    assert type(fast.b) is nn.Linear and "do not reach it" in explain(fast).plan["b"].reason


def test_excluded_layers_stay() -> None:
    fast = convert(sparse_tiny(), policy=force(exclude=("features.3", "classifier")))
    assert type(fast.features[3]) is nn.Conv2d and type(fast.classifier[0]) is nn.Linear
    assert type(fast.features[4]) is nn.BatchNorm2d and isinstance(fast.features[7], BlockSparseConv2d)
    assert explain(fast).plan["classifier.0"].reason == "excluded by the policy"


def test_a_kernel_that_only_a_measurement_can_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are timed in CUDA graphs, a module by its name stands beside the one on `auto`; nowhere else."""
    name = cuda_tensor_cores.NAME
    here = dataclasses.replace(KERNELS[name], devices=frozenset({"cpu", "cuda"}), available=lambda: None)
    monkeypatch.setitem(KERNELS, name, here)
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: cuda_tensor_cores.Limits(True, 227 * 1024, 132))
    conv = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False).eval()
    conv.weight[:16] = 0
    assert conv.bias is not None
    weight = LayerWeight(conv.weight, conv.bias, (1, 1), (1, 1))
    calls: Any = ((object(),),)
    unit = candidates.Unit(("conv",), weight, None, [conv], Tail(), calls)
    policy = Policy(serve=graphed, block_shapes=((16, 16),))
    sizes = [(2, 16, 8, 8)]

    def kernels(policy: Policy) -> list[str]:
        options, _ = candidates.block_sparse_options(unit, policy, sizes)
        return [module.kernel for option in options for module in option.modules]  # type: ignore[misc]

    with fp32_precision("tf32"):  # the CPU has no kernel for 16 bits
        assert kernels(policy) == ["auto"]  # timed by calls
        monkeypatch.setattr(candidates, "times_graphs", lambda unit, policy: True)
        assert kernels(policy) == ["auto", name]
        asked = "cpu" if BACKEND == "auto" else BACKEND
        assert len(kernels(dataclasses.replace(policy, backend=asked))) == 1
        options, _ = candidates.block_sparse_options(unit, policy, sizes)
        assert [decide._label(option) for option in options] == [
            "the candidate of (16, 16) blocks", f"the candidate of (16, 16) blocks by {name}"
        ]  # fmt: skip
        plan = drop_in_plan("conv", options[1].modules[0], "measured")
        assert plan.tied and plan.kernel == name and not drop_in_plan("conv", options[0].modules[0], "measured").tied
    with fp32_precision("ieee"):
        assert kernels(policy) == ["auto"]  # it refuses the layer
