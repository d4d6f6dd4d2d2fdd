"""`graphed(one_launch="stem")`: a dense convolution of images and the block-sparse one behind it in one launch.

Which layers are one, that the results are the model's and those of float64, and what is refused. The launches run in
the CPU emulation, or on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph_stand_in import close, layers_of_launches, only, place
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import graphed
from slimkernels.inference.cuda_stem import stem_of
from slimkernels.inference.one_launch import OneLaunch
from slimkernels.kernels import cuda_tensor_cores
from slimkernels.nn import BlockSparseConv2d, FusedConv2d
from slimkernels.testing import UNIT_ROUNDOFF, assert_close, reference_bsr_conv2d, scale_bsr_conv2d

__all__ = ["place"]  # a fixture, which its users name

BF16 = torch.bfloat16


def first(c_in: int = 3, c_out: int = 64, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, **{"padding": size // 2, "dtype": BF16, **options}).requires_grad_(False)


def sparse(epilogue: str = "relu", block: tuple[int, int] = (64, 16), dtype: torch.dtype = BF16, **options: Any) -> Any:
    conv = nn.Conv2d(64, 64, 3, **{"padding": 1, **options}).to(dtype)
    keep = torch.rand(64 // block[0], 9 * 64 // block[1]) < 0.3
    return BlockSparseConv2d.from_dense(conv, block, keep, epilogue).requires_grad_(False)


class Network(nn.Module):
    """A stem, two more block-sparse layers and a classifier."""

    def __init__(self, *stem: nn.Module) -> None:
        super().__init__()
        stem = stem or (first(), nn.ReLU(inplace=True), sparse("relu_maxpool2"))
        self.features = nn.Sequential(*stem, sparse(), sparse("none"))
        self.classifier = nn.Sequential(nn.Flatten(), nn.LazyLinear(10, dtype=BF16))
        self.eval()(torch.zeros(1, 3, 8, 6, dtype=BF16))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


def network(place: str, *stem: nn.Module) -> Network:
    torch.manual_seed(0)
    return Network(*stem).to(place)


def images(n: int, place: str, w: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, w, generator=torch.Generator().manual_seed(n)).to(place, BF16)


STEM, CHAIN = "the stem features.0 and features.2", "features.3 to features.4 (2 layers)"


def test_the_two_layers_are_one_launch(place: str, monkeypatch: pytest.MonkeyPatch):
    model = network(place)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    launched: list[int] = []
    launch = cuda_tensor_cores.launch_stem_conv2d
    monkeypatch.setattr(cuda_tensor_cores, "launch_stem_conv2d", lambda x, *a: launched.append(len(x)) or launch(x, *a))
    fast = graphed(model, [images(2, place), images(17, place)], one_launch="stem", warm_up_calls=1)
    assert [n for n in launched if n] == [2, 2, 17, 17]  # the warm-up's and the captured ones
    for recording in fast.recordings.values():
        assert recording.in_one_launch == [STEM] and recording.reasons == {}
    assert f"a CUDA graph, in one launch: {STEM}\n" in repr(fast)
    for n, factor in ((2, 1), (2, -3), (17, 1)):
        x = images(n, place) * factor
        assert close(fast(x), model(x))
    assert fast.model is model and all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
    launched.clear()
    graphed(model, images(2, place), one_launch=())
    assert launched == []


def test_a_chain_begins_behind_the_stem(place: str, monkeypatch: pytest.MonkeyPatch):
    model = network(place)
    chains = layers_of_launches(monkeypatch)
    fast = graphed(model, [images(2, place), images(17, place)], one_launch=("chain", "stem"), warm_up_calls=1)
    few, many = fast.recordings.values()
    assert few.in_one_launch == [STEM, CHAIN] and few.reasons == {} and chains == [2, 2]
    assert many.in_one_launch == [STEM] and many.reasons == {CHAIN: "17 images, not 1 to 16"}
    assert close(fast(images(2, place)), model(images(2, place)))
    chains.clear()
    alone = graphed(model, images(2, place), one_launch="chain")
    assert only(alone).in_one_launch == ["features.2 to features.4 (3 layers)"] and only(alone).reasons == {}


LAYOUTS: dict[str, tuple[Callable[[], Sequence[nn.Module]], str]] = {
    "a fused first layer": (lambda: (FusedConv2d.from_dense(first(), "relu"), sparse()), "0 and features.1"),
    "a fused layer and a ReLU": (
        lambda: (FusedConv2d.from_dense(first()), nn.ReLU(), sparse()), "0 and features.2"),
    "modules that do nothing": (
        lambda: (first(), nn.Identity(), nn.ReLU(), nn.Dropout(), sparse()), "0 and features.4"),
    "inner sequentials": (
        lambda: (nn.Sequential(first(), nn.ReLU()), nn.Sequential(nn.Sequential(sparse()), nn.Sigmoid())),
        "0.0 and features.1.0.0"),
    "no biases": (lambda: (first(bias=False), nn.ReLU(), sparse("relu_maxpool2", bias=False)), "0 and features.2"),
    "same padding": (lambda: (first(padding="same"), nn.ReLU(), sparse("none")), "0 and features.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_where_the_two_layers_stand(name: str, place: str):
    make, names = LAYOUTS[name]
    torch.manual_seed(0)
    model = network(place, *make())
    fast = graphed(model, images(2, place), one_launch="stem")
    assert only(fast).in_one_launch == [f"the stem features.{names}"]
    assert close(fast(images(2, place)), model(images(2, place)))


@pytest.mark.parametrize("dropped", [False, True])
def test_the_stem_is_that_of_float64(dropped: bool, place: str):
    torch.manual_seed(0)
    dense, second = first().to(place), sparse("relu_maxpool2").to(place).eval()
    x = images(3, place)
    middle = F.conv2d(x.double(), dense.weight.double(), dense.bias.double(), padding=1).relu().to(BF16)
    arguments = (middle, second.weight_bsr(), second.bias, (1, 1), (1, 1), (1, 1), "relu_maxpool2")
    scale, terms = scale_bsr_conv2d(*arguments)
    # What lies between is rounded from sums in fp32, here and there to the 16-bit number beside that of the double.
    bound = {"scale": scale, "terms": terms, "u_mul": 2 * UNIT_ROUNDOFF[BF16]}
    reference = reference_bsr_conv2d(*arguments)
    if dropped:
        dense.weight[5, 1, 0, 2] = 0
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(stem_of(dense, second)(x), reference, **bound, name="a tap is missing")
    else:
        assert_close(stem_of(dense, second)(x), reference, **bound, name="stem")


@pytest.mark.parametrize("write", ["first weight", "first bias", "values", "bias", "state dict"])
def test_a_weight_that_was_written_is_refused(write: str, place: str):
    model = network(place)
    fast = graphed(model, images(2, place), one_launch="stem")
    fast(images(2, place))
    features: Any = model.features
    if write == "state dict":
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    else:
        of = {"first weight": features[0].weight, "first bias": features[0].bias}
        of.get(write, getattr(features[2], write, None)).add_(1)
    with pytest.raises(RuntimeError, match=r"record it again with graphed\(model, example_inputs, one_launch='stem'\)"):
        fast(images(2, place))


def test_a_write_to_another_layer_is_seen(place: str):
    model = network(place)
    fast = graphed(model, images(2, place), one_launch="stem")
    before = fast(images(2, place))
    features: Any = model.features
    features[3].values.mul_(-3)
    after = fast(images(2, place))
    assert close(after, model(images(2, place))) and not close(after, before)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replaced(at: int, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.features.__setitem__(at, make().eval())


class OwnConv2d(nn.Conv2d):
    pass


CHANGES: dict[str, tuple[Callable[[Any], None], dict[str, str]]] = {
    "a hook on the first layer": (lambda m: hooked(m.features[0]), {"features.0": "it has a hook"}),
    "a hook between": (lambda m: hooked(m.features[1]), {"features.0": "features.1 has a hook"}),
    "a hook on the second": (lambda m: hooked(m.features[2]), {"features.0": "features.2 has a hook"}),
    "a hook around": (lambda m: hooked(m.features), {"features.0": "features has a hook"}),
    "a forward of its own": (
        lambda m: setattr(m.features[1], "forward", m.features[1].forward),
        {"features.0": "features.1 has a forward of its own"}),
    "no ReLU": (replaced(1, nn.Identity), {"features.0": "no ReLU stands between the two"}),
    "another activation": (
        replaced(1, nn.ReLU6), {"features.0": "features.1 follows it, which is no block-sparse convolution"}),
    "a dense second layer": (
        replaced(2, lambda: first(64)), {"features.0": "features.2 follows it, which is no block-sparse convolution"}),
    "nothing behind": (
        lambda m: setattr(m, "features", m.features[:2]), {"features.0": "no block-sparse convolution follows it"}),
    "a pooled first layer": (
        replaced(0, lambda: FusedConv2d.from_dense(first(), "relu_maxpool2")),
        {"features.0": "a max-pool stands between the two"}),
    "training mode": (lambda m: m.features[2].train(), {"features.0": "features.2 is in training mode"}),
    "a class of its own": (
        replaced(0, lambda: OwnConv2d(3, 64, 3, padding=1, dtype=BF16)), {"features.0": "it is a OwnConv2d"}),
    "a stride": (
        replaced(0, lambda: first(stride=2)),
        {"features.0": "the kernel takes stride, padding and dilation 1, not (2, 2), (1, 1), (1, 1)"}),
    "no padding behind": (
        replaced(2, lambda: sparse(padding=0)),
        {"features.0": "the kernel takes stride, padding and dilation 1, not (1, 1), (0, 0), (1, 1)"}),
    "a border that is not zero": (
        replaced(0, lambda: first(padding_mode="reflect")),
        {"features.0": "padding_mode='reflect' is not supported, expected 'zeros'"}),
    "one channel": (
        replaced(0, lambda: first(1)),
        {"features.0": "stem_conv2d: expected first_weight (64, 3, 3, 3), got (64, 1, 3, 3)"}),
    "five taps": (
        replaced(0, lambda: first(size=5)),
        {"features.0": "stem_conv2d: expected first_weight (64, 3, 3, 3), got (64, 3, 5, 5)"}),
    "blocks of 32": (
        replaced(2, lambda: sparse(block=(32, 16))),
        {"features.0": "stem_conv2d: expected weight_shape (up to 64, 64, 3, 3) and blocks of 64 x multiples of 16, "
                       "got (64, 64, 3, 3) and (32, 16)"}),
    "float32": (
        replaced(2, lambda: sparse(dtype=torch.float32)),
        {"features.0": "the kernel takes float16 or bfloat16, not torch.bfloat16 and torch.float32"}),
    "many channels": (
        replaced(0, lambda: first(8)), {"the model": "no dense convolution of at most 4 channels is in it"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_stem(name: str, place: str):
    change, reasons = CHANGES[name]
    model = network("cpu")
    change(model)
    found = OneLaunch(model.to(place), "stem")
    assert found.runs == [] and found.reasons == reasons and found.model is model


def test_layers_outside_of_a_sequential_are_no_stem(place: str):
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first(), sparse()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.relu(self.first(x)))
            return y

    with pytest.warns(UserWarning, match=r"^graphed: one_launch took no layers; the repr says why"):
        fast = graphed(Apart().to(place).eval(), images(1, place), one_launch="stem")
    assert only(fast).reasons == {"first": "it is in no nn.Sequential"}


def test_images_that_the_kernel_refuses_run_layer_by_layer(place: str):
    model = network(place, first(), nn.ReLU(), sparse("relu"))
    (run,) = OneLaunch(model, "stem").runs
    layers: Any = model.features[:3]
    for x, reason in (
        (images(1, place, 7), r"the kernel takes images of 3 channels and an even width, not (1, 3, 8, 7)"),
        (images(1, place, 224), "the kernel takes images whose rows fit shared memory, not (1, 3, 8, 224)"),
        (images(1, place)[0], "its input is no batch of images in torch.bfloat16"),
    ):
        run.outcomes.clear()
        assert torch.equal(run(x), layers(x)) and [*run.outcomes] == [reason]
    with torch.autocast(place, BF16):
        run(images(1, place))
    assert [*run.outcomes][1] == "autocast"
    (run,) = OneLaunch(network(place), "stem").runs
    assert run._obstacle(images(1, place)[:, :, :1]) == "the kernel takes images that can be pooled, not (1, 3, 1, 6)"


def test_refuses(place: str):
    with pytest.raises(
        ValueError, match=r"^graphed: expected one_launch of auto, True, False or some of chain, stem, linear, got"
    ):
        graphed(network(place), images(1, place), one_launch=("stem", "classifier"))
    dense, second = first().to(place), sparse().to(place).eval()
    with pytest.raises(ValueError, match=r"^stem_of: no ReLU stands between the two"):
        stem_of(dense, second, relu=False)
    stem = stem_of(dense, second)
    dense.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"^stem_of: a weight was written since the stem was made: make it anew"):
        stem(images(1, place))
