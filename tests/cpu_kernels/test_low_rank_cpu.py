"""Low-rank layers on the CPU: packs, native kernels against float64, modules with packs never stale, conversion."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conversion_models import Clock, assert_same_function
from torch import Tensor, nn

import slimkernels as sk
from slimkernels import ops
from slimkernels.cases import Case, LowRankConvCase, LowRankLinearCase, launch
from slimkernels.conversion import measure
from slimkernels.conversion.plan import Policy
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu import low_rank as native_low_rank
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.cpu.low_rank import PackedLowRank, factor_strip, pack_factor, pack_factors
from slimkernels.nn import LowRankConv2d, LowRankLinear
from slimkernels.testing import assert_close, random_tensor

ISAS = [isa for isa in ("avx512", "avx2", "scalar") if unavailable_reason(isa) is None]
KINDS = {"tai": (20,), "svd": (9,), "tucker2": (3, 13)}
pytestmark = pytest.mark.skipif(not ISAS, reason="no native kernel is built")


# Packs
@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_strips_waste_little(isa: str) -> None:
    """The chosen strip costs no more than any other, and pads fewer than 8 channels where an exact one exists."""
    costs = native_low_rank._STRIP_COST[isa]
    for channels in (*range(1, 70), 128, 160, 192, 256, 320, 512):
        chosen = factor_strip(channels, isa)
        assert all(-(-channels // chosen) * costs[chosen] <= -(-channels // s) * costs[s] for s in costs)
    assert [factor_strip(r, "avx2") for r in (5, 16, 24, 48, 64, 320)] == [8, 16, 24, 24, 16, 24]


@pytest.mark.parametrize("shape", [(24, 5, 3, 1), (5, 7, 1, 3), (37, 6, 3, 3), (19, 11, 1, 1)])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_a_factor_packs_as_the_full_pattern_does(shape: tuple[int, ...], isa: str) -> None:
    factor = random_tensor(*shape, seed=0)
    strip = factor_strip(shape[0], isa)
    weight = BSRWeight.from_dense(
        factor, (strip, 1), torch.ones(-(-shape[0] // strip), shape[1] * shape[2] * shape[3]) > 0
    )
    expected = native.pack_strips(weight.values, weight.crow_indices, weight.col_indices, shape, (strip, 1), strip)
    for got, want in zip(pack_factor(factor, isa), expected, strict=True):
        assert got.dtype == want.dtype and got.is_contiguous() and torch.equal(got, want)


def test_a_linear_factor_packs_as_its_1x1_convolution() -> None:
    factor = random_tensor(21, 12, seed=0)
    pairs = zip(pack_factor(factor, "avx2"), pack_factor(factor[:, :, None, None], "avx2"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Kernels against float64
CASES: list[Case] = [
    *(LowRankLinearCase(f"rank_{r}", m=7, in_features=33, out_features=29, rank=r) for r in (1, 5, 8, 16, 20, 24, 33)),
    LowRankLinearCase("relu_no_bias", m=3, epilogue="relu", bias=False),
    LowRankLinearCase("batch_0", m=0),
    LowRankLinearCase("wide", m=2, in_features=300, out_features=520, rank=48, epilogue="relu"),
    *(
        LowRankConvCase(f"{kind}_{name}", kind, ranks=ranks, **sizes)
        for kind, ranks in KINDS.items()
        for name, sizes in {
            "relu": {"epilogue": "relu", "c_out": 35},
            "strided": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "h": 11, "w": 10, "bias": False},
            "5x3": {"kernel_size": (5, 3), "padding": (2, 1), "n": 1, "c_in": 1, "c_out": 1},
            "2x2_images": {"h": 2, "w": 2, "n": 5, "c_in": 17, "epilogue": "relu"},
            "batch_0": {"n": 0},
        }.items()
    ),
    LowRankConvCase("tai_rank_1", ranks=(1,)),
    LowRankConvCase("tai_rank_48", ranks=(48,), c_in=32, c_out=64, h=9, w=9, epilogue="relu"),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_kernel_against_float64(case: Case, isa: str, sentinel_borders, nan_surrounded) -> None:
    """Nothing is left unwritten, written or read outside (allocations and surroundings hold NaN); 2 threads agree."""
    name, (x, *weights, bias) = f"{case.op}_f32__{isa}", case.inputs()
    guarded = (nan_surrounded(x), *weights, None if bias is None else nan_surrounded(bias))
    y = launch(name, case, guarded)
    sentinel_borders.check()
    ref, bound = case.expected(x, *weights, bias)
    assert_close(y, ref, **bound)
    assert torch.equal(launch(name, case, (x, *weights, bias), threads=2), y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [CASES[4], CASES[10], CASES[-1]], ids=lambda c: c.name)
def test_the_bound_sees_one_dropped_weight(case: Case, isa: str) -> None:
    args = case.launch_args(*case.inputs())
    factors = args[1] if case.op == "low_rank_conv2d" else [args[2], args[1]]
    ref, bound = case.expected(*case.inputs())
    run = KERNELS[f"{case.op}_f32__{isa}"].launch
    for i in range(len(factors)):
        packed = pack_factors(factors, isa)
        weights = packed[3 * i]
        entry = int(weights.abs().sum(1).argmax())
        weights[entry, int(weights[entry].abs().argmax())] = 0
        at = 3 if case.op == "low_rank_conv2d" else 4
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(run(*args[:at], packed, *args[at + 1 :]), ref, **bound)


def test_a_pack_of_other_factors_is_refused() -> None:
    x, factors, bias = LowRankConvCase().inputs()
    kernel = f"low_rank_conv2d_f32__{ISAS[-1]}"
    packed = pack_factors(factors, ISAS[-1])
    with pytest.raises(ValueError, match=r"^low_rank_conv2d: expected 6 packed tensors, got 3"):
        ops.low_rank_conv2d(x, factors, bias, packed[:3], kind="tai", padding=(1, 1), kernel=kernel)
    with pytest.raises(ValueError, match=r"^low_rank_conv2d: expected a strip pack of"):
        ops.low_rank_conv2d(x, factors, bias, packed[3:] + packed[:3], kind="tai", padding=(1, 1), kernel=kernel)


@pytest.mark.parametrize("case", [LowRankLinearCase(), LowRankConvCase(epilogue="relu")], ids=lambda c: c.op)
def test_opcheck_with_a_pack(case: Case) -> None:
    args = case.launch_args(*case.inputs())
    factors = args[1] if case.op == "low_rank_conv2d" else [args[2], args[1]]
    at = 3 if case.op == "low_rank_conv2d" else 4
    kernel = f"{case.op}_f32__{ISAS[0]}"
    inputs = (*args[:at], pack_factors(factors, ISAS[0]), *args[at + 1 :], kernel)
    torch.library.opcheck(getattr(torch.ops.slimkernels, case.op).default, inputs)


# Which kernel an op call takes
def test_auto_packs_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training repacks nothing: without a pack ``auto`` runs torch's layers; a forced backend packs in the call."""
    made: list[int] = []
    original = native_low_rank.pack_factor
    monkeypatch.setattr(native_low_rank, "pack_factor", lambda *a: made.append(1) or original(*a))
    case = LowRankConvCase()
    x, factors, bias = case.inputs()
    call = lambda: ops.low_rank_conv2d(x, factors, bias, kind="tai", padding=(1, 1))  # noqa: E731
    auto = call()
    assert not made
    monkeypatch.setenv("SLIMKERNELS_BACKEND", "cpu")
    forced = call()
    assert len(made) == 2
    ref, bound = case.expected(x, factors, bias)
    assert_close(auto, ref, **bound)
    assert_close(forced, ref, **bound)


# Modules
MODULES = {
    "tai": lambda: LowRankConv2d(12, 40, 3, padding=1, kind="tai", ranks=(20,), epilogue="relu"),
    "tucker2": lambda: LowRankConv2d(12, 10, 3, stride=2, kind="tucker2", ranks=(3, 5)),
    "linear": lambda: LowRankLinear(640, 512, 256),
}


def example(module: LowRankConv2d | LowRankLinear) -> Tensor:
    shape = (3, module.in_features) if isinstance(module, LowRankLinear) else (2, 12, 7, 9)
    return random_tensor(*shape, seed=0).to(module._factors()[0].dtype)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records the native low-rank calls."""
    seen: list[str] = []
    for name in ("__call__", "rows", "attempt", "attempt_rows"):
        original = getattr(PackedLowRank, name)

        def watched(self, *args, name=name, original=original):
            y = original(self, *args)
            if y is not None:
                seen.append(name)
            return y

        monkeypatch.setattr(PackedLowRank, name, watched)
    yield seen


def check_output(module: nn.Module) -> None:
    """The module computes its own present factors, whatever its pack holds."""
    x = example(module)
    with torch.no_grad():
        got = module(x)
        dense = copy.deepcopy(module).double().to_dense()
        ref = dense(x.double())
        ref = torch.relu(ref) if module.epilogue == "relu" else ref
    assert (got - ref).abs().max() <= 1e-4 * ref.abs().max()


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_pack_lives_in_eval_mode_only(make, native_calls: list[str]) -> None:
    module = make()
    assert not module.prepacked
    check_output(module)
    assert not native_calls
    module.eval()
    assert module.prepacked
    check_output(module)
    assert len(native_calls) == 1
    assert not any("packed" in name for name in module.state_dict())
    module.train()
    assert not module.prepacked and module._packed() == []


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_pack_is_never_stale(make, native_calls: list[str]) -> None:
    module = make().eval()
    state = {k: torch.randn_like(v) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    assert module.prepacked
    check_output(module)
    for factor in module._factors():  # an optimizer step in eval mode
        factor.grad = torch.ones_like(factor)
    torch.optim.SGD(module._factors(), lr=0.5).step()
    assert not module.prepacked
    check_output(module)
    module.prepack()
    assert module.prepacked
    check_output(module)
    assert len(native_calls) == 2
    with torch.no_grad():
        module._factors()[-1].mul_(2)
    check_output(module)
    module.to(torch.float64)
    assert not module.prepacked
    check_output(module)
    module.float()
    assert module.prepacked
    module.load_state_dict({k: torch.randn_like(v) for k, v in state.items()}, assign=True)
    assert module.prepacked
    check_output(module)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_copies_keep_the_pack(make, native_calls: list[str]) -> None:
    module = make().eval()
    x = example(module)
    with torch.no_grad():
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert twin.prepacked and torch.equal(twin(x), expected)
            twin._factors()[0].zero_()
            assert twin(x).std() != expected.std() and torch.equal(module(x), expected)
    assert "attempt_rows" in native_calls or "attempt" in native_calls


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_gradients_do_not_go_through_the_pack(make) -> None:
    module = make().eval()
    x = example(module).requires_grad_(True)
    module(x).square().sum().backward()
    twin = copy.deepcopy(module).double()
    y = x.detach().double().requires_grad_(True)
    twin(y).square().sum().backward()
    for got, want in ((x.grad, y.grad), *((a.grad, b.grad) for a, b in zip(module.parameters(), twin.parameters()))):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("make", [MODULES["tai"], MODULES["linear"]], ids=["tai", "linear"])
def test_export_reads_the_pack(make, native_calls: list[str]) -> None:
    module = make().eval().requires_grad_(False)
    x = example(module)
    exported = torch.export.export(module, (x,)).module()
    native_calls.clear()
    assert torch.equal(exported(x), module(x)) and len(native_calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [MODULES["tai"], MODULES["linear"]], ids=["tai", "linear"])
def test_compiled_modules_read_the_pack(make, native_calls: list[str]) -> None:
    module = make().eval().requires_grad_(False)
    x = example(module)
    with torch.no_grad():
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True)
        assert torch.equal(compiled(x), expected) and len(native_calls) == 2


def test_small_linear_layers_stay_with_torch(native_calls: list[str]) -> None:
    small = LowRankLinear(64, 32, 4).eval()
    assert not small.prepacked
    check_output(small)
    assert not native_calls
    small.kernel = f"low_rank_linear_f32__{ISAS[0]}"
    small.prepack()
    check_output(small)
    assert native_calls == ["attempt_rows"]


def test_frozen_modules_run_under_autocast_in_float32() -> None:
    module = MODULES["tai"]().eval()
    x = example(module)
    with torch.no_grad():
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


# Conversion
def low_rank_net() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    conv = LowRankConv2d(12, 40, 3, padding=1, kind="tai", ranks=(8,))
    return nn.Sequential(conv, nn.BatchNorm2d(40), nn.ReLU()).eval(), torch.randn(2, 12, 6, 6)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ([1.0, 0.4, 0.6], f"low_rank_conv2d_f32__{ISAS[0] if ISAS else ''}"),
        ([1.0, 0.6, 0.4], "low_rank_conv2d__reference"),
        ([1.0, 1.2, 1.1], None),
    ],
    ids=["native", "torch", "merged"],
)
def test_the_fastest_of_three_ways_is_taken(
    times: list[float], taken: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = low_rank_net()

    def clock(runs, **kwargs) -> list[float]:
        return times if hasattr(runs[0], "module") else [3.0, 2.0, 1.0]

    monkeypatch.setattr(measure, "typical_seconds", clock)
    fast = sk.convert(model, x)
    plan = sk.explain(fast).plan["0"]
    assert plan.kernel == taken and plan.dense_ms == (1000.0,)
    assert isinstance(fast[0], LowRankConv2d) == (taken is not None)
    assert_same_function(fast, model, x)
    if taken is not None:
        assert plan.tied == taken.endswith("reference") and fast[0].prepacked != plan.tied
        sk.save(fast, tmp_path / "net.slim.safetensors")
        again = sk.load(tmp_path / "net.slim.safetensors", into=model)
        assert again[0].kernel == fast[0].kernel and again[0].prepacked == fast[0].prepacked
        with torch.no_grad():
            assert torch.equal(again(x), fast(x))


def test_the_rank_may_be_kept_whatever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``merge_low_rank`` off, chains and low-rank layers keep the saving on disk; the faster kernel is taken."""
    model, x = low_rank_net()
    chain = nn.Sequential(
        nn.Conv2d(12, 8, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(8, 40, (1, 3), padding=(0, 1))
    )
    for net in (model, chain):
        monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5]))
        fast = sk.convert(net, x, policy=Policy(merge_low_rank=False))
        plan = sk.explain(fast).plan["0"]
        assert isinstance(fast[0], LowRankConv2d) and plan.format == "low_rank"
        assert plan.bytes_stored < plan.bytes_dense / 2
        assert_same_function(fast, net, x)
    monkeypatch.setattr(measure, "typical_seconds", Clock([0.5], [1.0]))
    fast = sk.convert(model, x, policy=Policy(merge_low_rank=False))
    assert fast[0].kernel == "low_rank_conv2d__reference"
    fast = sk.convert(chain, x, policy=Policy(merge_low_rank=False))
    assert [type(m) for m in fast] == [nn.Conv2d, nn.Conv2d]


def test_the_cost_model_keeps_thin_ranks_and_merges_thick_ones() -> None:
    policy = Policy(measure=False)
    for rank, cls in ((8, LowRankConv2d), (250, nn.Conv2d)):
        conv = LowRankConv2d(64, 64, 3, padding=1, kind="tai", ranks=(rank,)).eval()
        model, x = nn.Sequential(conv, nn.ReLU()), torch.randn(1, 64, 16, 16)
        fast = sk.convert(model, x, policy=policy)
        assert type(fast[0]) is cls, sk.explain(fast)
        assert "by the cost model: predicted" in sk.explain(fast).plan["0"].reason
        assert_same_function(fast, model, x)


def test_a_model_that_came_low_rank_is_never_merged_for_a_slow_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopwatch finds the converted model slower than the model as it was, which beats its merged twin."""
    model, x = low_rank_net()
    for original, merged, cls in ((1.0, 3.0, LowRankConv2d), (3.0, 1.0, nn.Conv2d)):
        monkeypatch.setattr(measure, "typical_seconds", Clock([1.0], [0.5], [original, merged, 1.1]))
        fast = sk.convert(model, x)
        assert type(fast[0]) is cls
        assert_same_function(fast, model, x)
