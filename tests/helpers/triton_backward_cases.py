"""Cases of the Triton gradient kernels, named by tile arithmetic, and their checks, for the interpreter and a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from precision import fp32_precision
from torch import Tensor
from torch.nn import functional as F
from triton_cases import BLOCK_SHAPES

from slimkernels import testing
from slimkernels.formats import BSRWeight, _to_blocks
from slimkernels.kernels.transposed import transpose_index
from slimkernels.kernels.triton import bsr_conv2d_backward_w, bsr_conv2d_backward_x, relu_maxpool2_backward, sums

Pair = tuple[int, int]


@dataclass(frozen=True)
class GradientCase:
    """A convolution; channels come from the block shape, `cut` removes some so that the last block is ragged."""

    image: tuple[int, int, int] = (2, 5, 5)
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pattern: str = "random"
    sparsity: float = 0.6
    cut: Pair = (0, 0)
    spare: int = 0
    block_m: int | None = 64
    splits: int = 1
    dgrad_k: int = 256
    index_64: bool = False

    def geometry(self) -> tuple[Pair, Pair, Pair]:
        """(stride, padding, dilation)."""
        return self.stride, self.padding, self.dilation

    def configs(self, block_shape: Pair, device: str) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """Tile constants of dgrad and wgrad; None leaves them to the kernels' default_config."""
        if self.block_m is None:
            return None, None
        # An interpreted step takes 10 ms whatever its size, so BLOCK_K is long on the CPU.
        out, into = ((n for n in (16, 32, 64, 128) if n >= min(b, 128)) for b in block_shape)
        shared = {"num_warps": 4, "num_stages": 3, "INDEX_64": int(self.index_64)}
        dgrad_k, wgrad_k = (32, 16) if device == "cuda" else (self.dgrad_k, 64)
        return (
            {"BLOCK_M": self.block_m, "BLOCK_N": next(into), "BLOCK_K": dgrad_k, **shared},
            {"BLOCK_M": 64, "BLOCK_N": next(out), "BLOCK_K": wgrad_k, "SPLITS": self.splits, **shared},
        )


GRADIENT_CASES = {
    "default_tile": GradientCase(image=(1, 3, 3), sparsity=0.8, block_m=None),
    "m_lt_tile": GradientCase(image=(1, 3, 3)),
    "m_div_tile": GradientCase(image=(1, 4, 8), block_m=16),
    "m_gt_tile": GradientCase(image=(2, 5, 7), block_m=32),
    "ragged_c_in": GradientCase(cut=(0, 1)),
    "ragged_c_out": GradientCase(cut=(1, 0)),
    "ragged_half_block": GradientCase(cut=(-2, -2)),
    "zero_block_row": GradientCase(pattern="zero_block_row"),
    "zero_blocks": GradientCase(pattern="zero_blocks"),
    "no_blocks": GradientCase(pattern="no_blocks", spare=2),
    "all_dense": GradientCase(image=(1, 4, 4), pattern="all_dense"),
    "spare_blocks": GradientCase(spare=3),
    "batch_0": GradientCase(image=(0, 5, 5)),
    "stride_2": GradientCase(image=(2, 6, 7), stride=(2, 2), block_m=16),
    "stride_3_2": GradientCase(image=(1, 11, 7), stride=(3, 2), padding=(1, 2)),
    "stride_exceeds_kernel": GradientCase(image=(1, 9, 8), kernel=(2, 1), stride=(3, 3), padding=(0, 0)),
    "stride_exceeds_image": GradientCase(image=(2, 1, 2), stride=(3, 3)),
    "stride_and_dilation_share_a_factor": GradientCase(image=(1, 9, 9), stride=(2, 2), dilation=(2, 3), padding=(2, 0)),
    "dilation": GradientCase(image=(1, 7, 9), dilation=(2, 3), padding=(2, 3)),
    "padding_exceeds_image": GradientCase(image=(1, 2, 2), padding=(4, 3)),
    "kernel_1x1": GradientCase(kernel=(1, 1), padding=(0, 0), sparsity=0.3),
    "kernel_1x1_padded": GradientCase(kernel=(1, 1), padding=(1, 2), sparsity=0.3),
    "kernel_1x1_strided": GradientCase(kernel=(1, 1), padding=(0, 0), stride=(2, 3), sparsity=0.3),
    "kernel_5x5": GradientCase(image=(1, 4, 4), kernel=(5, 5), padding=(2, 2), sparsity=0.8),
    "kernel_1x3": GradientCase(kernel=(1, 3), padding=(0, 1)),
    "without_border": GradientCase(image=(1, 6, 6), padding=(0, 0)),
    "unread_last_row": GradientCase(image=(1, 6, 6), stride=(2, 2), padding=(0, 0)),
    "splits": GradientCase(image=(3, 7, 7), splits=3),
    "more_splits_than_steps": GradientCase(image=(1, 3, 3), splits=5),
    "index_64": GradientCase(image=(1, 5, 4), stride=(2, 1), index_64=True),
    "one_pixel": GradientCase(image=(5, 1, 1), kernel=(1, 1), padding=(0, 0), sparsity=0.3),
}
# Blocks at least as tall as a K step (for (64, 16) blocks).
TALL_CASES = {
    "several_steps_a_block": GradientCase(dgrad_k=32, stride=(2, 1)),
    "one_step_a_block": GradientCase(dgrad_k=64, pattern="zero_block_row"),
    "ragged": GradientCase(image=(1, 4, 4), cut=(-2, -2), dgrad_k=32),
    "more_taps_than_bits": GradientCase(image=(1, 5, 4), kernel=(7, 7), padding=(3, 3), sparsity=0.9, dgrad_k=64),
}
# One case per kind of code in the kernels; the others differ in geometry alone.
CORE_CASES = ("m_gt_tile", "ragged_half_block", "stride_2", "splits")


def build(case: GradientCase, block_shape: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor, BSRWeight]:
    """grad and x (channels_last) and the block-sparse weight of a case, `spare` unused blocks included."""
    c_out, c_in = BLOCK_SHAPES[block_shape]
    cut_out, cut_in = (b // 2 if c == -2 else c for b, c in zip(block_shape, case.cut))
    shape = (c_out - cut_out, c_in - cut_in, *case.kernel)
    weight = testing.random_bsr(shape, block_shape, case.sparsity, seed=1, dtype=dtype, pattern=case.pattern)
    values = torch.cat([weight.values, torch.zeros(case.spare, *block_shape, dtype=dtype)])
    col = torch.cat([weight.col_indices, torch.zeros(case.spare, dtype=torch.int32)])
    n, h, w = case.image
    x = testing.random_tensor(n, shape[1], h, w, seed=2, dtype=dtype)
    size = F.conv2d(torch.empty(n, 1, h, w), torch.empty(1, 1, *case.kernel), None, *case.geometry()).shape[2:]
    grad = testing.random_tensor(n, shape[0], *size, seed=3, dtype=dtype)
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, x)]
    return *channels_last, replace(weight, values=values, col_indices=col)


def run(
    case: GradientCase, grad: Tensor, x: Tensor, weight: BSRWeight, device: str = "cpu", packed: bool = True
) -> tuple[Tensor, Tensor]:
    """The Triton gradients of x and values; the transposed index is handed over or left to the launch."""
    crow, col = weight.crow_indices.to(device), weight.col_indices.to(device)
    values, grad, x = weight.values.to(device), grad.to(device), x.to(device)
    geometry = (weight.weight_shape, weight.block_shape, *case.geometry())
    index = transpose_index(crow, col, *geometry[:2], case.stride, case.dilation) if packed else None
    dgrad, wgrad = case.configs(weight.block_shape, device)
    return (
        bsr_conv2d_backward_x.launch(grad, values, crow, col, index, tuple(x.shape[2:]), *geometry, dgrad),
        bsr_conv2d_backward_w.launch(grad, x, values, crow, col, *geometry, wgrad),
    )


def references(
    case: GradientCase, grad: Tensor, x: Tensor, weight: BSRWeight
) -> tuple[tuple[Tensor, Tensor, Any], tuple[Tensor, Tensor, Any]]:
    """(gradient, scale, terms) of x and of values in float64, from torch's dense convolution."""
    dense = testing.densify(weight)

    def back(grad: Tensor, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 0:
            return torch.zeros_like(x), torch.zeros_like(dense)
        geometry = (*case.geometry(), False, [0, 0], 1, [True, True, False])
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(grad, x, dense, None, *geometry)
        return grad_x, grad_w

    def stored(grad_w: Tensor) -> Tensor:
        blocks = torch.zeros(weight.values.shape, dtype=torch.float64)
        nnz = weight.nnz_blocks
        cols = weight.col_indices[:nnz].long()
        blocks[:nnz] = _to_blocks(grad_w, weight.block_shape)[weight.block_rows(), cols]
        return blocks

    grad, x = grad.double(), x.double()
    grad_x, grad_w = back(grad, x, dense)
    scale_x, scale_w = (t.clamp_min(0).sqrt() for t in back(grad.square(), x.square(), dense.square()))
    terms_x = (dense != 0).sum(dim=(0, 2, 3)).reshape(1, -1, 1, 1)
    pixels = max(1, grad.numel() // grad.shape[1])
    return (grad_x, scale_x, terms_x), (stored(grad_w), stored(scale_w), pixels)


def compare(got: tuple[Tensor, Tensor], refs: Any, u_mul: float | None = None) -> list[testing.Comparison]:
    """The gradients of x and values against their references."""
    return [
        testing.compare(out, ref, scale=scale, terms=terms, u_mul=u_mul, name=name)
        for out, (ref, scale, terms), name in zip(got, refs, ("gradient of x", "gradient of values"), strict=True)
    ]


def check(case: GradientCase, block_shape: Pair, dtype: torch.dtype, device: str = "cpu") -> None:
    """Both gradients are right, of the inputs' dtype and layout, and the same bits a second time."""
    grad, x, weight = build(case, block_shape, dtype)
    with fp32_precision("ieee"):
        got = run(case, grad, x, weight, device)
        again = run(case, grad, x, weight, device, packed=False) if case.image[0] < 3 else got
    for result in compare(got, references(case, grad, x, weight)):
        assert result.passed, result.message
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert got[0].dtype == got[1].dtype == dtype and got[0].shape == x.shape and got[1].shape == weight.values.shape
    assert got[0].is_contiguous(memory_format=torch.channels_last) and got[1].is_contiguous()
    inside = _to_blocks(torch.ones(weight.weight_shape), block_shape)[
        weight.block_rows(), weight.col_indices[: weight.nnz_blocks].long()
    ]
    assert not got[1].cpu()[: weight.nnz_blocks][inside == 0].any(), "padded entries have no gradient"
    assert not got[1][weight.nnz_blocks :].any(), "spare blocks have no gradient"


def mutants(case: GradientCase, grad: Tensor, x: Tensor, weight: BSRWeight) -> dict[str, tuple[Any, int]]:
    """References that are each wrong in one place, and which gradient (0: x, 1: values) must see it."""
    one_pixel = grad.clone()
    one_pixel[0, :, 0, 0] = 0
    return {
        "a dropped weight": (references(case, grad, x, testing.drop_term(weight)), 0),
        "a block in the wrong column": (references(case, grad, x, testing.wrong_block(weight)), 0),
        "a dropped pixel, seen by x": (references(case, one_pixel, x, weight), 0),
        "a dropped pixel, seen by values": (references(case, one_pixel, x, weight), 1),
    }


def check_pool(image: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """The pooled gradient goes where torch's autograd sends it, ties, negative windows and NaN included."""
    y = testing.random_tensor(*image, seed=1, dtype=dtype).mul(2).round()  # few values: many ties
    y[0, 0, 0, 0], y[-1, -1, 1, 1], y[0, 1, :2, :2] = math.nan, math.inf, -1
    leaf = y.clone().requires_grad_()
    out = F.max_pool2d(torch.relu(leaf), 2)
    grad = testing.random_tensor(*out.shape, seed=2, dtype=dtype)
    out.backward(grad)
    for source in (y, torch.relu(y)):
        moved = source.to(device).contiguous(memory_format=torch.channels_last).clone()
        got = relu_maxpool2_backward.launch(grad.to(device), moved)
        assert torch.equal(got.cpu(), leaf.grad)
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)


def check_bias(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """The bias gradient is the sum over images and pixels, in every layout; a dropped pixel is seen."""
    grad = testing.random_tensor(*shape, seed=3, dtype=dtype)
    terms, exact = grad.numel() // max(shape[1], 1), grad.double()
    ref, scale = exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3)).sqrt()
    for layout in (torch.contiguous_format, torch.channels_last):
        got = sums.launch(grad.to(device).contiguous(memory_format=layout))
        assert got.dtype == dtype and got.is_contiguous()
        testing.assert_close(got.cpu(), ref, scale=scale, terms=max(terms, 1))
    if terms > 1:
        dropped = ref - exact[-1, :, -1, -1]
        assert not testing.compare(got.cpu(), dropped, scale=scale, terms=terms).passed
