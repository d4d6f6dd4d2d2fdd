"""The ways out of a converted model: `to_dense`, ONNX files, `torch.jit.trace`."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.conversion.layers import DROP_IN_LAYERS

SWAP_ALL = sk.Policy(min_speedup=0, measure=False, check_model=False)


class Net(nn.Module):
    """Convolutions with batch norm, ReLU and pool behind them, a residual, two thin layers, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        self.thin = nn.Sequential(nn.Conv2d(32, 4, 3, padding=1, bias=False), nn.Conv2d(4, 48, 1), nn.ReLU())
        self.hidden, self.act, self.last = nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.relu(self.norm(self.second(x)))
        x = self.thin(x).mean((2, 3))
        return self.last(self.act(self.hidden(x)))


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return sk.prune_(model.eval(), 0.75, (16, 1), layers=["first.0", "second", "hidden"], skip_first=False)


def drop_ins(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DROP_IN_LAYERS)]


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_way_back_restores_layers_and_what_was_fused_into_them() -> None:
    model, x = pruned(), torch.randn(2, 3, 12, 12)
    fast = sk.convert(model, x, policy=SWAP_ALL)
    assert {"first.0", "second", "thin.0", "hidden"} <= set(drop_ins(fast))
    before = copy.deepcopy(fast.state_dict())
    plain = sk.to_dense(fast)
    assert type(plain) is Net and drop_ins(plain) == [] and not plain.training
    assert [type(m) for m in plain.first] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.MaxPool2d]
    assert [type(m) for m in plain.thin] == [nn.Conv2d, nn.Conv2d, nn.ReLU]
    assert (type(plain.relu), type(plain.act)) == (nn.ReLU, nn.ReLU)
    for name in ("first.0", "second", "hidden"):
        assert zeros(plain.get_submodule(name).weight) == zeros(model.get_submodule(name).weight) > 0.7
    close(plain(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.train()  # the converted model warns here
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())
    with pytest.raises(ValueError, match=r"expected a model from slimkernels.convert, got a plain Net"):
        sk.explain(plain)
    again = sk.convert(plain.eval(), x, policy=SWAP_ALL)
    assert set(drop_ins(again)) == set(drop_ins(fast))
    close(again(x), model(x))


def test_factors_may_be_merged() -> None:
    fast = sk.convert(pruned(), torch.randn(2, 3, 12, 12), policy=SWAP_ALL)
    x = torch.randn(2, 3, 12, 12)
    plain = sk.to_dense(fast, merge_low_rank=True)
    assert tuple(plain.thin[0].weight.shape) == (48, 32, 3, 3) and type(plain.thin[1]) is nn.Identity
    close(plain(x), fast(x))


@pytest.mark.parametrize("kind", ["svd", "tai", "tucker2"])
def test_modules_that_convert_did_not_make_become_sequentials(kind: str) -> None:
    ranks = (5, 7) if kind == "tucker2" else (5,)
    low_rank = sk.nn.LowRankConv2d(
        8, 16, (3, 5), (2, 1), (1, 2), (1, 2), kind=kind, ranks=ranks, epilogue="relu"
    ).requires_grad_(False)
    sparse = sk.nn.BlockSparseConv2d.from_dense(nn.Conv2d(16, 16, 3), (16, 1), epilogue="relu_maxpool2")
    linear = sk.nn.LowRankLinear(20, 12, 3, bias=False)
    shared = nn.Sequential(low_rank, sparse, nn.Flatten(0, -2), linear, nn.Linear(12, 20), linear).eval()
    x = torch.randn(2, 8, 11, 46)
    plain = sk.to_dense(shared)
    assert drop_ins(plain) == [] and plain[3] is plain[5]
    assert [type(m) for m in plain[1]] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert all(isinstance(m, nn.Conv2d) for m in plain[0][:-1]) and len(plain[0]) == len(low_rank.factors) + 1
    assert not any(p.requires_grad for p in plain[0].parameters()) and plain[3][0].weight.requires_grad
    close(plain(x), shared(x))
    close(sk.to_dense(low_rank)(x), low_rank(x))  # the model itself


def test_a_model_converted_for_training_comes_back_masked() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 16))
    sk.prune_(model, 0.5, (16, 1), layers=["0", "3"], skip_first=False)
    fast = sk.convert(model, policy=SWAP_ALL, training=True)
    assert drop_ins(fast) == ["0", "3"]
    plain = sk.to_dense(fast)
    assert plain.training and set(sk.masks(plain)) == {"0", "3"}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.randn(4, 16, 6, 6)).square().mean().backward()
    optimizer.step()
    assert zeros(plain[0].weight) == zeros(plain[3].weight) == 0.5
    x = torch.randn(2, 16, 6, 6)
    close(sk.finalize_(plain.eval())(x), sk.to_dense(sk.convert(plain, x, policy=SWAP_ALL))(x))


def test_refusals_of_to_dense() -> None:
    with pytest.raises(TypeError, match=r"to_dense: expected an nn.Module, got int"):
        sk.to_dense(3)


class Trainable(nn.Module):
    """A model whose drop-in layers want gradients, and so read no pack while torch records gradients."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(16, 32, 3)
        self.sparse = sk.nn.BlockSparseConv2d.from_dense(conv, (16, 1), torch.rand(2, 16 * 9) < 0.3, "relu")
        self.low = sk.nn.LowRankConv2d(32, 32, 3, kind="tai", ranks=(40,))
        self.head = sk.nn.LowRankLinear(32, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.low(self.sparse(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.parametrize("made", ["converted", "trainable"])
@pytest.mark.parametrize("grad", [True, False])
def test_traced_models_hold_for_other_batches_and_through_a_file(made: str, grad: bool) -> None:
    """Torch traces twice, once with gradients on and once off, and refuses a model that records another program."""
    x = torch.randn(2, 3, 12, 12) if made == "converted" else torch.randn(2, 16, 9, 9)
    model = sk.convert(pruned(), x, policy=SWAP_ALL) if made == "converted" else Trainable().eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    z = torch.randn(5, *x.shape[1:])
    for program in (traced, torch.jit.load(file), torch.jit.freeze(traced)):
        close(program(z), model(z))
    if made == "trainable":
        z.requires_grad_()
        gradients = [torch.autograd.grad(m(z).square().sum(), z)[0] for m in (model, traced)]
        close(*gradients)


def test_onnx_files_compute_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript; pip install 'slimkernels[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 12, 12)
    fast = sk.convert(pruned(), x, policy=SWAP_ALL)
    path = tmp_path / "net.onnx"
    sk.export_onnx(fast, path, x, dynamic_batch=True, input_names=["images"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        z = torch.randn(batch, 3, 12, 12)
        (got,) = session.run(None, {"images": z.numpy()})
        close(torch.from_numpy(got), fast(z))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": 3}, TypeError, "export_onnx: expected an nn.Module, got int"),
        (
            {"model": nn.Linear(2, 2)},
            ValueError,
            r"export_onnx: expected a model in eval mode.*call model.eval\(\)",
        ),
        ({"example_inputs": None}, ValueError, "export_onnx: expected one example input, got None"),
        ({"example_inputs": [torch.ones(1, 2)] * 2}, ValueError, "export_onnx: expected one example input, got 2"),
    ],
)
def test_refusals_of_export_onnx(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkernels.inference.onnx_export._NEEDED", ())
    arguments: dict[str, Any] = {"model": nn.Linear(2, 2).eval(), "example_inputs": torch.ones(1, 2), **change}
    with pytest.raises(error, match=message):
        sk.export_onnx(arguments["model"], tmp_path / "x.onnx", arguments["example_inputs"])
    assert not list(tmp_path.iterdir())


def test_export_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r"got no onnxscript; install them with: pip install 'slimkernels\[onnx\]'"):
        sk.export_onnx(nn.Linear(2, 2).eval(), tmp_path / "x.onnx", torch.ones(1, 2))
