"""Fine-tuning of classifiers by cross-entropy; the loop itself is in `engine`, shared with distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.engine import CrossEntropyStep, EpochStats, Loader, TrainConfig, evaluate, run
from slimkernels.compress.training.evaluation import without_wrapper

__all__ = ["EpochStats", "Loader", "TrainConfig", "build_config", "evaluate", "fine_tune"]


def fine_tune(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader | None = None,
    config: TrainConfig | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    optimizer: torch.optim.Optimizer | str | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    log_dir: str | Path | None = None,
    **overrides: Any,
) -> list[EpochStats]:
    """Trains a classifier in place by cross-entropy; masks of `prune_` stay in force throughout.

    Under torchrun every rank calls it with the same arguments: rank 0's weights are trained, each batch is shared out,
    gradients are averaged, and rank 0 alone writes files and shows progress. Running statistics of batch norm are rank
    0's. At the end every rank holds the same model.

    Args:
        model: returns logits ``(N, classes)`` in train mode too. Of a wrapper (DataParallel, DistributedDataParallel,
            AveragedModel, `torch.compile`) the model inside is trained; ``compile=True`` compiles it. ``model.train()``
            is called for the run, so a ``train`` method of its own decides; if the model itself is in train mode,
            submodules in eval mode (frozen batch norm) stay so. Every submodule has its own mode back after the call.
        train_loader: batches ``(images, labels)`` with labels int64 ``(N,)`` and a length, the number of batches; if it
            has ``set_epoch``, that is called.
        val_loader: evaluated after every epoch when given.
        config: the settings of the run; ``overrides`` are fields of it, ``fine_tune(..., epochs=3)`` needs no config.
        callbacks: called at fixed moments of the run, for instance a `gradual.GradualPruning`.
        optimizer: one that already holds the parameters, in place of the configured one.
        progress: shows a bar on stderr if that is a terminal.
        checkpoint: file rewritten, atomically, after every epoch, with a SHA-256 of itself; the one before it stays
            as ``<name>.previous<suffix>``.
        resume: continue from ``checkpoint`` if it exists; on the CPU the final weights equal those of an uninterrupted
            run.
        log_dir: folder of this run's ``epochs.csv`` and ``steps.csv`` (see `trackers.RunLog`), and of TensorBoard's
            files where that is installed.

    Returns:
        Statistics of every epoch, resumed ones included.

    Raises:
        ValueError: an empty loader, a bad argument, labels outside the logits' range, a checkpoint of another recipe or
            model, or a damaged one (the message then says whether the one before it is whole), a batch of one sample
            with batch norm in train mode.
        TypeError: an override that is no field of `TrainConfig`, a loader without a length, batches of other things
            than tensors.
        FloatingPointError: the loss became NaN or infinite; the message names epoch and step.
        OSError: a checkpoint could not be written; the one before it is left whole.
    """
    if isinstance(optimizer, str):
        overrides["optimizer"], optimizer = optimizer, None
    config = build_config("fine_tune", config, overrides)
    step = CrossEntropyStep(without_wrapper("fine_tune", model), config.label_smoothing)
    return run(
        "fine_tune",
        step,
        train_loader,
        val_loader,
        config,
        callbacks=callbacks,
        optimizer=optimizer,
        progress=progress,
        checkpoint=checkpoint,
        resume=resume,
        log_dir=log_dir,
    )


def build_config(name: str, config: TrainConfig | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """``config`` with ``overrides`` in place of its fields, or a new one from ``overrides``.

    Raises:
        TypeError: an unknown field, or neither a config nor ``epochs``; the message begins with ``name``.
        ValueError: a value outside its range.
    """
    known = [field.name for field in fields(TrainConfig)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(f"{name}: expected settings among {', '.join(known)}, got {', '.join(unknown)}")
    if config is not None:
        return replace(config, **overrides)
    if "epochs" not in overrides:
        raise TypeError(f"{name}: expected a TrainConfig or epochs=..., got neither")
    return TrainConfig(**overrides)
