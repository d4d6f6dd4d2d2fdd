"""Host planning of a chain of block-sparse convolutions in one launch (csrc/cuda/chain_conv2d.cuh).

A *group* of thread blocks takes some images through all layers and waits between two of them; groups never wait for
each other. An *item* of a layer is 32 output channels of 16 to 128 pixels; the eight warps of a block share out the
pixels, and the steps of each. Plain arithmetic and tensor operations: nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.problems import Pair, conv_output_image
from slimkernels.kernels.resident_plan import STEP_CHANNELS, pack_index, steps_of

MAX_LAYERS = 32  # SLIM_CUDA_MAX_CHAIN: what the arguments of a kernel hold
CLUSTER, COUNTER = 0, 1  # SLIM_CHAIN_CLUSTER and SLIM_CHAIN_COUNTER
GROUPS = {CLUSTER: (16, 8, 4), COUNTER: (32, 16, 8)}  # thread blocks of a group to choose from
MOST_BLOCKS = {CLUSTER: 16, COUNTER: 1024}  # of a group
COLUMN = 32  # output channels of an item: kChainColumn
_PIXELS = 16  # of a warp: kChainPixels
_WARPS = 8
_STEPS_AT_ONCE = 6  # of a warp: kChainDepth
READ_AHEAD = 2 * _STEPS_AT_ONCE  # steps that the kernel reads behind the last one
_ALIGNED = 128  # bytes

# Clocks, for choosing among plans and for docs/gpu.md, which has the measurements: those of one block on an H200.
_BYTES_PER_CLOCK = 64  # from L2 into one processor; recalled
_LAYER = {CLUSTER: 1350, COUNTER: 1800}  # stores released, weights asked for, pixels' places found, the barrier
_ITEM = 1600  # the next item found, sums added up and stored: some 350 instructions that wait for each other
_MORE_SUMS = 450  # another four channels of a thread added up and stored
_L2 = 350  # a load's way, with the products of the steps that are loaded at once
_MORE_STEPS = 600  # another six steps of a warp: their pixels found, and their way again
# Before the first layer: its numbers, the list of items and their first weights; a kernel that clears the counters.
_LAUNCH = {CLUSTER: 4800, COUNTER: 6300}
CLOCKS_PER_MICROSECOND = 1755


class Sizes(NamedTuple):
    """What a plan needs to know of a layer.

    Attributes:
        taps: (R, S).
        pool: whether 2x2 max-pool follows.
        steps: the most of a column of 32 output channels.
    """

    c_in: int
    c_out: int
    taps: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    pool: bool
    steps: int

    def image(self, h: int, w: int) -> tuple[Pair, Pair]:
        """Output size of the convolution on an image of h x w, and the size behind the pool."""
        p, q = conv_output_image((h, w), self.taps, self.stride, self.padding, self.dilation)
        return (p, q), (p // 2, q // 2) if self.pool else (p, q)


class LayerPlan(NamedTuple):
    """One layer: its images' sizes, how warps share it out, and the clocks that it is expected to take."""

    h: int
    w: int
    p: int
    q: int
    out: Pair
    row_bits: int
    clocks: float


class ChainPlan(NamedTuple):
    """How a chain runs.

    Attributes:
        group: thread blocks that take `images` images through all layers.
        waves: how many times as many groups there are as run at the same time, rounded up.
        buffer_bytes: of one of a group's two buffers, which hold what a layer gives the next one.
    """

    barrier: int
    group: int
    images: int
    groups: int
    waves: int
    buffer_bytes: int
    layers: tuple[LayerPlan, ...]

    @property
    def workspace_bytes(self) -> int:
        """Of all groups' buffers."""
        return 2 * self.groups * self.buffer_bytes

    @property
    def microseconds(self) -> float:
        """What the launch is expected to take."""
        clocks = _LAUNCH[self.barrier] + sum(layer.clocks for layer in self.layers)
        return self.waves * clocks / CLOCKS_PER_MICROSECOND


def obstacle(sizes: Sequence[Sizes], h: int, w: int) -> str | None:
    """Why these layers are no chain for images of h x w, or None."""
    if not 1 <= len(sizes) <= MAX_LAYERS:
        return f"1 to {MAX_LAYERS} layers, not {len(sizes)}"
    for i, layer in enumerate(sizes):
        if layer.c_in % 8 != 0 or layer.c_out % 8 != 0:
            return f"channels in multiples of 8, not {layer.c_in} to {layer.c_out} in layer {i}"
        if i > 0 and layer.c_in != sizes[i - 1].c_out:
            return f"layer {i} to take the {sizes[i - 1].c_out} channels that layer {i - 1} gives, not {layer.c_in}"
        _, out = layer.image(h, w)
        if min(out) < 1:
            return f"an output of at least 1x1 of layer {i}, not {out[0]}x{out[1]} from {h}x{w}"
        if not _divides(out[0] * out[1], 1):
            return f"images of fewer outputs than the {out[0]}x{out[1]} of layer {i}"
        h, w = out
    return None


def _divides(outputs: int, images: int) -> bool:
    """Whether the kernel's division by the outputs of an image is exact for the pixels of a group (ChainDivisor)."""
    return (images * outputs + 256) * outputs <= 2**32


def plan(
    n: int, h: int, w: int, sizes: Sequence[Sizes], barrier: int, at_once: Mapping[int, int], images: int | None = None
) -> ChainPlan | None:
    """The plan that takes the least time, or None where no group can run.

    Args:
        n: images, at least 1.
        sizes: layers without an `obstacle`.
        barrier: ``CLUSTER`` or ``COUNTER``.
        at_once: for each number of thread blocks of a group to try, how many groups run at the same time.
        images: of a group, instead of as few as leave no group waiting.
    """
    found: list[ChainPlan] = []
    for group, groups in at_once.items():
        if groups < 1:
            continue
        each = images or -(-n // groups)
        if barrier == COUNTER and -(-n // each) > groups:
            continue  # blocks that wait for others must all be running
        layers: list[LayerPlan] = []
        inner, size = 0, (h, w)
        for layer in sizes:
            inner = max(inner, size[0] * size[1] * layer.c_in) if layers else 0
            layers.append(_layer(layer, each, *size, group, barrier))
            size = layers[-1].out
        if not all(_divides(layer.out[0] * layer.out[1], each) for layer in layers):
            continue
        buffer_bytes = -(-each * inner * 2 // _ALIGNED) * _ALIGNED
        count = -(-n // each)
        found.append(ChainPlan(barrier, group, each, count, -(-count // groups), buffer_bytes, tuple(layers)))
    return min(found, key=lambda one: one.microseconds, default=None)


def _layer(layer: Sizes, images: int, h: int, w: int, group: int, barrier: int) -> LayerPlan:
    """The layer with the split of the warps that takes the fewest clocks."""
    (p, q), out = layer.image(h, w)
    pixels = images * out[0] * out[1] * (4 if layer.pool else 1)
    bits = min(range(4), key=lambda b: (layer_clocks(layer, pixels, group, barrier, b), b))
    return LayerPlan(h, w, p, q, out, bits, layer_clocks(layer, pixels, group, barrier, bits))


def layer_clocks(layer: Sizes, pixels: int, group: int, barrier: int, row_bits: int) -> float:
    """Clocks of a layer: the barrier in front, while weights arrive; then pixels, products, sums of each item."""
    items = -(-layer.c_out // COLUMN) * -(-pixels // (_PIXELS << row_bits))
    used = min(pixels, _PIXELS << row_bits)
    weights = layer.steps * COLUMN * STEP_CHANNELS * 2 / _BYTES_PER_CLOCK
    reads = layer.steps * used * STEP_CHANNELS * 2 / _BYTES_PER_CLOCK
    steps = -(-layer.steps // (_WARPS >> row_bits))
    rounds = -(-steps // _STEPS_AT_ONCE)
    stores = max(1, 1 << row_bits >> 1)  # by each thread
    item = max(_L2 + max(rounds - 1, 0) * _MORE_STEPS, reads) + _ITEM + (stores - 1) * _MORE_SUMS
    return max(_LAYER[barrier], weights) + item + (-(-items // group) - 1) * (weights + item)


# The packed weight


class ChainPack(NamedTuple):
    """A weight for the chain.

    Attributes:
        weights: ``(steps, 512)`` in the order in which lanes hold them.
        starts: int32 ``(columns of 32 output channels + 1,)``: first step of each.
        steps: int32 ``(steps + 12, 4)``: first input channel, pixels down, pixels right, and C_in less that channel.
        most: the most steps of a column.
    """

    weights: Tensor
    starts: Tensor
    steps: Tensor
    most: int


def pack(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    padding: Pair,
    dilation: Pair,
) -> ChainPack:
    """A BSR weight (`slimkernels.formats.BSRWeight`) packed, its block a multiple of (32, 16). Waits for the device."""
    _, c_in, _, s = weight_shape
    index = pack_index(crow_indices, col_indices, weight_shape, block_shape, COLUMN)
    weights = in_lane_order(steps_of(values, index, block_shape, COLUMN))
    tap, channel = index.taps >> 16, (index.taps & 0xFFFF) * STEP_CHANNELS
    steps = index.taps.new_zeros(index.taps.numel() + READ_AHEAD, 4)
    for i, column in enumerate(
        (channel, tap // s * dilation[0] - padding[0], tap % s * dilation[1] - padding[1], c_in - channel)
    ):
        steps[: tap.numel(), i] = column
    starts = torch.cat([index.group_start[:, 0], index.group_start[-1:, -1]]).contiguous()
    return ChainPack(weights, starts, steps, int(index.most_steps[0]))


def in_lane_order(steps: Tensor) -> Tensor:
    """``(n, 32, 16)`` weights as `(n, 512)`: two matrices, whose lane 4 g + q has two rows of four depths.

    Row 8 h + g of matrix t is output channel 4 g + 2 t + h. Depths 2 q + e and 8 + 2 q + e of the instruction are input
    channels 4 q + e and 4 q + 2 + e: four neighbouring ones of a pixel are a lane's.
    """
    n = steps.shape[0]
    parts = steps.reshape(n, 8, 2, 2, 4, 2, 2)  # g, t, h, q, lower or upper depths, e
    return parts.permute(0, 2, 1, 4, 5, 3, 6).reshape(n, COLUMN * STEP_CHANNELS).contiguous()
