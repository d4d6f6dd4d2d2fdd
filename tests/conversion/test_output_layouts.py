"""Models whose own code takes images in one layout alone: they run, every layer swapped, and so do their copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from conversion_models import FORCE, block_sparse_, force
from torch import Tensor, nn
from torch.nn import functional as F

import slimkernels as sk
from slimkernels.nn import BlockSparseConv2d, ChainedSequential
from slimkernels.nn.contiguous_output import ContiguousOutput
from slimkernels.nn.packed_run import PackedRun


class LeNet(nn.Module):
    """Poolings and ReLUs of torch.nn.functional between the layers, and a view in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32 * 3 * 3, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.flat(F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 4))
        return self.fc2(F.relu(self.fc1(h)))

    def flat(self, h: Tensor) -> Tensor:
        return h.view(h.size(0), -1)


class SizesInALoop(LeNet):
    """As in PyTorch's first tutorials, which torch.fx cannot trace."""

    def flat(self, h: Tensor) -> Tensor:
        features = 1
        for size in h.size()[1:]:
            features *= size
        return h.view(-1, features)


class OneTuple(LeNet):
    def flat(self, h: Tensor) -> Tensor:
        return h.view((h.size(0), 288))


class Features(nn.Module):
    """Layers in an nn.Sequential, as in the VGGs of many repositories, here with more than one pixel left."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Linear(32 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.classifier(h.view(h.size(0), -1))


class Branches(nn.Module):
    """What is viewed comes from neither of the modules that were called last, one of them by way of an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 16, 1)
        self.heads = nn.ModuleList(nn.Linear(16 * 144, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        left, right = self.left(stem), self.right(stem)
        last = self.last(torch.relu(stem))
        n = x.size(0)
        rows = [left.view(n, -1), torch.relu(right + left).view(n, -1), last.view(n, -1)]
        return sum(head(row) for head, row in zip(self.heads, rows, strict=True))


class Pair(nn.Module):
    """A module inside returns several images, none of which it views itself."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both()
        self.fc = nn.Linear(16 * 144, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.both(x)
        return self.fc(found["left"].view(x.size(0), -1)) + self.fc(found["right"].view(x.size(0), -1))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"left": self.left(x), "right": self.right(x)}


class WithoutBatch(LeNet):
    """Images of one channel each, as for correlations, and one row of all numbers."""

    def flat(self, h: Tensor) -> Tensor:
        n, c, height, width = h.shape
        one = h.view(n * c, height, width).mean((1, 2)).view(n, c)
        return F.pad(one, (0, 288 - 32)) + h.view(-1)[:288]


class Strided(LeNet):
    def flat(self, h: Tensor) -> Tensor:
        return torch.as_strided(h, (h.shape[0], 288), (288, 1))


def sparse(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[0] % 16 == 0:
            block_sparse_(module)
    return model


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 12, 12)


def assert_same(fast: nn.Module, model: nn.Module) -> None:
    for x in (images(3), images(2).contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            want = model(x.contiguous())
            torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)


CASES = [
    (LeNet, ("conv2",)),
    (OneTuple, ("conv2",)),
    (SizesInALoop, ("conv2",)),
    (Features, ("features",)),
    (Branches, ("last", "left", "right")),
    (WithoutBatch, ("conv2",)),
    (Strided, ("conv2",)),
]


@pytest.mark.parametrize(("kind", "names"), CASES)
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_every_layer_is_swapped_and_the_model_runs(kind: type[nn.Module], names: tuple[str, ...], given: bool) -> None:
    model = sparse(kind)
    fast = sk.convert(model, images() if given else None, policy=FORCE)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(m, BlockSparseConv2d) for m in fast.modules()) == len(kinds)
    if kind is SizesInALoop and not given:
        assert fast.slimkernels_plan.contiguous_outputs == ()
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            fast(images())
        return
    assert fast.slimkernels_plan.contiguous_outputs == names
    assert (
        f"made contiguous, as the model's own code takes them: outputs of {', '.join(names)}" in sk.explain(fast).text()
    )
    assert_same(fast, model)


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_tensors_in_an_output_are_contiguous_too(given: bool) -> None:
    model = sparse(Pair)
    fast = sk.convert(model, images() if given else None, policy=FORCE)
    names = ("both.left", "both.right") if given else ("both",)
    assert fast.slimkernels_plan.contiguous_outputs == names
    assert_same(fast, model)


def test_only_what_has_to_be_is_copied() -> None:
    """Contiguous images of one pixel are channels_last, too; a view of other sizes, and a reshape, take any layout."""

    class Shuffled(Features):
        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x)
            h = h.view(h.size(0), 2, 16, 6, 6).transpose(1, 2).reshape(h.size(0), -1)
            return self.classifier(h)

    class Pooled(Features):
        def __init__(self) -> None:
            super().__init__()
            self.features.append(nn.AdaptiveAvgPool2d(1))
            self.classifier = nn.Linear(32, 10)

    for kind in (Shuffled, Pooled):
        model = sparse(kind)
        fast = sk.convert(model, images(), policy=FORCE)
        assert fast.slimkernels_plan.contiguous_outputs == ()
        assert_same(fast, model)
    assert sk.convert(sparse(Shuffled), policy=FORCE).slimkernels_plan.contiguous_outputs == ()


def test_the_measured_model_keeps_its_layers() -> None:
    model = sparse(LeNet)
    policy = sk.Policy(min_speedup=0, check_model=True, repeats=3, budget_s=0.05)
    fast = sk.convert(model, [images(), images(2)], policy=policy)
    plan = fast.slimkernels_plan
    assert not any("put back" in note or "does not run" in note for note in plan.notes)
    assert plan.converted_ms or any("is not faster" in note for note in plan.notes)
    assert_same(fast, model)


def test_an_error_of_another_kind_is_not_blamed_on_layouts() -> None:
    class Counting(LeNet):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            if not isinstance(self.conv1, nn.Conv2d):
                raise RuntimeError("only with layers of torch")
            return h

    plan = sk.convert(sparse(Counting), images(), policy=sk.Policy(min_speedup=0, budget_s=0.05)).slimkernels_plan
    assert any("only with layers of torch" in note for note in plan.notes) and "conv1" not in plan.swapped


@pytest.mark.parametrize("kind", [LeNet, Features])
def test_copies_files_and_recordings_run_as_well(kind: type[nn.Module], tmp_path: Path) -> None:
    model = sparse(kind)
    fast = sk.convert(model, images(), policy=FORCE)
    sk.save(fast, tmp_path / "m.slim.safetensors")
    loaded = sk.load(tmp_path / "m.slim.safetensors", into=kind())
    assert loaded.slimkernels_plan == fast.slimkernels_plan
    again = sk.convert(fast, policy=FORCE)
    assert again.slimkernels_plan.contiguous_outputs == fast.slimkernels_plan.contiguous_outputs
    dense = sk.to_dense(fast)
    for other in (loaded, again, dense, dense.to(memory_format=torch.channels_last), copy.deepcopy(fast)):
        assert_same(other, model)
        assert sum(isinstance(h, ContiguousOutput) for m in other.modules() for h in m._forward_hooks.values()) == 1
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(sk.graphed(fast, x)(x), model(x), rtol=1e-4, atol=1e-4)
    if kind is LeNet:
        assert pickle.loads(pickle.dumps(ContiguousOutput()))(None, (), x.mT).is_contiguous()


def test_a_file_that_names_no_module_is_refused(tmp_path: Path) -> None:
    fast = sk.convert(sparse(Features), images(), policy=FORCE)
    fast.slimkernels_plan = fast.slimkernels_plan.from_json(
        fast.slimkernels_plan.to_json().replace('"contiguous_outputs": ["features"]', '"contiguous_outputs": ["trunk"]')
    )
    sk.save(fast, tmp_path / "m.slim.safetensors")
    with pytest.raises(ValueError, match="contiguous_outputs: expected into to have a module 'trunk', got none"):
        sk.load(tmp_path / "m.slim.safetensors", into=Features())


def test_a_sequential_stays_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is copied, not that of the layer inside, whose hook would end the chain."""
    fast = sk.convert(sparse(Features), images(), policy=FORCE)
    attempt, chained = PackedRun.attempt, []

    def seen(self: PackedRun, x: Tensor) -> Tensor | None:
        chained.append(attempt(self, x))
        return chained[-1]

    monkeypatch.setattr(PackedRun, "attempt", seen)
    with torch.no_grad():
        fast(images())
    assert type(fast.features) is ChainedSequential
    assert FORCE.backend != "auto" or [y is not None for y in chained] == [True]


def test_what_is_trained_runs_too() -> None:
    model = sparse(LeNet)
    for given in (images(), None):
        fast = sk.convert(model, given, training=True, policy=force())
        assert fast.slimkernels_plan.contiguous_outputs == ("conv2",)
        fast(images()).square().mean().backward()
        assert fast.conv1.values.grad is not None and bool(fast.conv1.values.grad.any())
