"""Recipes as data: a YAML file of presets and rows becomes a validated `Recipe`.

A row is one line of the report: where its network comes from (``model``: a fresh one, ``from``: the finished network of
an earlier row) and the steps that make it, in order. ``{name}`` in any text stands for a variable of the chosen preset
or of the row's ``each`` (lists whose combinations become one row each); text that is nothing but ``{name}`` takes the
variable's own type, other text is formatted as by `str.format`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from slimkernels.recipes.checks import listed, mapping, positive, repeated_key, seconds, unknown

VERBS = ("train", "distill", "prune", "factorize", "finalize", "convert")
TRAINING_VERBS = ("train", "distill")
# Numbers of the paper that a row may quote beside its own.
PAPER_KEYS = ("accuracy", "compression", "speedup", "row")

_RECIPE_KEYS = ("name", "title", "presets", "rows", "compared", "published")
_PRESET_KEYS = (
    "data",
    "batch_size",
    "batches",
    "seconds",
    "variables",
    "note",
    "leave_out",
    "policy",
    "goals",
    "dtype",
    "train_seconds",
    "checkpoints",
)
_ROW_KEYS = ("name", "group", "each", "model", "from", "steps", "paper", "note", "values", "seeds", "seconds")
# A point of others: `points` of accuracy against its own dense network, `counted` in bytes or in parameters.
_PUBLISHED_KEYS = ("name", "network", "compression", "points", "counted", "source")
DTYPES = ("fp32", "bf16")
COUNTED = ("bytes", "parameters")
# What one row is to reach at once; `rows` is a pattern of names, `batch` where the speed-up counts.
GOAL_KEYS = ("rows", "compression", "relative_accuracy", "points", "speedup", "batch")
_STEP_COMPANIONS = {
    "train": ("prune", "quantize", "sparse"),
    "distill": ("prune", "quantize", "sparse", "teacher", "loss", "temperature", "soft_weight", "cache_logits"),
}
# Beside TrainConfig's fields: a mapping to start from, the batch size, how many of the training images are used, and
# how these are augmented.
_TRAINING_EXTRAS = ("use", "batch_size", "images", "augment")
_PLACEHOLDER = re.compile(r"^\{(\w+)\}$")


@dataclass(frozen=True)
class Step:
    """One step: its verb, its settings, and the keys beside the verb (``prune``, ``quantize``, ``teacher``, ...).

    A key beside the verb whose value is null, such as by a preset's variable, is as if it were not there.
    """

    verb: str
    settings: Mapping[str, Any]
    companions: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values; equal steps give equal ones."""
        return {"verb": self.verb, "settings": dict(self.settings), "companions": dict(self.companions)}


@dataclass(frozen=True)
class Row:
    """One line of the report.

    ``model`` (name and options for `models.build`) or ``source`` (an earlier row) is where the network comes from; a
    source is taken finalized: its zeros are there, but only a ``prune`` of this row keeps them while it trains.
    ``paper`` quotes the paper's own numbers; ``group`` gathers rows in tables and pictures; ``labels`` are the values
    of the row's ``each``. ``values`` is how `slimkernels.save` writes the row's weights, by default as they were
    trained to be rounded; ``seeds`` the least number of seeds that the row is run with; ``seconds`` what each of its
    trainings may take.
    """

    name: str
    group: str
    steps: tuple[Step, ...]
    model: Mapping[str, Any] | None = None
    source: str | None = None
    paper: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    values: str = "fp32"
    seeds: int = 1
    seconds: float | None = None

    @property
    def slug(self) -> str:
        """The row's name as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-").lower()

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the rows that must be finished before this one."""
        teachers = [str(step.companions.get("teacher", "teacher")) for step in self.steps if step.verb == "distill"]
        return tuple(dict.fromkeys([*([self.source] if self.source else []), *teachers]))

    @property
    def budget(self) -> tuple[tuple[float, int | None], ...]:
        """Epochs of the row's own trainings by the number of images of an epoch (None: all): how long it is trained."""
        found: dict[int | None, float] = {}
        for step in self.steps:
            if step.verb in TRAINING_VERBS:
                images = step.settings.get("images")
                found[images] = found.get(images, 0) + step.settings.get("epochs", 0)
        return tuple((epochs, images) for images, epochs in sorted(found.items(), key=str))


@dataclass(frozen=True)
class Recipe:
    """A recipe under one preset: rows in order, and how they are trained and measured.

    ``data`` is the data set that the preset brings itself (None: the caller names one); ``batches`` and ``seconds`` are
    the batch sizes, at all of which a swapped layer has to be faster, and the timing budget per network of the
    measurement, and ``policy`` the `Policy` of its conversions. ``goals`` are what one row is to reach at once
    (`GOAL_KEYS`), ``published`` what others reached.
    ``dtype`` is that of the networks as they are measured, ``train_seconds`` what all trainings of a call may take
    together; without ``checkpoints`` a training that is interrupted begins anew.
    """

    name: str
    title: str
    preset: str
    rows: tuple[Row, ...]
    data: str | None
    batch_size: int
    batches: tuple[int, ...]
    seconds: float
    note: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Mapping[str, Any], ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    dtype: str = "fp32"
    train_seconds: float | None = None
    checkpoints: bool = True

    def row(self, name: str) -> Row:
        """The row of that name. Raises ValueError naming near misses."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(unknown(f"recipe {self.name!r}: expected a row", name, [row.name for row in self.rows]))

    def conversion(self, row: Row) -> dict[str, Any]:
        """How a row's finished network becomes what is measured: ``policy``, ``values`` and ``dtype``."""
        policy = dict(self.policy)
        for step in row.steps:
            if step.verb == "convert":
                policy.update(step.settings)
        return {"policy": policy, "values": row.values, "dtype": self.dtype}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("slimkernels.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str | Path, preset: str) -> Recipe:
    """A recipe of the package by name, or of a ``.yaml`` file by path, under one of its presets.

    Raises:
        ValueError: no such recipe or preset, text that is not YAML, an unknown key (near misses are named), a missing
            key, a variable that is not defined, a row that needs one that does not come before it, or rows that are
            compared and not trained equally long.
        TypeError: a value of the wrong type.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"load_recipe: expected a file, got {path}, which does not exist")
        return parse_recipe(path.read_text(encoding="utf-8"), preset, str(path))
    if str(name) not in recipe_names():
        raise ValueError(unknown("load_recipe: expected a recipe", str(name), recipe_names()))
    text = resources.files("slimkernels.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_recipe(text, preset, f"{name}.yaml")


def parse_recipe(text: str, preset: str, where: str = "recipe") -> Recipe:
    """The recipe in a YAML text; errors as `load_recipe`, beginning with ``where``."""
    import yaml

    try:
        data, repeated = yaml.safe_load(text), repeated_key(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{where}: expected YAML, got {line}") from error
    if repeated is not None:
        raise ValueError(f"{where}: expected every key once, got {repeated}")
    data = mapping(data, where, _RECIPE_KEYS, required=("name", "presets", "rows"))
    presets = mapping(data["presets"], f"{where}: presets", None)
    if preset not in presets:
        raise ValueError(unknown(f"{where}: expected a preset", preset, presets))
    chosen = mapping(presets[preset], f"{where}: preset {preset}", _PRESET_KEYS, required=("batch_size",))
    variables = mapping(chosen.get("variables") or {}, f"{where}: variables of preset {preset}", None)
    if not isinstance(data["rows"], list) or not data["rows"]:
        raise ValueError(f"{where}: expected rows to be a list, got {type(data['rows']).__name__}")
    rows: list[Row] = []
    for index, entry in enumerate(data["rows"]):
        rows += _rows(entry, variables, f"{where}: rows[{index}]")
    every = rows
    rows = _without(every, chosen.get("leave_out") or [], where)
    _check_order(rows, where)
    for patterns in listed(data.get("compared") or [], f"{where}: compared"):
        _check_budgets(patterns, every, rows, f"{where}: compared")
    return Recipe(
        name=str(data["name"]),
        title=str(data.get("title", data["name"])),
        preset=preset,
        rows=tuple(rows),
        data=chosen.get("data"),
        batch_size=positive(chosen["batch_size"], f"{where}: batch_size"),
        batches=tuple(
            positive(b, f"{where}: batches") for b in listed(chosen.get("batches", (1, 128)), f"{where}: batches")
        ),
        seconds=_timing(chosen.get("seconds", 1.0), f"{where}: seconds of preset {preset}"),
        note=str(chosen.get("note", "")),
        policy=mapping(chosen.get("policy") or {}, f"{where}: policy of preset {preset}", _settings_of("convert")),
        goals=tuple(
            mapping(goal, f"{where}: goals of preset {preset}", GOAL_KEYS)
            for goal in listed(chosen.get("goals", ()), f"{where}: goals of preset {preset}")
        ),
        dtype=_dtype(chosen.get("dtype", "fp32"), f"{where}: dtype of preset {preset}"),
        train_seconds=seconds(chosen.get("train_seconds"), f"{where}: train_seconds of preset {preset}"),
        checkpoints=_flag(chosen.get("checkpoints", True), f"{where}: checkpoints of preset {preset}"),
        published=tuple(
            _published(point, f"{where}: published")
            for point in listed(data.get("published") or (), f"{where}: published")
        ),
    )


def _timing(value: Any, where: str) -> float:
    """Seconds; 0 measures as briefly as can be."""
    return 0.0 if value == 0 and not isinstance(value, bool) else seconds(value, where) or 1.0


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{where}: expected true or false, got {value!r}")
    return value


def _dtype(value: Any, where: str) -> str:
    if value not in DTYPES:
        raise ValueError(unknown(f"{where}: expected one", str(value), DTYPES))
    return str(value)


def _published(point: Any, where: str) -> dict[str, Any]:
    point = mapping(point, where, _PUBLISHED_KEYS, required=_PUBLISHED_KEYS)
    if point["counted"] not in COUNTED:
        raise ValueError(unknown(f"{where}: {point['name']}: counted: expected one", str(point["counted"]), COUNTED))
    return point


def _rows(entry: Any, variables: Mapping[str, Any], where: str) -> list[Row]:
    """The rows that one entry of the file stands for."""
    entry = mapping(entry, where, _ROW_KEYS, required=("name", "group", "steps"))
    each = mapping(_filled(entry.get("each") or {}, variables, where), f"{where}: each", None)
    axes: list[list[dict[str, Any]]] = []
    for name, values in each.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: expected each.{name} to be a list, got {values!r}")
        axes.append([dict(value) if isinstance(value, Mapping) else {name: value} for value in values])
    rows = []
    for combination in itertools.product(*axes):
        own = {key: value for part in combination for key, value in part.items()}
        bound = {**variables, **own}
        rows.append(_row({k: _filled(v, bound, where) for k, v in entry.items() if k != "each"}, own, where))
    return rows


def _row(entry: Mapping[str, Any], labels: Mapping[str, Any], where: str) -> Row:
    from slimkernels.conversion.compact_index import VALUES

    name = str(entry["name"])
    where = f"{where} ({name})"
    if ("model" in entry) == ("from" in entry):
        raise ValueError(f"{where}: expected either model or from, got {'both' if 'model' in entry else 'neither'}")
    model = mapping(entry["model"], f"{where}: model", None, required=("name",)) if "model" in entry else None
    if not isinstance(entry["steps"], list):
        raise ValueError(f"{where}: expected steps to be a list, got {entry['steps']!r}")
    steps = tuple(_step(step, f"{where}: steps[{i}]") for i, step in enumerate(entry["steps"]))
    paper = mapping(entry.get("paper") or {}, f"{where}: paper", PAPER_KEYS)
    rounded = [step.companions["quantize"]["values"] for step in steps if "quantize" in step.companions]
    values = str(entry.get("values", rounded[-1] if rounded else "fp32"))
    if values not in VALUES:
        raise ValueError(unknown(f"{where}: values: expected one", values, VALUES))
    return Row(
        name=name,
        group=str(entry["group"]),
        steps=steps,
        model=model,
        source=entry.get("from"),
        paper=paper,
        note=str(entry.get("note", "")),
        labels=labels,
        values=values,
        seeds=positive(entry.get("seeds", 1), f"{where}: seeds"),
        seconds=seconds(entry.get("seconds"), f"{where}: seconds"),
    )


def _step(entry: Any, where: str) -> Step:
    entry = mapping({entry: {}} if isinstance(entry, str) else entry, where, None)
    verbs = [key for key in entry if key in TRAINING_VERBS] or [key for key in entry if key in VERBS]
    if len(verbs) != 1:
        if not verbs and entry:
            raise ValueError(unknown(f"{where}: expected a step", str(next(iter(entry))), VERBS))
        raise ValueError(f"{where}: expected one step among {', '.join(VERBS)}, got {', '.join(map(str, entry))}")
    verb = verbs[0]
    companions = mapping(
        {k: v for k, v in entry.items() if k != verb}, f"{where} ({verb})", _STEP_COMPANIONS.get(verb, ())
    )
    companions = {key: value for key, value in companions.items() if value is not None}
    settings = mapping(entry[verb] or {}, f"{where}: {verb}", None)
    if verb in TRAINING_VERBS:
        settings = {**mapping(settings.get("use") or {}, f"{where}: use", None), **settings}
        settings.pop("use", None)
    mapping(settings, f"{where}: {verb}", _settings_of(verb))
    if "augment" in settings:
        mapping(settings["augment"], f"{where}: augment", _settings_of("augment"))
    if "prune" in companions:
        mapping(companions["prune"], f"{where}: prune", {*_settings_of("gradual"), "speedup"})
    if "sparse" in companions:
        mapping(companions["sparse"], f"{where}: sparse", _settings_of("sparse"))
    if "quantize" in companions:
        mapping(companions["quantize"], f"{where}: quantize", _settings_of("quantize"), required=("values",))
    if verb in TRAINING_VERBS:
        _check_config(settings, f"{where}: {verb}")
    return Step(verb, settings, companions)


def _check_config(settings: Mapping[str, Any], where: str) -> None:
    """Refuses numbers that a training would refuse when its row's turn comes, hours later maybe."""
    from slimkernels.compress.training.train import TrainConfig

    own = {key: value for key, value in settings.items() if key not in _TRAINING_EXTRAS}
    if own.get("precision") == "auto":
        del own["precision"]  # the device decides
    if "epochs" not in own:
        raise ValueError(f"{where}: expected key 'epochs', got {', '.join(own) or 'none'}")
    try:
        TrainConfig(**own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _settings_of(verb: str) -> Collection[str]:
    """The keys that a step takes: the keywords of the function that it calls."""
    import dataclasses
    import inspect

    if verb in TRAINING_VERBS:
        from slimkernels.compress.training.train import TrainConfig

        return {f.name for f in dataclasses.fields(TrainConfig)} - {"seed"} | set(_TRAINING_EXTRAS)
    if verb == "convert":
        from slimkernels.conversion.plan import Policy

        return {f.name for f in dataclasses.fields(Policy)} - {"serve"}  # no plain data
    if verb == "finalize":
        return ()
    from slimkernels.compress.factorization.factorize import factorize_
    from slimkernels.compress.pruning.gradual import GradualPruning
    from slimkernels.compress.pruning.prune import prune_
    from slimkernels.compress.pruning.sparse_training import SparseTraining
    from slimkernels.compress.quantization import QuantizationAware
    from slimkernels.data import TensorLoader

    functions: dict[str, Any] = {
        "prune": prune_,
        "factorize": factorize_,
        "gradual": GradualPruning.__init__,
        "quantize": QuantizationAware.__init__,
        "sparse": SparseTraining.__init__,
        "augment": TensorLoader.augmented,
    }
    function = functions[verb]
    keys = set(inspect.signature(function).parameters) - {"model", "self", "options"}
    # For mypy: a set for the verbs that prune.
    return keys | (_settings_of("prune") if verb == "gradual" else set())  # type: ignore[operator]


def _filled(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """The value with every placeholder replaced, at any depth."""
    if isinstance(value, Mapping):
        return {key: _filled(item, variables, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables, where) for item in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    alone = _PLACEHOLDER.match(value)
    try:
        if alone:
            return _filled(variables[alone[1]], variables, where)
        return value.format_map(variables)
    except KeyError as error:
        raise ValueError(unknown(f"{where}: expected a variable", str(error.args[0]), variables)) from None
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected text with {{variables}}, got {value!r}: {error}") from error
    except RecursionError:
        raise ValueError(f"{where}: variable {value!r} stands for itself") from None


def _check_budgets(patterns: Any, every: list[Row], rows: list[Row], where: str) -> None:
    """Refuses rows of one comparison, chosen by patterns of names or groups, that are not trained equally long."""
    if not isinstance(patterns, list):
        raise TypeError(f"{where}: expected lists of rows or groups, got {patterns!r}")
    for pattern in patterns:
        if not any(_matches(row, str(pattern)) for row in every):
            known = dict.fromkeys([*(row.name for row in every), *(row.group for row in every)])
            raise ValueError(unknown(f"{where}: expected a row or a group", str(pattern), known))
    same = [row for row in rows if any(_matches(row, str(pattern)) for pattern in patterns)]
    for row in same[1:]:
        if row.budget != same[0].budget:
            raise ValueError(
                f"{where}: expected rows that are trained equally long, got {_words(same[0].budget)} of "
                f"{same[0].name!r} and {_words(row.budget)} of {row.name!r}"
            )


def _matches(row: Row, pattern: str) -> bool:
    return fnmatchcase(row.name, pattern) or fnmatchcase(row.group, pattern)


def _words(budget: Sequence[tuple[float, int | None]]) -> str:
    parts = [f"{epochs:g} epochs" + (f" of {images} images" if images else "") for epochs, images in budget]
    return " and ".join(parts) or "no training"


def _without(rows: list[Row], patterns: list[str], where: str) -> list[Row]:
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise ValueError(unknown(f"{where}: leave_out: expected a row", pattern, [row.name for row in rows]))
    return [row for row in rows if not any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def _check_order(rows: list[Row], where: str) -> None:
    names: list[str] = []
    slugs: set[str] = set()
    for row in rows:
        if row.slug in slugs:
            raise ValueError(f"{where}: expected rows of different names, got {row.name!r} twice")
        for needed in row.needs:
            if needed not in names:
                raise ValueError(unknown(f"{where}: row {row.name!r}: expected an earlier row", needed, names))
        names.append(row.name)
        slugs.add(row.slug)
