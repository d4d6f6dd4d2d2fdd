"""`warm_up`: every kernel that a model will use compiled, packed and loaded before it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.dispatch.select import choose
from slimkernels.inference.inputs import served_sets
from slimkernels.kernels.problems import (
    ConvProblem,
    FusedConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
)
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, FusedConv2d, LowRankConv2d, LowRankLinear

_LAYERS = (BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear, FusedConv2d)


@dataclass(frozen=True)
class LayerKernel:
    """What one layer runs at one size: kernel, launch configuration (empty: the kernel's own), and why."""

    layer: str
    problem: SizedProblem
    kernel: str
    config: Mapping[str, int]
    reason: str


@dataclass(frozen=True)
class WarmUp:
    """The result of `warm_up`.

    Attributes:
        first_s: seconds of the first call, one number per example input.
        steady_s: seconds of the fastest later call, one number per example input.
        kernels: of every drop-in layer, per size that it was called with.
    """

    first_s: tuple[float, ...]
    steady_s: tuple[float, ...]
    kernels: tuple[LayerKernel, ...]


def problem_of(module: nn.Module, x: Tensor) -> SizedProblem:
    """The problem that a drop-in layer solves for an input; outside autocast.

    Raises:
        TypeError: another module.
    """
    dtype, device = x.dtype, x.device.type
    rows = x.shape[:-1].numel()  # of a linear layer, whatever the number of dimensions
    n, (h, w) = x.shape[:-3].numel(), (x.shape[-2:] if x.dim() > 2 else (1, 1))
    if isinstance(module, BlockSparseConv2d):
        return ConvProblem(
            n,
            module.in_channels,
            h,
            w,
            module.out_channels,
            *module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.block_shape,
            module.values.shape[0],
            dtype,
            device,
            module.epilogue,
        )
    if isinstance(module, BlockSparseLinear):
        return LinearProblem(
            rows,
            module.in_features,
            module.out_features,
            module.block_shape,
            module.values.shape[0],
            dtype,
            device,
            module.epilogue,
        )
    if isinstance(module, LowRankLinear):
        return LowRankLinearProblem(
            rows, module.in_features, module.out_features, module.rank, dtype, device, module.epilogue
        )
    if isinstance(module, LowRankConv2d):
        shapes = tuple(tuple(f.shape) for f in module.weight_low_rank().factors)
        return LowRankConvProblem(
            n,
            h,
            w,
            module.kind,
            # For mypy: taken from a module's attribute, which mypy takes for a Tensor or a Module.
            shapes,  # type: ignore[arg-type]
            module.stride,
            module.padding,
            module.dilation,
            dtype,
            # For mypy: taken from a module's attribute, which mypy takes for a Tensor or a Module.
            device,  # type: ignore[arg-type]
            module.epilogue,
        )
    if isinstance(module, FusedConv2d):
        return FusedConvProblem(
            n,
            module.in_channels,
            h,
            w,
            module.out_channels,
            *module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            dtype,
            device,
            module.epilogue,
        )
    raise TypeError(f"problem_of: expected a block-sparse, low-rank or fused layer, got {type(module).__name__}")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode(False)
@torch.no_grad()
def warm_up(model: nn.Module, example_inputs: Any, *, calls: int = 3) -> WarmUp:
    """Runs a model until nothing is compiled, packed or loaded any more, for inputs of the sizes that will be served.

    A Triton kernel is compiled once for each configuration, dtype and divisibility of its sizes by 16, so every batch
    size to be served should be among the example inputs. Values do not matter. The model's mode is kept; gradients are
    off, and on CUDA the device is idle when this returns.

    Args:
        model: what `slimkernels.convert` returned, or any module in eval mode.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these.
        calls: calls per example input, at least 2.

    Raises:
        ValueError: a model in training mode (its batch norms would learn from the example inputs), ``calls < 2``, no
            example inputs, or model and inputs on several devices. TypeError: example inputs of another form.
    """
    sets, device = served_sets("warm_up", model, example_inputs)
    if calls < 2:
        raise ValueError(f"warm_up: expected calls >= 2, got {calls}")
    found: dict[tuple[str, SizedProblem], LayerKernel] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            problem = problem_of(module, args[0])
            if (name, problem) not in found:
                asked = str(module.kernel)
                choice = choose(problem, index=args[0].get_device()) if asked == "auto" else None
                kernel, config, why = (
                    (asked, {}, "asked for by name") if choice is None else (choice.name, choice.config, choice.reason)
                )
                found[name, problem] = LayerKernel(name, problem, kernel, config, why)

        return hook

    def watched() -> None:
        hooks = [
            m.register_forward_pre_hook(record(name)) for name, m in model.named_modules() if isinstance(m, _LAYERS)
        ]
        try:
            model(*args, **kwargs)
        finally:
            for handle in hooks:
                handle.remove()

    first, steady = [], []
    for args, kwargs in sets:
        seconds = []
        for i in range(calls):
            start = time.perf_counter()
            # Hooks see the layers, but layers that run as one chain are run one by one where hooks are: see
            # `slimkernels.nn.ChainedSequential`. So only the first call has them.
            watched() if i == 0 else model(*args, **kwargs)
            _synchronise(device)
            seconds.append(time.perf_counter() - start)
        first.append(seconds[0])
        steady.append(min(seconds[1:]))
    return WarmUp(tuple(first), tuple(steady), tuple(found.values()))
