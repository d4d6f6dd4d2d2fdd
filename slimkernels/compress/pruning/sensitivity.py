"""How much each layer minds being pruned, and the sparsities per layer that cost least for a given total.

The scan prunes one layer at a time, without training, and measures loss and accuracy (as Li et al. do for filters,
arXiv 1608.08710, section 3.2). `SensitivityReport.budget` adds the losses of the layers up, as if they did not
interact, and spends the sparsity where the predicted loss rises least.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.compress.pruning.granularity import check_granularity
from slimkernels.compress.pruning.importance import Importance, check_importance
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.compress.pruning.schedules import check_sparsity
from slimkernels.compress.selection import block_shapes_of, prunable_layers, readable_weight
from slimkernels.compress.training.evaluation import Loader, checked_logits, device_of, mode_of
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.files import atomic_path, sealed_json, unsealed_json
from slimkernels.progress import counting_bar

SCAN_VERSION = 1
_UNPRUNED = "(none)"  # no layer can be called that
DEFAULT_SPARSITIES = (0.5, 0.75, 0.875, 0.9375)


@dataclass(frozen=True)
class SensitivityReport:
    """Accuracy and loss of a model with one layer pruned.

    Attributes:
        accuracy: of the unpruned model, in [0, 1].
        loss: of the unpruned model, the mean cross-entropy per sample.
        sparsities: what was tried, ascending.
        accuracies: layer -> the accuracy at each sparsity, with that layer alone pruned.
        losses: layer -> the loss at each sparsity, with that layer alone pruned.
        weights: layer -> number of weights.
    """

    accuracy: float
    loss: float
    sparsities: tuple[float, ...]
    accuracies: dict[str, tuple[float, ...]]
    losses: dict[str, tuple[float, ...]]
    weights: dict[str, int]

    def budget(self, sparsity: float) -> dict[str, float]:
        """Sparsity per layer, for `slimkernels.prune_`, that reaches ``sparsity`` of the scanned layers' weights at the
        least predicted loss.

        Per layer, the loss over sparsity is made non-decreasing and replaced by the lower convex hull of its points
        (a layer can always be taken between two of them); then the flattest segments are taken first, which is
        optimal for a sum of convex functions.

        Raises:
            ValueError: a sparsity outside [0, 1), or above the highest that was scanned.
        """
        check_sparsity("budget", "sparsity", sparsity)
        if sparsity > self.sparsities[-1]:
            raise ValueError(
                f"budget: expected sparsity of at most {self.sparsities[-1]}, the highest scanned, got {sparsity}"
            )
        shares = dict.fromkeys(self.weights, 0.0)
        left = sparsity * sum(self.weights.values())
        segments = []
        for name, weights in self.weights.items():
            for (s0, l0), (s1, l1) in itertools.pairwise(_hull(self._curve(name))):
                segments.append(((l1 - l0) / ((s1 - s0) * weights), s0, name, (s1 - s0) * weights))
        for _, start, name, size in sorted(segments):
            if left <= 0:
                break
            taken = min(size, left)
            shares[name] = start + taken / self.weights[name]
            left -= taken
        return shares

    def predicted_loss(self, shares: Mapping[str, float]) -> float:
        """Loss with these sparsities, rises of the layers added up, between scanned points on the convex hull.

        Raises:
            ValueError: an unknown layer, or a sparsity above the highest scanned.
        """
        total = self.loss
        for name, share in shares.items():
            if name not in self.weights or not 0.0 <= share <= self.sparsities[-1]:
                raise ValueError(
                    f"predicted_loss: expected scanned layers and sparsities up to {self.sparsities[-1]}, "
                    f"got {name!r}: {share}"
                )
            for (s0, l0), (s1, l1) in itertools.pairwise(_hull(self._curve(name))):
                if s0 <= share <= s1:
                    total += l0 + (l1 - l0) * (share - s0) / (s1 - s0)
                    break
        return total

    def _curve(self, name: str) -> list[tuple[float, float]]:
        """``(sparsity, rise of the loss)`` from (0, 0), never falling."""
        rises = [max(loss - self.loss, 0.0) for loss in self.losses[name]]
        return [(0.0, 0.0), *zip(self.sparsities, itertools.accumulate(rises, max), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "sparsities": list(self.sparsities),
            "layers": {
                name: {"weights": self.weights[name], "accuracies": list(self.accuracies[name]), "losses": list(losses)}
                for name, losses in self.losses.items()
            },
        }

    def __str__(self) -> str:
        width = max(map(len, [*self.weights, _UNPRUNED]))
        head = "  ".join(f"{s:>7.1%}" for s in self.sparsities)
        lines = [f"{'layer':<{width}}  {head}", f"{_UNPRUNED:<{width}}  {self.accuracy:>7.2%}"]
        for name, values in self.accuracies.items():
            lines.append(f"{name:<{width}}  " + "  ".join(f"{value:>7.2%}" for value in values))
        return "\n".join(lines)


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points with ascending abscissae."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def sensitivity_scan(
    model: nn.Module,
    loader: Loader,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    block_shape: Sequence[int] | Mapping[str, Sequence[int]] = (16, 1),
    *,
    granularity: str = "block",
    importance: str | Importance | Mapping[str, Tensor] = "magnitude",
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_first: bool = True,
    path: str | Path | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Prunes every layer alone at every sparsity and measures loss and accuracy; the model stays untouched.

    Args:
        model: a trained classifier; masks that it has already are part of it.
        loader: batches ``(images, labels)``, evaluated ``1 + layers * sparsities`` times: a few thousand samples do.
        sparsities: shares to try, each in (0, 1).
        block_shape: as in `slimkernels.prune_`.
        granularity: as in `slimkernels.prune_`.
        importance: as in `slimkernels.prune_`.
        layers: as in `slimkernels.prune_`.
        exclude: as in `slimkernels.prune_`.
        skip_first: as in `slimkernels.prune_`.
        path: JSON file, rewritten atomically after every layer; a later call with the same model and arguments goes on
            from it.
        progress: shows a bar on stderr if that is a terminal.

    Raises:
        ValueError: a bad argument, an empty loader, a layer that cannot be pruned, or a file of another scan.
    """
    op = "sensitivity_scan"
    model = unwrapped(op, model)
    check_granularity(op, granularity)
    check_importance(op, importance)
    tried = tuple(sorted({check_sparsity(op, "sparsities", share) for share in sparsities} - {0.0}))
    if not tried:
        raise ValueError(f"{op}: expected at least one sparsity above 0, got {tuple(sparsities)}")
    picked = prunable_layers(op, model, layers, exclude, skip_first, verb="scan")
    blocks = block_shapes_of(op, model, picked, block_shape)
    weights = {layer.name: readable_weight(op, layer.name, layer.module).numel() for layer in picked}
    if not weights:
        raise ValueError(f"{op}: expected at least one Conv2d or Linear to scan, got none after the exclusions")
    probe = finalize_(copy.deepcopy(model))
    key = _key(probe, tried, blocks, granularity, importance)
    found = _read(op, Path(path), key) if path is not None else {}

    def measured(name: str, share: float | None) -> tuple[float, float]:
        if share is None:
            return _measure(op, probe, loader)
        options = {"granularity": granularity, "importance": importance}
        with _pruned(probe, name, share, blocks[name], options):
            return _measure(op, probe, loader)

    with counting_bar(progress, "sensitivity", 1 + len(weights) * len(tried)) as advance:
        for name in (_UNPRUNED, *weights):
            if name not in found:
                found[name] = [measured(name, share) for share in (tried if name != _UNPRUNED else (None,))]
                if path is not None:
                    _write(Path(path), key, found)
            advance(len(found[name]), name)
    (loss, accuracy) = found.pop(_UNPRUNED)[0]
    return SensitivityReport(
        accuracy,
        loss,
        tried,
        {name: tuple(a for _, a in found[name]) for name in weights},
        {name: tuple(value for value, _ in found[name]) for name in weights},
        weights,
    )


@contextmanager
def _pruned(
    probe: nn.Module, name: str, share: float, block: tuple[int, int], options: Mapping[str, Any]
) -> Iterator[None]:
    """The model with one layer pruned inside the block, as it was afterwards."""
    weight = readable_weight("sensitivity_scan", name, probe.get_submodule(name))
    saved = weight.detach().clone()
    try:
        finalize_(prune_(probe, {name: share}, block, **options))
        yield
    finally:
        finalize_(probe)
        with torch.no_grad():
            weight.copy_(saved)


@torch.no_grad()
def _measure(op: str, model: nn.Module, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy per sample and top-1 accuracy, in eval mode."""
    device = device_of(model)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    with mode_of(model, training=False):
        for images, labels, *_ in loader:
            labels = labels.to(device, non_blocking=True)
            logits = checked_logits(op, model, images.to(device, non_blocking=True))
            loss += F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            total += len(labels)
    if total == 0:
        raise ValueError(f"{op}: expected at least one sample, got an empty loader")
    value = float(loss) / total
    if value != value:
        raise ValueError(f"{op}: expected a finite loss, got NaN; the model's weights or the images are not finite")
    return value, int(correct) / total


def _key(model: nn.Module, tried: Any, blocks: Any, granularity: str, importance: Any) -> str:
    """Digest of the weights and the arguments, so that a file of another scan is not taken for this one's."""
    digest = hashlib.sha256(repr((tried, blocks, granularity)).encode())
    named = importance if isinstance(importance, str) else getattr(importance, "__qualname__", "scores")
    digest.update(str(named).encode())
    scores = importance if isinstance(importance, Mapping) else {}
    for name, tensor in (*model.state_dict().items(), *scores.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(op: str, path: Path, key: str) -> dict[str, list[tuple[float, float]]]:
    if not path.exists():
        return {}
    try:
        state = unsealed_json(path.read_bytes())
        if state["version"] != SCAN_VERSION or state["key"] != key:
            raise ValueError("it belongs to another model or to other arguments")
        return {name: [(float(a), float(b)) for a, b in rows] for name, rows in state["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{op}: expected the unfinished scan of this model in {path}, got none: {error}") from error


def _write(path: Path, key: str, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        state = sealed_json({"version": SCAN_VERSION, "key": key, "layers": found})
        temporary.write_text(json.dumps(state, indent=1))
