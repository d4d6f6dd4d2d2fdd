"""Launcher of the input gradient on the tensor cores of csrc/cuda: checks, packed weights and plans.

The input gradient of a convolution of stride 1 is the convolution of ``grad`` with the transposed, flipped weight, so
the kernel of `cuda_tensor_cores` computes it; of another stride it is some such convolutions. It is no choice of
``auto``: it runs on explicit request, or for a layer whose forward runs the tensor-core kernel where `dgrad_obstacle`
sees nothing against it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels import cuda, resident_plan
from slimkernels.kernels import cuda_tensor_cores as tensor_cores
from slimkernels.kernels.cuda_gradients import DOES_NOT_TAKE, check, check_config, weight_reason
from slimkernels.kernels.gathered_packs import Places, gather, own_places, places_of, refuse_a_capture
from slimkernels.kernels.packs import TensorCorePack
from slimkernels.kernels.problems import Pair
from slimkernels.kernels.resident_plan import STEP_CHANNELS, VARIANTS, Convolution, Plan, Shape, in_range
from slimkernels.kernels.transposed import PixelClass, class_pattern, pixel_classes, transpose_index
from slimkernels.tensors import Derived

OP = "bsr_conv2d_dgrad"
_CONFIGS = frozenset({"variant", "slab", "stages"})
MAX_LAUNCHES = 16  # of 1 us each at least
_NARROWER = (4, 6)  # columns of 32 and of 16 channels, of which a thread block may have one


class DgradIndex(NamedTuple):
    """The steps of a transposed pattern for columns of one width, one class of input pixels behind the other.

    Attributes:
        group_start: int32 ``(classes, columns, groups + 1)``: as `resident_plan.Index` has it, counted through all
            classes that any tap meets.
        taps: int32 ``(steps,)``, likewise.
        most_steps: int32 ``(classes, columns)`` on the CPU, of each class as `resident_plan.Index` has them.
        order: as `resident_plan.Index` has it, of the blocks below.
        blocks: int32, the stored block that each block of the classes' patterns is.
    """

    group_start: Tensor
    taps: Tensor
    most_steps: Tensor
    order: Tensor
    blocks: Tensor


class _Dgrad(NamedTuple):
    """How an input gradient runs: for each class of pixels that any tap meets its convolution and plan, or None."""

    variant: int
    steps: DgradIndex | None  # None: nothing is to be computed
    classes: list[PixelClass]
    plans: list[tuple[Convolution, Plan] | None]


# By the channels of a column, and whether for wgmma: what follows from a pattern is kept with it.
_INDICES: defaultdict[int, Derived] = defaultdict(Derived)
_PLACES: defaultdict[tuple[int, bool], Derived] = defaultdict(Derived)


def _index(
    op: str,
    crow: Tensor,
    col: Tensor,
    transposed: Tensor | None,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    column: int,
) -> DgradIndex:
    """The steps of the transposed pattern, kept with it: a training step meets it with other values.

    Made anew, they wait for the device.
    """
    c_out, c_in, r, s = weight_shape
    block, capacity = (block_shape[1], block_shape[0]), col.numel()

    def compute() -> DgradIndex:
        refuse_a_capture(op, crow)
        index = transposed
        if index is None:
            index = transpose_index(crow, col, weight_shape, block_shape, stride, dilation)
        starts, taps, most, order, blocks = [], [], [], [], []
        steps = parts = 0
        for of in pixel_classes((1, 1), (r, s), stride, (0, 0), dilation):
            if min(of.taps) == 0:
                continue
            stored, crow_t, col_t = class_pattern(index, capacity, weight_shape, block_shape, stride, of)
            found = resident_plan.pack_index(crow_t, col_t, (c_in, c_out, *of.taps), block, column)
            starts.append(found.group_start + steps)
            taps.append(found.taps)
            most.append(found.most_steps)
            order.append(found.order + parts)
            blocks.append(stored)
            # Parts behind the last channel come last: they are no steps of a list, but keep their places.
            steps, parts = steps + found.taps.numel(), parts + found.order.numel()
        return DgradIndex(
            torch.stack(starts), torch.cat(taps), torch.stack(most), torch.cat(order), torch.cat(blocks)
        )  # fmt: skip

    key = (tuple(weight_shape), tuple(block_shape), tuple(stride), tuple(dilation))
    return _INDICES[column].of(key, (crow, col), compute)


def _places(op: str, crow: Tensor, col: Tensor, index: DgradIndex, block_shape: Sequence[int], shape: Shape) -> Tensor:
    """int32 ``(steps, column * 16)``, kept with the pattern."""

    def compute() -> Places:
        refuse_a_capture(op, crow)
        high, wide = block_shape
        places = own_places((col.numel(), high, wide), col.device)
        blocks = places[index.blocks.long()].transpose(1, 2)
        return places_of(blocks, resident_plan.Index(*index[:4]), (wide, high), shape, STEP_CHANNELS)

    return _PLACES[shape.column, shape.wgmma].of(tuple(block_shape), (crow, col, *index), compute).places


def _variants(
    block: int, c_in: int, taps: Pair, limits: tensor_cores.Limits, most_steps: Callable[[int], Tensor]
) -> list[int]:
    """The compiled shapes to try for blocks of so many input channels, the best first.

    First the one that the forward kernel would take for such a weight, then those with fewer channels a thread block.
    """
    found = resident_plan.candidates(block, c_in, limits.wgmma, taps=taps)
    best = resident_plan.choose_variant(found, most_steps, limits.shared_memory)
    narrower = [v for v in _NARROWER if block % VARIANTS[v].column == 0]
    return list(dict.fromkeys((*found[found.index(best) :], *narrower)))


def _prepare(
    op: str,
    grad: Tensor,
    crow: Tensor,
    col: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Mapping[str, int],
    limits: tensor_cores.Limits,
) -> _Dgrad | str:
    """How the gradient of at least one image runs, or why it does not. Reads a pattern that it has not met."""
    c_out, c_in, r, s = weight_shape
    classes = [c for c in pixel_classes(image, (r, s), stride, padding, dilation) if min(c.taps) > 0]
    if len(classes) > MAX_LAUNCHES:
        return f"stride {tuple(stride)} makes {len(classes)} convolutions of it, more than {MAX_LAUNCHES}"
    n, _, p, q = grad.shape

    def convolution(of: PixelClass) -> Convolution | None:
        pads = of.padding
        h, w = p + min(pads[0], 0), q + min(pads[1], 0)
        if min(h, w, *of.pixels) < 1:
            return None  # no such pixels, or no output reads them
        pad = (max(pads[0], 0), max(pads[1], 0))
        return Convolution(n, c_out, h, w, c_in, of.taps, (1, 1), pad, of.dilation, of.pixels)

    def index(column: int) -> DgradIndex:
        return _index(op, crow, col, transposed, weight_shape, block_shape, stride, dilation, column)

    convolutions = [convolution(of) for of in classes]
    if not any(convolutions):
        return _Dgrad(0, None, classes, [None] * len(classes))
    if "variant" in config:
        variants = [config["variant"]]
    else:
        variants = _variants(block_shape[1], c_in, (r, s), limits, lambda column: index(column).most_steps.amax(0))
    reason = None
    for variant in variants:
        found, plans = index(VARIANTS[variant].column), []
        for conv, most_steps in zip(convolutions, found.most_steps, strict=True):
            plan = None if conv is None else tensor_cores.fitting_plan(conv, variant, most_steps, limits, config)
            if conv is not None and plan is None:
                break
            plans.append(None if conv is None or plan is None else (conv, plan))
        else:
            image_of_dx = image[0] * image[1] * c_in
            reason = next((too for pair in plans if pair and (too := in_range(*pair, image_of_dx))), None)
            if reason is None:
                return _Dgrad(variant, found, classes, plans)
    return reason or (
        f"the weights of {VARIANTS[variants[-1]].column} input channels do not fit {limits.shared_memory} bytes of "
        "shared memory beside a part of grad"
    )


def dgrad_obstacle(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str | None:
    """None when `launch_dgrad` takes these arguments, whose shapes fit together, else why not.

    Reads a pattern that was not met before; in a CUDA graph that is being captured this raises RuntimeError.
    """
    reason = weight_reason(grad, values, weight_shape, block_shape)
    if reason is not None or grad.shape[0] == 0:
        return reason
    crow, col = crow_indices.contiguous(), col_indices.contiguous()
    geometry = (weight_shape, block_shape, stride, padding, dilation)
    limits = tensor_cores._limits(grad)
    found = _prepare(OP, grad, crow, col, transposed, image, *geometry, {}, limits)
    return found if isinstance(found, str) else None


def launch_dgrad(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    transposed: Tensor | None,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """dx of `bsr_conv2d` before its epilogue, on tensor cores with sums in float32.

    At a stride above 1 each class of input pixels (`transposed.PixelClass`) is a convolution of its own with some of
    the taps, which writes its pixels to their places in dx: nothing is multiplied with zeros between pixels.

    Args:
        grad: ``(N, C_out, P, Q)``, float16 or bfloat16 on the GPU, read as channels_last (converted when it is not).
        values: the stored blocks of the BSR weight, each a multiple of 16 x 16.
        crow_indices: its row pointers.
        col_indices: its block columns. What follows from the indices is kept with them; a captured CUDA graph keeps the
            pattern of its capture.
        transposed: `transposed.transpose_index` of the pattern at this stride and dilation; None builds it where it is
            needed.
        image: ``(H, W)`` of the input.
        config: ``variant`` of `resident_plan.VARIANTS`, ``slab`` and ``stages`` of the ring.

    Returns:
        ``(N, C_in, H, W)``, channels_last, on torch's current stream.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype does not fit, or the weights of 16 input channels do not
            fit shared memory; `dgrad_obstacle` says so beforehand.
        RuntimeError: the kernel cannot run here, CUDA reports an error, or a CUDA graph is being captured and the
            pattern was not met before.
    """
    op, config = OP, config or {}
    module = cuda._module(op, grad, values=values, crow_indices=crow_indices, col_indices=col_indices)
    geometry = (weight_shape, block_shape, stride, padding, dilation)
    check(op, grad, values, crow_indices, col_indices, image, *geometry)
    check_config(op, config, _CONFIGS)
    limits = tensor_cores._limits(grad)
    if "variant" in config:
        tensor_cores._check_variant(op, config["variant"], VARIANTS, limits, (block_shape[1], block_shape[0]), 0)
    shape = (grad.shape[0], weight_shape[1], *image)
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if dx.numel() == 0:
        return dx
    crow, col = crow_indices.contiguous(), col_indices.contiguous()
    found = _prepare(op, grad, crow, col, transposed, image, *geometry, config, limits)
    if isinstance(found, str):
        raise ValueError(f"{op}: {DOES_NOT_TAKE}: {found}")
    index = found.steps
    if index is None:
        return dx.zero_()
    if sum(pair[0].out[0] * pair[0].out[1] for pair in found.plans if pair) < image[0] * image[1]:
        dx.zero_()  # some pixels meet no tap
    places = _places(op, crow, col, index, block_shape, VARIANTS[found.variant])
    weights = gather(values, places)
    grad = grad.contiguous(memory_format=torch.channels_last)
    for i, (of, pair) in enumerate(zip(found.classes, found.plans, strict=True)):
        if pair is None:
            continue
        read = grad
        if min(of.padding) < 0:  # more padding than the taps reach: the outermost outputs read no pixel
            read = grad[:, :, max(0, -of.padding[0]) :, max(0, -of.padding[1]) :]
            read = read.contiguous(memory_format=torch.channels_last)
        part = dx[:, :, of.first[0] :: stride[0], of.first[1] :: stride[1]]
        pack = TensorCorePack(weights, index.group_start[i], index.taps, index.most_steps[i])
        tensor_cores.run(op, module, *pair, read, part, None, pack)
    return dx
