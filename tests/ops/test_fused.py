"""`FusedConv2d`, its op's kernels and `convert`'s use of them, as far as they go without a GPU.

The op itself (schema, fake, gradients, compile, export) is in tests/ops/test_ops.py with the others.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimkernels as sk
from slimkernels.cases import FusedConvCase, assert_matches_reference
from slimkernels.dispatch import fused_cost, select
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.inference import problem_of
from slimkernels.kernels import KERNELS, cudnn, reference
from slimkernels.kernels.problems import FusedConvProblem, problem_from_json, problem_json
from slimkernels.nn import FusedConv2d
from slimkernels.ops import fused_conv2d

REFERENCE, TRITON, CUDNN = (f"fused_conv2d__{name}" for name in ("reference", "triton", "cudnn"))
EPILOGUES = ("none", "relu", "relu_maxpool2")
# 3 -> 64 channels of 1024 images 32x32, as VGG-19 on CIFAR-10 has it.
FIRST = FusedConvProblem(1024, 3, 32, 32, 64, 3, 3, (1, 1), (1, 1), (1, 1), torch.bfloat16, "cuda", "relu")
STEM = replace(FIRST, n=64, h=224, w=224, r=7, s=7, stride=(2, 2), padding=(3, 3))


def conv(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 12, 3, stride=(1, 2), padding=(1, 2), dilation=(2, 1), **options)


def dense(layer: nn.Conv2d, x: Tensor, epilogue: str) -> Tensor:
    y = layer(x)
    y = y if epilogue == "none" else F.relu(y)
    return F.max_pool2d(y, 2) if epilogue == "relu_maxpool2" else y


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to the order of torch's sums, which the weight's memory format decides."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


X = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(1))


# The reference kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_reference(epilogue: str, dtype: torch.dtype) -> None:
    case = FusedConvCase(epilogue=epilogue, dtype=dtype, stride=(2, 1), dilation=(1, 2), padding=(1, 2), h=12)
    # Torch rounds a half product to its dtype before it adds the bias.
    assert_matches_reference(REFERENCE, case, u_mul=torch.finfo(dtype).eps)


# The module


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_layer_with_what_follows_it(epilogue: str, bias: bool) -> None:
    layer = conv(bias=bias)
    module = FusedConv2d.from_dense(layer, epilogue)
    assert_same(module(X), dense(layer, X, epilogue))
    assert_same(module(X[0]), dense(layer, X[:1], epilogue)[0])
    assert list(module.state_dict()) == list(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), layer.state_dict().values()))
    back = module.to_dense()
    assert torch.equal(back.weight, layer.weight) and torch.equal(back(X), layer(X)) and back.training == layer.training
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(X), module(X)) and copied.epilogue == epilogue


def test_module_follows_writes_loads_and_moves() -> None:
    """Nothing is kept beside the parameters: a write in eval mode, through ``.data`` too, is seen by the next call."""
    layer, other = conv(), conv()
    nn.init.normal_(other.weight)
    module = FusedConv2d.from_dense(layer, "relu", REFERENCE).eval()
    module.weight.data.mul_(2)
    assert_same(module(X), F.relu(F.conv2d(X, 2 * layer.weight, layer.bias, (1, 2), (1, 2), (2, 1))))
    module.load_state_dict(other.state_dict())
    assert_same(module(X), F.relu(other(X)))
    assert module.weight.is_contiguous(memory_format=torch.channels_last) and module.kernel == REFERENCE
    assert_same(module.double()(X.double()), F.relu(other.double()(X.double())))
    assert module.kernel == "auto", "another dtype chooses its own kernel"
    module.to("meta")
    assert module(X.double().to("meta")).shape == other(X.double()).shape


def test_module_attributes() -> None:
    module = FusedConv2d.from_dense(conv(), "relu")
    module.stride, module.epilogue = 2, "none"
    assert module.stride == (2, 2) and module(X).shape[2:] == (5, 6)
    with pytest.raises(ValueError, match=r"^FusedConv2d: expected epilogue in .*, got 'gelu'"):
        module.epilogue = "gelu"
    with pytest.raises(ValueError, match=r"^FusedConv2d: expected stride >= 1"):
        module.stride = 0
    with pytest.raises(AttributeError, match=r"^FusedConv2d: kernel_size belongs to the stored weight"):
        module.kernel_size = (5, 5)
    assert module.stride == (2, 2) and module.epilogue == "none"
    for options, words in (({"groups": 3}, "groups=3"), ({"padding_mode": "circular"}, "padding_mode='circular'")):
        with pytest.raises(ValueError, match=rf"^FusedConv2d.from_dense: {words}"):
            FusedConv2d.from_dense(nn.Conv2d(3, 6, 3, **options))
    assert "epilogue='none'" in repr(module) and problem_of(module, X).op == "fused_conv2d"


def test_construction_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    module = FusedConv2d(3, 4, 3)
    assert torch.equal(torch.get_rng_state(), before) and not module.weight.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(4, 5, 3, 3)}, ValueError, r"expected x of shape \(N, 5, H, W\), got \(2, 3, 11, 9\)"),
        ({"weight": torch.zeros(4, 3)}, ValueError, r"expected weight of shape \(C_out, C_in, R, S\), got \(4, 3\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"expected bias of shape \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(4).double()}, TypeError, "expected bias of dtype torch.float32 like x"),
        ({"epilogue": "gelu"}, ValueError, "expected epilogue in"),
        ({"stride": (0, 1)}, ValueError, "expected stride >= 1"),
        ({"dilation": (6, 1)}, ValueError, "expected an output of at least 1x1, got -1x7"),
        ({"kernel": "fused"}, ValueError, "expected kernel 'auto' or one of fused_conv2d__reference"),
        ({"kernel": TRITON}, ValueError, "kernel 'fused_conv2d__triton' cannot run here"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=f"^fused_conv2d: {words}"):
        fused_conv2d(X, **arguments)


def test_forward_mode_runs_the_reference() -> None:
    weight = conv().weight.detach()
    _, tangent = torch.func.jvp(lambda x: fused_conv2d(x, weight, epilogue="relu"), (X,), (torch.ones_like(X),))
    y = F.conv2d(X, weight)
    assert torch.allclose(tangent, F.conv2d(torch.ones_like(X), weight) * (y > 0), atol=1e-5)


# cuDNN's kernel, whose call is replaced here


@pytest.fixture
def cudnn_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Torch's fused call computes on the CPU, or fails with the last message of the list."""
    messages: list[str] = []

    def call(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last) and groups == 1
        assert weight.is_contiguous(memory_format=torch.channels_last)
        if messages:
            raise RuntimeError(messages[-1])
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", call)
    yield messages


@pytest.mark.parametrize("epilogue", ["relu", "relu_maxpool2"])
def test_cudnn_launch(epilogue: str, cudnn_calls: list[str]) -> None:
    layer = conv()
    arguments = (X, layer.weight.detach(), layer.bias.detach(), (1, 2), (1, 2), (2, 1))
    expected = dense(layer, X, epilogue).detach()
    y = cudnn.launch_fused_conv2d(*arguments, epilogue)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, expected)
    cudnn_calls.append("GET was unable to find an engine to execute this computation")
    assert_same(cudnn.launch_fused_conv2d(*arguments, epilogue), expected)  # without one, torch's layers run
    cudnn_calls.append("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cudnn.launch_fused_conv2d(*arguments, epilogue)
    with torch.backends.cudnn.flags(enabled=False):
        assert_same(cudnn.launch_fused_conv2d(*arguments, epilogue), expected)
    assert cudnn.launch_fused_conv2d(X[:0], *arguments[1:], epilogue).shape == (0, *expected.shape[1:])
    with pytest.raises(ValueError, match=r"^fused_conv2d: expected epilogue 'relu' or 'relu_maxpool2' for cuDNN, got"):
        cudnn.launch_fused_conv2d(*arguments, "none")


# The choice on a GPU, from the ceilings of an H200


def predicted(problem: FusedConvProblem) -> list[str]:
    """The kernels that take a problem, the fastest by prediction first."""
    backends = {TRITON: "triton", CUDNN: "cuda", REFERENCE: "reference"}
    takes = [name for name in backends if KERNELS[name].supports(problem) is None]
    return sorted(takes, key=lambda name: fused_cost.predict_fused(backends[name], problem, {}, H200).seconds)


@pytest.mark.parametrize(
    ("problem", "order"),
    [
        # Measured, in this order: 47 us, 195 us, 447 us for the first; 120, 497, 644 for the stem.
        (FIRST, [TRITON, CUDNN, REFERENCE]),
        (replace(FIRST, n=1), [TRITON, CUDNN, REFERENCE]),
        (replace(FIRST, n=16), [TRITON, CUDNN, REFERENCE]),
        (STEM, [TRITON, CUDNN, REFERENCE]),
        (replace(FIRST, n=32, h=224, w=224), [TRITON, CUDNN, REFERENCE]),
        # IEEE float32 multiplies on the plain cores: 315 us, 458 us, 621 us.
        (replace(FIRST, dtype=torch.float32), [CUDNN, TRITON, REFERENCE]),
        # More channels are cuDNN's: 20 us against 35 us at 64 images.
        (replace(FIRST, n=64, c_in=64), [CUDNN, REFERENCE]),
        (replace(FIRST, c_in=28), [CUDNN, TRITON, REFERENCE]),
    ],
)
def test_predictions_rank_as_the_measurements(problem: FusedConvProblem, order: list[str]) -> None:
    assert predicted(problem) == order


def test_a_pool_in_the_kernel_writes_a_quarter() -> None:
    pooled = replace(FIRST, epilogue="relu_maxpool2")
    one, quarter = (fused_cost.gpu_few_channels(p, {}, H200) for p in (FIRST, pooled))
    assert quarter.memory_s < 0.4 * one.memory_s
    assert len(fused_cost.gpu_fused_layers(pooled, "cuda", H200).passes) == 2  # the image's, and the pool's


def test_problem_is_plain_data() -> None:
    assert problem_from_json(problem_json(FIRST)) == FIRST
    assert FIRST.macs == FIRST.macs_dense == 1024 * 3 * 64 * (3 * 32 - 2) ** 2
    assert KERNELS[TRITON].supports(replace(FIRST, c_in=29)) == "an output takes more than 256 products"
    assert KERNELS[CUDNN].supports(replace(FIRST, epilogue="none")) == "has no epilogue 'none'"
    assert [dict(c) for c in KERNELS[TRITON].configs(replace(FIRST, device="cpu"))] == [{}]
    listed = [dict(c) for c in KERNELS[TRITON].configs(FIRST)]
    assert listed[0] == {} and len({tuple(c.items()) for c in listed}) == len(listed) > 3


# Conversion, with a kernel of the table standing in for those of a GPU


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedConvProblem]]:
    """A CPU kernel that takes shallow layers as Triton's does, and any with a ReLU as cuDNN's; the problems it saw."""
    seen: list[FusedConvProblem] = []

    def reason(problem: Any) -> str | None:
        if isinstance(problem, FusedConvProblem):
            seen.append(problem)
            if problem.c_in * problem.r * problem.s > 256 and problem.epilogue == "none":
                return "an output takes more than 256 products"
        return None

    spec = replace(
        KERNELS[TRITON], backend="cpu", available=lambda: None, shape_reason=reason, launch=reference.fused_conv2d,
        configs=lambda problem: ({},),
    )  # fmt: skip
    monkeypatch.setitem(KERNELS, TRITON, spec)
    select.forget()
    yield seen
    select.forget()


def network() -> nn.Module:
    """Layers that a pool, a ReLU and nothing follows, a pruned one, and one whose ReLU reads more than it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.Flatten(), nn.Linear(32 * 16, 4),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    sk.finalize_(sk.prune_(model, 0.75, (16, 1), layers=["4"]))
    return model.eval()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
POLICY = sk.Policy(measure=False, min_speedup=0.0, dense_layers=False, check_model=False, block_shapes=((16, 1),))


def formats(model: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.format for layer in model.slimkernels_plan.layers if layer.weight_shape is not None}


@pytest.mark.parametrize("inputs", [IMAGES, None], ids=["shapes", "without shapes"])
def test_convert_fuses_dense_layers(inputs: Tensor | None, stand_in: list[Any], tmp_path: Path) -> None:
    model = network()
    fast = sk.convert(model, inputs, policy=POLICY)
    assert formats(fast) == {"0": "fused", "4": "bsr", "6": "fused", "8": None, "10": None}
    first = fast[0]
    assert isinstance(first, FusedConv2d) and first.epilogue == "relu_maxpool2" and first.kernel == "auto"
    assert all(type(fast[i]) is nn.Identity for i in (1, 2, 3, 7))
    assert not first.training and not first.weight.requires_grad
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    # The kernel's name, its epilogue and a reason stand in the report.
    plan = fast.slimkernels_plan["0"]
    assert plan.kernel == TRITON and plan.folded_bn and plan.bias and not plan.tied
    assert "no zeros" in plan.reason and "with what follows in its kernel" in plan.reason
    table = sk.explain(fast).to_markdown()
    assert "fused +bn +relu +pool" in table and TRITON in table
    # Keys are those of the dense model, the folded bias aside; the file gives the same model back.
    kept = {k: v for k, v in fast.state_dict().items() if k.startswith("6.")}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items()) and len(kept) == 2
    sk.save(fast, tmp_path / "net.slim.safetensors")
    loaded = sk.load(tmp_path / "net.slim.safetensors", into=network())
    assert torch.equal(loaded(IMAGES), fast(IMAGES)) and type(loaded[0]) is FusedConv2d
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last) and not loaded[0].weight.requires_grad
    again = sk.load(tmp_path / "net.slim.safetensors", into=fast)
    assert torch.equal(again(IMAGES), fast(IMAGES))
    # Converted once more, what is fused stays.
    twice = sk.convert(fast, inputs, policy=POLICY)
    assert torch.equal(twice(IMAGES), fast(IMAGES)) and formats(twice)["0"] == "fused"
    found = sk.warm_up(fast, IMAGES).kernels
    assert {k.layer for k in found if k.problem.op == "fused_conv2d"} == {"0", "6"}


def test_convert_fuses_by_the_stopwatch(stand_in: list[Any]) -> None:
    """Candidates are timed against dense; whatever wins has its reason, and the outputs agree."""
    model = network()
    fast = sk.convert(model, IMAGES, policy=replace(POLICY, measure=True, repeats=3, budget_s=0.01))
    layer = fast.slimkernels_plan["0"]
    assert layer.format == "fused" and "no zeros; measured" in layer.reason and "taking in what follows" in layer.reason
    assert len(layer.dense_ms) == len(layer.sparse_ms) == 1
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "epilogue"),
    [({"fuse_pool": False}, "relu"), ({"fuse_relu": False}, "none"), ({"exclude": ("0",)}, None)],
    ids=str,
)
def test_the_policy_says_what_is_taken_in(
    options: dict[str, Any], epilogue: str | None, stand_in: list[FusedConvProblem]
) -> None:
    model = network()
    fast = sk.convert(model, IMAGES, policy=replace(POLICY, **options))
    assert getattr(fast[0], "epilogue", None) == epilogue
    if epilogue is not None:
        again = sk.convert(fast, IMAGES, policy=POLICY)
        assert again.slimkernels_plan["0"].reason == "it is converted already" and again[0].epilogue == epilogue
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_nothing_is_fused_while_training_or_where_no_kernel_is(stand_in: list[FusedConvProblem]) -> None:
    fast = sk.convert(network().train(), policy=POLICY, training=True)
    assert formats(fast)["0"] is None and stand_in == []
    fast = sk.convert(network(), IMAGES, policy=replace(POLICY, backend="reference"))
    assert "fused" not in formats(fast).values()


def test_nothing_changes_without_a_gpu() -> None:
    fast = sk.convert(network(), IMAGES, policy=POLICY)
    assert formats(fast) == {"0": None, "4": "bsr", "6": None, "8": None, "10": None}


def test_a_tied_kernel_is_chosen_anew_where_it_cannot_run(stand_in: list[Any], tmp_path: Path) -> None:
    fast = sk.convert(network(), IMAGES, policy=replace(POLICY, backend="cpu"))
    assert fast[0].kernel == TRITON and fast.slimkernels_plan["0"].tied
    sk.save(fast, tmp_path / "net.slim.safetensors")
    assert sk.load(tmp_path / "net.slim.safetensors", into=network())[0].kernel == TRITON
    expected = fast(IMAGES)
    KERNELS[TRITON] = replace(KERNELS[TRITON], available=lambda: "gone")
    select.forget()
    select._explicit.cache_clear()
    loaded = sk.load(tmp_path / "net.slim.safetensors", into=network())
    assert loaded[0].kernel == "auto" and torch.equal(loaded(IMAGES), expected)


def test_a_file_cannot_claim_a_fused_linear_layer(stand_in: list[Any]) -> None:
    plan = sk.convert(network(), IMAGES, policy=POLICY).slimkernels_plan["0"]
    with pytest.raises(ValueError, match="expected format 'fused' of a convolution alone"):
        replace(plan, weight_shape=(8, 27), stride=None, padding=None, dilation=None)
    with pytest.raises(ValueError, match="expected epilogue in"):
        replace(plan, epilogue="gelu")
