"""The weight formats: exact round trips at any block shape, every corruption refused with its message."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from slimkernels.formats import (
    BlockMask,
    BSRWeight,
    LowRankWeight,
    block_grid,
    block_mask,
    block_norms,
    expand_mask,
)
from slimkernels.testing import assert_close, densify, random_bsr, random_tensor

WEIGHT_SHAPES = [(37, 19, 3, 3), (8, 8, 1, 1), (1, 1, 1, 1), (16, 3, 5, 2), (33, 20), (7, 1)]
BLOCK_SHAPES = [(16, 1), (32, 1), (8, 1), (16, 4), (16, 16), (64, 16), (1, 1), (4, 4), (5, 3), (1, 7), (128, 128)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def block_of(shape, block_shape, o: int, c: int, r: int, s: int) -> tuple[int, int]:
    """(block row, block column) of an entry: the definition of the format."""
    groups = math.ceil(shape[1] / block_shape[1])
    return o // block_shape[0], (r * shape[3] + s) * groups + c // block_shape[1]


@st.composite
def weights(draw) -> tuple[torch.Tensor, tuple[int, int]]:
    """A weight of any small shape with zeros, and any block shape."""
    shape = draw(st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2))
    shape = shape[: draw(st.sampled_from([2, 4]))]
    block_shape = draw(st.tuples(st.integers(1, 10), st.integers(1, 10)))
    weight = random_tensor(*shape, seed=draw(st.integers(0, 1000)), dtype=draw(st.sampled_from(DTYPES)))
    keep = random_tensor(*shape, seed=draw(st.integers(0, 1000)))
    return torch.where(keep > draw(st.floats(-1, 3)), weight, 0), block_shape


# Round trips


@given(weights())
def test_dense_round_trip(drawn) -> None:
    weight, block_shape = drawn
    stored = BSRWeight.from_dense(weight, block_shape)
    stored.validate()
    dense = stored.to_dense()
    assert dense.dtype == weight.dtype and dense.dim() == 4 and dense.is_contiguous()
    assert torch.equal(dense.reshape(weight.shape), weight)
    assert torch.equal(densify(stored), dense.double()), "to_dense is the index arithmetic of the format"
    assert torch.equal(stored.mask(), block_mask(weight, block_shape))
    again = BSRWeight.from_dense(dense, block_shape, mask=stored.mask())
    for name in ("values", "crow_indices", "col_indices"):
        assert torch.equal(getattr(again, name), getattr(stored, name))


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_every_entry_is_where_the_format_says(shape, block_shape) -> None:
    shape4d = (*shape, 1, 1)[:4]
    weight = random_tensor(*shape, seed=1)
    weight[random_tensor(*shape, seed=2) > -0.5] = 0
    stored = BSRWeight.from_dense(weight, block_shape)
    rows, cols = block_grid(shape, block_shape)
    assert rows == math.ceil(shape[0] / block_shape[0])
    assert cols == shape4d[2] * shape4d[3] * math.ceil(shape[1] / block_shape[1])
    assert stored.weight_shape == shape4d and stored.block_shape == block_shape
    assert stored.crow_indices.dtype == stored.col_indices.dtype == torch.int32
    assert stored.crow_indices.shape == (rows + 1,) and stored.values.shape == (stored.nnz_blocks, *block_shape)
    crow, col = stored.crow_indices.tolist(), stored.col_indices.tolist()
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for o, c, r, s in weight.reshape(shape4d).nonzero().tolist():
        block = expected.setdefault(block_of(shape4d, block_shape, o, c, r, s), torch.zeros(block_shape))
        block[o % block_shape[0], c % block_shape[1]] = weight.reshape(shape4d)[o, c, r, s]
    found = {(i, col[b]): stored.values[b] for i in range(rows) for b in range(crow[i], crow[i + 1])}
    assert list(found) == sorted(expected), "block rows in order, columns strictly increasing"
    assert all(torch.equal(found[key], block) for key, block in expected.items()), "padded entries are exactly 0"


@given(weights())
def test_mask_grid_expands_over_the_weight(drawn) -> None:
    weight, block_shape = drawn
    shape4d = (*weight.shape, 1, 1)[:4]
    mask = block_mask(weight, block_shape)
    spread = expand_mask(mask, weight.shape, block_shape)
    assert spread.shape == weight.shape and spread.dtype == torch.bool
    assert not weight[~spread].any(), "no non-zero lies outside the mask"
    for index in torch.cartesian_prod(*[torch.arange(min(n, 3)) for n in shape4d]).reshape(-1, 4).tolist():
        assert spread.reshape(shape4d)[tuple(index)] == mask[block_of(shape4d, block_shape, *index)]
    assert torch.equal(BSRWeight.from_dense(weight, block_shape, mask=mask).to_dense().reshape(weight.shape), weight)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_block_norms(block_shape, p) -> None:
    shape = (37, 19, 3, 3)
    weight = random_tensor(*shape, seed=0)
    norms = block_norms(weight, block_shape, p)
    assert norms.shape == block_grid(shape, block_shape)
    ones = torch.ones(shape, dtype=torch.float64)
    count = block_norms(ones, block_shape, 1.0)
    assert count.sum() == weight.numel(), "every entry lies in one block, padding in none"
    flat = torch.zeros_like(norms, dtype=torch.float64).flatten()
    index = torch.tensor([block_of(shape, block_shape, *i) for i in torch.ones(shape).nonzero().tolist()])
    index = index[:, 0] * norms.shape[1] + index[:, 1]
    power = weight.double().abs().flatten()
    if math.isinf(p):
        ref = flat.scatter_reduce(0, index, power, "amax")
    else:
        ref = flat.index_add(0, index, power**p) ** (1 / p)
    ref = ref.reshape(norms.shape)
    assert_close(norms, ref, scale=ref.clone(), terms=count)


def test_norms_and_masks_of_nan_and_negative_zero() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[1, 3], weight[3, 0] = -0.0, math.nan, math.inf
    mask = block_mask(weight, (2, 2))
    assert mask.tolist() == [[False, True], [True, False]], "-0.0 is a zero, NaN and infinity are not"
    norms = block_norms(weight, (2, 2))
    assert norms[0, 0] == 0 and norms[0, 1].isnan() and norms[1, 0] == math.inf and norms[1, 1] == 0
    dense = BSRWeight.from_dense(weight, (2, 2)).to_dense()[:, :, 0, 0]
    assert dense[1, 3].isnan() and dense[3, 0] == math.inf and dense[0, 0] == 0
    kept = BSRWeight.from_dense(weight, (2, 2), mask=torch.ones(2, 2, dtype=torch.bool)).to_dense()
    assert math.copysign(1, kept[0, 0, 0, 0]) == -1, "a stored -0.0 keeps its sign"


def test_stored_zero_blocks_are_legal_and_counted() -> None:
    weight = torch.zeros(32, 8, 3, 3)
    stored = BSRWeight.from_dense(weight, (16, 4), mask=torch.ones(2, 18, dtype=torch.bool))
    stored.validate()
    assert stored.nnz_blocks == 36 and stored.block_sparsity == 0.0 and stored.mask().all()
    assert not stored.to_dense().any()
    empty = BSRWeight.from_dense(weight, (16, 4))
    empty.validate()
    assert empty.nnz_blocks == 0 and empty.block_sparsity == 1.0 and empty.values.shape == (0, 16, 4)
    assert not empty.to_dense().any() and empty.to_dense().shape == weight.shape


def test_mask_drops_non_zero_blocks() -> None:
    weight = torch.ones(4, 4)
    stored = BSRWeight.from_dense(weight, (2, 2), mask=torch.tensor([[True, False], [False, False]]))
    assert stored.to_dense().sum() == 4 and stored.nnz_blocks == 1 and stored.block_sparsity == 0.75


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nbytes_counts_values_and_indices(dtype) -> None:
    stored = random_bsr((32, 10, 3, 3), (16, 4), 0.5, dtype=dtype)
    values = stored.nnz_blocks * 16 * 4 * dtype.itemsize
    assert stored.nbytes == values + 4 * stored.nnz_blocks + 4 * 3
    spare = dataclasses.replace(
        stored,
        values=torch.cat([stored.values, torch.zeros(5, 16, 4, dtype=dtype)]),
        col_indices=torch.cat([stored.col_indices, torch.zeros(5, dtype=torch.int32)]),
    )
    spare.validate()
    assert spare.nbytes == stored.nbytes and spare.nnz_blocks == stored.nnz_blocks
    assert torch.equal(spare.to_dense(), stored.to_dense()) and torch.equal(spare.mask(), stored.mask())


def test_the_gradient_of_padding_is_zero() -> None:
    stored = random_bsr((10, 5, 3, 3), (4, 2), 0.5, seed=1, dtype=torch.float64)
    values = torch.full_like(stored.values, 2.0).requires_grad_()
    dataclasses.replace(stored, values=values).to_dense().sum().backward()
    ones = BSRWeight.from_dense(torch.ones(10, 5, 3, 3, dtype=torch.float64), (4, 2), mask=stored.mask())
    assert torch.equal(values.grad, ones.values) and (ones.values == 0).any()


def test_from_dense_does_not_share_memory_and_needs_no_contiguity() -> None:
    weight = random_tensor(8, 6, 3, 3, seed=0)
    for view in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
        stored = BSRWeight.from_dense(view, (4, 2))
        assert torch.equal(stored.to_dense(), weight)
    whole = torch.ones(4, 4)
    stored = BSRWeight.from_dense(whole, (4, 4))
    whole.zero_()
    assert stored.values.sum() == 16


# Validation


def good() -> BSRWeight:
    return random_bsr((10, 5, 3, 3), (4, 2), 0.5, seed=1)


def changed(field: str, edit):
    weight = good()
    tensor = getattr(weight, field).clone()
    return dataclasses.replace(weight, **{field: edit(tensor)})


def put(index, value):
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return edit


def swap_first_two(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[[1, 0]], tensor[2:]])


CORRUPTIONS = {
    "crow_start": ("crow_indices", put(0, 1), ValueError, "expected crow_indices to start at 0, got 1"),
    "crow_decreasing": ("crow_indices", put(1, 99), ValueError, "expected non-decreasing crow_indices"),
    "crow_end": ("crow_indices", put(-1, 10_000), ValueError, "expected crow_indices to end at most at"),
    "crow_length": ("crow_indices", lambda t: t[:-1].clone(), ValueError, "expected crow_indices of length 4, got 3"),
    "crow_dtype": ("crow_indices", lambda t: t.long(), TypeError, "expected crow_indices of dtype torch.int32"),
    "crow_rank": ("crow_indices", lambda t: t[None], ValueError, "one-dimensional crow_indices"),
    "col_negative": ("col_indices", put(0, -1), ValueError, r"expected col_indices in \[0, 27\), got -1"),
    "col_too_large": ("col_indices", put(5, 27), ValueError, r"expected col_indices in \[0, 27\), got 27"),
    "col_unsorted": ("col_indices", swap_first_two, ValueError, "expected strictly increasing col_indices"),
    "col_duplicate": ("col_indices", lambda t: put(0, int(t[1]))(t), ValueError, "expected strictly increasing"),
    "col_length": ("col_indices", lambda t: t[:-1].clone(), ValueError, "expected col_indices of length"),
    "col_dtype": ("col_indices", lambda t: t.to(torch.int16), TypeError, "expected col_indices of dtype torch.int32"),
    "col_strides": (
        "col_indices",
        lambda t: torch.stack([t, t], 1)[:, 0],
        ValueError,
        "expected contiguous one-dimensional col_indices",
    ),
    "col_device": ("col_indices", lambda t: t.to("meta"), ValueError, "expected col_indices on cpu, got meta"),
    "values_dtype": ("values", lambda t: t.int(), TypeError, "expected floating-point values, got torch.int32"),
    "values_shape": ("values", lambda t: t[:, :3].clone(), ValueError, r"values of shape \(nnz_blocks, 4, 2\)"),
    "values_rank": ("values", lambda t: t.flatten(1), ValueError, r"values of shape \(nnz_blocks, 4, 2\)"),
    "values_strides": (
        "values",
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        ValueError,
        "expected contiguous values",
    ),
    "padding_not_zero": ("values", lambda t: put((-1, 3, 0), 1.0)(t), ValueError, "padded entries of values to be"),
    "padding_nan": ("values", lambda t: put((-1, 3, 0), math.nan)(t), ValueError, "padded entries of values to be"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_refused(name) -> None:
    field, edit, error, message = CORRUPTIONS[name]
    good().validate()
    with pytest.raises(error, match=f"^BSRWeight: .*{message}"):
        changed(field, edit).validate()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: block_grid((4,), (1, 1)), ValueError, r"expected weight_shape .* got \(4,\)"),
        (lambda: block_grid((4, 0), (1, 1)), ValueError, r"got \(4, 0\)"),
        (lambda: block_grid((4, 4), (1,)), ValueError, r"expected block_shape .* got \(1,\)"),
        (lambda: block_grid((4, 4), (0, 4)), ValueError, r"expected block_shape .* got \(0, 4\)"),
        (lambda: BSRWeight.from_dense(torch.ones(4, 4, dtype=torch.int32), (2, 2)), TypeError, "got torch.int32"),
        (lambda: BSRWeight.from_dense(torch.ones(4, 4, 4), (2, 2)), ValueError, r"got \(4, 4, 4\)"),
        (
            lambda: BSRWeight.from_dense(torch.ones(4, 4), (2, 2), mask=torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            r"expected mask of shape \(2, 2\), got \(2, 3\)",
        ),
        (lambda: expand_mask(torch.ones(3, 3), (4, 4), (2, 2)), ValueError, r"shape \(2, 2\), got \(3, 3\)"),
        (lambda: BlockMask(torch.ones(3, 3), (4, 4), (2, 2)), ValueError, r"BlockMask: .*\(2, 2\), got \(3, 3\)"),
    ],
)
def test_bad_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# BlockMask


def masked_linear() -> tuple[nn.Linear, torch.Tensor]:
    linear = nn.Linear(8, 6)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    parametrize.register_parametrization(linear, "weight", BlockMask(mask, linear.weight.shape, (2, 2)))
    return linear, mask


def test_block_mask_zeroes_without_gradient_while_an_optimiser_runs() -> None:
    linear = nn.Linear(8, 6)
    parameter = linear.weight
    optimiser = torch.optim.Adam(linear.parameters(), lr=0.1)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    parametrize.register_parametrization(linear, "weight", BlockMask(mask, linear.weight.shape, (2, 2)))
    original = linear.parametrizations.weight.original
    assert original is parameter, "the Parameter stays the same object: running optimisers keep working"
    spread = expand_mask(mask, (6, 8), (2, 2))
    before = original.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        linear(random_tensor(4, 8, seed=0)).square().sum().backward()
        assert not original.grad[~spread].any() and original.grad[spread].all()
        optimiser.step()
    assert not linear.weight[~spread].any() and linear.weight[spread].all()
    assert torch.equal(original[~spread], before[~spread]) and not torch.equal(original[spread], before[spread])
    assert torch.equal(BSRWeight.from_dense(linear.weight, (2, 2)).mask(), mask)


def test_block_mask_stops_nan_under_the_mask() -> None:
    linear, mask = masked_linear()
    with torch.no_grad():
        linear.parametrizations.weight.original[~expand_mask(mask, (6, 8), (2, 2))] = math.nan
    assert torch.isfinite(linear.weight).all(), "masked entries are exactly 0, not 0 * NaN"
    linear(torch.ones(1, 8)).sum().backward()
    assert torch.isfinite(linear.parametrizations.weight.original.grad).all()


def test_block_mask_state() -> None:
    linear, mask = masked_linear()
    state = linear.state_dict()
    assert torch.equal(state["parametrizations.weight.0.mask"], mask)
    assert state["parametrizations.weight.0.mask"].dtype == torch.bool
    other, _ = masked_linear()
    with torch.no_grad():
        other.parametrizations.weight[0].mask.fill_(True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.parametrizations.weight[0].mask, mask)
    wrong = nn.Linear(8, 6)
    parametrize.register_parametrization(wrong, "weight", BlockMask(torch.ones(6, 4), (6, 8), (1, 2)))
    with pytest.raises((RuntimeError, ValueError), match=r"block_shape \(1, 2\)|size mismatch"):
        wrong.load_state_dict(state)
    same_grid = nn.Linear(8, 6)
    parametrize.register_parametrization(same_grid, "weight", BlockMask(torch.ones(3, 4), (6, 8), (2, 2)))
    saved = same_grid.state_dict()
    saved["parametrizations.weight.0._extra_state"] = {"block_shape": [4, 2], "weight_shape": [6, 8]}
    with pytest.raises(ValueError, match=r"BlockMask: expected block_shape \(2, 2\)"):
        same_grid.load_state_dict(saved)


def test_block_mask_copies_moves_and_prints() -> None:
    linear, mask = masked_linear()
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight, linear.weight)
    with torch.no_grad():
        mask.fill_(False)
    assert linear.weight.any(), "the mask is copied at construction"
    assert twin.double().weight.dtype == torch.float64 and twin.parametrizations.weight[0].mask.dtype == torch.bool
    assert "block_shape=(2, 2), block_sparsity=0.500" in repr(linear)
    with torch.no_grad():
        linear.weight = torch.ones(6, 8)
    assert linear.weight.sum() == 24, "assignment stores, the mask applies on reading"
    parametrize.remove_parametrizations(linear, "weight")
    assert linear.weight.sum() == 24


# LowRankWeight


def test_low_rank_products() -> None:
    v, u = random_tensor(3, 8, seed=0, dtype=torch.float64), random_tensor(6, 3, seed=1, dtype=torch.float64)
    linear = LowRankWeight("svd", (v, u))
    linear.validate()
    product = torch.zeros(6, 8, dtype=torch.float64)
    for k in range(3):
        product += u[:, k : k + 1] * v[k]
    assert_close(linear.to_dense(), product, scale=(u.square() @ v.square()).sqrt(), terms=3)
    assert linear.nbytes == 8 * (24 + 18)
    shapes = {
        "tai": ((4, 5, 3, 1), (6, 4, 1, 2)),
        "svd": ((4, 5, 3, 2), (6, 4, 1, 1)),
        "tucker2": ((4, 5, 1, 1), (3, 4, 3, 2), (6, 3, 1, 1)),
    }
    for kind, sizes in shapes.items():
        weight = LowRankWeight(kind, tuple(random_tensor(*s, seed=i) for i, s in enumerate(sizes)))
        weight.validate()
        dense = weight.to_dense()
        assert dense.shape == (6, 5, 3, 2)
        impulse = torch.eye(5 * 6, dtype=torch.float64).reshape(30, 5, 3, 2)
        y, magnitude = impulse, impulse
        for factor in weight.factors:
            y = nn.functional.conv2d(y, factor.double())
            magnitude = nn.functional.conv2d(magnitude, factor.double().square())
        ref = y.reshape(30, 6).T.reshape(6, 5, 3, 2)
        scale = magnitude.sqrt().reshape(30, 6).T.reshape(6, 5, 3, 2)
        assert_close(dense, ref, scale=scale, terms=8, name=kind)
        assert weight.nbytes == 4 * sum(math.prod(s) for s in sizes)


@pytest.mark.parametrize(
    ("kind", "shapes", "dtype", "error", "message"),
    [
        ("cp", ((3, 8), (6, 3)), None, ValueError, "expected kind in .* got 'cp'"),
        ("svd", ((3, 8),), None, ValueError, "expected 2 factors for kind 'svd', got 1"),
        ("tucker2", ((3, 8, 1, 1), (6, 3, 1, 1)), None, ValueError, "expected 3 factors"),
        ("svd", ((3, 8), (6, 4)), None, ValueError, "expected factor 1 to take 3 channels"),
        ("svd", ((3, 8), (6, 3, 1, 1)), None, ValueError, "expected 4-D factors"),
        ("tai", ((3, 8), (6, 3)), None, ValueError, "expected 4-D factors"),
        ("tai", ((3, 8, 3, 3), (6, 3, 1, 3)), None, ValueError, "are not those of kind 'tai'"),
        ("svd", ((3, 8, 3, 3), (6, 3, 3, 1)), None, ValueError, "are not those of kind 'svd'"),
        ("tucker2", ((3, 8, 1, 1), (4, 3, 3, 3), (6, 4, 1, 3)), None, ValueError, "are not those of kind 'tucker2'"),
        ("svd", ((3, 8), (6, 3)), torch.int32, TypeError, "expected floating-point factors"),
    ],
)
def test_low_rank_validation(kind, shapes, dtype, error, message) -> None:
    with pytest.raises(error, match=f"^LowRankWeight: .*{message}"):
        LowRankWeight(kind, tuple(torch.ones(s, dtype=dtype) for s in shapes)).validate()


def test_low_rank_mixed_dtypes() -> None:
    with pytest.raises(TypeError, match=r"of one dtype, got torch\.float64 at 1"):
        LowRankWeight("svd", (torch.ones(3, 8), torch.ones(6, 3, dtype=torch.float64))).validate()


def test_the_formats_are_frozen() -> None:
    for weight in (good(), LowRankWeight("svd", (torch.ones(3, 8), torch.ones(6, 3)))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            weight.weight_shape = (1, 1, 1, 1)
