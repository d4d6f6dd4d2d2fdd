"""Launchers of the C++ CPU kernels. Only this file hands out CPU addresses: what the kernels trust is checked here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slimkernels import _extension
from slimkernels.kernels.problems import Problem


@lru_cache(maxsize=1)
def _library() -> tuple[ModuleType | None, str | None, tuple[str, ...]]:
    module, reason = _extension.load()
    return module, reason, tuple(module.isas()) if module is not None else ()


def unavailable_reason(isa: str) -> str | None:
    """None when the native kernel of this instruction set can run here, else why not."""
    module, reason, isas = _library()
    if module is None:
        return f"slimkernels._C is not loaded: {reason}"
    if isa in isas:
        return None
    return f"{isa} is not built or not supported by this CPU (available: {', '.join(isas)})"


def shape_reason(problem: Problem) -> str | None:
    """None when the strip kernels take the problem's block shape: whole strips of 8 output channels, or why not."""
    if problem.block_shape[0] % 8:
        return f"block_out must be a multiple of 8, got {problem.block_shape[0]}"
    return None


def strip_width(block_out: int, isa: str) -> int:
    """Output channels of one microkernel call; it divides ``block_out``, so a strip reads one block row only."""
    if isa == "avx512" and block_out % 32 == 0:
        return 32
    return 16 if block_out % 16 == 0 else 8


def pack_strips(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    strip: int,
) -> list[Tensor]:
    """Strip pack of csrc/kernels.h: ``[weights (entries, strip), channels (entries,), tap_ptr (strips * taps + 1,)]``.

    Args:
        values, crow_indices, col_indices: a valid BSR weight on the CPU; its spare capacity is left out.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        strip: output channels per strip, a divisor of ``block_out``.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    taps, groups, per_block = r * s, -(-c_in // block_in), block_out // strip
    strips = -(-c_out // strip)
    crow = crow_indices.long()
    counts = crow[1:] - crow[:-1]
    nnz = int(crow[-1])
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    tap = torch.div(col_indices[:nnz], groups, rounding_mode="floor").long()
    first_channel = (col_indices[:nnz].long() - tap * groups) * block_in

    # Order of the entries: strip, then block column, then channel inside the block.
    sub = torch.arange(per_block)
    position = crow[:-1][row][:, None] * (per_block - 1) + sub * counts[row][:, None] + torch.arange(nnz)[:, None]
    order = torch.empty(nnz * per_block, dtype=torch.long)
    order[position.reshape(-1)] = torch.arange(nnz * per_block)
    weights = values.detach()[:nnz].reshape(nnz, per_block, strip, block_in).transpose(2, 3)
    weights = weights.reshape(nnz * per_block, block_in, strip)
    channels = first_channel[:, None, None] + torch.arange(block_in)
    channels = channels.expand(nnz, per_block, block_in).reshape(nnz * per_block, block_in)
    key = ((row[:, None] * per_block + sub) * taps + tap[:, None]).reshape(-1)
    if per_block > 1:
        weights, channels, key = weights[order], channels[order], key[order]
    key = key[:, None].expand(-1, block_in).reshape(-1)
    weights, channels = weights.reshape(-1, strip), channels.reshape(-1)
    if strips * strip != counts.numel() * block_out or groups * block_in != c_in:
        inside = (channels < c_in) & (key < strips * taps)
        weights, channels, key = weights[inside], channels[inside], key[inside]
    tap_ptr = torch.zeros(strips * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = torch.bincount(key, minlength=strips * taps).cumsum(0)
    return [weights.contiguous(), channels.to(torch.int32), tap_ptr]


class PackedConv2d:
    """A packed weight with its geometry: a native convolution that only waits for its input.

    Immutable; holds the pack's tensors, so any number of threads may call it.

    Args:
        isa: instruction set of the kernel.
        packed: what `pack_strips` returned.
        weight_shape: ``(C_out, C_in, R, S)``.
        stride, padding, dilation: two ints each.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.
        op: named in errors.

    Raises:
        ValueError: a pack of another weight shape, or 2**31 entries and more.
    """

    __slots__ = ("_conv2d", "_geometry", "_isa", "_op", "_packed", "_pool", "_tail", "c_in", "c_out", "limit")

    def __init__(
        self, isa: str, packed: Sequence[Tensor], weight_shape: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], epilogue: str, op: str = "bsr_conv2d",
    ) -> None:  # fmt: skip
        self.c_out, self.c_in, r, s = weight_shape
        self._op = op
        weights, channels, tap_ptr = packed
        strip = weights.shape[1]
        strips = -(-self.c_out // strip)
        if tap_ptr.numel() != strips * r * s + 1 or channels.numel() != weights.shape[0]:
            raise ValueError(
                f"{op}: expected a strip pack of {strips} strips and {r * s} taps, "
                f"got tap_ptr of length {tap_ptr.numel()}"
            )
        if weights.shape[0] >= 2**31:
            raise ValueError(f"{op}: expected fewer than 2**31 entries")
        module = _library()[0]
        assert module is not None
        self._conv2d, self._isa, self._packed = module.conv2d_f32, isa, tuple(packed)
        self._geometry = (r, s, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1])
        self._pool = epilogue == "relu_maxpool2"
        self._tail = (strip, int(epilogue != "none"), int(self._pool))
        self.limit = (2**31 - 1) // max(self.c_in, self.c_out)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the output, before pooling, for an input of this height and width."""
        r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = self._geometry
        return (h + 2 * pad_h - dil_h * (r - 1) - 1) // stride_h + 1, (
            w + 2 * pad_w - dil_w * (s - 1) - 1
        ) // stride_w + 1

    def takes(self, x: Tensor) -> bool:
        """Whether x is a non-empty float32 CPU image batch of the right channels that leaves an output to compute."""
        if x.dim() != 4 or x.dtype is not torch.float32 or x.device.type != "cpu":
            return False
        n, c, h, w = x.shape
        p, q = self.output_size(h, w)
        return n > 0 and c == self.c_in and min(p, q) > self._pool and max(h * w, p * q) <= self.limit

    def takes_rows(self, x: Tensor) -> bool:
        """Whether x holds float32 CPU rows of the right length."""
        return x.dtype is torch.float32 and x.device.type == "cpu" and x.shape[-1:] == (self.c_in,)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output for a float32 CPU image batch that fits; x channels_last.

        Raises:
            ValueError: an image of 2**31 elements or more. RuntimeError: the native kernel failed (out of memory).
        """
        n, _, h, w = x.shape
        p, q = self.output_size(h, w)
        size = (n, self.c_out, p // 2, q // 2) if self._pool else (n, self.c_out, p, q)
        y = torch.empty(size, memory_format=torch.channels_last, dtype=torch.float32)
        self._run(x, y, bias, n, h, w, p, q)
        return y

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output for contiguous float32 CPU rows ``(..., in)``, the weight being that of a linear layer."""
        y = torch.empty((*x.shape[:-1], self.c_out), dtype=torch.float32)
        self._run(x, y, bias, x.numel() // self.c_in, 1, 1, 1, 1)
        return y

    def _run(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, h: int, w: int, p: int, q: int) -> None:
        if n == 0:
            return
        if max(h * w, p * q) > self.limit:
            raise ValueError(f"{self._op}: expected images of fewer than 2**31 elements")
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        weights, channels, tap_ptr = self._packed
        status = self._conv2d(
            self._isa, x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), weights.data_ptr(),
            channels.data_ptr(), tap_ptr.data_ptr(), n, h, w, self.c_in, self.c_out, p, q, *self._geometry, *self._tail,
            torch.get_num_threads(),
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"{self._op}: native kernel {self._isa} failed with status {status}")

    def bind(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Callable[[], None]:
        """The convolution of x into y as a call without arguments, which keeps every tensor it touches alive.

        Args:
            x: float32 CPU images, channels_last, or contiguous rows ``(..., in)`` where the weight is a linear layer's.
            y: the output, in the same layout; it does not overlap x.

        Raises:
            ValueError: tensors of another shape or layout.
        """
        images = x.dim() == 4 and self.takes(x)
        if images:
            (n, _, h, w), layout = x.shape, torch.channels_last
            p, q = self.output_size(h, w)
            size: tuple[int, ...] = (n, self.c_out, p >> self._pool, q >> self._pool)
        else:
            n, h, w, p, q, layout = x.numel() // self.c_in, 1, 1, 1, 1, torch.contiguous_format
            size = (*x.shape[:-1], self.c_out)
        fits = (images or (self.takes_rows(x) and n > 0)) and y.shape == size and y.dtype is torch.float32
        if not (fits and x.is_contiguous(memory_format=layout) and y.is_contiguous(memory_format=layout)):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self._op}: expected x and y in {layout} that fit this weight, got {got}")
        bias = None if bias is None else bias.contiguous()
        weights, channels, tap_ptr = self._packed
        run, threads = self._conv2d, torch.get_num_threads
        arguments = (
            self._isa, x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), weights.data_ptr(),
            channels.data_ptr(), tap_ptr.data_ptr(), n, h, w, self.c_in, self.c_out, p, q, *self._geometry, *self._tail,
        )  # fmt: skip

        def call(_alive: tuple[Any, ...] = (x, y, bias, self)) -> None:
            status = run(*arguments, threads())
            if status != 0:
                raise RuntimeError(f"{self._op}: native kernel failed with status {status}")

        return call


_UNIT = (1, 1)


def launch_bsr_conv2d(
    isa: str, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    packed: Sequence[Tensor], weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], epilogue: str,
) -> Tensor:  # fmt: skip
    """Block-sparse convolution of a float32 CPU tensor; x channels_last.

    Without ``packed`` the weight is packed in this call.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    strip = strip_width(block_shape[0], isa)
    packed = packed or pack_strips(values, crow_indices, col_indices, weight_shape, block_shape, strip)
    return PackedConv2d(isa, packed, weight_shape, stride, padding, dilation, epilogue)(x, bias)


def launch_bsr_linear(
    isa: str, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    packed: Sequence[Tensor], weight_shape: Sequence[int], block_shape: Sequence[int], epilogue: str,
) -> Tensor:  # fmt: skip
    """Block-sparse linear layer of a contiguous float32 CPU tensor (..., in): the 1x1 convolution of its rows."""
    shape, strip = (*weight_shape, 1, 1), strip_width(block_shape[0], isa)
    packed = packed or pack_strips(values, crow_indices, col_indices, shape, block_shape, strip)
    return PackedConv2d(isa, packed, shape, _UNIT, (0, 0), _UNIT, epilogue).rows(x, bias)


def peak_flops(isa: str | None = None, seconds: float = 0.2) -> float:
    """Measured fp32 multiply-add rate of this CPU at torch's thread count, FLOP/s (2 per multiply-add).

    The best of several bursts.

    Args:
        isa: instruction set, by default the highest that runs here.
        seconds: about how long to measure.

    Raises:
        ValueError: the native kernels of this instruction set cannot run here.
    """
    isa = isa or (_library()[2] or ("scalar",))[0]
    reason = unavailable_reason(isa)
    if reason is not None:
        raise ValueError(f"peak_flops: {reason}")
    module, threads, best = _library()[0], torch.get_num_threads(), 0.0
    assert module is not None
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        done = module.multiply_adds_f32(isa, 200_000, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best
