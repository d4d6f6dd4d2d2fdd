"""Triton without a driver and without compilation: launches are checked and recorded."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

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
        self.metadata = SimpleNamespace(name=self.name, **{k: options.get(k) for k in _OPTIONS})
        self.run = launcher(source, self.metadata)

    def launch_metadata(self, *args: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.run(*(*grid, 1, 1)[:3], None, None, None, None, None, None, *args)


_OPTIONS = ("num_warps", "num_stages")


def launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """What launches a kernel, as Triton asks its driver for it."""

    def run(x: int, y: int, z: int, *rest: Any) -> None:
        device_tensor.launched(metadata.name)
        # stream, function, packed metadata, launch metadata, two hooks, the kernel's arguments.
        given = dict(zip(source.fn.arg_names, rest[6:], strict=True))
        check_launch(metadata.name, (x, y, z), given, source.attrs, source.constants)
        record(metadata.name, (x, y, z), given, {name: getattr(metadata, name) for name in _OPTIONS})
        if metadata.name in EMULATED:
            EMULATED[metadata.name](given)

    return run


def _gather(given: dict[str, Any]) -> None:
    """The gather of ``bench_ceilings.py``; longer than its check it is only timed."""
    x, out, tile_rows, row = given["x_ptr"].inner, given["out_ptr"].inner, given["TILE"], given["ROW"]
    if given["steps"] > 8:
        return
    width, tiles = given["SLICE"], given["tiles"]
    words, programs = torch.arange(width * given["SLICES"]), torch.arange(out.shape[0])[:, None]
    out.zero_()
    for step in range(given["steps"]):
        rows = (programs * 7919 + step * 104729) % tiles * tile_rows + torch.arange(tile_rows)
        first = (step * 31 + words // width * 17 + programs) % (row // width) * width
        out += x[rows[:, :, None], (first + words % width)[:, None, :]].sum(2, dtype=out.dtype)


# Kernels of the benchmarks themselves, which no reference stands for, by name.
EMULATED = {"gather": _gather}


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
        self.launcher_cls = launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, *rest: (name, name, 32, 0, 1024),
            unload_module=lambda module: None,
        )

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
    (room,) = (room for room in ("low_rank", "fused", "bsr", "batch_norms") if name.startswith(room.removesuffix("s")))
    call = importlib.import_module("slimkernels.ops.calls").CALLS[name](*args, **kwargs)
    return getattr(importlib.import_module(f"slimkernels.ops.{room}"), f"_{name}")(call)


# Functions that launch, by module of slimkernels.kernels.triton, and the op whose reference computes what they return.
LAUNCHERS = {
    "bsr_conv2d": {"launch": "bsr_conv2d", "launch_linear": "bsr_linear"},
    "bsr_conv2d_backward_x": {"launch": "bsr_conv2d_dgrad"},
    "bsr_conv2d_backward_w": {"launch": "bsr_conv2d_wgrad"},
    "fused_conv2d": {"launch": "fused_conv2d"},
    "sums": {"launch": "bsr_conv2d_bias_grad"},
    "relu_maxpool2_backward": {"launch": "relu_maxpool2_backward"},
    "low_rank_linear": {"launch": "low_rank_linear", "launch_dgrad": "low_rank_linear_dgrad"},
    "low_rank_conv2d": {"launch": "low_rank_conv2d"},
    "batch_norm": {"launch_forward": "batch_norm_forward", "launch_backward": "batch_norm_backward"},
}
_PACKAGE = "slimkernels.kernels.triton."


def _with_values(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """A launching function whose results, which no kernel wrote, are filled by the op's reference."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        from slimkernels.kernels import reference

        given = signature.bind(*args, **kwargs).arguments
        asked = tree_map(_wider, [value for name, value in given.items() if name not in ("config", "variant")])
        with device_tensor.unchecked():
            expected = getattr(reference, op)(*asked)
        result = function(*args, **kwargs)
        with device_tensor.unchecked():
            for own, right in zip(tree_flatten(result)[0], tree_flatten(expected)[0], strict=True):
                own.copy_(right)
        return result

    return launch


def _wider(value: Any) -> Any:
    """16-bit values as float32, in which kernels accumulate."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def plain_type(value: Any) -> type:
    """`type` as a CUDA tensor would have it."""
    if isinstance(value, DeviceTensor):
        return torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else Tensor
    return type(value)


def _few_images(layers: Any) -> None:
    """The rows of the GPU check at the batch of SLIMKERNELS_STAND_IN_IMAGES, its large images at 32x32."""
    most = int(os.environ.get("SLIMKERNELS_STAND_IN_IMAGES") or 0)
    if most:
        for name, row in layers.ROWS.items():
            layers.ROWS[name] = replace(row, batch=min(row.batch, most))
        layers.HEADLINE = layers.ROWS["headline"]
        large = layers.NETWORKS["vgg16_bn"]
        layers.NETWORKS["vgg16_bn"] = tuple(replace(layer, size=layer.size * 32 // 224) for layer in large)


def _small_images(models: Any) -> None:
    plain = models.input_shape
    if os.environ.get("SLIMKERNELS_STAND_IN_IMAGES"):
        models.input_shape = lambda name: (plain(name)[0], 32, 32)


def _of_library(module: Any) -> None:
    """Autocast as a GPU has it, and the device's own mode is nobody who looks at ops."""
    _autocast_of_cuda(module)
    modes = module._modes
    module._modes = lambda: max(0, modes() - 1)


def _autocast_of_cuda(library: Any) -> None:
    """Autocast of ops on device tensors, which in C++ is the CPU's, by the rule for CUDA."""
    plain = library.register_autocast

    def register(name: str, cast: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        def on_device(device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            stands_in = any(isinstance(value, DeviceTensor) for value in tree_flatten(args)[0])
            return cast("cuda" if stands_in else device, args)

        plain(name, on_device)

    library.register_autocast = register


# What is done to other modules when they are imported.
after_import: dict[str, Callable[[Any], None]] = {
    "gpu_check.layers": _few_images,
    "slimkernels.models": _small_images,
    "slimkernels.ops.library": _of_library,
}
# Modules that pass tensors of unknown classes over, and would take a `DeviceTensor` for one.
_ASK_TYPES = (
    *(f"slimkernels.conversion.{name}" for name in ("layers", "readers", "units")),
    "slimkernels.inference.one_launch_runs",
)


class _Finder(MetaPathFinder):
    """Wraps the launching functions of a module when it is imported, and gives `plain_type` to those that ask.

    Args: values: without, it does the latter alone.
    """

    def __init__(self, values: bool) -> None:
        self._values = values

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        functions = LAUNCHERS.get(name.removeprefix(_PACKAGE), {}) if name.startswith(_PACKAGE) else {}
        wanted = self._values and (bool(functions) or name in after_import)
        if not wanted and name not in _ASK_TYPES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for function, op in functions.items() if wanted else ():
                setattr(module, function, _with_values(getattr(module, function), op))
            if name in _ASK_TYPES:
                module.type = plain_type
            if wanted and name in after_import:
                after_import[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(launches: Path | None, compiling: bool = False, values: bool = True) -> None:
    """Takes the place of Triton's driver, and of its compiler unless `compiling`; launches go to this file.

    Args:
        values: whether what kernels would have computed is filled in by the references.
    """
    global _file
    _file = launches
    import triton.compiler
    from triton.runtime import driver

    sys.meta_path.insert(0, _Finder(values))
    driver.set_active(Driver())

    def compile(source: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Kernel:
        return Kernel(source, dict(options or {}))

    if not compiling:
        triton.compiler.compile = compile


def make_launchers() -> None:
    """From here on Triton's own code that launches is made for every kernel, before the stand-in's runs."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    def make(source: Any, metadata: Any) -> Callable[..., None]:
        if hasattr(nvidia, "make_launcher"):
            with contextlib.suppress(ImportError):  # made and kept; no driver is here to load it with
                nvidia.CudaLauncher(source, metadata)
        return launcher(source, metadata)

    driver.active.launcher_cls = make
