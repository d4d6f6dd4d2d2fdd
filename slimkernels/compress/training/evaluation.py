"""Accuracy of a classifier, and the state a model and torch's generators are in while one is trained or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimkernels.conversion.wrappers import unwrapped


class Loader(Protocol):
    """Batches ``(images, labels)`` or ``(images, labels, indices)`` with a known count, such as a DataLoader or
    `slimkernels.data.TensorLoader`; ``indices`` are int64 ``(N,)``, the samples' places in the data set."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


def evaluate(model: nn.Module, loader: Loader) -> float:
    """Top-1 accuracy in [0, 1] of the model in eval mode; every submodule's mode is restored.

    Raises:
        ValueError: the loader holds no sample, or logits are not ``(N, classes)``.
        TypeError: a batch that is no tuple or list of tensors.
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
        for batch in batches:
            images, labels, *_ = checked_batch("evaluate", batch)
            logits = checked_logits("evaluate", model, images.to(device, non_blocking=True))
            correct += (logits.argmax(1) == labels.to(device, non_blocking=True)).sum()
            total += len(labels)
    return correct, total


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU if it has neither."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def without_wrapper(name: str, model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel or `torch.compile`; ``name`` is the public
    function's. A scripted model is no wrapper."""
    return model if isinstance(model, torch.jit.ScriptModule) else unwrapped(name, model)


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block; each submodule's own mode afterwards, set through its ``train`` method."""
    with _modes_restored(model):
        if any(module.training != training for module in model.modules()):
            model.train(training)
        yield


@contextmanager
def train_mode_of(model: nn.Module) -> Iterator[None]:
    """Train mode inside the block, as the model's user wants it; each submodule's own mode afterwards.

    ``model.train()`` is called, so that a model's own ``train`` method decides. Beside that, submodules in eval mode
    (frozen batch norm) stay so if the model itself is in train mode. If the model itself is in eval mode, that is taken
    for what its last use left, and nothing in it counts as frozen.
    """
    with _modes_restored(model):
        frozen = {module for module in model.modules() if not module.training} if model.training else set()
        model.train(True)
        _set_modes([(module, module.training and module not in frozen) for module in model.modules()])
        yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
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
    if not isinstance(logits, Tensor):
        mode = "train" if model.training else "eval"
        raise ValueError(
            f"{name}: expected logits of shape ({len(images)}, classes) from the model, got {type(logits).__name__} in "
            f"{mode} mode; switch off auxiliary outputs (torchvision: aux_logits=False) or wrap the model in a module "
            "that returns the logits alone"
        )
    if logits.dim() != 2 or logits.shape[0] != images.shape[0]:
        raise ValueError(
            f"{name}: expected logits of shape ({len(images)}, classes) from the model, got {tuple(logits.shape)}"
        )
    return logits


def batches_of(name: str, loader: Any) -> int:
    """The number of batches, at least one; messages begin with ``name``.

    Raises:
        TypeError: the loader has no length. ValueError: it is empty.
    """
    try:
        batches = len(loader)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a loader with a length, its number of batches, got {type(loader).__name__}: {error}; "
            "give an IterableDataset a __len__, or put the batches into a list"
        ) from error
    if batches == 0:
        raise ValueError(f"{name}: expected at least one training batch, got an empty loader")
    return batches


def checked_batch(name: str, batch: Any) -> Sequence[Tensor]:
    """``batch``, which has to be a tuple or list ``(images, labels, ...)`` of tensors; messages begin with ``name``.

    Raises:
        TypeError: it is something else, such as a dict.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch):
        return batch
    if isinstance(batch, Mapping):
        got = f"{type(batch).__name__} with {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        got = f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    else:
        got = type(batch).__name__
    raise TypeError(
        f"{name}: expected batches (images, labels) or (images, labels, indices) of tensors, got a {got}; "
        "a DataLoader's collate_fn can make them"
    )


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Refuses labels that are not int64 ``(N,)`` in ``[0, classes)``."""
    if labels.dtype != torch.int64 or labels.dim() != 1:
        soft = "; of soft labels, labels.argmax(1) are the classes" if labels.is_floating_point() else ""
        raise ValueError(f"{name}: expected int64 labels of shape (N,), got {labels.dtype} {tuple(labels.shape)}{soft}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected labels in [0, {classes}), the model's classes, got {low if low < 0 else high}"
        )
