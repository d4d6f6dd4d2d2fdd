"""Host planning of the tensor-core kernels of csrc/cuda: the packed weight, the tile, and what fits shared memory.

Plain arithmetic and tensor operations: nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.packs import TensorCorePack
from slimkernels.kernels.problems import INT32_MAX, Pair, conv_output_image
from slimkernels.kernels.tensor_core_tiles import MAX_PLACES, Tile, choose_tile, even, up, with_patch, without_borders
from slimkernels.kernels.tf32 import STEP_BYTES, round_to_tf32, step_channels

STEP_CHANNELS = 16  # input channels of one step: the depth of a tensor-core instruction, of 16-bit numbers


class Shape(NamedTuple):
    """A compiled shape of csrc/cuda: how a tile's pixels and channels are shared out.

    Attributes:
        pixels: of a tile.
        column: output channels that follow one list of steps.
        columns: of a thread block.
        groups: groups of four warps, each with a tile of its own.
        wgmma: whether it needs an sm_90a processor.
        streamed: whether weights stream by as the pixels do (csrc/cuda/streamed_conv2d.cuh): a thread block then takes
            all columns in turn, and two groups of warps have half of a tile each.
    """

    pixels: int
    column: int
    columns: int
    groups: int
    wgmma: bool
    streamed: bool = False

    @property
    def chunk(self) -> int:
        """Steps whose weights stream by together: kChunk of csrc/cuda/streamed_conv2d.cuh."""
        return self.column // 64

    def steps(self, most_steps: Sequence[int], columns: int | None = None) -> int:
        """The most steps that a thread block of so many columns has, from ``Index.most_steps``."""
        return int(most_steps[-1 if self.streamed else min(columns or self.columns, len(most_steps)) - 1])


# The compiled shapes, by the `variant` of csrc/kernels.h; resident_conv2d.cu, streamed_conv2d.cu, narrow_conv2d.cu
# and stem_conv2d.cu of csrc/cuda list them.
VARIANTS = (
    Shape(128, 64, 2, 2, False),
    Shape(256, 128, 1, 1, True, True),
    Shape(512, 64, 1, 1, True, True),
    Shape(128, 32, 4, 2, False),
    Shape(256, 32, 2, 2, False),
    Shape(128, 16, 8, 2, False),
    Shape(256, 16, 4, 2, False),
)
TF32_VARIANTS = (0, 4, 6)  # those that take float32: tf32_conv2d.cu
STEM_VARIANTS = (Shape(256, 64, 1, 2, False), Shape(256, 64, 1, 2, True))
# Input channels of a stage (16-bit ones, of float32 half as many), and stages of the ring, the best first: wide stages
# are, and more than three of them gained nothing (measured on an H200, up to 256 channels). Of more channels a tile is
# many stages: most bytes on their way.
RINGS = ((64, 3), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2))
LONG_RINGS, MANY_CHANNELS = ((64, 3), (32, 4), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2)), 257
# Where the weights stream by too: wide stages, several of them.
STREAMED_RINGS = ((64, 4), (64, 3), (64, 2), (32, 4), (32, 3), (32, 2), (16, 4), (16, 3), (16, 2))
# Places for the weights of a chunk. A group of warps waits for the third before it gives the first free.
GOOD_SLOTS, LEAST_SLOTS, MOST_SLOTS = 5, 3, 16
MOST_TAPS = 32  # bits of a word: which taps a pixel has
ZERO_BYTES = 128  # kZeroBytes of csrc/cuda/streamed_conv2d.cuh
MOST_BOX = 256  # pixels of a tensor copy in each direction


class Plan(NamedTuple):
    """How a convolution runs: the members of the same names in csrc/kernels.h, and the shared memory they take."""

    variant: int
    tile: Tile
    slab: int
    stages: int
    blocks: int
    shared_bytes: int
    columns: int
    steps: int
    slots: int = 0


class Convolution(NamedTuple):
    """What the kernel is asked for.

    Attributes:
        taps: (R, S).
        out: (P, Q). Those of an input gradient are not what the other numbers give: beyond the image it reads zeros.
        size: bytes of a number.
    """

    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    taps: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    out: Pair
    size: int = 2


def candidates(block_out: int, c_out: int, wgmma: bool, tf32: bool = False, taps: Pair = (3, 3)) -> tuple[int, ...]:
    """The compiled shapes for blocks of so many output channels, the first choice first, the one that needs the least
    shared memory for weights last.

    Args: c_out of the layer: a thread block of 128 channels would be half empty from 64 on; wgmma: whether the
    processor has it; tf32: whether the numbers are float32; taps (R, S) of the layer.
    """
    if block_out % 64 == 0 and wgmma and not tf32 and taps[0] * taps[1] <= MOST_TAPS:
        return (1,) if block_out % 128 == 0 and c_out > 64 else (2,)
    if block_out % 64 == 0:
        found: tuple[int, ...] = (0, 4)
    else:
        found = (3, 4) if block_out % 32 == 0 else (5, 6)
    if tf32:
        found = tuple(v for v in found if v in TF32_VARIANTS)
    few = tuple(v for v in found if VARIANTS[v].column * VARIANTS[v].columns <= 64)
    return few or found if c_out <= 64 else found


def choose_variant(found: Sequence[int], most_steps: Callable[[int], Tensor], limit: int) -> int:
    """The first of ``found`` whose weights leave half of shared memory to the input, or the last.

    Weights that fill it leave room for a few KB of input on their way to a processor, where a latency of 1 us and what
    L2 gives ask for 40 or more: 512 channels at 4x4, batch 1024, took 153 us so on an H200, and 61 with half of the
    channels.

    Args: most_steps: ``Index.most_steps`` for a column of so many channels; limit: bytes of shared memory.
    """
    for variant in found[:-1]:
        shape = VARIANTS[variant]
        if shape.steps(most_steps(shape.column).tolist()) * shape.column * STEP_BYTES <= limit // 2:
            return variant
    return found[-1]


def shared_bytes(shape: Shape, tile: Tile, slab: int, stages: int, c_in: int, steps: int, size: int = 2) -> int:
    """Shared memory of a thread block: `resident_layout` of csrc/cuda/resident_conv2d.cuh."""
    slabs = -(-c_in // slab)
    lists = steps * (shape.column * STEP_BYTES + 4) + (shape.columns + 1) * (slabs + 1) * 4
    tables = up(lists, 16) + shape.columns * shape.column * 8 + shape.pixels // 4 * 16
    tables += tile.images * tile.load_rows * tile.load_cols * 16
    return up(tables, 128) + shape.groups * stages * up(tile.patch * (slab * size + 16), 128)


def streamed_bytes(shape: Shape, tile: Tile, slab: int, stages: int, c_in: int, c_out: int, steps: int) -> int:
    """Shared memory of a thread block but for weights: `streamed_layout` of csrc/cuda/streamed_conv2d.cuh."""
    columns, slabs = -(-c_out // shape.column), -(-c_in // slab)
    tables = ZERO_BYTES + shape.pixels // 4 * 16 + 16 + columns * (shape.column * 8 + (slabs + 2) * 4)
    tables += (steps + shape.chunk + 1) * 4
    return stages * (up(tile.patch * slab * 2, 1024) + 16) + up(tables, 16)


def _streamed_plan(
    variant: int, conv: Convolution, steps: int, limit: int, processors: int, config: Mapping[str, int]
) -> Plan | None:
    """As `plan`. Pixels and weights share what shared memory has left: a stage of the pixels less where there are not
    `GOOD_SLOTS` places for weights otherwise.
    """
    shape = VARIANTS[variant]
    if conv.taps[0] * conv.taps[1] > MOST_TAPS:
        return None
    weights = shape.chunk * shape.column * STEP_BYTES + 16  # of a chunk of steps, and its barriers
    columns = -(-conv.c_out // shape.column)
    pixels = shape.pixels
    while pixels >= 4:
        tile = without_borders(
            choose_tile(pixels, conv.h, conv.w, conv.taps, conv.stride, conv.padding, conv.dilation, conv.out)
        )
        fits = max(tile.images, tile.load_rows, tile.load_cols) <= MOST_BOX and tile.patch < MAX_PLACES
        for wanted in (GOOD_SLOTS, LEAST_SLOTS):
            for slab, stages in _rings(conv.c_in, conv.size, config, True):
                used = streamed_bytes(shape, tile, slab, stages, conv.c_in, conv.c_out, steps)
                slots = min((limit - used) // weights, MOST_SLOTS, config.get("slots", MOST_SLOTS))
                if not fits or slots < wanted or slab > 64 or tile.reach(conv.taps, conv.dilation) * slab >= 2**23:
                    continue
                pairs = tile.tiles(conv.n, *conv.out) * columns
                blocks = min(pairs, processors)
                if blocks > columns:  # a round of blocks takes all columns of a tile
                    blocks -= blocks % columns
                return Plan(variant, tile, slab, stages, blocks, used + slots * weights, 1, steps, slots)
        pixels //= 2
    return None


def plan(
    variant: int,
    n: int,
    c_in: int,
    h: int,
    w: int,
    c_out: int,
    taps: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    steps: int,
    limit: int,
    processors: int,
    config: Mapping[str, int],
    out: Pair | None = None,
    columns: int | None = None,
    size: int = 2,
) -> Plan | None:
    """The plan of a convolution, or None where a thread block's weights and two slabs do not fit shared memory.

    Args: steps the most that a thread block has; limit bytes of shared memory it may use; config ``slab`` and
    ``stages`` to take instead of the largest that fit; out (P, Q) where it is not what the other numbers give; columns
    of a thread block, all of the shape's by default; size in bytes of a number.
    """
    shape = VARIANTS[variant]
    p, q = out or conv_output_image((h, w), taps, stride, padding, dilation)
    columns = columns or shape.columns
    rows = -(-c_out // (shape.column * columns))
    pixels = shape.pixels
    if shape.streamed:
        conv = Convolution(n, c_in, h, w, c_out, taps, stride, padding, dilation, (p, q), size)
        return _streamed_plan(variant, conv, steps, limit, processors, config)
    while pixels >= 4:  # where strides and dilations make patches large, a part of the shape's pixels
        tile = choose_tile(pixels, h, w, taps, stride, padding, dilation, out)
        for slab, stages in _rings(c_in, size, config):
            total = shared_bytes(shape, tile, slab, stages, c_in, steps, size)
            if total <= limit and tile.patch < MAX_PLACES:
                blocks = rows * max(1, min(tile.tiles(n, p, q), processors // rows))
                return Plan(variant, tile, slab, stages, blocks, total, columns, steps)
        pixels //= 2
    return None


@lru_cache(maxsize=1024)
def fitting_plan(
    variant: int,
    conv: Convolution,
    most_steps: tuple[int, ...],
    limit: int,
    processors: int,
    config: tuple[tuple[str, int], ...] = (),
) -> Plan | None:
    """The plan with all of a shape's columns in a thread block, or where their weights do not fit with half of them,
    a quarter, and so on; None where not even one column fits.

    Warps of columns that a thread block does not have wait for the others: with one column of the shapes of 16
    channels half of the warps work, each on 8 products for the 35 clocks that its step's loads take, 22% of the tensor
    cores' peak.

    Args: most_steps: ``Index.most_steps``; config: items of what `plan` takes.
    """
    columns = VARIANTS[variant].columns
    while columns:
        steps = VARIANTS[variant].steps(most_steps, columns)
        found = plan(variant, *conv[:-2], steps, limit, processors, dict(config), conv.out, columns, conv.size)
        if found is not None:
            return found
        columns //= 2
    return None


def in_range(conv: Convolution, plan: Plan, image_of_y: int) -> str | None:
    """None where no number of the kernel wraps (csrc/bindings/cuda.h looks again), else what is too large.

    Args: image_of_y: elements from an image of y to the next.
    """
    images, (p, q) = plan.tile.images, conv.out
    if max(*conv.taps, *conv.stride, *conv.padding, *conv.dilation) > MAX_PLACES:
        return "taps, strides, padding or dilation above 65535"
    read, written = conv.h * conv.w * conv.c_in * conv.size, max(image_of_y, p * q * conv.c_out)
    if images * max(read, written) > INT32_MAX:
        return "images of 2**31 bytes of input or elements of output"
    shape, tiles = VARIANTS[plan.variant], plan.tile.tiles(conv.n, p, q)
    if shape.streamed:  # its thread blocks count tiles and columns, and a round of blocks beyond the last
        tiles = 2 * tiles * -(-conv.c_out // shape.column) + 2 * plan.blocks
    if images * plan.tile.load_rows * plan.tile.load_cols > MAX_PLACES or tiles > INT32_MAX:
        return "too many pixels"
    return None


def _rings(c_in: int, size: int, config: Mapping[str, int], streamed: bool = False) -> Iterator[tuple[int, int]]:
    """The slabs and stages to try, the best first; what ``config`` says of either is taken as it is."""
    halves = c_in * size // 2  # channels of 16 bits that take as much
    rings = STREAMED_RINGS if streamed else RINGS if halves < MANY_CHANNELS else LONG_RINGS
    found = [(slab * 2 // size, stages) for slab, stages in rings if slab <= max(halves, STEP_CHANNELS)]
    yield from dict.fromkeys((config.get("slab", slab), config.get("stages", stages)) for slab, stages in found)


class Index(NamedTuple):
    """The steps of a pattern, which follow from the indices alone.

    Attributes:
        group_start: int32 ``(columns, groups + 1)``: first step of each group of `step_channels` input channels.
        taps: int32 ``(steps,)``: tap << 16 | group.
        most_steps: int32 ``(columns,)`` on the CPU: the most steps that 1, 2, ... columns of a thread block have.
        order: which part of which block each step is: slot, then column, then group of input channels in the block.
    """

    group_start: Tensor
    taps: Tensor
    most_steps: Tensor
    order: Tensor


def pack_index(
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    column: int,
    depth: int = STEP_CHANNELS,
) -> Index:
    """The steps of a BSR pattern: a column of output times a group of input channels at a tap, by group, then tap.

    Args: crow_indices ... block_shape a valid `slimkernels.formats.BSRWeight` whose block is a multiple of
    ``(column, depth)``; depth: input channels of a step. Waits for the device.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    device, capacity = col_indices.device, col_indices.numel()
    high, wide = block_out // column, block_in // depth
    columns, groups, column_groups = -(-c_out // block_out) * high, -(-c_in // depth), -(-c_in // block_in)
    slots = torch.arange(capacity, device=device, dtype=torch.int32)
    rows = torch.searchsorted(crow_indices[1:].contiguous(), slots, right=True)
    tap, group = col_indices.long() // column_groups, col_indices.long() % column_groups * wide
    # One key a step: (column, group, tap). What lies behind the stored blocks or the last channel comes last.
    column_of = (rows * high)[:, None, None] + torch.arange(high, device=device)[:, None]
    group_of = group[:, None, None] + torch.arange(wide, device=device)
    stored = (slots < crow_indices[-1])[:, None, None] & (group_of < groups)
    key = torch.where(stored, (column_of * groups + group_of) * (r * s) + tap[:, None, None], columns * groups * r * s)
    key, order = key.flatten().sort(stable=True)
    first = torch.arange(columns * groups, device=device).reshape(columns, groups) * (r * s)
    ends = torch.cat([first, first[:, -1:] + r * s], 1)
    group_start = torch.searchsorted(key, ends.flatten()).to(torch.int32).reshape(columns, groups + 1)
    taps = ((key % (r * s) << 16) | (key // (r * s) % groups)).to(torch.int32)
    counts = (group_start[:, -1] - group_start[:, 0]).cpu()
    most = [max(int(part.sum()) for part in counts.split(n)) for n in range(1, columns + 1)]
    return Index(group_start, taps, torch.tensor(most, dtype=torch.int32), order)


def pack(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    shape: Shape,
) -> TensorCorePack:
    """A BSR weight packed for a compiled shape; the arguments are those of `pack_index`. Waits for the device.

    Float32 is rounded to TF32, whatever torch's switches say: only a kernel that multiplies in TF32 reads the pack.
    """
    depth = step_channels(values.dtype)
    index = pack_index(crow_indices, col_indices, weight_shape, block_shape, shape.column, depth)
    steps = steps_of(values, index, block_shape, shape.column, depth)
    if values.dtype == torch.float32:
        steps = round_to_tf32(steps)
    weights = values.new_zeros(steps.shape[0] + 1, shape.column * depth)
    weights[:-1] = in_lane_order(steps, shape.wgmma)
    return TensorCorePack(weights, index.group_start, index.taps, index.most_steps)


def steps_of(values: Tensor, index: Index, block_shape: Sequence[int], column: int, depth: int = 16) -> Tensor:
    """The stored blocks cut into steps, ``(steps, column, depth)``, in the order of the index."""
    high, wide = block_shape[0] // column, block_shape[1] // depth
    blocks = values.reshape(values.shape[0], high, column, wide, depth).transpose(2, 3)
    return blocks.reshape(values.shape[0] * high * wide, column, depth)[index.order]


def in_lane_order(steps: Tensor, wgmma: bool) -> Tensor:
    """``(n, column, depth)`` weights, 16 deep or 8 of float32, flattened in the order of csrc/cuda/tensor_cores.cuh.

    Column 8 j + 2 q + e of an instruction is output channel 8 run (j // run) + 2 run q + 2 (j % run) + e, with run 4,
    or 2 for a column of 16 or float32: a lane, which holds the columns of one q, then has 2 run neighbouring channels.
    """
    n, column, depth = steps.shape
    run = min(column // 8, depth // 4)
    parts = column // (8 * run)
    if wgmma:  # matrices of 8 columns x 8 depths
        split = steps.reshape(n, parts, 4, run, 2, 2, 8)  # 8 run channels, q, j % run, e, depth // 8, depth % 8
        return split.permute(0, 5, 1, 3, 2, 4, 6).reshape(n, column * STEP_CHANNELS)
    # 8 run channels, q, j % run // 2, j % 2, e, half of the depth, register, and of 16 bits parity
    split = steps.reshape(n, parts, 4, run // 2, 2, 2, 2, 4, depth // 8)
    return split.permute(0, 1, 3, 2, 5, 7, 4, 6, 8).reshape(n, column * depth)


# The fused stem

STEM_PITCH = 64 * 2 + 16  # bytes of a place: kStemPitch of csrc/cuda/stem_conv2d.cuh
STEM_WORDS = 1024  # of two numbers, of the image rows that a group holds: 128 threads load kStemWordsOfThread each
STEM_FIRST_BYTES = 64 * 32 * 2


def pack_first(weight: Tensor, wgmma: bool) -> Tensor:
    """The dense first convolution ``(64, 3, 3, 3)`` as `(2, 1024)`: 32 products of a channel in two steps.

    Each row of taps has ten: three pixels of three channels, and one of no weight; the last two have none.
    """
    rows = weight.new_zeros(64, 32)
    rows[:, :30].view(64, 3, 10)[:, :, :9] = weight.permute(0, 2, 3, 1).reshape(64, 3, 9)
    steps = rows.view(64, 2, STEP_CHANNELS).transpose(0, 1).contiguous()
    return in_lane_order(steps, wgmma).contiguous()


def stem_shared_bytes(shape: Shape, tile: Tile, steps: int) -> int:
    """Shared memory of a thread block: `stem_layout` of csrc/cuda/stem_conv2d.cuh."""
    lists = steps * (shape.column * 2 * STEP_CHANNELS + 4) + STEM_FIRST_BYTES
    tables = up(lists, 16) + 2 * 64 * 8 + shape.pixels // 4 * 16 + up(tile.load_rows * tile.load_cols, 64) * 16
    rows = (tile.load_rows + 2) * up((tile.load_cols + 2) * 6 + 4, 16)
    return up(tables, 128) + shape.groups * up(up(tile.patch * STEM_PITCH, 128) + 2 * rows, 128)


def plan_stem(variant: int, n: int, h: int, w: int, steps: int, limit: int, processors: int) -> Plan | None:
    """The plan of a stem, whole rows of one image in a tile, or None where not two of them fit."""
    shape = STEM_VARIANTS[variant]
    taps, one = (3, 3), (1, 1)
    for rows in range(min(even(h), shape.pixels // w // 2 * 2), 0, -2):
        tile = with_patch(1, rows, w, h, w, h, w, taps, one, one, one)
        size = stem_shared_bytes(shape, tile, steps)
        if size <= limit and (tile.load_rows + 2) * w * 3 // 2 <= STEM_WORDS:
            blocks = min(tile.tiles(n, h, w), processors)
            return Plan(variant, tile, 64, 1, blocks, size, 1, steps)
    return None
