"""Cases of the Triton kernels, named by tile arithmetic, and their checks: for the interpreter and for a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from precision import fp32_precision
from torch import Tensor

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels.triton import bsr_conv2d as triton_bsr_conv2d
from slimkernels.kernels.triton import low_rank_linear as triton_low_rank_linear
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order

# Block shapes and the (C_out, C_in) of a layer of two block rows and two column groups; narrow blocks get a few more.
BLOCK_SHAPES = {
    (1, 1): (3, 5),
    (8, 1): (16, 5),
    (16, 1): (32, 6),
    (16, 16): (32, 32),
    (24, 24): (48, 48),
    (32, 32): (64, 64),
    (64, 16): (128, 32),
    (64, 64): (128, 128),
    (128, 16): (256, 32),
    (128, 32): (256, 64),
    (128, 128): (256, 256),
}
# The shapes between, for the slow run.
MORE_BLOCK_SHAPES = {
    **BLOCK_SHAPES,
    (24, 16): (48, 32),
    (32, 16): (64, 32),
    (64, 32): (128, 64),
    (128, 64): (256, 128),
    (256, 16): (512, 32),
}


def tile(block_shape: tuple[int, int], block_m: int, device: str) -> dict[str, int]:
    """Tile constants of a case. An interpreted step takes 10 ms whatever its size, so BLOCK_K is long on the CPU."""
    block_out, block_in = block_shape
    block_n = next(n for n in (16, 32, 64, 128) if n >= min(block_out, 128))
    block_k = 32 if device == "cuda" else 64 if block_in < 16 else 512
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class ConvCase:
    """A convolution, its channels left to the block shape; `cut` removes channels so that the last block is ragged."""

    image: tuple[int, int, int] = (2, 5, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pattern: str = "random"
    sparsity: float = 0.6
    cut: tuple[int, int] = (0, 0)
    bias: bool = True
    epilogue: str = "relu"
    block_m: int | None = 64
    block_k: int | None = None
    index_64: bool = False
    variant: str = "pixels_on_m"
    splits: int = 1
    group_m: int = 0
    ordered: bool = True

    def config(self, block_shape: tuple[int, int], device: str) -> dict[str, int] | None:
        """Tile constants; None leaves them to the kernel's default_config."""
        if self.block_m is None:
            return None
        config = {**tile(block_shape, self.block_m, device), "INDEX_64": int(self.index_64), "SPLITS": self.splits}
        config |= {"BLOCK_K": self.block_k} if self.block_k else {}
        return config | ({"GROUP_M": self.group_m} if self.group_m else {})


CONV_CASES = {
    "default_tile": ConvCase(image=(1, 3, 3), sparsity=0.8, block_m=None),
    "m_lt_tile": ConvCase(image=(1, 3, 3)),
    "m_div_tile": ConvCase(image=(1, 4, 8), block_m=16),
    "m_gt_tile": ConvCase(image=(2, 5, 7), block_m=32),
    "storage_order": ConvCase(ordered=False),
    "group_of_tiles": ConvCase(image=(2, 5, 7), block_m=16, group_m=3),
    "ragged_c_in": ConvCase(cut=(0, 1)),
    "ragged_c_out": ConvCase(cut=(1, 0), epilogue="none"),
    "ragged_half_block": ConvCase(cut=(-2, -2)),
    "zero_block_row": ConvCase(pattern="zero_block_row"),
    "zero_blocks": ConvCase(pattern="zero_blocks", bias=False),
    "no_blocks": ConvCase(pattern="no_blocks"),
    "all_dense": ConvCase(image=(1, 4, 4), pattern="all_dense", epilogue="none"),
    "batch_0": ConvCase(image=(0, 5, 5)),
    "prime_stride": ConvCase(image=(1, 11, 7), stride=(3, 2), padding=(1, 2), bias=False, epilogue="none"),
    "dilation": ConvCase(image=(1, 7, 9), dilation=(2, 3), padding=(2, 3)),
    "padding_exceeds_image": ConvCase(image=(1, 2, 2), padding=(4, 3)),
    "kernel_1x1": ConvCase(kernel=(1, 1), padding=(0, 0), sparsity=0.3),
    "kernel_5x5": ConvCase(image=(1, 4, 4), kernel=(5, 5), padding=(2, 2), sparsity=0.8),
    "kernel_7x7": ConvCase(image=(1, 4, 4), kernel=(7, 7), padding=(3, 3), sparsity=0.9),
    "kernel_1x3": ConvCase(kernel=(1, 3), padding=(0, 1)),
    "without_border": ConvCase(image=(1, 6, 6), padding=(0, 0)),
    "index_64": ConvCase(image=(1, 4, 4), index_64=True),
    "maxpool_odd": ConvCase(image=(1, 5, 7), epilogue="relu_maxpool2", sparsity=0.8, block_m=32),
    "maxpool_half_a_tile_apart": ConvCase(image=(3, 9, 11), epilogue="relu_maxpool2", sparsity=0.8, block_m=128),
}
# The stored blocks of a tile shared out: unevenly, to more programs than there are stages, and with a pooled sum.
SPLIT_CASES = {
    "splits": ConvCase(image=(2, 5, 7), splits=3, block_k=16),
    "splits_of_no_blocks": ConvCase(pattern="zero_block_row", splits=2, bias=False, epilogue="none"),
    "more_splits_than_stages": ConvCase(image=(1, 3, 3), splits=16, sparsity=0.9, block_k=32),
    "splits_ragged_maxpool": ConvCase(image=(1, 5, 7), cut=(-2, -2), epilogue="relu_maxpool2", splits=2, block_k=32),
    "splits_maxpool_wide": ConvCase(image=(3, 7, 9), epilogue="relu_maxpool2", splits=2, block_k=32, block_m=128),
}
# A stage is one slice of one tap: its column, slot and mask are scalars. Blocks of (32, 32) hold two such stages.
ONE_SLICE_CASES = {
    "one_slice": ConvCase(image=(2, 5, 7), block_m=32, block_k=16),
    "one_slice_ragged": ConvCase(cut=(-2, -2), block_k=16),
    "one_slice_zero_block_row": ConvCase(pattern="zero_block_row", block_k=16, bias=False, epilogue="none"),
    "one_slice_without_border": ConvCase(image=(1, 6, 6), padding=(0, 0), block_k=16),
    "one_slice_49_taps": ConvCase(image=(1, 4, 4), kernel=(7, 7), padding=(3, 3), sparsity=0.9, block_k=16),
    "one_slice_index_64": ConvCase(image=(1, 4, 4), index_64=True, block_k=16),
    "one_slice_maxpool": ConvCase(image=(1, 5, 7), epilogue="relu_maxpool2", block_m=32, block_k=16),
    "one_slice_taps_together": ConvCase(variant="taps_together", cut=(-2, -2), block_k=16),
    "one_slice_weights_on_m": ConvCase(variant="weights_on_m", image=(2, 5, 7), block_m=16, block_k=16),
}
# One output position a tile: every way in which taps can lie outside, and images that do not fill a tile.
IMAGES_CASES = {
    "images": ConvCase(image=(5, 4, 4)),
    "images_two_tiles": ConvCase(image=(35, 2, 2), block_m=32),
    "images_ragged": ConvCase(image=(3, 5, 4), cut=(-2, 0), epilogue="none"),
    "images_zero_block_row": ConvCase(image=(3, 3, 3), pattern="zero_block_row", bias=False),
    "images_no_blocks": ConvCase(image=(3, 3, 3), pattern="no_blocks"),
    "images_all_dense": ConvCase(image=(2, 3, 4), pattern="all_dense"),
    "images_one_pixel": ConvCase(image=(17, 1, 1), block_m=16),
    "images_stride": ConvCase(image=(3, 7, 6), stride=(3, 2), padding=(1, 2)),
    "images_dilation": ConvCase(image=(3, 5, 6), dilation=(2, 3), padding=(2, 3)),
    "images_padding_exceeds_image": ConvCase(image=(3, 2, 2), padding=(4, 3)),
    "images_kernel_1x3": ConvCase(image=(3, 4, 4), kernel=(1, 3), padding=(0, 1)),
    "images_kernel_2x5": ConvCase(image=(3, 4, 4), kernel=(2, 5), padding=(1, 2)),
    "images_storage_order": ConvCase(image=(3, 4, 4), ordered=False),
    "images_group_of_tiles": ConvCase(image=(5, 3, 3), block_m=16, group_m=4),
    "images_index_64": ConvCase(image=(3, 4, 4), index_64=True),
    "images_batch_0": ConvCase(image=(0, 4, 4)),
}
IMAGES_CASES = {name: replace(case, variant="images_on_m", block_k=16) for name, case in IMAGES_CASES.items()}
# With blocks of (32, 32): half of the last block is no channel of the image.
IMAGES_RAGGED_C_IN = replace(IMAGES_CASES["images_ragged"], cut=(-2, -2))
IMAGES_CASES["images_default_tile"] = ConvCase(image=(3, 4, 4), variant="images_on_m", block_m=None)
# Every kernel of the op beside the first, on the kinds of code that they do not share.
VARIANTS = ("weights_on_m", "taps_together", "shared_input")
VARIANT_CASES = ("m_gt_tile", "ragged_half_block", "zero_block_row", "maxpool_odd")
# One case per kind of code in the kernel; the others differ in geometry alone.
CORE_CASES = ("m_gt_tile", "ragged_half_block", "zero_block_row", "without_border", "maxpool_odd")


@dataclass(frozen=True)
class LowRankCase:
    """A low-rank linear layer on x of shape (*lead, in)."""

    lead: tuple[int, ...] = (5,)
    features: tuple[int, int] = (48, 40)
    rank: int = 16
    bias: bool = True
    epilogue: str = "relu"
    config: dict[str, int] | None = None


_TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "RANK": 16, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
LOW_RANK_CASES = {
    "m_lt_tile": LowRankCase(lead=(3,)),
    "m_div_tile": LowRankCase(lead=(32,), config=_TILE),
    "m_gt_tile": LowRankCase(lead=(37,), config=_TILE),
    "leading_dims": LowRankCase(lead=(2, 3, 4)),
    "vector": LowRankCase(lead=()),
    "batch_0": LowRankCase(lead=(0, 4)),
    "rank_1": LowRankCase(rank=1, bias=False),
    "rank_ragged": LowRankCase(rank=20, epilogue="none"),
    "rank_256": LowRankCase(rank=256, lead=(16,)),
    "rank_gt_tile": LowRankCase(rank=40, config=_TILE),
    "rank_above_256": LowRankCase(rank=300, features=(64, 32)),
    "k_ragged": LowRankCase(features=(70, 40), config=_TILE),
    "n_ragged": LowRankCase(features=(48, 53), config=_TILE),
    "n_lt_tile": LowRankCase(features=(48, 3)),
    "splits": LowRankCase(features=(48, 90), config={**_TILE, "SPLITS": 3}),
    "more_splits_than_tiles": LowRankCase(features=(48, 20), config={**_TILE, "SPLITS": 5}),
    "index_64": LowRankCase(config={**_TILE, "INDEX_64": 1}),
}


def build(case: ConvCase, block_shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, BSRWeight, Tensor | None]:
    """x (channels_last), the block-sparse weight and the bias of a case."""
    c_out, c_in = MORE_BLOCK_SHAPES[block_shape]
    cut_out, cut_in = (b // 2 if c == -2 else c for b, c in zip(block_shape, case.cut))
    shape = (c_out - cut_out, c_in - cut_in, *case.kernel)
    weight = testing.random_bsr(shape, block_shape, case.sparsity, seed=1, dtype=dtype, pattern=case.pattern)
    n, h, w = case.image
    x = testing.random_tensor(n, shape[1], h, w, seed=2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, testing.random_tensor(shape[0], seed=3, dtype=dtype) if case.bias else None


def run_conv(
    case: ConvCase,
    x: Tensor,
    weight: BSRWeight,
    bias: Tensor | None,
    device: str = "cpu",
    config: dict[str, int] | None = None,
) -> Tensor:
    """The Triton convolution of a case, with another configuration than the case's where one is given."""
    index = weight.crow_indices.to(device), weight.col_indices.to(device)
    return triton_bsr_conv2d.launch(
        x.to(device),
        weight.values.to(device),
        *index,
        None if bias is None else bias.to(device),
        [forward_order(*index, weight.weight_shape, weight.block_shape)] if case.ordered else [],
        weight.weight_shape,
        weight.block_shape,
        case.stride,
        case.padding,
        case.dilation,
        case.epilogue,
        config or case.config(weight.block_shape, device),
        case.variant,
    )


def compare_conv(
    y: Tensor, case: ConvCase, x: Tensor, weight: BSRWeight, bias: Tensor | None, u_mul: float | None = None
) -> testing.Comparison:
    """y against the float64 convolution of `weight`."""
    arguments = (x, weight, bias, case.stride, case.padding, case.dilation, case.epilogue)
    scale, terms = testing.scale_bsr_conv2d(*arguments)
    ref = testing.reference_bsr_conv2d(*arguments)
    return testing.compare(y, ref, scale=scale, terms=terms, u_mul=u_mul, block_shape=weight.block_shape)


def check_conv(case: ConvCase, block_shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """A case is right, channels_last and of x's dtype."""
    x, weight, bias = build(case, block_shape, dtype)
    with fp32_precision("ieee"):
        y = run_conv(case, x, weight, bias, device)
    result = compare_conv(y, case, x, weight, bias)
    assert result.passed, result.message
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


def check_low_rank(case: LowRankCase, dtype: torch.dtype, device: str = "cpu", precision: str = "ieee") -> None:
    """A low-rank case is right, contiguous and of x's dtype; h is rounded to x's dtype, which bounds u_mul."""
    in_features, out_features = case.features
    x = testing.random_tensor(*case.lead, in_features, seed=1, dtype=dtype)
    u = testing.random_tensor(out_features, case.rank, seed=2, dtype=dtype)
    v = testing.random_tensor(case.rank, in_features, seed=3, dtype=dtype)
    bias = testing.random_tensor(out_features, seed=4, dtype=dtype) if case.bias else None
    moved = [None if t is None else t.to(device) for t in (x, u, v, bias)]
    with fp32_precision(precision):
        y = triton_low_rank_linear.launch(*moved, [], case.epilogue, case.config)
    scale, terms = testing.scale_low_rank_linear(x, u, v, bias)
    ref = testing.reference_low_rank_linear(x, u, v, bias, case.epilogue)
    # x, V, the intermediate and U lose their low bits.
    u_mul = 4 * testing.TF32_DROPPED if precision == "tf32" else testing.UNIT_ROUNDOFF[dtype]
    testing.assert_close(y, ref, scale=scale, terms=terms, u_mul=u_mul)
    if precision == "tf32":
        exact = testing.compare(y, ref, scale=scale, terms=terms)
        assert not exact.passed, "tf32 was asked for and IEEE arithmetic ran"
    assert y.dtype == dtype and y.is_contiguous() and y.shape == (*case.lead, out_features)


def check_linear(
    block_shape: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    variant: str = "pixels_on_m",
    config: dict[str, int] | None = None,
) -> None:
    """The linear layer through the convolution kernels: leading dimensions, ragged blocks, an empty batch."""
    c_out, c_in = (size - max(1, b // 2) for size, b in zip(MORE_BLOCK_SHAPES[block_shape], block_shape))
    weight = testing.random_bsr((c_out, c_in), block_shape, 0.4, seed=5, dtype=dtype)
    bias = testing.random_tensor(c_out, seed=6, dtype=dtype)
    parts = [t.to(device) for t in (weight.values, weight.crow_indices, weight.col_indices, bias)]
    order = forward_order(parts[1], parts[2], (c_out, c_in, 1, 1), block_shape)
    for lead in ((3, 7), (0,), ()):
        x = testing.random_tensor(*lead, c_in, seed=7, dtype=dtype)
        with fp32_precision("ieee"):
            y = triton_bsr_conv2d.launch_linear(
                x.to(device), *parts, [order], (c_out, c_in), block_shape, "relu", config, variant
            )
        scale, terms = testing.scale_bsr_linear(x, weight, bias)
        testing.assert_close(y, testing.reference_bsr_linear(x, weight, bias, "relu"), scale=scale, terms=terms)
        assert y.dtype == dtype and y.is_contiguous()


def check_nonfinite(block_shape: tuple[int, int], epilogue: str, device: str = "cpu") -> None:
    """NaN and infinity reach exactly the outputs whose stored blocks read them, and ReLU and max-pool keep NaN."""
    case = ConvCase(image=(1, 6, 6), sparsity=0.7, cut=(0, -2), epilogue=epilogue)
    x, weight, bias = build(case, block_shape, torch.float32)
    first, last = x.shape[1] // 3, x.shape[1] - 1
    x[0, first, 2, 1], x[0, last, 4, 4], x[0, 0, 0, 5] = math.nan, math.inf, -math.inf
    with fp32_precision("ieee"):
        y = run_conv(case, x, weight, bias, device)
    ref = testing.naive_bsr_conv2d(x, weight, bias, case.stride, case.padding, case.dilation, epilogue)
    scale, terms = testing.scale_bsr_conv2d(x.nan_to_num(0, 0, 0), weight, bias, *[(1, 1)] * 3, epilogue)
    testing.assert_close(y, ref, scale=scale, terms=terms, nonfinite=True, block_shape=block_shape)
    assert 0 < int(ref.isnan().sum()) < ref.numel(), "the pattern must leave both NaN and finite outputs"
