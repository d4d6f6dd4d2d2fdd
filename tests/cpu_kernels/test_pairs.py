"""Convolutions in bf16 by `slimkernels.kernels.cpu.pairs`: packs, steps and what they refuse, on every engine here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimkernels.formats import BSRWeight
from slimkernels.kernels.cpu import pairs
from slimkernels.kernels.cpu.library import library, unavailable_reason
from slimkernels.kernels.cpu.pairs import (
    MAX_TAPS,
    PairPack,
    PairsConv2d,
    check_pairs,
    pack_pairs,
    pairs_shape,
    to_pairs_step,
)
from slimkernels.kernels.cpu.pooling import Pooling
from slimkernels.kernels.cpu.steps import AVERAGE_POOL, MAX_POOL, PADDED_AVERAGE_POOL, Step, Steps
from slimkernels.kernels.strips import pack_strips

pytestmark = pytest.mark.skipif(unavailable_reason("scalar") is not None, reason="the extension is not built")
ENGINES = ("scalar", "avx512_bf16", "amx")
BLOCKS = [(16, 1), (16, 2), (32, 32), (16, 32), (8, 1), (24, 4), (4, 2), (1, 1)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each engine, which chains then take, too."""
    module = library()[0]
    assert module is not None
    if request.param not in module.bf16_engines():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(pairs, "fast_engines", lambda: (request.param,))
    return str(request.param)


def sparse(c_out: int, c_in: int, kernel: int, block: tuple[int, int], density: float) -> Tensor:
    """A weight with zero blocks, its numbers of bf16."""
    rows, columns = -(-c_out // block[0]), -(-c_in // block[1])
    mask = torch.rand(rows, columns, kernel, kernel) < density
    mask = mask.repeat_interleave(block[0], 0)[:c_out].repeat_interleave(block[1], 1)[:, :c_in]
    weight = torch.randn(c_out, c_in, kernel, kernel) / math.sqrt(max(1, c_in * kernel * kernel * density))
    return (weight.bfloat16().float() * mask).contiguous()


def strip_pack(weight: Tensor, block: tuple[int, int]) -> Any:
    stored = BSRWeight.from_dense(weight, block)
    strip = math.gcd(block[0], 32)
    return pack_strips(stored.values, stored.crow_indices, stored.col_indices, weight.shape, block, strip)


def columns_of(packed: PairPack, weight_shape: Sequence[int]) -> Tensor:
    """The weight that a pack holds, from its groups, one number after the other."""
    c_out, c_in, r, s = weight_shape
    weight = torch.zeros(-(-c_out // 16) * 16, c_in + 1, r * s)
    for strip in range(packed.starts.numel() - 1):
        for group in range(int(packed.starts[strip]), int(packed.starts[strip + 1])):
            head = packed.groups[group].tolist()
            for row in range(head[0]):
                for which in range(2):
                    tap, place = head[4 + 4 * row + 2 * which : 6 + 4 * row + 2 * which]
                    values = packed.weights[group, :, row, which].float()
                    if tap == MAX_TAPS:
                        assert not values.any(), "a weight without a source"
                        continue
                    place += 2 * which
                    channel = place // 64 * 2 + place % 64 // 2
                    at = weight[16 * strip : 16 * strip + 16, channel, tap]
                    assert not at.any(), "a column twice"
                    at += values
    assert not weight[:, c_in].any() and not weight[c_out:].any()
    return weight[:c_out, :c_in].reshape(c_out, c_in, r, s)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_pack_holds_the_weight(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for c_out, c_in, kernel, density in ((48, 33, 3, 0.3), (10, 64, 1, 1.0), (40, 3, 3, 0.5), (16, 16, 2, 0.0)):
        weight = sparse(c_out, c_in, kernel, block, density)
        packed = pack_pairs(strip_pack(weight, block), weight.shape)
        check_pairs("test", packed, weight.shape)
        assert torch.equal(columns_of(packed, weight.shape), weight)


def test_groups_are_full_and_say_what_they_read() -> None:
    """Pairs whose channels are both stored share a row, the others do by parity, and whole tiles need no gathering."""
    dense = pack_pairs(strip_pack(torch.ones(16, 64, 1, 1), (16, 32)), (16, 64, 1, 1))
    assert dense.groups[:, :2].tolist() == [[16, 2], [16, 2]], "direct"
    single = torch.zeros(16, 64, 3, 3)
    single[:, 0:64:2, 0, 1] = 1  # 32 even channels, and 7 odd ones of another tap
    single[:, 1:15:2, 2, 2] = 1
    packed = pack_pairs(strip_pack(single, (16, 1)), single.shape)
    assert packed.groups[:, 0].tolist() == [16, 4] and packed.groups[:, 1].tolist() == [3, 3], "39 columns"
    assert packed.groups[:, 2].tolist() == [1 << 1 | 1 << 8, 1 << 1], "taps of the rows"
    assert torch.equal(columns_of(packed, single.shape), single)
    # Three channels of nine taps are 14 rows, the last one with one column.
    assert pack_pairs(strip_pack(torch.ones(16, 3, 3, 3), (16, 1)), (16, 3, 3, 3)).groups[:, 0].tolist() == [14]
    both = torch.zeros(16, 64, 1, 1)
    both[:, [2, 3, 8, 9]] = 1
    assert pack_pairs(strip_pack(both, (16, 2)), both.shape).groups[:, :2].tolist() == [[2, 1]], "whole pairs"
    wide = pack_pairs(strip_pack(torch.ones(16, 1, 7, 9), (16, 1)), (16, 1, 7, 9))
    assert wide.groups[:, 0].tolist() == [16, 16]


def in_pairs(engine: str, x: Tensor, steps: list[Step]) -> Tensor:
    """Where a step that is added to the list puts x in pairs."""
    n, channels, h, w = x.shape
    y = torch.full(pairs_shape(n, h, w, channels), float("nan"), dtype=torch.bfloat16)
    steps.append(to_pairs_step(engine, x.contiguous(memory_format=torch.channels_last), y, n))
    return y


def out_of_pairs(y: Tensor, n: int, channels: int) -> Tensor:
    """``(n, channels, h, w)`` of images in pairs, or of float32 with 16 images innermost."""
    if y.dim() == 6:
        return y.permute(0, 4, 3, 5, 1, 2).flatten(2, 3).flatten(0, 1)[:n, :channels].float()
    return y.permute(0, 4, 3, 1, 2).flatten(0, 1)[:n]


def run(
    engine: str,
    weight: Tensor,
    block: tuple[int, int],
    x: Tensor,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    epilogue: str,
    bias: Tensor | None,
    residual: Tensor | None,
    floats: bool,
    threads: int = 2,
) -> Tensor:
    steps: list[Step] = []
    packed = pack_pairs(strip_pack(weight, block), weight.shape)
    conv = PairsConv2d(engine, packed, weight.shape, *geometry, epilogue)
    source, added = in_pairs(engine, x, steps), None if residual is None else in_pairs(engine, residual, steps)
    want = reference(weight, x, geometry, epilogue, bias, residual)
    n, channels, p, q = want.shape
    shape = (-(-n // 16), p, q, channels, 16) if floats else pairs_shape(n, p, q, channels)
    y = torch.full(shape, float("nan"), dtype=torch.float32 if floats else torch.bfloat16)
    steps.append(conv.step(source, y, bias, n, added))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    Steps("scalar", steps)()
    torch.set_num_threads(before)
    return out_of_pairs(y, n, channels)


def reference(
    weight: Tensor,
    x: Tensor,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    epilogue: str,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """In float64, of numbers rounded to bf16."""
    stride, padding, dilation = geometry
    y = torch.nn.functional.conv2d(
        x.bfloat16().double(), weight.double(), None if bias is None else bias.double(), stride, padding, dilation
    )
    if residual is not None:
        y = y + residual.bfloat16().double()
    if epilogue != "none":
        y = y.relu()
    return torch.nn.functional.max_pool2d(y, 2) if epilogue == "relu_maxpool2" else y


def close(got: Tensor, want: Tensor, scale: Tensor, rounded: bool) -> None:
    """Sums in float32 of what `scale` is the sum of the sizes of, and one rounding to bf16."""
    bound = 1e-5 * scale + (2.0**-8) * want.abs() * rounded + 1e-30
    assert got.shape == want.shape and bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_against_float64(engine: str, block: tuple[int, int], kernel: int) -> None:
    """Every epilogue, outputs in pairs and in float32, batches that 16 does not divide, ragged channels, strides."""
    torch.manual_seed(1)
    cases = [
        ("none", (1, 1), (0, 0), (1, 1), 3, 10, 16, False), ("relu", (1, 1), (1, 1), (1, 1), 17, 48, 33, True),
        ("relu_maxpool2", (1, 1), (1, 1), (1, 1), 64, 32, 18, False),
        ("relu", (2, 1), (1, 2), (1, 2), 33, 16, 1, False),
        ("none", (1, 2), (2, 0), (2, 1), 16, 7, 16, True), ("relu_maxpool2", (2, 2), (0, 1), (1, 1), 8, 21, 5, True),
    ]  # fmt: skip
    for epilogue, stride, padding, dilation, c_in, c_out, n, floats in cases:
        if kernel == 1:
            padding, dilation = (0, 0), (1, 1)
        weight, geometry = sparse(c_out, c_in, kernel, block, 0.3), (stride, padding, dilation)
        x, bias = torch.randn(n, c_in, 9, 8), torch.randn(c_out)
        shape = reference(weight, x, geometry, "none", None, None).shape
        for residual in (None, torch.randn(shape)):
            if residual is not None and epilogue == "relu_maxpool2":
                continue
            got = run(engine, weight, block, x, geometry, epilogue, bias, residual, floats)
            want = reference(weight, x, geometry, epilogue, bias, residual)
            sizes = None if residual is None else residual.abs()
            scale = reference(weight.abs(), x.abs(), geometry, epilogue, bias.abs(), sizes)
            close(got, want, scale, rounded=not floats)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (16, 16)])
def test_image_sizes(engine: str, size: tuple[int, int]) -> None:
    """Corners, edges and insides; chunks that are not full; all strips, or a part of them, in a unit."""
    torch.manual_seed(2)
    weight, x = sparse(80, 40, 3, (16, 1), 0.4), torch.randn(20, 40, *size)
    geometry = ((1, 1), (1, 1), (1, 1))
    got = run(engine, weight, (16, 1), x, geometry, "none", None, None, False)
    want = reference(weight, x, geometry, "none", None, None)
    close(got, want, reference(weight.abs(), x.abs(), geometry, "none", None, None), rounded=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    """On the best engine of this machine and on the one that runs everywhere: the same within rounding."""
    module = library()[0]
    assert module is not None
    small = st.integers(1, 3)
    r, s = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    stride, dilation = data.draw(st.tuples(small, small)), data.draw(st.tuples(small, small))
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    c_in, c_out = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 50))
    least = [max(1, d * (k - 1) + 1 - 2 * pad) for d, k, pad in zip(dilation, (r, s), padding)]
    h, w = (low + data.draw(st.integers(0, 6)) for low in least)
    epilogue, floats = data.draw(st.sampled_from(["none", "relu"])), data.draw(st.booleans())
    block, n = data.draw(st.sampled_from(BLOCKS)), data.draw(st.integers(1, 35))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    weight = sparse(c_out, c_in, max(r, s), block, data.draw(st.sampled_from([0.05, 0.4, 1.0])))[:, :, :r, :s]
    weight, x, geometry = weight.contiguous(), torch.randn(n, c_in, h, w), (stride, padding, dilation)
    want = reference(weight, x, geometry, epilogue, None, None)
    scale = reference(weight.abs(), x.abs(), geometry, epilogue, None, None)
    for engine in {module.bf16_engines()[0], "scalar"}:
        got = run(engine, weight, block, x, geometry, epilogue, None, None, floats)
        close(got, want, scale, rounded=not floats)


def test_results_do_not_depend_on_threads_or_runs(engine: str) -> None:
    torch.manual_seed(3)
    weight, x = sparse(96, 64, 3, (16, 1), 0.3), torch.randn(40, 64, 12, 12)
    runs = [run(engine, weight, (16, 1), x, ((1, 1), (1, 1), (1, 1)), "relu", None, None, False, k) for k in (1, 2, 5)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_reaches_only_who_reads_it(engine: str, bad: float) -> None:
    """Neither a column of other outputs, nor the other half of a pair, nor another image, nor a last, ragged group."""
    weight = torch.zeros(32, 6, 1, 1)
    weight[:16, [0, 3, 4]] = 1  # the second strip stores its neighbour in the pair, and no partner for it
    weight[16:, [1, 4]] = 1
    x = torch.ones(17, 6, 3, 3)
    x[16, 0, 1, 1] = bad
    got = run(engine, weight, (16, 1), x, ((1, 1), (0, 0), (1, 1)), "none", None, None, True)
    reached = torch.zeros(17, 32, 3, 3, dtype=torch.bool)
    reached[16, :16, 1, 1] = True
    assert torch.equal(~got.isfinite(), reached)
    expected = torch.tensor([3.0] * 16 + [2.0] * 16)[:, None, None].expand_as(got)
    assert torch.equal(got[~reached], expected[~reached])


def test_relu_and_pool_keep_nan(engine: str) -> None:
    weight, x = torch.ones(16, 2, 1, 1), -torch.ones(2, 2, 4, 4)
    x[1, 0, 2, 3] = float("nan")
    for epilogue, place in (("relu", (2, 3)), ("relu_maxpool2", (1, 1))):
        got = run(engine, weight, (16, 1), x, ((1, 1), (0, 0), (1, 1)), epilogue, None, None, False)
        assert bool(got[1, :, place[0], place[1]].isnan().all()) and int(got.isnan().sum()) == 16
        assert not got.nan_to_num().any()


@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "padding"),
    [
        (MAX_POOL, (3, 3), (2, 2), (1, 1)), (AVERAGE_POOL, (2, 2), (2, 2), (0, 0)),
        (AVERAGE_POOL, (7, 6), (1, 1), (0, 0)),
        (PADDED_AVERAGE_POOL, (3, 2), (2, 1), (1, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("floats", [False, True])
def test_poolings(
    engine: str, kind: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], floats: bool
) -> None:
    torch.manual_seed(4)
    pool, x = Pooling("scalar", kind, 5, kernel, stride, padding), torch.randn(19, 5, 7, 6)
    steps: list[Step] = []
    source = in_pairs(engine, x, steps)
    want = pool(x.bfloat16().double())
    n, channels, p, q = want.shape
    shape = (2, p, q, channels, 16) if floats else pairs_shape(n, p, q, channels)
    y = torch.full(shape, float("nan"), dtype=torch.float32 if floats else torch.bfloat16)
    Steps("scalar", [*steps, pool.step(source, y, n, {}, None, (1, 1))])()
    close(out_of_pairs(y, n, channels), want, pool(x.abs().double()), rounded=not floats)


def test_rounding_is_to_the_nearest_and_even(engine: str) -> None:
    numbers = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1.5, 0.0, 3.0e38, float("inf"), -1e-3])
    x = numbers.expand(16, 8).contiguous()[:, :, None, None]
    steps: list[Step] = []
    y = in_pairs(engine, x, steps)
    Steps("scalar", steps)()
    assert torch.equal(out_of_pairs(y, 16, 8)[:, :, 0, 0], x[:, :, 0, 0].bfloat16().float())


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def pack() -> PairPack:
    weight = torch.zeros(20, 6, 3, 3)
    weight[:, [0, 1, 3]] = 1
    return pack_pairs(strip_pack(weight, (4, 1)), weight.shape)


@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        ("groups", (0, 0), 17), ("groups", (0, 0), 0), ("groups", (0, 1), 2), ("groups", (0, 2), 0),
        ("groups", (0, 4), 9), ("groups", (0, 4), -1), ("groups", (0, 5), 192), ("groups", (0, 5), 32),
        ("groups", (0, 7), -64), ("groups", (0, 5), -2),
        ("groups", (0, 7), 4), ("groups", (0, 5), 1), ("starts", (0,), 1), ("starts", (1,), 99), ("starts", (2,), 1),
    ],
)  # fmt: skip
def test_packs_that_would_read_elsewhere(pack: PairPack, field: str, at: tuple[int, ...], value: int) -> None:
    check_pairs("conv", pack, (20, 6, 3, 3))
    wrong = {name: tensor.clone() for name, tensor in pack._asdict().items()}
    wrong[field][at] = value
    with pytest.raises(ValueError, match=r"^conv: expected"):
        check_pairs("conv", PairPack(**wrong), (20, 6, 3, 3))


def test_packs_of_another_weight(pack: PairPack) -> None:
    for shape in ((40, 6, 3, 3), (20, 2, 3, 3), (20, 6, 1, 1), (20, 6, 8, 8)):
        with pytest.raises(ValueError, match=r"^conv: expected"):
            check_pairs("conv", pack, shape)
    with pytest.raises(TypeError, match="bfloat16"):
        check_pairs("conv", pack._replace(weights=pack.weights.float()), (20, 6, 3, 3))
    with pytest.raises(ValueError, match="plain contiguous CPU"):
        check_pairs("conv", pack._replace(groups=pack.groups.T.contiguous().T), (20, 6, 3, 3))
    with pytest.raises(ValueError, match="tensors of shape"):
        check_pairs("conv", pack._replace(weights=pack.weights[:1]), (20, 6, 3, 3))


def test_steps_refuse_tensors_that_do_not_fit(pack: PairPack) -> None:
    conv = PairsConv2d("scalar", pack, (20, 6, 3, 3), (1, 1), (1, 1), (1, 1), "relu")
    x = torch.zeros(pairs_shape(17, 4, 4, 6), dtype=torch.bfloat16)
    y = torch.zeros(pairs_shape(17, 4, 4, 20), dtype=torch.bfloat16)
    conv.step(x, y, None, 17)
    shifted = torch.zeros(x.numel() + 2, dtype=torch.bfloat16)[2:].view(x.shape)
    wrong: list[tuple[Any, ...]] = [
        (x, y, None, 33), (x, y, None, 0), (x[:, 1:], y, None, 17), (x.float(), y, None, 17), (shifted, y, None, 17),
        (x, y[:, :, :, 1:].contiguous(), None, 17), (x, torch.zeros(2, 4, 4, 19, 16), None, 17), (x, y, None, 17, x),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"^bsr_conv2d: expected"):
            conv.step(*arguments)
    with pytest.raises(TypeError, match="bias"):
        conv.step(x, y, torch.zeros(20).double(), 17)
    images = torch.zeros(17, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    to_pairs_step("scalar", images, x, 17)
    for a, b, n in ((images, x, 16), (images.contiguous(), x, 17), (images, y, 17), (images.double(), x, 17)):
        with pytest.raises(ValueError, match=r"^to_pairs_step: expected"):
            to_pairs_step("scalar", a, b, n)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"engine": 4}, "engine = 4"), ({"strip": 32}, "strips of 16"), ({"lanes": 8}, "16 images"),
        ({"r": 8, "s": 8}, "more taps"), ({"tap_ptr": 0}, "tap_ptr"), ({"p": 5}, "size of the output"),
        ({"h": 2**16, "w": 2**16}, "2\\^31"), ({"to_floats": 2}, "to_floats"), ({"x": 0}, "x or y"),
    ],
)  # fmt: skip
def test_the_bindings_refuse(pack: PairPack, wrong: dict[str, int], words: str) -> None:
    conv = PairsConv2d("scalar", pack, (20, 6, 3, 3), (1, 1), (1, 1), (1, 1), "relu")
    x, y = (torch.zeros(pairs_shape(1, 4, 4, c), dtype=torch.bfloat16) for c in (6, 20))
    step, module = conv.step(x, y, None, 1), library()[0]
    assert module is not None
    module.Steps("scalar", [(step.kind, -1, *step.arguments)])
    with pytest.raises(ValueError, match=f"Steps: .*({words})"):
        module.Steps("scalar", [(step.kind, -1, *step.arguments._replace(**wrong))])
    unknown = module.Steps("scalar", [(step.kind, -1, *step.arguments._replace(engine=0))])
    assert unknown.run(1) != 0, "no engine"
