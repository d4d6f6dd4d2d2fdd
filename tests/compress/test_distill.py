"""Distillation: what the step computes, and students that learn from teachers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import convert
from slimkernels.compress.distillation.distill import DistillationStep, distill
from slimkernels.compress.distillation.losses import attention_transfer_loss, decoupled_kd_loss, hint_loss, kd_loss
from slimkernels.compress.distillation.terms import KD, AttentionTransfer, DecoupledKD, Hint, Signals, Term
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import masks, prune_
from slimkernels.compress.training.train import TrainConfig, evaluate, fine_tune
from slimkernels.data import TensorLoader
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d


def blobs(n: int = 256, batch_size: int = 32, classes: int = 4, seed: int = 0, **options) -> TensorLoader:
    """Four well separated Gaussian clusters as 1x4x4 images."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    images = centres[labels] + 0.5 * torch.randn(n, 1, 4, 4, generator=generator)
    return TensorLoader(images, labels, batch_size=batch_size, shuffle=True, **options)


def net(classes: int = 4, width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(width * 16, classes),
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    teacher = net()
    fine_tune(teacher, blobs(), epochs=3, progress=False)
    return teacher.eval()


@pytest.fixture
def teacher(trained) -> nn.Module:
    return copy.deepcopy(trained)


# ---- the step


def pair() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return net(width=16).eval(), net().eval(), torch.randn(6, 1, 4, 4), torch.randint(4, (6,))


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (KD(), lambda z, v, y: kd_loss(z, v, y, 3.0, 0.6)),
        (
            KD(temperature=7.0, weight=0.5),
            lambda z, v, y: (
                0.4 * F.cross_entropy(z, y) + 0.5 * kd_loss(z, v, y, 7.0, 0.6) - 0.2 * F.cross_entropy(z, y)
            ),
        ),
        (
            DecoupledKD(2.0, 3.0),
            lambda z, v, y: 0.4 * F.cross_entropy(z, y) + 0.6 * decoupled_kd_loss(z, v, y, 3.0, 2.0, 3.0),
        ),
    ],
)
def test_step_mixes_soft_and_hard_losses(term, expected):
    student, teacher, x, y = pair()
    step = DistillationStep(student, teacher, [term], x[:2], temperature=3.0, soft_weight=0.6)
    torch.testing.assert_close(step(x, y), expected(student(x), teacher(x), y), rtol=1e-5, atol=1e-6)


def test_step_matches_the_named_layers_of_both_models():
    student, teacher, x, y = pair()
    terms = [Hint({"0": "3"}, weight=2.0), AttentionTransfer("3", weight=5.0)]
    step = DistillationStep(student, teacher, terms, x[:2], soft_weight=0.25)
    regressor = step.matchers[0][0]
    assert (regressor.in_channels, regressor.out_channels, regressor.kernel_size) == (16, 32, (1, 1))
    with step.attached():
        loss = step(x, y)
    first, second = student[0](x), student[:4](x)  # what the in-place ReLUs see, before they act
    wanted = teacher[:4](x)
    soft = 2.0 * hint_loss(regressor(first), wanted) + 5.0 * attention_transfer_loss(second, wanted)
    torch.testing.assert_close(loss, 0.75 * F.cross_entropy(student(x), y) + 0.25 * soft, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert bool(regressor.weight.grad.any()) and all(p.grad is None for p in teacher.parameters())
    assert not student[0]._forward_hooks and not teacher[3]._forward_hooks


def test_maps_of_different_sizes_are_pooled_to_the_smaller():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(20, 2))
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 0])
    step = DistillationStep(student, teacher, [AttentionTransfer("0")], x, soft_weight=1.0)
    with step.attached():
        expected = attention_transfer_loss(F.avg_pool2d(student[0](x), 2), teacher[0](x))
        torch.testing.assert_close(step(x, y), expected)


def test_teacher_is_no_part_of_the_step():
    student, teacher, x, _ = pair()
    step = DistillationStep(student, teacher, [KD(), Hint("0")], x)
    owned = {id(t) for t in [*step.parameters(), *step.buffers()]}
    assert not owned & {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
    assert {name.split(".")[0] for name in step.state_dict()} == {"model", "matchers"}
    assert step.train() is step and not teacher.training


def test_teacher_follows_the_autocast_of_the_student():
    student, teacher, x, y = pair()
    seen = []
    teacher[7].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = DistillationStep(student, teacher, [KD()], x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(x, y)
    assert seen == [torch.float32, torch.bfloat16] and loss.dtype == torch.float32


@dataclasses.dataclass(frozen=True)
class LogitDifference(Term):
    """A term from outside."""

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        return F.mse_loss(signals.student_logits, signals.teacher_logits)


def test_a_term_of_ones_own():
    student, teacher, x, y = pair()
    step = DistillationStep(student, teacher, [LogitDifference(weight=3.0)], x, soft_weight=1.0)
    torch.testing.assert_close(step(x, y), 3.0 * F.mse_loss(student(x), teacher(x)))
    assert step.recipe() == {"terms": ["LogitDifference(weight=3.0)"], "temperature": 4.0, "soft_weight": 1.0}


# ---- runs


def test_student_without_labels_reaches_its_teacher(teacher):
    torch.manual_seed(1)
    student, test = net(width=16), blobs(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    history = distill(student, teacher, blobs(), test, epochs=4, soft_weight=1.0, progress=False)
    assert len(history) == 4 and history[-1].loss < history[0].loss
    assert history[-1].val_accuracy > 0.9
    assert teacher.training and all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_config_and_keywords_are_the_same_run(teacher):
    def weights(*args, **kwargs) -> Tensor:
        torch.manual_seed(2)
        student = net(width=16)
        distill(student, teacher, blobs(64), None, *args, progress=False, **kwargs)
        return student[7].weight.detach()

    config = TrainConfig(epochs=1, lr=0.02, schedule="constant")
    assert torch.equal(weights(config), weights(epochs=1, lr=0.02, schedule="constant"))
    assert not torch.equal(weights(config), weights(config, temperature=20.0))
    assert not torch.equal(weights(config), weights(config, loss="dkd"))
    with pytest.raises(TypeError, match=r"distill: expected settings among epochs, .*, got epoch"):
        weights(config, epoch=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_regressors_have_the_dtype_of_the_student(dtype):
    images, labels = torch.rand(8, 3, 4, 4).to(dtype), torch.arange(8) % 4
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(4 * width, 4)).to(dtype) for width in (2, 5)
    )
    distill(student, teacher, [(images, labels)], loss=Hint("0"), epochs=1, progress=False)
    step = DistillationStep(student, teacher, [Hint("0")], images)
    assert [p.dtype for p in step.matchers.parameters()] == [dtype] * 2


@pytest.mark.parametrize("loss", ["dkd", (KD(), Hint({"2": "2"}), AttentionTransfer({"4": "4"}, weight=10.0))])
def test_other_losses_train(teacher, loss):
    torch.manual_seed(3)
    student = net(width=16)
    distill(student, teacher, blobs(), epochs=3, lr=0.02, loss=loss, progress=False)
    assert evaluate(student, blobs(seed=1)) > 0.9
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])


def test_hints_resume_with_their_regressors(teacher, tmp_path):
    def run(epochs: int, resume: bool, stop: bool = False) -> nn.Module:
        torch.manual_seed(4)
        student = net(width=16)
        options = {"loss": Hint({"2": "2"}), "checkpoint": tmp_path / "run.pt", "resume": resume, "progress": False}

        class Stop(GradualPruning):
            def on_epoch_end(self, epoch, model):
                if stop and epoch == 1:
                    raise KeyboardInterrupt

        callbacks = [Stop(0.5, (16, 1))]
        try:
            distill(student, teacher, blobs(96), epochs=epochs, callbacks=callbacks, **options)
        except KeyboardInterrupt:
            assert stop
        return student

    whole = run(3, resume=False)
    (tmp_path / "run.pt").unlink()
    run(3, resume=False, stop=True)
    resumed = run(3, resume=True)
    tensors = [[*model.parameters(), *model.buffers()] for model in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_masks_survive_distillation(teacher):
    student = prune_(copy.deepcopy(teacher), 0.75, (16, 1))
    grid = masks(student)["3"].mask.clone()
    distill(student, teacher, blobs(), epochs=2, progress=False)
    assert torch.equal(masks(student)["3"].mask, grid)
    blocks = student[3].weight.detach().unflatten(0, (-1, 16)).abs().sum(1).permute(0, 2, 3, 1).reshape(grid.shape)
    assert torch.equal(blocks != 0, grid)
    assert evaluate(student, blobs(seed=1)) > 0.9


def test_gradual_pruning_and_factorization_in_one_run(teacher):
    student = copy.deepcopy(teacher)
    factorize_(student, "tai", rank={"0": 3})
    pruning = GradualPruning(0.75, (16, 1), layers=["3"])
    distill(student, teacher, blobs(), epochs=3, progress=False, callbacks=[pruning])
    assert isinstance(student[0], LowRankConv2d)
    assert 1 - masks(student)["3"].mask.float().mean() == pytest.approx(0.75)
    assert evaluate(student, blobs(seed=1)) > 0.9


def test_sparse_kernels_train_under_distillation(teacher):
    pruned = prune_(copy.deepcopy(teacher), 0.75, (16, 1), layers=["3"])
    student = convert(pruned, training=True)
    layer = student[3]
    assert isinstance(layer, BlockSparseConv2d)
    before = layer.values.detach().clone()
    pattern = layer.crow_indices.clone(), layer.col_indices.clone()
    history = distill(student, teacher, blobs(), epochs=2, lr=0.02, progress=False)
    assert history[-1].loss < history[0].loss and student[3] is layer
    assert not torch.equal(layer.values, before)
    assert torch.equal(layer.crow_indices, pattern[0]) and torch.equal(layer.col_indices, pattern[1])
    dense = layer.to_dense().weight.detach()
    stored = masks(pruned)["3"](torch.ones_like(dense)) != 0
    assert not bool(dense[~stored].any()) and evaluate(student, blobs(seed=1)) > 0.9


class Counting(nn.Module):
    """Counts the samples that a model sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.samples = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.model(x)


def test_cached_logits_are_the_live_ones_and_cost_one_pass(teacher):
    students, seen = [], []
    for cache in (False, True):
        torch.manual_seed(5)
        student, counting = net(width=16), Counting(teacher)
        distill(student, counting, blobs(96, with_indices=True), epochs=3, lr=0.02, cache_logits=cache, progress=False)
        students.append(student)
        seen.append(counting.samples - 2)  # two for the check of the logits
    assert seen == [3 * 96, 96]
    for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cache_refuses_what_it_cannot_hold(teacher):
    run = {"epochs": 1, "cache_logits": True, "progress": False}
    with pytest.raises(ValueError, match="without augmentation with cache_logits=True, got flip=True"):
        distill(net(), teacher, blobs(64, flip=True), **run)
    with pytest.raises(ValueError, match="terms of logits alone with cache_logits=True, got Hint"):
        distill(net(), teacher, blobs(64, with_indices=True), loss=Hint("0"), **run)
    with pytest.raises(ValueError, match="with cache_logits=True, got no indices; a TensorLoader gives them"):
        distill(net(), teacher, blobs(64), **run)


# ---- bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "distill: expected temperature > 0"),
        ({"soft_weight": 2}, ValueError, r"distill: expected soft_weight in \[0, 1\], got 2"),
        ({"epochs": 0}, ValueError, "expected epochs >= 1"),
        ({"loss": "hinton"}, ValueError, r"distill: expected loss in \['dkd', 'kd'\] or terms, got 'hinton'"),
        ({"loss": []}, ValueError, "distill: expected at least one term in loss, got none"),
        ({"loss": [kd_loss]}, TypeError, "distill: expected loss to hold terms"),
        ({"loss": Hint("conv")}, ValueError, "distill: expected a layer of the student, got 'conv'; near matches: 0"),
        ({"loss": Hint({"3": "33"})}, ValueError, "expected a layer of the teacher, got '33'; near matches: 3"),
        ({"loss": Hint({"0": "7"})}, ValueError, r"Hint: .* \(2, 16, 4, 4\) from the student's '0' and \(2, 4\)"),
        ({"loss": AttentionTransfer("7")}, ValueError, r"AttentionTransfer: expected features \(N, C, H, W\)"),
    ],
)
def test_distill_refuses_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        distill(net(width=16), net(), blobs(32), progress=False, **{"epochs": 1, **kwargs})


def test_terms_refuse_arguments():
    with pytest.raises(ValueError, match="KD: expected weight >= 0 and finite, got -1"):
        KD(weight=-1)
    with pytest.raises(ValueError, match="KD: expected temperature > 0 and finite, got 0"):
        KD(0)
    with pytest.raises(ValueError, match=r"DecoupledKD: expected alpha and beta >= 0, got alpha=1.0, beta=-2"):
        DecoupledKD(beta=-2)
    with pytest.raises(TypeError, match="Hint: expected layers to hold names of layers, got 3"):
        Hint([3])
    with pytest.raises(ValueError, match="AttentionTransfer: expected at least one layer, got none"):
        AttentionTransfer({})


def test_distill_refuses_models_that_do_not_fit_and_changes_nothing():
    student = net()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="same number of classes, got 5 of the teacher and 4 of the student"):
        distill(student, net(classes=5), blobs(32), epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with pytest.raises(ValueError, match="the same object as student and teacher"):
        distill(student, student, blobs(32), epochs=1, progress=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="distill: expected optimizer to be None with a Hint"):
        distill(student, net(), blobs(32), epochs=1, loss=Hint("0"), optimizer=optimizer, progress=False)


def test_a_named_layer_that_does_not_run_is_an_error():
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = net(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(ValueError, match="expected layer 'unused' of the student to run in its forward pass"):
        distill(Detour(), net(), blobs(32), epochs=1, loss=Hint({"unused": "0"}), progress=False)


# ---- teachers that cannot teach


def test_a_student_that_would_change_its_teacher_is_refused(teacher):
    before = copy.deepcopy(teacher.state_dict())
    body = list(teacher)[:7]
    view = net()
    view[7].weight.data = teacher[7].weight.data  # the same memory in another parameter
    frozen_but_for_statistics = nn.Sequential(*body, nn.Linear(512, 4)).train()
    for parameter in nn.ModuleList(body).parameters():
        parameter.requires_grad_(False)
    refused = {
        "0.weight": nn.Sequential(*[copy.deepcopy(layer).requires_grad_() for layer in body], nn.Linear(512, 4)),
        "7.weight": view,
        "1.running_mean": frozen_but_for_statistics,
    }
    refused["0.weight"][0] = teacher[0].requires_grad_()
    for name, student in refused.items():
        with pytest.raises(ValueError, match=rf"a student that shares nothing .*got '{name}'.*deepcopy"):
            distill(student, teacher, blobs(), epochs=1, progress=False)
        teacher[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the same object"):
        distill(teacher, nn.DataParallel(teacher), blobs(), epochs=1, progress=False)
    kept = nn.Sequential(*body, nn.Linear(512, 4))
    for layer in kept[:7]:
        layer.eval()
    distill(kept, teacher, blobs(), epochs=1, progress=False)  # frozen layers may be shared
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_s_logits_may_rule_classes_out_but_must_not_be_nan():
    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.body, self.value = net(), value

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + torch.tensor([0.0, 0.0, 0.0, self.value])

    for loss in ("kd", "dkd"):
        history = distill(net(), Masked(-float("inf")), blobs(), loss=loss, epochs=1, lr=1e-3, progress=False)
        assert 0 < history[0].loss < float("inf")
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"distill: expected finite logits of the teacher, got NaN or \+inf"):
                distill(net(), Masked(value), blobs(), loss=loss, epochs=1, progress=False)


@pytest.mark.parametrize("term", [Hint, AttentionTransfer])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_layers_of_the_teacher_that_are_not_finite_are_named(teacher, term, value):
    with torch.no_grad():
        teacher[3].bias[0] = value
    with pytest.raises(ValueError, match=r"distill: expected finite (output of layer '3'|logits) of the teacher"):
        distill(net(), teacher, blobs(), loss=term("3"), epochs=1, progress=False)
