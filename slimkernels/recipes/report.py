"""The report of a run: ``report.json``, ``report.md`` and its pictures, from what the steps left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from slimkernels.files import atomic_path
from slimkernels.recipes.figures import pareto_front, write_figures
from slimkernels.recipes.schema import Recipe
from slimkernels.recipes.store import write_json
from slimkernels.recipes.summary import summarise

_SWAPPED = {"bsr": "block-sparse", "low_rank": "low-rank", "fused": "fused dense", "dense": "merged"}


def write_report(out: Path, recipe: Recipe, data: Mapping[str, Any], unfit: Sequence[str] = ()) -> dict[str, Any]:
    """Writes ``report.json``, ``report.md`` and PNGs into ``out``; the report.

    Rows in ``unfit`` are told to have had no time.

    Raises:
        ValueError: the teacher is not finished. OSError: a file cannot be written.
    """
    report = summarise(out, recipe, data)
    report["unfit"] = list(unfit)
    report["figures"] = write_figures(out, report, recipe)
    write_json(out / "report.json", report)
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The report as GitHub Markdown."""
    lines = [f"# {report['title']}: preset `{report['preset']}`", "", *_where(report), ""]
    lines += ["## At a glance", "", *_glance(report), ""]
    for figure in report["figures"]:
        lines += [f"![{figure['title']}]({figure['file']})", ""]
    lines += ["## Rows", "", *_legend(), ""]
    for group, rows in groupby(report["rows"], key=lambda row: row["group"]):
        lines += [f"### {group.capitalize()}", "", *_table(list(rows), report), ""]
    if by_values := _values_table(report["rows"]):
        lines += ["## Bytes and accuracy by values", "", *by_values, ""]
    if published := _published_table(report):
        lines += ["## Beside published compression", "", *published, ""]
    lines += ["## Beside the paper", "", *_paper_table(report["rows"]), ""]
    if report["unfit"]:
        lines += [f"Rows, or seeds of them, that did not fit into the time: {', '.join(report['unfit'])}.", ""]
    if report["missing"]:
        lines += [f"Rows not run yet: {', '.join(report['missing'])}.", ""]
    for note in report["notes"]:
        lines.append(f"Note: {note}")
    return "\n".join(lines).rstrip() + "\n"


def _where(report: Mapping[str, Any]) -> list[str]:
    environment, data = report["environment"], report["data"]
    commit = environment.get("commit")
    dirty = " (modified)" if environment.get("dirty") else ""
    device = environment.get("gpu") if str(report["device"]).startswith("cuda") else environment.get("cpu")
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "torchvision", "triton") if environment.get(name)
    )
    least, most = (f(len(row["seeds"]) for row in report["rows"]) for f in (min, max))
    seeds = f"{least} to {most} seeds" if least < most else f"{most} seed{'s' if most > 1 else ''}"
    return [
        f"- Data: **{data['name']}**, {data['training_images']:,} training and {data['test_images']:,} test images. "
        "Accuracies are top-1 on the test images, and are to be read against the teacher's on the same images.",
        f"- Measured on {device}, {environment['threads']} CPU threads; {versions}, Python {environment['python']}; "
        f"slimkernels {environment['slimkernels']}, commit {commit[:12] + dirty if commit else 'unknown'}.",
        f"- {seeds} a row; {report['training_seconds'] / 60:.1f} minutes of training in all.",
        *([f"- {report['note']}"] if report["note"] else []),
    ]


def _glance(report: Mapping[str, Any]) -> list[str]:
    teacher = report["rows"][0]
    lines = [
        f"- Teacher ({teacher['note'] or teacher['name']}): {_accuracy(teacher)}, {teacher['parameters']:,} parameters"
    ]
    if report["dense_bytes"]:
        times = ", ".join(
            f"{entry['p50_ms']:.3g} ms at batch {batch} ({entry['baseline']})"
            for batch, entry in report["baselines"].items()
        )
        lines[0] += f", {_size(report['dense_bytes'])} on disk, {times}"
    lines[0] += "."
    return lines + [f"- **{'Yes' if verdict['holds'] else 'No'}.** {verdict['text']}" for verdict in report["verdicts"]]


def _legend() -> list[str]:
    return [
        "*Accuracy*: of the network that is loaded from the row's file, the mean and the standard deviation where "
        "there are several seeds. *Against teacher*: that in points. *Epochs*: of the row's own training. *On "
        "disk*: the file of `slimkernels.save` whose speed is in this row, values and indices, how it holds its "
        "values, and how much smaller than the teacher's dense safetensors file it is; in brackets the same "
        "network with every block pattern and low-rank factor stored as such, whether or not that is faster. "
        "*Zeros*: of all weights of convolutions and linear layers. Times are medians in ms of interleaved runs: "
        "*as it is* is the compressed network in eager channels_last with batch norm folded, *converted* is "
        "`slimkernels.convert` of it, called module by module, *recorded* that in `slimkernels.graphed`; the "
        "factors are over the best dense baseline of the teacher in the same run (eager in two memory formats, "
        "torch.compile with freezing). *Difference*: largest absolute one of a logit, converted against "
        "compressed.",
    ]


def _table(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[str]:
    batches = [str(batch) for batch in report["batches"]]
    header = ["row", "accuracy", "against teacher", "epochs", "zeros", "parameters", "on disk"]
    for batch in batches:
        header += [f"batch {batch}: as it is", f"batch {batch}: converted", f"batch {batch}: recorded"]
    header += ["runs as", "difference"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in rows:
        own = row["measurement"] or {}
        cells = [
            row["name"],
            _accuracy(row),
            f"{row['points']:+.2f}",
            _epochs(row),
            f"{row['weight_sparsity']:.1%}",
            f"{row['parameters']:,}",
            _on_disk(row, own),
        ]
        for batch in batches:
            cells += _times(own.get("latency", {}).get(batch))
        swapped = ", ".join(f"{count} {_SWAPPED[name]}" for name, count in own.get("swapped", {}).items())
        cells += [swapped or ("dense" if own else ""), f"{own['max_abs_deviation']:.1e}" if own else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _on_disk(row: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    if not own:
        return ""
    return (
        f"{_size(own['bytes'])} {own['values']}, {row['compression']:.1f}x ({_size(own['smallest_bytes'])}, "
        f"{row['smallest_compression']:.1f}x)"
    )


def _epochs(row: Mapping[str, Any]) -> str:
    return " + ".join(
        f"{part['epochs']:g}" + (f" of {part['images']:,} images" if part["images"] else "") for part in row["budget"]
    )


def _values_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the networks of compact rows come to in other values; nothing where there are no compact rows."""
    compact = [row for row in rows if row["values"] != "fp32" and (row["measurement"] or {}).get("by_values")]
    if not compact:
        return []
    lines = [
        "The first seed's network of each row, written in every kind of values and evaluated after loading. The "
        "*bound* is the zeroth-order entropy of the coded values plus log2 of the number of patterns of each layer.",
        "",
        "| row | values | bytes | smaller than the teacher | above the bound | accuracy | against fp32 values |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in compact:
        found = row["measurement"]["by_values"]
        for values, of in found.items():
            cells = [
                row["name"],
                values,
                f"{of['bytes']:,}",
                f"{row['dense_bytes'] / of['bytes']:.1f}x",
                f"{of['bytes'] / of['bound'] - 1:.1%}" if of["bound"] else "",
                f"{of['accuracy']:.2%}",
                f"{100 * (of['accuracy'] - found['fp32']['accuracy']):+.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _published_table(report: Mapping[str, Any]) -> list[str]:
    """What others published and the rows that no smaller file here equals, in one table, by compression."""
    measured = [row for row in report["rows"][1:] if "compression" in row]
    if not measured or not report["published"]:
        return []
    front = pareto_front([(1 / row["compression"], row["points"]) for row in measured])
    lines = [
        "Each against its own dense network in float32. Ours are the rows of this run that no smaller file equals in "
        "accuracy, counted in bytes of the file, and as fast as that file is here.",
        "",
        "| whose | network | smaller | counted in | points | speed-up | source |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    entries = [
        (point["compression"], point["name"], point["network"], point["counted"], point["points"], "", point["source"])
        for point in report["published"]
    ]
    teacher = report["rows"][0]["note"]
    for row in (measured[index] for index in front):
        latency = row["measurement"]["latency"]
        speeds = " / ".join(f"{entry['speedup']:.1f}x at batch {batch}" for batch, entry in latency.items())
        entries.append((row["compression"], f"**{row['name']}**", teacher, "bytes", row["points"], speeds, "this run"))
    for smaller, name, network, counted, points, speed, source in sorted(entries, key=lambda entry: entry[0]):
        lines.append(f"| {name} | {network} | {smaller:.1f}x | {counted} | {points:+.2f} | {speed} | {source} |")
    return lines


def _times(entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return ["", "", ""]
    return [
        f"{entry['masked']['p50_ms']:.3g} ({entry['masked_speedup']:.2f}x)",
        f"{entry['converted']['p50_ms']:.3g} ({entry['converted_speedup']:.2f}x)",
        f"{entry['recorded']['p50_ms']:.3g} (**{entry['speedup']:.2f}x**)",
    ]


def _paper_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    quoted = [row for row in rows if row["paper"]]
    dense = next((row["paper"].get("accuracy") for row in rows if row["paper"].get("accuracy")), None)
    lines = [
        "| row | accuracy / teacher's | compression | speed-up | the paper's row | its accuracy (/ its teacher's) "
        "| its compression | its speed-up |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in quoted:
        paper, own = row["paper"], row["measurement"] or {}
        speeds = [entry["speedup"] for entry in own.get("latency", {}).values()]
        accuracy = paper.get("accuracy")
        cells = [
            row["name"],
            f"{row['relative_accuracy']:.1%}",
            f"{row['compression']:.1f}x" if own else "",
            " / ".join(f"{speed:.2f}x" for speed in speeds),
            str(paper.get("row", "")),
            f"{accuracy} ({accuracy / dense:.1%})" if accuracy and dense else "",
            f"{paper['compression']}x" if "compression" in paper else "not given",
            f"{paper['speedup']}x" if "speedup" in paper else "not measured",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _accuracy(row: Mapping[str, Any]) -> str:
    accuracy = row["accuracy"]
    if accuracy["std"] is None:
        return f"{accuracy['mean']:.2%}"
    return f"{accuracy['mean']:.2%} ± {100 * accuracy['std']:.2f} (n={len(row['seeds'])})"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
