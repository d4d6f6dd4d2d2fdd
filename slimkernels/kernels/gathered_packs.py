"""Packs of the tensor-core kernels that are made in a call, by one gather whose places are kept with the pattern.

A module in eval mode keeps its pack. A training step has new values in every call and the pattern of the call before:
what follows from the pattern alone is made once and waits for the device; the gather does not, and may be captured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels import resident_plan
from slimkernels.kernels.packs import TensorCorePack
from slimkernels.kernels.problems import INT32_MAX
from slimkernels.kernels.resident_plan import Index, Shape
from slimkernels.kernels.tf32 import round_to_tf32, step_channels
from slimkernels.tensors import Derived, is_capturing

BEFORE_A_CAPTURE = (
    "the weight must be packed before a CUDA graph is captured: call the layer once with this pattern (forward and "
    "backward where it is trained)"
)


class Places(NamedTuple):
    """Where in ``values`` each weight of the steps lies, in the order in which lanes hold them.

    Attributes:
        places: int32 or int64, ``(steps, column * depth)``: four bytes a weight below 2**31 weights.
    """

    places: Tensor


# By the channels of a column, the depth of a step, and whether for wgmma: what follows from a pattern is kept with it.
_INDICES: defaultdict[tuple[int, int], Derived] = defaultdict(Derived)
_PLACES: defaultdict[tuple[int, int, bool], Derived] = defaultdict(Derived)


def refuse_a_capture(op: str, pattern: Tensor) -> None:
    """Raises RuntimeError while a CUDA graph is captured, for what would have to wait for the device."""
    if is_capturing(pattern):
        raise RuntimeError(f"{op}: {BEFORE_A_CAPTURE}")


def index_of(
    op: str, crow: Tensor, col: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int], column: int, depth: int
) -> Index:
    """`resident_plan.pack_index` of a pattern, kept with it. Made anew, it waits for the device."""

    def compute() -> Index:
        refuse_a_capture(op, crow)
        return resident_plan.pack_index(crow, col, weight_shape, block_shape, column, depth)

    return _INDICES[column, depth].of((tuple(weight_shape), tuple(block_shape)), (crow, col), compute)


def places_of(blocks: Tensor, index: Index, block_shape: Sequence[int], shape: Shape, depth: int) -> Places:
    """The places of a pack for a compiled shape, from those of the weights of each block, shaped like ``values``."""
    steps = resident_plan.steps_of(blocks, index, block_shape, shape.column, depth)
    return Places(resident_plan.in_lane_order(steps, shape.wgmma))


def own_places(values_shape: Sequence[int], device: torch.device) -> Tensor:
    """The place in ``values`` of each of its weights."""
    capacity, high, wide = values_shape
    size = capacity * high * wide
    dtype = torch.int32 if size <= INT32_MAX else torch.int64
    return torch.arange(size, dtype=dtype, device=device).view(capacity, high, wide)


def gather(values: Tensor, places: Tensor) -> Tensor:
    """`packs.TensorCorePack.weights` of values by their places, float32 rounded to TF32: the last step is zero."""
    values = values.detach()
    rounded = round_to_tf32(values) if values.dtype == torch.float32 else values
    weights = values.new_zeros(places.shape[0] + 1, places.shape[1])
    torch.index_select(rounded.reshape(-1), 0, places.view(-1), out=weights[:-1].view(-1))
    return weights


def pack(
    op: str,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    shape: Shape,
) -> TensorCorePack:
    """`resident_plan.pack` of a pattern that was met before, without waiting for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured and the pattern was not met before.
    """
    depth = step_channels(values.dtype)
    index = index_of(op, crow, col, weight_shape, block_shape, shape.column, depth)

    def compute() -> Places:
        refuse_a_capture(op, crow)
        return places_of(own_places(values.shape, col.device), index, block_shape, shape, depth)

    key = (tuple(weight_shape), tuple(block_shape))
    places = _PLACES[shape.column, depth, shape.wgmma].of(key, (crow, col, *index), compute).places
    return TensorCorePack(gather(values, places), *index[:3])
