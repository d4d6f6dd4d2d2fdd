"""Triton kernels at sizes that no memory holds: the interpreter replays the addresses of chosen programs.

A launch runs through the op as always, in a process with TRITON_INTERPRET=1, on meta tensors: they have shapes, strides
and dtypes but no storage. Every tensor argument gets an address range of its own far from all others; a load or store
outside the range of the argument it started from fails, and so does integer arithmetic whose exact result does not fit
its type, a conversion to int32 that loses bits, and a hint (`tl.multiple_of`, `max_contiguous`, `max_constancy`) that
its values do not keep. Loads give zeros, or the contents of the arguments that are CPU tensors (an index). Products are
skipped. What is replayed is the kernel itself, not a copy of its arithmetic.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

Program = tuple[int, int, int]
# Bytes between the middles of two arguments' ranges: an offset that wrapped at 2^31 elements stays inside its own.
SPACING = 1 << 44
CHECKED = {np.add: "+", np.subtract: "-", np.multiply: "*"}


@dataclass
class Region:
    """The addresses of a tensor argument. data: its contents where it is a CPU tensor, else it reads as zeros."""

    name: str
    base: int
    elements: int
    itemsize: int
    data: np.ndarray | None


@dataclass
class Accesses:
    """Element offsets that one program read and wrote, by argument, in the order of its loads and stores."""

    loads: dict[str, list[np.ndarray]] = field(default_factory=dict)
    stores: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """Offsets read from an argument, sorted, none twice."""
        return np.unique(np.concatenate(self.loads.get(name, [np.empty(0, np.int64)])))

    def written(self, name: str) -> np.ndarray:
        """Offsets written to an argument, sorted; one that was written twice is there twice."""
        return np.sort(np.concatenate(self.stores.get(name, [np.empty(0, np.int64)])))


@dataclass
class Launched:
    """One launch: the kernel's name, its grid, its arguments by name and the accesses of the programs that ran."""

    kernel: str
    grid: Program
    arguments: dict[str, Any]
    programs: dict[Program, Accesses] = field(default_factory=dict)


@dataclass
class Replay:
    """What runs and what it did. choose: the programs to run, of a launch."""

    choose: Callable[[Launched], Iterable[Program]]
    launches: list[Launched] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    where: tuple[str, Program] = ("", (0, 0, 0))
    hints: int = 0

    def fail(self, text: str) -> None:
        raise AssertionError(f"{self.where[0]}, program {self.where[1]}: {text}")

    def pointer(self, name: str, tensor: Tensor) -> Any:
        """The address of a dense tensor as the kernel's argument `name`."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        assert extent == tensor.numel(), f"{name}: not dense, {tuple(tensor.shape)} {tensor.stride()}"
        data = None
        if tensor.device.type == "cpu":
            data = torch.as_strided(tensor.detach(), (extent,), (1,)).numpy()
        # An allocation of the device is aligned to more than 16 bytes; an offset into one (a view) shows on the CPU.
        base = (len(self.regions) + 1) * SPACING + (tensor.data_ptr() % 16 if data is not None else 0)
        self.regions.append(Region(name, base, extent, tensor.element_size(), data))
        kind = tl.str_to_ty(mangle_type(tensor), None)
        return tl.tensor(interpreter.TensorHandle(np.array([base], dtype=np.uint64), kind), kind)

    def offsets(self, pointers: Any, mask: np.ndarray, what: str) -> tuple[Region, np.ndarray] | None:
        """The argument and the element offsets of an access's active lanes; fails where one is out of bounds."""
        active = pointers.data[mask]
        if active.size == 0:
            return None
        index = int(active.flat[0] + SPACING // 2) // SPACING - 1
        region = self.regions[min(max(index, 0), len(self.regions) - 1)]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if itemsize != region.itemsize:
            self.fail(f"{what} of {itemsize} bytes in {region.name}, whose elements have {region.itemsize}")
        places = active.astype(np.int64) - region.base
        offsets = places // itemsize
        outside = (offsets < 0) | (offsets >= region.elements) | (places % itemsize != 0)
        if outside.any():
            worst = offsets[outside]
            self.fail(
                f"{what} of {region.name} out of bounds: {outside.sum()} of {active.size} lanes, elements "
                f"{worst.min()} to {worst.max()} of {region.elements}"
            )
        return region, offsets

    def check_hint(self, handle: Any, name: str, values: list[int]) -> None:
        """A hint's claim about the values it stands on; divisibility holds for the first of contiguous values."""
        data = handle.data
        contiguity = handle.attr.get("tt.contiguity", [1] * data.ndim)
        if data.ndim != len(values) or name not in ("tt.divisibility", "tt.contiguity", "tt.constancy"):
            return
        for axis, value in enumerate(values):
            value = min(value, data.shape[axis])
            lines = np.moveaxis(data, axis, -1)
            runs = lines.reshape(*lines.shape[:-1], -1, value)
            if name == "tt.divisibility":
                kept = (lines[..., :: contiguity[axis]] % values[axis] == 0).all()
            elif name == "tt.contiguity":
                kept = (runs - runs[..., :1] == np.arange(value)).all()
            else:
                kept = (runs == runs[..., :1]).all()
            if not kept:
                self.fail(f"the hint {name} = {values} does not hold")
        self.hints += 1


def _run(replay: Replay, executor: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """One launch: the chosen programs, on addresses in place of tensors."""
    fn = executor.fn
    keywords = {k: v for k, v in keywords.items() if k in inspect.getfullargspec(fn).args}
    named = inspect.getcallargs(fn, *arguments, **keywords)
    grid = executor.grid(named) if callable(executor.grid) else executor.grid
    x, y, z = (*grid, 1, 1)[:3]
    launched = Launched(fn.__name__, (x, y, z), named)
    replay.launches.append(launched)
    replay.regions.clear()
    scope = interpreter._patch_lang(fn)
    try:
        given = {
            name: arg
            if name in executor.constexprs
            else replay.pointer(name, arg)
            if isinstance(arg, Tensor)
            else interpreter._implicit_cvt(arg)
            for name, arg in named.items()
        }
        interpreter.interpreter_builder.set_grid_dim(x, y, z)
        for program in dict.fromkeys(replay.choose(launched)):
            launched.programs[program] = Accesses()
            replay.where = (fn.__name__, program)
            interpreter.interpreter_builder.set_grid_idx(*program)
            executor.fn(**given)
    finally:
        scope.restore()


def reduce_by_slices(self: Any, input: Any) -> list[Any]:
    """`ReduceOps.generic_reduce` with the combining function called once a slice instead of once an element."""
    (data,) = input
    slices = [
        self.to_tensor(np.ascontiguousarray(np.take(data.handle.data, i, axis=self.axis)), data.dtype)
        for i in range(data.handle.data.shape[self.axis])
    ]
    result = slices[0]
    for other in slices[1:]:
        result = self.combine_fn.fn(result, other)
    return [result]


@contextlib.contextmanager
def replaying(monkeypatch: Any, choose: Callable[[Launched], Iterable[Program]]) -> Iterator[Replay]:
    """Launches inside run as replays of the programs that `choose` names; undone at the end."""
    replay = Replay(choose)
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_binary, plain_cast, plain_attr = builder.binary_op, builder.cast_impl, handle.set_attr

    def call(executor: Any, *arguments: Any, **keywords: Any) -> None:
        _run(replay, executor, arguments, keywords)

    def here() -> Accesses:
        return replay.launches[-1].programs[replay.where[1]]

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        element = pointers.get_element_ty()
        kind = interpreter._get_np_dtype(element)
        result = np.zeros(pointers.data.shape, kind) if other is None else other.data.astype(kind)
        # A mask that was a scalar holds integers, by which an array would be indexed.
        active = mask.data.astype(bool)
        found = replay.offsets(pointers, active, "load")
        if found is not None:
            region, offsets = found
            here().loads.setdefault(region.name, []).append(offsets)
            result[active] = 0 if region.data is None else region.data[offsets]
        return handle(result, element)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        found = replay.offsets(pointers, mask.data.astype(bool), "store")
        if found is not None:
            here().stores.setdefault(found[0].name, []).append(found[1])

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = plain_binary(self, lhs, rhs, op)
        if op in CHECKED and result.data.dtype.kind in "iu":
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            wrong = exact != result.data.astype(np.int64)
            if wrong.any():
                replay.fail(f"{result.data.dtype} {CHECKED[op]} wraps: {exact[wrong].flat[0]}")
        return result

    def cast(self: Any, source: Any, kind: Any) -> Any:
        result = plain_cast(self, source, kind)
        narrower = result.data.dtype.itemsize < source.data.dtype.itemsize
        if narrower and source.data.dtype.kind in "iu" and result.data.dtype.kind in "iu":
            lost = source.data.astype(np.int64) != result.data.astype(np.int64)
            if lost.any():
                replay.fail(f"{source.data.dtype} to {result.data.dtype} loses bits: {source.data[lost].flat[0]}")
        return result

    def attribute(self: Any, name: str, values: Any) -> None:
        plain_attr(self, name, values)
        replay.check_hint(self, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_slices)
        patch.setattr(handle, "set_attr", attribute)
        for name, replacement in {
            "create_masked_load": load,
            "create_masked_store": store,
            "binary_op": binary,
            "cast_impl": cast,
            "create_dot": lambda self, a, b, d, *rest: d,
        }.items():
            patch.setattr(builder, name, replacement)
        # A shift by the tap of an absent block is discarded behind it; numpy warns of it.
        with np.errstate(all="ignore"):
            yield replay


def sample(launched: Launched, count: int = 4, seed: int = 0) -> list[Program]:
    """First and last programs, those on both sides of the borders of groups of pixel tiles, and `count` at random."""
    x, y, _ = launched.grid
    tiles = {0, 1, x // 2, x - 2, x - 1}
    if "group_m" in launched.arguments:
        group = launched.arguments["group_m"] * launched.arguments["n_tiles"]
        for border in {group, x // group * group}:
            tiles |= {border - 1, border}
    rng = np.random.default_rng(seed)
    tiles |= set(rng.integers(0, x, count).tolist())
    parts = sorted({0, y // 2, y - 1})
    return [(tile, part, 0) for tile in sorted(tiles) if 0 <= tile < x for part in parts]


def everything(launched: Launched) -> list[Program]:
    """Every program of the grid."""
    x, y, _ = launched.grid
    return [(tile, part, 0) for tile in range(x) for part in range(y)]
