"""The plan of a chain in one launch, and its packed weight: arithmetic, on any machine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from slimkernels import _extension
from slimkernels.cases import ConvCase
from slimkernels.kernels import chain_plan
from slimkernels.kernels.chain_plan import CLUSTER, COUNTER, Sizes, layer_clocks, obstacle, pack, plan
from slimkernels.testing import random_bsr

ONE = (1, 1)
VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
AT_ONCE = {16: 6, 8: 14, 4: 32}  # an H200's answer for 16


@given(by=st.integers(1, 2**16), share=st.floats(0, 1), data=st.data())
def test_the_kernels_division_is_exact(by: int, share: float, data: st.DataObject):
    """ChainDivisor of csrc/cuda/chain_conv2d.cuh, up to the numbers that the plan allows, and beside multiples."""
    end = 2**32 // by
    multiple = int(share * (end // by)) * by
    for n in {0, multiple, max(multiple - 1, 0), end - 1, data.draw(st.integers(0, end - 1))}:
        assert ((n + 1) * (0xFFFFFFFF // by)) >> 32 == n // by, (n, by)


def test_images_of_too_many_outputs_are_no_chain():
    """What the kernel divides by them has 32 bits: alone they reach further than in groups."""
    layer = Sizes(32, 32, (1, 1), ONE, (0, 0), ONE, False, 2)
    assert obstacle([layer], 255, 256) is None
    assert obstacle([layer], 256, 256) == "images of fewer outputs than the 256x256 of layer 0"
    assert obstacle([layer._replace(pool=True)], 256, 256) is None
    assert plan(16, 128, 128, [layer], CLUSTER, {16: 1}) is None
    few = plan(16, 128, 128, [layer], CLUSTER, {16: 2})
    assert few is not None and few.images == 8


def vgg19(density: float = 0.125) -> list[Sizes]:
    """The convolutions behind the first one, every column with the mean number of steps."""
    found, c_in = [], 64
    for stage, (c_out, convolutions) in enumerate(VGG19):
        for i in range(convolutions):
            if (stage, i) != (0, 0):
                pool = i == convolutions - 1
                steps = round(9 * c_in / 16 * density)
                found.append(Sizes(c_in, c_out, (3, 3), ONE, ONE, ONE, pool, steps))
            c_in = c_out
    return found


def test_vgg19_fits_and_is_what_the_documentation_says():
    text = (ROOT / "docs" / "gpu.md").read_text()
    for batch in (1, 16):
        found = plan(batch, 32, 32, vgg19(), CLUSTER, AT_ONCE)
        counted = plan(batch, 32, 32, vgg19(), COUNTER, {32: 4, 16: 8, 8: 16})
        assert found is not None and counted is not None and len(found.layers) == 15
        assert found.layers[-1].out == (1, 1)
        # As measured: clusters for one image, which 16 blocks share, a counter for many.
        assert (found.microseconds < counted.microseconds) == (batch == 1)
        assert found.groups * found.images >= batch and found.groups <= AT_ONCE[found.group]
        # Behind the first layer the largest is what conv1_2 gives conv2_1: 16 x 16 x 64, or conv2_1's own output.
        assert found.buffer_bytes == found.images * 16 * 16 * 128 * 2
        assert found.workspace_bytes == 2 * found.groups * found.buffer_bytes
        best = min(found, counted, key=lambda one: one.microseconds)
        assert f"{best.microseconds:.1f} us at batch {batch}" in text


def test_every_image_has_a_group_and_every_item_a_block():
    for n in (1, 3, 8, 9, 16, 100):
        for barrier, at_once in ((CLUSTER, AT_ONCE), (COUNTER, {32: 4, 8: 16})):
            found = plan(n, 32, 32, vgg19(), barrier, at_once)
            assert found is not None
            assert (found.groups - 1) * found.images < n <= found.groups * found.images
            assert barrier == CLUSTER or found.groups <= at_once[found.group]


def test_blocks_that_wait_for_each_other_all_run():
    assert plan(4, 8, 8, vgg19()[4:7], COUNTER, {16: 3}, images=1) is None
    assert plan(4, 8, 8, vgg19()[4:7], CLUSTER, {16: 3}, images=1) is not None
    assert plan(4, 8, 8, vgg19()[4:7], CLUSTER, {16: 0}) is None


def test_few_pixels_share_the_steps_and_many_the_pixels():
    found = plan(1, 32, 32, vgg19(), CLUSTER, {16: 8})
    assert found is not None
    bits = [layer.row_bits for layer in found.layers]
    assert bits[0] == 3 and bits[-1] == 0 and bits == sorted(bits, reverse=True)


def test_clocks_grow_with_steps_pixels_and_fewer_blocks():
    layer = vgg19()[-1]
    assert layer_clocks(layer, 4, 16, CLUSTER, 0) < layer_clocks(layer, 4, 8, CLUSTER, 0)
    assert layer_clocks(layer, 4, 16, CLUSTER, 0) < layer_clocks(layer, 4, 16, COUNTER, 0)
    assert layer_clocks(layer, 4, 16, CLUSTER, 0) < layer_clocks(layer._replace(steps=99), 4, 16, CLUSTER, 0)
    assert layer_clocks(layer, 4, 16, CLUSTER, 0) < layer_clocks(layer, 64, 16, CLUSTER, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c_in": 60}, "channels in multiples of 8, not 60 to 64 in layer 0"),
        ({"c_out": 128}, "layer 1 to take the 128 channels that layer 0 gives, not 64"),
        ({"padding": (0, 0), "taps": (5, 3)}, "an output of at least 1x1 of layer 0, not 0x1 from 4x4"),
    ],
)
def test_what_is_no_chain_is_named(change: dict[str, object], message: str):
    layer = vgg19()[0]
    assert obstacle([layer, layer], 4, 4) is None
    found = obstacle([layer._replace(**change), layer], 4, 4)  # type: ignore[arg-type]
    assert found is not None and found.startswith(message.split(", not 0x1")[0])


def test_layers_are_counted():
    layer = vgg19()[0]._replace(pool=False)
    assert obstacle([layer] * 32, 4, 4) is None
    assert obstacle([layer] * 33, 4, 4) == "1 to 32 layers, not 33"
    assert obstacle([], 4, 4) == "1 to 32 layers, not 0"


@pytest.mark.parametrize("block_shape", [(32, 16), (64, 16), (128, 64)], ids=str)
def test_the_pack_holds_every_stored_weight_where_a_lane_reads_it(block_shape: tuple[int, int]):
    """From the instruction's definition: lane 4 g + q holds rows g and g + 8, depths 2 q, 2 q + 1 and those 8 on."""
    c_out, c_in, r, s = 136, 72, 3, 2
    weight = random_bsr((c_out, c_in, r, s), block_shape, 0.5, 3, dtype=torch.float32)
    found = pack(
        weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, block_shape, (1, 0), (2, 1)
    )  # fmt: skip
    dense = torch.zeros(160, 80, r, s)
    dense[:c_out, :c_in] = weight.to_dense()
    seen = torch.zeros_like(dense)
    for column in range(-(-c_out // 32)):
        first, last = found.starts[column : column + 2].tolist()
        assert last - first <= found.most
        for step in range(first, last):
            channel, down, right, left = found.steps[step].tolist()
            assert left == c_in - channel and (down + 1) % 2 == 0
            i, j = (down + 1) // 2, right
            lanes = found.weights[step].reshape(2, 32, 4, 2)
            for t in range(2):
                for lane in range(32):
                    g, q = divmod(lane, 4)
                    for register in range(4):
                        high, row = divmod(register, 2)
                        for e in range(2):
                            o, c = column * 32 + 4 * g + 2 * t + row, channel + 4 * q + 2 * high + e
                            seen[o, c, i, j] = lanes[t, lane, register, e]
    assert torch.equal(seen, dense)
    assert found.steps.shape[0] == found.weights.shape[0] + 12


def test_the_numbers_are_those_of_the_sources():
    kernel = (ROOT / "csrc" / "cuda" / "chain_conv2d.cuh").read_text()
    header = (ROOT / "csrc" / "kernels.h").read_text()

    def constant(name: str) -> int:
        found = re.search(rf"\b{name} = (\d+)", kernel + header)
        assert found is not None, name
        return int(found[1])

    assert constant("kChainColumn") == chain_plan.COLUMN and constant("kChainPixels") == 16
    assert constant("kChainWarps") == 8 and 2 * constant("kChainDepth") == chain_plan.READ_AHEAD
    assert constant("SLIM_CUDA_MAX_CHAIN") == chain_plan.MAX_LAYERS
    assert (constant("SLIM_CHAIN_CLUSTER"), constant("SLIM_CHAIN_COUNTER")) == (CLUSTER, COUNTER)


def test_an_empty_pattern_has_no_steps():
    case = ConvCase(c_in=32, c_out=64, block_shape=(32, 16), pattern="no_blocks")
    weight = replace(case, dtype=torch.bfloat16).weight()
    found = pack(weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, (32, 16), ONE, ONE)
    assert found.most == 0 and found.starts.tolist() == [0, 0, 0] and found.steps.shape == (12, 4)


def test_the_binding_refuses_what_would_wrap():
    module, reason = _extension.load()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip(f"the extension has no CUDA code: {reason or 'built without'}")
    layer = [0] * 8 + [8, 8, 64, 64, 8, 8, 1, 1, 1, 0, 0]
    rest = [0, 1, 1, 4, 0, 0, 2, 0, 0]

    def refused(message: str, layers: list[list[int]], numbers: list[int]) -> None:
        with pytest.raises((ValueError, TypeError), match=f"^cuda_chain_conv2d: {message}"):
            module.cuda_chain_conv2d([tuple(one) for one in layers], *numbers)

    refused("h = 0 is out of range", [[*layer[:8], 0, *layer[9:]]], rest)
    refused("row_bits = 4 is out of range", [[*layer[:-1], 4]], rest)
    refused("expected 19 arguments, got 18", [layer[:-1]], rest)
    refused("count = 0 is out of range", [], rest)
    refused("count = 33 is out of range", [layer] * 33, rest)
    refused("expected 11 arguments, got 10", [layer], rest[:-1])
    refused("c_in and c_out are not multiples of 8", [[*layer[:10], 60, *layer[11:]]], rest)
    refused("the images of a group have 2", [[*layer[:8], 4096, 4096, *layer[10:]]], rest)
    refused("p or q is too small", [[*layer[:12], 1, 1, 1, 1, 1, 1, 0]], rest)
    with pytest.raises(ValueError, match=r"^cuda_chain_groups: group, barrier or device is out of range"):
        module.cuda_chain_groups(0, 0, 2, 0)
