"""Which configuration of each layer is fastest, and what binds it? The distinct layers of some rows, the headline's
first, six configurations each, replayed from CUDA graphs and checked against float64.

Every row carries the cost model's limits at the measured ceilings: L2, memory, matrix units, issue slots, L1 tags, and
its prediction. The kernels as first written were expected at two to three times the L2 limit, with one block a
processor. The fastest of each layer goes into a tuned table of the device, which `slimkernels` reads where
SLIMKERNELS_CACHE_DIR points there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from gpu_check import layers, measure, options, rows
from gpu_check.summary import FLOORS, config_text
from slimkernels import timing
from slimkernels.dispatch.devices import device_name
from slimkernels.dispatch.select import KernelChoice, configurations, predicted_seconds
from slimkernels.dispatch.tables import Entry, Table, gpu_rates
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem, problem_json

CONFIGURATIONS = 6
_TILE = ("BLOCK_M", "BLOCK_N", "num_warps")


def ways(p: ConvProblem | FusedConvProblem) -> list[KernelChoice]:
    """The configurations to time: what ``auto`` runs, of its kernel one of each tile, and one of each other kernel.

    Of several with the same tile the likeliest comes first; the second ones fill what is left.
    """
    index = torch.cuda.current_device() if p.device == "cuda" else -1
    auto = layers.choice_of(p)
    likeliest = sorted(configurations(p), key=lambda way: predicted_seconds(way[0], p, way[1], index))
    tiles: Counter[tuple[Any, ...]] = Counter()
    ranked: list[tuple[int, KernelChoice]] = []
    for spec, config in likeliest:
        tile = (spec.name, *(config.get(k) for k in _TILE)) if spec.name == auto.name else (spec.name,)
        ranked.append((tiles[tile], KernelChoice(spec.name, config)))
        tiles[tile] += 1
    ranked.sort(key=lambda pair: pair[0])
    unique = {layers.choice_key(p, c.name, c.config): c for c in [auto, *(choice for _, choice in ranked)]}
    return list(unique.values())[:CONFIGURATIONS]


def dense_seconds(bench: layers.Bench) -> float:
    """The dense layer with ReLU and max-pool, as torch runs them."""
    pool = bench.problem.epilogue == "relu_maxpool2"

    def call() -> torch.Tensor:
        y = F.relu_(bench.dense(bench.x))
        return F.max_pool2d(y, 2) if pool else y

    with torch.no_grad():
        return measure.replay_timing(call, bench.problem.device, bursts=5).p50


def sweep_layer(p: ConvProblem | FusedConvProblem, rows_path: Path | None) -> Entry | None:
    """Measures one layer, its rows written as they come; the fastest that is right, None where none is."""
    bench = layers.Bench(p)
    dense = dense_seconds(bench)
    best: tuple[float, KernelChoice] | None = None
    choices = ways(p)
    for choice in choices:
        row = {"suite": "sweep", "name": layers.layer_name(p), "problem": problem_json(p), "kernel": choice.name,
               "config": dict(choice.config), "key": layers.choice_key(p, choice.name, choice.config), "batch": p.n,
               "block_shape": list(p.block_shape), "dense_p50_ms": dense * 1e3, "match": False}  # fmt: skip
        try:
            result = bench.compare(bench.call(choice))
            row |= {"match": result.passed, "worst_over_bound": result.worst_over_bound}
            if not result.passed:
                row["errors"] = [result.message]
            timed = measure.replay_timing(lambda choice=choice: bench.call(choice), p.device)
            row |= timed.as_ms()
            if isinstance(p, ConvProblem) and p.device == "cuda" and "BLOCK_M" in choice.config:
                one_position = KERNELS[choice.name].one_position
                row |= measure.floors_us(p, choice.config, gpu_rates(0), one_position=one_position)
            if result.passed and (best is None or timed.p20 < best[0]):
                best = timed.p20, choice
        except Exception as error:  # a configuration that cannot run is a row, and the others go on
            row["errors"] = [f"{type(error).__name__}: {error}"[:500]]
        rows.append(rows_path, row)
        print(line(row))
    if best is None:
        return None
    return Entry(p, best[1].name, dict(best[1].config), best[0], dense, len(choices))


def line(row: dict) -> str:
    """One configuration in a line: microseconds, then its floors."""
    text = f"{row['name']:<8} {row['kernel']} {config_text(row['config'])}:"
    if "p50_ms" in row:
        text += f" {1e3 * row['p50_ms']:.1f} us"
    floors = [f"{key[:-3]} {row[key]:.1f}" for key in FLOORS if key in row]
    return " ".join([text, *floors, *row.get("errors", [])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="the table goes to STATE/swept/tuned/<device>.json")
    parser.add_argument("--names", nargs="*", default=list(layers.SWEPT_ROWS), help="of gpu_check.layers.ROWS")
    parser.add_argument("--batch", type=int, default=None, help="instead of 1024 (for a rehearsal)")
    parser.add_argument("--layers", type=int, default=None, help="only so many layers")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    torch.backends.cudnn.benchmark = True
    name = device_name(parsed.device)
    table = Table(name, {k: v for k, v in timing.environment().items() if k not in ("argv", "platform")})
    if parsed.device == "cuda":
        table.rates = gpu_rates(0)
    wrong = []
    problems = [p for row in parsed.names for p in layers.ROWS[row].every(parsed.device)[: parsed.layers]]
    for p in dict.fromkeys(layers.at_batch(p, parsed.batch) for p in problems):
        try:
            entry = sweep_layer(p, parsed.rows)
        except Exception as error:  # out of memory, say: the other layers go on
            print(f"{layers.layer_name(p)}: {type(error).__name__}: {error}")
            entry = None
        if entry is None:
            wrong.append(layers.layer_name(p))
            continue
        assert entry.kernel in KERNELS
        table.put(entry)
        table.save(parsed.state / "swept" / "tuned" / f"{name}.json")
    if wrong:
        raise SystemExit(f"no configuration is right: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
