"""What the rows left on disk, gathered into one JSON-able report: means over seeds, ratios to the teacher, verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkernels import timing
from slimkernels.recipes.schema import Recipe, Row
from slimkernels.recipes.store import read_result

# What the reproduction is after: the sizes and accuracies of SlimNets, and a speed that it did not have.
GOALS = {"compression": 85.0, "relative_accuracy": 0.98, "speedup_cpu": 20.0, "speedup_gpu": 8.0}
# The sparsity and the gap, in points, at which blocks with distillation are judged.
JUDGED_SPARSITY, ALLOWED_GAP = 0.875, 2.0


def summarise(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the rows that are finished, whatever their number.

    Raises:
        ValueError: the teacher, the recipe's first row, is not finished.
    """
    measured = read_result(out / "measurement.json") or {}
    rows = [entry for row in recipe.rows if (entry := _row(out, row, measured)) is not None]
    if not rows or rows[0]["name"] != recipe.rows[0].name:
        raise ValueError(f"report: expected row {recipe.rows[0].name!r} to be finished, got none in {out}")
    teacher = rows[0]
    for entry in rows:
        own, dense = entry["accuracy"]["mean"], teacher["accuracy"]["mean"]
        entry["relative_accuracy"] = own / dense if dense else None
        entry["points"] = 100 * (own - dense)
    measured_environment = measured.get("environment")
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "preset": recipe.preset,
        "note": recipe.note,
        "data": dict(data),
        "device": measured.get("device"),
        "environment": measured_environment or timing.environment(),
        "batches": measured.get("batches", []),
        "dense_bytes": measured.get("dense_bytes"),
        "baselines": _baselines(teacher),
        "training_seconds": sum(entry["seconds"] for entry in rows),
        "rows": rows,
        "missing": [row.name for row in recipe.rows if row.name not in {entry["name"] for entry in rows}],
        "verdicts": _verdicts(rows, measured),
        "goals": GOALS,
        "notes": measured.get("notes", []),
    }


def _row(out: Path, row: Row, measured: Mapping[str, Any]) -> dict[str, Any] | None:
    results = [
        result for path in sorted((out / "rows" / row.slug).glob("seed*/row.json")) if (result := read_result(path))
    ]
    if not results:
        return None
    results.sort(key=lambda result: int(result["seed"]))
    accuracies = [float(result["accuracy"]) for result in results]
    first = results[0]
    own = measured.get("rows", {}).get(row.name)
    dense_bytes = measured.get("dense_bytes")
    layers = first["layers"].values()
    weights = sum(layer["weights"] for layer in layers)
    zeros = sum(layer["weights"] * layer["sparsity"] for layer in layers)
    entry: dict[str, Any] = {
        "name": row.name,
        "group": row.group,
        "note": row.note,
        "labels": dict(row.labels),
        "paper": dict(row.paper),
        "seeds": [int(result["seed"]) for result in results],
        "accuracy": {
            "mean": statistics.fmean(accuracies),
            "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "min": min(accuracies),
            "max": max(accuracies),
        },
        "parameters": first["parameters"],
        "nonzero": first["nonzero"],
        "weight_sparsity": zeros / weights if weights else 0.0,
        "conv_sparsity": _conv_sparsity(first),
        "seconds": sum(float(result["seconds"]) for result in results),
        "images_per_s": [step["images_per_s"] for step in first["steps"] if "images_per_s" in step],
        "measurement": own,
    }
    if own is not None and dense_bytes:
        entry["compression"] = dense_bytes / own["bytes"]
        entry["smallest_compression"] = dense_bytes / own["smallest_bytes"]
    return entry


def _conv_sparsity(result: Mapping[str, Any]) -> float:
    """Share of zeros among the weights of all convolutions but the first, which is never pruned."""
    convs = [layer for layer in result["layers"].values() if layer.get("conv")][1:]
    weights = sum(layer["weights"] for layer in convs)
    return sum(layer["weights"] * layer["sparsity"] for layer in convs) / weights if weights else 0.0


def _baselines(teacher: Mapping[str, Any]) -> dict[str, Any]:
    latency = (teacher["measurement"] or {}).get("latency", {})
    return {batch: entry["teacher"] for batch, entry in latency.items()}


def _verdicts(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sentences with a yes or no, each from the numbers of the rows."""
    return [*_gradual_against_one_shot(rows), *_distilled_blocks(rows), *_goals(rows, measured), *_unmeasured(rows)]


def _gradual_against_one_shot(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    one_shot = {_point(row): row for row in rows if row["group"] == "one-shot pruning"}
    pairs = [
        (row, one_shot[_point(row)]) for row in rows if row["group"] == "gradual pruning" and _point(row) in one_shot
    ]
    if not pairs:
        return []
    better = [gradual for gradual, other in pairs if gradual["accuracy"]["mean"] >= other["accuracy"]["mean"]]
    worst = min(pairs, key=lambda pair: pair[0]["accuracy"]["mean"] - pair[1]["accuracy"]["mean"])
    difference = 100 * (worst[0]["accuracy"]["mean"] - worst[1]["accuracy"]["mean"])
    text = f"Gradual pruning is at least as accurate as one-shot in {len(better)} of {len(pairs)} pairs"
    if len(better) < len(pairs):
        at = f"{worst[0]['labels']['block']} and {worst[0]['labels']['sparsity']:.1%}"
        text += f"; the largest loss is at {at} ({difference:+.2f} points)"
    return [{"text": text + ".", "holds": len(better) == len(pairs)}]


def _point(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["labels"].get("block"), row["labels"].get("sparsity")


def _distilled_blocks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [row for row in rows if row["group"] == "combination" and row["labels"].get("sparsity") == JUDGED_SPARSITY]
    return [
        {
            "text": (
                f"Block-pruned and distilled at {JUDGED_SPARSITY:.1%}: {row['points']:+.2f} points against the teacher "
                f"({row['accuracy']['mean']:.2%} and {rows[0]['accuracy']['mean']:.2%}; "
                f"{row['conv_sparsity']:.1%} of the convolutions' weights after the first are zero); "
                f"asked for: a gap of at most {ALLOWED_GAP:g}."
            ),
            "holds": row["points"] >= -ALLOWED_GAP,
        }
        for row in found
    ]


def _goals(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    candidates = [row for row in rows if row["group"] == "combination" and (row["measurement"] or {}).get("latency")]
    if not candidates:
        return []
    wanted = GOALS["speedup_gpu" if str(measured.get("device", "cpu")).startswith("cuda") else "speedup_cpu"]
    best = max(candidates, key=lambda row: row["compression"])
    speedups = {batch: entry["speedup"] for batch, entry in best["measurement"]["latency"].items()}
    reached = {
        "compression": best["compression"] >= GOALS["compression"],
        "accuracy": best["relative_accuracy"] >= GOALS["relative_accuracy"],
        "speed": max(speedups.values()) >= wanted,
    }
    speeds = ", ".join(f"{value:.1f}x at batch {batch}" for batch, value in speedups.items())
    text = (
        f"Smallest combination ({best['name']}): {best['compression']:.1f}x smaller on disk (goal "
        f"{GOALS['compression']:.0f}x), {best['relative_accuracy']:.1%} of the teacher's accuracy (goal "
        f"{GOALS['relative_accuracy']:.0%}), {speeds} (goal {wanted:.0f}x)."
    )
    return [{"text": text, "holds": all(reached.values()), "reached": reached}]


def _unmeasured(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    errors = [(row["name"], row["measurement"]["error"]) for row in rows if (row["measurement"] or {}).get("error")]
    compared = [row for row in rows if row["measurement"]]
    if not compared:
        return []
    if errors:
        return [{"text": f"{name}: {error}.", "holds": False} for name, error in errors]
    worst = max(compared, key=lambda row: row["measurement"]["max_abs_deviation"] / row["measurement"]["largest_logit"])
    share = worst["measurement"]["max_abs_deviation"] / worst["measurement"]["largest_logit"]
    text = (
        f"Converted networks compute what the compressed ones do: the largest difference of a logit is {share:.1e} "
        f"of the largest logit ({worst['name']})."
    )
    return [{"text": text, "holds": True}]
