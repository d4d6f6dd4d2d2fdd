"""The training loop behind `fine_tune` and `distill`: one process or many, and the same weights when interrupted and
resumed.

`accelerate` gives the processes (DDP under torchrun, gloo on the CPU, NCCL on GPUs), autocast and loss scaling. Each
rank runs its slice of every batch, so the number of ranks changes no step's samples. Every epoch draws its randomness
from generators seeded by ``(seed, epoch)``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkernels import env
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.checkpoint import RunState, read_checkpoint, restore, save_checkpoint
from slimkernels.compress.training.config import EpochStats, TrainConfig, build_optimizer, build_scheduler, epoch_line
from slimkernels.compress.training.ema import WeightAverage
from slimkernels.compress.training.evaluation import (
    Loader,
    batches_of,
    check_labels,
    checked_batch,
    checked_logits,
    device_of,
    epoch_seed,
    evaluate,
    mode_of,
    set_epoch,
    train_mode_of,
)
from slimkernels.compress.training.processes import (
    RankBatches,
    equalise,
    evaluate_shards,
    mean_over_ranks,
    reseeded,
    session,
)
from slimkernels.compress.training.steps import CrossEntropyStep, TrainingStep
from slimkernels.compress.training.trackers import RunLog, progress_bar
from slimkernels.nn.strided_pointwise import StridedPointwiseGuard, strided_pointwise_guarded

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["CrossEntropyStep", "EpochStats", "Loader", "TrainConfig", "TrainingStep", "evaluate", "run"]

_LOG = logging.getLogger("slimkernels.train")
# Reading a loss from a GPU waits for it; 16 steps of a small net cost less than one such wait is worth.
_LOSSES_PER_CHECK_CUDA = 16


def run(
    name: str,
    step: TrainingStep,
    train_loader: Loader,
    val_loader: Loader | None,
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    log_dir: str | Path | None = None,
) -> list[EpochStats]:
    """Trains ``step.model`` in place; see `train.fine_tune` for arguments, results and errors.

    ``name`` begins every message.
    """
    batches_of(name, train_loader)
    if resume and checkpoint is None:
        raise ValueError(f"{name}: expected a checkpoint path with resume=True, got None")
    with (
        session(name, device_of(step.model), config.precision) as accelerator,
        _deterministic(config.deterministic),
        strided_pointwise_guarded(step),
        _channels_last(step, enabled=optimizer is None and not _scripted(step)),
    ):
        training = _Training(name, step, train_loader, config, tuple(callbacks), optimizer, accelerator)
        return training.run(val_loader, progress, Path(checkpoint) if checkpoint is not None else None, resume, log_dir)


@dataclass
class _Training:
    """What a run needs at every step."""

    name: str
    step: TrainingStep
    loader: Loader
    config: TrainConfig
    callbacks: tuple[Callback, ...]
    user_optimizer: torch.optim.Optimizer | None
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.many = self.accelerator.num_processes > 1
        self.main = self.accelerator.is_main_process
        if self.many and self.accelerator.device.type == "cuda":
            self.step.to(self.accelerator.device)
        self.device = device_of(self.step.model)
        self.micro_batches = len(self.loader)
        self.relaid = not _scripted(self.step)
        self.steps = -(-self.micro_batches // self.config.accumulate)
        self.total_steps = self.config.epochs * self.steps

    def run(
        self, val_loader: Loader | None, progress: bool, checkpoint: Path | None, resume: bool, log_dir: Any
    ) -> list[EpochStats]:
        state = self._prepare(checkpoint if resume else None)
        self.history = state.history
        if checkpoint is not None and self.main:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
        done = len(self.history)
        self.log = RunLog(log_dir, self.history, done * self.steps) if log_dir is not None and self.main else None
        try:
            with (
                train_mode_of(self.step.model),
                progress_bar(progress and self.main, self.config.epochs, self.steps, done) as self.advance,
            ):
                for epoch in range(done, self.config.epochs):
                    self._epoch(epoch, val_loader)
                    if self.main:
                        _LOG.info("%s: %s", self.name, epoch_line(self.history[-1], self.config.epochs))
                    if self.log is not None:
                        self.log.epoch(self.history)
                    if checkpoint is not None and self.main:
                        save_checkpoint(checkpoint, state)
        finally:
            if self.log is not None:
                self.log.close()
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if self.many:
            equalise(self.step, buffers_only=True)
        if self.average is not None:
            self.average.copy_to(self.step.model)
        return self.history

    def _prepare(self, resume_from: Path | None) -> RunState:
        """Masks first, then the optimiser over what is trainable, then the checkpoint, then the wrappers."""
        config, model = self.config, self.step.model
        if self.many:
            equalise(self.step)
        for callback in self.callbacks:
            callback.prepare(model, self.total_steps)
        if self.user_optimizer is None:
            self.optimizer = build_optimizer(self.name, self.step, config)
        else:
            self.optimizer = self.user_optimizer
        self.scheduler = build_scheduler(self.optimizer, config, self.steps)
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay is not None else None
        state = RunState(
            self.name,
            self._recipe(),
            self.step,
            self.optimizer,
            self.scheduler,
            self.accelerator.scaler,
            self.average,
            self.callbacks,
            self.loader,
            [],
        )
        content = self._checkpoint(resume_from)
        if content is not None and resume_from is not None:
            state.history = restore(content, resume_from, state)
        if self.many:
            equalise(self.step)
        self.wrapped, self.stepper = self.accelerator.prepare(self.step, self.optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        return state

    def _checkpoint(self, path: Path | None) -> dict[str, Any] | None:
        """What rank 0 reads, on every rank; None without a file."""
        content = read_checkpoint(self.name, path) if path is not None and self.main and path.exists() else None
        if self.many and path is not None:
            box = [content]
            torch.distributed.broadcast_object_list(box, src=0)
            content = box[0]
        return content

    def _recipe(self) -> dict[str, Any]:
        recipe = {"name": self.name, **asdict(self.config), **self.step.recipe(), "steps_per_epoch": self.steps}
        if self.user_optimizer is not None:
            recipe["optimizer"] = type(self.user_optimizer).__name__
        return recipe

    def _epoch(self, epoch: int, val_loader: Loader | None) -> None:
        started = time.perf_counter()
        with epoch_seed(self.config.seed, epoch, self.device):
            set_epoch(self.loader, epoch)
            loss = self._train_epoch(epoch)
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, self.step.model)
        accuracy, averaged = self._accuracies(val_loader)
        rate = float(self.scheduler.get_last_lr()[0])
        self.history.append(EpochStats(epoch + 1, loss, rate, accuracy, time.perf_counter() - started, averaged))

    def _accuracies(self, val_loader: Loader | None) -> tuple[float | None, float | None]:
        """Of the model and of its average, the running statistics of both being rank 0's."""
        if val_loader is None:
            return None, None
        model = self.step.model
        if self.many:
            equalise(self.step, buffers_only=True)
        accuracy = evaluate_shards(self.accelerator, model, val_loader)
        if self.average is None:
            return accuracy, None
        with self.average.applied(model):
            if self.many:
                equalise(model, buffers_only=True)
            return accuracy, evaluate_shards(self.accelerator, model, val_loader)

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the loader; the mean loss per optimiser step."""
        losses = _Losses(self, epoch)
        ranks = RankBatches(self.loader, self.accelerator.process_index, self.accelerator.num_processes)
        accumulate = self.config.accumulate
        taken, loss, classes = 0, None, None
        for parts, weight in reseeded(ranks, self.config.seed, epoch, self.device):
            if taken == self.micro_batches:
                raise ValueError(f"{self.name}: expected {self.micro_batches} batches (the loader's length), got more")
            batch = [part.to(self.device, non_blocking=True) for part in checked_batch(self.name, parts)]
            if batch[0].dim() == 4 and self.relaid:
                batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
            now = epoch * self.steps + taken // accumulate
            first, last = taken % accumulate == 0, (taken + 1) % accumulate == 0 or taken + 1 == self.micro_batches
            if first:
                self.optimizer.zero_grad(set_to_none=True)
                for callback in self.callbacks:
                    callback.on_step_begin(now, self.total_steps, self.step.model)
                loss = None
            if epoch == 0:
                classes = classes or self._classes(batch[0])
                check_labels(self.name, batch[1], classes)
            group = min(accumulate, self.micro_batches - taken // accumulate * accumulate)
            part = self._backward(batch, weight / group, synchronise=last)
            loss = part if loss is None else loss + part
            taken += 1
            if last:
                self._update(now)
                losses.add(now, loss)
        if taken != self.micro_batches:
            raise ValueError(f"{self.name}: expected {self.micro_batches} batches (the loader's length), got {taken}")
        return losses.mean()

    def _backward(self, batch: list[Tensor], weight: float, *, synchronise: bool) -> Tensor:
        """Adds the weighted gradient of a micro-batch; its detached, weighted loss."""
        quiet = self.accelerator.no_sync(self.wrapped) if self.many and not synchronise else nullcontext()
        with quiet:
            with StridedPointwiseGuard(), _batch_norm_of_one(self.name, batch[0]):
                loss = self.forward(*batch)
            if weight != 1.0:
                loss = loss * weight
            self.accelerator.backward(loss)
        return loss.detach()

    def _update(self, now: int) -> None:
        model, accelerator = self.step.model, self.accelerator
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self.stepper)
        if accelerator.scaler is None or self._gradients_are_finite():
            for callback in self.callbacks:
                callback.on_gradients(now, self.total_steps, model)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.step.parameters(), self.config.clip_norm)
        if accelerator.scaler is None:
            self.optimizer.step()  # accelerate's step looks for an optional package each time: 0.5 ms
        else:
            self.stepper.step()
        if not self.stepper.step_was_skipped:
            self.scheduler.step()
        if self.average is not None:
            self.average.update(model)
        for callback in self.callbacks:
            callback.on_step_end(now, self.total_steps, model)

    def _gradients_are_finite(self) -> bool:
        if not self.callbacks:
            return True
        gradients = [p.grad for p in self.step.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _classes(self, images: Tensor) -> int:
        """Width of the logits, from a forward pass that leaves no trace, so that bad labels are refused before a GPU
        meets them."""
        model = self.step.model
        devices = [self.device] if self.device.type == "cuda" else []
        with mode_of(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=devices):
            return checked_logits(self.name, model, images).shape[1]


class _Losses:
    """Collects the losses of an epoch and refuses one that is not finite."""

    def __init__(self, training: _Training, epoch: int) -> None:
        self.training, self.epoch = training, epoch
        self.per_check = _LOSSES_PER_CHECK_CUDA if training.device.type == "cuda" else 1
        self.pending: list[tuple[int, Tensor, float, dict[str, float]]] = []
        self.total = 0.0

    def add(self, now: int, loss: Tensor) -> None:
        training = self.training
        metrics: dict[str, float] = {}
        if training.log is not None:
            for callback in training.callbacks:
                metrics.update(callback.metrics())
        self.pending.append((now, loss, float(training.scheduler.get_last_lr()[0]), metrics))
        last: float | None = None
        if len(self.pending) == self.per_check or (now + 1) % training.steps == 0:
            last = self._check()
        training.advance(self.epoch, last)

    def _check(self) -> float:
        training, steps = self.training, self.training.steps
        values = mean_over_ranks(training.accelerator, torch.stack([loss for _, loss, _, _ in self.pending])).tolist()
        for (now, _, rate, metrics), value in zip(self.pending, values, strict=True):
            if not abs(value) < float("inf"):
                raise FloatingPointError(
                    f"{training.name}: loss is {value} at epoch {self.epoch + 1}, step {now % steps + 1} of {steps} "
                    f"(learning rate {rate:.3g}); lower lr or resume from a checkpoint"
                )
            if training.log is not None:
                training.log.step(now, value, rate, metrics)
        self.total += sum(values)
        self.pending.clear()
        return values[-1]

    def mean(self) -> float:
        return self.total / self.training.steps


@contextmanager
def _batch_norm_of_one(name: str, images: Tensor) -> Iterator[None]:
    """Says what to do about torch's error on a batch too small for batch norm."""
    try:
        yield
    except ValueError as error:
        if len(images) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected batches of at least 2 samples for batch norm in train mode, got 1; set drop_last=True, "
            "another batch_size, or the layer to eval()"
        ) from error


def _scripted(module: nn.Module) -> bool:
    """Whether torch.jit runs a part of the module, which `StridedPointwiseGuard` then does not see."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


@contextmanager
def _channels_last(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Convolution weights in channels_last inside the block: 1.3 times faster steps of VGG-11 on an AVX2 CPU.

    Not with a caller's optimiser: its state has the strides that the parameters had.
    """
    changed = [p for p in module.parameters() if p.dim() == 4 and p.is_contiguous()] if enabled else []
    try:
        for parameter in changed:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter in changed:
            parameter.data = parameter.data.contiguous()


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Only deterministic algorithms inside the block."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with env.fixed_cublas_workspace():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
