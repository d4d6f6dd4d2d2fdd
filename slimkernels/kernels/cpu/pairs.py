"""Convolutions in bf16 on a CPU: weights packed in groups of rows, and the steps of csrc/cpu/pairs.h.

Activations lie in pairs, ``(ceil(n / 16), h, w, ceil(channels / 2), 16 images, 2 channels)``: a row of 64 bytes is what
the dot products of AVX512_BF16 and the tiles of AMX read. Numbers are rounded to bf16 between layers and products are
added in float32, as torch does it for models in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import Conv2dArguments, address
from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.cpu.steps import PAIRS_CONV2D, TO_PAIRS, Step, image_sizes, is_dense
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import INT32_MAX, Pair, check_geometry, conv_output_image
from slimkernels.kernels.strips import readable_bias
from slimkernels.tensors import is_plain

ENGINES = {"scalar": 1, "avx512_bf16": 2, "amx": 3}  # SLIM_ENGINE_*
IMAGES = 16
MAX_TAPS = 63  # SLIM_PAIRS_MAX_TAPS, which also stands for the source that there is none of
_ROWS, _STRIP, _ROW_BYTES, _NUMBER_BYTES = 16, 16, 64, 2
_MIXED, _WHOLE, _DIRECT, _SHIFTED = range(4)  # SLIM_GROUP_*


@lru_cache(maxsize=1)
def fast_engines() -> tuple[str, ...]:
    """What runs steps in pairs faster than float32 on this machine, best first: ``amx``, ``avx512_bf16``."""
    module = library()[0]
    return tuple(name for name in (module.bf16_engines() if module else ()) if name != "scalar")


def engine() -> str | None:
    """What chains in bf16 run on, the first of `fast_engines`; None for nothing."""
    return next(iter(fast_engines()), None)


# Measured faster than float32: AMX 1.8 to 5 times on a Xeon (docs/measuring.md). There AVX512_BF16 was slower, and on
# the CPUs of AMD that it is for nobody has timed it: a recording takes it where it is faster when it is recorded.
MEASURED_FASTER = frozenset({"amx"})


def is_measured_faster() -> bool:
    """Whether chains take the engine without measuring."""
    return engine() in MEASURED_FASTER


def bf16_allowed() -> bool:
    """Whether torch's switches let a CPU multiply float32 in bf16, in convolutions as well as in matrix products."""
    mkldnn = torch.backends.mkldnn
    # For mypy: torch's stubs lack the switches.
    return mkldnn.conv.fp32_precision == "bf16" == mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def may_be_in_bf16(output: Tensor) -> bool:
    """Whether a float32 output may come from products in bf16, ours or torch's, as the switches are now."""
    return output.dtype is torch.float32 and output.is_cpu and bf16_allowed()


class PairPack(NamedTuple):
    """A weight for convolutions in pairs, see csrc/kernels.h.

    Attributes:
        weights: bfloat16 ``(groups, 16, 16, 2)``: output channel, row, even and odd input channel.
        groups: int32 ``(groups, 68)``, a ``SlimPairsGroup`` each.
        starts: int32 ``(ceil(C_out / 16) + 1,)``, where each strip of 16 output channels begins.
    """

    weights: Tensor
    groups: Tensor
    starts: Tensor


def pairs_shape(n: int, h: int, w: int, channels: int) -> tuple[int, ...]:
    """Shape of n images that lie in pairs."""
    return -(-n // IMAGES), h, w, -(-channels // 2), IMAGES, 2


# ---------------------------------------------------------------- weights


def pack_pairs(packed: StripPack, weight_shape: Sequence[int]) -> PairPack:
    """The pack of a weight that is packed in strips.

    A column (tap, input channel) is stored where the strip pack has it for any of its 16 output channels.

    Args:
        packed: what `strips.pack_strips` returned.
        weight_shape: ``(C_out, C_in, R, S)``.
    """
    columns, values = _columns(packed, weight_shape)
    strips = -(-weight_shape[0] // _STRIP)
    even, odd = _rows(columns)
    strip = columns[even, 0]
    counts = torch.bincount(strip, minlength=strips)
    groups_of = (counts + _ROWS - 1).div(_ROWS, rounding_mode="floor")
    starts = torch.zeros(strips + 1, dtype=torch.long)
    starts[1:] = groups_of.cumsum(0)
    rank = _rank(strip)
    group, slot = starts[strip] + rank.div(_ROWS, rounding_mode="floor"), rank % _ROWS
    total = int(starts[-1])
    weights = torch.zeros(total, _ROWS, 2, _STRIP, dtype=torch.float32)
    sources = torch.zeros(total, _ROWS, 2, 2, dtype=torch.long)
    sources[..., 0] = MAX_TAPS
    for which, column in enumerate((even, odd)):
        there = column >= 0
        at, (tap, channel) = (group[there], slot[there], which), columns[column[there], 1:].unbind(1)
        weights[at] = values[column[there]]
        place = channel.div(2, rounding_mode="floor") * _ROW_BYTES + _NUMBER_BYTES * (channel % 2 - which)
        sources[at] = torch.stack((tap, place), dim=1)
    rows = torch.bincount(group, minlength=total)
    return PairPack(
        weights.permute(0, 3, 1, 2).to(torch.bfloat16).contiguous(), _heads(sources, rows), starts.to(torch.int32)
    )


def _columns(packed: StripPack, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The stored columns ``(strip of 16, tap, channel)`` in this order, and their weights ``(columns, 16)``."""
    _, c_in, r, s = weight_shape
    taps = r * s
    entries, width = packed.weights.shape
    part = gcd(width, _STRIP)  # output channels of an entry that lie in one strip of 16
    parts = width // part
    lists = packed.tap_ptr.long()
    run = torch.repeat_interleave(torch.arange(lists.numel() - 1), lists[1:] - lists[:-1])
    channel = packed.channels.long()[:, None].expand(entries, parts)
    tap = (run % taps)[:, None].expand(entries, parts)
    first = run.div(taps, rounding_mode="floor")[:, None] * width + torch.arange(parts) * part
    strip = first.div(_STRIP, rounding_mode="floor")
    keys, place = torch.unique((strip * taps + tap) * c_in + channel, return_inverse=True)
    values = torch.zeros(keys.numel(), _STRIP, dtype=torch.float32)
    lanes = (first % _STRIP)[:, :, None] + torch.arange(part)
    values[place[:, :, None], lanes] = packed.weights.detach().view(entries, parts, part)
    strip_and_tap, found = keys.div(c_in, rounding_mode="floor"), keys % c_in
    columns = torch.stack((strip_and_tap.div(taps, rounding_mode="floor"), strip_and_tap % taps, found), dim=1)
    # Where c_out ends within a strip there may be columns of channels that do not exist.
    inside = columns[:, 0] < -(-weight_shape[0] // _STRIP)
    return columns[inside], values[inside]


def _rows(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The columns in the even and in the odd place of each row, -1 for none; rows in the order of first columns.

    Both channels of a pair share a row. Of the others the k-th even one of a strip shares a row with the k-th odd one;
    where one kind is left over, two of them share a row.
    """
    count = columns.shape[0]
    strip, odd = columns[:, 0], columns[:, 2] % 2 == 1
    pair = columns.clone()
    pair[:, 2] -= odd.long()
    whole = torch.zeros(count, dtype=torch.bool)
    if count > 1:
        whole[:-1] = (pair[1:] == pair[:-1]).all(1)  # and the next column
    second = torch.zeros(count, dtype=torch.bool)
    second[1:] = whole[:-1]
    single = ~(whole | second)
    at_whole = whole.nonzero()[:, 0]
    evens, odds = ((single & kind).nonzero()[:, 0] for kind in (~odd, odd))
    # Of each strip as many of both as it has of the rarer kind.
    strips = int(strip[-1]) + 1 if count else 0
    shared = torch.minimum(*(torch.bincount(strip[own], minlength=strips) for own in (evens, odds)))
    matched = [_rank(strip[own]) < shared[strip[own]] for own in (evens, odds)]
    left = torch.cat((evens[~matched[0]], odds[~matched[1]])).sort().values
    is_first = _rank(strip[left]) % 2 == 0
    first, last = left[is_first], torch.full((int(is_first.sum()),), -1)
    has_partner = torch.zeros(left.numel(), dtype=torch.bool)
    has_partner[:-1] = ~is_first[1:]
    last[has_partner[is_first]] = left[~is_first]
    even = torch.cat((at_whole, evens[matched[0]], first))
    odd_places = torch.cat((at_whole + 1, odds[matched[1]], last))
    order = torch.where(odd_places < 0, even, torch.minimum(even, odd_places)).argsort()
    return even[order], odd_places[order]


def _rank(rising: Tensor) -> Tensor:
    """The place of each number among its equals."""
    return torch.arange(rising.numel()) - torch.searchsorted(rising, rising)


def _heads(sources: Tensor, rows: Tensor) -> Tensor:
    """The groups as csrc/kernels.h has them, of sources ``(groups, 16, 2, (tap, bytes))`` and the rows of each."""
    total = rows.numel()
    used = torch.arange(_ROWS) < rows[:, None]
    tap, place = sources[:, :, 0, 0], sources[:, :, 0, 1]
    whole = ((sources[:, :, 0] == sources[:, :, 1]).all(2) | ~used).all(1)
    run = place == place[:, :1] + torch.arange(_ROWS) * _ROW_BYTES
    direct = whole & used.all(1) & ((tap == tap[:, :1]) & run & (tap < MAX_TAPS)).all(1)
    shifted = ((sources[..., 1] % _ROW_BYTES != 0) & used[:, :, None]).flatten(1).any(1)
    kinds = torch.where(direct, _DIRECT, torch.where(whole, _WHOLE, torch.where(shifted, _SHIFTED, _MIXED)))
    bits = torch.zeros(total, MAX_TAPS + 1, dtype=torch.long)
    bits.scatter_(1, torch.where(used[:, :, None], sources[..., 0], MAX_TAPS).reshape(total, 2 * _ROWS), 1)
    masks = (bits[:, :MAX_TAPS] << torch.arange(MAX_TAPS)).sum(1)
    heads = torch.stack((rows, kinds), dim=1).to(torch.int32)
    return torch.cat((heads, masks.view(-1, 1).view(torch.int32), sources.reshape(total, 4 * _ROWS).int()), dim=1)


def check_pairs(op: str, packed: PairPack, weight_shape: Sequence[int]) -> None:
    """Raises unless ``packed`` is a pack of a weight of this shape, so that no kernel reads outside its tensors.

    Raises:
        ValueError: anything else. TypeError: a tensor of another dtype.
    """
    c_out, c_in, r, s = weight_shape
    for name, tensor, dtype in zip(PairPack._fields, packed, (torch.bfloat16, torch.int32, torch.int32), strict=True):
        if tensor.dtype is not dtype:
            raise TypeError(f"{op}: expected {name} of the pack in pairs of dtype {dtype}, got {tensor.dtype}")
        if not tensor.is_cpu or not is_plain(tensor) or not tensor.is_contiguous():
            raise ValueError(f"{op}: expected {name} of the pack in pairs to be a plain contiguous CPU tensor")
    weights, groups, starts = packed
    count, strips = groups.shape[0], -(-c_out // _STRIP)
    if not 1 <= r * s <= MAX_TAPS:
        raise ValueError(f"{op}: expected 1 to {MAX_TAPS} taps in pairs, got {r * s}")
    shapes = weights.shape, groups.shape, starts.shape
    if shapes != ((count, _STRIP, _ROWS, 2), (count, 4 + 4 * _ROWS), (strips + 1,)):
        raise ValueError(f"{op}: expected a pack in pairs of {strips} strips, got tensors of shape {shapes}")
    if int(starts[0]) != 0 or int(starts[-1]) != count or bool((starts[1:] < starts[:-1]).any()):
        raise ValueError(f"{op}: expected starts of the pack in pairs to rise from 0 to {count}")
    rows, sources = groups[:, 0].long(), groups[:, 4:].long().view(count, _ROWS, 2, 2)
    tap, place = sources[..., 0], sources[..., 1]
    inside = place + torch.tensor([0, _NUMBER_BYTES])  # from a row's first number to an even or an odd one
    number = (inside % _ROW_BYTES).div(_NUMBER_BYTES, rounding_mode="floor")
    channel = inside.div(_ROW_BYTES, rounding_mode="floor") * 2 + number
    known = (tap >= 0) & (tap < r * s) & (inside % _NUMBER_BYTES == 0) & (number < 2) & (channel < c_in) & (inside >= 0)
    known |= (tap == MAX_TAPS) & (place == 0)
    if bool(((rows < 1) | (rows > _ROWS)).any()) or not bool(known.all()):
        raise ValueError(f"{op}: expected 1 to {_ROWS} rows of a group, at taps and channels of {tuple(weight_shape)}")
    if not torch.equal(_heads(sources, rows), groups):
        raise ValueError(f"{op}: expected heads of groups that say what their rows are")


# ---------------------------------------------------------------- steps


class PairsConv2d:
    """A convolution in pairs, whose pack is checked here, once.

    Args:
        engine: one of `ENGINES`.
        packed: what `pack_pairs` returned.
        weight_shape: ``(C_out, C_in, R, S)``.
        stride: two ints (rows, columns).
        padding: two ints (rows, columns).
        dilation: two ints (rows, columns).
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.
        op: named in errors.

    Raises:
        ValueError, TypeError: as `check_pairs`; a geometry that is not positive or does not fit int32.
    """

    def __init__(
        self,
        engine: str,
        packed: PairPack,
        weight_shape: Sequence[int],
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        epilogue: str,
        op: str = "bsr_conv2d",
    ) -> None:
        check_geometry(op, stride, padding, dilation)
        check_pairs(op, packed, weight_shape)
        self.engine, self.packed, self.op = engine, packed, op
        self.c_out, self.c_in, *kernel = weight_shape
        self._kernel, self._stride, self._padding, self._dilation = tuple(kernel), stride, padding, dilation
        self._relu, self._pool = epilogue != "none", epilogue == "relu_maxpool2"

    def step(self, x: Tensor, y: Tensor, bias: Tensor | None, n: int, residual: Tensor | None = None) -> Step:
        """The convolution of x into y as one of `Steps`.

        Args:
            x: n images in pairs, bfloat16, at a multiple of 64 bytes.
            y: the output, likewise, or float32 ``(groups, h, w, channels, 16)``; in memory that does not overlap x.
            bias: float32 ``(C_out,)`` or None.
            n: images.
            residual: added to the sums in front of the ReLU, in pairs, in memory that does not overlap y.

        Raises:
            ValueError: tensors of another shape, dtype or layout. TypeError: a bias of another dtype.
        """
        h, w = x.shape[1:3]
        p, q = conv_output_image((h, w), self._kernel, self._stride, self._padding, self._dilation)
        p_out, q_out = (p // 2, q // 2) if self._pool else (p, q)
        like_y = pairs_shape(n, p_out, q_out, self.c_out)
        fits = n > 0 and min(p_out, q_out) > 0 and x.shape == pairs_shape(n, h, w, self.c_in)
        fits = fits and takes_pairs(self.c_in, self.c_out, self._kernel, (h, w), (p, q))
        if not (fits and is_in_pairs(x) and is_output(y, like_y, self.c_out)):
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{self.op}: expected x and y in pairs that fit this weight and {n} images, got {got}")
        if residual is not None and (self._pool or residual.shape != like_y or not is_in_pairs(residual)):
            raise ValueError(f"{self.op}: expected a residual in pairs like y and no pooling")
        bias = None if bias is None else readable_bias(self.op, bias, self.c_out)
        weights, groups, starts = self.packed
        (r, s), (stride_h, stride_w), (pad_h, pad_w) = self._kernel, self._stride, self._padding
        arguments = Conv2dArguments(
            x=address(x), y=address(y), bias=address(bias), weights=address(weights), channels=address(groups),
            tap_ptr=address(starts), residual=address(residual), n=n, h=h, w=w, c_in=self.c_in, c_out=self.c_out, p=p,
            q=q, r=r, s=s, stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w, dil_h=self._dilation[0],
            dil_w=self._dilation[1], strip=_STRIP, depth=1, relu=int(self._relu), pool=int(self._pool), lanes=IMAGES,
            engine=ENGINES[self.engine], to_floats=int(y.dtype is torch.float32),
        )  # fmt: skip
        return Step(PAIRS_CONV2D, arguments, (self, x, y, bias, residual))


def takes_pairs(c_in: int, c_out: int, kernel: Sequence[int], image: Sequence[int], output: Sequence[int]) -> bool:
    """Whether convolutions in pairs hold images and outputs ``(h, w)`` of these sizes."""
    taps, largest = kernel[0] * kernel[1], max(c_in * image[0] * image[1], c_out * output[0] * output[1])
    return taps <= MAX_TAPS and (largest + max(c_in, c_out)) * IMAGES <= INT32_MAX


def is_in_pairs(x: Tensor) -> bool:
    """Whether a tensor lies as the engines read it."""
    plain = x.dtype is torch.bfloat16 and x.is_cpu and is_plain(x) and x.is_contiguous()
    return plain and x.data_ptr() % _ROW_BYTES == 0


def is_output(y: Tensor, like: Sequence[int], channels: int) -> bool:
    """Whether a tensor is an output of this shape in pairs, or the same in float32 with 16 images innermost."""
    if y.dtype is torch.bfloat16:
        return y.shape == like and is_in_pairs(y)
    innermost = (*like[:3], channels, IMAGES)
    return y.shape == innermost and is_dense(y) and y.data_ptr() % _ROW_BYTES == 0


def to_pairs_step(engine: str, x: Tensor, y: Tensor, n: int) -> Step:
    """The copy of n images from float32 channels_last (or rows) into pairs as one of `Steps`.

    Raises:
        ValueError: tensors of another shape, dtype or layout.
    """
    count, channels, h, w = image_sizes(x)
    if not (x.dim() < 5 and n == count > 0 and is_dense(x) and is_in_pairs(y)) or y.shape != pairs_shape(
        n, h, w, channels
    ):
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"to_pairs_step: expected {n} images, and the same in pairs, got {got}")
    arguments = Conv2dArguments(
        x=address(x), y=address(y), n=n, h=h, w=w, c_in=channels, lanes=IMAGES, engine=ENGINES[engine]
    )
    return Step(TO_PAIRS, arguments, (x, y))
