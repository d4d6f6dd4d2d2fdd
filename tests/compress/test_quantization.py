"""Quantization-aware training: what is saved is, bit for bit, what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from training_runs import loader, net

import slimkernels as sk
from slimkernels.compress.fake_quantization import FakeQuantize, fake_quantized
from slimkernels.compress.pruning.prune import apply_masks_
from slimkernels.compress.training.callbacks import Callback
from slimkernels.conversion.quantization import LEVELS
from slimkernels.data import TensorLoader


def varied(seed: int = 0) -> nn.Sequential:
    """Batch norm behind a plain, a grouped and no convolution; gains of every sign."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, groups=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    with torch.no_grad():
        model[1].weight.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
        model[4].weight[3] = 0.0
    return model


def pictures() -> TensorLoader:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(64, 3, 8, 8, generator=generator), torch.randint(5, (64,), generator=generator)
    return TensorLoader(images, labels, batch_size=16, shuffle=True)


class Stop(Callback):
    """Interrupts a run; None lets it go on."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model, still under its parametrizations, says that a file holds of each layer."""
    found = {}
    for name, rounding in fake_quantized(model).items():
        weight = model.get_submodule(name).parametrizations.weight.original
        mask = sk.masks(model).get(name)
        found[name] = rounding.stored(weight if mask is None else mask(weight))
    return found


@pytest.mark.parametrize("values", ["int4", "int8", "bf16"])
@pytest.mark.parametrize(("pruned_first", "fused"), [(True, False), (False, False), (True, True)])
def test_what_is_saved_is_what_was_trained(tmp_path, values, pruned_first, fused):
    model, x = varied(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    callbacks = [
        sk.GradualPruning(0.75, (16, 1), layers=["6"], end=0.6, times=3),
        sk.QuantizationAware(values, begin=0.4),
    ]
    callbacks = callbacks if pruned_first else callbacks[::-1]
    sk.fine_tune(model, pictures(), epochs=2, callbacks=callbacks, ema_decay=0.9, progress=False, fuse_batch_norm=fused)
    model.eval()
    assert fake_quantized(model)["3"].norm is model[4], "the batch norm that is read is not the model's"
    trained, outputs, zeros = stored(model), model(x), model[6].weight == 0
    assert zeros.float().mean() >= 0.75 and sorted(trained) == ["0", "10", "3", "6"]
    direct = sk.to_dense(sk.quantize_(sk.convert(model), values))  # without finalize_
    sk.finalize_(model)
    assert not fake_quantized(model) and not sk.masks(model) and type(model[6]) is nn.Conv2d
    assert torch.equal(model[6].weight == 0, zeros)
    torch.testing.assert_close(model(x), outputs, atol=1e-3, rtol=1e-3)  # biases have 16 bits now
    fast = sk.convert(model)
    sk.save(fast, tmp_path / "net.slim.safetensors", values=values)
    loaded = sk.load(tmp_path / "net.slim.safetensors", into=varied(seed=5))
    assert "BlockSparse" in type(loaded[6]).__name__ and isinstance(loaded[1], nn.Identity)
    plain, unrounded = sk.to_dense(loaded), sk.to_dense(fast)
    for name, weight in trained.items():
        assert torch.equal(plain.get_submodule(name).weight, weight), name
        assert torch.equal(direct.get_submodule(name).weight, weight), name
        bias, before = plain.get_submodule(name).bias, unrounded.get_submodule(name).bias
        # finalize_ has brought biases and shifts to their 16 bits: saving moves none of them by more than rounding.
        torch.testing.assert_close(bias, before, rtol=1e-5, atol=1e-7)
    assert torch.equal(loaded(x), sk.quantize_(fast, values)(x))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", ["int4", "int8", "bf16"])
def test_scales_are_those_that_a_file_of_the_same_weights_has(values):
    model = varied()
    expected = sk.to_dense(sk.quantize_(sk.convert(copy.deepcopy(model).eval()), values))
    callback = sk.QuantizationAware(values, begin=0.0)
    callback.prepare(model, 10)
    callback.on_step_begin(0, 10, model)
    for name, weight in stored(model).items():
        assert torch.equal(weight, expected.get_submodule(name).weight), name


@pytest.mark.parametrize("values", ["int4", "int8"])
@pytest.mark.parametrize("shift", [-11, -8, 9, 17])
def test_weights_on_any_grid_are_saved_on_it(tmp_path, values, shift):
    """Scales are chosen now and then: at the end weights may fill their grid badly, or be clipped by it."""
    model = nn.Sequential(nn.Linear(64, 32))
    callback = sk.QuantizationAware(values)
    callback.prepare(model, 1)
    callback.on_step_begin(0, 1, model)
    fake_quantized(model)["0"].exponents += shift
    trained = stored(model)["0"]
    codes = trained.abs().amax(1) / trained.abs().masked_fill(trained == 0, torch.inf).amin(1)
    assert (codes <= LEVELS[values]).all()
    sk.save(sk.convert(sk.finalize_(model)), tmp_path / "a.slim.safetensors", values=values)
    loaded = sk.load(tmp_path / "a.slim.safetensors", into=nn.Sequential(nn.Linear(64, 32)))
    assert torch.equal(sk.to_dense(loaded)[0].weight, trained)


def test_gradients_pass_as_if_nothing_was_rounded():
    layer = nn.Linear(8, 4, bias=False)
    rounding = FakeQuantize("int4", layer.weight)
    parametrize.register_parametrization(layer, "weight", rounding)
    original, x = layer.parametrizations.weight.original, torch.randn(3, 8)
    assert layer.weight is original  # not begun yet
    rounding.set_scales_(original)
    rounded = layer.weight.detach()
    assert not torch.equal(rounded, original) and all(len(row.unique()) <= 15 for row in rounded)
    layer(x).square().sum().backward()
    plain = rounded.clone().requires_grad_()
    (x @ plain.T).square().sum().backward()
    torch.testing.assert_close(original.grad, plain.grad)


def test_rounding_begins_and_chooses_scales_when_it_is_said_to(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(FakeQuantize, "set_scales_", lambda self, weight: seen.append(step))
    model, callback = net(), sk.QuantizationAware("int8", begin=0.5, times=3)
    callback.prepare(model, 20)
    layers = len(fake_quantized(model))
    quantized = []
    for step in range(20):
        callback.on_step_begin(step, 20, model)
        quantized.append(callback.metrics()["quantized"])
    assert seen == [step for step in (10, 14, 17) for _ in range(layers)]
    assert quantized == [0.0] * 10 + [1.0] * 10


def test_before_it_begins_training_is_as_without_it():
    def weights_before_each_step(*callbacks: Callback) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        class Watch(Callback):
            def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
                seen.append(dict(model.named_parameters())[name].detach().clone())

        name = "0.parametrizations.weight.original" if callbacks else "0.weight"
        sk.fine_tune(net(), loader(), epochs=2, progress=False, callbacks=[*callbacks, Watch()])
        return seen

    plain, watched = weights_before_each_step(), weights_before_each_step(sk.QuantizationAware("int4", begin=0.5))
    same = [torch.equal(a, b) for a, b in zip(plain, watched, strict=True)]
    assert same == [True] * 7 + [False] * 5


def test_a_run_resumes_bitwise(tmp_path):
    def run(model: nn.Module, stop: int | None = None, resume: bool = False) -> nn.Module:
        pruning = sk.GradualPruning(0.75, (16, 1), end=0.5, times=4)
        callbacks = [Stop(stop), pruning, sk.QuantizationAware("int4", begin=0.4, times=3)]
        sk.fine_tune(
            model, loader(), epochs=4, progress=False, callbacks=callbacks, ema_decay=0.9, resume=resume,
            checkpoint=tmp_path / ("part.pt" if resume or stop else "whole.pt"),
        )  # fmt: skip
        return model

    whole = run(net())
    for stop in (8, 14, 20):
        with pytest.raises(KeyboardInterrupt):
            run(net(), stop=stop)
        resumed = run(net(seed=1), resume=True)
        (tmp_path / "part.pt").unlink()
        assert all(rounding.active for rounding in fake_quantized(resumed).values())
        state, expected = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.items() if isinstance(v, torch.Tensor))
        assert torch.equal(resumed[3].weight, whole[3].weight)


def test_a_checkpoint_of_other_settings_is_refused_before_the_model_changes(tmp_path):
    common = {"epochs": 1, "progress": False, "checkpoint": tmp_path / "run.pt"}
    sk.fine_tune(net(), loader(), callbacks=[sk.QuantizationAware("int4", begin=0.4)], **common)
    for other, got in ((sk.QuantizationAware("int8", begin=0.4), "values=int4"), (sk.QuantizationAware(), "begin=0.4")):
        model = net(seed=1)
        with pytest.raises(ValueError, match=f"^QuantizationAware: expected {got} as in the checkpoint, got"):
            sk.fine_tune(model, loader(), callbacks=[other], resume=True, **common)
        assert torch.equal(model[0].weight, net(seed=1)[0].weight)


@pytest.mark.slow
def test_compiled_steps_train_the_same_model():
    """Equal up to the steps in which a last bit decides how a weight is rounded."""

    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

    plain, compiled = small(), small()
    for model in (plain, compiled):
        callback = sk.QuantizationAware("int8", begin=0.5, times=1)
        sk.fine_tune(model, loader(), epochs=1, callbacks=[callback], compile=model is compiled, progress=False)
    for index in (0, 4):
        weight = plain[index].weight
        steps = weight.abs().flatten(1).amax(1) / 64  # at least a step of the grid
        assert ((compiled[index].weight - weight).abs().flatten(1).amax(1) <= steps).all()
        unrounded = plain[index].parametrizations.weight.original
        torch.testing.assert_close(compiled[index].parametrizations.weight.original, unrounded, rtol=1e-2, atol=1e-3)


def test_a_weight_of_two_layers_stays_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(x))

    model, callback = Tied(), sk.QuantizationAware("int4", begin=0.0)
    callback.prepare(model, 1)
    callback.on_step_begin(0, 1, model)
    x = torch.arange(20)
    expected = model(x)
    sk.finalize_(model)
    assert model.head.weight is model.words.weight
    assert torch.equal(model(x), expected)


def test_masks_and_rounding_come_in_any_order():
    model, callback = net(), sk.QuantizationAware("int4", begin=0.0)
    callback.prepare(model, 1)
    callback.on_step_begin(0, 1, model)
    sk.prune_(model, 0.5, (16, 1))
    assert "3" in sk.masks(model) and (model[3].weight == 0).float().mean() >= 0.5
    sk.prune_(model, 0.75, (16, 1))
    apply_masks_(model)
    zeros = model[3].weight == 0
    sk.finalize_(model)
    assert torch.equal(model[3].weight == 0, zeros) and zeros.float().mean() >= 0.75


@pytest.mark.parametrize(
    "options, message",
    [
        ({"values": "fp32"}, "QuantizationAware: expected values in bf16, int8, int4, got 'fp32'"),
        ({"begin": 1.0}, "QuantizationAware: expected 0 <= begin < 1 and times >= 1, got begin=1.0, times=5"),
        ({"times": 0}, "QuantizationAware: expected 0 <= begin < 1 and times >= 1, got begin=0.6, times=0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sk.QuantizationAware(**options)


def test_models_that_cannot_be_trained_so_are_refused():
    model = net()
    sk.QuantizationAware("int4").prepare(model, 1)
    with pytest.raises(ValueError, match=r"expected layer '0' to be rounded to int8 or not at all, got int4"):
        sk.QuantizationAware("int8").prepare(model, 1)
    sk.QuantizationAware("int4").prepare(model, 1)
    assert all(len(model[i].parametrizations.weight) == 1 for i in (0, 3, 7))
    sparse = nn.Sequential(sk.nn.BlockSparseLinear.from_dense(nn.Linear(32, 32), (16, 1)))
    with pytest.raises(ValueError, match="expected a model before convert, got '0' converted"):
        sk.QuantizationAware("int4").prepare(sparse, 1)
    broken = net()
    callback = sk.QuantizationAware("int4", begin=0.0)
    callback.prepare(broken, 1)
    with torch.no_grad():
        broken[3].parametrizations.weight.original[0] = torch.nan
    with pytest.raises(ValueError, match="QuantizationAware: layer '3': FakeQuantize: expected finite weights"):
        callback.on_step_begin(0, 1, broken)
