"""Gradients of the block-sparse ops on the CPU: every listed kernel, the transposed index, and training as a whole."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.dispatch.select import resolve_gradient
from slimkernels.formats import BSRWeight, _to_blocks, block_grid, expand_mask
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import gradients as cpu_gradients
from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.weight_gradient import weight_gradient
from slimkernels.kernels.packs import StripPack
from slimkernels.kernels.problems import Request
from slimkernels.kernels.transposed import pack_size, split_index, transpose_index
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear
from slimkernels.pattern import update_pattern
from slimkernels.testing import assert_close, densify, random_bsr, random_tensor

OPS = ("bsr_conv2d_dgrad", "bsr_conv2d_wgrad", "bsr_conv2d_bias_grad", "relu_maxpool2_backward")
LOCAL = [n for n, s in KERNELS.items() if s.op in OPS and s.backend != "triton" and s.available() is None]
GEOMETRIES = {
    "plain": {},
    "without_padding": {"padding": (0, 0)},
    "padding_2_1": {"padding": (2, 1), "h": 4, "w": 7},
    "padding_exceeds_kernel": {"padding": (4, 3), "h": 2, "w": 3},
    "kernel_1x1_padded": {"kernel": (1, 1), "padding": (2, 1)},
    "kernel_1x1": {"kernel": (1, 1), "padding": (0, 0)},
    "kernel_2x5": {"kernel": (2, 5), "padding": (1, 2)},
    "dilation": {"dilation": (2, 3), "padding": (2, 3), "h": 9, "w": 8},
    "stride_2": {"stride": (2, 2), "h": 6},
    "stride_3_2": {"stride": (3, 2), "padding": (1, 2), "h": 11},
    "kernel_1x1_strided": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 3)},
    "tall_kernel": {"kernel": (70, 1), "padding": (0, 0), "h": 140, "w": 2, "n": 1, "c_out": 48},
    "few_blocks": {"sparsity": 0.95},
    "most_blocks": {"sparsity": 0.2},
    "all_dense": {"pattern": "all_dense"},
    "no_blocks": {"pattern": "no_blocks"},
    "zero_block_row": {"pattern": "zero_block_row"},
    "batch_0": {"n": 0},
    "one_pixel": {"kernel": (1, 1), "padding": (0, 0), "h": 1, "w": 1, "n": 7},
    "one_strip_of_one_tap": {"kernel": (1, 1), "padding": (0, 0), "c_in": 16, "c_out": 16, "pattern": "all_dense"},
}


def problem(
    block_shape=(16, 1), c_out=40, c_in=19, n=2, h=5, w=6, kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), pattern="random", sparsity=0.6,
):  # fmt: skip
    """(grad, x, weight with two spare blocks, geometry, references of x and values with scale and terms)."""
    weight = random_bsr((c_out, c_in, *kernel), block_shape, sparsity, seed=1, pattern=pattern)
    x = random_tensor(n, c_in, h, w, seed=2).contiguous(memory_format=torch.channels_last)
    size = F.conv2d(torch.empty(n, 1, h, w), torch.empty(1, 1, *kernel), None, stride, padding, dilation).shape[2:]
    grad = random_tensor(n, c_out, *size, seed=3).contiguous(memory_format=torch.channels_last)
    dense = densify(weight)

    def back(grad: Tensor, x: Tensor, dense: Tensor) -> list[Tensor]:
        geometry = (stride, padding, dilation, False, [0, 0], 1, [True, True, False])
        if not x.shape[0]:
            return [torch.zeros_like(x), weight.values.double() * 0]
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(grad, x, dense, None, *geometry)
        rows, cols = weight.block_rows(), weight.col_indices.long()
        return [grad_x, _to_blocks(grad_w, block_shape)[rows, cols]]

    grads = back(grad.double(), x.double(), dense)
    scales = [s.clamp_min(0).sqrt() for s in back(grad.double().square(), x.double().square(), dense.square())]
    terms = [int((dense != 0).sum(dim=(0, 2, 3)).max()), max(1, grad.numel() // c_out)]
    refs = [{"ref": g, "scale": s, "terms": k} for g, s, k in zip(grads, scales, terms, strict=True)]
    spare = torch.cat([weight.values, torch.zeros(2, *block_shape)])
    weight = replace(weight, values=spare, col_indices=F.pad(weight.col_indices, (0, 2)))
    return grad, x, weight, (weight.weight_shape, block_shape, stride, padding, dilation), refs


@pytest.mark.parametrize("block_shape", [(16, 1), (16, 4), (8, 8), (32, 16), (5, 3), (1, 1), (64, 24)], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_listed_kernel_against_float64(case: str, block_shape: tuple[int, int]) -> None:
    arguments = GEOMETRIES[case]
    grad, x, weight, geometry, (of_x, of_values) = problem(block_shape, **arguments)
    pattern = (weight.values, weight.crow_indices, weight.col_indices)
    ran = 0
    for name in LOCAL:
        spec = KERNELS[name]
        if spec.op == "bsr_conv2d_dgrad" and (spec.backend == "reference" or max(geometry[2]) == 1):
            out = spec.launch(grad, *pattern, None, tuple(x.shape[2:]), *geometry)
            assert_close(out, of_x["ref"], scale=of_x["scale"], terms=of_x["terms"], name=name)
            assert out.is_contiguous(memory_format=torch.channels_last)
        elif spec.op == "bsr_conv2d_wgrad":
            out = spec.launch(grad, x, *pattern, *geometry)
            assert_close(out[:-2], of_values["ref"], scale=of_values["scale"], terms=of_values["terms"], name=name)
            assert out.shape == weight.values.shape and not out[-2:].any()
        else:
            continue
        ran += 1
    assert ran >= 3


def test_a_dropped_block_is_seen() -> None:
    grad, x, weight, geometry, (of_x, of_values) = problem((16, 8))
    fewer = replace(weight, values=weight.values.clone())
    fewer.values[3] = 0
    dx = KERNELS["bsr_conv2d_dgrad__reference"].launch(
        grad, fewer.values, weight.crow_indices, weight.col_indices, None, tuple(x.shape[2:]), *geometry
    )
    with pytest.raises(AssertionError):
        assert_close(dx, of_x["ref"], scale=of_x["scale"], terms=of_x["terms"])
    dv = cpu_gradients.wgrad_by_products(grad, x, weight.values, weight.crow_indices, weight.col_indices, *geometry)
    dv[3, 0, 0] = 0
    with pytest.raises(AssertionError):
        assert_close(dv[:-2], of_values["ref"], scale=of_values["scale"], terms=of_values["terms"])


def test_wgrad_cuts_images_and_rows(monkeypatch) -> None:
    """Whatever part of the im2col matrix fits, the sum is the same up to rounding; the tail parts are smaller."""
    grad, x, weight, geometry, (_, of_values) = problem((16, 8), n=5, h=7)
    pattern = (weight.values, weight.crow_indices, weight.col_indices)
    for elements in (1, 9 * 24 * 6 * 3, 9 * 24 * 6 * 7 * 2):
        monkeypatch.setattr(cpu_gradients, "COLUMN_ELEMENTS", elements)
        out = cpu_gradients.wgrad_by_products(grad, x, *pattern, *geometry)
        assert_close(out[:-2], of_values["ref"], scale=of_values["scale"], terms=of_values["terms"])


NATIVE = [n for n in LOCAL if KERNELS[n].isa is not None]
# Chunks of one image's rows and of several images, several parts of them, and parts of the block rows.
CUTS = {
    "rows_of_images": {"c_out": 48, "n": 2, "h": 23, "w": 31, "sparsity": 0.8},
    "many_images": {"c_out": 48, "n": 90, "h": 3, "w": 4, "sparsity": 0.8},
    "rows_strided": {"c_out": 48, "n": 3, "h": 35, "w": 30, "stride": (2, 1), "sparsity": 0.8},
    "one_image": {"n": 1, "h": 4, "w": 4, "c_out": 208, "sparsity": 0.8},
    "linear": {
        "c_out": 48,
        "n": 700,
        "h": 1,
        "w": 1,
        "kernel": (1, 1),
        "padding": (0, 0),
        "c_in": 100,
        "sparsity": 0.8,
    },
    "far_taps": {"c_out": 48, "n": 40, "h": 30, "w": 30, "dilation": (14, 14), "padding": (0, 0), "sparsity": 0.7},
}


@pytest.mark.parametrize("block_shape", [(16, 1), (8, 3), (32, 16)], ids=str)
@pytest.mark.parametrize(
    ("name", "case"),
    # The input gradient of a strided convolution is the reference's.
    [(n, c) for n in NATIVE for c in CUTS if KERNELS[n].op != "bsr_conv2d_dgrad" or "stride" not in CUTS[c]],
)
def test_native_gradients_of_any_cut_whatever_the_threads(
    name: str, case: str, block_shape: tuple[int, int], monkeypatch
) -> None:
    """Against float64, and the same bits from one, two and three threads; stored blocks alone are multiplied."""
    monkeypatch.setattr(cpu_gradients, "wgrad_by_products", None)
    grad, x, weight, geometry, (of_x, of_values) = problem(block_shape, **CUTS[case])
    spec, pattern = KERNELS[name], (weight.values, weight.crow_indices, weight.col_indices)
    if spec.op == "bsr_conv2d_dgrad":
        arguments, expected = (grad, *pattern, None, tuple(x.shape[2:]), *geometry), of_x
    else:
        arguments, expected = (grad, x, *pattern, *geometry), of_values
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(spec.launch(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    out = outs[0] if spec.op == "bsr_conv2d_dgrad" else outs[0][:-2]
    assert_close(out, expected["ref"], scale=expected["scale"], terms=expected["terms"], name=name)


@pytest.mark.parametrize("name", [n for n in NATIVE if KERNELS[n].op == "bsr_conv2d_wgrad"])
def test_weights_that_do_not_exist_have_no_gradient_of_non_finite_numbers(name: str) -> None:
    grad, x, weight, geometry, _ = problem((16, 4), c_out=40, c_in=19)
    x[0, 0], grad[0, 0] = torch.nan, torch.inf
    out = KERNELS[name].launch(grad, x, weight.values, weight.crow_indices, weight.col_indices, *geometry)
    dense = replace(weight, values=torch.where(weight.values == 0, 0.0, 1.0)).to_dense()
    stored = BSRWeight.from_dense(dense, (16, 4), weight.mask())
    beyond = stored.values == 0
    assert beyond.any() and not out[: stored.nnz_blocks][beyond].any()
    assert not torch.isfinite(out).all()


def test_the_native_weight_gradient_refuses_what_it_does_not_take() -> None:
    grad, x, weight, geometry, _ = problem((16, 1))
    pattern = (weight.values, weight.crow_indices, weight.col_indices)
    legal = (grad, x, *pattern, *geometry)
    for i, wrong in ((0, grad[:1]), (1, x.double()), (2, weight.values[:1]), (3, weight.crow_indices.long())):
        with pytest.raises(
            ValueError, match=r"^bsr_conv2d_wgrad: expected float32 grad, x and values of one convolution"
        ):
            weight_gradient("scalar", *legal[:i], wrong, *legal[i + 1 :])


@pytest.mark.parametrize("block_shape", [(16, 1), (8, 3), (48, 2)], ids=str)
def test_entries_of_several_output_channels_hold_every_stored_weight_once(block_shape: tuple[int, int]) -> None:
    weight = random_bsr((96, 19, 3, 2), block_shape, 0.7, seed=5)
    c_out, c_in, r, s = weight.weight_shape
    pack = cpu_gradients.deep_entries(
        weight.values, weight.crow_indices, weight.col_indices, weight.weight_shape, block_shape
    )
    assert pack is not None
    depth = pack.weights.shape[1]
    run = torch.repeat_interleave(torch.arange(c_in * r * s), pack.tap_ptr.diff().long())
    dense = torch.zeros(c_in * r * s, c_out)
    for i in range(depth):
        dense.index_put_((run, pack.channels.long() + i), pack.weights[:, i], accumulate=True)
    dense = dense.view(c_in, r, s, c_out).flip(1, 2).permute(3, 0, 1, 2)
    assert torch.equal(dense, weight.to_dense())


def test_a_pack_with_entries_of_several_channels_is_checked() -> None:
    def made(channels: int, depth: int = 8, epilogue: str = "none") -> PackedConv2d:
        pack = StripPack(torch.ones(1, depth), torch.tensor([channels]).int(), torch.tensor([0, 1, 1]).int())
        return PackedConv2d("scalar", pack, (2, 19, 1, 1), (1, 1), (0, 0), (1, 1), epilogue, deep=True)

    if NATIVE:
        assert made(11)(torch.ones(1, 19, 1, 1), None).flatten().tolist() == [8.0, 0.0]
        for wrong in (12, -1):
            with pytest.raises(ValueError, match=r"expected channels of the strip pack in \[0, 12\), got"):
                made(wrong)
        with pytest.raises(ValueError, match=r"expected \[8, 16\] input channels an entry, got 4"):
            made(0, depth=4)
        with pytest.raises(ValueError, match="expected no pooling behind entries of several input channels"):
            made(0, epilogue="relu_maxpool2")


@pytest.mark.parametrize("kernel", [n for n, s in KERNELS.items() if s.op == "bsr_conv2d"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_run_on_the_forwards_backend(op: str, kernel: str) -> None:
    request = Request(op, torch.float32, "cpu", (16, 8), "none")
    forward = KERNELS[kernel]
    if forward.backend == "triton":
        with pytest.raises(ValueError, match=f"{op}: no kernel takes this problem"):
            resolve_gradient(kernel, request)
        return
    got = resolve_gradient(kernel, request)
    assert got.op == op and (got.backend == "reference") == (
        forward.backend == "reference" or op in ("bsr_conv2d_bias_grad", "relu_maxpool2_backward")
    )
    if got.isa is not None and forward.isa is not None:
        order = ("scalar", "avx2", "avx512")
        assert order.index(got.isa) <= order.index(forward.isa)
    if op == "bsr_conv2d_dgrad":
        assert resolve_gradient(kernel, request, (2, 1)).name == "bsr_conv2d_dgrad__reference"


def test_unknown_forward_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="bsr_conv2d_wgrad: expected 'auto' or a listed kernel, got 'nothing'"):
        resolve_gradient("nothing", Request("bsr_conv2d_wgrad", torch.float32, "cpu", (16, 1), "none"))


def test_a_forced_backend_without_gradient_kernels_still_trains(monkeypatch) -> None:
    for backend in ("cpu", "cuda", "reference"):
        monkeypatch.setenv("SLIMKERNELS_BACKEND", backend)
        spec = resolve_gradient("auto", Request("bsr_conv2d_wgrad", torch.float32, "cpu", (16, 1), "none"))
        assert spec.backend == ("reference" if backend == "reference" else "cpu")


# The transposed index


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sparsity=st.floats(0, 1),
    spare=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_the_transposed_index_lists_every_block_once_in_its_class(
    shape, block, stride, dilation, sparsity, spare, seed
) -> None:
    weight = random_bsr(shape, block, sparsity, seed)
    col = torch.cat([weight.col_indices, torch.zeros(spare, dtype=torch.int32)])
    capacity, nnz = len(col), weight.nnz_blocks
    index = transpose_index(weight.crow_indices, col, shape, block, stride, dilation)
    assert index.dtype == torch.int32 and len(index) == pack_size(capacity, shape, block, stride)
    crow, blocks, entries = split_index(index, capacity, shape, block, stride)
    rows, groups = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    assert crow[0] == 0 and crow[-1] == nnz and sorted(blocks.tolist()) == list(range(capacity))
    of_block = weight.block_rows().tolist()
    for group in range(groups):
        for kind in range(stride[0] * stride[1]):
            at = group * stride[0] * stride[1] + kind
            listed = range(int(crow[at]), int(crow[at + 1]))
            keys = [int(entries[e]) for e in listed]
            assert keys == sorted(set(keys))
            for e, (tap, row) in zip(listed, [divmod(key, rows) for key in keys], strict=True):
                b = int(blocks[e])
                assert row == of_block[b] and divmod(int(col[b]), groups) == (tap, group)
                r, s = divmod(tap, shape[3])
                assert divmod(kind, stride[1]) == (r * dilation[0] % stride[0], s * dilation[1] % stride[1])


def modules() -> list[nn.Module]:
    conv = nn.Conv2d(10, 32, 3, stride=(2, 1), dilation=(1, 2), padding=1)
    mask = torch.rand(block_grid(conv.weight.shape, (16, 1)), generator=torch.Generator().manual_seed(0)) < 0.5
    linear = nn.Linear(20, 32)
    pattern = torch.rand(block_grid(linear.weight.shape, (8, 4)), generator=torch.Generator().manual_seed(1)) < 0.5
    return [BlockSparseConv2d.from_dense(conv, (16, 1), mask), BlockSparseLinear.from_dense(linear, (8, 4), pattern)]


def expected_index(module: nn.Module) -> Tensor:
    shape = (*module.weight_shape, 1, 1)[:4]
    stride, dilation = getattr(module, "stride", (1, 1)), getattr(module, "dilation", (1, 1))
    return transpose_index(module.crow_indices, module.col_indices, shape, module.block_shape, stride, dilation)


@pytest.mark.parametrize("which", (0, 1), ids=("conv", "linear"))
def test_modules_keep_the_transposed_index_current(which: int) -> None:
    module = modules()[which]
    assert torch.equal(module.transposed, expected_index(module))
    assert not any("transposed" in key for key in module.state_dict())
    other = modules()[which]
    mask = other.weight_bsr().mask()
    mask[tuple(mask.nonzero()[2])] = False
    buffer = other.transposed
    update_pattern(other, mask)
    assert other.transposed is buffer and torch.equal(buffer, expected_index(other))
    assert not torch.equal(buffer, module.transposed)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.double()):
        assert torch.equal(twin.transposed, buffer) and twin.transposed.dtype == torch.int32
    module.load_state_dict(other.float().state_dict())
    assert torch.equal(module.transposed, buffer)
    assigned = modules()[which].to("meta")
    assigned.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(assigned.transposed, buffer)


# Training


class Masked(nn.Module):
    """The dense net whose masked weights are zeroed by hand after every step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.head = nn.Linear(32, 16)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


BLOCKS = {"first": (8, 1), "second": (16, 8), "head": (8, 4)}


def optimizer(net: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(net.parameters(), lr=0.01)


@pytest.mark.parametrize("name", ("sgd", "adamw"))
def test_gradual_pruning_trains_to_the_weights_of_the_masked_dense_net(name: str) -> None:
    """Masks shrink, and at one point move, during training; what the mask left out never comes back by momentum."""
    dense = Masked()
    sparse = Masked()
    for layer, block in BLOCKS.items():
        twin = BlockSparseLinear if layer == "head" else BlockSparseConv2d
        module = getattr(dense, layer)
        grid = block_grid(module.weight.shape, block)
        setattr(sparse, layer, twin.from_dense(module, block, torch.ones(grid, dtype=torch.bool)).train())
    with torch.no_grad():  # the sparse net copied first, second and head
        for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
            assert ours.numel() >= theirs.numel()
    ours, theirs = optimizer(sparse, name), optimizer(dense, name)
    generator = torch.Generator().manual_seed(1)
    masks = {layer: getattr(sparse, layer).weight_bsr().mask() for layer in BLOCKS}
    x = torch.randn(12, 6, 4, 7, 7, generator=generator)
    labels = torch.randint(16, (12, 6), generator=generator)
    for step in range(12):
        if step in (3, 6, 9):
            for layer, block in BLOCKS.items():
                scores = torch.rand(masks[layer].shape, generator=generator)
                kept = scores.flatten().topk(int(scores.numel() * (1 - 0.25 * step / 3))).values.min()
                new = scores >= kept  # drawn anew: some blocks come back, at 0 and with zero state
                module, weight = getattr(sparse, layer), getattr(dense, layer).weight
                update_pattern(module, new, ours)
                stay = expand_mask(new & masks[layer], weight.shape, block)
                masks[layer] = new
                with torch.no_grad():
                    for tensor in (weight, *theirs.state[weight].values()):
                        if tensor.shape == weight.shape:
                            tensor.mul_(stay)
        for net, steps in ((sparse, ours), (dense, theirs)):
            steps.zero_grad()
            F.cross_entropy(net(x[step]), labels[step]).backward()
            if net is dense:
                for layer, block in BLOCKS.items():
                    weight = getattr(dense, layer).weight
                    weight.grad.mul_(expand_mask(masks[layer], weight.shape, block))
            steps.step()
        for layer, block in BLOCKS.items():
            module, weight = getattr(sparse, layer), getattr(dense, layer).weight
            with torch.no_grad():  # weight decay and momentum of masked entries are 0 times 0
                assert not weight[~expand_mask(masks[layer], weight.shape, block)].any()
            got = module.weight_bsr().to_dense().reshape(weight.shape)
            torch.testing.assert_close(got, weight, rtol=2e-4, atol=2e-5)
            blocks = module.weight_bsr().nnz_blocks
            assert not module.values[blocks:].any(), "spare slots stay 0"
    moved = dense.second.weight - Masked().second.weight
    assert moved[dense.second.weight != 0].abs().median() > 1e-3, "the nets trained"


@pytest.mark.parametrize("which", (0, 1), ids=("conv", "linear"))
def test_a_second_derivative_is_refused(which: int) -> None:
    module = modules()[which]
    x = torch.randn(*((2, 10, 8, 9) if which == 0 else (3, 20)), requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="bsr_conv2d: expected to be differentiated once"):
        grad.sum().backward()


def test_bsr_weight_gradient_equals_from_dense_of_the_dense_gradient() -> None:
    module = modules()[0]
    twin = module.to_dense()
    x = torch.randn(2, 10, 8, 9)
    module(x).square().sum().backward()
    twin(x).square().sum().backward()
    wanted = BSRWeight.from_dense(twin.weight.grad, (16, 1), module.weight_bsr().mask()).values
    torch.testing.assert_close(module.values.grad, wanted, rtol=1e-4, atol=1e-4)
