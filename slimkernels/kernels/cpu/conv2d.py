"""Launchers of the C++ convolutions on a CPU. What the kernels trust is checked where addresses are handed out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import Conv2dArguments, address
from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.cpu.steps import CONV2D, Step, Steps, image_sizes, images_innermost, is_dense, layout_step
from slimkernels.kernels.image_parts import WHOLE, image_parts
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import (
    INT32_MAX,
    LANES,
    MAX_TAP_ROWS,
    NARROWEST_CHANNELS_LAST,
    Pair,
    Room,
    check_geometry,
    strip_width,
)
from slimkernels.kernels.strips import check_pack, pack_strips, readable_bias

_CACHED_SIZES = 4


class PackedConv2d:
    """A packed weight with its geometry: a native convolution that only waits for its input.

    The pack and the geometry are checked here, once, and the pack again after a write to it; a call checks its input
    and its bias. Any number of threads may call it; it remembers the offsets of its entries for the image sizes it has
    seen.

    Args:
        isa: instruction set of the kernel.
        packed: what `pack_strips` returned, or any other tensors that `strips.check_pack` lets pass.
        weight_shape: ``(C_out, C_in, R, S)``.
        stride: two ints (rows, columns).
        padding: two ints (rows, columns).
        dilation: two ints (rows, columns).
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.
        op: named in errors.
        deep: the pack has entries of several input channels: ``weights (entries, depth)``, ``channels`` the first of
            them, one strip for each output channel. Not with pooling.

    Raises:
        ValueError: a pack of another weight shape or with a number that points outside of it; a geometry that is not
            positive or does not fit int32. TypeError: a pack of other dtypes.
    """

    __slots__ = (
        "_conv2d",
        "_deep",
        "_geometry",
        "_offsets",
        "_packed",
        "_pool",
        "_room",
        "_tail",
        "_versions",
        "c_in",
        "c_out",
        "epilogue",
        "isa",
        "op",
    )

    def __init__(
        self,
        isa: str,
        packed: Sequence[Tensor],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        epilogue: str,
        op: str = "bsr_conv2d",
        deep: bool = False,
    ) -> None:
        check_geometry(op, stride, padding, dilation)
        self.c_out, self.c_in, r, s = weight_shape
        if not all(0 < size <= INT32_MAX for size in weight_shape):
            raise ValueError(f"{op}: expected positive weight sizes that fit int32, got {tuple(weight_shape)}")
        check_pack(op, packed, weight_shape, deep)
        module = library()[0]
        assert module is not None
        self.op, self._conv2d, self.isa, self.epilogue = op, module.conv2d_f32, isa, epilogue
        # Aliases: what happens to the sizes or the storage of the caller's tensors does not reach them.
        weights, channels, tap_ptr = (tensor.detach() for tensor in packed)
        if weights.is_inference() or channels.is_inference() or tap_ptr.is_inference():
            # Torch would not count writes to these.
            with torch.inference_mode(False):
                weights, channels, tap_ptr = weights.clone(), channels.clone(), tap_ptr.clone()
        self._packed = weights, channels, tap_ptr  # a plain tuple, which every call takes apart faster
        self._versions = self.count_writes()
        self._geometry = (r, s, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1])
        self._pool = epilogue == "relu_maxpool2"
        if deep and self._pool:
            raise ValueError(f"{op}: expected no pooling behind entries of several input channels")
        strip, depth = (1, weights.shape[1]) if deep else (weights.shape[1], 1)
        self._deep, self._tail = deep, (strip, depth, int(epilogue != "none"), int(self._pool))
        self._offsets: dict[tuple[int, int, int, Pair], Tensor] = {}
        self._room = Room.of(weight_shape, stride, padding, dilation)

    @property
    def packed(self) -> StripPack:
        """The pack, whose tensors are aliases of those that were given."""
        return StripPack(*self._packed)

    @property
    def convs(self) -> tuple[PackedConv2d, ...]:
        """The native convolutions that a call runs, in order: this one."""
        return (self,)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """``(C_out, C_in, R, S)``."""
        return self.c_out, self.c_in, *self._geometry[:2]

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair]:
        """``(stride, padding, dilation)``."""
        _, _, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = self._geometry
        return (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w)

    @property
    def narrow(self) -> bool:
        """Whether the kernel runs with images innermost only."""
        return self._tail[0] < NARROWEST_CHANNELS_LAST and not self._deep

    @property
    def deep(self) -> bool:
        """Whether its entries are of several input channels, which are read channels last."""
        return self._deep

    @property
    def macs(self) -> int:
        """Multiply-adds of one output pixel away from the border."""
        return self._packed[0].numel()

    def takes_images_innermost(self, h: int, w: int) -> bool:
        """Whether the kernel runs on images of this size with a vector of them innermost."""
        p, q = self.output_size(h, w)
        fits = not self._deep and self._room.holds(h, w, p, q, LANES[self.isa])
        return fits and min(p, q) > self._pool and self._geometry[0] <= MAX_TAP_ROWS

    def parts(self, n: int, h: int, w: int) -> Pair:
        """How many rows and columns of parts each of n images of this size is cut into, so that they fill a vector."""
        if self._tail[0] > 1 or self._deep:
            return WHOLE
        r, s, stride_h, stride_w = self._geometry[:4]
        output = self.output_size(h, w)
        return image_parts(n, LANES[self.isa], (r, s), (stride_h, stride_w), (h, w), output, self._pool)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the output, before pooling, for an input of this height and width."""
        # `problems.conv_output_image` written out: it would take 2% of a call of a small layer.
        r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = self._geometry
        p = (h + 2 * pad_h - dil_h * (r - 1) - 1) // stride_h + 1
        return p, (w + 2 * pad_w - dil_w * (s - 1) - 1) // stride_w + 1

    def takes_images(self, h: int, w: int) -> bool:
        """Whether the kernel runs on images of this size, and they leave an output to compute."""
        p, q = self.output_size(h, w)
        fits = min(p, q) > self._pool and self._room.holds(h, w, p, q)
        return fits and (not self.narrow or self.takes_images_innermost(h, w))

    def attempt(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for a non-empty float32 CPU image batch ``(N, C_in, H, W)`` of any strides; None where it is not.

        None, too, where the images or their geometry are beyond what the kernel holds, or leave no output.

        Raises:
            ValueError, TypeError: the bias does not fit. RuntimeError: the native kernel failed (out of memory).
        """
        if x.dim() != 4 or x.dtype is not torch.float32 or not x.is_cpu:
            return None
        n, c, h, w = x.shape
        p, q = self.output_size(h, w)
        pool = self._pool
        if c != self.c_in or n == 0 or p <= pool or q <= pool or not self._room.holds(h, w, p, q):
            return None
        if self.narrow and not self.takes_images_innermost(h, w):
            return None
        size = (n, self.c_out, p // 2, q // 2) if pool else (n, self.c_out, p, q)
        y = torch.empty(size, memory_format=torch.channels_last, dtype=torch.float32)
        self._run(x.contiguous(memory_format=torch.channels_last), y, bias, n, h, w, p, q)
        return y

    def attempt_rows(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for float32 CPU rows ``(..., in)``, the weight being that of a linear layer; None for others.

        Raises:
            ValueError, TypeError: the bias does not fit. RuntimeError: the native kernel failed (out of memory).
        """
        if x.dtype is not torch.float32 or not x.is_cpu or x.shape[-1:] != (self.c_in,):
            return None
        y = torch.empty((*x.shape[:-1], self.c_out), dtype=torch.float32)
        x, rows = x.contiguous(), x.numel() // self.c_in
        if rows == 0:
            return y
        if self.narrow:
            # Two dimensions: in front of the layout copies, four would be taken for those of a batch of images.
            self._run(x.view(rows, self.c_in), y.view(rows, self.c_out), bias, rows, 1, 1, 1, 1)
        else:
            self._run(x, y, bias, rows, 1, 1, 1, 1)
        return y

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `attempt`, for images that the op has checked: none at all give an empty output.

        Raises:
            ValueError: an image, or a geometry on it, that the kernel cannot hold. Others as `attempt`.
        """
        y = self.attempt(x, bias)
        if y is not None:
            return y
        n, c, h, w = x.shape
        p, q = self.output_size(h, w)
        if n == 0 and c == self.c_in and min(p, q) > self._pool:
            size = (0, self.c_out, p // 2, q // 2) if self._pool else (0, self.c_out, p, q)
            return torch.empty(size, memory_format=torch.channels_last, dtype=torch.float32)
        limit = f" and at most {MAX_TAP_ROWS} tap rows" if self.narrow else ""
        raise ValueError(
            f"{self.op}: expected float32 CPU images of {self.c_in} channels with fewer than 2**31 elements in an "
            f"image, an output and the reach of the kernel{limit}, got {x.dtype} x of shape {tuple(x.shape)} for "
            f"(r, s, stride, padding, dilation) {self._geometry}"
        )

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `attempt_rows`, for rows that the op has checked. Raises ValueError for others."""
        y = self.attempt_rows(x, bias)
        if y is None:
            got = f"{x.dtype} x of shape {tuple(x.shape)}"
            raise ValueError(f"{self.op}: expected float32 CPU rows (..., {self.c_in}), got {got}")
        return y

    def count_writes(self) -> int:
        """Grows with every write to what offsets follow from; those of single weights hold the weights, too."""
        weights, channels, tap_ptr = self._packed
        return channels._version + tap_ptr._version + (weights._version if weights.shape[1] == 1 else 0)

    def _check_for_writes(self) -> None:
        """Checks the pack again where somebody wrote to its tensors."""
        versions = self.count_writes()
        if versions != self._versions:
            check_pack(self.op, self._packed, (self.c_out, self.c_in, *self._geometry[:2]), self._deep)
            self._offsets, self._versions = {}, versions

    def _run(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, h: int, w: int, p: int, q: int) -> None:
        self._check_for_writes()
        if bias is not None:
            bias = readable_bias(self.op, bias, self.c_out)
        if self.narrow:
            self._run_innermost(x, y, bias, n, h, w)
            return
        offsets = self.known_offsets(h, w, 1) if self._geometry[0] * self._geometry[1] > 1 else None
        members = self._arguments(x, y, bias, offsets, n, h, w, p, q, 1)
        status = self._conv2d(self.isa, *members, torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"{self.op}: native kernel {self.isa} failed with status {status}")

    def _run_innermost(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, h: int, w: int) -> None:
        """The same through copies of x and y with a vector of images innermost."""
        x, y = (t if t.dim() == 4 else t.view(n, t.shape[-1], 1, 1) for t in (x, y))
        parts = self.parts(n, h, w)
        inner = torch.empty(images_innermost(n, h, w, self.c_in, self.isa, parts))
        outer = torch.empty(images_innermost(n, y.shape[2], y.shape[3], self.c_out, self.isa, parts))
        steps = [
            layout_step(x, inner, n, parts),
            self.step(inner, outer, bias, n, self.known_offsets(h, w, LANES[self.isa], parts), parts=parts),
            layout_step(outer, y, n, parts),
        ]
        Steps(self.isa, steps)()

    def known_offsets(self, h: int, w: int, lanes: int = 1, parts: Pair = WHOLE) -> Tensor:
        """As `entry_offsets`, remembered for a few sizes of images."""
        key = h if self._tail[0] == 1 else 0, w, lanes, parts
        offsets = self._offsets.get(key)
        if offsets is None:
            if len(self._offsets) >= _CACHED_SIZES:
                self._offsets = {}
            offsets = self._offsets[key] = self.entry_offsets(h, w, lanes, parts)
        return offsets

    def _arguments(
        self,
        x: Tensor | None,
        y: Tensor | None,
        bias: Tensor | None,
        offsets: Tensor | None,
        n: int,
        h: int,
        w: int,
        p: int,
        q: int,
        lanes: int,
        parts: Pair = WHOLE,
    ) -> Conv2dArguments:
        # The residual, which only `step` knows, comes after the offsets.
        addresses = (address(t) for t in (x, y, bias, *self._packed, offsets, None))
        sizes = (n, h, w, self.c_in, self.c_out, p, q)
        return Conv2dArguments._make((*addresses, *sizes, *self._geometry, *self._tail, lanes, *parts, 0, 0))

    def entry_offsets(self, h: int, w: int, lanes: int = 1, parts: Pair = WHOLE) -> Tensor:
        """What the kernel reads of its entries on images of this size: see ``offsets`` in csrc/kernels.h.

        Only that of single weights depends on the height, and on the parts that each image is cut into.

        Raises:
            ValueError: an offset that int32 does not hold.
        """
        if not self._room.holds(1, w, 1, 1, lanes):
            raise ValueError(
                f"{self.op}: expected offsets below 2**31, got images {w} wide with {lanes} innermost for "
                f"(r, s, stride, padding, dilation) {self._geometry} and {self.c_in} channels"
            )
        self._check_for_writes()
        module = library()[0]
        assert module is not None
        offsets = torch.empty(self._offsets_count(h, w, lanes, parts), dtype=torch.int32)
        module.entry_offsets(self._sizes(h, w, lanes, parts), offsets.data_ptr(), offsets.numel())
        return offsets

    def _offsets_count(self, h: int, w: int, lanes: int, parts: Pair) -> int:
        module = library()[0]
        assert module is not None
        count: int = module.entry_offsets_count(self._sizes(h, w, lanes, parts))
        return count

    def _sizes(self, h: int, w: int, lanes: int, parts: Pair) -> Conv2dArguments:
        """The convolution of images of this size, as far as its offsets depend on it."""
        rows, columns = parts
        h, w = h // rows, w // columns
        p, q = self.output_size(h, w) if self._tail[0] == 1 and not self._deep else (1, 1)
        return self._arguments(None, None, None, None, rows * columns, h, w, p, q, lanes, parts)

    def step(
        self,
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        n: int,
        offsets: Tensor,
        residual: Tensor | None = None,
        parts: Pair = WHOLE,
    ) -> Step:
        """The convolution of x into y as one of `Steps`.

        Args:
            x: the input, float32 on the CPU: images channels_last, contiguous rows ``(n, in)`` where the weight is a
                linear layer's, or ``(groups, h, w, channels, lanes)`` with a vector of images innermost.
            y: the output, laid out like x, in memory that does not overlap it.
            bias: ``(C_out,)`` or None.
            n: images, or rows.
            offsets: `entry_offsets` for the images, the lanes and the parts of x.
            residual: added to the sums in front of the ReLU; laid out like y, in memory that does not overlap it. Not
                with pooling.
            parts: rows and columns of parts that each image is cut into, those of x and of y: `parts` or `WHOLE`.

        Raises:
            ValueError: tensors of another shape, dtype or layout. TypeError: a bias of another dtype.
        """
        self._check_for_writes()
        lanes, (rows, columns) = x.shape[4] if x.dim() == 5 else 1, parts
        _, c_in, h, w = image_sizes(x)
        p, q = self.output_size(h, w)
        p_out, q_out = p >> self._pool, q >> self._pool
        fits = c_in == self.c_in and min(p_out, q_out) > 0 and self._room.holds(h, w, p, q, lanes)
        if lanes > 1:
            whole, out = (h * rows, w * columns), (p_out * rows, q_out * columns)
            fits = fits and self.takes_images_innermost(h, w) and parts in (WHOLE, self.parts(n, *whole))
            fits = fits and x.shape == images_innermost(n, *whole, c_in, self.isa, parts)
            fits = fits and y.shape == images_innermost(n, *out, self.c_out, self.isa, parts)
        else:
            fits = fits and not self.narrow and parts == WHOLE
            fits = fits and x.shape[0] == n and image_sizes(y) == (n, self.c_out, p_out, q_out)
        if not (
            fits
            and n > 0
            and is_dense(x)
            and is_dense(y)
            and offsets.dtype is torch.int32
            and offsets.is_cpu
            and offsets.is_contiguous()
            and offsets.numel() == self._offsets_count(h * rows, w * columns, lanes, parts)
        ):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self.op}: expected float32 x and y that fit this weight and {n} images, got {got}")
        if residual is not None and (self._pool or residual.shape != y.shape or not is_dense(residual)):
            got = f"{tuple(residual.shape)} for {tuple(y.shape)}, pooling {self._pool}"
            raise ValueError(f"{self.op}: expected a float32 residual laid out like y and no pooling, got {got}")
        bias = None if bias is None else readable_bias(self.op, bias, self.c_out)
        arguments = self._arguments(x, y, bias, offsets, n * rows * columns, h, w, p, q, lanes, parts)
        arguments = arguments._replace(residual=address(residual))
        return Step(CONV2D, arguments, (self, x, y, bias, offsets, residual))


_UNIT = (1, 1)


def launch_bsr_conv2d(
    isa: str,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> Tensor:
    """Block-sparse convolution of a float32 CPU tensor; x channels_last.

    Without ``packed`` the weight is packed in this call.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    strip = strip_width(block_shape[0], isa)
    packed = packed or pack_strips(values, crow_indices, col_indices, weight_shape, block_shape, strip)
    return PackedConv2d(isa, packed, weight_shape, stride, padding, dilation, epilogue)(x, bias)


def launch_bsr_linear(
    isa: str,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
) -> Tensor:
    """Block-sparse linear layer of a contiguous float32 CPU tensor (..., in): the 1x1 convolution of its rows."""
    shape, strip = (*weight_shape, 1, 1), strip_width(block_shape[0], isa)
    packed = packed or pack_strips(values, crow_indices, col_indices, shape, block_shape, strip)
    return PackedConv2d(isa, packed, shape, _UNIT, (0, 0), _UNIT, epilogue).rows(x, bias)
