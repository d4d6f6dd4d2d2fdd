"""Index packs and configurations of the Triton convolutions: plain tensors and arithmetic, without Triton."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimkernels import testing
from slimkernels.dispatch.gpu_prediction import Tile
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, LinearProblem
from slimkernels.kernels.triton import bsr_conv2d_config as config
from slimkernels.kernels.triton import bsr_conv2d_index as index
from slimkernels.kernels.triton.runtime import division
from slimkernels.nn import BlockSparseConv2d
from slimkernels.pattern import update_pattern

VARIANTS = ("pixels_on_m", "weights_on_m", "images_on_m", "taps_together", "shared_input")


def weight(pattern: str = "random", spare: int = 0, seed: int = 0) -> BSRWeight:
    """7 block rows, 3x3 taps of 3 column groups; `spare` slots past the stored blocks."""
    made = testing.random_bsr((7 * 8, 3 * 8, 3, 3), (8, 8), 0.6, seed=seed, pattern=pattern)
    values = torch.cat([made.values, torch.zeros(spare, 8, 8)])
    col = torch.cat([made.col_indices, torch.zeros(spare, dtype=torch.int32)])
    return BSRWeight(values, made.crow_indices, col, made.weight_shape, made.block_shape)


def blocks_by_row(w: BSRWeight) -> list[dict[int, int]]:
    """{block column: slot} of every block row."""
    crow, col = w.crow_indices.tolist(), w.col_indices.tolist()
    return [{col[b]: b for b in range(crow[i], crow[i + 1])} for i in range(len(crow) - 1)]


def split_order(w: BSRWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of the forward order of 3x3 taps."""
    order = index.forward_order(w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
    rows, capacity = len(w.crow_indices) - 1, len(w.col_indices)
    assert order.dtype == torch.int32 and order.shape == (4 * rows + 2 * capacity + rows * 10,)
    assert order.numel() == index.order_size(rows, capacity, 9)
    table, entries, starts = order.split((4 * rows, 2 * capacity, rows * 10))
    assert index.tap_starts_offset(rows, capacity) == len(table) + len(entries)
    return table.reshape(rows, 4), entries.reshape(-1, 2), starts.reshape(rows, 10)


@pytest.mark.parametrize("pattern", ("random", "zero_block_row", "no_blocks", "all_dense"))
def test_forward_order_is_the_pattern_longest_rows_first_taps_together(pattern: str) -> None:
    w = weight(pattern, spare=5)
    rows, entries, _ = split_order(w)
    counts = rows[:, 2].tolist()
    assert counts == sorted(counts, reverse=True) and sorted(rows[:, 0].tolist()) == list(range(7))
    for i, first, count, _ in rows.tolist():
        visited = entries[first : first + count].tolist()
        assert dict(visited) == blocks_by_row(w)[i]
        assert visited == sorted(visited, key=lambda entry: (entry[0] % 3, entry[0] // 3))
    if pattern == "random":
        assert len(set(counts)) > 2 and (entries[: len(w.col_indices), 1].diff() < 0).any()


@pytest.mark.parametrize("spare", (0, 5))
@pytest.mark.parametrize("pattern", ("random", "zero_block_row", "no_blocks", "all_dense"))
def test_tap_starts_hold_the_blocks_of_every_tap(pattern: str, spare: int) -> None:
    """From a tap's start to the next one's lie the row's blocks of that tap, and none of the slots that are spare."""
    w = weight(pattern, spare)
    *_, starts = split_order(w)
    for i, (row, blocks) in enumerate(zip(starts.tolist(), blocks_by_row(w), strict=True)):
        found = {slot: tap for tap in range(9) for slot in range(row[tap], row[tap + 1])}
        assert found == {slot: column // 3 for column, slot in blocks.items()}
        assert (row[0], row[9]) == tuple(w.crow_indices[i : i + 2].tolist())


@pytest.mark.parametrize("rows", (2, 4))
@pytest.mark.parametrize("pattern", ("random", "zero_block_row", "no_blocks"))
def test_shared_input_holds_every_block_once(pattern: str, rows: int) -> None:
    w = weight(pattern, spare=3)
    table, entries = index.shared_input(w.crow_indices, w.col_indices, rows)
    assert table.shape == (-(-7 // rows), rows + 2) and entries.shape[1] == rows + 1
    assert sorted(i for row in table[:, :rows].tolist() for i in row if i >= 0) == list(range(7))
    for *members, first, count in table.tolist():
        part = entries[first : first + count]
        assert part[:, 0].unique().numel() == count
        for k, i in enumerate(members):
            found = {column: slot for column, slot in part[:, [0, k + 1]].tolist() if slot >= 0}
            assert found == (blocks_by_row(w)[i] if i >= 0 else {})


def test_shared_input_finds_the_rows_that_agree() -> None:
    """Rows 0, 2, 4, 6 store the same columns, 1, 3, 5, 7 others: two groups without a wasted product."""
    mask = torch.zeros(8, 18, dtype=torch.bool)
    mask[0::2, :5], mask[1::2, 9:12] = True, True
    dense = testing.random_tensor(8 * 8, 2 * 8, 3, 3, seed=1)
    w = BSRWeight.from_dense(dense, (8, 8), mask)
    table, _ = index.shared_input(w.crow_indices, w.col_indices, 4)
    assert [sorted(row[:4]) for row in table.tolist()] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert index.multiplied_share(w.crow_indices, w.col_indices, 8) == 1.0
    mixed = weight()
    assert 1.3 < index.multiplied_share(mixed.crow_indices, mixed.col_indices, 8) < 2.6


def test_modules_keep_the_order_of_their_pattern() -> None:
    w = weight()
    conv = torch.nn.Conv2d(24, 56, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(w.to_dense())
    module = BlockSparseConv2d.from_dense(conv, (8, 8))
    other = BlockSparseConv2d.from_dense(conv, (8, 8))
    assert torch.equal(module.order, torch.cat([part.flatten() for part in split_order(module.weight_bsr())]))
    assert "order" not in module.state_dict()
    mask = w.mask()
    mask[0], mask[1] = mask[1].clone(), mask[0].clone()
    update_pattern(other, mask)
    assert not torch.equal(other.order, module.order)
    assert torch.equal(other.order, torch.cat([part.flatten() for part in split_order(other.weight_bsr())]))


def conv_problem(**changes: object) -> ConvProblem:
    usual = ConvProblem(
        64,
        256,
        32,
        32,
        256,
        3,
        3,
        (1, 1),
        (1, 1),
        (1, 1),
        (128, 16),
        nnz_blocks=36,
        dtype=torch.bfloat16,
        device="cuda",
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("block_shape", ((1, 1), (16, 1), (24, 24), (32, 32), (64, 16), (128, 16), (256, 16)))
def test_configs_are_distinct_and_fit_the_device(
    block_shape: tuple[int, int], dtype: torch.dtype, variant: str
) -> None:
    if variant == "shared_input" and block_shape[0] > 64:
        return
    rows = index.rows_sharing_input(block_shape[0]) if variant == "shared_input" else 1
    if variant == "images_on_m" and block_shape[1] % 16:
        assert "16 channels of one tap" in config.images_reason(conv_problem(block_shape=block_shape))
        return
    for n, size in ((1, 2), (1, 32), (64, 32)):
        for shared_memory, processors in ((99 * 1024, 84), (163 * 1024, 108), (227 * 1024, 132)):
            problem = conv_problem(n=n, h=size, w=size, block_shape=block_shape, dtype=dtype, nnz_blocks=600)
            found = config.configs(problem, variant, shared_memory=shared_memory, processors=processors)
            assert len({tuple(sorted(c.items())) for c in found}) == len(found)
            for c in found:
                assert config.shared_bytes(c, dtype.itemsize, rows) <= shared_memory
                assert c["BLOCK_N"] >= min(block_shape[0], 16 if dtype == torch.float32 else 64)
                assert c["BLOCK_M"] <= max(2 * problem.n * problem.p * problem.q, 64)


def test_a_pattern_is_split_only_where_processors_idle() -> None:
    """A 2x2 image of 512 channels has 4 tiles for 132 processors and 72 times 64 channels a row, which is what splits
    are counted in whatever a stage holds; a large batch fills the processors."""
    limits = {"shared_memory": 227 * 1024, "processors": 132}
    small = conv_problem(n=1, h=2, w=2, c_in=512, c_out=512, nnz_blocks=4 * 288)
    assert config.configs(small, **limits)[0]["SPLITS"] == 18
    assert config.configs(small, "weights_on_m", **limits)[0] == {
        "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 6, "SPLITS": 18,
    }  # fmt: skip
    assert config.configs(conv_problem(n=1024), **limits)[0]["SPLITS"] == 1
    assert config.configs(conv_problem(n=1, h=2, w=2, nnz_blocks=8), **limits)[0]["SPLITS"] == 1
    row = LinearProblem(1, 25088, 4096, (128, 16), 6272, torch.bfloat16, "cuda")
    assert config.configs(row, "weights_on_m", **limits)[0]["SPLITS"] == 4


H200_LIMITS = {"shared_memory": 227 * 1024, "processors": 132}


def held(tile: dict[str, int]) -> int:
    """Programs that a processor of an H200 holds, as the cost model plans it (16-bit)."""
    sizes = (tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"))
    return Tile(*sizes).resident(2, H200)


def vgg_layer(c_in: int, c_out: int, size: int, epilogue: str = "relu", height: int = 128) -> ConvProblem:
    """A layer of VGG-19 at batch 1024, 87.5% sparse."""
    height = min(height, c_out)
    blocks = c_out // height * c_in // 16 * 9 // 8
    return conv_problem(
        n=1024, h=size, w=size, c_in=c_in, c_out=c_out, block_shape=(height, 16), nnz_blocks=blocks, epilogue=epilogue
    )


@pytest.mark.parametrize(
    ("layer", "tile", "programs"),
    [
        ((64, 64, 32, "relu_maxpool2"), (128, 64), 5),
        ((64, 128, 16), (128, 128), 3),
        ((128, 128, 16, "relu_maxpool2"), (128, 128), 3),
        ((256, 256, 8), (128, 128), 3),
        ((256, 256, 8, "relu", 64), (128, 64), 5),
        # 512 and 128 programs of 128 pixels are fewer than four a processor: halves.
        ((512, 512, 4), (64, 128), 5),
        ((512, 512, 4, "relu_maxpool2"), (64, 128), 5),
        ((512, 512, 2), (64, 128), 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ("pixels_on_m", "weights_on_m", "taps_together"))
def test_default_tiles_follow_the_plan(
    layer: tuple[object, ...], tile: tuple[int, int], programs: int, variant: str
) -> None:
    """Stages of the 16 channels of one block, six of them, on four warps."""
    first = config.configs(vgg_layer(*layer), variant, **H200_LIMITS)[0]  # type: ignore[arg-type]
    assert first == {
        "BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": 16, "num_warps": 4, "num_stages": 6, "SPLITS": 1,
    }  # fmt: skip
    assert held(first) == programs


@pytest.mark.parametrize(
    ("block_in", "c_in", "dtype", "stage"),
    [
        (16, 256, torch.bfloat16, (16, 6)),
        (32, 256, torch.bfloat16, (32, 3)),
        (64, 256, torch.bfloat16, (64, 2)),
        (128, 256, torch.bfloat16, (64, 2)),
        # The last block of 80 channels is half empty: its slices are 16 wide.
        (32, 80, torch.bfloat16, (16, 6)),
        # A slice of 8 channels is half a product's depth, so that a stage is eight of them.
        (24, 240, torch.bfloat16, (64, 3)),
        (16, 256, torch.float32, (16, 3)),
        (64, 256, torch.float32, (32, 2)),
    ],
)
def test_a_stage_is_one_slice_of_a_block(block_in: int, c_in: int, dtype: torch.dtype, stage: tuple[int, int]) -> None:
    """About 96 channels of two bytes are in flight."""
    found = config.default_config(65536, 2, (128, block_in), c_in, dtype, **H200_LIMITS)
    assert (found["BLOCK_K"], found["num_stages"]) == stage


def test_the_tuner_tries_tiles_that_share_a_processor() -> None:
    tiles = {(m, w, s) for m, w in ((256, 8), (128, 8), (128, 4), (64, 4)) for s in (6, 4, 3)}
    for layer in ((512, 512, 4), (64, 64, 32, "relu_maxpool2")):
        for limits in (H200_LIMITS, {"shared_memory": 163 * 1024, "processors": 108}):
            found = config.configs(vgg_layer(*layer), **limits)  # type: ignore[arg-type]
            assert {(c["BLOCK_M"], c["num_warps"], c["num_stages"]) for c in found} == tiles
            assert {c["BLOCK_K"] for c in found} == {16}
    assert {held(c) for c in config.configs(vgg_layer(512, 512, 4), **H200_LIMITS)} == {1, 2, 3, 5}


def test_tiles_of_one_position_hold_images() -> None:
    """64 images or 128, four stages of one slice or six; no more images than twice the batch, and never a split."""
    found = config.configs(vgg_layer(512, 512, 2), "images_on_m", **H200_LIMITS)
    assert {(c["BLOCK_M"], c["num_stages"]) for c in found} == {(64, 4), (128, 4), (64, 6), (128, 6)}
    assert found[0] == {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 4}
    assert all({**c, "BLOCK_M": 64, "num_stages": 4} == found[0] for c in found)
    few = config.configs(conv_problem(n=5), "images_on_m", **H200_LIMITS)
    assert [c["BLOCK_M"] for c in few] == [16]
    wide = config.configs(conv_problem(n=40, block_shape=(64, 64)), "images_on_m", **H200_LIMITS)
    assert [(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["num_stages"]) for c in wide] == [(64, 64, 64, 2)]
    exact = config.configs(conv_problem(dtype=torch.float32), "images_on_m", tensor_cores=False)
    assert [tuple(c.values()) for c in exact] == [(64, 64, 16, 8, 3)]


def test_a_factor_and_a_shift_divide_every_number_of_31_bits() -> None:
    """umulhi(2 n, factor) >> shift, in Python's integers, for the numbers next to multiples of the divisor."""
    for divisor in [*range(1, 300), *(2**k + d for k in range(9, 31) for d in (-1, 0, 1)), 2**31 - 1]:
        factor, shift = division(divisor)
        assert -(2**31) <= factor < 0 and 0 <= shift < 32
        top = (2**31 - 1) // divisor
        for multiple in {min(m, top) for m in (0, 1, 2, top // 3, max(top - 1, 0), top)}:
            for n in range(max(multiple * divisor - 1, 0), min(multiple * divisor + 2, 2**31)):
                assert (2 * n * (factor + 2**32) >> 32) >> shift == n // divisor, (n, divisor)


def test_groups_of_tiles_are_divided_as_they_are_counted() -> None:
    """A last group of three tiles; and a group as large as L2 allows is never larger than the tiles there are."""
    assert config.grid_integers(11, 5, 4) == (11, 5, 4, *division(20), *division(4), *division(3))
    assert config.grid_integers(11, 100_000, 10**6)[2:] == (11, *division(1_100_000), *division(11), *division(11))


def test_kernels_say_what_they_do_not_take() -> None:
    assert "1x1" in config.taps_together_reason(conv_problem(r=1, s=1, padding=(0, 0)))
    assert config.taps_together_reason(conv_problem()) is None
    assert "128 outputs" in config.shared_input_reason(conv_problem())
    assert config.shared_input_reason(conv_problem(block_shape=(64, 16))) is None
    assert "TRITON_INTERPRET=1" in config.shared_input_reason(conv_problem(block_shape=(64, 16), device="cpu"))
    reasons = {
        "one tap": LinearProblem(4, 32, 32, (16, 16), 2, torch.bfloat16, "cuda"),
        "max-pool": conv_problem(epilogue="relu_maxpool2"),
        "at most 3 rows of taps, not 5": conv_problem(r=5, s=5, padding=(2, 2)),
        "without padding": conv_problem(padding=(0, 0)),
        "only 8 follow": conv_problem(block_shape=(24, 24)),
        "only 4 follow": conv_problem(c_in=100),
        "TRITON_INTERPRET=1": conv_problem(device="cpu"),
    }
    for words, problem in reasons.items():
        assert words in config.images_reason(problem)
    assert config.images_reason(conv_problem(r=3, s=5, padding=(0, 2))) is None
    with pytest.raises(TypeError, match=r"^configs: expected a ConvProblem or LinearProblem"):
        config.configs(3)  # type: ignore[arg-type]
    assert [spec.name for spec in KERNELS.values() if spec.explicit_only] == [
        "bsr_conv2d__triton_shared_input", "bsr_linear__triton_shared_input", "low_rank_linear__cuda",
        "low_rank_conv2d__cuda_tensor_cores", "bsr_conv2d__cuda_tensor_cores", "bsr_conv2d_dgrad__cuda_tensor_cores",
        "bsr_conv2d_wgrad__cuda_tensor_cores",
    ]  # fmt: skip


def test_configurations_come_without_triton() -> None:
    """A machine without Triton lists kernels and their configurations, as `explain` and the cost model do."""
    code = (
        "import sys; from slimkernels.kernels.triton import bsr_conv2d_config, bsr_conv2d_geometry, bsr_conv2d_index;"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
