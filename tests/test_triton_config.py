"""Index packs and configurations of the Triton convolutions: plain tensors and arithmetic, without Triton."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimkernels import testing
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, LinearProblem
from slimkernels.kernels.triton import bsr_conv2d_config as config
from slimkernels.kernels.triton import bsr_conv2d_index as index
from slimkernels.kernels.triton.runtime import division
from slimkernels.nn import BlockSparseConv2d
from slimkernels.pattern import update_pattern

VARIANTS = ("pixels_on_m", "weights_on_m", "taps_together", "shared_input")


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


def split_order(w: BSRWeight) -> tuple[Tensor, Tensor]:
    order = index.forward_order(w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
    rows = len(w.crow_indices) - 1
    assert order.dtype == torch.int32 and order.shape == (4 * rows + 2 * len(w.col_indices),)
    return order[: 4 * rows].reshape(rows, 4), order[4 * rows :].reshape(-1, 2)


@pytest.mark.parametrize("pattern", ("random", "zero_block_row", "no_blocks", "all_dense"))
def test_forward_order_is_the_pattern_longest_rows_first_taps_together(pattern: str) -> None:
    w = weight(pattern, spare=5)
    rows, entries = split_order(w)
    counts = rows[:, 2].tolist()
    assert counts == sorted(counts, reverse=True) and sorted(rows[:, 0].tolist()) == list(range(7))
    for i, first, count, _ in rows.tolist():
        visited = entries[first : first + count].tolist()
        assert dict(visited) == blocks_by_row(w)[i]
        assert visited == sorted(visited, key=lambda entry: (entry[0] % 3, entry[0] // 3))
    if pattern == "random":
        assert len(set(counts)) > 2 and (entries[: len(w.col_indices), 1].diff() < 0).any()


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
    """A 2x2 image of 512 channels has 4 tiles for 132 processors and 72 K stages a row; a large batch fills them."""
    limits = {"shared_memory": 227 * 1024, "processors": 132}
    small = conv_problem(n=1, h=2, w=2, c_in=512, c_out=512, nnz_blocks=4 * 288)
    assert config.configs(small, **limits)[0]["SPLITS"] == 18
    assert config.configs(small, "weights_on_m", **limits)[0] == {
        "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4, "SPLITS": 18,
    }  # fmt: skip
    assert config.configs(conv_problem(n=1024), **limits)[0]["SPLITS"] == 1
    assert config.configs(conv_problem(n=1, h=2, w=2, nnz_blocks=8), **limits)[0]["SPLITS"] == 1
    row = LinearProblem(1, 25088, 4096, (128, 16), 6272, torch.bfloat16, "cuda")
    assert config.configs(row, "weights_on_m", **limits)[0]["SPLITS"] == 4


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
        # Two steps: two stages, four programs of 64 channels.
        ((64, 64, 32, "relu_maxpool2"), (128, 64, 4, 2), 4),
        ((64, 128, 16), (128, 128, 8, 2), 2),
        # Three and five steps: three stages, two programs. A window's pixels in one thread's registers: four warps.
        ((128, 128, 16, "relu_maxpool2"), (128, 128, 4, 3), 2),
        ((256, 256, 8), (128, 128, 8, 3), 2),
        # Nine steps repay a tile that leaves no room for a second.
        ((512, 512, 4), (256, 128, 8, 4), 1),
        # 128 programs for 132 processors: none gets a second, and halves would load more.
        ((512, 512, 2), (128, 128, 8, 4), 1),
        ((256, 256, 8, "relu", 64), (128, 64, 4, 3), 3),
    ],
    ids=str,
)
def test_default_tiles_follow_the_plan(
    layer: tuple[object, ...], tile: tuple[int, int, int, int], programs: int
) -> None:
    limits = {"shared_memory": 227 * 1024, "processors": 132}
    first = config.configs(vgg_layer(*layer), **limits)[0]  # type: ignore[arg-type]
    assert (first["BLOCK_M"], first["BLOCK_N"], first["num_warps"], first["num_stages"]) == tile
    assert config.programs_a_processor(first, 2, limits["shared_memory"]) == programs


def test_the_tuner_tries_tiles_that_share_a_processor() -> None:
    limits = {"shared_memory": 227 * 1024, "processors": 132}
    deep = config.configs(vgg_layer(512, 512, 4), **limits)
    tiles = {(c["BLOCK_M"], c["num_warps"], c["num_stages"]) for c in deep if c["BLOCK_K"] == 64}
    assert tiles >= {(256, 8, 4), (256, 8, 3), (128, 8, 4), (128, 8, 3), (128, 8, 2), (128, 4, 3), (64, 4, 2)}
    short = config.configs(vgg_layer(64, 64, 32, "relu_maxpool2"), **limits)
    assert {c["num_stages"] for c in short if c["BLOCK_K"] == 64} == {2}
    # On an A100 a pipeline of two stages has one buffer.
    for layer, stages in (((512, 512, 4), {3, 4}), ((64, 64, 32), {3})):
        found = config.configs(vgg_layer(*layer), shared_memory=163 * 1024, processors=108)[1:]
        assert {c["num_stages"] for c in found if c["BLOCK_K"] == 64 and "GROUP_M" not in c} == stages
    held = {config.programs_a_processor(c, 2, limits["shared_memory"]) for c in deep + short}
    assert held >= {1, 2, 4}


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
    with pytest.raises(TypeError, match=r"^configs: expected a ConvProblem or LinearProblem"):
        config.configs(3)  # type: ignore[arg-type]
    assert [spec.name for spec in KERNELS.values() if spec.explicit_only] == [
        "bsr_conv2d__triton_shared_input", "bsr_linear__triton_shared_input",
    ]  # fmt: skip


def test_configurations_come_without_triton() -> None:
    """A machine without Triton lists kernels and their configurations, as `explain` and the cost model do."""
    code = (
        "import sys; from slimkernels.kernels.triton import bsr_conv2d_config, bsr_conv2d_geometry, bsr_conv2d_index;"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
