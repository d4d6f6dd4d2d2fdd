"""Runs of block-sparse convolutions in one CUDA launch each, inside the CUDA graphs of `graphed(one_launch=True)`.

The model is not changed. `OneLaunch` makes a copy of the modules above its runs, which shares all tensors and all other
modules with it, and whose ``nn.Sequential`` call a chain (`slimkernels.inference.cuda_chain`) where a run stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.inference.cuda_chain import chain_of
from slimkernels.kernels import cuda_chain
from slimkernels.kernels.chain_plan import MAX_LAYERS
from slimkernels.nn import BlockSparseConv2d
from slimkernels.nn.chained import _GLOBAL_HOOKS, ChainedSequential

MAX_IMAGES = 16  # with more, a layer's own kernel has work enough
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)  # they hand their input on in eval mode
_SEQUENTIALS = (nn.Sequential, ChainedSequential)


class OneLaunch:
    """A model to be recorded, whose runs of block-sparse convolutions are one launch each.

    A run is two layers or more that follow each other in an ``nn.Sequential``, with nothing but ``nn.Identity``,
    dropout and ``nn.Sequential`` of the same between them. Their explicit ``kernel`` does not matter. A hook on a
    module, or on one that holds it, keeps it out of a run, as does a ``forward`` of its own: they would be passed over.

    Attributes:
        model: what is to be recorded; equal to the given model but for its runs.
        runs: those that were found.
        reasons: why a block-sparse convolution is in no run, by its name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.runs: list[_Run] = []
        self.reasons: dict[str, str] = {}
        self._copies: dict[int, nn.Module] = {}
        found = [name or "the model" for name, m in model.named_modules() if isinstance(m, BlockSparseConv2d)]
        if any(_GLOBAL_HOOKS):
            self.model = model
            self.reasons = dict.fromkeys(found, "all modules have a hook")
            return
        self.model = self._copy_of(model, "")
        taken = {name for run in self.runs for name in run.names}
        for name in found:
            if name not in taken:
                self.reasons.setdefault(name, "it is in no nn.Sequential")

    def record(self, record: Callable[[], Callable[..., Any]]) -> OneLaunchRecording:
        """What ``record`` returns, a call of `model` captured, with what that call made of the runs."""
        for run in self.runs:
            run.outcomes.clear()
        return OneLaunchRecording(record(), self)

    def _copy_of(self, module: nn.Module, name: str) -> nn.Module:
        """The module, or one in its place that shares its tensors and attributes where there is a run below it."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        obstacle = _obstacle(module)
        if obstacle is not None:
            of = f"{name or 'the model'} {obstacle}"
            for inner, layer in module.named_modules(prefix=name):
                if isinstance(layer, BlockSparseConv2d):
                    self.reasons.setdefault(inner, of if layer is not module else f"it {obstacle}")
            return module
        parts = self._parts(module, name) if type(module) in _SEQUENTIALS else None
        children = {
            # A child inside a run is called by it alone.
            key: child if child is None or _inside(child, parts) else self._copy_of(child, _joined(name, key))
            for key, child in module._modules.items()
        }
        runs = parts is not None and any(isinstance(part, _Run) for part in parts)
        if not runs and all(children[key] is child for key, child in module._modules.items()):
            return module
        kind = _WithRuns if runs else type(module)
        copy = object.__new__(kind)
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = children
        if isinstance(copy, _WithRuns):
            assert parts is not None
            copy.__dict__["parts"] = [part if isinstance(part, _Run) else children[part] for part in parts]
        self._copies[id(module)] = copy
        return copy

    def _parts(self, module: nn.Module, name: str) -> list[_Run | str]:
        """The runs of an ``nn.Sequential`` and the names of its other children, in their order."""
        parts: list[_Run | str] = []
        pending: list[str] = []

        def flush() -> None:
            layers = [pair for key in pending for pair in _layers(module._modules[key], _joined(name, key))]
            if len(layers) > 1:
                run = _Run([module._modules[key] for key in pending], [n for n, _ in layers])
                self.runs.append(run)
                parts.append(run)
            else:
                parts.extend(pending)
                for n, _ in layers:
                    self.reasons.setdefault(n, "no other such layer stands next to it")
            pending.clear()

        count = 0
        for key, child in module._modules.items():
            reasons = dict(_reasons(child, _joined(name, key)))
            size = 0 if reasons else sum(1 for _ in _layers(child, ""))
            if reasons or count + size > MAX_LAYERS:
                flush()
                count = 0
            if reasons:
                self.reasons.update({n: reason for n, reason in reasons.items() if reason})
                parts.append(key)
            else:
                pending.append(key)
                count += size
        flush()
        return parts


class _Run:
    """Modules that follow each other: one launch where the kernel takes the input, else one after the other."""

    def __init__(self, modules: list[nn.Module | None], names: list[str]) -> None:
        self.modules = [module for module in modules if module is not None]
        self.names = names
        self._chain = chain_of(self.modules)
        # What the calls since the last recording began were: None for one launch, else why not.
        self.outcomes: dict[str | None, None] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return self._chain.tensors

    def __call__(self, x: Any) -> Any:
        reason = self._obstacle(x)
        self.outcomes[reason] = None
        if reason is None:
            return self._chain(x)
        for module in self.modules:
            x = module(x)
        return x

    def _obstacle(self, x: Any) -> str | None:
        dtype = self.tensors[0].dtype
        if type(x) is not Tensor or x.dim() != 4 or x.dtype != dtype:
            return f"its input is no batch of images in {dtype}"
        if not 1 <= x.shape[0] <= MAX_IMAGES:
            return f"{x.shape[0]} images, not 1 to {MAX_IMAGES}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast"
        try:
            cuda_chain.plan_for(x, self._chain.layers)
        except ValueError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]} ({len(self.names)} layers)"


class _WithRuns(nn.Sequential):
    """An ``nn.Sequential`` with runs among its modules.

    Attributes:
        parts: runs and other modules, in their order; its modules are those of the original all the same.
    """

    parts: list[Any]

    # The name of the argument is that of nn.Sequential.
    def forward(self, input: Any) -> Any:
        for part in self.parts:
            input = part(input)
        return input


class OneLaunchRecording:
    """A CUDA graph with runs in it, which hold packed copies of their weights.

    Where one of those weights was written in place since, it refuses to run: the rest of the graph would see such a
    write, and the runs would not. It looks at torch's counts of writes, which takes 5 us for the 60 tensors of VGG-19.

    Attributes:
        in_one_launch: the runs that are one launch in this recording, by the names of their first and last layers.
        reasons: why other block-sparse convolutions are not in one, by their names.
        tensors: of which it holds packed copies.
    """

    def __init__(self, replay: Callable[..., Any], of: OneLaunch) -> None:
        self._replay = replay
        taken = [run for run in of.runs if None in run.outcomes]
        self.in_one_launch = [str(run) for run in taken]
        self.reasons: dict[str, str] = {}
        for run in of.runs:
            said = [reason for reason in run.outcomes if reason is not None]
            if said or not run.outcomes:
                self.reasons[str(run)] = " and ".join(said) or "it was not called"
        self.reasons |= of.reasons
        self.tensors = [tensor for run in taken for tensor in run.tensors]
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._writes = sum([tensor._version for tensor in self._counted])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if sum([tensor._version for tensor in self._counted]) != self._writes:
            raise RuntimeError(
                "GraphedModel: expected the weights that were recorded, and a layer that runs in one launch has others "
                "since, which that does not see; record it again with graphed(model, example_inputs, one_launch=True)"
            )
        return self._replay(*args, **kwargs)

    def __repr__(self) -> str:
        text = "a CUDA graph"
        if self.in_one_launch:
            text += f", in one launch: {', '.join(self.in_one_launch)}"
        reasons = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return f"{text}; not in one launch: {', '.join(reasons)}" if reasons else text


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _inside(child: nn.Module, parts: list[_Run | str] | None) -> bool:
    return any(child in part.modules for part in parts or () if isinstance(part, _Run))


def _obstacle(module: nn.Module) -> str | None:
    """Why a call of a module may do more, or other things, than its class says; None where it does not."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a hook"
    if "forward" in own:
        return "has a forward of its own"
    return "is a script module" if isinstance(module, torch.jit.ScriptModule) else None


def _layers(module: nn.Module | None, name: str) -> Iterator[tuple[str, BlockSparseConv2d]]:
    """The block-sparse convolutions of a module that `_reasons` has nothing against, with their names."""
    if isinstance(module, BlockSparseConv2d):
        yield name, module
    elif isinstance(module, nn.Sequential):
        for key, child in module._modules.items():
            yield from _layers(child, _joined(name, key))


def _reasons(module: nn.Module | None, name: str) -> Iterator[tuple[str, str]]:
    """Why a module cannot be part of a run, by the names of its layers; another module has an empty reason."""
    if module is None:
        return
    obstacle = _obstacle(module)
    if isinstance(module, BlockSparseConv2d):
        reason = f"it {obstacle}" if obstacle is not None else _layer_reason(module)
        if reason is not None:
            yield name, reason
    elif obstacle is not None or type(module) not in (*_SEQUENTIALS, *_IDLE) or module.training:
        yield name, ""
    elif isinstance(module, nn.Sequential):
        for key, child in module._modules.items():
            yield from _reasons(child, _joined(name, key))


def _layer_reason(layer: BlockSparseConv2d) -> str | None:
    """Why the kernel does not take a layer, None where it does."""
    if type(layer) is not BlockSparseConv2d:
        return f"it is a {type(layer).__name__}"
    if layer.training:
        return "it is in training mode"
    if layer.values.dtype not in (torch.float16, torch.bfloat16):
        return f"it is in {layer.values.dtype}"
    reason = cuda_chain.shape_reason(layer.weight_shape, layer.block_shape)
    return None if reason is None else f"the kernel takes {reason}"
