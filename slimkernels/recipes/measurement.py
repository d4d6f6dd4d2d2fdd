"""The last step of a run: every finished network converted, checked, saved and timed beside the dense teacher.

It reads nothing but what the rows left on disk, so it can be repeated alone on a quiet machine. Networks are timed a
few at a time (``_AT_ONCE``), each group interleaved with the teacher's baselines, and a speed-up is a ratio within its
group.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import checkpoint, timing
from slimkernels.conversion import convert
from slimkernels.conversion.plan import ModelPlan, Policy
from slimkernels.files import atomic_path
from slimkernels.inference import graphed
from slimkernels.recipes.rows import Workplace
from slimkernels.recipes.schema import Row
from slimkernels.recipes.store import write_result

# Of a network and its converted twin in float32: largest difference of the logits over the largest logit.
MAX_RELATIVE_DEVIATION = 1e-3

_COMPARED_IMAGES = 256
# Networks timed in one group: each is held three times (as it is, its folded copy, converted).
_AT_ONCE = 4
# Every block pattern stored as such, whatever its speed; low-rank layers stay two thin layers.
_SMALLEST = Policy(min_speedup=0.0, measure=False, dense_layers=False, merge_low_rank=False, check_model=False)


def measure(place: Workplace, rows: Sequence[Row], *, seed: int = 0, compile: bool = True) -> dict[str, Any]:
    """Converts, saves and times the finished networks of ``rows``; the result is also in ``measurement.json``.

    Args:
        rows: finished ones; the recipe's first row is the dense teacher and the baseline of every ratio.
        seed: whose networks are measured.
        compile: also try torch.compile with freezing as the teacher's baseline.

    Returns:
        ``environment``, ``batches``, ``notes``, and under ``rows``, by name: bytes of the files, what was swapped, the
        largest deviation of the converted network's logits, ``latency`` per batch size, or an ``error``.
    """
    recipe = place.recipe
    images = {batch: _images(place, batch) for batch in recipe.batches}
    teacher = place.network(recipe.rows[0].name, seed)
    dense_file = place.folder(recipe.rows[0], seed) / "dense.safetensors"
    save_dense(teacher, dense_file)
    notes: list[str] = []
    baselines = {
        batch: timing.best_dense(teacher, x, compile=compile, note=lambda line: notes.append(line))
        for batch, x in images.items()
    }
    measured: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), _AT_ONCE):
        group = rows[start : start + _AT_ONCE]
        pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for row in group:
            place.say(f"    measuring {row.name}")
            model = place.network(row.name, seed)
            measured[row.name], fast = _convert(place, row, model, seed, images)
            if fast is not None:
                pairs[row.name] = model, fast
        for batch, x in images.items():
            _time_group(batch, x, baselines[batch], pairs, recipe.seconds, measured)
    result = {
        "seed": seed,
        "batches": list(recipe.batches),
        "dense_bytes": dense_file.stat().st_size,
        "environment": timing.environment(),
        "device": str(place.device),
        "notes": list(dict.fromkeys(notes)),
        "rows": measured,
    }
    write_result(place.out / "measurement.json", result)
    return result


def save_dense(model: nn.Module, path: Path) -> None:
    """The dense network's state as plain safetensors: what a compressed file is compared with.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(state))


def _images(place: Workplace, batch: int) -> Tensor:
    """The first test images as the loader normalises them, repeated where there are fewer than ``batch``."""
    loader = place.test
    found = torch.cat([images for images, *_ in _first(loader, batch)])
    repeated = found.repeat(-(-batch // len(found)), 1, 1, 1)[:batch]
    return repeated.to(place.device).contiguous(memory_format=torch.channels_last)


def _first(loader: Any, count: int) -> list[Any]:
    batches, taken = [], 0
    for batch in loader:
        batches.append(batch)
        taken += len(batch[0])
        if taken >= count:
            break
    return batches


def _convert(
    place: Workplace, row: Row, model: nn.Module, seed: int, images: Mapping[int, Tensor]
) -> tuple[dict[str, Any], nn.Module | None]:
    """Files and facts of one network, and its converted twin; None where that computes something else."""
    settings: dict[str, Any] = dict(place.recipe.policy)
    for step in row.steps:
        if step.verb == "convert":
            settings.update(step.settings)
    fast = convert(model, example_inputs=[(x,) for x in images.values()], policy=Policy(**settings))
    # For mypy: a model's own attribute, a Tensor or a Module to mypy.
    plan: ModelPlan = fast.slimkernels_plan  # type: ignore[assignment]
    file = place.folder(row, seed) / "model.slim.safetensors"
    checkpoint.save(fast, file)
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "smallest.slim.safetensors"
        checkpoint.save(convert(model, policy=_SMALLEST), small)
        smallest = min(small.stat().st_size, file.stat().st_size)
    deviation, largest = _deviation(model, fast, _images(place, _COMPARED_IMAGES))
    facts: dict[str, Any] = {
        "file": str(file.relative_to(place.out)),
        "bytes": file.stat().st_size,
        "smallest_bytes": smallest,
        "swapped": dict(Counter(str(plan[name].format) for name in plan.swapped)),
        "layers": len([layer for layer in plan.layers if layer.weight_shape is not None]),
        "max_abs_deviation": deviation,
        "largest_logit": largest,
        "latency": {},
        "notes": list(plan.notes),
    }
    if not deviation <= MAX_RELATIVE_DEVIATION * largest:
        facts["error"] = (
            f"the converted network's logits differ by {deviation:.3g} at a largest logit of {largest:.3g}, "
            f"expected at most {MAX_RELATIVE_DEVIATION:g} of it"
        )
        place.say(f"    {row.name}: {facts['error']}")
        return facts, None
    return facts, fast


@torch.no_grad()
def _deviation(model: nn.Module, fast: nn.Module, x: Tensor) -> tuple[float, float]:
    """Largest absolute difference of the logits, and the largest logit."""
    expected, got = model(x), fast(x)
    return float((got - expected).abs().max()), float(expected.abs().max())


def _time_group(
    batch: int,
    x: Tensor,
    baselines: Mapping[str, Callable[[], Any]],
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    seconds: float,
    measured: dict[str, dict[str, Any]],
) -> None:
    """Times compressed and converted networks beside the teacher and adds the result to ``measured``."""
    if not pairs:
        return
    callables: dict[tuple[str, str], Callable[[], Any]] = {("teacher", name): run for name, run in baselines.items()}
    for name, (model, fast) in pairs.items():
        masked = timing.best_dense(model, x, compile=False)
        callables["masked", name] = masked["eager channels_last"]
        callables["converted", name] = partial(fast, x)
        recorded = graphed(fast, x)
        callables["recorded", name] = partial(recorded, x)
    # For mypy: keys are pairs here, and what the functions return is not looked at.
    found: dict[Any, timing.Timing] = timing.interleaved(callables, seconds=seconds)  # type: ignore[type-var, arg-type]
    best = min((key for key in found if key[0] == "teacher"), key=lambda key: found[key].p50)
    for name in pairs:
        ways = {way: found[way, name] for way in ("masked", "converted", "recorded")}
        measured[name]["latency"][str(batch)] = {
            "teacher": {"baseline": best[1], **found[best].as_ms()},
            **{way: own.as_ms() for way, own in ways.items()},
            "masked_speedup": found[best].p50 / ways["masked"].p50,
            "converted_speedup": found[best].p50 / ways["converted"].p50,
            "speedup": found[best].p50 / ways["recorded"].p50,
        }
