"""The tensor-core kernels of csrc/cuda and their launchers, on a GPU where there is one and on a CPU emulation.

The emulation (csrc/tests/tensor_cores_on_cpu.h) does an instruction once the 32 lanes of a warp have come, with each
lane's registers where PTX puts them. Copies and wgmma happen at once or as late as the waits allow, and threads run in
several orders, in some of which one warp runs ahead.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import ROOT, compiled, emulate_fault
from tensor_core_device import CASES, HOPPER_SHARED, MODES, Device, check_nonfinite, device, fails, use
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.cases import ConvCase, to_device
from slimkernels.kernels import KERNELS, cuda, cuda_tensor_cores, resident_plan
from slimkernels.kernels.cuda_tensor_cores import Limits
from slimkernels.nn import BlockSparseConv2d
from slimkernels.testing import (
    UNIT_ROUNDOFF,
    assert_close,
    drop_term,
    naive_bsr_conv2d,
    random_bsr,
    random_tensor,
    reference_bsr_conv2d,
    scale_bsr_conv2d,
    wrong_block,
)

__all__ = ["device"]  # a fixture, which its users name

BF16, FP16 = torch.bfloat16, torch.float16


def in_blocks(case: ConvCase, variant: int, block_in: int = 16) -> ConvCase:
    return replace(case, block_shape=(resident_plan.VARIANTS[variant].column, block_in))


@pytest.mark.parametrize("variant", range(len(resident_plan.VARIANTS)))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bsr_conv2d(case: ConvCase, variant: int, device: Device):
    out = device.check(in_blocks(case, variant), variant)
    assert out.is_contiguous(memory_format=torch.channels_last)
    if device.emulator is not None and case.name != "batch_0":
        assert plan_of(in_blocks(case, variant), variant).shared_bytes == device.emulator.library.get_launch_shared()


def plan_of(case: ConvCase, variant: int, **config: int) -> resident_plan.Plan:
    weight = case.weight()
    shape = resident_plan.VARIANTS[variant]
    most = resident_plan.pack_index(
        weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape, shape.column
    ).most_steps
    plan = resident_plan.plan(
        variant, case.n, case.c_in, case.h, case.w, case.c_out, case.kernel_size, case.stride, case.padding,
        case.dilation, shape.steps(most.tolist()), HOPPER_SHARED, 2, config,
    )  # fmt: skip
    assert plan is not None
    return plan


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", range(len(resident_plan.VARIANTS)))
def test_every_order_of_threads_and_copies(variant: int, mode: int, device: Device):
    """Several tiles a group and several slabs a tile, so that the ring turns over."""
    device.set_mode(mode)
    case = ConvCase("orders", n=9, c_in=64, h=8, w=8, c_out=128, sparsity=0.7, dtype=BF16)
    device.check(in_blocks(case, variant), variant, slab=16, stages=2)


@pytest.mark.parametrize("block_shape", [(64, 32), (128, 16), (128, 64), (192, 16), (256, 32)], ids=str)
def test_block_shapes(block_shape: tuple[int, int], device: Device):
    case = ConvCase("blocks", n=1, c_in=72, c_out=264, h=5, w=4, block_shape=block_shape, sparsity=0.6, dtype=BF16)
    for variant, shape in enumerate(resident_plan.VARIANTS):
        if block_shape[0] % shape.column == 0:
            device.check(case, variant)


@pytest.mark.parametrize(("slab", "stages"), [(16, 4), (32, 2), (32, 3), (64, 2), (128, 2)])
def test_slabs_and_stages(slab: int, stages: int, device: Device):
    case = ConvCase("slabs", n=3, c_in=136, h=4, w=4, c_out=64, block_shape=(64, 16), sparsity=0.8, dtype=BF16)
    device.check(case, 0, slab=slab, stages=stages)
    if slab <= 64:  # as much of a pixel as a tensor copy turns
        device.check(case, 2, slab=slab, stages=stages)


def test_nonfinite_inputs_reach_what_reads_them(device: Device):
    case = ConvCase("nan", n=1, c_in=32, h=5, w=6, c_out=128, sparsity=0.7, epilogue="relu_maxpool2", dtype=BF16)
    for variant in range(len(resident_plan.VARIANTS)):
        check_nonfinite(device, in_blocks(case, variant), variant)


@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
def test_the_comparison_sees_a_wrong_weight(mutate: Callable[..., Any], device: Device):
    case = ConvCase("mutant", c_in=32, c_out=64, block_shape=(64, 16), dtype=BF16)
    x, weight, bias = case.inputs()
    out = device.launch(case, (x, mutate(weight), bias), 0)
    reference, bound = case.expected(x, weight, bias)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close(out, reference, **bound)


def test_a_pack_gives_the_same_and_is_checked(device: Device):
    case = ConvCase("pack", c_in=32, c_out=128, block_shape=(128, 16), sparsity=0.6, dtype=BF16)
    arguments = list(to_device(case.launch_args(*case.inputs()), device.name))
    expected = cuda_tensor_cores.launch_bsr_conv2d(*arguments)
    packed = list(cuda_tensor_cores.pack(*arguments[1:4], *arguments[6:8]))
    arguments[5] = packed
    assert torch.equal(cuda_tensor_cores.launch_bsr_conv2d(*arguments), expected)
    for i, name in ((1, "group_start"), (2, "taps"), (3, "most_steps")):
        arguments[5] = [t + 1 if i == k else t for k, t in enumerate(packed)]
        with pytest.raises(ValueError, match=rf"^bsr_conv2d: expected packed {name} to be that of"):
            cuda_tensor_cores.launch_bsr_conv2d(*arguments)
    arguments[5] = [packed[0][:-1], *packed[1:]]
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected packed weights \(\d+, 2048\)"):
        cuda_tensor_cores.launch_bsr_conv2d(*arguments)


REFUSALS: dict[str, tuple[type[Exception], str, dict[int, Any]]] = {
    "dtype": (TypeError, "expected x of float32, float16 or bfloat16, got torch.float64", {}),
    "block": (ValueError, r"a block is a multiple of 16 x 16, not 8 x 16", {7: [8, 16]}),
    "channels": (ValueError, r"expected x of shape \(N, 32, H, W\)", {0: torch.zeros(1, 40, 8, 8, dtype=BF16)}),
    "bias": (ValueError, r"expected bias of shape \(64,\)", {4: torch.zeros(63, dtype=BF16)}),
    "epilogue": (ValueError, "expected epilogue 'none', 'relu' or 'relu_maxpool2'", {11: "gelu"}),
    "padding": (ValueError, "expected stride >= 1, dilation >= 1, padding >= 0", {9: [-1, 0]}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str, device: Device):
    error, message, changes = REFUSALS[name]
    case = ConvCase(c_in=32, c_out=64, block_shape=(64, 16), dtype=torch.float64 if name == "dtype" else BF16)
    arguments = list(case.launch_args(*case.inputs()))
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(error, match=f"^bsr_conv2d: .*{message}"):
        cuda_tensor_cores.launch_bsr_conv2d(*to_device(arguments, device.name))


def test_a_row_beyond_shared_memory_is_refused(device: Device):
    case = ConvCase(c_in=512, h=2, w=2, c_out=128, block_shape=(64, 16), sparsity=0.0, dtype=BF16)
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected block rows whose weights fit \d+ bytes .* 288 steps"):
        device.launch(case, case.inputs(), 0)


@pytest.mark.parametrize(
    ("variant", "limits", "message"),
    [
        (7, Limits(True, HOPPER_SHARED, 2), "expected variant in 0 to 6, got 7"),
        (2, Limits(False, HOPPER_SHARED, 2), "variant 2 needs a GPU of compute capability 9.0"),
        (1, Limits(True, HOPPER_SHARED, 2), "variant 1 takes blocks of a multiple of 128 channels"),
    ],
)
def test_a_shape_that_does_not_run_here_is_refused(
    variant: int, limits: Limits, message: str, device: Device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: limits)
    case = ConvCase(c_in=32, c_out=64, block_shape=(64, 16), dtype=BF16)
    with pytest.raises(ValueError, match=f"^bsr_conv2d: {message}"):
        device.launch(case, case.inputs(), variant)
    if not limits.wgmma:
        stem = StemCase("overlap")
        with pytest.raises(ValueError, match=r"^bsr_conv2d: overlap needs a GPU of compute capability 9.0"):
            device.launch(case, case.inputs(), 0, overlap=1)
        with pytest.raises(ValueError, match=r"^stem_conv2d: overlap needs a GPU of compute capability 9.0"):
            launch_stem(stem.inputs(), stem, device, variant=0, overlap=1)


# The fused stem


@dataclass(frozen=True)
class StemCase:
    name: str
    n: int = 2
    h: int = 16
    w: int = 16
    c_out: int = 64
    block_in: int = 16
    epilogue: str = "relu_maxpool2"
    bias: bool = True
    dtype: torch.dtype = BF16

    def inputs(self) -> tuple[Any, ...]:
        """``(x, first weight, first bias, weight, bias)`` on the CPU."""
        x = random_tensor(self.n, 3, self.h, self.w, seed=1, dtype=self.dtype)
        first = random_tensor(64, 3, 3, 3, seed=2, dtype=self.dtype)
        biases = [random_tensor(c, seed=c, dtype=self.dtype) if self.bias else None for c in (64, self.c_out)]
        weight = random_bsr((self.c_out, 64, 3, 3), (64, self.block_in), 0.8, 3, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last), first, biases[0], weight, biases[1]


def launch_stem(inputs: Sequence[Any], case: StemCase, device: Device, **config: int) -> Tensor:
    x, first, first_bias, weight, bias = to_device(inputs, device.name)
    return cuda_tensor_cores.launch_stem_conv2d(
        x, first, first_bias, weight.values, weight.crow_indices, weight.col_indices, bias, [],
        list(weight.weight_shape), list(weight.block_shape), case.epilogue, config,
    )  # fmt: skip


def between(inputs: Sequence[Any]) -> Tensor:
    """What the first convolution gives, rounded as the kernel rounds it, from double precision."""
    x, first, first_bias, _, _ = inputs
    y = F.conv2d(x.double(), first.double(), None if first_bias is None else first_bias.double(), padding=1)
    return y.relu().to(x.dtype).contiguous(memory_format=torch.channels_last)


def check_stem(case: StemCase, device: Device, **config: int) -> None:
    inputs = case.inputs()
    out = launch_stem(inputs, case, device, **config)
    assert out.is_contiguous(memory_format=torch.channels_last)
    middle, weight, bias = between(inputs), *inputs[3:]
    geometry = ((1, 1), (1, 1), (1, 1), case.epilogue)
    scale, terms = scale_bsr_conv2d(middle, weight, bias, *geometry)
    reference = reference_bsr_conv2d(middle, weight, bias, *geometry)
    # What lies between is rounded from sums in fp32, here and there to the 16-bit number beside that of the double.
    assert_close(out, reference, scale=scale, terms=terms, u_mul=2 * UNIT_ROUNDOFF[case.dtype], name=case.name)


STEM_CASES = [
    StemCase("tiles_of_8_rows", n=1, h=32, w=32),
    StemCase("whole_images", n=3, h=8, w=8),
    StemCase("odd_height", h=15, w=12, epilogue="relu"),
    StemCase("odd_pool", h=9, w=6),
    StemCase("few_outputs", c_out=40, epilogue="none", bias=False),
    StemCase("half", dtype=FP16, block_in=32),
    StemCase("one_row", h=1, w=4, epilogue="relu"),
    StemCase("batch_0", n=0),
]


@pytest.mark.parametrize("variant", range(len(resident_plan.STEM_VARIANTS)))
@pytest.mark.parametrize("case", STEM_CASES, ids=lambda case: case.name)
def test_stem(case: StemCase, variant: int, device: Device):
    check_stem(case, device, variant=variant)
    if device.emulator is not None and case.n > 0:
        steps = case.inputs()[3]
        steps = steps.values.shape[0] * case.block_in // 16
        plan = resident_plan.plan_stem(variant, case.n, case.h, case.w, steps, HOPPER_SHARED, 2)
        assert plan is not None and plan.shared_bytes == device.emulator.library.get_launch_shared()


@pytest.mark.parametrize("mode", MODES)
def test_stem_in_every_order(mode: int, device: Device):
    device.set_mode(mode)
    for variant in range(len(resident_plan.STEM_VARIANTS)):
        check_stem(StemCase("orders", n=5, h=16, w=16), device, variant=variant)


def test_stem_is_zero_outside_of_the_image(device: Device):
    """Where the first convolution would give relu(bias) beyond the border, the second reads zeros."""
    case = StemCase("border", n=1, h=4, w=4, epilogue="none")
    inputs = list(case.inputs())
    inputs[2] = torch.full((64,), 100.0, dtype=case.dtype)
    out = launch_stem(inputs, case, device).cpu()
    reference = reference_bsr_conv2d(between(inputs), inputs[3], inputs[4], (1, 1), (1, 1), (1, 1), "none")
    assert torch.allclose(out.double(), reference.double(), rtol=0.02, atol=2.0)


def test_stem_nonfinite_pixels_reach_what_reads_them(device: Device):
    """The tenth number of a row of taps, a neighbouring pixel's, has no weight and must not spread."""
    case = StemCase("nan", n=1, h=8, w=8, epilogue="relu", bias=False)
    inputs = list(case.inputs())
    inputs[0][0, 0, 3, 5] = torch.nan
    out = launch_stem(inputs, case, device).cpu()
    expected = naive_bsr_conv2d(between(inputs), inputs[3], None, (1, 1), (1, 1), (1, 1), "relu")
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not out.isnan().all()


def test_stem_refuses(device: Device):
    case = StemCase("refused")
    x, first, first_bias, weight, bias = case.inputs()
    narrow = random_bsr((64, 32, 3, 3), (64, 16), 0.8, 3, dtype=BF16)
    for change, message in (
        ((x[..., 1:], first, first_bias, weight, bias), "even W"),
        ((x, first[:32], first_bias, weight, bias), r"expected first_weight \(64, 3, 3, 3\)"),
        ((x, first, first_bias[1:], weight, bias), r"expected first_bias \(64,\)"),
        ((x, first, first_bias, narrow, bias), "expected weight_shape"),
    ):
        with pytest.raises(ValueError, match=f"^stem_conv2d: .*{message}"):
            launch_stem(change, case, device)


# What keeps it right

BREAKS = {
    "a wait for copies": ("resident_conv2d.cuh", "hw::copy_async_wait_all_but(a.stages - 2);", "", "resident"),
    "a barrier": ("resident_conv2d.cuh", "hw::synchronize(1 + group, 128);", "", "resident"),
    "a row of the border": ("sparse_tile.cuh", "tap / a.s * a.dil_h", "(tap / a.s + tap / 8) * a.dil_h", "resident"),
    "a lane": ("sparse_tile.cuh", "(lane >> 4) * 16;", "((lane >> 4) ^ (lane == 17)) * 16;", "resident"),
    "a wait for wgmma": (
        "sparse_tile.cuh", "add(pixels[1]);\n        hw::multiply_group_wait<0>();", "add(pixels[1]);", "stem_wgmma"),
    "the fence before wgmma": (
        "stem_conv2d.cuh", "if (Shape::WGMMA) hw::fence_for_multiply_group();", "", "stem_wgmma"),
    "the barrier behind the rows": (
        "stem_conv2d.cuh", "hw::synchronize(1 + group, 128);  // the rows are there", "// the rows are there", "stem"),
    "the barrier behind the patch": (
        "stem_conv2d.cuh", "hw::synchronize(1 + group, 128);  // the patch is there", "// the patch is there", "stem"),
    "zeros outside": ("stem_conv2d.cuh", "inside ? packed : make_uint4(0, 0, 0, 0)", "packed", "stem_strips"),
    "the unwanted number": ("stem_conv2d.cuh", "0x0000ffffu", "0xffffffffu", "stem_nan"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    header, old, new, what = BREAKS[name]
    emulator = emulate_fault(tmp_path, header, old, new, "resident_conv2d", "stem_conv2d")
    device = use(emulator, monkeypatch)
    assert any(fails(device, mode, lambda: check_part(what, device)) for mode in MODES)


def check_part(what: str, device: Device) -> None:
    case = ConvCase("broken", n=9, c_in=64, c_out=128, sparsity=0.7, dtype=BF16)
    if what.startswith("stem") and what not in ("stem_strips", "stem_nan"):
        check_stem(StemCase("broken", n=5, h=16, w=16), device, variant=int(what == "stem_wgmma"))
    elif what == "stem_strips":
        check_stem(StemCase("broken", n=1, h=32, w=32), device, variant=0)
    elif what == "stem_nan":
        test_stem_nonfinite_pixels_reach_what_reads_them(device)
    else:
        device.check(in_blocks(case, 0), 0, slab=16, stages=2)


def test_bank_conflicts_of_planned_tiles(device: Device):
    """VGG-19's image sizes: no row of a matrix waits for another."""
    if device.emulator is None:
        pytest.skip("counted by the emulation")
    for size in (2, 4, 8, 16, 32):
        case = ConvCase(
            "conflicts", n=1, c_in=16, h=size, w=size, c_out=128, block_shape=(128, 16), sparsity=0.5, dtype=BF16
        )
        for variant in (0, 1, 2):
            before = device.emulator.library.get_conflicts()
            device.check(case, variant)
            assert device.emulator.library.get_conflicts() == before, (size, variant)


def test_compiled_shapes_are_those_of_the_sources():
    for names, shapes in (
        (("resident_conv2d.cu", "streamed_conv2d.cu", "narrow_conv2d.cu"), resident_plan.VARIANTS),
        (("stem_conv2d.cu",), resident_plan.STEM_VARIANTS),
    ):
        text = "".join((ROOT / "csrc" / "cuda" / name).read_text() for name in names)
        declared = dict(re.findall(r"using (\w+) = TileShape<(.*?)>;", text))
        cases = sorted(re.findall(r"case (\d): return launch\w*<T, (\w+)>", text))
        assert [int(number) for number, _ in cases] == list(range(len(shapes)))
        for (_, alias), shape in zip(cases, shapes, strict=True):
            m, n, tiles, columns, groups, wgmma, *rest = declared[alias].split(", ")
            of_block = int(n) * int(*rest or [1])
            together = int(groups) if shape.streamed else 1  # groups that have a part of a tile each
            pixels = int(m) * int(tiles) * 16 * together
            expected = (pixels, int(columns) * 8, of_block, int(groups) // together, wgmma == "true")
            assert tuple(shape)[:-1] == expected and shape.streamed <= shape.wgmma


def test_shapes_of_float32_are_those_of_the_other_sources():
    source = {
        name: (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
        for name in ("resident_conv2d", "narrow_conv2d", "tf32_conv2d")
    }
    cases = {}
    for name, text in source.items():
        shapes = dict(re.findall(r"using (\w+) = (TileShape<.*?>);", text))
        cases[name] = {
            int(n): shapes[alias] for n, alias in re.findall(r"case (\d): return launch\w*<\w+, (\w+)>", text)
        }
    of_halves = cases["resident_conv2d"] | cases["narrow_conv2d"]
    assert tuple(cases["tf32_conv2d"]) == resident_plan.TF32_VARIANTS
    assert all(of_halves[variant] == shape for variant, shape in cases["tf32_conv2d"].items())


def test_never_a_choice_of_auto():
    spec = KERNELS[cuda_tensor_cores.NAME]
    assert spec.explicit_only and spec.op == "bsr_conv2d" and spec.dtypes == {BF16, FP16, torch.float32}


# The pack that a module keeps


def test_a_module_keeps_the_pack_in_eval_mode(monkeypatch: pytest.MonkeyPatch):
    """Packed on the CPU here, where only the call cannot run: built, renewed and dropped as the CPU kernels' packs."""
    use(compiled(), monkeypatch)
    monkeypatch.setattr(BlockSparseConv2d, "_wants_tensor_cores", lambda self: self.kernel == cuda_tensor_cores.NAME)
    conv = nn.Conv2d(32, 128, 3, padding=1).to(BF16)
    module = BlockSparseConv2d.from_dense(conv, (128, 16)).eval()
    assert len(module._packed()) != 4
    module.kernel = cuda_tensor_cores.NAME

    def expect_pack(module: BlockSparseConv2d) -> None:
        packed = module._packed()
        weight = module.weight_bsr()
        parts = (weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(packed, cuda_tensor_cores.pack(*parts), strict=True))

    module.requires_grad_(False)
    expect_pack(module)
    module.values.mul_(2)
    assert module._packed() == []  # written since: the call packs by itself
    module.prepack()
    expect_pack(module)
    module.load_state_dict({name: tensor + (name == "values") for name, tensor in module.state_dict().items()})
    expect_pack(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        expect_pack(copied)
    module.train()
    assert not any(name.startswith("tensor_core") for name, _ in module.named_buffers())
    module.eval()
    expect_pack(module)
    assert not any(name.startswith("tensor_core") for name in module.state_dict())


@pytest.mark.gpu
def test_a_module_runs_its_pack_in_a_cuda_graph():
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    case = ConvCase(n=4, c_in=64, c_out=128, block_shape=(128, 16), sparsity=0.7, epilogue="relu", dtype=BF16)
    x, weight, bias = to_device(case.inputs(), "cuda")
    conv = nn.Conv2d(64, 128, 3, padding=1).to("cuda", BF16)
    with torch.no_grad():
        conv.weight.copy_(weight.to_dense())
        assert conv.bias is not None
        conv.bias.copy_(bias)
    module = BlockSparseConv2d.from_dense(conv, (128, 16), epilogue="relu").eval().requires_grad_(False)
    module.kernel = cuda_tensor_cores.NAME
    expected = module(x)
    reference, bound = case.expected(*case.inputs())
    assert_close(expected, reference, **bound)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
