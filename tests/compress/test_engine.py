"""The training engine: callbacks, schedules, accumulation, averages, precisions, logs, steps with own parameters."""

from __future__ import annotations

import csv
import math
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_runs import StopAt

from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import finalize_, masks, prune_
from slimkernels.compress.training import engine, processes
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.config import build_optimizer, build_scheduler
from slimkernels.compress.training.ema import WeightAverage
from slimkernels.compress.training.engine import CrossEntropyStep, TrainConfig, TrainingStep
from slimkernels.compress.training.evaluation import evaluate
from slimkernels.compress.training.train import fine_tune
from slimkernels.data import TensorLoader


def samples(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    images[torch.arange(n), 0, labels] += 2.0
    return images, labels


def loader(batch_size: int = 16, n: int = 96, **options) -> TensorLoader:
    return TensorLoader(*samples(n), batch_size=batch_size, shuffle=True, **options)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 3),
        )  # fmt: skip


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    tensors = [name for name, value in left.items() if isinstance(value, torch.Tensor)]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in tensors)


class Record(Callback):
    """Every call, and the norm of the gradients where there are any."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.norms: dict[str, list[float]] = {"on_gradients": [], "on_step_end": []}

    def prepare(self, model, total_steps):
        self.calls.append(("prepare", total_steps))

    def on_step_begin(self, step, total_steps, model):
        assert all(p.grad is None for p in model.parameters())
        self.calls.append(("begin", step))

    def on_gradients(self, step, total_steps, model):
        self.calls.append(("gradients", step))
        self.norm("on_gradients", model)

    def on_step_end(self, step, total_steps, model):
        self.calls.append(("end", step))
        self.norm("on_step_end", model)

    def on_epoch_end(self, epoch, model):
        self.calls.append(("epoch", epoch))

    def norm(self, moment, model):
        total = sum(p.grad.double().square().sum() for p in model.parameters())
        self.norms[moment].append(math.sqrt(total))


def test_callbacks_are_called_in_order_once_an_optimiser_step():
    """80 samples in batches of 16 make 5 micro-batches: steps of two, two and one."""
    record, model = Record(), net()
    fine_tune(model, loader(n=80), epochs=2, accumulate=2, callbacks=[record], progress=False)
    expected: list[tuple] = [("prepare", 6)]
    for step in range(6):
        expected += [("begin", step), ("gradients", step), ("end", step)]
        if step % 3 == 2:
            expected.append(("epoch", step // 3))
    assert record.calls == expected


def test_accumulated_gradients_are_means_over_micro_batches():
    """The last group of an epoch is divided by its own size."""
    grads: list[torch.Tensor] = []

    class Keep(Callback):
        def on_gradients(self, step, total_steps, model):
            grads.append(model[1].weight.grad.clone())

    images, labels = samples(80)
    model, order = linear(), loader(n=80)
    weight, bias = model[1].weight.detach().clone().requires_grad_(), model[1].bias.detach().clone()
    fine_tune(model, loader(n=80), epochs=1, accumulate=2, lr=1e-12, callbacks=[Keep()], progress=False)
    batches = [indices for _, _, indices in loader(n=80, with_indices=True)]
    for got, group in zip(grads, [batches[:2], batches[2:4], batches[4:]], strict=True):
        loss = sum(F.cross_entropy(images[i].flatten(1) @ weight.T + bias, labels[i]) for i in group) / len(group)
        torch.testing.assert_close(got, torch.autograd.grad(loss, weight)[0], rtol=1e-5, atol=1e-7)
    assert len(order) == 5


def test_gradients_are_clipped_after_callbacks_saw_them():
    record = Record()
    fine_tune(net(), loader(), epochs=1, clip_norm=0.1, callbacks=[record], progress=False)
    assert min(record.norms["on_gradients"]) > 0.1
    assert all(norm == pytest.approx(0.1, rel=1e-3) for norm in record.norms["on_step_end"])


def rates(steps_per_epoch: int = 10, **settings) -> list[float]:
    config = TrainConfig(**{"epochs": 4, "lr": 1.0, **settings})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch)
    seen = []
    for _ in range(config.epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules_against_their_formulas():
    assert rates(schedule="constant") == [1.0] * 40
    assert rates(schedule="step", lr_step_epochs=2, lr_gamma=0.5) == [1.0] * 20 + [0.5] * 20
    cosine = [0.5 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    assert rates(schedule="cosine") == pytest.approx(cosine)
    warm = rates(schedule="cosine", warmup_epochs=1.0)
    assert warm[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert warm[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 30)) for t in range(30)])
    for warmup, share in ((0.0, 0.3), (0.5, 0.125)):
        peak = share * 41 - 1
        up = [1 + (0.04 - 1) / 2 * (1 + math.cos(math.pi * t / peak)) for t in range(40) if t <= peak]
        down = [4e-6 / 10 + (1 - 4e-6 / 10) / 2 * (1 + math.cos(math.pi * (t - peak) / (40 - peak))) for t in range(40)]
        assert rates(schedule="onecycle", warmup_epochs=warmup) == pytest.approx(up + down[len(up) :], abs=1e-5)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step", "constant"])
def test_a_warm_up_may_take_the_whole_run(schedule):
    """Of a run of 3 steps 0.95 epochs are 3 steps; the scheduler is asked for the rate behind the last one, too."""
    model = nn.Linear(2, 2)
    config = TrainConfig(1, 0.1, schedule=schedule, warmup_epochs=0.95)
    optimizer = build_optimizer("fine_tune", model, config)
    scheduler = build_scheduler(optimizer, config, 3)
    rates = []
    for _ in range(3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == sorted(rates) and all(0 < rate <= 0.1 for rate in rates)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    model, (images, labels) = linear(), samples(8)
    log_p = F.log_softmax(model(images), 1)
    expected = -(0.8 * log_p[torch.arange(8), labels] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(CrossEntropyStep(model, 0.2)(images, labels), expected)
    expected = expected.detach()
    history = fine_tune(model, loader(8, n=8), epochs=1, label_smoothing=0.2, progress=False)
    assert history[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_average_against_its_recurrence():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for t in range(8):
        with torch.no_grad():
            model.weight.add_(t + 1.0)
            model.running_mean.sub_(t)
            model.num_batches_tracked += 1
        average.update(model)
        decay = min(0.5, (1 + t) / (10 + t))
        for name in ("weight", "running_mean"):
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied(model):
        for name in ("weight", "running_mean"):
            torch.testing.assert_close(model.state_dict()[name], expected[name])
        assert int(model.num_batches_tracked) == 8
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_of_16_bit_weights_move(dtype):
    """In 16 bits a hundredth of the way is lost: the average would stay near its first value however long it runs."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.zero_()
    average, expected = WeightAverage(model, 0.99), 0.0
    with torch.no_grad():
        model.weight.fill_(1.0)
    for t in range(500):
        average.update(model)
        decay = min(0.99, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay)
    again = WeightAverage(model, 0.99)
    again.load_state_dict(average.state_dict())
    again.copy_to(model)
    assert expected > 0.9 and model.weight.dtype == dtype
    torch.testing.assert_close(model.weight.double(), torch.tensor([[expected]]).double(), atol=4e-3, rtol=0)


def test_masks_do_not_leak_into_the_average():
    """A block masked late has a history of other values; in the average it is zero all the same."""
    model = prune_(net(), 0.0, (16, 1))
    average = WeightAverage(model, 0.9)
    average.update(model)
    prune_(model, 0.75, (16, 1))
    average.update(model)
    with average.applied(model):
        zero = model[3].parametrizations.weight.original.detach() == 0
        assert torch.equal(zero, model[3].weight.detach() == 0) and zero.float().mean() == 0.75
    average.copy_to(model)
    grid = masks(model)["3"].mask.clone()
    finalize_(model)
    blocks = model[3].weight.detach().unflatten(0, (-1, 16)).abs().sum(1).permute(0, 2, 3, 1).reshape(grid.shape)
    assert torch.equal(blocks != 0, grid)


def test_the_average_is_evaluated_saved_and_what_the_model_ends_with(tmp_path):
    class Own(Callback):
        """The weights without averaging."""

        def on_epoch_end(self, epoch, model):
            self.weight = model[6].weight.detach().clone()

    own, model, path, test = Own(), net(), tmp_path / "run.pt", TensorLoader(*samples(50))
    settings = {"epochs": 3, "lr": 0.05, "schedule": "constant", "ema_decay": 0.9, "progress": False}
    history = fine_tune(model, loader(), test, callbacks=[own], checkpoint=path, **settings)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["average"]["averages"]["6.weight"], model[6].weight)
    assert torch.equal(state["model"]["6.weight"], own.weight) and not torch.equal(own.weight, model[6].weight)
    assert history[-1].ema_val_accuracy == evaluate(model, test)
    plain = net()
    without = fine_tune(plain, loader(), test, callbacks=[Own()], **{**settings, "ema_decay": None})
    assert torch.equal(plain[6].weight, own.weight)  # averaging does not touch the training
    assert [s.val_accuracy for s in without] == [s.val_accuracy for s in history]
    assert without[-1].ema_val_accuracy is None
    again = net(seed=1)
    fine_tune(again, loader(), test, callbacks=[Own()], checkpoint=path, resume=True, **settings)
    assert same(again, model)


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    seen: list[torch.dtype] = []
    model = net()
    model[3].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    history = fine_tune(model, loader(), epochs=3, lr=0.02, precision="bf16", progress=False)
    # the first pass, which finds the number of classes, is outside of training
    assert seen[0] == torch.float32 and set(seen[1:]) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history[-1].loss < 0.5 * history[0].loss
    assert model(samples(2)[0]).dtype == torch.float32


@pytest.fixture
def loss_scaling(monkeypatch):
    """fp16 on the CPU: autocast and a GradScaler whose first scale overflows, as accelerate sets them up on a GPU."""
    original = processes.session

    @contextmanager
    def session(name, device, precision):
        with original(name, device, "fp32") as accelerator:
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
            yield accelerator

    monkeypatch.setattr(engine, "session", session)


def test_overflowing_steps_are_skipped_and_the_scale_is_saved(loss_scaling, tmp_path):
    record, model, path = Record(), net(), tmp_path / "run.pt"
    settings = {"epochs": 6, "lr": 0.02, "schedule": "cosine", "precision": "fp16", "progress": False}
    history = fine_tune(model, loader(), callbacks=[record], checkpoint=path, **settings)
    state = torch.load(path, weights_only=True)
    taken = [step for call, step in record.calls if call == "gradients"]
    skipped = 36 - len(taken)
    assert 0 < skipped < 36 and taken == list(range(skipped, 36))
    assert state["scaler"]["scale"] == 2.0 ** (40 - skipped)
    assert state["scheduler"]["last_epoch"] == len(taken)
    assert all(norm < 1e3 for norm in record.norms["on_gradients"])  # unscaled
    assert history[-1].loss < 0.5 * history[0].loss and all(p.dtype == torch.float32 for p in model.parameters())


def test_fp16_resumes_bitwise(loss_scaling, tmp_path):
    class Stop(Callback):
        def __init__(self, step):
            self.step = step

        def on_step_begin(self, step, total_steps, model):
            if step == self.step:
                raise KeyboardInterrupt

    whole, resumed, path = net(), net(seed=1), tmp_path / "run.pt"
    settings = {"epochs": 6, "precision": "fp16", "progress": False}
    fine_tune(whole, loader(), callbacks=[Stop(99)], **settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), callbacks=[Stop(32)], checkpoint=path, **settings)
    fine_tune(resumed, loader(), callbacks=[Stop(99)], checkpoint=path, resume=True, **settings)
    assert same(whole, resumed)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu(precision, tmp_path):
    path, settings = tmp_path / "run.pt", {"lr": 0.02, "precision": precision, "progress": False}
    model = net().cuda()
    data = loader(device="cuda", crop_padding=1, flip=True)
    history = fine_tune(model, data, data, epochs=4, ema_decay=0.9, clip_norm=1.0, checkpoint=path, **settings)
    assert history[-1].loss < history[0].loss
    again = net(seed=1).cuda()
    fine_tune(again, data, data, epochs=4, ema_decay=0.9, clip_norm=1.0, checkpoint=path, resume=True, **settings)
    assert same(model, again)


@pytest.mark.slow
def test_compiled_steps_train_the_same_model():
    settings = {"epochs": 2, "lr": 0.02, "progress": False}
    plain, compiled = net(), net()
    expected = fine_tune(plain, loader(n=88), callbacks=[GradualPruning(0.5, (16, 1), times=4)], **settings)
    got = fine_tune(compiled, loader(n=88), callbacks=[GradualPruning(0.5, (16, 1), times=4)], compile=True, **settings)
    assert torch.equal(masks(plain)["3"].mask, masks(compiled)["3"].mask)
    assert [s.loss for s in got] == pytest.approx([s.loss for s in expected], rel=1e-3)
    torch.testing.assert_close(compiled[6].weight, plain[6].weight, rtol=1e-2, atol=1e-4)
    assert not hasattr(compiled, "_orig_mod") and not any("_orig_mod" in name for name in compiled.state_dict())


def test_deterministic_mode_is_on_while_training_only():
    modes: list[bool] = []

    class Look(Callback):
        def on_step_begin(self, step, total_steps, model):
            modes.append(torch.are_deterministic_algorithms_enabled())

    fine_tune(net(), loader(), epochs=1, deterministic=True, callbacks=[Look()], progress=False)
    assert modes and all(modes) and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(FloatingPointError):
        fine_tune(net(), loader(), epochs=1, lr=1e30, deterministic=True, progress=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_weights_are_channels_last_while_training_only():
    seen: list[bool] = []

    class Look(Callback):
        def on_gradients(self, step, total_steps, model):
            weight = model[3].weight
            seen.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (weight, weight.grad)))

    model = net()
    parameters = list(model.parameters())
    model[3].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    fine_tune(model, loader(), epochs=1, callbacks=[Look()], progress=False)
    assert len(seen) > 6 and all(seen)
    assert all(p.is_contiguous() and p is before for p, before in zip(model.parameters(), parameters, strict=True))


class Regressed(TrainingStep):
    """Cross-entropy of the model plus a regression from its logits, by a layer that is not the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        torch.manual_seed(0)
        self.regressor = nn.Linear(3, 1)

    def forward(self, images, labels, indices=None):
        logits = self.model(images)
        assert indices is not None and indices.shape == labels.shape
        return F.cross_entropy(logits, labels) + F.mse_loss(self.regressor(logits).squeeze(1), labels.float())

    def recipe(self):
        return {"kind": "regressed"}


def test_a_step_s_own_parts_are_trained_saved_and_resumed(tmp_path):
    class Stop(Callback):
        def __init__(self, step):
            self.step = step

        def on_step_begin(self, step, total_steps, model):
            assert isinstance(model, nn.Sequential)
            if step == self.step:
                raise KeyboardInterrupt

    def train(model, stop=99, **options):
        step = Regressed(model)
        before = step.regressor.weight.detach().clone()
        data = loader(with_indices=True)
        engine.run("test", step, data, data, TrainConfig(4, lr=0.01), callbacks=[Stop(stop)], progress=False, **options)
        assert not torch.equal(before, step.regressor.weight)
        return step

    path = tmp_path / "run.pt"
    whole = train(net())
    with pytest.raises(KeyboardInterrupt):
        train(net(), stop=14, checkpoint=path)
    assert set(torch.load(path, weights_only=True)["step"]) == {"regressor.weight", "regressor.bias"}
    assert same(whole, train(net(seed=1), checkpoint=path, resume=True))
    data = loader(with_indices=True)
    with pytest.raises(ValueError, match="name='test' as in the checkpoint"):
        fine_tune(net(), data, epochs=4, lr=0.01, checkpoint=path, resume=True, progress=False)
    step = CrossEntropyStep(net())
    step.recipe = lambda: {"kind": "regressed"}
    with pytest.raises(ValueError, match=r"a difference at 'regressor\.bias'"):
        engine.run(
            "test", step, data, data, TrainConfig(4, lr=0.01), callbacks=[Stop(99)], progress=False, checkpoint=path,
            resume=True,
        )  # fmt: skip


def rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Sparsity(Callback):
    """Logs a number of its own, and stops the run once."""

    def __init__(self, stop: int) -> None:
        self.stop, self.now = stop, 0

    def on_step_begin(self, step, total_steps, model):
        self.now = step
        if step == self.stop:
            raise KeyboardInterrupt

    def metrics(self):
        return {"sparsity": self.now / 100}


def test_logs_have_every_row_once_after_a_resumed_run(tmp_path):
    options = {"epochs": 4, "progress": False, "log_dir": tmp_path / "log", "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), loader(), callbacks=[Sparsity(stop=15)], **options)
    steps, epochs = (tmp_path / "log" / name for name in ("steps.csv", "epochs.csv"))
    assert [int(row["step"]) for row in rows(steps)] == list(range(12)) and len(rows(epochs)) == 2
    # killed while a third epoch, of which there is no checkpoint, was being written
    with open(steps, "a") as file:
        file.write("12,0.1,0.1,0.12\n13,0.1,0.1,0.13\n1")
    history = fine_tune(net(), loader(), loader(), callbacks=[Sparsity(stop=99)], resume=True, **options)
    assert [int(row["step"]) for row in rows(steps)] == list(range(24))
    assert [float(row["sparsity"]) for row in rows(steps)] == [i / 100 for i in range(24)]
    assert [int(row["epoch"]) for row in rows(epochs)] == [1, 2, 3, 4]
    for row, stats in zip(rows(epochs), history, strict=True):
        assert float(row["loss"]) == stats.loss and float(row["val_accuracy"]) == stats.val_accuracy
        assert row["ema_val_accuracy"] == ""
        losses = [float(r["loss"]) for r in rows(steps)[6 * stats.epoch - 6 : 6 * stats.epoch]]
        assert stats.loss == pytest.approx(sum(losses) / 6)
    fine_tune(net(), loader(), callbacks=[Sparsity(stop=99)], **{**options, "epochs": 1})
    assert len(rows(steps)) == 6 and len(rows(epochs)) == 1  # a new run in the same folder


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    written: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, step))

        def flush(self):
            written.append(("flush",))

        def close(self):
            written.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    options = {"progress": False, "log_dir": tmp_path, "checkpoint": tmp_path / "run.pt", "epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(48), loader(), callbacks=[Sparsity(stop=2)], **options)
    fine_tune(net(), loader(48), loader(), callbacks=[Sparsity(stop=9)], resume=True, **options)
    assert [entry[1] for entry in written if entry[0] == str(tmp_path)] == [0, 2]
    assert [entry[1] for entry in written if entry[0] == "train/sparsity"] == [0, 1, 2, 3]
    assert [entry[1] for entry in written if entry[0] == "epoch/val_accuracy"] == [1, 3]
    assert written.count(("close",)) == 2


def test_a_caller_s_accelerator_survives():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    own = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        fine_tune(linear(), loader(), epochs=1, progress=False)
        assert own.mixed_precision == "bf16" and own.num_processes == 1
        with own.autocast():
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    finally:
        AcceleratorState._reset_state(True)
    fine_tune(linear(), loader(), epochs=1, progress=False)
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_settings_come_from_a_config_or_by_name():
    config = TrainConfig(epochs=2, lr=0.03, optimizer="adamw", momentum=0.8)
    models = [linear() for _ in range(3)]
    fine_tune(models[0], loader(), config=config, progress=False)
    fine_tune(models[1], loader(), None, replace(config, epochs=9), epochs=2, progress=False)
    fine_tune(models[2], loader(), epochs=2, lr=0.03, optimizer="adamw", momentum=0.8, progress=False)
    assert same(models[0], models[1]) and same(models[0], models[2])
    with pytest.raises(TypeError, match=r"fine_tune: expected settings among epochs, lr, .*, seed, got on_step"):
        fine_tune(linear(), loader(), epochs=1, on_step=None)
    with pytest.raises(TypeError, match=r"fine_tune: expected a TrainConfig or epochs="):
        fine_tune(linear(), loader())


def test_cuda_graphs_change_nothing_on_the_cpu_and_a_run_may_go_on_without_them(tmp_path):
    """Their setting belongs to no checkpoint: it says how steps are launched, not what they compute."""
    plain, graphed = net(), net()
    fine_tune(plain, loader(), epochs=2, lr=0.01, progress=False)
    stop = StopAt(6)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(
            graphed, loader(), epochs=2, lr=0.01, progress=False, cuda_graph=True, callbacks=[stop],
            checkpoint=tmp_path / "run.pt",
        )  # fmt: skip
    fine_tune(
        graphed, loader(), epochs=2, lr=0.01, progress=False, callbacks=[Callback()], checkpoint=tmp_path / "run.pt",
        resume=True,
    )  # fmt: skip
    assert same(plain, graphed)


def test_fused_batch_norms_train_the_same_model_and_leave_its_own_layers(tmp_path):
    """Also when the run is interrupted, and resumed from a checkpoint whose running means are without biases."""
    plain, fused, resumed, seen = net(), net(), net(), []
    before, bias = list(fused.modules()), fused[0].bias

    class Look(Callback):
        def on_step_end(self, step, total_steps, model):
            seen.append((type(model[1]).__name__, model[0].bias))

    for model, options in ((plain, {}), (fused, {"fuse_batch_norm": True, "callbacks": [Look()]})):
        fine_tune(model, loader(), epochs=2, lr=0.01, progress=False, ema_decay=0.5, **options)
    assert set(seen) == {("FusedBatchNorm2d", None)}
    assert [type(m) for m in fused.modules()] == [type(m) for m in before] and fused[0].bias is bias
    assert same(net(), fused) is False and fused.state_dict().keys() == plain.state_dict().keys()
    for (name, own), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    common = {"epochs": 2, "lr": 0.01, "progress": False, "ema_decay": 0.5, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(resumed, loader(), callbacks=[StopAt(8)], fuse_batch_norm=True, **common)
    assert [type(m) for m in resumed.modules()] == [type(m) for m in before] and resumed[0].bias is not None
    with pytest.raises(ValueError, match="fuse_batch_norm"):
        fine_tune(resumed, loader(), callbacks=[Callback()], resume=True, **common)
    fine_tune(net(), loader(), callbacks=[Callback()], resume=True, fuse_batch_norm=True, **common)
    fine_tune(resumed, loader(), callbacks=[Callback()], resume=True, fuse_batch_norm=True, **common)
    assert same(resumed, fused)


def test_fused_batch_norms_need_a_model_that_can_be_traced():
    model = net()
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with pytest.raises(ValueError, match=r"^fine_tune: fuse_batch_norm=True: fuse_batch_norm_: expected a model that"):
        fine_tune(model, loader(), epochs=1, progress=False, fuse_batch_norm=True)


@pytest.mark.parametrize(("options", "got"), [({"accumulate": 2}, "accumulate=2"), ({"precision": "fp16"}, "'fp16'")])
def test_cuda_graphs_of_steps_that_they_cannot_hold_are_refused(options, got):
    with pytest.raises(ValueError, match=f"^TrainConfig: expected accumulate=1 and precision .* got .*{got}"):
        TrainConfig(epochs=1, cuda_graph=True, **options)
