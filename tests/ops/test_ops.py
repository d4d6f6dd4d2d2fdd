"""The registered ops: schema, fakes, autograd, compile, export, autocast, and every refusal with its message."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels import ops
from slimkernels.cases import Case, ConvCase, FusedConvCase, LinearCase, LowRankConvCase, LowRankLinearCase
from slimkernels.dispatch import select
from slimkernels.formats import BSRWeight
from slimkernels.kernels import KERNELS
from slimkernels.kernels.transposed import transpose_index
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, FusedConv2d, LowRankConv2d, LowRankLinear
from slimkernels.ops import bsr
from slimkernels.testing import (
    UNIT_ROUNDOFF,
    assert_close,
    densify,
    random_tensor,
    reference_bsr_conv2d,
    scale_bsr_conv2d,
    unit_bound,
)

OPS = torch.ops.slimkernels
SCHEMAS = {
    "bsr_conv2d": "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor[] packed, "
    "SymInt[4] weight_shape, SymInt[2] block_shape, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str epilogue, str kernel, Tensor? transposed=None) -> Tensor",
    "bsr_linear": "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor[] packed, "
    "SymInt[2] weight_shape, SymInt[2] block_shape, str epilogue, str kernel, Tensor? transposed=None) -> Tensor",
    "low_rank_linear": "(Tensor x, Tensor U, Tensor V, Tensor? bias, Tensor[] packed, str epilogue, "
    "str kernel) -> Tensor",
    "low_rank_conv2d": "(Tensor x, Tensor[] factors, Tensor? bias, Tensor[] packed, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, str kind, str epilogue, str kernel) -> Tensor",
    "fused_conv2d": "(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str epilogue, str kernel) -> Tensor",
}
CONV = ConvCase(n=2, c_in=6, h=7, w=6, c_out=16, block_shape=(8, 2), sparsity=0.5, stride=(2, 1), padding=(1, 2))
CASES: list[Case] = [
    CONV,
    replace(CONV, epilogue="relu", bias=False),
    replace(CONV, epilogue="relu_maxpool2", stride=(1, 1), block_shape=(5, 3)),
    replace(CONV, n=1, h=1, w=1, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0)),
    LinearCase(m=3, in_features=10, out_features=16, block_shape=(8, 1)),
    LinearCase(m=3, in_features=10, out_features=13, block_shape=(5, 3), epilogue="relu", bias=False),
    LowRankLinearCase(m=3, in_features=7, out_features=9, rank=4),
    LowRankLinearCase(m=3, in_features=7, out_features=9, rank=4, epilogue="relu", bias=False),
    LowRankConvCase(kind="tai", ranks=(4,), stride=(2, 1), padding=(0, 1)),
    LowRankConvCase(kind="svd", ranks=(3,), epilogue="relu"),
    LowRankConvCase(kind="tucker2", ranks=(3, 5), bias=False),
    replace(CONV, c_in=3, kernel_size=(1, 1), stride=(2, 3), padding=(0, 0)),
    FusedConvCase(stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    FusedConvCase(epilogue="relu", bias=False),
    FusedConvCase(epilogue="relu_maxpool2"),
]
IDS = [f"{c.op}-{getattr(c, 'kind', c.epilogue)}-{i}" for i, c in enumerate(CASES)]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def arguments(case: Case, kernel: str = "auto") -> tuple:
    """All positional arguments of the case's op."""
    return (*case.launch_args(*case.inputs()), kernel)


def floats(args: tuple) -> list[Tensor]:
    """The differentiable tensors among an op's arguments, in order."""
    flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def with_floats(args: tuple, tensors: list[Tensor]) -> tuple:
    """The arguments with their differentiable tensors replaced."""
    pool = iter(tensors)

    def swap(a):
        if isinstance(a, list) and a and isinstance(a[0], Tensor):
            return [next(pool) for _ in a]
        return next(pool) if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(swap(a) for a in args)


def run(case: Case, args: tuple) -> Tensor:
    return getattr(OPS, case.op)(*args)


# Schema, fake, opcheck


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    text = str(getattr(OPS, op).default._schema)
    assert text.removeprefix(f"slimkernels::{op}") in (SCHEMAS[op], SCHEMAS[op].replace("SymInt", "int"))
    assert torch.Tag.pt2_compliant_tag in getattr(OPS, op).default.tags
    assert not getattr(OPS, op).default._schema.is_mutable


@every_case
def test_opcheck(case: Case) -> None:
    args = arguments(case)
    for grad in (False, True):
        inputs = with_floats(args, [t.detach().clone().requires_grad_(grad) for t in floats(args)])
        torch.library.opcheck(getattr(OPS, case.op).default, inputs)


@pytest.mark.parametrize("given", (False, True), ids=("left at its default", "given"))
@pytest.mark.parametrize("case", (CONV, CASES[4]), ids=lambda c: c.op)
def test_one_gradient_for_each_argument_that_reaches_autograd(case: Case, given: bool, monkeypatch) -> None:
    """The dispatcher leaves out a last argument at its default; up to torch 2.11 a gradient for it is an error."""
    counts: list[tuple[int, int]] = []
    gradients = bsr._gradients

    def counted(ctx, grads) -> tuple:
        found = gradients(ctx, grads)
        counts.append((len(found), len(ctx.needs_input_grad)))
        return found

    monkeypatch.setattr(bsr, "_gradients", counted)
    args = arguments(case)
    weight = case.inputs()[1]
    shape, stride = (*weight.weight_shape, 1, 1)[:4], getattr(case, "stride", (1, 1))
    index = transpose_index(*args[2:4], shape, weight.block_shape, stride, getattr(case, "dilation", (1, 1)))
    x = args[0].clone().requires_grad_()
    getattr(OPS, case.op)(x, *args[1:], *([index] if given else [])).sum().backward()
    expected = len(args) + given
    assert counts == [(expected, expected)] and x.grad is not None


@every_case
def test_fake_equals_real(case: Case) -> None:
    args = arguments(case)
    real = run(case, args)
    with FakeTensorMode() as mode:
        fake = run(case, torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
    meta = run(case, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args))
    for other in (fake, meta):
        assert other.shape == real.shape and other.dtype == real.dtype and other.stride() == real.stride()
    memory_format = torch.channels_last if real.dim() == 4 else torch.contiguous_format
    assert real.is_contiguous(memory_format=memory_format) and real.storage_offset() == 0


@pytest.mark.parametrize("case", [c for c in CASES if hasattr(c, "c_in")], ids=lambda c: f"{c.op}-{c.epilogue}")
def test_any_memory_format_of_x_gives_the_same_bits(case: Case) -> None:
    args = arguments(case)
    x, expected = args[0], run(case, args)
    views = {
        "contiguous": x.contiguous(),
        "width first": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second channel": torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1, 2)[:, ::2],
        "row of a batch": torch.cat([torch.full_like(x, torch.nan), x])[x.shape[0] :],
        "expanded": x[:1].expand(x.shape),
    }
    for name, view in views.items():
        out = run(case, (view, *args[1:]))
        assert out.is_contiguous(memory_format=torch.channels_last), name
        reference = expected if name != "expanded" else run(case, (view.clone(), *args[1:]))
        assert torch.equal(out, reference), name


def test_channels_last_input_is_not_copied(monkeypatch) -> None:
    seen = []
    name = "bsr_conv2d__reference"
    spec = KERNELS[name]
    monkeypatch.setitem(
        KERNELS, name, replace(spec, launch=lambda x, *a: seen.append(x.data_ptr()) or spec.launch(x, *a))
    )
    select._explicit.cache_clear()
    args = arguments(CONV, name)
    run(CONV, args)
    run(CONV, (args[0].contiguous(), *args[1:]))
    select._explicit.cache_clear()
    assert seen[0] == args[0].data_ptr() and seen[1] != args[0].data_ptr()


@pytest.mark.parametrize("case", [CONV, CASES[4], CASES[6], CASES[8]], ids=lambda c: c.op)
def test_python_wrappers_call_the_op(case: Case) -> None:
    args = arguments(case)
    if case.op == "bsr_conv2d":
        out = ops.bsr_conv2d(
            *args[:5], weight_shape=args[6], block_shape=args[7], stride=args[8], padding=args[9], dilation=args[10]
        )
    elif case.op == "bsr_linear":
        out = ops.bsr_linear(*args[:5], weight_shape=args[6], block_shape=args[7])
    elif case.op == "low_rank_linear":
        out = ops.low_rank_linear(*args[:4])
    else:
        geometry = dict(zip(("stride", "padding", "dilation", "kind"), args[4:8], strict=True))
        out = ops.low_rank_conv2d(*args[:3], **geometry)
    assert torch.equal(out, run(case, args))


class Watched(Tensor):
    """A plain tensor that records which ops reach it."""

    seen: list[str] = []  # noqa: RUF012
    plain: Tensor

    @staticmethod
    def wrap(tensor: Tensor) -> Watched:
        watched = Tensor._make_subclass(Watched, tensor)
        watched.plain = tensor
        return watched

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        args, kwargs = torch.utils._pytree.tree_map_only(Watched, lambda t: t.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class WatchedMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_dispatcher_is_bypassed_only_when_nothing_looks() -> None:
    """Modes, subclasses in any argument, meta tensors and gradients all see the op itself."""
    plain = conv_call()
    with WatchedMode() as mode:
        assert torch.equal(conv_call(), plain)
    assert "slimkernels.bsr_conv2d.default" in mode.seen
    x, weight, bias = ConvCase(c_in=16, c_out=32).inputs()
    for name, tensor in (("x", x), ("values", weight.values), ("bias", bias)):
        Watched.seen.clear()
        with torch.no_grad():
            out = conv_call(**{name: Watched.wrap(tensor)})
        assert Watched.seen[0] == "slimkernels.bsr_conv2d.default", name
        assert torch.equal(out, plain)
    out = conv_call(values=weight.values.clone().requires_grad_())
    assert out.requires_grad and torch.equal(out.detach(), plain)
    with torch.no_grad():
        assert torch.equal(conv_call(values=nn.Parameter(weight.values)), plain)
    on_meta = {
        "x": x, "values": weight.values, "crow_indices": weight.crow_indices, "col_indices": weight.col_indices,
        "bias": bias,
    }  # fmt: skip
    out = conv_call(**{k: v.to("meta") for k, v in on_meta.items()})
    assert out.is_meta and out.shape == plain.shape and out.stride() == plain.stride()
    fake = FakeTensorMode()
    out = conv_call(**{k: fake.from_tensor(v) for k, v in on_meta.items()})
    assert isinstance(out, FakeTensor) and out.shape == plain.shape


def test_linear_takes_any_leading_dimensions() -> None:
    for case in (CASES[4], CASES[6]):
        args = arguments(case)
        features = args[0].shape[1]
        for shape in ((), (2, 3), (0,), (2, 0, 3)):
            x = random_tensor(*shape, features, seed=0)
            out = run(case, (x, *args[1:]))
            assert out.shape == (*shape, case.out_features) and out.is_contiguous()
            flat = run(case, (x.reshape(-1, features), *args[1:]))
            assert torch.equal(out.reshape(-1, case.out_features), flat)


# Gradients


@every_case
def test_gradcheck_through_the_reference(case: Case) -> None:
    tiny = {"h": 4, "w": 3} if hasattr(case, "h") and case.h > 1 else {}
    tiny |= {"n": 1, "c_in": 3} if hasattr(case, "c_in") else {}
    case = replace(case, dtype=torch.float64, **tiny)
    args = arguments(case)
    tensors = [t.clone().requires_grad_() for t in floats(args)]
    mask = padding_mask(case, args)

    def function(*inputs: Tensor) -> Tensor:
        inputs = list(inputs)
        if mask is not None:  # padded entries are not parameters: they are 0 and stay 0
            inputs[1] = inputs[1] * mask
        return run(case, with_floats(args, inputs))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=False)


def padding_mask(case: Case, args: tuple) -> Tensor | None:
    """1 where an entry of ``values`` lies inside the weight, 0 where it is padding; None for low-rank ops."""
    if "bsr" not in case.op:
        return None
    weight = case.inputs()[1]
    ones = BSRWeight.from_dense(torch.ones(weight.weight_shape), case.block_shape, mask=weight.mask())
    return ones.values.to(args[1].dtype)


def reference_gradients(case: ConvCase, grad_out: Tensor) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Float64 gradients of (x, values, bias), their scales and terms. The epilogue's mask is part of grad_out."""
    x, weight, _ = case.inputs()
    geometry = (list(case.stride), list(case.padding), list(case.dilation))

    def back(x: Tensor, dense: Tensor, grad: Tensor) -> list[Tensor]:
        return list(
            torch.ops.aten.convolution_backward(
                grad, x, dense, [case.c_out], *geometry, False, [0, 0], 1, [True, True, True]
            )
        )

    def stored(grad_w: Tensor) -> Tensor:
        return BSRWeight.from_dense(grad_w, case.block_shape, mask=weight.mask()).values

    dense = densify(weight)
    grads = back(x.double(), dense, grad_out.double())
    squares = back(x.double().square(), dense.square(), grad_out.double().square())
    scales = [s.clamp_min(0).sqrt() for s in squares]
    pixels = grad_out.numel() // case.c_out
    terms = [int((dense != 0).sum(dim=(0, 2, 3)).max()), pixels, pixels]
    grads[1], scales[1] = stored(grads[1]), stored(scales[1])
    return grads, scales, terms


GRADIENT_CASES = [
    ConvCase("plain", c_in=19, c_out=40, block_shape=(8, 4), h=9, w=7, stride=(2, 1), padding=(0, 2)),
    ConvCase("relu", c_in=16, c_out=37, block_shape=(16, 1), epilogue="relu", dilation=(1, 2), padding=(1, 2)),
    ConvCase("pool", c_in=8, c_out=24, block_shape=(8, 1), epilogue="relu_maxpool2", h=7, w=9),
    ConvCase("one_pixel", h=1, w=1, kernel_size=(1, 1), padding=(0, 0), n=5),
    ConvCase("no_blocks", pattern="no_blocks"),
    ConvCase("batch_0", n=0),
]


def route(case: ConvCase, grad: Tensor) -> Tensor:
    """The gradient that reaches the convolution's output; 0 wherever rounding could change the way it takes.

    An element within its error bound of the ReLU's kink, or of another element of its window, could go either way: the
    incoming gradient must be 0 there, so such elements get none.
    """
    x, weight, bias = case.inputs()
    geometry = (case.stride, case.padding, case.dilation)
    y = reference_bsr_conv2d(x, weight, bias, *geometry)
    scale, terms = scale_bsr_conv2d(x, weight, bias, *geometry)
    bound = 8 * sum(unit_bound(y, scale, terms, torch.float32))
    if case.epilogue == "none":
        return grad
    if case.epilogue == "relu":
        return torch.where(y > bound, grad, 0.0)
    routed = torch.zeros_like(y)
    for n, c, i, j in torch.cartesian_prod(*[torch.arange(s) for s in grad.shape]).tolist():
        window = y[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
        best, second = window.topk(2).indices.tolist()
        row, column = 2 * i + best // 2, 2 * j + best % 2
        if window[best] > bound[n, c, row, column] and window[best] - window[second] > bound[n, c, row, column]:
            routed[n, c, row, column] = grad[n, c, i, j]
    return routed


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", ["auto", "bsr_conv2d__reference", "bsr_conv2d_f32__scalar"])
def test_gradients_against_float64(kernel: str, case: ConvCase) -> None:
    if kernel != "auto" and KERNELS[kernel].available() is not None:
        pytest.skip(f"{kernel}: {KERNELS[kernel].available()}")
    args = arguments(case, kernel)
    tensors = [t.clone().requires_grad_() for t in floats(args)]
    out = run(case, with_floats(args, tensors))
    grad = random_tensor(*out.shape, seed=9)
    routed = route(case, grad)
    assert routed.any() or not routed.numel()
    if case.epilogue == "relu":
        grad = routed.float()
    elif case.epilogue == "relu_maxpool2":
        kept = F.max_pool2d(routed.abs(), 2) > 0
        grad = torch.where(kept, grad, 0.0)
        routed = route(case, grad)
    out.backward(grad)
    grads, scales, terms = reference_gradients(case, routed)
    for name, tensor, ref, scale, k in zip(("x", "values", "bias"), tensors, grads, scales, terms, strict=True):
        assert tensor.grad.shape == tensor.shape
        assert_close(tensor.grad, ref, scale=scale, terms=k, name=f"gradient of {name}")


@every_case
def test_non_contiguous_and_expanded_grad_out(case: Case) -> None:
    args = arguments(case)

    def gradients(make) -> list[Tensor]:
        tensors = [t.clone().requires_grad_() for t in floats(args)]
        out = run(case, with_floats(args, tensors))
        out.backward(make(out))
        return [t.grad for t in tensors]

    def weight(out: Tensor) -> Tensor:
        return random_tensor(*out.shape, seed=4)

    plain = gradients(weight)
    last = gradients(lambda out: weight(out).transpose(-1, -2).contiguous().transpose(-1, -2))
    strided = gradients(lambda out: torch.stack([weight(out), torch.full(out.shape, torch.nan)], -1)[..., 0])
    for grads in (last, strided):
        assert all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))
    ones = gradients(lambda out: torch.ones(out.shape))
    expanded = gradients(lambda out: torch.ones(()).expand(out.shape))
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))


@every_case
def test_gradients_are_the_same_bits_every_time(case: Case) -> None:
    def once() -> list[Tensor]:
        args = arguments(case)
        tensors = [t.clone().requires_grad_() for t in floats(args)]
        run(case, with_floats(args, tensors)).square().sum().backward()
        return [t.grad for t in tensors]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@every_case
def test_every_subset_of_gradients(case: Case) -> None:
    args = arguments(case)
    count = len(floats(args))

    def gradients(need: list[bool]) -> list[Tensor | None]:
        tensors = [t.clone().requires_grad_(n) for t, n in zip(floats(args), need, strict=True)]
        run(case, with_floats(args, tensors)).sum().backward()
        return [t.grad for t in tensors]

    every = gradients([True] * count)
    for bits in range(1, 2**count):
        need = [bool(bits >> i & 1) for i in range(count)]
        for grad, full, wanted in zip(gradients(need), every, need, strict=True):
            assert torch.equal(grad, full) if wanted else grad is None
    assert not run(case, args).requires_grad


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=lambda c: c.op)
def test_padded_entries_and_spare_blocks_get_no_gradient(case: Case) -> None:
    args = arguments(case)
    mask = padding_mask(case, args)
    assert (mask == 0).any()
    spare = torch.zeros(2, *case.block_shape)
    values = torch.cat([args[1], spare]).requires_grad_()
    col = torch.cat([args[3], torch.zeros(2, dtype=torch.int32)])
    run(case, (args[0], values, args[2], col, *args[4:])).square().sum().backward()
    assert not values.grad[:-2][mask == 0].any() and not values.grad[-2:].any()
    assert values.grad[:-2][mask == 1].any()


def test_two_forwards_then_two_backwards_accumulate() -> None:
    for case in CASES:
        args = arguments(case)
        tensors = [t.clone().requires_grad_() for t in floats(args)]
        outs = [run(case, with_floats(args, tensors)) for _ in range(2)]
        outs[1].sum().backward()
        once = [t.grad.clone() for t in tensors]
        outs[0].sum().backward()
        assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors, once, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_through_the_reference(dtype) -> None:
    for case in (CONV, CASES[4], CASES[6], CASES[8]):
        args = arguments(replace(case, dtype=dtype))
        tensors = [t.clone().requires_grad_() for t in floats(args)]
        out = run(case, with_floats(args, tensors))
        out.sum().backward()
        assert out.dtype == dtype
        assert all(t.grad.dtype == dtype and torch.isfinite(t.grad).all() for t in tensors)


# compile, export, autocast


class Net(nn.Module):
    """One of each module."""

    def __init__(self) -> None:
        super().__init__()
        dense = nn.Conv2d(6, 16, 3, padding=1)
        keep = torch.nn.functional.interpolate(random_tensor(1, 6, 3, 3, seed=0), scale_factor=1)[0] > 0
        with torch.no_grad():
            dense.weight.mul_(keep)
        self.first = FusedConv2d.from_dense(nn.Conv2d(6, 6, 3, padding=1), "relu")
        # Two channels a block: the pack is a copy in another order, not a view of the values.
        self.conv = BlockSparseConv2d.from_dense(dense, (8, 2), epilogue="relu_maxpool2")
        self.factors = LowRankConv2d(16, 8, 3, padding=1, kind="tai", ranks=(4,), epilogue="relu")
        self.linear = BlockSparseLinear.from_dense(nn.Linear(8, 16), (8, 1), epilogue="relu")
        self.head = LowRankLinear(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.factors(self.conv(self.first(x))).mean((2, 3))
        return self.head(self.linear(x))


X = random_tensor(3, 6, 8, 10, seed=5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(backend: str) -> None:
    torch._dynamo.reset()
    net = Net()
    eager = net(X)
    eager.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    try:
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        out = compiled(X)
    except Exception as error:  # no C++ compiler: inductor's own requirement, not ours
        if "InvalidCxxCompiler" in repr(error):
            pytest.skip("inductor finds no C++ compiler")
        raise
    out.square().sum().backward()
    if backend == "aot_eager":
        assert torch.equal(out, eager)
        assert all(torch.equal(p.grad, expected[n]) for n, p in net.named_parameters())
    else:
        # inductor rounds the mean between our ops in another order: an error of two roundings a layer.
        for got, want in [(out, eager)] + [(p.grad, expected[n]) for n, p in net.named_parameters()]:
            rms = (got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt()
            assert rms < 64 * UNIT_ROUNDOFF[torch.float32]
    torch._dynamo.reset()


def test_compiled_eval_model_follows_its_weights() -> None:
    torch._dynamo.reset()
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), net(X))
        for layer in (net.conv, net.linear):
            layer.values.data = layer.values * 2
            layer.prepack()
        assert torch.equal(compiled(X), net(X)), "prepack"
        net.train()
        net.conv.values.mul_(2)
        net.eval()
        assert torch.equal(compiled(X), net(X)), "train and eval"
        other = Net().eval()
        net.load_state_dict(other.state_dict())
        assert torch.equal(compiled(X), other(X)), "load_state_dict"
        assert torch.equal(compiled(X[:2, :, :6]), net(X[:2, :, :6])), "another shape"
    torch._dynamo.reset()


def test_dynamic_shapes_compile_once() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for n, h, w in ((3, 8, 10), (4, 12, 6), (5, 6, 14)):
            x = random_tensor(n, 6, h, w, seed=1)
            assert torch.equal(compiled(x), net(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


EXPORTED = """
import sys, torch, slimkernels
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert torch.equal(program.module()(x), expected)
print("same")
"""


def test_exported_program_reloads_in_a_fresh_process(tmp_path) -> None:
    net = Net().eval()
    with torch.no_grad():
        program = torch.export.export(net, (X,))
        expected = net(X)
    assert {str(n.target) for n in program.graph.nodes if "slimkernels" in str(n.target)} == {
        f"slimkernels.{op}.default" for op in SCHEMAS
    }
    assert torch.equal(program.module()(X), expected)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((X, expected), tmp_path / "io.pt")
    # The same number of threads as here: torch's own mean may sum in another order with more.
    result = subprocess.run(
        [sys.executable, "-c", EXPORTED, str(tmp_path / "net.pt2"), str(tmp_path / "io.pt")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and "same" in result.stdout, result.stderr


def test_export_with_a_dynamic_batch() -> None:
    net = Net().eval()
    with torch.no_grad():
        program = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        module = program.module()
        for n in (1, 3, 7):
            x = random_tensor(n, 6, 8, 10, seed=2)
            torch.testing.assert_close(module(x), net(x))


def test_cpu_autocast() -> None:
    """Block-sparse ops stay in float32 on the CPU, as their kernels are; low-rank ops run in the autocast dtype."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for case, dtype in (
            (CONV, torch.float32),
            (CASES[4], torch.float32),
            (CASES[6], torch.bfloat16),
            (CASES[8], torch.bfloat16),
        ):
            args = arguments(case)
            assert run(case, args).dtype == dtype
            half = (args[0].bfloat16(), *args[1:])
            assert run(case, half).dtype == dtype, "activations of another dtype are cast, not refused"
            assert run(case, arguments(replace(case, dtype=torch.float64))).dtype == torch.float64
        net = Net()
        net(X).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if "bsr" in c.op], ids=lambda c: f"{c.op}-{c.epilogue}")
def test_cpu_autocast_changes_no_bit_of_the_block_sparse_ops(case: Case) -> None:
    def once() -> list[Tensor]:
        args = arguments(case)
        tensors = [t.clone().requires_grad_() for t in floats(args)]
        out = run(case, with_floats(args, tensors))
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in tensors)]

    plain = once()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = once()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


# Refusals


def conv_call(**change) -> Tensor:
    case = replace(ConvCase(c_in=16, c_out=32), **{k: change.pop(k) for k in ("block_shape", "dtype") if k in change})
    x, weight, bias = case.inputs()
    call = {
        "x": x, "values": weight.values, "crow_indices": weight.crow_indices, "col_indices": weight.col_indices,
        "bias": bias, "weight_shape": weight.weight_shape, "block_shape": weight.block_shape, "padding": (1, 1),
    }  # fmt: skip
    return ops.bsr_conv2d(**{**call, **change})


def linear_call(**change) -> Tensor:
    x, weight, bias = LinearCase().inputs()
    call = {
        "x": x, "values": weight.values, "crow_indices": weight.crow_indices, "col_indices": weight.col_indices,
        "bias": bias, "weight_shape": weight.weight_shape[:2], "block_shape": weight.block_shape,
    }  # fmt: skip
    return ops.bsr_linear(**{**call, **change})


def low_rank_call(**change) -> Tensor:
    x, U, V, bias = LowRankLinearCase().inputs()
    return ops.low_rank_linear(**{"x": x, "U": U, "V": V, "bias": bias, **change})


def low_rank_conv_call(**change) -> Tensor:
    x, factors, bias = LowRankConvCase().inputs()
    return ops.low_rank_conv2d(**{"x": x, "factors": factors, "bias": bias, "kind": "tai", "padding": (1, 1), **change})


ones = torch.ones
CONV_REFUSALS = {
    "rank": ({"x": ones(2, 16, 8)}, ValueError, r"expected x of shape \(N, 16, H, W\), got \(2, 16, 8\)"),
    "channels": ({"x": ones(8, 12, 4, 4)}, ValueError, r"expected x of shape \(N, 16, H, W\), got \(8, 12, 4, 4\)"),
    "x_int": ({"x": ones(2, 16, 8, 8, dtype=torch.int32)}, TypeError, r"floating-point x, got torch\.int32"),
    "x_complex": ({"x": ones(2, 16, 8, 8, dtype=torch.cfloat)}, TypeError, r"floating-point x, got torch\.complex64"),
    "x_dtype": ({"x": ones(2, 16, 8, 8).double()}, TypeError, r"values of dtype torch\.float64 like x, got torch\.flo"),
    "x_device": ({"x": ones(2, 16, 8, 8, device="meta")}, ValueError, "expected values on meta like x, got cpu"),
    "bias_shape": ({"bias": ones(31)}, ValueError, r"expected bias of shape \(32,\), got \(31,\)"),
    "bias_dtype": (
        {"bias": ones(32).half()},
        TypeError,
        r"expected bias of dtype torch\.float32 like x, got torch\.fl",
    ),
    "bias_device": ({"bias": ones(32, device="meta")}, ValueError, "expected bias on cpu like x, got meta"),
    "values_rank": ({"values": ones(36, 16)}, ValueError, r"values of shape \(nnz_blocks, 16, 1\), got \(36, 16\)"),
    "values_block": (
        {"values": ones(36, 8, 2)},
        ValueError,
        r"values of shape \(nnz_blocks, 16, 1\), got \(36, 8, 2\)",
    ),
    "crow_dtype": (
        {"crow_indices": torch.zeros(3, dtype=torch.int64)},
        TypeError,
        r"expected crow_indices of dtype torch\.int32, got torch\.int64",
    ),
    "crow_length": (
        {"crow_indices": torch.zeros(4, dtype=torch.int32)},
        ValueError,
        r"expected crow_indices of shape \(3,\), got \(4,\)",
    ),
    "col_dtype": (
        {"col_indices": torch.zeros(36)},
        TypeError,
        r"expected col_indices of dtype torch\.int32, got torch\.float32",
    ),
    "col_length": (
        {"col_indices": torch.zeros(35, dtype=torch.int32)},
        ValueError,
        r"expected col_indices of shape \(36,\), got \(35,\)",
    ),
    "col_device": (
        {"col_indices": torch.zeros(36, dtype=torch.int32, device="meta")},
        ValueError,
        "expected col_indices on cpu like x, got meta",
    ),
    "empty_output": (
        {"x": ones(1, 16, 1, 1), "padding": (0, 0)},
        ValueError,
        r"expected an output of at least 1x1, got -1x-1 from x of shape \(1, 16, 1, 1\)",
    ),
    "empty_pool": (
        {"x": ones(1, 16, 1, 4), "epilogue": "relu_maxpool2"},
        ValueError,
        "expected an output of at least 1x1, got 0x2",
    ),
    "padding": ({"padding": (-1, 0)}, ValueError, r"padding >= 0, got \(1, 1\), \(1, 1\), \(-1, 0\)|padding >= 0, got"),
    "stride": ({"stride": (0, 1)}, ValueError, "expected stride >= 1"),
    "dilation": ({"dilation": (1, 0)}, ValueError, "dilation >= 1"),
    "epilogue": (
        {"epilogue": "gelu"},
        ValueError,
        "expected epilogue in .*'none', 'relu', 'relu_maxpool2'.*, got 'gelu'",
    ),
    "kernel": (
        {"kernel": "fast"},
        ValueError,
        "expected kernel 'auto' or one of .*bsr_conv2d__reference.*, got 'fast'",
    ),
    "kernel_of_another_op": ({"kernel": "bsr_linear__reference"}, ValueError, "expected kernel 'auto' or one of"),
    "unavailable": (
        {"kernel": "bsr_conv2d__cuda"},
        ValueError,
        "kernel 'bsr_conv2d__cuda' cannot run here: runs on cuda tensors, not cpu",
    ),
    "block_shape_zero": ({"values": ones(36, 0, 1), "block_shape": (0, 1)}, ValueError, "expected block_shape"),
}


@pytest.mark.parametrize("name", CONV_REFUSALS)
def test_conv_refusals(name: str) -> None:
    conv_call()
    change, error, message = CONV_REFUSALS[name]
    with pytest.raises(error, match=message) as caught:
        conv_call(**change)
    assert name == "block_shape_zero" or str(caught.value).startswith("bsr_conv2d: ")


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (linear_call, {"x": ones(5, 31)}, ValueError, r"bsr_linear: expected x of shape \(..., 32\), got \(5, 31\)"),
        (linear_call, {"x": ones(())}, ValueError, r"bsr_linear: expected x of shape \(..., 32\), got \(\)"),
        (linear_call, {"x": ones(5, 32).double()}, TypeError, r"bsr_linear: expected values of dtype torch\.float64"),
        (linear_call, {"bias": ones(3)}, ValueError, r"bsr_linear: expected bias of shape \(48,\), got \(3,\)"),
        (linear_call, {"epilogue": "relu_maxpool2"}, ValueError, "bsr_linear: expected epilogue in .*, got 'relu_max"),
        (linear_call, {"kernel": "fast"}, ValueError, "bsr_linear: expected kernel 'auto' or one of"),
        (low_rank_call, {"x": ones(5, 23)}, ValueError, r"low_rank_linear: expected x of shape \(..., 24\), got"),
        (low_rank_call, {"U": ones(40, 5)}, ValueError, r"low_rank_linear: expected U of shape \(out, rank\) and V"),
        (low_rank_call, {"U": ones(40)}, ValueError, "low_rank_linear: expected U of shape"),
        (low_rank_call, {"U": ones(40, 6).half()}, TypeError, "low_rank_linear: expected U of dtype"),
        (low_rank_call, {"bias": ones(41)}, ValueError, r"low_rank_linear: expected bias of shape \(40,\), got"),
        (low_rank_call, {"x": ones(5, 24, dtype=torch.int64)}, TypeError, "low_rank_linear: expected floating-point x"),
        (low_rank_call, {"epilogue": "tanh"}, ValueError, "low_rank_linear: expected epilogue in"),
        (low_rank_call, {"kernel": "fast"}, ValueError, "low_rank_linear: expected kernel 'auto' or one of"),
        (low_rank_conv_call, {"kind": "cp"}, ValueError, "low_rank_conv2d: .*expected kind in .* got 'cp'"),
        (low_rank_conv_call, {"kind": "tucker2"}, ValueError, "low_rank_conv2d: .*expected 3 factors"),
        (low_rank_conv_call, {"kind": "svd"}, ValueError, "low_rank_conv2d: .*are not those of kind 'svd'"),
        (
            low_rank_conv_call,
            {"factors": []},
            ValueError,
            "low_rank_conv2d: .*expected 2 factors for kind 'tai', got 0",
        ),
        (
            low_rank_conv_call,
            {"x": ones(2, 5, 7, 9)},
            ValueError,
            r"low_rank_conv2d: expected x of shape \(N, 6, H, W\)",
        ),
        (low_rank_conv_call, {"x": ones(2, 6, 7)}, ValueError, r"low_rank_conv2d: expected x of shape \(N, 6, H, W\)"),
        (
            low_rank_conv_call,
            {"x": ones(2, 6, 7, 9).half()},
            TypeError,
            r"low_rank_conv2d: expected factors\[0\] of dtyp",
        ),
        (low_rank_conv_call, {"bias": ones(9)}, ValueError, r"low_rank_conv2d: expected bias of shape \(10,\), got"),
        (low_rank_conv_call, {"padding": (-1, 0)}, ValueError, "low_rank_conv2d: .*padding >= 0"),
        (low_rank_conv_call, {"x": ones(2, 6, 1, 1), "padding": (0, 0)}, ValueError, "low_rank_conv2d: .*at least 1x1"),
        (low_rank_conv_call, {"kernel": "fast"}, ValueError, "low_rank_conv2d: expected kernel 'auto' or one of"),
    ],
)
def test_other_refusals(call, change, error, message) -> None:
    call()
    with pytest.raises(error, match=f"^{message}"):
        call(**change)


def test_fakes_refuse_what_the_ops_refuse() -> None:
    case = ConvCase()
    args = arguments(case)
    meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
    with pytest.raises(ValueError, match=r"^bsr_conv2d: expected x of shape \(N, 16, H, W\), got \(2, 12, 8, 8\)"):
        run(case, (meta[0][:, :12], *meta[1:]))
