"""Runs the steps of a row: the network it starts from, then one step after the other, each of them resumable.

Every training step leaves ``<n>-<verb>.pt`` (the network's state, masks included), ``<n>-<verb>.json`` and its logs in
the row's folder, and while it runs a training checkpoint. The other steps are deterministic and take seconds: they are
done again when a row is resumed, so that the stored state finds a network of the right structure.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkernels import models
from slimkernels.compress.distillation.distill import distill
from slimkernels.compress.factorization.factorize import factorization_report, factorize_
from slimkernels.compress.pruning.prune import finalize_, masks, prune_
from slimkernels.compress.training.checkpoint import remove_checkpoint
from slimkernels.compress.training.train import EpochStats, TrainConfig, evaluate, fine_tune
from slimkernels.conversion.batch_norms import fuse_batch_norm_
from slimkernels.data import TensorLoader
from slimkernels.files import atomic_path, file_sha256
from slimkernels.recipes.clock import Clock, work_of
from slimkernels.recipes.companions import block_shape, callbacks_of
from slimkernels.recipes.schema import TRAINING_VERBS, Recipe, Row, Step
from slimkernels.recipes.store import finished, key_of, read_result, write_result

Say = Callable[[str], None]


@dataclass
class Workplace:
    """What all rows of a run share.

    Attributes:
        recipe: with its preset.
        out: folder of everything written.
        train: loader of the training data; its ``batch_size`` is replaced by the step's.
        test: loader of the test data.
        data_key: identifies the data in the keys of steps.
        device: where networks are trained.
        progress: training bars.
        say: called with one line per step.
        seeds: how many seeds every row is run with, if not more by itself.
        may_train: False where only finished steps may be used.
        clock: what is left of the run's time.
    """

    recipe: Recipe
    out: Path
    train: TensorLoader
    test: TensorLoader
    data_key: str
    device: torch.device
    progress: bool = True
    say: Say = lambda line: None
    seeds: int = 1
    may_train: bool = True
    clock: Clock = field(default_factory=lambda: Clock(None, lambda line: None))
    _models: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    _multiply_adds: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """In which networks are converted and timed."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.recipe.dtype]

    def largest_batch(self) -> torch.Tensor:
        """Black images, as many as the largest batch that is timed."""
        shape = (max(self.recipe.batches), *self.train.images.shape[1:])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def seeds_of(self, row: Row) -> int:
        """How many seeds a row is run with."""
        return max(self.seeds, row.seeds)

    def seed_of(self, name: str, seed: int) -> int:
        """The seed of a row that another row's ``seed`` starts from or is taught by: its own, where there is one."""
        return seed if seed < self.seeds_of(self.recipe.row(name)) else 0

    def work(self, row: Row, step: Step) -> float:
        """Multiply-adds of a step's training; those of the dense network, where the row prunes or factorizes it."""
        if step.verb not in TRAINING_VERBS:
            return 0.0
        teacher = str(step.companions.get("teacher", "teacher")) if step.verb == "distill" else None
        taught = self.multiply_adds(self.recipe.row(teacher)) if teacher else 0.0
        images = step.settings.get("images") or self.train.samples
        return work_of(self.multiply_adds(row), step.settings["epochs"], images, taught)

    def multiply_adds(self, row: Row) -> float:
        """Of one image through the network that a row begins with."""
        while row.source is not None:
            row = self.recipe.row(row.source)
        assert row.model is not None
        if row.name not in self._multiply_adds:
            model = build(row.model, len(self.train.classes), 0).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, *self.train.images.shape[1:]))
            self._multiply_adds[row.name] = counter.get_total_flops() / 2
        return self._multiply_adds[row.name]

    def folder(self, row: Row, seed: int) -> Path:
        """Where a row keeps its steps."""
        return self.out / "rows" / row.slug / f"seed{seed}"

    def result(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The finished row's result, whatever recipe made it; None where there is none."""
        return read_result(self.folder(row, seed) / "row.json")

    def network(self, name: str, seed: int) -> nn.Module:
        """The finished network of a row, in eval mode; rows that it needs are run first."""
        row = self.recipe.row(name)
        if (name, seed) not in self._models:
            model = run_row(self, row, seed)[1]
            if any(name in other.needs for other in self.recipe.rows):
                self._models[name, seed] = model
            return model
        return self._models[name, seed]


def run_row(place: Workplace, row: Row, seed: int) -> tuple[dict[str, Any], nn.Module]:
    """Runs what is left of a row; its result (also in ``row.json``) and its network, finalized, in eval mode."""
    folder = place.folder(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    classes = len(place.train.classes)
    if row.source is not None:
        first = place.seed_of(row.source, seed)
        model = copy.deepcopy(place.network(row.source, first))
        before = place.result(place.recipe.row(row.source), first)
        assert before is not None
        identity = str(before["identity"])
    else:
        assert row.model is not None
        model = build(row.model, classes, seed)
        identity = key_of(model=row.model, classes=classes, seed=seed)
    model = model.to(place.device).to(memory_format=torch.channels_last).train()
    model.requires_grad_(True)
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(row.steps, start=1):
        identity, result = _run_step(place, row, seed, model, number, step, identity)
        steps.append(result)
    finalize_(model)
    model.eval()
    stored = finished(folder / "row.json", identity)
    if stored is None:
        stored = {
            "key": identity,
            "identity": identity,
            "name": row.name,
            "seed": seed,
            "accuracy": evaluate(model, place.test),
            "parameters": sum(p.numel() for p in model.parameters()),
            "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
            "layers": layer_sparsities(model),
            "seconds": sum(step.get("seconds", 0.0) for step in steps),
            "steps": steps,
        }
        write_result(folder / "row.json", stored)
        place.say(f"    {row.name}: accuracy {stored['accuracy']:.2%}")
    return stored, model


def build(spec: Mapping[str, Any], classes: int, seed: int) -> nn.Module:
    """A fresh network of `models.build`, initialised from ``seed``; ``dropout`` replaces its dropout probabilities."""
    options = {key: value for key, value in spec.items() if key not in ("name", "dropout")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(str(spec["name"]), classes, **options)
    if "dropout" in spec:
        probability = float(spec["dropout"])
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"recipe: expected dropout in [0, 1), got {probability}")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
    return model


def layer_sparsities(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every Conv2d and Linear: its number of weights, and the share of them that is zero."""
    return {
        name: {
            "weights": module.weight.numel(),
            "sparsity": 1.0 - module.weight.count_nonzero().item() / module.weight.numel(),
            "conv": isinstance(module, nn.Conv2d),
        }
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def _run_step(
    place: Workplace, row: Row, seed: int, model: nn.Module, number: int, step: Step, identity: str
) -> tuple[str, dict[str, Any]]:
    """Does one step, or takes over what an earlier run did; the new identity of the network, and the result."""
    teacher = str(step.companions.get("teacher", "teacher")) if step.verb == "distill" else None
    taught_by = None
    if teacher is not None:
        own = place.seed_of(teacher, seed)
        place.network(teacher, own)
        done = place.result(place.recipe.row(teacher), own)
        assert done is not None
        taught_by = done["identity"]
    data = {"data": place.data_key, "batch_size": place.recipe.batch_size} if step.verb in TRAINING_VERBS else None
    key = key_of(step=step.as_dict(), before=identity, teacher=taught_by, data=data, seed=seed)
    stem = place.folder(row, seed) / f"{number}-{step.verb}"
    if step.verb not in TRAINING_VERBS:
        facts = _change(model, step)
        changed = {"key": key, "verb": step.verb, **facts}
        if finished(stem.with_suffix(".json"), key) is None:
            write_result(stem.with_suffix(".json"), changed)
        return key, changed
    state = stem.with_suffix(".pt")
    result = finished(stem.with_suffix(".json"), key, state)
    if result is None:
        if not place.may_train:
            raise ValueError(
                f"recipe: expected step {number} ({step.verb}) of row {row.name!r} to be finished with the present "
                "recipe and data; run the row again, or remove its folder"
            )
        place.clock.check(row.name, place.work(row, step))
        place.say(f"    {row.name}: {_words(step)}" + (f", seed {seed}" if seed else ""))
        taught = place.network(teacher, place.seed_of(teacher, seed)) if teacher else None
        result = _train(place, row, model, step, seed, stem, taught, key)
    else:
        for callback in callbacks_of(step, model, place.largest_batch()):
            callback.prepare(model, 1)
        content = torch.load(state, map_location="cpu", weights_only=True)
        model.load_state_dict(content)
    return str(result["state_sha256"]), result


def _change(model: nn.Module, step: Step) -> dict[str, Any]:
    """A step that needs no training; facts about it."""
    settings = dict(step.settings)
    if step.verb == "prune":
        shape = settings.pop("block_shape", (16, 1))
        prune_(model, settings.pop("sparsity", 0.875), block_shape(shape), **settings)
        return {"block_sparsity": {name: 1.0 - m.mask.float().mean().item() for name, m in masks(model).items()}}
    if step.verb == "factorize":
        if isinstance(settings.get("rank"), list):
            settings["rank"] = conv_ranks(model, settings["rank"])
        factorize_(model, settings.pop("method", "svd"), **settings)
        return {
            "layers": [
                {"name": r.name, "kind": r.kind, "ranks": list(r.ranks), "relative_error": r.relative_error}
                for r in factorization_report(model)
            ]
        }
    if step.verb == "finalize":
        finalize_(model)
    return {}  # "convert" speaks of the measurement


def _train(
    place: Workplace, row: Row, model: nn.Module, step: Step, seed: int, stem: Path, teacher: nn.Module | None, key: str
) -> dict[str, Any]:
    """Trains, from the checkpoint of an interrupted run where there is one of the same key."""
    settings = dict(step.settings)
    loader = training_loader(
        place, settings.pop("batch_size", None), settings.pop("images", None), seed, settings.pop("augment", {})
    )
    config = training_config(settings, seed, place.device)
    checkpoint, mark = stem.with_suffix(".ckpt"), stem.with_suffix(".running.json")
    if (read_result(mark) or {}).get("key") != key:
        remove_checkpoint(checkpoint)
        write_result(mark, {"key": key})
    started = time.perf_counter()
    watch = place.clock.callback(row.name, row.seconds, place.work(row, step) / config.epochs, loader.samples)
    common: dict[str, Any] = {
        "callbacks": [*callbacks_of(step, model, place.largest_batch()), watch],
        "progress": place.progress,
        "checkpoint": checkpoint if place.recipe.checkpoints else None,
        "resume": place.recipe.checkpoints,
        "log_dir": stem.with_name(stem.name + "-log"),
    }
    history: list[EpochStats]
    if teacher is None:
        history = fine_tune(model, loader, None, config, **common)
    else:
        if config.fuse_batch_norm:  # the teacher adds its biases in its batch norms too: two passes less a layer
            teacher = fuse_batch_norm_(copy.deepcopy(teacher), take_biases=True)
        options = {k: v for k, v in step.companions.items() if k not in ("prune", "quantize", "sparse", "teacher")}
        history = distill(model, teacher, loader, None, config, **options, **common)
    seconds = sum(stats.seconds for stats in history)
    state = stem.with_suffix(".pt")
    with atomic_path(state) as temporary:
        torch.save(
            {
                name: value.cpu() if isinstance(value, torch.Tensor) else value
                for name, value in model.state_dict().items()
            },
            temporary,
        )
    result = {
        "key": key,
        "verb": step.verb,
        "state_sha256": file_sha256(state),
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - started,
        "images_per_s": len(loader) * loader.batch_size * config.epochs / max(seconds, 1e-9),
        "losses": [stats.loss for stats in history],
        "settings": step.as_dict(),
    }
    write_result(stem.with_suffix(".json"), result)
    remove_checkpoint(checkpoint)
    mark.unlink(missing_ok=True)
    return result


def training_config(settings: Mapping[str, Any], seed: int, device: torch.device) -> TrainConfig:
    """The `TrainConfig` of a step's settings; ``precision: auto`` is bf16 where the device is fast in it, else fp32."""
    settings = {key: value for key, value in settings.items() if key not in ("batch_size", "images", "augment")}
    if settings.get("precision") == "auto":
        settings["precision"] = "bf16" if _multiplies_bf16(device) else "fp32"
    return TrainConfig(**settings, seed=seed)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def training_loader(
    place: Workplace, batch_size: int | None, images: int | None, seed: int, augment: Mapping[str, Any]
) -> TensorLoader:
    """The training images in batches of ``batch_size``, or a fixed, stratified subset of them, under another
    augmentation where ``augment`` says so.

    Raises:
        ValueError: ``images`` outside [1, number of training images]; as `TensorLoader.augmented`.
    """
    loader = place.train.augmented(**augment)
    loader.batch_size, loader.seed = batch_size or place.recipe.batch_size, seed
    if images is not None:
        if not 1 <= images <= len(loader.images):
            raise ValueError(f"recipe: expected images in [1, {len(loader.images)}], got {images}")
        chosen = stratified(loader.labels.cpu(), images).to(loader.labels.device)
        loader.images, loader.labels = loader.images[chosen], loader.labels[chosen]
    return loader


def stratified(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of ``count`` samples, spread over the classes in proportion; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    # Position of each sample within its class, as a share of the class: the smallest shares are a stratified subset.
    share = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        own = order[labels[order] == label]
        share[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return torch.argsort(share, stable=True)[:count].sort().values


def conv_ranks(model: nn.Module, ranks: list[int]) -> dict[str, int]:
    """Ranks by layer name from a list with one rank for each Conv2d, in order. Raises ValueError for another count."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if len(names) != len(ranks):
        raise ValueError(f"recipe: expected one rank for each of {len(names)} convolutions, got {len(ranks)}")
    return dict(zip(names, ranks, strict=True))


def _words(step: Step) -> str:
    epochs = step.settings.get("epochs")
    text = f"{step.verb} {epochs} epochs" if epochs else step.verb
    prune: Any = step.companions.get("prune")
    if prune:
        text += (
            f", pruning to {prune.get('sparsity', 0.875):.1%}" if not isinstance(prune.get("sparsity"), Mapping) else ""
        )
    return text
