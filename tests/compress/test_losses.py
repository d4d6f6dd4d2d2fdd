"""Distillation losses and their gradients against closed forms, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.compress.distillation.losses import (
    attention_map,
    attention_transfer_loss,
    decoupled_kd_loss,
    decoupled_kd_parts,
    hint_loss,
    kd_loss,
    soft_target_loss,
)

TIGHT = {"rtol": 1e-11, "atol": 1e-14}


def logits(n: int = 6, classes: int = 5, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student (with gradient), teacher (with gradient, which must stay empty) and labels."""
    generator = torch.Generator().manual_seed(seed)
    z, v = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return z.requires_grad_(), v.requires_grad_(), torch.randint(classes, (n,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [w / sum(weights) for w in weights]


def divergence(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.7, 1.0])
def test_kd_loss_is_the_written_out_sum(temperature, soft_weight):
    z, v, target = logits(5, 7)
    expected = 0.0
    for zi, vi, label in zip(z.tolist(), v.tolist(), target.tolist(), strict=True):
        soft = divergence(softmax([a / temperature for a in vi]), softmax([a / temperature for a in zi]))
        expected += (soft_weight * temperature**2 * soft - (1 - soft_weight) * math.log(softmax(zi)[label])) / 5
    assert float(kd_loss(z, v, target, temperature, soft_weight).detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.7, 1.0])
def test_kd_loss_gradient_is_the_closed_form(temperature, soft_weight):
    z, v, target = logits(scale=1.0)
    kd_loss(z, v, target, temperature, soft_weight).backward()
    soft = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1))
    hard = z.softmax(1) - F.one_hot(target, 5)
    torch.testing.assert_close(z.grad, (soft_weight * soft + (1 - soft_weight) * hard) / 6, **TIGHT)
    assert v.grad is None


def test_kd_loss_gradient_keeps_its_size_at_high_temperature():
    # Hinton: at high T the soft gradient tends to (z - v) / (N classes) for zero-mean logits.
    z = torch.tensor([[0.5, -0.5, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[1.0, 0.5, -1.5, 0.0]], dtype=torch.float64)
    kd_loss(z, v, torch.tensor([0]), temperature=1e4, soft_weight=1.0).backward()
    torch.testing.assert_close(z.grad, (z.detach() - v) / 4, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [kd_loss, decoupled_kd_loss])
def test_half_precision_is_computed_in_float32(loss):
    z, v, target = (t.detach().bfloat16() if t.is_floating_point() else t for t in logits(4, 9))
    out = loss(z, v, target)
    assert out.dtype == torch.float32 and torch.equal(out, loss(z.float(), v.float(), target))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_parts_are_the_written_out_divergences(temperature):
    z, v, target = logits(5, 7)
    tckd, nckd = decoupled_kd_parts(z, v, target, temperature)
    for i, label in enumerate(target.tolist()):
        p, q = (softmax([a / temperature for a in t[i].tolist()]) for t in (z, v))
        assert float(tckd[i].detach()) == pytest.approx(
            divergence([q[label], 1 - q[label]], [p[label], 1 - p[label]]), rel=1e-9
        )
        rest = [[a / (1 - w[label]) for k, a in enumerate(w) if k != label] for w in (q, p)]
        assert float(nckd[i].detach()) == pytest.approx(divergence(*rest), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_kd_with_the_teachers_weights_is_kd(temperature):
    z, v, target = logits(8, 10)
    beta = 1.0 - (v / temperature).softmax(1).gather(1, target[:, None])[:, 0].detach()
    decoupled = decoupled_kd_loss(z, v, target, temperature, alpha=1.0, beta=beta)
    coupled = soft_target_loss(z, v, temperature)
    torch.testing.assert_close(decoupled, coupled, **TIGHT)
    for a, b in zip(torch.autograd.grad(decoupled, z), torch.autograd.grad(coupled, z), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (1.5, 8.0)])
def test_decoupled_kd_gradient_is_the_closed_form(alpha, beta):
    t = 4.0
    z, v, target = logits()
    decoupled_kd_loss(z, v, target, t, alpha, beta).backward()
    p, q = (z / t).softmax(1).detach(), (v / t).softmax(1).detach()
    one_hot = F.one_hot(target, 5).double()
    p_t, q_t = (p * one_hot).sum(1, keepdim=True), (q * one_hot).sum(1, keepdim=True)
    binary = (one_hot - p) * (p_t - q_t) / (1 - p_t)  # T d TCKD / dz
    others = (p / (1 - p_t) - q / (1 - q_t)) * (1 - one_hot)  # T d NCKD / dz
    torch.testing.assert_close(z.grad, t * (alpha * binary + beta * others) / 6, **TIGHT)
    assert v.grad is None


def test_decoupled_kd_of_a_saturated_teacher_stays_finite():
    z = torch.tensor([[5.0, 0.0, -5.0]], requires_grad=True)
    loss = decoupled_kd_loss(z, torch.tensor([[200.0, -300.0, 0.0]]), torch.tensor([0]), 1.0)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and bool(z.grad.isfinite().all())
    # NCKD of classes 1, 2: the teacher is certain of class 2, the student gives it sigmoid(-5)
    _, nckd = decoupled_kd_parts(z.detach(), torch.tensor([[200.0, -300.0, 0.0]]), torch.tensor([0]), 1.0)
    assert float(nckd) == pytest.approx(math.log1p(math.exp(5.0)), rel=1e-5)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hint_loss_and_gradient():
    student, teacher = features(3, 4, 2, 5).requires_grad_(), features(3, 4, 2, 5, seed=1).requires_grad_()
    loss = hint_loss(student, teacher)
    difference = (student - teacher).detach()
    assert float(loss.detach()) == pytest.approx(float(difference.square().sum()) / 2 / 120, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(student.grad, difference / 120, **TIGHT)
    assert teacher.grad is None


def test_attention_transfer_loss_and_gradient():
    student, teacher = features(3, 4, 2, 5).requires_grad_(), features(3, 7, 2, 5, seed=1).requires_grad_()
    loss = attention_transfer_loss(student, teacher)
    loss.backward()
    expected, gradient = 0.0, torch.zeros_like(student)
    for i in range(3):
        a, q_s = student[i].detach(), student[i].detach().square().sum(0).flatten()
        q_t = teacher[i].detach().square().sum(0).flatten()
        unit_s, unit_t = q_s / q_s.norm(), q_t / q_t.norm()
        expected += float((unit_s - unit_t).square().sum()) / 3
        by_unit = 2 * (unit_s - unit_t) / 3
        by_map = (by_unit - unit_s * (unit_s @ by_unit)) / q_s.norm()  # through the normalisation
        gradient[i] = 2 * a * by_map.reshape(2, 5)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(student.grad, gradient, **TIGHT)
    assert teacher.grad is None


def test_attention_ignores_scale_and_channel_order_and_survives_a_dead_map():
    a = features(2, 6, 4, 4)
    assert float(attention_transfer_loss(a, 3 * a.flip(1))) == pytest.approx(0.0, abs=1e-24)
    dead = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention_transfer_loss(dead, torch.rand(1, 5, 3, 3)).backward()
    assert bool(dead.grad.isfinite().all()) and not bool(attention_map(dead).any())


@pytest.mark.parametrize(
    ("loss", "teacher_shape", "kwargs", "message"),
    [
        (kd_loss, (3, 5), {"temperature": 0.0}, "kd_loss: expected temperature > 0"),
        (kd_loss, (3, 5), {"temperature": math.inf}, "kd_loss: expected temperature > 0 and finite, got inf"),
        (kd_loss, (3, 5), {"temperature": math.nan}, "temperature > 0 and finite, got nan"),
        (kd_loss, (3, 5), {"soft_weight": 1.1}, r"kd_loss: expected soft_weight in \[0, 1\], got 1.1"),
        (kd_loss, (3, 5), {"soft_weight": math.nan}, r"soft_weight in \[0, 1\], got nan"),
        (kd_loss, (3, 6), {}, r"kd_loss: .* got student \(3, 5\) and teacher \(3, 6\)"),
        (kd_loss, (1, 5), {}, r"student \(3, 5\) and teacher \(1, 5\)"),
        (decoupled_kd_loss, (3, 6), {}, r"decoupled_kd_loss: .* student \(3, 5\) and teacher \(3, 6\)"),
        (decoupled_kd_loss, (3, 5), {"temperature": -1.0}, "decoupled_kd_loss: expected temperature > 0"),
        (decoupled_kd_loss, (3, 5), {"alpha": -1.0}, "expected alpha and beta >= 0, got alpha=-1.0, beta=2.0"),
        (decoupled_kd_loss, (3, 5), {"beta": math.nan}, "expected alpha and beta >= 0, got alpha=1.0, beta=nan"),
    ],
)
def test_logit_losses_refuse(loss, teacher_shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(3, 5), torch.zeros(teacher_shape), torch.zeros(3, dtype=torch.int64), **kwargs)


def test_other_losses_refuse():
    with pytest.raises(ValueError, match="decoupled_kd_loss: expected at least two classes, got 1"):
        decoupled_kd_loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"hint_loss: .* got student \(2, 3\) and teacher \(2, 4\)"):
        hint_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"attention_transfer_loss: .* got student \(1, 2, 3, 3\) and teacher"):
        attention_transfer_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 3))
    with pytest.raises(ValueError, match=r"attention_transfer_loss: .* got student \(1, 2\) and teacher"):
        attention_transfer_loss(torch.zeros(1, 2), torch.zeros(1, 2))


def test_a_class_the_teacher_rules_out_adds_nothing():
    """Teacher logits of -inf: torch's divergence from probabilities, which of logarithms is NaN; the same gradient."""
    z, v, _ = logits(classes=5)
    v = v.detach().clone()
    v[:, 3], v[0, :2] = -math.inf, -math.inf
    loss = soft_target_loss(z, v, 2.0)
    (gradient,) = torch.autograd.grad(loss, z)
    expected = 4.0 * F.kl_div(F.log_softmax(z / 2, 1), F.softmax(v / 2, 1), reduction="batchmean")
    torch.testing.assert_close(loss, expected, **TIGHT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], **TIGHT)

    ruled_out = z.detach().clone()
    ruled_out[:, 3] = -math.inf  # by the student too: 0 log(0 / 0) is 0
    without = [0, 1, 2, 4]
    both = soft_target_loss(ruled_out.requires_grad_(), v, 2.0)
    torch.testing.assert_close(both, soft_target_loss(z[:, without], v[:, without], 2.0), **TIGHT)
    assert torch.autograd.grad(both, ruled_out)[0].isfinite().all()


def test_decoupled_distillation_with_classes_ruled_out():
    z, v, target = logits(classes=5)
    v = v.detach().clone()
    v[torch.arange(len(v)), (target + 1) % 5] = -math.inf
    beta = 1 - F.softmax(v / 2, 1).gather(1, target[:, None])[:, 0]
    whole = decoupled_kd_loss(z, v, target, 2.0, beta=beta)
    torch.testing.assert_close(whole, soft_target_loss(z, v, 2.0), **TIGHT)
    certain = torch.full_like(v, -math.inf).scatter(1, target[:, None], 1.0)  # nothing is said about the others
    tckd, nckd = decoupled_kd_parts(z, certain, target, 2.0)
    torch.testing.assert_close(tckd, -F.log_softmax(z / 2, 1).gather(1, target[:, None])[:, 0], **TIGHT)
    assert torch.equal(nckd, torch.zeros_like(nckd))
    assert torch.autograd.grad(decoupled_kd_loss(z, certain, target), z)[0].isfinite().all()
    assert soft_target_loss(z, torch.full_like(v, -math.inf)).isnan()  # a teacher that gives no class anything
