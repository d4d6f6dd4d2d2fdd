"""Launchers of the tensor-core kernels of csrc/cuda: checks, packed weights and plans; `cuda` has what is common.

`launch_bsr_conv2d` is the block-sparse convolution, whose weights stay in shared memory while the images stream by, or
on sm_90 stream by too. It multiplies float32 in TF32, where torch's switch for convolutions allows that.
`launch_stem_conv2d` is a network's dense first convolution and the block-sparse second one in one kernel. Neither is a
choice of ``auto``: they run on explicit request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels import cuda, gathered_packs, resident_plan
from slimkernels.kernels.packs import StemPack, TensorCorePack, kind_of
from slimkernels.kernels.problems import ConvProblem, Pair, Problem, check_geometry
from slimkernels.kernels.resident_plan import STEM_VARIANTS, TF32_VARIANTS, VARIANTS, Convolution, Index, Plan, Shape
from slimkernels.kernels.tf32 import precision_reason, step_channels
from slimkernels.tensors import Checked, is_capturing

NAME = "bsr_conv2d__cuda_tensor_cores"
_WGMMA_CAPABILITY = (9, 0)  # of the only processors that have wgmma
_CONFIGS = frozenset({"variant", "slab", "stages", "slots", "overlap"})
_STEM_CHANNELS, _STEM_WORDS = 64, 1024  # kStemChannels and what kStemWordsOfThread allow in csrc/cuda/stem_conv2d.cuh


class Limits(NamedTuple):
    """What a plan needs to know of a device."""

    wgmma: bool
    shared_memory: int
    processors: int


@lru_cache(maxsize=16)
def _device_limits(index: int) -> Limits:
    p: Any = torch.cuda.get_device_properties(index)  # torch's stub lacks shared_memory_per_block_optin
    return Limits((p.major, p.minor) == _WGMMA_CAPABILITY, p.shared_memory_per_block_optin, p.multi_processor_count)


def _limits(x: Tensor) -> Limits:
    return _device_limits(x.device.index)


def shape_reason(problem: Problem) -> str | None:
    """None when the kernel takes the problem's shapes, else why not."""
    block_out, block_in = problem.block_shape
    depth = step_channels(problem.dtype)
    if block_out % 16 != 0 or block_in % depth != 0:
        return f"a block is a multiple of 16 x {depth}, not {block_out} x {block_in}"
    if isinstance(problem, ConvProblem):
        if problem.c_in % 8 != 0 or problem.c_out % 8 != 0:
            return f"channels are copied eight at a time, not {problem.c_in} to {problem.c_out}"
        if problem.r * problem.s >= 2**15 or problem.c_in >= 2**16 * depth:
            return "too many taps or channels"
    return None


_CHECKED = Checked()


def _check_packed(
    op: str,
    packed: TensorCorePack,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    column: int,
) -> None:
    """Raises ValueError unless the pack's indices are those of the pattern and its weights have the values' size.

    The kernel follows the indices without a check. They are compared once for tensors that stay as they are, and not
    while a CUDA graph is captured.
    """
    weights, group_start, taps, most_steps = packed
    depth = step_channels(values.dtype)
    size = (values.numel() // (column * depth) + 1, column * depth)
    if tuple(weights.shape) != size or weights.dtype != values.dtype or not weights.is_contiguous():
        raise ValueError(
            f"{op}: expected packed weights {size} of {values.dtype}, contiguous, "
            f"got {tuple(weights.shape)} of {weights.dtype}"
        )
    key = (*weight_shape, *block_shape, column, depth)
    if _CHECKED.knows(key, group_start, taps, most_steps, crow, col) or is_capturing(crow):
        return
    expected: Index = resident_plan.pack_index(crow, col, weight_shape, block_shape, column, depth)
    for got, name in ((group_start, "group_start"), (taps, "taps"), (most_steps, "most_steps")):
        wanted = getattr(expected, name)
        if got.device != wanted.device or got.dtype != wanted.dtype or not torch.equal(got, wanted):
            raise ValueError(f"{op}: expected packed {name} to be that of crow_indices and col_indices")
    _CHECKED.remember(key, group_start, taps, most_steps, crow, col)


def pack(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, weight_shape: Sequence[int], block_shape: Sequence[int]
) -> TensorCorePack:
    """The weight packed for values' device, as `launch_bsr_conv2d` takes it. Waits for the device.

    Args: a valid `slimkernels.formats.BSRWeight` whose block shape `shape_reason` takes.
    """
    variant = chosen_variant(values, crow_indices, col_indices, weight_shape, block_shape)
    return resident_plan.pack(values, crow_indices, col_indices, weight_shape, block_shape, VARIANTS[variant])


def chosen_variant(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    packed: Sequence[Tensor] = (),
) -> int:
    """The compiled shape that a weight runs on: one of its pack's column where there is a pack.

    Without one, where there is a choice, the pattern is read: for one that was not met before this waits for the
    device, and raises RuntimeError in a CUDA graph that is being captured.
    """
    limits, depth = _limits(values), step_channels(values.dtype)
    tf32 = values.dtype == torch.float32
    taps = (weight_shape[2], weight_shape[3])
    found = resident_plan.candidates(block_shape[0], weight_shape[0], limits.wgmma, tf32, taps)
    if kind_of(packed) is TensorCorePack:
        pack = TensorCorePack(*packed)
        fitting = tuple(v for v in found if VARIANTS[v].column * depth == pack.weights.shape[-1])
        if fitting:
            return resident_plan.choose_variant(fitting, lambda column: pack.most_steps, limits.shared_memory)

    def most_steps(column: int) -> Tensor:
        pattern = (crow_indices, col_indices, weight_shape, block_shape)
        return gathered_packs.index_of("bsr_conv2d", *pattern, column, depth).most_steps

    return resident_plan.choose_variant(found, most_steps, limits.shared_memory)


def _packed_or_new(
    op: str,
    packed: Sequence[Tensor],
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    variant: int,
) -> TensorCorePack:
    shape = VARIANTS[variant]
    if kind_of(packed) is TensorCorePack and packed[0].shape[1:] == (shape.column * step_channels(values.dtype),):
        found = TensorCorePack(*packed)
        _check_packed(op, found, crow, col, values, weight_shape, block_shape, shape.column)
        return found
    return gathered_packs.pack(op, values, crow, col, weight_shape, block_shape, shape)


def launch_bsr_conv2d(
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
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Block-sparse convolution on tensor cores, a thread block's weights in shared memory or streaming through it.

    Args:
        x: ``(N, C_in, H, W)``, float16, bfloat16 or float32 on the GPU; channels_last is taken as it is.
        values: the stored blocks of the BSR weight, see `slimkernels.formats.BSRWeight`; each a multiple of 16 x 16, of
            float32 of 16 x 8.
        crow_indices: its row pointers, validated when the weight was built.
        col_indices: its block columns, validated when the weight was built.
        bias: ``(C_out,)`` or None.
        packed: what `pack` returned for this weight, or anything else: then it is packed in this call, by one gather
            whose places are kept with the pattern.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.
        config: ``slab`` and ``stages`` of the ring, ``slots`` of that of streamed weights; ``variant`` of
            `resident_plan.VARIANTS`; ``overlap`` 1 lets the kernel begin while the one in front of it ends, which must
            not have written ``packed``; a weight that is packed in this call waits. By default launches of sm_90 that
            are captured in a CUDA graph overlap.

    Returns:
        ``(N, C_out, P, Q)``, pooled where asked for, channels_last, on torch's current stream. Float32 is multiplied in
        TF32: both factors are rounded to 10 bits behind the point, half a unit of which is 2^-11; sums, bias and output
        are float32.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit, or a block row's weights do not fit shared memory;
            float32 while ``torch.backends.cudnn.conv.fp32_precision`` is not "tf32".
        RuntimeError: the kernel cannot run here, CUDA reports an error, or a CUDA graph is being captured, there is no
            pack, and the pattern was not met before.
    """
    op, config = "bsr_conv2d", config or {}
    module = cuda._module(op, x, values=values, crow_indices=crow_indices, col_indices=col_indices, bias=bias)
    check_geometry(op, stride, padding, dilation)
    c_out, c_in, r, s = weight_shape
    if x.dim() != 4 or x.shape[1] != c_in:
        raise ValueError(f"{op}: expected x of shape (N, {c_in}, H, W), got {tuple(x.shape)}")
    n, _, h, w = x.shape
    problem = ConvProblem(
        n, c_in, h, w, c_out, r, s, _pair(stride), _pair(padding), _pair(dilation), _pair(block_shape), values.shape[0],
        x.dtype, x.device.type, epilogue,
    )  # fmt: skip
    reason = shape_reason(problem) or precision_reason(problem)  # the switch may have changed since the last call
    if reason is not None:
        raise ValueError(f"{op}: the tensor-core kernel does not take this: {reason}")
    _check_weight(op, values, crow_indices, bias, c_out, block_shape)
    if set(config) - _CONFIGS:
        raise ValueError(f"{op}: expected config of {', '.join(sorted(_CONFIGS))}, got {dict(config)}")
    pool = epilogue == "relu_maxpool2"
    if epilogue not in ("none", "relu", "relu_maxpool2"):
        raise ValueError(f"{op}: expected epilogue 'none', 'relu' or 'relu_maxpool2', got {epilogue!r}")
    p, q = problem.p, problem.q
    out = (p // 2, q // 2) if pool else (p, q)
    if min(out) < 1:
        raise ValueError(f"{op}: expected an output of at least 1x1, got {out[0]}x{out[1]} from x {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty((n, c_out, *out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    values, crow, col = values.contiguous(), crow_indices.contiguous(), col_indices.contiguous()
    bias = bias if bias is None else bias.contiguous()
    if "variant" in config:
        variant = config["variant"]
    else:
        variant = chosen_variant(values, crow, col, weight_shape, block_shape, packed)
    _check_variant(op, variant, VARIANTS, _limits(x), block_shape, config.get("overlap", 0))
    if x.dtype == torch.float32 and variant not in TF32_VARIANTS:
        raise ValueError(f"{op}: variant {variant} takes no float32, only {', '.join(map(str, TF32_VARIANTS))} do")
    weight = _packed_or_new(op, packed, values, crow, col, weight_shape, block_shape, variant)
    sizes = (n, c_in, h, w, c_out, (r, s), _pair(stride), _pair(padding), _pair(dilation), (p, q))
    conv = Convolution(*sizes, x.element_size())
    plan = fitting_plan(conv, variant, weight.most_steps, _limits(x), config)
    if plan is None and VARIANTS[variant].streamed:
        raise ValueError(
            f"{op}: variant {variant} takes {resident_plan.MOST_TAPS} taps at most, of which four pixels' input fits "
            f"shared memory, got {r} x {s} with stride {tuple(stride)} and dilation {tuple(dilation)}"
        )
    if plan is None:
        step = f"{VARIANTS[variant].column} x {step_channels(x.dtype)}"
        raise ValueError(
            f"{op}: expected block rows whose weights fit {_limits(x).shared_memory} bytes of shared memory, "
            f"got one of {int(weight.most_steps[0])} steps of {step} weights"
        )
    # The kernel in front of this one has only just written a pack that was made in this call. A pack that comes along
    # may be that new too, but not while a CUDA graph is captured: it was made before, and the graph begins behind it.
    given = bool(packed) and weight.weights is packed[0]
    overlap = config.get("overlap", int(_limits(x).wgmma and is_capturing(x))) if given else 0
    run(op, module, conv, plan, x, y, bias, weight, epilogue, overlap)
    return y


def fitting_plan(
    conv: Convolution, variant: int, most_steps: Tensor, limits: Limits, config: Mapping[str, int]
) -> Plan | None:
    """`resident_plan.fitting_plan` for a device; ``most_steps`` as `packs.TensorCorePack` has it."""
    most = tuple(most_steps.tolist())
    items = tuple((name, config[name]) for name in ("slab", "stages", "slots") if name in config)
    return resident_plan.fitting_plan(variant, conv, most, limits.shared_memory, limits.processors, items)


def run(
    op: str,
    module: Any,
    conv: Convolution,
    plan: Plan,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    weight: TensorCorePack,
    epilogue: str = "none",
    overlap: int = 0,
) -> None:
    """Fills y by the convolution of x, both checked, with a pack for the compiled shape of the plan.

    Args: x channels_last; y has its channels side by side, images, rows and columns anywhere.

    Raises:
        RuntimeError: CUDA reports an error.
    """
    steps_of_y = [step if size > 1 else 0 for size, step in zip(y.shape, y.stride(), strict=True)]
    status = module.cuda_resident_conv2d(
        x.data_ptr(), y.data_ptr(), cuda._pointer(bias), weight.weights.data_ptr(), weight.group_start.data_ptr(),
        weight.taps.data_ptr(), conv.n, conv.h, conv.w, conv.c_in, conv.c_out, *conv.out, *conv.taps, *conv.stride,
        *conv.padding, *conv.dilation, int(epilogue != "none"), int(epilogue == "relu_maxpool2"), *plan.tile,
        steps_of_y[0], *steps_of_y[2:], plan.slab, plan.stages, plan.steps, plan.slots, plan.columns, plan.variant,
        plan.blocks, overlap, cuda._DTYPES[x.dtype], *cuda._target(x),
    )  # fmt: skip
    cuda._check(op, module, status)


def _check_variant(
    op: str, variant: int, variants: Sequence[Shape], limits: Limits, block_shape: Sequence[int], overlap: int
) -> None:
    if not 0 <= variant < len(variants):
        raise ValueError(f"{op}: expected variant in 0 to {len(variants) - 1}, got {variant}")
    if variants[variant].wgmma and not limits.wgmma:
        raise ValueError(f"{op}: variant {variant} needs a GPU of compute capability 9.0")
    if overlap and not limits.wgmma:  # what other GPUs run was compiled for sm_80, which cannot wait by itself
        raise ValueError(f"{op}: overlap needs a GPU of compute capability 9.0")
    if block_shape[0] % variants[variant].column != 0:
        raise ValueError(f"{op}: variant {variant} takes blocks of a multiple of {variants[variant].column} channels")


def _check_weight(
    op: str, values: Tensor, crow: Tensor, bias: Tensor | None, c_out: int, block_shape: Sequence[int]
) -> None:
    block_out, block_in = block_shape
    rows = -(-c_out // block_out)
    if crow.numel() != rows + 1 or values.dim() != 3 or tuple(values.shape[1:]) != (block_out, block_in):
        raise ValueError(
            f"{op}: expected values (nnz_blocks, {block_out}, {block_in}) and {rows + 1} crow_indices, "
            f"got {tuple(values.shape)} and {crow.numel()}"
        )
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ValueError(f"{op}: expected bias of shape ({c_out},), got {tuple(bias.shape)}")


def _pair(value: Sequence[int]) -> Pair:
    return (value[0], value[1])


def launch_stem_conv2d(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor | None,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """A dense 3x3 convolution of images to 64 channels, its ReLU, and the block-sparse 3x3 one behind it.

    Both have stride 1 and padding 1. What lies between them stays in shared memory, rounded to x's dtype.

    Args:
        x: ``(N, 3, H, W)``, W even, float16 or bfloat16 on the GPU.
        first_weight: ``(64, 3, 3, 3)``.
        first_bias: ``(64,)`` or None.
        values: the stored blocks of the second convolution, whose weight is ``(C_out <= 64, 64, 3, 3)`` in blocks of 64
            output channels.
        crow_indices: its row pointers, as `launch_bsr_conv2d` takes them.
        col_indices: its block columns, as `launch_bsr_conv2d` takes them.
        bias: of the second convolution, ``(C_out,)`` or None.
        packed: what `pack_stem` returned for both weights, or anything else: then they are packed in this call, which
            waits for the device and is refused while a CUDA graph is captured.
        epilogue: of the second convolution.
        config: ``variant`` of `resident_plan.STEM_VARIANTS`; ``overlap`` as `launch_bsr_conv2d` has it.

    Returns:
        ``(N, C_out, H, W)``, pooled where asked for, channels_last.

    Raises:
        ValueError, TypeError, RuntimeError: as `launch_bsr_conv2d`.
    """
    op, config = "stem_conv2d", config or {}
    module = cuda._module(
        op,
        x,
        first_weight=first_weight,
        first_bias=first_bias,
        values=values,
        bias=bias,
        crow_indices=crow_indices,
        col_indices=col_indices,
    )
    if x.dim() != 4 or x.shape[1] != 3 or x.shape[3] % 2 != 0 or x.dtype == torch.float32:
        raise ValueError(f"{op}: expected x of shape (N, 3, H, even W) in 16 bits, got {tuple(x.shape)} of {x.dtype}")
    c_out, *rest = weight_shape
    if rest != [_STEM_CHANNELS, 3, 3] or c_out > 64 or c_out % 8 or block_shape[0] != 64 or block_shape[1] % 16:
        raise ValueError(
            f"{op}: expected weight_shape (up to 64, {_STEM_CHANNELS}, 3, 3) and blocks of 64 x multiples of 16, "
            f"got {tuple(weight_shape)} and {tuple(block_shape)}"
        )
    if tuple(first_weight.shape) != (_STEM_CHANNELS, 3, 3, 3):
        raise ValueError(f"{op}: expected first_weight ({_STEM_CHANNELS}, 3, 3, 3), got {tuple(first_weight.shape)}")
    if first_bias is not None and tuple(first_bias.shape) != (_STEM_CHANNELS,):
        raise ValueError(f"{op}: expected first_bias ({_STEM_CHANNELS},), got {tuple(first_bias.shape)}")
    _check_weight(op, values, crow_indices, bias, c_out, block_shape)
    pool = epilogue == "relu_maxpool2"
    if epilogue not in ("none", "relu", "relu_maxpool2"):
        raise ValueError(f"{op}: expected epilogue 'none', 'relu' or 'relu_maxpool2', got {epilogue!r}")
    n, _, h, w = x.shape
    out = (h // 2, w // 2) if pool else (h, w)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty((n, c_out, *out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    values, crow, col = values.contiguous(), crow_indices.contiguous(), col_indices.contiguous()
    first_bias, bias = (b if b is None else b.contiguous() for b in (first_bias, bias))
    limits = _limits(x)
    variant = config.get("variant", int(limits.wgmma))
    _check_variant(op, variant, STEM_VARIANTS, limits, block_shape, config.get("overlap", 0))
    shape = STEM_VARIANTS[variant]
    if kind_of(packed) is StemPack:
        pack = StemPack(*packed)
        first = pack.first
        if tuple(first.shape) != (2, 1024) or first.dtype != x.dtype or first.device != x.device:
            raise ValueError(f"{op}: expected packed first weights (2, 1024) of {x.dtype}, got {tuple(first.shape)}")
        _check_packed(op, pack.second, crow, col, values, weight_shape, block_shape, shape.column)
    else:
        gathered_packs.refuse_a_capture(op, values)
        pack = pack_stem(first_weight, values, crow, col, weight_shape, block_shape, variant)
    first, weight = pack.first, pack.second
    steps = int(weight.most_steps[0])
    plan = resident_plan.plan_stem(variant, n, h, w, steps, limits.shared_memory, limits.processors)
    if plan is None:
        raise ValueError(f"{op}: expected images of rows that fit shared memory, got {tuple(x.shape)}")
    status = module.cuda_stem_conv2d(
        x.data_ptr(),
        y.data_ptr(),
        first.data_ptr(),
        cuda._pointer(first_bias),
        weight.weights.data_ptr(),
        cuda._pointer(bias),
        weight.taps.data_ptr(),
        n,
        h,
        w,
        c_out,
        h,
        w,
        3,
        3,
        1,
        1,
        1,
        1,
        1,
        1,
        int(epilogue != "none"),
        int(pool),
        *plan.tile,
        steps,
        variant,
        plan.blocks,
        config.get("overlap", 0),
        cuda._DTYPES[x.dtype],
        *cuda._target(x),
    )
    cuda._check(op, module, status)
    return y


def pack_stem(
    first_weight: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    variant: int | None = None,
) -> StemPack:
    """Both weights packed as `launch_stem_conv2d` takes them, for values' device. Waits for the device."""
    shape = STEM_VARIANTS[int(_limits(values).wgmma) if variant is None else variant]
    first = resident_plan.pack_first(first_weight, shape.wgmma)
    return StemPack(first, *resident_plan.pack(values, crow_indices, col_indices, weight_shape, block_shape, shape))
