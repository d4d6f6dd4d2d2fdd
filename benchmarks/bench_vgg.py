"""Whole networks: converted VGG-19/CIFAR-10 against the fastest dense one of the same run.

Dense is the best of eager (batch norm folded, channels_last or contiguous) and torch.compile with freezing. Weights are
random and pruned by magnitude in every convolution but the first: speed depends on which blocks are zero, not on the
values kept.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from slimkernels import timing
from slimkernels.cli import bench
from slimkernels.compress.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.models import vgg19_cifar

ROWS = [(s, b, (16, 1)) for b in (1, 16, 128) for s in (0.75, 0.875, 0.95)]
OTHER_BLOCKS = [(0.875, 16, (32, 1)), (0.875, 16, (8, 1)), (0.875, 16, (16, 4)), (0.875, 16, (16, 16))]
SMOKE = (0.875, 1, (16, 1))


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
    return timing.best_dense(dense_model(), x, compile=compile)


@pytest.mark.parametrize(("sparsity", "batch", "block_shape"), ROWS + OTHER_BLOCKS)
def test_vgg19_cifar(
    race: Any, smoke: bool, device: str, sparsity: float, batch: int, block_shape: tuple[int, int]
) -> None:
    if smoke and (sparsity, batch, block_shape) != SMOKE:
        pytest.skip("not in the smoke run")
    if device != "cpu":
        pytest.skip("rows of this suite are for the CPU")
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    model = pruned_model(sparsity, block_shape)
    fast = convert(model, example_inputs=(x,))
    ratio = bench.error_ratio(model, fast, x[:4])
    assert ratio <= 2, f"error against float64 is {ratio:.2f} times that of the dense network"
    x = x.contiguous(memory_format=torch.channels_last)
    timings = race.run(lambda: fast(x), dense_baselines(batch, compile=not smoke))
    ours, dense = timings["contender"], timings["best"]
    plan: Any = fast.slimkernels_plan
    race.benchmark.extra_info.update(
        suite="vgg", network="vgg19_cifar", weights="random, pruned by magnitude", sparsity=sparsity, batch=batch,
        block_shape=block_shape, match=True, error_ratio=ratio, swapped=len(plan.swapped), **ours.as_ms(),
        dense_p50_ms=dense.p50 * 1e3, dense_p20_ms=dense.p20 * 1e3, dense_p80_ms=dense.p80 * 1e3, dense_n=dense.n,
        baselines_p50_ms={k: v.p50 * 1e3 for k, v in timings.items() if k not in ("contender", "best")},
        speedup=dense.p50 / ours.p50, images_per_s=batch / ours.p50, threads=torch.get_num_threads(),
    )  # fmt: skip
