"""`slimkernels bench`: a whole network, dense against converted, over sparsities and batch sizes.

The weights are random, and pruned by magnitude: speed depends on which blocks are zero, not on the values kept. Every
converted network is checked against its own dense twin before it is timed. Dense is the fastest of what is installed:
eager PyTorch in both memory formats, torch.compile, ONNX Runtime, OpenVINO, on a GPU a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import models, timing
from slimkernels.cli.comparison import believable_speedup, contest, doubt, speedup
from slimkernels.cli.peers import cpu_peers, first_line
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.prune import finalize_, prune_
from slimkernels.conversion import convert
from slimkernels.conversion.plan import ModelPlan, Policy
from slimkernels.inference import graphed

# A converted network may be at most twice as far from float64 as torch's dense network in the same dtype. Of a handful
# of outputs the ratio is mostly chance: 0.97 to 2.07 for VGG-19 on one image, 1.42 to 1.51 on 64.
_MAX_ERROR_RATIO = 2.0
_COMPARED_IMAGES = 64

# SlimNets' ranks of VGG-19's sixteen convolutions (arXiv 1808.00496): a vertical factor, then a horizontal one.
SLIMNETS_RANKS = (5, 24, 48, 48, 64, 128, 128, 160, 192, 256, 320, 320, 320, 320, 320, 320)


@dataclass(frozen=True)
class Case:
    """What is measured in one row: a batch size, and the sparsity and blocks, or none where layers are low-rank."""

    batch: int
    sparsity: float
    block_shape: tuple[int, int] | None

    @property
    def compression(self) -> str:
        """In words, such as ``87.5%, 16x1``."""
        if self.block_shape is None:
            return "low rank"
        return f"{self.sparsity:.1%}, {self.block_shape[0]}x{self.block_shape[1]}"


# The rows of the README's table of VGG-19 on a CPU; (1, 1) is unstructured sparsity.
README_CASES = (
    Case(1, 0.875, (16, 1)),
    Case(16, 0.875, (16, 1)),
    Case(128, 0.95, (16, 1)),
    Case(128, 0.875, (1, 1)),
    Case(16, 0.0, None),
)


@dataclass(frozen=True)
class Row:
    """One measurement: the converted network of a case beside the fastest dense one of the same run.

    ``dense`` and ``converted`` hold p20_ms, p50_ms, p80_ms and n; ``baselines`` maps every dense baseline to its
    p50_ms; ``speedup`` is the dense p50 over the converted p50, which lies between ``speedup_low`` and ``speedup_high``
    with 99 % confidence; ``images_per_s`` is of the converted network; ``recorded`` says whether `graphed` served it.
    """

    sparsity: float
    batch: int
    block_shape: tuple[int, int] | None
    compression: str
    recorded: bool
    baseline: str
    dense: dict[str, float | int]
    converted: dict[str, float | int]
    baselines: dict[str, float | int]
    speedup: float
    speedup_low: float
    speedup_high: float
    images_per_s: float
    swapped_layers: int


@dataclass(frozen=True)
class BenchResult:
    """Rows, what was measured, where, and notes about baselines that could not run and speed-ups in doubt."""

    model: str
    weights: str
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
    cases: Sequence[Case] | None = None,
    seconds: float = 3.0,
    compile: bool = True,
    peers: bool = True,
    device: str = "cpu",
    seed: int = 0,
    network: nn.Module | None = None,
    shape: Sequence[int] | None = None,
    recorded: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Times the named model dense (the best of the baselines) and converted, interleaved.

    Args:
        model: as `models.build` takes it.
        sparsities: shares of zero blocks in every Conv2d but the first, and in every large Linear but the last.
        batches: batch sizes.
        cases: instead of all sparsities at all batch sizes, such as `README_CASES`.
        seconds: timing budget per network and batch; a speed-up in doubt is measured again, up to three times as long.
        compile: also try torch.compile with freezing as a dense baseline.
        peers: also try ONNX Runtime and OpenVINO, on a CPU, where they are installed.
        network: a model of the user's own, instead of the named one.
        shape: of one of its images.
        recorded: serve the converted network by `slimkernels.graphed`; where it cannot, a note says why.
        say: called with one line per step.

    Returns:
        One row per case, those of one batch size together.

    Raises:
        ValueError: an unknown model, nothing to measure, a batch below 1, a sparsity outside [0, 1), low rank for
            another network than a VGG-19.
        RuntimeError: a converted network does not compute what its dense twin does.
    """
    if cases is None:
        cases = [Case(batch, sparsity, block_shape) for batch in batches for sparsity in sparsities]
    if not cases or not all(case.batch >= 1 and 0 <= case.sparsity < 1 for case in cases):
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
        inputs = {case.batch: torch.randn(case.batch, *shape).to(device) for case in cases}
    compressed: dict[str, nn.Module] = {}
    for case in cases:
        if case.compression not in compressed:
            say(f"compressing: {case.compression}")
            compressed[case.compression] = calibrated(_compressed(dense, case), sample.to(device))
    setting = _Setting(dense, compressed, seconds, compile, peers, recorded, say, [])
    rows: list[Row] = []
    for batch, x in inputs.items():
        rows += _rows(setting, [case for case in cases if case.batch == batch], x)
    return BenchResult(
        model=model,
        weights="random, pruned by magnitude",
        rows=rows,
        notes=list(dict.fromkeys(setting.notes)),
        environment=timing.environment(),
    )


def _compressed(dense: nn.Module, case: Case) -> nn.Module:
    """A copy of the network without what a case leaves out."""
    model = copy.deepcopy(dense)
    if case.block_shape is not None:
        return finalize_(prune_(model, case.sparsity, case.block_shape))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if len(convs) != len(SLIMNETS_RANKS):
        raise ValueError(
            f"run_bench: expected a network of {len(SLIMNETS_RANKS)} convolutions, a VGG-19, to give it SlimNets' "
            f"ranks, got {len(convs)}"
        )
    for name, rank in zip(convs, SLIMNETS_RANKS, strict=True):
        factorize_(model, "tai", rank=rank, layers=[name])
    return model


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


@dataclass(frozen=True)
class _Setting:
    """What all rows share."""

    dense: nn.Module
    compressed: Mapping[str, nn.Module]
    seconds: float
    compile: bool
    peers: bool
    recorded: bool
    say: Callable[[str], None]
    notes: list[str]


def _rows(setting: _Setting, cases: Sequence[Case], x: Tensor) -> Iterable[Row]:
    """The rows of one batch size, all timed in turn."""
    batch, dense, say = len(x), setting.dense, setting.say
    note: Callable[[str], None] = setting.notes.append
    say(f"batch {batch}: preparing dense baselines" + (" (torch.compile takes a while)" if setting.compile else ""))
    baselines: dict[str, Callable[[], Any]] = dict(_dense_baselines(setting, x))
    ours: dict[str, Callable[[], Any]] = {}
    channels_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    swapped: dict[str, int] = {}
    recorded: dict[str, bool] = {}
    for case in cases:
        key = case.compression
        say(f"batch {batch}: converting, {key}")
        model = setting.compressed[key]
        fast = convert(model, example_inputs=(x,), policy=Policy(merge_low_rank=case.block_shape is not None))
        _check_same(model, fast, x, case)
        # For mypy: a model's own attribute, a Tensor or a Module to mypy.
        plan: ModelPlan = fast.slimkernels_plan  # type: ignore[assignment]
        swapped[key] = len(plan.swapped)
        served, recorded[key] = fast, False
        if setting.recorded:
            try:
                served, recorded[key] = graphed(fast, channels_last), True
            except Exception as error:  # whatever the model's own code does that cannot be recorded
                note(f"batch {batch}, {key}: called module by module, since it cannot be recorded: {first_line(error)}")
        ours[_ours(case)] = partial(served, channels_last)
    limits = {case: believable_speedup(dense, setting.compressed[case.compression]) for case in cases}

    def best(measured: Mapping[str, timing.Timing]) -> str:
        return min((name for name in baselines if name in measured), key=lambda name: measured[name].p50)

    def doubts(measured: Mapping[str, timing.Timing]) -> list[str]:
        fastest = measured[best(measured)]
        found = {case: doubt(speedup(fastest, measured[_ours(case)]), limits[case]) for case in cases}
        return [f"batch {batch}, {case.compression}: {text}" for case, text in found.items() if text is not None]

    say(f"batch {batch}: timing")
    measured, others, left = contest(ours, baselines, setting.seconds, doubts, say)
    setting.notes.extend(f"{text}, and stays so after it was measured again; is the machine busy?" for text in left)
    baseline = best(measured)
    for case in cases:
        own = measured[_ours(case)]
        ratio = speedup(measured[baseline], own)
        yield Row(
            sparsity=case.sparsity,
            batch=batch,
            block_shape=case.block_shape,
            compression=case.compression,
            recorded=recorded[case.compression],
            baseline=baseline,
            dense=measured[baseline].as_ms(),
            converted=own.as_ms(),
            baselines={name: one.p50 * 1e3 for name, one in {**others, **measured}.items() if name in baselines},
            speedup=ratio.middle,
            speedup_low=ratio.low,
            speedup_high=ratio.high,
            images_per_s=batch / own.p50,
            swapped_layers=swapped[case.compression],
        )


def _ours(case: Case) -> str:
    return f"converted, {case.compression}"


def _dense_baselines(setting: _Setting, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The dense networks that the converted one has to beat."""
    model, batch = setting.dense, len(x)
    note: Callable[[str], None] = setting.notes.append
    yield from timing.best_dense(
        model, x, compile=setting.compile, note=lambda line: note(f"batch {batch}: {line}")
    ).items()
    if x.is_cuda and setting.recorded:
        # What is recorded has no launches to wait for, so the dense network has to be recorded too.
        image = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        folded = timing.fold_batch_norm(model)
        folded = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it
        yield "CUDA graph", partial(graphed(folded, image), image)
    elif setting.peers and not x.is_cuda:
        yield from cpu_peers(model, x, note).items()


def _check_same(model: nn.Module, fast: nn.Module, x: Tensor, case: Case) -> None:
    images = torch.randn(_COMPARED_IMAGES, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
    ratio = error_ratio(model, fast, images)
    if not ratio <= _MAX_ERROR_RATIO:
        raise RuntimeError(
            f"run_bench: with {case.compression} the converted model's error against float64 is {ratio:.3g} times that "
            f"of its dense twin, expected at most {_MAX_ERROR_RATIO:g}"
        )
