"""What conversion decided: `Policy` in, `ModelPlan` out, both plain data with a JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from slimkernels import env
from slimkernels.conversion.analysis import CANDIDATE_BLOCK_SHAPES
from slimkernels.formats import LOW_RANK_KINDS, block_shape_2d
from slimkernels.kernels import EPILOGUES

ACTIONS = ("swap", "keep", "fold", "fuse")
FORMATS = ("bsr", "low_rank", "fused", "dense")
MEASURED, SHAPELESS = "measured", "cost model, without shapes"
COST_MODEL = "cost model"
DECIDED = (MEASURED, COST_MODEL, SHAPELESS)
PLAN_VERSION = 1
SWAP_DTYPES = ("float64", "float32", "float16", "bfloat16")
# Sizes, strides and ranks beyond this fit no kernel; other integers are byte counts.
_MAX_SIZE, _MAX_INT = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True)
class Policy:
    """How `slimkernels.convert` decides.

    Attributes:
        backend: ``auto`` or the backend whose kernels the swapped layers are tied to.
        min_speedup: a layer is swapped where dense time >= ``min_speedup`` * sparse time at every example input. Where
            the spread of the measured times leaves that open, they are measured up to four times as long; where it is
            still open, the cost model decides, and the report says so. 0 swaps every layer that a kernel takes.
        block_shapes: candidates for layers that declare no block shape.
        measured_candidates: how many of them, fastest by prediction first, are timed per layer.
        measure: time layers where example inputs are given; else the cost model decides at their shapes.
        repeats: most timed rounds per layer.
        budget_s: most seconds per layer and example input, at least three rounds.
        fold_bn: fold batch norm into its convolution.
        fuse_relu: run a ReLU that follows a layer in the layer's kernel.
        fuse_pool: run a 2x2 max-pool that follows the ReLU in the layer's kernel.
        prefer_smaller: swap a layer that is stored in fewer bytes also where it is only as fast as dense, or where
            noise hides which is faster. Off, it has to be faster by ``min_speedup``.
        dense_layers: also try layers without a zero block (their whole weight is then stored as blocks).
        merge_low_rank: chains of thin layers and low-rank layers may be merged to dense where that is faster. Off, they
            keep their rank, and the size on disk that goes with it; they are then fused where that is faster.
        exclude: layers that stay as they are: names, names of what contains them, patterns such as ``*.attn.*``.
        check_model: with example inputs, also time the whole model, and keep it dense where it is not faster.
        serve: how the model will be called, such as `slimkernels.graphed`: a function of a model and a list of its
            example inputs that returns what is called with one of them. The whole model, dense and converted, is then
            timed as that; None times plain calls. A recording skips what plain calls do between layers, so a network
            of thin layers may be faster than dense as a recording alone. With it each layer on a GPU is timed in a
            CUDA graph, without the time that Python takes.

    Raises:
        ValueError: a value out of range, named.

    Example:
        >>> import slimkernels as sk
        >>> policy = sk.Policy(serve=sk.graphed)  # sk.graphed(sk.convert(model, x, policy=policy), x)
    """

    backend: str = "auto"
    min_speedup: float = 1.05
    block_shapes: tuple[tuple[int, int], ...] = CANDIDATE_BLOCK_SHAPES
    measured_candidates: int = 2
    measure: bool = True
    repeats: int = 15
    budget_s: float = 0.1
    fold_bn: bool = True
    fuse_relu: bool = True
    fuse_pool: bool = True
    prefer_smaller: bool = False
    dense_layers: bool = True
    merge_low_rank: bool = True
    exclude: tuple[str, ...] = ()
    check_model: bool = True
    serve: Callable[[Any, list[Any]], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        if self.backend not in env.BACKENDS:
            raise ValueError(f"Policy: expected backend in {', '.join(env.BACKENDS)}, got {self.backend!r}")
        if not self.min_speedup >= 0:
            raise ValueError(f"Policy: expected min_speedup >= 0, got {self.min_speedup}")
        for name, least in (("measured_candidates", 1), ("repeats", 1), ("budget_s", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"Policy: expected {name} >= {least}, got {getattr(self, name)}")
        if self.serve is not None and not callable(self.serve):
            raise ValueError(f"Policy: expected serve to be a function or None, got {self.serve!r}")
        if not self.block_shapes:
            raise ValueError("Policy: expected at least one block shape, got none")
        if isinstance(self.exclude, str):
            raise ValueError(f"Policy: expected exclude to be names of layers, got the string {self.exclude!r}")
        if all(isinstance(size, int) for size in self.block_shapes):
            raise ValueError(
                "Policy: expected block_shapes to be several shapes (block_out, block_in), got one, "
                f"{tuple(self.block_shapes)}; write ({tuple(self.block_shapes)},)"
            )
        object.__setattr__(self, "block_shapes", tuple(block_shape_2d(b, "Policy") for b in self.block_shapes))
        object.__setattr__(self, "exclude", tuple(self.exclude))


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Attributes:
        name: of the module in the original model.
        type: its class in the original model.
        action: ``swap`` (replaced by a module of ``format``), ``keep`` (a batch norm may be folded into it), ``fold``
            (a batch norm or a factor, now inside ``into``), ``fuse`` (a ReLU or max-pool, now in ``into``'s epilogue).
        reason: why.
        format: of a swapped module: ``bsr``, ``low_rank``, ``fused`` (dense, its epilogue in the same kernel), or
            ``dense`` (a merged chain).
        into: the module that took over a folded or fused one.
        supported: False where conversion cannot take this layer at all (``strict=True`` raises for these).
        weight_shape: of a swapped module.
        block_shape: of a block-sparse module, ``(block_out, block_in)``.
        kind: of a low-rank module: ``svd``, ``tai`` or ``tucker2``.
        ranks: inner sizes of a low-rank module.
        bias: whether a swapped module has one.
        stride: of a swapped convolution.
        padding: of a swapped convolution.
        dilation: of a swapped convolution.
        dtype: of its weight, such as ``float32``.
        epilogue: of a swapped module.
        kernel: what a swapped module ran when it was converted; another device chooses its own.
        tied: the module asks for ``kernel`` by name (``Policy.backend`` was not ``auto``).
        sparsity: share of zero weights.
        block_sparsity: share of blocks that are not stored.
        bytes_dense: of the dense weight and bias.
        bytes_stored: of what is stored for them: values, indices, bias.
        dense_ms: time of the dense layer with its ReLU and pool, one number per example input.
        sparse_ms: time of what was compared with it, one number per example input.
        speedup_low: the least that the speed-up is, with 99 % confidence.
        speedup_high: the most that it is.
        mask_block_shape: block shape of a training mask that stays on a kept layer.
        folded_bn: whether a batch norm's scale and shift are inside this layer's weight.
        channels_last: whether a kept convolution holds its weight in channels_last.
    """

    name: str
    type: str
    action: str
    reason: str = ""
    format: str | None = None
    into: str | None = None
    supported: bool = True
    weight_shape: tuple[int, ...] | None = None
    block_shape: tuple[int, int] | None = None
    kind: str | None = None
    ranks: tuple[int, ...] | None = None
    bias: bool = False
    stride: tuple[int, int] | None = None
    padding: tuple[int, int] | None = None
    dilation: tuple[int, int] | None = None
    dtype: str | None = None
    epilogue: str = "none"
    kernel: str | None = None
    tied: bool = False
    sparsity: float = 0.0
    block_sparsity: float = 0.0
    bytes_dense: int = 0
    bytes_stored: int = 0
    dense_ms: tuple[float, ...] = ()
    sparse_ms: tuple[float, ...] = ()
    speedup_low: tuple[float, ...] = ()
    speedup_high: tuple[float, ...] = ()
    mask_block_shape: tuple[int, int] | None = None
    folded_bn: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        where = f"LayerPlan {self.name!r}"
        if self.action not in ACTIONS:
            raise ValueError(f"{where}: expected action in {', '.join(ACTIONS)}, got {self.action!r}")
        if (self.format is None) != (self.action != "swap") or self.format not in (None, *FORMATS):
            raise ValueError(f"{where}: expected format in {', '.join(FORMATS)} of a swap alone, got {self.format!r}")
        if (self.into is None) != (self.action not in ("fold", "fuse")):
            raise ValueError(f"{where}: expected into of a fold or fuse alone, got {self.into!r}")
        if self.action != "keep" and not self.name:
            raise ValueError(f"{where}: expected {self.action} of a module inside the model, got the model itself")
        shape = self.weight_shape
        if shape is not None and not _sizes_fit(shape, 0):
            raise ValueError(f"{where}: expected weight_shape of sizes up to {_MAX_SIZE}, got {_shown(shape)}")
        if self.mask_block_shape is not None and (self.action != "keep" or not _sizes_fit(self.mask_block_shape, 1, 2)):
            raise ValueError(
                f"{where}: expected mask_block_shape of 2 positive sizes of a kept layer, "
                f"got {_shown(self.mask_block_shape)}"
            )
        if self.channels_last and not (shape is not None and len(shape) == 4 and self.format in (None, "dense")):
            raise ValueError(f"{where}: expected channels_last of a dense convolution alone")
        for name in ("sparsity", "block_sparsity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{where}: expected {name} in [0, 1], got {getattr(self, name)}")
        for name in ("bytes_dense", "bytes_stored"):
            if not 0 <= getattr(self, name) <= _MAX_INT:
                raise ValueError(f"{where}: expected {name} in [0, {_MAX_INT}], got {_shown(getattr(self, name))}")
        if self.action == "swap":
            self._check_swap(where)
            return
        for name in ("block_shape", "kind", "ranks", "stride", "padding", "dilation"):
            if getattr(self, name) is not None:
                raise ValueError(f"{where}: expected {name} of a swap alone, got {_shown(getattr(self, name))}")

    def _check_swap(self, where: str) -> None:
        shape = self.weight_shape
        if shape is None or len(shape) not in (2, 4) or min(shape) < 1:
            raise ValueError(f"{where}: expected weight_shape of 2 or 4 positive sizes, got {_shown(shape)}")
        conv = len(shape) == 4
        if self.format == "fused" and not conv:
            raise ValueError(f"{where}: expected format 'fused' of a convolution alone, got weight_shape {shape}")
        block_shape = self.block_shape
        if (block_shape is None) != (self.format != "bsr"):
            raise ValueError(f"{where}: expected block_shape of format 'bsr' alone, got {_shown(block_shape)}")
        if block_shape is not None and not _sizes_fit(block_shape, 1, 2):
            raise ValueError(f"{where}: expected block_shape of 2 positive sizes, got {_shown(block_shape)}")
        self._check_low_rank(where, conv)
        if self.dtype not in SWAP_DTYPES:
            raise ValueError(f"{where}: expected dtype in {', '.join(SWAP_DTYPES)}, got {self.dtype!r}")
        op = f"{self.format}_{'conv2d' if conv else 'linear'}"
        epilogues = EPILOGUES.get(op, frozenset({"none"}))
        if self.epilogue not in epilogues:
            raise ValueError(f"{where}: expected epilogue in {sorted(epilogues)}, got {self.epilogue!r}")
        for name in ("stride", "padding", "dilation"):
            pair = getattr(self, name)
            if not conv and pair is not None:
                raise ValueError(f"{where}: expected {name} of a convolution alone, got {_shown(pair)}")
            if conv and (pair is None or not _sizes_fit(pair, int(name != "padding"), 2)):
                raise ValueError(f"{where}: expected {name} of 2 sizes, got {_shown(pair)}")

    def _check_low_rank(self, where: str, conv: bool) -> None:
        """``kind`` and ``ranks``: of format ``low_rank`` alone, and as many ranks as the kind has."""
        if self.format != "low_rank":
            if self.kind is not None or self.ranks is not None:
                got = f"{self.kind!r} and {_shown(self.ranks)}"
                raise ValueError(f"{where}: expected kind and ranks of format 'low_rank' alone, got {got}")
            return
        kinds = LOW_RANK_KINDS if conv else ("svd",)
        if self.kind not in kinds:
            raise ValueError(f"{where}: expected kind in {', '.join(kinds)}, got {self.kind!r}")
        count = 2 if self.kind == "tucker2" else 1
        if self.ranks is None or not _sizes_fit(self.ranks, 1, count):
            raise ValueError(f"{where}: expected {count} positive ranks, got {_shown(self.ranks)}")


@dataclass(frozen=True)
class ModelPlan:
    """The layers of a converted model and how it was decided.

    Attributes:
        layers: in the order of the original's ``named_modules``.
        decided: ``measured``, ``cost model``, or ``cost model, without shapes``.
        training: whether the result is to be trained (nothing folded).
        device: type of the device the decision holds for.
        threads: CPU threads it was measured with.
        versions: of slimkernels and torch.
        dense_ms: time of the whole dense model, one number per example input; empty where not measured.
        converted_ms: time of the whole converted model, likewise.
        speedup_low: the least that the speed-up is, with 99 % confidence.
        speedup_high: the most that it is.
        notes: lines for the report, such as why the model could not be traced.
        contiguous_outputs: modules whose outputs are made contiguous, since code of the model's own takes no other.
        builder: of a saved model, how `slimkernels.models.build` makes its architecture, as JSON: ``model``,
            ``num_classes``, ``options``.
    """

    layers: tuple[LayerPlan, ...]
    decided: str
    training: bool = False
    device: str = "cpu"
    threads: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    dense_ms: tuple[float, ...] = ()
    converted_ms: tuple[float, ...] = ()
    speedup_low: tuple[float, ...] = ()
    speedup_high: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    contiguous_outputs: tuple[str, ...] = ()
    builder: str | None = None

    def __post_init__(self) -> None:
        if self.decided not in DECIDED:
            raise ValueError(f"ModelPlan: expected decided in {DECIDED}, got {self.decided!r}")
        if self.threads < 1:
            raise ValueError(f"ModelPlan: expected threads >= 1, got {_shown(self.threads)}")
        layers: dict[str, LayerPlan] = {}
        for layer in self.layers:
            if layer.name in layers:
                raise ValueError(f"ModelPlan: expected each layer once, got {layer.name!r} twice")
            layers[layer.name] = layer
        for layer in self.layers:
            _check_target(layer, layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def swapped(self) -> list[str]:
        """Names of the swapped layers."""
        return [layer.name for layer in self.layers if layer.action == "swap"]

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan back."""
        return json.dumps({"plan_version": PLAN_VERSION, **dataclasses.asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ModelPlan:
        """The plan of a JSON text.

        Raises:
            ValueError: not JSON, another version, or a field that is missing, unknown or out of range; named.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"ModelPlan: expected JSON, got {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"ModelPlan: expected a JSON object, got {type(data).__name__}")
        version = data.pop("plan_version", None)
        if type(version) is not int or version != PLAN_VERSION:
            raise ValueError(f"ModelPlan: expected plan_version {PLAN_VERSION}, got {_shown(version)}")
        layers = data.get("layers")
        if not isinstance(layers, list):
            raise ValueError(f"ModelPlan: expected layers to be a list, got {type(layers).__name__}")
        data["layers"] = [_from_plain(LayerPlan, layer, f"ModelPlan: layers[{i}]") for i, layer in enumerate(layers)]
        return _from_plain(cls, data, "ModelPlan")


def _check_target(layer: LayerPlan, layers: Mapping[str, LayerPlan]) -> None:
    """Raises ValueError where ``into`` names no layer, or one that can take nothing over."""
    where, allowed = f"LayerPlan {layer.name!r}", ("swap",) if layer.action == "fuse" else ("swap", "keep", "fold")
    if layer.into is None:
        return
    if layer.into not in layers:
        raise ValueError(f"{where}: expected into to name a layer, got {layer.into!r}")
    target = layers[layer.into]
    if target.action not in allowed:
        words = f"{layer.into!r} of action {target.action!r}"
        raise ValueError(f"{where}: expected into to name a layer of action {' or '.join(allowed)}, got {words}")
    # A batch norm may be inside a factor that is inside another layer; that one stays.
    end = target if target.into is None else layers.get(target.into)
    if end is None or end.action not in ("swap", "keep"):
        raise ValueError(f"{where}: expected into to lead to a layer that stays, got {layer.into!r}")


def faster_everywhere(dense: Sequence[float], other: Sequence[float], min_speedup: float) -> bool:
    """The rule of every swap: ``dense >= min_speedup * other`` at each size."""
    return len(dense) > 0 and all(d >= min_speedup * o for d, o in zip(dense, other, strict=True))


def parse_json(text: str) -> Any:
    """The value of a JSON text in which no name occurs twice, no number is NaN or infinite, and all text is Unicode.

    Raises:
        ValueError: anything else, too deep a nesting included.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"the number {name}")

    try:
        text.encode()  # half of a surrogate pair is no text
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _sizes_fit(sizes: tuple[int, ...], least: int, count: int | None = None) -> bool:
    return (count is None or len(sizes) == count) and all(least <= size <= _MAX_SIZE for size in sizes)


def _shown(value: Any) -> str:
    """A value from a file in a message: shortened, however long or deep it is."""
    return reprlib.repr(value)


def _from_plain(cls: type, data: Any, where: str) -> Any:
    """A dataclass from JSON data, lists as tuples; every field's type is checked."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown field {_shown(unknown[0])}")
    hints, arguments = get_type_hints(cls), {}
    for name, f in fields.items():
        if name not in data:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: expected field {name!r}, got none")
            continue
        value = tuple(data[name]) if isinstance(data[name], list) else data[name]
        if not _fits(value, str(hints[name])):
            raise ValueError(f"{where}: expected {name} to be {f.type}, got {_shown(data[name])}")
        arguments[name] = value
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: str) -> bool:
    """Whether a JSON value has the type of a field of the plan; the hints are those that this file uses.

    Numbers are finite, integers those of 64 bits, and text can be written as UTF-8.
    """
    if value is None:
        return "None" in hint
    if "tuple" in hint:
        if not isinstance(value, tuple):
            return False
        for kind in ("float", "int", "str"):
            if kind in hint:
                return all(_fits(item, kind) and item is not None for item in value)
        return True  # of layers, which were read before
    if "Mapping" in hint:
        return isinstance(value, dict) and all(_fits(key, "str") and _fits(v, "str") for key, v in value.items())
    if "bool" in hint:
        return isinstance(value, bool)
    if "float" in hint:
        return _fits(value, "int") or (isinstance(value, float) and math.isfinite(value))
    if "int" in hint:
        return type(value) is int and -_MAX_INT <= value <= _MAX_INT
    return isinstance(value, str) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
