"""One training loop, shared by fine-tuning and distillation, that gives the same weights when interrupted and resumed.

Every epoch draws all its randomness (dropout, shuffling) from torch generators seeded by ``(seed, epoch)``, so nothing
but weights, optimiser, schedule, the epoch number and a DataLoader's own generator has to survive a restart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimkernels.files import atomic_path

CHECKPOINT_FORMAT = 1

# Reading a loss from a GPU waits for it; 16 steps of a small net cost less than one such wait is worth.
_LOSSES_PER_CHECK_CUDA = 16

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
StepHook = Callable[[int, int, nn.Module], None]


class Loader(Protocol):
    """Batches ``(images, labels)`` with a known count, such as a DataLoader or `data.TensorLoader`."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class EpochStats:
    """One epoch: 1-based number, mean training loss, last learning rate, validation accuracy in [0, 1], seconds."""

    epoch: int
    loss: float
    lr: float
    val_accuracy: float | None
    seconds: float


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader) -> float:
    """Top-1 accuracy in [0, 1] of the model in eval mode; every submodule's mode is restored.

    Raises:
        ValueError: the loader holds no sample, or logits are not ``(N, classes)``.
    """
    device = device_of(model)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    with mode_of(model, training=False):
        for images, labels in loader:
            logits = _logits("evaluate", model, images.to(device, non_blocking=True))
            correct += (logits.argmax(1) == labels.to(device, non_blocking=True)).sum()
            total += len(labels)
    if total == 0:
        raise ValueError("evaluate: expected at least one sample, got an empty loader")
    return int(correct) / total


def run(
    name: str,
    model: nn.Module,
    loss_fn: Loss,
    train_loader: Loader,
    val_loader: Loader | None,
    *,
    epochs: int,
    lr: float,
    optimizer: str | torch.optim.Optimizer,
    momentum: float,
    weight_decay: float,
    schedule: str,
    on_step: StepHook | None,
    seed: int,
    progress: bool,
    checkpoint: str | Path | None,
    resume: bool,
    recipe: Mapping[str, Any],
) -> list[EpochStats]:
    """The loop behind `fine_tune` and `distill`; ``loss_fn(logits, images, labels)`` and ``recipe`` are what differs.

    ``name`` begins every message; ``recipe`` holds further numbers that a resumed run must share.
    """
    if len(train_loader) == 0:
        raise ValueError(f"{name}: expected at least one training batch, got an empty loader")
    if epochs < 1 or not lr > 0:
        raise ValueError(f"{name}: expected epochs >= 1 and lr > 0, got epochs={epochs}, lr={lr}")
    if resume and checkpoint is None:
        raise ValueError(f"{name}: expected a checkpoint path with resume=True, got None")
    steps = len(train_loader)
    recipe = {
        **recipe, "name": name, "epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay,
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__,
        "schedule": schedule, "seed": seed, "steps_per_epoch": steps,
    }  # fmt: skip
    if on_step is not None and hasattr(on_step, "prepare"):
        on_step.prepare(model)
    opt = _optimizer(name, model, optimizer, lr, momentum, weight_decay)
    scheduler = _scheduler(name, opt, schedule, lr, epochs * steps)
    history: list[EpochStats] = []
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if resume and checkpoint.exists():
            history = _restore(name, checkpoint, recipe, model, opt, scheduler, train_loader)
    device = device_of(model)
    with mode_of(model, training=True), _progress_bar(progress, epochs, steps, len(history)) as advance:
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            with epoch_seed(seed, epoch, device):
                set_epoch(train_loader, epoch)
                mean_loss = _train_epoch(
                    name, model, loss_fn, train_loader, opt, scheduler, on_step, epoch, epochs * steps, device, advance
                )
            accuracy = evaluate(model, val_loader) if val_loader is not None else None
            rate = float(scheduler.get_last_lr()[0])
            history.append(EpochStats(epoch + 1, mean_loss, rate, accuracy, time.perf_counter() - started))
            if checkpoint is not None:
                _save(Path(checkpoint), recipe, model, opt, scheduler, train_loader, history)
    return history


def _train_epoch(
    name: str,
    model: nn.Module,
    loss_fn: Loss,
    loader: Loader,
    opt: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    on_step: StepHook | None,
    epoch: int,
    total_steps: int,
    device: torch.device,
    advance: Callable[[int, float | None], None],
) -> float:
    """One pass over the loader; the mean loss per step."""
    per_check = _LOSSES_PER_CHECK_CUDA if device.type == "cuda" else 1
    steps = len(loader)
    pending: list[Tensor] = []
    total, taken, last = 0.0, 0, None
    for images, labels in loader:
        if taken == steps:
            raise ValueError(f"{name}: expected {steps} batches (the loader's length), got more")
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if on_step is not None:
            on_step(epoch * steps + taken, total_steps, model)
        logits = _logits(name, model, images)
        if epoch == 0:
            _check_labels(name, labels, logits.shape[1])
        loss = loss_fn(logits, images, labels)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        scheduler.step()
        pending.append(loss.detach())
        taken += 1
        if len(pending) == per_check or taken == steps:
            values = torch.stack(pending).tolist()
            for offset, value in enumerate(values):
                if not abs(value) < float("inf"):
                    step = taken - len(values) + offset + 1
                    raise FloatingPointError(
                        f"{name}: loss is {value} at epoch {epoch + 1}, step {step} of {steps} "
                        f"(learning rate {scheduler.get_last_lr()[0]:.3g}); lower lr or resume from a checkpoint"
                    )
            total += sum(values)
            last = values[-1]
            pending.clear()
        advance(epoch, last)
    if taken != steps:
        raise ValueError(f"{name}: expected {steps} batches (the loader's length), got {taken}")
    return total / steps


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
    mixed = (seed * 1_000_003 + epoch) % 2**63
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(mixed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader or its sampler which epoch begins, if it asks for that."""
    for target in (loader, getattr(loader, "sampler", None)):
        if target is not None and hasattr(target, "set_epoch"):
            target.set_epoch(epoch)


def _logits(name: str, model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: expected logits of shape ({len(images)}, classes) from the model, got {got}")
    return logits


def _check_labels(name: str, labels: Tensor, classes: int) -> None:
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{name}: expected int64 labels of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected labels in [0, {classes}), the model's classes, got {low if low < 0 else high}"
        )


def _optimizer(
    name: str,
    model: nn.Module,
    optimizer: str | torch.optim.Optimizer,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: expected a model with trainable parameters, got none")
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    raise ValueError(f"{name}: expected optimizer 'sgd', 'adamw' or a torch optimizer, got {optimizer!r}")


def _scheduler(
    name: str, opt: torch.optim.Optimizer, schedule: str, lr: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if schedule == "onecycle":
        # Momentum stays put: cycling it as well changes the meaning of the `momentum` argument.
        return schedulers.OneCycleLR(opt, max_lr=lr, total_steps=total_steps + 1, pct_start=0.3, cycle_momentum=False)
    if schedule == "cosine":
        return schedulers.CosineAnnealingLR(opt, T_max=total_steps)
    if schedule == "constant":
        return schedulers.ConstantLR(opt, factor=1.0, total_iters=total_steps)
    raise ValueError(f"{name}: expected schedule 'onecycle', 'cosine' or 'constant', got {schedule!r}")


def _save(
    path: Path,
    recipe: Mapping[str, Any],
    model: nn.Module,
    opt: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loader: Loader,
    history: Iterable[EpochStats],
) -> None:
    generator = getattr(loader, "generator", None)
    state = {
        "format": CHECKPOINT_FORMAT,
        "recipe": dict(recipe),
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loader_generator": generator.get_state() if isinstance(generator, torch.Generator) else None,
        "history": [asdict(stats) for stats in history],
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(
    name: str,
    path: Path,
    recipe: Mapping[str, Any],
    model: nn.Module,
    opt: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loader: Loader,
) -> list[EpochStats]:
    """Loads a checkpoint into everything, after checking that it belongs to this recipe and fits this model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a foreign pickle and a text file all raise different types
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: expected a training checkpoint in {path}, got an unreadable file: {first_line}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{name}: expected a training checkpoint of format {CHECKPOINT_FORMAT} in {path}")
    for key, value in recipe.items():
        saved = state["recipe"].get(key)
        if saved != value:
            raise ValueError(f"{name}: expected {key}={saved!r} as in the checkpoint {path}, got {value!r}")
    current = model.state_dict()
    differing = sorted(set(current) ^ set(state["model"])) or sorted(
        key
        for key, value in current.items()
        if isinstance(value, Tensor) and value.shape != getattr(state["model"][key], "shape", None)
    )
    if differing:
        raise ValueError(f"{name}: expected a model like the one in {path}, got a difference at {differing[0]!r}")
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if state["loader_generator"] is not None:
        loader.generator.set_state(state["loader_generator"])  # type: ignore[attr-defined]
    return [EpochStats(**stats) for stats in state["history"]]


@contextmanager
def _progress_bar(
    enabled: bool, epochs: int, steps: int, epochs_done: int
) -> Iterator[Callable[[int, float | None], None]]:
    """A function ``advance(epoch, loss)`` for each finished step; it does nothing without a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda epoch, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"epoch {epochs_done + 1}/{epochs}", total=epochs * steps, completed=epochs_done * steps)

        def advance(epoch: int, loss: float | None) -> None:
            text = f"epoch {epoch + 1}/{epochs}" + (f"  loss {loss:.3f}" if loss is not None else "")
            bar.update(task, advance=1, description=text)

        yield advance
