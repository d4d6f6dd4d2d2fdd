"""Draws the pictures of the documentation: ``python docs/pictures/draw.py``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["svg.hashsalt"] = "slimkernels"  # the same picture gives the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

from slimkernels.cli.demo import DemoResult  # noqa: E402
from slimkernels.cli.plots import demo_figure  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STORED, EMPTY, LINE, MARK, TEXT = "#5c6bc0", "#e8eaf6", "#9fa8da", "#ef6c00", "#37474f"


def cell(axes: Axes, x: float, y: float, w: float, h: float, color: str, edge: str = LINE, width: float = 0.8) -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=edge, linewidth=width))


def label(axes: Axes, x: float, y: float, text: str, color: str = TEXT, size: float = 9.5, **kwargs: object) -> None:
    axes.text(x, y, text, color=color, fontsize=size, ha=kwargs.pop("ha", "center"), va="center", **kwargs)  # type: ignore[arg-type]


def arrow(axes: Axes, a: tuple[float, float], b: tuple[float, float], color: str = TEXT) -> None:
    axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=10, color=color, linewidth=1.1))


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(
        HERE / f"{name}.svg", bbox_inches="tight", transparent=False, facecolor="white", metadata={"Date": None}
    )
    plt.close(figure)


def blocks() -> None:
    """The weight as a matrix: rows of output channels, a column group of input channels per tap, and its blocks."""
    figure, axes = canvas(9, 3.4)
    stored = {(0, 1), (0, 4), (0, 5), (0, 9), (0, 14), (1, 0), (1, 2), (1, 7), (1, 10), (1, 15), (1, 16)}
    for row in range(2):
        for column in range(18):
            cell(axes, column * 1.0, (1 - row) * 1.6, 1.0, 1.6, STORED if (row, column) in stored else EMPTY)
    for tap in range(10):
        axes.plot([2 * tap, 2 * tap], [-0.15, 3.45], color=TEXT, linewidth=1.4 if tap in (0, 9) else 0.9)
    for tap in range(9):
        label(axes, 2 * tap + 1, 3.75, f"tap {tap}")
    label(axes, -0.4, 2.4, "output channels\n0 to 15", ha="right")
    label(axes, -0.4, 0.8, "output channels\n16 to 31", ha="right")
    cell(axes, 4.0, 1.6, 1.0, 1.6, "none", MARK, 2.4)
    label(axes, 9, -0.75, "one block: block_out = 16 output channels x block_in input channels of one tap", MARK)
    arrow(axes, (5.4, -0.5), (4.6, 1.5), MARK)
    label(axes, 9, -1.35, "dark: stored, with its values     light: all zero, neither stored nor multiplied")
    axes.set_xlim(-4, 18.5)
    axes.set_ylim(-1.8, 4.1)
    save(figure, "blocks")


def taps() -> None:
    """A tap shifts the image: the output pixel reads, for each stored block, one shifted input pixel."""
    figure, axes = canvas(8, 3)
    for i in range(6):
        for j in range(6):
            cell(axes, j, i, 1, 1, EMPTY)
            cell(axes, j + 10, i, 1, 1, EMPTY)
    for r in range(3):
        for s in range(3):
            cell(axes, 1 + s, 4 - r, 1, 1, "#c5cae9")
            label(axes, 1.5 + s, 4.5 - r, str(3 * r + s), size=8.5)
    cell(axes, 3, 4, 1, 1, STORED)
    label(axes, 3.5, 4.5, "2", "white", 8.5)
    cell(axes, 12, 3, 1, 1, MARK)
    arrow(axes, (4.1, 4.45), (11.9, 3.55), MARK)
    label(axes, 3, -0.6, "input image: the nine taps of a 3x3 filter")
    label(axes, 13, -0.6, "output image")
    label(axes, 8, 2.4, "tap 2:\nrow 0,\ncolumn 2", MARK)
    axes.set_xlim(-0.5, 16.5)
    axes.set_ylim(-1.1, 6.3)
    save(figure, "taps")


def strips() -> None:
    """What a CPU microkernel computes: a strip of output channels for a few pixels, kept in registers."""
    figure, axes = canvas(8.5, 2.9)
    for i in range(4):
        cell(axes, 0, 3 - i, 1, 1, "#c5cae9")
    label(axes, 0.5, 4.4, "input:\none channel, 4 pixels", size=9)
    for j in range(8):
        cell(axes, 4 + j * 0.6, 1.5, 0.6, 1, STORED)
    label(axes, 6.4, 3.05, "weights of one entry:\na strip of 16 output channels", size=9)
    label(axes, 2.6, 2, "x", size=14)
    label(axes, 9.9, 2, "added to", size=9)
    for i in range(4):
        for j in range(8):
            cell(axes, 11.2 + j * 0.6, 3 - i, 0.6, 1, EMPTY)
    label(axes, 13.6, 4.4, "accumulators in registers:\n4 pixels x 16 output channels", size=9)
    arrow(axes, (16.2, 2), (17.6, 2))
    label(axes, 19.4, 2, "epilogue:\nbias, ReLU,\n2x2 max-pool,\nthen one store", size=9)
    axes.set_xlim(-1.6, 21.4)
    axes.set_ylim(-0.3, 5.2)
    save(figure, "strips")


def layouts() -> None:
    """The two activation layouts of the CPU kernels: channels last, and images innermost."""
    figure, axes = canvas(9, 3.2)
    palette = ("#5c6bc0", "#26a69a", "#ef6c00", "#8d6e63")
    for image in range(4):
        for channel in range(4):
            x = image * 4.6 + channel * 1.1
            cell(axes, x, 2.6, 1.1, 0.9, palette[image])
            label(axes, x + 0.55, 3.05, f"c{channel}", "white", 8.5)
        label(axes, image * 4.6 + 2.2, 3.95, f"image {image}, one pixel", size=9)
    label(axes, -0.4, 3.05, "channels last", ha="right")
    for channel in range(4):
        for image in range(4):
            x = channel * 4.6 + image * 1.1
            cell(axes, x, 0.2, 1.1, 0.9, palette[image])
            label(axes, x + 0.55, 0.65, f"c{channel}", "white", 8.5)
        axes.add_patch(Rectangle((channel * 4.6 - 0.06, 0.1), 4.52, 1.1, fill=False, edgecolor=TEXT, linewidth=1.6))
        label(axes, channel * 4.6 + 2.2, -0.3, "one vector register", size=8.5)
    label(axes, -0.4, 0.65, "images innermost", ha="right")
    label(
        axes,
        9.2,
        1.75,
        "the same numbers in memory, left to right; a vector of AVX-512 holds 16 images, here 4",
        size=9,
    )
    axes.set_xlim(-4.6, 18.6)
    axes.set_ylim(-0.8, 4.4)
    save(figure, "layouts")


RECORD = ROOT / "benchmarks/results/amd-epyc-zen5-2c/2e2017bdf1f0.json"
DEMO = ROOT / "benchmarks/results/amd-epyc-zen4-2c/demo.json"
ENGINES = (("fastest dense engine", "dense_p50_ms"), ("DeepSparse 1.8", "deepsparse_p50_ms"), ("slimkernels", "p50_ms"))
# Colours of the bars, of text and of the background, for light and for dark pages.
LIGHT = (("#b0bec5", "#9fa8da", "#3949ab"), "#263238", "#ffffff")
DARK = (("#546e7a", "#7986cb", "#ffb74d"), "#e6edf3", "#0d1117")


def headline(name: str, theme: tuple[tuple[str, ...], str, str]) -> plt.Figure:
    """The README's picture: speed over the fastest dense engine, recorded VGG-19 on two CPU cores."""
    colours, text, background = theme
    rows = {}
    for row in json.loads(RECORD.read_text())["rows"]:
        wanted = {"network": "vgg19_cifar", "sparsity": 0.875, "block_shape": [16, 1], "recorded": True}
        if wanted.items() <= row.items():
            rows[row["batch"]] = row
    figure, axes = plt.subplots(figsize=(8.4, 3.5), facecolor=background)
    axes.set_facecolor(background)
    for i, (batch, row) in enumerate(sorted(rows.items())):
        for j, (_, key) in enumerate(ENGINES):
            place, ratio = i + 0.29 * (j - 1), row["dense_p50_ms"] / row[key]
            axes.bar(place, ratio, width=0.26, color=colours[j])
            digits = 1 if row[key] >= 0.95 and row[key] < 100 else 2 if row[key] < 1 else 0
            axes.text(place, ratio + 0.14, f"{row[key]:.{digits}f} ms", ha="center", color=text, fontsize=8.5)
            axes.text(
                place, ratio + 0.75, f"{ratio:.1f}x", ha="center", color=text, fontsize=12 if j == 2 else 9.5,
                fontweight="bold" if j == 2 else "normal",
            )  # fmt: skip
        axes.text(i, -0.75, f"batch {batch}", ha="center", color=text, fontsize=10.5)
    axes.axhline(0, color=text, linewidth=1.0)
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.set_ylim(-1.0, 12.0)
    axes.axis("off")
    for j, (left, (engine, _)) in enumerate(zip((0.05, 0.34, 0.69), ENGINES, strict=True)):
        square = Rectangle((left - 0.03, 0.945), 0.02, 0.05, transform=axes.transAxes, color=colours[j], clip_on=False)
        axes.add_patch(square)
        axes.text(
            left, 0.97, engine + (", same zeros" if j else ""), transform=axes.transAxes, color=text, va="center",
            fontsize=9.5, fontweight="bold" if j == 2 else "normal",
        )  # fmt: skip
    axes.set_title(
        "VGG-19/CIFAR-10, 87.5% of the 16x1 blocks zero: speed over the fastest dense engine (fp32, two Zen 5 cores)",
        color=text, fontsize=10, pad=12,
    )  # fmt: skip
    figure.savefig(
        HERE / f"{name}.svg", bbox_inches="tight", facecolor=background, metadata={"Date": None, "Title": ALT}
    )
    return figure


# What a reader is told who does not see the picture.
ALT = "Speed of VGG-19 over the fastest dense engine at batch 1, 16 and 128: DeepSparse and slimkernels"


def result() -> None:
    """The headline for light and dark pages."""
    for name, theme in (("vgg19", LIGHT), ("vgg19-dark", DARK)):
        plt.close(headline(name, theme))


def demo() -> None:
    """What `slimkernels demo` draws, from a committed run of it."""
    demo_figure(DemoResult.from_json(DEMO.read_text()), HERE / "demo.png")


if __name__ == "__main__":
    for draw in (blocks, taps, strips, layouts, result, demo):
        draw()
