"""`explain`: what conversion did to each layer, as text, HTML, Markdown and data."""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from slimkernels.conversion.compact_index import SizeBound
from slimkernels.conversion.container import read_header
from slimkernels.conversion.plan import ModelPlan
from slimkernels.conversion.report_rows import COLUMNS, RIGHT, Row, hints, rows_of, table_text
from slimkernels.conversion.wrappers import unwrapped

# Rows of the text; `Report.text` shows more or fewer.
_MOST_ROWS = 40
_WIDTH_WITHOUT_TERMINAL = 120


@dataclass(frozen=True)
class Report:
    """The plan of a converted model. ``print(report)`` shows a table, and ``report[:500]`` cuts its text as any text.

    Notebooks show it as a table, too. The table has the layers that take most of the time first (without measurements,
    the largest), says what was folded and fused into each, and gathers what needs no row of its own.

    Attributes:
        plan: what it was made from.
        file_bytes: size of the file, where a file was explained.
        state_bytes: bytes of all tensors of the model, those that conversion does not look at included; None where a
            `ModelPlan` alone was explained. Of a file, when it is loaded.
        file_bound: of a compact file, the least bytes that its values and patterns need.
    """

    plan: ModelPlan
    file_bytes: int | None = None
    state_bytes: int | None = None
    file_bound: SizeBound | None = None

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
            "speedup_low",
            "speedup_high",
            "supported",
            "reason",
        )
        return [{name: getattr(layer, name) for name in names} for layer in self.plan.layers]

    @property
    def bytes_stored(self) -> int:
        """Bytes of the whole model as stored: values, indices, biases, and all other parameters and buffers.

        Of a `ModelPlan` alone: of the layers in it.
        """
        listed = sum(layer.bytes_stored for layer in self.plan.layers)
        return listed if self.state_bytes is None else self.state_bytes

    @property
    def bytes_dense(self) -> int:
        """The same with every layer dense, as before the conversion."""
        saved = sum(layer.bytes_dense - layer.bytes_stored for layer in self.plan.layers)
        return self.bytes_stored + saved

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
                "file_bound": None if self.file_bound is None else asdict(self.file_bound),
                "dense_ms": plan.dense_ms,
                "converted_ms": plan.converted_ms,
                "speedup_low": plan.speedup_low,
                "speedup_high": plan.speedup_high,
                "notes": plan.notes,
            }
        )

    def text(self, width: int | None = None, rows: int | None = _MOST_ROWS, *, order: str = "cost") -> str:
        """The table and the summary as text.

        Args:
            width: of a line; by default that of the terminal, 120 without one. Reasons are cut at it.
            rows: at most so many; None shows all.
            order: ``cost``, the most expensive layers first, or ``model``, as they are in the model.

        Raises:
            ValueError: another order, or fewer than one row.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"Report.text: expected rows >= 1 or None, got {rows}")
        width = width or shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns
        shown, left_out = self._shown(rows, order, "Report.text")
        lines = table_text([row.cells for row in shown], width) if shown else []
        if left_out:
            lines.append(f"... and {left_out} more rows: .text(rows=None) shows all")
        return "\n".join([*lines, *([""] if lines else []), *self._summary()])

    def _shown(self, rows: int | None, order: str, where: str) -> tuple[list[Row], int]:
        if order not in ("cost", "model"):
            raise ValueError(f"{where}: expected order in cost, model, got {order!r}")
        every = rows_of(self.plan)
        if order == "cost":
            every.sort(key=lambda row: row.cost, reverse=True)
        count = len(every) if rows is None else rows
        return every[:count], max(len(every) - count, 0)

    def to_markdown(self, rows: int | None = None, *, order: str = "cost") -> str:
        """The table, all of it by default, and the summary as Markdown. Raises as `text` does."""
        shown, left_out = self._shown(rows, order, "Report.to_markdown")

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = "| " + " | ".join("---:" if column in RIGHT else "---" for column in COLUMNS) + " |"
        table = [line(COLUMNS), rule, *(line(row.cells) for row in shown)] if shown else []
        more = [f"\n... and {left_out} more rows"] if left_out else []
        return "\n".join([*table, *more, "", *(f"- {text}" for text in self._summary())])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        shown, left_out = self._shown(_MOST_ROWS, "cost", "Report")
        head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
        body = []
        for row in shown:
            cells = (
                f'<td style="text-align: {"right" if column in RIGHT else "left"}">{html.escape(cell)}</td>'
                for column, cell in zip(COLUMNS, row.cells, strict=True)
            )
            body.append(f"<tr>{''.join(cells)}</tr>")
        more = f"<p>... and {left_out} more rows: <code>print(report.text(rows=None))</code></p>" if left_out else ""
        points = "".join(f"<li>{html.escape(text)}</li>" for text in self._summary())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{more}<ul>{points}</ul>"

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def __getitem__(self, key: int | slice) -> str:
        return self.text()[key]

    def __len__(self) -> int:
        return len(self.text())

    def __contains__(self, part: str) -> bool:
        return part in self.text()

    def splitlines(self) -> list[str]:
        """The lines of the text."""
        return self.text().splitlines()

    def _summary(self) -> list[str]:
        plan = self.plan
        lines = [f"{len(plan.swapped)} layers swapped; decided: {plan.decided} ({plan.device}, {plan.threads} threads)"]
        of = "the whole model" if self.state_bytes is not None else "the listed layers"
        lines.append(
            f"{of}: stored {_size(self.bytes_stored)} (indices included) instead of "
            f"{_size(self.bytes_dense)}: {_times_smaller(self.bytes_dense, self.bytes_stored, 2)}"
        )
        if self.file_bytes is not None:
            lines.append(
                f"file: {self.file_bytes} bytes, {_times_smaller(self.bytes_dense, self.file_bytes, 1)} than dense"
            )
        if self.file_bytes is not None and self.file_bound is not None:
            bound = self.file_bound
            parts = f"values {bound.values}, patterns {bound.patterns}, scales {bound.scales}, plain {bound.plain}"
            over = self.file_bytes / max(bound.total, 1) - 1
            lines.append(
                f"bound: {bound.total} bytes ({parts}), the entropy of what is coded and log2 of the number of "
                f"patterns; the file takes {over:.1%} more"
            )
        for i, (dense, converted) in enumerate(zip(plan.dense_ms, plan.converted_ms, strict=False)):
            spread = ""
            if i < min(len(plan.speedup_low), len(plan.speedup_high)) and plan.speedup_low[i] < plan.speedup_high[i]:
                spread = f" ({plan.speedup_low[i]:.2f}x to {plan.speedup_high[i]:.2f}x)"
            lines.append(
                f"whole model, example input {i}: {dense:.3g} ms dense, {converted:.3g} ms converted, "
                f"{dense / max(converted, 1e-12):.2f}x faster{spread}"
            )
        return [*lines, *(f"note: {note}" for note in plan.notes), *(f"hint: {hint}" for hint in hints(plan))]


def _size(nbytes: int) -> str:
    """Bytes in the unit that people read."""
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / 1024:.1f} KiB"


def _times_smaller(before: int, after: int, digits: int) -> str:
    """How many times fewer bytes ``after`` are, or more: filling blocks up may cost more than zeros save."""
    if after > before:
        return f"{after / max(before, 1):.{digits}f}x larger"
    return f"{before / max(after, 1):.{digits}f}x smaller"


def explain(subject: nn.Module | ModelPlan | str | os.PathLike[str]) -> Report:
    """What happened to each layer of a converted model, and why.

    Args:
        subject: a model from `convert` or `load`, a wrapper around one (DataParallel, AveragedModel, `torch.compile`),
            a `ModelPlan`, or the path of a ``.slim.safetensors`` file.

    Raises:
        TypeError: anything else. ValueError: a model that was not converted; a file that `slimkernels.save` did not
            write, or a damaged one, the field at fault named. OSError: no such file.
    """
    if isinstance(subject, ModelPlan):
        return Report(subject)
    subject = unwrapped("explain", subject)
    if isinstance(subject, nn.Module):
        plan = getattr(subject, "slimkernels_plan", None)
        if not isinstance(plan, ModelPlan):
            raise ValueError(
                f"explain: expected a model from slimkernels.convert, got a plain {type(subject).__name__}; "
                "convert it first, or look at it with slimkernels.analyze(model)"
            )
        return Report(plan, state_bytes=_state_bytes(subject.state_dict(keep_vars=True)))
    if isinstance(subject, (str, os.PathLike)):
        try:
            header = read_header(subject)
        except ValueError as error:
            raise ValueError(f"explain: {str(error).removeprefix('load: ')}") from error
        bound = None if header.index is None else header.index.bound
        return Report(header.plan, header.nbytes, header.state_bytes, bound)
    raise TypeError(f"explain: expected a converted model, a ModelPlan or a path, got {type(subject).__name__}")


def _state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state dict, each once."""
    tensors = {id(value): value for value in state.values() if isinstance(value, Tensor)}
    return sum(
        value.numel() * value.element_size()
        for value in tensors.values()
        if not isinstance(value, nn.UninitializedParameter)
    )
