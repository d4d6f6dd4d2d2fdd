"""Data-aware factorization against its closed form, and never worse than the plain SVD on its data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimkernels.compress.factorization.decompositions import tai, truncated_svd, tucker2
from slimkernels.compress.factorization.whitening import (
    moment_spectrum,
    output_moments,
    refit_last_factors,
    whitened_svd,
)
from slimkernels.nn import LowRankConv2d


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(tensor: Tensor) -> float:
    return float(tensor.square().sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.data())
def test_output_error_is_the_tail_and_never_above_the_plain_svd(out, inside, rows, data):
    weight = randn(out, inside, seed=out * 100 + inside)
    x = randn(rows, inside, seed=rows) * torch.logspace(0, 2, inside, dtype=torch.float64)  # inputs of unequal size
    rank = data.draw(st.integers(1, min(out, inside)))
    moment = (x @ weight.t()).t() @ (x @ weight.t())
    u, v = whitened_svd(weight, rank, moment)
    assert u.shape == (out, rank) and v.shape == (rank, inside)
    error, whole = squared(x @ (weight - u @ v).t()), squared(x @ weight.t())
    # Eckart and Young for W S^(1/2), S = X^T X: its singular values are those of X W^T
    assert error == pytest.approx(squared(torch.linalg.svdvals(x @ weight.t())[rank:]), rel=1e-6, abs=1e-8 * whole)
    assert error == pytest.approx(float(moment_spectrum(moment)[rank:].sum()), rel=1e-6, abs=1e-8 * whole)
    plain_u, plain_v = truncated_svd(weight, rank)
    assert error <= squared(x @ (weight - plain_u @ plain_v).t()) * (1 + 1e-9) + 1e-8 * whole


def test_it_is_the_truncated_svd_of_the_whitened_weight():
    weight, x = randn(7, 5), randn(40, 5, seed=1) @ randn(5, 5, seed=2)
    values, vectors = torch.linalg.eigh(x.t() @ x)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.t()
    left, s, right = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = left[:, :3] @ torch.diag(s[:3]) @ right[:3] @ torch.linalg.inv(root)
    u, v = whitened_svd(weight, 3, weight @ (x.t() @ x) @ weight.t())
    torch.testing.assert_close(u @ v, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


def test_white_inputs_give_the_plain_svd():
    weight = randn(6, 8)
    u, v = whitened_svd(weight, 3, 5.0 * weight @ weight.t())
    plain_u, plain_v = truncated_svd(weight, 3)
    torch.testing.assert_close(u @ v, plain_u @ plain_v, rtol=1e-9, atol=1e-9)


def test_directions_that_no_data_reach_are_filled_by_the_plain_svd():
    weight, x = randn(6, 8), randn(2, 8, seed=1)  # two inputs: outputs of rank 2
    moment = (x @ weight.t()).t() @ (x @ weight.t())
    u, v = whitened_svd(weight, 6, moment)
    torch.testing.assert_close(u @ v, weight, rtol=1e-9, atol=1e-9)
    u, v = whitened_svd(weight, 4, moment)
    assert squared(x @ (weight - u @ v).t()) < 1e-18 * squared(x @ weight.t())
    basis = torch.linalg.qr((x @ weight.t()).t()).Q
    rest = weight - basis @ (basis.t() @ weight)
    assert squared(weight - u @ v) == pytest.approx(squared(torch.linalg.svdvals(rest)[2:]), rel=1e-6)
    zero = whitened_svd(torch.zeros(3, 4), 2, torch.zeros(3, 3))
    assert all(bool(torch.isfinite(factor).all()) for factor in zero) and not bool((zero[0] @ zero[1]).any())


def test_moments_are_those_of_the_outputs_without_bias():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.Flatten())
    net.append(nn.Linear(4 * 9, 5)).train()
    statistics = net[1].running_mean.clone()
    batches = [randn(3, 2, 6, 6, seed=seed).float() for seed in range(2)]
    layers = {"0": net[0], "3": net[3], "5": net[5]}
    labels = torch.zeros(3, dtype=torch.int64)
    found = output_moments("factorize_", net, layers, [(x, labels) for x in batches])
    assert net.training and torch.equal(net[1].running_mean, statistics)
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad():
        first = nn.functional.conv2d(torch.cat(batches), net[0].weight).movedim(1, -1).reshape(-1, 3).double()
        net.eval()
        last = nn.functional.linear(net[:5](torch.cat(batches)), net[5].weight).double()
    torch.testing.assert_close(found["0"], first.t() @ first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["5"], last.t() @ last, rtol=1e-5, atol=1e-5)
    assert found["3"].shape == (4, 4) and found["3"].dtype == torch.float64
    fewer = output_moments("factorize_", net, layers, batches, max_batches=1)
    assert float(fewer["0"].trace()) < float(found["0"].trace())


@pytest.mark.parametrize(("kind", "decompose"), [("tai", lambda w: tai(w, 5)), ("tucker2", lambda w: tucker2(w, 4, 3))])
def test_refitted_last_factor_is_the_least_squares_solution(kind, decompose):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    plain = decompose(conv.weight.detach())
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    twin = LowRankConv2d.from_factors(plain, conv.bias.detach(), kind=kind, **geometry)
    batches = [randn(3, 4, 7, 8, seed=seed).abs() for seed in range(2)]
    error = refit_last_factors("factorize_", nn.Sequential(conv), {"0": (conv, twin)}, batches)["0"]
    assert all(torch.equal(a, b) for a, b in zip(twin.factors[:-1], plain[:-1], strict=True))
    with torch.no_grad():
        x = torch.cat(batches)
        wanted = conv(x) - conv.bias[:, None, None]
        before = LowRankConv2d.from_factors(plain, kind=kind, **geometry)(x) - wanted
        after = twin(x) - twin.bias[:, None, None] - wanted
        # The same residual from the factor's columns: one convolution per weight of the last factor
        read = LowRankConv2d.from_factors([*plain[:-1], one_hot_like(plain[-1])], kind=kind, **geometry)(x)
    columns, rows = read.movedim(1, -1).flatten(0, -2), wanted.movedim(1, -1).flatten(0, -2)
    left = rows - columns @ torch.linalg.lstsq(columns, rows).solution
    assert squared(after) == pytest.approx(squared(left), rel=1e-6)
    assert squared(after) < squared(before)
    assert error**2 == pytest.approx(squared(after) / squared(wanted), rel=1e-6)


def one_hot_like(factor: Tensor) -> Tensor:
    """A factor whose output channel k is what weight k of a filter reads."""
    count = factor[0].numel()
    return torch.eye(count, dtype=factor.dtype).reshape(count, *factor.shape[1:])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(3, 4), 4, torch.eye(3)), ValueError, r"whitened_svd: expected rank in \[1, 3\] for a \(3, 4\)"),
        ((torch.ones(3, 4), True, torch.eye(3)), TypeError, "expected rank to be an int, got True"),
        ((torch.ones(3, 4), 2, torch.eye(4)), ValueError, r"expected an output moment \(3, 3\), got \(4, 4\)"),
        ((torch.ones(3), 2, torch.eye(3)), ValueError, "expected a 2-D weight"),
        ((torch.ones(3, 4), 2, torch.full((3, 3), torch.inf)), ValueError, "expected a finite weight"),
    ],
)
def test_whitened_svd_refuses(args, error, message):
    with pytest.raises(error, match=message):
        whitened_svd(*args)


def test_moments_refuse_what_the_data_do_not_show():
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="factorize_: expected at least one calibration batch, got none"):
        output_moments("factorize_", net, {"0": net[0]}, [])
    with pytest.raises(ValueError, match="expected the calibration data to reach layer 'spare', they do not"):
        output_moments("factorize_", net, {"0": net[0], "spare": nn.Linear(3, 2)}, [torch.ones(1, 3)])
