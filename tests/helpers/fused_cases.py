"""Dense convolutions with a fused epilogue, named by what of the kernel they reach: by the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.cases import FusedConvCase
from slimkernels.kernels import KERNELS

KERNEL = "fused_conv2d__triton"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the first layers that networks have: VGG's and ResNet's.
VGG = FusedConvCase("vgg", n=3, h=8, w=8, c_out=64, epilogue="relu")
STEM = FusedConvCase(
    "stem", n=1, h=19, w=22, c_out=64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), epilogue="relu"
)
CASES = [
    VGG,
    STEM,
    FusedConvCase("contiguous", contiguous=True, epilogue="relu"),
    replace(STEM, name="stem_contiguous", h=12, w=11, contiguous=True),
    FusedConvCase("pool", n=3, epilogue="relu_maxpool2", h=9),
    FusedConvCase("pool_contiguous", epilogue="relu_maxpool2", contiguous=True, h=8, w=13, stride=(1, 2)),
    FusedConvCase("ragged_outputs", c_out=83, bias=False),
    FusedConvCase("one_output", c_out=1, n=1, epilogue="relu"),
    FusedConvCase("one_channel", c_in=1, kernel_size=(5, 3), padding=(2, 0)),
    FusedConvCase("pointwise", kernel_size=(1, 1), padding=(0, 0), c_in=4),
    FusedConvCase("no_padding", padding=(0, 0), contiguous=True),
    FusedConvCase("strided_dilated", h=13, w=11, stride=(2, 3), padding=(0, 2), dilation=(2, 1), c_in=5),
    FusedConvCase("dilated_contiguous", n=1, h=9, w=10, dilation=(2, 3), padding=(2, 1), contiguous=True),
    FusedConvCase("padding_exceeds_image", n=1, h=2, w=1, padding=(3, 2), dilation=(2, 2)),
    FusedConvCase("stride_exceeds_kernel", kernel_size=(2, 2), stride=(3, 4), padding=(1, 1), h=13, w=14),
    FusedConvCase("deepest", n=1, h=4, w=3, c_in=28, contiguous=True),
    FusedConvCase("many_tiles", n=3, h=7, w=5, c_out=20, epilogue="relu"),
    FusedConvCase("batch_0", n=0),
]
# Small tiles, so that a case has several in both directions, dealt to few programs.
TILE = {
    "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 3, "PREFETCH": 0, "BIAS_LAST": 0, "num_warps": 4,
    "num_stages": 1,
}  # fmt: skip
CONFIGS = {
    "default": {},
    "small": TILE,
    "prefetched": {**TILE, "PREFETCH": 1},
    "int64": {**TILE, "PREFETCH": 1, "INDEX_64": 1},
    "bias_last": {**TILE, "BIAS_LAST": 1},
    "one_program": {**TILE, "BIAS_LAST": 1, "PROGRAMS": 1, "BLOCK_K": 32},
    "a_program_a_tile": {**TILE, "PROGRAMS": 10**6, "BLOCK_M": 32},
}


def check_nonfinite(epilogue: str, device: str, *, contiguous: bool, kernel: str = KERNEL) -> None:
    """NaN and infinities reach the outputs that read them and no other, through ReLU and pool as torch's do."""
    x = torch.ones(3, 3, 9, 8)
    for image, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[image, 1, 4, 5] = value
    if not contiguous:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(20, 3, 3, 3)
    weight[1::2] = -1
    weight[:, :, 0, 0] = 0  # a stored zero reads its pixel
    y = KERNELS[kernel].launch(x.to(device), weight.to(device), None, (1, 1), (1, 1), (1, 1), epilogue).cpu()
    expected = F.conv2d(x, weight, None, padding=1)
    if epilogue != "none":
        expected = expected.relu()
    if epilogue == "relu_maxpool2":
        expected = F.max_pool2d(expected, 2)
    assert_same(y, expected)


def assert_same(y: Tensor, expected: Tensor) -> None:
    """Equal, NaN to NaN."""
    assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().any()
    assert torch.equal(y.nan_to_num(0.5, 7e3, -7e3), expected.nan_to_num(0.5, 7e3, -7e3))
