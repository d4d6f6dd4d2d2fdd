"""Triton without a driver and without compilation: launches are checked and recorded."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from stand_in import device_tensor
from stand_in.device_tensor import DeviceTensor

# The largest grids that CUDA launches.
LARGEST_GRID = (2**31 - 1, 65535, 65535)
_file: Path | None = None


def check_launch(name: str, grid: tuple[int, ...], given: dict[str, Any], attributes: Any, specialised: Any) -> None:
    """Raises RuntimeError where a launch could not run as its kernel was compiled.

    Args:
        given: the kernel's arguments by name, constants too.
        attributes: what Triton assumed of arguments, by their place: divisible by 16.
        specialised: integer arguments compiled in (those of value 1), by place.
    """
    names = list(given)
    grid = (*grid, 1, 1)[:3]
    if not all(0 < size <= most for size, most in zip(grid, LARGEST_GRID)):
        raise RuntimeError(f"{name}: grid {grid} cannot be launched")
    for argument, value in given.items():
        if isinstance(value, Tensor):
            if not isinstance(value, DeviceTensor):
                raise RuntimeError(f"{name}: Pointer argument {argument} cannot be accessed from Triton (cpu tensor?)")
            if value.numel() == 0:
                raise RuntimeError(f"{name}: {argument} is empty")
    for place, claims in attributes.items():
        value = given[names[place[0]]]
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if any(claim[0] == "tt.divisibility" and number % claim[1] for claim in claims):
            raise RuntimeError(f"{name}: compiled for {names[place[0]]} divisible by 16, launched with {number}")
    for place, value in specialised.items():
        if isinstance(value, int) and given[names[place[0]]] != value:
            raise RuntimeError(f"{name}: compiled for {names[place[0]]} = {value}, got {given[names[place[0]]]}")


class Kernel:
    """In the place of Triton's compiled kernel."""

    def __init__(self, source: Any, options: Any) -> None:
        self.src, self.name, self.hash = source, source.name, source.hash()
        self.function = self.packed_metadata = None
        self.metadata = SimpleNamespace(name=self.name, shared=0, num_warps=options.get("num_warps"))
        self._options = {name: options.get(name) for name in ("num_warps", "num_stages")}

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        # stream, function, packed metadata, launch metadata, two hooks, the kernel's arguments.
        given = dict(zip(self.src.fn.arg_names, rest[6:], strict=True))
        check_launch(self.name, (x, y, z), given, self.src.attrs, self.src.constants)
        record(self.name, (x, y, z), given, self._options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.run(*(*grid, 1, 1)[:3], None, None, None, None, None, None, *args)


def record(name: str, grid: tuple[int, ...], given: dict[str, Any], options: dict[str, Any]) -> None:
    """Appends one launch to the file."""
    if _file is None:
        return
    arguments = {
        k: f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" if isinstance(v, Tensor) else str(v)
        for k, v in given.items()
    }
    alignment = {k: min(v.data_ptr() & -v.data_ptr(), 256) for k, v in given.items() if isinstance(v, Tensor)}
    line = {"kernel": name, "grid": grid, **options, "alignment": alignment, "arguments": arguments}
    with open(_file, "a") as file:
        file.write(json.dumps(line) + "\n")


class Driver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 1024})

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def run_op(name: str, args: Any, kwargs: Any) -> Any:
    """An op of slimkernels by its own code, as torch's dispatcher would run it for CUDA tensors."""
    module = importlib.import_module("slimkernels.ops." + ("low_rank" if name.startswith("low_rank") else "bsr"))
    return getattr(module, f"_{name}")(*args, **kwargs)


# Functions that launch, by module of slimkernels.kernels.triton, and the op whose reference computes what they return.
LAUNCHERS = {
    "bsr_conv2d": {"launch": "bsr_conv2d", "launch_linear": "bsr_linear"},
    "bsr_conv2d_backward_x": {"launch": "bsr_conv2d_dgrad"},
    "bsr_conv2d_backward_w": {"launch": "bsr_conv2d_wgrad"},
    "relu_maxpool2_backward": {"launch": "relu_maxpool2_backward"},
    "low_rank_linear": {"launch": "low_rank_linear", "launch_dgrad": "low_rank_linear_dgrad"},
    "low_rank_conv2d": {"launch": "low_rank_conv2d"},
}
_PACKAGE = "slimkernels.kernels.triton."


def _with_values(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """A launching function whose results, which no kernel wrote, are filled by the op's reference."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        from slimkernels.kernels import reference

        given = signature.bind(*args, **kwargs).arguments
        asked = [value for name, value in given.items() if name not in ("config", "variant")]
        with device_tensor.unchecked():
            expected = getattr(reference, op)(*asked)
        result = function(*args, **kwargs)
        with device_tensor.unchecked():
            for own, right in zip(tree_flatten(result)[0], tree_flatten(expected)[0], strict=True):
                own.copy_(right)
        return result

    return launch


class _Finder(MetaPathFinder):
    """Wraps the launching functions of a module when it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        functions = LAUNCHERS.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None
        spec = PathFinder.find_spec(name, path, target) if functions else None
        if spec is None or spec.loader is None or functions is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for function, op in functions.items():
                setattr(module, function, _with_values(getattr(module, function), op))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(launches: Path | None) -> None:
    """Takes the place of Triton's driver and compiler; launches go to this file."""
    global _file
    _file = launches
    import triton.compiler
    from triton.runtime import driver

    sys.meta_path.insert(0, _Finder())
    driver.set_active(Driver())

    def compile(source: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Kernel:
        return Kernel(source, dict(options or {}))

    triton.compiler.compile = compile
