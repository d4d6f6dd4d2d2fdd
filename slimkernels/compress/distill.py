"""Knowledge distillation: a student learns a teacher's softened class probabilities beside the labels.

Source: Hinton, Vinyals and Dean, arXiv 1503.02531. With student logits z, teacher logits v, temperature T and soft
weight a: ``loss = a T^2 KL(softmax(v / T) || softmax(z / T)) + (1 - a) CE(z, labels)``, both averaged over
the batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.loop import EpochStats, Loader, StepHook, device_of, mode_of, run


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0, soft_weight: float = 0.7
) -> Tensor:
    """Hinton's distillation loss; its gradient by the student's logits z is, with p the softmax and N the batch size,
    ``(a T (p(z / T) - p(v / T)) + (1 - a) (p(z) - onehot)) / N``.

    The factor T^2 keeps the soft term's gradient of the order of the hard one's at any temperature.

    Args:
        student_logits: ``(N, classes)``, floating; half precision is computed in float32.
        teacher_logits: ``(N, classes)``; no gradient flows into them.
        target: int64 labels ``(N,)``.
        temperature: T > 0.
        soft_weight: a in [0, 1].

    Returns:
        Scalar loss.

    Raises:
        ValueError: logits of different shapes, ``temperature <= 0``, ``soft_weight`` outside [0, 1].
    """
    _check("kd_loss", temperature, soft_weight)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            "kd_loss: expected student and teacher logits of one shape (N, classes), "
            f"got student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}"
        )
    z, v = (t.float() if t.dtype.itemsize < 4 else t for t in (student_logits, teacher_logits.detach()))
    soft = F.kl_div(
        F.log_softmax(z / temperature, dim=1),
        F.log_softmax(v.to(z.dtype) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return soft_weight * temperature**2 * soft + (1.0 - soft_weight) * F.cross_entropy(z, target)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_loader: Loader,
    val_loader: Loader | None = None,
    *,
    epochs: int,
    lr: float = 0.05,
    temperature: float = 4.0,
    soft_weight: float = 0.7,
    optimizer: str | torch.optim.Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "onecycle",
    on_step: StepHook | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> list[EpochStats]:
    """Trains ``student`` in place with `kd_loss` against ``teacher``, which is run in eval mode and left unchanged.

    Pruned students keep their masks; ``on_step=GradualPruning(...)`` prunes while distilling. All other arguments,
    checkpoints and resuming are those of `slimkernels.compress.train.fine_tune`.

    Args:
        student: returns logits ``(N, classes)``.
        teacher: returns logits of the same shape on the same images; it may live on another device.
        temperature: T > 0; SlimNets used 20.
        soft_weight: share of the soft loss, in [0, 1].

    Returns:
        Statistics of every epoch.

    Raises:
        ValueError: teacher and student are one object or differ in their number of classes, a bad temperature or soft
            weight, an empty loader, and all that `fine_tune` raises.
        FloatingPointError: the loss became NaN or infinite; the message names epoch and step.
    """
    _check("distill", temperature, soft_weight)
    if student is teacher:
        raise ValueError("distill: expected two models, got the same object as student and teacher")
    teacher_device = device_of(teacher)

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(images.to(teacher_device)).to(logits.device)
        if targets.shape != logits.shape:
            raise ValueError(
                f"distill: expected teacher and student with the same number of classes, got teacher logits "
                f"{tuple(targets.shape)} and student logits {tuple(logits.shape)}"
            )
        return kd_loss(logits, targets, labels, temperature, soft_weight)

    with mode_of(teacher, training=False):
        return run(
            "distill", student, loss, train_loader, val_loader, epochs=epochs, lr=lr, optimizer=optimizer,
            momentum=momentum, weight_decay=weight_decay, schedule=schedule, on_step=on_step, seed=seed,
            progress=progress, checkpoint=checkpoint, resume=resume,
            recipe={"temperature": temperature, "soft_weight": soft_weight},
        )  # fmt: skip


def _check(name: str, temperature: float, soft_weight: float) -> None:
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"{name}: expected temperature > 0 and finite, got {temperature}")
    if not 0.0 <= soft_weight <= 1.0:
        raise ValueError(f"{name}: expected soft_weight in [0, 1], got {soft_weight}")
