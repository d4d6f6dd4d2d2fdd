"""Pruning while a model trains: a `callbacks.Callback` that prunes along a schedule, and rewinds where asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from slimkernels.compress.pruning.granularity import Units, check_granularity
from slimkernels.compress.pruning.importance import GRADIENT_IMPORTANCES, GradientScores, Importance, check_importance
from slimkernels.compress.pruning.prune import apply_masks_, mask_sparsity, masks, prune_
from slimkernels.compress.pruning.schedules import (
    SCHEDULES,
    check_sparsity,
    cubic_schedule,
    iterative_schedule,
    linear_schedule,
)
from slimkernels.compress.training.callbacks import Callback, check_settings
from slimkernels.formats import BlockMask

_DEFAULT_TIMES = {"cubic": 50, "linear": 50, "one_shot": 1, "iterative": 5}
_PRUNE_OPTIONS = ("scope", "costs", "floor", "layers", "exclude", "skip_first")


class GradualPruning(Callback):
    """Prunes a model while it trains, along one of four schedules.

    - "cubic": ``times`` prunings from ``begin`` to ``end`` along Zhu & Gupta's curve (arXiv 1710.01878).
    - "linear": the same along a straight line.
    - "one_shot": everything at ``begin``.
    - "iterative": ``times`` prunings, evenly spaced, the last one at ``end``, each of the same share of what is left
      (Frankle & Carbin, arXiv 1803.03635). With ``rewind`` every pruning puts all parameters and statistics back to
      their values at that early point of the run (Frankle et al., arXiv 1912.05671), under the new mask. Optimiser
      state and learning rate go on, so a constant learning rate suits it, or one that falls after ``end`` only.

    Masked weights stay exactly zero at every step, in the Parameters as well as in what the model computes with. Under
    torchrun rank 0's masks are broadcast after every pruning. The state (importance gathered so far, the values to
    rewind to, the history) is checkpointed with the run.

    Args:
        sparsity: final share of units to mask, or a dict of them by layer, as in `slimkernels.prune_`.
        block_shape: ``(block_out, block_in)``, or a dict of them by layer.
        schedule: "cubic", "linear", "one_shot" or "iterative".
        begin: share of the run after which pruning starts.
        end: share of the run at which the final sparsity is reached; the rest recovers accuracy.
        times: how many prunings; 50 by default, 5 of "iterative".
        rewind: share of the run whose weights "iterative" and "one_shot" go back to; None does not rewind.
        importance: as in `slimkernels.prune_`. "taylor" is the mean over the steps since the last pruning, "movement"
            the sum over all steps.
        granularity: as in `slimkernels.prune_`.
        options: ``scope``, ``costs``, ``floor``, ``layers``, ``exclude``, ``skip_first`` of `slimkernels.prune_`.

    Attributes:
        history: ``(step, share of the masked layers' weights that is zero)`` after every pruning.

    Raises:
        ValueError: not ``0 <= begin < end <= 1``, ``times < 1``, an unknown schedule, a sparsity outside [0, 1), a
            rewind point at or after the first pruning.
        TypeError: an unknown option.

    Example:
        >>> from slimkernels.compress.pruning.gradual import GradualPruning
        >>> callback = GradualPruning(0.875, (16, 1), end=0.6)  # fine_tune(..., callbacks=[callback])
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.875,
        block_shape: Sequence[int] | Mapping[str, Sequence[int]] = (16, 1),
        *,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.7,
        times: int | None = None,
        rewind: float | None = None,
        importance: str | Importance | Mapping[str, Tensor] = "magnitude",
        granularity: str = "block",
        **options: Any,
    ) -> None:
        op = "GradualPruning"
        if schedule not in SCHEDULES:
            raise ValueError(f"{op}: expected schedule {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
        times = _DEFAULT_TIMES[schedule] if times is None else times
        if not 0.0 <= begin < end <= 1.0 or times < 1:
            raise ValueError(
                f"{op}: expected 0 <= begin < end <= 1 and times >= 1, got begin={begin}, end={end}, times={times}"
            )
        unknown = sorted(set(options) - set(_PRUNE_OPTIONS))
        if unknown:
            raise TypeError(f"{op}: expected options of {', '.join(_PRUNE_OPTIONS)}, got {unknown[0]!r}")
        for name, value in sparsity.items() if isinstance(sparsity, Mapping) else [(None, sparsity)]:
            check_sparsity(op, "sparsity" if name is None else f"sparsity[{name!r}]", value)
        check_importance(op, importance)
        check_granularity(op, granularity)
        first = begin + (end - begin) / times if schedule == "iterative" else begin
        if rewind is not None and (schedule not in ("iterative", "one_shot") or not 0.0 <= rewind < first):
            raise ValueError(
                f"{op}: expected rewind of schedule 'iterative' or 'one_shot' alone, in [0, {first:g}), before the "
                f"first pruning; got rewind={rewind} with schedule {schedule!r}"
            )
        if importance in GRADIENT_IMPORTANCES and schedule == "one_shot" and begin == 0.0:
            raise ValueError(f"{op}: expected begin > 0, so that importance {importance!r} sees gradients, got begin=0")
        self.sparsity, self.schedule, self.times, self.rewind = sparsity, schedule, times, rewind
        self.block_shape = dict(block_shape) if isinstance(block_shape, Mapping) else tuple(block_shape)
        self.begin, self.end = begin, end
        self.importance, self.granularity, self.options = importance, granularity, options
        self.history: list[tuple[int, float]] = []
        gathers = isinstance(importance, str) and importance in GRADIENT_IMPORTANCES
        # For mypy: a name wherever gradients are gathered.
        self._gathered = GradientScores(importance) if gathers else None  # type: ignore[arg-type]
        self._snapshot: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        """Registers the masks, all units kept, so that a checkpoint of a half-pruned model fits."""
        prune_(
            model, self._at(lambda final: 0.0), self.block_shape, granularity=self.granularity, **self.options
        )  # magnitude: nothing is dropped, so the importance asked for, and gradients, are not needed yet

    def on_step_begin(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Takes the values to rewind to, and prunes where the schedule says so."""
        if self.rewind is not None and step == int(self.rewind * total_steps):
            self._snapshot = {name: t.detach().clone() for name, t in _values(model)}
        share = self._due(step, total_steps)
        if share is None:
            return
        now = self._at(share)
        if (max(now.values(), default=0.0) if isinstance(now, Mapping) else now) <= 0.0:
            return
        importance = self.importance if self._gathered is None else self._gathered.scores()
        prune_(model, now, self.block_shape, granularity=self.granularity, importance=importance, **self.options)
        _same_masks_on_all_ranks(model)
        if self._gathered is not None and self.importance == "taylor":
            self._gathered.forget()
        if self._snapshot:
            _restore(model, self._snapshot)
        self.history.append((step, mask_sparsity(model)))

    def on_gradients(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Gathers Taylor or movement scores, until the last pruning."""
        if self._gathered is None or step >= self._last(total_steps):
            return
        self._gathered.add(_masked_layers(model, self.granularity))

    def on_step_end(self, step: int, total_steps: int, model: nn.Module) -> None:
        """Zeroes what momentum wrote under the masks."""
        apply_masks_(model)

    def metrics(self) -> dict[str, float]:
        """The present sparsity of the masked layers."""
        return {"sparsity": self.history[-1][1] if self.history else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Scores gathered so far, values to rewind to, history."""
        return {
            "gathered": None if self._gathered is None else self._gathered.state_dict(),
            "snapshot": dict(self._snapshot),
            "history": [list(entry) for entry in self.history],
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back `state_dict`."""
        if (state["gathered"] is None) != (self._gathered is None):
            raise ValueError(f"GradualPruning: expected a checkpoint of importance {self.importance!r}, got another")
        check_settings(self, self._settings(), state.get("settings", {}))
        if self._gathered is not None:
            self._gathered.load_state_dict(state["gathered"])
        self._snapshot = dict(state["snapshot"])
        self.history = [(int(step), float(share)) for step, share in state["history"]]

    def _settings(self) -> dict[str, str]:
        """What a resumed run has to share, in words; of scores and costs what they are of."""
        names = ("sparsity", "block_shape", "schedule", "begin", "end", "times", "rewind", "granularity", "importance")
        given = {**{name: getattr(self, name) for name in names}, **self.options}
        if given.get("costs") is not None:  # predicted or measured anew
            given["costs"] = set(given["costs"])
        return {name: _in_words(value) for name, value in given.items()}

    def _first(self, total: int) -> int:
        return int(self.begin * total)

    def _last(self, total: int) -> int:
        if self.schedule == "one_shot":
            return self._first(total)
        return max(self._first(total), min(int(self.end * total), total - 1))

    def _due(self, step: int, total: int) -> Callable[[float], float] | None:
        """The sparsity of this step as a function of the final one; None where nothing is pruned."""
        begin, end = self._first(total), self._last(total)
        if not begin <= step <= end:
            return None
        if step == end:
            return lambda final: final
        round_, before = ((s - begin) * self.times // (end - begin) for s in (step, step - 1))
        if round_ == before:
            return None
        if self.schedule == "iterative":
            return lambda final: iterative_schedule(round_, final=final, rounds=self.times)
        curve = cubic_schedule if self.schedule == "cubic" else linear_schedule
        return lambda final: curve(step, final=final, begin=begin, end=end)

    def _at(self, share: Callable[[float], float]) -> float | dict[str, float]:
        if isinstance(self.sparsity, Mapping):
            return {name: share(final) for name, final in self.sparsity.items()}
        return share(self.sparsity)


def _in_words(value: Any) -> str:
    """A setting as text that is the same in another process."""
    if isinstance(value, Mapping):
        plain = [(name, part if isinstance(part, (int, float, tuple, list)) else "") for name, part in value.items()]
        return ", ".join(f"{name}: {_in_words(part)}" for name, part in plain)
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(str(part) for part in value)
    return getattr(value, "__name__", type(value).__name__) if callable(value) else str(value)


def _masked_layers(model: nn.Module, granularity: str) -> Iterator[tuple[str, Tensor, Tensor | None, Units]]:
    for name, mask in masks(model).items():
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        weight: Any = model.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr]
        yield name, weight, weight.grad, Units.of(mask.weight_shape, mask.block_shape, granularity)


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, masks left out."""
    hidden = {id(mask.mask) for mask in masks(model).values()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in hidden:
            yield name, tensor


def _restore(model: nn.Module, snapshot: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _values(model):
            if name in snapshot:
                tensor.copy_(snapshot[name])
    apply_masks_(model)


def _same_masks_on_all_ranks(model: nn.Module) -> None:
    """Rank 0's masks everywhere: unequal GPUs may round a score differently and part ways."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    found: list[BlockMask] = list(masks(model).values())
    flat = torch.cat([mask.mask.reshape(-1) for mask in found]).to(torch.uint8)
    distributed.broadcast(flat, src=0)
    for mask, kept in zip(found, flat.split([m.mask.numel() for m in found]), strict=True):
        mask.mask.copy_(kept.view_as(mask.mask))
    apply_masks_(model)
