"""Networks of several kinds, dense, converted, and recorded, in one run: on a CPU, or on a GPU in bf16.

Block-sparse ResNets and a VGG-16 on images of 224x224, and VGG-19 and SlimNets' NIN with single zero weights, which is
what most pruned checkpoints hold. Dense is the fastest of eager PyTorch, torch.compile, ONNX Runtime and OpenVINO;
``--deepsparse PYTHON`` adds DeepSparse with the same zeros. Weights are random and pruned by magnitude. The converted
network is timed called as it is and recorded by `slimkernels.graphed`, both in the same bursts as the dense ones. On a
GPU dense is the fastest of eager PyTorch, CUDA graphs and, for the largest network, torch.compile in a CUDA graph
(``--compile``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from slimkernels import models, timing
from slimkernels.cli import bench
from slimkernels.cli.peers import cpu_peers
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.conversion.plan import Policy
from slimkernels.inference import graphed


@dataclass(frozen=True)
class Row:
    """A network, its zeros and a batch size; (1, 1) is unstructured sparsity."""

    network: str
    sparsity: float
    block_shape: tuple[int, int]
    batch: int

    def __str__(self) -> str:
        block_out, block_in = self.block_shape
        return f"{self.network}-{self.sparsity:.1%}-{block_out}x{block_in}-batch{self.batch}"


ROWS = (
    *(Row("vgg19_cifar", 0.875, (16, 1), batch) for batch in (1, 16, 128)),
    *(Row("vgg19_cifar", 0.875, (1, 1), batch) for batch in (1, 16, 128)),
    *(Row("nin_cifar", 0.875, (1, 1), batch) for batch in (1, 128)),
    *(Row("resnet18", 0.9, (16, 1), batch) for batch in (1, 8)),
    *(Row("resnet50", 0.9, (16, 1), batch) for batch in (1, 8)),
    *(Row("vgg16", 0.9, (16, 1), batch) for batch in (1, 8)),
)
SMOKE = Row("nin_cifar", 0.875, (1, 1), 1)
# Rows of one network follow each other, so that it is made once; the most telling come first.
GPU_ROWS = (
    *(Row("resnet50", 0.9, (64, 16), batch) for batch in (32, 1)),
    *(Row("nin_cifar", 0.875, (32, 16), batch) for batch in (1024, 1)),
    Row("resnet18", 0.9, (64, 16), 32),
)
GPU_SMOKE = GPU_ROWS[3]
# The rows that torch.compile takes part in: it takes some 20 s a network, and for VGG-19 cuDNN's fused kernels in a
# CUDA graph were 6% faster (712b384).
GPU_COMPILED = GPU_ROWS[:1]
# Images that batch norms take their statistics from, and on which outputs are compared in float64.
SAMPLES = 8


def images(network: str, count: int) -> Tensor:
    """Random images in channels_last, the same ones each time."""
    x = torch.randn(count, *models.input_shape(network), generator=torch.Generator().manual_seed(count))
    return x.contiguous(memory_format=torch.channels_last)


# Of the batch norm at the end of a residual block, which is zero where training begins and stays small. As large as the
# others it lets fifty layers of bf16 round the output of a random network by an eighth, and nothing can be compared.
LAST_NORM = 0.25


@torch.no_grad()
def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode with activations of one size from layer to layer on x.

    Batch norms hold the statistics that they see; without any, the weights of convolutions are scaled. Otherwise what a
    pruned random network returns is its last bias alone, and says nothing about the layers in front of it.
    """

    def scale(conv: Any, args: Any, y: Tensor) -> Tensor:
        bias = conv.bias.reshape(1, -1, 1, 1)
        factor = 1 / (y - bias).std()
        conv.weight.mul_(factor)
        return (y - bias) * factor + bias

    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return bench.calibrated(model, x)
    hooks = [m.register_forward_hook(scale) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return model


@lru_cache(maxsize=1)
def dense_model(network: str) -> nn.Module:
    torch.manual_seed(0)
    model = bench.with_random_norms(models.build(network, models.default_classes(network)))
    for block in model.modules():
        last: Any = getattr(block, "bn3", getattr(block, "bn2", None))  # of torchvision's residual blocks
        for parameter in () if last is None else (last.weight, last.bias):
            parameter.data.mul_(LAST_NORM)
    return calibrated(model, images(network, SAMPLES))


@lru_cache(maxsize=1)
def pruned_model(network: str, sparsity: float, block_shape: tuple[int, int]) -> nn.Module:
    model = finalize_(prune_(copy.deepcopy(dense_model(network)), sparsity, block_shape))
    return calibrated(model, images(network, SAMPLES))


def note(
    race: Any, row: Row, fast: nn.Module, ratio: float, timings: dict[str, timing.Timing], baselines: Iterable[str]
) -> None:
    """A row's numbers: the recording, the converted network called as it is, and the dense baselines."""
    ours, called, best = timings["contender"], timings["converted"], timings["best"]
    plan: Any = fast.slimkernels_plan
    race.benchmark.extra_info.update(
        suite="networks", network=row.network, weights="random, pruned by magnitude", sparsity=row.sparsity,
        batch=row.batch, block_shape=row.block_shape, match=True, error_ratio=ratio, swapped=len(plan.swapped),
        **ours.as_ms(), converted_p50_ms=called.p50 * 1e3, converted_p20_ms=called.p20 * 1e3,
        converted_p80_ms=called.p80 * 1e3, dense_p50_ms=best.p50 * 1e3, dense_p20_ms=best.p20 * 1e3,
        dense_p80_ms=best.p80 * 1e3, dense_n=best.n,
        baselines_p50_ms={name: timings[name].p50 * 1e3 for name in baselines},
        speedup=best.p50 / ours.p50, images_per_s=row.batch / ours.p50, threads=torch.get_num_threads(),
    )  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_network(race: Any, smoke: bool, device: str, request: pytest.FixtureRequest, row: Row) -> None:
    if smoke and row != SMOKE:
        pytest.skip("not in the smoke run")
    if device != "cpu":
        pytest.skip("rows for the CPU")
    x = images(row.network, row.batch)
    dense, model = dense_model(row.network), pruned_model(row.network, row.sparsity, row.block_shape)
    fast = convert(model, example_inputs=(x,), policy=Policy(serve=graphed))  # what is timed is the recording
    ratio = bench.error_ratio(model, fast, images(row.network, SAMPLES))
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    recorded = graphed(fast, x)
    sparse_peer = peers.deepsparse_seconds(request.config.getoption("--deepsparse"), model, x, race.seconds)
    baselines = timing.best_dense(dense, x, compile=not smoke) | ({} if smoke else cpu_peers(dense, x, print))
    timings = race.run(lambda: recorded(x), baselines, beside={"converted": lambda: fast(x)})
    note(race, row, fast, ratio, timings, baselines)
    if sparse_peer is not None:
        race.benchmark.extra_info["deepsparse_p50_ms"] = sparse_peer * 1e3


@pytest.mark.parametrize("row", GPU_ROWS, ids=str)
def test_network_gpu(race: Any, smoke: bool, device: str, request: pytest.FixtureRequest, row: Row) -> None:
    """As `sk.convert` decides on this GPU, recorded; both sides in CUDA graphs, the copies of inputs and outputs left
    out.
    """
    if device != "cuda":
        pytest.skip("rows for a GPU")
    if smoke and row != GPU_SMOKE:
        pytest.skip("not in the smoke run")

    def on_device(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(device, torch.bfloat16)

    x = images(row.network, row.batch).to(device, torch.bfloat16)
    dense = on_device(dense_model(row.network))
    model = on_device(pruned_model(row.network, row.sparsity, row.block_shape))
    fast = convert(model, example_inputs=(x,), policy=Policy(measure=not smoke, serve=graphed))
    torch.backends.cudnn.benchmark = False  # it would try every algorithm on float64
    compared = images(row.network, max(SAMPLES, row.batch)).to(device, torch.bfloat16)
    ratio = bench.error_ratio(model, peers.in_batches(fast, row.batch), compared, device)
    # As folding rounds weights to bf16 once more, the dense network that counts is the folded one.
    ratio /= bench.error_ratio(model, timing.fold_batch_norm(model), compared, device)
    torch.backends.cudnn.benchmark = True  # on both sides, before anything is captured
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    served = graphed(fast, x)
    mode = request.config.getoption("--compile")
    baselines = peers.gpu_dense(dense, x, print, compile=mode if mode != "none" and row in GPU_COMPILED else None)
    timings = race.run(peers.Replay(fast, x), baselines, beside={"served": lambda: served(x)})
    # On their own: from Python a call at batch 1 takes twenty times as long as its kernels.
    timings |= timing.interleaved({"converted": lambda: fast(x)}, seconds=0.05)
    note(race, row, fast, ratio, timings, baselines)
    race.benchmark.extra_info.update(
        served_p50_ms=timings["served"].p50 * 1e3, graph_ms=peers.graph_ms(served), **peers.decisions(fast, served)
    )
