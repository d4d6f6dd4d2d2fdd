"""Gradients on the tensor-core kernels of csrc/cuda, on a GPU where there is one and on a CPU emulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import ROOT, emulate_fault, structure
from tensor_core_device import HOPPER_SHARED, MODES, Device, device, fails, use
from torch import Tensor
from triton_backward_cases import GradientCase, build, compare, mutants, references

from slimkernels import _extension
from slimkernels.dispatch import select
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS, cuda, cuda_gradients, cuda_input_gradient, cuda_tensor_cores, resident_plan
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.kernels.problems import Request
from slimkernels.kernels.transposed import transpose_index
from slimkernels.tensors import Derived
from slimkernels.testing import Comparison

__all__ = ["device"]  # a fixture, which its users name

BF16, FP16 = torch.bfloat16, torch.float16
# Stages have 32 pixels, tiles of the input gradient 128 or 256 in windows of 2 x 2.
CASES = {
    "less_than_a_stage": GradientCase(image=(1, 3, 3)),
    "several_stages": GradientCase(image=(3, 7, 7)),
    "one_pixel": GradientCase(image=(5, 1, 1), kernel=(1, 1), padding=(0, 0), sparsity=0.3),
    "ragged": GradientCase(cut=(8, 8)),
    "zero_block_row": GradientCase(pattern="zero_block_row"),
    "no_blocks": GradientCase(pattern="no_blocks", spare=2),
    "all_dense": GradientCase(image=(1, 4, 4), pattern="all_dense"),
    "spare_blocks": GradientCase(spare=3),
    "batch_0": GradientCase(image=(0, 5, 5)),
    "dilation": GradientCase(image=(1, 7, 9), dilation=(2, 3), padding=(2, 3)),
    "more_padding_than_taps_reach": GradientCase(image=(1, 4, 3), padding=(4, 3)),
    "kernel_1x1_padded": GradientCase(kernel=(1, 1), padding=(1, 2), sparsity=0.3),
    "kernel_1x3": GradientCase(kernel=(1, 3), padding=(0, 1)),
    "without_border": GradientCase(image=(1, 6, 6), padding=(0, 0)),
    "wide_image": GradientCase(image=(1, 3, 40), sparsity=0.8),
}
STRIDED = {
    "stride_2": GradientCase(image=(2, 6, 7), stride=(2, 2)),
    "stride_3_2": GradientCase(image=(1, 11, 7), stride=(3, 2), padding=(1, 2)),
    "stride_exceeds_image": GradientCase(image=(2, 1, 2), stride=(3, 3)),
    "stride_and_dilation": GradientCase(image=(1, 9, 9), stride=(2, 2), dilation=(2, 3), padding=(2, 0)),
}
BLOCKS = [(128, 16), (64, 16), (32, 32), (16, 16)]


def dgrad(case: GradientCase, grad: Tensor, weight: BSRWeight, device: Device, **config: int) -> Tensor:
    grad, values, crow, col = (
        t.to(device.name) for t in (grad, weight.values, weight.crow_indices, weight.col_indices)
    )
    geometry = (weight.weight_shape, weight.block_shape, *case.geometry())
    return cuda_input_gradient.launch_dgrad(grad, values, crow, col, None, case.image[1:], *geometry, config)


def wgrad(case: GradientCase, grad: Tensor, x: Tensor, weight: BSRWeight, device: Device, **config: int) -> Tensor:
    tensors = (t.to(device.name) for t in (grad, x, weight.values, weight.crow_indices, weight.col_indices))
    return cuda_gradients.launch_wgrad(*tensors, weight.weight_shape, weight.block_shape, *case.geometry(), config)


def compare_wgrad(case: GradientCase, got: Tensor, inputs: tuple[Tensor, Tensor, BSRWeight]) -> Comparison:
    grad, x, weight = inputs
    ref = references(case, grad, x, weight)
    return compare((got.new_zeros(x.shape).cpu(), got.cpu()), ref)[1]


def check_wgrad(case: GradientCase, block: tuple[int, int], dtype: torch.dtype, device: Device, **config: int) -> None:
    grad, x, weight = build(case, block, dtype)
    got = wgrad(case, grad, x, weight, device, **config)
    result = compare_wgrad(case, got, (grad, x, weight))
    assert result.passed, result.message
    assert got.dtype == dtype and got.is_contiguous() and not got[weight.nnz_blocks :].any()
    outside = torch.arange(block[0])[None, :] + weight.block_rows()[:, None] * block[0] >= weight.weight_shape[0]
    assert not got.cpu()[: weight.nnz_blocks][outside].any(), "padded entries have no gradient"
    assert torch.equal(got, wgrad(case, grad, x, weight, device, **config)), "not the same bits a second time"


def check_dgrad(case: GradientCase, block: tuple[int, int], dtype: torch.dtype, device: Device, **config: int) -> None:
    grad, x, weight = build(case, block, dtype)
    got = dgrad(case, grad, weight, device, **config)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype
    result = compare((got.cpu(), torch.zeros_like(weight.values)), references(case, grad, x, weight))[0]
    assert result.passed, result.message


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [(128, 16), (16, 16)], ids=str)
def test_dgrad(name: str, block: tuple[int, int], device: Device):
    check_dgrad(CASES[name], block, FP16 if name == "dilation" else BF16, device)


@pytest.mark.parametrize("name", [*CASES, *STRIDED])
def test_wgrad(name: str, device: Device):
    case = {**CASES, **STRIDED}[name]
    check_wgrad(case, (128, 16) if name != "wide_image" else (64, 16), FP16 if name == "dilation" else BF16, device)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks(block: tuple[int, int], device: Device):
    """Every compiled shape of the weight gradient, and of the input gradient those of its blocks."""
    case = GradientCase(image=(2, 5, 4), sparsity=0.5)
    check_dgrad(case, block, BF16, device)
    for variant, shape in enumerate(cuda_gradients.GRADIENT_VARIANTS):
        if block[0] % shape.column == 0:
            check_wgrad(case, block, BF16, device, variant=variant)


@pytest.mark.parametrize(("stages", "parts"), [(2, 3), (3, 1), (4, 5), (6, 2)])
def test_stages_and_parts(stages: int, parts: int, device: Device):
    check_wgrad(GradientCase(image=(3, 8, 7), sparsity=0.8), (64, 16), BF16, device, stages=stages, parts=parts)


@pytest.mark.parametrize("mode", MODES)
def test_every_order_of_threads_and_copies(mode: int, device: Device):
    """Several stages of the ring, which turns over, and several parts."""
    device.set_mode(mode)
    check_wgrad(GradientCase(image=(2, 10, 9), sparsity=0.8), (128, 16), BF16, device, stages=2, parts=2)
    check_dgrad(GradientCase(image=(9, 4, 4), sparsity=0.8), (64, 16), BF16, device, slab=16, stages=2)


def test_every_element_of_a_transposed_matrix_has_its_place(device: Device):
    """One instruction of the tensor cores: of 16 pixels, each the gradient of one channel, x comes out transposed."""
    case = GradientCase(image=(16, 1, 1), kernel=(1, 1), padding=(0, 0), pattern="all_dense")
    x = torch.arange(256.0).reshape(16, 16)
    grad = torch.eye(16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    indices = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    weight = BSRWeight(torch.zeros(1, 16, 16, dtype=BF16), *indices, (16, 16, 1, 1), (16, 16))
    got = wgrad(case, grad.to(BF16)[:, :, None, None], x.to(BF16)[:, :, None, None], weight, device)
    assert torch.equal(got.cpu()[0].float(), grad.T @ x)


def test_a_pixel_or_weight_left_out_is_seen(device: Device):
    case = GradientCase(image=(2, 5, 4), sparsity=0.5)
    grad, x, weight = build(case, (64, 16), BF16)
    got = dgrad(case, grad, weight, device).cpu(), wgrad(case, grad, x, weight, device).cpu()
    for name, (ref, which) in mutants(case, grad, x, weight).items():
        assert not compare(got, ref)[which].passed, name


def test_what_follows_from_a_pattern_is_kept_and_renewed(device: Device, monkeypatch: pytest.MonkeyPatch):
    case = GradientCase(image=(1, 4, 4), sparsity=0.5)
    grad, _, weight = build(case, (64, 16), BF16)
    crow, col = weight.crow_indices.to(device.name), weight.col_indices.to(device.name)
    grad, values = grad.to(device.name), weight.values.to(device.name)
    geometry = (weight.weight_shape, weight.block_shape, *case.geometry())
    made: list[Any] = []
    steps_of = resident_plan.steps_of
    monkeypatch.setattr(resident_plan, "steps_of", lambda *a: made.append(a) or steps_of(*a))

    def run(values: Tensor, index: Tensor | None) -> Tensor:
        return cuda_input_gradient.launch_dgrad(grad, values, crow, col, index, (4, 4), *geometry)

    first = run(values, transpose_index(crow, col, weight.weight_shape, weight.block_shape))
    assert torch.equal(run(values * 2, None), first * 2) and len(made) == 1
    with torch.no_grad():
        col.add_(0)  # counted as a write
    assert torch.equal(run(values, None), first) and len(made) == 2


def test_a_capture_asks_for_the_pattern_first(monkeypatch: pytest.MonkeyPatch):
    """What must be read from the device is read before: the message says what to do."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class OnGPU:
        is_cuda = True

        def numel(self) -> int:
            return 1

    monkeypatch.setattr(Derived, "of", lambda self, what, tensors, compute: compute())
    asked = "bsr_conv2d_dgrad", OnGPU(), OnGPU()
    for pattern in (
        lambda: cuda_input_gradient._index(*asked, None, (16, 16, 1, 1), (16, 16), (2, 2), (1, 1), 16),
        lambda: cuda_input_gradient._places(*asked, [OnGPU()] * 5, (16, 16), resident_plan.VARIANTS[5]),
    ):
        with pytest.raises(RuntimeError, match=r"^bsr_conv2d_dgrad: the weight must be packed before a CUDA graph"):
            pattern()


@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_refuses(which: str, device: Device):
    case = GradientCase(image=(1, 5, 5))
    grad, x, weight = build(case, (16, 16), BF16)

    def run(case: GradientCase, grad: Tensor, weight: BSRWeight, **config: int) -> None:
        if which == "dgrad":
            dgrad(case, grad, weight, device, **config)
        else:
            wgrad(case, grad, x, weight, device, **config)

    ragged, _, odd = build(GradientCase(image=(1, 5, 5), cut=(1, 0)), (16, 16), BF16)
    for arguments, message in (
        ((case, grad[:, :, 1:], weight), r"expected grad of shape \(N, 32, 5, 5\), got \(1, 32, 4, 5\)"),
        ((case, ragged, odd), "channels are copied eight at a time, not 32 to 31"),
        ((case, grad, replace(weight, block_shape=(8, 16))), "a block is a multiple of 16 x 16, not 8 x 16"),
        ((replace(case, padding=(-1, 0)), grad, weight), "expected stride >= 1, dilation >= 1, padding >= 0"),
    ):
        with pytest.raises(ValueError, match=f"^bsr_conv2d_{which}: .*{message}"):
            run(*arguments)
    with pytest.raises(ValueError, match=f"^bsr_conv2d_{which}: expected config of "):
        run(case, grad, weight, tile=1)
    with pytest.raises(ValueError, match=f"^bsr_conv2d_{which}: expected variant in 0 to [36], got 9"):
        run(case, grad, weight, variant=9)
    with pytest.raises(ValueError, match=f"^bsr_conv2d_{which}: variant 0 takes blocks of a multiple of "):
        run(case, grad, weight, variant=0)
    if which == "wgrad" and device.emulator is not None:
        with pytest.raises(
            ValueError, match=r"^bsr_conv2d_wgrad: expected stages that fit 232448 bytes .*, got 237056"
        ):
            run(case, grad, weight, stages=7, variant=3)


def test_the_layers_gradient_follows_its_forward(monkeypatch: pytest.MonkeyPatch):
    """A layer on the tensor-core kernel has its gradients there."""
    available = {name: replace(spec, available=lambda: None) for name, spec in KERNELS.items() if "cuda" in name}
    monkeypatch.setattr(select, "KERNELS", {**KERNELS, **available})
    for op, stride, expected in (
        ("bsr_conv2d_dgrad", (1, 1), cuda_gradients.DGRAD),
        ("bsr_conv2d_dgrad", (2, 1), cuda_gradients.DGRAD),
        ("bsr_conv2d_wgrad", (1, 1), cuda_gradients.WGRAD),
        ("bsr_conv2d_wgrad", (2, 2), cuda_gradients.WGRAD),
    ):
        request = Request(op, BF16, "cuda", (64, 16), "none")
        assert select.resolve_gradient(cuda_tensor_cores.NAME, request, stride).name == expected
        assert KERNELS[expected].explicit_only
        assert select.resolve_gradient("bsr_conv2d__reference", request, stride).name == f"{op}__reference"
    narrow = Request("bsr_conv2d_wgrad", BF16, "cuda", (64, 8), "none")
    assert select.resolve_gradient(cuda_tensor_cores.NAME, narrow).name != cuda_gradients.WGRAD


def test_plans():
    """VGG-19's layers of 512 channels at batch 512: a block a processor, parts of whole stages, every piece a place."""
    limits = Limits(True, HOPPER_SHARED, 132)
    plan = cuda_gradients.gradient_plan(512 * 16, 144, 512, (128, 16), limits, {})
    assert plan == (0, 4, 11, 768, 13)  # 12 thread blocks of pieces, one more where rows differ
    assert plan.part_pixels % cuda_gradients.STAGE_PIXELS == 0
    few = cuda_gradients.gradient_plan(40, 3, 16, (16, 16), limits, {})
    assert few.variant == 3 and few.parts == 1
    small = cuda_gradients.gradient_plan(8192, 144, 512, (64, 32), Limits(False, 99 * 1024, 108), {})
    assert small.variant == 1 and small.stages == 2
    text = (ROOT / "csrc" / "cuda" / "weight_gradient.cu").read_text()
    for i, shape in enumerate(cuda_gradients.GRADIENT_VARIANTS):
        assert f"GradientShape<{shape.column // 16}, {shape.pieces // 8}>" in text.split("using ")[i + 1]


def members(**changes: int) -> list[int]:
    """Members of the struct for one 16 x 16 block, 3 x 3 taps and images of 8 x 8, with changes."""
    fields = [field for field, _ in structure("SlimCudaWeightGradient")._fields_]
    values = dict.fromkeys(fields, 0)
    values |= {"n": 1, "h": 8, "w": 8, "c_in": 16, "c_out": 16, "p": 8, "q": 8, "elements": 256, "part_pixels": 64,
               "r": 3, "s": 3, "block_out": 16, "block_in": 16, "step_p": 4, "parts": 1, "chunks": 1, "stages": 2,
               "variant": 3, "dtype": 2, **dict.fromkeys(
                   ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"), 1)}  # fmt: skip
    return [(values | changes)[field] for field in fields]


WRONG_MEMBERS = [
    ({"c_in": 20}, "c_in and c_out are not multiples of 8"),
    ({"variant": 2}, "the blocks are not made of the variant's pieces"),
    ({"elements": 255}, "elements is no number of blocks"),
    ({"p": 7}, "p or q is not the size of the output"),
    ({"h": 2**30, "p": 2**30}, "an image has 2"),
    ({"dil_h": 2**29, "pad_h": 2**29}, "the taps reach 2"),
    ({"part_pixels": 2**31}, "part_pixels = 2147483648 is out of range"),
    ({"part_pixels": 48}, "part_pixels is not a multiple of 32"),
    ({"parts": 2}, "the parts are not those of the pixels"),
    ({"step_q": 1}, "the steps are not those of 32 pixels"),
    ({"n": 2**60}, "n is out of range"),
    ({"stages": 1}, "stages = 1 is out of range"),
    ({"dtype": 0}, "dtype = 0 is out of range"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG_MEMBERS, ids=[f"{next(iter(c))}={next(iter(c.values()))}" for c, _ in WRONG_MEMBERS]
)
def test_the_bindings_refuse_a_wrong_plan(changes: dict[str, int], message: str):
    module, reason = _extension.load()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip(f"the extension has no CUDA code: {reason or 'built without'}")
    with pytest.raises(ValueError, match=f"^cuda_weight_gradient: {message}"):
        module.cuda_weight_gradient(*members(**changes))


def test_no_row_of_a_matrix_waits_for_another(device: Device):
    if device.emulator is None:
        pytest.skip("counted by the emulation")
    for block in BLOCKS:
        before = device.emulator.library.get_conflicts()
        case = GradientCase(image=(1, 5, 7), sparsity=0.5)
        grad, x, weight = build(case, block, BF16)
        wgrad(case, grad, x, weight, device)
        assert device.emulator.library.get_conflicts() == before, block


# What keeps it right

BREAKS = {
    "a wait for copies": ("hw::copy_async_wait_all_but(a.stages - 2);", ""),
    "a barrier": ("hw::synchronize();\n    loader.fill();", "loader.fill();"),
    "the table's barrier": ("hw::synchronize();\n\n  const int64_t pixels", "const int64_t pixels"),
    "a lane": ("const int matrix = lane >> 3,", "const int matrix = (lane >> 3) ^ (lane == 9),"),
    "a row of the border": ("(unsigned(top + int(entry.x)) < unsigned(a.h))", "true"),
    "the last pixel": ("const bool here = k < left;", "const bool here = k < left - 1;"),
    "a carry": ("y -= int(a.p);", ""),
    "a part": ("for (int part = 0; part < a.parts; ++part)", "for (int part = 0; part < a.parts - 1; ++part)"),
    "spare blocks": ("if (at < int64_t(a.crow_indices[rows]) * a.block_out * a.block_in)", "if (true)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    old, new = BREAKS[name]
    broken = use(emulate_fault(tmp_path, "weight_gradient.cuh", old, new, "weight_gradient"), monkeypatch)
    assert any(fails(broken, mode, lambda: check_orders(broken)) for mode in MODES)


def check_orders(device: Device) -> None:
    case = GradientCase(image=(3, 9, 9), sparsity=0.7, spare=2)
    check_wgrad(case, (64, 16), BF16, device, stages=2, parts=2)


@pytest.mark.gpu
def test_a_training_step_on_the_kernels():
    """Forward and both gradients of a layer through autograd, on one GPU, against float64."""
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    from slimkernels.ops.bsr import bsr_conv2d

    case = GradientCase(image=(8, 8, 8), sparsity=0.7)
    grad, x, weight = build(case, (128, 16), BF16)
    leaf, values = x.to("cuda").requires_grad_(), weight.values.to("cuda").requires_grad_()
    y = bsr_conv2d(
        leaf, values, weight.crow_indices.to("cuda"), weight.col_indices.to("cuda"),
        weight_shape=weight.weight_shape, block_shape=weight.block_shape, padding=[1, 1], kernel=cuda_tensor_cores.NAME,
    )  # fmt: skip
    y.backward(grad.to("cuda"))
    assert leaf.grad is not None and values.grad is not None
    for result in compare((leaf.grad.cpu(), values.grad.cpu()), references(case, grad, x, weight)):
        assert result.passed, result.message


def test_inputs_in_any_layout(device: Device):
    case = GradientCase(image=(2, 5, 4), sparsity=0.5)
    grad, x, weight = build(case, (32, 32), BF16)
    rows = grad.contiguous(), x.contiguous()
    assert torch.equal(wgrad(case, *rows, weight, device), wgrad(case, grad, x, weight, device))
    assert torch.equal(dgrad(case, rows[0], weight, device), dgrad(case, grad, weight, device))
