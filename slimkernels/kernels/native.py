"""Launchers of the C++ CPU kernels. Only this file hands out CPU addresses: what the kernels trust is checked here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from slimkernels import _extension
from slimkernels.kernels.problems import Problem, conv_output_size


@lru_cache(maxsize=1)
def _library() -> tuple[ModuleType | None, str | None, tuple[str, ...]]:
    module, reason = _extension.load()
    return module, reason, tuple(module.isas()) if module is not None else ()


def unavailable_reason(isa: str) -> str | None:
    """None when the native kernel of this instruction set can run here, else why not."""
    module, reason, isas = _library()
    if module is None:
        return f"slimkernels._C is not loaded: {reason}"
    if isa in isas:
        return None
    return f"{isa} is not built or not supported by this CPU (available: {', '.join(isas)})"


def shape_reason(problem: Problem) -> str | None:
    """None when the strip kernels take the problem's block shape: whole strips of 8 output channels, or why not."""
    if problem.block_shape[0] % 8:
        return f"block_out must be a multiple of 8, got {problem.block_shape[0]}"
    return None


def strip_width(block_out: int, isa: str) -> int:
    """Output channels of one microkernel call; it divides ``block_out``, so a strip reads one block row only."""
    if isa == "avx512" and block_out % 32 == 0:
        return 32
    return 16 if block_out % 16 == 0 else 8


def pack_strips(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    strip: int,
) -> list[Tensor]:
    """Strip pack of csrc/kernels.h: ``[weights (entries, strip), channels (entries,), tap_ptr (strips * taps + 1,)]``.

    Args:
        values, crow_indices, col_indices: a valid BSR weight on the CPU; its spare capacity is left out.
        weight_shape: ``(C_out, C_in, R, S)``.
        block_shape: ``(block_out, block_in)``.
        strip: output channels per strip, a divisor of ``block_out``.
    """
    c_out, c_in, r, s = weight_shape
    block_out, block_in = block_shape
    taps, groups, per_block = r * s, -(-c_in // block_in), block_out // strip
    strips = -(-c_out // strip)
    crow = crow_indices.long()
    counts = crow[1:] - crow[:-1]
    nnz = int(crow[-1])
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    tap = torch.div(col_indices[:nnz], groups, rounding_mode="floor").long()
    first_channel = (col_indices[:nnz].long() - tap * groups) * block_in

    # Order of the entries: strip, then block column, then channel inside the block.
    sub = torch.arange(per_block)
    position = crow[:-1][row][:, None] * (per_block - 1) + sub * counts[row][:, None] + torch.arange(nnz)[:, None]
    order = torch.empty(nnz * per_block, dtype=torch.long)
    order[position.reshape(-1)] = torch.arange(nnz * per_block)
    weights = values.detach()[:nnz].reshape(nnz, per_block, strip, block_in).transpose(2, 3)
    weights = weights.reshape(nnz * per_block, block_in, strip)
    channels = first_channel[:, None, None] + torch.arange(block_in)
    channels = channels.expand(nnz, per_block, block_in).reshape(nnz * per_block, block_in)
    key = ((row[:, None] * per_block + sub) * taps + tap[:, None]).reshape(-1)
    if per_block > 1:
        weights, channels, key = weights[order], channels[order], key[order]
    key = key[:, None].expand(-1, block_in).reshape(-1)
    weights, channels = weights.reshape(-1, strip), channels.reshape(-1)
    if strips * strip != counts.numel() * block_out or groups * block_in != c_in:
        inside = (channels < c_in) & (key < strips * taps)
        weights, channels, key = weights[inside], channels[inside], key[inside]
    tap_ptr = torch.zeros(strips * taps + 1, dtype=torch.int32)
    tap_ptr[1:] = torch.bincount(key, minlength=strips * taps).cumsum(0)
    return [weights.contiguous(), channels.to(torch.int32), tap_ptr]


def launch_bsr_conv2d(
    isa: str, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    packed: Sequence[Tensor], weight_shape: Sequence[int], block_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], epilogue: str,
) -> Tensor:  # fmt: skip
    """Block-sparse convolution of a float32 CPU tensor; x channels_last.

    Without ``packed`` the weight is packed in this call.

    Raises:
        RuntimeError: the native kernel failed (out of memory).
    """
    c_out, c_in, r, s = weight_shape
    if not packed:
        packed = pack_strips(
            values, crow_indices, col_indices, weight_shape, block_shape, strip_width(block_shape[0], isa)
        )
    n, _, h, w = x.shape
    p = conv_output_size(h, r, stride[0], padding[0], dilation[0])
    q = conv_output_size(w, s, stride[1], padding[1], dilation[1])
    pool = epilogue == "relu_maxpool2"
    y = torch.empty(
        (n, c_out, p // 2, q // 2) if pool else (n, c_out, p, q), dtype=x.dtype, memory_format=torch.channels_last
    )
    _run(isa, x, y, bias, packed, n, h, w, c_in, c_out, p, q, r, s, stride, padding, dilation, epilogue != "none", pool)
    return y


def launch_bsr_linear(
    isa: str, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None,
    packed: Sequence[Tensor], weight_shape: Sequence[int], block_shape: Sequence[int], epilogue: str,
) -> Tensor:  # fmt: skip
    """Block-sparse linear layer of a contiguous float32 CPU tensor (..., in): the 1x1 convolution of its rows."""
    out_features, in_features = weight_shape
    if not packed:
        packed = pack_strips(
            values, crow_indices, col_indices, (*weight_shape, 1, 1), block_shape, strip_width(block_shape[0], isa)
        )
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    m = x.numel() // in_features
    unit = (1, 1)
    _run(
        isa,
        x,
        y,
        bias,
        packed,
        m,
        1,
        1,
        in_features,
        out_features,
        1,
        1,
        1,
        1,
        unit,
        (0, 0),
        unit,
        epilogue != "none",
        False,
    )
    return y


def peak_flops(isa: str | None = None, seconds: float = 0.2) -> float:
    """Measured fp32 multiply-add rate of this CPU at torch's thread count, FLOP/s (2 per multiply-add).

    The best of several bursts.

    Args:
        isa: instruction set, by default the highest that runs here.
        seconds: about how long to measure.

    Raises:
        ValueError: the native kernels of this instruction set cannot run here.
    """
    isa = isa or (_library()[2] or ("scalar",))[0]
    reason = unavailable_reason(isa)
    if reason is not None:
        raise ValueError(f"peak_flops: {reason}")
    module, threads, best = _library()[0], torch.get_num_threads(), 0.0
    assert module is not None
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        done = module.multiply_adds_f32(isa, 200_000, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best


def _run(
    isa: str, x: Tensor, y: Tensor, bias: Tensor | None, packed: Sequence[Tensor], n: int, h: int, w: int, c_in: int,
    c_out: int, p: int, q: int, r: int, s: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    relu: bool, pool: bool,
) -> None:  # fmt: skip
    weights, channels, tap_ptr = packed
    strip = weights.shape[1]
    if y.numel() == 0:
        return
    if max(h * w * c_in, p * q * c_out, weights.shape[0]) >= 2**31:
        raise ValueError("bsr_conv2d: expected images and entry counts below 2**31 elements")
    if tap_ptr.numel() != -(-c_out // strip) * r * s + 1 or channels.numel() != weights.shape[0]:
        raise ValueError(
            f"bsr_conv2d: expected a strip pack of {-(-c_out // strip)} strips and {r * s} taps, "
            f"got tap_ptr of length {tap_ptr.numel()}"
        )
    module = _library()[0]
    assert module is not None
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    status = module.conv2d_f32(
        isa, x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), weights.data_ptr(),
        channels.data_ptr(), tap_ptr.data_ptr(), n, h, w, c_in, c_out, p, q, r, s, stride[0], stride[1], padding[0],
        padding[1], dilation[0], dilation[1], strip, int(relu), int(pool), torch.get_num_threads(),
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"bsr_conv2d: native kernel {isa} failed with status {status}")
