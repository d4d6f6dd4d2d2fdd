"""Host planning of the tensor-core kernels: packed weights, tiles and what fits shared memory."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import structure
from torch import Tensor

from slimkernels import _extension
from slimkernels.formats import BSRWeight
from slimkernels.kernels import resident_plan
from slimkernels.kernels.packs import TensorCorePack
from slimkernels.kernels.resident_plan import TF32_VARIANTS, VARIANTS, Shape
from slimkernels.kernels.tensor_core_tiles import choose_tile, without_borders
from slimkernels.testing import random_bsr

ONE = (1, 1)


def unpacked(packed: TensorCorePack, shape: Shape, weight_shape: tuple[int, int, int, int]) -> Tensor:
    """The dense weight that a pack's steps add up to, by what csrc/cuda/tensor_cores.cuh says of lanes."""
    c_out, c_in, r, s = weight_shape
    columns, groups = packed.group_start.shape[0], packed.group_start.shape[1] - 1
    depth = packed.weights.shape[1] // shape.column  # 16, or 8 of float32
    dense = torch.zeros(columns * shape.column, groups * depth, r * s, dtype=packed.weights.dtype)
    for column in range(columns):
        for group in range(groups):
            for step in range(packed.group_start[column, group], packed.group_start[column, group + 1]):
                tap, of = int(packed.taps[step]) >> 16, int(packed.taps[step]) & 0xFFFF
                assert of == group
                run = min(shape.column // 8, depth // 4)
                for n in range(shape.column):  # column 8 j + 2 q + e of the instruction
                    j, q, e = n // 8, n % 8 // 2, n % 2
                    channel = column * shape.column + j // run * 8 * run + q * 2 * run + j % run * 2 + e
                    for k in range(depth):
                        if shape.wgmma:
                            at = k // 8 * shape.column * 8 + j * 64 + n % 8 * 8 + k % 8
                        else:
                            of_word = depth // 8  # numbers in a register
                            word, half = k // of_word % 4, k // (4 * of_word)
                            at = (j // 2 * 128 + (n % 8 * 4 + word) * 4 + j % 2 * 2 + half) * of_word + k % of_word
                        dense[channel, group * depth + k, tap] = packed.weights[step, at]
    return dense[:c_out, :c_in].reshape(c_out, c_in, r, s)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize(("c_out", "c_in", "block_in"), [(128, 32, 16), (200, 40, 16), (256, 72, 32)])
def test_a_pack_holds_the_weight(variant: int, c_out: int, c_in: int, block_in: int):
    shape = VARIANTS[variant]
    weight = random_bsr((c_out, c_in, 3, 2), (128, block_in), 0.6, seed=1, dtype=torch.bfloat16)
    parts = (weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    packed = resident_plan.pack(*parts, shape)
    assert torch.equal(unpacked(packed, shape, weight.weight_shape), weight.to_dense())
    assert not packed.weights[-1].any()
    counts = packed.group_start[:, -1] - packed.group_start[:, 0]
    assert packed.most_steps[0] == counts.max() and packed.most_steps[-1] == counts.sum()


@pytest.mark.parametrize("variant", TF32_VARIANTS)
@pytest.mark.parametrize(("c_out", "c_in", "block_in"), [(128, 32, 8), (200, 40, 16), (256, 72, 24)])
def test_a_pack_holds_a_weight_in_tf32(variant: int, c_out: int, c_in: int, block_in: int):
    weight = random_bsr((c_out, c_in, 3, 2), (128, block_in), 0.6, seed=1)
    parts = (weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    packed = resident_plan.pack(*parts, VARIANTS[variant])
    rounded = resident_plan.round_to_tf32(weight.to_dense())
    assert torch.equal(unpacked(packed, VARIANTS[variant], weight.weight_shape), rounded)
    assert not packed.weights[-1].any() and not torch.equal(rounded, weight.to_dense())


def test_slots_behind_the_stored_blocks_are_passed_over():
    """A weight that was pruned further keeps room for the blocks that it had."""
    weight = random_bsr((128, 32, 3, 3), (64, 16), 0.5, seed=1, dtype=torch.float16)
    crow = weight.crow_indices.clone()
    crow[-1] -= 2  # the last row's last two
    fewer = BSRWeight(weight.values[:-2], crow, weight.col_indices[:-2], weight.weight_shape, weight.block_shape)
    for shape in (VARIANTS[0], VARIANTS[2]):
        packed = resident_plan.pack(
            weight.values, crow, weight.col_indices, weight.weight_shape, weight.block_shape, shape
        )
        assert torch.equal(unpacked(packed, shape, weight.weight_shape), fewer.to_dense())
        assert packed.group_start[-1, -1] == packed.taps.numel() - 2


def test_the_first_convolution_is_packed_by_rows_of_taps():
    weight = torch.randn(64, 3, 3, 3)
    for wgmma in (False, True):
        shape = Shape(256, 64, 1, 2, wgmma)
        packed = resident_plan.pack_first(weight, wgmma)
        index = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        steps = TensorCorePack(packed, *index, torch.tensor([2]))
        rows = unpacked(steps, shape, (64, 32, 1, 1)).reshape(64, 32)
        assert not rows[:, [9, 19, 29, 30, 31]].any()
        taps = rows[:, :30].reshape(64, 3, 10)[:, :, :9].reshape(64, 3, 3, 3)  # channel, row, column, input channel
        assert torch.equal(taps.permute(0, 3, 1, 2), weight)


@pytest.mark.parametrize(
    ("pixels", "size", "images", "rows", "cols", "patch_row", "patch_image"),
    [
        (128, 8, 2, 8, 8, 9, 81),  # whole images share borders: 9 places a row, 9 rows an image
        (128, 4, 8, 4, 4, 5, 28),  # 28 and not 25: fewer conflicts
        (128, 2, 32, 2, 2, 3, 9),
        (256, 16, 1, 16, 16, 17, 289),
        (256, 32, 1, 8, 32, 33, 330),  # of the tiles that read as much, the widest
    ],
)
def test_tiles_of_a_network(
    pixels: int, size: int, images: int, rows: int, cols: int, patch_row: int, patch_image: int
):
    tile = choose_tile(pixels, size, size, (3, 3), ONE, ONE, ONE)
    assert tile[:5] == (images, rows, cols, patch_row, patch_image)


@pytest.mark.parametrize("h", [1, 5, 8, 33])
@pytest.mark.parametrize("w", [1, 7, 12, 70])
@pytest.mark.parametrize(
    ("taps", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 2), (2, 3), (3, 1), (2, 1)), ((1, 1), (1, 1), (0, 0), (1, 1))],
)
def test_a_tile_reads_inside_its_patch(h: int, w: int, taps: tuple[int, int], stride: tuple[int, int],
                                       padding: tuple[int, int], dilation: tuple[int, int]):  # fmt: skip
    """Every tap of every pixel finds its pixel, or a zero where there is none, at its place."""
    p, q = ((size + 2 * padding[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate((h, w)))
    if p < 1 or q < 1:
        pytest.skip("the kernel does not fit into the image")
    for pixels in (16, 128):
        tile = choose_tile(pixels, h, w, taps, stride, padding, dilation)
        assert tile.images * tile.rows * tile.cols <= pixels and tile.rows % 2 == tile.cols % 2 == 0
        for top in range(0, p, tile.rows):
            for left in range(0, q, tile.cols):
                patch = {}
                for image in range(tile.images):
                    for y in range(tile.load_rows):
                        for x in range(tile.load_cols):
                            place = image * tile.patch_image + (y + tile.load_top) * tile.patch_row + x + tile.load_left
                            at = (
                                top * stride[0] - padding[0] + tile.load_top + y,
                                left * stride[1] - padding[1] + tile.load_left + x,
                            )
                            assert place < tile.patch and place not in patch
                            patch[place] = (image, *at) if 0 <= at[0] < h and 0 <= at[1] < w else None
                for image in range(tile.images):
                    for oy in range(min(tile.rows, p - top)):
                        for ox in range(min(tile.cols, q - left)):
                            for r in range(taps[0]):
                                for s in range(taps[1]):
                                    down, right = oy * stride[0] + r * dilation[0], ox * stride[1] + s * dilation[1]
                                    place = image * tile.patch_image + down * tile.patch_row + right
                                    y = (top * stride[0]) - padding[0] + down
                                    x = (left * stride[1]) - padding[1] + right
                                    inside = 0 <= y < h and 0 <= x < w
                                    assert place < tile.patch
                                    assert patch.get(place) == ((image, y, x) if inside else None)


def test_plans_fit_and_fill_the_device():
    layer = (0, 1024, 256, 8, 8, 256, (3, 3), ONE, ONE, ONE)
    plan = resident_plan.plan(*layer, 36, 227 * 1024, 132, {})
    assert plan is not None and (plan.slab, plan.stages, plan.blocks) == (64, 3, 132)
    assert plan.shared_bytes <= 227 * 1024
    assert resident_plan.plan(*layer, 36, 227 * 1024, 132, {"slab": 16, "stages": 4})[2:4] == (16, 4)
    assert resident_plan.plan(*layer, 120, 227 * 1024, 132, {}) is None  # 240 KB of weights
    streamed = resident_plan.plan(1, *layer[1:], 120, 227 * 1024, 132, {})  # of which few are there at a time
    assert streamed is not None and streamed.shared_bytes <= 227 * 1024 and streamed.slots < 60
    few = resident_plan.plan(0, 1, 512, 2, 2, 512, (3, 3), ONE, ONE, ONE, 36, 227 * 1024, 132, {})
    assert few is not None and few.blocks == 4  # one tile of each row of channels
    strided = resident_plan.plan(4, 4, 64, 40, 40, 64, (3, 3), (4, 4), ONE, ONE, 36, 99 * 1024, 108, {})
    assert strided is not None and strided.tile.images * strided.tile.rows * strided.tile.cols < 256
    assert resident_plan.plan_stem(1, 1024, 32, 32, 5, 227 * 1024, 132).tile[:3] == (1, 8, 32)
    assert resident_plan.plan_stem(0, 1, 224, 224, 5, 227 * 1024, 132) is None  # two rows of 224 exceed a tile


# What the bindings refuse: plans that would read or write beyond their memory, before anything is launched


def members(name: str) -> dict[str, int]:
    return dict.fromkeys((field for field, _ in structure(name)._fields_), 0)


def plan_members(name: str, **changes: int) -> list[int]:
    """Members of a struct for a tile of a 16 x 16 image, with changes."""
    values = members(name)
    values |= {"n": 1, "h": 16, "w": 16, "c_in": 64, "c_out": 64, "p": 16, "q": 16, "r": 3, "s": 3, "relu": 1,
               "slab": 64, "stages": 2, "steps": 5, "columns": 2, "variant": 0, "blocks": 1, "dtype": 2,
               "y_image": 256 * 64, "y_row": 16 * 64, "y_pixel": 64, **dict.fromkeys(
                   ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"), 1)}  # fmt: skip
    tile = choose_tile(256, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1))
    names = ("tile_images", "tile_rows", "tile_cols", *tile._fields[3:])
    values |= dict(zip(names, tile, strict=True))
    return [(values | changes)[field] for field in members(name)]


WRONG_PLANS = [
    ({"patch": 305}, "a tile reaches beyond its patch"),
    ({"load_rows": 18}, "a tile reaches beyond its patch"),
    ({"dil_h": 3, "pad_h": 3}, "a tile reaches beyond its patch"),
    ({"p": 0}, "p = 0 is out of range"),
    ({"tile_rows": 15}, "a tile's rows and columns are not even"),
    ({"tile_images": 60000}, "a tile reads too many pixels"),
    ({"h": 2**24, "p": 2**24}, "the images of a tile have 2"),
    ({"steps": -1}, "steps = -1 is out of range"),
    ({"variant": 7}, "variant = 7 is out of range"),
    ({"overlap": 2}, "overlap = 2 is out of range"),
    ({"dtype": 3}, "dtype = 3 is out of range"),
    ({"blocks": 0}, "blocks = 0 is out of range"),
    ({"n": 2**50}, "there are 2"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_PLANS, ids=[next(iter(c)) for c, _ in WRONG_PLANS])
@pytest.mark.parametrize("entry", ["resident_conv2d", "stem_conv2d"])
def test_the_bindings_refuse_a_wrong_plan(entry: str, changes: dict[str, int], message: str):
    module, reason = _extension.load()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip(f"the extension has no CUDA code: {reason or 'built without'}")
    name = {"resident_conv2d": "SlimCudaResidentConv2d", "stem_conv2d": "SlimCudaStemConv2d"}[entry]
    with pytest.raises(ValueError, match=f"^cuda_{entry}: {message}"):
        getattr(module, f"cuda_{entry}")(*plan_members(name, **changes))


def test_the_bindings_refuse_what_one_of_them_cannot_do():
    module, reason = _extension.load()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip(f"the extension has no CUDA code: {reason or 'built without'}")
    for changes, message in (
        ({"slab": 48}, "slab = 48 is no known width"),
        ({"slab": 8}, "slab = 8 is no known width"),
        ({"slab": 128, "dtype": 0}, "slab = 128 is no known width"),
        ({"variant": 3, "columns": 1, "dtype": 0}, "variant = 3 takes no float32"),
        ({"h": 2**21, "p": 2**21, "c_in": 16, "c_out": 8, "dtype": 0}, "the images of a tile have 2"),  # 4 bytes each
        ({"c_out": 192, "blocks": 1}, "there are fewer blocks than rows of channels"),
        ({"c_in": 60}, "c_in and c_out are not multiples of 8"),
        ({"stages": 1}, "stages = 1 is out of range"),
        ({"columns": 0}, "columns = 0 is out of range"),
        ({"columns": 3}, "columns = 3 is more than the variant has"),
        ({"c_out": 128, "columns": 1}, "there are fewer blocks than rows of channels"),
        ({"y_row": 1028}, "a step of y is not a multiple of 8"),
        ({"y_row": 2**28}, "the images of a tile have 2"),
        ({"n": 2, "tile_images": 2, "y_image": 2**30, "patch": 700}, "the images of a tile have 2"),
    ):
        with pytest.raises(ValueError, match=f"^cuda_resident_conv2d: {message}"):
            module.cuda_resident_conv2d(*plan_members("SlimCudaResidentConv2d", **changes))
    tile = without_borders(choose_tile(256, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1)))
    streamed = dict(zip(("tile_images", "tile_rows", "tile_cols", *tile._fields[3:]), tile, strict=True))
    streamed |= {"variant": 2, "columns": 1, "slots": 3}
    for changes, message in (
        ({"patch_row": 17}, "a patch is not what a tensor copy leaves"),
        ({"patch": 257}, "a patch is not what a tensor copy leaves"),
        (
            {"tile_images": 1, "load_rows": 257, "patch_image": 257 * 16, "patch": 257 * 16},
            "a patch is more than a tensor",
        ),
        ({"r": 11, "pad_h": 5}, "there are more than 32 taps"),
        ({"dil_h": 2**15, "pad_h": 2**15, "dil_w": 2**15, "pad_w": 2**15}, "a step's place does not fit 24 bits"),
        ({"slab": 128}, "a step's place does not fit 24 bits"),
        ({"slots": 2}, "there are fewer than three places for weights"),
        ({"n": 2**30}, "there are too many tiles"),
        ({"columns": 2}, "columns = 2 is more than the variant has"),
        ({"dtype": 0}, "variant = 2 takes no float32"),
    ):
        with pytest.raises(ValueError, match=f"^cuda_resident_conv2d: {message}"):
            module.cuda_resident_conv2d(*plan_members("SlimCudaResidentConv2d", **(streamed | changes)))
    wide = {"w": 64, "q": 64, "tile_cols": 64, "patch_row": 65, "load_cols": 64, "patch": 65 * 18 + 2}
    for changes, message in (
        ({"load_left": 0}, "a tile is not made of whole rows"),
        ({"p": 15}, "p or q is not the size of the output"),
        (wide, "the rows of a tile hold more than 1024 words"),
        ({"c_out": 72}, "c_out = 72 is out of range"),
        ({"dtype": 0}, "dtype = 0 is out of range"),
    ):
        with pytest.raises(ValueError, match=f"^cuda_stem_conv2d: {message}"):
            module.cuda_stem_conv2d(*plan_members("SlimCudaStemConv2d", **changes))
    with pytest.raises(TypeError, match=r"^cuda_stem_conv2d: expected \d+ arguments, got 1"):
        module.cuda_stem_conv2d(1)
