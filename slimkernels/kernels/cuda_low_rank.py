"""Launchers of the fused low-rank kernels on tensor cores (csrc/cuda/low_rank.cuh): linear layers and convolutions.

    h = x V^T, rounded once to x's dtype;   y = epilogue(h U^T + bias)

V is a matrix, or a convolution whose output h a 1x1 convolution U takes: svd's two factors, tucker2's last two. h stays
in shared memory. `low_rank_plan` says how it runs. Neither is a choice of ``auto``: they run on explicit request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.kernels import cuda, cuda_tensor_cores, low_rank_plan
from slimkernels.kernels.low_rank_plan import MAX_DEPTH_SPLITS, MAX_RANK, MAX_STAGES, VARIANTS, Plan, Work
from slimkernels.kernels.problems import (
    INT32_MAX,
    LowRankConvProblem,
    LowRankLinearProblem,
    Pair,
    Problem,
    SizedProblem,
    check_geometry,
    conv_output_image,
    factor_geometry,
)

CONV_NAME = "low_rank_conv2d__cuda_tensor_cores"
_CONFIGS = frozenset({"variant", "stages", "splits", "depth_splits", "overlap"})
_MAX_PLACES = 65535  # of a kernel and its geometry: kMaxPlaces of csrc/bindings/cuda.h


def _reason(rows: int, image: int, work: tuple[int, int, int], c_in: int) -> str | None:
    """The same for both layers: `work` is depth, rank and output channels, `image` the numbers of one of x."""
    depth, rank, c_out = work
    if rank > MAX_RANK:
        return f"the intermediate of at most {MAX_RANK} channels lies in shared memory, not {rank}"
    if c_in % 8 != 0 or c_out % 8 != 0:
        return f"channels are copied eight at a time, not {c_in} to {c_out}"
    if rows > INT32_MAX - 128:  # a tile's rows beyond the last are counted too
        return "there are 2**31 - 128 rows or output pixels or more"
    if max(2 * image, 2 * depth, 2 * c_out) > INT32_MAX:
        return "an image of x has 2**31 bytes or more, or the depth or the outputs are 2**30 or more"
    return None


def linear_reason(problem: Problem) -> str | None:
    """None where a linear layer runs on tensor cores, else why ``low_rank_linear__cuda`` runs its fp32 sums."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"tensor cores multiply float16 and bfloat16, not {problem.dtype}"
    if not isinstance(problem, LowRankLinearProblem):
        return None
    k = problem.in_features
    return _reason(problem.m, k, (k, problem.rank, problem.out_features), k)


def conv_reason(problem: Problem) -> str | None:
    """None where the kernel takes the problem's shapes, else why not."""
    if not isinstance(problem, LowRankConvProblem):
        return None
    if problem.kind == "tai":
        return "its last factor is no 1x1 convolution, which reads the one before it pixel by pixel"
    geometry = factor_geometry(
        problem.kind, len(problem.factor_shapes), problem.stride, problem.padding, problem.dilation
    )[-2]
    rank, c_in, r, s = problem.factor_shapes[-2]
    if max(r, s, *(number for pair in geometry for number in pair)) > _MAX_PLACES:
        return f"a side of the kernel, its stride, padding or dilation is above {_MAX_PLACES}"
    c_out = problem.factor_shapes[-1][0]
    return _reason(problem.rows, problem.h * problem.w * c_in, (r * s * c_in, rank, c_out), c_in)


def on_tensor_cores(problem: SizedProblem) -> bool:
    """Whether a problem that a row of the kernel table takes runs on tensor cores there."""
    return not isinstance(problem, LowRankLinearProblem) or linear_reason(problem) is None


def work_of(problem: LowRankLinearProblem | LowRankConvProblem) -> Work:
    """What a plan needs to know of a linear layer, or of a convolution's last two factors."""
    if isinstance(problem, LowRankLinearProblem):
        m, k, n, rank = problem.m, problem.in_features, problem.out_features, problem.rank
        return Work(m, k, rank, n, 2 * (m * (k + n) + rank * (k + n)))
    (rank, c_in, r, s), c_out = problem.factor_shapes[-2], problem.factor_shapes[-1][0]
    pixels = problem.n * problem.h * problem.w
    nbytes = 2 * (pixels * c_in + problem.rows * c_out + rank * (r * s * c_in + c_out))
    return Work(problem.rows, r * s * c_in, rank, c_out, nbytes)


def _aligned(t: Tensor) -> Tensor:
    """``t``, which is dense, where 16 divides its address, else a copy."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _plan(op: str, x: Tensor, work: Work, config: Mapping[str, int]) -> Plan:
    limits = cuda_tensor_cores._limits(x)
    bounds = {"variant": (0, len(VARIANTS) - 1), "stages": (2, MAX_STAGES), "splits": (1, _MAX_PLACES),
              "depth_splits": (1, MAX_DEPTH_SPLITS), "overlap": (0, 1)}  # fmt: skip
    if set(config) - _CONFIGS:
        raise ValueError(f"{op}: expected config of {', '.join(sorted(_CONFIGS))}, got {dict(config)}")
    for name, value in config.items():
        low, high = bounds[name]
        if not low <= value <= high:
            raise ValueError(f"{op}: expected {name} in {low} to {high}, got {value}")
    if config.get("overlap") and not limits.wgmma:  # other GPUs run what was compiled for sm_80, which cannot wait
        raise ValueError(f"{op}: overlap needs a GPU of compute capability 9.0")
    if "variant" in config:
        most = VARIANTS[config["variant"]].rank
        if work.rank > most:
            raise ValueError(f"{op}: variant {config['variant']} takes a rank of at most {most}, not {work.rank}")
    gpu = low_rank_plan.machine(limits.processors, limits.shared_memory)
    plan = low_rank_plan.plan(work, gpu, {name: v for name, v in config.items() if name != "overlap"})
    if plan is None:
        raise ValueError(
            f"{op}: expected a plan within {limits.shared_memory} bytes of shared memory, got {dict(config)}"
        )
    return plan


def _run(
    op: str,
    x: Tensor,
    y: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None,
    image: tuple[int, int, int],
    out_image: Pair,
    taps: Pair,
    geometry: tuple[Pair, Pair, Pair],
    relu: int,
    work: Work,
    config: Mapping[str, int],
) -> None:
    """Fill y; x and y are dense in (n, h, w, c) order, V in (rank, r, s, c_in) order, and `image` is x's (n, h, w)."""
    module = cuda._require(op, x)
    plan = _plan(op, x, work, config)
    # Copies may die once the launch is enqueued: the caching allocator reuses their memory in this stream's order.
    rank, row = work.rank, -(-work.rank // 8) * 8
    U = U.contiguous() if row == rank else F.pad(U, (0, row - rank))
    x, V, U = _aligned(x), _aligned(V), _aligned(U)
    bias = bias if bias is None else bias.contiguous()
    partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device) if plan.partial else None
    overlap = config.get("overlap", int(cuda_tensor_cores._limits(x).wgmma)) if plan.depth_splits > 1 else 0
    status = module.cuda_low_rank(
        x.data_ptr(),
        y.data_ptr(),
        cuda._pointer(bias),
        U.data_ptr(),
        V.data_ptr(),
        cuda._pointer(partial),
        *image,
        work.depth // (taps[0] * taps[1]),
        work.columns,
        *out_image,
        *taps,
        *geometry[0],
        *geometry[1],
        *geometry[2],
        rank,
        row,
        relu,
        plan.variant,
        plan.stages,
        plan.splits,
        plan.depth_splits,
        overlap,
        cuda._DTYPES[x.dtype],
        *cuda._target(x),
    )
    cuda._check(op, module, status)


def launch_low_rank_linear(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    epilogue: str,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """``epilogue((x V^T) U^T + bias)`` on tensor cores, or as `cuda.launch_low_rank_linear` where `linear_reason` says.

    Args:
        x: ``(..., in)``, float32, float16 or bfloat16 on the GPU.
        U: ``(out, rank)``; a rank that 8 does not divide makes a copy of it.
        V: ``(rank, in)``.
        bias: ``(out,)`` or None.
        packed: not used.
        epilogue: ``none`` or ``relu``.
        config: ``variant`` of `low_rank_plan.VARIANTS`, ``stages`` of the ring, ``splits`` of the outputs,
            ``depth_splits`` of the first product, which then is a kernel of its own; ``overlap`` 0 keeps the second
            kernel from beginning before the first has ended. Taken on tensor cores only.

    The intermediate is rounded once to x's dtype, on tensor cores alone: with fp32 sums it stays fp32.

    Returns:
        ``(..., out)``, contiguous, on torch's current stream.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
        RuntimeError: the kernels cannot run here, or CUDA reports an error.
    """
    op = "low_rank_linear"
    _, relu = cuda._check_low_rank_linear(op, x, U, V, bias, epilogue)
    (out_features, rank), in_features = U.shape, V.shape[1]
    rows = x.numel() // max(in_features, 1)
    problem = LowRankLinearProblem(rows, in_features, out_features, rank, x.dtype, x.device.type, epilogue)
    reason = linear_reason(problem)
    if reason is not None:
        if config:
            raise ValueError(f"{op}: no configuration without tensor cores, got {dict(config)}: {reason}")
        return cuda.launch_low_rank_linear(x, U, V, bias, packed, epilogue)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        one: Pair = (1, 1)
        geometry = one, (0, 0), one
        x, V = x.contiguous(), V.contiguous()
        _run(op, x, y, V, U, bias, (rows, 1, 1), one, one, geometry, relu, work_of(problem), config or {})
    return y


def launch_low_rank_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    packed: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kind: str,
    epilogue: str,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """A low-rank convolution whose last factor is 1x1, that one and the factor before it fused, on tensor cores.

    The first factor of ``tucker2``, also 1x1, is torch's matrix product of the pixels.

    Args:
        x: ``(N, C_in, H, W)``, float16 or bfloat16 on the GPU; channels_last is taken as it is.
        factors: convolution weights in the order they are applied; channels_last is taken as it is.
        bias: ``(C_out,)`` or None, added after the last factor, as is the epilogue.
        packed: not used.
        stride: of the convolution that the factors replace.
        padding: of the convolution that the factors replace.
        dilation: of the convolution that the factors replace.
        kind: ``svd`` or ``tucker2``.
        epilogue: ``none`` or ``relu``.
        config: as `launch_low_rank_linear` takes it.

    Intermediates are rounded to x's dtype.

    Returns:
        ``(N, C_out, P, Q)``, channels_last, on torch's current stream.

    Raises:
        ValueError, TypeError: a shape, device, dtype or kind does not fit.
        RuntimeError: the kernel cannot run here, or CUDA reports an error.
    """
    op = "low_rank_conv2d"
    cuda._module(op, x, **{f"factors[{i}]": f for i, f in enumerate(factors)}, bias=bias)
    relu = cuda._relu(op, epilogue)
    check_geometry(op, stride, padding, dilation)
    shapes = tuple((f.shape[0], f.shape[1], f.shape[2], f.shape[3]) for f in factors)
    follow = len(shapes) >= 2 and all(b[1] == a[0] for a, b in pairwise(shapes))
    if kind != "tai" and not (follow and shapes[-1][2:] == (1, 1)):  # `conv_reason` refuses tai
        raise ValueError(f"{op}: expected factors that follow each other, the last one 1x1, got {shapes}")
    if x.dim() != 4 or x.shape[1] != shapes[0][1]:
        raise ValueError(f"{op}: expected x of shape (N, {shapes[0][1]}, H, W), got {tuple(x.shape)}")
    n, _, h, w = x.shape
    pairs = _pair(stride), _pair(padding), _pair(dilation)
    problem = LowRankConvProblem(n, h, w, kind, shapes, *pairs, x.dtype, x.device.type, epilogue)
    reason = conv_reason(problem)
    if reason is not None or x.dtype == torch.float32:
        raise ValueError(f"{op}: the tensor-core kernel does not take this: {reason or 'float32'}")
    if bias is not None and tuple(bias.shape) != (shapes[-1][0],):
        raise ValueError(f"{op}: expected bias of shape ({shapes[-1][0]},), got {tuple(bias.shape)}")
    taps = shapes[-2][2:]
    out = conv_output_image((h, w), taps, *pairs)
    if min(out) < 1:
        raise ValueError(f"{op}: expected an output of at least 1x1, got {out[0]}x{out[1]} from x {tuple(x.shape)}")
    y = torch.empty((n, shapes[-1][0], *out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    if kind == "tucker2":
        pixels = x.permute(0, 2, 3, 1) @ factors[0].flatten(1).t()
        x = pixels.permute(0, 3, 1, 2)
    V = factors[-2].contiguous(memory_format=torch.channels_last)
    U = factors[-1].flatten(1)
    x = x.contiguous(memory_format=torch.channels_last)
    _run(op, x, y, V, U, bias, (n, h, w), out, taps, pairs, relu, work_of(problem), config or {})
    return y


def _pair(value: Sequence[int]) -> Pair:
    return (value[0], value[1])
