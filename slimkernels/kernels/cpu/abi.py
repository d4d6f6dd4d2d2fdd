"""What the C++ CPU kernels are handed: the members of ``SlimConv2dF32`` (csrc/kernels.h) by name.

The extension says where each member lies in the struct; `mismatch` compares that with the fields here, so that an
extension built from other sources is refused when it is loaded.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

_POINTERS = ("x", "y", "bias", "weights", "channels", "tap_ptr", "offsets", "residual")
_INT64 = ("n", "h", "w", "c_in", "c_out", "p", "q")


class Conv2dArguments(NamedTuple):
    """One convolution, or one copy between layouts, which reads x, y, n, h, w, c_in and lanes alone.

    Attributes:
        x: address of the input; addresses are 0 for NULL.
        y: address of the output.
        bias: address of the bias.
        weights: address of the packed weights.
        channels: address of the entries' input channels.
        tap_ptr: address of the first entry of every strip and tap.
        offsets: address of the entries' distances in x.
        residual: address of what is added in front of the ReLU.
        n: images.
        h: input height.
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


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def layout() -> list[tuple[str, int, int]]:
    """(name, offset, size) in bytes of every member, as a C compiler lays them out."""
    found, offset = [], 0
    for name in Conv2dArguments._fields:
        size = 8 if name in _POINTERS or name in _INT64 else 4
        found.append((name, offset, size))
        offset += size
    return found


def mismatch(module: ModuleType) -> str | None:
    """None where the extension's struct is the one described here, else what differs."""
    theirs, ours = list(module.conv2d_members()), layout()
    if theirs == ours:
        return None
    different = next((pair for pair in zip(theirs, ours) if pair[0] != pair[1]), (len(theirs), len(ours)))
    return f"it was built from other sources, build it again: SlimConv2dF32 has {different[0]}, expected {different[1]}"
