"""Float32 on the tensor-core convolution of CUDA C++: multiplied in TF32, and only where torch's switch allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import compiled, emulate_fault, structure
from precision import fp32_precision
from tensor_core_device import CASES, HOPPER_SHARED, MODES, Device, check_nonfinite, device, fails, use
from torch import Tensor, nn

from slimkernels.cases import ConvCase, to_device
from slimkernels.dispatch import select
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS, cuda_tensor_cores, gathered_packs, resident_plan
from slimkernels.kernels.problems import Request
from slimkernels.kernels.resident_plan import TF32_VARIANTS, VARIANTS
from slimkernels.kernels.tensor_core_tiles import choose_tile
from slimkernels.nn import BlockSparseConv2d
from slimkernels.ops import bsr_conv2d
from slimkernels.testing import TF32_ROUNDOFF, assert_close, compare, drop_term, wrong_block

__all__ = ["device"]  # a fixture, which its users name

FP32, BF16 = torch.float32, torch.bfloat16
SWITCHED_OFF = r"it multiplies float32 in TF32, and torch\.backends\.cudnn\.conv\.fp32_precision is '\w+', not 'tf32'"


@pytest.fixture(autouse=True)
def tf32_allowed() -> Iterator[None]:
    with fp32_precision("tf32"):
        yield


def tf32(t: Tensor) -> Tensor:
    """Float32 with 11 significant bits, in arithmetic of float64: to nearest, from the middle away from zero."""
    significand, exponent = torch.frexp(t.detach().double())
    return torch.ldexp((significand.abs() * 2**11 + 0.5).floor() * significand.sign() / 2**11, exponent).float()


def in_float32(case: ConvCase, variant: int, block_in: int = 8) -> ConvCase:
    return replace(case, dtype=FP32, block_shape=(VARIANTS[variant].column, block_in))


def check(case: ConvCase, variant: int, device: Device, **config: int) -> Tensor:
    """Both bounds: of rounded factors only the sums are inexact, and what rounding takes is half a unit of a factor."""
    inputs = x, weight, bias = case.inputs()
    out = device.launch(case, inputs, variant, **config)
    reference, bound = case.expected(tf32(x), replace(weight, values=tf32(weight.values)), bias)
    assert_close(out, reference, name=f"{case.name}, factors rounded", **bound)
    reference, bound = case.expected(*inputs)
    assert_close(out, reference, u_mul=TF32_ROUNDOFF, name=case.name, **bound)
    assert weight.values.numel() == 0 or out.numel() == 0 or not compare(out, reference, **bound).passed
    return out


@pytest.mark.parametrize("variant", TF32_VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bsr_conv2d(case: ConvCase, variant: int, device: Device) -> None:
    case = in_float32(case, variant)
    out = check(case, variant, device)
    assert out.dtype == FP32 and out.is_contiguous(memory_format=torch.channels_last)
    if device.emulator is not None and case.name != "batch_0":
        w, shape = case.weight(), VARIANTS[variant]
        most = resident_plan.pack_index(
            w.crow_indices, w.col_indices, w.weight_shape, w.block_shape, shape.column, 8
        ).most_steps
        plan = resident_plan.plan(
            variant, case.n, case.c_in, case.h, case.w, case.c_out, case.kernel_size, case.stride, case.padding,
            case.dilation, int(most[min(shape.columns, most.numel()) - 1]), HOPPER_SHARED, 2, {}, size=4,
        )  # fmt: skip
        assert plan is not None and plan.shared_bytes == device.emulator.library.get_launch_shared()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", TF32_VARIANTS)
def test_every_order_of_threads_and_copies(variant: int, mode: int, device: Device) -> None:
    """Several tiles a group and several slabs a tile, so that the ring turns over."""
    device.set_mode(mode)
    case = ConvCase("orders", n=9, c_in=32, h=8, w=8, c_out=128, sparsity=0.7)
    check(in_float32(case, variant), variant, device, slab=8, stages=2)


@pytest.mark.parametrize("block_shape", [(64, 32), (128, 8), (192, 24), (32, 8), (96, 16), (16, 8), (48, 40)], ids=str)
def test_block_shapes(block_shape: tuple[int, int], device: Device) -> None:
    case = ConvCase("blocks", n=1, c_in=40, c_out=264, h=5, w=4, block_shape=block_shape, sparsity=0.6)
    for variant in TF32_VARIANTS:
        if block_shape[0] % VARIANTS[variant].column == 0:
            check(case, variant, device)


@pytest.mark.parametrize(("slab", "stages"), [(8, 4), (16, 3), (32, 2), (64, 2)])
def test_slabs_and_stages(slab: int, stages: int, device: Device) -> None:
    case = ConvCase("slabs", n=3, c_in=72, h=4, w=4, c_out=64, block_shape=(64, 8), sparsity=0.8)
    for variant in (0, 6):
        check(case, variant, device, slab=slab, stages=stages)


# One instruction


def pointwise(x: Tensor, weight: Tensor, device: Device, variant: int = 6) -> Tensor:
    """``(pixels, 8)`` times ``(16, 8)``: one step, with neither bias nor border."""
    case = ConvCase(c_in=8, c_out=16, kernel_size=(1, 1), block_shape=(16, 8), padding=(0, 0), bias=False)
    index = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    stored = BSRWeight(weight[None].contiguous(), *index, (16, 8, 1, 1), (16, 8))
    return device.launch(case, (x[:, :, None, None], stored, None), variant).cpu()[:, :, 0, 0]


def test_every_number_of_an_operand_has_its_place(device: Device) -> None:
    weight = torch.arange(1.0, 129.0).reshape(16, 8)
    x = torch.eye(8)[torch.randperm(64, generator=torch.Generator().manual_seed(1)) % 8]
    assert torch.equal(pointwise(x, weight, device), x @ weight.T)


def bits(*words: int) -> Tensor:
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32).view(FP32)


# Beside the middle between two numbers of TF32, at it and behind it; the largest of TF32 and what rounds to infinity.
HALVES = bits(
    0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F802FFF, 0x3F803000, 0x3F803001, 0xBF800FFF, 0xBF801000, 0xBF801001,
    0x3FFFF000, 0x3FFFEFFF, 0x7F7FEFFF, 0x7F7FF000, 0xFF7FF000, 0x7F7FFFFF, 0x00800001, 0x00801000, 0x7F800000,
    0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x00000000, 0x80000000,
)  # fmt: skip
ROUNDED = bits(
    0x3F800000, 0x3F802000, 0x3F802000, 0x3F802000, 0x3F804000, 0x3F804000, 0xBF800000, 0xBF802000, 0xBF802000,
    0x40000000, 0x3FFFE000, 0x7F7FE000, 0x7F800000, 0xFF800000, 0x7F800000, 0x00800000, 0x00802000, 0x7F800000,
    0xFF800000, 0x7FC00000, 0x7FC00000, 0x7FC00000, 0x00000000, 0x80000000,
)  # fmt: skip


def test_numbers_are_rounded_to_nearest_and_from_the_middle_away_from_zero(device: Device) -> None:
    """Each times one, beside zeros: the instructions that round the input and multiply give the number itself."""
    x = torch.zeros(len(HALVES), 8)
    for i in range(8):
        x[:] = 0
        x[:, i] = HALVES
        weight = torch.zeros(16, 8)
        weight[i], weight[8 + i] = torch.eye(8)[i], -torch.eye(8)[i]
        out = pointwise(x, weight, device)
        assert torch.equal(
            out[:, i].nan_to_num(1234.0, torch.inf, -torch.inf), ROUNDED.nan_to_num(1234.0, torch.inf, -torch.inf)
        )
        assert torch.equal(
            out[:, 8 + i].nan_to_num(1234.0, torch.inf, -torch.inf),
            (-ROUNDED).nan_to_num(1234.0, torch.inf, -torch.inf),
        )


def test_weights_are_rounded_as_the_input_is() -> None:
    same = resident_plan.round_to_tf32(HALVES)
    assert torch.equal(same.isnan(), ROUNDED.isnan()) and torch.equal(same[~same.isnan()], ROUNDED[~same.isnan()])
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-60, 68).repeat(32)
    assert torch.equal(resident_plan.round_to_tf32(numbers), tf32(numbers))
    assert torch.equal(resident_plan.round_to_tf32(numbers.reshape(64, 64).T), tf32(numbers).reshape(64, 64).T)


def test_nonfinite_inputs_reach_what_reads_them(device: Device) -> None:
    case = ConvCase("nan", n=1, c_in=32, h=5, w=6, c_out=128, sparsity=0.7, epilogue="relu_maxpool2")
    for variant in TF32_VARIANTS:
        check_nonfinite(device, in_float32(case, variant), variant)


@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
def test_the_comparison_sees_a_wrong_weight(mutate: Callable[[BSRWeight], BSRWeight], device: Device) -> None:
    case = ConvCase("mutant", c_in=32, c_out=64, block_shape=(64, 8))
    x, weight, bias = case.inputs()
    out = device.launch(case, (x, mutate(weight), bias), 0)
    for rounded in (False, True):
        factors = (tf32(x), replace(weight, values=tf32(weight.values))) if rounded else (x, weight)
        reference, bound = case.expected(*factors, bias)
        assert not compare(out, reference, u_mul=None if rounded else TF32_ROUNDOFF, **bound).passed


def test_no_row_of_a_matrix_waits_for_another(device: Device) -> None:
    if device.emulator is None:
        pytest.skip("counted by the emulation")
    for size in (2, 4, 8, 16, 32):
        case = ConvCase("conflicts", n=1, c_in=8, h=size, w=size, c_out=64, block_shape=(64, 8), sparsity=0.5)
        for variant in TF32_VARIANTS:
            before = device.emulator.library.get_conflicts()
            check(case, variant, device)
            assert device.emulator.library.get_conflicts() == before, (size, variant)


# The switch


@pytest.fixture
def listed(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Ops and modules that name the kernel run it, on the emulation by tensors of the CPU."""
    name = cuda_tensor_cores.NAME
    if device.emulator is not None:
        spec = replace(KERNELS[name], devices=frozenset({"cpu", "cuda"}), available=lambda: None)
        monkeypatch.setattr(select, "KERNELS", {**KERNELS, name: spec})
    for forget in (select.forget, select._explicit.cache_clear):
        forget()
    yield device
    for forget in (select.forget, select._explicit.cache_clear):
        forget()


CASE = ConvCase("switch", n=2, c_in=32, c_out=64, block_shape=(64, 16), sparsity=0.6)


def test_float32_is_refused_where_the_switch_says_ieee(listed: Device) -> None:
    """By the table, by the launcher and by the op, whatever was remembered while it said tf32."""
    x, weight, bias = to_device(CASE.inputs(), listed.name)
    request = Request.of(CASE.problem(listed.name))
    parts = weight.values, weight.crow_indices, weight.col_indices, bias
    geometry = {"weight_shape": weight.weight_shape, "block_shape": weight.block_shape, "padding": CASE.padding}

    def call() -> Tensor:
        return bsr_conv2d(x, *parts, **geometry, kernel=cuda_tensor_cores.NAME)

    expected = call()
    for value in ("ieee", "tf32", "ieee"):
        with fp32_precision(value):
            spec = select.KERNELS[cuda_tensor_cores.NAME]
            reasons = {c.name: c.reason for c in select.candidates(CASE.problem(listed.name), "cuda")}
            assert reasons[cuda_tensor_cores.NAME] is not None  # never a choice of auto
            if value == "tf32":
                assert spec.supports(request) is None and select.resolve(spec.name, request) is spec
                assert torch.equal(call(), expected)
                continue
            reason = spec.supports(request)
            assert reason is not None and reason.startswith("it multiplies float32 in TF32")
            assert spec.supports(request._replace(dtype=BF16)) is None
            for refused in (
                call,
                lambda: listed.launch(CASE, CASE.inputs(), 0),
                lambda: select.resolve(cuda_tensor_cores.NAME, request),
            ):
                with pytest.raises(ValueError, match=rf"^bsr_conv2d: .*{SWITCHED_OFF}"):
                    refused()


def test_the_pack_is_the_same_whatever_the_switch_says(listed: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed while TF32 is not allowed, and read once it is: no other kernel reads it, and the weight stays whole."""
    conv = nn.Conv2d(32, 64, 3, padding=1).to(listed.name)
    x = torch.randn(2, 32, 5, 6, device=listed.name).contiguous(memory_format=torch.channels_last)
    with fp32_precision("ieee"):
        module = BlockSparseConv2d.from_dense(conv, (64, 16)).eval().requires_grad_(False)
        module.kernel = cuda_tensor_cores.NAME
        packed = module._packed()
        assert len(packed) == 4 and torch.equal(packed[0], tf32(packed[0]))
        assert torch.equal(module.to_dense().weight, conv.weight), "the stored blocks keep their low bits"
        with pytest.raises(ValueError, match=SWITCHED_OFF):
            module(x)
    monkeypatch.setattr(resident_plan, "pack", None)  # no call packs anew
    out = module(x)
    with fp32_precision("ieee"), pytest.raises(ValueError, match=SWITCHED_OFF):
        module(x)
    assert torch.equal(module(x), out) and all(a is b for a, b in zip(module._packed(), packed, strict=True))
    exact = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert 0 < (out - exact).abs().max() < 64 * TF32_ROUNDOFF


def test_gradients_of_float32_are_left_to_auto(listed: Device) -> None:
    for op in ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad"):
        request = Request(op, FP32, "cuda", (64, 16), "none")
        spec = KERNELS[f"{op}__cuda_tensor_cores"]
        assert spec.supports(request) == "takes torch.bfloat16, torch.float16, not torch.float32"
        assert select.resolve_gradient(cuda_tensor_cores.NAME, request).name == select.resolve("auto", request).name


# Plans and packs


@pytest.mark.parametrize("variant", TF32_VARIANTS)
def test_a_pack_of_another_dtype_is_not_taken(variant: int, device: Device) -> None:
    """Groups of 8 and of 16 input channels: the indices of one are not those of the other."""
    case = in_float32(replace(CASE, c_out=128), variant, 16)
    x, weight, bias = to_device(case.inputs(), device.name)
    halves = replace(weight, values=weight.values.to(BF16))
    packs = {}
    for w in (weight, halves):
        parts = w.values, w.crow_indices, w.col_indices, w.weight_shape, w.block_shape
        packs[w.values.dtype] = list(resident_plan.pack(*parts, VARIANTS[variant]))
    assert (
        packs[FP32][0].shape[1] * 2 == packs[BF16][0].shape[1] and packs[FP32][2].numel() == 2 * packs[BF16][2].numel()
    )
    arguments: list[Any] = list(case.launch_args(x, weight, bias))
    config = {"variant": variant}
    expected = cuda_tensor_cores.launch_bsr_conv2d(*arguments, config=config)
    for pack in (packs[FP32], packs[BF16]):  # one of another width is passed over
        arguments[5] = pack
        assert torch.equal(cuda_tensor_cores.launch_bsr_conv2d(*arguments, config=config), expected)
    arguments[5] = [t.to(BF16) if i == 0 else t for i, t in enumerate(packs[FP32])]
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected packed weights .* of torch.float32"):
        cuda_tensor_cores.launch_bsr_conv2d(*arguments, config=config)
    arguments[5] = [packs[FP32][0], *(t + 1 if i == 0 else t for i, t in enumerate(packs[FP32][1:]))]
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected packed group_start to be that of"):
        cuda_tensor_cores.launch_bsr_conv2d(*arguments, config=config)


def test_candidates_and_the_shape_that_is_chosen(device: Device) -> None:
    for block_out, c_out, expected in (
        (128, 512, (0, 4)),
        (64, 64, (4,)),
        (32, 256, (4,)),
        (16, 256, (6,)),
        (48, 64, (6,)),
    ):
        for wgmma in (False, True):
            assert resident_plan.candidates(block_out, c_out, wgmma, tf32=True) == expected
    for block in ((128, 16), (64, 8), (32, 8), (16, 16)):
        case = replace(CASE, c_out=136, block_shape=block)
        arguments: list[Any] = list(to_device(case.launch_args(*case.inputs()), device.name))
        out = cuda_tensor_cores.launch_bsr_conv2d(*arguments)
        variant = cuda_tensor_cores.chosen_variant(*arguments[1:4], *arguments[6:8])
        assert torch.equal(out, check(case, variant, device))
        arguments[5] = list(cuda_tensor_cores.pack(*arguments[1:4], *arguments[6:8]))
        assert torch.equal(cuda_tensor_cores.launch_bsr_conv2d(*arguments), out)


def test_what_does_not_run_is_refused(device: Device) -> None:
    with pytest.raises(ValueError, match=r"^bsr_conv2d: variant 1 takes no float32, only 0, 4, 6 do"):
        device.launch(
            replace(CASE, c_out=128, block_shape=(128, 16)), replace(CASE, c_out=128, block_shape=(128, 16)).inputs(), 1
        )
    with pytest.raises(ValueError, match="a block is a multiple of 16 x 8, not 16 x 4"):
        narrow = replace(CASE, block_shape=(16, 4))
        device.launch(narrow, narrow.inputs(), 6)
    large = ConvCase(c_in=512, h=2, w=2, c_out=128, block_shape=(128, 16), sparsity=0.0)
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected block rows .* one of 576 steps of 64 x 8 weights"):
        device.launch(large, large.inputs(), 0)


def test_float32_takes_twice_the_memory() -> None:
    """256 channels at 8x8, 75% zeros: two columns of 36 steps each, and of float32 twice as many."""
    layer = (1024, 256, 8, 8, 256, (3, 3), (1, 1), (1, 1), (1, 1))
    halves = resident_plan.plan(0, *layer, 72, HOPPER_SHARED, 132, {})
    floats = resident_plan.plan(0, *layer, 144, HOPPER_SHARED, 132, {}, size=4)
    assert halves is not None and halves.slab == 32 and floats is None  # 147 and 295 KB of weights
    half = resident_plan.plan(4, *layer, 144, HOPPER_SHARED, 132, {}, size=4)  # 64 channels a thread block
    assert half is not None and half.slab * 4 in (32, 64, 128) and half.shared_bytes <= HOPPER_SHARED
    tile = choose_tile(128, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1))
    sizes = [resident_plan.shared_bytes(VARIANTS[0], tile, 64 // size, 2, 512 // size, 5, size) for size in (2, 4)]
    assert sizes[0] == sizes[1], "as many bytes of a pixel take as much"


# What keeps it right

ROUNDING = "hw::round_operand<T>(pixels[i]);"
BREAKS = {
    "rounding the input": ("sparse_tile.cuh", ROUNDING, ""),
    "a lane's rounding": ("sparse_tile.cuh", ROUNDING, f"if (lane != 17) {ROUNDING}"),
    "a wait for copies": ("resident_conv2d.cuh", "hw::copy_async_wait_all_but(a.stages - 2);", ""),
    "a barrier": ("resident_conv2d.cuh", "hw::synchronize(1 + group, 128);", ""),
    "a row of the border": ("sparse_tile.cuh", "tap / a.s * a.dil_h", "(tap / a.s + tap / 8) * a.dil_h"),
    "a lane": ("sparse_tile.cuh", "(lane >> 4) * 16;", "((lane >> 4) ^ (lane == 17)) * 16;"),
    "the width of a number": ("resident_conv2d.cuh", "a.slab * int(sizeof(T)) + 16;", "a.slab * 2 + 16;"),
    "groups of eight": ("sparse_tile.cuh", "kStepChannels = 32 / int(sizeof(T));", "kStepChannels = 16;"),
    "a channel's bias": ("sparse_tile.cuh", "+ (lane & 3) * RUN", "+ (lane & 3) * 4"),
    "the ReLU": ("sparse_tile.cuh", "relu && sum < 0.0f ? 0.0f : sum", "sum"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    header, old, new = BREAKS[name]
    emulator = emulate_fault(tmp_path, header, old, new, "tf32_conv2d")
    emulator.cuda_resident_conv2d = emulator.entry("tf32_conv2d", structure("SlimCudaResidentConv2d"))
    device = use(emulator, monkeypatch)
    case = in_float32(ConvCase("broken", n=9, c_in=32, c_out=128, sparsity=0.7, epilogue="relu"), 0)
    assert any(fails(device, mode, lambda: check(case, 0, device, slab=8, stages=2)) for mode in MODES)


@pytest.mark.slow
def test_weights_that_were_not_rounded_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    device = use(compiled(), monkeypatch)
    monkeypatch.setattr(gathered_packs, "round_to_tf32", lambda values: values)
    case = in_float32(CASE, 0)
    assert any(fails(device, mode, lambda: check(case, 0, device)) for mode in MODES)
