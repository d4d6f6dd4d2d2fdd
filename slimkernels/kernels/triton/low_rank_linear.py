"""Fused low-rank linear layer: forward, and the gradient of its input.

    y = epilogue((x V^T) U^T + bias),   x (M, in), V (rank, in), U (out, rank), y (M, out)

One program computes BLOCK_M rows of h = x V^T for the whole rank in registers (float32), rounds them once to x's
dtype, as the unfused pair of layers does, and multiplies them with its share of U's rows: h never leaves the chip.
The rows of U are dealt to `splits` programs per row tile, each of which recomputes h: that costs (splits - 1) * in *
rank multiply-adds a row, and is used only while the device has processors that would otherwise idle (small M).

A rank above RANK_TILE is taken in tiles (a wider h does not fit the registers beside the output tile), and h is then
recomputed for every BLOCK_N outputs: correct, but two GEMMs, compute-bound at such ranks, are the faster choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.kernels.problems import LowRankLinearProblem
from slimkernels.kernels.triton.launcher import Launch, launch_options
from slimkernels.kernels.triton.runtime import (
    DTYPES,
    INT32_MAX,
    SHARED_MEMORY_SM80,
    Limits,
    cdiv,
    device_limits,
    interpreted_dtype,
    limits,
    next_power_of_2,
    power_of_2_divisor,
)
from slimkernels.kernels.triton.tiles import maximum_nan

EPILOGUES = ("none", "relu")
RANK_TILE = 256


@triton.jit
def _project(
    x_row_ptr,
    v_ptr,
    mask_m,
    offs_r,
    in_features,
    rank,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_k = tl.arange(0, BLOCK_K)
    mask_r = offs_r < rank
    v_row_ptr = v_ptr + offs_r[None, :] * in_features
    h = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        kk = k + offs_k
        mask_x = mask_m[:, None]
        mask_v = mask_r[None, :]
        if not EVEN_K:
            mask_x = mask_x & (kk < in_features)[None, :]
            mask_v = mask_v & (kk < in_features)[:, None]
        x_tile = tl.load(x_row_ptr + kk[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        v_tile = tl.load(v_row_ptr + kk[:, None], mask=mask_v, other=0.0)  # [BLOCK_K, RANK]
        h = tl.dot(x_tile, v_tile, h, input_precision=PRECISION)  # [BLOCK_M, RANK]
    return h.to(x_row_ptr.dtype.element_ty)


@triton.jit
def low_rank_linear_fwd_kernel(
    x_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    m_total,
    in_features,
    out_features,
    rank,
    splits,
    ONE_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    STORE_INNER: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # RANK is a power of two, at least rank when ONE_TILE; the rows past rank are read as zeros.
    # Triton knows of an argument only whether 16 divides it; of this product, that ALIGN does: loads stay wide.
    if ALIGN < 16:
        in_features = in_features // ALIGN * ALIGN
    split = tl.program_id(0) % splits
    tile_m = tl.program_id(0) // splits
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_m = tile_m.to(index_type) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK).to(index_type)
    mask_m = offs_m < m_total
    x_row_ptr = x_ptr + offs_m[:, None] * in_features
    if ONE_TILE:
        h = _project(x_row_ptr, v_ptr, mask_m, offs_r, in_features, rank, EVEN_K, PRECISION, RANK, BLOCK_M, BLOCK_K)
        if STORE_INNER:  # noqa: SIM102 (a constant, decided while compiling; the other at run time)
            if split == 0:
                h_tile = h_ptr + offs_m[:, None] * rank + offs_r[None, :]
                tl.store(h_tile, h, mask=mask_m[:, None] & (offs_r < rank)[None, :])

    for first in range(split * BLOCK_N, out_features, splits * BLOCK_N):
        offs_n = (first + tl.arange(0, BLOCK_N)).to(index_type)
        mask_n = offs_n < out_features
        u_row_ptr = u_ptr + offs_n[None, :] * rank
        if ONE_TILE:
            mask_u = (offs_r < rank)[:, None] & mask_n[None, :]
            u_tile = tl.load(u_row_ptr + offs_r[:, None], mask=mask_u, other=0.0)  # [RANK, BLOCK_N]
            acc = tl.dot(h, u_tile, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for first_r in range(0, rank, RANK):
                rr = first_r + offs_r
                h = _project(x_row_ptr, v_ptr, mask_m, rr, in_features, rank, EVEN_K, PRECISION, RANK, BLOCK_M, BLOCK_K)
                mask_u = (rr < rank)[:, None] & mask_n[None, :]
                u_tile = tl.load(u_row_ptr + rr[:, None], mask=mask_u, other=0.0)
                acc = tl.dot(h, u_tile, acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc = maximum_nan(acc, 0.0)
        y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * out_features + offs_n[None, :]
        tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _shared_bytes(stages: int, block_m: int, block_n: int, block_k: int, wide: int, itemsize: int) -> int:
    """Upper bound of the shared memory of a launch: h and the larger of the two loops' buffers."""
    return itemsize * (stages * max((block_m + wide) * block_k, wide * block_n) + block_m * wide)


def default_config(
    m_total: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    *,
    in_features: int = 16,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> dict[str, int]:
    """Tile constants for one low-rank linear layer, by arithmetic and what was measured on an H200.

    Args: m_total rows of x; in_features their length; tensor_cores False for IEEE float32; shared_memory bytes one
    block may use; processors the number of SMs to keep busy.
    Returns: BLOCK_M, BLOCK_N, BLOCK_K, RANK, SPLITS, num_warps, num_stages.
    """
    wide = max(next_power_of_2(rank), 16)
    if wide > RANK_TILE:
        # Recomputing h keeps its inputs alive beside two accumulators; on FMA units that spills above 64 (compiled).
        wide = RANK_TILE if tensor_cores else 64
    # Where one round of programs of 64 outputs computes all, rows as few as that allows, and wide pieces of x and V
    # to wait for: on an H200 128 x 512 of rank 64 took 3.6 us in place of 6.0, 16 x 4096 of rank 128 15, not 23.
    few = [rows for rows in (16, 32, 64) if cdiv(m_total, rows) * cdiv(out_features, 64) <= processors]
    if tensor_cores and dtype.itemsize == 2 and in_features % 4 == 0 and wide <= 128 and few:
        block_m, block_n, warps = few[0], 64, 4
        block_k = 256 if block_m == 16 else 128
    elif tensor_cores:
        # h (BLOCK_M x wide) and the output tile take 64 + 16 registers a thread at 64 x 256 x 64, 8 warps.
        block_m = 128 if wide <= 64 else 64
        block_n = 128 if wide <= 64 and dtype.itemsize == 2 else 64 if dtype.itemsize == 2 else 32
        # Pieces of fewer than 8 bytes, an address each: a stage of 64 would spill.
        block_k, warps = 64 if dtype.itemsize == 2 and in_features % 4 == 0 else 32, 8
    else:
        block_m, block_n, block_k, warps = 32, 32 if wide <= 128 else 16, 16, 8
    block_m = min(block_m, max(16, next_power_of_2(m_total)))
    block_k = min(block_k, max(16, next_power_of_2(in_features)))
    if tensor_cores and block_m < 64 and wide <= 128:
        warps = 4
    splits = min(cdiv(out_features, block_n), max(1, processors // max(1, cdiv(m_total, block_m))))
    stages = 3
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


def device_configs(problem: LowRankLinearProblem) -> list[dict[str, int]]:
    """Launch configurations worth trying: the default within the limits of the current GPU, then fewer splits.

    Of an A100 where there is no GPU; on the CPU the default alone.
    """
    if problem.device == "cpu":
        return [{}]
    found = device_limits(torch.empty(0, device="cuda")) if torch.cuda.is_available() else {}
    tensor_cores = problem.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    default = default_config(
        problem.m,
        problem.out_features,
        problem.rank,
        problem.dtype,
        in_features=problem.in_features,
        tensor_cores=tensor_cores,
        **found,
    )
    splits = {default["SPLITS"]: 0, max(1, default["SPLITS"] // 2): 0, 1: 0}
    return [{**default, "SPLITS": count} for count in splits]


class _Geometry(NamedTuple):
    """What a launch depends on beside the pointers and the device."""

    m_total: int
    in_features: int
    out_features: int
    rank: int
    has_bias: bool
    relu: bool
    store_inner: bool
    precision: str
    dtype: torch.dtype


@lru_cache(maxsize=4096)
def _plan(g: _Geometry, config_items: tuple[tuple[str, int], ...], device: Limits) -> Launch:
    config = dict(config_items) or default_config(
        g.m_total,
        g.out_features,
        g.rank,
        g.dtype,
        in_features=g.in_features,
        tensor_cores=g.dtype != torch.float32 or g.precision == "tf32",
        shared_memory=device.shared_memory,
        processors=device.processors,
    )
    largest = max(g.m_total * g.in_features, g.out_features * g.rank, g.rank * g.in_features)
    programs = cdiv(g.m_total, config["BLOCK_M"]) * config["SPLITS"]
    return Launch(
        low_rank_linear_fwd_kernel,
        (programs, 1, 1),
        (g.m_total, g.in_features, g.out_features, g.rank, config["SPLITS"]),
        {
            "ONE_TILE": g.rank <= config["RANK"],
            "EVEN_K": g.in_features % config["BLOCK_K"] == 0,
            "ALIGN": power_of_2_divisor(g.in_features, 16),
            "HAS_BIAS": g.has_bias,
            "RELU": g.relu,
            "STORE_INNER": g.store_inner,
            "INDEX_64": largest > INT32_MAX or bool(config.get("INDEX_64", False)),
            "PRECISION": g.precision,
            **{name: config[name] for name in ("RANK", "BLOCK_M", "BLOCK_N", "BLOCK_K")},
        },
        launch_options(config, 0),
    )


def launch(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    epilogue: str,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """y = epilogue((x V^T) U^T + bias) in one kernel, in x's dtype, both products accumulated in float32.

    Args:
        x: (..., in) float32 | float16 | bfloat16.
        U: (out, rank), V: (rank, in), bias: (out,) or None, in x's dtype.
        packed: not used.
        epilogue: "none" or "relu".
        config: BLOCK_M, BLOCK_N, BLOCK_K, RANK, SPLITS, num_warps, num_stages; None takes `default_config`. INDEX_64=1
            forces 64-bit addresses, which are otherwise used from 2^31 elements on.

    The intermediate is rounded once to x's dtype. float32 multiplies in IEEE precision unless
    torch.backends.cuda.matmul.fp32_precision is "tf32".

    Returns: (..., out), contiguous.
    Raises: TypeError for another dtype or mixed dtypes; ValueError for an unknown epilogue.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"low_rank_linear: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in (("U", U), ("V", V), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"low_rank_linear: expected {name} of x's dtype {x.dtype}, got {tensor.dtype}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"low_rank_linear: expected epilogue in {EPILOGUES}, got {epilogue!r}")
    return _run(x, U, V, bias, epilogue, config)[0]


def launch_dgrad(grad: Tensor, U: Tensor, V: Tensor, config: Mapping[str, int] | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of x and of z = x V^T: the forward kernel with the factors' roles swapped.

        grad_z = grad U,   grad_x = grad_z V

    grad_z is written once on its way and never read back; grad_x is made of its rounded values, as the unfused pair
    of products is. Above RANK_TILE, where the kernel would compute grad_z again for every tile of grad_x, torch's two
    products run.

    Args:
        grad: (..., out) float32 | float16 | bfloat16.
        U: (out, rank), V: (rank, in), in grad's dtype.
        config: as `launch`, for the swapped layer.

    Returns: grad_x (..., in), grad_z (..., rank), both contiguous and in grad's dtype.
    """
    rank = V.shape[0]
    if rank > (RANK_TILE if config is None else config["RANK"]):
        grad_z = torch.matmul(grad, U)
        return torch.matmul(grad_z, V), grad_z
    grad_x, grad_z = _run(grad, V.t(), U.t(), None, "none", config, store_inner=True)
    assert grad_z is not None
    return grad_x, grad_z


def _run(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    epilogue: str,
    config: Mapping[str, int] | None,
    store_inner: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(y, x V^T if store_inner)``."""
    out_features, rank = U.shape
    in_features = V.shape[1]
    dtype = x.dtype
    compute = interpreted_dtype(dtype)
    rows = x.to(compute).reshape(-1, in_features).contiguous()
    m_total = rows.shape[0]
    y = torch.empty((m_total, out_features), dtype=compute, device=x.device)
    h = torch.empty((m_total, rank), dtype=compute, device=x.device) if store_inner else y
    if y.numel() > 0:
        geometry = _Geometry(
            m_total,
            in_features,
            out_features,
            rank,
            bias is not None,
            epilogue == "relu",
            store_inner,
            "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            compute,
        )
        factors = [t.to(compute).contiguous() for t in (U, V)]
        plan = _plan(geometry, tuple(config.items()) if config else (), limits(x.get_device()))
        plan(rows, *factors, factors[0] if bias is None else bias.to(compute).contiguous(), y, h)
    inner = h.reshape(*x.shape[:-1], rank).to(dtype) if store_inner else None
    return y.reshape(*x.shape[:-1], out_features).to(dtype), inner
