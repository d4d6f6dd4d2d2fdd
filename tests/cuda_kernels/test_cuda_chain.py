"""A chain of convolutions in one launch, on a GPU where there is one and on the CPU emulation of csrc/tests.

The emulation runs the thread blocks of a cluster, or of a cooperative launch, side by side. In half of its modes what a
thread stores is seen by others only once it arrives at the barrier between two layers, and in half of them one block
runs ahead as far as the barriers let it. Workspace and outputs begin as NaN.

The input of layer k is what the first k - 1 layers alone give: sums are added in a fixed order, so each layer is held
to its own bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import Emulator, compiled, emulate_fault
from tensor_core_device import MODES, Place, fails, skip_without_hopper, stand_in
from torch import Tensor, nn

from slimkernels import _extension
from slimkernels.cases import ConvCase, to_device
from slimkernels.inference.cuda_chain import chain_of
from slimkernels.kernels import chain_plan, cuda, cuda_chain
from slimkernels.kernels.chain_plan import CLUSTER, COUNTER
from slimkernels.kernels.cuda_chain import ChainLayer, launch_chain, pack_layer
from slimkernels.nn import BlockSparseConv2d
from slimkernels.testing import assert_close, drop_term, naive_bsr_conv2d, wrong_block

BF16, FP16 = torch.bfloat16, torch.float16
cuda_chain_groups = cuda_chain._groups_at_once


class Device(Place):
    """Where chains run in a test."""

    def pack(self, case: ConvCase) -> ChainLayer:
        _, weight, bias = to_device(case.inputs(), self.name)
        parts = (weight.values, weight.crow_indices, weight.col_indices, bias, weight.weight_shape, weight.block_shape)
        return pack_layer(*parts, *case.geometry())

    def launch(self, x: Tensor, layers: Sequence[ChainLayer], **config: int) -> Tensor:
        return launch_chain(x.to(self.name), layers, config)

    def check(self, cases: Sequence[ConvCase], **config: int) -> Tensor:
        """Every prefix of the chain against the reference of its last layer."""
        x = cases[0].inputs()[0]
        layers: list[ChainLayer] = []
        given = x
        for i, case in enumerate(cases):
            _, weight, bias = case.inputs()
            layers.append(self.pack(case))
            out = self.launch(x, layers, **config)
            assert out.is_contiguous(memory_format=torch.channels_last)
            reference, bound = case.expected(given, weight, bias)
            assert_close(out, reference, **{"name": f"{case.name} {i}", **bound})
            given = out.cpu()
        return given


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, clusters: bool = True) -> Device:
    stand_in(emulator, monkeypatch, 20, clusters)

    def groups(group: int, barrier: int, dtype: torch.dtype, device: int) -> int:
        return emulator.cuda_chain_groups(group, barrier, cuda._DTYPES[dtype], device)

    monkeypatch.setattr(cuda_chain, "_groups_at_once", groups)
    return Device("cpu", emulator)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "gpu":
        skip_without_hopper()
        yield Device("cuda", None)
        return
    found = use(compiled(), monkeypatch)
    found.set_mode(-1)
    yield found


def chain(name: str, first: ConvCase, *channels: int, epilogues: Sequence[str] = ()) -> list[ConvCase]:
    """Layers like the first one, each with so many output channels, on what the one in front gives."""
    cases: list[ConvCase] = []
    for i, c_out in enumerate(channels):
        case = replace(first, name=name, c_out=c_out, seed=10 * i, epilogue=epilogues[i] if epilogues else "relu")
        if cases:
            last = cases[-1]
            problem = last.problem()
            pool = 2 if last.epilogue == "relu_maxpool2" else 1
            case = replace(case, c_in=last.c_out, h=problem.p // pool, w=problem.q // pool)
        cases.append(case)
    return cases


NARROW = ConvCase(n=3, c_in=32, h=4, w=4, block_shape=(32, 16), sparsity=0.6, dtype=BF16)
POOLS = ("relu", "relu_maxpool2", "relu", "none")
CHAINS = {
    "pools": (chain("pools", NARROW, 64, 96, 64, 32, epilogues=POOLS), {}),
    "whole_network": (
        chain("vgg", replace(NARROW, n=1, h=8, w=8, block_shape=(64, 16)), 64, 128, 128,
              epilogues=("relu_maxpool2",) * 3), {}),
    "more_groups_than_run": (chain("groups", replace(NARROW, n=7), 64, 64, 64), {"images": 1, "group": 8}),
    "a_last_group_of_fewer": (chain("fewer", replace(NARROW, n=5), 64, 64), {"images": 3, "group": 2}),
    "more_items_than_blocks": (chain("items", replace(NARROW, n=2, h=9, w=10), 96, 64), {"group": 2}),
    "more_blocks_than_items": (chain("idle", replace(NARROW, n=1, h=2, w=2), 64, 32, 64), {"group": 16}),
    "one_block": (chain("alone", replace(NARROW, n=1), 64, 64), {"group": 1}),
    "odd_pool": (chain("odd", replace(NARROW, h=7, w=5), 64, 64, epilogues=("relu_maxpool2", "relu")), {"group": 4}),
    "many_steps": (chain("steps", replace(NARROW, n=1, c_in=128, sparsity=0.1), 64, 64), {"group": 4}),
    "ragged": (chain("ragged", replace(NARROW, c_in=24, dtype=FP16, bias=False), 40, 72, 40), {"group": 4}),
    "stride": (chain("stride", replace(NARROW, n=1, h=11, w=9, stride=(2, 2)), 64, 64), {"group": 4}),
    "mixed": (chain("mixed", replace(NARROW, n=1, h=9, w=12, stride=(1, 2), padding=(3, 1), dilation=(2, 1),
                                     kernel_size=(3, 2), dtype=FP16), 64, 32), {"group": 2}),
    "pointwise": (chain("pointwise", replace(NARROW, n=9, h=1, w=1, kernel_size=(1, 1), padding=(0, 0)), 64, 64, 32),
                  {"group": 4}),
    "no_blocks": (chain("no_blocks", replace(NARROW, pattern="no_blocks"), 64, 64), {"group": 2}),
    "zero_block_row": (chain("zero_row", replace(NARROW, pattern="zero_block_row"), 96, 64), {"group": 4}),
    "large_blocks": (chain("large", replace(NARROW, n=1, c_in=64, block_shape=(128, 64)), 256, 128), {"group": 8}),
    "overlap": (chain("overlap", NARROW, 64, 64), {"group": 4, "overlap": 1}),
    "batch_0": (chain("empty", replace(NARROW, n=0), 64, 64), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, device: Device):
    cases, config = CHAINS[name]
    device.check(cases, **({"group": 4} | config))


@pytest.mark.parametrize("row_bits", range(4))
def test_every_split_of_the_warps(row_bits: int, device: Device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chain_plan, "layer_clocks", lambda layer, pixels, group, barrier, bits: bits != row_bits)
    cases = chain("split", replace(NARROW, n=1, h=6, w=8), 64, 64, epilogues=("relu_maxpool2", "relu"))
    device.check(cases, group=2)


def test_a_block_with_more_items_than_its_list(device: Device, monkeypatch: pytest.MonkeyPatch):
    """266 items of 16 pixels in each layer, and a list of 256."""
    monkeypatch.setattr(chain_plan, "layer_clocks", lambda layer, pixels, group, barrier, bits: bits)
    one = replace(NARROW, n=1, c_in=16, h=46, w=46, kernel_size=(1, 1), padding=(0, 0), sparsity=0.0)
    device.check(chain("list", one, 64, 64), group=1)


ORDERS = chain("orders", replace(NARROW, n=2, c_in=64), 64, 96, 64, 64, epilogues=("relu", "relu_maxpool2", *POOLS[:2]))


@pytest.mark.parametrize("mode", MODES)
def test_every_order_of_blocks_and_stores(mode: int, device: Device):
    device.set_mode(mode)
    for config in ({"group": 8}, {"group": 2}):
        device.check(ORDERS, **config)


@pytest.mark.parametrize("mode", MODES)
def test_a_counter_between_layers(mode: int, device: Device):
    device.set_mode(mode)
    device.check(ORDERS, group=8, barrier=COUNTER)
    if device.emulator is not None:
        assert device.emulator.library.get_launch_cluster() == 0


def test_the_faster_barrier_is_taken(device: Device, monkeypatch: pytest.MonkeyPatch):
    if device.emulator is None:
        pytest.skip("a GPU has the clusters that it has")
    monkeypatch.setattr(cuda_chain, "_groups_at_once", lambda group, barrier, dtype, index: 128 // group)
    cases, _ = CHAINS["whole_network"]
    layers, x = [device.pack(case) for case in cases], cases[0].inputs()[0]
    for slow, taken in ((CLUSTER, COUNTER), (COUNTER, CLUSTER)):
        monkeypatch.setitem(chain_plan._LAUNCH, slow, 10**6)
        monkeypatch.setitem(chain_plan._LAUNCH, taken, 10)
        assert cuda_chain.plan_for(x, layers).barrier == taken
        assert cuda_chain.plan_for(x, layers, {"barrier": slow}).barrier == slow
        assert cuda_chain.plan_for(x, layers, {"overlap": 1}).barrier == CLUSTER  # a counter has to be cleared before


def test_the_plan_is_what_runs(device: Device, monkeypatch: pytest.MonkeyPatch):
    cases, _ = CHAINS["whole_network"]
    layers = [device.pack(case) for case in cases]
    x = cases[0].inputs()[0]
    out = device.launch(x, layers)
    assert torch.equal(device.launch(x, layers), out)
    if device.emulator is not None:
        assert device.emulator.library.get_launch_cluster() == 16
        use(device.emulator, monkeypatch, clusters=False)
        assert cuda_chain.plan_for(x, layers).barrier == COUNTER
        device.launch(x, layers)
        assert device.emulator.library.get_launch_cluster() == 0


# What a device without clusters of 16 may answer: cudaErrorInvalidValue, InvalidConfiguration, LaunchOutOfResources,
# NotSupported, InvalidClusterSize and InvalidResourceConfiguration.
REFUSED = (1, 9, 701, 801, 912, 915)


@pytest.fixture
def refusing(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes the emulated device refuse clusters of more than 8: errors where that is allowed, and where it counts."""
    if device.emulator is None:
        pytest.skip("a GPU has the clusters that it has")
    monkeypatch.setattr(_extension, "load", lambda: (device.emulator, None))
    monkeypatch.setattr(cuda_chain, "_groups_at_once", cuda_chain_groups)
    cuda_chain_groups.cache_clear()
    yield device.emulator.library.refuse_large_clusters
    device.emulator.library.refuse_large_clusters(0, 0)
    device.emulator.library.take_last_error()
    cuda_chain_groups.cache_clear()


@pytest.mark.parametrize("error", REFUSED)
@pytest.mark.parametrize("where", ["allowed", "counted"])
def test_a_device_without_clusters_of_16_runs_others(
    error: int, where: str, device: Device, refusing: Callable[[int, int], None]
):
    cases, _ = CHAINS["whole_network"]
    layers, x = [device.pack(case) for case in cases], cases[0].inputs()[0]
    assert cuda_chain.plan_for(x, layers).group == 16
    cuda_chain_groups.cache_clear()
    refusing(*((error, 0) if where == "allowed" else (0, error)))
    assert cuda_chain.plan_for(x, layers, {"barrier": CLUSTER}).group == 8
    assert device.emulator is not None and device.emulator.library.take_last_error() == 0
    with pytest.raises(ValueError, match=r"^chain_conv2d: 1 images need more thread blocks of \[16\] at the same time"):
        cuda_chain.plan_for(x, layers, {"group": 16, "barrier": CLUSTER})
    device.check(cases)
    device.check(cases, barrier=CLUSTER)


@pytest.mark.parametrize("errors", [(700, 0), (0, 700)])
def test_another_error_is_no_answer(errors: tuple[int, int], device: Device, refusing: Callable[[int, int], None]):
    refusing(*errors)
    cases, _ = CHAINS["whole_network"]
    with pytest.raises(RuntimeError, match=r"^chain_conv2d: .* status 3: an illegal memory access was encountered"):
        cuda_chain.plan_for(cases[0].inputs()[0], [device.pack(case) for case in cases])


def test_nonfinite_inputs_reach_what_reads_them(device: Device):
    case = chain("nan", replace(NARROW, n=1), 64, epilogues=["relu_maxpool2"])[0]
    x, weight, bias = case.inputs()
    x[0, 3, 2, 2], x[0, 17, 0, 3] = torch.nan, torch.inf
    out = device.launch(x, [device.pack(case)], group=2).cpu()
    expected = naive_bsr_conv2d(x, weight, bias, *case.geometry())
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("mutate", [drop_term, wrong_block])
def test_the_comparison_sees_a_wrong_weight(mutate: Callable[..., Any], device: Device):
    case = chain("mutant", NARROW, 64)[0]
    x, weight, bias = case.inputs()
    wrong = to_device(mutate(weight), device.name)
    parts = (wrong.values, wrong.crow_indices, wrong.col_indices, None if bias is None else bias.to(device.name))
    layer = pack_layer(*parts, wrong.weight_shape, wrong.block_shape, *case.geometry())
    reference, bound = case.expected(x, weight, bias)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close(device.launch(x, [layer], group=2), reference, **bound)


REFUSALS: dict[str, tuple[type[Exception], str]] = {
    "channels": (ValueError, r"expected x of shape \(N, 32, H, W\) and a layer at least"),
    "no_layers": (ValueError, r"expected x of shape .* and a layer at least, got \(3, 32, 4, 4\) and 0 layers"),
    "order": (ValueError, "expected layer 1 to take the 64 channels that layer 0 gives, not 32"),
    "dtype": (TypeError, "expected weights of layer 0 of torch.float16, got torch.bfloat16"),
    "float32": (TypeError, "expected x of float16 or bfloat16, got torch.float32"),
    "too_many": (ValueError, "expected 1 to 32 layers, not 33"),
    "config": (ValueError, "expected config of barrier, group, images, overlap"),
    "group": (ValueError, "expected group in 1 to 16, got 17"),
    "image": (ValueError, "expected an output of at least 1x1 of layer 0"),
    "overlap": (ValueError, "overlap needs barrier 0"),
    "processors": (ValueError, r"3 images need more thread blocks of \[1024\] at the same time than run here"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str, device: Device):
    error, message = REFUSALS[name]
    first, second = (device.pack(case) for case in chain("refused", NARROW, 64, 32))
    x = NARROW.inputs()[0]
    back = chain("back", replace(NARROW, c_in=32), 32)[0]
    kernel = device.pack(replace(NARROW, c_out=32, padding=(0, 0), kernel_size=(5, 5)))
    calls: dict[str, tuple[Any, ...]] = {
        "channels": (x[:, :24], [first]), "no_layers": (x, []), "order": (x, [first, first]),
        "dtype": (x.half(), [first, second]), "float32": (x.float(), [first]),
        "too_many": (x, [device.pack(back)] * 33), "config": (x, [first], {"stages": 2}),
        "group": (x, [first], {"group": 17, "barrier": CLUSTER}), "image": (x, [kernel]),
        "overlap": (x, [first], {"overlap": 1, "barrier": COUNTER}),
        "processors": (x, [first], {"group": 1024, "barrier": COUNTER}),
    }  # fmt: skip
    given, layers, *config = calls[name]
    with pytest.raises(error, match=f"^chain_conv2d: {message}"):
        device.launch(given, layers, **(config[0] if config else {}))


def test_a_pack_of_another_size_is_refused(device: Device):
    layer = device.pack(replace(NARROW, c_out=64))
    x = NARROW.inputs()[0]
    for name, change in (("weights", lambda t: t[:, 1:]), ("steps", lambda t: t[1:]), ("starts", lambda t: t[1:])):
        pack = layer.pack._replace(**{name: change(getattr(layer.pack, name))})
        with pytest.raises(ValueError, match=rf"^chain_conv2d: expected {name} of layer 0 of shape"):
            device.launch(x, [layer._replace(pack=pack)])
    assert layer.bias is not None
    with pytest.raises(ValueError, match=r"^chain_conv2d: expected bias of layer 0 of shape \(64,\)"):
        device.launch(x, [layer._replace(bias=layer.bias[:8])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_shape": (16, 16)}, "expected blocks of multiples of 32 x 16, not 16 x 16"),
        ({"c_out": 36}, "expected channels in multiples of 8, not 32 to 36"),
        ({"epilogue": "gelu"}, "expected epilogue none, relu, relu_maxpool2, got 'gelu'"),
        ({"padding": (-1, 0)}, "expected stride >= 1, dilation >= 1, padding >= 0"),
        ({"dtype": torch.float32}, "expected values of float16 or bfloat16, got torch.float32"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(change: dict[str, Any], message: str):
    case = replace(NARROW, c_out=64)
    _, weight, bias = replace(case, **{k: v for k, v in change.items() if k not in ("epilogue", "padding")}).inputs()
    parts = (weight.values, weight.crow_indices, weight.col_indices, bias, weight.weight_shape, weight.block_shape)
    with pytest.raises((ValueError, TypeError), match=f"^chain_conv2d: {message}"):
        pack_layer(*parts, *replace(case, **change).geometry())


# Modules as a chain


def modules_of(cases: Sequence[ConvCase], device: str) -> nn.Sequential:
    """The layers as modules in eval mode, with an Identity where a batch norm or ReLU was."""
    found: list[nn.Module] = []
    for case in cases:
        _, weight, bias = case.inputs()
        conv = nn.Conv2d(case.c_in, case.c_out, case.kernel_size, case.stride, case.padding, case.dilation).to(BF16)
        with torch.no_grad():
            conv.weight.copy_(weight.to_dense())
            assert conv.bias is not None and bias is not None
            conv.bias.copy_(bias)
        found += [BlockSparseConv2d.from_dense(conv, case.block_shape, epilogue=case.epilogue), nn.Identity()]
    return nn.Sequential(*found).to(device).eval().requires_grad_(False)


def test_modules_as_a_chain(device: Device):
    cases, _ = CHAINS["pools"]
    x = cases[0].inputs()[0].to(device.name)
    model = modules_of(cases, device.name)
    layers = [device.pack(case) for case in cases]
    ours = chain_of([model], group=4)
    assert torch.equal(ours(x), device.launch(x, layers, group=4))
    convolution = model[0]
    convolution.values.mul_(2)
    with pytest.raises(RuntimeError, match=r"^chain_of: a weight was written since"):
        ours(x)
    assert not torch.equal(chain_of([model], group=4)(x), device.launch(x, layers, group=4))
    with pytest.raises(TypeError, match=r"^chain_of: expected BlockSparseConv2d, .* got Conv2d"):
        chain_of([nn.Conv2d(8, 8, 1).eval()])
    with pytest.raises(ValueError, match=r"^chain_of: expected modules in eval mode, got a BlockSparseConv2d"):
        chain_of([convolution.train()])
    with pytest.raises(ValueError, match=r"^chain_of: expected a BlockSparseConv2d at least, got none"):
        chain_of([])


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"overlap": 1}, {"barrier": COUNTER}], ids=str)
def test_a_chain_in_a_cuda_graph(config: dict[str, int]):
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    if torch.cuda.get_device_capability() != (9, 0) and config.get("barrier") != COUNTER:
        pytest.skip("the GPU has no clusters")
    cases, _ = CHAINS["whole_network"]
    x = cases[0].inputs()[0].cuda()
    ours = chain_of([modules_of(cases, "cuda")], **config)
    expected = ours(x)
    _, weight, bias = to_device(cases[0].inputs(), "cuda")
    parts = (weight.values, weight.crow_indices, weight.col_indices, bias, weight.weight_shape, weight.block_shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(x)
        with pytest.raises(RuntimeError, match=r"^chain_conv2d: layers must be packed before"):
            pack_layer(*parts, *cases[0].geometry())
    for _ in range(20):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.slow
def test_vgg19_at_batch_1(device: Device):
    """All 15 layers at their sizes, sixteen thread blocks."""
    sizes = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    channels = [c for c, count in sizes for _ in range(count)][1:]
    ends = {1, 3, 7, 11, 15}
    epilogues = ["relu_maxpool2" if i in ends else "relu" for i in range(1, 16)]
    first = ConvCase(n=1, c_in=64, h=32, w=32, block_shape=(64, 16), dtype=BF16)
    device.check(chain("vgg19", first, *channels, epilogues=epilogues), group=16)


# What keeps it right

AFTER_THE_SUMS = """{}store_sums<T>(store, bias, sums);
    if (done) break;
    waits = next_layer != layer;
    if (waits) {};"""
BREAKS = {
    "the wait for the group": ("chain_conv2d.cuh", "if (waits) barrier.wait();", "", CLUSTER),
    "stores after the barrier": (
        "chain_conv2d.cuh", AFTER_THE_SUMS.format("", "barrier.arrive()"),
        AFTER_THE_SUMS.format("if (!done && next_layer != layer) barrier.arrive();\n    ", "{}"), CLUSTER),
    "the barrier in front of the sums": (
        "chain_conv2d.cuh", "hw::synchronize();\n    store_sums<T>", "store_sums<T>", CLUSTER),
    "the second set of sums": ("chain_conv2d.cuh", "set ^= 1;", "", CLUSTER),
    "a lane": ("chain_conv2d.cuh", "+ (lane & 3) * 4;", "+ ((lane ^ (lane == 17)) & 3) * 4;", CLUSTER),
    "a border": ("chain_conv2d.cuh", "(unsigned(at.y[i] + step[s].down) < unsigned(at.h))",
                 "(unsigned(at.y[i] + step[s].down) <= unsigned(at.h))", CLUSTER),
    "a share of the steps": ("chain_conv2d.cuh", "k < shares; ++k) {", "k < shares - 1; ++k) {", CLUSTER),
    "a group's own buffers": ("chain_conv2d.cuh", "which * l.y_group", "0 * l.y_group", CLUSTER),
    "an item of a block without any": ("chain_conv2d.cuh", "/ uint32_t(group) : 1;", "/ uint32_t(group) : 0;", CLUSTER),
    "the barrier behind the layers' numbers": (
        "chain_conv2d.cuh", "hw::synchronize();\n  tables.write_list", "tables.write_list", CLUSTER),
    "the pixels of the next item": ("chain_conv2d.cuh", "    tile.aim();\n    layer", "    layer", CLUSTER),
    "the sums' own place to go": ("chain_conv2d.cuh", "const ChainStore store = tile.at.store;",
                                  "const ChainStore& store = tile.at.store;", CLUSTER),
    "the counter's acquire": (
        "chain_conv2d.cuh", "if (threadIdx.x == 0) hw::wait_acquire(counter, target);", "", COUNTER),
    "the block's barrier behind the wait": (
        "chain_conv2d.cuh", "hw::wait_acquire(counter, target);\n    hw::synchronize();",
        "hw::wait_acquire(counter, target);", COUNTER),
    "the block's barrier in front of the release": (
        "chain_conv2d.cuh", "hw::synchronize();\n    if (threadIdx.x == 0) hw::add_release",
        "if (threadIdx.x == 0) hw::add_release", COUNTER),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_emulation_sees_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one mode at least the result is wrong, or the emulation ends the process: each runs in one of its own."""
    header, old, new, barrier = BREAKS[name]
    device = use(emulate_fault(tmp_path, header, old, new, "chain_conv2d"), monkeypatch)
    assert any(fails(device, mode, lambda: check_orders(device, barrier)) for mode in MODES)


def check_orders(device: Device, barrier: int) -> None:
    for group in (4, 1):  # one item of a layer for a block, and several
        device.check(ORDERS, group=group, images=1, barrier=barrier)
    device.check(CHAINS["more_blocks_than_items"][0], group=16, barrier=barrier)
