"""Batch norm of a training step with what is behind it: the op, the module, and whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from batch_norm_cases import plain
from torch import Tensor, nn
from torch.autograd import forward_ad

import slimkernels as sk
from slimkernels.models import vgg19_cifar
from slimkernels.nn import FusedBatchNorm2d
from slimkernels.nn.batch_norm import RunsInBatchNorm
from slimkernels.ops import batch_norm

EPILOGUES = ("none", "relu", "relu_maxpool2")


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (3, 5, 7, 5)) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype).mul(2).add(1).to(memory_format=torch.channels_last)
    return x.requires_grad_(), *(torch.randn(shape[1], dtype=wide, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_op_is_torchs_ops_one_after_the_other(epilogue: str, dtype: torch.dtype) -> None:
    """Ties in a window, which 16-bit dtypes have, included: the gradients go to the same pixels."""
    leaves = inputs(dtype)
    running = [torch.rand(5, dtype=leaves[1].dtype) for _ in range(2)]
    expected = [t.clone() for t in running]
    y = batch_norm(*leaves, *running, momentum=0.3, epilogue=epilogue)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, grad)
    z = nn.functional.batch_norm(leaves[0], *expected, *leaves[1:], training=True, momentum=0.3)
    z = torch.relu(z) if epilogue != "none" else z
    z = nn.functional.max_pool2d(z, 2) if epilogue == "relu_maxpool2" else z
    close = {"rtol": 1e-5, "atol": 1e-5} if y.itemsize > 2 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(y, z, **close)
    for own, other in zip(ours, torch.autograd.grad(z, leaves, grad), strict=True):
        torch.testing.assert_close(own, other, **close)
    for own, other in zip(running, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_gradients_in_double_precision() -> None:
    x, weight, bias = inputs(torch.float64, (2, 3, 4, 4))
    assert torch.autograd.gradcheck(lambda *args: batch_norm(*args, epilogue="relu"), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: batch_norm(x), (x,))
    (of_bias,) = torch.autograd.grad(batch_norm(x.detach(), weight.detach(), bias).sum(), bias)
    assert torch.equal(of_bias, torch.full((3,), 32.0, dtype=torch.float64))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_op_passes_torchs_own_checks(epilogue: str) -> None:
    x, weight, bias = inputs(torch.float32, (2, 3, 5, 4))
    for args in ((x, weight, bias), (x, None, None)):
        torch.library.opcheck(torch.ops.slimkernels.batch_norm_forward.default, (*args, 1e-5, epilogue, "auto"))


def test_compiled_and_with_tangents() -> None:
    x, weight, bias = inputs(torch.float32)
    compiled = torch.compile(lambda *a: batch_norm(*a, epilogue="relu_maxpool2"), backend="aot_eager", fullgraph=True)
    y = compiled(x, weight, bias)
    assert torch.equal(y, batch_norm(x, weight, bias, epilogue="relu_maxpool2"))
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), tangent)
        own, other = (
            forward_ad.unpack_dual(f(dual, weight.detach(), bias.detach(), epilogue="relu")).tangent
            for f in (batch_norm, plain)
        )
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 1, 1)}, r"^batch_norm: expected more than one value a channel"),
        ({"x": torch.zeros(5, 3)}, r"^batch_norm: expected x of shape \(N, C, H, W\), got \(5, 3\)"),
        ({"x": torch.zeros(2, 5, 1, 3), "epilogue": "relu_maxpool2"}, r"^batch_norm: expected an output of at least"),
        ({"x": torch.zeros(2, 5, 3, 3, dtype=torch.int64)}, r"^batch_norm: expected floating-point x"),
        ({"weight": torch.zeros(4)}, r"^batch_norm: expected weight of shape \(5,\), got \(4,\)"),
        ({"bias": None}, r"^batch_norm: expected weight and bias or neither"),
        ({"weight": torch.zeros(5, device="meta")}, r"^batch_norm: expected weight of a floating-point dtype on cpu"),
        ({"epilogue": "gelu"}, r"^batch_norm_forward: expected epilogue in"),
        ({"kernel": "fast"}, r"^batch_norm_forward: expected 'auto' or a listed kernel, got 'fast'"),
        (
            {"running_mean": torch.zeros(5).double(), "running_var": torch.ones(5)},
            r"^batch_norm: expected running_mean",
        ),
        ({"running_mean": torch.zeros(3), "running_var": torch.ones(5)}, r"^batch_norm: expected"),
    ],
)
def test_what_is_wrong_is_said(change: dict, message: str) -> None:
    args = {"x": torch.zeros(2, 5, 4, 4), "weight": torch.ones(5), "bias": torch.zeros(5)}
    with pytest.raises((ValueError, TypeError), match=message):
        batch_norm(**{**args, **change})


class Net(nn.Module):
    """What may move and what may not: a ReLU called twice, one with a hook, a sum in between, another pool."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.relu, self.hooked, self.last = nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True)
        self.hooked.register_forward_hook(lambda *args: None)
        self.pool, self.wide_pool = nn.MaxPool2d(2), nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norms[0](self.convs[0](x)))
        x = self.relu(self.norms[1](self.convs[1](x)))
        x = self.hooked(self.norms[2](self.convs[2](x)))
        y = self.norms[3](self.convs[3](x)) + x
        y = self.last(self.norms[4](self.convs[4](y)))
        return self.wide_pool(y)


def test_only_what_nobody_else_sees_moves() -> None:
    net = Net()
    names = list(net.state_dict())
    assert sk.fuse_batch_norm_(net) is net
    assert [norm.epilogue for norm in net.norms] == ["none", "none", "none", "none", "relu"]
    assert isinstance(net.last, RunsInBatchNorm) and type(net.relu) is nn.ReLU and "ReLU" in repr(net)
    assert list(net.state_dict()) == names
    sk.restore_batch_norm_(net)
    assert all(type(norm) is nn.BatchNorm2d for norm in net.norms) and type(net.last) is nn.ReLU and net.last.inplace
    dynamic = nn.Module()
    dynamic.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^fuse_batch_norm_: expected a model that torch.fx can trace, got: "):
        sk.fuse_batch_norm_(dynamic)


def test_a_fused_model_trains_evaluates_and_converts_as_the_plain_one() -> None:
    torch.manual_seed(0)
    model = vgg19_cifar(width=0.125)
    fused = sk.fuse_batch_norm_(copy.deepcopy(model))
    norms = [m for m in fused.modules() if isinstance(m, FusedBatchNorm2d)]
    assert [m.epilogue for m in norms].count("relu_maxpool2") == 5 and len(norms) == 16
    assert not any(type(m) in (nn.BatchNorm2d, nn.MaxPool2d) for m in fused.modules())
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    for net in (model, fused):
        optimizer = torch.optim.SGD(net.train().parameters(), 0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(1)  # dropout
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    for (name, own), other in zip(fused.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(fused.eval()(images), model.eval()(images), rtol=1e-3, atol=1e-3)
    back = sk.restore_batch_norm_(copy.deepcopy(fused))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()] and not back.training
    policy = sk.Policy(measure=False, min_speedup=0.0)
    plans = [sk.convert(net, policy=policy).slimkernels_plan for net in (fused, model)]
    assert [layer.action for layer in plans[0].layers] == [layer.action for layer in plans[1].layers]


def test_biases_that_a_batch_norm_subtracts_are_taken_and_given_back() -> None:
    torch.manual_seed(0)
    model = vgg19_cifar(width=0.125).train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, std=3.0)
    fused = sk.fuse_batch_norm_(copy.deepcopy(model), take_biases=True)
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs) and len(convs) == 16
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    losses, gradients = [], []
    for net in (copy.deepcopy(model).double(), copy.deepcopy(fused).double()):  # such biases cost float32 three digits
        torch.manual_seed(1)  # dropout
        losses.append(nn.functional.cross_entropy(net(images.double()), labels))
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in net.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-9, atol=1e-12)
    assert max(g.abs().max() for n, g in gradients[0].items() if n not in gradients[1]) < 1e-12
    for net in (model, fused):  # running statistics of one step, which `expected` needs
        net(images)
    expected = model.eval()(images)
    torch.testing.assert_close(fused.eval()(images), expected, rtol=1e-3, atol=1e-4)
    # A state dict of it fits another, on another device or in another dtype biases go along, and so do copies.
    other = sk.fuse_batch_norm_(vgg19_cifar(width=0.125), take_biases=True)
    other.load_state_dict(fused.state_dict())
    for net in (fused, other, copy.deepcopy(fused), copy.deepcopy(fused).double().float()):
        back = sk.restore_batch_norm_(net)
        assert not any("taken" in name for name in back.state_dict())
        for (name, own), value in zip(back.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert all(isinstance(conv.bias, nn.Parameter) for conv in back.modules() if isinstance(conv, nn.Conv2d))
    # A layer that was replaced meanwhile adds no bias, so running means stay without it.
    fused = sk.fuse_batch_norm_(copy.deepcopy(model), take_biases=True)
    conv = fused.features[0]
    fused.features[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    fused.features[0].weight = conv.weight
    torch.testing.assert_close(sk.restore_batch_norm_(fused)(images), expected, rtol=1e-3, atol=1e-4)


class Biased(nn.Module):
    """Convolutions in front of batch norms whose biases somebody else needs, and one that nobody does."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("hooked", "read", "twice", "frozen", "own", "free"):
            conv = _OwnConv2d(3, 3, 1) if name == "own" else nn.Conv2d(3, 3, 1)
            setattr(self, name, nn.Sequential(conv, nn.BatchNorm2d(3)))
        self.hooked[0].register_forward_hook(lambda *args: None)
        self.frozen[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.hooked(x)) + self.read[0].bias.sum()
        y = self.twice[0](x)
        return self.free(self.own(self.frozen(self.twice[1](y) + y)))


class _OwnConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_biases_that_somebody_needs_stay() -> None:
    model = Biased()
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    sk.fuse_batch_norm_(model, take_biases=True)
    kept = [name for name, block in model.named_children() if block[0].bias is not None]
    assert kept == ["hooked", "read", "twice", "frozen", "own"]
    torch.testing.assert_close(model(x), expected)


def test_a_twin_shares_tensors_and_is_no_batch_norm_that_others_would_replace() -> None:
    norm = nn.BatchNorm2d(4).eval()
    twin = FusedBatchNorm2d.from_batch_norm(norm, "relu")
    assert twin.weight is norm.weight and twin.running_var is norm.running_var and not twin.training
    assert list(twin.state_dict()) == list(norm.state_dict()) and "epilogue='relu'" in repr(twin)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(twin))[0], FusedBatchNorm2d)
    assert twin.to_batch_norm().bias is norm.bias
    with pytest.raises(ValueError, match=r"^FusedBatchNorm2d: expected epilogue in"):
        FusedBatchNorm2d(4, epilogue="tanh")
    averaged = FusedBatchNorm2d(4, momentum=None, epilogue="relu")
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(averaged(x), plain(x, None, None, "relu"))
