"""Draws the pictures of committed results again, from the results alone.

    python benchmarks/pictures.py [RESULT.json ...]

By default all of them: break-even and share of peak of the layer sweeps, and the Pareto fronts of reproduced recipes. A
picture lies beside its result. The documentation's own, the demo's included, are drawn by docs/pictures/draw.py.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slimkernels.kernels import KERNELS
from slimkernels.recipes.figures import pareto_figure

RESULTS = Path(__file__).resolve().parent / "results"
# Okabe and Ito's palette, in an order in which neighbours differ in brightness too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#7f7f7f")
# Two labels at the ends of lines are so far apart at least, as a share of the axis.
LABEL_DISTANCE = 0.055


def machine(environment: dict[str, Any]) -> str:
    """Where a result was measured, in a line."""
    device = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    return f"{device}, torch {environment['torch']}, commit {environment['commit'][:7]}"


def spread_out(places: list[float], distance: float) -> list[float]:
    """Places of labels near the given ones, in their order, no two nearer to each other than ``distance``."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for _ in range(100):
        for a, b in itertools.pairwise(order):
            overlap = distance - (found[b] - found[a])
            if overlap > 1e-9:
                found[a], found[b] = found[a] - overlap / 2, found[b] + overlap / 2
    return found


def finished(figure: Figure, path: Path) -> None:
    """Writes a figure, without the frame's upper and right side."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def canvas(width: float, height: float) -> Figure:
    """An empty figure on white: it is read on dark pages too."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def breakeven(record: dict[str, Any], path: Path) -> bool:
    """Speed-up over dense against sparsity, a line per block shape, a panel per swept layer and batch size."""
    fastest: dict[tuple[str, int, tuple[int, ...], float], float] = {}
    for r in record["rows"]:
        if r.get("suite") == "ops" and r["sparsity"] > 0 and r["kernel"] in KERNELS:
            key = r["layer"], r["batch"], tuple(r["block_shape"]), r["sparsity"]
            fastest[key] = max(fastest.get(key, 0.0), r["speedup"])
    # A line needs more points than the two sparsities that other questions are asked at.
    layers = [n for n in dict.fromkeys(k[0] for k in fastest) if len({k[3] for k in fastest if k[0] == n}) > 2]
    if not layers:
        return False
    batches = sorted({k[1] for k in fastest if k[0] in layers})
    figure = canvas(5.2 * len(batches), 4.2 * len(layers) + 0.5)
    figure.suptitle(
        f"When block sparsity pays: speed-up of a layer over dense\n{machine(record['environment'])}", fontsize=11
    )
    panels = figure.subplots(len(layers), len(batches), squeeze=False, sharey=True)
    blocks = sorted({k[2] for k in fastest if k[0] in layers}, key=lambda b: (b[0] * b[1], b))
    most = max(v for k, v in fastest.items() if k[0] in layers)
    for row, layer in zip(panels, layers, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            axes.set_yscale("log", base=2)
            axes.set_ylim(0.7, most * 1.45)
            ends: dict[tuple[int, ...], tuple[float, float]] = {}
            for block, colour in zip(blocks, COLOURS, strict=False):
                points = sorted((100 * k[3], v) for k, v in fastest.items() if k[:3] == (layer, batch, block))
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=5, color=colour, linewidth=1.8)
                    ends[block] = points[-1]
            _label_ends(axes, ends, dict(zip(blocks, COLOURS, strict=False)))
            axes.axhline(1, color="#37474f", linewidth=1.4, linestyle="--")
            left = min(100 * k[3] for k in fastest if k[:2] == (layer, batch))
            axes.annotate(
                "1x: as fast as dense", (left, 1), xytext=(0, -5), textcoords="offset points", va="top", fontsize=9,
                color="#37474f",
            )  # fmt: skip
            ticks = [2**i for i in range(int(math.log2(most * 1.45)) + 1)]
            axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.set_xticks(sorted({100 * k[3] for k in fastest if k[0] == layer}))
            axes.xaxis.set_major_formatter("{x:g}")
            network, _, name = layer.partition(".")
            axes.set_title(f"{network} {name.replace('@', ' (')}), batch {batch}", fontsize=10)
            axes.set_xlabel("zero blocks (%)")
        row[0].set_ylabel("speed-up over dense (log scale)")
    finished(figure, path)
    return True


def _label_ends(axes: Any, ends: dict[tuple[int, ...], tuple[float, float]], colours: dict[Any, str]) -> None:
    """Names the lines at their ends, where no two names overlap."""
    if not ends:
        return
    low, high = (math.log(limit) for limit in axes.get_ylim())
    places = spread_out([(math.log(y) - low) / (high - low) for _, y in ends.values()], LABEL_DISTANCE)
    right = max(x for x, _ in ends.values())
    axes.set_xlim(None, right + 0.22 * (right - axes.get_xlim()[0]))
    for (block, (x, y)), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            f"{block[0]}x{block[1]}", (x, y), xytext=(right + 2.5, math.exp(low + place * (high - low))),
            textcoords="data", va="center", fontsize=9, color=colours[block],
            arrowprops={"arrowstyle": "-", "color": colours[block], "alpha": 0.5, "linewidth": 0.8, "shrinkA": 1,
                        "shrinkB": 3},
        )  # fmt: skip


def roofline(record: dict[str, Any], path: Path) -> bool:
    """Share of the multiply-add peak by layer, natural block shape, one bar per kernel and batch size."""
    rows = [r for r in record["rows"] if r.get("suite") == "ops"]
    rows = [r for r in rows if r["share_of_peak"] is not None and r["sparsity"] in (0.0, 0.875)]
    if not rows:
        return False
    natural = rows[0]["block_shape"]
    rows = [r for r in rows if r["block_shape"] == natural]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    bars = sorted({(r["batch"], r["kernel"]) for r in rows})
    figure = canvas(9.5, 4.6)
    axes = figure.subplots()
    width = 0.82 / len(bars)
    for i, (batch, kernel) in enumerate(bars):
        shares = {r["layer"]: r["share_of_peak"] * 100 for r in rows if (r["batch"], r["kernel"]) == (batch, kernel)}
        axes.bar([j + i * width for j in range(len(layers))], [shares.get(name, 0) for name in layers], width,
                 color=COLOURS[i % len(COLOURS)], label=f"batch {batch}, {kernel}")  # fmt: skip
    names = [name.split(".")[1].split("@")[0] for name in layers]
    axes.set_xticks([j + width * (len(bars) - 1) / 2 for j in range(len(layers))], names)
    axes.set(ylabel="share of the multiply-add peak (%)", ylim=(0, 100))
    dense = [r["layer"].split(".")[1].split("@")[0] for r in rows if r["sparsity"] == 0.0]
    note = f" ({dense[0]} dense)" if dense else ""
    axes.set_title(
        f"VGG-19/CIFAR-10, 87.5% zero {natural[0]}x{natural[1]} blocks{note}, in-image FLOPs\n"
        f"{machine(record['environment'])}",
        fontsize=10,
    )
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    finished(figure, path)
    return True


def draw_record(path: Path) -> list[Path]:
    """The pictures of a record of the suites, beside it; those that its rows allow."""
    record = json.loads(path.read_text())
    made = []
    for name, draw in (("breakeven", breakeven), ("roofline", roofline)):
        picture = path.with_name(f"{path.stem}-{name}.png")
        if draw(record, picture):
            made.append(picture)
    return made


def draw(path: Path) -> list[Path]:
    """The pictures of one committed result, whichever it is."""
    content = json.loads(path.read_text())
    if "recipe" in content:
        pareto_figure(content, path.with_name("pareto.png"))
        return [path.with_name("pareto.png")]
    return draw_record(path) if {"rows", "environment"} <= set(content) else []


def main() -> None:
    for path in [Path(argument) for argument in sys.argv[1:]] or sorted(RESULTS.rglob("*.json")):
        for picture in draw(path):
            print(picture)


if __name__ == "__main__":
    main()
