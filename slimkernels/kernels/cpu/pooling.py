"""Native max and average pooling: layers of a chain between convolutions, and how torch's ops are read as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import Conv2dArguments, address
from slimkernels.kernels.cpu.pairs import ENGINES, IMAGES, engine, is_in_pairs, is_output, pairs_shape
from slimkernels.kernels.cpu.steps import (
    AVERAGE_POOL,
    MAX_POOL,
    PADDED_AVERAGE_POOL,
    PAIRS_MAX_POOL,
    Step,
    image_sizes,
    images_innermost,
    is_dense,
)
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.problems import INT32_MAX, LANES, Pair, conv_output_image

_F = torch.nn.functional


@dataclass(frozen=True)
class Pooling:
    """A pooling of images: a layer of a chain that has no weights.

    Attributes:
        isa: instruction set of its kernel.
        kind: ``MAX_POOL``, ``AVERAGE_POOL`` (of the pixels inside the image) or ``PADDED_AVERAGE_POOL`` of `steps`.
        channels: of input and output.
        kernel: rows and columns of a window.
    """

    isa: str
    kind: int
    channels: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    # What a chain asks of its layers, and of their convolutions.
    packed = ()
    bias = None
    epilogue = "pooling"  # behind which nothing else fits
    narrow = False
    macs = 0

    @property
    def conv(self) -> Pooling:
        """What stands where other layers have a convolution."""
        return self

    @property
    def op(self) -> str:
        """Named in errors."""
        return "max_pool2d" if self.kind == MAX_POOL else "avg_pool2d"

    @property
    def c_in(self) -> int:
        """Input channels."""
        return self.channels

    @property
    def c_out(self) -> int:
        """Output channels."""
        return self.channels

    def output_size(self, h: int, w: int) -> Pair:
        """Height and width of the output."""
        return conv_output_image((h, w), self.kernel, self.stride, self.padding, self.dilation)

    def parts(self, n: int, h: int, w: int) -> Pair:
        """Images are not cut into parts, since a window may reach over the border of one."""
        return WHOLE

    def takes_images(self, h: int, w: int) -> bool:
        """Whether the kernel runs on images of this size."""
        return self._takes(h, w, 1)

    def takes_images_innermost(self, h: int, w: int) -> bool:
        """Whether the kernel runs on images of this size with a vector of them innermost."""
        return self._takes(h, w, LANES[self.isa])

    def takes_pairs(self, h: int, w: int) -> bool:
        """Whether the kernel runs in bf16 on images of this size."""
        return self._takes(h, w, IMAGES)

    def _takes(self, h: int, w: int, lanes: int) -> bool:
        p, q = self.output_size(h, w)
        return min(p, q) > 0 and max(h * w, p * q) * self.channels * lanes <= INT32_MAX

    def offsets(self, h: int, w: int, lanes: set[int], parts: Pair) -> dict[int, Tensor]:
        """None: its windows are regular."""
        return {}

    def step(
        self, x: Tensor, y: Tensor, n: int, offsets: dict[int, Tensor], residual: Tensor | None, parts: Pair
    ) -> Step:
        """The pooling of x into y as one of `Steps`.

        Args:
            x: float32 on the CPU: images channels_last, or ``(groups, h, w, channels, lanes)``; or images in pairs.
            y: the output, laid out like x, in memory that does not overlap it. Of pairs it may be float32 with 16
                images innermost.
            n: images.
            offsets: not read, as the two arguments behind it are.

        Raises:
            ValueError: tensors of another shape, dtype or layout.
        """
        if x.dtype is torch.bfloat16:
            return self._step_in_pairs(x, y, n, residual)
        lanes, (_, channels, h, w) = x.shape[4] if x.dim() == 5 else 1, image_sizes(x)
        p, q = self.output_size(h, w)
        fits = channels == self.channels and self._takes(h, w, lanes) and n > 0
        if lanes > 1:
            fits = fits and x.shape == images_innermost(n, h, w, channels, self.isa)
            fits = fits and y.shape == images_innermost(n, p, q, channels, self.isa)
        else:
            fits = fits and x.dim() == y.dim() == 4 and tuple(x.shape) == (n, channels, h, w)
            fits = fits and tuple(y.shape) == (n, channels, p, q)
        if not (fits and residual is None and parts == WHOLE and is_dense(x) and is_dense(y)):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self.op}: expected float32 x and y that fit {self} and {n} images, got {got}")
        return Step(self.kind, self._arguments(x, y, n, (h, w), (p, q), lanes), (x, y))

    def _step_in_pairs(self, x: Tensor, y: Tensor, n: int, residual: Tensor | None) -> Step:
        h, w = x.shape[1:3]
        p, q = self.output_size(h, w)
        fits = n > 0 and residual is None and self._takes(h, w, IMAGES) and is_in_pairs(x)
        fits = fits and x.shape == pairs_shape(n, h, w, self.channels)
        if not (fits and is_output(y, pairs_shape(n, p, q, self.channels), self.channels)):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self.op}: expected x and y in pairs that fit {self} and {n} images, got {got}")
        fastest = engine()
        assert fastest is not None
        arguments = self._arguments(x, y, n, (h, w), (p, q), IMAGES)
        arguments = arguments._replace(engine=ENGINES[fastest], to_floats=int(y.dtype is torch.float32))
        return Step(PAIRS_MAX_POOL + self.kind - MAX_POOL, arguments, (x, y))

    def _arguments(self, x: Tensor, y: Tensor, n: int, image: Pair, output: Pair, lanes: int) -> Conv2dArguments:
        (r, s), (stride_h, stride_w) = self.kernel, self.stride
        return Conv2dArguments(
            x=address(x), y=address(y), n=n, h=image[0], w=image[1], c_in=self.channels, p=output[0], q=output[1], r=r,
            s=s, stride_h=stride_h, stride_w=stride_w, pad_h=self.padding[0], pad_w=self.padding[1],
            dil_h=self.dilation[0], dil_w=self.dilation[1], lanes=lanes,
        )  # fmt: skip

    def __call__(self, x: Tensor, bias: None = None) -> Tensor:
        """The same by torch, for images of any layout."""
        if self.kind == MAX_POOL:
            return _F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation)
        padded = self.kind == PADDED_AVERAGE_POOL
        return _F.avg_pool2d(x, self.kernel, self.stride, self.padding, count_include_pad=padded)


def _pair(value: Any) -> Pair:
    values = [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)
    return int(values[0]), int(values[1])


def max_pooling(
    isa: str,
    image: tuple[int, int, int],
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Pooling | None:
    """``torch.nn.functional.max_pool2d`` with these arguments; None where the native one does not take them.

    Args:
        isa: instruction set of the kernel.
        image: channels, height and width of each image.
        kernel_size: as torch's, which has taken this and the others for such images.
        stride: as torch's.
        padding: as torch's.
        dilation: as torch's.
        ceil_mode: as torch's.
    """
    kernel = _pair(kernel_size)
    found = Pooling(isa, MAX_POOL, image[0], kernel, _stride(stride, kernel), _pair(padding), _pair(dilation))
    return found if _is_native(found, image, ceil_mode) else None


def average_pooling(
    isa: str,
    image: tuple[int, int, int],
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Pooling | None:
    """``torch.nn.functional.avg_pool2d`` as `max_pooling`; None where the native one does not take its arguments."""
    kernel, kind = _pair(kernel_size), PADDED_AVERAGE_POOL if count_include_pad else AVERAGE_POOL
    found = Pooling(isa, kind, image[0], kernel, _stride(stride, kernel), _pair(padding))
    return found if divisor_override is None and _is_native(found, image, ceil_mode) else None


def adaptive_average_pooling(isa: str, image: tuple[int, int, int], output_size: Any) -> Pooling | None:
    """``torch.nn.functional.adaptive_avg_pool2d`` where its windows are equal and side by side; else None."""
    channels, h, w = image
    p, q = (own if size is None else size for size, own in zip(_sizes(output_size), (h, w), strict=True))
    if p < 1 or q < 1 or h % p or w % q:
        return None
    found = Pooling(isa, AVERAGE_POOL, channels, (h // p, w // q), (h // p, w // q))
    return found if _is_native(found, image, False) else None


def _sizes(output_size: Any) -> Sequence[int | None]:
    return output_size if isinstance(output_size, (list, tuple)) else [output_size, output_size]


def _stride(stride: Any, kernel: Pair) -> Pair:
    return kernel if stride is None or stride == () or stride == [] else _pair(stride)


def _is_native(pool: Pooling, image: tuple[int, int, int], ceil_mode: bool) -> bool:
    """Whether the kernel takes such images, and rounding sizes up would change nothing."""
    _, h, w = image
    uneven = any(
        (size + 2 * pad - dilation * (taps - 1) - 1) % stride
        for size, pad, dilation, taps, stride in zip((h, w), pool.padding, pool.dilation, pool.kernel, pool.stride)
    )
    return pool.takes_images(h, w) and not (ceil_mode and uneven)
