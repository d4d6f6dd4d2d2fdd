"""Block-sparse convolution, forward, as an implicit GEMM over the stored blocks only.

    y[n, p, q, o] = epilogue(bias[o] + sum over stored blocks (i, j) and k of
                             x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * values[b, o - i*block_out, k])

with block row i = o // block_out, block column j = tap * G + g, tap = r * S + s, c = g * block_in + k < C_in. GEMM
view: M = output pixels (N*P*Q), N = output channels of one block row, K = the row's stored blocks in storage order
(tap-major) times block_in.

x is NHWC (channels_last), y is NHWC. One program computes BLOCK_M pixels x BLOCK_N channels of one block row. A K
stage is BLOCK_K / SLICE gathered slices, each SLICE consecutive channels of one tap; SLICE divides both block_in and
C_in, so a slice lies entirely inside one stored block and entirely inside or outside the image's channels: columns
past C_in are never read. With padding the mainloop masks each (pixel, tap); without padding (1x1, or an input that
carries its own zero ring) no border mask is compiled.

Not done here: split-K, block rows sorted by length, backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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

EPILOGUES = ("none", "relu", "relu_maxpool2")


@triton.jit
def _maximum_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bsr_conv2d_fwd_kernel(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    bias_ptr,
    y_ptr,
    m_total,
    c_in,
    h,
    w,
    c_out,
    p,
    q,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    n_tiles,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    BSR_OUT: tl.constexpr,
    BSR_IN: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_BORDER: tl.constexpr,
    RAGGED_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs of one pixel tile are neighbours, so its input comes from device memory once and from L2 after that.
    tile_n = tl.program_id(0) % n_tiles
    tile_m = tl.program_id(0) // n_tiles
    SUB_TILES: tl.constexpr = (BSR_OUT + BLOCK_N - 1) // BLOCK_N
    row = tile_n // SUB_TILES
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32

    # With POOL the four pixels of a 2x2 window are consecutive in M, and (p, q) count windows.
    m = tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(m, m_total - 1)
    if POOL:
        window = m // 4
        out_q = (window % q) * 2 + m % 2
        out_p = (window // q % p) * 2 + m // 2 % 2
        image = window // q // p
    else:
        out_q = m % q
        out_p = m // q % p
        image = m // q // p
    in_h = (out_p * stride_h - pad_h).to(tl.int32)
    in_w = (out_q * stride_w - pad_w).to(tl.int32)
    offs_m = tl.multiple_of(((image * h + in_h) * w + in_w) * c_in, SLICE)

    first = tl.load(crow_ptr + row)
    count = (tl.load(crow_ptr + row + 1) - first) * BSR_IN
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = (tile_n % SUB_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row_ptr = values_ptr + first.to(index_type) * (BSR_OUT * BSR_IN)

    # The column of step t+1 is loaded in step t and carried in a register: loaded where it is used, the gather below
    # becomes indirect and Triton divides its pipeline depth by the levels of indirection.
    column = tl.load(col_ptr + first + offs_k // BSR_IN, mask=offs_k < count, other=-1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, count, BLOCK_K):
        tap = column // GROUPS
        channel = (column - tap * GROUPS) * BSR_IN + (k + offs_k) % BSR_IN
        tap_h = tap // S * dil_h
        tap_w = (tap - tap // S * S) * dil_w
        offs_x = (tap_h.to(index_type) * w + tap_w) * c_in + channel
        offs_x = tl.multiple_of(tl.max_contiguous(offs_x, SLICE), SLICE)
        stored = column >= 0
        if RAGGED_IN:
            stored = stored & (channel < c_in)
        mask_x = tl.max_constancy(stored, SLICE)[None, :]
        if HAS_BORDER:
            row_inside = (in_h[:, None] + tap_h[None, :]).to(tl.uint32) < h
            mask_x = mask_x & row_inside & ((in_w[:, None] + tap_w[None, :]).to(tl.uint32) < w)
            mask_x = tl.max_constancy(mask_x, [1, SLICE])
        x_tile = tl.load(x_ptr + offs_m[:, None] + offs_x[None, :], mask=mask_x, other=0.0)

        kk = k + offs_k
        offs_w = kk // BSR_IN * (BSR_OUT * BSR_IN) + kk % BSR_IN
        offs_w = tl.multiple_of(tl.max_contiguous(offs_w, SLICE), SLICE)
        mask_w = tl.max_constancy(kk < count, SLICE)[:, None]
        if BSR_OUT % BLOCK_N != 0:
            mask_w = mask_w & (offs_n < BSR_OUT)[None, :]
        w_tile = tl.load(w_row_ptr + offs_w[:, None] + (offs_n * BSR_IN)[None, :], mask=mask_w, other=0.0)

        next_k = k + BLOCK_K + offs_k
        column = tl.load(col_ptr + first + next_k // BSR_IN, mask=next_k < count, other=-1)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    out_channel = row * BSR_OUT + offs_n
    mask_n = (offs_n < BSR_OUT) & (out_channel < c_out)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out_channel, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)
    if POOL:
        acc = tl.reduce(tl.reshape(acc, (BLOCK_M // 4, 4, BLOCK_N)), 1, _maximum_nan)
        offs_y = tile_m.to(tl.int64) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        mask_y = offs_y < m_total // 4
    else:
        offs_y = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_y = offs_y < m_total
    y_tile = y_ptr + offs_y[:, None] * c_out + out_channel[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mask_y[:, None] & mask_n[None, :])


def default_config(
    m_total: int,
    block_rows: int,
    block_shape: Sequence[int],
    c_in: int,
    dtype: torch.dtype,
    *,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> dict[str, int]:
    """Tile constants for one convolution, by arithmetic (nothing here is measured on a GPU).

    Args: m_total output pixels; block_rows rows of the BSR; c_in input channels; tensor_cores False for IEEE float32;
    shared_memory bytes one block may use; processors the number of SMs to keep busy.
    Returns: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """
    block_out, block_in = block_shape
    block_n = min(max(next_power_of_2(block_out), 16), 128)
    block_k = 64 if dtype.itemsize == 2 else 32
    slice_bytes = power_of_2_divisor(c_in, 16), power_of_2_divisor(block_in, 16)
    if not tensor_cores:
        # FMA units take both operands from registers: at K = 16 a 64 x 64 tile needs 168 on sm_80, at K = 32 198.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 16, 4, 3
    elif min(slice_bytes) * dtype.itemsize < 16:
        # Slices below 16 bytes are gathered element by element into registers, 16 a thread at 64 x 32.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 32, 4, 3
    elif block_n == 128 and dtype.itemsize == 2 and shared_memory >= 4 * (256 + 128) * 64 * 2:
        block_m, warps, stages = 256, 8, 4
    else:
        block_m, warps, stages = 128, 8 if block_n == 128 else 4, 4
    floor = min(64, max(16, next_power_of_2(m_total)))
    tiles_n = block_rows * cdiv(block_out, block_n)
    while block_m > floor and (block_m >= 2 * m_total or cdiv(m_total, block_m) * tiles_n < processors):
        block_m //= 2
    if block_m < 128:
        warps = 4
    while stages > 2 and stages * (block_m + block_n) * block_k * dtype.itemsize > shared_memory:
        stages -= 1
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def _check(op: str, x: Tensor, values: Tensor, bias: Tensor | None, epilogue: str) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        got = values.dtype if values.dtype != x.dtype else bias.dtype  # type: ignore[union-attr]
        raise TypeError(f"{op}: expected values and bias of x's dtype {x.dtype}, got {got}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"{op}: expected epilogue in {EPILOGUES}, got {epilogue!r}")


def _launch(
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
    precision: str,
    config: Mapping[str, int] | None,
) -> Tensor:
    n, c_in, h, w = x.shape
    c_out, _, r, s = weight_shape
    block_out, block_in = block_shape
    pool = epilogue == "relu_maxpool2"
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    if pool:
        p, q = p // 2, q // 2
    y = torch.empty((n, c_out, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    m_total = n * p * q * (4 if pool else 1)
    if config is None:
        tensor_cores = x.dtype != torch.float32 or precision == "tf32"
        block_rows = cdiv(c_out, block_out)
        config = default_config(
            m_total, block_rows, block_shape, c_in, x.dtype, tensor_cores=tensor_cores, **device_limits(x)
        )
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    n_tiles = cdiv(c_out, block_out) * cdiv(block_out, block_n)
    # Columns past C_in of the last group are stored as zeros; slices that divide C_in keep them out of the reads.
    slice_width = min(power_of_2_divisor(block_in, block_k), power_of_2_divisor(c_in, block_k))
    index_64 = max(x.numel(), values.numel(), m_total + block_m) > INT32_MAX or bool(config.get("INDEX_64", False))
    with device_guard(x):
        bsr_conv2d_fwd_kernel[(cdiv(m_total, block_m) * n_tiles,)](
            x,
            values,
            crow_indices,
            col_indices,
            bias if bias is not None else values,
            y,
            m_total,
            c_in,
            h,
            w,
            c_out,
            p,
            q,
            *stride,
            *padding,
            *dilation,
            n_tiles,
            S=s,
            GROUPS=cdiv(c_in, block_in),
            BSR_OUT=block_out,
            BSR_IN=block_in,
            SLICE=slice_width,
            HAS_BORDER=padding[0] > 0 or padding[1] > 0,
            RAGGED_IN=c_in % block_in != 0,
            HAS_BIAS=bias is not None,
            RELU=epilogue != "none",
            POOL=pool,
            INDEX_64=index_64,
            PRECISION=precision,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return y


def launch(
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
    """y = epilogue(conv2d(x, BSR weight) + bias), channels_last, in x's dtype with float32 accumulation.

    Args:
        x: (N, C_in, H, W) float32 | float16 | bfloat16; read as channels_last (converted when it is not).
        values: (nnz_blocks, block_out, block_in) in x's dtype; crow_indices, col_indices: int32 (`formats.BSRWeight`).
        bias: (C_out,) in x's dtype, or None.
        packed: ignored; the kernel decodes tap and channel of a stored block from col_indices, one stage ahead.
        weight_shape: (C_out, C_in, R, S). epilogue: "none", "relu" or "relu_maxpool2" (2x2, stride 2, floor mode).
        config: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages; None takes `default_config`. INDEX_64=1 forces 64-bit
            addresses, which are otherwise used from 2^31 elements on.

    float32 multiplies in IEEE precision unless torch.backends.cudnn.conv.fp32_precision is "tf32".

    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    _check("bsr_conv2d", x, values, bias, epilogue)
    precision = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    dtype = x.dtype
    compute = interpreted_dtype(dtype)
    y = _launch(
        x.to(compute).contiguous(memory_format=torch.channels_last),
        values.to(compute).contiguous(),
        crow_indices,
        col_indices,
        bias.to(compute).contiguous() if bias is not None else None,
        weight_shape,
        block_shape,
        stride,
        padding,
        dilation,
        epilogue,
        precision,
        config,
    )
    return y.to(dtype)


def launch_linear(
    x: Tensor,
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
    """y = epilogue(x W^T + bias) for x (..., in) and a BSR weight (out, in): the convolution at R = S = H = W = 1.

    Arguments as `launch`, with weight_shape (out, in) and epilogue "none" or "relu". float32 multiplies in IEEE
    precision unless torch.backends.cuda.matmul.fp32_precision is "tf32". Returns (..., out), contiguous.

    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    _check("bsr_linear", x, values, bias, epilogue)
    if epilogue == "relu_maxpool2":
        raise ValueError("bsr_linear: expected epilogue in ('none', 'relu'), got 'relu_maxpool2'")
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    dtype = x.dtype
    compute = interpreted_dtype(dtype)
    out_features, in_features = weight_shape[:2]
    y = _launch(
        x.to(compute).reshape(-1, in_features, 1, 1).contiguous(),
        values.to(compute).contiguous(),
        crow_indices,
        col_indices,
        bias.to(compute).contiguous() if bias is not None else None,
        (out_features, in_features, 1, 1),
        block_shape,
        (1, 1),
        (0, 0),
        (1, 1),
        epilogue,
        precision,
        config,
    )
    return y.reshape(*x.shape[:-1], out_features).to(dtype)
