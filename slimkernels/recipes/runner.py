"""Runs a recipe from its first unfinished step to its report."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from slimkernels.conversion.symbols import coders
from slimkernels.recipes.clock import Clock, OutOfTime
from slimkernels.recipes.measurement import measure
from slimkernels.recipes.report import write_report
from slimkernels.recipes.rows import Say, Workplace, run_row
from slimkernels.recipes.schema import Recipe, Row, load_recipe
from slimkernels.recipes.sources import data_title, open_data
from slimkernels.recipes.store import key_of, write_json

MEASURE, REPORT = "measure", "report"


def reproduce(
    name: str | Path,
    *,
    preset: str,
    out: str | Path,
    data: str | None = None,
    data_name: str | None = None,
    seeds: int = 1,
    only: Sequence[str] = (),
    device: str = "cpu",
    compile: bool = True,
    progress: bool = True,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Runs what is left of a recipe, measures, and writes ``report.md``, ``report.json`` and pictures.

    Args:
        name: of a recipe in the package, or the path of a ``.yaml`` file.
        preset: one of its presets.
        out: folder; steps that it holds finished are skipped, an interrupted training goes on from its last epoch.
        data: as `sources.open_data` takes it; None for a preset that brings its own.
        data_name: how the report calls the data set.
        seeds: every row is run with seeds 0, 1, ..., each with a teacher of its own. A row whose recipe asks for more
            seeds is run with so many; those that its teacher or source lacks take that of seed 0.
        only: names or patterns of rows or groups to run (and what they need), ``measure`` to measure the finished rows
            again, ``report`` to write the report again.
        compile: also try torch.compile as the teacher's baseline.
        progress: training bars on stderr if that is a terminal.
        say: called with one line per step.

    Returns:
        The report, as in ``report.json``.

    Raises:
        ValueError: a bad recipe, preset or row name, data that does not fit it, fewer than one seed, nothing to report.
        OSError: the data cannot be read, or ``out`` cannot be written; finished steps stay.
        ImportError: rows with compact files, and no package to write them.
        RuntimeError: a converted network does not compute what the compressed one does; the report says which.
    """
    if seeds < 1:
        raise ValueError(f"reproduce: expected seeds >= 1, got {seeds}")
    recipe = load_recipe(name, preset)
    chosen, stages = _chosen(recipe, only)
    source = data or recipe.data
    if source is None:
        raise ValueError(f"reproduce: expected data for preset {preset!r} of {recipe.name}, got none (--data DIR)")
    if any(row.values != "fp32" for row in chosen):
        coders("reproduce")  # missing, it would be missed when all is trained
    place = _workplace(recipe, Path(out), source, device, progress, say)
    place.seeds = seeds
    described = {
        "source": Path(source).name if Path(source).exists() else source,
        "name": data_name or data_title(source, (place.train, place.test)),
        "training_images": place.train.samples,
        "test_images": place.test.samples,
        "classes": list(place.train.classes),
    }
    write_json(place.out / "run.json", {"recipe": recipe.name, "preset": preset, "data": described})
    runs = [(row, seed) for seed in range(max(map(place.seeds_of, chosen), default=0)) for row in chosen]
    runs = [(row, seed) for row, seed in runs if seed < place.seeds_of(row)]
    left = sum(place.work(row, step) for row, seed in runs if place.result(row, seed) is None for step in row.steps)
    place.clock = Clock(recipe.train_seconds, say, left)
    unfit: list[str] = []
    for index, (row, seed) in enumerate(runs, start=1):
        say(f"[{index}/{len(runs)}] {row.name}" + (f" (seed {seed})" if place.seeds_of(row) > 1 else ""))
        try:
            for name in row.needs:
                if place.result(recipe.row(name), place.seed_of(name, seed)) is None:
                    raise OutOfTime(f"{row.name}: not begun, it needs {name}")
            run_row(place, row, seed)
        except OutOfTime as error:
            say(f"    {error}")
            unfit.append(row.name)
    rows = [row for row in recipe.rows if place.result(row, 0) is not None]
    if MEASURE in stages:
        if not rows or rows[0] is not recipe.rows[0]:
            raise ValueError(f"reproduce: expected row {recipe.rows[0].name!r} to be finished before measuring")
        place.may_train = False
        say(f"measuring {len(rows)} networks on {place.device}")
        measure(place, rows, compile=compile)
    report = write_report(place.out, recipe, described, tuple(dict.fromkeys(unfit)))
    wrong = [row["name"] for row in report["rows"] if row["measurement"] and row["measurement"].get("error")]
    if wrong:
        raise RuntimeError(f"reproduce: converted networks differ from the compressed ones: {', '.join(wrong)}")
    return report


def _chosen(recipe: Recipe, only: Sequence[str]) -> tuple[list[Row], set[str]]:
    """The rows to run, what they need included, and the stages that follow."""
    stages = {MEASURE, REPORT}
    patterns = [pattern for pattern in only if pattern not in stages]
    if not only:
        return list(recipe.rows), stages
    if not patterns:
        return [], set(only)
    wanted: set[str] = set()
    for pattern in patterns:
        hits = {row.name for row in recipe.rows if fnmatchcase(row.name, pattern) or fnmatchcase(row.group, pattern)}
        if not hits:
            known = list(dict.fromkeys([*(row.name for row in recipe.rows), *(row.group for row in recipe.rows)]))
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:5]
            raise ValueError(
                f"reproduce: expected --only to name rows, groups, {MEASURE} or {REPORT}, got {pattern!r}; "
                f"near matches: {', '.join(near)}"
            )
        wanted |= hits
    for row in reversed(recipe.rows):
        if row.name in wanted:
            wanted |= set(row.needs)
    return [row for row in recipe.rows if row.name in wanted], set(only) & stages | {REPORT}


def _workplace(recipe: Recipe, out: Path, source: str, device: str, progress: bool, say: Say) -> Workplace:
    out.mkdir(parents=True, exist_ok=True)
    say(f"reading {source}")
    train, test = open_data(source, recipe.batch_size, device=device, progress=progress)
    key = key_of(
        train=len(train.labels),
        test=len(test.labels),
        classes=list(train.classes),
        shape=list(train.images.shape[1:]),
        # A sum over all pixels tells two data sets apart and takes no time.
        pixels=[round(float(loader.images.sum(dtype=torch.float64)), 3) for loader in (train, test)],
    )
    return Workplace(recipe, out, train, test, key, torch.device(device), progress, say)
