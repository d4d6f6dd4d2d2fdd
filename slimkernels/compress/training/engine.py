"""The training loop behind `fine_tune` and `distill`: one process or many, and the same weights when interrupted and
resumed.

`accelerate` gives the processes (DDP under torchrun, gloo on the CPU, NCCL on GPUs), autocast and loss scaling. Each
rank runs its slice of every batch, so the number of ranks changes no step's samples. Every epoch draws its randomness
from generators seeded by ``(seed, epoch)``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.checkpoint import RunState, save_checkpoint
from slimkernels.compress.training.config import EpochStats, TrainConfig, epoch_line
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
from slimkernels.compress.training.graphed_steps import GraphedSteps
from slimkernels.compress.training.processes import (
    RankBatches,
    check_undivided,
    equalise,
    evaluate_shards,
    mean_over_ranks,
    reseeded,
    session,
)
from slimkernels.compress.training.setup import (
    Setup,
    channels_last_weights,
    deterministic,
    fused_batch_norms,
    prepared_state,
    scripted,
)
from slimkernels.compress.training.steps import CrossEntropyStep, TrainingStep
from slimkernels.compress.training.trackers import RunLog, progress_bar
from slimkernels.files import write_obstacle
from slimkernels.nn.strided_pointwise import StridedPointwiseGuard, strided_pointwise_guarded

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
    for loader in (train_loader, val_loader):
        check_undivided(name, loader)
    if resume and checkpoint is None:
        raise ValueError(f"{name}: expected a checkpoint path with resume=True, got None")
    with (
        session(name, device_of(step.model), config.precision) as accelerator,
        deterministic(config.deterministic),
        fused_batch_norms(name, step.model, enabled=config.fuse_batch_norm),
        strided_pointwise_guarded(step),
        channels_last_weights(step, enabled=optimizer is None and not scripted(step)),
    ):
        setup = Setup.of(name, step, train_loader, config, tuple(callbacks), optimizer, accelerator)
        path = Path(checkpoint) if checkpoint is not None else None
        state = prepared_state(setup, path if resume else None)
        if config.cuda_graph and setup.many:
            raise ValueError(f"{name}: expected one process with cuda_graph=True, got {accelerator.num_processes}")
        wrapped, stepper = accelerator.prepare(step, state.optimizer)
        forward = torch.compile(wrapped) if config.compile else wrapped
        return _Training(setup, state, wrapped, stepper, forward).run(val_loader, progress, path, log_dir)


def _no_bar(epoch: int, loss: float | None) -> None:
    """Where no progress is shown."""


@dataclass
class _Training:
    """A run between its first and its last step.

    Attributes:
        state: what a checkpoint holds.
        setup: what the run was asked for.
        wrapped: the step as accelerate wraps it.
        stepper: the optimiser as accelerate wraps it.
        forward: `wrapped`, compiled where that was asked for.
        log: of rank 0, where there is a log directory.
        advance: moves the progress bar by one step.
        graphs: forward and backward passes as CUDA graphs, where that was asked for.
    """

    setup: Setup
    state: RunState
    wrapped: Any
    stepper: Any
    forward: Any
    log: RunLog | None = None
    advance: Callable[[int, float | None], None] = _no_bar
    graphs: GraphedSteps | None = None

    def run(self, val_loader: Loader | None, progress: bool, checkpoint: Path | None, log_dir: Any) -> list[EpochStats]:
        setup, state = self.setup, self.state
        model, epochs = setup.step.model, setup.config.epochs
        if checkpoint is not None and setup.main:
            error = write_obstacle(checkpoint)
            if error is not None:
                text = f"{setup.name}: expected a checkpoint that can be written, got {error.strerror}"
                raise OSError(error.errno, text, str(checkpoint)) from error
        done = len(state.history)
        if setup.config.cuda_graph and setup.device.type == "cuda":
            self.graphs = GraphedSteps(setup.name, setup.step, self._pass, setup.callbacks)
        if log_dir is not None and setup.main:
            self.log = RunLog(log_dir, state.history, done * setup.steps)
        try:
            with (
                train_mode_of(model),
                progress_bar(progress and setup.main, epochs, setup.steps, done) as self.advance,
            ):
                for epoch in range(done, epochs):
                    self._epoch(epoch, val_loader)
                    if setup.main:
                        _LOG.info("%s: %s", setup.name, epoch_line(state.history[-1], epochs))
                    if self.log is not None:
                        self.log.epoch(state.history)
                    if checkpoint is not None and setup.main:
                        save_checkpoint(checkpoint, state)
        finally:
            for callback in setup.callbacks:
                callback.on_run_end(model)
            if self.log is not None:
                self.log.close()
            setup.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if state.average is not None:
            state.average.copy_to(model)
        if setup.many:  # also the averages of running statistics, which every rank has its own of
            equalise(setup.step, buffers_only=True)
        return state.history

    def _epoch(self, epoch: int, val_loader: Loader | None) -> None:
        setup = self.setup
        started = time.perf_counter()
        with epoch_seed(setup.config.seed, epoch, setup.device):
            set_epoch(setup.loader, epoch)
            loss = self._train_epoch(epoch)
        for callback in setup.callbacks:
            callback.on_epoch_end(epoch, setup.step.model)
        accuracy, averaged = self._accuracies(val_loader)
        rate = float(self.state.scheduler.get_last_lr()[0])
        self.state.history.append(EpochStats(epoch + 1, loss, rate, accuracy, time.perf_counter() - started, averaged))

    def _accuracies(self, val_loader: Loader | None) -> tuple[float | None, float | None]:
        """Of the model and of its average, the running statistics of both being rank 0's."""
        setup = self.setup
        if val_loader is None:
            return None, None
        model = setup.step.model
        if setup.many:
            equalise(setup.step, buffers_only=True)
        accuracy = evaluate_shards(setup.accelerator, model, val_loader)
        if self.state.average is None:
            return accuracy, None
        with self.state.average.applied(model):
            if setup.many:
                equalise(model, buffers_only=True)
            return accuracy, evaluate_shards(setup.accelerator, model, val_loader)

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the loader; the mean loss per optimiser step."""
        setup = self.setup
        losses = _Losses(self, epoch)
        place = setup.accelerator.process_index, setup.accelerator.num_processes
        ranks = RankBatches(setup.loader, *place, setup.name)
        accumulate = setup.config.accumulate
        taken, loss, classes = 0, None, None
        for parts, weight in reseeded(ranks, setup.config.seed, epoch, setup.device):
            if taken == setup.micro_batches:
                raise ValueError(
                    f"{setup.name}: expected {setup.micro_batches} batches (the loader's length), got more"
                )
            batch = [part.to(setup.device, non_blocking=True) for part in checked_batch(setup.name, parts)]
            if batch[0].dim() == 4 and setup.relaid:
                batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
            now = epoch * setup.steps + taken // accumulate
            first = taken % accumulate == 0
            last = (taken + 1) % accumulate == 0 or taken + 1 == setup.micro_batches
            if first:
                self.state.optimizer.zero_grad(set_to_none=True)
                for callback in setup.callbacks:
                    callback.on_step_begin(now, setup.total_steps, setup.step.model)
                loss = None
            if epoch == 0:
                classes = classes or self._classes(batch[0])
                check_labels(setup.name, batch[1], classes)
            group = min(accumulate, setup.micro_batches - taken // accumulate * accumulate)
            if self.graphs is not None:
                part = self.graphs(batch)
            else:
                part = self._backward(batch, weight / group, synchronise=last)
            loss = part if loss is None else loss + part
            taken += 1
            if last:
                self._update(now)
                losses.add(now, loss)
        if taken != setup.micro_batches:
            raise ValueError(f"{setup.name}: expected {setup.micro_batches} batches (the loader's length), got {taken}")
        return losses.mean()

    def _pass(self, batch: list[Tensor]) -> Tensor:
        """What a CUDA graph holds: one process, one batch a step, no loss scaling."""
        return self._backward(batch, 1.0, synchronise=True)

    def _backward(self, batch: list[Tensor], weight: float, *, synchronise: bool) -> Tensor:
        """Adds the weighted gradient of a micro-batch; its detached, weighted loss."""
        setup = self.setup
        quiet = setup.accelerator.no_sync(self.wrapped) if setup.many and not synchronise else nullcontext()
        with quiet:
            with StridedPointwiseGuard(), _batch_norm_of_one(setup.name, batch[0]):
                loss = self.forward(*batch)
            if weight != 1.0:
                loss = loss * weight
            setup.accelerator.backward(loss)
        return loss.detach()

    def _update(self, now: int) -> None:
        setup, state = self.setup, self.state
        model, accelerator = setup.step.model, setup.accelerator
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self.stepper)
        if accelerator.scaler is None or self._gradients_are_finite():
            for callback in setup.callbacks:
                callback.on_gradients(now, setup.total_steps, model)
        if setup.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(setup.step.parameters(), setup.config.clip_norm)
        if accelerator.scaler is None:
            state.optimizer.step()  # accelerate's step looks for an optional package each time: 0.5 ms
        else:
            self.stepper.step()
        if not self.stepper.step_was_skipped:
            state.scheduler.step()
        if state.average is not None:
            state.average.update(model)
        for callback in setup.callbacks:
            callback.on_step_end(now, setup.total_steps, model)

    def _gradients_are_finite(self) -> bool:
        if not self.setup.callbacks:
            return True
        gradients = [p.grad for p in self.setup.step.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _classes(self, images: Tensor) -> int:
        """Width of the logits, from a forward pass that leaves no trace, so that bad labels are refused before a GPU
        meets them."""
        setup = self.setup
        model = setup.step.model
        devices = [setup.device] if setup.device.type == "cuda" else []
        with mode_of(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=devices):
            return checked_logits(setup.name, model, images).shape[1]


class _StepLoss(NamedTuple):
    """The loss of one optimiser step, not read from its device yet, and what is logged beside it."""

    step: int
    loss: Tensor
    rate: float
    metrics: dict[str, float]


class _Losses:
    """Collects the losses of an epoch and refuses one that is not finite."""

    def __init__(self, training: _Training, epoch: int) -> None:
        self.training, self.epoch = training, epoch
        self.per_check = _LOSSES_PER_CHECK_CUDA if training.setup.device.type == "cuda" else 1
        self.pending: list[_StepLoss] = []
        self.total = 0.0

    def add(self, now: int, loss: Tensor) -> None:
        training = self.training
        metrics: dict[str, float] = {}
        if training.log is not None:
            for callback in training.setup.callbacks:
                metrics.update(callback.metrics())
        rate = float(training.state.scheduler.get_last_lr()[0])
        self.pending.append(_StepLoss(now, loss, rate, metrics))
        last: float | None = None
        if len(self.pending) == self.per_check or (now + 1) % training.setup.steps == 0:
            last = self._check()
        training.advance(self.epoch, last)

    def _check(self) -> float:
        setup, log = self.training.setup, self.training.log
        losses = torch.stack([pending.loss for pending in self.pending])
        values = mean_over_ranks(setup.accelerator, losses).tolist()
        for pending, value in zip(self.pending, values, strict=True):
            if not abs(value) < float("inf"):
                raise FloatingPointError(
                    f"{setup.name}: loss is {value} at epoch {self.epoch + 1}, step {pending.step % setup.steps + 1} "
                    f"of {setup.steps} (learning rate {pending.rate:.3g}); lower lr or resume from a checkpoint"
                )
            if log is not None:
                log.step(pending.step, value, pending.rate, pending.metrics)
        self.total += sum(values)
        self.pending.clear()
        return values[-1]

    def mean(self) -> float:
        return self.total / self.training.setup.steps


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
