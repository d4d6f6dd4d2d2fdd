"""The checks check: right results pass over many seeds, a result lacking one term or reading one wrong block fails."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from slimkernels import testing
from slimkernels.cases import (
    ConvCase,
    LinearCase,
    LowRankConvCase,
    LowRankLinearCase,
    assert_matches_reference,
    launch,
)
from slimkernels.formats import block_grid
from slimkernels.kernels import KERNELS
from slimkernels.testing import (
    TF32_DROPPED,
    TF32_ROUNDOFF,
    UNIT_ROUNDOFF,
    assert_close,
    compare,
    densify,
    drop_term,
    naive_bsr_conv2d,
    random_bsr,
    random_tensor,
    reference_bsr_conv2d,
    wrong_block,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IDS = [str(d)[6:] for d in DTYPES]
SIZES = {
    "tiny": ConvCase(n=1, c_in=4, h=3, w=3, c_out=8, block_shape=(8, 1), sparsity=0.5),
    "small": ConvCase(n=2, c_in=16, h=8, w=8, c_out=32, block_shape=(16, 1)),
    "vgg_256": ConvCase(n=4, c_in=256, h=8, w=8, c_out=256, block_shape=(16, 1), sparsity=0.875),
    "vgg_512": ConvCase(n=16, c_in=512, h=4, w=4, c_out=128, block_shape=(64, 16), sparsity=0.875),
    "all_dense_256": ConvCase(n=4, c_in=256, h=8, w=8, c_out=128, block_shape=(16, 16), pattern="all_dense"),
}


def rounded_result(case: ConvCase, weight: testing.BSRWeight | None = None) -> torch.Tensor:
    """What a kernel in the case's dtype with a float32 (float64) accumulator returns."""
    x, own, bias = case.inputs()
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    dense = densify(weight or own).to(wide)
    y = F.conv2d(x.to(wide), dense, None if bias is None else bias.to(wide), case.stride, case.padding, case.dilation)
    return testing.apply_epilogue(y, case.epilogue).to(case.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_right_results_pass_over_many_seeds(size: str, dtype: torch.dtype) -> None:
    for seed in range(60):
        case = replace(SIZES[size], dtype=dtype, seed=seed, epilogue=("none", "relu", "relu_maxpool2")[seed % 3])
        ref, bound = case.expected(*case.inputs())
        assert_close(rounded_result(case), ref, **bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
def test_mutants_fail(mutate, size: str, dtype: torch.dtype) -> None:
    case = replace(SIZES[size], dtype=dtype)
    inputs = case.inputs()
    ref, bound = case.expected(*inputs)
    assert_close(rounded_result(case), ref, **bound)
    with pytest.raises(AssertionError, match=r"max_abs_err .* rms_ratio .* worst at .n=.* c_out="):
        assert_close(rounded_result(case, mutate(inputs[1])), ref, **bound)


@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
@pytest.mark.parametrize("size", SIZES)
def test_mutants_fail_under_the_tf32_bound(mutate, size: str) -> None:
    def tf32(t: torch.Tensor) -> torch.Tensor:
        return (t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    case = SIZES[size]
    x, weight, bias = case.inputs()
    ref, bound = case.expected(x, weight, bias)
    geometry = (case.stride, case.padding, case.dilation)
    rounded = replace(weight, values=tf32(weight.values))
    for w, right in ((rounded, True), (replace(mutate(weight), values=tf32(mutate(weight).values)), False)):
        out = F.conv2d(tf32(x), densify(w).float(), bias, *geometry)
        assert compare(out, ref, u_mul=TF32_ROUNDOFF, **bound).passed is right
    assert not compare(F.conv2d(tf32(x), densify(rounded).float(), bias, *geometry), ref, **bound).passed


def dropped(t: torch.Tensor) -> torch.Tensor:
    """float32 as tensor cores read it in TF32: without its 13 low bits."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("seed", range(10))
def test_dropped_bits_of_a_chain_add_up_over_its_four_factors(seed: int) -> None:
    case = LowRankLinearCase(m=300, in_features=512, out_features=256, rank=64, epilogue="relu", seed=seed)
    x, U, V, bias = case.inputs()
    ref, bound = case.expected(x, U, V, bias)

    def chain(U: torch.Tensor) -> torch.Tensor:
        inner = (dropped(x).double() @ dropped(V).double().T).float()
        return torch.relu((dropped(inner).double() @ dropped(U).double().T).float() + bias)

    assert_close(chain(U), ref, **{**bound, "u_mul": 4 * TF32_DROPPED})
    assert not compare(chain(U), ref, **{**bound, "u_mul": 2 * TF32_DROPPED}).passed, "the bound of one product"
    mutant = U.clone()
    mutant[3, 5] = 0
    assert not compare(chain(mutant), ref, **{**bound, "u_mul": 4 * TF32_DROPPED}).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("position", ["x_column", "u_entry", "bias"])
def test_low_rank_mutants_fail(position: str, dtype: torch.dtype) -> None:
    case = LowRankLinearCase(m=64, dtype=dtype)
    x, U, V, bias = case.inputs()
    ref, bound = case.expected(x, U, V, bias)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def result(x, U, V, bias) -> torch.Tensor:
        t = F.linear(x.to(wide), V.to(wide)).to(dtype).to(wide)
        return F.linear(t, U.to(wide), bias.to(wide)).to(dtype)

    assert_close(result(x, U, V, bias), ref, **bound)
    mutant = {"x_column": x.clone(), "u_entry": U.clone(), "bias": bias.clone()}
    mutant["x_column"][:, 3] = 0
    mutant["u_entry"][7, 2] = 0
    mutant["bias"][bias.abs().argsort()[len(bias) // 2]] = 0
    args = {
        "x_column": (mutant["x_column"], U, V, bias),
        "u_entry": (x, mutant["u_entry"], V, bias),
        "bias": (x, U, V, mutant["bias"]),
    }[position]
    with pytest.raises(AssertionError, match="elements out of bounds"):
        assert_close(result(*args), ref, **bound)


def test_every_kernel_case_of_the_reference_rejects_a_mutant() -> None:
    """End to end: `assert_matches_reference` fails when the kernel of the table is given a mutated weight."""

    class Mutated(ConvCase):
        def launch_args(self, x, weight, bias):
            return super().launch_args(x, drop_term(weight), bias)

    assert_matches_reference("bsr_conv2d__reference", ConvCase())
    with pytest.raises(AssertionError, match="bsr_conv2d__reference conv: max_abs_err"):
        assert_matches_reference("bsr_conv2d__reference", Mutated())


def test_one_wrong_element_among_many_fails() -> None:
    ref = random_tensor(512, 512, seed=0).double()
    scale = torch.ones_like(ref)
    out = ref.float()
    assert compare(out, ref, scale=scale, terms=100).passed
    out[500, 17] += 1e-3
    result = compare(out, ref, scale=scale, terms=100, block_shape=(16, 1))
    assert not result.passed and result.worst_index == (500, 17)
    assert "(m=500, c_out=17), block row 1 of (16, 1) blocks" in result.message


def test_a_small_error_everywhere_fails_the_rms_half_alone() -> None:
    ref = torch.zeros(1000, dtype=torch.float64)
    unit = 2.0**-24 * (1 + math.sqrt(100))
    result = compare(torch.full((1000,), 2 * unit), ref, scale=torch.ones_like(ref), terms=100)
    assert result.worst_over_bound < 1 and not result.passed
    assert compare(torch.full((1000,), 0.5 * unit), ref, scale=torch.ones_like(ref), terms=100).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rule(bad: float) -> None:
    ref = torch.zeros(4, 4, dtype=torch.float64)
    scale = torch.ones_like(ref)
    out = ref.float()
    out[1, 2] = bad
    assert not compare(out, ref, scale=scale, terms=1).passed, "a stray non-finite value must fail"
    assert not compare(out, ref, scale=scale, terms=1, nonfinite=True).passed, "masks must match"
    both = ref.clone()
    both[1, 2] = bad
    assert compare(out, both, scale=scale, terms=1, nonfinite=True).passed
    assert not compare(out, both, scale=scale, terms=1).passed, "not asked for: not allowed"
    assert not compare(ref.float(), both, scale=scale, terms=1, nonfinite=True).passed
    if math.isinf(bad):
        assert not compare(-out, both, scale=scale, terms=1, nonfinite=True).passed, "infinities keep their sign"


def test_wrong_shape_and_wrong_reference_dtype() -> None:
    ref = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3\)"):
        assert_close(torch.zeros(3, 2), ref, scale=ref, terms=1)
    with pytest.raises(TypeError, match="expected a float64 reference"):
        compare(torch.zeros(2, 3), ref.float(), scale=ref, terms=1)
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert compare(empty.float(), empty, scale=empty, terms=1).passed


@pytest.mark.parametrize("epilogue", testing.EPILOGUES)
@pytest.mark.parametrize("seed", range(6))
def test_naive_equals_the_densified_reference(seed: int, epilogue: str) -> None:
    shape = ((10, 5, 3, 3), (7, 6, 1, 3), (4, 4, 5, 5))[seed % 3]
    weight = random_bsr(shape, ((4, 2), (1, 1), (5, 3))[seed // 2], 0.6, seed, dtype=torch.float64)
    x, bias = random_tensor(2, shape[1], 6, 7, seed=seed, dtype=torch.float64), random_tensor(shape[0], seed=seed)
    args = (x, weight, bias, (1, 2), (2, 1), (1, 1) if shape[2] == 5 else (2, 1), epilogue)
    ref, (scale, terms) = reference_bsr_conv2d(*args), testing.scale_bsr_conv2d(*args)
    assert_close(naive_bsr_conv2d(*args), ref, scale=scale, terms=terms)


def test_densify_equals_index_arithmetic() -> None:
    weight = random_bsr((6, 5, 2, 3), (4, 2), 0.5, seed=3)
    dense = torch.zeros(6, 5, 2, 3, dtype=torch.float64)
    groups, crow = 3, weight.crow_indices.tolist()
    for i in range(len(crow) - 1):
        for b in range(crow[i], crow[i + 1]):
            tap, g = divmod(int(weight.col_indices[b]), groups)
            for o in range(i * 4, min(i * 4 + 4, 6)):
                for c in range(g * 2, min(g * 2 + 2, 5)):
                    dense[o, c, tap // 3, tap % 3] = weight.values[b, o % 4, c % 2]
    assert torch.equal(densify(weight), dense)


@pytest.mark.parametrize("pattern", ["random", "all_dense", "no_blocks", "zero_block_row", "zero_blocks"])
@pytest.mark.parametrize("block_shape", [(16, 1), (4, 4), (5, 3), (1, 1)])
def test_random_patterns_are_valid_seeded_and_as_named(block_shape, pattern: str) -> None:
    shape = (37, 19, 3, 3)
    weight = random_bsr(shape, block_shape, 0.8, seed=7, pattern=pattern)
    weight.validate()
    again = random_bsr(shape, block_shape, 0.8, seed=7, pattern=pattern)
    assert torch.equal(weight.values, again.values) and torch.equal(weight.col_indices, again.col_indices)
    rows, cols = block_grid(shape, block_shape)
    counts = weight.crow_indices.diff()
    if pattern == "random":
        assert weight.nnz_blocks == math.ceil(rows * cols * (1 - 0.8))
        other = random_bsr(shape, block_shape, 0.8, seed=8)
        assert not torch.equal(weight.col_indices, other.col_indices)
    elif pattern == "all_dense":
        assert weight.nnz_blocks == rows * cols
    elif pattern == "no_blocks":
        assert weight.nnz_blocks == 0 and weight.values.shape == (0, *block_shape)
    elif pattern == "zero_block_row":
        assert counts[0] == 0 and counts[-1] == 0 and counts.sum() > 0
    else:
        assert not weight.values[::2].any() and weight.values[1::2].flatten(1).any(1).all()


CASES = [ConvCase(), LinearCase(), LowRankLinearCase()]
CASES += [LowRankConvCase(kind=k, ranks=r) for k, r in (("tai", (4,)), ("svd", (3,)), ("tucker2", (3, 5)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{getattr(c, 'kind', '')}")
def test_cases_pass_on_the_reference_kernels_over_seeds(case, dtype: torch.dtype) -> None:
    for seed in range(12):
        one = replace(case, seed=10 * seed, dtype=dtype, epilogue=("none", "relu")[seed % 2], bias=seed % 3 > 0)
        result = assert_matches_reference(f"{case.op}__reference", one)
        assert result.passed and result.rms_ratio <= result.rms_ratio_allowed


def test_low_rank_reference_is_the_merged_convolution() -> None:
    for kind, ranks in (("tai", (4,)), ("svd", (3,)), ("tucker2", (3, 5))):
        case = LowRankConvCase(
            kind=kind, ranks=ranks, stride=(2, 1), padding=(1, 2), dilation=(1, 2), dtype=torch.float64
        )
        x, factors, bias = case.inputs()
        ref, bound = case.expected(x, factors, bias)
        letters = {"tai": "kcrz,nkys->ncrs", "svd": "kcrs,nkyz->ncrs", "tucker2": "icyz,oirs,noab->ncrs"}[kind]
        merged = torch.einsum(letters, *factors)
        assert_close(F.conv2d(x, merged, bias, case.stride, case.padding, case.dilation), ref, **bound)


def test_a_case_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="does not take conv: implements bsr_linear"):
        assert_matches_reference("bsr_linear__reference", ConvCase())
    assert launch("bsr_conv2d__reference", ConvCase(), ConvCase().inputs()).shape == (2, 32, 8, 8)
    assert set(UNIT_ROUNDOFF) >= KERNELS["bsr_conv2d__reference"].dtypes


# The fixtures of conftest


def test_poison_reaches_the_package_and_nothing_else() -> None:
    code = """
import torch
def allocate():
    return torch.empty(4), torch.ones(2).new_empty(3), torch.empty(2, dtype=torch.int32)
"""
    inside = {"__name__": "slimkernels.kernels.example"}
    exec(code, inside)
    f, new, index = inside["allocate"]()
    assert f.isnan().all() and new.isnan().all() and (index == torch.iinfo(torch.int32).min).all()
    outside = {"__name__": "elsewhere"}
    exec(code.replace("torch.empty(4)", "torch.empty(4).fill_(1)"), outside)
    assert not outside["allocate"]()[0].isnan().any()


@pytest.mark.parametrize("where", ["before", "after"])
def test_sentinel_border_finds_a_stray_write(where: str, sentinel_borders) -> None:
    namespace = {"__name__": "slimkernels.kernels.cpu.conv2d"}
    exec("import torch\ndef allocate(): return torch.empty((2, 3, 4, 5), memory_format=torch.channels_last)", namespace)
    out = namespace["allocate"]()
    assert out.is_contiguous(memory_format=torch.channels_last) and out.isnan().all()
    out.fill_(1.0)
    sentinel_borders.check()
    out = namespace["allocate"]()
    offset = out.storage_offset() + (-1 if where == "before" else out.numel())
    out.as_strided((1,), (1,), offset).fill_(1.0)
    with pytest.raises(AssertionError, match=f"1 elements written {where} an output of 120 elements"):
        sentinel_borders.check()
    sentinel_borders.buffers.clear()


def test_nan_surrounded_keeps_values_and_strides(nan_surrounded) -> None:
    x = random_tensor(2, 3, 4, 5, seed=0).to(memory_format=torch.channels_last)
    y = nan_surrounded(x)
    assert torch.equal(x, y) and x.stride() == y.stride()
    assert y.as_strided((1,), (1,), y.storage_offset() - 1).isnan().all()
