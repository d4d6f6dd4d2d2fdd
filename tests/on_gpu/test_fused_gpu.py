"""`fused_conv2d` on a CUDA GPU: Triton's kernel and cuDNN's against float64, and models that convert puts them into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import fused_cases
from fused_cases import CASES, CONFIGS, DTYPES, KERNEL, STEM, VGG
from precision import fp32_precision
from torch import nn

import slimkernels as sk
from slimkernels.cases import FusedConvCase, assert_matches_reference, to_device
from slimkernels.dispatch.select import KernelChoice, choose, configurations, forced
from slimkernels.kernels.problems import FusedConvProblem
from slimkernels.kernels.triton.fused_conv2d import launch
from slimkernels.nn import FusedConv2d
from slimkernels.testing import assert_close

pytestmark = pytest.mark.gpu
CUDNN = "fused_conv2d__cudnn"
BF16 = torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def full_float32_precision() -> Iterator[None]:
    """Convolutions of float32 as such: by default torch multiplies them in TF32."""
    with fp32_precision("ieee"):
        yield


def check_config(case: FusedConvCase, config: dict[str, int]) -> None:
    inputs = case.inputs()
    y = launch(*to_device(case.launch_args(*inputs), "cuda"), config)
    reference, bound = case.expected(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, reference, name=f"{case.name} {config}", **bound)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@dtypes
def test_triton(dtype: torch.dtype, case: FusedConvCase) -> None:
    assert_matches_reference(KERNEL, replace(case, dtype=dtype), "cuda")


@pytest.mark.parametrize("config", [*CONFIGS.values()], ids=[*CONFIGS])
@dtypes
def test_tiles(dtype: torch.dtype, config: dict[str, int]) -> None:
    for name in ("many_tiles", "pool", "pool_contiguous", "strided_dilated"):
        check_config(replace(next(c for c in CASES if c.name == name), dtype=dtype), config)


@pytest.mark.parametrize("case", [VGG, STEM], ids=lambda c: c.name)
@dtypes
def test_every_configuration_the_tuner_may_try(dtype: torch.dtype, case: FusedConvCase) -> None:
    """On an image with more tiles than a processor's programs take at once; the last tile is ragged."""
    for epilogue in ("relu", "relu_maxpool2"):
        large = replace(case, dtype=dtype, n=33, h=75, w=77, epilogue=epilogue)
        inputs = large.inputs()
        reference, bound = large.expected(*inputs)
        args = to_device(large.launch_args(*inputs), "cuda")
        for spec, config in configurations(large.problem("cuda")):
            if spec.name.endswith("__reference"):  # torch's own: in 16 bits it rounds before it adds the bias
                continue
            y = spec.launch(*args, **({"config": config} if config else {}))
            assert_close(y, reference, name=f"{spec.name} {config}", **bound)


@pytest.mark.parametrize("case", [VGG, STEM], ids=lambda c: c.name)
def test_tf32(case: FusedConvCase) -> None:
    """With torch's switch at tf32 the factors lose 13 bits (dropped, not rounded: 2^-10 each), and no more."""
    large = replace(case, n=4, h=33, w=31)
    with fp32_precision("tf32"):
        assert_matches_reference(KERNEL, large, "cuda", u_mul=2.0**-10)
        with pytest.raises(AssertionError):
            assert_matches_reference(KERNEL, large, "cuda")


@pytest.mark.parametrize("epilogue", ["relu", "relu_maxpool2"])
@dtypes
def test_cudnn(dtype: torch.dtype, epilogue: str) -> None:
    for case in CASES:
        if case.n > 0:
            # Images whose output has a window of 2x2, whatever the stride.
            large = replace(case, dtype=dtype, epilogue=epilogue, h=case.h + 4, w=case.w + 4)
            assert_matches_reference(CUDNN, large, "cuda")


@pytest.mark.parametrize("contiguous", [False, True])
def test_nonfinite_inputs_reach_what_reads_them(contiguous: bool) -> None:
    for epilogue in ("none", "relu", "relu_maxpool2"):
        fused_cases.check_nonfinite(epilogue, "cuda", contiguous=contiguous)
        if epilogue != "none":
            fused_cases.check_nonfinite(epilogue, "cuda", contiguous=contiguous, kernel=CUDNN)


def test_a_wrong_weight_is_seen() -> None:
    inputs = replace(VGG, dtype=BF16).inputs()
    y = torch.ops.slimkernels.fused_conv2d(*to_device(VGG.launch_args(*inputs), "cuda"), KERNEL)
    reference, bound = VGG.expected(*inputs)
    assert_close(y, reference, **bound)
    inputs[1][5, 1, 2, 0] += 0.5
    with pytest.raises(AssertionError):
        assert_close(y, VGG.expected(*inputs)[0], **bound)


def test_the_first_layer_of_a_large_batch_runs_the_triton_kernel() -> None:
    """And one of many channels runs cuDNN's."""
    first = FusedConvProblem(1024, 3, 32, 32, 64, 3, 3, (1, 1), (1, 1), (1, 1), BF16, "cuda", "relu")
    assert choose(first).name == KERNEL and choose(replace(first, n=1)).name == KERNEL
    assert choose(replace(first, c_in=64)).name == CUDNN
    assert choose(replace(first, c_in=28, epilogue="none")).name in (KERNEL, "fused_conv2d__reference")


def network() -> nn.Module:
    """A first layer, a block-sparse one, a dense one with a ReLU behind it and a dense one without."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
        nn.Conv2d(96, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 64, 10),
    ).cuda()  # fmt: skip
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    sk.finalize_(sk.prune_(model, 0.75, (32, 16), layers=["4"]))
    return model.eval().to(BF16)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)).to("cuda", BF16)


def converted(model: nn.Module) -> nn.Module:
    policy = sk.Policy(measure=False, min_speedup=0.0, dense_layers=False, block_shapes=((32, 16),), check_model=False)
    return sk.convert(model, images(8), policy=policy)


def test_convert_takes_dense_layers_with_what_follows_them(tmp_path) -> None:
    """The first layer by Triton, another by cuDNN, one that nothing follows not at all; save, load, compile, graphs."""
    model = network()
    fast = converted(model)
    kinds = {layer.name: (layer.format, layer.kernel) for layer in fast.slimkernels_plan.layers if layer.weight_shape}
    assert kinds["0"] == ("fused", KERNEL) and kinds["6"] == ("fused", CUDNN)
    assert kinds["4"][0] == "bsr" and kinds["8"] == (None, None)
    assert isinstance(fast[0], FusedConv2d) and fast[0].epilogue == "relu_maxpool2"
    assert type(fast[6]) is FusedConv2d and fast[6].weight.is_contiguous(memory_format=torch.channels_last)
    x = images(8)
    with torch.no_grad():
        expected = model.double()(x.double())
        y = fast(x)
        assert (y - expected).abs().max() <= 0.05 * expected.abs().max()
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        assert torch.equal(sk.graphed(fast, x, one_launch=False)(x), y)
        sk.save(fast, tmp_path / "net.slim.safetensors")
        loaded = sk.load(tmp_path / "net.slim.safetensors", into=network())
        assert torch.equal(loaded(x), y)
        assert fast(x.contiguous()).equal(fast(x.contiguous(memory_format=torch.channels_last)))
        half = fast.half()(x.half())
        assert (half - expected).abs().max() <= 0.05 * expected.abs().max()
        assert (fast.float().cpu()(x.float().cpu()) - expected.cpu()).abs().max() <= 0.05 * expected.abs().max()


def test_measured_conversion_is_never_slower() -> None:
    """With the stopwatch the layers are swapped or kept, each with a reason, and the outputs agree."""
    model = network()
    fast = sk.convert(model, images(64), policy=sk.Policy(repeats=5))
    for layer in fast.slimkernels_plan.layers:
        assert layer.reason or layer.action == "fold", layer
    with torch.no_grad():
        expected = model(images(64)).float()
        assert (fast(images(64)).float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_gradients_are_those_of_the_dense_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 20, 3, padding=1).cuda()
    fused = FusedConv2d.from_dense(dense, "relu", KERNEL)
    x = torch.randn(4, 3, 9, 8, device="cuda")
    grads = []
    for layer in (lambda t: torch.relu(dense(t)), fused):
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        grads.append(inputs.grad)
    for a, b in zip([*grads[:1], *(p.grad for p in dense.parameters())],
                    [*grads[1:], *(p.grad for p in fused.parameters())], strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_captured_in_a_graph() -> None:
    layer = FusedConv2d.from_dense(nn.Conv2d(3, 64, 3, padding=1), "relu").cuda().to(BF16).eval()
    x = images(8)
    with torch.no_grad():
        warm = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, layer(x)) and not torch.equal(y, warm)
        problem = FusedConvProblem(8, 3, 16, 16, 64, 3, 3, (1, 1), (1, 1), (1, 1), BF16, "cuda", "relu")
        for spec, config in configurations(problem):
            with forced(KernelChoice(spec.name, config)):
                assert torch.allclose(layer(x).float(), y.float(), rtol=2e-2, atol=2e-2)
