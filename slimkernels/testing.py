"""How slimkernels is checked: float64 references, derived error bounds, random patterns. For tests and benchmarks only.

A result ``out`` in dtype d is compared with a reference computed in float64 from the same (already rounded) inputs:

* per element, ``|out - ref| <= u_out |ref| + C (u_mul + u_acc sqrt(k)) scale``;
* as a whole, ``rms(out - ref) <= (1 + (C - 1) / sqrt(numel)) rms(u_out |ref| + (u_mul + u_acc sqrt(k)) scale)``.

``u`` is half a unit in the last place: ``u_out`` of the output's dtype, ``u_mul`` of the factors as the unit that
multiplies sees them (2^-11 for factors rounded to TF32, the dtype of a rounded intermediate), ``u_acc`` of the
accumulator. Tensor cores that read float32 do not round it: they drop its low 13 bits. That takes between 0 and 2^-10
of a factor, at most 2^-11 on average (`TF32_DROPPED`), and always towards zero: what the factors of a term lose adds
up and does not cancel over the terms. So ``u_mul`` is then 2^-11 times the factors of a term: two of a product, four
of a chain of two products, whose intermediate loses bits as the inputs do. ``k``
counts the terms of one output and ``scale = sqrt(sum_i (x_i w_i)^2)`` is the same operation on squares: rounding
errors of a sum of k independent terms grow as ``u sqrt(k) scale``, not as their worst case ``u k sum |x_i w_i|``
(Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019). So the bound is statistical, for inputs of mean zero.

`C` was fitted once: over 40 seeds and k = 1 .. 2048 sequential float32 sums need 3.2, TF32-rounded factors 3.0, and
the root mean square stays below 0.8 of its bound. tests/ops/test_testing.py passes right results over many seeds and
rejects one that lacks a single term or reads one wrong block. Changing `C` is a decision about every test, not a
fix for one of them.

No reference here calls the package's kernels or its densification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.formats import BSRWeight, block_grid

C = 4.0
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_ROUNDOFF = 2.0**-11
TF32_DROPPED = 2.0**-11
EPILOGUES = ("none", "relu", "relu_maxpool2")


# Comparison


@dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`: what was measured, against what, and where it is worst."""

    passed: bool
    max_abs_err: float
    rms_ratio: float
    rms_ratio_allowed: float
    worst_over_bound: float
    worst_index: tuple[int, ...]
    message: str


def unit_bound(
    ref: Tensor, scale: Tensor, terms: Tensor | int, dtype: torch.dtype, u_mul: float | None = None
) -> tuple[Tensor, Tensor]:
    """The parts of the bound without `C`: ``(u_out |ref|, (u_mul + u_acc sqrt(k)) scale)``, float64, shaped like ref.

    Args:
        ref: float64 reference.
        scale: same shape.
        terms: terms per output, a number or a tensor that broadcasts to ref.
        dtype: of the result under test; its sums are held in float32 or wider.
        u_mul: unit roundoff of the multiplied factors where it exceeds the accumulator's.
    """
    u_acc = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    k = torch.as_tensor(terms, dtype=torch.float64, device=ref.device)
    return UNIT_ROUNDOFF[dtype] * ref.abs(), ((u_mul or u_acc) + u_acc * k.sqrt()) * scale


def compare(
    out: Tensor,
    ref: Tensor,
    *,
    scale: Tensor,
    terms: Tensor | int,
    u_mul: float | None = None,
    nonfinite: bool = False,
    block_shape: Sequence[int] | None = None,
    name: str = "result",
) -> Comparison:
    """Compares a result with its float64 reference under the bound of this module.

    Args:
        out: result under test, float64, float32, float16 or bfloat16; its dtype sets ``u_out``.
        ref: float64 reference of the same shape.
        scale: float64, the same operation on squared inputs, square-rooted.
        terms: number of terms summed per output; a number, or a tensor that broadcasts to ``ref``.
        u_mul: unit roundoff of the multiplied factors when it is coarser than the accumulator's (`TF32_ROUNDOFF`).
            `TF32_DROPPED` times the factors of a term where the low bits of float32 are dropped.
        nonfinite: True if NaN and infinities may occur; they must then be the same in both, element by element. False:
            any non-finite element fails.
        block_shape: names the block row of the worst element in the message.
        name: first word of the message.
    """
    if ref.dtype != torch.float64 or scale.dtype != torch.float64:
        raise TypeError(f"compare: expected a float64 reference and scale, got {ref.dtype} and {scale.dtype}")
    if out.shape != ref.shape or scale.shape != ref.shape:
        text = f"{name}: expected shape {tuple(ref.shape)} (scale {tuple(scale.shape)}), got {tuple(out.shape)}"
        return Comparison(False, math.inf, math.inf, 0.0, math.inf, (), text)
    if out.numel() == 0:
        return Comparison(True, 0.0, 0.0, 0.0, 0.0, (), f"{name}: empty")
    # Where the reference lies: a batch of 1024 images is compared on the GPU in milliseconds.
    got, ref, scale = out.detach().double().to(ref.device), ref.detach(), scale.detach().to(ref.device)
    terms = terms.to(ref.device) if isinstance(terms, Tensor) else terms
    finite = torch.isfinite(ref) & torch.isfinite(got)
    agree = finite | (torch.isnan(got) & torch.isnan(ref)) | (got == ref) if nonfinite else finite
    zero = torch.zeros((), dtype=torch.float64, device=ref.device)
    err = torch.where(agree, torch.where(finite, (got - ref).abs(), zero), math.inf)
    rounded, summed = unit_bound(
        torch.where(finite, ref, zero), torch.where(finite, scale, zero), terms, out.dtype, u_mul
    )
    tiny = torch.finfo(out.dtype)
    bound = rounded + C * summed + tiny.tiny * tiny.eps
    ratio = err / bound
    worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    rms_ref = float(torch.where(finite, ref, zero).square().mean().sqrt())
    allowed = (1 + (C - 1) / math.sqrt(err.numel())) * float((rounded + summed).square().mean().sqrt())
    rms = float(err.square().mean().sqrt())
    passed = float(ratio.max()) <= 1.0 and rms <= allowed + tiny.tiny * tiny.eps
    rms_ref = rms_ref or 1.0
    text = (
        f"{name}: max_abs_err {float(err.max()):.3e}, rms_ratio {rms / rms_ref:.3e} (allowed {allowed / rms_ref:.3e}), "
        f"{int((ratio > 1).sum())} of {err.numel()} elements out of bounds; worst at {_describe(worst, block_shape)}: "
        f"got {float(got[worst])!r}, expected {float(ref[worst])!r} +- {float(bound[worst]):.3e}"
    )
    return Comparison(passed, float(err.max()), rms / rms_ref, allowed / rms_ref, float(ratio.max()), worst, text)


def assert_close(out: Tensor, ref: Tensor, **bound: Any) -> Comparison:
    """Asserts that ``out`` is the float64 ``ref`` up to rounding; arguments and result are those of `compare`.

    Raises:
        AssertionError: with max_abs_err, rms_ratio, and (n, p, q, c_out) of the worst element.
    """
    result = compare(out, ref, **bound)
    if not result.passed:
        raise AssertionError(result.message)
    return result


def _describe(index: tuple[int, ...], block_shape: Sequence[int] | None) -> str:
    if len(index) == 4:
        text = f"(n={index[0]}, p={index[2]}, q={index[3]}, c_out={index[1]})"
    elif len(index) == 2:
        text = f"(m={index[0]}, c_out={index[1]})"
    else:
        return str(index)
    return (
        text
        if block_shape is None
        else f"{text}, block row {index[1] // block_shape[0]} of {tuple(block_shape)} blocks"
    )


# Random patterns


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers rounded to ``dtype``, the same for a seed on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_bsr(
    weight_shape: Sequence[int],
    block_shape: Sequence[int],
    sparsity: float = 0.875,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    pattern: str = "random",
) -> BSRWeight:
    """A block-sparse weight with a seeded pattern and standard normal values (padded entries 0).

    Args:
        weight_shape: ``(C_out, C_in, R, S)`` or ``(out, in)``.
        sparsity: share of the blocks left out.
        pattern: ``"random"``; ``"all_dense"`` (every block stored); ``"no_blocks"``; ``"zero_block_row"`` (the first
            and, of three or more, the last block row store nothing); ``"zero_blocks"`` (every other stored block is 0).
    """
    c_out, c_in, r, s = (*weight_shape, 1, 1)[:4]
    block_out, block_in = block_shape
    rows, cols = block_grid((c_out, c_in, r, s), block_shape)
    groups = cols // (r * s)
    generator = torch.Generator().manual_seed(seed)
    keep = {"all_dense": rows * cols, "no_blocks": 0}.get(pattern, math.ceil(rows * cols * (1 - sparsity)))
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols, generator=generator)[:keep]] = True
    mask = mask.reshape(rows, cols)
    if pattern == "zero_block_row":
        mask[0] = False
        mask[-1] &= rows < 3
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    row, col = mask.nonzero(as_tuple=True)
    values = torch.randn(len(row), block_out, block_in, generator=generator, dtype=torch.float64).to(dtype)
    values[row[:, None] * block_out + torch.arange(block_out) >= c_out] = 0
    inside = (col % groups)[:, None] * block_in + torch.arange(block_in) < c_in
    values *= inside[:, None, :]
    if pattern == "zero_blocks":
        values[::2] = 0
    return BSRWeight(values, crow, col.to(torch.int32), (c_out, c_in, r, s), (block_out, block_in))


def stored_blocks(weight: BSRWeight) -> list[tuple[int, int, int, int]]:
    """``(b, tap, first output channel, first input channel)`` of every stored block, read straight from the indices."""
    c_in = weight.weight_shape[1]
    block_out, block_in = weight.block_shape
    groups = -(-c_in // block_in)
    crow, col = weight.crow_indices.tolist(), weight.col_indices.tolist()
    return [
        (b, col[b] // groups, row * block_out, col[b] % groups * block_in)
        for row in range(len(crow) - 1)
        for b in range(crow[row], crow[row + 1])
    ]


def densify(weight: BSRWeight) -> Tensor:
    """The float64 dense weight ``(C_out, C_in, R, S)``, every entry placed by the index arithmetic of the format."""
    c_out, c_in, r, s = weight.weight_shape
    block_out, block_in = weight.block_shape
    where = torch.tensor(stored_blocks(weight), dtype=torch.long).reshape(-1, 4)
    b, tap, o, c = where[:, :, None, None].unbind(1)
    o, c = o + torch.arange(block_out)[:, None], c + torch.arange(block_in)
    dense = torch.zeros(r * s, c_out + block_out, c_in + block_in, dtype=torch.float64)
    dense[tap, o, c] = weight.values.detach().double().cpu()[b[:, 0, 0]]
    return dense[:, :c_out, :c_in].reshape(r, s, c_out, c_in).permute(2, 3, 0, 1).contiguous()


def drop_term(weight: BSRWeight) -> BSRWeight:
    """A mutant: the stored weight of median magnitude is missing."""
    values = weight.values.clone()
    stored = values.flatten().nonzero().flatten()
    order = values.flatten()[stored].abs().argsort()
    values.view(-1)[stored[order[len(order) // 2]]] = 0
    return replace(weight, values=values)


def wrong_block(weight: BSRWeight) -> BSRWeight:
    """A mutant: one stored block sits one block column too far (cyclically), as after an off-by-one in an index."""
    cols = block_grid(weight.weight_shape, weight.block_shape)[1]
    col = weight.col_indices.clone()
    b = weight.values.flatten(1).abs().amax(1).argmax() if len(col) else 0
    col[b] = (col[b] + 1) % cols
    return replace(weight, col_indices=col)


# Float64 references


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """ReLU, and ReLU then 2x2 stride-2 max-pool (floor), as torch defines them."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"apply_epilogue: expected one of {EPILOGUES}, got {epilogue!r}")
    y = y if epilogue == "none" else torch.relu(y)
    if epilogue != "relu_maxpool2":
        return y
    return F.max_pool2d(y, 2) if y.numel() else y.new_zeros(*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2)


Size = Sequence[int]


def conv2d_float64(
    x: Tensor, dense: Tensor, bias: Tensor | None, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """``F.conv2d`` in float64, a few images at a time: torch's im2col buffer of a whole batch can take gigabytes."""
    dense, b = dense.to(x.device), None if bias is None else bias.double()
    step = (tuple(stride), tuple(padding), tuple(dilation))
    images = max(1, 2**22 // max(1, dense[0].numel() * x.shape[-1] * x.shape[-2]))
    return torch.cat([F.conv2d(part, dense, b, *step) for part in x.double().split(images)])


def reference_bsr_conv2d(
    x: Tensor,
    weight: BSRWeight,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    epilogue: str = "none",
) -> Tensor:
    """The block-sparse convolution in float64: densified weight, ``F.conv2d``, epilogue. x ``(N, C_in, H, W)``."""
    return apply_epilogue(conv2d_float64(x, densify(weight), bias, stride, padding, dilation), epilogue)


def scale_bsr_conv2d(
    x: Tensor,
    weight: BSRWeight,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    epilogue: str = "none",
) -> tuple[Tensor, Tensor]:
    """``(scale, terms)`` of `assert_close`: the convolution on squares, the stored terms per output (1, C_out, 1, 1).

    A max-pool cannot move a result by more than the largest error in its window, so scale is pooled by maximum too.
    """
    dense, square = densify(weight), (None if bias is None else bias.double().square())
    y = conv2d_float64(x.double().square(), dense.square(), square, stride, padding, dilation).sqrt()
    terms = (dense != 0).sum(dim=(1, 2, 3)) + (bias is not None)
    return apply_epilogue(y, epilogue), terms.reshape(1, -1, 1, 1)


def reference_bsr_linear(x: Tensor, weight: BSRWeight, bias: Tensor | None = None, epilogue: str = "none") -> Tensor:
    """The block-sparse linear layer in float64. x ``(..., in)``."""
    y = F.linear(x.double(), densify(weight)[:, :, 0, 0], None if bias is None else bias.double())
    return apply_epilogue(y, epilogue)


def scale_bsr_linear(x: Tensor, weight: BSRWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(scale, terms)`` of `assert_close` for the block-sparse linear layer."""
    dense, square = densify(weight)[:, :, 0, 0], (None if bias is None else bias.double().square())
    return F.linear(x.double().square(), dense.square(), square).sqrt(), (dense != 0).sum(1) + (bias is not None)


def reference_low_rank_linear(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None = None, epilogue: str = "none"
) -> Tensor:
    """``epilogue((x V^T) U^T + b)`` in float64. x ``(..., in)``, U ``(out, rank)``, V ``(rank, in)``."""
    y = F.linear(x.double() @ V.double().T, U.double(), None if bias is None else bias.double())
    return apply_epilogue(y, epilogue)


def scale_low_rank_linear(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None = None) -> tuple[Tensor, int]:
    """``(scale, terms)`` of `assert_close`; the intermediate may be rounded to x's dtype: ``u_mul`` is its roundoff."""
    square = None if bias is None else bias.double().square()
    scale = F.linear(x.double().square() @ V.double().square().T, U.double().square(), square).sqrt()
    return scale, V.shape[0] + V.shape[1] + (bias is not None)


def _low_rank_steps(kind: str, stride: Size, padding: Size, dilation: Size) -> Sequence[tuple[Size, Size, Size]]:
    """(stride, padding, dilation) of each factor of a low-rank convolution."""
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    whole, unit = ((sh, sw), (ph, pw), (dh, dw)), ((1, 1), (0, 0), (1, 1))
    return {
        "svd": [whole, unit],
        "tai": [((sh, 1), (ph, 0), (dh, 1)), ((1, sw), (0, pw), (1, dw))],
        "tucker2": [unit, whole, unit],
    }[kind]


def reference_low_rank_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    kind: str = "tai",
    epilogue: str = "none",
) -> Tensor:
    """The factors of a low-rank convolution applied one after the other in float64."""
    y = x.double()
    for i, (factor, step) in enumerate(zip(factors, _low_rank_steps(kind, stride, padding, dilation), strict=True)):
        y = conv2d_float64(y, factor.double(), bias if i == len(factors) - 1 else None, *step)
    return apply_epilogue(y, epilogue)


def scale_low_rank_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    kind: str = "tai",
    epilogue: str = "none",
) -> tuple[Tensor, int]:
    """``(scale, terms)`` of `assert_close`: the reference on squares; terms of all factors together."""
    squares = [f.double().square() for f in factors]
    square = None if bias is None else bias.double().square()
    y = reference_low_rank_conv2d(x.double().square(), squares, square, stride, padding, dilation, kind, "none")
    return apply_epilogue(y.sqrt(), epilogue), sum(f[0].numel() for f in factors) + (bias is not None)


def naive_bsr_conv2d(
    x: Tensor,
    weight: BSRWeight,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    epilogue: str = "none",
) -> Tensor:
    """The definition, weight by weight, in float64: loops over the stored blocks and nothing else. For tiny sizes.

    It says where a non-finite input goes: to every output whose stored blocks read it, zeros in stored blocks
    included, and to no other.
    """
    c_out, c_in, r, s = weight.weight_shape
    block_out, block_in = weight.block_shape
    n, _, h, w = x.shape
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    x64, v64 = x.detach().double(), weight.values.detach().double().tolist()
    y = torch.zeros(n, c_out, p, q, dtype=torch.float64)
    for b, tap, first_o, first_c in stored_blocks(weight):
        rows = torch.arange(p) * stride[0] - padding[0] + tap // s * dilation[0]
        columns = torch.arange(q) * stride[1] - padding[1] + tap % s * dilation[1]
        i, j = ((rows >= 0) & (rows < h)).nonzero(), ((columns >= 0) & (columns < w)).nonzero().T
        for oo, cc in product(range(min(block_out, c_out - first_o)), range(min(block_in, c_in - first_c))):
            y[:, first_o + oo, i, j] += v64[b][oo][cc] * x64[:, first_c + cc, rows[i], columns[j]]
    if bias is not None:
        y += bias.detach().double().reshape(1, -1, 1, 1)
    return naive_epilogue(y, epilogue)


def naive_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue spelt out: negative to 0, the largest of four; NaN stays NaN in both."""
    if epilogue == "none":
        return y
    y = torch.where(y < 0, torch.zeros_like(y), y)
    if epilogue == "relu":
        return y
    p, q = y.shape[2] // 2 * 2, y.shape[3] // 2 * 2
    windows = torch.stack([y[:, :, i:p:2, j:q:2] for i in (0, 1) for j in (0, 1)])
    return torch.where(windows.isnan().any(0), math.nan, windows.amax(0))


def naive_bsr_linear(x: Tensor, weight: BSRWeight, bias: Tensor | None = None, epilogue: str = "none") -> Tensor:
    """The definition of the block-sparse linear layer: the 1x1 case of `naive_bsr_conv2d`. x ``(M, in)``."""
    return naive_bsr_conv2d(x[:, :, None, None], weight, bias, epilogue=epilogue)[:, :, 0, 0]
