"""The Triton gradient kernels on CPU tensors: run by test_triton_backward.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from batch_norm_cases import SHAPES, check_batch_norm
from precision import fp32_precision
from triton_backward_cases import (  # fmt: skip
    CORE_CASES,
    GRADIENT_CASES,
    TALL_CASES,
    GradientCase,
    build,
    check,
    check_bias,
    check_pool,
    compare,
    mutants,
    references,
    run,
)
from triton_cases import BLOCK_SHAPES

from slimkernels import ops, testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS
from slimkernels.kernels.transposed import transpose_index
from slimkernels.kernels.triton import batch_norm, bsr_conv2d_backward_w
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("triton_backward_interpret_cases.py needs TRITON_INTERPRET=1", returncode=2)

DTYPES = {"float32": torch.float32, "float16": torch.float16}
shapes = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(name: str) -> None:
    check(GRADIENT_CASES[name], (16, 16), torch.float32)


@pytest.mark.parametrize("block_shape", [(1, 1), (16, 1), (24, 24), (64, 16)], ids=str)
def test_gradients_of_block_shapes(block_shape: tuple[int, int]) -> None:
    check(GRADIENT_CASES["ragged_half_block"], block_shape, torch.float16)


@pytest.mark.parametrize("name", TALL_CASES)
def test_gradients_of_tall_blocks(name: str) -> None:
    check(TALL_CASES[name], (64, 16), torch.float32)


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("name", CORE_CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_of_every_block_shape(dtype: torch.dtype, name: str, block_shape: tuple[int, int]) -> None:
    check(GRADIENT_CASES[name], block_shape, dtype)


@pytest.mark.parametrize("name", ("m_gt_tile", "splits"))
def test_gradients_bfloat16(name: str) -> None:
    check(GRADIENT_CASES[name], (16, 16), torch.bfloat16)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.bfloat16], ids=[*DTYPES, "bfloat16"])
def test_pool(dtype: torch.dtype) -> None:
    for image in ((2, 3, 6, 4), (1, 5, 7, 9), (1, 2, 2, 3)):
        check_pool(image, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.bfloat16], ids=[*DTYPES, "bfloat16"])
@pytest.mark.parametrize("shape", ((2, 3, 5, 7), (1, 130, 1, 1), (3, 64, 20, 9), (0, 8, 4, 4)), ids=str)
def test_bias_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_bias(shape, dtype)


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape: tuple[int, int, int, int], epilogue: str) -> None:
    check_batch_norm(shape, torch.float32, epilogue)


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
def test_batch_norm_in_16_bits_and_without_weights(epilogue: str) -> None:
    check_batch_norm(SHAPES[1], torch.float16, epilogue)
    check_batch_norm(SHAPES[1], torch.float16, epilogue, affine=False)


def test_batch_norm_in_many_parts_and_small_tiles() -> None:
    """More tiles than parts, a last one that is cut, parts without a full tile, both orders of the backward's sums."""
    for backwards in (True, False):
        sums, one = batch_norm.Cut(2, 4, 4, 2), batch_norm.Cut(4, 4)
        cuts = batch_norm.Cuts(sums, one, one, sums, sums, one, one, backwards)
        with mock.patch.object(batch_norm, "CUTS", cuts):
            for epilogue in ("relu", "relu_maxpool2"):
                check_batch_norm((3, 5, 7, 9), torch.float32, epilogue)


def test_batch_norm_of_a_mean_far_from_its_deviation_and_of_one_that_sticks_out() -> None:
    """Squares lose no digits about a mean 10^4 deviations away, nor where the first pixel of a part is far off."""
    x = testing.random_tensor(4, 3, 16, 16, seed=1, dtype=torch.float64)
    x[:, 0] = x[:, 0] / 100 + 100
    x[0, 1, 0, 0] = x[-1, 1, -1, -1] = 1e5
    x = x.float()
    _, statistics = batch_norm.launch_forward(x, None, None, 1e-5, "none")
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(statistics[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics[2].double(), var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_gradient_of_a_relu_whose_input_rounds_to_zero(dtype: torch.dtype) -> None:
    """Gradients follow z as it is stored: in float16 half the smallest number is 0, and a little more is not."""
    x = torch.tensor([1.0, -1.0], dtype=dtype).reshape(1, 1, 1, 2).expand(1, 4, 1, 2).contiguous()
    bias = torch.zeros(4)
    _, statistics = batch_norm.launch_forward(x, torch.ones(4), bias, 0.0, "relu")
    weight = torch.tensor([2.0**-25, 1.5 * 2.0**-25, 2.0**-26, 1.0])
    y, _ = batch_norm.launch_forward(x, weight, bias, 0.0, "relu")
    _, sums = batch_norm.launch_backward(torch.ones_like(y), x, weight, bias, statistics, 0.0, "relu")
    assert sums[0].tolist() == (y > 0).sum((0, 2, 3)).tolist() == ([0, 1, 0, 1] if dtype == torch.float16 else [1] * 4)


@pytest.mark.parametrize("block_shape", [(1, 1), (16, 16), (64, 16)], ids=str)
def test_a_dropped_term_pixel_or_block_is_seen(block_shape: tuple[int, int]) -> None:
    case = GradientCase()
    grad, x, weight = build(case, block_shape, torch.float32)
    with fp32_precision("ieee"):
        got = run(case, grad, x, weight)
    assert all(result.passed for result in compare(got, references(case, grad, x, weight)))
    for name, (refs, which) in mutants(case, grad, x, weight).items():
        assert not compare(got, refs)[which].passed, name


STRIDE, PADDING = (2, 1), (1, 2)


def conv_module(block_shape: tuple[int, int], epilogue: str, bias: bool = True) -> BlockSparseConv2d:
    dense = torch.nn.Conv2d(30, 31, 3, STRIDE, PADDING, bias=bias)
    weight = testing.random_bsr(dense.weight.shape, block_shape, 0.5, seed=4)
    with torch.no_grad():
        dense.weight.copy_(testing.densify(weight))
    kernel = "bsr_conv2d__triton"
    return BlockSparseConv2d.from_dense(dense, block_shape, weight.mask(), epilogue=epilogue, kernel=kernel).train()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run, in order."""
    ran: list[str] = []
    for name, spec in list(KERNELS.items()):

        def launch(*args, spec=spec, **kwargs):
            ran.append(spec.name)
            return spec.launch(*args, **kwargs)

        monkeypatch.setitem(KERNELS, name, type(spec)(**{**spec.__dict__, "launch": launch}))
    from slimkernels.dispatch import select

    select.forget()
    yield ran
    select.forget()


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
def test_autograd_runs_the_triton_kernels(epilogue: str, listed: list[str]) -> None:
    """Gradients of a whole module, bias included, against float64 autograd through the same output mask."""
    module = conv_module((16, 16), epilogue)
    x = testing.random_tensor(1, 30, 5, 4, seed=5).requires_grad_()
    y = module(x)
    dense = module.to_dense().double()
    x64 = x.detach().double().requires_grad_()
    y64 = testing.apply_epilogue(dense(x64), epilogue)
    grad = testing.random_tensor(*y.shape, seed=6)
    y.backward(grad)
    y64.backward(grad.double())
    triton_ops = ["bsr_conv2d", "bsr_conv2d_wgrad", "bsr_conv2d_bias_grad", "bsr_conv2d_dgrad"]
    if epilogue == "relu_maxpool2":
        triton_ops[1:1] = ["bsr_conv2d", "relu_maxpool2_backward"]
    assert listed == [f"{op}__triton" for op in triton_ops]
    wanted = BSRWeight.from_dense(dense.weight.grad, (16, 16), module.weight_bsr().mask()).values
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.values.grad.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad.double(), dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_linear_runs_the_triton_kernels(listed: list[str]) -> None:
    dense = torch.nn.Linear(40, 50)
    module = BlockSparseLinear.from_dense(
        dense, (16, 8), torch.rand(4, 5) < 0.5, epilogue="relu", kernel="bsr_linear__triton"
    ).train()
    x = testing.random_tensor(2, 3, 40, seed=5).requires_grad_()
    y = module(x)
    grad = testing.random_tensor(*y.shape, seed=6)
    y.backward(grad)
    ops = ("bsr_linear", "bsr_conv2d_wgrad", "bsr_conv2d_bias_grad", "bsr_conv2d_dgrad")
    assert listed == [f"{op}__triton" for op in ops]
    twin, x64 = module.to_dense().double(), x.detach().double().requires_grad_()
    torch.relu(twin(x64)).backward(grad.double())
    wanted = BSRWeight.from_dense(twin.weight.grad, (16, 8), module.weight_bsr().mask()).values
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.values.grad.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad.double(), twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_values_get_their_gradient_in_float32_from_16_bits() -> None:
    """One part of the pixels and several, and through the op: in 16 bits comes what that rounds to."""
    module = conv_module((16, 16), "none").half()
    x = testing.random_tensor(2, 30, 5, 4, seed=5, dtype=torch.float16)
    grad = testing.random_tensor(*module(x).shape, seed=6, dtype=torch.float16)
    values, *index = module.values.detach(), module.crow_indices, module.col_indices
    geometry = ((31, 30, 3, 3), (16, 16), STRIDE, PADDING, (1, 1))
    for splits in (1, 2):
        config = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
        half = bsr_conv2d_backward_w.launch(grad, x, values, *index, *geometry, config)
        wide = bsr_conv2d_backward_w.launch(grad, x, values.float(), *index, *geometry, config)
        assert half.dtype == torch.float16 and wide.dtype == torch.float32
        assert torch.equal(wide.half(), half) and not torch.equal(wide, half.float())
    rest = (None, None, None, *geometry, "none", "bsr_conv2d__triton", [False, True, False], torch.float32)
    through = torch.ops.slimkernels.bsr_conv2d_backward(grad, x, values, *index, *rest)[1]
    assert through.dtype == torch.float32
    torch.testing.assert_close(through, wide, rtol=1e-5, atol=1e-5)


def test_any_layout_of_grad_out_gives_the_same_bits() -> None:
    module = conv_module((16, 16), "relu")
    x = testing.random_tensor(1, 30, 5, 4, seed=5)

    def gradients(grad: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        module(leaf).backward(grad)
        return [leaf.grad, module.values.grad.clone(), module.bias.grad.clone()]

    grad = testing.random_tensor(*module(x).shape, seed=6)
    plain = gradients(grad.contiguous(memory_format=torch.channels_last))
    for view in (grad, torch.stack([grad, torch.full_like(grad, torch.nan)], -1)[..., 0]):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(view), strict=True))
    ones = gradients(torch.ones_like(grad))
    expanded = gradients(torch.ones(()).expand(grad.shape))
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))


def test_no_dense_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args):
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr(BSRWeight, "to_dense", refuse)
    module = conv_module((16, 16), "relu_maxpool2")
    module(testing.random_tensor(1, 30, 5, 4, seed=5).requires_grad_()).sum().backward()
    assert module.values.grad.abs().sum() > 0


def test_opcheck_with_the_transposed_index() -> None:
    module = conv_module((16, 16), "relu")
    x = testing.random_tensor(1, 30, 5, 4, seed=5).requires_grad_()
    weight = (module.values, module.crow_indices, module.col_indices, module.bias, [])
    index = transpose_index(module.crow_indices, module.col_indices, module.weight_shape, (16, 16), module.stride)
    assert torch.equal(index, module.transposed)
    tail = (module.weight_shape, (16, 16), module.stride, module.padding, module.dilation, "relu", module.kernel, index)
    torch.library.opcheck(torch.ops.slimkernels.bsr_conv2d.default, (x, *weight, *tail))
    with pytest.raises(ValueError, match=r"bsr_conv2d: expected transposed of shape \(\d+,\), got \(3,\)"):
        ops.bsr_conv2d(
            x,
            *weight,
            weight_shape=module.weight_shape,
            block_shape=(16, 16),
            stride=module.stride,
            transposed=index[:3],
        )


def test_compile_fullgraph_forward_and_backward() -> None:
    module = conv_module((16, 16), "relu")
    x = testing.random_tensor(1, 30, 5, 4, seed=5)

    def gradients(function) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        function(leaf).square().sum().backward()
        return [leaf.grad, module.values.grad.clone(), module.bias.grad.clone()]

    eager = gradients(module)
    compiled = gradients(torch.compile(module, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
