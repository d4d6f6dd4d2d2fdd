"""The table that ends a call: what a reader must know if nothing else comes home. At most 11 000 characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpu_check import rows

MOST_CHARACTERS = 11_000
FLOORS = ("l2_us", "memory_us", "matrix_us", "issue_us", "tags_us", "predicted_us")
_MESSAGE = 160
_ERROR = re.compile(r"[\w.]+(Error|Exception|Failed)\b")
STALL = "smsp__average_warps_issue_stalled_"


def _ms(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "-" if value is None else f"{value:.3g}"


def config_text(config: Mapping[str, int]) -> str:
    """A configuration in a few characters: ``256x128x64 w8 s4``."""
    tile = "x".join(str(config[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in config)
    short = {"num_warps": "w", "num_stages": "s", "SPLITS": "split", "GROUP_M": "group"}
    rest = [
        f"{short.get(k, k.lower())}{v}"
        for k, v in config.items()
        if not k.startswith("BLOCK_") and (k, v) != ("SPLITS", 1)
    ]
    return " ".join(filter(None, [tile, *rest])) or "default"


def stage_lines(result: Mapping[str, Any]) -> list[str]:
    """Every stage with its seconds and how it ended."""
    return [
        f"{s['stage']:<12} call {s['call']} {s['seconds']:6.1f}/{s['limit']:<3d} s  {s['status']}"
        + (f", {s['compiled']} compiled" if s.get("compiled") else "")
        + (f" ({s['note']})" if s.get("note") else "")
        for s in result["stages"]
    ]


def ceiling_lines(found: list[dict[str, Any]]) -> list[str]:
    """Measured ceilings beside those that the cost model had."""
    lines = []
    for r in rows.of_suite(found, "ceilings"):
        expected = "" if not r.get("predicted_rate") else f" (cost model {r['predicted_rate']:.3g})"
        lines.append(f"{r['what']}: {r['rate']:.3g} {r['unit']}{expected}")
    return lines


def correctness_lines(found: list[dict[str, Any]]) -> list[str]:
    """Counts by row of the plan, then what is wrong."""
    checks = rows.of_suite(found, "correctness")
    lines = []
    for name in dict.fromkeys(r.get("row", "") for r in checks):
        own = [r for r in checks if r.get("row", "") == name]
        lines.append(f"{name}: {sum(r['match'] for r in own)} of {len(own)} layers right")
    for r in (r for r in checks if not r["match"]):
        lines.append(f"WRONG {r.get('row', '')} {r['name']}: {'; '.join(r['errors'])[:_MESSAGE]}")
    return lines


def network_lines(found: list[dict[str, Any]]) -> list[str]:
    """Whole networks, training and low-rank rows: ours, the fastest dense one, the ratio."""
    lines = []
    for r in rows.of_suite(found, "vgg", "backward", "low_rank"):
        baselines = r.get("baselines_p50_ms") or {}
        best = min(baselines, key=lambda k: baselines[k]) if baselines else "masked dense"
        what = r.get("network") or r.get("layer")
        lines.append(
            f"[{r['stage']}] {what} b{r.get('batch', '')} {r.get('sparsity', '')} {r.get('block_shape', '')}: "
            f"{_ms(r, 'p50_ms')} ms, dense {_ms(r, 'dense_p50_ms')} ({best}), {r['speedup']:.2f}x, "
            f"predicted {_ms(r, 'predicted_ms')}, kernels {r.get('kernels', '-')}"
        )
        beside = r.get("beside_p50_ms") or {}
        others = ", ".join(f"{k} {v:.3g}" for k, v in (baselines | beside).items())
        lines += [f"    {others}"] if len(baselines | beside) > 1 else []
    return lines


def sweep_lines(found: list[dict[str, Any]]) -> list[str]:
    """The default and the fastest configuration of each layer, with the floors of the fastest."""
    measured = rows.of_suite(found, "sweep")
    lines = []
    for name in dict.fromkeys(r["name"] for r in measured):
        own = [r for r in measured if r["name"] == name and "p50_ms" in r]
        if not own:
            lines.append(f"{name}: nothing ran: {'; '.join(measured[0].get('errors', []))[:_MESSAGE]}")
            continue
        best = min(own, key=lambda r: (not r["match"], r["p50_ms"]))
        floors = " ".join(f"{k[:-3]} {best[k]:.0f}" for k in FLOORS if k in best)
        lines.append(
            f"{name}: first {1e3 * own[0]['p50_ms']:.1f} us, best {1e3 * best['p50_ms']:.1f} us "
            f"{best['kernel'].removeprefix('bsr_conv2d__')} {config_text(best['config'])}; floors {floors}; "
            f"dense {1e3 * best['dense_p50_ms']:.0f} us" + ("" if best["match"] else " WRONG")
        )
    return lines


_SHOWN = ("variant", "stages", "barrier", "group", "images", "overlap")


def setting(config: Mapping[str, int]) -> str:
    """A configuration of a kernel of CUDA C++ as text."""
    return " ".join(f"{key} {config[key]}" for key in _SHOWN if key in config)


def tensor_core_line(row: Mapping[str, Any]) -> str:
    """Layer, kernel, configuration, microseconds, and what went wrong."""
    named = [setting(row["config"])] if row["config"] else []
    time = [f"{1e3 * row['p50_ms']:.1f} us"] if "p50_ms" in row else []
    wrong = ["WRONG"] if time and not row["match"] else []
    kernel = row["kernel"].partition("__")[2]
    return " ".join([f"{row['name']:<8} {kernel}:", *time, *named, *wrong, *row.get("errors", [])])[:_MESSAGE]


def tensor_core_lines(found: list[dict[str, Any]]) -> list[str]:
    """Each layer: ``auto``, then the kernels of CUDA C++."""
    return [tensor_core_line(r) for r in rows.of_suite(found, "tensor_cores")]


def one_launch_lines(found: list[dict[str, Any]]) -> list[str]:
    """Each way to serve the network: its kernels' time, that of calls, its error, and what runs in one launch."""
    lines = []
    graphs: dict[str, float] = {}  # of each batch size, of `auto`'s kernels
    for r in rows.of_suite(found, "one_launch"):
        parts = [f"{r['name']} {r['way']}:"]
        if "p50_ms" in r:
            graph = graphs.setdefault(r["name"], r["p50_ms"])
            parts.append(
                f"{1e3 * r['p50_ms']:.1f} us ({graph / r['p50_ms']:.2f}x), served {1e3 * r['served_p50_ms']:.1f}, "
                f"{r['kernels']} kernels, {r['error_ratio']:.2f} of the modules' error"
            )
        parts += [] if r["match"] else ["WRONG"]
        parts.append(", ".join(r.get("errors", []) or r.get("in_one_launch", [])))
        lines.append(" ".join(parts)[:240])
    return lines


def counter_lines(found: list[dict[str, Any]]) -> list[str]:
    """The counters of the profiled kernels, then what their warps wait for, the longest waits first."""
    lines = []
    for r in rows.of_suite(found, "counters"):
        stalls = {k.split(STALL)[1].split("_per_issue")[0]: v for k, v in r["metrics"].items() if STALL in k}
        values = " ".join(f"{k.split('__', 1)[1]} {v:.4g}" for k, v in r["metrics"].items() if STALL not in k)
        lines.append(f"{r['name']} {config_text(r['config'])}: {values}"[:900])
        if stalls:
            longest = sorted(stalls.items(), key=lambda item: -item[1])
            lines.append("    warps waiting for: " + " ".join(f"{k} {v:.2f}" for k, v in longest[:8]))
    return lines


def kernel_lines(found: list[dict[str, Any]]) -> list[str]:
    """The ten kernels of each network that take longest, ours and of the fastest dense one, in microseconds."""
    lines = []
    for r in rows.of_suite(found, "kernel_counts"):
        for side, key in (("ours", "kernel_times"), ("dense", "dense_kernel_times")):
            times = r.get(key) or []
            if times:
                total, count = sum(t["us"] for t in times), sum(t["calls"] for t in times)
                lines.append(f"[{r['stage']}] {r['name']} {side}: {total:.0f} us in {count:g} kernels")
                lines += [f"    {t['us']:.1f} us, {t['calls']:g} x {t['name'][:70]}" for t in times[:10]]
    return lines


def said(row: Mapping[str, Any]) -> str:
    """The line of a failed test's row that says what went wrong: its error, else one of the end of its message.

    Of the lines that pytest marks, the last that begins with an error's name (some errors go on with advice), else the
    last; without marks the last line of all.
    """
    if row.get("error"):
        return row["error"]
    lines = row.get("message", "").strip().splitlines() or [""]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    named = [line for line in marked if _ERROR.match(line)]
    return (named or marked or lines)[-1]


def test_lines(found: list[dict[str, Any]]) -> list[str]:
    """Passed, failed, skipped and not reached, by stage; then what failed."""
    lines = []
    tests = rows.of_suite(found, "test")
    for stage in dict.fromkeys(r["stage"] for r in tests):
        own = {r["name"]: r["outcome"] for r in tests if r["stage"] == stage}
        collected = next((r["count"] for r in rows.of_suite(found, "tests") if r["stage"] == stage), len(own))
        counts = {o: sum(v == o for v in own.values()) for o in ("passed", "failed", "skipped")}
        lines.append(f"{stage}: {counts}, {collected - len(own)} not reached")
    for r in [r for r in tests if r["outcome"] == "failed"][:12]:
        lines.append(f"FAILED {r['name']}: {said(r)[:_MESSAGE]}")
    for r in rows.of_suite(found, "sanitizer"):
        lines.append(f"{r['name']}: {r['kernels']} of {r['of']} kernels, {r['summary']}")
    return lines


def compile_lines(found: list[dict[str, Any]]) -> list[str]:
    """How many kernels were compiled, how fast, and which could not be."""
    lines = []
    for r in rows.of_suite(found, "compile"):
        if "error" in r:
            lines.append(f"FAILED {r['name']}: {r['error'][:_MESSAGE]}")
        else:
            lines.append(f"{r['kernels']} kernels, {r['failed']} failed, {r['seconds']:.0f} s")
    return lines[-8:]


SECTIONS: tuple[tuple[str, Callable[[list[dict[str, Any]]], list[str]]], ...] = (
    ("compiled", compile_lines), ("counters", counter_lines), ("kernels", kernel_lines), ("ceilings", ceiling_lines),
    ("sweep", sweep_lines), ("tensor_cores", tensor_core_lines), ("one launch", one_launch_lines),
    ("tests", test_lines), ("correctness", correctness_lines), ("networks", network_lines),
)  # fmt: skip


def summary(result: Mapping[str, Any]) -> str:
    """The table; the most important last, where a cut-off output still shows it."""
    parts = []
    for title, make in SECTIONS:
        try:
            lines = make(result["rows"])
        except (KeyError, TypeError, ValueError) as error:  # a row cut short must not cost the rest of the table
            lines = [f"not shown: {type(error).__name__}: {error}"]
        if lines:
            parts.append(f"== {title}\n" + "\n".join(lines)[:2600])
    parts.append("== stages\n" + "\n".join(stage_lines(result)))
    return "\n".join(parts)[-MOST_CHARACTERS:]
