"""Break-even sparsities: measured times of one layer and size over its block sparsity, against the dense layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimkernels.kernels.problems import ConvProblem, LinearProblem, problem_json

if TYPE_CHECKING:
    from slimkernels.dispatch.tables import Entry


@dataclass(frozen=True)
class Curve:
    """Measured times of one layer and size over its block sparsity.

    Attributes:
        problem: of the first point.
        kernel: the fastest one at the sparsest point.
        dense_s: the dense layer.
        points: ``(block sparsity, seconds)``, ascending.
    """

    problem: ConvProblem | LinearProblem
    kernel: str
    dense_s: float
    points: tuple[tuple[float, float], ...]

    def seconds(self, sparsity: float) -> float:
        """Time at a block sparsity: linear between points and beyond, at least a tenth of the fastest."""
        points = self.points
        if len(points) == 1:
            return points[0][1]
        i = min(max(sum(s < sparsity for s, _ in points), 1), len(points) - 1)
        (s0, t0), (s1, t1) = points[i - 1], points[i]
        return max(t0 + (t1 - t0) * (sparsity - s0) / (s1 - s0), 0.1 * min(t for _, t in points))

    def break_even(self, speedup: float = 1.0) -> float | None:
        """Lowest block sparsity from which on the kernel is ``speedup`` times as fast as dense; None if nowhere."""
        wanted = self.dense_s / speedup
        if self.points[-1][1] > wanted:
            return None
        if all(t <= wanted for _, t in self.points):
            return 0.0 if self.seconds(0.0) <= wanted else self._crossing(0.0, self.points[0][0], wanted)
        last = max(i for i, (_, t) in enumerate(self.points) if t > wanted)
        return self._crossing(self.points[last][0], self.points[last + 1][0], wanted)

    def _crossing(self, low: float, high: float, wanted: float) -> float:
        a, b = self.seconds(low), self.seconds(high)
        return low + (high - low) * (a - wanted) / (a - b) if a > b else high


def _family(problem: ConvProblem | LinearProblem) -> ConvProblem | LinearProblem:
    """The problem without its sparsity and epilogue."""
    return replace(problem, nnz_blocks=0, epilogue="none")


def curves(entries: Iterable[Entry]) -> list[Curve]:
    """The block-sparse entries, grouped over sparsity."""
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        if isinstance(entry.problem, ConvProblem | LinearProblem):
            groups.setdefault(_family(entry.problem), []).append(entry)
    found = []
    for members in groups.values():
        # For mypy: entries of block-sparse problems alone get here.
        members = sorted(members, key=lambda e: -e.problem.stored_share)  # type: ignore[union-attr]
        # For mypy: entries of block-sparse problems alone get here.
        points: dict[float, float] = {round(1 - e.problem.stored_share, 6): e.seconds for e in members}  # type: ignore[union-attr]
        dense = sorted(e.dense_seconds for e in members)[len(members) // 2]
        # For mypy: entries of block-sparse problems alone get here.
        found.append(Curve(members[0].problem, members[-1].kernel, dense, tuple(points.items())))  # type: ignore[arg-type]
    return found


def break_even_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """For readers of the table: the break-even block sparsity of every layer, size and block shape; null where none."""
    rows = []
    for curve in curves(entries):
        problem = problem_json(curve.problem)
        problem.pop("nnz_blocks")
        found = curve.break_even()
        rows.append({**problem, "break_even": None if found is None else round(found, 3)})
    return rows
