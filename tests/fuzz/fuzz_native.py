"""Random legal and illegal calls of everything that reaches the C++ CPU kernels: ops, modules, packs, steps, bindings.

What is legal must compute what torch's float64 convolution computes, what is illegal must be refused with an exception
of Python, and no call may read or write outside its tensors, which a build with sanitizers (SLIMKERNELS_SANITIZE=1 for
setup.py) sees. Runs alone: ``python tests/fuzz/fuzz_native.py --seconds 60``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import _extension, ops
from slimkernels.formats import BSRWeight, block_grid
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu import pairs
from slimkernels.kernels.cpu.abi import Conv2dArguments
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.cpu.low_rank import pack_factors
from slimkernels.kernels.cpu.pooling import Pooling
from slimkernels.kernels.cpu.steps import AVERAGE_POOL, LAST_KIND, MAX_POOL, PADDED_AVERAGE_POOL
from slimkernels.kernels.image_parts import WHOLE
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import LANES, factor_geometry, strip_width
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear

REFUSALS = (ValueError, TypeError, NotImplementedError)
ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
FAR = (2**31 - 1, 2**31, 2**32 + 1, 2**33 - 3, 2**63 - 1)


def refused(call: Callable[[], Any], what: str) -> None:
    """Fails where an illegal call returns."""
    try:
        call()
    except (*REFUSALS, OverflowError):
        return
    raise AssertionError(f"accepted: {what}")


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the shapes and dtypes of their tensors."""
    return {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for k, v in arguments.items() if k != "packed"}


def pair(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    return rng.randint(low, high), rng.randint(low, high)


@dataclass
class Conv:
    """A legal block-sparse convolution (or linear layer): its tensors and geometry."""

    x: Tensor
    weight: BSRWeight
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    epilogue: str
    linear: bool

    @classmethod
    def draw(cls, rng: random.Random, linear: bool = False) -> Conv:
        kernel = (1, 1) if linear else (rng.choice([1, 1, 2, 3, 3, 5]), rng.choice([1, 2, 3, 3]))
        stride, dilation = ((1, 1), (1, 1)) if linear else (pair(rng, 1, 3), pair(rng, 1, 3))
        padding = (0, 0) if linear else pair(rng, 0, 4)
        c_out, c_in = rng.randint(1, 40), rng.randint(1, 20)
        block = (rng.choice([1, 2, 4, 5, 8, 16, 24, 32]), rng.choice([1, 1, 2, 3, 8]))
        dense = torch.randn(c_out, c_in, *kernel)
        mask = torch.rand(block_grid(dense.shape, block)) < rng.random()
        weight = BSRWeight.from_dense(dense, block, mask)
        least = [max(1, d * (k - 1) + 2 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
        n = rng.choice([1, 1, 2, 3, 9, 17])
        x = torch.randn(n, c_in) if linear else torch.randn(n, c_in, *(low + rng.randint(0, 6) for low in least))
        if not linear and rng.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        bias = torch.randn(c_out) if rng.random() < 0.7 else None
        conv = cls(x, weight, bias, stride, padding, dilation, rng.choice(["none", "relu"]), linear)
        if not linear and rng.random() < 0.2 and min(conv.output_size()) > 1:
            conv.epilogue = "relu_maxpool2"
        return conv

    def output_size(self) -> tuple[int, ...]:
        dense = torch.zeros(1, 1, *self.weight.weight_shape[2:])
        return tuple(F.conv2d(self.x[:1, :1], dense, None, self.stride, self.padding, self.dilation).shape[2:])

    def arguments(self) -> dict[str, Any]:
        shape = self.weight.weight_shape[:2] if self.linear else self.weight.weight_shape
        found = {
            "x": self.x, "values": self.weight.values, "crow_indices": self.weight.crow_indices,
            "col_indices": self.weight.col_indices, "bias": self.bias, "packed": (), "weight_shape": shape,
            "block_shape": self.weight.block_shape, "epilogue": self.epilogue,
        }  # fmt: skip
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return found if self.linear else {**found, **geometry}

    def pack(self, isa: str) -> list[Tensor]:
        w = self.weight
        strip = strip_width(w.block_shape[0], isa)
        return native.pack_strips(w.values, w.crow_indices, w.col_indices, w.weight_shape, w.block_shape, strip)

    @property
    def op(self) -> Callable[..., Tensor]:
        return ops.bsr_linear if self.linear else ops.bsr_conv2d

    def check(self, out: Tensor) -> None:
        """The output against float64, within the bound of summing so many products in float32."""
        x = self.x[:, :, None, None] if self.linear else self.x
        check_conv(out, x, [self.weight.to_dense()], self.bias, [self.geometry()], self.epilogue)

    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


def check_conv(
    out: Tensor, x: Tensor, factors: list[Tensor], bias: Tensor | None, geometry: list[Any], epilogue: str
) -> None:
    expected, scale, terms = x.double(), x.double().abs(), 2
    for i, (factor, step) in enumerate(zip(factors, geometry, strict=True)):
        last = bias if i == len(factors) - 1 else None
        w, b = factor.double(), None if last is None else last.double()
        expected = F.conv2d(expected, w, b, *step)
        scale = F.conv2d(scale, w.abs(), None if b is None else b.abs(), *step)
        terms += factor[0].numel() + 2
    if epilogue != "none":
        expected = expected.relu()
    if epilogue == "relu_maxpool2":
        expected, scale = F.max_pool2d(expected, 2), F.max_pool2d(scale, 2)
    out = out.double().reshape(expected.shape)
    wrong = (out - expected).abs() > 2**-23 * terms * scale + 1e-30
    assert not bool(wrong.any()), f"wrong by {float((out - expected).abs().max())} at {int(wrong.sum())} outputs"


def legal_op(rng: random.Random) -> None:
    """An op, with a kernel by name or not, with a pack or not."""
    conv = Conv.draw(rng, linear=rng.random() < 0.4)
    arguments, isa = conv.arguments(), rng.choice(ISAS)
    name = f"bsr_{'linear' if conv.linear else 'conv2d'}_f32__{isa}"
    if rng.random() < 0.5:
        arguments["kernel"] = name
        if rng.random() < 0.5:
            arguments["packed"] = conv.pack(isa)
    conv.check(conv.op(**arguments))


def damaged_pattern(rng: random.Random, crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Indices that break one rule of the format; there is at least one block."""
    crow, col, at = crow.clone(), col.clone(), rng.randrange(int(crow[-1]))
    how = rng.choice(["above", "below", "far", "start", "falls", "long", "same"])
    if how in ("above", "below", "far"):
        col[at] = {"above": columns, "below": -1, "far": rng.choice([2**31 - 1, -(2**31), 10**6])}[how]
    elif how == "start":
        crow[0] = rng.choice([-1, 1, -(2**31)])
    elif how == "long":
        crow[-1] = rng.choice([int(crow[-1]) + 1, 2**31 - 1, -1])
    elif how == "falls" and crow.numel() > 2:
        crow[rng.randrange(1, crow.numel() - 1)] = rng.choice([-1, -(2**31), 2**31 - 1])
    else:
        row = int((crow[1:] > at).nonzero()[0])
        if int(crow[row + 1]) - int(crow[row]) < 2:
            col[at] = columns
        else:
            first = int(crow[row])
            col[first + 1] = col[first]
    return crow, col


def damaged_pack(rng: random.Random, packed: list[Tensor], c_in: int) -> list[Tensor]:
    """A strip pack that breaks one rule."""
    weights, channels, tap_ptr = (t.clone() for t in packed)
    choices = ["ends", "start", "dtype64", "half", "short", "strip", "missing", "strided"]
    if channels.numel():
        choices += ["channel", "channel", "dips"]
    how = rng.choice(choices)
    if how == "channel":
        channels[rng.randrange(channels.numel())] = rng.choice([c_in, -1, 2**31 - 1, -(2**31), c_in + 10**6])
    elif how == "ends":
        tap_ptr[-1] += rng.choice([1, 5000, 2**30, -1])
    elif how == "start":
        tap_ptr[0] = rng.choice([-1, 1, 2**31 - 1])
    elif how == "dips":
        tap_ptr[tap_ptr.numel() // 2] = rng.choice([-5, 2**31 - 1])
    elif how == "dtype64":
        return [weights, channels.long(), tap_ptr] if rng.random() < 0.5 else [weights, channels, tap_ptr.long()]
    elif how == "half":
        weights = weights.to(rng.choice([torch.float16, torch.float64, torch.int32]))
    elif how == "short":
        tap_ptr = tap_ptr[:-1]
    elif how == "strip":
        weights = torch.zeros(weights.shape[0], rng.choice([0, 3, 7, 12, 33, 64]))
    elif how == "missing":
        return rng.choice([[weights, channels], [weights, channels, tap_ptr, tap_ptr]])
    else:
        weights = torch.zeros(weights.shape[0] + 1, 2 * weights.shape[1])[1:, ::2]
        tap_ptr = tap_ptr.repeat_interleave(2)[::2]
    return [weights, channels, tap_ptr]


def wrong_bias(rng: random.Random, size: int) -> Tensor:
    choices = (
        torch.zeros(size + 1), torch.zeros(size - 1), torch.zeros(size).double(), torch.zeros(size).bfloat16(),
        torch.zeros(size, dtype=torch.int8), torch.zeros(size, device="meta"), torch.zeros(1, size),
    )  # fmt: skip
    return rng.choice(choices)


def illegal_op(rng: random.Random) -> None:
    """An op of which one argument is wrong."""
    conv = Conv.draw(rng, linear=rng.random() < 0.4)
    arguments, isa = conv.arguments(), rng.choice(ISAS)
    name = f"bsr_{'linear' if conv.linear else 'conv2d'}_f32__{isa}"
    how = rng.choice(["pattern", "pack", "bias", "x", "values", "sizes", "geometry"])
    if rng.random() < 0.7:
        arguments["kernel"] = rng.choice([name, name.split("_f32")[0] + "__reference"])
    if how == "pattern" and conv.weight.nnz_blocks:
        _, columns = block_grid(conv.weight.weight_shape, conv.weight.block_shape)
        crow, col = damaged_pattern(rng, conv.weight.crow_indices, conv.weight.col_indices, columns)
        arguments.update(crow_indices=crow, col_indices=col)
    elif how == "pack":
        arguments.update(packed=damaged_pack(rng, conv.pack(isa), conv.weight.weight_shape[1]), kernel=name)
    elif how == "x":
        x = conv.x
        arguments["x"] = rng.choice([x.double(), x[:, :-1], x.to("meta"), x.int(), x.sum()])
    elif how == "values":
        values = conv.weight.values
        arguments["values"] = rng.choice([values.half(), values[:, :, :0], values[None], values.to("meta")])
    elif how == "sizes":
        key = rng.choice(["weight_shape", "block_shape"])
        sizes = list(arguments[key])
        sizes[rng.randrange(len(sizes))] = rng.choice([0, -1, *FAR[1:]])
        arguments[key] = rng.choice([sizes, sizes[:1], [*arguments[key], 1]])
    elif how == "geometry" and not conv.linear:
        key = rng.choice(["stride", "padding", "dilation"])
        legal = list(arguments[key])
        legal[rng.randrange(2)] = rng.choice([-1, -(2**31), *FAR[1:], -1 if key == "padding" else 0])
        arguments[key] = legal
    else:
        arguments["bias"] = wrong_bias(rng, conv.weight.weight_shape[0])
    refused(lambda: conv.op(**arguments), f"{how} of {described(arguments)}")


def wide_op(rng: random.Random) -> None:
    """Padding and dilation that reach far past the image: computed by some kernel, or refused, never wrapped."""
    conv = Conv.draw(rng)
    r, s = conv.weight.weight_shape[2:]
    reach = [rng.choice([1, 7, 10**4, 5 * 10**6, 2**28, 2**30]) for _ in range(2)]
    # As much padding as keeps the output as small as the image.
    odd = [(k - 1) % 2 for k in (r, s)]
    dilation = [2 * d if o else d for d, o in zip(reach, odd, strict=True)]
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, (r, s), strict=True))
    if max(*padding, *dilation) >= 2**31:
        return
    conv.dilation, conv.padding, conv.epilogue = tuple(dilation), padding, rng.choice(["none", "relu"])
    conv.stride = (rng.choice([1, 2, 10**9]), rng.choice([1, 10**9]))
    isa = rng.choice(ISAS)
    conv.check(conv.op(**conv.arguments()))
    try:
        out = conv.op(**conv.arguments(), kernel=f"bsr_conv2d_f32__{isa}")
    except ValueError:
        return
    conv.check(out)


def block_sparse_module(rng: random.Random, conv: Conv) -> nn.Module:
    w = conv.weight
    if conv.linear:
        dense = nn.Linear(w.weight_shape[1], w.weight_shape[0], conv.bias is not None)
        dense.weight.data.copy_(w.to_dense()[:, :, 0, 0])
        cls, extra = BlockSparseLinear, {}
    else:
        c_out, c_in, *kernel = w.weight_shape
        dense = nn.Conv2d(c_in, c_out, kernel, conv.stride, conv.padding, conv.dilation, bias=conv.bias is not None)
        dense.weight.data.copy_(w.to_dense())
        cls, extra = BlockSparseConv2d, {}
    if conv.bias is not None:
        dense.bias.data.copy_(conv.bias)
    module = cls.from_dense(dense, w.block_shape, w.mask(), epilogue=conv.epilogue, **extra)
    return module.eval().requires_grad_(False)


def module_call(rng: random.Random) -> None:
    """A module in eval mode whose attributes, bias, indices or input are changed behind its pack."""
    conv = Conv.draw(rng, linear=rng.random() < 0.4)
    module = block_sparse_module(rng, conv)
    conv.check(module(conv.x))
    how = rng.choice(["attribute", "bias", "pattern", "negative", "values", "features", "pack"])
    if how == "attribute" and not conv.linear:
        name = rng.choice(["stride", "padding", "dilation"])
        legal = pair(rng, 0 if name == "padding" else 1, 3)
        setattr(module, name, legal)
        setattr(conv, name, legal)
        try:
            least = min(conv.output_size())
        except RuntimeError:
            least = 0
        if least < (2 if conv.epilogue == "relu_maxpool2" else 1):
            refused(lambda: module(conv.x), f"{name} {legal}")
        else:
            conv.check(module(conv.x))
        refused(lambda: setattr(module, name, rng.choice([(0, -1), (2**31, 1), "same", (1, 2, 3)])), name)
    elif how == "bias":
        module.bias = nn.Parameter(wrong_bias(rng, conv.weight.weight_shape[0]), requires_grad=False)
        refused(lambda: module(conv.x), "bias")
    elif how == "pattern" and conv.weight.nnz_blocks:
        _, columns = block_grid(conv.weight.weight_shape, conv.weight.block_shape)
        crow, col = damaged_pattern(rng, module.crow_indices, module.col_indices, columns)
        module.crow_indices.copy_(crow)
        module.col_indices.copy_(col)
        refused(lambda: module(conv.x), "indices")
        refused(module.pattern_changed, "indices")
    elif how == "negative":
        out = module(torch._neg_view(conv.x))
        conv.x = -conv.x
        conv.check(out)
    elif how == "features" and conv.linear:
        module.in_features = max(1, conv.weight.weight_shape[1] // 2)
        conv.check(module(conv.x))
        if conv.weight.weight_shape[1] > 1:
            refused(lambda: module(conv.x[:, : conv.weight.weight_shape[1] // 2]), "features")
    elif how == "pack" and module.packed_channels is not None and module.packed_channels.numel():
        module.packed_channels.add_(rng.choice([10**6, -(10**6)]))
        refused(lambda: module(conv.x), "packed_channels")
    else:
        module.values.mul_(2)
        conv.weight.values.mul_(2)
        conv.check(module(conv.x))


def low_rank(rng: random.Random) -> None:
    """The low-rank ops and modules, legal or with one thing wrong."""
    isa = rng.choice(ISAS)
    if rng.random() < 0.4:
        out_features, rank, in_features = (rng.randint(1, 40) for _ in range(3))
        u, v = torch.randn(out_features, rank), torch.randn(rank, in_features)
        x, bias = torch.randn(rng.choice([1, 3, 20]), in_features), torch.randn(out_features)
        packed = pack_factors((v, u), isa)
        kernel = f"low_rank_linear_f32__{isa}"
        factors, geometry = [v[:, :, None, None], u[:, :, None, None]], [((1, 1), (0, 0), (1, 1))] * 2

        def call(packed: list[Tensor], bias: Tensor | None) -> Tensor:
            return ops.low_rank_linear(x, u, v, bias, packed, kernel=kernel)

        check_conv(call(packed, bias), x[:, :, None, None], factors, bias, geometry, "none")
    else:
        kind = rng.choice(["svd", "tai", "tucker2"])
        c_in, c_out, k1, k2 = (rng.randint(1, 24) for _ in range(4))
        r, s = pair(rng, 1, 3)
        factors = {
            "svd": [torch.randn(k1, c_in, r, s), torch.randn(c_out, k1, 1, 1)],
            "tai": [torch.randn(k1, c_in, r, 1), torch.randn(c_out, k1, 1, s)],
            "tucker2": [torch.randn(k1, c_in, 1, 1), torch.randn(k2, k1, r, s), torch.randn(c_out, k2, 1, 1)],
        }[kind]
        step = pair(rng, 1, 2), pair(rng, 0, 2), pair(rng, 1, 2)
        geometry = factor_geometry(kind, len(factors), *step)
        x, bias = torch.randn(rng.choice([1, 2, 5]), c_in, rng.randint(5, 9), rng.randint(5, 9)), torch.randn(c_out)
        packed, kernel = pack_factors(factors, isa), f"low_rank_conv2d_f32__{isa}"

        def call(packed: list[Tensor], bias: Tensor | None) -> Tensor:
            stride, padding, dilation = step
            return ops.low_rank_conv2d(
                x, factors, bias, packed, kind=kind, stride=stride, padding=padding, dilation=dilation, kernel=kernel
            )

        check_conv(call(packed, bias), x, factors, bias, geometry, "none")
    refused(lambda: call(packed, wrong_bias(rng, bias.numel())), "bias of a low-rank op")
    at = 3 * rng.randrange(len(factors))
    damaged = damaged_pack(rng, packed[at : at + 3], factors[at // 3].shape[1])
    refused(lambda: call([*packed[:at], *damaged, *packed[at + 3 :]], bias), "pack of a low-rank op")
    module: nn.Module
    if len(factors) == 2 and x.dim() == 2:
        module = LowRankLinear.from_factors(factors[1][:, :, 0, 0], factors[0][:, :, 0, 0], bias) if (
            factors[0].shape[0] <= min(factors[0].shape[1], factors[1].shape[0])
        ) else None  # fmt: skip
    else:
        stride, padding, dilation = step
        module = LowRankConv2d.from_factors(factors, bias, kind=kind, stride=stride, padding=padding, dilation=dilation)
    if module is not None:
        module = module.eval().requires_grad_(False)
        image = x if x.dim() == 4 else x[:, :, None, None]
        check_conv(module(x), image, factors, bias, geometry, "none")
        module.bias = nn.Parameter(wrong_bias(rng, bias.numel()), requires_grad=False)
        refused(lambda: module(x), "bias of a low-rank module")


# The numbers among the arguments.
MEMBERS = Conv2dArguments._fields[Conv2dArguments._fields.index("n") :]


def steps(rng: random.Random) -> None:
    """Recorded steps and the bindings below them: every number that does not fit is refused, none is cut to 32 bits."""
    conv, isa = Conv.draw(rng), rng.choice(ISAS)
    packed = native.PackedConv2d(isa, conv.pack(isa), conv.weight.weight_shape, *conv.geometry(), conv.epilogue)
    n, _, h, w = conv.x.shape
    x = conv.x.contiguous(memory_format=torch.channels_last)
    p, q = (size >> (conv.epilogue == "relu_maxpool2") for size in packed.output_size(h, w))
    y = torch.empty(n, p, q, packed.c_out).permute(0, 3, 1, 2)
    lanes = LANES[isa]
    wrong = rng.choice(
        [
            (x[:, :-1], y, n), (x, y[:, :, :-1], n), (x, y, n + 1), (x.double(), y, n), (x, y.double(), n),
            (x, y, 0), (x, y, 2**40), (torch._neg_view(x), y, n),
        ]
    )  # fmt: skip
    offsets = packed.entry_offsets(h, w)
    refused(lambda: packed.step(wrong[0], wrong[1], conv.bias, wrong[2], offsets), "step")
    refused(lambda: packed.entry_offsets(h, rng.choice(FAR)), "width of entry offsets")
    parts = rng.choice([WHOLE, packed.parts(n, h, w)])
    inner = torch.empty(native.images_innermost(n, h, w, packed.c_in, isa, parts))
    outer = torch.empty(native.images_innermost(n, p, q, packed.c_out, isa, parts))
    innermost_offsets = packed.entry_offsets(h, w, lanes, parts)
    step = packed.step(inner, outer, conv.bias, n, innermost_offsets, parts=parts)
    native.Steps(isa, [native.layout_step(x, inner, n, parts), step, native.layout_step(outer, y, n, parts)])()
    conv.check(y)
    module = _extension.load()[0]
    assert module is not None
    name = rng.choice(MEMBERS)
    value = getattr(step.arguments, name)
    illegal = [-1, -(2**31), -(2**63), 2**32 + value, 2**63 - 1]
    if name not in ("h", "w", "pad_h", "pad_w", "relu", "pool", "engine", "to_floats"):
        illegal.append(0)
    if name == "n":
        illegal.remove(2**32 + value)
    if name in ("strip", "lanes"):
        illegal += [3, 5, 64]
    wrong_value = rng.choice(illegal)
    members = step.arguments._replace(**{name: wrong_value})
    what = f"{name} = {wrong_value}"
    refused(lambda: module.Steps(isa, [(0, -1, *members)]), what)
    refused(lambda: module.conv2d_f32(isa, *members, 1), what)
    layout = native.layout_step(x, inner, n, parts).arguments._replace(**{name: wrong_value})
    if name in ("n", "h", "w", "c_in", "lanes"):
        refused(lambda: module.Steps(isa, [(1, -1, *layout)]), f"layout step with {what}")
    refused(lambda: module.Steps(isa, [(rng.choice([LAST_KIND + 1, -1, 2**32]), -1, *step.arguments)]), "kind")
    refused(lambda: module.Steps(isa, [(0, rng.choice([-2, 2**31, 2**32]), *step.arguments)]), "slot")
    refused(lambda: module.conv2d_f32(isa, *step.arguments, rng.choice([0, -1, 2**31, 2**32 + 1])), "threads")
    room = innermost_offsets.numel() - 1
    refused(lambda: module.entry_offsets(step.arguments, innermost_offsets.data_ptr(), room), "room for offsets")


def pooling(rng: random.Random) -> None:
    """A pooling in either layout against torch's, and its step with a number that does not fit."""
    kernel, dilation = [(rng.randint(1, 4), rng.randint(1, 4)), (1, 1)]
    kind = rng.choice([MAX_POOL, AVERAGE_POOL, PADDED_AVERAGE_POOL])
    padding = (rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2))
    if kind == MAX_POOL:
        dilation = (rng.randint(1, 2), rng.randint(1, 2))
    isa, n, channels = rng.choice(ISAS), rng.randint(1, 18), rng.randint(1, 70)
    pool = Pooling(isa, kind, channels, kernel, (rng.randint(1, 3), rng.randint(1, 3)), padding, dilation)
    h, w = rng.randint(1, 12), rng.randint(1, 12)
    p, q = pool.output_size(h, w)
    if min(p, q) < 1:
        return
    x = torch.randn(n, h, w, channels).permute(0, 3, 1, 2)
    y = torch.empty(n, p, q, channels).permute(0, 3, 1, 2)
    step = pool.step(x, y, n, {}, None, WHOLE)
    native.Steps(isa, [step])()
    torch.testing.assert_close(y, pool(x))
    inner, outer = (torch.empty(native.images_innermost(n, *size, channels, isa)) for size in ((h, w), (p, q)))
    y.fill_(math.nan)
    around = native.layout_step(x, inner, n), native.layout_step(outer, y, n)
    native.Steps(isa, [around[0], pool.step(inner, outer, n, {}, None, WHOLE), around[1]])()
    torch.testing.assert_close(y, pool(x))
    name = rng.choice(
        ["n", "h", "w", "c_in", "p", "q", "r", "s", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "lanes"]
    )
    value = rng.choice([-1, -(2**31), -(2**63), 2**63 - 1, 2**32 + getattr(step.arguments, name)])
    if name == "n" and 0 < value < 2**62:
        return  # so many images may be in order
    module = _extension.load()[0]
    assert module is not None
    members = step.arguments._replace(**{name: value})
    refused(lambda: module.Steps(isa, [(step.kind, -1, *members)]), f"pooling with {name} = {value}")


def in_pairs(rng: random.Random) -> None:
    """A convolution in bf16 on any engine against the definition, and a pack or a number that does not fit."""
    module = _extension.load()[0]
    assert module is not None
    conv, engine = Conv.draw(rng), rng.choice(module.bf16_engines())
    shape, (n, _, h, w) = conv.weight.weight_shape, conv.x.shape
    if shape[2] * shape[3] > pairs.MAX_TAPS:
        return
    pack = pairs.pack_pairs(StripPack(*conv.pack(rng.choice(ISAS))), shape)
    packed = pairs.PairsConv2d(engine, pack, shape, *conv.geometry(), conv.epilogue)
    p, q = native.PackedConv2d("scalar", conv.pack("scalar"), shape, *conv.geometry(), conv.epilogue).output_size(h, w)
    if conv.epilogue == "relu_maxpool2":
        p, q = p // 2, q // 2
    x, y = conv.x.contiguous(memory_format=torch.channels_last), torch.empty(-(-n // 16), p, q, shape[0], 16)
    inner = torch.empty(pairs.pairs_shape(n, h, w, shape[1]), dtype=torch.bfloat16)
    step = packed.step(inner, y, conv.bias, n)
    native.Steps("scalar", [pairs.to_pairs_step(engine, x, inner, n), step])()
    rounded = [t.bfloat16().float() for t in (conv.x, conv.weight.to_dense())]
    got = y.permute(0, 4, 3, 1, 2).flatten(0, 1)[:n]
    check_conv(got, rounded[0], rounded[1:], conv.bias, [conv.geometry()], conv.epilogue)
    field = rng.choice(["groups", "starts"])
    wrong = {name: tensor.clone() for name, tensor in pack._asdict().items()}
    numbers = wrong[field].view(-1)
    if numbers.numel():
        at = rng.randrange(numbers.numel())
        numbers[at] = rng.choice([-1, -64, 2**31 - 1, int(numbers[at]) + 1, int(numbers[at]) + 64, 1 << 20])
        # Another pattern may be as legal: then nothing outside of any tensor is read.
        with contextlib.suppress(ValueError):
            packed = pairs.PairsConv2d(engine, pairs.PairPack(**wrong), shape, *conv.geometry(), conv.epilogue)
            native.Steps("scalar", [packed.step(inner, y, conv.bias, n)])()
    name = rng.choice([name for name in MEMBERS if name not in ("parts_h", "parts_w")])
    value = rng.choice([-1, -(2**31), -(2**63), 2**32 + getattr(step.arguments, name)])
    if name != "n" or value < 0:
        members = step.arguments._replace(**{name: value})
        refused(lambda: module.Steps("scalar", [(step.kind, -1, *members)]), f"pairs with {name} = {value}")


KINDS = (legal_op, illegal_op, illegal_op, wide_op, module_call, module_call, low_rank, steps, pooling, in_pairs)


def run(cases: int, seed: int = 0, seconds: float = float("inf")) -> Counter[str]:
    """Runs so many cases, or as many as the time allows; how many of each kind. A failure names its seed."""
    end, done = time.monotonic() + seconds, Counter[str]()
    before = torch.get_num_threads()
    try:
        for case in range(cases):
            if time.monotonic() > end:
                break
            rng = random.Random(f"{seed}-{case}")
            torch.default_generator.manual_seed(rng.getrandbits(32))
            torch.set_num_threads(rng.choice([1, 1, 2, 3]))
            kind = KINDS[case % len(KINDS)]
            try:
                kind(rng)
            except Exception as error:
                raise AssertionError(f"{kind.__name__} failed at --seed {seed} case {case}: {error!r}") from error
            done[kind.__name__] += 1
    finally:
        torch.set_num_threads(before)
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    module, reason = _extension.load()
    if module is None:
        raise SystemExit(f"fuzz_native: slimkernels._C is not loaded: {reason}")
    done = run(options.cases, options.seed, options.seconds)
    kind = "sanitized" if module.build_info()["sanitized"] else "plain"
    print(f"fuzz_native: {sum(done.values())} cases on a {kind} build: {dict(done)}")


if __name__ == "__main__":
    main()
