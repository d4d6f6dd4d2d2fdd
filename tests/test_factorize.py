"""Low-rank decompositions against their closed forms, and the in-place replacement of layers."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from slimkernels.compress.factorize import (
    factorization_report,
    factorize_,
    rank_by_energy,
    svd_conv,
    tai,
    truncated_svd,
    tucker2,
)
from slimkernels.compress.prune import prune_
from slimkernels.formats import LowRankWeight
from slimkernels.nn import LowRankConv2d, LowRankLinear

conv_shapes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def squared(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum())


def tail(matrix: torch.Tensor, rank: int) -> float:
    """Squared error of the best rank-`rank` approximation (Eckart & Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def seeded(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return model


def small_net() -> nn.Sequential:
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
            nn.Conv2d(24, 20, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(80, 60),
        )
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_truncated_svd_reaches_eckart_young_and_splits_evenly(rows, cols, data):
    weight = randn(rows, cols, seed=rows * 100 + cols)
    rank = data.draw(st.integers(1, min(rows, cols)))
    u, v = truncated_svd(weight, rank)
    assert u.shape == (rows, rank) and v.shape == (rank, cols)
    assert squared(weight - u @ v) == pytest.approx(tail(weight, rank), rel=1e-9, abs=1e-20)
    singular = torch.diag(torch.linalg.svdvals(weight)[:rank])
    torch.testing.assert_close(u.t() @ u, singular, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(v @ v.t(), singular, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(conv_shapes, st.data())
def test_tai_error_is_the_tail_of_its_matrix(shape, data):
    n, c, kh, kw = shape
    weight = randn(*shape, seed=sum(shape))
    rank = data.draw(st.integers(1, min(c * kh, n * kw)))
    vertical, horizontal = tai(weight, rank)
    assert vertical.shape == (rank, c, kh, 1) and horizontal.shape == (n, rank, 1, kw)
    # Tai et al. eq. 3: W[n, c] = sum_k V[k, c] H[n, k], written out tap by tap
    composed = sum(vertical[k, :, :, 0][None, :, :, None] * horizontal[:, k, 0][:, None, None, :] for k in range(rank))
    matrix = torch.stack([weight[o, i, r, s] for i in range(c) for r in range(kh) for s in range(kw) for o in range(n)])
    assert squared(weight - composed) == pytest.approx(tail(matrix.reshape(c * kh, kw * n), rank), rel=1e-9, abs=1e-20)
    energies = vertical.square().sum((1, 2, 3)), horizontal.square().sum((0, 2, 3))
    torch.testing.assert_close(*energies, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(conv_shapes, st.data())
def test_svd_conv_error_is_the_tail_of_its_matrix(shape, data):
    weight = randn(*shape, seed=sum(shape))
    rank = data.draw(st.integers(1, min(shape[0], math.prod(shape[1:]))))
    first, last = svd_conv(weight, rank)
    assert first.shape == (rank, *shape[1:]) and last.shape == (shape[0], rank, 1, 1)
    composed = torch.einsum("kcrs,nk->ncrs", first, last[:, :, 0, 0])
    assert squared(weight - composed) == pytest.approx(tail(weight.flatten(1), rank), rel=1e-9, abs=1e-20)


@settings(max_examples=30, deadline=None)
@given(conv_shapes, st.data())
def test_tucker2_is_orthogonal_optimal_per_mode_and_within_the_hosvd_bound(shape, data):
    n, c, kh, kw = shape
    weight = randn(*shape, seed=sum(shape))
    rank_in = data.draw(st.integers(1, c))
    rank_out = data.draw(st.integers(1, min(n, rank_in * kh * kw)))
    rank_in = min(rank_in, rank_out * kh * kw)
    first, core, last = tucker2(weight, rank_out, rank_in)
    assert first.shape == (rank_in, c, 1, 1) and core.shape == (rank_out, rank_in, kh, kw)
    assert last.shape == (n, rank_out, 1, 1)
    u_in, u_out = first[:, :, 0, 0].t(), last[:, :, 0, 0]
    torch.testing.assert_close(u_in.t() @ u_in, torch.eye(rank_in, dtype=torch.float64))
    torch.testing.assert_close(u_out.t() @ u_out, torch.eye(rank_out, dtype=torch.float64))
    error = squared(weight - LowRankWeight("tucker2", (first, core, last)).to_dense())
    # Orthogonal projections: the error is what the core lacks, at least each mode's tail, at most their sum
    assert error == pytest.approx(squared(weight) - squared(core), rel=1e-6, abs=1e-9 * squared(weight))
    tails = tail(weight.flatten(1), rank_out), tail(weight.transpose(0, 1).flatten(1), rank_in)
    slack = 1e-9 * squared(weight)
    assert max(tails) - slack <= error <= sum(tails) + slack


def test_tucker2_sweeps_only_lower_the_error_and_help():
    weight = randn(12, 10, 3, 3)

    def error(sweeps: int) -> float:
        return squared(weight - LowRankWeight("tucker2", tucker2(weight, 4, 3, sweeps=sweeps)).to_dense())

    errors = [error(sweeps) for sweeps in range(5)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] < errors[0] * 0.995


@pytest.mark.parametrize("method", ["svd", "tai", "tucker2"])
def test_error_falls_with_rank_to_zero_at_full_rank(method):
    weight = randn(8, 6, 3, 3)
    full = {"svd": 8, "tai": 18, "tucker2": 8}[method]
    errors = []
    for rank in range(1, full + 1):
        factors = (
            {"svd": svd_conv, "tai": tai}[method](weight, rank)
            if method != "tucker2"
            else tucker2(weight, rank, min(rank, 6))
        )
        errors.append(squared(weight - LowRankWeight(method, factors).to_dense()))
    assert all(b < a for a, b in pairwise(errors))
    assert errors[-1] < 1e-24 * squared(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_come_back_in_the_weights_dtype_rounded_once(dtype):
    weight = randn(20, 30, dtype=dtype)
    u, v = truncated_svd(weight, 20)
    assert u.dtype == v.dtype == dtype
    u64, v64 = truncated_svd(weight.double(), 20)
    assert torch.equal(u, u64.to(dtype)) and torch.equal(v, v64.to(dtype))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.floats(0.01, 1.0))
def test_rank_by_energy_is_the_smallest_that_keeps_the_share(rows, cols, energy):
    weight = randn(rows, cols, seed=rows * 10 + cols)
    rank = rank_by_energy(weight, energy)
    lost = (1 - energy) * squared(weight)
    assert tail(weight, rank) <= lost * (1 + 1e-9) + 1e-18
    assert rank == 1 or tail(weight, rank - 1) > lost * (1 - 1e-9)


def test_rank_by_energy_one_is_the_numerical_rank():
    product = (randn(40, 7) @ randn(7, 50, seed=1)).float()
    assert rank_by_energy(product, 1.0) == 7 == int(torch.linalg.matrix_rank(product))
    assert rank_by_energy(torch.zeros(4, 5), 0.9) == 1
    assert rank_by_energy(torch.eye(10), 0.5) == 5


@pytest.mark.parametrize("method", ["svd", "tai", "tucker2"])
@pytest.mark.parametrize("training", [True, False])
def test_full_rank_replacement_computes_the_same_function(method, training):
    net = small_net().double().train(training)
    x = randn(2, 3, 9, 8)
    expected = net(x)
    full = {
        "svd": {"0": 16, "2": 24, "3": 20},
        "tai": {"0": 9, "2": 48, "3": 20},
        "tucker2": {"0": (16, 3), "2": 24, "3": 20},
    }
    assert factorize_(net, method, rank={**full[method], "6": 60}) is net
    assert [type(net[i]) for i in (0, 2, 3, 6)] == [LowRankConv2d] * 3 + [LowRankLinear]
    assert net[3].kind == "svd" and net[2].kind == method
    assert (net[2].stride, net[2].padding, net[2].dilation) == ((2, 1), (1, 2), (1, 2)) and net[2].bias is None
    assert all(module.training is training for module in net.modules())
    torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)
    assert all(record.relative_error < 1e-12 for record in factorization_report(net))


@pytest.mark.parametrize("method", ["svd", "tai", "tucker2"])
def test_replaced_layers_train(method):
    net = factorize_(small_net(), method, rank=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)  # standard normal weights would make any useful step diverge
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = randn(4, 3, 8, 8, dtype=torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    loss = net(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert net(x).square().mean().item() < loss.item()


@pytest.mark.parametrize("method", ["svd", "tai", "tucker2"])
def test_energy_is_kept_and_reported(method):
    net = small_net()
    dense = {name: module.weight.detach().clone() for name, module in net.named_modules() if hasattr(module, "weight")}
    factorize_(net, method, energy=0.7)
    records = {record.name: record for record in factorization_report(net)}
    assert set(records) == set(dense)
    assert records["2"].kind == method
    for name, record in records.items():
        twin = net.get_submodule(name)
        assert record.params_before == dense[name].numel()
        if record.kind is None:
            assert isinstance(twin, (nn.Conv2d, nn.Linear)) and "parameters" in record.reason
            assert record.params_after == record.params_before and record.relative_error == 0
            continue
        error = math.sqrt(squared((dense[name] - twin.to_dense().weight).detach()) / squared(dense[name]))
        assert record.relative_error == pytest.approx(error, rel=1e-4) and error**2 <= 0.3 + 1e-6
        weights = sum(p.numel() for key, p in twin.named_parameters() if key != "bias")
        assert record.params_after == weights < record.params_before


def test_layers_that_would_not_shrink_stay_unless_named():
    net = small_net()
    factorize_(net, "svd", rank=18)
    assert isinstance(net[0], nn.Conv2d) and isinstance(net[3], nn.Conv2d) and isinstance(net[6], LowRankLinear)
    reasons = {r.name: r.reason for r in factorization_report(net)}
    assert reasons["0"] == "rank 18 exceeds the full rank 16"
    assert reasons["3"] == "rank (18,) needs 792 parameters, the dense weight 480"
    factorize_(net, "svd", rank=18, layers=["3"])
    assert isinstance(net[3], LowRankConv2d)
    assert [r.name for r in factorization_report(net)] == ["0", "2", "3", "6"]
    with pytest.raises(ValueError, match=r"layer '0': expected rank in \[1, 16\] for a weight \(16, 3, 3, 3\), got 18"):
        factorize_(net, "svd", rank=18, layers=["0"])


def test_frozen_parameters_bias_and_shared_modules_carry_over():
    layer = seeded(nn.Linear(30, 20))
    layer.weight.requires_grad_(False)
    net = nn.ModuleDict({"a": layer, "b": layer})
    bias = layer.bias.detach().clone()
    factorize_(net, rank=3)
    assert isinstance(net["a"], LowRankLinear) and net["a"] is net["b"]
    assert not net["a"].U.requires_grad and not net["a"].V.requires_grad and net["a"].bias.requires_grad
    assert torch.equal(net["a"].bias, bias)


def test_same_padding_becomes_numbers():
    net = seeded(
        nn.Sequential(nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 1)), nn.Conv2d(8, 8, 4, padding="same"))
    )
    x = randn(1, 8, 9, 9, dtype=torch.float32)
    expected = net[0](x)
    factorize_(net, "tai", rank={"0": 24})
    assert net[0].padding == (2, 2)
    torch.testing.assert_close(net[0](x), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"factorize_: layer '1': padding='same' with kernel_size=\(4, 4\)"):
        factorize_(net, "tai", rank={"1": 4})


def unsupported_net() -> nn.ModuleDict:
    class Custom(nn.Linear):
        pass

    tied = nn.Linear(32, 32)
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(32, 32, 3, groups=4),
            "reflect": nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
            "custom": Custom(32, 32),
            "masked": nn.Conv2d(32, 32, 3),
            "legacy": nn.Linear(32, 32),
            "hooked": nn.Linear(32, 32),
            "tied_a": tied,
            "tied_b": nn.Linear(32, 32),
            "plain": nn.Linear(32, 32),
        }
    )
    net["tied_b"].weight = tied.weight
    prune_(net, 0.5, layers="masked")
    torch_prune.l1_unstructured(net["legacy"], "weight", 0.5)
    net["hooked"].register_forward_hook(lambda *args: None)
    return net


REASONS = {
    "grouped": "groups=4 is not supported, expected 1",
    "reflect": "padding_mode='reflect' is not supported, expected 'zeros'",
    "custom": "expected nn.Linear or nn.Conv2d, got the sub-class Custom",
    "masked": "expected a plain weight, got parametrizations on ['weight']",
    "legacy": "expected weight to be a Parameter, got a computed one",
    "hooked": "expected no hooks, got a layer that carries some",
    "tied_a": "expected parameters of its own, got some shared with another layer",
    "tied_b": "expected parameters of its own, got some shared with another layer",
}


def test_layers_without_a_twin_are_recorded_and_kept():
    net = factorize_(unsupported_net(), "svd", rank=4)
    assert [name for name, module in net.items() if isinstance(module, LowRankLinear)] == ["plain"]
    reasons = {record.name: record.reason for record in factorization_report(net) if record.kind is None}
    assert reasons.keys() == REASONS.keys()
    assert all(reasons[name].startswith(reason) for name, reason in REASONS.items())


@pytest.mark.parametrize("name", REASONS)
def test_layers_without_a_twin_raise_when_named(name):
    net = unsupported_net()
    with pytest.raises(ValueError) as caught:
        factorize_(net, "svd", rank=4, layers=["plain", name])
    assert str(caught.value).startswith(f"factorize_: layer {name!r}: {REASONS[name]}")
    assert type(net["plain"]) is nn.Linear and factorization_report(net) == ()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"method": "cp", "rank": 2}, ValueError, r"expected method in \('svd', 'tai', 'tucker2'\), got 'cp'"),
        ({}, ValueError, r"factorize_: expected either rank or energy, got rank=None, energy=None"),
        ({"rank": 2, "energy": 0.9}, ValueError, r"expected either rank or energy, got rank=2, energy=0.9"),
        ({"energy": 0.0}, ValueError, r"factorize_: expected energy in \(0, 1\], got 0.0"),
        ({"energy": "95%"}, TypeError, r"factorize_: expected energy to be a number in \(0, 1\], got '95%'"),
        ({"rank": 0}, ValueError, r"factorize_: layer '0': expected rank of at least 1, got 0"),
        ({"rank": 0.5}, TypeError, r"expected rank to be an int or, for 'tucker2', \(rank_out, rank_in\), got 0.5"),
        ({"rank": {"6": (3, 3)}}, ValueError, r"layer '6': expected one rank for 'svd', got \(3, 3\)"),
        ({"rank": {"fc": 3}}, ValueError, r"expected rank to match Linear or Conv2d layers, got 'fc'; near matches: 0"),
        ({"rank": {"6": 3}, "layers": ["6"]}, ValueError, r"expected either layers or a rank dict, got both"),
        (
            {"method": "tucker2", "rank": {"2": (30, 2)}},
            ValueError,
            r"tucker2: expected rank_out in \[1, 18\] for a weight",
        ),
    ],
)
def test_bad_input_raises_and_changes_nothing(args, error, message):
    net = small_net()
    types = [type(module) for module in net]
    with pytest.raises(error, match=message):
        factorize_(net, **args)
    assert [type(module) for module in net] == types


def test_pure_functions_name_themselves_in_errors():
    with pytest.raises(ValueError, match=r"truncated_svd: expected rank in \[1, 3\] for a \(3, 4\) matrix, got 4"):
        truncated_svd(torch.ones(3, 4), 4)
    with pytest.raises(ValueError, match=r"tai: expected a 4-D weight of positive sizes, got \(3, 4\)"):
        tai(torch.ones(3, 4), 1)
    with pytest.raises(TypeError, match=r"svd_conv: expected a floating-point weight, got torch.int64"):
        svd_conv(torch.ones(1, 1, 1, 1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"tucker2: expected rank_in in \[1, 4\] for a weight \(5, 4, 3, 3\), got 0"):
        tucker2(torch.ones(5, 4, 3, 3), 1, 0)
    with pytest.raises(ValueError, match=r"rank_by_energy: expected energy in \(0, 1\], got 1.5"):
        rank_by_energy(torch.ones(3, 4), 1.5)
    with pytest.raises(TypeError, match=r"truncated_svd: expected rank to be an int, got 2.0"):
        truncated_svd(torch.ones(3, 4), 2.0)
    net = small_net()
    with torch.no_grad():
        net[6].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"factorize_: layer '6': expected a finite weight, got NaN or infinity"):
        factorize_(net, rank=3)
    assert isinstance(net[0], nn.Conv2d)
    with pytest.raises(
        ValueError, match=r"factorize_: layer '': expected a layer inside a model, got the model itself"
    ):
        factorize_(nn.Linear(8, 8), rank=2)


def test_report_and_layers_survive_a_deepcopy_and_a_state_dict():
    net = factorize_(small_net(), "tai", rank=3)
    twin = copy.deepcopy(net)
    assert factorization_report(twin) == factorization_report(net) != ()
    perturbed = small_net()
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter.mul_(2)
    fresh = factorize_(perturbed, "tai", rank=3)
    fresh.load_state_dict(net.state_dict())
    x = randn(1, 3, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(fresh(x), net(x), rtol=0, atol=0)
