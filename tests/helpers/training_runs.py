"""A small network, its data, and a run that test_train.py kills in a process of its own."""

from __future__ import annotations

import time

import torch
from torch import nn

from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.train import fine_tune
from slimkernels.data import TensorLoader


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


class Slow(Callback):
    """Time for a signal to arrive between two epochs."""

    def on_step_begin(self, step, total_steps, model):
        time.sleep(0.03)


def killed_run(path: str, callbacks: list[Callback], resume: bool = False) -> nn.Module:
    """A run with everything that has state: pruning by movement, an average, accumulation, a schedule with warm-up."""
    model = net(seed=int(resume))
    fine_tune(
        model, loader(crop_padding=1), epochs=6, ema_decay=0.9, accumulate=2, schedule="cosine", warmup_epochs=1,
        clip_norm=1.0, deterministic=True, progress=False, checkpoint=path, resume=resume,
        callbacks=[*callbacks, GradualPruning(0.75, (16, 1), times=6, importance="movement")],
    )  # fmt: skip
    return model


class StopAt(Callback):
    """Ends the run as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, step, total_steps, model):
        if step == self.step:
            raise KeyboardInterrupt
