"""Training steps as CUDA graphs: the same weights as from Python, and captured anew when what they hold has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.compress.training import graphed_steps
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.graphed_steps import EAGER_STEPS, GraphedSteps
from slimkernels.data import TensorLoader

gpu = pytest.mark.gpu
EPOCHS, BATCHES = 3, 7


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every capture."""
    seen: list[Any] = []
    capture = graphed_steps.capture
    monkeypatch.setattr(graphed_steps, "capture", lambda *a, **k: seen.append(k) or capture(*a, **k))
    return seen


def loader(n: int = 16 * BATCHES - 6, **options: Any) -> TensorLoader:
    """The last of its batches is smaller than the others."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randn(n, 16, 8, 8, generator=generator)
    images[torch.arange(n), labels] += 1.0
    return TensorLoader(images, labels, batch_size=16, shuffle=True, device="cuda", **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3),
    ).cuda()  # fmt: skip


def plain(model: nn.Module, **config: Any) -> None:
    sk.fine_tune(model, loader(), epochs=EPOCHS, lr=0.02, progress=False, deterministic=True, **config)


def pruned(model: nn.Module, **config: Any) -> None:
    callbacks = [
        sk.GradualPruning(0.75, (16, 16), end=0.6, times=4, skip_first=False),
        sk.QuantizationAware("int8", begin=0.6, times=2),
    ]
    plain(model, callbacks=callbacks, ema_decay=0.9, **config)


def distilled(model: nn.Module, **config: Any) -> None:
    teacher = net()
    sk.distill(
        model, teacher, loader(), epochs=EPOCHS, lr=0.02, progress=False, deterministic=True, precision="bf16", **config
    )


def fused(model: nn.Module, **config: Any) -> None:
    model[0].bias = nn.Parameter(torch.ones(32, device="cuda"))
    pruned(model, fuse_batch_norm=True, **config)


@gpu
@pytest.mark.parametrize("train", [plain, pruned, distilled, fused], ids=lambda train: train.__name__)
def test_captured_steps_train_the_same_weights(train: Callable[..., None], captures: list[Any]) -> None:
    eager, graphed = net(), net()
    train(eager)
    assert not captures
    train(graphed, cuda_graph=True)
    assert captures, "no step was captured"
    expected = eager.state_dict()
    for name, value in graphed.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def steps(model: nn.Module, callbacks: Any = ()) -> tuple[GraphedSteps, Callable[[], Tensor]]:
    """Graphed passes of a model, and one call of them whose loss is the mean of the outputs."""

    def backward(batch: list[Tensor]) -> Tensor:
        loss = model(*batch).float().mean()
        loss.backward()
        return loss.detach()

    graphed = GraphedSteps("train", model, backward, callbacks)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).cuda()

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        return graphed([x])

    return graphed, call


@gpu
@pytest.mark.parametrize("change", ["mode", "requires_grad", "place", "module", "variant"])
def test_captured_anew_when_what_it_holds_changes(change: str, captures: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 4)).cuda()
    variants = [0]
    callback = type("Variant", (Callback,), {"variant": lambda self: variants[0]})()
    _, call = steps(model, [callback])
    for _ in range(EAGER_STEPS + 3):
        call()
    assert len(captures) == 1
    if change == "mode":
        model[1].eval()
    elif change == "requires_grad":
        model[0].weight.requires_grad_(False)
    elif change == "place":
        model[2].weight.data = model[2].weight.data.clone()
    elif change == "module":
        model[1] = nn.Tanh()
    else:
        variants[0] = 1
    loss = call()
    assert len(captures) == 2
    torch.testing.assert_close(loss, steps(copy.deepcopy(model))[1]())
    assert (model[0].weight.grad is None) == (change == "requires_grad")
    call()
    assert len(captures) == 2


@gpu
def test_values_may_change_under_a_captured_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).cuda()
    _, call = steps(model)
    losses = []
    for _ in range(EAGER_STEPS + 2):
        losses.append(call())
        with torch.no_grad():
            model[0].weight.mul_(0.5)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again[0].weight.mul_(2.0 ** len(losses))
    for loss in losses:
        torch.testing.assert_close(loss, steps(again)[1]())
        with torch.no_grad():
            again[0].weight.mul_(0.5)


@gpu
def test_captured_steps_that_wait_for_the_gpu_are_refused() -> None:
    class Waits(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum().item() > 0)

    _, call = steps(Waits(8, 4).cuda())
    for _ in range(EAGER_STEPS):
        call()
    with pytest.raises(RuntimeError, match=r"^train: expected a training step that never waits"):
        call()
    assert torch.randn(3, device="cuda").isfinite().all()
