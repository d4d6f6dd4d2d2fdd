"""Low-rank convolution, forward: channels_last implicit GEMM, the 1x1 factor behind an RxS one fused.

    h[m, k] = sum over taps t, channels c of x[pixel m at tap t, c] v[k, t, c]
    y[m, n] = epilogue(sum over k of h[m, k] u[n, k] + bias[n])

with m an output pixel (n, p, q). One program computes BLOCK_M pixels of h for the whole rank in registers (float32),
rounds them once to x's dtype, as the unfused pair of layers does, and multiplies them with its share of U's rows: h
never leaves the chip. The same kernel without U is a plain convolution with bias and ReLU in its epilogue.

What is fused, by kind:
- svd (RxS, 1x1): one launch.
- tucker2 (1x1, RxS, 1x1): two. The RxS factor reads R*S of the first factor's pixels for each of its own, so computing
  those again would cost R*S times the first factor's multiply-adds, and a shared-memory tile cannot be shifted by rows
  in Triton. The first factor runs alone, the other two as svd's.
- tai (Rx1, 1xS): two, for the same reason: recomputed, the first factor would cost S times its multiply-adds, at equal
  channel counts twice the time of the layer. Bias and ReLU are in the second launch.
A rank above RANK_TILE does not fit the registers beside the output tile: each factor is then a launch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.problems import Pair, conv_output_size, factor_geometry
from slimkernels.kernels.triton.runtime import (
    DTYPES,
    INT32_MAX,
    SHARED_MEMORY_SM80,
    cdiv,
    device_guard,
    device_limits,
    interpreted_dtype,
    next_power_of_2,
    power_of_2_divisor,
)
from slimkernels.kernels.triton.tiles import maximum_nan

EPILOGUES = ("none", "relu")
RANK_TILE = 256


@triton.jit
def low_rank_conv2d_fwd_kernel(
    x_ptr,
    v_ptr,
    u_ptr,
    bias_ptr,
    y_ptr,
    m_total,
    h_in,
    w_in,
    c_in,
    inner,
    c_out,
    p,
    q,
    splits,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    FUSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # FUSED: RANK is a power of two, at least inner. Otherwise v's rows are dealt to the splits, RANK a program.
    # Triton knows of an argument only whether 16 divides it; of this product, that ALIGN does: loads stay wide.
    if ALIGN < 16:
        c_in = c_in // ALIGN * ALIGN
    split = tl.program_id(0) % splits
    tile_m = tl.program_id(0) // splits
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_m = tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK).to(index_type)
    if not FUSED:
        offs_r += split * RANK
    mask_m = offs_m < m_total
    mask_r = offs_r < inner
    pixel = offs_m % (p * q)
    first_row = pixel // q * STRIDE_H - PAD_H
    first_col = pixel % q * STRIDE_W - PAD_W
    image_ptr = x_ptr + offs_m // (p * q) * h_in * w_in * c_in
    v_row_ptr = v_ptr + offs_r[None, :] * (R * S * c_in)

    k_steps = tl.cdiv(c_in, BLOCK_K)
    acc_r = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for step in range(0, R * S * k_steps):
        tap = step // k_steps
        kk = (step - tap * k_steps) * BLOCK_K + offs_k
        row = first_row + tap // S * DIL_H
        col = first_col + tap % S * DIL_W
        inside = mask_m & (row >= 0) & (row < h_in) & (col >= 0) & (col < w_in)
        mask_x = inside[:, None]
        mask_v = mask_r[None, :]
        if not EVEN_K:
            mask_x = mask_x & (kk < c_in)[None, :]
            mask_v = mask_v & (kk < c_in)[:, None]
        x_tile = tl.load((image_ptr + (row * w_in + col) * c_in)[:, None] + kk[None, :], mask=mask_x, other=0.0)
        v_tile = tl.load(v_row_ptr + (tap * c_in + kk)[:, None], mask=mask_v, other=0.0)  # [BLOCK_K, RANK]
        acc_r = tl.dot(x_tile, v_tile, acc_r, input_precision=PRECISION)  # [BLOCK_M, RANK]

    y_row_ptr = y_ptr + offs_m.to(tl.int64)[:, None] * c_out
    if FUSED:
        hidden = acc_r.to(x_ptr.dtype.element_ty)
        for first in range(split * BLOCK_N, c_out, splits * BLOCK_N):
            offs_n = (first + tl.arange(0, BLOCK_N)).to(index_type)
            mask_n = offs_n < c_out
            mask_u = mask_r[:, None] & mask_n[None, :]
            u_tile = tl.load(u_ptr + offs_n[None, :] * inner + offs_r[:, None], mask=mask_u, other=0.0)
            acc = tl.dot(hidden, u_tile, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if HAS_BIAS:
                acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            if RELU:
                acc = maximum_nan(acc, 0.0)
            y_tile = acc.to(y_ptr.dtype.element_ty)
            tl.store(y_row_ptr + offs_n[None, :], y_tile, mask=mask_m[:, None] & mask_n[None, :])
    else:
        if HAS_BIAS:
            acc_r += tl.load(bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc_r = maximum_nan(acc_r, 0.0)
        y_tile = acc_r.to(y_ptr.dtype.element_ty)
        tl.store(y_row_ptr + offs_r[None, :], y_tile, mask=mask_m[:, None] & mask_r[None, :])


def default_config(
    m_total: int,
    inner: int,
    c_out: int | None,
    dtype: torch.dtype,
    *,
    c_in: int = 16,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> dict[str, int]:
    """Tile constants of one launch, by arithmetic (nothing here is measured on a GPU).

    Args: m_total output pixels; inner output channels of the RxS factor; c_out those of the 1x1 factor behind it, None
    without one; c_in input channels; tensor_cores False for IEEE float32; shared_memory bytes one block may use;
    processors the number of SMs to keep busy.
    Returns: BLOCK_M, BLOCK_N, BLOCK_K, RANK, SPLITS, num_warps, num_stages.
    """
    wide = max(next_power_of_2(inner), 16)
    if c_out is None:
        wide = min(wide, 128 if tensor_cores else 64)
    if tensor_cores:
        # The accumulators of h and of the output tile take 64 + 16 registers a thread at 64 x 256 x 64, 8 warps.
        block_m = 128 if wide <= 128 else 64
        block_n = 64 if dtype.itemsize == 2 else 32
        # Pieces of fewer than 8 bytes, an address each: a stage of 64 would spill.
        block_k, warps = 64 if dtype.itemsize == 2 and c_in % 4 == 0 else 32, 8
    else:
        block_m, block_n, block_k, warps = 32, 32 if wide <= 128 else 16, 16, 8
    block_m = min(block_m, max(16, next_power_of_2(m_total)))
    if tensor_cores and block_m < 64 and wide <= 128:
        warps = 4
    if c_out is None:
        splits = cdiv(inner, wide)
    else:
        splits = min(cdiv(c_out, block_n), max(1, processors // cdiv(m_total, block_m)))
    stages = 4
    while stages > 1 and _shared_bytes(stages, block_m, block_n, block_k, wide, dtype.itemsize) > shared_memory:
        stages -= 1
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "RANK": wide,
        "SPLITS": splits,
        "num_warps": warps,
        "num_stages": stages,
    }


def _shared_bytes(stages: int, block_m: int, block_n: int, block_k: int, wide: int, itemsize: int) -> int:
    """Upper bound of the shared memory of a launch: h and the larger of the two loops' buffers."""
    return itemsize * (stages * max((block_m + wide) * block_k, wide * block_n) + block_m * wide)


def _convolve(
    x: Tensor,
    v: Tensor,
    u: Tensor | None,
    bias: Tensor | None,
    step: tuple[Pair, Pair, Pair],
    relu: bool,
    config: Mapping[str, int] | None,
) -> Tensor:
    """One launch: the convolution v and, fused, the 1x1 convolution u behind it; x and v channels_last."""
    (n, c_in, h_in, w_in), (inner, _, r, s) = x.shape, v.shape
    stride, padding, dilation = step
    p = conv_output_size(h_in, r, stride[0], padding[0], dilation[0])
    q = conv_output_size(w_in, s, stride[1], padding[1], dilation[1])
    c_out = inner if u is None else u.shape[0]
    y = torch.empty((n, c_out, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    m_total = n * p * q
    # For mypy: torch 2.9 has it, torch's annotations do not.
    precision = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    if config is None or (u is not None and inner > config["RANK"]):
        tensor_cores = x.dtype != torch.float32 or precision == "tf32"
        outer = None if u is None else c_out
        config = default_config(
            m_total, inner, outer, x.dtype, c_in=c_in, tensor_cores=tensor_cores, **device_limits(x)
        )
    splits = cdiv(inner, config["RANK"]) if u is None else config["SPLITS"]
    index_64 = max(x.numel(), v.numel(), m_total * c_out) > INT32_MAX or bool(config.get("INDEX_64", False))
    with device_guard(x):
        low_rank_conv2d_fwd_kernel[(cdiv(m_total, config["BLOCK_M"]) * splits,)](
            x,
            v,
            v if u is None else u,
            v if bias is None else bias,
            y,
            m_total,
            h_in,
            w_in,
            c_in,
            inner,
            c_out,
            p,
            q,
            splits,
            R=r,
            S=s,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            PAD_H=padding[0],
            PAD_W=padding[1],
            DIL_H=dilation[0],
            DIL_W=dilation[1],
            FUSED=u is not None,
            EVEN_K=c_in % config["BLOCK_K"] == 0,
            ALIGN=power_of_2_divisor(c_in, 16),
            HAS_BIAS=bias is not None,
            RELU=relu,
            INDEX_64=index_64,
            PRECISION=precision,
            RANK=config["RANK"],
            BLOCK_M=config["BLOCK_M"],
            BLOCK_N=config["BLOCK_N"],
            BLOCK_K=config["BLOCK_K"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return y


def launch(
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
    """The low-rank convolution in one launch (svd) or two (tai, tucker2), sums in float32.

    Args:
        x: (N, C_in, H, W) float32 | float16 | bfloat16.
        factors: convolution weights in the order they are applied, bias: (C_out,) or None, in x's dtype.
        packed: not used.
        kind: "svd", "tai" or "tucker2".
        epilogue: "none" or "relu".
        config: BLOCK_M, BLOCK_N, BLOCK_K, RANK, SPLITS, num_warps, num_stages of every launch; None takes
            `default_config`. INDEX_64=1 forces 64-bit addresses, which are otherwise used from 2^31 elements on.

    Intermediates are rounded to x's dtype. float32 multiplies in IEEE precision unless
    torch.backends.cudnn.conv.fp32_precision is "tf32".

    Returns: (N, C_out, P, Q), channels_last.
    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"low_rank_conv2d: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in (*((f"factors[{i}]", f) for i, f in enumerate(factors)), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"low_rank_conv2d: expected {name} of x's dtype {x.dtype}, got {tensor.dtype}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"low_rank_conv2d: expected epilogue in {EPILOGUES}, got {epilogue!r}")
    geometry = factor_geometry(kind, len(factors), _pair(stride), _pair(padding), _pair(dilation))
    compute = interpreted_dtype(x.dtype)
    y = x.to(compute).contiguous(memory_format=torch.channels_last)
    weights = [f.to(compute).contiguous(memory_format=torch.channels_last) for f in factors]
    shift = None if bias is None else bias.to(compute).contiguous()
    fused = kind != "tai" and weights[-2].shape[0] <= RANK_TILE
    relu, last = epilogue == "relu", len(weights) - 1
    for i in range(last - 1 if fused else last + 1):
        own_bias = shift if i == last else None
        y = _convolve(y, weights[i], None, own_bias, geometry[i], relu and i == last, config)
    if fused:
        y = _convolve(y, weights[-2], weights[-1], shift, geometry[-2], relu, config)
    return y.to(x.dtype)


def _pair(value: Sequence[int]) -> Pair:
    return value[0], value[1]
