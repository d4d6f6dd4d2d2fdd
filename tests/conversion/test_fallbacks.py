"""Where convert meets trouble: candidates that fail, layers that make outputs differ, inputs with nothing in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conversion_models import BACKEND, FORCE, assert_same_function, force, images, sparse_tiny
from torch import Tensor, nn

from slimkernels import Policy, convert, explain
from slimkernels.conversion import convert_model, measure, units
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear
from slimkernels.testing import random_tensor

SPARSE = (BlockSparseConv2d, BlockSparseLinear)
# Swaps whatever a kernel takes, measures, and compares the whole model.
MEASURED = Policy(min_speedup=0, repeats=1, budget_s=0, backend=BACKEND)


def sparse_layers(count: int = 8) -> nn.Sequential:
    """Linear layers of different widths, half of the rows of each 0."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32 + 16 * i, 48 + 16 * i) for i in range(count)])
    with torch.no_grad():
        for layer in model:
            layer.weight[: layer.out_features // 2] = 0
    return model


def swapped(model: nn.Module) -> list[int]:
    return [i for i, layer in enumerate(model) if isinstance(layer, SPARSE)]


@pytest.fixture
def whole_model_is_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real stopwatch for layers; of the whole model, the converted one is told to be the faster."""
    real = measure.typical_seconds

    def seconds(runs: list[Any], **options: Any) -> list[float]:
        return real(runs, **options) if hasattr(runs[0], "module") else [3.0, 2.0, 1.0]

    monkeypatch.setattr(measure, "typical_seconds", seconds)
    yield


# Candidates that fail
def failing_build(monkeypatch: pytest.MonkeyPatch, out_features: set[int], error: Callable[[], BaseException]) -> None:
    real = BlockSparseLinear.from_dense

    def build(linear: nn.Linear, *args: Any, **kwargs: Any) -> BlockSparseLinear:
        if linear.out_features in out_features:
            raise error()
        return real(linear, *args, **kwargs)

    monkeypatch.setattr(BlockSparseLinear, "from_dense", build)


def failing_call(monkeypatch: pytest.MonkeyPatch, out_features: set[int], error: Callable[[], BaseException]) -> None:
    real = BlockSparseLinear.forward

    def forward(self: BlockSparseLinear, x: Tensor) -> Tensor:
        if self.out_features in out_features:
            raise error()
        return real(self, x)

    monkeypatch.setattr(BlockSparseLinear, "forward", forward)


ERRORS = {
    "memory": lambda: MemoryError("asked for 103 GB"),
    "torch": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "value": lambda: ValueError("layout_step: expected other images"),
    "bug": lambda: ZeroDivisionError("float division by zero"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["built without inputs", "built", "measured", "measured for training"])
def test_a_candidate_that_fails_keeps_its_layer_dense(
    where: str, error: str, monkeypatch: pytest.MonkeyPatch, whole_model_is_faster: None
) -> None:
    model, x, training = sparse_layers(4), random_tensor(3, 32, seed=1), where == "measured for training"
    fail = failing_call if where.startswith("measured") else failing_build
    inputs = None if where == "built without inputs" else x
    policy = MEASURED if inputs is not None else FORCE
    fail(monkeypatch, {80}, ERRORS[error])
    fast = convert(model, inputs, policy=policy, training=training)
    assert swapped(fast) == [0, 1, 3] and type(fast[2]) is nn.Linear
    layer = explain(fast).plan["2"]
    assert layer.action == "keep" and str(ERRORS[error]()) in layer.reason
    assert_same_function(fast.eval(), model, x)
    with pytest.raises(ValueError, match=r"convert: strict=True, and these layers cannot be taken: 2: ") as raised:
        convert(model, inputs, policy=policy, training=training, strict=True)
    assert str(ERRORS[error]()) in str(raised.value)


def test_another_candidate_of_the_layer_may_still_win(
    monkeypatch: pytest.MonkeyPatch, whole_model_is_faster: None
) -> None:
    real = BlockSparseLinear.forward

    def forward(self: BlockSparseLinear, x: Tensor) -> Tensor:
        if self.block_shape == (16, 1):
            raise RuntimeError("no memory for it")
        return real(self, x)

    monkeypatch.setattr(BlockSparseLinear, "forward", forward)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        # Nearly every block of 16 is stored, and a quarter of those of 4 is not: too few for their slower kernel, with
        # AVX2 as with AVX-512, so they are tried second.
        model[0].weight.mul_(torch.rand(64, 64) < 0.3)
    policy = Policy(
        min_speedup=0, repeats=1, budget_s=0, backend=BACKEND, block_shapes=((16, 1), (4, 1)), measured_candidates=2
    )
    fast = convert(model, [random_tensor(3, 64, seed=1), random_tensor(2, 64, seed=2)], policy=policy)
    assert fast[0].block_shape == (4, 1)
    reason = explain(fast).plan["0"].reason
    assert "the candidate of (16, 1) blocks failed: RuntimeError: no memory for it" in reason
    assert reason.count("failed") == 1 and "the speed of dense" in reason


@pytest.mark.parametrize("fail", [failing_build, failing_call])
def test_an_interrupt_ends_convert(fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, {80}, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(sparse_layers(), random_tensor(3, 32, seed=1), policy=MEASURED)


def test_a_layer_that_fails_itself_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dense layer cannot be timed there is nothing to compare with."""
    monkeypatch.setattr(measure, "example_input", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
    fast = convert(sparse_layers(), random_tensor(3, 32, seed=1), policy=MEASURED)
    assert swapped(fast) == []
    assert all("built or measured: MemoryError: no room" in layer.reason for layer in explain(fast).plan.layers)


def test_a_chain_whose_product_cannot_be_made_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units.FactorChain, "merged", lambda self: (_ for _ in ()).throw(MemoryError("too large")))
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))
    fast = convert(model, policy=FORCE)
    assert isinstance(fast[3], BlockSparseLinear) and type(fast[0]) is type(fast[1]) is nn.Linear
    assert "MemoryError: too large" in explain(fast).plan["1"].reason
    assert_same_function(fast, model, random_tensor(3, 64, seed=1))


# Layers that make the model differ
def breaking(monkeypatch: pytest.MonkeyPatch, out_features: set[int]) -> None:
    """Twins of these widths compute something else."""
    real = BlockSparseLinear.from_dense

    def build(linear: nn.Linear, *args: Any, **kwargs: Any) -> BlockSparseLinear:
        module = real(linear, *args, **kwargs)
        if linear.out_features in out_features:
            with torch.no_grad():
                module.values.add_(1.0)
            module.prepack()
        return module

    monkeypatch.setattr(BlockSparseLinear, "from_dense", build)


@pytest.mark.parametrize("wrong", [{0}, {3}, {7}, {1, 2}, {0, 7}, set(range(8))])
def test_only_the_layers_that_differ_are_put_back(
    wrong: set[int], monkeypatch: pytest.MonkeyPatch, whole_model_is_faster: None
) -> None:
    model, x = sparse_layers(), random_tensor(3, 32, seed=1)
    breaking(monkeypatch, {48 + 16 * i for i in wrong})
    fast = convert(model, x, policy=MEASURED)
    assert set(swapped(fast)) == set(range(8)) - wrong
    plan = explain(fast).plan
    for i in wrong:
        assert plan[str(i)].action == "keep" and "with it swapped" in plan[str(i)].reason
        assert "output at example input 0 differs" in plan[str(i)].reason
    assert any("some layers were put back" in note for note in plan.notes)
    assert_same_function(fast, model, x)


def test_the_search_for_layers_that_differ_ends(monkeypatch: pytest.MonkeyPatch, whole_model_is_faster: None) -> None:
    monkeypatch.setattr(convert_model, "_MAX_PROBES", 3)
    breaking(monkeypatch, {48 + 16 * 7})
    model, x = sparse_layers(), random_tensor(3, 32, seed=1)
    fast = convert(model, x, policy=MEASURED)
    assert set(swapped(fast)) <= set(range(7))
    assert_same_function(fast, model, x)


class ChecksItsLayer(nn.Module):
    """Untraceable, and refuses any layer but its own: only running it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.checked = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.checked, nn.Conv2d):
            raise TypeError("expected a Conv2d")
        return self.checked(self.free(x)) * float(x.sum() < 1e30)


def test_a_layer_that_makes_the_model_fail_is_put_back(whole_model_is_faster: None) -> None:
    model, x = ChecksItsLayer(), images(1, 16)
    fast = convert(model, x, policy=MEASURED)
    assert type(fast.checked) is nn.Conv2d and isinstance(fast.free, BlockSparseConv2d)
    reason = explain(fast).plan["checked"].reason
    assert "does not run on example input 0: TypeError: expected a Conv2d" in reason
    assert_same_function(fast, model, x)


# Forwards that ask for types, which the torch.fx graph alone shows where nothing runs
class Tapped(nn.Module):
    """A perceptual loss: what the ReLUs return is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.features = sparse_tiny().features
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                taps.append(x)
        return [self.head(x.mean((2, 3))), *taps]


class ShortCuts(nn.Module):
    """Adds the input of some convolutions to their output, and counts the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        scale = 1
        for layer in self.layers:
            y = layer(x)
            if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels:
                y = y + x
            scale += type(layer).__name__ == "Linear"
            x = y
        return x * scale


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["no inputs", "inputs"])
def test_a_forward_that_asks_for_types_meets_those_it_knows(given: bool, training: bool) -> None:
    model, x = ShortCuts().eval(), random_tensor(2, 16, 4, 4, seed=1)
    fast = convert(model, x if given else None, policy=FORCE, training=training).eval()
    assert [i for i, layer in enumerate(fast.layers) if isinstance(layer, SPARSE)] == [2]
    plan = explain(fast).plan
    assert "the forward makes other calls then" in plan["layers.0"].reason and len(plan.notes) == 1
    assert_same_function(fast, model, x)
    model = Tapped().eval()
    fast = convert(model, images(2) if given else None, policy=FORCE, training=training).eval()
    assert isinstance(fast.head, BlockSparseLinear) and isinstance(fast.features[3], SPARSE)
    notes = explain(fast).plan.notes  # where a model is to be trained nothing is fused
    assert training == (not notes) and all("no ReLU is fused: the forward makes" in note for note in notes)
    with torch.no_grad():
        for a, b in zip(fast(images(2)), model(images(2)), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("given", [False, True], ids=["no inputs", "inputs"])
def test_a_forward_may_leave_out_what_does_nothing(given: bool) -> None:
    class LeavesOut(Tapped):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.features:
                x = x if isinstance(layer, nn.Identity) else layer(x)
            return self.head(x.mean((2, 3)))

    model = LeavesOut().eval()
    fast = convert(model, images(2) if given else None, policy=FORCE)
    assert isinstance(fast.features[3], SPARSE) and isinstance(fast.features[4], nn.Identity)
    assert not explain(fast).plan.notes
    assert_same_function(fast, model, images(2))


def test_a_forward_whose_every_layer_is_asked_for_stays() -> None:
    class Norms(Tapped):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.features:
                x = layer(x) * 2 if isinstance(layer, nn.BatchNorm2d) else layer(x)
            return x

    model = Norms().eval()
    fast = convert(model, policy=FORCE)
    assert not explain(fast).plan.swapped and isinstance(fast.features[1], nn.BatchNorm2d)
    assert_same_function(fast, model, images(2))


# Calls and outputs without anything in them
class Detector(nn.Module):
    """Without detections its head is called with no image, and one of its outputs is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = sparse_tiny().features
        self.head, self.score = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor, found: int = 0) -> dict[str, Tensor]:
        y = self.backbone(x)
        boxes = y[:found]
        return {"features": y, "masks": self.head(boxes), "scores": self.score(boxes.mean((2, 3)))}


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1)])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_example_without_detections_converts_the_rest(
    block: tuple[int, int], measured: bool, training: bool, whole_model_is_faster: None
) -> None:
    model = Detector().eval()
    changes = {"block_shapes": (block,), "measure": measured, "repeats": 1, "budget_s": 0}
    fast = convert(model, images(2), policy=force(**changes), training=training)
    plan = explain(fast).plan
    assert sum(isinstance(m, BlockSparseConv2d) for m in fast.backbone) == 3
    for name in ("head", "score"):
        assert plan[name].action == "keep" and "with an empty batch only" in plan[name].reason
    fast.eval()
    with torch.no_grad():
        for found in (0, 1):
            for a, b in zip(fast(images(2), found).values(), model(images(2), found).values(), strict=True):
                assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def test_one_example_with_detections_decides_for_the_others(whole_model_is_faster: None) -> None:
    fast = convert(Detector().eval(), [images(2), (images(2), 2)], policy=MEASURED)
    assert isinstance(fast.head, BlockSparseConv2d) and isinstance(fast.score, BlockSparseLinear)
    assert len(explain(fast).plan["head"].dense_ms) == 1


def test_outputs_of_another_form_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.fc(x)
            dense = bool(x.size(0) == 0) or isinstance(self.fc, nn.Linear)  # torch.fx traces no comparison of sizes
            return [y, x] if dense else [y]

    fast = convert(Forms(), random_tensor(2, 32, seed=1), policy=MEASURED)
    assert type(fast.fc) is nn.Linear and "has another form" in explain(fast).plan["fc"].reason
