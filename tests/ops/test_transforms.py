"""torch.func over the ops and modules: every transform gives what it gives of the dense layer, or names the op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion_models import FORCE
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

import slimkernels as sk
from slimkernels import ops
from slimkernels.formats import BSRWeight
from slimkernels.ops.library import _SCHEMAS, OPS

GEOMETRY: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}


def pruned(shape: tuple[int, ...], block_shape: tuple[int, int]) -> Tensor:
    """A float64 weight with zero blocks: ragged at both edges where the blocks do not divide its sizes."""
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = nn.Conv2d(1, 1, 1) if len(shape) == 4 else nn.Linear(1, 1)
    layer.weight = nn.Parameter(weight)
    return sk.finalize_(sk.prune_(nn.Sequential(layer), 0.5, block_shape, layers=["0"]))[0].weight.detach()


def settings(weight: BSRWeight, dims: int) -> dict[str, Any]:
    return {"weight_shape": weight.weight_shape[:dims], "block_shape": weight.block_shape}


def bsr_case(shape: tuple[int, ...], epilogue: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """The op of stored blocks, the dense layer of the same blocks, and the blocks."""
    dense = pruned(shape, (4, 3))
    weight = BSRWeight.from_dense(dense, (4, 3))
    indices = weight.crow_indices, weight.col_indices
    pools = {"none": lambda y: y, "relu": torch.relu, "relu_maxpool2": lambda y: F.max_pool2d(torch.relu(y), 2)}

    def ours(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        if len(shape) == 2:
            return ops.bsr_linear(x, values, *indices, bias, epilogue=epilogue, **settings(weight, 2))
        return ops.bsr_conv2d(x, values, *indices, bias, epilogue=epilogue, **settings(weight, 4), **GEOMETRY)

    # The dense weight is linear in the values: one matrix, found by unpacking unit blocks.
    units = torch.eye(weight.values.numel(), dtype=torch.float64).reshape(-1, *weight.values.shape)
    basis = torch.stack([BSRWeight(u, *indices, weight.weight_shape, (4, 3)).to_dense().reshape(shape) for u in units])

    def theirs(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        full = torch.tensordot(values.reshape(-1), basis, 1)
        y = F.linear(x, full, bias) if len(shape) == 2 else F.conv2d(x, full, bias, **GEOMETRY)
        return pools[epilogue](y)

    return ours, theirs, weight.values


def low_rank_linear_case() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    v = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (
        lambda x, u, bias: ops.low_rank_linear(x, u, v, bias, epilogue="relu"),
        lambda x, u, bias: torch.relu(x @ v.t() @ u.t() + bias),
        u,
    )


def low_rank_conv2d_case() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    first = torch.randn(3, 7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = torch.randn(10, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (
        lambda x, w, bias: ops.low_rank_conv2d(x, [first, w], bias, kind="svd", epilogue="relu", **GEOMETRY),
        lambda x, w, bias: torch.relu(F.conv2d(F.conv2d(x, first, **GEOMETRY), w, bias)),
        last,
    )


def fused_conv2d_case() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    weight = torch.randn(10, 7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (
        lambda x, w, bias: ops.fused_conv2d(x, w, bias, epilogue="relu_maxpool2", **GEOMETRY),
        lambda x, w, bias: F.max_pool2d(torch.relu(F.conv2d(x, w, bias, **GEOMETRY)), 2),
        weight,
    )


def batch_norm_case() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    weight = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = torch.randn(10, 7, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (
        lambda x, w, bias: ops.batch_norm(F.conv2d(x, wide), w, bias, epilogue="relu_maxpool2"),
        lambda x, w, bias: F.max_pool2d(
            torch.relu(F.batch_norm(F.conv2d(x, wide), None, None, w, bias, training=True)), 2
        ),
        weight,
    )


CASES: dict[str, Callable[[], tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]]] = {
    "bsr_conv2d": lambda: bsr_case((10, 7, 3, 2), "relu_maxpool2"),
    "bsr_linear": lambda: bsr_case((10, 7), "relu"),
    "low_rank_linear": low_rank_linear_case,
    "low_rank_conv2d": low_rank_conv2d_case,
    "fused_conv2d": fused_conv2d_case,
    "batch_norm_forward": batch_norm_case,
}
FIRST_ORDER = {schema.split("(")[0] for schema in _SCHEMAS if "backward" not in schema and "dgrad" not in schema}


def tangents(f: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor) -> Any:
    """Along another image and other weights; two directions at a time."""
    return vmap(lambda k: jvp(f, (x, w, b), (k * x.flip(-1), w.flip(0), b))[1])(torch.tensor([1.0, -2.0]).double())


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Any]] = {
    "vmap over inputs": lambda f, x, w, b: vmap(f, in_dims=(1, None, None))(torch.stack([x, -x, 2 * x], 1), w, b),
    "vmap over weights": lambda f, x, w, b: vmap(f, in_dims=(None, 0, 0))(x, torch.stack([w, -w]), torch.stack([b, b])),
    "vmap in vmap": lambda f, x, w, b: vmap(vmap(f, (0, None, None)), (None, 0, None))(
        torch.stack([x, -x]), torch.stack([w, 3 * w, -w]), b
    ),
    "jacrev": lambda f, x, w, b: jacrev(f, argnums=(0, 1, 2))(x, w, b),
    "jacfwd": lambda f, x, w, b: jacfwd(f, argnums=(0, 1, 2))(x, w, b),
    "gradients of each sample": lambda f, x, w, b: vmap(
        grad(lambda *args: f(*args).square().sum(), argnums=(0, 1, 2)), (0, None, None)
    )(x[:, None], w, b),
    "second derivatives": lambda f, x, w, b: hessian(lambda w: f(x[:1], w, b).square().sum())(w),
    "tangents": tangents,
}


def inputs(name: str) -> tuple[Tensor, Tensor]:
    shape = (2, 7) if name.endswith("linear") else (2, 7, 5, 6)
    draw = torch.Generator().manual_seed(3)
    return torch.randn(shape, dtype=torch.float64, generator=draw), torch.randn(10, dtype=torch.float64, generator=draw)


def test_every_op_has_a_case() -> None:
    assert set(CASES) == FIRST_ORDER


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_transforms_are_those_of_the_dense_layer(name: str, transform: str) -> None:
    ours, theirs, weight = CASES[name]()
    x, bias = inputs(name)
    got, expected = (TRANSFORMS[transform](f, x, weight, bias) for f in (ours, theirs))
    torch.testing.assert_close(got, expected)


def test_patterns_may_be_batched_too() -> None:
    """As `torch.func.stack_module_state` stacks them: networks whose zeros differ, in one call."""
    dense = torch.zeros(2, 10, 7).double()
    for i, stored in enumerate([((0, 0), (4, 3), (8, 6)), ((0, 6), (4, 0), (4, 3))]):
        for row, column in stored:
            dense[i, row : row + 4, column : column + 3] = torch.randn((), dtype=torch.float64)
    packed = [BSRWeight.from_dense(w, (4, 3)) for w in dense]
    assert len({len(w.values) for w in packed}) == 1 and not torch.equal(packed[0].col_indices, packed[1].col_indices)
    stacked = [torch.stack([getattr(w, key) for w in packed]) for key in ("values", "crow_indices", "col_indices")]
    x = inputs("bsr_linear")[0]
    got = vmap(lambda *weight: ops.bsr_linear(x, *weight, **settings(packed[0], 2)))(*stacked)
    torch.testing.assert_close(got, x @ dense.transpose(1, 2))


def test_arguments_are_checked_under_a_transform() -> None:
    ours, _, weight = CASES["bsr_linear"]()
    x, bias = inputs("bsr_linear")
    with pytest.raises(ValueError, match=r"^bsr_linear: expected x of shape \(..., 7\), got \(6,\)$"):
        vmap(lambda row: ours(row, weight, bias))(x[:, :6])


@pytest.mark.parametrize("training", [False, True])
def test_converted_models(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 16))
    sk.finalize_(sk.prune_(model.eval(), 0.5, (16, 1), layers=["0", "3"]))
    fast, x = sk.convert(model, policy=FORCE, training=training), torch.randn(3, 8, 4, 4)
    assert sk.explain(fast).plan.swapped
    for transform in (jacrev, lambda m: vmap(grad(lambda image: m(image[None]).square().sum()))):
        torch.testing.assert_close(transform(fast)(x), transform(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-4)
    if training:
        parameters = {name: p.detach() for name, p in fast.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(fast, parameters, (image[None],)).square().sum()

        each = vmap(grad(loss), (None, 0))(parameters, x)
        fast(x).square().sum().backward()
        for name, p in fast.named_parameters():
            torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("transform", [vmap, grad])
def test_what_has_no_rule_names_the_op(transform: Any) -> None:
    weight = BSRWeight.from_dense(pruned((10, 7), (4, 3)), (4, 3))
    sizes = weight.weight_shape[:2], weight.block_shape

    def raw(x: Tensor) -> Tensor:
        call = (x, weight.values, weight.crow_indices, weight.col_indices, None, [], *sizes, "none", "auto")
        return OPS.bsr_linear(*call).sum()

    with pytest.raises(NotImplementedError, match=r"^bsr_linear: torch.ops.slimkernels.bsr_linear has no rule for"):
        transform(raw)(inputs("bsr_linear")[0])


def test_converted_layers_are_single_nodes_of_fx() -> None:
    """As torch's own layers are, so that what works on fx graphs works on converted models."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128, 64), nn.Linear(64, 32), nn.Linear(32, 4)).eval()
    sk.finalize_(sk.prune_(model, 0.5, (16, 1), layers=["0", "4"]))
    sk.factorize_(sk.factorize_(model, "svd", rank=2, layers=["2", "5"]), "svd", rank=1, layers=["6"])
    fast, x = sk.convert(model, policy=FORCE), torch.randn(2, 8, 4, 4)
    traced = torch.fx.symbolic_trace(fast)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert set(sk.explain(fast).plan.swapped) <= targets
    torch.testing.assert_close(traced(x), fast(x))
