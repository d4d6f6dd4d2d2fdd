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
import pictures
from gpu_tables import table

from slimkernels.files import atomic_path


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


def networks_table(rows: list[dict[str, Any]]) -> str:
    """Networks of several kinds: dense, DeepSparse, the converted network called as it is, and its recording."""
    header = ["network", "batch", "zeros", "best dense", "its p50 [ms]", "DeepSparse, same zeros [ms]",
              "converted p50 [ms]", "recorded p20 / p50 / p80 [ms]", "n", "speed-up", "converted / recorded",
              "error / dense error"]  # fmt: skip
    body = [
        [
            r["network"], str(r["batch"]), f"{r['sparsity']:.1%}, {block_name(r)}", best_baseline(r),
            f"{r['dense_p50_ms']:.3g}", milliseconds(r, "deepsparse_p50_ms"), f"{r['converted_p50_ms']:.3g}",
            f"{r['p20_ms']:.3g} / {r['p50_ms']:.3g} / {r['p80_ms']:.3g}", str(r["n"]), f"**{r['speedup']:.2f}x**",
            f"{r['converted_p50_ms'] / r['p50_ms']:.2f}", f"{r['error_ratio']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def bf16_table(rows: list[dict[str, Any]]) -> str:
    """Networks in bf16 on a CPU, and our recording of the same in float32."""
    header = ["network", "batch", "zeros", "multiplied by", "best dense in bf16", "its p50 [ms]",
              "recorded in bf16 p20 / p50 / p80 [ms]", "n", "speed-up", "recorded in float32 p50 [ms]",
              "error / error of torch in bf16"]  # fmt: skip
    body = [
        [
            r["network"], str(r["batch"]), f"{r['sparsity']:.1%}, {block_name(r)}", r["engine"], best_baseline(r),
            f"{r['dense_p50_ms']:.3g}", f"{r['p20_ms']:.3g} / {r['p50_ms']:.3g} / {r['p80_ms']:.3g}", str(r["n"]),
            f"**{r['speedup']:.2f}x**", f"{r['float32_p50_ms']:.3g}", f"{r['error_ratio']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def checkpoints_table(rows: list[dict[str, Any]]) -> str:
    """Trained compact files: bytes as this machine stores them, and its recording against the best dense engine."""
    header = ["file", "bytes", "smaller", "batch", "best dense", "its p50 [ms]", "converted p50 [ms]",
              "recorded p20 / p50 / p80 [ms]", "speed-up"]  # fmt: skip
    body = [
        [
            r["file"].rpartition("/")[2].removesuffix(".slim.safetensors"), f"{r['bytes']:,}",
            f"{r['compression']:.0f}x", str(r["batch"]), best_baseline(r), f"{r['dense_p50_ms']:.3g}",
            f"{r['converted_p50_ms']:.3g}", f"{r['p20_ms']:.3g} / {r['p50_ms']:.3g} / {r['p80_ms']:.3g}",
            f"**{r['speedup']:.2f}x**",
        ]
        for r in rows
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
    header = ["layer", "batch", "blocks", "sparsity", "masked dense p50 [ms]",
              "p50 [ms]", "speed-up", "all others [ms]"]  # fmt: skip
    body = [
        [r["layer"], str(r["batch"]), block_name(r), f"{r['sparsity']:.1%}", f"{r['dense_p50_ms']:.3g}",
         f"{r['p50_ms']:.3g}", f"{r['speedup']:.2f}x",
         "; ".join(f"{k} {v:.3g}" for part in ("baselines", "beside") for k, v in r.get(f"{part}_p50_ms", {}).items())]
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
    ("networks", "Networks of several kinds", networks_table),
    ("bf16", "Networks in bf16 on a CPU", bf16_table),
    ("checkpoints", "Trained compact files", checkpoints_table),
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
        pictures.draw_record(arguments.out / f"{stem}.json")
    print(markdown(record))


if __name__ == "__main__":
    main()
