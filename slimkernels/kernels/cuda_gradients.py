"""Launcher of the weight gradient on the tensor cores of csrc/cuda, and what it shares with the input gradient's.

Neither is a choice of ``auto``: they run on explicit request, or for a layer whose forward runs the tensor-core kernel
where `wgrad_obstacle` and `cuda_input_gradient.dgrad_obstacle` see nothing against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels import cuda
from slimkernels.kernels import cuda_tensor_cores as tensor_cores
from slimkernels.kernels.problems import INT32_MAX, Pair, Problem, check_geometry, conv_output_image
from slimkernels.kernels.resident_plan import STEP_CHANNELS

DGRAD, WGRAD = "bsr_conv2d_dgrad__cuda_tensor_cores", "bsr_conv2d_wgrad__cuda_tensor_cores"
DOES_NOT_TAKE = "the tensor-core kernel does not take this"
_WGRAD_CONFIGS = frozenset({"variant", "stages", "parts"})


def shape_reason(problem: Problem) -> str | None:
    """None when both gradient kernels take the problem's blocks, else why not."""
    return _block_reason(problem.block_shape)


def _block_reason(block_shape: Sequence[int]) -> str | None:
    block_out, block_in = block_shape
    if block_out % STEP_CHANNELS != 0 or block_in % STEP_CHANNELS != 0:
        return f"a block is a multiple of {STEP_CHANNELS} x {STEP_CHANNELS}, not {block_out} x {block_in}"
    return None


def weight_reason(grad: Tensor, values: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]) -> str | None:
    """None when both gradient kernels take a weight, else why not."""
    c_out, c_in, r, s = weight_shape
    if grad.dtype == torch.float32:
        return "float32"
    if _block_reason(block_shape) is not None:
        return _block_reason(block_shape)
    if c_in % 8 != 0 or c_out % 8 != 0:
        return f"channels are copied eight at a time, not {c_in} to {c_out}"
    if r * s >= 2**15 or max(c_in, c_out) >= 2**20 or values.numel() > INT32_MAX:
        return "too many taps, channels or weights"
    return None


def check(
    op: str,
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    image: Sequence[int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """What both launchers ask for beside the devices and dtypes, which `cuda._module` has checked."""
    check_geometry(op, stride, padding, dilation)
    refuse(op, weight_reason(grad, values, weight_shape, block_shape))
    c_out, _, r, s = weight_shape
    block_out, block_in = block_shape
    rows = -(-c_out // block_out)
    if crow_indices.numel() != rows + 1 or values.dim() != 3 or tuple(values.shape[1:]) != (block_out, block_in):
        raise ValueError(
            f"{op}: expected values (nnz_blocks, {block_out}, {block_in}) and {rows + 1} crow_indices, "
            f"got {tuple(values.shape)} and {crow_indices.numel()}"
        )
    if tuple(col_indices.shape) != (values.shape[0],):
        raise ValueError(f"{op}: expected {values.shape[0]} col_indices, got {tuple(col_indices.shape)}")
    p, q = conv_output_image(image, (r, s), stride, padding, dilation)
    if grad.dim() != 4 or tuple(grad.shape[1:]) != (c_out, p, q):
        raise ValueError(f"{op}: expected grad of shape (N, {c_out}, {p}, {q}), got {tuple(grad.shape)}")


def refuse(op: str, reason: str | None) -> None:
    """Raises ValueError with a reason why the kernel does not take what it was given; None is no reason."""
    if reason is not None:
        raise ValueError(f"{op}: {DOES_NOT_TAKE}: {reason}")


def check_config(op: str, config: Mapping[str, int], known: frozenset[str]) -> None:
    """Raises ValueError where a launch configuration has a name that is not known."""
    if set(config) - known:
        raise ValueError(f"{op}: expected config of {', '.join(sorted(known))}, got {dict(config)}")


# The gradient of the stored weights


class GradientShape(NamedTuple):
    """A compiled shape of csrc/cuda/weight_gradient.cu.

    Attributes:
        column: output channels of a piece, which has 16 input channels.
        pieces: of a thread block.
    """

    column: int
    pieces: int

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of a thread block: `gradient_shared_bytes` of csrc/cuda/weight_gradient.cuh."""
        stage = STAGE_PIXELS * (self.column + self.pieces * STEP_CHANNELS) * 2
        return -(-self.pieces * 16 // 128) * 128 + stages * stage


GRADIENT_VARIANTS = (GradientShape(128, 16), GradientShape(64, 32), GradientShape(32, 32), GradientShape(16, 32))
STAGE_PIXELS = 32
# Stages to try, the first that fit: two stages of latency on their way while one is multiplied.
GRADIENT_STAGES = (4, 3, 2)
MAX_PARTS, MIN_STAGES_OF_PART = 128, 8


class GradientPlan(NamedTuple):
    """How a weight gradient runs: the members of the same names in csrc/kernels.h."""

    variant: int
    stages: int
    parts: int
    part_pixels: int
    chunks: int


def gradient_plan(
    pixels: int,
    capacity: int,
    c_out: int,
    block_shape: Sequence[int],
    limits: tensor_cores.Limits,
    config: Mapping[str, int],
) -> GradientPlan:
    """The plan for so many output pixels and stored blocks, or places for some; nothing is read from the device."""
    block_out, block_in = block_shape
    if "variant" in config:
        variant = config["variant"]
    else:
        variant = next(i for i, shape in enumerate(GRADIENT_VARIANTS) if block_out % shape.column == 0)
    shape = GRADIENT_VARIANTS[variant]
    fitting = [n for n in GRADIENT_STAGES if shape.shared_bytes(n) <= limits.shared_memory]
    rows, pieces, high = -(-c_out // block_out), capacity * block_in // STEP_CHANNELS, block_out // shape.column
    # A row's last thread block may have few pieces: one more a row at most. About one block a processor.
    likely = max(1, rows * -(-pieces // (rows * shape.pieces))) * high
    parts = max(1, min(limits.processors // likely, MAX_PARTS, -(-pixels // (MIN_STAGES_OF_PART * STAGE_PIXELS))))
    parts = config.get("parts", parts)
    part_pixels = -(-pixels // (parts * STAGE_PIXELS)) * STAGE_PIXELS
    chunks = (pieces // shape.pieces + rows) * high
    return GradientPlan(
        variant, config.get("stages", fitting[0] if fitting else 2), -(-pixels // part_pixels), part_pixels, chunks
    )


def _size_reason(
    grad: Tensor,
    x: Tensor,
    plan: GradientPlan,
    values: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    dilation: Sequence[int],
) -> str | None:
    """None where no number of the kernel wraps (csrc/bindings/cuda.h looks again), else what is too large."""
    _, c_in, r, s = weight_shape
    n, _, p, q = grad.shape
    if ((r - 1) * dilation[0] * x.shape[3] + (s - 1) * dilation[1] + 1) * (c_in + block_shape[1]) > INT32_MAX:
        return f"taps reach 2**31 elements or more with dilation {tuple(dilation)}"
    if max(grad[0].numel(), x[0].numel()) > INT32_MAX:
        return "an image has 2**31 elements or more"
    if plan.part_pixels > INT32_MAX:
        return f"each of {plan.parts} parts has 2**31 pixels or more, of {n * p * q} in all"
    if plan.chunks * plan.parts > INT32_MAX:
        return "there are 2**31 thread blocks or more"
    return None


def wgrad_obstacle(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str | None:
    """None when `launch_wgrad` takes these arguments, whose shapes fit together, else why not; reads no tensor."""
    reason = weight_reason(grad, values, weight_shape, block_shape)
    if reason is not None or grad.numel() == 0 or values.numel() == 0:
        return reason
    pixels, limits = grad.shape[0] * grad.shape[2] * grad.shape[3], tensor_cores._limits(grad)
    plan = gradient_plan(pixels, values.shape[0], weight_shape[0], block_shape, limits, {})
    if GRADIENT_VARIANTS[plan.variant].shared_bytes(plan.stages) > limits.shared_memory:
        return f"two stages do not fit {limits.shared_memory} bytes of shared memory"
    return _size_reason(grad, x, plan, values, weight_shape, block_shape, dilation)


def launch_wgrad(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """The gradient of ``values`` (spare blocks and padded entries exactly 0) before the epilogue, on tensor cores.

    Sums are in float32, over parts of the pixels that are added in their order, and rounded once: deterministic.
    Nothing is read back from the device, and a captured CUDA graph stays right when the pattern changes.

    Args:
        grad: ``(N, C_out, P, Q)``, float16 or bfloat16 on the GPU.
        x: ``(N, C_in, H, W)`` of that dtype. Both are read as channels_last (converted when they are not).
        values: gives its shape and dtype alone; blocks of a multiple of 16 x 16.
        crow_indices: int32, of the pattern.
        col_indices: int32, of the pattern.
        config: ``variant`` of `GRADIENT_VARIANTS`, ``stages`` of the ring, ``parts`` of the pixels.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
        RuntimeError: the kernel cannot run here, or CUDA reports an error.
    """
    op, config = "bsr_conv2d_wgrad", config or {}
    module = cuda._module(op, x, grad=grad, values=values, crow_indices=crow_indices, col_indices=col_indices)
    c_out, c_in, r, s = weight_shape
    if x.dim() != 4 or x.shape[1] != c_in or x.shape[0] != grad.shape[0]:
        raise ValueError(f"{op}: expected x of shape ({grad.shape[0]}, {c_in}, H, W), got {tuple(x.shape)}")
    n, _, h, w = x.shape
    geometry = (weight_shape, block_shape, stride, padding, dilation)
    check(op, grad, values, crow_indices, col_indices, (h, w), *geometry)
    check_config(op, config, _WGRAD_CONFIGS)
    limits = tensor_cores._limits(grad)
    if "variant" in config:
        _check_gradient_variant(op, config["variant"], block_shape[0])
    if grad.numel() == 0 or values.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    p, q = grad.shape[2:]
    plan = gradient_plan(n * p * q, values.shape[0], c_out, block_shape, limits, config)
    refuse(op, _size_reason(grad, x, plan, values, weight_shape, block_shape, dilation))
    size = GRADIENT_VARIANTS[plan.variant].shared_bytes(plan.stages)
    if size > limits.shared_memory:
        raise ValueError(f"{op}: expected stages that fit {limits.shared_memory} bytes of shared memory, got {size}")
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    crow, col = crow_indices.contiguous(), col_indices.contiguous()
    partial = torch.empty((plan.parts, *values.shape), dtype=torch.float32, device=x.device)
    out = torch.empty(values.shape, dtype=values.dtype, device=x.device)
    status = module.cuda_weight_gradient(
        x.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        partial.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        n,
        h,
        w,
        c_in,
        c_out,
        p,
        q,
        out.numel(),
        plan.part_pixels,
        r,
        s,
        *stride,
        *padding,
        *dilation,
        *block_shape,
        *_steps_of(STAGE_PIXELS, (p, q)),
        plan.parts,
        plan.chunks,
        plan.stages,
        plan.variant,
        cuda._DTYPES[x.dtype],
        *cuda._target(x),
    )
    cuda._check(op, module, status)
    return out


def _check_gradient_variant(op: str, variant: int, block_out: int) -> None:
    if not 0 <= variant < len(GRADIENT_VARIANTS):
        raise ValueError(f"{op}: expected variant in 0 to {len(GRADIENT_VARIANTS) - 1}, got {variant}")
    column = GRADIENT_VARIANTS[variant].column
    if block_out % column != 0:
        raise ValueError(f"{op}: variant {variant} takes blocks of a multiple of {column} channels")


def _steps_of(pixels: int, image: Pair | Any) -> tuple[int, int, int]:
    """How many images, rows and columns so many pixels further is."""
    p, q = image
    return pixels // (p * q), pixels % (p * q) // q, pixels % q
