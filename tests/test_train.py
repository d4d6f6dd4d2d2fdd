"""The training loop: learning, exact resumption, seeds, masks, modes, and every refusal."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimkernels.compress.loop import _optimizer, device_of, mode_of
from slimkernels.compress.prune import masks, prune_
from slimkernels.compress.train import GradualPruning, evaluate, fine_tune
from slimkernels.data import TensorLoader, digits_loaders
from slimkernels.models import vgg_digits


def samples(n: int = 96, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    images[torch.arange(n), 0, labels] += 2.0  # the class lights up one row
    return images, labels


def loader(batch_size: int = 16, **kwargs) -> TensorLoader:
    return TensorLoader(*samples(), batch_size=batch_size, shuffle=True, **kwargs)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(512, 3),
        )


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    tensors = [name for name, value in left.items() if isinstance(value, torch.Tensor)]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in tensors)


def stop_at(step: int, inner=None):
    """A step hook that ends the run as Ctrl-C does, after passing the step on to ``inner``."""

    def hook(now, total, model):
        if now == step:
            raise KeyboardInterrupt
        if inner is not None:
            inner(now, total, model)

    if inner is not None:
        hook.prepare = inner.prepare
    return hook


def test_small_vgg_learns_the_digits():
    train, test = digits_loaders()
    torch.manual_seed(0)
    model = vgg_digits(width=32)
    history = fine_tune(model, train, test, epochs=4, progress=False)
    assert history[-1].val_accuracy >= 0.97
    assert [stats.epoch for stats in history] == [1, 2, 3, 4]
    assert history[-1].loss < history[0].loss / 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_every_optimizer_and_schedule_learns_and_resumes_bitwise(tmp_path, optimizer, schedule):
    recipe = {"epochs": 4, "lr": 0.02 if optimizer == "sgd" else 0.002, "optimizer": optimizer, "schedule": schedule}
    whole = net()
    history = fine_tune(whole, loader(), progress=False, **recipe)
    assert history[-1].loss < history[0].loss and evaluate(whole, loader()) > 0.9
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), progress=False, checkpoint=path, on_step=stop_at(15), **recipe)
    resumed = net(seed=1)
    again = fine_tune(resumed, loader(), progress=False, checkpoint=path, resume=True, **recipe)
    assert same(whole, resumed)
    assert [(s.epoch, s.loss, s.lr) for s in again] == [(s.epoch, s.loss, s.lr) for s in history]


def test_gradual_pruning_resumes_bitwise(tmp_path):
    def hook():
        return GradualPruning(0.75, (16, 1), times=10)

    whole, path = net(), tmp_path / "run.pt"
    fine_tune(whole, loader(), epochs=4, progress=False, on_step=hook())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), epochs=4, progress=False, checkpoint=path, on_step=stop_at(14, hook()))
    resumed = net(seed=1)
    fine_tune(resumed, loader(), epochs=4, progress=False, checkpoint=path, resume=True, on_step=hook())
    assert 1 - masks(whole)["3"].mask.float().mean() == 0.75
    assert same(whole, resumed)


def test_shuffling_dataloader_resumes_bitwise(tmp_path):
    def shuffled(generator):
        return DataLoader(TensorDataset(*samples()), batch_size=16, shuffle=True, generator=generator)

    for seeded in (False, True):
        path = tmp_path / f"run{seeded}.pt"

        def fresh(seed=7, seeded=seeded):
            return shuffled(torch.Generator().manual_seed(seed) if seeded else None)

        whole, resumed = net(), net()
        fine_tune(whole, fresh(), epochs=3, progress=False)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(net(), fresh(), epochs=3, progress=False, checkpoint=path, on_step=stop_at(13))
        fine_tune(resumed, fresh(seed=8), epochs=3, progress=False, checkpoint=path, resume=True)
        assert same(whole, resumed)


KILLED = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_train import loader, net
    from slimkernels.compress.train import fine_tune
    fine_tune(net(), loader(), epochs=6, progress=False, checkpoint={path!r},
              on_step=lambda step, total, model: time.sleep(0.03))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_killed_run_resumes_bitwise(tmp_path):
    path = tmp_path / "run.pt"
    code = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, resumed = net(), net(seed=1)
        fine_tune(whole, loader(), epochs=6, progress=False)
        done = len(torch.load(path, weights_only=True)["history"])
        fine_tune(resumed, loader(), epochs=6, progress=False, checkpoint=path, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert 1 <= done < 6
    assert same(whole, resumed)


def test_failed_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path)
    before = path.read_bytes()

    def half_written(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]


def test_finished_run_resumes_to_itself(tmp_path):
    path, first, second = tmp_path / "sub" / "run.pt", net(), net(seed=1)
    fine_tune(first, loader(), epochs=2, progress=False, checkpoint=path, resume=True)
    history = fine_tune(second, loader(), epochs=2, progress=False, checkpoint=path, resume=True)
    assert same(first, second) and len(history) == 2


def test_resume_refuses_what_does_not_belong(tmp_path):
    path = tmp_path / "run.pt"
    fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path)
    with pytest.raises(ValueError, match=r"expected lr=0.05 as in the checkpoint .*run\.pt, got 0.1"):
        fine_tune(net(), loader(), epochs=1, lr=0.1, progress=False, checkpoint=path, resume=True)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"a difference at '0\.bias'"):
        fine_tune(other, loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    wider = net()
    wider[7] = nn.Linear(512, 4)
    with pytest.raises(ValueError, match=r"a difference at '7\.bias'"):
        fine_tune(wider, loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="unreadable file"):
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="training checkpoint of format 1"):
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="a checkpoint path with resume=True"):
        fine_tune(net(), loader(), epochs=1, progress=False, resume=True)


def test_seed_decides_and_the_caller_s_randomness_is_left_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    runs = [net() for _ in range(3)]
    for model, seed in zip(runs, (0, 0, 1), strict=True):
        fine_tune(model, loader(), epochs=1, seed=seed, progress=False)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_restored_per_module():
    model = net()
    model[1].eval()
    fine_tune(model, loader(), epochs=1, progress=False)
    evaluate(model, loader())
    assert model.training and not model[1].training and model[3].training
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model.eval(), loader(), epochs=1, progress=False, on_step=stop_at(2))
    assert not any(module.training for module in model.modules())


def test_mode_of_calls_train_only_when_something_changes():
    class Counting(nn.Module):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    model = Counting().eval()
    calls = model.calls
    with mode_of(model, training=False):
        pass
    assert model.calls == calls


def test_masks_do_not_leak():
    model = prune_(net(), 0.75, (16, 1))
    grid = masks(model)["3"].mask.clone()
    original = model[3].parametrizations.weight.original
    fine_tune(model, loader(), epochs=2, momentum=0.9, progress=False)
    assert model[3].parametrizations.weight.original is original
    assert torch.equal(masks(model)["3"].mask, grid)
    blocks = model[3].weight.detach().unflatten(0, (-1, 16)).abs().sum(1).permute(0, 2, 3, 1).reshape(grid.shape)
    assert torch.equal(blocks != 0, grid)


def test_no_weight_decay_on_vectors_and_users_optimizers_are_used():
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    model[7].weight.requires_grad_(True)
    frozen = model[3].weight.clone()
    user = torch.optim.SGD(model[7].parameters(), lr=0.1)
    bias = model[0].bias.clone()
    fine_tune(model, loader(), epochs=1, optimizer=user, progress=False)
    assert torch.equal(model[3].weight, frozen) and torch.equal(model[0].bias, bias)
    assert user.state_dict()["param_groups"][0]["lr"] < 1e-3

    matrices, vectors = _optimizer("fine_tune", net(), "sgd", 0.1, 0.9, 1e-2).param_groups
    assert matrices["weight_decay"] == 1e-2 and vectors["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in matrices["params"]) and all(p.dim() < 2 for p in vectors["params"])


@pytest.mark.parametrize("total", [1, 2, 3, 10, 100, 101])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.7), (0.2, 1.0), (0.5, 0.51), (0.98, 1.0)])
def test_gradual_pruning_rises_to_its_target(total, begin, end, monkeypatch):
    seen: list[tuple[int, float]] = []
    hook = GradualPruning(0.9, (16, 1), begin=begin, end=end, times=20)
    monkeypatch.setattr(
        "slimkernels.compress.train.prune_", lambda model, sparsity, *args, **kwargs: seen.append((now, sparsity))
    )
    for now in range(total):
        hook(now, total, nn.Identity())
    steps, values = zip(*seen, strict=True)
    assert values[-1] == 0.9 and list(values) == sorted(values)
    assert len(seen) <= 22 and min(steps) >= int(begin * total)
    assert max(steps) <= max(int(end * total), int(begin * total))


def test_gradual_pruning_by_layer_and_bad_shares():
    model = net()
    hook = GradualPruning({"3": 0.5}, (16, 1))
    hook.prepare(model)
    assert masks(model)["3"].mask.all()
    fine_tune(model, loader(), epochs=1, on_step=hook, progress=False)
    assert 1 - masks(model)["3"].mask.float().mean() == 0.5
    with pytest.raises(ValueError, match="0 <= begin < end <= 1"):
        GradualPruning(begin=0.5, end=0.5)


def test_nan_loss_names_epoch_and_step():
    images, labels = samples(32)
    model = net()

    def poison(step, total, model):
        if step == 3:
            with torch.no_grad():
                model[7].bias.fill_(float("nan"))

    bad = TensorLoader(images, labels, batch_size=16)
    with pytest.raises(FloatingPointError, match=r"fine_tune: loss is nan at epoch 2, step 2 of 2"):
        fine_tune(model, bad, epochs=3, on_step=poison, progress=False)


class Batches(list):
    """A loader of given batches whose claimed length may be wrong."""

    claimed: int

    def __len__(self):
        return getattr(self, "claimed", super().__len__())


def batches(*labels, claimed=None):
    out = Batches((torch.randn(len(y), 1, 4, 4), torch.as_tensor(y)) for y in labels)
    if claimed is not None:
        out.claimed = claimed
    return out


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (batches(), {}, "at least one training batch, got an empty loader"),
        (batches([0, 3]), {}, r"labels in \[0, 3\), the model's classes, got 3"),
        (batches([0, -1]), {}, r"labels in \[0, 3\), the model's classes, got -1"),
        (batches([0.0, 1.0]), {}, "expected int64 labels"),
        (batches([0, 1], claimed=2), {}, "expected 2 batches .* got 1"),
        (batches([0, 1], [0, 1], claimed=1), {}, "expected 1 batches .* got more"),
        (batches([0, 1]), {"epochs": 0}, "epochs >= 1"),
        (batches([0, 1]), {"lr": 0.0}, "lr > 0"),
        (batches([0, 1]), {"lr": float("nan")}, "lr > 0"),
        (batches([0, 1]), {"optimizer": "lion"}, "optimizer 'sgd', 'adamw' or a torch optimizer, got 'lion'"),
        (batches([0, 1]), {"schedule": "step"}, "schedule 'onecycle'"),
    ],
)
def test_fine_tune_refuses(data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(net(), data, progress=False, **{"epochs": 1, **kwargs})


def test_fine_tune_refuses_models():
    with pytest.raises(ValueError, match=r"logits of shape \(16, classes\) from the model, got \(16, 1, 4, 4\)"):
        fine_tune(nn.Conv2d(1, 1, 3, padding=1), loader(), epochs=1, progress=False)
    with pytest.raises(ValueError, match="trainable parameters"):
        fine_tune(nn.Flatten(), loader(), epochs=1, progress=False)


def test_evaluate_counts_every_sample():
    images, labels = samples(10)

    class Fixed(nn.Module):
        def forward(self, x):
            return torch.eye(3)[torch.zeros(len(x), dtype=torch.int64)]

    assert device_of(Fixed()) == torch.device("cpu")
    expected = float((labels == 0).float().mean())
    assert evaluate(Fixed(), TensorLoader(images, labels, batch_size=3)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="evaluate: expected at least one sample"):
        evaluate(Fixed(), batches())


def test_no_output_without_a_terminal(capfd):
    fine_tune(net(), loader(), epochs=1, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fine_tune(net(), loader(), epochs=2, progress=True)
    assert "epoch" in terminal.getvalue()
