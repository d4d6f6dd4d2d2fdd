"""The settings of a training run, and the optimiser and learning-rate schedule they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "cosine", "step", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run and its resumed continuation have to share.

    Args:
        epochs: length of the whole run, a resumed part included.
        lr: peak learning rate.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: of SGD; the first beta of AdamW.
        weight_decay: applied to tensors of two or more dimensions only (no biases, no batch norm).
        schedule: "onecycle" (arXiv 1708.07120), "cosine" (arXiv 1608.03983, one period), "step" (multiplied by
            ``lr_gamma`` every ``lr_step_epochs`` epochs, as in SlimNets) or "constant".
        warmup_epochs: the learning rate rises linearly from 0 over so many epochs; with "onecycle" it is the rising
            part of the cycle (0: 30% of the run).
        label_smoothing: in [0, 1), of the cross-entropy.
        clip_norm: gradients are scaled down to this total L2 norm when above it.
        accumulate: micro-batches (batches of the loader) per optimiser step; the last step of an epoch takes what is
            left.
        precision: "fp32", "bf16" or "fp16": autocast, the last with loss scaling and on a GPU only.
        ema_decay: keeps an exponential moving average of the weights with this decay (see `ema`); it is evaluated
            beside the weights, and the model holds it when the run is over.
        compile: runs the step (model and loss) through torch.compile.
        cuda_graph: runs forward and backward pass of every step as a CUDA graph, one launch in place of hundreds. What
            Python does inside them (hooks, prints, random choices) happens when the graph is captured, not in every
            step. On the CPU it changes nothing. Not with ``accumulate`` above 1, nor precision "fp16", nor several
            processes.
        fuse_batch_norm: `slimkernels.fuse_batch_norm_` while the run lasts, biases in front of batch norms taken too:
            the same steps up to rounding, faster on a GPU, and in float32 on a CPU. Callbacks and checkpoints see the
            model so; it has its own layers again afterwards. The model must be one that ``torch.fx`` can trace.
        deterministic: only deterministic algorithms; an op that has none raises.
        seed: of shuffling and dropout.

    Raises:
        ValueError: a value outside its range. TypeError: no number where one is needed, no whole one of epochs, say.
    """

    epochs: int
    lr: float = 0.05
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "onecycle"
    lr_step_epochs: int = 30
    lr_gamma: float = 0.5
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    ema_decay: float | None = None
    compile: bool = False
    cuda_graph: bool = False
    fuse_batch_norm: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field, kind in _NUMBERS.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, kind):
                words = "an int" if kind is Integral else "a number"
                raise TypeError(f"TrainConfig: expected {field} to be {words}, got {value!r}")
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"TrainConfig: expected epochs >= 1 and lr > 0, got epochs={self.epochs}, lr={self.lr}")
        for field, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, field) not in allowed:
                names = ", ".join(repr(name) for name in allowed)
                raise ValueError(f"TrainConfig: expected {field} to be one of {names}, got {getattr(self, field)!r}")
        ranges = {
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "lr_step_epochs": self.lr_step_epochs >= 1,
            "lr_gamma": 0 < self.lr_gamma <= 1,
            "warmup_epochs": 0 <= self.warmup_epochs < self.epochs,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "clip_norm": self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "accumulate": self.accumulate >= 1,
            "ema_decay": self.ema_decay is None or 0 < self.ema_decay < 1,
        }
        for field, fits in ranges.items():
            if not fits:
                raise ValueError(f"TrainConfig: expected {field} in {_RANGES[field]}, got {getattr(self, field)}")
        if self.cuda_graph and (self.accumulate > 1 or self.precision == "fp16"):
            raise ValueError(
                "TrainConfig: expected accumulate=1 and precision 'fp32' or 'bf16' with cuda_graph=True, got "
                f"accumulate={self.accumulate}, precision={self.precision!r}"
            )


_NUMBERS = {
    **dict.fromkeys(("epochs", "lr_step_epochs", "accumulate", "seed"), Integral),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "lr_gamma", "warmup_epochs", "label_smoothing"), Real),
}
_RANGES = {
    "momentum": "[0, 1)",
    "weight_decay": "[0, inf)",
    "lr_step_epochs": "[1, inf)",
    "lr_gamma": "(0, 1]",
    "warmup_epochs": "[0, epochs)",
    "label_smoothing": "[0, 1)",
    "clip_norm": "(0, inf) or None",
    "accumulate": "[1, inf)",
    "ema_decay": "(0, 1) or None",
}


@dataclass(frozen=True)
class EpochStats:
    """One epoch: 1-based number, mean training loss, last learning rate, validation accuracy in [0, 1], seconds, and
    the accuracy of the averaged weights where an average is kept."""

    epoch: int
    loss: float
    lr: float
    val_accuracy: float | None
    seconds: float
    ema_val_accuracy: float | None = None


def build_optimizer(name: str, module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimiser over all trainable parameters, weight decay on tensors of two or more dimensions only.

    Raises:
        ValueError: nothing to train; the message begins with ``name``.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: expected a model with trainable parameters, got none")
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel in place of one for each operation.
    fused = True if all(p.is_cuda for p in trainable) else None
    if config.optimizer == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The configured schedule, to be advanced once an optimiser step.

    "onecycle" sets the optimiser's learning rate from ``config.lr``; the others scale the rates it has.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "onecycle":
        # Momentum stays put: cycling it as well changes the meaning of `momentum`.
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=total + 1,
            pct_start=warmup / total if warmup else 0.3,
            cycle_momentum=False,
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            # A warm-up may take the whole run; the scheduler asks for the rate of the step behind it, too.
            return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        if config.schedule == "step":
            return config.lr_gamma ** (step // steps_per_epoch // config.lr_step_epochs)
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def epoch_line(stats: EpochStats, epochs: int | None = None) -> str:
    """One epoch in a line for people."""
    of = "" if epochs is None else f" of {epochs}"
    shown = "" if stats.val_accuracy is None else f", accuracy {stats.val_accuracy:.2%}"
    shown += "" if stats.ema_val_accuracy is None else f" (average {stats.ema_val_accuracy:.2%})"
    return f"epoch {stats.epoch}{of}: loss {stats.loss:.4f}{shown} ({stats.seconds:.1f} s)"
