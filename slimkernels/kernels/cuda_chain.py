"""A chain of block-sparse convolutions of a few images in one launch: the launcher of csrc/cuda/chain_conv2d.cuh.

At batch 1 to 16 a layer's own kernel is latency, not work. Here a group of thread blocks takes some images through all
layers: a cluster with the hardware's barrier on sm_90, blocks of a cooperative launch and a counter elsewhere. Nothing
chooses it; `slimkernels.inference.cuda_chain.chain_of` makes one of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels import chain_plan, cuda, cuda_tensor_cores
from slimkernels.kernels.chain_plan import (
    CLUSTER,
    COLUMN,
    COUNTER,
    GROUPS,
    MOST_BLOCKS,
    READ_AHEAD,
    ChainPack,
    ChainPlan,
    Sizes,
)
from slimkernels.kernels.problems import Pair, check_geometry
from slimkernels.kernels.resident_plan import STEP_CHANNELS
from slimkernels.tensors import is_capturing

OP = "chain_conv2d"
_CONFIGS = frozenset({"barrier", "group", "images", "overlap"})
_EPILOGUES = ("none", "relu", "relu_maxpool2")
_ALIGNED = 16  # bytes


class ChainLayer(NamedTuple):
    """A convolution packed for the chain, by `pack_layer`: a copy, which later writes to the weight do not reach.

    The kernel follows the indices in it without a check; `launch_chain` checks their number alone.
    """

    pack: ChainPack
    bias: Tensor | None
    sizes: Sizes
    relu: bool


def shape_reason(weight_shape: Sequence[int], block_shape: Sequence[int]) -> str | None:
    """None where a layer of such a weight can be part of a chain, else why not."""
    block_out, block_in = block_shape
    if block_out % COLUMN != 0 or block_in % STEP_CHANNELS != 0:
        return f"blocks of multiples of {COLUMN} x {STEP_CHANNELS}, not {block_out} x {block_in}"
    c_out, c_in, r, s = weight_shape
    if c_out % 8 != 0 or c_in % 8 != 0:
        return f"channels in multiples of 8, not {c_in} to {c_out}"
    if r * s >= 2**15 or c_in >= 2**20:
        return "fewer taps or channels"
    return None


def pack_layer(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    epilogue: str = "none",
) -> ChainLayer:
    """A block-sparse convolution packed as `launch_chain` takes it. Waits for the device.

    Args:
        values: the stored blocks of a valid `slimkernels.formats.BSRWeight`, float16 or bfloat16, each a multiple of
            32 x 16.
        crow_indices: its row pointers.
        col_indices: its block columns.
        bias: ``(C_out,)`` or None.
        weight_shape: ``(C_out, C_in, R, S)``, channels multiples of 8.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.

    Raises:
        ValueError, TypeError: the layer cannot be part of a chain.
        RuntimeError: a CUDA graph is being captured.
    """
    check_geometry(OP, stride, padding, dilation)
    reason = shape_reason(weight_shape, block_shape)
    if reason is not None:
        raise ValueError(f"{OP}: expected {reason}")
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{OP}: expected values of float16 or bfloat16, got {values.dtype}")
    if epilogue not in _EPILOGUES:
        raise ValueError(f"{OP}: expected epilogue {', '.join(_EPILOGUES)}, got {epilogue!r}")
    cuda_tensor_cores._check_weight(OP, values, crow_indices, bias, weight_shape[0], block_shape)
    if bias is not None and bias.dtype != values.dtype:
        raise TypeError(f"{OP}: expected bias of {values.dtype}, got {bias.dtype}")
    if is_capturing(values):
        raise RuntimeError(f"{OP}: layers must be packed before a CUDA graph is captured")
    c_out, c_in, r, s = weight_shape
    pads, apart = _pair(padding), _pair(dilation)
    found = chain_plan.pack(
        values.detach(), crow_indices, col_indices, (c_out, c_in, r, s), block_shape, pads, apart
    )  # fmt: skip
    sizes = Sizes(c_in, c_out, (r, s), _pair(stride), pads, apart, epilogue == "relu_maxpool2", found.most)
    kept = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    return ChainLayer(found, kept, sizes, epilogue != "none")


@lru_cache(maxsize=64)
def _groups_at_once(group: int, barrier: int, dtype: torch.dtype, device: int) -> int:
    from slimkernels import _extension

    module = _extension.load()[0]
    assert module is not None
    found = int(module.cuda_chain_groups(group, barrier, cuda._DTYPES[dtype], device))
    cuda._check(OP, module, max(0, -found))
    return found


def has_clusters(x: Tensor) -> bool:
    """Whether x's device runs thread blocks in clusters, whose launches may overlap."""
    return cuda_tensor_cores._limits(x).wgmma


def plan_for(x: Tensor, layers: Sequence[ChainLayer], config: Mapping[str, int] | None = None) -> ChainPlan:
    """The plan by which `launch_chain` runs these layers on x's device.

    Raises:
        ValueError: the layers are no chain for images of this size, or no group of thread blocks can run.
    """
    config = config or {}
    if set(config) - _CONFIGS:
        raise ValueError(f"{OP}: expected config of {', '.join(sorted(_CONFIGS))}, got {dict(config)}")
    sizes = [layer.sizes for layer in layers]
    n, _, h, w = x.shape
    reason = chain_plan.obstacle(sizes, h, w)
    if reason is not None:
        raise ValueError(f"{OP}: expected {reason}")
    clusters, overlap = has_clusters(x), config.get("overlap", 0)
    barriers: tuple[int, ...] = (COUNTER,)
    if "barrier" in config:
        barriers = (config["barrier"],)
    elif clusters:
        barriers = (CLUSTER,) if overlap else (CLUSTER, COUNTER)
    if not set(barriers) <= {CLUSTER, COUNTER}:
        raise ValueError(f"{OP}: expected barrier {CLUSTER} (cluster) or {COUNTER} (counter), got {barriers[0]}")
    if not clusters and (CLUSTER in barriers or overlap):
        raise ValueError(f"{OP}: clusters and overlap need a GPU of compute capability 9.0")
    if COUNTER in barriers and overlap:
        raise ValueError(f"{OP}: overlap needs barrier {CLUSTER}: the counters are set in front of the launch")
    for name, most in (("group", max(MOST_BLOCKS[barrier] for barrier in barriers)), ("images", 65535)):
        if not 1 <= config.get(name, 1) <= most:
            raise ValueError(f"{OP}: expected {name} in 1 to {most}, got {config[name]}")
    plans: list[ChainPlan] = []
    tried: set[int] = set()
    for barrier in barriers:
        wanted: tuple[int, ...] = (config["group"],) if "group" in config else GROUPS[barrier]
        groups = [group for group in wanted if group <= MOST_BLOCKS[barrier]]
        tried.update(groups)
        at_once = {group: _groups_at_once(group, barrier, x.dtype, x.device.index or 0) for group in groups}
        found = chain_plan.plan(n, h, w, sizes, barrier, at_once, config.get("images"))
        plans += [] if found is None else [found]
    if not plans:
        text = f"{n} images need more thread blocks of {sorted(tried)} at the same time than run here"
        raise ValueError(f"{OP}: {text}")
    return min(plans, key=lambda plan: plan.microseconds)


def launch_chain(
    x: Tensor,
    layers: Sequence[ChainLayer],
    config: Mapping[str, int] | None = None,
    plan_of: Callable[[Tensor], ChainPlan] | None = None,
) -> Tensor:
    """All layers one after the other, in one launch on torch's current stream.

    What lies between two layers is rounded to x's dtype and kept in a workspace, which stays in L2. Sums are fp32, in a
    fixed order.

    Args:
        x: ``(N, C, H, W)``, float16 or bfloat16 on the GPU; channels_last is taken as it is.
        layers: what `pack_layer` returned, on x's device, 1 to 32 of them.
        config: ``barrier`` 0 for clusters (sm_90) or 1 for a counter, where not given what `plan_for` expects to be
            faster; ``group`` thread blocks that share ``images``; ``overlap`` 1 takes clusters and lets the launch
            begin while the kernel in front ends, which must not have packed the layers.
        plan_of: called in the place of `plan_for`, by who keeps what that gave.

    Returns:
        ``(N, C_out, P, Q)``, channels_last.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit, or no group of thread blocks can run.
        RuntimeError: the kernel cannot run here, or CUDA reports an error.
    """
    config = config or {}
    module = cuda._require(OP, x)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{OP}: expected x of float16 or bfloat16, got {x.dtype}")
    if not layers or x.dim() != 4 or x.shape[1] != layers[0].sizes.c_in:
        wanted = layers[0].sizes.c_in if layers else "C"
        raise ValueError(
            f"{OP}: expected x of shape (N, {wanted}, H, W) and a layer at least, "
            f"got {tuple(x.shape)} and {len(layers)} layers"
        )
    for i, layer in enumerate(layers):
        _check_layer(i, layer, x)
    n = x.shape[0]
    one = x if n else x.new_empty(1, *x.shape[1:])
    plan = plan_for(one, layers, config) if plan_of is None else plan_of(one)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.data_ptr() % _ALIGNED:
        x = x.clone(memory_format=torch.channels_last)
    shape = (n, layers[-1].sizes.c_out, *plan.layers[-1].out)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if n == 0:
        return y
    workspace = torch.empty(plan.workspace_bytes // x.element_size(), dtype=x.dtype, device=x.device)
    counters = None
    if plan.barrier == COUNTER:
        counters = torch.zeros(plan.groups, dtype=torch.int32, device=x.device)
    status = module.cuda_chain_conv2d(
        _layer_members(x, y, workspace, layers, plan),
        cuda._pointer(counters),
        n,
        plan.images,
        plan.group,
        plan.barrier,
        config.get("overlap", 0),
        cuda._DTYPES[x.dtype],
        *cuda._target(x),
    )
    cuda._check(OP, module, status)
    return y


def _check_layer(i: int, layer: ChainLayer, x: Tensor) -> None:
    """Raises where a layer's tensors are not of x's device and dtype, or not as large as the kernel reads them."""
    pack = layer.pack
    columns = -(-layer.sizes.c_out // COLUMN)
    shapes: tuple[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]], ...] = (
        ("weights", pack.weights, x.dtype, (pack.weights.shape[0], COLUMN * STEP_CHANNELS)),
        ("steps", pack.steps, torch.int32, (pack.weights.shape[0] + READ_AHEAD, 4)),
        ("starts", pack.starts, torch.int32, (max(pack.starts.numel(), columns + 1),)),
        ("bias", layer.bias, x.dtype, (layer.sizes.c_out,)),
    )
    for name, tensor, dtype, shape in shapes:
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{OP}: expected {name} of layer {i} on {x.device}, got {tensor.device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{OP}: expected {name} of layer {i} of {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{OP}: expected {name} of layer {i} of shape {shape}, contiguous, got {tuple(tensor.shape)}"
            )


def _layer_members(
    x: Tensor, y: Tensor, workspace: Tensor, layers: Sequence[ChainLayer], plan: ChainPlan
) -> list[tuple[int, ...]]:
    """Each layer's members of SlimCudaChainLayer; what lies between alternates between a group's two buffers."""
    size = x.element_size()
    buffers = [workspace.data_ptr(), workspace.data_ptr() + plan.buffer_bytes]
    of_group = 2 * plan.buffer_bytes
    read_at, read_step = x.data_ptr(), plan.images * x[0].numel() * size
    members: list[tuple[int, ...]] = []
    for i, (layer, planned) in enumerate(zip(layers, plan.layers, strict=True)):
        write_at, write_step = buffers[i % 2], of_group
        if i == len(layers) - 1:
            write_at, write_step = y.data_ptr(), plan.images * y[0].numel() * size
        sizes = layer.sizes
        members.append(
            (
                read_at,
                write_at,
                cuda._pointer(layer.bias),
                layer.pack.weights.data_ptr(),
                layer.pack.starts.data_ptr(),
                layer.pack.steps.data_ptr(),
                read_step,
                write_step,
                planned.h,
                planned.w,
                sizes.c_in,
                sizes.c_out,
                planned.p,
                planned.q,
                *sizes.stride,
                int(layer.relu),
                int(sizes.pool),
                planned.row_bits,
            )
        )
        read_at, read_step = write_at, write_step
    return members


def _pair(value: Sequence[int]) -> Pair:
    return (value[0], value[1])
