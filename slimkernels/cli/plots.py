"""Pictures of results, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.files import atomic_path

if TYPE_CHECKING:
    from slimkernels.cli.demo import DemoResult

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_DENSE, _MASKED, _PRUNED, _LOW_RANK = "#7f7f7f", "#56b4e9", "#0072b2", "#e69f00"


def demo_figure(result: DemoResult, path: str | Path) -> None:
    """Writes a PNG of block sparsity per layer, test accuracy, and latency per batch size, under model and machine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(13.6, 5.0), dpi=130, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    layers, accuracy, latency = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.1, 0.9, 1.35]})
    settings, environment = result.settings, result.environment
    figure.suptitle(
        f"A VGG of {settings['parameters'] / 1e6:.1f} million parameters on scikit-learn's digits\n"
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        fontsize=13,
        fontweight="bold",
    )
    _sparsity_panel(layers, result)
    _accuracy_panel(accuracy, result)
    _latency_panel(latency, result)
    for axes in (layers, accuracy, latency):
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _sparsity_panel(axes: Any, result: DemoResult) -> None:
    names = [layer.name for layer in result.layers]
    values = [100 * layer.block_sparsity for layer in result.layers]
    colours = [_PRUNED if layer.action == "swap" else _DENSE for layer in result.layers]
    bars = axes.barh(names, values, color=colours, height=0.7)
    axes.bar_label(bars, labels=[f"{value:.1f} %" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 25))
    block = "x".join(str(size) for size in result.settings["block_shape"])
    axes.set_xlabel(f"zero {block} blocks (% of all blocks)")
    axes.set_title("Pruned model: zero blocks per layer")
    axes.grid(axis="x", alpha=0.25)
    handles = [_patch(_PRUNED, "runs block-sparse"), _patch(_DENSE, "stays dense")]
    present = [handle for handle in handles if any(handle.get_facecolor() == _rgba(colour) for colour in colours)]
    axes.legend(handles=present, fontsize=8, loc="upper right", framealpha=1.0)


def _accuracy_panel(axes: Any, result: DemoResult) -> None:
    """Accuracies as dots on an axis that begins where they do, with what 450 test images leave open."""
    shown = [entry for entry in result.entries if entry.name != "pruned, masked"]
    names = [f"{entry.name.split(',')[0]}\n{entry.bytes / 1e6:.2f} MB" for entry in shown]
    images = result.settings["test_images"]
    lowest = 100.0
    for i, entry in enumerate(shown):
        low, high = (100 * limit for limit in _wilson(entry.accuracy, images))
        axes.plot([i, i], [low, high], color=_colour(entry.name), linewidth=2.5, solid_capstyle="round")
        axes.plot(i, 100 * entry.accuracy, "o", color=_colour(entry.name), markersize=9)
        axes.annotate(
            f"{100 * entry.accuracy:.1f} %",
            (i, 100 * entry.accuracy),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        lowest = min(lowest, low)
    axes.set_xticks(range(len(shown)), names)
    axes.set_xlim(-0.5, len(shown) - 0.2)
    axes.set_ylim(lowest - 0.1 * (100 - lowest), 100)
    axes.set_ylabel(f"test accuracy (%), 95 % limits of {images} images")
    axes.set_title("Accuracy (axis cut), and size on disk")
    axes.grid(axis="y", alpha=0.25)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % limits of a share of n trials."""
    z = 1.96
    middle, width = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def _latency_panel(axes: Any, result: DemoResult) -> None:
    """One row per batch size and model: median as a dot, p20 to p80 as a line, time and speed-up beside it."""
    ticks: list[int] = []
    names: list[str] = []
    row = 0
    for batch in result.entries[0].latency:
        ticks.append(row)
        names.append(f"batch {batch}")
        row += 1
        for entry in result.entries:
            middle, low, high = (float(entry.latency[batch][key]) for key in ("p50_ms", "p20_ms", "p80_ms"))
            axes.plot([low, high], [row, row], color=_colour(entry.name), linewidth=2.5, solid_capstyle="round")
            axes.plot(middle, row, "o", color=_colour(entry.name), markersize=8)
            text = f"{middle:.3g} ms"
            if entry.name != "dense":
                limits = f"{entry.speedup_low[batch]:.1f} to {entry.speedup_high[batch]:.1f}"
                text += f", {entry.speedup[batch]:.1f}x ({limits})"
            axes.annotate(
                text, (max(high, middle), row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9
            )
            ticks.append(row)
            names.append(entry.name)
            row += 1
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("batch") else "normal")
    axes.set_ylim(row - 0.5, -0.6)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.3, right * (right / left) ** 0.6 * 1.5)  # room for the labels
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("latency (ms, log scale): median, p20 to p80")
    axes.set_title("Latency, and speed-up over dense (its spread)")
    axes.grid(axis="x", alpha=0.25)


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
