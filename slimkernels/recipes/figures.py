"""Pictures of a run, drawn without a display: sparsity and loss over steps, accuracy against size and latency."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkernels.files import atomic_path
from slimkernels.recipes.schema import Recipe

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#7f7f7f")
_SMOOTHED_SHARE = 0.04  # of a run's steps under one point of a loss curve


def write_figures(out: Path, report: Mapping[str, Any], recipe: Recipe) -> list[dict[str, str]]:
    """Writes the pictures that the finished rows allow into ``out``; their files and titles."""
    figures: list[dict[str, str]] = []
    curves = _curves(out, recipe)
    gradual = {name: curve for name, curve in curves.items() if _group(recipe, name) == "gradual pruning"}
    if gradual:
        title = "Sparsity over steps, gradual pruning"
        _draw(out / "sparsity.png", lambda figure: _lines(figure, gradual, recipe, "sparsity", title))
        figures.append({"file": "sparsity.png", "title": title})
    pruned = {name: curve for name, curve in curves.items() if "pruning" in _group(recipe, name)}
    if pruned:
        title = "Training loss over steps, gradual (solid) and one-shot (dashed)"
        _draw(out / "loss.png", lambda figure: _lines(figure, pruned, recipe, "loss", title))
        figures.append({"file": "loss.png", "title": title})
    measured = [row for row in report["rows"] if (row["measurement"] or {}).get("latency")]
    if measured:
        pareto_figure(report, out / "pareto.png")
        figures.append(
            {"file": "pareto.png", "title": "Accuracy against size and latency; the line is the Pareto front"}
        )
        if report.get("published"):
            published_figure(report, out / "published.png")
            title = "Accuracy against compression, beside what others published"
            figures.append({"file": "published.png", "title": title})
    return figures


def published_figure(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of points of accuracy against compression: rows of a report, and what it quotes of others."""
    _draw(path, lambda figure: _published(figure, report), width=9.0, height=5.6)


def pareto_figure(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of accuracy against size and latency, from the report of a run alone."""
    rows = [row for row in report["rows"] if (row["measurement"] or {}).get("latency")]
    _draw(path, lambda figure: _pareto(figure, rows, report), width=6.4 * (1 + len(report["batches"])), height=5.8)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by cost, of the points ``(cost, value)`` that none beats: no cheaper one is as good."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def _draw(path: Path, paint: Any, width: float = 9.0, height: float = 5.0) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    paint(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _group(recipe: Recipe, name: str) -> str:
    return next((row.group for row in recipe.rows if row.name == name), "")


def _curves(out: Path, recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    """Steps of the first seed's last training, by row."""
    found = {}
    for row in recipe.rows:
        logs = sorted((out / "rows" / row.slug / "seed0").glob("*-log/steps.csv"))
        if logs and (steps := _read_steps(logs[-1])):
            found[row.name] = steps
    return found


def _read_steps(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)]


def _lines(
    figure: Any, curves: Mapping[str, list[dict[str, float]]], recipe: Recipe, quantity: str, title: str
) -> None:
    """One panel per block shape for the loss, one in all for the sparsity."""
    rows = {row.name: row for row in recipe.rows}
    blocks = list(dict.fromkeys(str(rows[name].labels.get("block")) for name in curves))
    panels = blocks if quantity == "loss" else blocks[:1]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    levels = sorted({float(rows[name].labels.get("sparsity", 0)) for name in curves})
    for panel, block in zip(axes, panels, strict=True):
        for name, steps in curves.items():
            row = rows[name]
            if str(row.labels.get("block")) != block:
                continue
            level = levels.index(float(row.labels.get("sparsity", 0)))
            values = [step.get(quantity, 0.0) for step in steps]
            values = _smoothed(values) if quantity == "loss" else [100 * value for value in values]
            panel.plot(
                [step["step"] for step in steps],
                values,
                color=_COLOURS[level % len(_COLOURS)],
                linestyle="--" if row.group.startswith("one-shot") else "-",
                linewidth=1.6,
                label=f"{levels[level]:.1%}",
            )
        panel.set_xlabel("step")
        panel.set_title(f"{block} blocks", fontsize=10)
    axes[0].set_ylabel("training loss (running mean)" if quantity == "loss" else "zero weights of pruned layers (%)")
    named = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # one entry per level
    axes[0].legend(named.values(), named.keys(), title="final sparsity", fontsize=8, title_fontsize=8)
    figure.suptitle(title, fontsize=11)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a share of the run."""
    window = max(1, int(len(values) * _SMOOTHED_SHARE))
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        out.append(total / min(index + 1, window))
    return out


def _pareto(figure: Any, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Accuracy against bytes on disk, and against the recorded network's latency at every batch size."""
    from matplotlib.ticker import LogLocator, NullFormatter

    fronts = []
    panels = figure.subplots(1, 1 + len(report["batches"]), sharey=True, squeeze=False)[0]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    costs = [("size of the file (MB, log scale)", [row["measurement"]["bytes"] / 1e6 for row in rows])]
    for batch in report["batches"]:
        ways = [row["measurement"]["latency"][str(batch)] for row in rows]
        times = [way.get("recorded", way["converted"])["p50_ms"] for way in ways]  # reports of old know no recordings
        costs.append((f"latency at batch {batch} (ms, log scale)", times))
    accuracies = [100 * row["accuracy"]["mean"] for row in rows]
    for panel, (label, cost) in zip(panels, costs, strict=True):
        for group in groups:
            own = [i for i, row in enumerate(rows) if row["group"] == group]
            colour = _COLOURS[groups.index(group) % len(_COLOURS)]
            panel.scatter(
                [cost[i] for i in own], [accuracies[i] for i in own], color=colour, label=group, s=34, zorder=3
            )
        front = pareto_front(list(zip(cost, accuracies, strict=True)))
        panel.step(
            [cost[i] for i in front], [accuracies[i] for i in front], where="post", color="#7f7f7f", linewidth=1.2
        )
        fronts.append((panel, [(cost[i], accuracies[i], rows[i]["name"]) for i in front], cost))
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(label)
        panel.margins(x=0.08, y=0.06)
    teacher = 100 * report["rows"][0]["accuracy"]["mean"]
    for panel in panels:
        panel.axhline(98.0 / 100.0 * teacher, color="#7f7f7f", linestyle=":", linewidth=1.0)
    panels[0].set_ylabel("test accuracy (%); dotted: 98% of the teacher's")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    environment = report["environment"]
    figure.suptitle(
        f"{report['title']}: accuracy against size and latency, the line is the Pareto front\n"
        f"{environment['gpu'] or environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        fontsize=12,
    )
    figure.canvas.draw()  # the layout decides where there is room for names
    for panel, named, cost in fronts:
        place_names(panel, named, list(zip(cost, accuracies, strict=True)))


def _published(figure: Any, report: Mapping[str, Any]) -> None:
    """One panel: ours by group with their front, others as squares, hollow where they count parameters alone."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in report["rows"] if "compression" in row]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    panel = figure.subplots()
    ours = [(row["compression"], row["points"]) for row in rows]
    for group in groups:
        own = [point for point, row in zip(ours, rows, strict=True) if row["group"] == group]
        colour = _COLOURS[groups.index(group) % len(_COLOURS)]
        panel.scatter(*zip(*own, strict=True), color=colour, label=group, s=34, zorder=3)
    front = pareto_front([(1 / smaller, points) for smaller, points in ours])
    panel.step(
        [ours[i][0] for i in front], [ours[i][1] for i in front], where="post", color="#7f7f7f", linewidth=1.2, zorder=2
    )
    theirs = [(point["compression"], point["points"]) for point in report["published"]]
    for counted, face in (("bytes", "#7f7f7f"), ("parameters", "none")):
        own = [at for at, point in zip(theirs, report["published"], strict=True) if point["counted"] == counted]
        if own:
            label = f"published, in {counted}"
            panel.scatter(
                *zip(*own, strict=True), marker="s", facecolor=face, edgecolor="#7f7f7f", label=label, s=30, zorder=3
            )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.12, y=0.15)
    panel.set_xlabel("times smaller than the own dense network (log scale); ours in bytes of the file")
    panel.set_ylabel("points of test accuracy against the own dense network")
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=8.5)
    title = f"{report['title']}: compression beside what others published"
    figure.suptitle(f"{title}\nours: {report['rows'][0]['note']}, {report['data']['name']}", fontsize=11)
    figure.canvas.draw()  # the layout decides where there is room for names
    named = [(*ours[i], rows[i]["name"]) for i in front]
    named += [(*at, point["name"]) for at, point in zip(theirs, report["published"], strict=True)]
    place_names(panel, named, [*ours, *theirs])


# Places of a name around its point, in points, near ones first; those further than _NEAR get a line to the point.
# Above a Pareto front, to the left, there is nothing else.
_NEAR = 10
_NAME_PLACES = [
    (dx, dy)
    for distance in (8, 18, 30, 44, 60, 80, 100, 120)
    for dx, dy in ((-distance, distance), (distance, -distance), (distance, distance), (-distance, -distance))
]


def place_names(panel: Any, named: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]) -> None:
    """Writes the names of some points of a drawn panel where they cover no other name, no point and no edge of it.

    Args:
        panel: its limits are final.
        named: ``(x, y, name)`` of each, in the coordinates of the data.
        points: all points of the panel.
    """
    from matplotlib.transforms import Bbox

    frame, scale = panel.get_window_extent(), panel.figure.dpi / 72
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in panel.transData.transform(list(points))]
    for x, y, name in named:
        text = panel.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=7.5, va="center")
        text.set_in_layout(False)
        size = text.get_window_extent()
        at_x, at_y = panel.transData.transform((x, y))
        for dx, dy in _NAME_PLACES:
            left = at_x + dx * scale - (size.width if dx < 0 else 0)
            box = Bbox.from_bounds(left - 2, at_y + dy * scale - size.height / 2, size.width + 4, size.height)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:  # a crowd: better beside its point and over others than nowhere
            dx, dy = _NAME_PLACES[0]
            box = Bbox.from_bounds(at_x + dx * scale, at_y + dy * scale, size.width, size.height)
        taken.append(box)
        text.set(position=(dx, dy), ha="left" if dx > 0 else "right")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        if max(abs(dx), abs(dy)) > _NEAR:
            panel.annotate(
                "",
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#7f7f7f", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
            ).set_in_layout(False)
