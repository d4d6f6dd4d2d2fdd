"""What the C++ CPU kernels are handed: the members of the structs of csrc/kernels.h by name.

The extension says where each member lies in its struct; `mismatch` compares that with the fields here, so that an
extension built from other sources is refused when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

_POINTERS = frozenset({"x", "y", "bias", "weights", "channels", "tap_ptr", "offsets", "residual"})
_POINTERS |= {"grad", "values_grad", "crow_indices", "col_indices", "coefficients", "sums"}
_INT64 = ("n", "h", "w", "c", "c_in", "c_out", "p", "q")


class Conv2dArguments(NamedTuple):
    """One convolution, or one copy between layouts, which reads x, y, n, h, w, c_in, lanes and the parts alone.

    Attributes:
        x: address of the input; addresses are 0 for NULL.
        y: address of the output.
        bias: address of the bias.
        weights: address of the packed weights.
        channels: address of the entries' input channels.
        tap_ptr: address of the first entry of every strip and tap.
        offsets: address of the entries' distances in x.
        residual: address of what is added in front of the ReLU.
        n: images, or parts of images.
        h: input height, of a part where images are cut into parts; so are the sizes below.
        w: input width.
        c_in: input channels.
        c_out: output channels.
        p: output height, before pooling.
        q: output width, before pooling.
        r: rows of taps.
        s: columns of taps.
        stride_h: stride of rows.
        stride_w: stride of columns.
        pad_h: rows of zeros above and below.
        pad_w: columns of zeros on either side.
        dil_h: dilation of rows.
        dil_w: dilation of columns.
        strip: output channels that share an index list.
        depth: input channels that share an entry.
        relu: 0 or 1.
        pool: 0 or 1, a 2x2 max-pool after the ReLU.
        lanes: images innermost, or 1 for channels_last.
        parts_h: rows of parts that an image is cut into.
        parts_w: columns of parts.
        engine: of a step in pairs, ``SLIM_ENGINE_*``; else 0.
        to_floats: of a step in pairs, 0 or 1: y is float32 with 16 images innermost.
    """

    x: int = 0
    y: int = 0
    bias: int = 0
    weights: int = 0
    channels: int = 0
    tap_ptr: int = 0
    offsets: int = 0
    residual: int = 0
    n: int = 0
    h: int = 0
    w: int = 0
    c_in: int = 0
    c_out: int = 0
    p: int = 0
    q: int = 0
    r: int = 0
    s: int = 0
    stride_h: int = 0
    stride_w: int = 0
    pad_h: int = 0
    pad_w: int = 0
    dil_h: int = 0
    dil_w: int = 0
    strip: int = 0
    depth: int = 0
    relu: int = 0
    pool: int = 0
    lanes: int = 0
    parts_h: int = 1
    parts_w: int = 1
    engine: int = 0
    to_floats: int = 0


class WeightGradientArguments(NamedTuple):
    """The gradient of the weights that a convolution stores: the members of ``SlimWeightGradientF32``.

    Attributes:
        x: address of the convolution's input.
        grad: address of the gradient of its output.
        values_grad: address of the gradient of the stored blocks.
        crow_indices: address of the pattern's row pointers.
        col_indices: address of its block columns.
        n: images.
        h: input height.
        w: input width.
        c_in: input channels.
        c_out: output channels.
        p: output height.
        q: output width.
        r: rows of taps.
        s: columns of taps.
        stride_h: stride of rows.
        stride_w: stride of columns.
        pad_h: rows of zeros above and below.
        pad_w: columns of zeros on either side.
        dil_h: dilation of rows.
        dil_w: dilation of columns.
        block_out: output channels of a block.
        block_in: input channels of a block.
    """

    x: int
    grad: int
    values_grad: int
    crow_indices: int
    col_indices: int
    n: int
    h: int
    w: int
    c_in: int
    c_out: int
    p: int
    q: int
    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    block_out: int
    block_in: int


class BatchNormArguments(NamedTuple):
    """One pass of a training step's batch norm: the members of ``SlimBatchNormF32``.

    Attributes:
        x: address of the input.
        grad: address of the gradient of the output.
        coefficients: address of five rows of channels.
        y: address of the output, or of the gradient of the input.
        sums: address of two rows of channels in double precision.
        n: images.
        h: height.
        w: width.
        c: channels.
        which: the pass.
        relu: 0 or 1.
        pool: 0 or 1, a 2x2 max-pool after the ReLU.
    """

    x: int
    grad: int
    coefficients: int
    y: int
    sums: int
    n: int
    h: int
    w: int
    c: int
    which: int
    relu: int
    pool: int


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def layout(fields: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, offset, size) in bytes of these members, as a C compiler lays them out."""
    found, offset = [], 0
    for name in fields:
        size = 8 if name in _POINTERS or name in _INT64 else 4
        found.append((name, offset, size))
        offset += size
    return found


def mismatch(module: ModuleType) -> str | None:
    """None where the extension's structs are the ones described here, else what differs."""
    for struct, fields, members in (
        ("SlimConv2dF32", Conv2dArguments._fields, "conv2d_members"),
        ("SlimWeightGradientF32", WeightGradientArguments._fields, "weight_gradient_members"),
        ("SlimBatchNormF32", BatchNormArguments._fields, "batch_norm_members"),
    ):
        theirs, ours = list(getattr(module, members, list)()), layout(fields)
        if theirs != ours:
            different = next((pair for pair in zip(theirs, ours) if pair[0] != pair[1]), (len(theirs), len(ours)))
            has = f"{struct} has {different[0]}, expected {different[1]}"
            return f"it was built from other sources, build it again: {has}"
    return None
