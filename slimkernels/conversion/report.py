"""`explain`: what conversion did to each layer, as text and as data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimkernels.conversion.container import read_plan
from slimkernels.conversion.plan import LayerPlan, ModelPlan
from slimkernels.conversion.wrappers import unwrapped

_COLUMNS = ("layer", "type", "action", "stored as", "kernel", "zeros", "KiB", "dense ms", "ms", "reason")
_RIGHT = {"zeros", "KiB", "dense ms", "ms"}


@dataclass(frozen=True)
class Report:
    """The plan of a converted model, row by row; ``str()`` is a table.

    Attributes:
        plan: what it was made from.
        file_bytes: size of the file, where a file was explained.
    """

    plan: ModelPlan
    file_bytes: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per layer, with the fields of `LayerPlan` that describe it."""
        names = (
            "name",
            "type",
            "action",
            "format",
            "into",
            "block_shape",
            "kind",
            "ranks",
            "kernel",
            "epilogue",
            "sparsity",
            "block_sparsity",
            "bytes_dense",
            "bytes_stored",
            "dense_ms",
            "sparse_ms",
            "supported",
            "reason",
        )
        return [{name: getattr(layer, name) for name in names} for layer in self.plan.layers]

    @property
    def bytes_dense(self) -> int:
        """Bytes of all listed layers as dense weights."""
        return sum(layer.bytes_dense for layer in self.plan.layers)

    @property
    def bytes_stored(self) -> int:
        """Bytes of all listed layers as stored: values, indices, biases."""
        return sum(layer.bytes_stored for layer in self.plan.layers)

    def to_json(self) -> str:
        """Rows and totals as JSON text."""
        plan = self.plan
        return json.dumps(
            {
                "decided": plan.decided,
                "training": plan.training,
                "device": plan.device,
                "threads": plan.threads,
                "versions": dict(plan.versions),
                "rows": self.rows,
                "bytes_dense": self.bytes_dense,
                "bytes_stored": self.bytes_stored,
                "file_bytes": self.file_bytes,
                "dense_ms": plan.dense_ms,
                "converted_ms": plan.converted_ms,
                "notes": plan.notes,
            }
        )

    def __str__(self) -> str:
        table = [_COLUMNS, *(_cells(layer) for layer in self.plan.layers)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = []
        for row in table:
            cells = [
                cell.rjust(width) if column in _RIGHT else cell.ljust(width)
                for cell, width, column in zip(row, widths, _COLUMNS, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        plan = self.plan
        lines = [f"{len(plan.swapped)} layers swapped; decided: {plan.decided} ({plan.device}, {plan.threads} threads)"]
        ratio = self.bytes_dense / max(self.bytes_stored, 1)
        lines.append(
            f"stored {self.bytes_stored / 1024:.1f} KiB (indices included) instead of "
            f"{self.bytes_dense / 1024:.1f} KiB: {ratio:.2f}x smaller"
        )
        if self.file_bytes is not None:
            lines.append(f"file: {self.file_bytes} bytes")
        for i, (dense, converted) in enumerate(zip(plan.dense_ms, plan.converted_ms, strict=False)):
            lines.append(
                f"whole model, example input {i}: {dense:.3g} ms dense, {converted:.3g} ms converted, "
                f"{dense / max(converted, 1e-12):.2f}x faster"
            )
        return [*lines, *(f"note: {note}" for note in plan.notes)]


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    stored = layer.format or ""
    if layer.block_shape is not None:
        stored += f" {layer.block_shape[0]}x{layer.block_shape[1]}"
    if layer.ranks is not None:
        stored += f" {layer.kind} {'x'.join(map(str, layer.ranks))}"
    if layer.epilogue != "none":
        stored += f" +{layer.epilogue}"
    weighted = layer.weight_shape is not None
    return (
        layer.name,
        layer.type,
        layer.action,
        stored,
        layer.kernel or "",
        f"{layer.sparsity:.1%}" if weighted else "",
        f"{layer.bytes_stored / 1024:.1f}" if weighted else "",
        " ".join(f"{t:.3g}" for t in layer.dense_ms),
        " ".join(f"{t:.3g}" for t in layer.sparse_ms),
        layer.reason,
    )


def explain(subject: nn.Module | ModelPlan | str | os.PathLike[str]) -> Report:
    """What happened to each layer of a converted model, and why.

    Args:
        subject: a model from `convert` or `load`, a wrapper around one (DataParallel, AveragedModel, `torch.compile`),
            a `ModelPlan`, or the path of a ``.slim.safetensors`` file.

    Raises:
        TypeError: anything else. ValueError: a model that was not converted; a damaged file, the field at fault named.
    """
    if isinstance(subject, ModelPlan):
        return Report(subject)
    subject = unwrapped("explain", subject)
    if isinstance(subject, nn.Module):
        plan = getattr(subject, "slimkernels_plan", None)
        if not isinstance(plan, ModelPlan):
            raise ValueError(
                f"explain: expected a model from slimkernels.convert, got a plain {type(subject).__name__}"
            )
        return Report(plan)
    if isinstance(subject, (str, os.PathLike)):
        return Report(*read_plan(subject))
    raise TypeError(f"explain: expected a converted model, a ModelPlan or a path, got {type(subject).__name__}")
