"""The training loop: learning, exact resumption, seeds, masks, modes, and every refusal."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import pytest
import torch
from places import TESTS
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_runs import StopAt, killed_run, loader, net, samples

from slimkernels.compress.distillation.distill import distill
from slimkernels.compress.distillation.terms import Hint
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import masks, prune_
from slimkernels.compress.pruning.sparse_training import SparseTraining
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.config import TrainConfig, build_optimizer
from slimkernels.compress.training.evaluation import device_of, mode_of
from slimkernels.compress.training.train import evaluate, fine_tune
from slimkernels.data import TensorLoader, digits_loaders
from slimkernels.files import seal
from slimkernels.models import vgg_digits


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    tensors = [name for name, value in left.items() if isinstance(value, torch.Tensor)]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in tensors)


class Never(Callback):
    """In the place of a `StopAt` when the run goes on."""


def test_small_vgg_learns_the_digits():
    train, test = digits_loaders()
    torch.manual_seed(0)
    model = vgg_digits(width=16)
    history = fine_tune(model, train, test, epochs=3, progress=False)
    assert history[-1].val_accuracy >= 0.95
    assert [stats.epoch for stats in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss / 4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step", "constant"])
def test_every_optimizer_and_schedule_learns_and_resumes_bitwise(tmp_path, optimizer, schedule):
    recipe = {"epochs": 4, "lr": 0.02 if optimizer == "sgd" else 0.002, "optimizer": optimizer, "schedule": schedule,
              "lr_step_epochs": 2}  # fmt: skip
    whole = net()
    history = fine_tune(whole, loader(), progress=False, **recipe)
    assert history[-1].loss < history[0].loss and evaluate(whole, loader()) > 0.9
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), progress=False, checkpoint=path, callbacks=[StopAt(15)], **recipe)
    resumed = net(seed=1)
    again = fine_tune(resumed, loader(), progress=False, checkpoint=path, resume=True, callbacks=[Never()], **recipe)
    assert same(whole, resumed)
    assert [(s.epoch, s.loss, s.lr) for s in again] == [(s.epoch, s.loss, s.lr) for s in history]


@pytest.mark.parametrize("importance", ["magnitude", "movement"])
def test_gradual_pruning_resumes_bitwise(tmp_path, importance):
    def callbacks(*more):
        return [*more, GradualPruning(0.75, (16, 1), times=10, importance=importance)]

    whole, path = net(), tmp_path / "run.pt"
    fine_tune(whole, loader(), epochs=4, progress=False, callbacks=callbacks())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(net(), loader(), epochs=4, progress=False, checkpoint=path, callbacks=callbacks(StopAt(14)))
    resumed = net(seed=1)
    with pytest.raises(ValueError, match=r"expected 2 callbacks as in the checkpoint .*, got 1"):
        fine_tune(net(), loader(), epochs=4, progress=False, checkpoint=path, resume=True, callbacks=callbacks())
    fine_tune(resumed, loader(), epochs=4, progress=False, checkpoint=path, resume=True, callbacks=callbacks(Never()))
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
            fine_tune(net(), fresh(), epochs=3, progress=False, checkpoint=path, callbacks=[StopAt(13)])
        fine_tune(resumed, fresh(seed=8), epochs=3, progress=False, checkpoint=path, resume=True, callbacks=[Never()])
        assert same(whole, resumed)


KILLED = """
    import sys, time
    sys.path.insert(0, {helpers!r})
    import torch
    torch.set_num_threads(1)
    from training_runs import Slow, killed_run
    killed_run({path!r}, [Slow()])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_killed_run_resumes_bitwise(tmp_path):
    path = tmp_path / "run.pt"
    code = textwrap.dedent(KILLED).format(helpers=str(TESTS / "helpers"), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = killed_run(str(tmp_path / "whole.pt"), [Never()])
        done = len(torch.load(path, weights_only=True)["history"])
        resumed = killed_run(str(path), [Never()], resume=True)
    finally:
        torch.set_num_threads(threads)
    assert 1 <= done < 6
    assert same(whole, resumed)


@pytest.fixture
def small_files():
    """Files may not grow beyond 4 KiB: writing more fails as on a full disk, in the middle of the file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield limited
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_can_be_resumed(tmp_path, small_files):
    path, whole = tmp_path / "run.pt", net()
    fine_tune(whole, loader(), epochs=3, progress=False, callbacks=[Never()])

    class DiskFills(Callback):
        def on_epoch_end(self, epoch, model):
            if epoch == 1:
                stack.enter_context(small_files())

    with (
        contextlib.ExitStack() as stack,
        pytest.raises(OSError, match=r"fine_tune: expected to write the checkpoint of epoch 2, got .*still holds"),
    ):
        fine_tune(net(), loader(), epochs=3, progress=False, checkpoint=path, callbacks=[DiskFills()])
    assert os.listdir(tmp_path) == ["run.pt"]
    assert len(torch.load(path, weights_only=True)["history"]) == 1
    resumed = net(seed=1)
    fine_tune(resumed, loader(), epochs=3, progress=False, checkpoint=path, resume=True, callbacks=[Never()])
    assert same(whole, resumed)


def test_a_failed_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    def no_space(state, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space left on device; there is no earlier one") as caught:
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=tmp_path / "run.pt")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


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
    with pytest.raises(ValueError, match="does not end with its SHA-256"):
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    torch.save({"format": 99}, path)
    seal(path)
    with pytest.raises(ValueError, match="training checkpoint of format 3"):
        fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="a checkpoint path with resume=True"):
        fine_tune(net(), loader(), epochs=1, progress=False, resume=True)


def test_callbacks_in_another_order_are_refused_before_the_model_changes(tmp_path):
    path = tmp_path / "run.pt"
    pruning, sparse = GradualPruning(0.5, (16, 1)), SparseTraining(begin=0.9)
    fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, callbacks=[pruning, sparse])
    model = net(1)
    parameters = list(model.parameters())  # whose order in the model the masks change
    before = [p.detach().clone() for p in parameters]
    for callbacks in ([sparse, pruning], [GradualPruning(0.5, (16, 1), importance="taylor", begin=0.1), sparse]):
        with pytest.raises(ValueError, match=r"got SparseTraining in the place of another|of importance 'taylor'"):
            fine_tune(model, loader(), epochs=1, progress=False, checkpoint=path, resume=True, callbacks=callbacks)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    class Step(Callback):
        def on_step_begin(self, step, total_steps, model):
            raise AssertionError("a step was run")

    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.pt"):
        with pytest.raises(OSError, match="fine_tune: expected a checkpoint that can be written, got"):
            fine_tune(net(), loader(), epochs=1, progress=False, checkpoint=path, callbacks=[Step()])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_an_optimizer_of_other_parameters_is_refused():
    """It would run without an error, and train nothing, or everything but the new factors."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fine_tune(model, loader(), epochs=1, optimizer=optimizer, progress=False)
    with pytest.raises(ValueError, match=r"optimizer of the model's parameters, got one without '0\.weight' and with"):
        fine_tune(net(), loader(), epochs=1, optimizer=optimizer, progress=False)
    factorize_(model, rank=2, layers="3")
    with pytest.raises(ValueError, match=r"got one without '3\.\w+' and with 2 tensors that are none of the model's"):
        fine_tune(model, loader(), epochs=1, optimizer=optimizer, progress=False)


@pytest.mark.parametrize("field", ["epochs", "accumulate", "lr_step_epochs", "seed", "lr", "weight_decay", "momentum"])
def test_settings_of_another_type_are_named(field):
    for wrong in ("1e-3", True, *([1.5] if field in ("epochs", "accumulate", "lr_step_epochs", "seed") else [])):
        with pytest.raises(TypeError, match=f"TrainConfig: expected {field} to be an? (int|number), got {wrong!r}"):
            TrainConfig(**{"epochs": 2, field: wrong})


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
        fine_tune(model.eval(), loader(), epochs=1, progress=False, callbacks=[StopAt(2)])
    assert not any(module.training for module in model.modules())


class NormEval(nn.Module):
    """Keeps its batch norm in eval mode by a ``train`` method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def train(self, mode=True):
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("before", ["fresh", "train", "eval"])
@pytest.mark.parametrize("run", ["fine_tune", "distill"])
def test_a_train_method_of_the_model_s_own_is_respected(before, run):
    model = NormEval()
    if before != "fresh":
        model.train(before == "train")
    norm, modes = model.body[1], [module.training for module in model.modules()]
    statistics = norm.running_mean.clone()
    settings = {"epochs": 2, "lr": 1e-3, "ema_decay": 0.5, "progress": False}
    if run == "fine_tune":
        fine_tune(model, loader(), loader(), **settings)
    else:
        distill(model, net(), loader(), loader(), **settings)
    assert torch.equal(norm.running_mean, statistics) and int(norm.num_batches_tracked) == 0
    assert [module.training for module in model.modules()] == modes


def test_layers_that_were_put_into_eval_mode_stay_there_and_others_are_trained():
    model = nn.Sequential(net()[:3], nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 3))
    model[0].eval()
    seen = []

    class Look(Callback):
        def on_step_end(self, step, total_steps, model):
            seen.append([module.training for module in model.modules()])

    modes = [module.training for module in model.modules()]
    fine_tune(model, loader(), loader(), epochs=2, progress=False, callbacks=[Look()])
    assert all(look == modes for look in seen) and len(seen) == 12
    assert int(model[0][1].num_batches_tracked) == 0 and int(model[1].num_batches_tracked) == 12
    model.eval()
    fine_tune(model, loader(), epochs=1, progress=False)  # evaluated before: nothing in it counts as frozen
    assert int(model[0][1].num_batches_tracked) == 6 and not model.training


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
@pytest.mark.parametrize("run", ["fine_tune", "distill"])
def test_the_model_inside_a_wrapper_is_trained(wrap, run):
    inside, plain = net(), net()
    wrapped = wrap(inside)
    inside = wrapped.module if hasattr(wrapped, "module") else inside
    settings = {"epochs": 1, "progress": False, "callbacks": [GradualPruning(0.5, (16, 1))]}
    for model in (wrapped, plain):
        if run == "fine_tune":
            fine_tune(model, loader(), **settings)
        else:
            distill(model, nn.DataParallel(net(seed=1)), loader(), loss=Hint("0"), **settings)
    assert same(inside, plain) and list(masks(inside)) == ["3"]


@pytest.mark.parametrize("run", ["fine_tune", "distill"])
@pytest.mark.parametrize("what", ["no length", "generator", "dict", "text", "soft labels", "one sample", "auxiliary"])
def test_what_the_loop_cannot_take_is_named_with_a_way_out(run, what):
    images, labels = samples(17)
    model = net()

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(images, labels, strict=True)

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            y = self.body(x)
            return (y, y) if self.training else y

    cases = {
        "no length": (DataLoader(Stream(), 4), TypeError, "a loader with a length, .* got DataLoader.*__len__"),
        "generator": (iter([(images, labels)]), TypeError, "a loader with a length, .* got list_iterator"),
        "dict": ([{"pixels": images, "labels": labels}], TypeError, "got a dict with pixels, labels; .*collate_fn"),
        "text": ([(images, "ab")], TypeError, "got a tuple of Tensor, str; .*collate_fn"),
        "soft labels": ([(images, torch.rand(17, 3))], ValueError, r"int64 labels .*labels.argmax\(1\)"),
        "one sample": (
            DataLoader(TensorDataset(images, labels), 16),
            ValueError,
            "at least 2 .*drop_last=True",
        ),
        "auxiliary": ([(images, labels)], ValueError, "from the model, got tuple in train mode; .*auxiliary outputs"),
    }
    batches, error, message = cases[what]
    if what == "one sample":
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    elif what == "auxiliary":
        model = Auxiliary()
    with pytest.raises(error, match=rf"^{run}: expected .*{message}"):
        if run == "fine_tune":
            fine_tune(model, batches, epochs=1, progress=False)
        else:
            distill(model, net(seed=1), batches, epochs=1, progress=False)


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

    matrices, vectors = build_optimizer("fine_tune", net(), TrainConfig(1, weight_decay=1e-2)).param_groups
    assert matrices["weight_decay"] == 1e-2 and vectors["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in matrices["params"]) and all(p.dim() < 2 for p in vectors["params"])


def test_nan_loss_names_epoch_and_step():
    images, labels = samples(32)
    model = net()

    class Poison(Callback):
        def on_step_begin(self, step, total_steps, model):
            if step == 3:
                with torch.no_grad():
                    model[7].bias.fill_(float("nan"))

    bad = TensorLoader(images, labels, batch_size=16)
    with pytest.raises(FloatingPointError, match=r"fine_tune: loss is nan at epoch 2, step 2 of 2"):
        fine_tune(model, bad, epochs=3, callbacks=[Poison()], progress=False)


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
        (batches([0, 1]), {"optimizer": "lion"}, "optimizer to be one of 'sgd', 'adamw', got 'lion'"),
        (batches([0, 1]), {"schedule": "linear"}, "schedule to be one of 'onecycle', .* got 'linear'"),
        (batches([0, 1]), {"precision": "fp8"}, "precision to be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        (batches([0, 1]), {"precision": "fp16"}, "precision 'fp32' or 'bf16' for a model on the CPU, got 'fp16'"),
        (batches([0, 1]), {"accumulate": 0}, r"accumulate in \[1, inf\), got 0"),
        (batches([0, 1]), {"ema_decay": 1.0}, r"ema_decay in \(0, 1\) or None, got 1.0"),
        (batches([0, 1]), {"warmup_epochs": 1}, r"warmup_epochs in \[0, epochs\), got 1"),
        (batches([0, 1]), {"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\), got 1.0"),
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
