"""Whole networks: converted VGG-19/CIFAR-10 against the fastest dense one of the same run.

On a CPU dense is the best of eager (batch norm folded, channels_last or contiguous), torch.compile with freezing, and
OpenVINO and ONNX Runtime where they are installed. On a GPU, in bf16, it is the best of cuDNN channels_last eager, the
same in a CUDA graph with and without cuDNN's fused ReLU, and torch.compile (``--compile MODE``); ours is replayed from
a CUDA graph too, every pruned layer swapped, each checked at the full batch. Weights are random and pruned by magnitude
in every convolution but the first: speed depends on which blocks are zero, not on the values kept. The cost model's
prediction for the swapped layers stands beside the measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from gpu_check import correctness, layers
from gpu_check import rows as gpu_rows
from torch import Tensor, nn

from slimkernels import models, timing
from slimkernels.cli import bench
from slimkernels.cli.peers import cpu_peers
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.conversion.plan import Policy
from slimkernels.dispatch.select import KernelChoice, predicted_dense_seconds, predicted_seconds
from slimkernels.inference import LayerKernel, graphed, warm_up
from slimkernels.kernels import KERNELS
from slimkernels.models import vgg19_cifar
from slimkernels.nn import BlockSparseConv2d

# Sparsity, batch, block shape, and whether ours is recorded (`slimkernels.graphed`) or called module by module.
ROWS = [(s, b, (16, 1), r) for b in (1, 16, 128) for s in (0.75, 0.875, 0.95) for r in (True, False)]
# (1, 1) is unstructured sparsity.
OTHER_BLOCKS = [
    *((0.875, 16, shape, True) for shape in ((32, 1), (8, 1), (4, 1), (1, 1), (16, 4), (16, 16))),
    *((0.875, 128, shape, True) for shape in ((4, 1), (1, 1))),
]
SMOKE = (0.875, 1, (16, 1), True)


def sample() -> torch.Tensor:
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def dense_model() -> nn.Module:
    torch.manual_seed(0)
    return bench.calibrated(bench.with_random_norms(vgg19_cifar()), sample())


@lru_cache(maxsize=8)
def pruned_model(sparsity: float, block_shape: tuple[int, int]) -> nn.Module:
    model = prune_(copy.deepcopy(dense_model()), sparsity, block_shape, layers="features.*")
    return bench.calibrated(finalize_(model), sample())


@lru_cache(maxsize=4)
def dense_baselines(batch: int, compile: bool) -> dict[str, Any]:
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    found = timing.best_dense(dense_model(), x, compile=compile)
    return found | (cpu_peers(dense_model(), x, print) if compile else {})


def predicted_ms(fast: nn.Module, x: Tensor) -> tuple[float, float]:
    """``(ours, dense)`` of the swapped layers by the cost model, in milliseconds; launches of both sides counted."""
    layers = warm_up(fast, x, calls=2).kernels
    ours = sum(predicted_seconds(KERNELS[k.kernel], k.problem, k.config) for k in layers)
    return 1e3 * ours, 1e3 * sum(predicted_dense_seconds(k.problem) for k in layers)


def row_name(row: tuple[float, int, tuple[int, int], bool]) -> str:
    sparsity, batch, (block_out, block_in), recorded = row
    return f"{sparsity:.1%}-batch{batch}-{block_out}x{block_in}-{'recorded' if recorded else 'modules'}"


@pytest.mark.parametrize(
    ("sparsity", "batch", "block_shape", "recorded"), ROWS + OTHER_BLOCKS, ids=map(row_name, ROWS + OTHER_BLOCKS)
)
def test_vgg19_cifar(
    race: Any,
    smoke: bool,
    device: str,
    request: pytest.FixtureRequest,
    sparsity: float,
    batch: int,
    block_shape: tuple[int, int],
    recorded: bool,
) -> None:
    if smoke and (sparsity, batch, block_shape, recorded) != SMOKE:
        pytest.skip("not in the smoke run")
    if device != "cpu":
        pytest.skip("rows for the CPU")
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    model = pruned_model(sparsity, block_shape)
    fast = convert(model, example_inputs=(x,))
    ratio = bench.error_ratio(model, fast, sample())
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    x = x.contiguous(memory_format=torch.channels_last)
    served = graphed(fast, x) if recorded else fast
    sparse_peer = peers.deepsparse_seconds(request.config.getoption("--deepsparse"), model, x, race.seconds)
    timings = race.run(lambda: served(x), dense_baselines(batch, compile=not smoke))
    ours, dense = timings["contender"], timings["best"]
    plan: Any = fast.slimkernels_plan
    predicted, predicted_dense = predicted_ms(fast, x)
    race.benchmark.extra_info.update(
        suite="vgg", network="vgg19_cifar", weights="random, pruned by magnitude", sparsity=sparsity, batch=batch,
        block_shape=block_shape, match=True, error_ratio=ratio, swapped=len(plan.swapped), **ours.as_ms(),
        dense_p50_ms=dense.p50 * 1e3, dense_p20_ms=dense.p20 * 1e3, dense_p80_ms=dense.p80 * 1e3, dense_n=dense.n,
        baselines_p50_ms={k: v.p50 * 1e3 for k, v in timings.items() if k not in ("contender", "best")},
        speedup=dense.p50 / ours.p50, images_per_s=batch / ours.p50, threads=torch.get_num_threads(),
        predicted_ms=predicted, predicted_dense_ms=predicted_dense, recorded=recorded,
        **({} if sparse_peer is None else {"deepsparse_p50_ms": sparse_peer * 1e3}),
    )  # fmt: skip


@lru_cache(maxsize=1)
def low_rank_model() -> nn.Module:
    model = copy.deepcopy(dense_model())
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name, rank in zip(convs, bench.SLIMNETS_RANKS, strict=True):
        factorize_(model, "tai", rank=rank, layers=[name])
    return bench.calibrated(model, sample())


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_vgg19_cifar_low_rank(race: Any, smoke: bool, device: str, batch: int) -> None:
    """The paper's low-rank VGG-19, which it measured at 1.02 times the speed of the dense one."""
    if device != "cpu" or (smoke and batch > 1):
        pytest.skip("rows for the CPU" if device != "cpu" else "not in the smoke run")
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    x = x.contiguous(memory_format=torch.channels_last)
    model = low_rank_model()
    fast = convert(model, example_inputs=(x,), policy=Policy(merge_low_rank=False))
    ratio = bench.error_ratio(model, fast, sample())
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the factorized network"
    served = graphed(fast, x)
    timings = race.run(lambda: served(x), dense_baselines(batch, compile=not smoke))
    ours, dense = timings["contender"], timings["best"]
    plan: Any = fast.slimkernels_plan
    race.benchmark.extra_info.update(
        suite="vgg", network="vgg19_cifar, low rank", weights="random, factorized", sparsity=0.0, batch=batch,
        block_shape=(1, 1), match=True, error_ratio=ratio, swapped=len(plan.swapped), **ours.as_ms(),
        dense_p50_ms=dense.p50 * 1e3, dense_p20_ms=dense.p20 * 1e3, dense_p80_ms=dense.p80 * 1e3, dense_n=dense.n,
        baselines_p50_ms={k: v.p50 * 1e3 for k, v in timings.items() if k not in ("contender", "best")},
        speedup=dense.p50 / ours.p50, images_per_s=batch / ours.p50, threads=torch.get_num_threads(), recorded=True,
    )  # fmt: skip


def fitting_blocks(model: nn.Module, block_shape: tuple[int, int]) -> dict[tuple[int, int], list[str]]:
    """Block shape -> convolutions, the first left out: ``block_out`` at most a layer's output channels."""
    groups: dict[tuple[int, int], list[str]] = {}
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name, conv in convs[1:]:
        groups.setdefault((min(block_shape[0], conv.out_channels), block_shape[1]), []).append(name)
    return groups


@lru_cache(maxsize=2)
def gpu_dense_model(network: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(32, *models.input_shape(network))
    model = bench.with_random_norms(models.build(network, models.default_classes(network)))
    return bench.calibrated(model.to(device), x.to(device)).requires_grad_(False)


@lru_cache(maxsize=3)
def gpu_pruned_model(network: str, sparsity: float, block_shape: tuple[int, int], device: str) -> nn.Module:
    model = copy.deepcopy(gpu_dense_model(network, device))
    for shape, names in fitting_blocks(model, block_shape).items():
        prune_(model, sparsity, shape, layers=names)
    x = torch.randn(32, *models.input_shape(network), generator=torch.Generator().manual_seed(0))
    return bench.calibrated(finalize_(model), x.to(device))


@lru_cache(maxsize=2)
def gpu_baselines(network: str, batch: int, mode: str | None) -> dict[str, Callable[[], Any]]:
    x = torch.randn(batch, *models.input_shape(network), device="cuda", dtype=torch.bfloat16)
    dense = copy.deepcopy(gpu_dense_model(network, "cuda")).bfloat16()
    return peers.gpu_dense(dense, x, print, compile=mode)


def checked_layers(kernels: Iterable[LayerKernel], known: Iterable[Path]) -> list[dict[str, Any]]:
    """Kernel and configuration of every layer, each compared with float64 at the full batch, here if not yet elsewhere.

    Args:
        known: files of rows of `gpu_check.correctness` or `gpu_check.sweep`.
    """
    right = {row["key"] for path in known for row in gpu_rows.read(path) if row.get("match") and "key" in row}
    found: list[dict[str, Any]] = []
    for k in kernels:
        key = layers.choice_key(k.problem, k.kernel, k.config)
        if key not in right:
            row = correctness.check(k.problem, KernelChoice(k.kernel, k.config))
            assert row["match"], f"{k.layer}: {'; '.join(row['errors'])}"
            right.add(key)
        found.append({"layer": k.layer, "kernel": k.kernel, "config": dict(k.config)})
    return found


def counts_of_kernels(info: dict[str, Any], ours: Callable[[], Any], dense: Callable[[], Any]) -> None:
    """Adds to a row how many kernels both sides launch, and how long each of them takes."""
    for side, call in (("", ours), ("dense_", dense)):
        kernels, launches = peers.kernel_times(call)
        info[f"{side}kernels"] = round(sum(kernel["calls"] for kernel in kernels))
        info |= {f"{side}kernel_times": kernels, f"{side}kernel_launches": launches}


@pytest.mark.parametrize("row", layers.ROWS.values(), ids=layers.ROWS)
def test_vgg_gpu(
    race: Any, smoke: bool, device: str, request: pytest.FixtureRequest, afterwards: list[Callable[[], None]],
    row: layers.NetworkRow,
) -> None:  # fmt: skip
    if smoke and row is not layers.ROWS["batch_1"]:
        pytest.skip("not in the smoke run")
    model = gpu_pruned_model(row.network, row.sparsity, row.block_shape, device)
    pruned = [name for names in fitting_blocks(model, row.block_shape).values() for name in names]
    if device != "cuda":
        all_swapped(model, torch.randn(2, *models.input_shape(row.network)), row.block_shape)
        pytest.skip("every pruned layer was swapped; timing the network needs a GPU")
    x = torch.randn(row.batch, *models.input_shape(row.network), generator=torch.Generator().manual_seed(row.batch))
    x = x.cuda().bfloat16().contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(model).bfloat16()
    fast = all_swapped(half, x, row.block_shape)
    if row.kernel != "auto":
        if KERNELS[row.kernel].available() is not None:
            pytest.skip(f"{row.kernel}: {KERNELS[row.kernel].available()}")
        for layer in fast.modules():
            if isinstance(layer, BlockSparseConv2d):
                layer.kernel = row.kernel
    run = checked_layers(warm_up(fast, x, calls=2).kernels, request.config.getoption("--checks"))
    predicted, predicted_dense = predicted_ms(fast, x)
    torch.backends.cudnn.benchmark = False  # it would try every algorithm on float64
    ratio = bench.error_ratio(half, fast, x, "cuda")
    torch.backends.cudnn.benchmark = True
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    ours = peers.Replay(fast, x)
    mode = request.config.getoption("--compile")
    baselines = gpu_baselines(row.network, row.batch, None if mode == "none" else mode)
    timings = race.run(ours, baselines)
    own, dense = timings["contender"], timings["best"]
    served = graphed(fast, x)
    with_copies = timing.interleaved({"served": lambda: served(x)}, seconds=0.05)["served"]
    info = race.benchmark.extra_info
    info.update(
        suite="vgg", network=row.network, weights="random, pruned by magnitude", sparsity=row.sparsity, batch=row.batch,
        block_shape=row.block_shape, match=True, error_ratio=ratio, swapped=len(pruned), **own.as_ms(),
        dense_p50_ms=dense.p50 * 1e3, dense_p20_ms=dense.p20 * 1e3, dense_p80_ms=dense.p80 * 1e3, dense_n=dense.n,
        baselines_p50_ms={k: v.p50 * 1e3 for k, v in timings.items() if k not in ("contender", "best")},
        speedup=dense.p50 / own.p50, images_per_s=row.batch / own.p50, threads=torch.get_num_threads(),
        predicted_ms=predicted, predicted_dense_ms=predicted_dense, served_p50_ms=with_copies.p50 * 1e3, layers=run,
        dtype="bfloat16", recorded=True,
    )  # fmt: skip
    best = min(baselines, key=lambda name: timings[name].p50)
    kernels: dict[str, Any] = {"suite": "kernel_counts", "name": request.node.name, "match": True}

    def count() -> None:
        counts_of_kernels(kernels, ours, baselines[best])
        info.update({name: value for name, value in kernels.items() if "kernel" in name})
        gpu_rows.append(request.config.getoption("--rows"), kernels)

    afterwards.append(count)


def all_swapped(model: nn.Module, x: Tensor, block_shape: tuple[int, int]) -> nn.Module:
    """The model converted, every pruned layer to our kernels: a row that left one dense would compare dense with dense.

    The layers that were not pruned may take their ReLU into a dense kernel.
    """
    groups = fitting_blocks(model, block_shape)
    policy = Policy(measure=False, min_speedup=0.0, check_model=False, dense_layers=False, block_shapes=tuple(groups))
    fast = convert(model, example_inputs=(x,), policy=policy)
    plan: Any = fast.slimkernels_plan
    swapped = {layer.name: layer.kernel for layer in plan.layers if layer.format not in (None, "fused")}
    pruned = {name for names in groups.values() for name in names}
    assert swapped.keys() == pruned, sorted(swapped.keys() ^ pruned)
    assert not [name for name, kernel in swapped.items() if kernel.endswith("__reference")], swapped
    return fast
