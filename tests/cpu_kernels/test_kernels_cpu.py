"""Every CPU and reference kernel of the table against the float64 reference: edges, borders, NaN reach, determinism."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import TESTS

from slimkernels import ops
from slimkernels.cases import (
    Case,
    ConvCase,
    LinearCase,
    LowRankConvCase,
    LowRankLinearCase,
    assert_matches_reference,
    launch,
)
from slimkernels.kernels import DENSE_OPS, EPILOGUES, GRADIENT_OPS, KERNELS, NORM_OPS, OPS
from slimkernels.kernels.cpu.conv2d import pack_strips
from slimkernels.testing import assert_close, naive_bsr_conv2d, naive_bsr_linear, naive_epilogue, random_bsr

# A kernel that this machine cannot run is skipped once, with its reason, in test_kernel_of_the_table.
LISTED = [name for name, spec in KERNELS.items() if spec.backend in ("reference", "cpu") and spec.op in OPS]
LOCAL = [name for name in LISTED if KERNELS[name].available() is None]
NATIVE = [name for name in LOCAL if KERNELS[name].backend == "cpu"]
CONV = [name for name in LOCAL if KERNELS[name].op == "bsr_conv2d"]
LINEAR = [name for name in LOCAL if KERNELS[name].op == "bsr_linear"]
NATIVE_CONV = [name for name in CONV if name in NATIVE]
REFERENCE_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Strips of 16, 32, 8, of 4, 2 and 1 channels (which run with images innermost), 16 again in wider blocks.
STRIPS = [(16, 1), (32, 1), (8, 1), (24, 2), (4, 4), (5, 3), (6, 1), (16, 4), (1, 1), (16, 16), (64, 16)]
BLOCK_SHAPES = {"cpu": STRIPS, "reference": [(16, 1), (64, 16), (1, 1), (4, 4), (5, 3)]}
GEOMETRY = {"h": 9, "w": 7}

# Named by the arithmetic of the tiles: MR output pixels and NR (strip) output channels a microkernel call, block_shape
# of the pattern. Base case: 2 images 8x8, 16 -> 32 channels, 3x3, padding 1, 87.5% sparse.
CONV_CASES = [
    ConvCase("base"),
    ConvCase("m_is_1", n=1, h=1, w=1, kernel_size=(1, 1), padding=(0, 0)),
    ConvCase("m_lt_mr", n=1, h=1, w=3, padding=(1, 1)),
    ConvCase("m_div_mr", n=1, h=12, w=12),
    ConvCase("m_tail_of_one", n=1, h=13, w=13),
    ConvCase("n_gt_nr", c_out=128, h=5, w=5),
    ConvCase("k_eq_block", c_in=16, kernel_size=(1, 1), padding=(0, 0), sparsity=0.0),
    ConvCase("prime_stride", c_in=17, c_out=67, h=11, w=13),
    ConvCase("half_sparse", sparsity=0.5),
    ConvCase("zero_blocks", sparsity=0.5, pattern="zero_blocks"),
    ConvCase("zero_block_row", c_out=80, sparsity=0.5, pattern="zero_block_row"),
    ConvCase("no_blocks", pattern="no_blocks"),
    ConvCase("all_dense", pattern="all_dense"),
    ConvCase("batch_0", n=0),
    ConvCase("image_2x2_many", n=37, h=2, w=2),
    ConvCase("image_4x4_batch1", n=1, h=4, w=4, c_in=64, c_out=64),
    ConvCase("image_4x4_batch16", n=16, h=4, w=4),
    ConvCase("image_1_row", h=1, w=33),
    ConvCase("image_1_column", h=33, w=1),
    ConvCase("ragged_c_out", c_out=37),
    ConvCase("c_out_1", c_out=1, sparsity=0.5),
    ConvCase("ragged_c_in", c_in=19),
    ConvCase("c_in_3", c_in=3, sparsity=0.3),
    ConvCase("kernel_1x1", kernel_size=(1, 1), padding=(0, 0)),
    ConvCase("kernel_5x5", kernel_size=(5, 5), padding=(2, 2)),
    ConvCase("kernel_1x3", kernel_size=(1, 3), padding=(0, 1), **GEOMETRY),
    ConvCase("kernel_3x1", kernel_size=(3, 1), padding=(1, 0), **GEOMETRY),
    ConvCase("kernel_2x2_no_padding", kernel_size=(2, 2), padding=(0, 0), **GEOMETRY),
    ConvCase("kernel_of_the_image", h=5, w=4, kernel_size=(5, 4), padding=(0, 0)),
    ConvCase("kernel_1x1_padded", kernel_size=(1, 1), padding=(1, 2)),
    ConvCase("asymmetric_padding", padding=(2, 0), **GEOMETRY),
    ConvCase("asymmetric_stride", stride=(2, 1), **GEOMETRY),
    ConvCase("stride_2", stride=(2, 2), h=15, w=16),
    ConvCase("stride_3_5", stride=(3, 5), h=17, w=23),
    ConvCase("stride_gt_kernel", stride=(3, 2), kernel_size=(1, 1), padding=(0, 0), **GEOMETRY),
    ConvCase("padding_gt_kernel", padding=(4, 5), h=3, w=2),
    ConvCase("dilation", dilation=(2, 3), padding=(2, 3), **GEOMETRY),
    ConvCase("dilation_gt_image", dilation=(5, 5), padding=(5, 5), h=4, w=4),
    ConvCase("dilation_and_stride", dilation=(2, 1), stride=(2, 2), padding=(0, 1), h=12, w=9),
    ConvCase("pool_odd", h=7, w=9),
    ConvCase("pool_of_one_output", h=2, w=3),
]
LINEAR_CASES = [
    LinearCase("base"),
    LinearCase("m_is_1", m=1),
    LinearCase("m_is_0", m=0),
    LinearCase("m_37", m=37, in_features=19, out_features=67),
    LinearCase("vgg_classifier", m=3, in_features=512, out_features=512, sparsity=0.875),
    LinearCase("ten_classes", m=9, in_features=40, out_features=10),
    LinearCase("no_blocks", pattern="no_blocks"),
    LinearCase("all_dense", pattern="all_dense"),
    LinearCase("zero_block_row", out_features=80, pattern="zero_block_row"),
    LinearCase("zero_blocks", pattern="zero_blocks"),
]
LOW_RANK_CASES = [
    LowRankLinearCase("base"),
    LowRankLinearCase("rank_1", rank=1),
    LowRankLinearCase("rank_gt_sizes", rank=31, in_features=7, out_features=5),
    LowRankLinearCase("m_is_0", m=0),
    LowRankLinearCase("m_is_1", m=1, in_features=512, out_features=512, rank=64),
] + [
    LowRankConvCase(f"{kind}_{name}", kind, ranks=ranks, **sizes)
    for kind, ranks in (("tai", (4,)), ("svd", (3,)), ("tucker2", (3, 5)))
    for name, sizes in {
        "base": {},
        "batch_0": {"n": 0},
        "kernel_5x3": {"kernel_size": (5, 3), "padding": (2, 1)},
        "asymmetric": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "h": 11, "w": 10},
    }.items()
]


def usable(name: str, case: Case) -> None:
    """Fails where a kernel refuses a case that it must take."""
    assert KERNELS[name].supports(case.problem()) is None, f"{name} refuses {case}"


def poolable(case: ConvCase) -> ConvCase:
    """The case, without its pool where the convolution has a single row or column of outputs."""
    problem = case.problem()
    return replace(case, epilogue="relu") if "pool" in case.epilogue and min(problem.p, problem.q) < 2 else case


def pairs(names: list[str], cases: list) -> list:
    return [pytest.param(n, c, i, id=f"{n}-{c.name}") for n in names for i, c in enumerate(cases)]


@pytest.mark.parametrize(("name", "case", "index"), pairs(CONV, CONV_CASES))
def test_conv_edge_case(name: str, case: ConvCase, index: int) -> None:
    for seed, block_shape in enumerate(BLOCK_SHAPES[KERNELS[name].backend], index):
        epilogue = sorted(KERNELS[name].epilogues)[seed % 3]
        one = replace(case, block_shape=block_shape, seed=seed, bias=seed % 4 > 0, epilogue=epilogue)
        assert_matches_reference(name, poolable(one), threads=1 + seed % 2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("epilogue", sorted(EPILOGUES["bsr_conv2d"]))
@pytest.mark.parametrize("block_shape", [(8, 1), (16, 1), (32, 1)])
@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("threads", [1, 2])
def test_conv_epilogue_bias_threads(name: str, block_shape, epilogue: str, bias: bool, threads: int) -> None:
    for sizes in ({"h": 9, "w": 11}, {"n": 5, "h": 4, "w": 4}, {"n": 9, "h": 2, "w": 2}, {"n": 1, "h": 21, "w": 2}):
        case = ConvCase("epilogue", c_out=72, block_shape=block_shape, epilogue=epilogue, bias=bias, **sizes)
        assert_matches_reference(name, case, threads=threads)


@pytest.mark.parametrize(("name", "case", "index"), pairs(LINEAR, LINEAR_CASES))
def test_linear_edge_case(name: str, case: LinearCase, index: int) -> None:
    for seed, block_shape in enumerate(BLOCK_SHAPES[KERNELS[name].backend], index):
        epilogue = sorted(KERNELS[name].epilogues)[seed % 2]
        one = replace(case, block_shape=block_shape, seed=seed, bias=seed % 4 > 0, epilogue=epilogue)
        assert_matches_reference(name, one, threads=1 + seed % 2)


@pytest.mark.parametrize("epilogue", ["none", "relu"])
@pytest.mark.parametrize("case", LOW_RANK_CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_low_rank_reference(case, epilogue: str) -> None:
    for dtype in REFERENCE_DTYPES:
        one = replace(case, epilogue=epilogue, dtype=dtype, bias=dtype != torch.float64)
        assert_matches_reference(f"{case.op}__reference", one)


@pytest.mark.parametrize("dtype", REFERENCE_DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", sorted(EPILOGUES["bsr_conv2d"]))
def test_reference_computes_in_the_dtype_of_its_input(epilogue: str, dtype: torch.dtype) -> None:
    case = ConvCase("dtype", dtype=dtype, epilogue=epilogue, block_shape=(5, 3), h=9, w=7)
    assert launch("bsr_conv2d__reference", case, case.inputs()).dtype == dtype
    assert_matches_reference("bsr_conv2d__reference", case)
    if epilogue != "relu_maxpool2":
        assert_matches_reference("bsr_linear__reference", LinearCase(dtype=dtype, epilogue=epilogue))


SIZES = st.integers(1, 12)


@pytest.mark.parametrize("name", CONV)
@given(data=st.data())
def test_conv_of_any_shape(name: str, data) -> None:
    draw = data.draw
    kernel, dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 5))), draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    block_out = draw(st.sampled_from([8, 16, 24, 32, 48, 64] if name in NATIVE else [1, 3, 4, 8, 16]))
    case = ConvCase(
        "hypothesis", n=draw(st.integers(0, 5)), c_in=draw(st.integers(1, 33)), c_out=draw(st.integers(1, 100)),
        h=least[0] + draw(SIZES) - 1, w=least[1] + draw(st.integers(1, 30)) - 1, kernel_size=kernel,
        stride=draw(st.tuples(*[st.integers(1, 4)] * 2)), padding=padding, dilation=dilation,
        block_shape=(block_out, draw(st.sampled_from([1, 2, 3, 4, 16]))), sparsity=draw(st.floats(0, 1)),
        pattern=draw(st.sampled_from(["random", "zero_block_row", "zero_blocks"])), bias=draw(st.booleans()),
        epilogue=draw(st.sampled_from(["none", "relu", "relu_maxpool2"])), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    assert_matches_reference(name, poolable(case), threads=draw(st.sampled_from([1, 2])))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CONV)
def test_conv_of_a_vgg_layer(name: str, threads: int) -> None:
    """The sizes the kernels are for: many strips, many pixel tiles, several images."""
    for case in (
        ConvCase("vgg_conv3", n=2, c_in=128, c_out=256, block_shape=(16, 1), h=8, w=8, epilogue="relu_maxpool2"),
        ConvCase("vgg_conv5", n=3, c_in=512, c_out=512, block_shape=(32, 1), sparsity=0.95, h=2, w=2, epilogue="relu"),
        ConvCase("vgg_conv1", n=1, c_in=64, c_out=64, block_shape=(64, 16), h=32, w=32),
    ):
        assert_matches_reference(name, case, threads=threads)


# Memory


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [n for n in NATIVE if "bsr" in n])  # low rank: tests/cpu_kernels/test_low_rank_cpu.py
def test_no_write_outside_the_output_no_read_outside_the_input(
    name: str, sentinel_borders, nan_surrounded, threads: int
) -> None:
    op = KERNELS[name].op
    cases = CONV_CASES if op == "bsr_conv2d" else LINEAR_CASES
    for i, case in enumerate(cases):
        for block_shape in ((8, 1), (16, 4), (32, 1)):
            epilogues = ("none", "relu_maxpool2") if op == "bsr_conv2d" else ("relu",)
            case = replace(case, block_shape=block_shape, bias=i % 2 == 0, epilogue=epilogues[i % len(epilogues)])
            case = poolable(case) if op == "bsr_conv2d" else case
            x, weight, bias = case.inputs()
            guarded = (nan_surrounded(x), weight, None if bias is None else nan_surrounded(bias))
            out = launch(name, case, guarded, threads=threads)
            sentinel_borders.check()
            assert not out.isnan().any(), f"{case.name}: reads outside its input, or leaves an output unwritten"
            assert torch.equal(out, launch(name, case, case.inputs())), case.name


@pytest.mark.parametrize("name", CONV)
def test_inputs_are_left_alone(name: str) -> None:
    case = ConvCase("inputs", epilogue="relu_maxpool2")
    usable(name, case)
    x, weight, bias = case.inputs()
    before = [t.clone() for t in (x, weight.values, weight.crow_indices, weight.col_indices, bias)]
    launch(name, case, (x, weight, bias))
    for old, new in zip(before, (x, weight.values, weight.crow_indices, weight.col_indices, bias), strict=True):
        assert torch.equal(old, new)


# Non-finite values


def nan_cases() -> list[ConvCase]:
    small = ConvCase("nan", n=1, c_in=6, c_out=24, h=6, w=5, sparsity=0.8)
    return [
        replace(
            small, name=f"{b[0]}x{b[1]}-{e}-{p}", block_shape=b, epilogue=e, pattern=p, seed=i, c_out=max(20, b[0] + 8)
        )
        for i, (b, e, p) in enumerate(
            (b, e, p)
            for b in ((8, 1), (16, 1), (32, 1), (16, 4), (64, 16), (4, 4), (1, 1))
            for e, p in (("none", "random"), ("relu", "zero_blocks"), ("relu_maxpool2", "zero_block_row"))
        )
    ] + [
        replace(small, name="strided", sparsity=0.5, block_shape=(8, 1), stride=(2, 1), padding=(3, 0), dilation=(1, 2))
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, id=f"{n}-{c.name}") for n in CONV for c in nan_cases()],
)
def test_a_non_finite_input_reaches_what_its_stored_blocks_reach(name: str, case: ConvCase) -> None:
    x, weight, bias = case.inputs()
    x[0, 2, 1, 3], x[0, 5, 4, 0], x[0, 1, 0, 0] = math.nan, math.inf, -math.inf
    before_epilogue = naive_bsr_conv2d(x, weight, bias, *case.geometry()[:3])
    expected = naive_epilogue(before_epilogue, case.epilogue)
    out = launch(name, case, (x, weight, bias))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf()) and torch.equal(out.isneginf(), expected.isneginf())
    ref_x = torch.where(torch.isfinite(x), x, 0.0)
    ref, bound = case.expected(ref_x, weight, bias)
    clean = torch.isfinite(before_epilogue)
    assert not clean.all() and clean.any(), "the case must hold both kinds"
    if case.epilogue != "relu_maxpool2":
        assert_close(torch.where(clean, out, ref.float()), ref, **bound)


@pytest.mark.parametrize("name", LINEAR)
def test_a_non_finite_row_stays_in_its_row(name: str) -> None:
    case = LinearCase("nan", m=4, block_shape=(16, 1))
    usable(name, case)
    x, weight, bias = case.inputs()
    x[2, :4] = math.nan
    out = launch(name, case, (x, weight, bias))
    assert torch.equal(out.isnan(), naive_bsr_linear(x, weight, bias).isnan())
    assert out.isnan().any()


@pytest.mark.parametrize("name", CONV)
def test_relu_and_pool_keep_nan_of_the_bias(name: str) -> None:
    for epilogue in ("relu", "relu_maxpool2"):
        case = ConvCase("nan_bias", epilogue=epilogue)
        usable(name, case)
        x, weight, bias = case.inputs()
        bias[3], bias[4], bias[5] = math.nan, math.inf, -math.inf
        out = launch(name, case, (x, weight, bias))
        assert out[:, 3].isnan().all() and out[:, 4].isposinf().all() and (out[:, 5] == 0).all()
        assert torch.isfinite(out[:, :3]).all() and torch.isfinite(out[:, 6:]).all()


# Determinism


@pytest.mark.parametrize("name", LOCAL)
def test_the_same_bits_every_time_and_for_every_thread_count(name: str) -> None:
    op = KERNELS[name].op
    cases = {
        "bsr_conv2d": [c for c in CONV_CASES if c.n] + [ConvCase("wide", n=3, c_in=96, c_out=160, h=14, w=14)],
        "bsr_linear": [LinearCase("wide", m=33, in_features=300, out_features=200)],
        "low_rank_linear": [LowRankLinearCase(m=33)],
        "low_rank_conv2d": [LowRankConvCase()],
    }[op]
    for case in cases:
        usable(name, case)
        one = launch(name, case, case.inputs())
        assert torch.equal(one, launch(name, case, case.inputs())), f"{case.name}: two calls differ"
        if KERNELS[name].backend == "cpu":
            for threads in (2, 3):
                assert torch.equal(one, launch(name, case, case.inputs(), threads=threads)), f"{case.name}: {threads}"


@pytest.mark.parametrize("name", NATIVE_CONV)
def test_images_of_a_batch_do_not_meet(name: str) -> None:
    """A tile may hold pixels of several images: NaN in one of them changes no bit of the others."""
    for sizes in ({"h": 5, "w": 3}, {"h": 2, "w": 2}, {"h": 1, "w": 1}, {"h": 4, "w": 4, "stride": (2, 2)}):
        case = ConvCase("batch", n=7, c_out=40, block_shape=(8, 1), sparsity=0.5, **sizes)
        usable(name, case)
        x, weight, bias = case.inputs()
        clean = launch(name, case, (x, weight, bias))
        x[3] = math.nan
        spoilt = launch(name, case, (x, weight, bias))
        others = [0, 1, 2, 4, 5, 6]
        assert torch.equal(clean[others], spoilt[others]) and spoilt[3].isnan().any()


def test_spare_capacity_is_never_read() -> None:
    """Blocks past crow_indices[-1] are spare: the result is that of the weight without them, even if they hold NaN."""
    case = ConvCase("capacity")
    x, weight, bias = case.inputs()
    spare = replace(
        weight,
        values=torch.cat([weight.values, torch.full((3, 16, 1), math.nan)]),
        col_indices=torch.cat([weight.col_indices, torch.zeros(3, dtype=torch.int32)]),
    )
    for name in CONV:
        out = launch(name, case, (x, spare, bias))
        assert torch.equal(out, launch(name, case, (x, weight, bias))), name


# The table


def test_every_listed_kernel_has_its_tests() -> None:
    """Local kernels are parametrised from the table; the others have a file that names them or iterates over it."""
    for name, spec in KERNELS.items():
        assert name == spec.name and spec.op in OPS + DENSE_OPS + GRADIENT_OPS + NORM_OPS and spec.launch is not None
        assert spec.epilogues <= EPILOGUES[spec.op] and spec.dtypes and spec.devices
        if spec.backend in ("triton", "cuda"):
            text = "".join(p.read_text() for p in TESTS.rglob(f"*{spec.backend}*.py"))
            assert name in text or "KERNELS" in text, f"no test of {name} in tests/*/*{spec.backend}*.py"
        else:
            # Those are in tests/ops, in test_gradients.py, test_fused.py and test_batch_norm.py.
            assert name in LISTED or spec.op in GRADIENT_OPS + DENSE_OPS + NORM_OPS
    assert {KERNELS[n].op for n in LOCAL} == set(OPS), "every op has a reference kernel"
    assert {KERNELS[n].isa for n in LISTED} == {None, "scalar", "avx2", "avx512"}


def test_an_unlisted_kernel_cannot_run() -> None:
    case = ConvCase()
    x, weight, bias = case.inputs()
    tensors = (x, weight.values, weight.crow_indices, weight.col_indices, bias)
    expected = r"bsr_conv2d: expected kernel 'auto' or one of .*bsr_conv2d_f32__avx2.*, got"
    for kernel in ("bsr_conv2d_f32__sse2", "bsr_linear__reference", ""):
        with pytest.raises(ValueError, match=expected):
            ops.bsr_conv2d(*tensors, weight_shape=weight.weight_shape, block_shape=(16, 1), kernel=kernel)


@pytest.mark.parametrize("name", LISTED)
def test_kernel_of_the_table(name: str) -> None:
    """One skip per kernel that cannot run here, with its reason; a native one must run where the CPU has its ISA."""
    spec = KERNELS[name]
    reason = spec.available()
    if reason is not None and reason.startswith("slimkernels._C is not loaded"):
        pytest.skip(reason)
    if spec.backend == "cpu" and Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        needs = {
            "scalar": set(),
            "avx2": {"avx2", "fma"},
            "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"},
        }
        assert (reason is None) == (needs[spec.isa] <= flags), reason
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    assert name in LOCAL


def test_kernels_refuse_what_they_do_not_take() -> None:
    """A refusal is a reason, and only for what the kernel's row says."""
    for name in LISTED:
        if KERNELS[name].op != "bsr_conv2d":
            continue
        for block_shape in {*STRIPS, *BLOCK_SHAPES["reference"]}:
            if KERNELS[name].backend in ("cpu", "reference"):
                assert KERNELS[name].supports(ConvCase(block_shape=block_shape).problem()) is None
        for dtype in REFERENCE_DTYPES:
            reason = KERNELS[name].supports(ConvCase(dtype=dtype).problem())
            assert (reason is None) == (dtype in KERNELS[name].dtypes) and (reason is None or str(dtype) in reason)
        if KERNELS[name].backend == "cpu":
            assert "not cuda" in KERNELS[name].supports(ConvCase().problem("cuda"))
        assert "no epilogue 'gelu'" in KERNELS[name].supports(ConvCase(epilogue="gelu").problem())


def test_the_strip_pack_holds_every_stored_weight_once() -> None:
    """The strip pack of the native kernels holds every stored weight once, sorted by (strip, tap, channel)."""
    for shape, block_shape, strip in (
        ((37, 19, 3, 3), (16, 4), 16), ((37, 19, 3, 3), (16, 4), 8), ((100, 5, 1, 3), (64, 3), 32),
        ((8, 4, 2, 2), (8, 1), 8), ((40, 7, 1, 1), (32, 16), 16),
    ):  # fmt: skip
        weight = random_bsr(shape, block_shape, 0.6, seed=1)
        weights, channels, tap_ptr = pack_strips(
            weight.values, weight.crow_indices, weight.col_indices, shape, block_shape, strip
        )
        c_out, c_in, r, s = shape
        strips, taps = -(-c_out // strip), r * s
        assert tap_ptr.dtype == channels.dtype == torch.int32 and weights.shape == (len(channels), strip)
        assert tap_ptr.shape == (strips * taps + 1,) and tap_ptr[0] == 0 and tap_ptr[-1] == len(channels)
        dense = torch.zeros(strips * strip, c_in, taps)
        for cell in range(strips * taps):
            begin, end = int(tap_ptr[cell]), int(tap_ptr[cell + 1])
            assert begin <= end and (channels[begin:end].diff() > 0).all()
            i, tap = divmod(cell, taps)
            dense[i * strip : (i + 1) * strip, channels[begin:end].long(), tap] = weights[begin:end].T
        assert torch.equal(dense[:c_out].reshape(shape), weight.to_dense()) and not dense[c_out:].any()
