"""`graphed(one_launch=True)`: which layers run in one launch, that they are the model's, and what it refuses.

The launches run in the CPU emulation, or on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_stand_in import close, layers_of_launches, only, place
from torch import Tensor, nn

from slimkernels import graphed
from slimkernels.inference import cuda_graph
from slimkernels.inference.cuda_graph import GraphRecording
from slimkernels.inference.one_launch import OneLaunch
from slimkernels.kernels import cuda, cuda_chain
from slimkernels.nn import BlockSparseConv2d
from slimkernels.nn.chained import ChainedSequential

__all__ = ["place"]  # a fixture, which its users name

BF16 = torch.bfloat16


def layer(c_in: int, c_out: int, epilogue: str = "relu", block: tuple[int, int] = (32, 16)) -> BlockSparseConv2d:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1).to(BF16)
    keep = torch.rand(-(-c_out // block[0]), 9 * -(-c_in // block[1])) < 0.5
    return BlockSparseConv2d.from_dense(conv, block, keep, epilogue).requires_grad_(False)


class Network(nn.Module):
    """A dense layer, two stages of block-sparse ones and a classifier, as a converted network has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = ChainedSequential(
            nn.Conv2d(8, 32, 3, padding=1), layer(32, 64), nn.Identity(), layer(64, 64, "relu_maxpool2"),
            nn.Sequential(layer(64, 32), nn.Dropout()), nn.Conv2d(32, 32, 1), layer(32, 32), nn.ReLU(),
            nn.Sequential(layer(32, 32, "none"), layer(32, 64)),
        )  # fmt: skip
        self.alone = layer(64, 32)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(32 * 9, 10))
        self.to(BF16).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.alone(self.features(x)))
        return y


RUNS = ["features.1 to features.4.0 (3 layers)", "features.8.0 to features.8.1 (2 layers)"]
REASONS = {"features.6": "no other such layer stands next to it", "alone": "it is in no nn.Sequential"}


def network(place: str) -> Network:
    return Network().to(place)


def images(n: int, place: str) -> Tensor:
    return torch.randn(n, 8, 6, 7, generator=torch.Generator().manual_seed(n)).to(place, BF16)


def test_runs_of_layers_are_one_launch(place: str):
    model = network(place)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    fast = graphed(model, images(2, place), one_launch=True)
    recording = only(fast)
    assert recording.in_one_launch == RUNS and recording.reasons == REASONS
    assert repr(recording) in repr(fast) and all(run in repr(fast) for run in RUNS)
    assert "not in one launch: features.6: no other such layer" in repr(fast)
    for seed in (2, 12):
        x = images(2, place) * seed
        assert close(fast(x), model(x))
    # The model is what it was.
    assert dict(model.named_modules()) == modules and fast.model is model
    assert type(model.features) is ChainedSequential and "parts" not in model.features.__dict__
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_launches_are_those_of_the_chain(place: str, monkeypatch: pytest.MonkeyPatch):
    launched = layers_of_launches(monkeypatch)
    graphed(network(place), images(1, place), one_launch=True, warm_up_calls=1)
    assert launched == [3, 2] * 2  # the warm-up's and the captured ones
    launched.clear()
    graphed(network(place), images(1, place), one_launch=False)
    assert launched == []


# Plain, in one launch, and overlapping.
TIMES = {"in one launch": (2e-5, 1e-5, 1.5e-5), "overlapping": (2e-5, 1.5e-5, 1e-5), "plain": (1e-5, 2e-5, 3e-5)}


@pytest.mark.parametrize("fastest", TIMES)
def test_auto_takes_the_fastest(fastest: str, place: str, monkeypatch: pytest.MonkeyPatch):
    times, configs = iter(TIMES[fastest]), []
    monkeypatch.setattr(GraphRecording, "seconds", lambda self: next(times))
    launch = cuda_chain.launch_chain

    def noted(x: Tensor, layers: Any, config: Any, plan_of: Any) -> Tensor:
        configs.append(dict(config))
        return launch(x, layers, config, plan_of)

    monkeypatch.setattr(cuda_chain, "launch_chain", noted)
    model = network(place)
    fast = graphed(model, [images(2, place), images(17, place)], warm_up_calls=1)  # 17 images are not tried
    one, many = fast.recordings.values()
    assert type(many) is GraphRecording and repr(many) == "a CUDA graph" and not list(times)
    assert [c.get("overlap", 0) for c in configs] == sorted(c.get("overlap", 0) for c in configs)
    assert {c.get("overlap", 0) for c in configs} == {0, 1}
    if fastest == "plain":
        said = f"; {', '.join(RUNS)} in one launch would be slower (20.0 us so and 10.0 without)"
        assert type(one) is GraphRecording and repr(one) == f"a CUDA graph{said}"
    else:
        said = ", overlapping," if fastest == "overlapping" else ""
        assert one.in_one_launch == RUNS and f"{RUNS[1]} (10.0 us so{said} and 20.0 without)" in repr(fast)
    for n in (2, 17):
        assert close(fast(images(n, place)), model(images(n, place)))


def test_auto_leaves_out_what_gives_other_outputs(place: str, monkeypatch: pytest.MonkeyPatch):
    launch = cuda_chain.launch_chain
    monkeypatch.setattr(
        cuda_chain, "launch_chain", lambda x, layers, config, plan: 20 * launch(x, layers, config, plan)
    )
    model = network(place)
    with pytest.warns(UserWarning, match=r"^graphed: features.1 to .* in one launch gave other outputs than layer by"):
        fast = graphed(model, images(2, place), warm_up_calls=1)
    assert repr(only(fast)) == f"a CUDA graph; {', '.join(RUNS)} in one launch gave other outputs"
    assert close(fast(images(2, place)), model(images(2, place)))


def test_auto_is_measured(place: str, monkeypatch: pytest.MonkeyPatch):
    if place == "cpu":
        monkeypatch.setattr(cuda_graph, "_REPLAYS", 1)
        monkeypatch.setattr(cuda_graph, "_READINGS", 1)
    fast = graphed(network(place), images(2, place), warm_up_calls=1)
    assert " us so and " in repr(fast) and close(fast(images(2, place)), fast.model(images(2, place)))


def test_auto_without_what_could_be_one_launch_is_a_plain_graph(place: str, monkeypatch: pytest.MonkeyPatch):
    launched = layers_of_launches(monkeypatch)
    for model in (network(place).float(), nn.Sequential(nn.Conv2d(8, 8, 1)).to(place, BF16).eval()):
        x = images(2, place).to(next(model.parameters()).dtype)
        assert repr(only(graphed(model, x, warm_up_calls=1))) == "a CUDA graph"
    monkeypatch.setattr(cuda, "available", lambda: "no such kernel")
    assert repr(only(graphed(network(place), images(2, place)))) == "a CUDA graph" and launched == []


def test_many_images_run_layer_by_layer(place: str):
    model = network(place)
    fast = graphed(model, [images(16, place), images(17, place)], one_launch=True)
    few, many = fast.recordings.values()
    assert few.in_one_launch == RUNS and many.in_one_launch == []
    assert many.reasons == dict.fromkeys(RUNS, "17 images, not 1 to 16") | REASONS
    assert close(fast(images(17, place)), model(images(17, place)))
    # What was written is seen by one and refused by the other.
    model.features[1].values.mul_(2)
    assert close(fast(images(17, place)), model(images(17, place)))
    with pytest.raises(RuntimeError, match=r"^GraphedModel: expected the weights that were recorded, and a layer"):
        fast(images(16, place))


@pytest.mark.parametrize("write", ["values", "bias", "state dict"])
def test_a_weight_that_was_written_is_refused(write: str, place: str):
    model = network(place)
    fast = graphed(model, images(2, place), one_launch=True)
    fast(images(2, place))
    if write == "state dict":
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    else:
        getattr(model.features[8][1], write).add_(1)
    with pytest.raises(RuntimeError, match=r"record it again with graphed\(model, example_inputs, one_launch=True\)"):
        fast(images(2, place))
    fast.device = images(1, place).device  # what stands in for a GPU is the CPU
    with pytest.raises(RuntimeError, match=r"^GraphedModel: expected the weights that were recorded, and the model"):
        fast(images(1, place))  # of another shape: the model itself would answer


def test_a_write_to_another_layer_is_seen(place: str):
    """As in any CUDA graph: no copy of those weights was made."""
    model = network(place)
    fast = graphed(model, images(2, place), one_launch=True)
    before = fast(images(2, place))
    model.alone.values.mul_(-3)
    after = fast(images(2, place))
    assert close(after, model(images(2, place))) and not close(after, before)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES: dict[str, tuple[Callable[[Network], None], list[str], dict[str, str]]] = {
    "a hook on a layer": (
        lambda m: hooked(m.features[3]), RUNS[1:],
        {"features.3": "it has a hook", "features.1": REASONS["features.6"], "features.4.0": REASONS["features.6"]}),
    "a hook in front of an identity": (
        lambda m: m.features[2].register_forward_pre_hook(lambda *_: None),
        ["features.3 to features.4.0 (2 layers)", RUNS[1]], {"features.1": REASONS["features.6"]}),
    "a hook on an inner sequential": (
        lambda m: hooked(m.features[4]), ["features.1 to features.3 (2 layers)", RUNS[1]],
        {"features.4.0": "features.4 has a hook"}),
    "a hook on the sequential": (
        lambda m: hooked(m.features), [],
        {f"features.{n}": "features has a hook" for n in ("1", "3", "4.0", "6", "8.0", "8.1")}),
    "a forward of its own": (
        lambda m: setattr(m.features[8], "forward", m.features[8].forward), RUNS[:1],
        {f"features.8.{n}": "features.8 has a forward of its own" for n in "01"}),
    "blocks of another size": (
        lambda m: m.features.__setitem__(3, layer(64, 64, "relu_maxpool2", (16, 16)).eval()), RUNS[1:],
        {"features.3": "the kernel takes blocks of multiples of 32 x 16, not 16 x 16",
         "features.1": REASONS["features.6"], "features.4.0": REASONS["features.6"]}),
    "training mode": (
        lambda m: m.features[8][0].train(), RUNS[:1],
        {"features.8.0": "it is in training mode", "features.8.1": REASONS["features.6"]}),
    "dropout that drops": (lambda m: m.features[4][1].train(), RUNS, {}),
    "a sequential that goes on behind the run": (
        lambda m: m.features[4].append(nn.Sigmoid()), RUNS, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_in_no_run(name: str, place: str):
    change, runs, reasons = CHANGES[name]
    model = network(place)
    change(model)
    found = OneLaunch(model)
    assert [str(run) for run in found.runs] == runs
    assert found.reasons == REASONS | reasons
    if name.startswith("a hook"):
        called: list[object] = []
        for module in model.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                module.register_forward_hook(lambda *_: called.append(1))
        found.model(images(1, place))
        assert called, "the hook runs"


def test_a_slice_of_a_sequential_runs_layer_by_layer(place: str):
    found = OneLaunch(model := network(place))
    features: Any = found.model.features
    x = images(1, place)
    assert torch.equal(features[:2](x), model.features[1](model.features[0](x)))
    assert [*found.runs[0].outcomes] == []


def test_hooks_on_all_modules_leave_nothing(place: str):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = OneLaunch(model := network(place))
    finally:
        handle.remove()
    assert found.runs == [] and found.model is model and set(found.reasons.values()) == {"all modules have a hook"}


def test_long_runs_are_cut(place: str):
    model = nn.Sequential(*[layer(32, 32, "none") for _ in range(35)]).to(place).eval()
    found = OneLaunch(model)
    assert [str(run) for run in found.runs] == ["0 to 31 (32 layers)", "32 to 34 (3 layers)"]


def test_what_the_kernel_refuses_runs_layer_by_layer(place: str):
    """A pool of one pixel is nothing that the kernel, or the model, computes; float32 is not its dtype."""
    fast = network(place)
    found = OneLaunch(fast)
    run = found.runs[0]
    x = torch.zeros(2, 32, 1, 1, dtype=BF16, device=place)
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected an output of at least 1x1"):
        run(x)
    assert "an output of at least 1x1 of layer 1" in str(next(iter(run.outcomes)))
    with torch.autocast(place, BF16):
        run(torch.zeros(2, 32, 6, 7, dtype=BF16, device=place))
    assert [*run.outcomes][1] == "autocast"


def test_refuses(place: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.warns(UserWarning, match=r"^graphed: one_launch took no layers; the repr says why"):
        fast = graphed(network(place).alone, torch.zeros(1, 64, 4, 4, dtype=BF16, device=place), one_launch=True)
    assert only(fast).reasons == {"the model": "it is in no nn.Sequential"}
    monkeypatch.setattr(cuda, "available", lambda: "no CUDA GPU")
    with pytest.raises(ValueError, match=r"^graphed: one_launch cannot run here: no CUDA GPU"):
        graphed(network(place), images(1, place), one_launch=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^graphed: expected one_launch with a model on a CUDA device, got cpu"):
        graphed(Network(), images(1, "cpu"), one_launch=True)
