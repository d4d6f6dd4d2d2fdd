"""Launchers of the C++ CPU kernels. Only this file hands out CPU addresses: what the kernels trust is checked here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels import _extension
from slimkernels.kernels.problems import LANES, NARROWEST_CHANNELS_LAST, strip_width


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


_MAX_TAP_ROWS = 64  # of a kernel that reads images innermost
_OFFSETS_MARGIN = 16  # SLIM_OFFSETS_MARGIN
_CACHED_WIDTHS = 4
_CONV2D, _TO_IMAGES, _FROM_IMAGES = range(3)  # SLIM_STEP_*


def images_innermost(n: int, h: int, w: int, channels: int, isa: str) -> tuple[int, int, int, int, int]:
    """Shape of n images in the layout that keeps a vector of images innermost."""
    lanes = LANES[isa]
    return -(-n // lanes), h, w, channels, lanes


class PackedConv2d:
    """A packed weight with its geometry: a native convolution that only waits for its input.

    What it computes never changes, so any number of threads may call it; it remembers the offsets of its entries for
    the image widths it has seen.

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

    __slots__ = (
        "_conv2d", "_geometry", "_isa", "_offsets", "_op", "_packed", "_pool", "_tail", "c_in", "c_out", "limit",
    )  # fmt: skip

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
        self._offsets: dict[int, Tensor] = {}
        self.limit = (2**31 - 1) // max(self.c_in, self.c_out)

    @property
    def narrow(self) -> bool:
        """Whether the kernel runs with images innermost only."""
        return self._tail[0] < NARROWEST_CHANNELS_LAST

    @property
    def macs(self) -> int:
        """Multiply-adds of one output pixel away from the border."""
        return self._packed[0].numel()

    def takes_images_innermost(self, h: int, w: int) -> bool:
        """Whether the kernel runs on images of this size with a vector of them innermost."""
        p, q = self.output_size(h, w)
        fits = LANES[self._isa] * max(h * w, p * q) <= self.limit
        return fits and min(p, q) > self._pool and self._geometry[0] <= _MAX_TAP_ROWS

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
        fits = n > 0 and c == self.c_in and min(p, q) > self._pool and max(h * w, p * q) <= self.limit
        return fits and (not self.narrow or self.takes_images_innermost(h, w))

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
        rows = x.numel() // self.c_in
        if self.narrow:
            # Two dimensions: in front of the layout copies, four would be taken for those of a batch of images.
            self._run(x.view(rows, self.c_in), y.view(rows, self.c_out), bias, rows, 1, 1, 1, 1)
        else:
            self._run(x, y, bias, rows, 1, 1, 1, 1)
        return y

    def _run(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, h: int, w: int, p: int, q: int) -> None:
        if n == 0:
            return
        if max(h * w, p * q) > self.limit:
            raise ValueError(f"{self._op}: expected images of fewer than 2**31 elements")
        if self.narrow:
            self._run_innermost(x, y, bias, n, h, w)
            return
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        offsets = self._known_offsets(w, 1) if self._geometry[0] * self._geometry[1] > 1 else None
        members = self._members(x, y, bias, offsets, n, h, w, p, q, 1)
        status = self._conv2d(self._isa, *members, torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"{self._op}: native kernel {self._isa} failed with status {status}")

    def _run_innermost(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, h: int, w: int) -> None:
        """The same through copies of x and y with a vector of images innermost."""
        if not self.takes_images_innermost(h, w):
            size = f"{self._geometry[0]} tap rows and images of {h} x {w}"
            raise ValueError(f"{self._op}: expected at most {_MAX_TAP_ROWS} tap rows and smaller images, got {size}")
        x, y = (t if t.dim() == 4 else t.view(n, t.shape[-1], 1, 1) for t in (x, y))
        inner = torch.empty(images_innermost(n, h, w, self.c_in, self._isa))
        outer = torch.empty(images_innermost(n, y.shape[2], y.shape[3], self.c_out, self._isa))
        steps = [
            layout_step(x, inner, n),
            self.step(inner, outer, bias, n, self._known_offsets(w, LANES[self._isa])),
            layout_step(outer, y, n),
        ]
        Steps(self._isa, steps)()

    def _known_offsets(self, w: int, lanes: int) -> Tensor:
        offsets = self._offsets.get(w)
        if offsets is None:
            if len(self._offsets) >= _CACHED_WIDTHS:
                self._offsets = {}
            offsets = self._offsets[w] = self.entry_offsets(w, lanes)
        return offsets

    def _members(
        self, x: Tensor | None, y: Tensor | None, bias: Tensor | None, offsets: Tensor | None, n: int, h: int, w: int,
        p: int, q: int, lanes: int,
    ) -> tuple[int, ...]:  # fmt: skip
        """The members of SlimConv2dF32 in order."""
        weights, channels, tap_ptr = self._packed
        pointers = (x, y, bias, weights, channels, tap_ptr, offsets)
        addresses = (0 if t is None else t.data_ptr() for t in pointers)
        return (*addresses, n, h, w, self.c_in, self.c_out, p, q, *self._geometry, *self._tail, lanes)

    def entry_offsets(self, w: int, lanes: int = 1) -> Tensor:
        """Elements of x between a pixel's first tap and each entry, for images of this width.

        Int32, with a margin behind them that the kernels read ahead.
        """
        offsets = torch.empty(self._packed[1].numel() + _OFFSETS_MARGIN, dtype=torch.int32)
        module = _library()[0]
        assert module is not None
        module.entry_offsets(self._members(None, None, None, None, 1, 1, w, 1, 1, lanes), offsets.data_ptr())
        return offsets

    def step(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, offsets: Tensor) -> Step:
        """The convolution of x into y as one of `Steps`.

        Args:
            x, y: float32 on the CPU, not overlapping: images channels_last, contiguous rows ``(n, in)`` where the
                weight is a linear layer's, or ``(groups, h, w, channels, lanes)`` with a vector of images innermost.
            bias: ``(C_out,)`` or None.
            n: images, or rows.
            offsets: `entry_offsets` for the width and the lanes of x.

        Raises:
            ValueError: tensors of another shape, dtype or layout.
        """
        lanes = x.shape[4] if x.dim() == 5 else 1
        _, c_in, h, w = _image_sizes(x)
        p, q = self.output_size(h, w)
        p_out, q_out = p >> self._pool, q >> self._pool
        fits = c_in == self.c_in and min(p_out, q_out) > 0 and max(h * w, p * q) <= self.limit
        if lanes > 1:
            fits = fits and self.takes_images_innermost(h, w)
            fits = fits and x.shape == images_innermost(n, h, w, c_in, self._isa)
            fits = fits and y.shape == images_innermost(n, p_out, q_out, self.c_out, self._isa)
        else:
            fits = fits and not self.narrow
            fits = fits and x.shape[0] == n and _image_sizes(y) == (n, self.c_out, p_out, q_out)
        if not (
            fits
            and n > 0
            and _is_plain(x)
            and _is_plain(y)
            and offsets.numel() == self._packed[1].numel() + _OFFSETS_MARGIN
        ):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self._op}: expected float32 x and y that fit this weight and {n} images, got {got}")
        bias = None if bias is None else bias.contiguous()
        members = self._members(x, y, bias, offsets, n, h, w, p, q, lanes)
        return Step(_CONV2D, members, (self, x, y, bias, offsets))


class Step(NamedTuple):
    """One step of csrc/kernels.h and the tensors it reads and writes.

    Steps that follow each other with slots from 0 on run at the same time where the slots differ, each on one thread;
    steps with slot -1 share all threads.
    """

    kind: int
    members: tuple[int, ...]
    alive: tuple[Any, ...]
    slot: int = -1


class Steps:
    """A list of steps on fixed memory, run by one team of threads; keeps every tensor it touches alive.

    Raises:
        RuntimeError: in a call, when a native kernel failed (out of memory).
    """

    def __init__(self, isa: str, steps: Sequence[Step]) -> None:
        module = _library()[0]
        assert module is not None
        self._isa, self._alive, self.count = isa, [step.alive for step in steps], len(steps)
        self._steps = module.Steps(isa, [(step.kind, step.slot, *step.members) for step in steps])

    def __call__(self) -> None:
        status = self._steps.run(torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"Steps: native kernels of {self._isa} failed with status {status}")


def layout_step(x: Tensor, y: Tensor, n: int) -> Step:
    """The copy of n images between channels_last (or rows) and a vector of images innermost as one of `Steps`.

    Args:
        x, y: float32 on the CPU, not overlapping; one of them ``(groups, h, w, channels, lanes)``.

    Raises:
        ValueError: tensors of another shape, dtype or layout.
    """
    to_images = y.dim() == 5
    near, far = (x, y) if to_images else (y, x)
    _, channels, h, w = _image_sizes(near)
    lanes = far.shape[-1]
    fits = near.dim() < 5 and near.shape[0] == n and far.shape == (-(-n // lanes), h, w, channels, lanes)
    if not (fits and n > 0 and _is_plain(x) and _is_plain(y)):
        raise ValueError(f"layout_step: expected {n} images in two layouts, got {tuple(x.shape)} and {tuple(y.shape)}")
    members = (x.data_ptr(), y.data_ptr(), *[0] * 5, n, h, w, channels, *[0] * 14, lanes)
    return Step(_TO_IMAGES if to_images else _FROM_IMAGES, members, (x, y))


def _image_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """``(n, channels, h, w)``; rows are images of one pixel, and n counts groups where images lie innermost."""
    if x.dim() == 5:
        return x.shape[0], x.shape[3], x.shape[1], x.shape[2]
    if x.dim() == 4:
        return x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    return x.numel() // max(x.shape[-1], 1), x.shape[-1], 1, 1


def _is_plain(x: Tensor) -> bool:
    """Float32 on the CPU, images channels_last, everything else contiguous."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous(memory_format=layout)


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
