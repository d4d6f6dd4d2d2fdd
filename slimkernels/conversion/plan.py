"""What conversion decided: `Policy` in, `ModelPlan` out, both plain data with a JSON form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from slimkernels import env
from slimkernels.conversion.analysis import CANDIDATE_BLOCK_SHAPES
from slimkernels.formats import LOW_RANK_KINDS, block_shape_2d
from slimkernels.kernels import EPILOGUES

ACTIONS = ("swap", "keep", "fold", "fuse")
FORMATS = ("bsr", "low_rank", "dense")
MEASURED, SHAPELESS = "measured", "cost model, without shapes"
COST_MODEL = "cost model"
DECIDED = (MEASURED, COST_MODEL, SHAPELESS)
PLAN_VERSION = 1
SWAP_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Policy:
    """How `slimkernels.convert` decides.

    Attributes:
        backend: ``auto`` or the backend whose kernels the swapped layers are tied to.
        min_speedup: a layer is swapped where dense time >= ``min_speedup`` * sparse time at every example input. The
            default asks for 5 %, so that noise does not decide. 0 swaps every layer that a kernel takes.
        block_shapes: candidates for layers that declare no block shape.
        measured_candidates: how many of them, fastest by prediction first, are timed per layer.
        measure: time layers where example inputs are given; else the cost model decides at their shapes.
        repeats: most timed rounds per layer. budget_s: most seconds per layer and example input, at least three rounds.
        fold_bn: fold batch norm into its convolution. fuse_relu, fuse_pool: run ReLU, 2x2 max-pool in the kernel.
        dense_layers: also try layers without a zero block (their whole weight is then stored as blocks).
        merge_low_rank: chains of thin layers and low-rank layers may be merged to dense where that is faster. Off, they
            keep their rank, and the size on disk that goes with it; they are then fused where that is faster.
        exclude: names of layers that stay as they are.
        check_model: with example inputs, also time the whole model, and keep it dense where it is not faster.

    Raises:
        ValueError: a value out of range, named.
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
    dense_layers: bool = True
    merge_low_rank: bool = True
    exclude: tuple[str, ...] = ()
    check_model: bool = True

    def __post_init__(self) -> None:
        if self.backend not in env.BACKENDS:
            raise ValueError(f"Policy: expected backend in {', '.join(env.BACKENDS)}, got {self.backend!r}")
        if not self.min_speedup >= 0:
            raise ValueError(f"Policy: expected min_speedup >= 0, got {self.min_speedup}")
        for name, least in (("measured_candidates", 1), ("repeats", 1), ("budget_s", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"Policy: expected {name} >= {least}, got {getattr(self, name)}")
        if not self.block_shapes:
            raise ValueError("Policy: expected at least one block shape, got none")
        if isinstance(self.exclude, str):
            raise ValueError(f"Policy: expected exclude to be names of layers, got the string {self.exclude!r}")
        object.__setattr__(self, "block_shapes", tuple(block_shape_2d(b) for b in self.block_shapes))
        object.__setattr__(self, "exclude", tuple(self.exclude))


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Attributes:
        name, type: of the module in the original model.
        action: ``swap`` (replaced by a module of ``format``), ``keep`` (a batch norm may be folded into it), ``fold``
            (a batch norm or a factor, now inside ``into``), ``fuse`` (a ReLU or max-pool, now in ``into``'s epilogue).
        reason: why.
        format: of a swapped module: ``bsr``, ``low_rank``, or ``dense`` (a merged chain).
        into: the module that took over a folded or fused one.
        supported: False where conversion cannot take this layer at all (``strict=True`` raises for these).
        weight_shape, block_shape, kind, ranks, bias, stride, padding, dilation: what a swapped module is built from.
        dtype: of its weight, such as ``float32``.
        epilogue, kernel: of a swapped module; ``kernel`` ran when it was converted (another device chooses its own).
        tied: the module asks for ``kernel`` by name (``Policy.backend`` was not ``auto``).
        sparsity, block_sparsity: share of zero weights, and of blocks that are not stored.
        bytes_dense, bytes_stored: dense weight and bias, and what is stored for them (values, indices, bias).
        dense_ms, sparse_ms: time per example input of the dense layer with its ReLU and pool, and of what was compared.
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
        if self.action == "swap":
            self._check_swap(where)

    def _check_swap(self, where: str) -> None:
        shape = self.weight_shape
        if shape is None or len(shape) not in (2, 4) or min(shape) < 1:
            raise ValueError(f"{where}: expected weight_shape of 2 or 4 positive sizes, got {shape}")
        if (self.block_shape is None) != (self.format != "bsr"):
            raise ValueError(f"{where}: expected block_shape of format 'bsr' alone, got {self.block_shape}")
        if self.block_shape is not None and (len(self.block_shape) != 2 or min(self.block_shape) < 1):
            raise ValueError(f"{where}: expected block_shape of 2 positive sizes, got {self.block_shape}")
        if self.format == "low_rank":
            if self.kind not in LOW_RANK_KINDS:
                raise ValueError(f"{where}: expected kind in {', '.join(LOW_RANK_KINDS)}, got {self.kind!r}")
            if not self.ranks or min(self.ranks) < 1:
                raise ValueError(f"{where}: expected positive ranks, got {self.ranks}")
        if self.dtype not in SWAP_DTYPES:
            raise ValueError(f"{where}: expected dtype in {', '.join(SWAP_DTYPES)}, got {self.dtype!r}")
        if self.epilogue not in EPILOGUES["bsr_conv2d"]:
            raise ValueError(f"{where}: expected epilogue in {sorted(EPILOGUES['bsr_conv2d'])}, got {self.epilogue!r}")
        if len(shape) == 4:
            for name in ("stride", "padding", "dilation"):
                pair = getattr(self, name)
                if pair is None or len(pair) != 2 or min(pair) < (name != "padding"):
                    raise ValueError(f"{where}: expected {name} of 2 sizes, got {pair}")


@dataclass(frozen=True)
class ModelPlan:
    """The layers of a converted model and how it was decided.

    Attributes:
        layers: in the order of the original's ``named_modules``.
        decided: ``measured``, ``cost model``, or ``cost model, without shapes``.
        training: whether the result is to be trained (nothing folded).
        device: type of the device the decision holds for. threads: CPU threads it was measured with.
        versions: of slimkernels and torch.
        dense_ms, converted_ms: the whole model per example input; empty where not measured.
        notes: lines for the report, such as why the model could not be traced.
    """

    layers: tuple[LayerPlan, ...]
    decided: str
    training: bool = False
    device: str = "cpu"
    threads: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    dense_ms: tuple[float, ...] = ()
    converted_ms: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.decided not in DECIDED:
            raise ValueError(f"ModelPlan: expected decided in {DECIDED}, got {self.decided!r}")
        names: set[str] = set()
        for layer in self.layers:
            if layer.name in names:
                raise ValueError(f"ModelPlan: expected each layer once, got {layer.name!r} twice")
            names.add(layer.name)
        for layer in self.layers:
            if layer.into is not None and layer.into not in names:
                raise ValueError(f"LayerPlan {layer.name!r}: expected into to name a layer, got {layer.into!r}")

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
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"ModelPlan: expected JSON, got {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"ModelPlan: expected a JSON object, got {type(data).__name__}")
        version = data.pop("plan_version", None)
        if version != PLAN_VERSION:
            raise ValueError(f"ModelPlan: expected plan_version {PLAN_VERSION}, got {version!r}")
        layers = data.get("layers")
        if not isinstance(layers, list):
            raise ValueError(f"ModelPlan: expected layers to be a list, got {type(layers).__name__}")
        data["layers"] = [_from_plain(LayerPlan, layer, f"ModelPlan: layers[{i}]") for i, layer in enumerate(layers)]
        return _from_plain(cls, data, "ModelPlan")


def faster_everywhere(dense: Sequence[float], other: Sequence[float], min_speedup: float) -> bool:
    """The rule of every swap: ``dense >= min_speedup * other`` at each size."""
    return len(dense) > 0 and all(d >= min_speedup * o for d, o in zip(dense, other, strict=True))


def _from_plain(cls: type, data: Any, where: str) -> Any:
    """A dataclass from JSON data, lists as tuples; every field's type is checked."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    hints, arguments = get_type_hints(cls), {}
    for name, f in fields.items():
        if name not in data:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: expected field {name!r}, got none")
            continue
        value = _tupled(data[name])
        if not _fits(value, str(hints[name])):
            raise ValueError(f"{where}: expected {name} to be {f.type}, got {data[name]!r}")
        arguments[name] = value
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: str) -> bool:
    """Whether a JSON value has the type of a field of the plan; the hints are those that this file uses."""
    if value is None:
        return "None" in hint
    if "tuple" in hint:
        if not isinstance(value, tuple):
            return False
        kinds: tuple[type, ...] = (int, float) if "float" in hint else (int,) if "int" in hint else (object,)
        if "str" in hint:
            kinds = (str,)
        return all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    if "Mapping" in hint:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if "bool" in hint:
        return isinstance(value, bool)
    if "float" in hint:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if "int" in hint:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str)
