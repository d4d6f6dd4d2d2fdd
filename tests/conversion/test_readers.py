"""Layers whose weight something else reads: convert, factorize_ and prune_ leave the same ones alone and say why."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conversion_models import BACKEND, FORCE, assert_same_function
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import Policy, convert, explain, factorize_, prune_
from slimkernels.compress.factorization.factorize import factorization_report
from slimkernels.compress.pruning.prune import masks
from slimkernels.conversion.calls import capture
from slimkernels.conversion.readers import weight_readers
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear

SPARSE, LOW_RANK = (BlockSparseConv2d, BlockSparseLinear), (LowRankConv2d, LowRankLinear)
FEATURES = 64
# Swaps every layer that a kernel takes, and compares the whole model.
CHECKED = Policy(min_speedup=0, repeats=1, budget_s=0, backend=BACKEND)


class Net(nn.Module):
    """``free`` is a layer like any other; ``odd`` is the one that subclasses read; ``last`` is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.odd, self.last = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def read(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.read(F.relu(self.free(x))))


class CosineHead(Net):
    def read(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.odd.weight, dim=-1))


class CastsLikeT5(Net):
    def read(self, x: Tensor) -> Tensor:
        if isinstance(self.odd.weight, Tensor) and x.dtype != self.odd.weight.dtype:
            x = x.to(self.odd.weight.dtype)
        return self.odd(x)


class Functional(Net):
    """As the attention of Swin Transformers: a function is handed the parameters."""

    def read(self, x: Tensor) -> Tensor:
        return F.linear(x, self.odd.weight, bias=self.odd.bias)


class BiasAlone(Net):
    def read(self, x: Tensor) -> Tensor:
        return self.odd(x) - self.odd.bias


class Aliased(Net):
    """Neither the graph nor the attributes of ``self`` show this one where the model cannot be traced."""

    def read(self, x: Tensor) -> Tensor:
        for layer in [self.odd]:
            x = F.linear(x, layer.weight)
        return x


class Normalised(Net):
    """A weight that a property computes with."""

    @property
    def unit(self) -> Tensor:
        return self.odd.weight / self.odd.weight.norm()

    def read(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unit)


def untraceable(kind: type[Net]) -> type[Net]:
    """The class with a branch on the values of its input."""

    def forward(self: Net, x: Tensor) -> Tensor:
        return kind.forward(self, x) if float(x.sum()) < 1e30 else x

    return type(f"Untraceable{kind.__name__}", (kind,), {"forward": forward})


class Tied(nn.Module):
    """A language model: its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.free, self.odd = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 96, bias=False)
        self.odd.weight = self.embed.weight
        self.last = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.free(self.embed(x.abs().mul(10).long().clamp(max=95)))))


class Around(nn.Module):
    """A layer of torch's own around others."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.free, self.inside, self.last = nn.Linear(64, 64), inside, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.free(x)[:, None]
        attends = isinstance(self.inside, nn.MultiheadAttention)
        y = self.inside(y, y, y, need_weights=False)[0] if attends else self.inside(y)
        return self.last(y[:, 0])


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) + src


class StdConv2d(nn.Conv2d):
    """A convolution that standardises its weight in every call: zeros do not stay zeros."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Images(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.stem, self.odd = nn.Conv2d(1, 16, 1), odd
        self.free = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.odd(self.stem(x.view(-1, 1, 8, 8))))


@dataclass(frozen=True)
class Case:
    """A model, the layers that stay as they are, and a part of the reason given for them."""

    make: Callable[[], nn.Module]
    reason: str
    alone: tuple[str, ...] = ("odd",)


def encoder(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    return kind(64, 2, 64, dropout=0.0, batch_first=True, **options)


READ = "reads its weight past the layer"
IN_ENCODER = ("inside.self_attn.out_proj", "inside.linear1", "inside.linear2")
CASES = {
    "cosine head": Case(CosineHead, READ),
    "T5": Case(CastsLikeT5, READ),
    "functional": Case(Functional, READ),
    "bias": Case(BiasAlone, READ),
    "alias": Case(Aliased, READ),
    "property": Case(Normalised, READ),
    "tied": Case(Tied, "shared with another layer"),
    "attention": Case(
        lambda: Around(nn.MultiheadAttention(64, 2, batch_first=True)), "MultiheadAttention", ("inside.out_proj",)
    ),
    "encoder layer": Case(lambda: Around(encoder()), "which may read its weight", IN_ENCODER),
    "subclassed encoder layer": Case(lambda: Around(encoder(OwnEncoderLayer)), "which may read its weight", IN_ENCODER),
    "own forward": Case(lambda: Images(StdConv2d(16, 16, 3)), "StdConv2d"),
    "reflect": Case(lambda: Images(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")), "padding_mode='reflect'"),
    **{
        f"untraceable {kind.__name__}": Case(lambda kind=kind: untraceable(kind)(), READ)  # type: ignore[misc]
        for kind in (CosineHead, CastsLikeT5, Functional, BiasAlone, Normalised)
    },
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name].make()
    with torch.no_grad():
        model.get_submodule("free").weight[:16] = 0
    return model.eval()


@pytest.mark.parametrize("how", ["without inputs", "by the cost model", "measured"])
@pytest.mark.parametrize("name", CASES)
def test_convert_leaves_that_layer_alone_and_takes_the_others(name: str, how: str) -> None:
    model, case, x = build(name), CASES[name], torch.randn(3, 64)
    fast = convert(model, None if how == "without inputs" else x, policy=CHECKED if how == "measured" else FORCE)
    plan = explain(fast).plan
    for layer in case.alone:
        assert not isinstance(fast.get_submodule(layer), SPARSE)
        assert case.reason in plan[layer].reason and not plan[layer].supported
    if how != "measured":  # there a stopwatch decides about the whole model
        assert isinstance(fast.get_submodule("free"), SPARSE)
    assert not any("put back" in note for note in plan.notes)
    assert_same_function(fast, model, x)


@pytest.mark.parametrize("name", CASES)
def test_a_model_converted_for_training_runs_in_both_modes(name: str) -> None:
    model, case, x = build(name), CASES[name], torch.randn(3, 64)
    fast = convert(model, policy=FORCE, training=True)
    assert isinstance(fast.get_submodule("free"), SPARSE)
    assert not any(isinstance(fast.get_submodule(layer), SPARSE) for layer in case.alone)
    fast(x).sum().backward()
    with torch.no_grad():
        assert torch.allclose(fast.eval()(x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_factorize_leaves_that_layer_dense_and_refuses_it_by_name(name: str) -> None:
    model, case, x = build(name), CASES[name], torch.randn(3, 64)
    factorize_(model, rank=4)
    assert isinstance(model.get_submodule("free"), LOW_RANK)
    kept = {record.name: record.reason for record in factorization_report(model) if record.kind is None}
    assert set(case.alone) <= set(kept) and all(kept[layer] for layer in case.alone)
    model.train()(x).sum().backward()
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(model.eval()(x), expected, atol=1e-4)
    with pytest.raises(ValueError, match=f"factorize_: layer '{case.alone[0]}': "):
        factorize_(build(name), rank=4, layers=case.alone[0])


@pytest.mark.parametrize("name", CASES)
def test_prune_skips_that_layer_with_a_warning_unless_it_is_named(name: str) -> None:
    model, case = build(name), CASES[name]
    with pytest.warns(UserWarning, match=r"^prune_: .* dense, because convert could not use zeros there: ") as caught:
        prune_(model, 0.5, (16, 1))
    assert len(caught) == 1 and case.reason in str(caught[0].message) and case.alone[0] in str(caught[0].message)
    assert caught[0].filename == __file__
    assert "free" in masks(model) and not set(case.alone) & set(masks(model))
    with pytest.warns(UserWarning, match="could not use zeros"):
        prune_(build(name), 0.5, (16, 1), layers="*")  # a pattern is no name
    if name == "tied":
        return  # the mask would not reach the other owner, so it is refused even by name
    named = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_(named, 0.5, (16, 1), layers=list(case.alone))
        prune_(build(name), 0.5, (16, 1), layers="*", exclude=case.alone)
    assert set(masks(named)) == set(case.alone)


def test_a_model_of_such_layers_alone_is_left_as_it_is() -> None:
    model = nn.Sequential(encoder())
    with pytest.warns(UserWarning, match="2 layers stay dense"):
        assert prune_(model, 0.5, (16, 1)) is model
    assert masks(model) == {}


def test_a_run_shows_reads_that_neither_graph_nor_code_name() -> None:
    class Hidden(Net):
        def read(self, x: Tensor) -> Tensor:
            weight = operator.attrgetter("odd." + "weight")(self)
            return F.linear(x, weight) if float(x.sum()) < 1e30 else x

    model, x = Hidden(), torch.randn(2, 64)
    names = ["free", "odd", "last"]
    assert capture(model, [((x,), {})], names).reads == {"odd"}
    assert type(model.odd) is nn.Linear and type(model.free) is nn.Linear
    fast = convert(model, x, policy=FORCE)
    assert isinstance(fast.free, SPARSE) and type(fast.odd) is nn.Linear
    assert READ in explain(fast).plan["odd"].reason
    factorize_(model, rank=4, example_inputs=x)
    assert isinstance(model.free, LOW_RANK) and type(model.odd) is nn.Linear


def test_code_that_may_read_counts_only_where_there_is_no_run() -> None:
    model, x = untraceable(Aliased)(), torch.randn(2, 64)
    assert set(weight_readers(model)) == {"free", "odd", "last"}  # `layer.weight` may be that of any of them
    fast = convert(model, x, policy=FORCE)
    assert isinstance(fast.free, SPARSE) and type(fast.odd) is nn.Linear
    alone = convert(model, policy=FORCE)
    assert type(alone.free) is nn.Linear and "its code may read" in explain(alone).plan["free"].reason
    assert_same_function(alone, model, x)


def test_parts_of_one_buffer_are_no_shared_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    assert weight_readers(model) == {}
    model[1].weight = nn.Parameter(model[0].weight.detach()[:32])  # rows of another layer's weight
    assert set(weight_readers(model)) == {"0", "1"}
    model[2].weight = nn.Parameter(model[0].weight.detach().T)
    assert set(weight_readers(model)) == {"0", "1", "2"}


def test_a_weight_that_only_training_reads_may_be_pruned_but_not_factorized() -> None:
    class Penalised(Net):
        def read(self, x: Tensor) -> Tensor:
            return self.odd(x) + (self.odd.weight.square().sum() if self.training else 0.0)

    model = Penalised()
    prune_(model, 0.5, (16, 1))
    assert set(masks(model)) == {"free", "odd"}
    assert isinstance(convert(model, policy=FORCE).odd, SPARSE)
    assert type(convert(model, policy=FORCE, training=True).odd) is not BlockSparseLinear
    plain = factorize_(Penalised(), rank=4)
    assert isinstance(plain.free, LOW_RANK) and type(plain.odd) is nn.Linear


def test_a_weight_that_only_evaluation_reads_stays_in_a_model_to_be_trained() -> None:
    class FastInEval(Net):
        def read(self, x: Tensor) -> Tensor:
            return self.odd(x) if self.training else F.linear(x, self.odd.weight, self.odd.bias)

    model, x = FastInEval(), torch.randn(3, 64)
    fast = convert(model, policy=FORCE, training=True)
    assert isinstance(fast.free, SPARSE) and type(fast.odd) is nn.Linear
    assert_same_function(fast.eval(), model, x)


def test_looking_at_a_model_draws_no_random_numbers() -> None:
    class Noisy(Net):
        def read(self, x: Tensor) -> Tensor:
            return self.odd(x) + torch.randn(FEATURES)

    model = Noisy()
    before = torch.get_rng_state()
    weight_readers(model)
    prune_(model, 0.5, (16, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_what_only_initialisation_reads_is_free() -> None:
    class Resets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.reset()

        def reset(self) -> None:
            nn.init.normal_(self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) < 1e30 else x

    assert weight_readers(Resets()) == {}
    assert isinstance(convert(Resets(), policy=FORCE).fc, SPARSE)


def test_a_batch_norm_that_is_read_is_not_folded() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.weight.sum()

    model, x = Gate().eval(), torch.randn(1, 16, 6, 6)
    fast = convert(model, policy=FORCE)
    assert isinstance(fast.conv, SPARSE) and type(fast.bn) is nn.BatchNorm2d
    assert READ in explain(fast).plan["bn"].reason
    assert_same_function(fast, model, x)


def test_a_forward_put_on_the_instance_is_read_too() -> None:
    model = Functional()
    model.forward = lambda x: F.linear(x, model.free.weight)  # type: ignore[method-assign]
    assert "replaced on the instance" in str(explain(convert(model, policy=FORCE)).plan.notes)
    assert "free" in weight_readers(model)
