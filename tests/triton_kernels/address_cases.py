"""Addresses of the Triton kernels at the sizes that a GPU will see: run by test_addresses.py, TRITON_INTERPRET=1.

The layers are those of VGG-19 on 32x32 images at batch 1024 and of VGG-16 on 224x224 images at batch 32, the tile
configurations an H100's defaults. Beyond what a replay refuses by itself (`address_replay`), every program must read
exactly the elements that the convolution's definition names for what it writes, and write nothing twice.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from address_layers import (
    CIFAR,
    DTYPE,
    IMAGENET,
    Layer,
    every_layer,
    every_unpooled_layer,
    nhwc,
    on_an_h100,  # noqa: F401 (a fixture)
    unravelled,
    virtual,
    weight_of,
)
from address_replay import Accesses, Launched, everything, replaying, sample

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels.triton import (
    bsr_conv2d,
)
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order
from slimkernels.kernels.triton.runtime import INT32_MAX


def forward(
    layer: Layer, weight: BSRWeight, config: dict[str, int] | None = None, variant: str = "pixels_on_m"
) -> None:
    """The op's launch on tensors without storage, its index apart."""
    index = weight.crow_indices, weight.col_indices
    bsr_conv2d.launch(
        virtual(layer.batch, layer.c_in, layer.size, layer.size), weight.values.to("meta"), *index,
        virtual(layer.c_out), [forward_order(*index, weight.weight_shape, weight.block_shape)], weight.weight_shape,
        weight.block_shape, (1, 1), (1, 1), (1, 1), layer.epilogue, config, variant,
    )  # fmt: skip


def check_forward_program(layer: Layer, weight: BSRWeight, accesses: Accesses, variant: str = "pixels_on_m") -> None:
    """What a program writes decides what it may read: see the module's docstring.

    With one position a tile the weights of taps that lie outside the image are not read.
    """
    out = layer.size // 2 if layer.pool else layer.size
    written = accesses.written("y_ptr")
    assert len(np.unique(written)) == len(written), "an output is written twice"
    if len(written) == 0:
        return
    pixels, channels = np.unique(written // layer.c_out), np.unique(written % layer.c_out)
    assert len(pixels) * len(channels) == len(written)
    block_out, block_in = weight.block_shape
    crow, col = weight.crow_indices.numpy(), weight.col_indices.numpy()
    groups = layer.c_in // block_in
    n, p, q = unravelled(pixels, layer.batch, out, out)
    steps = (0, 1) if layer.pool else (0,)
    expected_x, expected_w = [], []
    for row in np.unique(channels // block_out):
        inside_row = channels[channels // block_out == row] % block_out
        for block in range(crow[row], crow[row + 1]):
            tap, group = divmod(int(col[block]), groups)
            if variant == "images_on_m":
                position = np.unique(p) + tap // 3 - 1, np.unique(q) + tap % 3 - 1
                assert [len(place) for place in position] == [1, 1], "a tile of several positions"
                if not all(0 <= place[0] < layer.size for place in position):
                    continue
            read = np.arange(group * block_in, (group + 1) * block_in)
            for dp, dq in product(steps, steps):
                scale = len(steps)
                h, w = p * scale + dp + tap // 3 - 1, q * scale + dq + tap % 3 - 1
                expected_x.append(nhwc(layer, n, h, w, read, layer.c_in))
            places = (block * block_out + inside_row)[:, None] * block_in + np.arange(block_in)[None, :]
            expected_w.append(places.ravel())
    nothing = np.empty(0, np.int64)
    assert np.array_equal(accesses.read("x_ptr"), np.unique(np.concatenate([nothing, *expected_x])))
    assert np.array_equal(accesses.read("values_ptr"), np.unique(np.concatenate([nothing, *expected_w])))
    assert np.array_equal(accesses.read("bias_ptr"), channels)


@every_layer
def test_forward(monkeypatch: pytest.MonkeyPatch, layer: Layer, block_shape: tuple[int, int]) -> None:
    weight = weight_of(layer, block_shape)
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight)
    (launched,) = replay.launches
    assert launched.arguments["INDEX_64"] is False and replay.hints > 0
    for accesses in launched.programs.values():
        check_forward_program(layer, weight, accesses)


@every_unpooled_layer
def test_forward_of_one_position_a_tile(
    monkeypatch: pytest.MonkeyPatch, layer: Layer, block_shape: tuple[int, int]
) -> None:
    weight = weight_of(layer, block_shape)
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight, variant="images_on_m")
    (launched,) = replay.launches
    assert launched.kernel == "bsr_conv2d_fwd_kernel_images" and replay.hints > 0
    for accesses in launched.programs.values():
        check_forward_program(layer, weight, accesses, "images_on_m")


# Small enough that every program runs: each output is written by exactly one of them.
COVERED = {
    "one_group": (Layer(512, 512, 2, True, 256), {}),
    "last_group_smaller": (Layer(64, 256, 4, False, 45), {"GROUP_M": 4}),
    "groups_of_one": (Layer(64, 128, 8, True, 20), {"GROUP_M": 1}),
    "last_tile_smaller": (Layer(128, 256, 7, False, 7), {"GROUP_M": 8}),
}


@pytest.mark.parametrize("name", COVERED)
def test_every_output_is_written_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layer, config = COVERED[name]
    weight = weight_of(layer, (128, 16), 0.98)
    tile = {"BLOCK_M": 256 if layer.size < 7 else 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    with replaying(monkeypatch, everything) as replay:
        forward(layer, weight, tile | config)
    (launched,) = replay.launches
    written = np.concatenate([accesses.written("y_ptr") for accesses in launched.programs.values()])
    outputs = layer.batch * layer.c_out * layer.size**2 // (4 if layer.pool else 1)
    assert np.array_equal(np.sort(written), np.arange(outputs))


@pytest.mark.parametrize(("batch", "group_m"), [(70, None), (70, 3), (5, 1)])
def test_every_output_is_written_once_by_one_position_a_tile(
    monkeypatch: pytest.MonkeyPatch, batch: int, group_m: int | None
) -> None:
    """Two tiles of images, the second one not full, at each of nine positions, in groups that do not divide them."""
    layer = Layer(32, 256, 3, False, batch)
    weight = weight_of(layer, (128, 32), 0.8)
    tile = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 4}
    with replaying(monkeypatch, everything) as replay:
        forward(layer, weight, tile | ({"GROUP_M": group_m} if group_m else {}), "images_on_m")
    (launched,) = replay.launches
    for accesses in launched.programs.values():
        check_forward_program(layer, weight, accesses, "images_on_m")
    written = np.concatenate([accesses.written("y_ptr") for accesses in launched.programs.values()])
    assert np.array_equal(np.sort(written), np.arange(batch * 256 * 9))


@pytest.mark.parametrize("variant", ("pixels_on_m", "weights_on_m", "taps_together", "images_on_m"))
def test_an_empty_block_row_reads_nothing(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    layer = Layer(32, 256, 2, False, 20)
    weight = testing.random_bsr((256, 32, 3, 3), (64, 16), 0.7, seed=1, dtype=DTYPE, pattern="zero_block_row")
    assert (weight.crow_indices.diff() == 0).any()
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 4}
    with replaying(monkeypatch, everything) as replay:
        forward(layer, weight, tile, variant)
    for accesses in replay.launches[0].programs.values():
        check_forward_program(layer, weight, accesses, variant)


@pytest.mark.parametrize("variant", ("weights_on_m", "taps_together", "shared_input"))
@pytest.mark.parametrize("layer", (CIFAR[0], CIFAR[-2]), ids=str)
def test_forward_variants(monkeypatch: pytest.MonkeyPatch, layer: Layer, variant: str) -> None:
    weight = weight_of(layer, (64, 16))
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight, variant=variant)
    for accesses in replay.launches[0].programs.values():
        check_forward_program(layer, weight, accesses)


@pytest.mark.parametrize("layer", (CIFAR[-1], IMAGENET[-1]), ids=str)
def test_split_and_reduce(monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    """The programs of one tile read all of its stored blocks between them; the reduction reads each of their sums."""
    weight, splits = weight_of(layer, (128, 16)), 5
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4, "SPLITS": splits}

    def parts(launched: Launched) -> list[tuple[int, int, int]]:
        if "reduce" in launched.kernel:
            return sample(launched)
        last = launched.grid[0] - 1
        return [(tile, part, 0) for tile in (0, last // 2, last) for part in range(splits)]

    with replaying(monkeypatch, parts) as replay:
        forward(layer, weight, tile)
    product_launch, reduction = replay.launches
    outputs = layer.batch * layer.size**2 * layer.c_out
    for tile_index in {program[0] for program in product_launch.programs}:
        whole = Accesses()
        slices = []
        for part in range(splits):
            accesses = product_launch.programs[tile_index, part, 0]
            written = accesses.written("y_ptr")
            assert np.array_equal(written // outputs, np.full(len(written), part))
            slices.append(written % outputs)
            for name, offsets in accesses.loads.items():
                whole.loads.setdefault(name, []).extend(offsets)
        assert all(np.array_equal(slices[0], other) for other in slices)
        whole.stores["y_ptr"] = [slices[0]]
        # The bias is the reduction's.
        whole.loads["bias_ptr"] = [np.unique(slices[0] % layer.c_out)]
        check_forward_program(replace(layer, pool=False), weight, whole) if not layer.pool else None
    corners = layer.size // 2 if layer.pool else layer.size
    for accesses in reduction.programs.values():
        written = accesses.written("y_ptr")
        assert len(written) and len(np.unique(written)) == len(written)
        assert written.max() < layer.batch * corners**2 * layer.c_out
        rows, channels = written // layer.c_out, written % layer.c_out
        pixels = 4 if layer.pool else 1
        sums = (rows[:, None] * pixels + np.arange(pixels)).ravel() * layer.c_out + np.repeat(channels, pixels)
        expected = (sums[:, None] + np.arange(splits) * outputs).ravel()
        assert np.array_equal(accesses.read("partial_ptr"), np.sort(expected))
        assert np.array_equal(accesses.read("bias_ptr"), np.unique(channels))


@pytest.mark.parametrize("batch", (32767, 32768), ids=("below", "at"))
@pytest.mark.parametrize("kind", ("plain", "pool", "images_on_m"))
def test_forward_around_2_to_the_31(monkeypatch: pytest.MonkeyPatch, batch: int, kind: str) -> None:
    """One image fewer than 2^31 elements of input, the last addresses in 32 bits, and the first in 64."""
    layer = Layer(64, 128, 32, kind == "pool", batch)
    variant = kind if kind == "images_on_m" else "pixels_on_m"
    weight = weight_of(layer, (128, 16))
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight, variant=variant)
    (launched,) = replay.launches
    assert launched.arguments["INDEX_64"] is (batch * 64 * 32 * 32 > INT32_MAX)
    for accesses in launched.programs.values():
        check_forward_program(layer, weight, accesses, variant)


def test_first_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three input channels in blocks of sixteen: a slice is one channel, and columns past the third are not read."""
    layer = Layer(3, 64, 224, False, 32)
    weight = weight_of(layer, (64, 16), 0.0)
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight)
    for accesses in replay.launches[0].programs.values():
        pixels = np.unique(accesses.written("y_ptr") // 64)
        n, p, q = unravelled(pixels, 32, 224, 224)
        expected = [nhwc(layer, n, p + r - 1, q + s - 1, np.arange(3), 3) for r in range(3) for s in range(3)]
        assert np.array_equal(accesses.read("x_ptr"), np.unique(np.concatenate(expected)))
