"""The drop-in modules: exact round trips, torch's attributes, state, packs that never go stale."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels.formats import block_grid
from slimkernels.kernels import KERNELS
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear
from slimkernels.nn.packing import Prepacked
from slimkernels.testing import (
    UNIT_ROUNDOFF,
    apply_epilogue,
    assert_close,
    random_bsr,
    random_tensor,
    reference_bsr_conv2d,
    reference_bsr_linear,
    reference_low_rank_conv2d,
    reference_low_rank_linear,
    scale_bsr_conv2d,
    scale_bsr_linear,
    scale_low_rank_conv2d,
    scale_low_rank_linear,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONV_KINDS = {"tai": (4,), "svd": (3,), "tucker2": (3, 5)}


def sparse_conv(c_in=12, c_out=32, seed=0, block_shape=(16, 1), sparsity=0.6, dtype=torch.float32, **conv) -> nn.Conv2d:
    """A dense nn.Conv2d whose weight has zero blocks."""
    dense = nn.Conv2d(c_in, c_out, **{"kernel_size": 3, "padding": 1, **conv}, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(random_bsr(dense.weight.shape, block_shape, sparsity, seed, dtype=dtype).to_dense())
    return dense


def sparse_linear(in_features=24, out_features=40, seed=0, block_shape=(8, 1), dtype=torch.float32) -> nn.Linear:
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(random_bsr(dense.weight.shape, block_shape, 0.6, seed, dtype=dtype).to_dense()[:, :, 0, 0])
    return dense


def conv_module(**kwargs) -> BlockSparseConv2d:
    block_shape = kwargs.get("block_shape", (16, 1))
    return BlockSparseConv2d.from_dense(sparse_conv(**kwargs), block_shape).eval()


def assert_right(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's output equals the float64 reference of its own present parameters."""
    with torch.no_grad():
        out = module(x)
    bias = module.bias
    if isinstance(module, BlockSparseConv2d):
        args = (x, module.weight_bsr(), bias, module.stride, module.padding, module.dilation, module.epilogue)
        ref, (scale, terms), u_mul = reference_bsr_conv2d(*args), scale_bsr_conv2d(*args), None
    elif isinstance(module, BlockSparseLinear):
        ref = reference_bsr_linear(x, module.weight_bsr(), bias, module.epilogue)
        (scale, terms), u_mul = scale_bsr_linear(x, module.weight_bsr(), bias), None
    elif isinstance(module, LowRankLinear):
        ref = reference_low_rank_linear(x, module.U, module.V, bias, module.epilogue)
        (scale, terms), u_mul = scale_low_rank_linear(x, module.U, module.V, bias), UNIT_ROUNDOFF[x.dtype]
    else:
        geometry = (module.stride, module.padding, module.dilation, module.kind, module.epilogue)
        ref = reference_low_rank_conv2d(x, list(module.factors), bias, *geometry)
        scale, terms = scale_low_rank_conv2d(x, list(module.factors), bias, *geometry)
        u_mul = UNIT_ROUNDOFF[x.dtype]
    assert_close(out, ref.detach(), scale=scale.detach(), terms=terms, u_mul=u_mul)
    return out


X = random_tensor(2, 12, 7, 6, seed=3)
X_LINEAR = random_tensor(5, 24, seed=3)


# Dense <-> sparse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", [(16, 1), (32, 1), (4, 4), (5, 3), (1, 1), (64, 16)])
def test_conv_round_trip_is_exact(block_shape, dtype) -> None:
    dense = sparse_conv(dtype=dtype, block_shape=block_shape, stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    module = BlockSparseConv2d.from_dense(dense, block_shape)
    back = module.to_dense()
    assert type(back) is nn.Conv2d and torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(back, name) == getattr(dense, name) == getattr(module, name), name
    assert module.values.dtype == dtype and module.block_shape == block_shape
    assert module.weight_bsr().weight_shape == tuple(dense.weight.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", [(8, 1), (16, 1), (4, 4), (5, 3), (1, 1)])
def test_linear_round_trip_is_exact(block_shape, dtype) -> None:
    dense = sparse_linear(dtype=dtype, block_shape=block_shape)
    module = BlockSparseLinear.from_dense(dense, block_shape)
    back = module.to_dense()
    assert type(back) is nn.Linear and torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert (module.in_features, module.out_features) == (24, 40)


def test_from_dense_copies() -> None:
    dense = sparse_conv()
    module = BlockSparseConv2d.from_dense(dense, (16, 1))
    before = module.to_dense().weight.clone()
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(module.to_dense().weight, before) and module.bias.abs().sum() > 0


def test_mask_drops_and_keeps_blocks() -> None:
    dense = sparse_conv()
    grid = block_grid(dense.weight.shape, (16, 1))
    every = BlockSparseConv2d.from_dense(dense, (16, 1), mask=torch.ones(grid, dtype=torch.bool))
    assert every.values.shape[0] == grid[0] * grid[1]
    assert torch.equal(every.to_dense().weight, dense.weight)
    half = torch.zeros(grid, dtype=torch.bool)
    half[:, ::2] = True
    module = BlockSparseConv2d.from_dense(dense, (16, 1), mask=half)
    assert torch.equal(module.weight_bsr().mask(), half)
    with pytest.raises(ValueError, match=r"expected mask of shape \(2, 108\), got \(2, 2\)"):
        BlockSparseConv2d.from_dense(dense, (16, 1), mask=half[:, :2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "groups=2"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": "same", "kernel_size": (2, 3)}, r"padding='same' with kernel_size=\(2, 3\)"),
    ],
)
def test_unsupported_attributes_raise_with_name_and_value(change, message) -> None:
    conv = nn.Conv2d(8, 16, **{"kernel_size": 3, **change})
    with pytest.raises(ValueError, match=f"^BlockSparseConv2d.from_dense: .*{message}"):
        BlockSparseConv2d.from_dense(conv, (16, 1))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding) -> None:
    dense = sparse_conv(padding=padding, dilation=2)
    module = BlockSparseConv2d.from_dense(dense, (16, 1)).eval()
    assert module.padding == ((2, 2) if padding == "same" else (0, 0))
    assert module(X).shape == dense(X).shape
    assert_right(module, X)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epilogue", ["none", "relu", "relu_maxpool2"])
@pytest.mark.parametrize("block_shape", [(16, 1), (5, 3)])
def test_conv_forward(block_shape, epilogue, bias) -> None:
    dense = sparse_conv(block_shape=block_shape, bias=bias)
    module = BlockSparseConv2d.from_dense(dense, block_shape, epilogue=epilogue)
    for mode in (True, False):
        out = assert_right(module.train(mode), X)
        assert out.shape == apply_epilogue(dense(X), epilogue).shape
        assert out.is_contiguous(memory_format=torch.channels_last)
    single = module(X[0])
    assert single.dim() == 3 and torch.equal(single, module(X[:1])[0])
    assert module(X[:0]).shape[0] == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epilogue", ["none", "relu"])
def test_linear_forward(epilogue, bias) -> None:
    dense = sparse_linear()
    dense.bias = dense.bias if bias else None
    module = BlockSparseLinear.from_dense(dense, (8, 1), epilogue=epilogue).eval()
    assert_right(module, X_LINEAR)
    for shape in ((24,), (2, 3, 24), (0, 24)):
        x = random_tensor(*shape, seed=1)
        assert module(x).shape == (*shape[:-1], 40)
        assert_close(
            module(x).reshape(-1, 40),
            reference_bsr_linear(x.reshape(-1, 24), module.weight_bsr(), module.bias, epilogue).detach(),
            scale=scale_bsr_linear(x.reshape(-1, 24), module.weight_bsr(), module.bias)[0].detach(),
            terms=25,
        )


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 16, 3), lambda: nn.Linear(4, 16)])
def test_training_flag_and_requires_grad_are_kept(make) -> None:
    dense = make().eval()
    dense.requires_grad_(False)
    twin = BlockSparseConv2d if isinstance(dense, nn.Conv2d) else BlockSparseLinear
    module = twin.from_dense(dense, (16, 1))
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert not module.to_dense().training
    assert all(p.requires_grad for p in twin.from_dense(make(), (16, 1)).parameters())


# Low rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["none", "relu"])
def test_low_rank_linear(dtype, epilogue) -> None:
    U, V, bias = (random_tensor(*s, seed=i, dtype=dtype) for i, s in enumerate(((40, 6), (6, 24), (40,))))
    module = LowRankLinear.from_factors(U, V, bias, epilogue=epilogue).eval()
    assert torch.equal(module.U, U) and torch.equal(module.V, V) and module.rank == 6
    assert_right(module, X_LINEAR.to(dtype))
    assert_close(
        module.to_dense().weight,
        U.double() @ V.double(),
        scale=(U.double().square() @ V.double().square()).sqrt(),
        terms=6,
    )


def test_truncated_svd_is_the_best_approximation() -> None:
    dense = nn.Linear(24, 40)
    for rank in (1, 5, 24):
        module = LowRankLinear.from_dense(dense, rank)
        error = torch.linalg.matrix_norm(dense.weight.double() - module.U.double() @ module.V.double())
        tail = torch.linalg.svdvals(dense.weight.double())[rank:].square().sum().sqrt()
        rounding = 24 * UNIT_ROUNDOFF[torch.float32] * torch.linalg.matrix_norm(dense.weight.double())
        assert tail - rounding <= error <= tail + rounding, "Eckart-Young"
        u, v = torch.linalg.svdvals(module.U.double()), torch.linalg.svdvals(module.V.double())
        assert_close(u.float(), v.detach(), scale=v.detach().clone(), terms=40), "singular values split evenly"
    for rank in (0, 25):
        with pytest.raises(ValueError, match=rf"LowRankLinear.from_dense: expected rank in \[1, 24\], got {rank}"):
            LowRankLinear.from_dense(dense, rank)


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_low_rank_conv(kind) -> None:
    module = LowRankConv2d(
        12, 20, (3, 5), (2, 1), (1, 2), (1, 2), kind=kind, ranks=CONV_KINDS[kind], epilogue="relu"
    ).eval()
    x = random_tensor(2, 12, 9, 11, seed=0)
    out = assert_right(module, x)
    dense = module.to_dense()
    assert type(dense) is nn.Conv2d and dense.kernel_size == (3, 5)
    assert out.shape == dense(x).shape
    again = LowRankConv2d.from_factors(
        list(module.factors), module.bias, kind=kind, stride=(2, 1), padding=(1, 2), dilation=(1, 2), epilogue="relu"
    ).eval()
    assert torch.equal(again(x), module(x)) and again.ranks == module.ranks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(8, 8, 0), r"LowRankLinear: expected rank in \[1, 8\], got 0"),
        (lambda: LowRankLinear(8, 8, 2, epilogue="gelu"), "LowRankLinear: expected epilogue in .* got 'gelu'"),
        (lambda: LowRankConv2d(4, 4, 3, kind="cp", ranks=(2,)), "LowRankConv2d: expected kind in .* got 'cp'"),
        (lambda: LowRankConv2d(4, 4, 3, kind="tucker2", ranks=(2,)), r"expected \(rank_in, rank_out\), got \(2,\)"),
        (lambda: LowRankConv2d(4, 4, 3, kind="tai", ranks=(0,)), r"expected \(rank,\), got \(0,\)"),
        (lambda: LowRankLinear.from_factors(torch.zeros(4, 2), torch.zeros(3, 5)), "LowRankWeight: expected factor 1"),
        (lambda: conv_module_with(epilogue="gelu"), "BlockSparseConv2d: expected epilogue in .* got 'gelu'"),
        (lambda: conv_module_with(block_shape=(16,)), "expected block_shape .* got"),
        (lambda: conv_module_with(block_shape=(0, 1)), "expected block_shape .* got"),
        (lambda: conv_module_with(col_indices=torch.tensor([99])), r"expected col_indices in \[0, 36\), got 99"),
        (lambda: conv_module_with(crow_indices=torch.tensor([0, 1, 1])), "expected crow_indices of length 2, got 3"),
    ],
)
def test_bad_construction(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def conv_module_with(**kwargs) -> BlockSparseConv2d:
    pattern = {"crow_indices": torch.tensor([0, 1]), "col_indices": torch.tensor([3])}
    return BlockSparseConv2d(4, 16, 3, **{"block_shape": (16, 1), **pattern, **kwargs})


# State


def test_state_dict_is_plain_and_loads_into_a_fresh_module() -> None:
    module = conv_module()
    state = module.state_dict()
    assert set(state) == {"values", "bias", "crow_indices", "col_indices"}
    assert {n for n, _ in module.named_parameters()} == {"values", "bias"}
    fresh = conv_module()
    with torch.no_grad():
        fresh.values.zero_()
        fresh.bias.zero_()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(X), module(X))


def test_load_state_dict_after_a_forward_is_not_stale() -> None:
    module, other = conv_module(seed=0, block_shape=(16, 4)), conv_module(seed=1, block_shape=(16, 4))
    assert module.values.shape == other.values.shape
    module(X)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.col_indices, other.col_indices)
    assert torch.equal(assert_right(module, X), other(X))
    module.load_state_dict(
        {k: v.clone() for k, v in conv_module(seed=2, block_shape=(16, 4)).state_dict().items()}, assign=True
    )
    assert_right(module, X)


def test_a_corrupt_state_dict_is_refused_and_changes_nothing() -> None:
    module = conv_module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bad = {k: v.clone() for k, v in before.items()}
    bad["col_indices"][0] = 10_000
    with pytest.raises(RuntimeError, match=r"expected col_indices in \[0, 108\), got 10000"):
        module.load_state_dict(bad)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert_right(module, X)


@pytest.mark.parametrize("block_shape", [(16, 1), (16, 4)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_optimiser_step_after_a_forward_is_not_stale(mode, block_shape) -> None:
    module = conv_module(block_shape=block_shape).train(mode == "train")
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    with torch.no_grad():
        before = module(X)
    for _ in range(2):
        optimiser.zero_grad()
        module(X).square().mean().backward()
        optimiser.step()
        assert_right(module, X)
    module.eval()
    assert not torch.equal(assert_right(module, X), before)


def in_place(module):
    with torch.no_grad():
        module.values.mul_(2)


def new_parameter(module):
    module.values = nn.Parameter(module.values.detach() * 2)


def data_swap(module):
    module.values.data = module.values.data * 2


def vector_to_parameters(module):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()) * 2, module.parameters())


def inference_mode(module):
    with torch.inference_mode():
        module.values.mul_(2)


@pytest.mark.parametrize("block_shape", [(16, 1), (16, 4)], ids=["pack_is_a_view", "pack_is_a_copy"])
@pytest.mark.parametrize("edit", [in_place, new_parameter, data_swap, vector_to_parameters, inference_mode])
def test_edits_of_the_values_in_eval_mode_show(edit, block_shape) -> None:
    module = conv_module(block_shape=block_shape)
    before = module(X)
    edit(module)
    assert not torch.equal(assert_right(module, X), before)
    module.prepack()
    assert_right(module, X)


def test_writes_through_data_need_prepack() -> None:
    """``values.data.mul_()`` bumps no version counter of torch: the documented exception, which prepack() ends."""
    for block_shape in ((16, 1), (16, 4)):
        module = conv_module(block_shape=block_shape)
        module.values.data.mul_(2)
        module.prepack()
        assert_right(module, X)
    assert isinstance(module, Prepacked)
    assert "call ``prepack()``" in Prepacked.__doc__ and "through ``.data``" in Prepacked.__doc__


@pytest.mark.parametrize("block_shape", [(16, 1), (16, 4)])
def test_functional_call_uses_the_values_it_is_given(block_shape) -> None:
    module = conv_module(block_shape=block_shape)
    for edits in range(5):
        values = module.values.detach().clone()
        for _ in range(edits):  # whatever version counter the pack was built at, one of these has the same
            values.mul_(-3)
        with torch.no_grad():
            out = torch.func.functional_call(module, {"values": values}, (X,))
        weight = replace(module.weight_bsr(), values=values)
        args = (X, weight, module.bias.detach(), module.stride, module.padding, module.dilation)
        scale, terms = scale_bsr_conv2d(*args)
        assert_close(out, reference_bsr_conv2d(*args), scale=scale, terms=terms)


def test_packs_live_in_eval_only_and_are_never_saved(monkeypatch) -> None:
    monkeypatch.delenv("SLIMKERNELS_BACKEND", raising=False)
    module = conv_module()
    native = KERNELS["bsr_conv2d_f32__scalar"].available() is None
    packed = [b for n, b in module.named_buffers() if n.startswith("packed")]
    assert bool(packed) == native
    module.train()
    assert not [b for n, b in module.named_buffers() if n.startswith("packed")]
    assert not [k for k in module.eval().state_dict() if "packed" in k]
    training = BlockSparseConv2d.from_dense(sparse_conv(), (16, 1)).train()
    assert not [b for n, b in training.named_buffers() if n.startswith("packed")]
    training.load_state_dict(module.state_dict())
    assert torch.equal(module(X), training(X)), "with and without a pack, the same bits"


@pytest.mark.parametrize(
    "make",
    [
        conv_module,
        lambda: BlockSparseLinear.from_dense(sparse_linear(), (8, 1)).eval(),
        lambda: LowRankLinear(24, 40, 4).eval(),
        lambda: LowRankConv2d(12, 8, 3, kind="tucker2", ranks=(3, 5)).eval(),
    ],
    ids=["BlockSparseConv2d", "BlockSparseLinear", "LowRankLinear", "LowRankConv2d"],
)
class TestEveryModule:
    @staticmethod
    def x(module: nn.Module) -> torch.Tensor:
        return X if isinstance(module, BlockSparseConv2d | LowRankConv2d) else X_LINEAR

    def test_deepcopy_and_pickle(self, make) -> None:
        module = make()
        x = self.x(module)
        out = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module) and torch.equal(twin(x), out)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(2)
            assert torch.equal(module(x), out), "the copy shares nothing"
            assert_right(twin, x)

    def test_dtype_moves(self, make) -> None:
        module = make()
        x = self.x(module)
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
            module = module.to(dtype)
            assert module(x.to(dtype)).dtype == dtype
            assert_right(module, x.to(dtype))
            for name, buffer in module.named_buffers():
                assert not name.endswith("indices") or buffer.dtype == torch.int32

    def test_train_and_eval_agree(self, make) -> None:
        module = make()
        x = self.x(module)
        assert torch.equal(module.train()(x), module.eval()(x))

    def test_extra_repr_shows_shape_epilogue_and_kernel(self, make) -> None:
        text = repr(make())
        assert "epilogue='none'" in text and "kernel='auto'" in text and "bias=True" in text
        assert ("block_shape=" in text) == ("BlockSparse" in text)

    def test_wrong_input_is_refused(self, make) -> None:
        module = make()
        x = self.x(module)
        op = {"Co": "conv2d", "Li": "linear"}[
            type(module).__name__.replace("BlockSparse", "").replace("LowRank", "")[:2]
        ]
        family = "bsr" if "BlockSparse" in type(module).__name__ else "low_rank"
        wrong = x[:, :5] if x.dim() == 4 else x[..., :5]
        with pytest.raises(ValueError, match=rf"^{family}_{op}: expected x of shape"):
            module(wrong)

    def test_to_meta_and_back_to_empty(self, make) -> None:
        module = make().to("meta")
        assert all(p.is_meta for p in module.parameters())

    def test_share_memory_and_state_round_trip(self, make) -> None:
        module = make()
        x = self.x(module)
        other = make()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))
        missing = {k: v for k, v in module.state_dict().items() if k != "bias"}
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(missing)


def test_a_kernel_is_kept_and_shown() -> None:
    module = BlockSparseConv2d.from_dense(sparse_conv(), (16, 1), kernel="bsr_conv2d__reference").eval()
    assert "kernel='bsr_conv2d__reference'" in repr(module)
    assert_right(module, X)
    assert not [b for n, b in module.named_buffers() if n.startswith("packed")], "the reference reads no pack"
    with pytest.raises(ValueError, match="bsr_conv2d: expected kernel 'auto' or one of"):
        BlockSparseConv2d.from_dense(sparse_conv(), (16, 1), kernel="no_such_kernel")(X)


def test_a_whole_net_trains_and_follows_the_masked_dense_net() -> None:
    """Three SGD steps of sparse modules and of dense layers whose gradients are masked give the same weights."""
    conv, linear = sparse_conv(dtype=torch.float64), sparse_linear(in_features=32, dtype=torch.float64)
    dense = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    sparse = nn.Sequential(
        BlockSparseConv2d.from_dense(conv, (16, 1), epilogue="relu"), nn.Identity(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), BlockSparseLinear.from_dense(linear, (8, 1)),
    )  # fmt: skip
    masks = [layer.weight != 0 for layer in (conv, linear)]
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (dense, sparse)]
    x, target = random_tensor(4, 12, 6, 6, seed=1, dtype=torch.float64), torch.tensor([1, 7, 3, 2])
    for _ in range(3):
        for model, optimiser in zip((dense, sparse), optimisers, strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), target).backward()
            if model is dense:
                conv.weight.grad *= masks[0]
                linear.weight.grad *= masks[1]
            optimiser.step()
    for layer, module in ((conv, sparse[0]), (linear, sparse[4])):
        weight = module.to_dense().weight
        assert torch.equal(weight != 0, layer.weight != 0)
        # 3 steps of 16-term chains in float64: a few hundred roundings of the largest weight.
        assert (weight - layer.weight).abs().max() <= 1000 * UNIT_ROUNDOFF[torch.float64] * layer.weight.abs().max()
