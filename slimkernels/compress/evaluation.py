"""Accuracy of a classifier, and the state a model and torch's generators are in while one is trained or measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Loader(Protocol):
    """Batches ``(images, labels)`` or ``(images, labels, indices)`` with a known count, such as a DataLoader or
    `slimkernels.data.TensorLoader`; ``indices`` are int64 ``(N,)``, the samples' places in the data set."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


def evaluate(model: nn.Module, loader: Loader) -> float:
    """Top-1 accuracy in [0, 1] of the model in eval mode; every submodule's mode is restored.

    Raises:
        ValueError: the loader holds no sample, or logits are not ``(N, classes)``.
    """
    correct, total = count_correct(model, loader)
    if total == 0:
        raise ValueError("evaluate: expected at least one sample, got an empty loader")
    return int(correct) / total


@torch.no_grad()
def count_correct(model: nn.Module, batches: Any) -> tuple[Tensor, int]:
    """Correctly classified samples (int64 scalar on the model's device) and all samples, the model in eval mode."""
    device = device_of(model)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    with mode_of(model, training=False):
        for images, labels, *_ in batches:
            logits = checked_logits("evaluate", model, images.to(device, non_blocking=True))
            correct += (logits.argmax(1) == labels.to(device, non_blocking=True)).sum()
            total += len(labels)
    return correct, total


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU if it has neither."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block; each submodule's own mode afterwards, set through its ``train`` method."""
    modes = [(module, module.training) for module in model.modules()]
    if any(mode != training for _, mode in modes):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:  # parents come first, so a child's differing mode is set last
            if module.training != mode:
                module.train(mode)


@contextmanager
def epoch_seed(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """torch's generators seeded by ``(seed, epoch)`` inside the block, the caller's state restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, epoch, device)
        yield


def reseed(seed: int, epoch: int, device: torch.device, rank: int = 0) -> None:
    """Seeds torch's generators by ``(seed, epoch, rank)``."""
    mixed = (seed * 1_000_003 + epoch + rank * 7_777_777_777) % 2**63
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader or its sampler which epoch begins, if it asks for that."""
    for target in (loader, getattr(loader, "sampler", None)):
        if target is not None and hasattr(target, "set_epoch"):
            target.set_epoch(epoch)


def checked_logits(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """``model(images)``, which has to be ``(N, classes)``; messages begin with ``name``."""
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: expected logits of shape ({len(images)}, classes) from the model, got {got}")
    return logits


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Refuses labels that are not int64 ``(N,)`` in ``[0, classes)``."""
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{name}: expected int64 labels of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected labels in [0, {classes}), the model's classes, got {low if low < 0 else high}"
        )
