"""`slimkernels bench`: a whole network, dense against converted, over sparsities and batch sizes.

The weights are random, and pruned by magnitude: speed depends on which blocks are zero, not on the values kept. Every
converted network is checked against its own dense twin before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import models, timing
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.conversion.plan import ModelPlan, Policy
from slimkernels.inference import graphed

# A converted network may be at most twice as far from float64 as torch's dense network in the same dtype. Of a handful
# of outputs the ratio is mostly chance: 0.97 to 2.07 for VGG-19 on one image, 1.42 to 1.51 on 64.
_MAX_ERROR_RATIO = 2.0
_COMPARED_IMAGES = 64


@dataclass(frozen=True)
class Row:
    """One measurement: the converted network at a sparsity and batch size beside the fastest dense one of the same run.

    ``dense`` and ``converted`` hold p20_ms, p50_ms, p80_ms and n; ``baselines`` maps every dense baseline to its
    p50_ms; ``speedup`` is the dense p50 over the converted p50; ``images_per_s`` is of the converted network.
    """

    sparsity: float
    batch: int
    baseline: str
    dense: dict[str, float | int]
    converted: dict[str, float | int]
    baselines: dict[str, float | int]
    speedup: float
    images_per_s: float
    swapped_layers: int


@dataclass(frozen=True)
class BenchResult:
    """Rows, what was measured, where, and notes about baselines that could not run."""

    model: str
    weights: str
    block_shape: tuple[int, int]
    rows: list[Row]
    notes: list[str]
    environment: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return asdict(self)


def run_bench(
    model: str = "vgg19_cifar",
    *,
    sparsities: Sequence[float] = (0.75, 0.875, 0.95),
    batches: Sequence[int] = (1, 16, 128),
    block_shape: tuple[int, int] = (16, 1),
    seconds: float = 3.0,
    compile: bool = True,
    device: str = "cpu",
    seed: int = 0,
    network: nn.Module | None = None,
    shape: Sequence[int] | None = None,
    recorded: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Times the named model dense (the best of eager and torch.compile) and converted, interleaved.

    Args:
        model: as `models.build` takes it.
        sparsities: shares of zero blocks in every Conv2d but the first, and in every large Linear but the last.
        batches: batch sizes.
        seconds: timing budget per network and batch.
        compile: also try torch.compile with freezing as a dense baseline.
        network: a model of the user's own, instead of the named one.
        shape: of one of its images.
        recorded: serve the converted network by `slimkernels.graphed`.
        say: called with one line per step.

    Returns:
        One row per batch and sparsity.

    Raises:
        ValueError: an unknown model, nothing to measure, a batch below 1, a sparsity outside [0, 1).
        RuntimeError: a converted network does not compute what its dense twin does.
    """
    if not sparsities or not batches or min(batches, default=0) < 1 or not all(0 <= s < 1 for s in sparsities):
        raise ValueError(
            "run_bench: expected sparsities in [0, 1) and batches >= 1, "
            f"got sparsities={tuple(sparsities)}, batches={tuple(batches)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = tuple(shape or models.input_shape(model))
        sample = torch.randn(32, *shape)
        if network is None:
            network = with_random_norms(models.build(model, models.default_classes(model)))
        dense = calibrated(copy.deepcopy(network), sample).to(device)
        inputs = {batch: torch.randn(batch, *shape).to(device) for batch in batches}
    pruned: dict[float, nn.Module] = {}
    for sparsity in sparsities:
        say(f"pruning {sparsity:.1%} of the blocks")
        pruned[sparsity] = calibrated(finalize_(prune_(copy.deepcopy(dense), sparsity, block_shape)), sample.to(device))
    rows: list[Row] = []
    notes: list[str] = []
    for batch, x in inputs.items():
        say(f"batch {batch}: preparing dense baselines" + (" (torch.compile takes a while)" if compile else ""))
        rows += _rows(dense, pruned, x, seconds, compile, recorded, notes, say)
    return BenchResult(
        model=model,
        weights="random, pruned by magnitude",
        block_shape=block_shape,
        rows=rows,
        notes=list(dict.fromkeys(notes)),
        environment=timing.environment(),
    )


def with_random_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms of random scale and shift, so that folding them is not trivial."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return model


@torch.no_grad()
def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode, every batch norm holding the statistics that it sees on x.

    Without them a pruned random network's activations shrink layer by layer until its output is the last bias alone.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(x)
    for norm, momentum in zip(norms, momenta):
        norm.eval()
        norm.momentum = momentum
    return model


@torch.no_grad()
def error_ratio(model: nn.Module, fast: nn.Module, x: Tensor, device: str = "cpu") -> float:
    """RMS error of ``fast`` over that of ``model``, both in their dtype against ``model`` in float64 on ``device``."""
    exact = copy.deepcopy(model).double().to(device)(x.double().to(device))
    own, ours = ((m(x).double().to(device) - exact).square().mean().sqrt() for m in (model, fast))
    return float(ours / own)


def _rows(
    dense: nn.Module,
    pruned: dict[float, nn.Module],
    x: Tensor,
    seconds: float,
    compile: bool,
    recorded: bool,
    notes: list[str],
    say: Callable[[str], None],
) -> Iterable[Row]:
    batch = len(x)
    callables: dict[str, Callable[[], Any]] = dict(
        timing.best_dense(dense, x, compile=compile, note=lambda line: notes.append(f"batch {batch}: {line}"))
    )
    baselines = list(callables)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    swapped: dict[float, int] = {}
    for sparsity, model in pruned.items():
        say(f"batch {batch}: converting at {sparsity:.1%}")
        fast = convert(model, example_inputs=(x,), policy=Policy())
        _check_same(model, fast, x, sparsity)
        # For mypy: a model's own attribute, a Tensor or a Module to mypy.
        plan: ModelPlan = fast.slimkernels_plan  # type: ignore[assignment]
        swapped[sparsity] = len(plan.swapped)
        served = graphed(fast, channels_last) if recorded else fast
        callables[f"sparse {sparsity}"] = partial(served, channels_last)
    say(f"batch {batch}: timing")
    measured = timing.interleaved(callables, seconds=seconds)
    baseline = min(baselines, key=lambda name: measured[name].p50)
    best = measured[baseline]
    for sparsity in pruned:
        own = measured[f"sparse {sparsity}"]
        yield Row(
            sparsity=sparsity,
            batch=batch,
            baseline=baseline,
            dense=best.as_ms(),
            converted=own.as_ms(),
            baselines={name: measured[name].p50 * 1e3 for name in baselines},
            speedup=best.p50 / own.p50,
            images_per_s=batch / own.p50,
            swapped_layers=swapped[sparsity],
        )


def _check_same(model: nn.Module, fast: nn.Module, x: Tensor, sparsity: float) -> None:
    images = torch.randn(_COMPARED_IMAGES, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
    ratio = error_ratio(model, fast, images)
    if not ratio <= _MAX_ERROR_RATIO:
        raise RuntimeError(
            f"run_bench: at sparsity {sparsity} the converted model's error against float64 is {ratio:.3g} times the "
            f"dense model's, expected at most {_MAX_ERROR_RATIO:g}"
        )
