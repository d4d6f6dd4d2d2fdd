"""Launchers of the CUDA C++ kernels (csrc/cuda): the only file that hands out CUDA addresses, so all is checked here.

Simple kernels with fp32 sums on the plain cores, for GPUs and block shapes that the Triton kernels do not take, and an
independent implementation to compare with. `low_rank_conv2d` runs its factors one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from slimkernels import _extension
from slimkernels.kernels.problems import Pair, check_geometry, conv_output_image, factor_geometry

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ERROR_CUDA = 3  # SLIM_ERROR_CUDA of csrc/kernels.h
_MIN_CAPABILITY = (8, 0)  # the lowest architecture csrc/cuda is compiled for


@lru_cache(maxsize=1)
def _static_reason() -> str | None:
    module, reason = _extension.load()
    if module is None:
        return f"slimkernels._C is not loaded: {reason}"
    if not module.build_info()["cuda"]:
        return f"built without CUDA C++: {_extension.missing().get('cuda', 'no nvcc at build time')}"
    if not torch.cuda.is_available():
        return "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
    reason = module.cuda_unavailable_reason()
    return None if reason is None else f"CUDA runtime {_version(module)}: {reason}"


def _version(module: ModuleType) -> str:
    number = module.build_info()["cuda_version"]
    return f"{number // 1000}.{number % 1000 // 10}"


def available() -> str | None:
    """None when the CUDA C++ kernels can run on the current GPU, else why not."""
    reason = _static_reason()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    return None


def _require(op: str, x: Tensor) -> ModuleType:
    """The extension, where it can run on x."""
    reason = available()
    if reason is not None:
        raise RuntimeError(f"{op}: the CUDA C++ kernel cannot run: {reason}")
    if not x.is_cuda:
        raise ValueError(f"{op}: expected x on a CUDA device, got {x.device}")
    module = _extension.load()[0]
    assert module is not None
    return module


def _module(op: str, x: Tensor, **tensors: Tensor | None) -> ModuleType:
    """The extension, after the checks that every launcher shares."""
    module = _require(op, x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: expected x of float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")
        expected = torch.int32 if name in ("crow_indices", "col_indices") else x.dtype
        if tensor.dtype != expected:
            raise TypeError(f"{op}: expected {name} of {expected}, got {tensor.dtype}")
    return module


def _relu(op: str, epilogue: str) -> int:
    if epilogue not in ("none", "relu"):
        raise ValueError(f"{op}: expected epilogue 'none' or 'relu' for a CUDA C++ kernel, got {epilogue!r}")
    return int(epilogue == "relu")


def _check(op: str, module: ModuleType, status: int) -> None:
    if status != 0:
        message = module.cuda_error_message() if status == _ERROR_CUDA else "more tiles than a CUDA grid holds"
        raise RuntimeError(f"{op}: the CUDA C++ kernel failed with status {status}: {message}")


def _target(x: Tensor) -> tuple[int, int]:
    """Device ordinal and handle of the stream that torch would use for x."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run_bsr(
    op: str,
    x: Tensor,
    y: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    image: tuple[int, int, int],
    out_image: tuple[int, int],
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> None:
    """Fill y; x and y are dense in (n, h, w, c) order and `image` is x's (n, h, w)."""
    module = _module(op, x, values=values, crow_indices=crow_indices, col_indices=col_indices, bias=bias)
    relu = _relu(op, epilogue)
    check_geometry(op, stride, padding, dilation)
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    rows = -(-c_out // block_out)
    if crow_indices.numel() != rows + 1 or values.dim() != 3 or tuple(values.shape[1:]) != (block_out, block_in):
        raise ValueError(
            f"{op}: expected values (nnz_blocks, {block_out}, {block_in}) and {rows + 1} crow_indices, "
            f"got {tuple(values.shape)} and {crow_indices.numel()}"
        )
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ValueError(f"{op}: expected bias of shape ({c_out},), got {tuple(bias.shape)}")
    if r * s * -(-c_in // block_in) * block_in >= 2**31:
        raise ValueError(f"{op}: expected fewer than 2**31 weights per output channel, got {tuple(weight_shape)}")
    if y.numel() == 0:
        return
    # Copies may die once the launch is enqueued: the caching allocator reuses their memory in this stream's order.
    values, crow_indices, col_indices = values.contiguous(), crow_indices.contiguous(), col_indices.contiguous()
    bias = bias if bias is None else bias.contiguous()
    status = module.cuda_bsr_conv2d(
        x.data_ptr(),
        y.data_ptr(),
        _pointer(bias),
        values.data_ptr(),
        crow_indices.data_ptr(),
        col_indices.data_ptr(),
        *image,
        c_in,
        c_out,
        *out_image,
        r,
        s,
        *stride,
        *padding,
        *dilation,
        block_out,
        block_in,
        relu,
        _DTYPES[x.dtype],
        *_target(x),
    )
    _check(op, module, status)


def _conv(
    op: str,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> Tensor:
    c_out, c_in, r, s = weight_shape
    if x.dim() != 4 or x.shape[1] != c_in:
        raise ValueError(f"{op}: expected x of shape (N, {c_in}, H, W), got {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    n, _, h, w = x.shape
    p, q = conv_output_image((h, w), (r, s), stride, padding, dilation)
    if p < 1 or q < 1:
        raise ValueError(f"{op}: expected an image that the kernel fits into, got x of shape {tuple(x.shape)}")
    y = torch.empty((n, c_out, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _run_bsr(
        op,
        x,
        y,
        values,
        crow_indices,
        col_indices,
        bias,
        (n, h, w),
        (p, q),
        weight_shape,
        block_shape,
        stride,
        padding,
        dilation,
        epilogue,
    )
    return y


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
) -> Tensor:
    """Block-sparse convolution on the GPU, any block shape; ``packed`` is not used.

    Args:
        x: ``(N, C_in, H, W)``, float32, float16 or bfloat16; channels_last is taken as it is.
        values: the stored blocks of the BSR weight, see `slimkernels.formats.BSRWeight`.
        crow_indices: its row pointers, validated when the weight was built.
        col_indices: its block columns, validated when the weight was built.
        bias: ``(C_out,)`` or None.
        epilogue: ``none`` or ``relu``.

    Returns:
        ``(N, C_out, P, Q)``, channels_last, on torch's current stream.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
        RuntimeError: the kernels cannot run here, or CUDA reports an error.
    """
    return _conv(
        "bsr_conv2d",
        x,
        values,
        crow_indices,
        col_indices,
        bias,
        weight_shape,
        block_shape,
        stride,
        padding,
        dilation,
        epilogue,
    )


def _linear(
    op: str,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    epilogue: str,
) -> Tensor:
    out_features, in_features = weight_shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: expected x of shape (..., {in_features}), got {tuple(x.shape)}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    rows = x.numel() // in_features
    _run_bsr(
        op,
        x,
        y,
        values,
        crow_indices,
        col_indices,
        bias,
        (rows, 1, 1),
        (1, 1),
        (*weight_shape, 1, 1),
        block_shape,
        (1, 1),
        (0, 0),
        (1, 1),
        epilogue,
    )
    return y


def launch_bsr_linear(
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
    """Block-sparse linear layer on the GPU: ``x (..., in)`` -> ``(..., out)``, the 1x1 convolution of its rows.

    Raises:
        ValueError, TypeError, RuntimeError: as `launch_bsr_conv2d`.
    """
    return _linear("bsr_linear", x, values, crow_indices, col_indices, bias, weight_shape, block_shape, epilogue)


def _full_pattern(taps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of a weight that is one block per tap, made on the device without waiting for it."""
    crow = torch.arange(0, taps + 1, taps, dtype=torch.int32, device=device)
    return crow, torch.arange(taps, dtype=torch.int32, device=device)


def _check_low_rank_linear(
    op: str, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, epilogue: str
) -> tuple[ModuleType, int]:
    """The extension and whether ReLU is asked for, after the checks that both launchers of a linear layer share."""
    module = _module(op, x, U=U, V=V, bias=bias)
    relu = _relu(op, epilogue)
    if V.dim() != 2 or x.dim() < 1 or x.shape[-1] != V.shape[1]:
        raise ValueError(f"{op}: expected x (..., in) and V (rank, in), got {tuple(x.shape)} and {tuple(V.shape)}")
    if U.dim() != 2 or U.shape[1] != V.shape[0]:
        raise ValueError(f"{op}: expected U of shape (out, {V.shape[0]}), got {tuple(U.shape)}")
    if bias is not None and tuple(bias.shape) != (U.shape[0],):
        raise ValueError(f"{op}: expected bias of shape ({U.shape[0]},), got {tuple(bias.shape)}")
    return module, relu


def launch_low_rank_linear(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, packed: Sequence[Tensor], epilogue: str
) -> Tensor:
    """``epilogue((x V^T) U^T + bias)`` in one launch; above rank 640, which shared memory cannot hold, in two.

    Args:
        x: ``(..., in)``, float32, float16 or bfloat16 on the GPU.
        U: ``(out, rank)``.
        V: ``(rank, in)``.
        bias: ``(out,)`` or None.
        packed: not used.
        epilogue: ``none`` or ``relu``.

    Raises:
        ValueError, TypeError, RuntimeError: as `launch_bsr_conv2d`.
    """
    op = "low_rank_linear"
    module, relu = _check_low_rank_linear(op, x, U, V, bias, epilogue)
    (out_features, rank), in_features = U.shape, V.shape[1]
    x, U, V = x.contiguous(), U.contiguous(), V.contiguous()
    if rank > module.CUDA_MAX_FUSED_RANK:
        crow, col = _full_pattern(1, x.device)
        inner = _linear(op, x, V[None], crow, col, None, (rank, in_features), (rank, in_features), "none")
        return _linear(op, inner, U[None], crow, col, bias, (out_features, rank), (out_features, rank), epilogue)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    bias = bias if bias is None else bias.contiguous()
    status = module.cuda_low_rank_linear(
        x.data_ptr(),
        y.data_ptr(),
        _pointer(bias),
        U.data_ptr(),
        V.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        rank,
        relu,
        _DTYPES[x.dtype],
        *_target(x),
    )
    _check(op, module, status)
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
) -> Tensor:
    """The factor convolutions one after the other, each through the block-sparse kernel with one full block per tap.

    Args:
        x: ``(N, C_in, H, W)``, float32, float16 or bfloat16 on the GPU.
        factors: convolution weights in the order they are applied.
        bias: ``(C_out,)`` or None, added after the last factor, as is the epilogue.
        packed: not used.
        stride: of the convolution that the factors replace.
        padding: of the convolution that the factors replace.
        dilation: of the convolution that the factors replace.
        kind: ``svd``, ``tai`` or ``tucker2``.
        epilogue: ``none`` or ``relu``.

    Raises:
        ValueError, TypeError, RuntimeError: as `launch_bsr_conv2d`.
    """
    op = "low_rank_conv2d"
    geometry = factor_geometry(kind, len(factors), _pair(stride), _pair(padding), _pair(dilation))
    for i, (factor, (factor_stride, factor_padding, factor_dilation)) in enumerate(zip(factors, geometry, strict=True)):
        c_out, c_in, r, s = factor.shape
        last = i == len(factors) - 1
        values = factor.permute(2, 3, 0, 1).reshape(r * s, c_out, c_in)
        x = _conv(
            op,
            x,
            values,
            *_full_pattern(r * s, x.device),
            bias if last else None,
            (c_out, c_in, r, s),
            (c_out, c_in),
            factor_stride,
            factor_padding,
            factor_dilation,
            epilogue if last else "none",
        )
    return x


def _pair(value: Sequence[int]) -> Pair:
    return (value[0], value[1])
