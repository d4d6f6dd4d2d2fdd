"""The Triton gradient kernels on a CUDA GPU: the interpreter's cases, layers of real size, training through modules."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

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

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.nn import BlockSparseConv2d
from slimkernels.pattern import update_pattern

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
shapes = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize("name", GRADIENT_CASES)
@dtypes
def test_gradients(dtype: torch.dtype, name: str) -> None:
    check(GRADIENT_CASES[name], (16, 16), dtype, "cuda")


@pytest.mark.parametrize("name", TALL_CASES)
@dtypes
def test_gradients_of_tall_blocks(dtype: torch.dtype, name: str) -> None:
    check(TALL_CASES[name], (64, 16), dtype, "cuda")


@shapes
@pytest.mark.parametrize("name", CORE_CASES)
@dtypes
def test_gradients_of_every_block_shape(dtype: torch.dtype, name: str, block_shape: tuple[int, int]) -> None:
    check(GRADIENT_CASES[name], block_shape, dtype, "cuda")


@shapes
@dtypes
@pytest.mark.parametrize("stride", (1, 2))
def test_default_tiles_of_a_large_image(stride: int, dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """Enough pixels for the largest tile, several waves and several splits; the last tile is ragged."""
    case = GradientCase(image=(9, 45, 47), stride=(stride, stride), sparsity=0.875, block_m=None)
    check(case, block_shape, dtype, "cuda")


@shapes
def test_tf32(block_shape: tuple[int, int]) -> None:
    """With torch's switch at tf32 both factors lose their 13 low bits (dropped, not rounded), and no more."""
    case = GradientCase(image=(3, 17, 19), sparsity=0.8, block_m=None)
    grad, x, weight = build(case, block_shape, torch.float32)
    with fp32_precision("tf32"):
        got = run(case, grad, x, weight, "cuda")
    refs = references(case, grad, x, weight)
    results = compare(got, refs, u_mul=2 * testing.TF32_DROPPED)
    assert all(r.passed for r in results), [r.message for r in results]
    assert not any(r.passed for r in compare(got, refs)), "tf32 was asked for and IEEE arithmetic ran"


@pytest.mark.parametrize("image", [(2, 3, 6, 4), (1, 5, 7, 9), (33, 64, 30, 31)], ids=str)
@dtypes
def test_pool(dtype: torch.dtype, image: tuple[int, int, int, int]) -> None:
    check_pool(image, dtype, "cuda")


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 130, 1, 1), (33, 64, 30, 31), (0, 8, 4, 4)], ids=str)
@dtypes
def test_bias_gradient(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check_bias(shape, dtype, "cuda")


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
@pytest.mark.parametrize("shape", [*SHAPES, (33, 512, 30, 31)], ids=str)
@dtypes
def test_batch_norm(dtype: torch.dtype, shape: tuple[int, int, int, int], epilogue: str) -> None:
    check_batch_norm(shape, dtype, epilogue, device="cuda")


@shapes
def test_a_dropped_term_pixel_or_block_is_seen(block_shape: tuple[int, int]) -> None:
    case = GradientCase(block_m=None)
    grad, x, weight = build(case, block_shape, torch.float32)
    with fp32_precision("ieee"):
        got = run(case, grad, x, weight, "cuda")
    assert all(result.passed for result in compare(got, references(case, grad, x, weight)))
    for name, (refs, which) in mutants(case, grad, x, weight).items():
        assert not compare(got, refs)[which].passed, name


def layer(epilogue: str, dtype: torch.dtype) -> BlockSparseConv2d:
    dense = torch.nn.Conv2d(256, 256, 3, padding=1)
    weight = testing.random_bsr(dense.weight.shape, (128, 32), 0.75, seed=4)
    with torch.no_grad():
        dense.weight.copy_(testing.densify(weight))
    return BlockSparseConv2d.from_dense(dense, (128, 32), epilogue=epilogue).train().to("cuda", dtype)


@pytest.mark.parametrize("epilogue", ("none", "relu", "relu_maxpool2"))
def test_a_training_step_makes_no_dense_weight(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(epilogue, torch.bfloat16)
    x = testing.random_tensor(8, 256, 16, 16, seed=5, dtype=torch.bfloat16).cuda().requires_grad_()
    monkeypatch.setattr(BSRWeight, "to_dense", lambda *a: pytest.fail("a dense weight was made"))
    module(x).square().mean().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.any() for t in (x, module.values, module.bias))


def test_compiled_and_graphed_training_steps_give_the_same_bits() -> None:
    module = layer("relu", torch.float16)
    x = testing.random_tensor(8, 256, 16, 16, seed=5, dtype=torch.float16).cuda()

    def gradients(function) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        function(leaf).sum().backward()
        return [leaf.grad, module.values.grad.clone(), module.bias.grad.clone()]

    eager = gradients(module)
    compiled = gradients(torch.compile(module, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    leaf = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(module(leaf).sum(), (leaf, module.values, module.bias))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(module(leaf).sum(), (leaf, module.values, module.bias))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, grads, strict=True))
    # The grids do not depend on the pattern, and the transposed index is rewritten where it is.
    mask = module.weight_bsr().mask()
    mask[tuple(mask.nonzero()[0])] = False
    update_pattern(module, mask)
    graph.replay()
    fresh = gradients(module)
    assert all(torch.equal(a, b) for a, b in zip(fresh, grads, strict=True))
