"""Native max and average pooling: the kernel in both layouts against torch in float64, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimkernels.inference.native_layers import native_layers
from slimkernels.kernels.cpu.library import library, unavailable_reason
from slimkernels.kernels.cpu.pooling import (
    Pooling,
    adaptive_average_pooling,
    average_pooling,
    max_pooling,
)
from slimkernels.kernels.cpu.steps import (
    AVERAGE_POOL,
    LAST_KIND,
    MAX_POOL,
    PADDED_AVERAGE_POOL,
    Steps,
    images_innermost,
    layout_step,
)
from slimkernels.kernels.problems import LANES

ISAS = [isa for isa in LANES if unavailable_reason(isa) is None]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")

# kind, kernel, stride, padding, dilation, height, width
WINDOWS = {
    "max 3x3 of stride 2": (MAX_POOL, (3, 3), (2, 2), (1, 1), (1, 1), 9, 8),
    "max 2x3, uneven": (MAX_POOL, (2, 3), (1, 2), (1, 0), (1, 1), 5, 7),
    "max with gaps": (MAX_POOL, (3, 2), (1, 1), (1, 1), (2, 3), 8, 9),
    "max of nothing but padding": (MAX_POOL, (2, 2), (1, 1), (1, 1), (3, 3), 2, 2),
    "mean 3x3 of stride 2": (AVERAGE_POOL, (3, 3), (2, 2), (1, 1), (1, 1), 8, 7),
    "mean with zeros": (PADDED_AVERAGE_POOL, (3, 3), (2, 2), (1, 1), (1, 1), 8, 7),
    "global mean": (AVERAGE_POOL, (7, 5), (7, 5), (0, 0), (1, 1), 7, 5),
    "one pixel": (AVERAGE_POOL, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1),
}


def pooled(pool: Pooling, x: Tensor) -> Tensor:
    """The definition, by torch in float64."""
    if pool.kind == MAX_POOL:
        return torch.nn.functional.max_pool2d(x.double(), pool.kernel, pool.stride, pool.padding, pool.dilation)
    padded = pool.kind == PADDED_AVERAGE_POOL
    return torch.nn.functional.avg_pool2d(x.double(), pool.kernel, pool.stride, pool.padding, False, padded)


def images(n: int, channels: int, h: int, w: int) -> Tensor:
    return torch.randn(n, channels, h, w).contiguous(memory_format=torch.channels_last)


def run(pool: Pooling, x: Tensor, *, innermost: bool) -> Tensor:
    n, channels, h, w = x.shape
    p, q = pool.output_size(h, w)
    y = torch.full((n, p, q, channels), torch.nan).permute(0, 3, 1, 2)
    if not innermost:
        Steps(pool.isa, [pool.step(x, y, n, {}, None, (1, 1))])()
        return y
    a, b = (torch.full(images_innermost(n, *size, channels, pool.isa), torch.nan) for size in ((h, w), (p, q)))
    steps = [layout_step(x, a, n), pool.step(a, b, n, {}, None, (1, 1)), layout_step(b, y, n)]
    Steps(pool.isa, steps)()
    return y


# Channels below, at and beyond a vector and four of them; images that do not fill a vector.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (3, 19), (5, 64), (17, 77)])
@pytest.mark.parametrize("innermost", [False, True], ids=["channels last", "images innermost"])
def test_windows(isa: str, window: str, n: int, channels: int, innermost: bool) -> None:
    kind, kernel, stride, padding, dilation, h, w = WINDOWS[window]
    pool = Pooling(isa, kind, channels, kernel, stride, padding, dilation)
    x = images(n, channels, h, w)
    want, got = pooled(pool, x), run(pool, x, innermost=innermost)
    if kind == MAX_POOL:
        assert torch.equal(got, want.float())
    else:
        bound = (kernel[0] * kernel[1] + 3) * 2.0**-24 * pooled(pool, x.abs())
        assert bool(((got.double() - want).abs() <= bound).all())
    torch.testing.assert_close(pool(x), want.float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [MAX_POOL, AVERAGE_POOL])
def test_numbers_that_are_not_finite_stay_in_their_windows(isa: str, kind: int) -> None:
    pool, x = Pooling(isa, kind, 21, (3, 3), (1, 1), (1, 1)), images(2, 21, 6, 6)
    x[0, 3, 0, 0], x[0, 20, 3, 3], x[1, 0, 5, 5] = torch.nan, torch.nan, -torch.inf
    for innermost in (False, True):
        torch.testing.assert_close(run(pool, x, innermost=innermost), pooled(pool, x).float(), equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    pool, x = Pooling(isa, AVERAGE_POOL, 32, (3, 3), (2, 2), (1, 1)), images(6, 32, 15, 15)
    alone = run(pool, x, innermost=False)
    torch.set_num_threads(3)
    assert torch.equal(run(pool, x, innermost=False), alone)


def test_torchs_arguments() -> None:
    x, isa = (4, 8, 8), ISAS[0]
    assert max_pooling(isa, x, 2) == Pooling(isa, MAX_POOL, 4, (2, 2), (2, 2))
    assert max_pooling(isa, x, [3], [2, 1], [1]) == Pooling(isa, MAX_POOL, 4, (3, 3), (2, 1), (1, 1))
    assert average_pooling(isa, x, [2, 4], []) == Pooling(isa, PADDED_AVERAGE_POOL, 4, (2, 4), (2, 4))
    assert average_pooling(isa, x, 3, 2, 1, False, False) == Pooling(isa, AVERAGE_POOL, 4, (3, 3), (2, 2), (1, 1))
    assert adaptive_average_pooling(isa, x, [1, 1]) == Pooling(isa, AVERAGE_POOL, 4, (8, 8), (8, 8))
    assert adaptive_average_pooling(isa, x, [None, 2]) == Pooling(isa, AVERAGE_POOL, 4, (1, 4), (1, 4))
    # Sizes that are rounded up where that changes nothing.
    assert max_pooling(isa, x, 2, ceil_mode=True) == max_pooling(isa, x, 2)


@pytest.mark.parametrize(
    "found",
    [
        lambda isa, x: max_pooling(isa, x, 3, 2, ceil_mode=True),
        lambda isa, x: average_pooling(isa, x, 2, divisor_override=3),
        lambda isa, x: adaptive_average_pooling(isa, x, [3, 3]),
        lambda isa, x: adaptive_average_pooling(isa, x, [16, 8]),
        lambda isa, x: adaptive_average_pooling(isa, x, 0),
        lambda isa, x: max_pooling(isa, x, 9),
    ],
    ids=["sizes rounded up", "a divisor", "windows that overlap", "larger outputs", "no output", "a large window"],
)
def test_what_stays_torchs(found: Any) -> None:
    assert found(ISAS[0], (4, 8, 8)) is None


@pytest.mark.parametrize("wrong", [lambda x: x[0], lambda x: x.double(), lambda x: x[:0]])
def test_what_is_no_batch_of_float32_images_stays_torchs(wrong: Any) -> None:
    x, op = images(1, 4, 8, 8), torch.ops.aten.max_pool2d.default
    assert native_layers(op, (x, [2, 2])) == [max_pooling(ISAS[-1], (4, 8, 8), 2)]
    assert native_layers(op, (wrong(x), [2, 2])) == []


def test_tensors_that_do_not_fit_are_refused() -> None:
    pool, x, y = Pooling(ISAS[0], MAX_POOL, 4, (2, 2), (2, 2)), images(2, 4, 8, 8), images(2, 4, 4, 4)
    pool.step(x, y, 2, {}, None, (1, 1))
    for wrong in [
        (x[:, :3], y, 2), (x, y[:1], 2), (x, y[:, :, :3], 2), (x, y, 3), (x.double(), y, 2), (x, y.contiguous(), 2),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"^max_pool2d: expected float32 x and y that fit"):
            pool.step(*wrong, {}, None, (1, 1))
    with pytest.raises(ValueError, match=r"^max_pool2d: expected"):
        pool.step(x, y, 2, {}, y, (1, 1))
    with pytest.raises(ValueError, match=r"^max_pool2d: expected"):
        replace(pool, channels=8).step(x, y, 2, {}, None, (1, 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": 0}, "n = 0 is out of range"), ({"c_in": 0}, "c_in = 0"), ({"r": 0}, "r = 0"),
        ({"stride_w": 0}, "stride_w"), ({"dil_h": 0}, "dil_h"),
        ({"pad_h": -1}, "pad_h"), ({"h": 2**31}, "h = "), ({"lanes": 3}, "no known vector"),
        ({"parts_h": 2, "n": 2}, "whole images"), ({"p": 3}, "size of the output"), ({"q": 5}, "size of the output"),
        ({"h": 2**16, "w": 2**16}, "2\\^31 elements"), ({"n": 2**62}, "n is out of range"),
        ({"x": 0}, "x or y is NULL"), ({"r": 2**20, "dil_h": 2**20}, "size of the output|2\\^31"),
    ],
)  # fmt: skip
def test_the_bindings_refuse(wrong: dict[str, int], words: str) -> None:
    module, pool = library()[0], Pooling("scalar", MAX_POOL, 4, (2, 2), (2, 2))
    assert module is not None
    step = pool.step(images(1, 4, 8, 8), images(1, 4, 4, 4), 1, {}, None, (1, 1))
    module.Steps("scalar", [(step.kind, -1, *step.arguments)])
    with pytest.raises(ValueError, match=f"Steps: .*({words})"):
        module.Steps("scalar", [(step.kind, -1, *step.arguments._replace(**wrong))])
    with pytest.raises(ValueError, match="no known step"):
        module.Steps("scalar", [(LAST_KIND + 1, -1, *step.arguments)])
