"""Training checkpoints: everything a resumed run needs, in one file that is either complete or absent.

Every epoch draws its randomness from generators seeded by ``(seed, epoch)``, so weights, optimiser, schedule, average,
loss scaling, callbacks, a DataLoader's own generator and the epochs done so far are all there is to save. Files hold
tensors and plain numbers only and are read with ``weights_only=True``.

A file carries a SHA-256 of itself, since torch's own check misses most flipped bits, and weights that differ in one
bit train on without a word. It guards against accidents, not against whoever can write the file. The checkpoint before
the last stays beside it, as ``<name>.previous<suffix>``. A damaged checkpoint is refused, and the message says whether
the one before is whole; the run does not go back to it by itself, because a disk that loses bits is something to know,
and because epochs that were paid for would be run again unasked.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkernels.compress.training.callbacks import Callback, differing_setting
from slimkernels.compress.training.config import EpochStats
from slimkernels.compress.training.ema import WeightAverage
from slimkernels.compress.training.evaluation import Loader
from slimkernels.compress.training.steps import TrainingStep
from slimkernels.files import atomic_path, seal, seal_obstacle

CHECKPOINT_FORMAT = 3


@dataclass
class RunState:
    """The objects whose state is saved and restored."""

    name: str
    recipe: Mapping[str, Any]
    step: TrainingStep
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: Any
    average: WeightAverage | None
    callbacks: Sequence[Callback]
    loader: Loader
    history: list[EpochStats]


def save_checkpoint(path: Path, run: RunState) -> None:
    """Writes ``path`` atomically; what it held before is then in `previous_checkpoint`.

    Raises:
        OSError: it could not be written, for instance because the disk is full; a previous file is left whole.
    """
    own = dict(run.step.state_dict())
    generator = getattr(run.loader, "generator", None)
    state = {
        "format": CHECKPOINT_FORMAT,
        "recipe": dict(run.recipe),
        "model": {key.removeprefix("model."): value for key, value in own.items() if key.startswith("model.")},
        "step": {key: value for key, value in own.items() if not key.startswith("model.")},
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "average": run.average.state_dict() if run.average is not None else None,
        "callbacks": [callback.state_dict() for callback in run.callbacks],
        "loader_generator": generator.get_state() if isinstance(generator, torch.Generator) else None,
        "history": [asdict(stats) for stats in run.history],
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
            seal(temporary)
            _keep_previous(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a failed write as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        left = f"{path} still holds the checkpoint before it" if path.exists() else "there is no earlier one"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            number,
            f"{run.name}: expected to write the checkpoint of epoch {len(run.history)}, got {reason}; {left}. "
            "Free space and resume",
            str(path),
        ) from error


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint and the one before it, where they exist."""
    path.unlink(missing_ok=True)
    previous_checkpoint(path).unlink(missing_ok=True)


def _keep_previous(path: Path) -> None:
    """Gives the present checkpoint a second name. ``path`` exists at every moment, whenever the process is killed."""
    if not path.exists():
        return
    previous = previous_checkpoint(path)
    with atomic_path(previous) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def read_checkpoint(name: str, path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Raises:
        ValueError: a damaged checkpoint, or none of this format; the message names the file and, where the checkpoint
            before it is whole, that one.
    """
    obstacle = seal_obstacle(path)
    if obstacle is not None:
        raise ValueError(f"{name}: expected a training checkpoint in {path}, but {obstacle}; {_way_out(path)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what somebody else sealed
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: expected a training checkpoint in {path}, got an unreadable file: {first_line}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{name}: expected a training checkpoint of format {CHECKPOINT_FORMAT} in {path}")
    return state


def _way_out(path: Path) -> str:
    previous = previous_checkpoint(path)
    if not previous.exists():
        return "there is no earlier one"
    if seal_obstacle(previous) is not None:
        return f"the one before it, {previous}, is damaged too"
    state = torch.load(previous, map_location="cpu", weights_only=True)
    epochs = len(state.get("history", ())) if isinstance(state, dict) else 0
    return f"the one before it, {previous}, is whole (epoch {epochs}): rename it to {path.name} to go on from there"


def restore(state: Mapping[str, Any], path: Path, run: RunState) -> list[EpochStats]:
    """Loads a checkpoint into the run's objects, after checking that it belongs to this recipe and fits this model.

    Returns:
        The epochs done so far.

    Raises:
        ValueError: another recipe, model or other callbacks; the model is not changed then.
    """
    key = differing_setting(run.recipe, state["recipe"])
    if key is not None:
        value, saved = run.recipe.get(key), state["recipe"].get(key)
        raise ValueError(f"{run.name}: expected {key}={saved!r} as in the checkpoint {path}, got {value!r}")
    if len(state["callbacks"]) != len(run.callbacks):
        raise ValueError(
            f"{run.name}: expected {len(state['callbacks'])} callbacks as in the checkpoint {path}, "
            f"got {len(run.callbacks)}"
        )
    saved_model = {**{f"model.{key}": value for key, value in state["model"].items()}, **state["step"]}
    current = run.step.state_dict()
    differing = sorted(set(current) ^ set(saved_model)) or sorted(
        key
        for key, value in current.items()
        if isinstance(value, Tensor) and value.shape != getattr(saved_model[key], "shape", None)
    )
    if differing:
        at = differing[0].removeprefix("model.")
        raise ValueError(f"{run.name}: expected a model like the one in {path}, got a difference at {at!r}")
    for callback, saved in zip(run.callbacks, state["callbacks"], strict=True):
        try:
            callback.load_state_dict(saved)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{run.name}: expected the callbacks of the checkpoint {path} in their order, got "
                f"{type(callback).__name__} in the place of another: {error!r}"
            ) from error
    run.step.load_state_dict(saved_model)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.scaler is not None and state["scaler"] is not None:
        run.scaler.load_state_dict(state["scaler"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    if state["loader_generator"] is not None:
        # For mypy: there is one wherever its state was saved.
        run.loader.generator.set_state(state["loader_generator"])  # type: ignore[attr-defined]
    return [EpochStats(**stats) for stats in state["history"]]
