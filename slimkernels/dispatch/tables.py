"""Tuned tables: what was measured on a device, as JSON; loaded at the first use, never written by an op.

A table of a device lies in ``<cache>/tuned/<device>.json`` (`slimkernels tune` writes it) or ships in
``slimkernels/tuned/``; the user's own comes first. Elsewhere the nearest entry is taken: of this device's table the
problem nearest in size, or, with one warning that names the command, the table of another device of the same kind.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from slimkernels import env
from slimkernels.dispatch.break_even import Curve, break_even_json, curves
from slimkernels.dispatch.cpu_cost import CPU_RATES, CpuRates
from slimkernels.dispatch.devices import device_name
from slimkernels.dispatch.gpu_rates import KNOWN, GpuRates, scaled_rates
from slimkernels.files import atomic_path
from slimkernels.kernels.problems import (
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankLinearProblem,
    SizedProblem,
    problem_from_json,
    problem_json,
)

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent.parent / "tuned"


@dataclass(frozen=True)
class Entry:
    """The fastest kernel and configuration of one problem.

    Attributes:
        problem: what was measured.
        kernel: the name of the fastest kernel.
        config: its configuration.
        seconds: its time.
        dense_seconds: the dense layer with the same epilogue (of low rank, the merged layer).
        tried: kernels and configurations measured.
    """

    problem: SizedProblem
    kernel: str
    config: Mapping[str, int]
    seconds: float
    dense_seconds: float
    tried: int = 1

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        own = {k: v for k, v in vars(self).items() if k != "problem"}
        return {"problem": problem_json(self.problem), **own, "config": dict(self.config)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """An entry of plain data; raises ValueError or TypeError where a field is wrong."""
        entry = cls(**{**data, "problem": problem_from_json(data["problem"])})
        if not (entry.seconds > 0 and entry.dense_seconds > 0):
            raise ValueError(f"expected positive times, got {entry.seconds} and {entry.dense_seconds}")
        return replace(entry, config={str(k): int(v) for k, v in entry.config.items()})


@dataclass
class Table:
    """The tuned table of one device.

    Attributes:
        device: its name.
        environment: versions, processor, threads of the last measurement.
        entries: best kernels by problem.
        rates: fitted `CpuRates` or measured `GpuRates`, None where none.
    """

    device: str
    environment: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    rates: CpuRates | GpuRates | None = None

    def entry(self, problem: SizedProblem) -> Entry | None:
        """The entry of exactly this problem."""
        return next((e for e in self.entries if e.problem == problem), None)

    def put(self, entry: Entry) -> None:
        """Adds an entry in place of one of the same problem."""
        self.entries = [e for e in self.entries if e.problem != entry.problem] + [entry]

    def save(self, path: Path) -> None:
        """Writes the table, whole or not at all; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "format": FORMAT,
            "device": self.device,
            "environment": self.environment,
            "rates": None if self.rates is None else asdict(self.rates),
            "break_even": break_even_json(self.entries),
            "entries": [e.as_json() for e in self.entries],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(_compact_json(data))

    @classmethod
    def load(cls, path: Path) -> Table:
        """The table of a file.

        Raises:
            ValueError: not such a table, with the file and what is wrong. OSError: no such file.
        """
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {data['format']!r}")
            rates = data.get("rates")
            if rates is not None:
                rates = (CpuRates if "isa" in rates else GpuRates)(**rates)
            entries = [Entry.from_json(e) for e in data["entries"]]
            return cls(str(data["device"]), dict(data["environment"]), entries, rates)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"tuned table {path}: {type(error).__name__}: {error}") from error


def _compact_json(data: Mapping[str, Any]) -> str:
    """JSON with one entry a line: a changed measurement is one changed line."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(v, allow_nan=False) for v in value)
            lines.append(f' "{key}": [\n  {rows}\n ]' if value else f' "{key}": []')
        else:
            lines.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def user_path(device: str) -> Path:
    """Where `slimkernels tune` writes the table of a device."""
    return env.cache_dir() / "tuned" / f"{device}.json"


@lru_cache(maxsize=16)
def _load(path: Path, _changed: float) -> Table | None:
    try:
        return Table.load(path)
    except ValueError as error:
        warnings.warn(f"slimkernels: ignoring a damaged {error}", stacklevel=2)
        return None


def _read(path: Path) -> Table | None:
    try:
        changed = path.stat().st_mtime
    except OSError:
        return None
    return _load(path, changed)


def forget() -> None:
    """Drops what was loaded, so that the next use reads the files again."""
    table_for.cache_clear()
    _load.cache_clear()
    device_name.cache_clear()
    _layer_curves.cache_clear()
    _WARNED.clear()


_WARNED: set[str] = set()


def _warn_once(device: str, text: str) -> None:
    if device not in _WARNED:
        _WARNED.add(device)
        option = " --device cuda" if device.startswith("nvidia") else ""
        warnings.warn(f"slimkernels: {text}; `slimkernels tune{option}` measures this machine", stacklevel=3)


@lru_cache(maxsize=16)
def table_for(device: str, index: int = -1) -> tuple[Table | None, bool]:
    """``(table, own)`` of a device: the user's entries before the shipped ones; ``own`` False for another device's."""
    name = device_name(device, index)
    mine, shipped = _read(user_path(name)), _read(SHIPPED / f"{name}.json")
    if mine is not None and shipped is not None:
        known = {e.problem for e in mine.entries}
        entries = [*mine.entries, *(e for e in shipped.entries if e.problem not in known)]
        return Table(name, mine.environment, entries, mine.rates or shipped.rates), True
    if mine is not None or shipped is not None:
        return mine or shipped, True
    others = [_read(p) for p in sorted(SHIPPED.glob("*.json"))]
    kind = GpuRates if device == "cuda" else CpuRates
    return next((t for t in others if t is not None and isinstance(t.rates, kind)), None), False


def gpu_rates(index: int = -1) -> GpuRates:
    """Ceilings of a CUDA device: its table's, those of a known card, or the nearest card's scaled to this one."""
    table, own = table_for("cuda", index)
    if own and table is not None and isinstance(table.rates, GpuRates):
        return table.rates
    if not torch.cuda.is_available():
        return KNOWN[0]
    return scaled_rates(device_name("cuda", index), torch.cuda.get_device_properties(max(index, 0)))


def cpu_rates(isa: str) -> CpuRates:
    """Rates of this CPU with an instruction set: fitted ones where a table of that instruction set was measured."""
    table, _ = table_for("cpu")
    if table is not None and isinstance(table.rates, CpuRates) and table.rates.isa == isa:
        return table.rates
    return CPU_RATES[isa]


def sizes_of(problem: SizedProblem) -> tuple[float, ...]:
    """What the distance between problems of one op is taken over: outputs, channels, stored share."""
    if isinstance(problem, ConvProblem):
        pixels, taps = problem.n * problem.p * problem.q, problem.r * problem.s
        return pixels, problem.c_in, problem.c_out, taps, math.prod(problem.stride), max(problem.stored_share, 1e-4)
    if isinstance(problem, FusedConvProblem):
        return problem.rows, problem.c_in, problem.c_out, problem.r * problem.s, math.prod(problem.stride)
    if isinstance(problem, LinearProblem):
        return problem.m, problem.in_features, problem.out_features, max(problem.stored_share, 1e-4)
    if isinstance(problem, LowRankLinearProblem):
        return problem.m, problem.in_features, problem.out_features, problem.rank
    first, last = problem.factor_shapes[0], problem.factor_shapes[-1]
    return problem.n * problem.h * problem.w, first[1], last[0], first[0], first[2] * first[3]


def distance(a: SizedProblem, b: SizedProblem) -> float:
    """Doublings between two problems, summed over their sizes; infinite between those of different kernels' worlds."""
    kinds = [
        (p.op, p.dtype, p.device, p.block_shape, getattr(p, "kind", ""), p.epilogue == "relu_maxpool2") for p in (a, b)
    ]
    if kinds[0] != kinds[1]:
        return math.inf
    pairs = zip(sizes_of(a), sizes_of(b), strict=True)
    return sum(abs(math.log2(max(x, 1e-9) / max(y, 1e-9))) for x, y in pairs)


# Beyond four halvings or doublings in all, another batch at another width, a neighbour says little.
_FAR = 4.0


def nearest(problem: SizedProblem, index: int = -1) -> tuple[Entry, float] | None:
    """The entry that stands for a problem and its distance (0 for its own); None where none is near.

    Warns once a device where its own table lacks one.
    """
    table, own = table_for(problem.device, index)
    found = (
        min(((distance(problem, e.problem), i) for i, e in enumerate(table.entries)), default=None) if table else None
    )
    near = found is not None and found[0] <= _FAR
    if not own or not near:
        name = device_name(problem.device, index)
        what = "no tuned table" if not own else f"no tuned entry near {problem.op} {problem.block_shape}"
        _warn_once(
            name, f"{what} for {name}, {'the nearest entry of another device' if near else 'the cost model'} decides"
        )
    if not near or table is None or found is None:
        return None
    return table.entries[found[1]], found[0]


def layer_curves(
    weight_shape: Sequence[int], block_shape: tuple[int, int], dtype: torch.dtype, device: str
) -> list[Curve]:
    """Curves, one a tabulated size, of the tabulated layer nearest to a weight; empty where the table has none near.

    Near: the same number of taps, and input and output channels within four doublings in all.

    Args:
        weight_shape: ``(C_out, C_in, R, S)`` or ``(out, in)``.
    """
    table, own = table_for(device)
    if table is None or not own:
        return []
    return list(_layer_curves(device, tuple(weight_shape), block_shape, dtype))


@lru_cache(maxsize=256)
def _layer_curves(
    device: str, shape: tuple[int, ...], block_shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Curve, ...]:
    table, _ = table_for(device)
    assert table is not None
    groups: dict[tuple[int, ...], list[Curve]] = {}
    for curve in curves(e for e in table.entries if e.problem.block_shape == block_shape):
        problem = curve.problem
        if problem.dtype != dtype or problem.device != device:
            continue
        if isinstance(problem, ConvProblem) and problem.stride == (1, 1):
            groups.setdefault((problem.c_out, problem.c_in, problem.r, problem.s), []).append(curve)
        elif isinstance(problem, LinearProblem):
            groups.setdefault((problem.out_features, problem.in_features), []).append(curve)
    near = [
        (sum(abs(math.log2(a / b)) for a, b in zip(shape[:2], other[:2])), other)
        for other in groups
        if len(other) == len(shape) and other[2:] == shape[2:]
    ]
    best = min(near, default=(math.inf, ()))
    return tuple(groups[best[1]]) if best[0] <= _FAR else ()
