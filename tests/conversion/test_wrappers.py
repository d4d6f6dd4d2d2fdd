"""Wrappers of a whole model: DataParallel, DistributedDataParallel, AveragedModel, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import FORCE, Tiny, assert_same_function, images, sparse_tiny
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel

from slimkernels import analyze, convert, explain, factorize_, finalize_, load, prune_, save
from slimkernels.compress.factorization.factorize import factorization_report
from slimkernels.compress.pruning.prune import apply_masks_, mask_sparsity, masks
from slimkernels.compress.pruning.shrink import shrink_
from slimkernels.conversion.wrappers import unwrapped
from slimkernels.nn import BlockSparseConv2d, LowRankConv2d


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "several": lambda model: compiled(nn.DataParallel(AveragedModel(model))),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    if request.param != "DistributedDataParallel":
        yield WRAPPERS[request.param]
        return
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield WRAPPERS[request.param]
    finally:
        distributed.destroy_process_group()


def inside(wrapper: Any) -> nn.Module:
    """The model in the wrapper, found without the function under test."""
    return next(module for module in wrapper.modules() if isinstance(module, Tiny))


def test_convert_takes_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = sparse_tiny().eval()
    wrapper = wrap(model)
    before = {name: id(module) for name, module in wrapper.named_modules()}
    for inputs in (None, images()):
        fast = convert(wrapper, inputs, policy=FORCE)
        assert type(fast) is Tiny and type(fast.features[1]) is nn.Identity
        assert explain(fast).plan.layers == explain(convert(model, inputs, policy=FORCE)).plan.layers
        assert_same_function(fast, model, images())
    assert before == {name: id(module) for name, module in wrapper.named_modules()}
    assert [layer.name for layer in analyze(wrapper).layers] == [layer.name for layer in analyze(model).layers]


def test_a_file_of_a_wrapper_loads_into_the_plain_model_and_back(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, path = sparse_tiny().eval(), tmp_path / "model.slim.safetensors"
    fast = convert(wrap(model), policy=FORCE, training=True)
    save(wrap(fast), path)
    assert explain(wrap(fast)).plan == explain(path).plan == explain(fast).plan
    for into in (Tiny(), wrap(Tiny())):
        loaded = load(path, into=into)
        assert type(loaded) is Tiny
        assert_same_function(loaded.eval(), model, images())


def test_prune_and_its_relatives_use_the_names_of_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapper = wrap(Tiny())
    assert prune_(wrapper, 0.5, (16, 1), layers=["features.3"]) is wrapper
    model = inside(wrapper)
    assert list(masks(wrapper)) == list(masks(model)) == ["features.3"]
    assert mask_sparsity(wrapper) == 0.5
    with torch.no_grad():
        model.features[3].parametrizations.weight.original.add_(1.0)
    apply_masks_(wrapper)
    assert finalize_(wrapper) is wrapper and masks(wrapper) == {}
    assert float((model.features[3].weight == 0).double().mean()) == 0.5
    assert isinstance(convert(wrapper, policy=FORCE).features[3], BlockSparseConv2d)


def test_factorize_replaces_layers_of_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapper = wrap(Tiny())
    assert factorize_(wrapper, rank=4, layers=["features.3"]) is wrapper
    assert isinstance(inside(wrapper).features[3], LowRankConv2d)
    for subject in (wrapper, inside(wrapper)):
        assert [record.name for record in factorization_report(subject)] == ["features.3"]


def test_shrink_takes_the_model_inside() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    prune_(model, 0.5, granularity="channel", layers="0")
    assert shrink_(nn.DataParallel(model)).channels == {"0": (16, 8)} and model[0].out_channels == 8


def test_parts_that_were_compiled_convert_as_what_they_were(tmp_path: Path) -> None:
    model, x = sparse_tiny().eval(), images()
    prune_(model, 0.5, (16, 1), layers=["features.3"])
    plain = convert(model, x, policy=FORCE)
    mixed = sparse_tiny().eval()
    prune_(mixed, 0.5, (16, 1), layers=["features.3"])
    mixed.features = compiled(mixed.features)
    fast = convert(mixed, x, policy=FORCE)
    assert explain(fast).plan.layers == explain(plain).plan.layers
    assert fast.features[3].block_shape == (16, 1) and type(fast.features[4]) is nn.Identity
    assert_same_function(fast, model, x)
    save(fast, tmp_path / "model")
    assert_same_function(load(tmp_path / "model", into=Tiny()), model, x)
    assert "_orig_mod" in dict(mixed.named_modules())["features"]._modules  # the original stays compiled


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_is_refused_with_the_way_out() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    for name, call in (("convert", convert), ("prune_", prune_), ("factorize_", lambda m: factorize_(m, rank=1))):
        with pytest.raises(TypeError, match=rf"^{name}: expected a model as it was before torch.jit, got a Recursive"):
            call(scripted)


def test_other_things_are_returned_as_they_are() -> None:
    model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    assert unwrapped("f", model) is model and unwrapped("f", 3) == 3 and unwrapped("f", None) is None
