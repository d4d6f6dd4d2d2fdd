"""What a training run calls at fixed moments: pruning schedules, loggers, anything that has to see every step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn


class Callback:
    """Base of all callbacks; every method does nothing by default.

    A step is one optimiser step, however many micro-batches it accumulates; steps count from 0 through the whole run,
    a resumed one included. ``model`` is the network itself, never a wrapper (DDP, torch.compile, `TrainingStep`).
    Under torchrun every rank calls every method with equal parameters and gradients, so a callback that changes the
    model deterministically keeps the ranks equal. Several callbacks run in the given order.
    """

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        """Before the optimiser is built and before a checkpoint is restored; parametrizations are registered here."""

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Before the forward pass of the step's first micro-batch."""

    def on_gradients(self, step: int, total_steps: int, model: nn.Module) -> None:
        """After the backward pass and before the optimiser step; ``p.grad`` is averaged over ranks and micro-batches,
        unscaled, and not yet clipped.

        In fp16 a step whose gradients overflowed is skipped, and so is this call.
        """

    def on_step_end(self, step: int, total_steps: int, model: nn.Module) -> None:
        """After the optimiser step."""

    def on_epoch_end(self, epoch: int, model: nn.Module) -> None:
        """After the last step of ``epoch`` (counted from 0), before the model is evaluated and the checkpoint
        written."""

    def on_run_end(self, model: nn.Module) -> None:
        """Once the run is over, also where an error or Ctrl-C ends it; for undoing what only training needs."""

    def variant(self) -> Hashable:
        """What the forward pass of the next step depends on besides its inputs and the values of tensors.

        With ``cuda_graph=True`` a step is captured anew when it changes, or when a module, its mode or the place of a
        tensor does. A callback whose forward passes cannot be captured raises ValueError.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers to write into the logs beside the loss, such as the present sparsity."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, plain numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, after `prepare`.

        Raises:
            ValueError: the state is that of a callback with other settings, with which the run would end elsewhere.
        """


def check_settings(callback: Callback, own: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Refuses a state of other settings than the callback's own; checkpoints from before there were any are taken.

    Raises:
        ValueError: naming the callback and the first setting that differs.
    """
    key = differing_setting(own, saved) if saved else None
    if key is not None:
        raise ValueError(
            f"{type(callback).__name__}: expected {key}={saved.get(key)} as in the checkpoint, got {own.get(key)}"
        )


def differing_setting(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same in both, or is in one of them alone; None where there is none."""
    return next((key for key in {**own, **saved} if own.get(key) != saved.get(key)), None)
