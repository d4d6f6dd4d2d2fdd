"""Addresses of the Triton kernels at the sizes that a GPU will see: run by tests/test_addresses.py, TRITON_INTERPRET=1.

The layers are those of VGG-19 on 32x32 images at batch 1024 and of VGG-16 on 224x224 images at batch 32, the tile
configurations an H100's defaults. Beyond what a replay refuses by itself (`address_replay`), every program must read
exactly the elements that the convolution's definition names for what it writes, and write nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from address_replay import Accesses, Launched, everything, replaying, sample
from torch import Tensor
from torchvision.models.vgg import cfgs

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels.triton import (
    bsr_conv2d,
    bsr_conv2d_backward_w,
    bsr_conv2d_backward_x,
    low_rank_conv2d,
    low_rank_linear,
    relu_maxpool2_backward,
)
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order
from slimkernels.kernels.triton.runtime import INT32_MAX

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("address_cases.py needs TRITON_INTERPRET=1 before the kernels are decorated", returncode=2)

H100 = {"shared_memory": 227 * 1024, "processors": 132}
MODULES = (bsr_conv2d, bsr_conv2d_backward_w, bsr_conv2d_backward_x, low_rank_conv2d, low_rank_linear)
# float16 takes bfloat16's configurations; the interpreter would convert bfloat16 to float32 first.
DTYPE = torch.float16


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of stride 1 and padding 1 on square images, with or without a 2x2 max-pool behind it."""

    c_in: int
    c_out: int
    size: int
    pool: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.c_in}-{self.c_out}@{self.size}{'-pool' if self.pool else ''}-batch{self.batch}"

    @property
    def epilogue(self) -> str:
        return "relu_maxpool2" if self.pool else "relu"


def vgg_layers(letter: str, size: int, batch: int) -> list[Layer]:
    """The distinct convolutions behind the first of torchvision's VGG of that letter, in order."""
    layers, channels = [], 3
    plan = cfgs[letter]
    for step, following in zip(plan, [*plan[1:], 0]):
        if step == "M":
            size //= 2
        else:
            layers.append(Layer(channels, step, size, following == "M", batch))
            channels = step
    return list(dict.fromkeys(layers[1:]))


CIFAR = vgg_layers("E", 32, 1024)
IMAGENET = vgg_layers("D", 224, 32)
BLOCK_SHAPES = ((128, 16), (64, 16), (64, 32), (32, 32))
# The default run: layers with and without a pool at both ends of both networks.
DEFAULT = {
    (CIFAR[0], (64, 16)), (CIFAR[3], (128, 16)), (CIFAR[-2], (128, 16)), (CIFAR[-1], (32, 32)), (IMAGENET[0], (64, 16)),
    (IMAGENET[-2], (64, 32)),
}  # fmt: skip


def every(layers: list[Layer]) -> pytest.MarkDecorator:
    """Layers and block shapes; those that are not in DEFAULT are slow."""
    pairs = [
        pytest.param(
            *pair, id=f"{pair[0]}-{pair[1][0]}x{pair[1][1]}", marks=() if pair in DEFAULT else pytest.mark.slow
        )
        for pair in product(layers, BLOCK_SHAPES)
    ]
    return pytest.mark.parametrize(("layer", "block_shape"), pairs)


every_layer = every(CIFAR + IMAGENET)
# The gradient of the pool comes before the others and has a kernel of its own.
every_unpooled_layer = every([layer for layer in CIFAR + IMAGENET if not layer.pool])


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Defaults are chosen for an H100, though tensors are on no device."""
    for module in MODULES:
        monkeypatch.setattr(module, "device_limits", lambda x: H100)
    bsr_conv2d._limits.cache_clear()
    bsr_conv2d._plan.cache_clear()
    yield
    bsr_conv2d._limits.cache_clear()
    bsr_conv2d._plan.cache_clear()


def weight_of(layer: Layer, block_shape: tuple[int, int], sparsity: float = 0.875) -> BSRWeight:
    """A random pattern; block rows taller than the layer are as tall as the layer."""
    shape = min(block_shape[0], layer.c_out), block_shape[1]
    return testing.random_bsr((layer.c_out, layer.c_in, 3, 3), shape, sparsity, seed=1, dtype=DTYPE)


def virtual(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """An activation without storage, channels_last where it has four axes."""
    channels_last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=channels_last)


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


def unravelled(offsets: np.ndarray, *sizes: int) -> tuple[np.ndarray, ...]:
    return np.unravel_index(offsets, sizes)


def nhwc(layer: Layer, n: np.ndarray, h: np.ndarray, w: np.ndarray, channels: np.ndarray, of: int) -> np.ndarray:
    """Sorted element offsets of these channels of the pixels that lie inside the image (int64)."""
    inside = (h >= 0) & (h < layer.size) & (w >= 0) & (w < layer.size)
    pixels = ((n.astype(np.int64) * layer.size + h) * layer.size + w)[inside]
    return np.unique((pixels[:, None] * of + channels[None, :]).ravel())


def check_forward_program(layer: Layer, weight: BSRWeight, accesses: Accesses) -> None:
    """What a program writes decides what it may read: see the module's docstring."""
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
            read = np.arange(group * block_in, (group + 1) * block_in)
            for dp, dq in product(steps, steps):
                scale = len(steps)
                h, w = p * scale + dp + tap // 3 - 1, q * scale + dq + tap % 3 - 1
                expected_x.append(nhwc(layer, n, h, w, read, layer.c_in))
            places = (block * block_out + inside_row)[:, None] * block_in + np.arange(block_in)[None, :]
            expected_w.append(places.ravel())
    assert np.array_equal(accesses.read("x_ptr"), np.unique(np.concatenate(expected_x)))
    assert np.array_equal(accesses.read("values_ptr"), np.unique(np.concatenate(expected_w)))
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
@pytest.mark.parametrize("pool", (False, True), ids=("plain", "pool"))
def test_forward_around_2_to_the_31(monkeypatch: pytest.MonkeyPatch, batch: int, pool: bool) -> None:
    """One image fewer than 2^31 elements of input, the last addresses in 32 bits, and the first in 64."""
    layer = Layer(64, 128, 32, pool, batch)
    weight = weight_of(layer, (128, 16))
    with replaying(monkeypatch, sample) as replay:
        forward(layer, weight)
    (launched,) = replay.launches
    assert launched.arguments["INDEX_64"] is (batch * 64 * 32 * 32 > INT32_MAX)
    for accesses in launched.programs.values():
        check_forward_program(layer, weight, accesses)


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
    """The first tile of the first range of pixels and the last stored tile of the last one."""
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
    (launched,) = replay.launches
    assert any(accesses.stores for accesses in launched.programs.values())
    for accesses in launched.programs.values():
        check_weight_gradient_program(layer, weight, launched, accesses)


def test_weight_gradient_beyond_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(512, 512, 14, False, 21400)
    weight = weight_of(layer, (128, 16), 0.95)
    monkeypatch.setattr(bsr_conv2d_backward_w, "MAX_SPLITS", 4096)  # short ranges: the addresses are what matters
    monkeypatch.setattr(bsr_conv2d_backward_w, "device_limits", lambda x: {**H100, "processors": 10**6})
    with replaying(monkeypatch, corners) as replay:
        weight_gradient(layer, weight)
    (launched,) = replay.launches
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
