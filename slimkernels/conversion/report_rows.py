"""The rows of `explain`'s table: one for every layer that people look for, one for each group of the others."""

from __future__ import annotations

from typing import NamedTuple

from slimkernels.conversion.plan import LayerPlan, ModelPlan

COLUMNS = ("layer", "type", "action", "stored as", "kernel", "zeros", "KiB", "dense ms", "ms", "reason")
RIGHT = frozenset({"zeros", "KiB", "dense ms", "ms"})
# Where lines are short these columns go, in this order; what they say is in `Report.rows` and in the Markdown.
_EXPENDABLE = ("kernel", "type", "zeros", "KiB", "dense ms")
_LEAST_REASON = 24
_MOST_NAME = 40
# Rows that are alike are gathered from so many on.
_ALIKE = 3
# Single zeros are worth a word from this share on.
_MANY_ZEROS = 0.3


class Row(NamedTuple):
    """The cells of one row, and what the layer costs: its time where it is known, its bytes otherwise."""

    cells: tuple[str, ...]
    cost: tuple[float, float]


def rows_of(plan: ModelPlan) -> list[Row]:
    """The rows in the order of the model.

    What was folded or fused has no row; its layer says so. Layers that are kept for one reason, without a measurement
    of their own, share a row.
    """
    inside: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.into is not None:
            inside.setdefault(layer.into, []).append(layer)
    alike: dict[tuple[str, str], list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.action == "keep" and not layer.dense_ms and layer.name not in inside:
            alike.setdefault((layer.type, layer.reason), []).append(layer)
    rows, gathered = [], set()
    for layer in plan.layers:
        group = alike.get((layer.type, layer.reason), [])
        if layer.into is not None:
            continue
        if layer in group and len(group) >= _ALIKE:
            if id(group) not in gathered:
                gathered.add(id(group))
                rows.append(_group_row(group))
            continue
        rows.append(_layer_row(layer, inside))
    return rows


def _cost(layer: LayerPlan) -> tuple[float, float]:
    times = layer.sparse_ms if layer.action == "swap" and layer.sparse_ms else layer.dense_ms
    return sum(times), float(layer.bytes_stored)


def _layer_row(layer: LayerPlan, inside: dict[str, list[LayerPlan]]) -> Row:
    stored = layer.format or ""
    if layer.block_shape is not None:
        stored += f" {layer.block_shape[0]}x{layer.block_shape[1]}"
    if layer.ranks is not None:
        stored += f" {layer.kind} {'x'.join(map(str, layer.ranks))}"
    stored += "".join(f" +{word}" for word in _taken_in(layer, inside))
    weighted = layer.weight_shape is not None
    cells = (
        layer.name,
        layer.type,
        layer.action,
        stored.strip(),
        layer.kernel or "",
        f"{layer.sparsity:.1%}" if weighted else "",
        f"{layer.bytes_stored / 1024:.1f}" if weighted else "",
        " ".join(f"{t:.3g}" for t in layer.dense_ms),
        " ".join(f"{t:.3g}" for t in layer.sparse_ms),
        layer.reason,
    )
    return Row(cells, _cost(layer))


def _taken_in(layer: LayerPlan, inside: dict[str, list[LayerPlan]]) -> list[str]:
    """Words for what a layer took over: batch norm, factors, ReLU, max-pool."""
    words = {"BatchNorm2d": "bn", "ReLU": "relu", "MaxPool2d": "pool"}
    taken, todo = [], list(inside.get(layer.name, []))
    while todo:
        one = todo.pop(0)
        taken.append(words.get(one.type, "factor"))
        todo += inside.get(one.name, [])
    # An epilogue that came with the model has no module of its own.
    own = {"relu": ["relu"], "relu_maxpool2": ["relu", "pool"]}.get(layer.epilogue, [])
    order = ("factor", "bn", "relu", "pool")
    return [word for word in order for _ in range(max(taken.count(word), own.count(word)))]


def _group_row(group: list[LayerPlan]) -> Row:
    first = group[0]
    stored = sum(layer.bytes_stored for layer in group)
    dense = sum(layer.bytes_dense for layer in group)
    # Weighted by size: the layers' shares of zeros say little one by one.
    zeros = sum(layer.sparsity * layer.bytes_dense for layer in group) / max(dense, 1)
    weighted = first.weight_shape is not None
    cells = (
        f"{first.name} and {len(group) - 1} more",
        first.type,
        first.action,
        "",
        "",
        f"{zeros:.1%}" if weighted else "",
        f"{stored / 1024:.1f}" if weighted else "",
        "",
        "",
        first.reason,
    )
    return Row(cells, (0.0, float(stored)))


def table_text(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned lines of at most ``width`` characters, headings first. Columns without a cell are left out."""
    kept = [i for i, column in enumerate(COLUMNS) if column == "reason" or any(row[i] for row in rows)]
    # The end of a long name tells more than its beginning.
    longest_name = min(_MOST_NAME, width // 3)
    names = [row[0] if len(row[0]) <= longest_name else "…" + row[0][1 - longest_name :] for row in rows]
    table = [COLUMNS, *((name, *row[1:]) for name, row in zip(names, rows, strict=True))]

    def widths() -> dict[int, int]:
        return {i: max(len(row[i]) for row in table) for i in kept[:-1]}

    for column in _EXPENDABLE:
        if sum(widths().values()) + 2 * (len(kept) - 1) + _LEAST_REASON > width:
            kept = [i for i in kept if COLUMNS[i] != column]
    wide = widths()
    reason = max(width - sum(wide.values()) - 2 * len(wide), _LEAST_REASON)
    lines = []
    for row in table:
        cells = [row[i].rjust(w) if COLUMNS[i] in RIGHT else row[i].ljust(w) for i, w in wide.items()]
        lines.append("  ".join([*cells, _cut(row[-1], reason)]).rstrip())
    longest = max(len(line) for line in lines)
    return [lines[0], "-" * min(longest, max(width, _LEAST_REASON)), *lines[1:]]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def hints(plan: ModelPlan) -> list[str]:
    """What would make more of a model, as whole sentences."""
    kept = [layer for layer in plan.layers if layer.action == "keep" and layer.supported]
    dense = [layer for layer in kept if layer.sparsity >= _MANY_ZEROS]
    if not dense:
        return []
    zeros, nbytes = sum(one.sparsity * one.bytes_dense for one in dense), sum(one.bytes_dense for one in dense)
    which = f"{dense[0].name} has" if len(dense) == 1 else f"{len(dense)} layers, such as {dense[0].name}, have"
    return [
        f"{which} {zeros / max(nbytes, 1):.0%} zeros and stayed dense, so these zeros save neither time nor bytes. "
        "Blocks of zeros do: prune_(model, sparsity, block_shape=(16, 1)). So do whole channels of zeros, which "
        "shrink_(model) removes."
    ]
