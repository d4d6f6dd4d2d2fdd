"""What the rows of whole networks on a GPU are made of: random networks that can be compared, and dense baselines."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path
from types import SimpleNamespace

import bench_checkpoints
import bench_networks
import peers
import pytest
import torch
import torch.fx
from stand_in import device_tensor
from torch import Tensor, nn

from slimkernels import LayerPlan, ModelPlan, timing
from slimkernels.models import build


@pytest.fixture(autouse=True)
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in device_tensor.CUDNN.items():
        monkeypatch.setattr(torch, name, call)


@pytest.mark.parametrize(
    ("network", "convolutions", "with_additions"), [("resnet18", 9, 17), ("nin_cifar", 9, 9), ("vgg11_cifar", 8, 8)]
)
def test_relus_and_additions_are_fused(network: str, convolutions: int, with_additions: int) -> None:
    """Every convolution with a ReLU behind it, but none whose addition would be left out."""
    torch.manual_seed(0)
    model = timing.fold_batch_norm(build(network, 10).eval())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for additions, count in ((False, convolutions), (True, with_additions)):
            fused = peers.fused_by_cudnn(model, additions)
            assert sum(isinstance(m, peers._Fused) for m in fused.modules()) == count
            torch.testing.assert_close(fused(x), expected)
    assert not any(isinstance(m, peers._Fused) for m in model.modules())


class Branches(nn.Module):
    """A convolution that is read twice, an addition that is, and one of two inputs that are no convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = self.relu(a) + a
        z = y + self.b(x)
        return self.relu(z) * z + self.relu(y + x) + self.relu(torch.add(x, self.c(x)))


def test_what_is_read_elsewhere_stays() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        for additions in (False, True):
            fused = peers.fused_by_cudnn(model, additions)
            assert sum(isinstance(m, peers._Fused) for m in fused.modules()) == additions
            torch.testing.assert_close(fused(x), model(x))


def test_a_residual_network_has_a_baseline_with_fused_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Replay", lambda module, x: lambda: module(x))
    torch.manual_seed(0)
    notes: list[str] = []
    name = "CUDA graph, addition and ReLU fused by cuDNN"
    for network, expected in (("resnet18", True), ("vgg11_cifar", False)):
        found = peers.gpu_dense(build(network, 10).eval(), torch.randn(1, 3, 32, 32), notes.append, compile=None)
        assert (name in found) == expected and len(found) == 3 + expected and not notes


@pytest.mark.parametrize("network", ["nin_cifar", "resnet18"])
def test_pruned_random_networks_can_be_compared(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their outputs follow the images, and rounding to bf16 stays far below what `convert` allows."""
    monkeypatch.setattr(bench_networks.models, "input_shape", lambda name: (3, 32, 32))
    for made in (bench_networks.dense_model, bench_networks.pruned_model):
        made.cache_clear()
    model = bench_networks.pruned_model(network, 0.9, (32, 16))
    for made in (bench_networks.dense_model, bench_networks.pruned_model):
        made.cache_clear()
    x = bench_networks.images(network, 4)
    with torch.no_grad():
        y = model(x)
        half = timing.fold_batch_norm(model).bfloat16()(x.bfloat16())
    size = y.square().mean().sqrt()
    assert (y - y.mean(0)).square().mean().sqrt() > 0.01 * size
    assert (half - y).square().mean().sqrt() < 0.05 * size
    assert any(isinstance(m, nn.Conv2d) and (m.weight == 0).any() for m in model.modules())


def test_a_served_graph_is_timed_alone() -> None:
    plain = SimpleNamespace(recordings={"": SimpleNamespace(seconds=lambda: 2e-3)})
    chain = SimpleNamespace(recordings={"": SimpleNamespace(replay=SimpleNamespace(seconds=lambda: 3e-3))})
    assert (peers.graph_ms(plain), peers.graph_ms(chain)) == (2, 3)


def test_a_row_says_what_was_decided() -> None:
    plan = ModelPlan(
        (
            LayerPlan("0", "Conv2d", "keep", weight_shape=(8, 8, 3, 3), dense_ms=(2.0,), sparse_ms=(3.0,)),
            LayerPlan("1", "ReLU", "keep"),
        ),
        "measured",
        notes=("a note",),
    )
    found = peers.decisions(SimpleNamespace(slimkernels_plan=plan), "a CUDA graph")
    (layer,) = found["decisions"]
    assert (layer["layer"], layer["runs"], layer["dense_ms"], layer["other_ms"]) == ("0", None, (2.0,), (3.0,))
    assert found["notes"] == ["a note"] and found["recording"] == "'a CUDA graph'"


def test_a_model_is_called_with_a_batch_at_a_time() -> None:
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x + 1

    x = torch.randn(7, 2)
    assert torch.equal(peers.in_batches(model, 3)(x), x + 1) and sizes == [3, 3, 1]


def test_rows_of_a_network_follow_each_other() -> None:
    """It is made for each of them otherwise; and the row of the rehearsal is the smallest."""
    networks = [name for name, _ in itertools.groupby(bench_networks.GPU_ROWS, operator.attrgetter("network"))]
    assert len(set(networks)) == len(networks)
    assert bench_networks.GPU_SMOKE.batch == 1 and bench_networks.GPU_SMOKE.network == "nin_cifar"
    assert set(bench_networks.GPU_COMPILED) < set(bench_networks.GPU_ROWS)


def test_a_gpu_takes_files_whose_blocks_it_multiplies() -> None:
    names = [file.name for file in bench_checkpoints.FILES if bench_checkpoints.for_a_gpu(file)]
    assert names == [f"pruned-and-distilled-128x16-{zeros}.slim.safetensors" for zeros in ("92.0", "95.0", "98.0")]
    other = Path(bench_checkpoints.RESULTS) / "amd" / "slimnets" / names[0]
    assert not bench_checkpoints.for_a_gpu(other)
