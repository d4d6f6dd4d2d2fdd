"""Fine-tuning and gradual pruning of classifiers; the loop itself is in `loop`, shared with distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.loop import EpochStats, Loader, StepHook, evaluate, run
from slimkernels.compress.prune import cubic_schedule, prune_

__all__ = ["EpochStats", "GradualPruning", "Loader", "StepHook", "evaluate", "fine_tune"]


class GradualPruning:
    """Step hook that prunes along the cubic schedule of Zhu & Gupta (arXiv 1710.01878) while a model trains.

    Args:
        sparsity: final share of blocks to mask, or a dict of them by layer, as in `prune_`.
        block_shape: ``(block_out, block_in)``.
        begin: share of the run after which pruning starts.
        end: share of the run at which the final sparsity is reached; the rest recovers accuracy.
        times: how many prunings are spread between the two.
        options: further keywords of `prune_`.

    Raises:
        ValueError: not 0 <= begin < end <= 1, or ``times < 1``.

    Example:
        >>> from slimkernels.compress.train import GradualPruning
        >>> hook = GradualPruning(0.875, (16, 1))  # fine_tune(..., on_step=hook)
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.875,
        block_shape: Sequence[int] = (16, 1),
        *,
        begin: float = 0.0,
        end: float = 0.7,
        times: int = 50,
        **options: Any,
    ) -> None:
        if not 0.0 <= begin < end <= 1.0 or times < 1:
            raise ValueError(
                "GradualPruning: expected 0 <= begin < end <= 1 and times >= 1, "
                f"got begin={begin}, end={end}, times={times}"
            )
        self.sparsity, self.block_shape, self.options = sparsity, tuple(block_shape), options
        self.begin, self.end, self.times = begin, end, times

    def prepare(self, model: nn.Module) -> None:
        """Registers the masks, all blocks kept, so that a checkpoint of a half-pruned model fits."""
        self._prune(model, lambda final: 0.0)

    def __call__(self, step: int, total: int, model: nn.Module) -> None:
        begin = int(self.begin * total)
        end = min(int(self.end * total), total - 1)
        if not begin <= step <= max(begin, end):
            return
        if step >= end:
            self._prune(model, lambda final: final)
        elif self._due(step - begin, end - begin):
            self._prune(model, lambda final: cubic_schedule(step, final=final, begin=begin, end=end))

    def _due(self, step: int, span: int) -> bool:
        return step * self.times // span != (step - 1) * self.times // span

    def _prune(self, model: nn.Module, at: Callable[[float], float]) -> None:
        if isinstance(self.sparsity, Mapping):
            now: float | dict[str, float] = {name: at(final) for name, final in self.sparsity.items()}
        else:
            now = at(self.sparsity)
        prune_(model, now, self.block_shape, **self.options)


def fine_tune(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader | None = None,
    *,
    epochs: int,
    lr: float = 0.05,
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
    """Trains a classifier in place by cross-entropy; masks of `prune_` stay in force throughout.

    Args:
        model: returns logits ``(N, classes)``; it keeps its train/eval mode after the call.
        train_loader: batches ``(images, labels)`` with labels int64 ``(N,)``; if it has ``set_epoch``, that is called.
        val_loader: evaluated after every epoch when given.
        epochs: length of the whole run, resumed part included.
        lr: peak learning rate.
        optimizer: "sgd" (with Nesterov momentum), "adamw", or an optimiser that already holds the parameters.
        weight_decay: applied to tensors of two or more dimensions only (no biases, no batch norm).
        schedule: "onecycle" (arXiv 1708.07120), "cosine" (arXiv 1608.03983, one period), or "constant".
        on_step: called as ``on_step(step, total_steps, model)`` before each step, for instance a `GradualPruning`.
        seed: of shuffling and dropout. The caller's random state is left as it was.
        progress: shows a bar on stderr if that is a terminal.
        checkpoint: file rewritten, atomically, after every epoch.
        resume: continue from ``checkpoint`` if it exists; on the CPU the final weights equal those of an uninterrupted
            run.

    Returns:
        Statistics of every epoch, resumed ones included.

    Raises:
        ValueError: an empty loader, a bad argument, labels outside the logits' range, a checkpoint of another recipe or
            model.
        FloatingPointError: the loss became NaN or infinite; the message names epoch and step.
    """

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    return run(
        "fine_tune", model, loss, train_loader, val_loader, epochs=epochs, lr=lr, optimizer=optimizer,
        momentum=momentum, weight_decay=weight_decay, schedule=schedule, on_step=on_step, seed=seed, progress=progress,
        checkpoint=checkpoint, resume=resume, recipe={},
    )  # fmt: skip
