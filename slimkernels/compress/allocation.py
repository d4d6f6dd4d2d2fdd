"""One way for every layer, all together within a budget, with little lost in total: the multiple-choice knapsack.

`allocate_exactly` tries everything, up to the rounding of costs, and suits a few coarse ways a layer: block shapes and
sparsities. `allocate_by_rate` is greedy and suits many fine ones: ranks, of which a layer has hundreds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch

# Costs are rounded up to this share of the budget before layers are added up: 20 layers cost at most 0.5 % of it.
_STEPS = 4096


class Way(Protocol):
    """A way to store or run a layer."""

    @property
    def cost(self) -> float:
        """In the unit of the budget."""

    @property
    def lost(self) -> float:
        """What it costs in accuracy, in a unit in which layers add up."""


AnyWay = TypeVar("AnyWay", bound=Way)


def least_cost(ways: Sequence[Sequence[Way]]) -> float:
    """What the cheapest ways of all layers cost together."""
    return sum(min(way.cost for way in choices) for choices in ways)


def allocate_exactly(ways: Sequence[Sequence[AnyWay]], budget: float) -> list[AnyWay]:
    """One way for each layer, the least lost in total among those whose costs fit into the budget.

    ``best[t]`` is the least loss of the layers so far in ``t`` steps of cost; each cost is rounded up to whole steps.

    Args:
        ways: of every layer, what loses nothing first.
        budget: at least `least_cost`.
    """
    if sum(choices[0].cost for choices in ways) <= budget * (1 + 1e-9):
        return [choices[0] for choices in ways]
    step = budget / _STEPS
    best = torch.zeros(_STEPS + 1, dtype=torch.float64)
    taken = []
    for choices in ways:
        table = torch.full((len(choices), _STEPS + 1), math.inf, dtype=torch.float64)
        for row, choice in zip(table, choices, strict=True):
            cost = math.ceil(choice.cost / step - 1e-9)
            if cost <= _STEPS:
                row[cost:] = best[: _STEPS + 1 - cost] + choice.lost
        best, index = table.min(0)
        taken.append(index)
    if not math.isfinite(float(best[-1])):  # it fits, but only without the rounding of costs
        return [min(choices, key=lambda way: (way.cost, way.lost)) for choices in ways]
    left, chosen = _STEPS, []
    for choices, index in zip(reversed(ways), reversed(taken), strict=True):
        choice = choices[int(index[left])]
        left -= math.ceil(choice.cost / step - 1e-9)
        chosen.append(choice)
    return chosen[::-1]


def allocate_by_rate(ways: Mapping[str, Sequence[AnyWay]], budget: float) -> dict[str, AnyWay]:
    """One way for each layer, with little lost in all.

    Every layer starts at its cheapest way. Steps along the lower convex hull of (cost, lost) are taken in falling order
    of what they gain per cost, the greedy solution of the relaxed multiple-choice knapsack (Sinha and Zoltners, 1979),
    then what is left of the budget is spent on the best single exchanges.

    Args:
        ways: of every layer, at least one, in any order.
        budget: at least `least_cost`.
    """
    hulls = {name: _lower_hull(choices) for name, choices in ways.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(way.cost for way in taken.values())
    steps: list[tuple[float, str, AnyWay]] = []
    for name, hull in hulls.items():
        rate = math.inf
        for a, b in itertools.pairwise(hull):
            rate = min(rate, (a.lost - b.lost) / (b.cost - a.cost))  # rounding must not put a later step first
            steps.append((rate, name, b))
    blocked: set[str] = set()
    for _, name, way in sorted(steps, key=lambda step: -step[0]):  # stable: equal rates stay in order
        extra = way.cost - taken[name].cost
        if name in blocked or extra > left:
            blocked.add(name)
            continue
        taken[name], left = way, left - extra
    while True:
        exchanges = [
            (taken[name].lost - way.lost, name, way)
            for name, choices in ways.items()
            for way in choices
            if way.lost < taken[name].lost and way.cost - taken[name].cost <= left
        ]
        if not exchanges:
            return taken
        _, name, way = max(exchanges, key=lambda exchange: exchange[0])
        left -= way.cost - taken[name].cost
        taken[name] = way


def _lower_hull(choices: Sequence[AnyWay]) -> list[AnyWay]:
    """Ways on the falling lower convex hull of (cost, lost), cheapest first."""
    hull: list[AnyWay] = []
    for way in sorted(choices, key=lambda w: (w.cost, w.lost)):
        if hull and way.lost >= hull[-1].lost:
            continue  # no cheaper and no better
        while len(hull) >= 2:
            (a, b), c = hull[-2:], way
            gain, next_gain = (a.lost - b.lost) * (c.cost - b.cost), (b.lost - c.lost) * (b.cost - a.cost)
            if gain >= next_gain * (1 - 1e-9):  # points on a line stay: small steps waste less of a budget
                break
            hull.pop()
        hull.append(way)
    return hull
