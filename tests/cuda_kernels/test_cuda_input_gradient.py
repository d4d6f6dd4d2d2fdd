"""Input gradients on tensor cores: of strides, and of weights too large for all columns of a thread block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import emulate_fault
from tensor_core_device import HOPPER_SHARED, MODES, Device, device, fails, use
from torch import Tensor
from torch.nn import functional as F
from triton_backward_cases import GradientCase, build, compare, references

from slimkernels.dispatch import select
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS, cuda_gradients, cuda_input_gradient, cuda_tensor_cores, resident_plan
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.kernels.resident_plan import VARIANTS, Convolution, Plan
from slimkernels.kernels.transposed import class_pattern, pixel_classes, transpose_index
from slimkernels.ops.bsr import bsr_conv2d
from slimkernels.testing import random_bsr

__all__ = ["device"]  # a fixture, which its users name

BF16, FP16 = torch.bfloat16, torch.float16
STRIDED = {
    "even_image": GradientCase(image=(2, 6, 8), stride=(2, 2)),
    "odd_image": GradientCase(image=(2, 7, 5), stride=(2, 2)),
    "one_axis": GradientCase(image=(1, 5, 9), stride=(1, 2), spare=2),
    "three_and_two": GradientCase(image=(1, 11, 7), stride=(3, 2), padding=(1, 2)),
    "exceeds_kernel": GradientCase(image=(1, 9, 8), kernel=(2, 1), stride=(3, 3), padding=(0, 0)),
    "exceeds_image": GradientCase(image=(2, 1, 2), stride=(3, 3)),
    "dilation_shares_a_factor": GradientCase(image=(1, 9, 9), stride=(2, 2), dilation=(2, 3), padding=(2, 0)),
    "dilation": GradientCase(image=(1, 9, 7), stride=(2, 2), dilation=(3, 1), padding=(3, 1)),
    "more_padding_than_taps_reach": GradientCase(image=(1, 5, 4), stride=(2, 2), padding=(4, 5)),
    "pointwise": GradientCase(image=(3, 5, 6), kernel=(1, 1), stride=(2, 2), padding=(0, 0), sparsity=0.3),
    "kernel_7x7": GradientCase(image=(1, 9, 8), kernel=(7, 7), stride=(2, 2), padding=(3, 3), sparsity=0.9),
    "unread_last_row": GradientCase(image=(1, 6, 6), stride=(2, 2), padding=(0, 0)),
    "ragged": GradientCase(image=(2, 6, 7), stride=(2, 2), cut=(8, 8)),
    "zero_block_row": GradientCase(image=(1, 6, 7), stride=(2, 2), pattern="zero_block_row"),
    "no_blocks": GradientCase(image=(1, 6, 7), stride=(2, 2), pattern="no_blocks"),
    "several_tiles": GradientCase(image=(3, 22, 20), stride=(2, 2), sparsity=0.8),
    "batch_0": GradientCase(image=(0, 6, 6), stride=(2, 2)),
}
STRIDE_2 = GradientCase(image=(2, 5, 6), stride=(2, 2), sparsity=0.3)
STRIDE_1 = GradientCase(image=(2, 5, 4), sparsity=0.3)


def arguments(case: GradientCase, grad: Tensor, weight: BSRWeight, device: Device) -> tuple[Any, ...]:
    tensors = (t.to(device.name) for t in (grad, weight.values, weight.crow_indices, weight.col_indices))
    return *tensors, None, case.image[1:], weight.weight_shape, weight.block_shape, *case.geometry()


def check(case: GradientCase, block: tuple[int, int], dtype: torch.dtype, device: Device, **config: int) -> Tensor:
    grad, x, weight = build(case, block, dtype)
    got = cuda_input_gradient.launch_dgrad(*arguments(case, grad, weight, device), config)
    assert got.shape == x.shape and got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype
    result = compare((got.cpu(), torch.zeros_like(weight.values)), references(case, grad, x, weight))[0]
    assert result.passed, result.message
    return got


def with_memory(
    device: Device, monkeypatch: pytest.MonkeyPatch, size: int, hopper: bool = True, mode: int = -1
) -> None:
    """Gives the emulated GPU so many bytes of shared memory."""
    if device.emulator is None:
        pytest.skip("the shared memory of a GPU is what it is")
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: Limits(hopper, size, 2))
    device.emulator.library.set_mode(mode, size)


def plans(case: GradientCase, block: tuple[int, int], device: Device) -> list[Plan]:
    grad, _, weight = build(case, block, BF16)
    grad, _, crow, col, transposed, image, *geometry = arguments(case, grad, weight, device)
    limits = cuda_tensor_cores._limits(grad)
    found = cuda_input_gradient._prepare("op", grad, crow, col, transposed, image, *geometry, {}, limits)
    assert not isinstance(found, str), found
    return [pair[1] for pair in found.plans if pair]


def with_little_memory(
    case: GradientCase, block: tuple[int, int], device: Device, monkeypatch: pytest.MonkeyPatch, mode: int = -1
) -> None:
    """Three quarters of what the weights of all columns of a thread block take, as shared memory."""
    with_memory(device, monkeypatch, HOPPER_SHARED)
    size = max(plan.steps * VARIANTS[plan.variant].column * 32 for plan in plans(case, block, device)) * 3 // 4
    with_memory(device, monkeypatch, size, mode=mode)


# Strides


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("block", [(128, 16), (32, 32)], ids=str)
def test_strides(name: str, block: tuple[int, int], device: Device):
    check(STRIDED[name], block, FP16 if name == "dilation" else BF16, device)


@pytest.mark.parametrize("mode", MODES)
def test_every_order_of_threads_and_copies(mode: int, device: Device):
    """Rings that turn over in each of the four convolutions."""
    device.set_mode(mode)
    check(GradientCase(image=(3, 9, 10), stride=(2, 2), sparsity=0.7), (64, 16), BF16, device, slab=16, stages=2)


def test_blocks_and_shapes(device: Device):
    """All compiled shapes write pixels that are no neighbours."""
    case = GradientCase(image=(1, 5, 6), stride=(2, 2), sparsity=0.5)
    for variant, shape in enumerate(VARIANTS):
        check(case, {16: (16, 16), 32: (32, 32), 64: (64, 64), 128: (128, 128)}[shape.column], BF16, device,
              variant=variant)  # fmt: skip


@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (4, 1)], ids=str)
def test_the_classes_of_pixels_are_the_gradient(kernel: tuple[int, int]):
    """Each class's convolution of the gradient, by torch in float64 with the class's own pattern, over geometries."""
    generator = torch.Generator().manual_seed(0)
    weight = random_bsr((32, 16, *kernel), (16, 8), 0.4, seed=1, dtype=torch.float64)
    dense, seen = weight.to_dense(), 0
    for stride, padding, dilation, image in product(
        ((1, 1), (2, 1), (3, 2)), ((0, 0), (1, 2), (5, 4)), ((1, 1), (2, 3), (4, 2)), ((1, 6), (9, 8))
    ):
        x = torch.randn(1, 16, *image, generator=generator, dtype=torch.float64, requires_grad=True)
        if any(i + 2 * p < d * (k - 1) + 1 for i, p, d, k in zip(image, padding, dilation, kernel, strict=True)):
            continue
        y = F.conv2d(x, dense, None, stride, padding, dilation)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (expected,) = torch.autograd.grad(y, x, grad)
        pattern = weight.crow_indices, weight.col_indices
        index = transpose_index(*pattern, weight.weight_shape, weight.block_shape, stride, dilation)
        got = torch.zeros_like(expected)
        for of in pixel_classes(image, kernel, stride, padding, dilation):
            if min(*of.pixels, *of.taps) < 1:
                continue
            stored, crow, col = class_pattern(
                index, weight.col_indices.numel(), weight.weight_shape, weight.block_shape, stride, of
            )
            part = BSRWeight(
                weight.values[stored.long()].transpose(1, 2), crow, col, (16, 32, *of.taps), (8, 16)
            ).to_dense()  # fmt: skip
            after = (
                pixels - 1 + (taps - 1) * apart + 1 - pad - size
                for pixels, taps, apart, pad, size in zip(
                    of.pixels, of.taps, of.dilation, of.padding, grad.shape[2:], strict=True
                )
            )
            (top, left), (low, right) = of.padding, after
            part_of = got[:, :, of.first[0] :: stride[0], of.first[1] :: stride[1]]
            part_of.copy_(F.conv2d(F.pad(grad, (left, right, top, low)), part, None, 1, 0, of.dilation))
        assert torch.allclose(got, expected.detach(), atol=1e-12), (stride, padding, dilation, image)
        seen += 1
    assert seen > 25


def test_a_stride_of_too_many_convolutions_is_refused(device: Device):
    case = GradientCase(image=(1, 9, 9), kernel=(5, 5), stride=(5, 5), padding=(0, 0))
    grad, _, weight = build(case, (16, 16), BF16)
    with pytest.raises(
        ValueError, match=r"^bsr_conv2d_dgrad: .*stride \(5, 5\) makes 25 convolutions of it, more than"
    ):
        cuda_input_gradient.launch_dgrad(*arguments(case, grad, weight, device))


# Weights that are too large for all columns of a thread block


@pytest.mark.parametrize("case", [STRIDE_1, STRIDE_2], ids=["stride_1", "stride_2"])
@pytest.mark.parametrize("block", [(128, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_fewer_columns(case: GradientCase, block: tuple[int, int], device: Device, monkeypatch: pytest.MonkeyPatch):
    """Half of the columns, a quarter or one, and narrower ones than the block allows; weights that stream by fit."""
    with_little_memory(case, block, device, monkeypatch)
    found = plans(case, block, device)
    full = resident_plan.candidates(block[1], 2 * block[1], True)
    if VARIANTS[full[0]].streamed:
        assert all(plan.variant in full for plan in found)
    else:
        assert any(plan.variant not in full or plan.columns < VARIANTS[plan.variant].columns for plan in found), found
    check(case, block, BF16, device)


@pytest.mark.parametrize("mode", MODES)
def test_fewer_columns_in_every_order(mode: int, device: Device, monkeypatch: pytest.MonkeyPatch):
    with_little_memory(STRIDE_1, (128, 16), device, monkeypatch, mode)
    check(STRIDE_1, (128, 16), BF16, device)


def test_fewer_columns_than_a_shape_has_in_the_forward(device: Device, monkeypatch: pytest.MonkeyPatch):
    """A row of the forward kernel that does not fit with all columns of a thread block runs with fewer."""
    from slimkernels.cases import ConvCase

    case = ConvCase(n=1, c_in=64, h=5, w=6, c_out=128, block_shape=(64, 16), sparsity=0.2, dtype=BF16)
    with_memory(device, monkeypatch, 100_000, hopper=False)
    weight = case.inputs()[1]
    parts = (weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    most = resident_plan.pack_index(*parts, VARIANTS[0].column).most_steps
    conv = Convolution(1, 64, 5, 6, 128, (3, 3), (1, 1), (1, 1), (1, 1), (5, 6))
    plan = cuda_tensor_cores.fitting_plan(conv, 0, most, cuda_tensor_cores._limits(weight.values), {})
    assert plan is not None and plan.columns == 1 < VARIANTS[0].columns
    device.check(case, 0)


def test_what_fits_nowhere_is_left_to_auto(device: Device, monkeypatch: pytest.MonkeyPatch):
    """The reason is known before anything is launched, and once a pattern was met nothing is read of it again."""
    with_memory(device, monkeypatch, 8_000)
    grad, _, weight = build(STRIDE_1, (128, 16), BF16)
    given = arguments(STRIDE_1, grad, weight, device)
    reason = cuda_input_gradient.dgrad_obstacle(*given)
    assert reason is not None and reason.startswith("the weights of 16 input channels do not fit 8000 bytes")
    with pytest.raises(ValueError, match=f"^bsr_conv2d_dgrad: the tensor-core kernel does not take this: {reason}"):
        cuda_input_gradient.launch_dgrad(*given)
    read: list[object] = []
    monkeypatch.setattr(resident_plan, "pack_index", lambda *a: read.append(a))
    monkeypatch.setattr(cuda_input_gradient, "transpose_index", lambda *a: read.append(a))
    assert cuda_input_gradient.dgrad_obstacle(*given) == reason and not read
    assert device.emulator is not None


@pytest.fixture
def on_the_cpu(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Ops take layers that name the tensor-core kernels to the emulation."""
    if device.emulator is None:
        pytest.skip("the shared memory of a GPU is what it is")
    emulated = {
        name: replace(spec, devices=frozenset({"cpu", "cuda"}), available=lambda: None)
        for name, spec in KERNELS.items()
        if name.startswith("bsr") and name.endswith("__cuda_tensor_cores")
    }
    monkeypatch.setattr(select, "KERNELS", {**KERNELS, **emulated})
    select.forget()
    select._explicit.cache_clear()
    yield device
    select.forget()
    select._explicit.cache_clear()


@pytest.mark.parametrize("case", [STRIDE_1, STRIDE_2], ids=["stride_1", "stride_2"])
@pytest.mark.parametrize("memory", ["much", "little", "too little"])
def test_a_forward_that_runs_has_a_backward_that_runs(
    case: GradientCase, memory: str, on_the_cpu: Device, monkeypatch: pytest.MonkeyPatch
):
    """Through autograd: of the transposed weight a thread block holds all columns, some or none."""
    grad, x, weight = build(case, (128, 16), BF16)
    leaf, values = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
    stride, padding, dilation = case.geometry()
    y = bsr_conv2d(
        leaf, values, weight.crow_indices, weight.col_indices, weight_shape=weight.weight_shape,
        block_shape=weight.block_shape, stride=stride, padding=padding, dilation=dilation,
        kernel=cuda_tensor_cores.NAME,
    )  # fmt: skip
    if memory == "little":
        with_little_memory(case, (128, 16), on_the_cpu, monkeypatch)
    elif memory == "too little":
        with_memory(on_the_cpu, monkeypatch, 8_000)
    ran: list[str] = []
    for op in ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad"):
        for name in (f"{op}__reference", f"{op}__cuda_tensor_cores"):
            launch = select.KERNELS[name].launch
            noted = partial(lambda name, launch, *arguments: ran.append(name) or launch(*arguments), name, launch)
            monkeypatch.setitem(select.KERNELS, name, replace(select.KERNELS[name], launch=noted))
    y.backward(grad)
    assert leaf.grad is not None and values.grad is not None
    ran.sort()  # the input's gradient comes last, and first here
    assert ran[0] == (f"bsr_conv2d_dgrad__{'reference' if memory == 'too little' else 'cuda_tensor_cores'}")
    for name, result in zip(ran, compare((leaf.grad, values.grad), references(case, grad, x, weight)), strict=True):
        # Torch's own bf16 convolution on a CPU is not held to the bound of each element.
        assert result.passed or (name.endswith("__reference") and result.rms_ratio < result.rms_ratio_allowed), name


def test_layers_of_real_sizes():
    """1024 output channels for 64 input ones: the forward's rows fit, of the transposed weight not one column does."""
    grad = Convolution(8, 1024, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), (8, 8))
    forward = Convolution(8, 64, 8, 8, 1024, (3, 3), (1, 1), (1, 1), (1, 1), (8, 8))
    full = resident_plan.fitting_plan(1, forward, tuple(range(36, 9 * 36, 36)), HOPPER_SHARED, 132)
    assert full is not None and full.columns == 1 and full.steps == 288
    columns = tuple(range(576, 5 * 576, 576))
    assert resident_plan.fitting_plan(6, grad, columns, HOPPER_SHARED, 132) is None
    half = resident_plan.fitting_plan(6, grad._replace(c_in=512), tuple(n // 2 for n in columns), HOPPER_SHARED, 132)
    assert half is not None and half.columns == 1 and half.steps == 288


def test_numbers_that_would_wrap_are_left_to_auto():
    conv = Convolution(1, 16, 64, 64, 16, (3, 3), (1, 1), (1, 1), (1, 1), (64, 64))
    plan = resident_plan.fitting_plan(5, conv, (9,), HOPPER_SHARED, 2)
    assert plan is not None and resident_plan.in_range(conv, plan, 64 * 64 * 16) is None
    for changes, image, message in (
        ({"dilation": (70000, 1)}, 0, "taps, strides, padding or dilation above 65535"),
        ({"h": 2**20}, 0, "images of 2"),
        ({}, 2**31, "images of 2"),
        ({"n": 2**40}, 0, "too many pixels"),
    ):
        reason = resident_plan.in_range(conv._replace(**changes), plan, image)
        assert reason is not None and reason.startswith(message)


def test_weight_gradients_say_what_they_do_not_take(device: Device):
    grad, x, weight = build(STRIDE_1, (64, 16), BF16)
    tensors = (t.to(device.name) for t in (grad, x, weight.values, weight.crow_indices, weight.col_indices))
    given = [*tensors, weight.weight_shape, weight.block_shape, *STRIDE_1.geometry()]
    assert cuda_gradients.wgrad_obstacle(*given) is None
    assert cuda_gradients.wgrad_obstacle(given[0].float(), *given[1:]) == "float32"
    far = cuda_gradients.wgrad_obstacle(*given[:-1], (2**28, 1))
    assert far is not None and far.startswith("taps reach 2**31 elements or more")
    assert cuda_gradients.wgrad_obstacle(*given[:6], (8, 16), *given[7:]) == (
        "a block is a multiple of 16 x 16, not 8 x 16"
    )


# What keeps it right

BREAKS = {
    "the end of a thread block's channels": ("first + h * 8 * RUN < end", "first + h * 8 * RUN < int(a.c_out)"),
    "the row of a pixel of y": ("down * step.row", "down * step.pixel"),
    "the columns of a tile of y": ("(a.pool ? x / 2 : x) * step.pixel", "(a.pool ? x / 2 : x) * int(a.c_out)"),
    "the place of a tile in y": ("y * step.row + x * step.pixel + first", "y * step.row + x * int(a.c_out) + first"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = BREAKS[name]
    broken = use(emulate_fault(tmp_path, "sparse_tile.cuh", old, new, "resident_conv2d", "narrow_conv2d"), monkeypatch)
    assert any(fails(broken, mode, partial(check_places, broken, monkeypatch, mode)) for mode in MODES)


def check_places(device: Device, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    check(replace(STRIDED["several_tiles"], image=(1, 6, 160)), (64, 16), BF16, device)
    with_little_memory(STRIDE_1, (128, 16), device, monkeypatch, mode)
    check(STRIDE_1, (128, 16), BF16, device)
