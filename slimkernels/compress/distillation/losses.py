"""Distillation losses: what a student has to match of its teacher, as functions of tensors.

Throughout, z are the student's logits and v the teacher's, ``(N, classes)``, T is the temperature and p the softmax.
Teachers get no gradient. Half precision is computed in float32, float64 in float64. A teacher's logit may be -inf: a
class that it rules out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 KL(p(v / T) || p(z / T))`` averaged over the batch (Hinton, Vinyals and Dean, arXiv 1503.02531).

    Its gradient by z is ``T (p(z / T) - p(v / T)) / N``: the factor T^2 keeps it of one order at any temperature.

    Raises:
        ValueError: logits of different shapes, or a temperature that is not positive and finite.
    """
    check_temperature("soft_target_loss", temperature)
    z, v = _logits("soft_target_loss", student_logits, teacher_logits)
    return temperature**2 * _kl(F.log_softmax(v / temperature, dim=1), F.log_softmax(z / temperature, dim=1)).mean()


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0, soft_weight: float = 0.7
) -> Tensor:
    """Hinton's distillation loss ``a soft_target_loss + (1 - a) cross_entropy`` (arXiv 1503.02531).

    Its gradient by z is ``(a T (p(z / T) - p(v / T)) + (1 - a) (p(z) - onehot)) / N``.

    Args:
        student_logits: ``(N, classes)``, floating point.
        teacher_logits: ``(N, classes)``.
        target: int64 labels ``(N,)``.
        temperature: T > 0; SlimNets used 20.
        soft_weight: a in [0, 1]; SlimNets used 0.7.

    Returns:
        Scalar loss.

    Raises:
        ValueError: logits of different shapes, ``temperature <= 0``, ``soft_weight`` outside [0, 1].
    """
    check_temperature("kd_loss", temperature)
    check_share("kd_loss", "soft_weight", soft_weight)
    z, v = _logits("kd_loss", student_logits, teacher_logits)
    return soft_weight * soft_target_loss(z, v, temperature) + (1.0 - soft_weight) * F.cross_entropy(z, target)


def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float | Tensor = 2.0,
) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)``, a mean over the batch: decoupled distillation (Zhao et al., arXiv 2203.08679).

    TCKD is the divergence of (target, all other classes), NCKD that among the other classes, see `decoupled_kd_parts`.
    With ``alpha=1`` and ``beta = 1 - p(v / T)[target]`` per sample it equals `soft_target_loss` (their eq. 7).

    Args:
        student_logits: ``(N, classes)``, at least two classes.
        teacher_logits: like the student's.
        target: ``(N,)`` class indices.
        temperature: divides both logits, as in `kd_loss`.
        alpha: weight of the target's part, at least 0.
        beta: weight of the others' part, at least 0; or one per sample, ``(N,)``. The paper takes 8 for most pairs on
            CIFAR-100, with 20 epochs of warm-up; that much makes short runs diverge at their usual learning rates.

    Raises:
        ValueError: as `kd_loss`, a negative weight, or fewer than two classes.
    """
    if not 0.0 <= alpha < math.inf or (not isinstance(beta, Tensor) and not 0.0 <= beta < math.inf):
        raise ValueError(f"decoupled_kd_loss: expected alpha and beta >= 0, got alpha={alpha}, beta={beta}")
    tckd, nckd = decoupled_kd_parts(student_logits, teacher_logits, target, temperature)
    return temperature**2 * (alpha * tckd + beta * nckd).mean()


def decoupled_kd_parts(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of every sample, each ``(N,)``, without T^2 (Zhao et al., arXiv 2203.08679, eqs. 3 to 6).

    With t the target, q the teacher's and p the student's softmax at temperature T, ``TCKD = q_t log(q_t / p_t) +
    (1 - q_t) log((1 - q_t) / (1 - p_t))`` and NCKD is the divergence of the softmaxes over the other classes alone.
    Computed from logits, so that a saturated teacher loses nothing.

    Raises:
        ValueError: logits of different shapes, fewer than two classes, or a bad temperature.
    """
    check_temperature("decoupled_kd_loss", temperature)
    z, v = _logits("decoupled_kd_loss", student_logits, teacher_logits)
    classes = z.shape[1]
    if classes < 2:
        raise ValueError(f"decoupled_kd_loss: expected at least two classes, got {classes}")
    column = torch.arange(classes - 1, device=z.device)
    others = column + (column >= target[:, None]).to(column.dtype)  # (N, classes - 1): every class but the target

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        rest = scaled.gather(1, others)
        pair = torch.stack([scaled.gather(1, target[:, None])[:, 0], rest.logsumexp(1)], dim=1)
        return F.log_softmax(pair, dim=1), F.log_softmax(rest, dim=1)

    (student_pair, student_rest), (teacher_pair, teacher_rest) = split(z), split(v)
    # A teacher that gives all other classes a logit of -inf says nothing about them: their softmax would be 0 / 0.
    teacher_rest = teacher_rest.masked_fill(teacher_pair[:, 1:].isneginf(), -math.inf)
    return _kl(teacher_pair, student_pair), _kl(teacher_rest, student_rest)


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Half the mean squared difference of two feature maps (FitNets, Romero et al., arXiv 1412.6550, eq. 3).

    The paper sums over the map; the mean makes the weight of the term independent of its size. The gradient by the
    student's features is ``(s - t) / numel``.

    Raises:
        ValueError: features of different shapes (a regressor has to match the channels first).
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            "hint_loss: expected student and teacher features of one shape, "
            f"got student {tuple(student_features.shape)} and teacher {tuple(teacher_features.shape)}"
        )
    student = _at_least_float32(student_features)
    return 0.5 * F.mse_loss(student, teacher_features.detach().to(student.dtype))


def attention_map(features: Tensor) -> Tensor:
    """``(N, H * W)``: the squares of ``(N, C, H, W)`` summed over channels, each sample scaled to L2 norm 1.

    Zagoruyko and Komodakis, arXiv 1612.03928, with p = 2. A map that is zero everywhere stays zero.
    """
    return F.normalize(_at_least_float32(features).square().sum(1).flatten(1), dim=1)


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """``||Q_S - Q_T||^2`` averaged over the batch, Q the `attention_map` (Zagoruyko and Komodakis, arXiv 1612.03928).

    The squared norm, as in the authors' program, where the paper's eq. 2 has the norm. Channels may differ.

    Raises:
        ValueError: not 4-D, or different batch or image sizes.
    """
    shapes = [tuple(t.shape) for t in (student_features, teacher_features)]
    if any(len(s) != 4 for s in shapes) or (shapes[0][0], *shapes[0][2:]) != (shapes[1][0], *shapes[1][2:]):
        raise ValueError(
            "attention_transfer_loss: expected features (N, C, H, W) of one N, H and W, "
            f"got student {shapes[0]} and teacher {shapes[1]}"
        )
    student, teacher = attention_map(student_features), attention_map(teacher_features.detach())
    return (student - teacher.to(student.dtype)).square().sum(1).mean()


def check_temperature(name: str, temperature: float) -> None:
    """Raises ValueError, beginning with ``name``, unless the temperature is positive and finite."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{name}: expected temperature > 0 and finite, got {temperature}")


def check_share(name: str, argument: str, value: float) -> None:
    """Raises ValueError, beginning with ``name``, unless the value is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected {argument} in [0, 1], got {value}")


def _logits(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"{name}: expected student and teacher logits of one shape (N, classes), "
            f"got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    z = _at_least_float32(student)
    return z, teacher.detach().to(z.dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || p)`` of every row.

    A class to which q gives nothing adds 0, as in torch's ``kl_div`` of probabilities; of logarithms that is NaN.
    """
    q = log_q.exp()
    return (q * (log_q - log_p).masked_fill(q == 0, 0.0)).sum(1)
