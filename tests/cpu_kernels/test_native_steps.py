"""Recorded native steps: layouts, slots and bad tensors, against the op's own definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu.library import library, unavailable_reason
from slimkernels.kernels.cpu.steps import MovableSteps
from slimkernels.kernels.image_parts import WHOLE, image_parts
from slimkernels.kernels.problems import LANES

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


def packed_conv(
    isa: str, c_in: int, c_out: int, strip: int, taps: int = 9, epilogue: str = "relu", stride: int = 1, seed: int = 0
) -> tuple[native.PackedConv2d, Tensor, Tensor]:
    """A random pack with a third of its entries stored, the dense weight it stands for, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    side = 3 if taps == 9 else 1
    strips = -(-c_out // strip)
    stored = torch.rand(strips, taps, c_in, generator=generator) < 0.33
    weights = torch.randn(int(stored.sum()), strip, generator=generator)
    dense = torch.zeros(strips, taps, c_in, strip)
    dense[stored] = weights
    dense = dense.permute(0, 3, 2, 1).reshape(strips * strip, c_in, side, side)[:c_out]
    counts = stored.sum(2).reshape(-1)
    tap_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    channels = stored.nonzero()[:, 2].int()
    if c_out % strip:  # lanes beyond the last output channel weigh nothing
        weights[int(tap_ptr[(strips - 1) * taps]) :, c_out % strip :] = 0
    pad = side // 2
    conv = native.PackedConv2d(
        isa, [weights, channels, tap_ptr], (c_out, c_in, side, side), (stride, stride), (pad, pad), (1, 1), epilogue
    )
    return conv, dense, torch.randn(c_out, generator=generator)


def expected(x: Tensor, dense: Tensor, bias: Tensor, epilogue: str, stride: int = 1) -> tuple[Tensor, Tensor]:
    """The outputs in float64, and the bound of float32 rounding of each: terms x 2^-24 x summed magnitudes."""
    pad = dense.shape[2] // 2

    def conv(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(a.double(), w.double(), b.double(), stride, pad)

    y, scale = conv(x, dense, bias), conv(x.abs(), dense.abs(), bias.abs())
    terms = dense[0].numel() + 3
    if epilogue != "none":
        y = y.relu()
    if epilogue == "relu_maxpool2":
        y, scale = (torch.nn.functional.max_pool2d(t, 2) for t in (y, scale))
    return y, terms * 2.0**-24 * scale


def images(n: int, c: int, h: int, w: int, seed: int = 1) -> Tensor:
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def assert_within(y: Tensor, want: tuple[Tensor, Tensor]) -> None:
    assert y.shape == want[0].shape
    error = (y.double() - want[0]).abs()
    assert bool((error <= want[1]).all()), float((error / want[1]).max())


# Widths around the tiles: 3 pixels x 8 channels (AVX-512), 3 x 4; batches around a vector of 4, 8 or 16 images.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("strip", [1, 2, 4, 8, 16, 24, 32])
@pytest.mark.parametrize(
    ("n", "h", "w", "epilogue", "stride"),
    [(16, 5, 7, "relu", 1), (3, 4, 4, "none", 1), (17, 2, 2, "relu_maxpool2", 1), (33, 1, 1, "relu", 1),
     (8, 6, 6, "relu_maxpool2", 1), (20, 9, 4, "relu", 2)],
)  # fmt: skip
@pytest.mark.parametrize("c_out", [32, 37])
def test_images_innermost(isa: str, strip: int, n: int, h: int, w: int, epilogue: str, stride: int, c_out: int) -> None:
    conv, dense, bias = packed_conv(isa, 11, c_out, strip, epilogue=epilogue, stride=stride)
    x = images(n, 11, h, w)
    want = expected(x, dense, bias, epilogue, stride)
    p, q = want[0].shape[2:]
    lanes = LANES[isa]
    a, b = poisoned(*native.images_innermost(n, h, w, 11, isa)), poisoned(*native.images_innermost(n, p, q, c_out, isa))
    y = poisoned(n, p, q, c_out).permute(0, 3, 1, 2)
    steps = [
        native.layout_step(x, a, n),
        conv.step(a, b, bias, n, conv.entry_offsets(h, w, lanes)),
        native.layout_step(b, y, n),
    ]
    native.Steps(isa, steps)()
    assert_within(y, want)
    # The layout itself: image i is lane i % lanes of group i // lanes, and lanes without an image are zero.
    unfolded = a.permute(0, 4, 3, 1, 2).reshape(-1, 11, h, w)
    assert torch.equal(unfolded[:n], x) and not unfolded[n:].any()


@pytest.mark.parametrize("isa", ISAS)
def test_layouts_agree(isa: str) -> None:
    """Up to the order of an output's terms: the smallest channels-last tiles have several accumulators."""
    conv, _, bias = packed_conv(isa, 24, 32, 16)
    n, size = 16, 6
    x = images(n, 24, size, size)
    plain = poisoned(n, size, size, 32).permute(0, 3, 1, 2)
    native.Steps(isa, [conv.step(x, plain, bias, n, conv.entry_offsets(size, size))])()
    a, b = (poisoned(*native.images_innermost(n, size, size, c, isa)) for c in (24, 32))
    steps = [native.layout_step(x, a, n), conv.step(a, b, bias, n, conv.entry_offsets(size, size, LANES[isa]))]
    native.Steps(isa, steps)()
    back = b.permute(0, 4, 3, 1, 2).reshape(-1, 32, size, size)
    torch.testing.assert_close(back[:n], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_slots_run_beside_each_other_and_in_order(isa: str, threads: int) -> None:
    """Two layers for four pieces in four slots, then a shared step that reads what all of them wrote."""
    first, dense1, bias1 = packed_conv(isa, 8, 16, 16, seed=1)
    second, dense2, bias2 = packed_conv(isa, 16, 8, 8, seed=2)
    third, dense3, bias3 = packed_conv(isa, 8, 8, 8, taps=1, seed=3)
    x = images(8, 8, 5, 5)
    middle, y, z = (poisoned(8, 5, 5, c).permute(0, 3, 1, 2) for c in (16, 8, 8))
    steps = []
    for i in range(4):
        part = slice(2 * i, 2 * i + 2)
        one = first.step(x[part], middle[part], bias1, 2, first.entry_offsets(5, 5))
        two = second.step(middle[part], y[part], bias2, 2, second.entry_offsets(5, 5))
        steps += [one._replace(slot=i), two._replace(slot=i)]
    steps.append(third.step(y, z, bias3, 8, third.entry_offsets(5, 5)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run = native.Steps(isa, steps)
        run()
        once = z.clone()
        z.fill_(torch.nan)
        run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(z, once)
    value = x.double()
    for dense, bias in ((dense1, bias1), (dense2, bias2), (dense3, bias3)):
        value = torch.nn.functional.conv2d(value, dense.double(), bias.double(), 1, dense.shape[2] // 2).relu()
    torch.testing.assert_close(z.double(), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
def test_a_wrong_entry_is_seen(isa: str) -> None:
    """The bound is tight enough for one weight of one strip at one tap to matter."""
    conv, dense, bias = packed_conv(isa, 11, 16, 16)
    n, lanes = 16, LANES[isa]
    x = images(n, 11, 5, 5)
    want = expected(x, dense, bias, "relu")
    dense[3, 5, 1, 1] += 0.01
    wrong = expected(x, dense, bias, "relu")
    a, b = (poisoned(*native.images_innermost(n, 5, 5, c, isa)) for c in (11, 16))
    native.Steps(isa, [native.layout_step(x, a, n), conv.step(a, b, bias, n, conv.entry_offsets(5, 5, lanes))])()
    y = b.permute(0, 4, 3, 1, 2).reshape(-1, 16, 5, 5)[:n]
    assert_within(y, want)
    with pytest.raises(AssertionError):
        assert_within(y, wrong)


@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_images_stay_in_their_lane(isa: str) -> None:
    conv, _, bias = packed_conv(isa, 4, 8, 8)
    n = lanes = LANES[isa]
    x = images(n, 4, 3, 3)
    x[1] = torch.nan
    x[2] = torch.inf
    a, b = (poisoned(*native.images_innermost(n, 3, 3, c, isa)) for c in (4, 8))
    native.Steps(isa, [native.layout_step(x, a, n), conv.step(a, b, bias, n, conv.entry_offsets(3, 3, lanes))])()
    finite = torch.isfinite(b).flatten(1, 3).all(1)[0]
    assert not finite[1] and not finite[2]
    assert bool(finite[0]) and bool(finite[3:].all())


@pytest.mark.parametrize("isa", ISAS)
def test_single_weights_follow_writes_to_their_pack(isa: str) -> None:
    """What the kernel reads of them is a copy in another order."""
    conv, _, _ = packed_conv(isa, 11, 16, 1, epilogue="none")
    x = images(LANES[isa], 11, 6, 6)
    once = conv(x, None)
    conv.packed.weights.mul_(2)
    assert bool(once.any()) and torch.equal(conv(x, None), 2 * once)


@pytest.mark.parametrize("isa", ISAS)
def test_single_weights_ordered_for_other_images_are_ordered_again(isa: str) -> None:
    """How entries are ordered depends on the size of the images, which their number need not tell."""
    conv, _, bias = packed_conv(isa, 11, 16, 1)
    n, lanes = LANES[isa], LANES[isa]
    x = images(n, 11, 4, 4)
    own, other = conv.entry_offsets(4, 4, lanes), conv.entry_offsets(9, 9, lanes)
    assert own.numel() == other.numel() and not torch.equal(own, other)
    results = []
    for offsets in (own, other):
        a, b = (poisoned(*native.images_innermost(n, 4, 4, c, isa)) for c in (11, 16))
        native.Steps(isa, [native.layout_step(x, a, n), conv.step(a, b, bias, n, offsets)])()
        results.append(b)
    assert bool(torch.isfinite(results[0]).all()) and torch.equal(*results)


# Images around the tiles of 4x4, 2x4 and 2x2 pixels, and input channels in one slab and in several.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("h", "w", "stride", "c_in"), [(3, 10, 1, 80), (4, 4, 1, 150), (11, 8, 2, 40), (2, 2, 1, 500)])
@pytest.mark.parametrize("epilogue", ["none", "relu_maxpool2"])
def test_slabs(isa: str, h: int, w: int, stride: int, c_in: int, epilogue: str) -> None:
    conv, dense, bias = packed_conv(isa, c_in, 19, 1, epilogue=epilogue, stride=stride)
    n = LANES[isa] + 1
    x = images(n, c_in, h, w)
    assert_within(conv(x, bias), expected(x, dense, bias, epilogue, stride))


def test_how_images_are_cut_into_parts() -> None:
    def cut(n: int, h: int, w: int, *, lanes: int = 16, stride: int = 1, shrink: int = 0, pool: bool = False):
        output = h // stride - shrink, w // stride - shrink
        return image_parts(n, lanes, (3, 3), (stride, stride), (h, w), output, pool)

    assert [cut(n, 32, 32) for n in (1, 2, 3, 4, 5, 8, 9, 16, 100)] == [
        (4, 4),
        (2, 4),
        (2, 2),
        (2, 2),
        (1, 2),
        (1, 2),
    ] + [WHOLE] * 3
    assert [cut(1, 8, 8, lanes=lanes) for lanes in (4, 8)] == [(2, 2), (2, 4)]
    # Sizes that do not divide, and pools that would lie in two parts, take fewer.
    assert [cut(1, 4, 4), cut(1, 4, 4, pool=True), cut(1, 2, 2), cut(1, 2, 2, pool=True)] == [
        (4, 4),
        (2, 2),
        (2, 2),
        WHOLE,
    ]
    assert [cut(1, 14, 14), cut(1, 7, 7), cut(1, 12, 20), cut(1, 3, 4)] == [(2, 2), WHOLE, (4, 4), (1, 2)]
    # The outputs of a part are computed from its own pixels and the neighbours' border.
    assert [cut(1, 16, 16, stride=2), cut(1, 16, 16, shrink=2), cut(1, 9, 9, stride=2)] == [(4, 4), WHOLE, WHOLE]
    assert image_parts(1, 16, (33, 1), (1, 1), (64, 64), (64, 64), False) == WHOLE


# Parts of one pixel, of a column, of a tile and more; borders in both directions, strides, several slabs.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("h", "w", "stride", "c_in", "taps"),
    [(4, 4, 1, 150, 9), (2, 2, 1, 100, 9), (8, 8, 1, 60, 9), (4, 16, 2, 20, 9), (24, 8, 1, 9, 9), (8, 4, 1, 300, 1)],
)
@pytest.mark.parametrize("epilogue", ["none", "relu_maxpool2"])
def test_parts_of_images(isa: str, n: int, h: int, w: int, stride: int, c_in: int, taps: int, epilogue: str) -> None:
    conv, dense, bias = packed_conv(isa, c_in, 37, 1, taps, epilogue, stride)
    x = images(n, c_in, h, w)
    y = conv(x, bias)
    assert_within(y, expected(x, dense, bias, epilogue, stride))
    assert torch.equal(conv(x, bias), y)
    if n == 1:
        # What is not finite reaches the outputs that read it, across the borders of parts, and no others.
        at = 0, 0, h // 2, w // 2
        x[at], reading = torch.nan, torch.zeros_like(x)
        reading[at] = 1
        readers = expected(reading, (dense != 0).float(), torch.zeros(37), epilogue, stride)[0]
        assert torch.equal(conv(x, bias).isnan(), readers > 0)


@pytest.mark.parametrize("isa", ISAS)
def test_steps_in_parts_are_checked(isa: str) -> None:
    conv, _, bias = packed_conv(isa, 8, 16, 1)
    parts, lanes = conv.parts(1, 8, 8), LANES[isa]
    assert parts != WHOLE
    x = images(1, 8, 8, 8)
    a, b = (torch.zeros(native.images_innermost(1, 8, 8, c, isa, parts)) for c in (8, 16))
    offsets = conv.entry_offsets(8, 8, lanes, parts)
    native.layout_step(x, a, 1, parts)
    conv.step(a, b, bias, 1, offsets, parts=parts)
    for wrong in (WHOLE, (parts[0], 1), (3, parts[1]), (1, lanes)):
        with pytest.raises(ValueError, match="layout_step: expected 1 images"):
            native.layout_step(x, a, 1, wrong)
        if wrong != WHOLE:  # as well the only image of a vector, of the size of a part
            with pytest.raises(ValueError, match="bsr_conv2d: expected float32 x and y"):
                conv.step(a, b, bias, 1, offsets, parts=wrong)
    strips, _, bias = packed_conv(isa, 8, 16, 4)
    assert strips.parts(1, 8, 8) == WHOLE


def test_tensors_that_do_not_fit_are_refused() -> None:
    isa = ISAS[0]
    lanes = LANES[isa]
    conv, _, bias = packed_conv(isa, 8, 16, 16)
    x, y = images(lanes, 8, 4, 4), torch.empty(lanes, 4, 4, 16).permute(0, 3, 1, 2)
    a, b = (torch.empty(native.images_innermost(lanes, 4, 4, c, isa)) for c in (8, 16))
    offsets = conv.entry_offsets(4, 4)
    conv.step(x, y, bias, lanes, offsets)
    message = "bsr_conv2d: expected float32 x and y that fit this weight and"
    for wrong in (
        (x.contiguous(), y, lanes, offsets), (x, y.contiguous(), lanes, offsets), (x, y, lanes + 1, offsets),
        (x.double(), y, lanes, offsets), (x[:, :4], y, lanes, offsets), (x, y[:, :8], lanes, offsets),
        (x, y, lanes, offsets[:-1]), (a, y, lanes, offsets), (x, b, lanes, offsets), (a[..., :-1], b, lanes, offsets),
        (a, b, lanes + 1, offsets), (x[:0], y[:0], 0, offsets),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            conv.step(wrong[0], wrong[1], bias, wrong[2], wrong[3])
    narrow, _, bias = packed_conv(isa, 8, 16, 4)
    narrow.step(a, b, bias, lanes, narrow.entry_offsets(4, 4, lanes))
    with pytest.raises(ValueError, match=message):  # strips of 4 channels read images innermost only
        narrow.step(x, y, bias, lanes, narrow.entry_offsets(4, 4))
    for pair in ((x, b), (x.contiguous(), a), (x.double(), a.double()), (x[1:], a), (x, a[..., 1:])):
        with pytest.raises(ValueError, match="layout_step: expected"):
            native.layout_step(*pair, lanes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(("n", "size", "c_out", "taps", "epilogue"), [(3, 5, 37, 9, "relu"), (18, 1, 16, 1, "none")])
def test_a_residual_is_added_in_front_of_the_relu(
    isa: str, innermost: bool, n: int, size: int, c_out: int, taps: int, epilogue: str
) -> None:
    conv, dense, bias = packed_conv(isa, 19, c_out, 16, taps, epilogue)
    x, residual = images(n, 19, size, size), images(n, c_out, size, size, seed=2)
    residual[0, 3, 0, 0] = torch.nan
    sums, bound = expected(x, dense, bias, "none")
    want = sums + residual.double()
    if epilogue == "relu":
        want = want.relu()
    y = poisoned(n, size, size, c_out).permute(0, 3, 1, 2)
    lanes = LANES[isa] if innermost else 1
    own = [x, residual, y]
    steps = []
    if innermost:
        own = [poisoned(*native.images_innermost(n, size, size, c, isa)) for c in (19, c_out, c_out)]
        steps = [native.layout_step(far, near, n) for far, near in zip((x, residual), own)]
    steps.append(conv.step(own[0], own[2], bias, n, conv.entry_offsets(size, size, lanes), own[1]))
    if innermost:
        steps.append(native.layout_step(own[2], y, n))
    native.Steps(isa, steps)()
    assert torch.equal(y.isnan(), want.isnan()) and int(want.isnan().sum()) == 1
    error = (y.double() - want).abs().nan_to_num(0)
    assert bool((error <= bound + 2.0**-23 * (sums.abs() + residual.abs()).nan_to_num(0)).all())


@pytest.mark.parametrize("wrong", ["shape", "layout", "dtype", "pooling"])
def test_a_residual_has_the_layout_of_the_output(wrong: str) -> None:
    epilogue = "relu_maxpool2" if wrong == "pooling" else "relu"
    conv, _, bias = packed_conv(ISAS[-1], 16, 16, 16, 9, epilogue)
    side = 2 if wrong == "pooling" else 4
    x, y, residual = images(2, 16, 4, 4), images(2, 16, side, side), images(2, 16, side, side)
    if wrong == "shape":
        residual = residual[:1]
    elif wrong == "layout":
        residual = residual.contiguous()
    elif wrong == "dtype":
        residual = residual.double()
    with pytest.raises(ValueError, match="bsr_conv2d: expected a float32 residual laid out like y and no pooling"):
        conv.step(x, y, bias, 2, conv.entry_offsets(4, 4), residual)


def test_the_bindings_refuse_a_residual_in_front_of_pooling() -> None:
    conv, _, bias = packed_conv(ISAS[-1], 16, 16, 16, 9, "relu_maxpool2")
    x, y = images(2, 16, 4, 4), images(2, 16, 2, 2)
    step = conv.step(x, y, bias, 2, conv.entry_offsets(4, 4))
    step = step._replace(arguments=step.arguments._replace(residual=x.data_ptr()))
    with pytest.raises(ValueError, match="residual"):
        native.Steps(ISAS[-1], [step])


def test_steps_on_other_memory_in_every_call() -> None:
    """Input, output, residual and workspace lie elsewhere in each call; the weights stay."""
    isa = ISAS[-1]
    conv, _, bias = packed_conv(isa, 16, 16, 16, 9, "relu")

    def memory() -> tuple[Tensor, Tensor, Tensor]:
        return images(2, 16, 4, 4), images(2, 16, 4, 4), torch.empty(4 * 2 * 16 * 16, dtype=torch.uint8)

    def made(x: Tensor, y: Tensor, workspace: Tensor) -> list[native.Step]:
        middle = workspace.view(torch.float32).view(2, 4, 4, 16).permute(0, 3, 1, 2)
        offsets = conv.entry_offsets(4, 4)
        return [conv.step(x, middle, bias, 2, offsets), conv.step(middle, y, bias, 2, offsets, x)]

    movable = MovableSteps(isa, made(*(first := memory())), first)
    kept = [t.clone() for t in first]
    calls = [memory() for _ in range(3)]
    for x, y, workspace in calls:
        movable(x, y, workspace)
        expected = torch.empty_like(y)
        native.Steps(isa, made(x, expected, workspace))()
        assert torch.equal(y, expected) and y.abs().sum() > 0
    assert all(torch.equal(t, was) for t, was in zip(first, kept))
    x, y, workspace = calls[0]
    others = [x[:1], x.contiguous(), x.double(), x._neg_view()]
    for given in ((x, y), (x, y, workspace[1:]), *((other, y, workspace) for other in others)):
        with pytest.raises(ValueError, match="MovableSteps: expected dense CPU tensors like"):
            movable(*given)
    module = library()[0]
    numbers = [(step.kind, step.slot, *step.arguments) for step in made(x, y, workspace)]
    raw = module.Steps(isa, numbers, [(x.data_ptr(), 8)])
    for addresses in ([], [0], [x.data_ptr()] * 2):
        with pytest.raises(ValueError, match="Steps: expected the address of every movable memory"):
            raw.run_at(addresses, 1)
    with pytest.raises(ValueError, match="at least one thread"):
        raw.run_at([x.data_ptr()], 0)
