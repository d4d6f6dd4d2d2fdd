"""Terms of a distillation loss, as settings: what `distill` takes in ``loss``.

A term with layers may need trainable parts of its own (FitNets' regressors): `Term.matcher` builds them before the
optimiser is, and they are trained and checkpointed with the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimkernels.compress.distillation.features import layer_pairs, same_image_size
from slimkernels.compress.distillation.losses import (
    attention_transfer_loss,
    check_temperature,
    decoupled_kd_loss,
    hint_loss,
    soft_target_loss,
)


@dataclass(frozen=True)
class Signals:
    """What a term sees of one batch: logits ``(N, classes)``, labels ``(N,)``, recorded outputs by layer name, and the
    temperature of the call to `distill`."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor
    student_features: Mapping[str, Tensor]
    teacher_features: Mapping[str, Tensor]
    temperature: float


@dataclass(frozen=True)
class Term:
    """Base of all terms. ``weight`` multiplies the term; ``layers`` maps student's layers to teacher's.

    A term of your own is a frozen dataclass that overrides `loss`; its ``repr`` is what a resumed run compares.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"{type(self).__name__}: expected weight >= 0 and finite, got {self.weight}")

    @property
    def pairs(self) -> dict[str, str]:
        """Student's layer -> teacher's layer whose outputs the term compares."""
        return {}

    def matcher(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> nn.Module | None:
        """Trainable parts for features of these shapes, freshly initialised; None where the term has none."""
        return None

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        """Scalar, without the weight."""
        raise NotImplementedError


def _check_temperature(term: KD | DecoupledKD) -> None:
    if term.temperature is not None:
        check_temperature(type(term).__name__, term.temperature)


@dataclass(frozen=True)
class KD(Term):
    """Softened class probabilities, `losses.soft_target_loss` (arXiv 1503.02531), at its own or `distill`'s
    temperature."""

    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        """`losses.soft_target_loss`."""
        return soft_target_loss(signals.student_logits, signals.teacher_logits, self.temperature or signals.temperature)


@dataclass(frozen=True)
class DecoupledKD(Term):
    """Decoupled distillation, `losses.decoupled_kd_loss` (arXiv 2203.08679), at its own or `distill`'s temperature.

    The paper adds it to the full cross-entropy, which is ``soft_weight=0.5`` at twice the learning rate.
    """

    alpha: float = 1.0
    beta: float = 2.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)
        if not (0.0 <= self.alpha < math.inf and 0.0 <= self.beta < math.inf):
            raise ValueError(f"DecoupledKD: expected alpha and beta >= 0, got alpha={self.alpha}, beta={self.beta}")

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        """`losses.decoupled_kd_loss`."""
        return decoupled_kd_loss(
            signals.student_logits,
            signals.teacher_logits,
            signals.labels,
            self.temperature or signals.temperature,
            self.alpha,
            self.beta,
        )


@dataclass(frozen=True)
class _LayerTerm(Term):
    layers: str | Iterable[str] | Mapping[str, str]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", layer_pairs(type(self).__name__, self.layers))

    @property
    def pairs(self) -> dict[str, str]:
        return self.layers  # type: ignore[return-value]  # the constructor made pairs of them

    def _features(self, signals: Signals) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's output of every pair, of one image size, the teacher's on the student's device."""
        return [_matched(signals.student_features[s], signals.teacher_features[t]) for s, t in self.pairs.items()]


@dataclass(frozen=True)
class Hint(_LayerTerm):
    """FitNets (Romero et al., arXiv 1412.6550): the student's layers, through a trained 1x1 regressor each, match the
    teacher's, `losses.hint_loss` summed over the pairs.

    The regressor is a 1x1 convolution for ``(N, C, H, W)``, a linear layer for ``(N, features)``; where image sizes
    differ the larger map is average-pooled first. ``layers`` is a name, several, or a dict from student's to
    teacher's. The paper's first stage, hints alone, is ``soft_weight=1``.
    """

    def matcher(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> nn.Module:
        """One regressor per pair, in order."""
        regressors = []
        for s, t in self.pairs.items():
            a, b = student[s], teacher[t]
            if a.dim() != b.dim() or a.dim() not in (2, 4):
                raise ValueError(
                    f"Hint: expected features (N, C, H, W) or (N, C) of both layers, got {tuple(a.shape)} from the "
                    f"student's {s!r} and {tuple(b.shape)} from the teacher's {t!r}"
                )
            layer = nn.Conv2d(a.shape[1], b.shape[1], 1) if a.dim() == 4 else nn.Linear(a.shape[1], b.shape[1])
            regressors.append(layer.to(a.device, a.dtype))
        return nn.ModuleList(regressors)

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        """Sum of `losses.hint_loss` over the pairs."""
        assert isinstance(matcher, nn.ModuleList)
        losses = [hint_loss(r(a), b) for r, (a, b) in zip(matcher, self._features(signals), strict=True)]
        return sum(losses[1:], losses[0])


@dataclass(frozen=True)
class AttentionTransfer(_LayerTerm):
    """Attention maps of the student's layers match the teacher's, `losses.attention_transfer_loss` (arXiv 1612.03928)
    summed over the pairs; ``layers`` as in `Hint`.

    The paper's weight beta / 2 = 500 is for a mean over positions: 500 / (H W) here.
    """

    def matcher(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """No trainable part; only checks that the layers give images."""
        for s, t in self.pairs.items():
            if student[s].dim() != 4 or teacher[t].dim() != 4:
                raise ValueError(
                    f"AttentionTransfer: expected features (N, C, H, W) of both layers, got {tuple(student[s].shape)} "
                    f"from the student's {s!r} and {tuple(teacher[t].shape)} from the teacher's {t!r}"
                )

    def loss(self, signals: Signals, matcher: nn.Module | None) -> Tensor:
        """Sum of `losses.attention_transfer_loss` over the pairs."""
        losses = [attention_transfer_loss(a, b) for a, b in self._features(signals)]
        return sum(losses[1:], losses[0])


def _matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return same_image_size(student, teacher.to(student.device))


NAMED_TERMS = {"kd": KD(), "dkd": DecoupledKD()}


def as_terms(op: str, loss: str | Term | Iterable[Term]) -> tuple[Term, ...]:
    """Terms from a name, a term, or several.

    Raises:
        ValueError: an unknown name, or none at all. TypeError: something that is no term.
    """
    if isinstance(loss, str):
        if loss not in NAMED_TERMS:
            raise ValueError(f"{op}: expected loss in {sorted(NAMED_TERMS)} or terms, got {loss!r}")
        return (NAMED_TERMS[loss],)
    terms = (loss,) if isinstance(loss, Term) else tuple(loss)
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"{op}: expected loss to hold terms (KD, DecoupledKD, Hint, ...), got {term!r}")
    if not terms:
        raise ValueError(f"{op}: expected at least one term in loss, got none")
    return terms
