"""Distillation: the loss against its closed form, and students that learn from teachers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels.compress.distill import distill, kd_loss
from slimkernels.compress.prune import masks, prune_
from slimkernels.compress.train import GradualPruning, evaluate, fine_tune
from slimkernels.data import TensorLoader


def blobs(n: int = 256, batch_size: int = 32, classes: int = 4, seed: int = 0) -> TensorLoader:
    """Four well separated Gaussian clusters as 1x4x4 images."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    images = centres[labels] + 0.5 * torch.randn(n, 1, 4, 4, generator=generator)
    return TensorLoader(images, labels, batch_size=batch_size, shuffle=True)


def net(classes: int = 4, width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(width * 16, classes),
    )


def softmax(row):
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.7, 1.0])
def test_kd_loss_is_the_written_out_sum(temperature, soft_weight):
    torch.manual_seed(0)
    z, v = torch.randn(5, 7, dtype=torch.float64) * 3, torch.randn(5, 7, dtype=torch.float64) * 3
    target = torch.randint(7, (5,))
    expected = 0.0
    for zi, vi, label in zip(z.tolist(), v.tolist(), target.tolist(), strict=True):
        p, q = softmax([a / temperature for a in zi]), softmax([a / temperature for a in vi])
        soft = sum(qk * math.log(qk / pk) for qk, pk in zip(q, p, strict=True))
        expected += (soft_weight * temperature**2 * soft - (1 - soft_weight) * math.log(softmax(zi)[label])) / 5
    assert float(kd_loss(z, v, target, temperature, soft_weight)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.7, 1.0])
def test_kd_loss_gradient_is_the_closed_form(temperature, soft_weight):
    torch.manual_seed(1)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (6,))
    kd_loss(z, v, target, temperature, soft_weight).backward()
    soft = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1))
    hard = z.softmax(1) - F.one_hot(target, 5)
    torch.testing.assert_close(z.grad, (soft_weight * soft + (1 - soft_weight) * hard) / 6, rtol=1e-12, atol=1e-14)
    assert v.grad is None


def test_kd_loss_gradient_keeps_its_size_at_high_temperature():
    # Hinton: at high T the soft gradient tends to (z - v) / (N classes) for zero-mean logits.
    z = torch.tensor([[0.5, -0.5, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[1.0, 0.5, -1.5, 0.0]], dtype=torch.float64)
    kd_loss(z, v, torch.tensor([0]), temperature=1e4, soft_weight=1.0).backward()
    torch.testing.assert_close(z.grad, (z.detach() - v) / 4, rtol=1e-3, atol=1e-4)


def test_kd_loss_of_half_precision_is_that_of_its_float32_copy():
    torch.manual_seed(0)
    z, v, target = torch.randn(4, 9).bfloat16(), torch.randn(4, 9).bfloat16(), torch.randint(9, (4,))
    out = kd_loss(z, v, target)
    assert out.dtype == torch.float32 and torch.equal(out, kd_loss(z.float(), v.float(), target))


@pytest.mark.parametrize(
    ("teacher_shape", "kwargs", "message"),
    [
        ((3, 5), {"temperature": 0.0}, "kd_loss: expected temperature > 0"),
        ((3, 5), {"temperature": -1.0}, "temperature > 0"),
        ((3, 5), {"temperature": math.inf}, "finite"),
        ((3, 5), {"temperature": math.nan}, "temperature > 0"),
        ((3, 5), {"soft_weight": 1.1}, r"soft_weight in \[0, 1\], got 1.1"),
        ((3, 5), {"soft_weight": -0.1}, r"soft_weight in \[0, 1\]"),
        ((3, 6), {}, r"student \(3, 5\) and teacher \(3, 6\)"),
        ((1, 5), {}, r"student \(3, 5\) and teacher \(1, 5\)"),
    ],
)
def test_kd_loss_refuses(teacher_shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kd_loss(torch.zeros(3, 5), torch.zeros(teacher_shape), torch.zeros(3, dtype=torch.int64), **kwargs)


def test_student_without_labels_reaches_its_teacher():
    torch.manual_seed(0)
    teacher, student, train, test = net(), net(width=16), blobs(), blobs(seed=1)
    fine_tune(teacher, train, epochs=3, progress=False)
    before = copy.deepcopy(teacher.state_dict())
    untrained = evaluate(student, test)
    teacher.train()
    history = distill(student, teacher, train, test, epochs=4, soft_weight=1.0, progress=False)
    assert evaluate(teacher, test) > 0.95
    assert history[-1].val_accuracy == evaluate(student, test) > 0.95 > untrained
    assert teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in teacher.parameters())


def test_pruned_student_keeps_its_zeros():
    torch.manual_seed(0)
    teacher, train = net(), blobs()
    fine_tune(teacher, train, epochs=3, progress=False)
    student = prune_(copy.deepcopy(teacher), 0.75, (16, 1))
    grid = masks(student)["3"].mask.clone()
    distill(student, teacher, train, epochs=2, progress=False)
    assert torch.equal(masks(student)["3"].mask, grid)
    blocks = student[3].weight.detach().unflatten(0, (-1, 16)).abs().sum(1).permute(0, 2, 3, 1).reshape(grid.shape)
    assert torch.equal(blocks != 0, grid)
    assert evaluate(student, blobs(seed=1)) > 0.9


def test_gradual_pruning_while_distilling():
    torch.manual_seed(0)
    teacher, train = net(), blobs()
    fine_tune(teacher, train, epochs=3, progress=False)
    student = copy.deepcopy(teacher)
    distill(student, teacher, train, epochs=3, progress=False, on_step=GradualPruning(0.75, (16, 1)))
    assert 1 - masks(student)["3"].mask.float().mean() == pytest.approx(0.75)
    assert evaluate(student, blobs(seed=1)) > 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0}, "distill: expected temperature > 0"),
        ({"soft_weight": 2}, "distill: expected soft_weight in"),
        ({"epochs": 0}, "distill: expected epochs >= 1"),
        ({"schedule": "step"}, "schedule 'onecycle', 'cosine' or 'constant', got 'step'"),
    ],
)
def test_distill_refuses_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        distill(net(), net(), blobs(32), progress=False, **{"epochs": 1, **kwargs})


def test_distill_refuses_models_that_do_not_fit():
    student = net()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"got teacher logits \(32, 5\) and student logits \(32, 4\)"):
        distill(student, net(classes=5), blobs(32), epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items() if "weight" in name)
    with pytest.raises(ValueError, match="the same object as student and teacher"):
        distill(student, student, blobs(32), epochs=1, progress=False)
