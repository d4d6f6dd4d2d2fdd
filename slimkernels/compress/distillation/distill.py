"""Knowledge distillation: a student learns from a teacher beside the labels.

With soft weight a the loss is ``(1 - a) cross_entropy + a sum(weight * term)``. The one term of ``loss="kd"`` makes it
`losses.kd_loss` (Hinton, Vinyals and Dean, arXiv 1503.02531); `terms` has the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from slimkernels.compress.distillation.features import FeatureTap
from slimkernels.compress.distillation.losses import check_share, check_temperature, kd_loss
from slimkernels.compress.distillation.terms import Signals, Term, as_terms
from slimkernels.compress.training.callbacks import Callback
from slimkernels.compress.training.engine import EpochStats, Loader, TrainConfig, TrainingStep, run
from slimkernels.compress.training.evaluation import (
    batches_of,
    checked_batch,
    checked_logits,
    device_of,
    epoch_seed,
    mode_of,
    train_mode_of,
    without_wrapper,
)
from slimkernels.compress.training.train import build_config

__all__ = ["DistillationStep", "distill", "kd_loss"]


class DistillationStep(TrainingStep):
    """The student and its loss against a teacher, which is no part of the step's parameters or state.

    The teacher runs without gradient, under the autocast of the student where they share a kind of device, in
    whatever mode it is in: `distill` sees to eval mode.

    Args:
        student: the model to train; returns logits ``(N, classes)``.
        teacher: returns logits ``(N, classes)``; it may be on another device.
        terms: what the loss compares, as in `distill`.
        temperature: divides the logits, as in `distill`.
        soft_weight: share of the teacher in the loss, as in `distill`.
        label_smoothing: of the cross-entropy.
        sample: a few images, run through both models to check the logits and to build the terms' trainable parts.
        cache: keeps the teacher's logits by sample index; batches then have to bring their indices.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Term],
        sample: Tensor,
        *,
        temperature: float = 4.0,
        soft_weight: float = 0.7,
        label_smoothing: float = 0.0,
        cache: bool = False,
    ) -> None:
        super().__init__(student)
        teacher = without_wrapper("distill", teacher) if any(term.pairs for term in terms) else teacher
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        # With no share in the loss a trainable term would have parameters without a gradient, which DDP refuses.
        self._terms, self._temperature = tuple(terms) if soft_weight > 0.0 else (), temperature
        self._soft_weight, self._label_smoothing = soft_weight, label_smoothing
        self._cache = _LogitCache() if cache else None
        pairs = [pair for term in self._terms for pair in term.pairs.items()]
        self._student_tap = FeatureTap("distill", "student", student, dict.fromkeys(s for s, _ in pairs))
        self._teacher_tap = FeatureTap("distill", "teacher", teacher, dict.fromkeys(t for _, t in pairs))
        self.matchers = nn.ModuleList(self._matchers(sample))

    def attached(self) -> ExitStack:
        """Context in which the terms see the layers they compare."""
        stack = ExitStack()
        stack.enter_context(self._student_tap.attached())
        stack.enter_context(self._teacher_tap.attached())
        return stack

    def _matchers(self, sample: Tensor) -> list[nn.Module]:
        (teacher,) = self._teacher
        with (
            torch.no_grad(),
            self.attached(),
            mode_of(self.model, training=False),
            mode_of(teacher, training=False),
            self._student_tap.recording() as student_features,
            self._teacher_tap.recording() as teacher_features,
        ):
            logits = checked_logits("distill", self.model, sample.to(device_of(self.model)))
            targets = checked_logits("distill", teacher, sample.to(device_of(teacher)))
        if logits.shape != targets.shape:
            raise ValueError(
                "distill: expected teacher and student with the same number of classes, "
                f"got {targets.shape[1]} of the teacher and {logits.shape[1]} of the student"
            )
        _check_finite(targets, teacher_features)
        built = (term.matcher(student_features, teacher_features) for term in self._terms)
        return [nn.Identity() if matcher is None else matcher for matcher in built]

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        with self._student_tap.recording() as student_features:
            logits = checked_logits("distill", self.model, images)
        hard = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        if self._soft_weight == 0.0:
            return hard
        targets, teacher_features = self._teach(images, indices)
        signals = Signals(
            logits, targets.to(logits.device), labels, student_features, teacher_features, self._temperature
        )
        soft = [
            term.weight * term.loss(signals, matcher) for term, matcher in zip(self._terms, self.matchers, strict=True)
        ]
        return (1.0 - self._soft_weight) * hard + self._soft_weight * sum(soft[1:], soft[0])

    def _teach(self, images: Tensor, indices: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The teacher's logits and features for these samples."""
        if self._cache is not None:
            if indices is None:
                raise ValueError(
                    "distill: expected batches (images, labels, indices) with cache_logits=True, got no indices; "
                    "a TensorLoader gives them with with_indices=True"
                )
            return self._cache.get(indices, lambda missing: self._run_teacher(images[missing])[0]), {}
        return self._run_teacher(images)

    def _run_teacher(self, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        (teacher,) = self._teacher
        with torch.no_grad(), self._teacher_tap.recording() as features:
            return teacher(images.to(device_of(teacher), non_blocking=True)), features

    def recipe(self) -> dict[str, Any]:
        """Terms, temperature and soft weight."""
        return {
            "terms": [repr(term) for term in self._terms],
            "temperature": self._temperature,
            "soft_weight": self._soft_weight,
        }


def _check_finite(logits: Tensor, features: Mapping[str, Tensor]) -> None:
    """Refuses a teacher whose signals would make every loss NaN; -inf is a logit that the losses take."""
    bad = [("logits", "NaN or +inf")] if bool((logits.isnan() | logits.isposinf()).any()) else []
    bad += [(f"output of layer {name!r}", "NaN or infinity") for name, t in features.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"distill: expected finite {bad[0][0]} of the teacher, got {bad[0][1]}")


class _LogitCache:
    """Logits by sample index, computed when a sample is first seen and kept on the device of the indices."""

    def __init__(self) -> None:
        self.table = torch.empty(0, 0)
        self.known = torch.empty(0, dtype=torch.bool)

    @torch.compiler.disable  # grows by the data
    @torch.no_grad()
    def get(self, indices: Tensor, compute: Any) -> Tensor:
        size = int(indices.max()) + 1
        if size > len(self.known):
            grown = torch.zeros(max(size, 2 * len(self.known)), dtype=torch.bool, device=indices.device)
            grown[: len(self.known)] = self.known
            self.known = grown
        missing = ~self.known[indices]
        if bool(missing.any()):
            fresh = compute(missing).detach().to(indices.device)
            fresh = fresh.float() if fresh.dtype.itemsize < 4 else fresh
            if self.table.shape != (len(self.known), fresh.shape[1]):
                table = fresh.new_zeros(len(self.known), fresh.shape[1])
                table[: len(self.table), : self.table.shape[1]] = self.table
                self.table = table
            self.table[indices[missing]] = fresh
            self.known[indices] = True
        return self.table[indices]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_loader: Loader,
    val_loader: Loader | None = None,
    config: TrainConfig | None = None,
    *,
    loss: str | Term | Iterable[Term] = "kd",
    temperature: float = 4.0,
    soft_weight: float = 0.7,
    cache_logits: bool = False,
    callbacks: Sequence[Callback] = (),
    optimizer: torch.optim.Optimizer | str | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    log_dir: str | Path | None = None,
    **overrides: Any,
) -> list[EpochStats]:
    """Trains ``student`` in place against ``teacher``, which is run in eval mode and left unchanged.

    The student may be any module: one pruned by `prune_` keeps its masks, ``callbacks=[GradualPruning(...)]`` prunes
    while distilling, `factorize_` may have been called before, and ``convert(model, training=True)`` trains through
    the sparse kernels, its pattern fixed. Everything not listed here is as in `train.fine_tune`.

    Args:
        student: returns logits ``(N, classes)``.
        teacher: returns logits of the same shape on the same images; it may live on another device. A logit of -inf is
            a class that it rules out.
        loss: "kd", "dkd", a `terms.Term`, or several: `terms.KD`, `terms.DecoupledKD`, `terms.Hint`,
            `terms.AttentionTransfer`. Cross-entropy is always the rest of the loss.
        temperature: T > 0 of the terms that give none of their own; SlimNets used 20.
        soft_weight: share a of the terms against the cross-entropy, in [0, 1]; SlimNets used 0.7.
        cache_logits: the teacher sees every sample once, at its first use, and its logits are kept (4 bytes per sample
            and class). Exact only where a sample's image never changes: a loader that says it augments is refused, a
            DataLoader with random transforms cannot be seen and must not be used. The loader has to give
            ``(images, labels, indices)``. A resumed run computes the logits again, in other batches: the same up to
            rounding.

    Returns:
        Statistics of every epoch.

    Raises:
        ValueError: teacher and student are one object, share layers that training would change or differ in their
            number of classes, NaN in what the teacher returns, an unknown layer name (near matches are listed), a bad
            temperature or weight, an augmenting loader or terms with layers together with ``cache_logits``, an
            optimizer object together with a trainable term, and all that `fine_tune` raises.
        TypeError: a loss that is no term, and all that `fine_tune` raises.
        FloatingPointError: the loss became NaN or infinite; the message names epoch and step.
    """
    check_temperature("distill", temperature)
    check_share("distill", "soft_weight", soft_weight)
    terms = as_terms("distill", loss)
    if isinstance(optimizer, str):
        overrides["optimizer"], optimizer = optimizer, None
    config = build_config("distill", config, overrides)
    student = without_wrapper("distill", student)
    _check_apart(student, teacher)
    if cache_logits:
        _check_cacheable(train_loader, terms)
    with epoch_seed(config.seed, -1, device_of(student)):
        step = DistillationStep(
            student,
            teacher,
            terms,
            _sample(train_loader),
            temperature=temperature,
            soft_weight=soft_weight,
            label_smoothing=config.label_smoothing,
            cache=cache_logits,
        )
    if optimizer is not None and any(True for _ in step.matchers.parameters()):
        raise ValueError(
            "distill: expected optimizer to be None with a Hint, whose regressors it could not hold; "
            "set optimizer, lr and the like in the config"
        )
    with mode_of(teacher, training=False), step.attached():
        return run(
            "distill",
            step,
            train_loader,
            val_loader,
            config,
            callbacks=callbacks,
            optimizer=optimizer,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
            log_dir=log_dir,
        )


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher that training the student would change, through tensors or layers that they share."""
    teacher = without_wrapper("distill", teacher)
    if student is teacher:
        raise ValueError("distill: expected two models, got the same object as student and teacher")
    taught = {_memory(tensor) for tensor in (*teacher.parameters(), *teacher.buffers()) if tensor.numel()}
    layers = set(teacher.modules())
    shared = [name for name, p in student.named_parameters() if p.requires_grad and _memory(p) in taught]
    with train_mode_of(student):
        for name, module in student.named_modules():
            if module.training:
                shared += [f"{name}.{key}" for key, b in module.named_buffers(recurse=False) if _memory(b) in taught]
                shared += [name] if module in layers and isinstance(module, _DropoutNd) else []
    if shared:
        raise ValueError(
            f"distill: expected a student that shares nothing it trains with its teacher, got {shared[0]!r} and "
            f"{len(shared) - 1} more of the teacher's own; build the student on copy.deepcopy of the layers, or freeze "
            "them with requires_grad_(False) and eval()"
        )


def _memory(tensor: Tensor) -> object:
    """Equal for tensors in the same memory; the tensor itself where it has none to compare."""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.device, tensor.untyped_storage().data_ptr()) if plain else id(tensor)


def _check_cacheable(loader: Any, terms: Sequence[Term]) -> None:
    augmented = [name for name in ("crop_padding", "flip", "cutout", "augment") if getattr(loader, name, None)]
    if augmented:
        raise ValueError(
            f"distill: expected a loader without augmentation with cache_logits=True, got {augmented[0]}="
            f"{getattr(loader, augmented[0])!r}; cached logits belong to one image"
        )
    for term in terms:
        if term.pairs:
            raise ValueError(
                f"distill: expected terms of logits alone with cache_logits=True, got {type(term).__name__}, "
                "which compares layers"
            )


def _sample(loader: Loader) -> Tensor:
    """Two images of the loader's first batch; its own generator is left as it was."""
    batches_of("distill", loader)
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        return checked_batch("distill", next(iter(loader)))[0][:2]
    finally:
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
