"""Chains of native layers in bf16, where torch's switches let float32 be multiplied so."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.conversion.plan import Policy
from slimkernels.inference import Replay, chain_forms, graphed
from slimkernels.inference.batches import same
from slimkernels.kernels.cpu import pairs
from slimkernels.kernels.cpu.chain import Chain, Form, Link, forms
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.library import library, unavailable_reason
from slimkernels.kernels.cpu.pairs import bf16_allowed
from slimkernels.kernels.strips import pack_strips
from slimkernels.nn import BlockSparseConv2d

pytestmark = pytest.mark.skipif(unavailable_reason("scalar") is not None, reason="the extension is not built")
ALL = Policy(measure=False, min_speedup=0.0)


def switch(to: str) -> None:
    torch.backends.mkldnn.conv.fp32_precision = to  # type: ignore[attr-defined]  # torch's stubs lack it
    torch.backends.mkldnn.matmul.fp32_precision = to  # type: ignore[attr-defined]


@pytest.fixture(params=["scalar", "fastest"])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The switches at bf16, on the engine that runs everywhere and on the best of this machine."""
    module = library()[0]
    assert module is not None
    best = module.bf16_engines()[0]
    if request.param == "fastest" and best == "scalar":
        pytest.skip("this CPU multiplies no bf16")
    engine = "scalar" if request.param == "scalar" else best
    monkeypatch.setattr(pairs, "fast_engines", lambda: (engine,))
    monkeypatch.setattr(pairs, "MEASURED_FASTER", {engine})
    switch("bf16")
    yield
    switch("ieee")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


def pruned(block: tuple[int, int] = (16, 1)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(48, 48, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    with torch.no_grad():
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.mul_(2)  # lest the biases alone are seen
    return finalize_(prune_(model, 0.5, block)).eval()


def like_bf16(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """As near to float64 as torch's own bf16, up to a factor of two; and not float32, which nobody asked for."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        theirs = copy.deepcopy(model).bfloat16()(x.bfloat16()).double()
    error, usual = (float((y - exact).norm() / exact.norm()) for y in (got.double(), theirs))
    assert 1e-5 < error <= 2 * usual, (error, usual)


@pytest.mark.parametrize("n", [16, 30])
@pytest.mark.parametrize("block", [(16, 1), (16, 16), (1, 1)])
def test_a_recording_multiplies_in_bf16(bf16: None, n: int, block: tuple[int, int]) -> None:
    model, x = pruned(block), torch.randn(n, 3, 24, 20)
    # Measured, the engine that runs everywhere would lose to float32.
    served = Replay(convert(model, example_inputs=x, policy=ALL), x, measure=False)
    assert {form for _, form in served.chains} == {"bf16"}
    got = served(x)
    like_bf16(got, model, x)
    assert torch.equal(served(x), got)
    # The switches count when something is recorded.
    switch("ieee")
    assert torch.equal(served(x), got)


def test_a_plain_call_follows_the_switch(bf16: None) -> None:
    """A run of our modules is a chain without a recording."""
    torch.manual_seed(0)
    layers = [BlockSparseConv2d.from_dense(nn.Conv2d(16, 16, 3, padding=1), (16, 1), epilogue="relu") for _ in range(3)]
    net, x = nn.Sequential(*layers).eval(), torch.randn(32, 16, 12, 12)
    fast = convert(nn.Sequential(*layers).eval(), policy=ALL)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        errors = []
        for to in ("bf16", "ieee", "bf16"):
            switch(to)
            errors.append(float((fast(x).double() - exact).norm() / exact.norm()))
    assert errors[0] == errors[2] and 1e-4 < errors[0] < 1e-2 and errors[1] < 1e-6


def test_layers_of_one_output_pixel_and_threads(bf16: None) -> None:
    model, x = nn.Sequential(nn.Linear(200, 96), nn.ReLU(), nn.Linear(96, 7)).eval(), torch.randn(64, 200)
    fast = convert(finalize_(prune_(model, 0.5, (16, 1))), example_inputs=x, policy=ALL)
    replay = Replay(fast, x, measure=False)
    assert {form for _, form in replay.chains} == {"bf16"}
    first = replay(x)
    like_bf16(first, model, x)
    wrong: list[str] = []

    def serve() -> None:
        for _ in range(20):
            if not torch.equal(replay(x), first):
                wrong.append("another result")

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def layer(kernel: int = 3, c: int = 16) -> NativeLayer:
    weight = torch.ones(c, c, kernel, kernel)
    stored = sk.BSRWeight.from_dense(weight, (16, 1))
    packed = pack_strips(stored.values, stored.crow_indices, stored.col_indices, weight.shape, (16, 1), 16)
    return NativeLayer("scalar", "test", packed, tuple(weight.shape), ((1, 1), (kernel // 2,) * 2, (1, 1)))  # type: ignore[arg-type]


def test_which_chains_are_in_bf16(bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    links, size = [Link(layer(), 0), Link(layer(), 1)], [(16, 8, 8)]

    def first(n: int, links: list[Link] = links) -> Form:
        return forms(links, n, size)[0]

    assert [n for n in (1, 11, 12, 16, 17, 23, 24, 32, 48) if first(n) is Form.BF16] == [12, 16, 24, 32, 48]
    assert first(16, [Link(layer(9), 0)]) is not Form.BF16, "more taps than an engine knows"
    assert first(16, [Link(layer(), 0), Link(layer(), 1, residual=0)]) is Form.BF16
    switch("ieee")
    assert first(16) is not Form.BF16 and not bf16_allowed()
    torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]
    assert first(16) is not Form.BF16, "matrix products stay in float32"
    switch("bf16")
    monkeypatch.setattr(pairs, "MEASURED_FASTER", {"another"})
    assert first(16) is not Form.BF16 and forms(links, 16, size)[1] is Form.BF16, "taken where it is measured faster"
    monkeypatch.setattr(pairs, "fast_engines", tuple)
    assert first(16) is not Form.BF16, "nothing here multiplies bf16 faster"


def test_memory_of_a_chain_in_bf16(bf16: None) -> None:
    """Half of float32's, but for the output, which is written in float32; and the packs that it reads alone."""
    links, size = [Link(layer(), 0), Link(layer(), 1)], [(16, 8, 8)]
    torch.set_num_threads(1)
    chain = Chain.of(links, 16, size, Form.BF16)
    numbers = 16 * 16 * 8 * 8
    assert chain.activations == (2 * numbers, 2 * numbers, 4 * numbers)
    assert [t.dtype for t in chain.weights()] == [torch.bfloat16, torch.int32, torch.int32] * 2
    again = chain.with_weights([t.clone() for t in chain.weights()])
    assert all(torch.equal(a, b) for a, b in zip(chain.weights(), again.weights()))


def test_convert_compares_as_bf16_does(bf16: None) -> None:
    """A model with a plain call in bf16 agrees with its original as well as the switches allow."""
    model, x = pruned(), torch.randn(16, 3, 24, 20)
    fast = convert(model, example_inputs=x, policy=ALL)
    assert fast.slimkernels_plan.swapped  # type: ignore[union-attr]


def test_what_a_recording_in_bf16_is_compared_with(bf16: None) -> None:
    """Rounding passes, a wrong layer, another place or a lost NaN does not."""
    torch.manual_seed(0)
    a = torch.randn(50, 20)
    assert same(a, a + 0.05 * torch.randn_like(a)) and same(a, a.bfloat16().float())
    assert not same(a, torch.randn_like(a)) and not same(a, a.roll(1, 0)) and not same(a, 1.2 * a)
    lost, none = a.clone(), torch.full((3,), float("nan"))
    lost[0, 0] = float("nan")
    assert same(lost, lost) and not same(lost, a) and not same(a, lost) and same(none, none)
    infinite = lost.nan_to_num(float("inf"))
    assert same(infinite, infinite) and not same(infinite, lost) and not same(infinite, -infinite)
    switch("ieee")
    assert not same(a, a + 0.05 * torch.randn_like(a))


def test_smaller_batches_are_filled_up_when_the_switches_are_back(bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded in bf16 then differs from the model by more than the order of sums explains."""
    model, x = pruned(), torch.randn(32, 3, 24, 20)
    fast = convert(model, example_inputs=x, policy=ALL)
    monkeypatch.setattr(chain_forms, "_SHORTEST_MEASURED_S", 1e9)  # nothing is timed
    served = graphed(fast, x)
    switch("ieee")
    with pytest.warns(UserWarning, match="filled up with zeros"):
        served(x[:20])
    assert torch.equal(served(x[:20]), served(x)[:20])
    like_bf16(served(x[:20]), model, x[:20])


def test_packs_do_not_hang_on_the_default_dtype(bf16: None) -> None:
    own = layer()
    torch.set_default_dtype(torch.float64)
    try:
        packed = own.pairs.packed
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(packed, layer().pairs.packed, strict=True))
