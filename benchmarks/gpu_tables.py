"""The parts of a report that a GPU check adds: what is right, configurations beside their floors, counters, tests."""

from __future__ import annotations

from typing import Any

from gpu_check.counters import METRICS
from gpu_check.summary import FLOORS, STALL, config_text, said, setting

# Suites whose rows are no speeds of the package, or say themselves what is wrong.
UNTIMED = (
    "versions", "compile", "correctness", "sweep", "counters", "kernel_counts", "test", "tests", "sanitizer", "trainer",
)  # fmt: skip


def as_record(results: dict[str, Any]) -> dict[str, Any]:
    """The ``results.json`` of a GPU check in the form of a pytest-benchmark record.

    Rows of passed tests are left out, and the kernels of a network join its row.

    Raises:
        ValueError: no environment, so nothing ran.
    """
    if not results.get("environment"):
        raise ValueError("report: expected results with an environment, got none: no stage ran")
    counts = {(r["stage"], r["name"]): r for r in results["rows"] if r.get("suite") == "kernel_counts"}
    entries = []
    for row in results["rows"]:
        if row["suite"] == "kernel_counts" or (row["suite"] == "test" and row["outcome"] == "passed"):
            continue
        counted = counts.get((row["stage"], row["name"]), {}) if row["suite"] in ("vgg", "backward") else {}
        info = {**row, **{k: v for k, v in counted.items() if "kernel" in k}}
        if row["suite"] == "test":
            info["message"] = said(row)
        if row["suite"] == "counters":  # the profiler's report holds the attributes of the device, too
            info["metrics"] = {k: v for k, v in row["metrics"].items() if k in METRICS or STALL in k}
        entries.append({"name": row["name"], "extra_info": {k: v for k, v in info.items() if k != "name"}})
    tests = [r for r in results["rows"] if r.get("suite") == "test"]
    for stage in dict.fromkeys(r["stage"] for r in tests):
        own = {r["name"]: r["outcome"] for r in tests if r["stage"] == stage}
        totals = {outcome: sum(v == outcome for v in own.values()) for outcome in ("passed", "failed", "skipped")}
        collected = [r["count"] for r in results["rows"] if r.get("suite") == "tests" and r["stage"] == stage]
        totals["not_reached"] = max(0, (collected or [len(own)])[0] - len(own))
        entries.append({"name": "totals", "extra_info": {"suite": "tests", "stage": stage, **totals}})
    environment = dict(results["environment"])
    return {"machine_info": {"slimkernels": environment}, "benchmarks": entries, "stages": results["stages"]}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def correctness_table(rows: list[dict[str, Any]]) -> str:
    """Every checked layer: its kernel, its configuration, the worst error over the bound."""
    header = ["layer", "batch", "blocks", "kernel", "configuration", "worst error / bound", "verdict"]
    body = [
        [
            r["name"], str(r["batch"]), "x".join(map(str, r["block_shape"])), r.get("kernel", ""),
            config_text(r.get("config", {})), f"{r['worst_over_bound']:.2f}" if "worst_over_bound" in r else "",
            "right" if r["match"] else "**wrong**: " + "; ".join(r.get("errors", [])).replace("|", "/")[:300],
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Every configuration: microseconds beside its floors, and beside the dense layer; the fastest in bold."""
    header = ["layer", "kernel", "configuration", "p50 [us]", "L2", "memory", "matrix", "issue", "tags",
              "predicted [us]", "dense [us]", "verdict"]  # fmt: skip
    best: dict[str, float] = {}
    for r in rows:
        if r["match"] and "p50_ms" in r:
            best[r["name"]] = min(best.get(r["name"], float("inf")), r["p50_ms"])
    body = []
    for r in rows:
        time = f"{1e3 * r['p50_ms']:.1f}" if "p50_ms" in r else ""
        body.append(
            [
                r["name"], r["kernel"], config_text(r["config"]),
                f"**{time}**" if time and best.get(r["name"]) == r["p50_ms"] else time,
                *(f"{r[key]:.1f}" if key in r else "" for key in FLOORS), f"{1e3 * r['dense_p50_ms']:.1f}",
                "right" if r["match"] else "**wrong**: " + "; ".join(r.get("errors", [])).replace("|", "/")[:300],
            ]
        )  # fmt: skip
    return table(header, body)


def counters_table(rows: list[dict[str, Any]]) -> str:
    """Hardware counters, one column a profiled kernel."""
    names = list(dict.fromkeys(name for r in rows for name in r["metrics"]))
    header = ["counter", *(f"{r['name']} {config_text(r['config'])}" for r in rows)]
    return table(header, [[n, *(f"{r['metrics'][n]:.6g}" if n in r["metrics"] else "" for r in rows)] for n in names])


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """What each network spends in which kernels, ours and those of the fastest dense one."""
    body = [
        [r["name"], side, t["name"][:90].replace("|", "/"), f"{t['calls']:g}", f"{t['us']:.1f}"]
        for r in rows
        for side, key in (("ours", "kernel_times"), ("dense", "dense_kernel_times"))
        for t in r.get(key) or []
    ]
    return table(["row", "side", "kernel", "launches", "all of them [us]"], body)


def one_launch_table(rows: list[dict[str, Any]]) -> str:
    """Each way to serve a network at small batches, beside the plain CUDA graph and the fastest dense engine."""
    header = ["batch", "way", "in one launch", "kernels a call", "kernels alone, p50 [us]", "served, p50 [us]",
              "over the graph", "best dense", "its p50 [us]", "over dense", "error / modules' error"]  # fmt: skip
    dense = {r["name"]: r for r in rows if r["suite"] == "dense"}
    ways = [r for r in rows if r["suite"] == "one_launch"]
    graph = {r["name"]: r["p50_ms"] for r in ways if r["way"] == "graph"}
    body = []
    for r in sorted(ways, key=lambda r: int(r["name"][1:])):
        beside, plain = dense.get(r["name"]), graph.get(r["name"])
        times = beside["baselines_p50_ms"] if beside else {}
        body.append(
            [
                r["name"][1:], r["way"], "; ".join(r["in_one_launch"]), str(r["kernels"]), f"{1e3 * r['p50_ms']:.1f}",
                f"{1e3 * r['served_p50_ms']:.1f}", f"{plain / r['p50_ms']:.2f}x" if plain else "",
                min(times, key=times.__getitem__, default=""), f"{1e3 * beside['p50_ms']:.1f}" if beside else "",
                f"**{beside['p50_ms'] / r['p50_ms']:.2f}x**" if beside else "", f"{r['error_ratio']:.2f}",
            ]
        )  # fmt: skip
    return table(header, body)


def tensor_cores_table(rows: list[dict[str, Any]]) -> str:
    """Kernels of CUDA C++ that `auto` does not choose, layer by layer, beside the one that it does."""
    header = ["layer", "batch", "blocks", "auto's kernel", "its p50 [us]", "kernel", "configuration", "p50 [us]",
              "over auto's", "expected [us]", "worst error / bound"]  # fmt: skip
    autos = {(r["stage"], r["name"]): r for r in rows if "__cuda" not in r["kernel"]}
    body = []
    for r in rows:
        auto = autos.get((r["stage"], r["name"]))
        if r is auto:
            continue
        body.append(
            [
                r["name"], str(r["problem"]["n"]), "x".join(map(str, r["problem"]["block_shape"])),
                auto["kernel"] if auto else "", f"{1e3 * auto['p50_ms']:.1f}" if auto else "", r["kernel"],
                setting(r["config"]), f"{1e3 * r['p50_ms']:.1f}",
                f"{auto['p50_ms'] / r['p50_ms']:.2f}x" if auto else "",
                f"{r['expected_us']:.1f}" if "expected_us" in r else "", f"{r['worst_over_bound']:.2f}",
            ]
        )  # fmt: skip
    return table(header, body)


def trainer_table(rows: list[dict[str, Any]]) -> str:
    """A step of the training loop, launched from Python and as a CUDA graph."""
    header = ["training", "batch", "from Python [ms]", "CUDA graph [ms]", "kernels alone [ms]", "images/s"]
    body = [
        [r["name"], str(r["batch"]), f"{r['from_python_ms']:.1f}", f"{r['graph_ms']:.1f}",
         f"{r['gpu_ms']:.1f}" if "gpu_ms" in r else "", f"{r['graph_images_per_s']:.0f}"]
        for r in rows
    ]  # fmt: skip
    return table(header, body)


def tests_table(rows: list[dict[str, Any]]) -> str:
    """How many tests passed, failed, were skipped or not reached."""
    header = ["stage", "passed", "failed", "skipped", "not reached"]
    totals = [r for r in rows if "passed" in r]
    return table(
        header, [[r["stage"], *(str(r[k]) for k in ("passed", "failed", "skipped", "not_reached"))] for r in totals]
    )


def failures_table(rows: list[dict[str, Any]]) -> str:
    """Tests that failed, each with what it said."""
    failed = [r for r in rows if r["outcome"] == "failed"]
    return table(["failed test", "stage", "message"],
                 [[r["name"], r["stage"], r.get("message", "").replace("|", "/")[:200]] for r in failed])  # fmt: skip


def sanitizer_table(rows: list[dict[str, Any]]) -> str:
    """What the sanitizers said."""
    body = [[r["name"], f"{r['kernels']} of {r['of']}", r["summary"]] for r in rows]
    return table(["tool", "kernels", "summary"], body)


def stages_table(stages: list[dict[str, Any]]) -> str:
    """Every stage: seconds of its limit, and how it ended."""
    body = [[s["stage"], str(s["call"]), f"{s['seconds']} / {s['limit']}", s["status"]] for s in stages]
    return table(["stage", "call", "seconds", "ended"], body)


def sections(record: dict[str, Any]) -> list[str]:
    """Titles and tables of what a GPU check adds to a record; empty for any other record."""

    def own(suite: str) -> list[dict[str, Any]]:
        return [r for r in record["rows"] if r["suite"] == suite]

    parts: list[str] = []
    for suite, title, make in (
        ("correctness", "Correctness of what was timed", correctness_table),
        ("sweep", "Configurations, layer by layer", sweep_table),
        ("vgg", "Kernels of the networks", kernels_table),
        ("backward", "Kernels of a training step", kernels_table),
        ("trainer", "The training loop", trainer_table),
        ("one_launch", "Ways to serve VGG-19 at small batches", one_launch_table),
        ("tensor_cores", "CUDA C++ on tensor cores beside auto's kernels", tensor_cores_table),
        ("counters", "Hardware counters", counters_table),
        ("tests", "GPU tests", tests_table),
        ("test", "Failed tests", failures_table),
        ("sanitizer", "Sanitizers", sanitizer_table),
    ):
        rows = own(suite)
        if make is one_launch_table:
            rows += own("dense")
        if make is kernels_table:
            rows = [r for r in rows if r.get("kernel_times")]
        if rows and (suite != "test" or any(r["outcome"] == "failed" for r in rows)):
            parts += [f"## {title}\n", make(rows)]
    if record.get("stages"):
        parts += ["## Stages\n", stages_table(record["stages"])]
    return parts
