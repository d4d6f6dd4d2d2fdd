"""Packs: every kind is told from the others by the list that an op is given, and reaches the check of its kernel."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from slimkernels.kernels import packs, resident_plan
from slimkernels.kernels.cpu.low_rank import pack_factor, pack_factors
from slimkernels.kernels.packs import KINDS, ForwardOrder, StemPack, StripPack, TensorCorePack, factor_packs, kind_of
from slimkernels.kernels.strips import check_pack, pack_strips
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order
from slimkernels.nn import BlockSparseConv2d, LowRankLinear
from slimkernels.ops import bsr_conv2d
from slimkernels.tensors import Derived
from slimkernels.testing import random_bsr, random_tensor

WEIGHT = random_bsr((64, 32, 3, 3), (64, 16), 0.5, seed=1)
PATTERN = WEIGHT.crow_indices, WEIGHT.col_indices, WEIGHT.weight_shape, WEIGHT.block_shape


def made() -> dict[type, list[torch.Tensor]]:
    """What the makers return, as an op is given it."""
    weight = WEIGHT.values, *PATTERN
    cores = resident_plan.pack(*weight, resident_plan.VARIANTS[0])
    first = resident_plan.pack_first(torch.zeros(64, 3, 3, 3), wgmma=False)
    found = (pack_strips(*weight, 16), ForwardOrder(forward_order(*PATTERN)), cores, StemPack(first, *cores))
    return {type(pack): list(pack) for pack in found}


def test_no_two_kinds_have_equally_many_tensors() -> None:
    assert set(made()) == set(KINDS)
    for one, other in combinations(KINDS, 2):
        assert len(one._fields) != len(other._fields), f"{one.__name__} and {other.__name__}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_list_is_known_as_what_was_made(kind: type) -> None:
    tensors = made()[kind]
    assert kind_of(tensors) is kind
    assert all(a is b for a, b in zip(kind(*tensors), tensors, strict=True))
    assert kind.__name__ in packs.__doc__, "the table of the module names every kind"


def test_nothing_is_no_pack() -> None:
    assert kind_of([]) is None and kind_of([torch.zeros(1)] * 7) is None


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not StripPack], ids=lambda kind: kind.__name__)
def test_cpu_kernels_refuse_the_pack_of_another_kernel(kind: type) -> None:
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected a strip pack of 3 tensors, got"):
        check_pack("bsr_conv2d", made()[kind], WEIGHT.weight_shape)


@pytest.mark.parametrize("kind", [StripPack, TensorCorePack, StemPack], ids=lambda kind: kind.__name__)
def test_the_reference_passes_packs_over(kind: type) -> None:
    x = random_tensor(1, 32, 4, 4, seed=2)
    geometry = {"weight_shape": WEIGHT.weight_shape, "block_shape": WEIGHT.block_shape, "padding": (1, 1)}
    geometry["kernel"] = "bsr_conv2d__reference"
    parts = WEIGHT.values, WEIGHT.crow_indices, WEIGHT.col_indices, None
    assert torch.equal(bsr_conv2d(x, *parts, made()[kind], **geometry), bsr_conv2d(x, *parts, [], **geometry))


def test_modules_hand_over_whole_packs() -> None:
    conv = BlockSparseConv2d.from_dense(torch.nn.Conv2d(32, 64, 3), (16, 1)).eval().requires_grad_(False)
    linear = LowRankLinear.from_dense(torch.nn.Linear(512, 512), rank=64).eval().requires_grad_(False)
    linear.kernel = "low_rank_linear_f32__scalar"  # "auto" leaves small layers to torch
    if not conv.prepacked:
        pytest.skip("the C++ kernels do not run here, and the others take no pack on the CPU")
    assert kind_of(conv._packed()) is StripPack
    for pack, shape in zip(factor_packs("low_rank_linear", linear._packed(), 2), ((64, 512), (512, 64)), strict=True):
        check_pack("low_rank_linear", pack, (*shape, 1, 1))


def test_factors_come_one_after_the_other() -> None:
    factors = torch.randn(8, 24), torch.randn(40, 8)
    found = factor_packs("low_rank_linear", pack_factors(factors, "scalar"), 2)
    for pack, factor in zip(found, factors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pack, pack_factor(factor, "scalar"), strict=True))
        check_pack("low_rank_linear", pack, (*factor.shape, 1, 1))
    with pytest.raises(ValueError, match=r"^low_rank_linear: expected 6 packed tensors, got 3"):
        factor_packs("low_rank_linear", found[0], 2)


def test_what_follows_from_a_pattern_is_computed_once_and_again_after_a_write() -> None:
    derived, calls = Derived(), []
    crow, col = torch.arange(3), torch.arange(2)

    def compute() -> tuple[torch.Tensor, None]:
        calls.append(1)
        return crow + 1, None

    first = derived.of("sums", (crow, col), compute)
    assert derived.of("sums", (crow, col), compute) is first and len(calls) == 1
    derived.of("others", (crow, col), compute)
    derived.of("sums", (crow, col), compute)
    assert len(calls) == 3, "another question"
    for which in range(3):
        written = (crow, col, derived.of("sums", (crow, col), compute)[0])[which]
        before = len(calls)
        written.add_(1)
        assert torch.equal(derived.of("sums", (crow, col), compute)[0], crow + 1) and len(calls) == before + 1
    with torch.inference_mode():
        untold = torch.arange(3)
        assert derived.of("sums", (untold,), compute) is not derived.of("sums", (untold,), compute)


def test_a_pack_that_was_written_to_is_not_handed_out_again() -> None:
    def fresh() -> StripPack:
        return pack_strips(WEIGHT.values, *PATTERN, 8)

    kept = [t.clone() for t in fresh()]
    fresh().channels.zero_()
    fresh().tap_ptr.zero_()
    assert all(torch.equal(a, b) for a, b in zip(fresh(), kept, strict=True))
