"""Pictures of results, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.files import atomic_path

if TYPE_CHECKING:
    from slimkernels.demo import DemoResult

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_DENSE, _MASKED, _PRUNED, _LOW_RANK = "#7f7f7f", "#56b4e9", "#0072b2", "#e69f00"


def demo_figure(result: DemoResult, path: str | Path) -> None:
    """Writes a PNG of block sparsity per layer, test accuracy, and latency per batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    layers, accuracy, latency = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.15, 0.85, 1.25]})
    _sparsity_panel(layers, result)
    _accuracy_panel(accuracy, result)
    _latency_panel(latency, result)
    for axes in (layers, accuracy, latency):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _sparsity_panel(axes: Any, result: DemoResult) -> None:
    names = [layer.name for layer in result.layers]
    values = [100 * layer.block_sparsity for layer in result.layers]
    colours = [_PRUNED if layer.action == "swap" else _DENSE for layer in result.layers]
    bars = axes.barh(names, values, color=colours, height=0.7)
    axes.bar_label(bars, labels=[f"{value:.0f} %" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    block = "x".join(str(size) for size in result.settings["block_shape"])
    axes.set_xlabel(f"zero {block} blocks (% of all blocks)")
    axes.set_title("Pruned model: block sparsity per layer")
    axes.grid(axis="x", alpha=0.25)
    handles = [_patch(_PRUNED, "runs block-sparse"), _patch(_DENSE, "stays dense")]
    present = [handle for handle in handles if any(handle.get_facecolor() == _rgba(colour) for colour in colours)]
    axes.legend(handles=present, fontsize=8, loc="upper right", framealpha=1.0)


def _accuracy_panel(axes: Any, result: DemoResult) -> None:
    shown = [entry for entry in result.entries if entry.name != "pruned, masked"]
    names = [entry.name.split(",")[0] for entry in shown]
    values = [100 * entry.accuracy for entry in shown]
    bars = axes.bar(names, values, color=[_colour(entry.name) for entry in shown], width=0.6)
    labels = [f"{value:.1f} %\n{entry.bytes / 1e6:.2f} MB" for value, entry in zip(values, shown, strict=True)]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=9)
    axes.set_ylim(0, 122)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Accuracy, and size on disk")
    axes.grid(axis="y", alpha=0.25)


def _latency_panel(axes: Any, result: DemoResult) -> None:
    batches = list(result.entries[0].latency)
    width = 0.8 / len(result.entries)
    for index, entry in enumerate(result.entries):
        positions = [i - 0.4 + width * (index + 0.5) for i in range(len(batches))]
        middle = [float(entry.latency[batch]["p50_ms"]) for batch in batches]
        low = [float(m) - float(entry.latency[b]["p20_ms"]) for m, b in zip(middle, batches, strict=True)]
        high = [float(entry.latency[b]["p80_ms"]) - float(m) for m, b in zip(middle, batches, strict=True)]
        bars = axes.bar(positions, middle, width * 0.92, color=_colour(entry.name), label=entry.name)
        axes.errorbar(positions, middle, yerr=[low, high], fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        labels = [f"{entry.speedup[batch]:.1f}x" for batch in batches]
        axes.bar_label(bars, labels=labels, padding=6, fontsize=9)
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 1.2, top * 2.2)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("latency (ms, log scale)")
    axes.set_title("Latency: median, p20 to p80; labels: speed-up over dense")
    axes.title.set_fontsize(10.5)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", framealpha=1.0)


def _colour(name: str) -> str:
    if name == "pruned, masked":
        return _MASKED
    return {"dense": _DENSE, "pruned": _PRUNED}.get(name.split(",")[0], _LOW_RANK)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _rgba(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(colour)
