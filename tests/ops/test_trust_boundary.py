"""What reaches native code: packs, geometry, indices, biases and tensors that are not what they seem."""

from __future__ import annotations

import random
from collections.abc import Callable

import fuzz_native
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from slimkernels import _extension, formats, ops
from slimkernels.dispatch.select import choose
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS, far_taps
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu.library import unavailable_reason
from slimkernels.kernels.cpu.low_rank import PackedLowRank, pack_factors
from slimkernels.kernels.problems import ConvProblem, LowRankConvProblem
from slimkernels.kernels.transposed import transpose_index
from slimkernels.kernels.triton.bsr_conv2d_index import check_order, forward_order
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear
from slimkernels.tensors import Checked, Snapshot, is_plain

ISAS = [isa for isa in ("avx512", "avx2", "scalar") if unavailable_reason(isa) is None]
needs_native = pytest.mark.skipif(not ISAS, reason="slimkernels._C is not built")


def weight(c_out: int = 16, c_in: int = 8, kernel: tuple[int, int] = (3, 3)) -> BSRWeight:
    return BSRWeight.from_dense(torch.randn(c_out, c_in, *kernel), (16, 1))


def call(w: BSRWeight, x: Tensor, **changes) -> Tensor:
    arguments = {
        "values": w.values, "crow_indices": w.crow_indices, "col_indices": w.col_indices, "bias": None, "packed": (),
        "weight_shape": w.weight_shape, "block_shape": w.block_shape, "padding": (1, 1),
    }  # fmt: skip
    return ops.bsr_conv2d(x, **{**arguments, **changes})


def pack(w: BSRWeight, strip: int = 16) -> list[Tensor]:
    return native.pack_strips(w.values, w.crow_indices, w.col_indices, w.weight_shape, w.block_shape, strip)


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def conv_pair(**options) -> tuple[BlockSparseConv2d, nn.Conv2d]:
    dense = nn.Conv2d(8, 16, 3, **{"padding": 1, **options}).requires_grad_(False)
    return frozen(BlockSparseConv2d.from_dense(dense, (16, 1))), dense


def linear_pair() -> tuple[BlockSparseLinear, nn.Linear]:
    dense = nn.Linear(32, 16).requires_grad_(False)
    return frozen(BlockSparseLinear.from_dense(dense, (16, 1))), dense


def low_rank_pair() -> tuple[LowRankLinear, nn.Linear]:
    module = frozen(LowRankLinear.from_factors(torch.randn(600, 300), torch.randn(300, 500), torch.randn(600)))
    assert module.prepacked or not ISAS
    return module, module.to_dense()


def low_rank_conv_pair() -> tuple[LowRankConv2d, nn.Conv2d]:
    module = frozen(LowRankConv2d(8, 16, 3, 1, 1, kind="svd", ranks=[5]))
    return module, module.to_dense().requires_grad_(False)


PAIRS = {
    "conv2d": (conv_pair, (2, 8, 6, 6)),
    "linear": (linear_pair, (3, 32)),
    "low_rank_linear": (low_rank_pair, (3, 500)),
    "low_rank_conv2d": (low_rank_conv_pair, (2, 8, 6, 6)),
}
pairs = pytest.mark.parametrize(("make", "shape"), PAIRS.values(), ids=PAIRS)


@needs_native
def test_fuzz() -> None:
    """A short run of the fuzzing that `.ci/run` does for longer, on a build with sanitizers."""
    done = fuzz_native.run(cases=400)
    assert sum(done.values()) == 400 and set(done) == {kind.__name__ for kind in fuzz_native.KINDS}


# Packs


@needs_native
def test_a_pack_is_read_once_and_again_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), torch.randn(1, 8, 5, 5)
    packed = pack(w)
    expected = call(w, x, packed=packed)
    reads: list[int] = []
    aminmax = Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda *args: reads.append(1) or aminmax(*args))
    assert torch.equal(call(w, x, packed=packed), expected) and not reads
    packed[1].add_(0)
    assert torch.equal(call(w, x, packed=packed), expected) and len(reads) == 1
    packed[1].add_(8000)
    with pytest.raises(ValueError, match=r"bsr_conv2d: expected channels of the strip pack in \[0, 8\), got 8000"):
        call(w, x, packed=packed)


@needs_native
def test_a_packed_convolution_sees_writes_to_its_pack() -> None:
    w, x = weight(), torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    packed = pack(w)
    conv = native.PackedConv2d(ISAS[0], packed, w.weight_shape, (1, 1), (1, 1), (1, 1), "none")
    conv(x, None)
    offsets = conv.entry_offsets(5, 5)
    packed[2][-1] = 200_000
    y = torch.empty(1, 5, 5, 16).permute(0, 3, 1, 2)
    for again in (
        lambda: conv(x, None), lambda: conv.entry_offsets(5, 5), lambda: conv.step(x, y, None, 1, offsets),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected tap_ptr of the strip pack to rise from 0 to 72"):
            again()


@needs_native
def test_a_pack_made_in_inference_mode_is_kept_apart() -> None:
    """Torch counts no writes to such tensors, so the convolution reads a copy of what was checked."""
    w, x = weight(), torch.randn(1, 8, 5, 5)
    with torch.inference_mode():
        packed = [t.clone() for t in pack(w)]
        conv = native.PackedConv2d(ISAS[0], packed, w.weight_shape, (1, 1), (1, 1), (1, 1), "none")
        expected = conv(x, None)
        packed[1].fill_(10**8)
        assert torch.equal(conv(x, None), expected)
        with pytest.raises(ValueError, match="expected channels"):
            call(w, x, packed=packed)


DAMAGES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], list[Tensor]], type[Exception], str]] = {
    "channel": (lambda w, c, t: [w, c.clone().fill_(8), t], ValueError, r"channels of the strip pack in \[0, 8\)"),
    "negative": (lambda w, c, t: [w, c - 1, t], ValueError, r"channels of the strip pack in \[0, 8\)"),
    "int64": (lambda w, c, t: [w, c.long(), t], TypeError, "channels of the strip pack of dtype torch.int32"),
    "float64": (lambda w, c, t: [w.double(), c, t], TypeError, "weights of the strip pack of dtype torch.float32"),
    "ends": (
        lambda w, c, t: [w, c, (t + t.ne(0) * 9).int()],
        ValueError,
        "tap_ptr of the strip pack to rise from 0 to 72",
    ),
    "falls": (
        lambda w, c, t: [w, c, (t - t.eq(8) * 80).int()],
        ValueError,
        "tap_ptr of the strip pack to rise from 0 to 72",
    ),
    "short": (lambda w, c, t: [w, c, t[:-1]], ValueError, "expected a strip pack of 1 strips and 9 taps"),
    "width": (lambda w, c, t: [torch.zeros(72, 12), c, t], ValueError, "output channels a strip, got 12"),
    "strided": (lambda w, c, t: [w.t().contiguous().t(), c, t], ValueError, "expected contiguous weights"),
    "two": (lambda w, c, t: [w, c], ValueError, "expected a strip pack of 3 tensors, got 2"),
    "meta": (lambda w, c, t: [w.to("meta"), c, t], ValueError, "to be a plain CPU tensor"),
    "negated": (lambda w, c, t: [torch._neg_view(w), c, t], ValueError, "to be a plain CPU tensor"),
}


@needs_native
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_packs_are_refused(name: str) -> None:
    damage, error, message = DAMAGES[name]
    w = weight()
    with pytest.raises(error, match=message):
        call(w, torch.randn(1, 8, 5, 5), packed=damage(*pack(w)), kernel=f"bsr_conv2d_f32__{ISAS[0]}")


@needs_native
def test_low_rank_packs_belong_to_their_factors() -> None:
    factors = [torch.randn(5, 8, 3, 3), torch.randn(16, 5, 1, 1)]
    packed, unit = pack_factors(factors, ISAS[0]), ((1, 1), (0, 0), (1, 1))
    shapes = [f.shape for f in factors]
    PackedLowRank("low_rank_conv2d", ISAS[0], packed, shapes, [unit, unit], "none")
    with pytest.raises(ValueError, match="expected factors that take each other's channels"):
        PackedLowRank("low_rank_conv2d", ISAS[0], packed, [shapes[0], (16, 4, 1, 1)], [unit, unit], "none")
    packed[4] = packed[4] + 5
    with pytest.raises(ValueError, match=r"low_rank_conv2d: expected channels of the strip pack in \[0, 5\)"):
        PackedLowRank("low_rank_conv2d", ISAS[0], packed, shapes, [unit, unit], "none")


# Geometry


@pytest.mark.parametrize("value", [2**31, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_beyond_int32_is_refused(name: str, value: int) -> None:
    x, message = torch.randn(1, 8, 9, 9), "expected stride, padding and dilation of two ints below"
    with pytest.raises(ValueError, match=message):
        call(weight(), x, **{name: (value, 1)})
    with pytest.raises(ValueError, match=message):
        BlockSparseConv2d.from_dense(nn.Conv2d(8, 16, 3, **{name: (value, 1)}), (16, 1))
    with pytest.raises(ValueError, match=message):
        LowRankConv2d(8, 16, 3, **{name: (value, 1)}, kind="svd", ranks=[4])
    with pytest.raises(ValueError, match=message):
        factors = [torch.randn(4, 8, 3, 3), torch.randn(16, 4, 1, 1)]
        ops.low_rank_conv2d(x, factors, kind="svd", **{name: (value, 1)})


@pytest.mark.parametrize("reach", [5_000_000, 2**30 + 1])
def test_a_dilation_beyond_the_offsets_is_computed_by_another_kernel(reach: int) -> None:
    module, dense = conv_pair(padding=reach, dilation=reach)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    # Of nine taps only the middle one meets the image.
    expected = F.conv2d(x, dense.weight[:, :, 1:2, 1:2], dense.bias)
    torch.testing.assert_close(module(x.detach()), expected.detach())
    (grad,) = torch.autograd.grad(expected.sum(), x)
    module.requires_grad_(True).train()
    out = module(x)
    grad_x, grad_values = torch.autograd.grad(out.sum(), (x, module.values))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad_x, grad)
    dense.requires_grad_(True)
    (middle,) = torch.autograd.grad(F.conv2d(x, dense.weight[:, :, 1:2, 1:2]).sum(), dense.weight)
    torch.testing.assert_close(BSRWeight.from_dense(middle, (16, 1), torch.ones(1, 72) > 0).values, grad_values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((1, 1), (2, 3), (1, 2)), ((2, 3), (4, 1), (3, 1)), ((3, 1), (0, 2), (1, 1)), ((5, 7), (6, 6), (2, 2))],
)
def test_the_reference_tap_by_tap_is_torchs_convolution(monkeypatch, dtype, stride, padding, dilation) -> None:
    """What it does for geometries that torch's own convolution is not asked for, here for those that it takes."""
    x, w, bias = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 2), torch.randn(4)
    x, w, bias = (t.to(dtype) for t in (x, w, bias))
    asked: list[int] = []
    conv2d = F.conv2d
    expected = conv2d(x, w, bias, stride, padding, dilation)
    grad = torch.randn_like(expected)
    geometry = ([*stride], [*padding], [*dilation])
    wanted = torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, False, [0, 0], 1, [True, True, False])
    monkeypatch.setattr(far_taps, "_FAR", 0)
    monkeypatch.setattr(F, "conv2d", lambda *args: asked.append(1) or conv2d(*args))
    found = far_taps.convolution(x, w, bias, stride, padding, dilation)
    got = far_taps.convolution_backward(grad, x, w, stride, padding, dilation, (True, True))
    assert not asked
    bound = {"rtol": 0.1, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for one, other in zip((found, *got), (expected, *wanted[:2]), strict=True):
        torch.testing.assert_close(one, other, **bound)
    assert far_taps.convolution_backward(grad, x, w, stride, padding, dilation, (False, False)) == (None, None)


@pytest.mark.parametrize(
    "far",
    [
        {"stride": (1, 10**9)},
        {"padding": (5000, 1), "dilation": (5000, 1)},
        {"padding": (1, 3)},
        {"padding": (5, 7)},
        {"padding": (1, 7), "dilation": (1, 7)},
    ],
)
def test_torchs_convolution_is_not_asked_for_far_geometries(monkeypatch, far) -> None:
    x, factors = torch.randn(1, 8, 6, 6, requires_grad=True), [torch.randn(4, 8, 3, 3), torch.randn(16, 4, 1, 1)]
    asked: list[int] = []
    conv2d, backward = F.conv2d, torch.ops.aten.convolution_backward

    def watched_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest):
        asked.append(max(weight.shape[2:]))
        return backward(grad, x, weight, *rest)

    monkeypatch.setattr(F, "conv2d", lambda x, w, *rest: asked.append(max(w.shape[2:])) or conv2d(x, w, *rest))
    monkeypatch.setattr(
        torch.ops.aten,
        "convolution_backward",
        lambda g, x, w, *r: asked.append(max(w.shape[2:])) or backward(g, x, w, *r),
    )
    kernels = [{"kernel": name} for name in ("bsr_conv2d__reference", "auto")]
    for kernel in kernels:
        w = weight()
        w.values.requires_grad_(True)
        call(w, x, **{**kernel, **far}).sum().backward()
    factors[0].requires_grad_(True)
    ops.low_rank_conv2d(x, factors, kind="svd", **far, kernel="low_rank_conv2d__reference").sum().backward()
    assert max(asked, default=1) == 1  # pointwise factors alone


@needs_native
def test_what_the_cpu_kernels_cannot_hold_they_refuse_by_name() -> None:
    module, _ = conv_pair(padding=5_000_000, dilation=5_000_000)
    module.kernel = f"bsr_conv2d_f32__{ISAS[0]}"
    with pytest.raises(
        ValueError, match=r"bsr_conv2d: expected float32 CPU images of 8 channels with fewer than 2\*\*31"
    ):
        module(torch.randn(1, 8, 60, 60))
    w = weight()
    conv = native.PackedConv2d(ISAS[0], pack(w), w.weight_shape, (1, 1), (1, 1), (10**6, 10**6), "none")
    assert conv.entry_offsets(1, 100)[-17] == (2 * 10**6 * 100 + 2 * 10**6) * 8 + 7
    for wide, lanes in ((200, 1), (100, 16), (2**40, 1)):
        with pytest.raises(ValueError, match=r"bsr_conv2d: expected offsets below 2\*\*31"):
            conv.entry_offsets(1, wide, lanes)


@needs_native
def test_the_choice_of_a_kernel_knows_what_the_cpu_kernels_hold() -> None:
    sizes = (1, 8, 60, 60, 16, 3, 3, (1, 1), (10**6, 10**6), (10**6, 10**6), (16, 1), 72, torch.float32, "cpu")
    assert choose(ConvProblem(*sizes)).name.startswith("bsr_conv2d_f32__")
    far = ConvProblem(*sizes[:8], (10**7, 10**7), (10**7, 10**7), *sizes[10:])
    assert choose(far).name == "bsr_conv2d__reference" and "2**31 elements" in choose(far).reason
    narrow = ConvProblem(1, 8, 99, 9, 16, 65, 1, (1, 1), (0, 0), (1, 1), (4, 1), 99, torch.float32, "cpu")
    assert choose(narrow).name == "bsr_conv2d__reference" and "64 rows of taps" in choose(narrow).reason
    shapes = ((4, 8, 3, 3), (16, 4, 1, 1))
    factors = LowRankConvProblem(1, 60, 60, "svd", shapes, (1, 1), (10**7,) * 2, (10**7,) * 2, torch.float32, "cpu")
    assert choose(factors).name == "low_rank_conv2d__reference"


@needs_native
def test_the_bindings_cut_no_number_to_32_bits() -> None:
    module = _extension.load()[0]
    assert module is not None
    for seed in range(30):  # `fuzz_native.steps` changes one member a run
        fuzz_native.steps(random.Random(seed))
    with pytest.raises(ValueError, match="multiply_adds_f32"):
        module.multiply_adds_f32(ISAS[0], -1, 1)
    with pytest.raises(ValueError, match="Steps: expected at least one thread"):
        module.Steps(ISAS[0], []).run(0)


# Biases


@needs_native
@pairs
def test_an_eval_call_refuses_the_biases_that_the_op_refuses(make, shape) -> None:
    module, _ = make()
    x, size = torch.randn(shape), module.bias.numel()
    module(x)
    for bias, error, message in (
        (torch.zeros(1), ValueError, rf"expected bias of shape \({size},\), got \(1,\)"),
        (torch.zeros(size, 1), ValueError, rf"expected bias of shape \({size},\), got \({size}, 1\)"),
        (torch.zeros(size).bfloat16(), TypeError, "expected bias of dtype torch.float32 like x, got torch.bfloat16"),
        (torch.zeros(size).double(), TypeError, "expected bias of dtype torch.float32 like x, got torch.float64"),
        (torch.zeros(size, dtype=torch.int8), TypeError, "expected bias of dtype torch.float32 like x"),
        (torch.zeros(size, device="meta"), ValueError, "expected bias on cpu like x, got meta"),
    ):
        module.bias = nn.Parameter(bias, requires_grad=False)
        with pytest.raises(error, match=f"{module._op}: {message}"):
            module(x)
        module.train()  # the op's own check
        with pytest.raises(error, match=f"{module._op}: {message}"):
            module(x)
        module.eval()


@pairs
def test_strided_and_negated_biases_are_read_as_they_are(make, shape) -> None:
    module, dense = make()
    x, values = torch.randn(shape), torch.randn(module.bias.numel())
    for bias in (values.repeat_interleave(3)[::3], torch._neg_view(-values)):
        module.bias = nn.Parameter(bias, requires_grad=False)
        dense.bias = nn.Parameter(values, requires_grad=False)
        with torch.no_grad():
            torch.testing.assert_close(module(x), dense(x), rtol=1e-4, atol=1e-4 * float(dense(x).abs().max()))


# Attributes and indices


@pytest.mark.parametrize("kind", ["block_sparse", "low_rank"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 2), ("padding", (0, 2)), ("dilation", [2, 1]), ("epilogue", "relu"), ("kernel", "reference")],
)
def test_a_changed_attribute_is_seen(kind: str, name: str, value) -> None:
    module, _ = conv_pair() if kind == "block_sparse" else low_rank_conv_pair()
    x = torch.randn(2, 8, 9, 9)
    module(x)
    setattr(module, name, f"{module._op}__reference" if name == "kernel" else value)
    expected = F.conv2d(x, module.to_dense().weight, module.bias, module.stride, module.padding, module.dilation)
    expected = expected.relu() if name == "epilogue" else expected
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    x.requires_grad_(True)
    out = module.requires_grad_(True).train()(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    weight = module.to_dense().weight.detach()
    again = F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation)
    again = again.relu() if name == "epilogue" else again
    torch.testing.assert_close(grad, torch.autograd.grad(again.square().sum(), x)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("stride", 0, ValueError), ("padding", (0, -1), ValueError), ("dilation", 2**31, ValueError),
        ("stride", 1.5, TypeError), ("padding", (1, 1, 1), ValueError), ("epilogue", "gelu", ValueError),
        ("kind", "cp", ValueError), ("kind", "tai", ValueError),
    ],
)  # fmt: skip
def test_an_attribute_without_meaning_is_refused_and_the_old_one_stays(name: str, value, error) -> None:
    module, _ = low_rank_conv_pair() if name == "kind" else conv_pair()
    x = torch.randn(2, 8, 9, 9)
    before, expected = getattr(module, name), module(x)
    with pytest.raises(error):
        setattr(module, name, value)
    assert getattr(module, name) == before and torch.equal(module(x), expected)


def test_the_shape_of_the_stored_weight_is_fixed() -> None:
    module, dense = linear_pair()
    for name, value in (("weight_shape", (16, 16)), ("block_shape", (8, 1))):
        with pytest.raises(AttributeError, match=f"BlockSparseLinear: {name} belongs to the stored weight"):
            setattr(module, name, value)
    module.in_features = 16  # a description; the weight knows better
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 32\), got \(3, 16\)"):
        module(torch.randn(3, 16))
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x), dense(x))


def two_rows() -> BlockSparseLinear:
    """Block rows with columns (0, 2, 3) and (1, 3) of 4, one spare slot."""
    crow, col = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 2, 3, 1, 3, 0], dtype=torch.int32)
    module = BlockSparseLinear(4, 32, block_shape=(16, 1), crow_indices=crow, col_indices=col)
    module.values.data[:5].normal_()
    return frozen(module)


BROKEN = {
    "above": ("col_indices", 1, 4, r"expected col_indices in \[0, 4\), got 4"),
    "below": ("col_indices", 0, -1, r"expected col_indices in \[0, 4\), got -1"),
    "unsorted": ("col_indices", 1, 3, "strictly increasing col_indices within each block row"),
    "twice": ("col_indices", 1, 0, "strictly increasing col_indices within each block row"),
    "start": ("crow_indices", 0, 1, "crow_indices to start at 0, got 1"),
    "falls": ("crow_indices", 1, 6, "non-decreasing crow_indices"),
    "past_the_end": ("crow_indices", 2, 7, "crow_indices to end at most at 6, got 7"),
}
LINEAR_KERNELS = [n for n, s in KERNELS.items() if s.op == "bsr_linear" and s.backend in ("cpu", "reference")]
LINEAR_KERNELS = [n for n in LINEAR_KERNELS if KERNELS[n].available() is None]


@pytest.mark.parametrize("name", BROKEN)
def test_every_kernel_refuses_broken_indices(name: str) -> None:
    """Written in place into indices that passed before: in the op, in its backward, and behind a module's pack."""
    key, at, value, message = BROKEN[name]
    for kernel in LINEAR_KERNELS:
        module = two_rows()
        module.kernel = kernel
        x = torch.randn(3, 4, requires_grad=True)
        out, trained = module(x.detach()), module.train()(x)
        getattr(module.eval(), key)[at] = value
        with pytest.raises(ValueError, match=f"bsr_linear: expected.*{message.removeprefix('expected ')}"):
            module(x.detach())
        with pytest.raises(ValueError, match=f"BlockSparseLinear: expected.*{message.removeprefix('expected ')}"):
            module.pattern_changed()
        with pytest.raises((ValueError, RuntimeError), match=r"expected|modified by an inplace operation"):
            trained.sum().backward()
        assert out.isfinite().all()


def test_indices_written_in_place_are_seen() -> None:
    module, x = two_rows(), torch.randn(3, 4)
    before = module(x)
    module.col_indices[0] = 1
    expected = F.linear(x, module.weight_bsr().to_dense()[:, :, 0, 0], module.bias)
    torch.testing.assert_close(module(x), expected)
    assert not torch.allclose(before, expected)
    module.pattern_changed()
    torch.testing.assert_close(module(x), expected)
    module.crow_indices = torch.tensor([0, 0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="strictly increasing"):
        module(x)


def test_indices_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    check = formats._check_pattern
    monkeypatch.setattr(formats, "_check_pattern", lambda *args: reads.append(1) or check(*args))
    w, x = weight(), torch.randn(1, 8, 5, 5)
    for _ in range(3):
        call(w, x)
    assert len(reads) == 1
    with torch.inference_mode():  # whose tensors count no writes
        crow = w.crow_indices.clone()
        for _ in range(3):
            call(w, x, crow_indices=crow)
    assert len(reads) == 4


def test_a_state_dict_with_a_part_of_the_pattern_is_checked_with_the_rest() -> None:
    module, x = two_rows(), torch.randn(3, 4)
    expected = module(x)
    with pytest.raises(RuntimeError, match="strictly increasing col_indices within each block row"):
        module.load_state_dict({"crow_indices": torch.tensor([0, 4, 5], dtype=torch.int32)}, strict=False)
    assert torch.equal(module(x), expected)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        module.load_state_dict({**module.state_dict(), "values": torch.zeros(5, 16, 1)})


def test_a_wrong_transposed_index_or_order_is_refused() -> None:
    w, x = weight(), torch.randn(1, 8, 5, 5, requires_grad=True)
    transposed = transpose_index(w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
    call(w, x, transposed=transposed).sum().backward()
    transposed[3] += 1
    with pytest.raises(ValueError, match="bsr_conv2d_backward: expected transposed to be the transposed index"):
        call(w, x, transposed=transposed).sum().backward()
    order = forward_order(w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
    arguments = (w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
    check_order("bsr_conv2d", order, *arguments)
    order[1] += 1
    with pytest.raises(ValueError, match="bsr_conv2d: expected packed to be the forward order"):
        check_order("bsr_conv2d", order, *arguments)
    with pytest.raises(ValueError, match="bsr_conv2d: expected packed to be the forward order"):
        call(w, x.detach(), packed=[order])


def test_the_backward_op_checks_the_shape_of_the_gradient() -> None:
    w, x = weight(), torch.randn(1, 8, 5, 5)
    rest = (None, None, None, w.weight_shape, w.block_shape, [1, 1], [1, 1], [1, 1], "none", "auto", [True, True, True])
    backward = torch.ops.slimkernels.bsr_conv2d_backward
    backward(torch.randn(1, 16, 5, 5), x, w.values, w.crow_indices, w.col_indices, *rest)
    for grad in (torch.randn(1, 16, 5, 6), torch.randn(1, 8, 5, 5), torch.randn(2, 16, 5, 5)):
        with pytest.raises(ValueError, match="bsr_conv2d_backward: expected grad"):
            backward(grad, x, w.values, w.crow_indices, w.col_indices, *rest)


# Tensors that are not plain


@pairs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_mode_tangents_are_those_of_the_dense_layer(make, shape, training: bool) -> None:
    module, dense = make()
    module.train(training)
    x, tangent = torch.randn(shape), torch.randn(shape)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
        want = forward_ad.unpack_dual(dense(forward_ad.make_dual(x, tangent))).tangent
    assert got is not None
    bound = {"rtol": 1e-4, "atol": 1e-4 * float(want.abs().max())}
    torch.testing.assert_close(got, want, **bound)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (tangent,))[1], want, **bound)
    with torch.no_grad(), forward_ad.dual_level():  # no tangent, nothing to lose
        torch.testing.assert_close(module(x), dense(x), rtol=1e-4, atol=1e-3)


def test_tangents_of_weights_biases_and_gradients() -> None:
    module, dense = linear_pair()
    x, tangent = torch.randn(3, 32), torch.randn(16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(module.bias.detach(), tangent)
        out = torch.func.functional_call(module, {"bias": dual}, (x,))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, tangent.expand(3, 16))
        direction = torch.randn_like(module.values)
        dual = forward_ad.make_dual(module.values.detach(), direction)
        out = torch.func.functional_call(module, {"values": dual}, (x,))
        weight = BSRWeight(direction, module.crow_indices, module.col_indices, (16, 32, 1, 1), (16, 1)).to_dense()
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, x @ weight[:, :, 0, 0].t())
        hessian_products = []
        for layer in (module, dense):
            dual = forward_ad.make_dual(x.clone().requires_grad_(True), x.flip(0))
            (grad,) = torch.autograd.grad(layer(dual).square().sum(), dual, create_graph=True)
            hessian_products.append(forward_ad.unpack_dual(grad).tangent)
        torch.testing.assert_close(*hessian_products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wants_grad", [False, True])
def test_the_dispatched_ops_refuse_tangents(wants_grad: bool) -> None:
    module, _ = linear_pair()
    x, tangent = torch.randn(3, 32), torch.randn(3, 32)
    u, v = torch.randn(4, 2), torch.randn(2, 32)
    images, factors = x[:, :, None, None], [v[:, :, None, None], u[:, :, None, None]]
    ops_of = torch.ops.slimkernels
    weights = (module.values, module.crow_indices, module.col_indices, module.bias, [])
    calls = {
        "bsr_linear": lambda x: ops_of.bsr_linear(x, *weights, [16, 32], [16, 1], "none", "auto"),
        "low_rank_linear": lambda x: ops_of.low_rank_linear(x, u, v, None, [], "none", "auto"),
        "low_rank_conv2d": lambda x: ops_of.low_rank_conv2d(
            x[:, :, None, None], factors, None, [], [1, 1], [0, 0], [1, 1], "svd", "none", "auto"
        ),
        "bsr_conv2d": lambda x: ops_of.bsr_conv2d(
            x[:, :, None, None], *weights, [16, 32, 1, 1], [16, 1], [1, 1], [0, 0], [1, 1], "none", "auto"
        ),
    }
    for name, run in calls.items():
        assert run(x).shape[0] == len(images)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name}: .*no forward-mode"):
            run(forward_ad.make_dual(x.clone().requires_grad_(wants_grad), tangent))
        with pytest.raises(NotImplementedError, match=f"{name}: .*no forward-mode"):
            torch.func.jvp(run, (x,), (tangent,))


@pairs
def test_lazy_negatives_and_zero_tensors_compute_what_they_stand_for(make, shape) -> None:
    module, dense = make()
    x = torch.randn(shape)
    imaginary = torch.complex(torch.zeros_like(x), x).conj().imag
    with torch.no_grad():
        bound = {"rtol": 1e-4, "atol": 1e-4 * float(dense(x).abs().max())}
        torch.testing.assert_close(module(torch._neg_view(x)), dense(-x), **bound)
        assert imaginary.is_neg()
        torch.testing.assert_close(module(imaginary), dense(-x), **bound)
        torch.testing.assert_close(module(torch._efficientzerotensor(shape)), dense(torch.zeros(shape)), **bound)


def test_which_tensors_are_plain() -> None:
    x = torch.randn(4, 4)
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    for plain in (x, x.t(), x[1:], nn.Parameter(x), x.int(), inference, x.clone().requires_grad_(), x.expand(2, 4, 4)):
        assert is_plain(plain)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for other in (
        torch._neg_view(x), x.to(torch.complex64).conj(), torch._efficientzerotensor(4, 4), x.to("meta"), fake,
        x.to_sparse(), torch.nested.nested_tensor([x, x]), torch._to_functional_tensor(x),
    ):  # fmt: skip
        assert not is_plain(other)
    seen: list[bool] = []
    torch.func.vmap(lambda t: seen.append(is_plain(t)) or t)(x)
    torch.func.grad(lambda t: seen.append(is_plain(t)) or t.sum())(x)
    assert seen == [False, False]


def test_a_snapshot_holds_until_the_storage_or_the_version_changes() -> None:
    x = torch.zeros(4)
    snapshot, checked = Snapshot(x), Checked()
    checked.remember("rule", x)
    assert snapshot.holds(x) and checked.knows("rule", x) and not checked.knows("other rule", x)
    assert not checked.knows("rule", x.clone())
    x.add_(1)
    assert not snapshot.holds(x) and not checked.knows("rule", x)
    y = torch.zeros(4)
    checked.remember("rule", y)
    y.data = torch.zeros(4)
    assert not checked.knows("rule", y)
