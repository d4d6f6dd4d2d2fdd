"""The last step of a run: every finished network converted, saved, loaded, checked and timed beside the dense teacher.

What is checked, evaluated and timed is what `slimkernels.load` makes of the row's file, so its bytes, its accuracy
and its speed belong together, also where the file holds its values in fewer bits than they were trained in. It reads
nothing but what the rows left on disk, so it can be repeated alone on a quiet machine. Networks are timed a few at a
time (``_AT_ONCE``), each group interleaved with the teacher's baselines, and a speed-up is a ratio within its group.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import checkpoint, timing
from slimkernels.compress.training.train import evaluate
from slimkernels.conversion import convert
from slimkernels.conversion.compact_index import VALUES
from slimkernels.conversion.plan import ModelPlan, Policy
from slimkernels.conversion.report import explain
from slimkernels.files import atomic_path
from slimkernels.inference import graphed
from slimkernels.recipes.rows import Workplace
from slimkernels.recipes.schema import Row
from slimkernels.recipes.store import key_of, write_result

# Of a network and its converted twin: largest difference of the logits over the largest logit. In bfloat16 every layer
# rounds its output to 8 bits, in another order of additions.
MAX_RELATIVE_DEVIATION = 1e-3
MAX_RELATIVE_DEVIATION_BF16 = 5e-2
# Compact files of so many bytes are also put into the folder "checkpoints" of the report.
_SMALL_FILE = 2_000_000

_COMPARED_IMAGES = 256
# Networks timed in one group: each is held three times (as it is, its folded copy, converted).
_AT_ONCE = 4
# Every block pattern stored as such, whatever its speed; low-rank layers stay two thin layers.
_SMALLEST = Policy(min_speedup=0.0, measure=False, dense_layers=False, merge_low_rank=False, check_model=False)


def measure(place: Workplace, rows: Sequence[Row], *, compile: bool = True) -> dict[str, Any]:
    """Converts, saves, loads and times the finished networks of ``rows``; the result is also in ``measurement.json``.

    Args:
        rows: finished ones; the recipe's first row is the dense teacher and the baseline of every ratio.
        compile: also try torch.compile with freezing as the teacher's baseline.

    Returns:
        ``environment``, ``batches``, ``notes``, and under ``rows``, by name: bytes and accuracy of the files of every
        seed (``files``, with the key of the network and of its conversion), and of the first: what was swapped, the
        largest deviation of the converted network's logits, of a compact file its bound and what other values would
        give (``by_values``), ``latency`` per batch size, or an ``error``.
    """
    recipe, seed = place.recipe, 0
    images = {batch: _images(place, batch) for batch in recipe.batches}
    inputs = [(_images(place, batch),) for batch in recipe.batches]
    teacher = place.network(recipe.rows[0].name, seed)
    dense_file = place.folder(recipe.rows[0], seed) / "dense.safetensors"
    save_dense(teacher, dense_file)
    teacher = _in_dtype(place, teacher)
    notes: list[str] = []
    baselines = {
        batch: timing.best_dense(teacher, x, compile=compile, note=lambda line: notes.append(line))
        for batch, x in images.items()
    }
    if place.device.type == "cuda":  # what is recorded is compared with the teacher in a CUDA graph as well
        folded = timing.fold_batch_norm(teacher).to(memory_format=torch.channels_last)
        every = [(x,) for x in images.values()]
        fused = convert(copy.deepcopy(teacher), example_inputs=every, policy=Policy(measure=False, check_model=False))
        for batch, x in images.items():
            baselines[batch]["CUDA graph"] = partial(graphed(folded, x), x)
            baselines[batch]["CUDA graph, ReLU fused"] = partial(graphed(fused, x), x)
    measured: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), _AT_ONCE):
        group = rows[start : start + _AT_ONCE]
        pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for row in group:
            place.say(f"    measuring {row.name}")
            model = _in_dtype(place, place.network(row.name, seed))
            measured[row.name], fast = _convert(place, row, model, seed, inputs)
            if fast is not None:
                pairs[row.name] = model, fast
            for other in range(1, place.seeds_of(row)):
                if place.result(row, other) is not None:
                    found, _ = _convert(place, row, _in_dtype(place, place.network(row.name, other)), other, inputs)
                    measured[row.name]["files"] += found["files"]
                    if "error" in found:
                        measured[row.name]["error"] = f"seed {other}: {found['error']}"
        for batch, x in images.items():
            _time_group(batch, x, baselines[batch], pairs, recipe.seconds, measured)
        result = {
            "batches": list(recipe.batches),
            "dense_bytes": dense_file.stat().st_size,
            "environment": timing.environment(),
            "device": str(place.device),
            "notes": list(dict.fromkeys(notes)),
            "rows": measured,
        }
        write_result(place.out / "measurement.json", result)  # of what is measured by now
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


class _Images:
    """The test loader's batches, the images in the dtype of the measurement."""

    def __init__(self, place: Workplace) -> None:
        self._loader, self._dtype = place.test, place.dtype

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images, *rest in self._loader:
            yield images.to(self._dtype), *rest


def _in_dtype(place: Workplace, model: nn.Module) -> nn.Module:
    """The network in the dtype of the measurement, a copy where that is another one."""
    return model if place.recipe.dtype == "fp32" else copy.deepcopy(model).to(place.dtype)


def _images(place: Workplace, batch: int) -> Tensor:
    """The first test images as the loader normalises them, repeated where there are fewer than ``batch``."""
    loader = place.test
    found = torch.cat([images for images, *_ in _first(loader, batch)])
    found = found.to(place.dtype)
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
    place: Workplace, row: Row, model: nn.Module, seed: int, inputs: list[tuple[Tensor]]
) -> tuple[dict[str, Any], nn.Module | None]:
    """Files and facts of one network, and what its file is loaded as; None where that computes something else."""
    conversion = place.recipe.conversion(row)
    fast = convert(model, example_inputs=inputs, policy=Policy(**conversion["policy"]))
    # For mypy: a model's own attribute, a Tensor or a Module to mypy.
    plan: ModelPlan = fast.slimkernels_plan  # type: ignore[assignment]
    file = place.folder(row, seed) / "model.slim.safetensors"
    checkpoint.save(fast, file, values=row.values, builder=_builder(place, row))
    loaded = checkpoint.load(file, into=model)
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "smallest.slim.safetensors"
        checkpoint.save(convert(model, policy=_SMALLEST), small, values=row.values)
        smallest = min(small.stat().st_size, file.stat().st_size)
        by_values = {} if seed else _by_values(place, row, model, fast, Path(scratch))
    deviation, largest, error = _checked(place, row, model, fast, loaded)
    result = place.result(row, seed)
    assert result is not None
    own = {
        "seed": seed,
        "key": key_of(identity=result["identity"], **conversion),
        "bytes": file.stat().st_size,
        "accuracy": evaluate(loaded, _Images(place)),
    }
    if not seed and row.values != "fp32" and file.stat().st_size < _SMALL_FILE:
        kept = place.out / "checkpoints" / f"{row.slug}.slim.safetensors"
        kept.parent.mkdir(exist_ok=True)
        with atomic_path(kept) as temporary:
            temporary.write_bytes(file.read_bytes())
    facts: dict[str, Any] = {
        "file": str(file.relative_to(place.out)),
        "values": row.values,
        "bytes": file.stat().st_size,
        "bound": _bound(file),
        "smallest_bytes": smallest,
        "by_values": by_values,
        "files": [own],
        "swapped": dict(Counter(str(plan[name].format) for name in plan.swapped)),
        "layers": len([layer for layer in plan.layers if layer.weight_shape is not None]),
        "max_abs_deviation": deviation,
        "largest_logit": largest,
        "latency": {},
        "notes": list(plan.notes),
    }
    if error:
        facts["error"] = error
        place.say(f"    {row.name}: {error}")
        return facts, None
    return facts, loaded


def _builder(place: Workplace, row: Row) -> dict[str, Any] | None:
    """How `slimkernels.models.build` makes the row's architecture; None where a step changes it."""
    while row.source is not None:
        if any(step.verb == "factorize" for step in row.steps):
            return None
        row = place.recipe.row(row.source)
    if row.model is None or any(step.verb == "factorize" for step in row.steps):
        return None
    options = {key: value for key, value in row.model.items() if key not in ("name", "dropout")}
    return {"model": row.model["name"], "num_classes": len(place.train.classes), "options": options}


def _by_values(place: Workplace, row: Row, model: nn.Module, fast: nn.Module, folder: Path) -> dict[str, Any]:
    """Bytes, bound and accuracy of the same network's file in other kinds of values; of a row that is not for compact
    files fp32 and int8, and nothing where no row of the recipe is."""
    if all(other.values == "fp32" for other in place.recipe.rows):
        return {}
    found = {}
    for values in ("fp32", "int8") if row.values == "fp32" else VALUES:
        file = folder / f"{values}.slim.safetensors"
        checkpoint.save(fast, file, values=values, builder=_builder(place, row))
        accuracy = evaluate(checkpoint.load(file, into=model), _Images(place))
        found[values] = {"bytes": file.stat().st_size, "bound": _bound(file), "accuracy": accuracy}
    return found


def _bound(file: Path) -> int | None:
    bound = explain(file).file_bound
    return None if bound is None else bound.total


def _checked(
    place: Workplace, row: Row, model: nn.Module, fast: nn.Module, loaded: nn.Module
) -> tuple[float, float, str | None]:
    """Largest deviation and logit, and what is wrong: of the converted network against the compressed one, and of the
    loaded file against the converted network with its values rounded in memory."""
    x = _images(place, _COMPARED_IMAGES)
    rounded = checkpoint.quantize_(copy.deepcopy(fast), row.values)
    pairs = (("the converted network's", model, fast), ("the loaded file's", rounded, loaded))
    deviation = largest = 0.0
    for whose, expected, got in pairs:
        difference, logit = _deviation(expected, got, x)
        deviation, largest = max(deviation, difference), max(largest, logit)
        allowed = MAX_RELATIVE_DEVIATION if place.recipe.dtype == "fp32" else MAX_RELATIVE_DEVIATION_BF16
        if not difference <= allowed * logit:
            error = (
                f"{whose} logits differ by {difference:.3g} at a largest logit of {logit:.3g}, "
                f"expected at most {allowed:g} of it"
            )
            return difference, logit, error
    return deviation, largest, None


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
