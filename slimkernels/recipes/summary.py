"""What the rows left on disk, gathered into one JSON-able report: means over seeds, ratios to the teacher, verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slimkernels import timing
from slimkernels.recipes.schema import Recipe, Row
from slimkernels.recipes.store import key_of, read_result

# Points that a file's values may cost against the same network in fp32, and bytes above the bound of a compact file.
ALLOWED_LOSS = {"int8": 0.3, "int4": 1.0}
ALLOWED_ABOVE_BOUND = 0.10


def summarise(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the rows that are finished, whatever their number.

    Raises:
        ValueError: the teacher, the recipe's first row, is not finished.
    """
    measured = read_result(out / "measurement.json") or {}
    rows = [entry for row in recipe.rows if (entry := _row(out, recipe, row, measured)) is not None]
    if not rows or rows[0]["name"] != recipe.rows[0].name:
        raise ValueError(f"report: expected row {recipe.rows[0].name!r} to be finished, got none in {out}")
    teacher = rows[0]
    for entry in rows:
        own, dense = entry["accuracy"]["mean"], teacher["accuracy"]["mean"]
        entry["relative_accuracy"] = own / dense if dense else None
        entry["points"] = 100 * (own - dense)
    measured_environment = measured.get("environment")
    outdated = [row["name"] for row in rows if row["measurement"] is None and row["name"] in measured.get("rows", {})]
    notes = [f"trained or converted otherwise since they were measured: {', '.join(outdated)}"] if outdated else []
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
        "verdicts": _verdicts(rows, recipe),
        "goals": [dict(goal) for goal in recipe.goals],
        "published": [dict(point) for point in recipe.published],
        "notes": [*measured.get("notes", []), *notes],
    }


def _row(out: Path, recipe: Recipe, row: Row, measured: Mapping[str, Any]) -> dict[str, Any] | None:
    results = [
        result for path in sorted((out / "rows" / row.slug).glob("seed*/row.json")) if (result := read_result(path))
    ]
    if not results:
        return None
    results.sort(key=lambda result: int(result["seed"]))
    first = results[0]
    own = _measured(recipe, row, measured, results)
    trained = [float(result["accuracy"]) for result in results]
    # Of a measured row the accuracy is that of the files whose bytes are told, not that before they were written.
    files = {int(file["seed"]): float(file["accuracy"]) for file in (own or {}).get("files", [])}
    accuracies = [files.get(int(result["seed"]), accuracy) for result, accuracy in zip(results, trained, strict=True)]
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
            "trained": statistics.fmean(trained),
        },
        "budget": [{"epochs": epochs, "images": images} for epochs, images in row.budget],
        "values": row.values,
        "parameters": first["parameters"],
        "nonzero": first["nonzero"],
        "weight_sparsity": zeros / weights if weights else 0.0,
        "conv_sparsity": _conv_sparsity(first),
        "seconds": sum(float(result["seconds"]) for result in results),
        "images_per_s": [step["images_per_s"] for step in first["steps"] if "images_per_s" in step],
        "measurement": own,
    }
    if own is not None and dense_bytes:
        entry["dense_bytes"] = dense_bytes
        entry["compression"] = dense_bytes / own["bytes"]
        entry["smallest_compression"] = dense_bytes / own["smallest_bytes"]
    return entry


def _measured(
    recipe: Recipe, row: Row, measured: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What was measured of the networks of ``results``; None where it was of others, or of others' conversions."""
    own: dict[str, Any] | None = measured.get("rows", {}).get(row.name)
    keys = {int(result["seed"]): key_of(identity=result["identity"], **recipe.conversion(row)) for result in results}
    known = own is not None and all(file.get("key") == keys.get(int(file["seed"])) for file in own["files"])
    return own if known else None


def _conv_sparsity(result: Mapping[str, Any]) -> float:
    """Share of zeros among the weights of all convolutions but the first, which is never pruned."""
    convs = [layer for layer in result["layers"].values() if layer.get("conv")][1:]
    weights = sum(layer["weights"] for layer in convs)
    return sum(layer["weights"] * layer["sparsity"] for layer in convs) / weights if weights else 0.0


def _baselines(teacher: Mapping[str, Any]) -> dict[str, Any]:
    latency = (teacher["measurement"] or {}).get("latency", {})
    return {batch: entry["teacher"] for batch, entry in latency.items()}


def _verdicts(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """Sentences with a yes or no, each from the numbers of the rows."""
    goals = [verdict for goal in recipe.goals if (verdict := _goal(goal, rows)) is not None]
    return [*_gradual_against_one_shot(rows), *goals, *_compact(rows), *_unmeasured(rows)]


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


def _goal(goal: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Whether one measured row reaches all of a goal at once; the row that does, or that comes nearest."""
    pattern = str(goal.get("rows", "*"))
    candidates = [
        row for row in rows[1:] if fnmatchcase(row["name"], pattern) and (row["measurement"] or {}).get("latency")
    ]
    if not candidates:
        return None
    # The row with the fewest misses; among those, the one that misses least.
    best = min(candidates, key=lambda row: sorted((miss for miss in _misses(goal, row).values()), reverse=True))
    misses = _misses(goal, best)
    said = {"compression": f"{best['compression']:.1f}x smaller", "points": f"{best['points']:+.2f} points"}
    said["relative_accuracy"] = f"{best['relative_accuracy']:.1%} of the teacher's accuracy"
    wanted = {
        "compression": f"at least {goal.get('compression', 0):g}x",
        "points": f"at least {goal.get('points', 0):+g}",
        "relative_accuracy": f"at least {goal.get('relative_accuracy', 0):.0%}",
    }
    if "speedup" in misses:
        batch, speed = _speedup(goal, best)
        said["speedup"] = f"{speed:.1f}x faster at batch {batch}"
        wanted["speedup"] = f"at least {goal['speedup']:g}x"
    text = ", ".join(f"{said[name]} (asked for: {wanted[name]})" for name in misses)
    reached = {name: miss <= 0 for name, miss in misses.items()}
    return {"text": f"{best['name']}: {text}.", "holds": all(reached.values()), "reached": reached}


def _misses(goal: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """By how much a row misses each part of a goal, as a share of it; 0 where it reaches it."""
    found: dict[str, float] = {}
    for name in ("compression", "relative_accuracy"):
        if name in goal:
            found[name] = max(0.0, 1.0 - row[name] / goal[name])
    if "points" in goal:
        found["points"] = max(0.0, (goal["points"] - row["points"]) / 100)
    if "speedup" in goal:
        found["speedup"] = max(0.0, 1.0 - _speedup(goal, row)[1] / goal["speedup"])
    return found


def _speedup(goal: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, float]:
    """The batch size that a goal speaks of, the largest by default, and the row's speed-up at it."""
    latency = row["measurement"]["latency"]
    batch = int(goal.get("batch") or max(map(int, latency)))
    return batch, float(latency[str(batch)]["speedup"]) if str(batch) in latency else 0.0


def _compact(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What fewer bits cost in accuracy, and how near the files are to their bounds."""
    found = []
    compact = [row for row in rows if (row["measurement"] or {}).get("by_values")]
    for values, allowed in ALLOWED_LOSS.items():
        # Four bits are for networks that were trained for them.
        pairs = [
            (row, row["measurement"]["by_values"]) for row in compact if values != "int4" or row["values"] == "int4"
        ]
        if not pairs:
            continue
        row, by = min(pairs, key=lambda pair: pair[1][values]["accuracy"] - pair[1]["fp32"]["accuracy"])
        loss = 100 * (by[values]["accuracy"] - by["fp32"]["accuracy"])
        text = (
            f"Files with {values} values against fp32 files of the same networks: at worst {loss:+.2f} points "
            f"({row['name']}); allowed: {-allowed:+g}."
        )
        found.append({"text": text, "holds": loss >= -allowed})
    bounded = [
        (row, values, of["bytes"] / of["bound"] - 1)
        for row in compact
        for values, of in row["measurement"]["by_values"].items()
        if of["bound"]
    ]
    if bounded:
        row, values, above = max(bounded, key=lambda entry: entry[2])
        text = (
            f"Compact files are at most {above:.1%} above their bound, the zeroth-order entropy of their values plus "
            f"log2 of the number of their patterns ({row['name']}, {values}); allowed: {ALLOWED_ABOVE_BOUND:.0%}."
        )
        found.append({"text": text, "holds": above <= ALLOWED_ABOVE_BOUND})
    return found


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
