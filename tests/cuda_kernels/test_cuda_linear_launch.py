"""`graphed(one_launch="linear")`: linear layers that follow each other in one launch, a chain of 1x1 convolutions.

That the results are the model's and those of float64, which layers are taken, and what is refused. The launches run in
the CPU emulation, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_stand_in import close, layers_of_launches, only, place
from torch import Tensor, nn

from slimkernels import graphed
from slimkernels.formats import BSRWeight
from slimkernels.inference.cuda_linear_chain import linear_chain_of
from slimkernels.inference.one_launch import OneLaunch
from slimkernels.nn import BlockSparseConv2d
from slimkernels.testing import assert_close, reference_bsr_linear, scale_bsr_linear

__all__ = ["place"]  # a fixture, which its users name

BF16 = torch.bfloat16


def linear(taken: int, features: int, dtype: torch.dtype = BF16, bias: bool = True) -> nn.Linear:
    return nn.Linear(taken, features, bias=bias, dtype=dtype).requires_grad_(False)


def classifier(place: str, dtype: torch.dtype = BF16) -> nn.Sequential:
    """Features that are no multiples of 8 at the end, and between the last two layers."""
    torch.manual_seed(0)
    modules = (linear(72, 64, dtype), nn.ReLU(inplace=True), nn.Dropout(), linear(64, 36, dtype, bias=False),
               nn.Identity(), linear(36, 10, dtype))  # fmt: skip
    return nn.Sequential(*modules).to(place).eval()


def rows(n: int, place: str, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(n, 72, generator=torch.Generator().manual_seed(n)).to(place, dtype)


RUN = "0 to 5 (3 linear layers)"


def test_linear_layers_are_one_launch(place: str, monkeypatch: pytest.MonkeyPatch):
    model = classifier(place)
    launched = layers_of_launches(monkeypatch)
    fast = graphed(model, [rows(1, place), rows(16, place), rows(17, place)], one_launch="linear", warm_up_calls=1)
    one, most, many = fast.recordings.values()
    assert launched == [3] * 4  # the warm-up's and the captured ones of two
    assert one.in_one_launch == most.in_one_launch == [RUN] and one.reasons == {}
    assert many.in_one_launch == [] and many.reasons == {RUN: "17 rows, not 1 to 16"}
    for n in (1, 16, 17):
        y = fast(rows(n, place))
        assert y.is_contiguous() and close(y, model(rows(n, place)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("n", [1, 5])
def test_every_layer_is_that_of_float64(n: int, dtype: torch.dtype, place: str):
    modules, given = list(classifier(place, dtype)), rows(n, place, dtype).cpu()
    for end, relu in ((3, True), (5, False), (6, False)):
        layer: Any = next(module for module in reversed(modules[:end]) if isinstance(module, nn.Linear))
        weight = BSRWeight.from_dense(layer.weight, tuple(layer.weight.shape))
        bias = None if layer.bias is None else layer.bias.cpu()
        reference = reference_bsr_linear(given, weight, bias, "relu" if relu else "none")
        scale, terms = scale_bsr_linear(given, weight, bias)
        bound = {"scale": scale, "terms": terms, "name": f"the first {end} modules"}
        x = rows(n, place, dtype)
        given = linear_chain_of(modules[:end])(x).cpu()
        assert_close(given, reference, **bound)
        kept = layer.weight.clone()
        layer.weight[reference[0].argmax()] *= 0.5
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(linear_chain_of(modules[:end])(x).cpu(), reference, **bound)
        layer.weight.copy_(kept)


class Network(nn.Module):
    """A stem, a chain and a classifier, with a flatten between the two that is no module."""

    def __init__(self) -> None:
        super().__init__()

        def sparse(epilogue: str) -> BlockSparseConv2d:
            keep = torch.rand(1, 36) < 0.3
            conv = nn.Conv2d(64, 64, 3, padding=1, dtype=BF16)
            return BlockSparseConv2d.from_dense(conv, (64, 16), keep, epilogue)

        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, dtype=BF16), nn.ReLU(), sparse("relu_maxpool2"), sparse("relu_maxpool2"),
            sparse("relu_maxpool2"),
        )  # fmt: skip
        self.classifier = nn.Sequential(linear(64, 64), nn.ReLU(), nn.Dropout(), linear(64, 10))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


def test_a_network_is_three_launches(place: str):
    torch.manual_seed(0)
    model = Network().to(place)
    x = torch.randn(2, 3, 8, 8).to(place, BF16)
    fast = graphed(model, x, one_launch=("chain", "stem", "linear"))
    assert only(fast).in_one_launch == [
        "the stem features.0 and features.2", "features.3 to features.4 (2 layers)",
        "classifier.0 to classifier.3 (2 linear layers)",
    ]  # fmt: skip
    assert only(fast).reasons == {} and close(fast(x), model(x))


def test_a_weight_that_was_written_is_refused(place: str):
    model = classifier(place)
    fast = graphed(model, rows(2, place), one_launch="linear")
    fast(rows(2, place))
    last: Any = model[5]
    last.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"record it again with graphed\(model, example_inputs, one_launch='linear"):
        fast(rows(2, place))


def replaced(at: int, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.__setitem__(at, make().eval())


ALONE = "no other such layer stands next to it"
FEW = "the kernel takes features in multiples of 8, not 36"
CHANGES: dict[str, tuple[Callable[[Any], None], list[str], dict[str, str]]] = {
    "a hook on a layer": (
        lambda m: m[3].register_forward_hook(lambda *_: None), [], {"0": ALONE, "3": "it has a hook", "5": FEW}),
    "a hook on a ReLU": (
        lambda m: m[1].register_forward_hook(lambda *_: None), ["3 to 5 (2 linear layers)"], {"0": ALONE}),
    "dropout that drops": (lambda m: m[2].train(), ["3 to 5 (2 linear layers)"], {"0": ALONE}),
    "another activation": (replaced(4, nn.Sigmoid), ["0 to 3 (2 linear layers)"], {"5": FEW}),
    "float32": (
        replaced(5, lambda: linear(36, 10, torch.float32)), ["0 to 3 (2 linear layers)"],
        {"5": "it is in torch.float32"}),
    "features that do not fit": (replaced(3, lambda: linear(56, 36)), ["3 to 5 (2 linear layers)"], {"0": ALONE}),
    "few features": (
        replaced(0, lambda: linear(71, 64)), ["3 to 5 (2 linear layers)"],
        {"0": "the kernel takes features in multiples of 8, not 71"}),
    "many weights": (
        replaced(0, lambda: linear(2**15, 64)), ["3 to 5 (2 linear layers)"],
        {"0": "a kernel of its own has all processors to read its 2097152 weights"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_in_no_run(name: str, place: str):
    change, runs, reasons = CHANGES[name]
    model = classifier("cpu")
    change(model)
    found = OneLaunch(model.to(place), "linear")
    assert [str(run) for run in found.runs] == runs and found.reasons == reasons


def test_long_runs_are_cut(place: str):
    model = nn.Sequential(*[module for _ in range(33) for module in (linear(8, 8), nn.ReLU())]).to(place).eval()
    found = OneLaunch(model, "linear")
    assert [str(run) for run in found.runs] == ["0 to 62 (32 linear layers)"] and found.reasons == {"64": ALONE}


def test_refuses(place: str):
    (run,) = OneLaunch(model := classifier(place), "linear").runs
    x = rows(4, place)[None]
    assert torch.equal(run(x), model(x)) and [*run.outcomes] == ["its input is no batch of rows in torch.bfloat16"]
    for modules, error, message in (
        ([nn.ReLU(), linear(8, 8)], ValueError, "expected a Linear in front of a ReLU"),
        ([nn.Identity().eval()], ValueError, "expected a Linear at least, got none"),
        ([linear(8, 8), nn.Sigmoid()], TypeError, "expected Linear, ReLU, Identity, Dropout, got Sigmoid"),
        ([linear(8, 8), nn.Dropout()], ValueError, "expected eval mode, got a Dropout in training mode"),
        ([linear(8, 16), linear(8, 8)], ValueError, "it takes 8 features in torch.bfloat16, not what is in front"),
    ):
        with pytest.raises(error, match=f"^linear_chain_of: {message}"):
            linear_chain_of(modules)
