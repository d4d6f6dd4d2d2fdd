"""Choosing ranks: energy, VBMF on simulated matrices, rounding, and budgets against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimkernels.compress.factorization.ranks import (
    RankOption,
    _evb_tau,
    energy_rank,
    lost_shares,
    rank_by_energy,
    rank_for_budget,
    rank_multiple,
    rounded_rank,
    squared_spectrum,
    vbmf_rank,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tail(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


# ---- energy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.floats(0.01, 1.0))
def test_rank_by_energy_is_the_smallest_that_keeps_the_share(rows, cols, energy):
    weight = randn(rows, cols, seed=rows * 10 + cols)
    rank = rank_by_energy(weight, energy)
    whole = float(weight.square().sum())
    lost = (1 - energy) * whole
    assert tail(weight, rank) <= lost * (1 + 1e-9) + 1e-18
    assert rank == 1 or tail(weight, rank - 1) > lost * (1 - 1e-9)


def test_rank_by_energy_one_is_the_numerical_rank():
    product = (randn(40, 7) @ randn(7, 50, seed=1)).float()
    assert rank_by_energy(product, 1.0) == 7 == int(torch.linalg.matrix_rank(product))
    assert rank_by_energy(torch.zeros(4, 5), 0.9) == 1
    assert rank_by_energy(torch.eye(10), 0.5) == 5


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 8)])
def test_spectrum_of_a_wide_or_tall_matrix_is_that_of_its_triangular_factor(shape):
    matrix = randn(*shape)
    torch.testing.assert_close(squared_spectrum(matrix, torch.float64), torch.linalg.svdvals(matrix).square())


def test_lost_shares_fall_from_one_to_zero():
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(lost_shares(squares), torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64))
    assert not bool(lost_shares(torch.zeros(3)).any())
    assert [energy_rank(squares, energy) for energy in (0.4, 0.41, 0.7, 1.0)] == [1, 2, 2, 4]


# ---- VBMF


@pytest.mark.parametrize("shape", [(60, 60), (40, 160), (160, 40)])
@pytest.mark.parametrize("rank", [1, 8, 15])
def test_vbmf_finds_the_rank_of_a_low_rank_matrix_with_noise(shape, rank):
    for seed in range(3):
        signal = randn(shape[0], rank, seed=seed) @ randn(rank, shape[1], seed=seed + 10)
        noise = randn(*shape, seed=seed + 20)
        assert vbmf_rank(signal + noise) == rank  # singular values about sqrt(L M), noise up to sqrt(L) + sqrt(M)
        assert vbmf_rank((1e-4 * (signal + noise)).float()) == rank  # no scale in it


def test_vbmf_of_noise_is_zero_and_of_an_exact_product_its_rank():
    assert [vbmf_rank(randn(50, 80, seed=seed)) for seed in range(5)] == [0] * 5
    assert vbmf_rank(torch.zeros(5, 6)) == 0
    assert vbmf_rank((randn(30, 4) @ randn(4, 70, seed=1)).float()) == 4


def test_vbmf_keeps_less_as_the_noise_grows():
    spectrum = torch.diag(torch.linspace(40, 0.5, 40, dtype=torch.float64))
    u, v = torch.linalg.qr(randn(80, 40)).Q, torch.linalg.qr(randn(120, 40, seed=1)).Q
    signal = u @ spectrum @ v.t()
    ranks = [vbmf_rank(signal + scale * randn(80, 120, seed=2)) for scale in (0.1, 0.3, 1.0, 3.0)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[2] > ranks[3]


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_evb_threshold_is_a_zero_and_near_the_published_approximation(ratio):
    tau = _evb_tau(ratio)
    phi = [math.log(z + 1) / z - 0.5 for z in (tau, tau / ratio)]
    assert sum(phi) == pytest.approx(0.0, abs=1e-12)
    near = 2.5129 * math.sqrt(ratio)  # which Nakajima et al. give; exact for square matrices
    assert tau == pytest.approx(near, rel=1e-4 if ratio == 1.0 else 0.07)


# ---- rounding


def test_ranks_round_up_unless_that_is_too_large():
    assert [rounded_rank(rank, 8, 20) for rank in (1, 8, 9, 16, 17, 20)] == [8, 8, 16, 16, 17, 20]
    assert rounded_rank(3, 8, 5) == 3 and rounded_rank(13, 1, 20) == 13
    assert rank_multiple("cpu") == 8 and rank_multiple(torch.device("cuda", 1)) == 16


# ---- budgets

layers = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(layers, st.integers(0, 140))
def test_budget_is_kept_and_nearly_as_good_as_brute_force(table, budget):
    options = {
        str(i): [RankOption((j + 1,), float(cost), lost) for j, (cost, lost) in enumerate(choices)]
        for i, choices in enumerate(table)
    }
    cheapest = sum(min(o.cost for o in choices) for choices in options.values())
    if cheapest > budget:
        with pytest.raises(ValueError, match="rank_for_budget: expected a budget of at least"):
            rank_for_budget(options, budget)
        return
    taken = rank_for_budget(options, budget)
    assert taken.keys() == options.keys() and all(taken[name] in options[name] for name in options)
    assert sum(o.cost for o in taken.values()) <= budget
    found = sum(o.lost for o in taken.values())
    every = [c for c in itertools.product(*options.values()) if sum(o.cost for o in c) <= budget]
    best = min(sum(o.lost for o in c) for c in every)
    # The greedy solution of the relaxed problem misses at most one step of one layer.
    largest_step = max(max(o.lost for o in choices) - min(o.lost for o in choices) for choices in options.values())
    assert best - 1e-9 <= found <= best + largest_step + 1e-9


def test_budget_goes_where_a_cost_buys_most_energy():
    steep = [RankOption((r,), 10.0 * r, lost) for r, lost in enumerate((1.0, 0.2, 0.05, 0.0))]
    flat = [RankOption((r,), 10.0 * r, lost) for r, lost in enumerate((1.0, 0.7, 0.4, 0.1))]
    taken = rank_for_budget({"steep": steep, "flat": flat}, 30.0)
    assert (taken["steep"].ranks, taken["flat"].ranks) == ((1,), (2,))
    assert rank_for_budget({"steep": steep, "flat": flat}, 60.0)["flat"].ranks == (3,)


def test_budget_takes_the_jump_to_dense_that_ranks_alone_would_never_reach():
    # Half of the energy for half of the cost by ranks, or all of it: the hull goes straight to dense.
    flat = [RankOption((r,), 10.0 * r, 1.0 - 0.05 * r) for r in range(1, 10)] + [RankOption(None, 100.0, 0.0)]
    assert rank_for_budget({"a": flat}, 100.0)["a"].ranks is None
    assert rank_for_budget({"a": flat}, 95.0)["a"].ranks == (9,)


def test_budget_refuses():
    with pytest.raises(ValueError, match="expected a budget of at least 5, what the smallest ranks cost, got 4"):
        rank_for_budget({"a": [RankOption((1,), 5.0, 0.5)]}, 4.0)
    with pytest.raises(ValueError, match="expected options for layer 'a', got none"):
        rank_for_budget({"a": []}, 4.0)
    with pytest.raises(ValueError, match=r"rank_by_energy: expected energy in \(0, 1\], got 1.5"):
        rank_by_energy(torch.ones(3, 4), 1.5)
    with pytest.raises(ValueError, match="vbmf_rank: expected a finite weight, got NaN"):
        vbmf_rank(torch.full((3, 4), math.nan))
