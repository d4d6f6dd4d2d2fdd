"""The ranks of every layer that `factorize_` takes: asked for, by energy, by VBMF, or within a budget."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.compress.allocation import least_cost
from slimkernels.compress.factorization.decompositions import float64, tai_matrix, unfold_in, unfold_out
from slimkernels.compress.factorization.layer_costs import (
    Budget,
    Call,
    factor_params,
    macs,
    measured_seconds,
    predicted_seconds,
    recorded_calls,
)
from slimkernels.compress.factorization.ranks import (
    RankOption,
    energy_rank,
    lost_shares,
    rank_for_budget,
    rank_multiple,
    rounded_rank,
    squared_spectrum,
    vbmf_rank_of,
)
from slimkernels.compress.factorization.whitening import moment_spectrum

Ranks = tuple[int, ...]  # a pair is (rank_out, rank_in), the order in which `decompositions.tucker2` takes them

_MEASURED_OPTIONS = 5  # times are nearly linear in the rank: the others are interpolated


@dataclass
class FactorizableLayer:
    """A layer that has a low-rank twin.

    Attributes:
        name: in the model.
        module: nn.Linear or nn.Conv2d.
        kind: as in `formats.LowRankWeight`.
        explicit: whether its exact name was given.
        moment: second moment of its outputs, where calibration data were given and the kind is "svd".
        multiple: what its rank is rounded to.
    """

    name: str
    module: Any
    kind: str
    explicit: bool = False
    moment: Tensor | None = field(default=None, repr=False)
    asked_multiple: int | None = None

    @property
    def dense(self) -> Tensor:
        """The weight in float64."""
        return self.module.weight.detach().double()

    def check_finite(self) -> None:
        """Raises ValueError, naming the layer, unless every weight is finite."""
        float64(f"factorize_: layer {self.name!r}", self.module.weight, self.module.weight.dim())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.module.weight.shape)

    @property
    def multiple(self) -> int:
        """What the rank is rounded to."""
        return self.asked_multiple or rank_multiple(self.module.weight.device)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """The matrices whose ranks are chosen: one, or for "tucker2" those of outputs and of inputs."""
        if self.kind == "tucker2":
            return unfold_out(self.dense), unfold_in(self.dense)
        return (tai_matrix(self.dense) if self.kind == "tai" else self.dense.flatten(1),)

    @cached_property
    def spectra(self) -> tuple[Tensor, ...]:
        """Squared singular values of `matrices`, falling; eigenvalues of the output moment where there is one."""
        if self.moment is not None:
            return (moment_spectrum(self.moment)[: self.full_rank],)
        return tuple(squared_spectrum(matrix, self.module.weight.dtype) for matrix in self.matrices)

    @property
    def full_rank(self) -> int:
        """Of the first of `matrices`."""
        shape = self.shape
        if self.kind == "tai":
            return min(shape[1] * shape[2], shape[0] * shape[3])
        return min(shape[0], math.prod(shape[1:]))

    @property
    def largest(self) -> int:
        """The largest rank with fewer weights than the dense layer (one rank only); 0 where there is none."""
        return min((self.module.weight.numel() - 1) // factor_params(self.shape, self.kind, (1,)), self.full_rank)

    def rounded(self, ranks: Ranks) -> Ranks:
        """Ranks rounded up to multiples, or as they are where that would make the layer as large as a dense one."""
        if self.kind != "tucker2":
            return (rounded_rank(ranks[0], self.multiple, self.largest),)
        n, c = self.shape[:2]
        pair = rounded_rank(ranks[0], self.multiple, n), rounded_rank(ranks[1], self.multiple, c)
        pair = feasible_pair(self.shape, *pair)
        return pair if factor_params(self.shape, self.kind, pair) < self.module.weight.numel() else ranks

    def by_energy(self, energy: float) -> Ranks:
        """Smallest ranks that keep the share; of "tucker2" each mode may lose half of the rest."""
        if self.kind == "tucker2":  # the squared error of the HOSVD is at most the sum of what the modes lose
            per_mode = 0.5 * (1.0 + energy)
            pair = (energy_rank(s, per_mode) for s in self.spectra)
            return self.rounded(feasible_pair(self.shape, *pair))
        return self.rounded((energy_rank(self.spectra[0], energy),))

    def by_vbmf(self) -> Ranks:
        """`ranks.vbmf_rank` of every matrix, at least 1."""
        found = tuple(max(1, vbmf_rank_of(matrix, self.module.weight.dtype)) for matrix in self.matrices)
        return self.rounded(feasible_pair(self.shape, *found) if self.kind == "tucker2" else found)

    def options(self) -> list[tuple[Ranks, float]]:
        """Ranks worth offering, smallest first, and the share of energy each loses (of "tucker2" at most)."""
        if self.kind == "tucker2":
            return self._pairs()
        lost, largest = lost_shares(self.spectra[0]), self.largest
        ranks = range(self.multiple, largest + 1, self.multiple) if largest >= self.multiple else range(1, largest + 1)
        return [((rank,), float(lost[min(rank, len(lost) - 1)])) for rank in ranks]

    def _pairs(self) -> list[tuple[Ranks, float]]:
        """For every rank of the outputs the smallest rank of the inputs that loses no more."""
        c, full = self.shape[1], self.full_rank
        lost_out, lost_in = (lost_shares(spectrum) for spectrum in self.spectra)
        found: dict[Ranks, float] = {}
        whole = {*range(self.multiple, full, self.multiple), full}
        for rank_out in sorted(whole if full > self.multiple else range(1, full + 1)):
            wanted = float(lost_out[rank_out])
            needed = max(1, int((lost_in > wanted).sum()))
            pair = feasible_pair(self.shape, rank_out, rounded_rank(needed, self.multiple, c))
            if factor_params(self.shape, self.kind, pair) < self.module.weight.numel():
                found[pair] = min(1.0, float(lost_out[pair[0]] + lost_in[pair[1]]))
        return list(found.items())


def feasible_pair(shape: Sequence[int], rank_out: int, rank_in: int) -> tuple[int, int]:
    """Tucker-2 ranks capped at the channels, and at the rank that the other mode leaves; that loses nothing."""
    n, c, kh, kw = shape
    rank_out, rank_in = min(rank_out, n), min(rank_in, c)
    rank_out = min(rank_out, rank_in * kh * kw)
    return rank_out, min(rank_in, rank_out * kh * kw)


def asked_ranks(layer: FactorizableLayer, rank: Any) -> Ranks:
    """The ranks a caller named for a layer: a pair comes in the order the factors run, ``(rank_in, rank_out)``.

    Raises:
        TypeError: no int, and no pair of ints. ValueError: below 1, or a pair for one rank.
    """
    op = f"factorize_: layer {layer.name!r}"
    rank = tuple(rank) if isinstance(rank, list) else rank
    pair: Any = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or any(isinstance(r, bool) or not isinstance(r, int) for r in pair):
        raise TypeError(f"{op}: expected rank to be an int or, for 'tucker2', (rank_in, rank_out), got {rank!r}")
    if min(pair) < 1:
        raise ValueError(f"{op}: expected rank of at least 1, got {rank}")
    if layer.kind == "tucker2":
        return pair[::-1] if isinstance(rank, tuple) else feasible_pair(layer.shape, *pair)
    if isinstance(rank, tuple):
        raise ValueError(f"{op}: expected one rank for {layer.kind!r}, got {rank}")
    return pair[:1]


def ranks_within(
    model: nn.Module,
    layers: Sequence[FactorizableLayer],
    budget: Budget,
    example_inputs: Any,
    build: Callable[[FactorizableLayer, Ranks], nn.Module],
    extra_params: Mapping[str, tuple[int, int]],
) -> dict[str, Ranks | None]:
    """Ranks of every layer (None: it stays dense) with which the model keeps to the budget.

    Args:
        build: makes the low-rank twin, for the stopwatch.
        extra_params: parameters and bytes that factorizing a layer adds beside its factors (batch norm).

    Raises:
        ValueError: the budget is below what the smallest ranks cost, or sizes of activations are needed and no example
            inputs were given.
    """
    if budget.needs_inputs and example_inputs is None:
        raise ValueError(f"factorize_: expected example_inputs with a budget of {budget.resource}, got None")
    by_name = {layer.name: layer for layer in layers}
    offered = {layer.name: layer.options() for layer in layers}
    total, fixed, costs = _costs(model, by_name, offered, budget, example_inputs, build, extra_params)
    options = {}
    for name, (dense, sized) in costs.items():
        found = [RankOption(r, cost, lost) for (r, lost), cost in zip(offered[name], sized, strict=True)]
        options[name] = [*found, RankOption(None, dense, 0.0)]
    shares = budget.resource in ("flops", "latency") or (budget.resource == "parameters" and budget.amount <= 1)
    allowed = budget.amount * total if shares else budget.amount
    least = least_cost(list(options.values())) + fixed
    if least > allowed:
        raise ValueError(
            f"factorize_: expected a budget of at least {least:.6g} {budget.resource} "
            f"({least / total:.1%} of the model), what the smallest ranks leave, got {allowed:.6g}"
        )
    taken = rank_for_budget(options, allowed - fixed)
    return {name: option.ranks for name, option in taken.items()}


_Costs = dict[str, tuple[float, list[float]]]  # layer -> (dense, per option)


def _costs(
    model: nn.Module,
    layers: Mapping[str, FactorizableLayer],
    offered: Mapping[str, list[tuple[Ranks, float]]],
    budget: Budget,
    example_inputs: Any,
    build: Callable[[FactorizableLayer, Ranks], nn.Module],
    extra_params: Mapping[str, tuple[int, int]],
) -> tuple[float, float, _Costs]:
    """``(whole model as it is, what no choice changes, costs of every layer)`` in the budget's resource."""
    costs: _Costs = {}
    if budget.resource in ("parameters", "bytes"):
        tensors = list(model.parameters()) if budget.resource == "parameters" else _state(model)
        of_bytes = budget.resource == "bytes"
        total = sum(t.numel() * (t.element_size() if of_bytes else 1) for t in tensors)
        for name, layer in layers.items():
            size = layer.module.weight.element_size() if of_bytes else 1
            extra = extra_params.get(name, (0, 0))[of_bytes]
            sized = [float(factor_params(layer.shape, layer.kind, r) * size + extra) for r, _ in offered[name]]
            costs[name] = float(layer.module.weight.numel() * size), sized
        return total, total - sum(dense for dense, _ in costs.values()), costs
    weighted = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    calls = recorded_calls(model, weighted, example_inputs)
    for name, layer in layers.items():
        ranks = [r for r, _ in offered[name]]
        if budget.resource == "flops":
            every = [float(macs(layer.module, layer.kind, r, calls[name])) for r in (None, *ranks)]
        elif budget.measure:
            every = _measured(layer, ranks, calls[name], build)
        else:
            every = [predicted_seconds(layer.module, layer.kind, r, calls[name]) for r in (None, *ranks)]
        costs[name] = every[0], every[1:]
    fixed = 0.0
    if budget.resource == "flops":
        fixed = float(sum(macs(weighted[n], "svd", None, calls[n]) for n in weighted if n not in layers))
    return fixed + sum(dense for dense, _ in costs.values()), fixed, costs


def _state(model: nn.Module) -> list[Tensor]:
    """Everything a checkpoint of the model holds, each tensor once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return list(tensors.values())


def _measured(
    layer: FactorizableLayer,
    ranks: Sequence[Ranks],
    calls: Sequence[Call],
    build: Callable[[FactorizableLayer, Ranks], nn.Module],
) -> list[float]:
    """Seconds dense and at every rank, most of the latter interpolated in the number of weights."""
    count = min(len(ranks), _MEASURED_OPTIONS)
    picked = sorted({round(i * (len(ranks) - 1) / max(count - 1, 1)) for i in range(count)})
    modules = [copy.deepcopy(layer.module), *(build(layer, ranks[i]) for i in picked)]
    with torch.random.fork_rng(devices=[]):
        dense, *found = measured_seconds(modules, calls, layer.module.weight)
    weights = [factor_params(layer.shape, layer.kind, r) for r in ranks]
    known = list(zip([weights[i] for i in picked], itertools.accumulate(found, max), strict=True))
    return [dense, *(_interpolated(known, w) for w in weights)]


def _interpolated(known: Sequence[tuple[int, float]], x: int) -> float:
    """Linear between the known points, which are in rising order and span ``x``."""
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return known[-1][1]
