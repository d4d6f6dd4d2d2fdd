"""How large a rank has to be: by energy, by variational Bayes, or by what a whole model may cost.

Everything here works on spectra and costs; `factorize` brings the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimkernels.compress.allocation import allocate_by_rate, least_cost
from slimkernels.compress.factorization.decompositions import float64

# The native kernels take eight float32 at a time; a tensor core's product has depth 16.
_MULTIPLES = {"cuda": 16}


def rank_multiple(device: torch.device | str) -> int:
    """What the kernels of a device like ranks to be multiples of: 16 on a GPU, 8 elsewhere."""
    return _MULTIPLES.get(torch.device(device).type, 8)


def rounded_rank(rank: int, multiple: int, largest: int) -> int:
    """``rank`` rounded up to a multiple, or as it is where that would exceed ``largest``."""
    up = -(-rank // multiple) * multiple
    return up if up <= largest else rank


def check_energy(op: str, energy: float) -> None:
    """Raises TypeError or ValueError, beginning with ``op``, unless energy is a number in (0, 1]."""
    if isinstance(energy, bool) or not isinstance(energy, (int, float)):
        raise TypeError(f"{op}: expected energy to be a number in (0, 1], got {energy!r}")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"{op}: expected energy in (0, 1], got {energy}")


def rank_by_energy(weight: Tensor, energy: float = 0.95) -> int:
    """Smallest rank whose truncated SVD keeps at least the share ``energy`` of the squared Frobenius norm.

    Singular values below ``max(out, in) * eps(dtype)`` of the largest count as zero, so ``energy=1`` gives the
    numerical rank. At least 1, for a zero matrix too.

    Args:
        weight: ``(out, in)``, floating point.
        energy: in (0, 1].

    Raises:
        ValueError: not a finite matrix, or energy out of range. TypeError: not floating point.
    """
    check_energy("rank_by_energy", energy)
    return energy_rank(squared_spectrum(float64("rank_by_energy", weight, 2), weight.dtype), energy)


def squared_spectrum(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared singular values, falling, of a float64 matrix given in ``dtype``; 0 where they are rounding noise."""
    s = torch.linalg.svdvals(_square(matrix))
    return torch.where(s > s[0] * max(matrix.shape) * torch.finfo(dtype).eps, s, 0.0).square()


def _square(matrix: Tensor) -> Tensor:
    """The triangular factor of a wide or tall matrix, which has its singular values at a fraction of the cost."""
    rows, cols = matrix.shape
    if max(rows, cols) < 2 * min(rows, cols):
        return matrix
    return torch.linalg.qr(matrix if rows > cols else matrix.t(), mode="r").R


def energy_rank(squares: Tensor, energy: float) -> int:
    """Smallest rank, at least 1, that keeps the share ``energy`` of the sum of a falling squared spectrum."""
    tail = squares.flip(0).cumsum(0).flip(0)  # tail[r]: what rank r loses
    return max(1, int((tail > (1.0 - energy) * tail[0]).sum()))


def lost_shares(squares: Tensor) -> Tensor:
    """``lost[r]``, the share of a squared spectrum's sum that rank r loses, for r from 0 to full; 0 if the sum is."""
    tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return tail / tail[0] if float(tail[0]) > 0 else tail


def vbmf_rank(weight: Tensor) -> int:
    """Rank by empirical variational Bayesian matrix factorization, the noise variance estimated with it.

    The global analytic solution of Nakajima, Sugiyama, Babacan and Tomioka (JMLR 14, 2013; EVB, theorem 2 and
    corollary 3): a singular value of an ``L x M`` matrix (L <= M, a = L / M) is signal where it exceeds
    ``sqrt(M v x)``, ``x = (1 + t) (1 + a / t)``, t the zero of ``log(1 + t) / t + log(1 + t / a) a / t - 1``, and the
    noise variance v minimises their free energy. Used for ranks by Kim et al., arXiv 1511.06530.

    Args:
        weight: ``(out, in)``, floating point.

    Returns:
        From 0 (all noise) to ``min(out, in)``.

    Raises:
        ValueError: not a finite matrix. TypeError: not floating point.
    """
    return vbmf_rank_of(float64("vbmf_rank", weight, 2), weight.dtype)


def vbmf_rank_of(matrix: Tensor, dtype: torch.dtype) -> int:
    """`vbmf_rank` of a float64 matrix given in ``dtype``, without its checks."""
    small, large = sorted(matrix.shape)
    singular = torch.linalg.svdvals(_square(matrix))
    if float(singular[0]) == 0.0:
        return 0
    ratio = small / large
    tau = _evb_tau(ratio)
    threshold = (1 + tau) * (1 + ratio / tau)
    floor = singular[0] * large * torch.finfo(dtype).eps  # below it a singular value is rounding, and log 0 is infinite
    squares = singular.clamp_min(float(floor)).square() / large
    kept = min(math.ceil(small / (1 + ratio)) - 1, small - 1)
    low = max(float(squares[kept]) / threshold, float(squares[kept:].mean()))
    high = float(squares.mean())
    low, high = math.log(min(low, high)), math.log(high)
    for _ in range(4):  # the free energy may have several minima: a grid, then finer ones around its best point
        grid = torch.linspace(low, high, 201, dtype=torch.float64, device=matrix.device)
        best = int(_evb_free_energy(squares, grid.exp(), ratio, threshold).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
    return int((squares > math.exp((low + high) / 2) * threshold).sum())


def _evb_tau(ratio: float) -> float:
    """The zero of ``phi(t) + phi(t / ratio)`` with ``phi(z) = log(z + 1) / z - 1 / 2``, by bisection: it falls."""
    low, high = 1e-9, 10.0
    for _ in range(80):
        t = (low + high) / 2
        value = math.log1p(t) / t + math.log1p(t / ratio) * ratio / t - 1.0
        low, high = (t, high) if value > 0 else (low, t)
    return (low + high) / 2


def _evb_free_energy(squares: Tensor, variances: Tensor, ratio: float, threshold: float) -> Tensor:
    """Free energy (up to constants) at every noise variance, ``(variances,)``; ``squares`` are singular^2 / M."""
    x = squares / variances[:, None]
    above = x.clamp_min(threshold)
    b = above - (1 + ratio)
    tau = 0.5 * (b + (b.square() - 4 * ratio).clamp_min(0).sqrt())
    signal = torch.log1p(tau) + ratio * torch.log1p(tau / ratio) - tau
    return (x - x.log() + torch.where(x > threshold, signal, 0.0)).sum(1)


@dataclass(frozen=True)
class RankOption:
    """One way to store a layer: its ranks (None: dense), what that costs, and the share of energy it loses."""

    ranks: tuple[int, ...] | None
    cost: float
    lost: float


def rank_for_budget(options: Mapping[str, Sequence[RankOption]], budget: float) -> dict[str, RankOption]:
    """One option per layer, together within the budget, with little energy lost in all.

    See `slimkernels.compress.allocation.allocate_by_rate`.

    Args:
        options: of every layer, in any order.
        budget: in the unit of the costs.

    Returns:
        The option of every layer; their costs add up to at most the budget.

    Raises:
        ValueError: even the cheapest options exceed the budget, or a layer has none.
    """
    for name, choices in options.items():
        if not choices:
            raise ValueError(f"rank_for_budget: expected options for layer {name!r}, got none")
    least = least_cost(list(options.values()))
    if budget - least < 0:
        raise ValueError(
            f"rank_for_budget: expected a budget of at least {least:.6g}, what the smallest ranks cost, "
            f"got {budget:.6g}"
        )
    return allocate_by_rate(options, budget)
