"""Addresses of the gradient and low-rank kernels at the sizes that a GPU will see: see address_cases.py."""

from __future__ import annotations

import numpy as np
import pytest
from address_layers import (
    CIFAR,
    H100,
    IMAGENET,
    Layer,
    every_unpooled_layer,
    nhwc,
    on_an_h100,  # noqa: F401 (a fixture)
    unravelled,
    virtual,
    weight_of,
)
from address_replay import Accesses, Launched, replaying, sample

from slimkernels.formats import BSRWeight
from slimkernels.kernels.triton import (
    bsr_conv2d_backward_w,
    bsr_conv2d_backward_x,
    low_rank_conv2d,
    low_rank_linear,
    relu_maxpool2_backward,
    runtime,
    sums,
)


def input_gradient(layer: Layer, weight: BSRWeight) -> None:
    bsr_conv2d_backward_x.launch(
        virtual(layer.batch, layer.c_out, layer.size, layer.size), weight.values.to("meta"), weight.crow_indices,
        weight.col_indices, None, (layer.size, layer.size), weight.weight_shape, weight.block_shape, (1, 1), (1, 1),
        (1, 1),
    )  # fmt: skip


def check_input_gradient_program(layer: Layer, weight: BSRWeight, accesses: Accesses) -> None:
    """dx[h, w] of a channel group is made of dy[h + 1 - r, w + 1 - s] for the group's stored blocks."""
    written = accesses.written("dx_ptr")
    assert len(np.unique(written)) == len(written), "a gradient is written twice"
    pixels, channels = np.unique(written // layer.c_in), np.unique(written % layer.c_in)
    block_out, block_in = weight.block_shape
    crow, col = weight.crow_indices.numpy(), weight.col_indices.numpy()
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    groups = layer.c_in // block_in
    n, h, w = unravelled(pixels, layer.batch, layer.size, layer.size)
    expected_y, expected_w = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for group in np.unique(channels // block_in):
        inside_group = channels[channels // block_in == group] % block_in
        for block in np.flatnonzero(col[: crow[-1]] % groups == group):
            tap = int(col[block]) // groups
            read = rows[block] * block_out + np.arange(block_out)
            expected_y.append(nhwc(layer, n, h + 1 - tap // 3, w + 1 - tap % 3, read, layer.c_out))
            places = (block * block_out + np.arange(block_out))[:, None] * block_in + inside_group[None, :]
            expected_w.append(places.ravel())
    assert np.array_equal(accesses.read("dy_ptr"), np.unique(np.concatenate(expected_y)))
    assert np.array_equal(accesses.read("values_ptr"), np.unique(np.concatenate(expected_w)))


@every_unpooled_layer
def test_input_gradient(monkeypatch: pytest.MonkeyPatch, layer: Layer, block_shape: tuple[int, int]) -> None:
    weight = weight_of(layer, block_shape)
    with replaying(monkeypatch, sample) as replay:
        input_gradient(layer, weight)
    for accesses in replay.launches[0].programs.values():
        check_input_gradient_program(layer, weight, accesses)


@pytest.mark.parametrize("batch", (16382, 16383), ids=("below", "at"))
def test_input_gradient_around_2_to_the_31(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    layer = Layer(64, 128, 32, False, batch)
    weight = weight_of(layer, (128, 16), 0.95)
    with replaying(monkeypatch, sample) as replay:
        input_gradient(layer, weight)
    assert replay.launches[0].arguments["INDEX_64"] is (batch > 16382)
    for accesses in replay.launches[0].programs.values():
        check_input_gradient_program(layer, weight, accesses)


def weight_gradient(layer: Layer, weight: BSRWeight) -> None:
    bsr_conv2d_backward_w.launch(
        virtual(layer.batch, layer.c_out, layer.size, layer.size),
        virtual(layer.batch, layer.c_in, layer.size, layer.size), weight.values.to("meta"), weight.crow_indices,
        weight.col_indices, weight.weight_shape, weight.block_shape, (1, 1), (1, 1), (1, 1),
    )  # fmt: skip


def check_weight_gradient_program(layer: Layer, weight: BSRWeight, launched: Launched, accesses: Accesses) -> None:
    """A partial sum of stored blocks reads one range of output pixels, and the input under their taps."""
    written = accesses.written("out_ptr")
    if len(written) == 0:
        return
    assert len(np.unique(written)) == len(written), "a sum is written twice"
    block_out, block_in = weight.block_shape
    crow, col = weight.crow_indices.numpy(), weight.col_indices.numpy()
    groups, size = layer.c_in // block_in, weight.values.numel()
    (split,) = np.unique(written // size)
    blocks, outputs, _ = (
        np.unique(part) for part in unravelled(written % size, len(weight.values), *weight.block_shape)
    )
    (row,) = np.unique(np.searchsorted(crow, blocks, side="right") - 1)
    share = launched.arguments["split_pixels"]
    pixels = np.arange(split * share, min((split + 1) * share, layer.batch * layer.size**2))
    dy = (pixels[:, None] * layer.c_out + (row * block_out + outputs)[None, :]).ravel()
    assert np.array_equal(accesses.read("dy_ptr"), dy)
    n, p, q = unravelled(pixels, layer.batch, layer.size, layer.size)
    expected = []
    for block in blocks:
        tap, group = divmod(int(col[block]), groups)
        channels = np.arange(group * block_in, (group + 1) * block_in)
        expected.append(nhwc(layer, n, p + tap // 3 - 1, q + tap % 3 - 1, channels, layer.c_in))
    assert np.array_equal(accesses.read("x_ptr"), np.unique(np.concatenate(expected)))


def corners(launched: Launched) -> list[tuple[int, int, int]]:
    """The first tile of the first range of pixels and the last stored tile of the last one; of sums both ends."""
    if launched.kernel == "add_partials_kernel":
        return [(0, 0, 0), (launched.grid[0] - 1, 0, 0)]
    tiles = launched.arguments["column_tiles"]
    last = launched.grid[0] - tiles
    # A column tile too many is counted for every block row, so the last ones have nothing to do.
    stored = launched.arguments["crow_ptr"].diff() * launched.arguments["BSR_IN"]
    used = int((-(-stored // launched.arguments["BLOCK_M"])).sum())
    return [(0, 0, 0), (last + used - 1, 0, 0), (launched.grid[0] - 1, 0, 0)]


@every_unpooled_layer
def test_weight_gradient(monkeypatch: pytest.MonkeyPatch, layer: Layer, block_shape: tuple[int, int]) -> None:
    weight = weight_of(layer, block_shape)
    with replaying(monkeypatch, corners) as replay:
        weight_gradient(layer, weight)
    launched, *added = replay.launches
    assert any(accesses.stores for accesses in launched.programs.values())
    for accesses in launched.programs.values():
        check_weight_gradient_program(layer, weight, launched, accesses)
    for addition in added:
        check_addition(addition)


def check_addition(launched: Launched) -> None:
    """A program reads the elements that it writes, of every part."""
    elements, parts = launched.arguments["elements"], launched.arguments["parts"]
    for accesses in launched.programs.values():
        written = accesses.written("out_ptr")
        wanted = (np.arange(parts)[:, None] * elements + written[None, :]).ravel()
        assert np.array_equal(accesses.read("partial_ptr"), np.unique(wanted))
        assert written[0] % launched.arguments["BLOCK_N"] == 0
    assert written[-1] == elements - 1


@pytest.mark.parametrize("image", ((1024, 64, 32, 32), (32, 64, 224, 224), (1024, 512, 2, 2), (3, 130, 5, 7)), ids=str)
def test_bias_gradient(monkeypatch: pytest.MonkeyPatch, image: tuple[int, int, int, int]) -> None:
    n, c, p, q = image
    with replaying(monkeypatch, ends) as replay:
        sums.launch(virtual(*image))
    counted, added = replay.launches
    share, width = counted.arguments["part_pixels"], counted.arguments["BLOCK_N"]
    for (part, tile, _), accesses in counted.programs.items():
        pixels = np.arange(part * share, min((part + 1) * share, n * p * q))
        channels = np.arange(tile * width, min((tile + 1) * width, c))
        assert np.array_equal(accesses.read("grad_ptr"), (pixels[:, None] * c + channels[None, :]).ravel())
        assert np.array_equal(accesses.written("partial_ptr"), part * c + channels)
    check_addition(added)


def test_weight_gradient_beyond_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(512, 512, 14, False, 21400)
    weight = weight_of(layer, (128, 16), 0.95)
    monkeypatch.setattr(bsr_conv2d_backward_w, "MAX_SPLITS", 4096)  # short ranges: the addresses are what matters
    monkeypatch.setattr(
        bsr_conv2d_backward_w, "limits", lambda device: runtime.Limits(H100["shared_memory"], 10**6, False)
    )
    with replaying(monkeypatch, corners) as replay:
        weight_gradient(layer, weight)
    launched = replay.launches[0]
    assert launched.arguments["INDEX_64"] is True
    for accesses in launched.programs.values():
        check_weight_gradient_program(layer, weight, launched, accesses)


@pytest.mark.parametrize(
    "image", ((1024, 64, 32, 32), (32, 64, 224, 224), (1024, 512, 2, 2), (32, 512, 15, 13)), ids=str
)
def test_pool_gradient(monkeypatch: pytest.MonkeyPatch, image: tuple[int, int, int, int]) -> None:
    n, c, p, q = image
    with replaying(monkeypatch, sample) as replay:
        relu_maxpool2_backward.launch(virtual(n, c, p // 2, q // 2), virtual(*image))
    for accesses in replay.launches[0].programs.values():
        read, written = accesses.read("y_ptr"), accesses.written("y_ptr")
        assert len(np.unique(written)) == len(written)
        # Of a window that the image's edge cuts, one corner is read and all that lie inside are written.
        assert np.array_equal(read, written) if p % 2 == q % 2 == 0 else np.isin(read, written).all()


def ends(launched: Launched) -> list[tuple[int, int, int]]:
    """The first and the last program."""
    return [(0, 0, 0), (launched.grid[0] - 1, 0, 0)]


LONG = pytest.param((4096, 25088, 128), marks=pytest.mark.slow)
ABOVE_256 = pytest.param((1000, 4096, 300), marks=pytest.mark.slow)


@pytest.mark.parametrize("features", ((512, 512, 64), (10, 70, 3), LONG, ABOVE_256), ids=str)
@pytest.mark.parametrize("rows", (16, 1024))
def test_low_rank_linear(monkeypatch: pytest.MonkeyPatch, features: tuple[int, int, int], rows: int) -> None:
    """A program reads whole rows of x, all of V, and of U and the bias what belongs to the columns it writes."""
    n_out, n_in, rank = features
    with replaying(monkeypatch, ends) as replay:
        low_rank_linear.launch(
            virtual(rows, n_in), virtual(n_out, rank), virtual(rank, n_in), virtual(n_out), [], "relu"
        )
    for accesses in replay.launches[0].programs.values():
        written = accesses.written("y_ptr")
        assert len(np.unique(written)) == len(written)
        own, columns = np.unique(written // n_out), np.unique(written % n_out)
        assert np.array_equal(accesses.read("x_ptr"), (own[:, None] * n_in + np.arange(n_in)).ravel())
        assert np.array_equal(accesses.read("v_ptr"), np.arange(rank * n_in))
        assert np.array_equal(accesses.read("u_ptr"), (columns[:, None] * rank + np.arange(rank)).ravel())
        assert np.array_equal(accesses.read("bias_ptr"), columns)


LOW_RANK_LAYERS = (
    (CIFAR[0], 20),
    (IMAGENET[0], 24),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in ((CIFAR[-1], 128), (IMAGENET[-1], 100))),
)


@pytest.mark.parametrize(("layer", "rank"), LOW_RANK_LAYERS, ids=str)
@pytest.mark.parametrize("kind", ("svd", "tai"))
def test_low_rank_conv(monkeypatch: pytest.MonkeyPatch, layer: Layer, rank: int, kind: str) -> None:
    """Every launch reads all of its factors, and under each pixel the taps that lie inside the image."""
    shapes = {
        "svd": ((rank, layer.c_in, 3, 3), (layer.c_out, rank, 1, 1)),
        "tai": ((rank, layer.c_in, 3, 1), (layer.c_out, rank, 1, 3)),
    }[kind]
    with replaying(monkeypatch, ends) as replay:
        low_rank_conv2d.launch(
            virtual(layer.batch, layer.c_in, layer.size, layer.size), [virtual(*shape) for shape in shapes],
            virtual(layer.c_out), [], (1, 1), (1, 1), (1, 1), kind, "relu",
        )  # fmt: skip
    assert len(replay.launches) == {"svd": 1, "tai": 2}[kind]
    for launched in replay.launches:
        arguments = launched.arguments
        c_in, c_out, inner = (arguments[name] for name in ("c_in", "c_out", "inner"))
        taps = [(r, s) for r in range(arguments["R"]) for s in range(arguments["S"])]
        for accesses in launched.programs.values():
            written = accesses.written("y_ptr")
            assert len(np.unique(written)) == len(written)
            pixels, columns = np.unique(written // c_out), np.unique(written % c_out)
            n, p, q = unravelled(pixels, layer.batch, layer.size, layer.size)
            pad = arguments["PAD_H"], arguments["PAD_W"]
            expected = [nhwc(layer, n, p + r - pad[0], q + s - pad[1], np.arange(c_in), c_in) for r, s in taps]
            assert np.array_equal(accesses.read("x_ptr"), np.unique(np.concatenate(expected)))
            width = len(taps) * c_in
            factor_rows = np.arange(inner) if arguments["FUSED"] else columns
            assert np.array_equal(accesses.read("v_ptr"), (factor_rows[:, None] * width + np.arange(width)).ravel())
            if arguments["FUSED"]:
                assert np.array_equal(accesses.read("u_ptr"), (columns[:, None] * inner + np.arange(inner)).ravel())
            if arguments["HAS_BIAS"]:
                assert np.array_equal(accesses.read("bias_ptr"), columns)
