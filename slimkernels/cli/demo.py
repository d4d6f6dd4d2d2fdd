"""The whole flow on real data in about a minute, without network: train, prune, factorize, distil, convert, save, time.

A small VGG learns scikit-learn's 8x8 digits. One copy is pruned in blocks, another factorized; both are distilled from
the first, converted, checked against the unconverted model, written to disk, read back, and timed beside it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import timing
from slimkernels.checkpoint import load, save
from slimkernels.cli.comparison import believable_speedup, doubt, speedup, timed
from slimkernels.cli.weights import write_weights
from slimkernels.compress.distillation.distill import distill
from slimkernels.compress.factorization.factorize import factorize_
from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.prune import finalize_
from slimkernels.compress.training.train import evaluate, fine_tune
from slimkernels.conversion import convert, explain
from slimkernels.conversion.plan import ModelPlan
from slimkernels.data import digits_loaders
from slimkernels.files import atomic_path
from slimkernels.formats import block_mask
from slimkernels.models import vgg_digits

BLOCK_SHAPE = (16, 1)
SPARSITY = 0.875
ENERGY = 0.5
# Narrow layers at 8x8 are cheap already; two thin ones there cost more calls than they save work.
LOW_RANK_LAYERS = ("features.10", "features.14", "features.17", "classifier.0")
BATCHES = (1, 64)

# A converted network may differ from its dense twin by what rounding explains: float32, a few hundred terms a sum.
_MAX_RELATIVE_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Entry:
    """One row of the result: a model and the kernels it ran with.

    ``accuracy`` is on the 450 test images, in [0, 1]; ``bytes`` counts the file, indices included; ``latency`` maps the
    batch size to milliseconds (p20, p50, p80, n); ``speedup`` is dense p50 over this p50, which lies between
    ``speedup_low`` and ``speedup_high`` with 99 % confidence; ``swapped`` counts the swapped layers by what they became
    ("dense": low-rank layers merged back, because that was measured faster).
    """

    name: str
    accuracy: float
    bytes: int
    file: str
    latency: dict[int, dict[str, float | int]]
    speedup: dict[int, float] = field(default_factory=dict)
    max_abs_difference: float | None = None
    swapped: dict[str, int] = field(default_factory=dict)
    speedup_low: dict[int, float] = field(default_factory=dict)
    speedup_high: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSparsity:
    """Of one layer of the pruned model: share of zero blocks, and whether conversion swapped or kept it."""

    name: str
    block_sparsity: float
    action: str
    kernel: str | None
    reason: str


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` measured, where it wrote, and on what machine; notes tell of speed-ups that are in doubt."""

    entries: list[Entry]
    layers: list[LayerSparsity]
    out: str
    figure: str
    report: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The result as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> DemoResult:
        """The result of `to_json`, such as that in ``demo.json``."""
        data = json.loads(text)
        by_batch = ("latency", "speedup", "speedup_low", "speedup_high")
        for entry in data["entries"]:
            entry.update({name: {int(batch): value for batch, value in entry[name].items()} for name in by_batch})
        entries = [Entry(**entry) for entry in data.pop("entries")]
        return cls(entries, [LayerSparsity(**layer) for layer in data.pop("layers")], **data)


def run_demo(
    out: str | Path = "slimkernels-demo",
    *,
    epochs: int = 8,
    seconds: float = 1.0,
    seed: int = 0,
    width: int = 64,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Runs the demo; writes ``dense.safetensors``, two ``.slim.safetensors``, ``demo.png`` and ``demo.json``.

    Args:
        out: folder, created if it is missing.
        epochs: of the teacher and of each distillation.
        seconds: timing budget per model and batch size; speed-ups in doubt are measured again, up to thrice as long.
        seed: of initialisation, batch order and dropout.
        width: channels of the first convolution.
        progress: training bars on stderr if that is a terminal.
        say: called with one line per step.

    Raises:
        ValueError: a bad setting.
        RuntimeError: a converted or reloaded model does not compute what the compressed one does.
    """
    if epochs < 1 or seconds < 0:
        raise ValueError(f"run_demo: expected epochs >= 1 and seconds >= 0, got epochs={epochs}, seconds={seconds}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = digits_loaders(seed=seed)
    recipe: dict[str, Any] = {"epochs": epochs, "lr": 0.05, "seed": seed, "progress": progress}

    say(f"1/5 training a dense VGG on {train.samples} digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = vgg_digits(width=width)
    fine_tune(teacher, train, **recipe)

    say(f"2/5 pruning {SPARSITY:.1%} of its {BLOCK_SHAPE[0]}x{BLOCK_SHAPE[1]} blocks while distilling")
    pruned = copy.deepcopy(teacher)
    distill(pruned, teacher, train, callbacks=[GradualPruning(SPARSITY, BLOCK_SHAPE, end=0.6)], **recipe)
    finalize_(pruned)

    say(f"3/5 factorizing the wide layers to {ENERGY:.0%} of their energy, then distilling")
    low_rank = factorize_(copy.deepcopy(teacher), "svd", energy=ENERGY, layers=LOW_RANK_LAYERS)
    distill(low_rank, teacher, train, **{**recipe, "lr": 0.02})

    say("4/5 converting, checking, saving, loading back")
    for model in (teacher, pruned, low_rank):
        model.eval()
    images = test.images[: max(BATCHES)]
    inputs = {batch: (images[:batch] - test.mean) / test.std for batch in BATCHES}
    dense_file = folder / "dense.safetensors"
    write_weights(teacher, dense_file, name="vgg_digits", num_classes=10, options={"width": width})
    fast: dict[str, nn.Module] = {}
    files: dict[str, Path] = {}
    differences: dict[str, float] = {}
    for name, compressed in (("pruned", pruned), ("low-rank", low_rank)):
        converted = convert(compressed, example_inputs=[(x,) for x in inputs.values()])
        files[name] = folder / f"{name}.slim.safetensors"
        save(converted, files[name], builder={"model": "vgg_digits", "options": {"width": width}})
        fast[name] = load(files[name], into=vgg_digits(width=width))
        differences[name] = max(_same(name, compressed, model, inputs) for model in (converted, fast[name]))

    say("5/5 timing")
    believable = {
        "pruned, masked": believable_speedup(teacher, teacher),
        "pruned, converted": believable_speedup(teacher, pruned),
        "low-rank, converted": believable_speedup(teacher, low_rank),
    }
    latency: dict[int, dict[str, timing.Timing]] = {}
    notes: list[str] = []
    for batch, x in inputs.items():
        latency[batch], left = _latencies(teacher, pruned, fast, x, seconds, believable, say)
        notes += left
    rows: list[tuple[str, nn.Module, Path, float | None]] = [
        ("dense", teacher, dense_file, None),
        ("pruned, masked", pruned, dense_file, None),
        ("pruned, converted", fast["pruned"], files["pruned"], differences["pruned"]),
        ("low-rank, converted", fast["low-rank"], files["low-rank"], differences["low-rank"]),
    ]
    entries = [
        _entry(name, model, evaluate(model, test), file, latency, difference) for name, model, file, difference in rows
    ]
    figure = folder / "demo.png"
    result = DemoResult(
        entries=entries,
        layers=_layers(pruned, fast["pruned"]),
        out=str(folder),
        figure=str(figure),
        report=str(explain(fast["pruned"])),
        settings={
            "data": f"scikit-learn digits, {train.samples} training and {test.samples} test images of 8x8 pixels",
            "test_images": test.samples,
            "epochs": epochs,
            "seed": seed,
            "width": width,
            "block_shape": list(BLOCK_SHAPE),
            "sparsity": SPARSITY,
            "energy": ENERGY,
            "parameters": sum(p.numel() for p in teacher.parameters()),
        },
        environment=timing.environment(),
        notes=notes,
    )
    from slimkernels.cli.plots import demo_figure

    demo_figure(result, figure)
    with atomic_path(folder / "demo.json") as temporary:
        temporary.write_text(result.to_json() + "\n")
    return result


@torch.no_grad()
def _same(name: str, expected: nn.Module, got: nn.Module, inputs: Mapping[int, Tensor]) -> float:
    """Largest absolute difference of the logits; raises RuntimeError where rounding cannot explain it."""
    largest = 0.0
    for batch, x in inputs.items():
        reference, logits = expected(x), got(x)
        difference = float((logits - reference).abs().max())
        bound = _MAX_RELATIVE_DIFFERENCE * float(reference.abs().max())
        if not difference <= bound:
            raise RuntimeError(
                f"run_demo: the converted {name} model differs from the compressed one by {difference:.3g} "
                f"at batch {batch}, expected at most {bound:.3g}"
            )
        largest = max(largest, difference)
    return largest


def _latencies(
    teacher: nn.Module,
    pruned: nn.Module,
    fast: Mapping[str, nn.Module],
    x: Tensor,
    seconds: float,
    believable: Mapping[str, float],
    say: Callable[[str], None],
) -> tuple[dict[str, timing.Timing], list[str]]:
    """Timing by row name, where dense rows take the faster memory format, and the speed-ups left in doubt."""
    channels_last = x.contiguous(memory_format=torch.channels_last)
    callables: dict[str, Callable[[], Any]] = {}
    for name, model in (("dense", teacher), ("pruned, masked", pruned)):
        for variant, call in timing.best_dense(model, x, compile=False).items():
            callables[f"{name}|{variant}"] = call
    for name, model in fast.items():
        callables[f"{name}, converted"] = partial(model, channels_last)

    def best(measured: Mapping[str, timing.Timing]) -> dict[str, timing.Timing]:
        rows: dict[str, timing.Timing] = {}
        for name, one in measured.items():
            row = name.split("|")[0]
            if row not in rows or one.p50 < rows[row].p50:
                rows[row] = one
        return rows

    def doubts(measured: Mapping[str, timing.Timing]) -> list[str]:
        rows = best(measured)
        found = {name: doubt(speedup(rows["dense"], rows[name]), most) for name, most in believable.items()}
        return [f"batch {len(x)}, {name}: {text}" for name, text in found.items() if text is not None]

    measured, left = timed(callables, seconds, doubts, say)
    return best(measured), [f"{text}, and stays so after it was measured again" for text in left]


def _entry(
    name: str,
    model: nn.Module,
    accuracy: float,
    file: Path,
    latency: Mapping[int, Mapping[str, timing.Timing]],
    difference: float | None,
) -> Entry:
    own = {batch: measured[name] for batch, measured in latency.items()}
    gains = {batch: speedup(latency[batch]["dense"], measured) for batch, measured in own.items()}
    plan = getattr(model, "slimkernels_plan", None)
    formats = [str(plan[layer].format) for layer in plan.swapped] if isinstance(plan, ModelPlan) else []
    return Entry(
        name=name,
        accuracy=accuracy,
        bytes=file.stat().st_size,
        file=file.name,
        latency={batch: measured.as_ms() for batch, measured in own.items()},
        speedup={batch: gain.middle for batch, gain in gains.items()},
        speedup_low={batch: 1.0 if name == "dense" else gain.low for batch, gain in gains.items()},
        speedup_high={batch: 1.0 if name == "dense" else gain.high for batch, gain in gains.items()},
        max_abs_difference=difference,
        swapped=dict(Counter(formats)),
    )


def _layers(pruned: nn.Module, converted: nn.Module) -> list[LayerSparsity]:
    # For mypy: a model's own attribute, a Tensor or a Module to mypy.
    plan: ModelPlan = converted.slimkernels_plan  # type: ignore[assignment]
    rows = []
    for name, module in pruned.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            sparsity = 1.0 - block_mask(module.weight.detach(), BLOCK_SHAPE).float().mean().item()
            layer = plan[name]
            rows.append(LayerSparsity(name, sparsity, layer.action, layer.kernel, layer.reason))
    return rows
