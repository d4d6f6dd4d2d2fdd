"""Problem descriptions: what a kernel is asked to do, without its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output size of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_output_image(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output for images ``(height, width)``."""
    return (
        conv_output_size(image[0], kernel[0], stride[0], padding[0], dilation[0]),
        conv_output_size(image[1], kernel[1], stride[1], padding[1], dilation[1]),
    )


def taps_in_image(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Number of (output position, tap) pairs along one axis whose input lies inside the image."""
    out = conv_output_size(size, kernel, stride, padding, dilation)
    return sum(0 <= i * stride - padding + t * dilation < size for t in range(kernel) for i in range(out))


INT32_MAX = 2**31 - 1


def check_geometry(op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Raises ValueError unless stride and dilation are positive, padding is not negative, and all fit int32."""
    pairs = len(stride) == len(padding) == len(dilation) == 2
    if not pairs or max(*stride, *padding, *dilation) > INT32_MAX:
        raise ValueError(
            f"{op}: expected stride, padding and dilation of two ints below 2**31 each, "
            f"got {tuple(stride)}, {tuple(padding)}, {tuple(dilation)}"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: expected stride >= 1, dilation >= 1, padding >= 0, "
            f"got {tuple(stride)}, {tuple(dilation)}, {tuple(padding)}"
        )


class Room(NamedTuple):
    """What the CPU kernels hold of a convolution: they count the elements inside an image in int32.

    Attributes:
        pixels: of an image or an output, at most, one image being innermost.
        rows: how many rows the kernel reaches from a pixel, taps, padding and stride considered.
        columns: how many columns it reaches, likewise.
        reach: the same in pixels, at most.
    """

    pixels: int
    rows: int
    columns: int
    reach: int

    @classmethod
    def of(
        cls, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Room:
        """The room of a convolution of weight ``(C_out, C_in, R, S)``."""
        c_out, c_in, r, s = weight_shape
        rows, columns = max(dilation[0] * (r - 1), padding[0]), max(dilation[1] * (s - 1), padding[1], stride[1])
        return cls(INT32_MAX // max(c_in, c_out), rows, columns + 1, INT32_MAX // c_in)

    def holds(self, h: int, w: int, p: int, q: int, lanes: int = 1) -> bool:
        """Whether there is room for images of h x w and outputs of p x q, ``lanes`` of them innermost."""
        pixels, rows, columns, reach = self
        return h * w * lanes <= pixels and p * q * lanes <= pixels and (rows * w + columns) * lanes <= reach


# Images of a vector, by instruction set: how many lie innermost in the second activation layout of csrc/kernels.h.
LANES = {"scalar": 4, "avx2": 8, "avx512": 16}
# Strips narrower than this read images innermost only.
NARROWEST_CHANNELS_LAST = 8
# Rows of taps at most of a kernel that reads images innermost.
MAX_TAP_ROWS = 64


def strip_width(block_out: int, isa: str) -> int:
    """Output channels of a strip of the CPU kernels: it divides ``block_out``, so a strip reads one block row only."""
    widest = 32 if isa == "avx512" else 16
    return math.gcd(block_out, widest)


class DenseWork(NamedTuple):
    """What the dense layer that a problem replaces costs.

    Attributes:
        macs: multiply-adds, taps in the padding included.
        weight_bytes: bytes of its weight.
    """

    macs: int
    weight_bytes: int


class Request(NamedTuple):
    """The part of a problem that decides which kernels take it (shapes of activations left out)."""

    op: str
    dtype: torch.dtype
    device: str
    block_shape: tuple[int, int]
    epilogue: str

    @classmethod
    def of(cls, problem: SizedProblem) -> Request:
        """The request of a sized problem."""
        return cls(problem.op, problem.dtype, problem.device, problem.block_shape, problem.epilogue)


@dataclass(frozen=True)
class _Convolution:
    """The sizes of a convolution and what follows from them, whatever its weight is stored as."""

    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def p(self) -> int:
        """Output height before pooling."""
        return conv_output_size(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def q(self) -> int:
        """Output width before pooling."""
        return conv_output_size(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def macs_dense(self) -> int:
        """Multiply-adds of the dense convolution that lie inside the image."""
        rows = taps_in_image(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])
        cols = taps_in_image(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])
        return self.n * self.c_in * self.c_out * rows * cols

    @property
    def rows(self) -> int:
        """Output pixels of all images, before pooling."""
        return self.n * self.p * self.q

    @property
    def native_calls(self) -> int:
        """CPU kernel calls of one forward."""
        return 1

    def dense_work(self) -> DenseWork:
        """The dense convolution's work."""
        weights = self.c_in * self.c_out * self.r * self.s
        # For mypy: torch.dtype has it, torch's annotations do not.
        return DenseWork(self.rows * weights, weights * self.dtype.itemsize)  # type: ignore[attr-defined]

    def io_bytes(self, *, pooled: bool) -> tuple[int, int]:
        """``(input, output)`` bytes, each counted once; ``pooled``: the output after 2x2 pooling."""
        rows = self.n * (self.p // 2) * (self.q // 2) if pooled else self.rows
        size: int = self.dtype.itemsize  # type: ignore[attr-defined]  # torch.dtype has it, torch's annotations do not
        return self.n * self.c_in * self.h * self.w * size, rows * self.c_out * size


@dataclass(frozen=True)
class ConvProblem(_Convolution):
    """A block-sparse convolution."""

    block_shape: tuple[int, int]
    nnz_blocks: int
    dtype: torch.dtype
    device: str
    epilogue: str = "none"
    op: ClassVar[str] = "bsr_conv2d"

    @property
    def stored_share(self) -> float:
        """Stored weights (padded entries included) over all weights."""
        block_out, block_in = self.block_shape
        return self.nnz_blocks * block_out * block_in / (self.c_out * self.c_in * self.r * self.s)

    @property
    def macs(self) -> int:
        """Multiply-adds of the stored blocks that lie inside the image, a uniform pattern over taps assumed."""
        return round(self.macs_dense * self.stored_share)


@dataclass(frozen=True)
class FusedConvProblem(_Convolution):
    """A dense convolution with the bias, ReLU and pool behind it."""

    dtype: torch.dtype
    device: str
    epilogue: str = "none"
    op: ClassVar[str] = "fused_conv2d"
    block_shape: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def macs(self) -> int:
        """Multiply-adds that lie inside the image."""
        return self.macs_dense


@dataclass(frozen=True)
class LinearProblem:
    """A block-sparse linear layer over ``m`` rows."""

    m: int
    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    nnz_blocks: int
    dtype: torch.dtype
    device: str
    epilogue: str = "none"
    op: ClassVar[str] = "bsr_linear"

    @property
    def stored_share(self) -> float:
        """Stored weights (padded entries included) over all weights."""
        return self.nnz_blocks * self.block_shape[0] * self.block_shape[1] / (self.in_features * self.out_features)

    @property
    def macs_dense(self) -> int:
        """Multiply-adds of the dense layer."""
        return self.m * self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """Multiply-adds of the stored blocks."""
        return round(self.macs_dense * self.stored_share)

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.m

    @property
    def native_calls(self) -> int:
        """CPU kernel calls of one forward."""
        return 1

    def dense_work(self) -> DenseWork:
        """The dense layer's work."""
        return DenseWork(self.macs_dense, self.in_features * self.out_features * self.dtype.itemsize)

    def io_bytes(self, *, pooled: bool = False) -> tuple[int, int]:
        """``(input, output)`` bytes, each counted once; a linear layer pools nothing."""
        return self.m * self.in_features * self.dtype.itemsize, self.m * self.out_features * self.dtype.itemsize


@dataclass(frozen=True)
class LowRankLinearProblem:
    """A low-rank linear layer over ``m`` rows."""

    m: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    device: str
    epilogue: str = "none"
    op: ClassVar[str] = "low_rank_linear"
    block_shape: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def macs_dense(self) -> int:
        """Multiply-adds of the merged dense layer."""
        return self.m * self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """Multiply-adds of both factors."""
        return self.m * self.rank * (self.in_features + self.out_features)

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.m

    @property
    def native_calls(self) -> int:
        """CPU kernel calls of one forward."""
        return 2

    def dense_work(self) -> DenseWork:
        """The merged dense layer's work."""
        return DenseWork(self.macs_dense, self.in_features * self.out_features * self.dtype.itemsize)

    def io_bytes(self, *, pooled: bool = False) -> tuple[int, int]:
        """``(input, output)`` bytes, each counted once; a linear layer pools nothing."""
        return self.m * self.in_features * self.dtype.itemsize, self.m * self.out_features * self.dtype.itemsize


@dataclass(frozen=True)
class LowRankConvProblem:
    """A low-rank convolution: an ordered chain of dense factor convolutions with the given weight shapes."""

    n: int
    h: int
    w: int
    kind: str
    factor_shapes: tuple[tuple[int, int, int, int], ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    device: str
    epilogue: str = "none"
    op: ClassVar[str] = "low_rank_conv2d"
    block_shape: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return conv_output_image((self.h, self.w), self.kernel_size, self.stride, self.padding, self.dilation)

    @property
    def rows(self) -> int:
        """Output pixels of all images."""
        p, q = self.output_size
        return self.n * p * q

    @property
    def macs_dense(self) -> int:
        """Multiply-adds of the merged dense convolution, padding included."""
        kernel = self.kernel_size
        return self.rows * self.factor_shapes[0][1] * self.factor_shapes[-1][0] * kernel[0] * kernel[1]

    @property
    def native_calls(self) -> int:
        """CPU kernel calls of one forward."""
        return len(self.factor_shapes)

    def dense_work(self) -> DenseWork:
        """The merged dense convolution's work."""
        kernel = self.kernel_size
        weights = self.factor_shapes[0][1] * self.factor_shapes[-1][0] * kernel[0] * kernel[1]
        return DenseWork(self.macs_dense, weights * self.dtype.itemsize)

    def io_bytes(self, *, pooled: bool = False) -> tuple[int, int]:
        """``(input, output)`` bytes, each counted once; a low-rank convolution pools nothing."""
        size = self.dtype.itemsize
        return self.n * self.h * self.w * self.factor_shapes[0][1] * size, self.rows * self.factor_shapes[-1][0] * size

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Kernel of the merged convolution."""
        return max(f[2] for f in self.factor_shapes), max(f[3] for f in self.factor_shapes)

    @property
    def macs(self) -> int:
        """Multiply-adds of all factors, padding included."""
        h, w, total = self.h, self.w, 0
        for shape, (stride, padding, dilation) in zip(
            self.factor_shapes,
            factor_geometry(self.kind, len(self.factor_shapes), self.stride, self.padding, self.dilation),
        ):
            h, w = conv_output_image((h, w), shape[2:], stride, padding, dilation)
            total += self.n * h * w * shape[0] * shape[1] * shape[2] * shape[3]
        return total


Pair: TypeAlias = tuple[int, int]
SizedProblem: TypeAlias = ConvProblem | LinearProblem | LowRankLinearProblem | LowRankConvProblem | FusedConvProblem
Problem: TypeAlias = Request | SizedProblem


def factor_geometry(
    kind: str, count: int, stride: Pair, padding: Pair, dilation: Pair
) -> list[tuple[Pair, Pair, Pair]]:
    """``(stride, padding, dilation)`` of every factor convolution.

    ``tai``: the vertical factor carries the row axis, the horizontal one the column axis. ``svd``: the first factor
    carries both, ``tucker2``: the middle one.
    """
    unit: tuple[Pair, Pair, Pair] = ((1, 1), (0, 0), (1, 1))
    if kind == "tai":
        return [
            ((stride[0], 1), (padding[0], 0), (dilation[0], 1)),
            ((1, stride[1]), (0, padding[1]), (1, dilation[1])),
        ]
    carrier = 1 if kind == "tucker2" else 0
    return [(stride, padding, dilation) if i == carrier else unit for i in range(count)]


def native_obstacle(isa: str, problem: Problem) -> str | None:
    """Why the CPU kernels of an instruction set cannot hold a problem; None where they can, or sizes are unknown."""
    if isinstance(problem, ConvProblem):
        shapes: Sequence[Sequence[int]] = [(problem.c_out, problem.c_in, problem.r, problem.s)]
        geometry = [(problem.stride, problem.padding, problem.dilation)]
        narrow = strip_width(problem.block_shape[0], isa) < NARROWEST_CHANNELS_LAST
    elif isinstance(problem, LowRankConvProblem):
        shapes, narrow = problem.factor_shapes, False
        geometry = factor_geometry(problem.kind, len(shapes), problem.stride, problem.padding, problem.dilation)
    else:
        return None
    h, w, lanes = problem.h, problem.w, LANES[isa] if narrow else 1
    for shape, (stride, padding, dilation) in zip(shapes, geometry, strict=True):
        p, q = conv_output_image((h, w), shape[2:], stride, padding, dilation)
        if not Room.of(shape, stride, padding, dilation).holds(h, w, p, q, lanes):
            return "an image, an output or the reach of the kernel has 2**31 elements or more"
        if narrow and shape[2] > MAX_TAP_ROWS:
            return f"blocks of {problem.block_shape[0]} output channels take at most {MAX_TAP_ROWS} rows of taps"
        h, w = p, q
    return None


PROBLEM_TYPES = {
    cls.op: cls for cls in (ConvProblem, LinearProblem, LowRankLinearProblem, LowRankConvProblem, FusedConvProblem)
}


def problem_json(problem: SizedProblem) -> dict[str, Any]:
    """A problem as plain data, its op with it."""
    return {"op": problem.op, **asdict(problem), "dtype": str(problem.dtype).removeprefix("torch.")}


def problem_from_json(data: Mapping[str, Any]) -> SizedProblem:
    """The problem of plain data; raises ValueError or TypeError where a field is wrong."""

    def tupled(value: Any) -> Any:
        return tuple(map(tupled, value)) if isinstance(value, list) else value

    values = {k: tupled(v) for k, v in data.items()}
    cls = PROBLEM_TYPES.get(values.pop("op", None))
    if cls is None:
        raise ValueError(f"expected op in {', '.join(PROBLEM_TYPES)}, got {data.get('op')!r}")
    values["dtype"] = getattr(torch, values["dtype"])
    return cls(**values)
