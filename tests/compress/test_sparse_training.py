"""Training through the sparse kernels: the same steps as dense, the layer's own forward again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_runs import loader

import slimkernels as sk
from slimkernels.compress.pruning import sparse_training
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.graphed_steps import GraphedSteps


def net() -> nn.Sequential:
    """Masked are a convolution of ragged blocks with a stride, one without a bias, and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 18, 3, padding=1),
            nn.BatchNorm2d(18),
            nn.ReLU(),
            nn.Conv2d(18, 20, 3, padding="same", bias=False),
            nn.ReLU(),
            nn.Conv2d(20, 36, (3, 1), stride=(2, 1), padding=(1, 0)),
            nn.Flatten(),
            nn.Linear(288, 64),
            nn.ReLU(),
            nn.Linear(64, 3),
        )


class Watch(Callback):
    """Counts the calls of the sparse ops, and which layers have another forward at each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.calls, self.swapped, self.stop = 0, [], stop
        for name in ("bsr_conv2d", "bsr_linear"):
            monkeypatch.setattr(sparse_training, name, self._counting(getattr(sparse_training, name)))

    def _counting(self, op):
        def call(*args, **kwargs):
            self.calls += 1
            return op(*args, **kwargs)

        return call

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        self.swapped.append([name for name, module in model.named_modules() if "forward" in vars(module)])
        if step == self.stop:
            raise KeyboardInterrupt


def pruning(**options) -> sk.GradualPruning:
    return sk.GradualPruning(0.75, (16, 2), end=0.4, times=2, layers=["3", "5", "7"], **options)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_run_is_that_of_the_dense_layers(monkeypatch, quantized):
    settings = {"epochs": 2, "lr": 0.02, "progress": False, "ema_decay": 0.9, "val_loader": loader()}
    rounding = [sk.QuantizationAware("bf16", begin=0.5)] if quantized else []
    dense, sparse = net(), net()
    expected = sk.fine_tune(dense, loader(), callbacks=[pruning(), *rounding], **settings)
    watch, training = Watch(monkeypatch), sk.SparseTraining(0.5, min_speedup=0.0)
    got = sk.fine_tune(sparse, loader(), callbacks=[pruning(), *rounding, training, watch], **settings)
    assert watch.swapped == [[]] * 6 + [["3", "5", "7"]] * 6
    assert watch.calls >= 18 and list(training.speedups) == ["3", "5", "7"]
    assert not any("forward" in vars(module) for module in sparse.modules())
    if not quantized:  # otherwise a last bit decides how a weight is rounded
        assert_same(dense, sparse)
    assert [s.loss for s in got] == pytest.approx([s.loss for s in expected], rel=1e-3)
    assert torch.equal(dense[3].weight == 0, sparse[3].weight == 0)
    fast = sk.convert(sk.finalize_(sparse), policy=sk.Policy(min_speedup=0, measure=False))
    x = next(iter(loader()))[0]
    torch.testing.assert_close(fast(x), sparse.eval()(x), rtol=1e-4, atol=1e-4)


def test_outputs_and_gradients_are_those_of_the_dense_layers():
    model = sk.prune_(net(), 0.75, (16, 2), layers=["3", "5", "7"])
    dense = net()
    dense.load_state_dict(sk.finalize_(copy.deepcopy(model)).state_dict())
    training = sk.SparseTraining(0.0, min_speedup=0.0)
    training.on_step_begin(0, 1, model)
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    for module in (model, dense):
        module(x).square().sum().backward()
    assert training.metrics() == {"sparse_layers": 3.0}
    torch.testing.assert_close(model(x), dense(x))
    for index in (3, 5, 7):
        layer = model[index].parametrizations.weight
        kept = layer[0](torch.ones_like(layer.original)) != 0
        assert not layer.original.grad[~kept].any() and layer.original.grad[kept].any()
        torch.testing.assert_close(layer.original.grad, dense[index].weight.grad * kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].weight.grad, dense[0].weight.grad, rtol=1e-4, atol=1e-5)
    training.on_run_end(model)
    assert type(model[3].forward).__name__ == "method"


def test_a_mask_that_changes_is_followed():
    model = sk.prune_(net(), 0.5, (16, 2), layers=["3", "5", "7"])
    training = sk.SparseTraining(0.0, min_speedup=0.0)
    training.on_step_begin(0, 2, model)
    x = torch.randn(8, 1, 4, 4)
    model(x)
    sk.prune_(model, 0.9, (16, 2), layers=["3", "5", "7"])
    got = model(x)
    got.sum().backward()
    for index in (3, 5, 7):
        layer = model[index].parametrizations.weight
        assert not layer.original.grad[layer[0](torch.ones_like(layer.original)) == 0].any()
    training.on_run_end(model)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_layers_that_gain_nothing_stay_dense(monkeypatch):
    watch, training = Watch(monkeypatch), sk.SparseTraining(0.5, min_speedup=1e9)
    sk.fine_tune(net(), loader(), epochs=2, progress=False, callbacks=[pruning(), training, watch])
    measured = watch.calls
    assert set(training.speedups) == {"3", "5", "7"} and training.metrics() == {"sparse_layers": 0.0}
    model = sk.prune_(net(), 0.5, (16, 2), layers=["3"])
    again = sk.SparseTraining(0.0, min_speedup=1e9)
    again.load_state_dict(training.state_dict())
    again.on_step_begin(0, 1, model)
    model(next(iter(loader()))[0])
    assert watch.calls == measured, "what a checkpoint knows is not measured again"


def test_an_interrupted_run_leaves_the_model_as_it_was(monkeypatch):
    model, watch = net(), Watch(monkeypatch, stop=10)
    callbacks = [pruning(), sk.SparseTraining(0.5, min_speedup=0.0), watch]
    with pytest.raises(KeyboardInterrupt):
        sk.fine_tune(model, loader(), epochs=2, progress=False, callbacks=callbacks)
    assert watch.swapped[-1] == ["3", "5", "7"]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_captured_step_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"^SparseTraining: expected cuda_graph=False, got True"):
        GraphedSteps("fine_tune", net(), lambda batch: batch[0], [pruning(), sk.SparseTraining()])


@pytest.mark.parametrize("options", [{"begin": 1.0}, {"begin": -0.1}, {"min_speedup": -1.0}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match="SparseTraining: expected 0 <= begin < 1 and min_speedup >= 0, got begin="):
        sk.SparseTraining(**options)
