"""Before serving: `warm_up` loads every kernel that a model will use, `graphed` records its launches in CUDA graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.conversion.graph import InputSet, input_sets
from slimkernels.kernels.problems import (
    ConvProblem,
    LinearProblem,
    LowRankConvProblem,
    LowRankLinearProblem,
    SizedProblem,
)
from slimkernels.kernels.select import choose
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear

_LAYERS = (BlockSparseConv2d, BlockSparseLinear, LowRankConv2d, LowRankLinear)


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
        first_s, steady_s: seconds of the first call and of the fastest later one, per example input.
        kernels: of every block-sparse and low-rank layer, per size that it was called with.
    """

    first_s: tuple[float, ...]
    steady_s: tuple[float, ...]
    kernels: tuple[LayerKernel, ...]


def problem_of(module: nn.Module, x: Tensor) -> SizedProblem:
    """The problem that a block-sparse or low-rank layer solves for an input; outside autocast.

    Raises:
        TypeError: another module.
    """
    dtype, device = x.dtype, x.device.type
    n, (h, w) = max(x.shape[:-3].numel(), 1), (x.shape[-2:] if x.dim() > 2 else (1, 1))
    rows = x.shape[:-1].numel()
    if isinstance(module, BlockSparseConv2d):
        return ConvProblem(
            n, module.in_channels, h, w, module.out_channels, *module.kernel_size, module.stride, module.padding,
            module.dilation, module.block_shape, module.values.shape[0], dtype, device, module.epilogue,
        )  # fmt: skip
    if isinstance(module, BlockSparseLinear):
        return LinearProblem(
            rows, module.in_features, module.out_features, module.block_shape, module.values.shape[0], dtype, device,
            module.epilogue,
        )  # fmt: skip
    if isinstance(module, LowRankLinear):
        return LowRankLinearProblem(
            rows, module.in_features, module.out_features, module.rank, dtype, device, module.epilogue
        )
    if isinstance(module, LowRankConv2d):
        shapes = tuple(tuple(f.shape) for f in module.weight_low_rank().factors)
        return LowRankConvProblem(
            n, h, w, module.kind, shapes, module.stride, module.padding, module.dilation, dtype, device,  # type: ignore[arg-type]
            module.epilogue,
        )  # fmt: skip
    raise TypeError(f"problem_of: expected a block-sparse or low-rank layer, got {type(module).__name__}")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(op: str, model: nn.Module, sets: list[InputSet]) -> torch.device:
    """The one device of a model and its inputs."""
    tensors = [*model.parameters(), *model.buffers(), *_tensors(sets)]
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        raise ValueError(
            f"{op}: expected model and inputs on one device, got {sorted(map(str, devices)) or 'no tensor'}"
        )
    return devices.pop()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


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
    if model.training:
        raise ValueError("warm_up: expected a model in eval mode, got one in training mode")
    if calls < 2:
        raise ValueError(f"warm_up: expected calls >= 2, got {calls}")
    sets = input_sets(example_inputs)
    if not sets:
        raise ValueError("warm_up: expected example inputs, got none")
    device = _device("warm_up", model, sets)
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

    hooks = [m.register_forward_pre_hook(record(name)) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    try:
        first, steady = [], []
        for args, kwargs in sets:
            seconds = []
            for _ in range(calls):
                start = time.perf_counter()
                model(*args, **kwargs)
                _synchronise(device)
                seconds.append(time.perf_counter() - start)
            first.append(seconds[0])
            steady.append(min(seconds[1:]))
    finally:
        for handle in hooks:
            handle.remove()
    return WarmUp(tuple(first), tuple(steady), tuple(found.values()))


@dataclass
class _Recording:
    graph: Any
    inputs: list[Tensor]
    outputs: Any


class GraphedModel:
    """A model's inference as CUDA graphs, one for each input signature (`graphed` makes it).

    A call copies its inputs into the recording's memory, replays on the current stream and returns copies of the
    outputs. Gradients are off. Weights may change in place (``load_state_dict``); a weight that is replaced, moved or
    repacked is not seen. Calls from several streams or threads wait for each other, since they share memory.

    Attributes:
        device: of the model. signatures: shapes and dtypes of the inputs that were recorded.
    """

    def __init__(self, model: nn.Module, sets: list[InputSet], warm_up_calls: int, copy_outputs: bool) -> None:
        self.device = _device("graphed", model, sets)
        self._copy_outputs, self._lock = copy_outputs, threading.Lock()
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None
        self._last: Any = None
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.device):
            for args, kwargs in sets:
                key = _signature(args, kwargs)
                if key not in self._recordings:
                    self._recordings[key] = self._record(model, args, kwargs, warm_up_calls)

    def _record(self, model: nn.Module, args: Any, kwargs: Any, warm_up_calls: int) -> _Recording:
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(leaves, spec)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up_calls):
                model(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                outputs = model(*args, **kwargs)
        except RuntimeError as error:
            line = (str(error).strip().splitlines() or ["no message"])[0]
            raise ValueError(f"graphed: the model cannot be captured in a CUDA graph: {line}") from error
        self._pool = graph.pool()
        return _Recording(graph, [leaf for leaf in leaves if isinstance(leaf, Tensor)], outputs)

    @property
    def signatures(self) -> list[str]:
        """One line per recording: the shapes and dtypes of its inputs."""
        return [_describe(key) for key in self._recordings]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for inputs of a recorded signature.

        Raises:
            ValueError: inputs of a signature that was not recorded; the message lists those that were.
        """
        key = _signature(args, kwargs)
        recording = self._recordings.get(key)
        if recording is None:
            raise ValueError(
                f"GraphedModel: expected inputs {' or '.join(self.signatures)} on {self.device}, got {_describe(key)}"
            )
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            for own, given in zip(recording.inputs, _tensors((args, kwargs)), strict=True):
                own.copy_(given)
            recording.graph.replay()
            outputs = recording.outputs
            if self._copy_outputs:
                outputs = _pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, outputs)
            self._last = stream.record_event()
        return outputs


def _signature(args: Any, kwargs: Any) -> Any:
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    parts = tuple((tuple(v.shape), v.dtype, str(v.device)) if isinstance(v, Tensor) else v for v in leaves)
    return parts, str(spec)


def _describe(key: Any) -> str:
    def one(part: Any) -> str:
        if isinstance(part, tuple) and len(part) == 3 and isinstance(part[1], torch.dtype):
            return f"{str(part[1]).removeprefix('torch.')}{list(part[0])} on {part[2]}"
        return repr(part)

    return "(" + ", ".join(map(one, key[0])) + ")"


def graphed(
    model: nn.Module, example_inputs: Any, *, warm_up_calls: int = 3, copy_outputs: bool = True
) -> GraphedModel:
    """Captures a model's inference on static shapes in CUDA graphs and returns a callable that replays them.

    At small batches a network is bound by launches: a graph replays all of them with one call. The example inputs say
    which shapes can be served; they share one memory pool.

    Args:
        model: an eval-mode model on a CUDA device; branches on tensor values cannot be captured.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these,
            on the model's device.
        warm_up_calls: calls before each capture: kernels are compiled and loaded there, which a capture cannot do.
        copy_outputs: return copies. Without, a call returns the recording's own memory, which the next call overwrites.

    Raises:
        ValueError: a model in training mode, off CUDA, or one that cannot be captured; no example inputs.
        TypeError: example inputs of another form.
    """
    if model.training:
        raise ValueError("graphed: expected a model in eval mode, got one in training mode")
    sets = input_sets(example_inputs)
    if not sets:
        raise ValueError("graphed: expected example inputs, got none")
    device = _device("graphed", model, sets)
    if device.type != "cuda":
        raise ValueError(f"graphed: expected model and inputs on a CUDA device, got {device}")
    if warm_up_calls < 1:
        raise ValueError(f"graphed: expected warm_up_calls >= 1, got {warm_up_calls}")
    return GraphedModel(model, sets, warm_up_calls, copy_outputs)
