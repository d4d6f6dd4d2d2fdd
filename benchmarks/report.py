"""Turns records of the suites into one record, Markdown tables and pictures.

A record is pytest-benchmark's, a ``--rows`` file, or the ``results.json`` of a GPU check.

python benchmarks/report.py RECORD.json|ROWS.jsonl|results.json [...] --out benchmarks/results/<device>

writes ``<commit>.json`` (environment and one flat row per measurement), ``<commit>.md`` and, where the layer sweep is
in the record, ``<commit>-breakeven.png`` and ``<commit>-roofline.png``. Losing rows are printed like any other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gpu_tables
from gpu_tables import table

from slimkernels.files import atomic_path
from slimkernels.kernels import KERNELS


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of one pytest-benchmark record, flat; raises ValueError on a speed that was not checked."""
    rows = []
    for entry in record["benchmarks"]:
        info = entry["extra_info"]
        if info.get("match") is not True and info.get("suite") not in gpu_tables.UNTIMED:
            raise ValueError(f"report: row {entry['name']} was not checked against the reference")
        rows.append({"name": entry["name"], **info})
    return rows


def read(path: Path) -> dict[str, Any]:
    """A pytest-benchmark record, or another in the same form; of equal rows of a ``--rows`` file the last one stays."""
    if path.suffix != ".jsonl":
        record = json.loads(path.read_text())
        return record if "benchmarks" in record else gpu_tables.as_record(record)
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    environment = next(line["environment"] for line in lines if "environment" in line)
    rows = {line["name"]: line for line in lines if "environment" not in line}
    entries = [{"name": n, "extra_info": {k: v for k, v in r.items() if k != "name"}} for n, r in rows.items()]
    return {"machine_info": {"slimkernels": environment}, "benchmarks": entries}


def merged(paths: list[Path], commit: str | None = None) -> dict[str, Any]:
    """Several records of one machine and commit as one.

    Args:
        commit: of records that do not know theirs.

    Raises:
        ValueError: commit or processor differ, or a record knows another commit than the one given.
    """
    records = [read(path) for path in paths]
    environments = [r["machine_info"]["slimkernels"] for r in records]
    for environment in environments:
        known = environment["commit"] = environment["commit"] or commit
        if commit is not None and known != commit:
            raise ValueError(f"report: expected records of commit {commit}, got one of {known}")
    for key in ("commit", "cpu", "gpu", "torch", "threads"):
        values = {str(e[key]) for e in environments}
        if len(values) > 1:
            raise ValueError(f"report: expected records of one {key}, got {sorted(values)}")
    environment = {key: value for key, value in environments[0].items() if key != "argv"}  # paths of one machine
    found = {"environment": environment, "rows": [row for r in records for row in rows_of(r)]}
    stages = [stage for r in records for stage in r.get("stages", ())]
    return found | ({"stages": stages} if stages else {})


def block_name(row: dict[str, Any]) -> str:
    """``16x1``."""
    return "x".join(str(b) for b in row["block_shape"])


def milliseconds(row: dict[str, Any], key: str) -> str:
    """A time of a row to three digits; empty where the row has none."""
    return f"{row[key]:.3g}" if row.get(key) is not None else ""


def best_baseline(row: dict[str, Any]) -> str:
    """Name of the fastest dense baseline of a row; empty where the row does not list them."""
    found = row.get("baselines_p50_ms") or {}
    return min(found, key=lambda name: found[name]) if found else ""


def vgg_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of one size and sparsity beside each other, the headline's blocks first."""
    return block_name(row) != "16x1", row["batch"], row["sparsity"], not row.get("recorded")


def vgg_table(rows: list[dict[str, Any]]) -> str:
    """Whole networks: dense and converted latency, speed-up, error ratio, and the prediction for swapped layers."""
    header = ["network", "batch", "sparsity", "blocks", "runs as", "best dense", "dense p50 [ms]",
              "ours p20 / p50 / p80 [ms]", "n", "speed-up", "images/s", "predicted, swapped layers [ms]",
              "the same dense [ms]", "kernels, dense", "error / dense error",
              "DeepSparse, same zeros [ms]"]  # fmt: skip
    body = [
        [
            r["network"], str(r["batch"]), f"{r['sparsity']:.1%}", block_name(r),
            "recording" if r.get("recorded") else "modules", best_baseline(r), f"{r['dense_p50_ms']:.3g}",
            f"{r['p20_ms']:.3g} / {r['p50_ms']:.3g} / {r['p80_ms']:.3g}", str(r["n"]), f"**{r['speedup']:.2f}x**",
            f"{r['images_per_s']:.0f}", milliseconds(r, "predicted_ms"), milliseconds(r, "predicted_dense_ms"),
            f"{r['kernels']}, {r['dense_kernels']}" if r.get("kernels") is not None else "", f"{r['error_ratio']:.2f}",
            milliseconds(r, "deepsparse_p50_ms"),
        ]
        for r in sorted(rows, key=vgg_order)
    ]  # fmt: skip
    return table(header, body)


def ops_table(rows: list[dict[str, Any]]) -> str:
    """Single layers: latency, rates, share of the measured multiply-add peak."""
    header = ["layer", "batch", "blocks", "sparsity", "kernel", "dense p50 [ms]", "p50 [ms]", "predicted [ms]",
              "speed-up", "stored GFLOP/s", "dense-equivalent GFLOP/s", "share of peak"]  # fmt: skip
    body = [
        [
            r["layer"], str(r["batch"]), block_name(r), f"{r['sparsity']:.1%}", r["kernel"], f"{r['dense_p50_ms']:.3g}",
            f"{r['p50_ms']:.3g}", milliseconds(r, "predicted_ms"), f"{r['speedup']:.2f}x",
            f"{r['sparse_flops_per_s'] / 1e9:.0f}", f"{r['dense_equiv_flops_per_s'] / 1e9:.0f}",
            "" if r["share_of_peak"] is None else f"{r['share_of_peak']:.0%}",
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def ceilings_table(rows: list[dict[str, Any]]) -> str:
    """Measured ceilings beside those that the cost model divides by."""
    header = ["ceiling", "measured", "cost model", "unit", "p50 [ms]"]

    def rate(value: float | None) -> str:
        return "" if value is None else f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"

    body = [[r["what"], rate(r["rate"]), rate(r.get("predicted_rate")), r["unit"], f"{r['p50_ms']:.3g}"] for r in rows]
    return table(header, body)


def backward_table(rows: list[dict[str, Any]]) -> str:
    """Training: forward and backward, or a whole step, against masked dense."""
    header = ["layer", "batch", "blocks", "sparsity", "masked dense p50 [ms]", "p50 [ms]", "speed-up"]
    body = [
        [r["layer"], str(r["batch"]), block_name(r), f"{r['sparsity']:.1%}", f"{r['dense_p50_ms']:.3g}",
         f"{r['p50_ms']:.3g}", f"{r['speedup']:.2f}x"]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def low_rank_table(rows: list[dict[str, Any]]) -> str:
    """Low-rank layers against the factors one after the other and the merged layer."""
    header = ["layer", "kernel", "faster of both", "its p50 [ms]", "p50 [ms]", "predicted [ms]", "speed-up"]
    body = [
        [r["layer"], r["kernel"], best_baseline(r), f"{r['dense_p50_ms']:.3g}", f"{r['p50_ms']:.3g}",
         milliseconds(r, "predicted_ms"), f"{r['speedup']:.2f}x"]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


SECTIONS = (
    ("ceilings", "Ceilings", ceilings_table),
    ("vgg", "Converted networks (random weights, pruned by magnitude)", vgg_table),
    ("ops", "Layers", ops_table),
    ("backward", "Training", backward_table),
    ("low_rank", "Low-rank layers", low_rank_table),
)


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    env = record["environment"]
    device = env["gpu"] or env["cpu"]
    parts = [
        f"# Measurements on {device}\n",
        f"Commit {env['commit']}{' with local changes' if env['dirty'] else ''}, torch {env['torch']}, "
        f"{env['threads']} threads, {env['platform']}. Dense is the best of the baselines of the same run, timed in "
        "turn with ours; medians.\n",
    ]
    for suite, title, make in SECTIONS:
        rows = [r for r in record["rows"] if r["suite"] == suite]
        if rows:
            parts += [f"## {title}\n", make(rows)]
    return "\n".join(parts + gpu_tables.sections(record))


def plot_breakeven(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense against sparsity, one line per block shape, one panel per swept layer and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fastest: dict[tuple[str, int, tuple[int, ...], float], float] = {}
    for r in rows:
        if r["sparsity"] > 0:
            key = r["layer"], r["batch"], tuple(r["block_shape"]), r["sparsity"]
            fastest[key] = max(fastest.get(key, 0.0), r["speedup"])
    layers = [n for n in dict.fromkeys(k[0] for k in fastest) if len({k[3] for k in fastest if k[0] == n}) > 1]
    batches = sorted({k[1] for k in fastest})
    if not layers:
        return
    figure, axes = plt.subplots(
        len(layers), len(batches), figsize=(5 * len(batches), 4 * len(layers)), squeeze=False, sharey=True
    )
    for axis_row, layer in zip(axes, layers, strict=True):
        for axis, batch in zip(axis_row, batches, strict=True):
            for block in sorted({k[2] for k in fastest if k[:2] == (layer, batch)}):
                points = sorted((100 * k[3], v) for k, v in fastest.items() if k[:3] == (layer, batch, block))
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{block[0]}x{block[1]}")
            axis.axhline(1, color="0.5", linewidth=1)
            axis.set(title=f"{layer}, batch {batch}", xlabel="block sparsity [%]", ylabel="speed-up over dense")
            axis.legend(title="block")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_roofline(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the multiply-add peak by layer, natural block shape, one bar per kernel and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["share_of_peak"] is not None and r["sparsity"] in (0.0, 0.875)]
    if not rows:
        return
    natural = rows[0]["block_shape"]
    rows = [r for r in rows if r["block_shape"] == natural]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    bars = sorted({(r["batch"], r["kernel"]) for r in rows})
    figure, axis = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(bars)
    for i, (batch, kernel) in enumerate(bars):
        shares = {r["layer"]: r["share_of_peak"] * 100 for r in rows if (r["batch"], r["kernel"]) == (batch, kernel)}
        axis.bar([j + i * width for j in range(len(layers))], [shares.get(name, 0) for name in layers], width,
                 label=f"batch {batch}, {kernel}")  # fmt: skip
    axis.set_xticks([j + width * (len(bars) - 1) / 2 for j in range(len(layers))],
                    [name.split(".")[1].split("@")[0] for name in layers])  # fmt: skip
    axis.set(ylabel="share of multiply-add peak [%]", ylim=(0, 100),
             title=f"VGG-19/CIFAR-10, 87.5% zero {natural[0]}x{natural[1]} blocks (conv1_1 dense), "
                   "in-image FLOPs")  # fmt: skip
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of records made where there was no .git folder")
    arguments = parser.parse_args()
    record = merged(arguments.records, arguments.commit)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = (record["environment"]["commit"] or "uncommitted")[:12]
    with atomic_path(arguments.out / f"{stem}.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    with atomic_path(arguments.out / f"{stem}.md") as path:
        path.write_text(markdown(record))
    sweep = [r for r in record["rows"] if r["suite"] == "ops"]
    if sweep:
        plot_breakeven([r for r in sweep if r["kernel"] in KERNELS], arguments.out / f"{stem}-breakeven.png")
        plot_roofline(sweep, arguments.out / f"{stem}-roofline.png")
    print(markdown(record))


if __name__ == "__main__":
    main()
