"""Layers that follow each other in one CUDA launch, inside the CUDA graphs of `graphed(one_launch=...)`.

Two kinds: a ``chain`` of block-sparse convolutions (`slimkernels.inference.cuda_chain`), and a ``stem``, a dense
convolution of images with the block-sparse one behind it (`slimkernels.inference.cuda_stem`).

The model is not changed. `OneLaunch` makes a copy of the modules above its runs, which shares all tensors and all other
modules with it, and whose ``nn.Sequential`` call a run where its modules stand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slimkernels.inference.cuda_chain import CudaChain, chain_of
from slimkernels.inference.cuda_stem import MOST_CHANNELS, CudaStem, stem_of, stem_reason
from slimkernels.kernels import cuda_chain
from slimkernels.kernels.chain_plan import MAX_LAYERS
from slimkernels.nn import BlockSparseConv2d, FusedConv2d
from slimkernels.nn.chained import _GLOBAL_HOOKS, ChainedSequential

CHAIN, STEM = "chain", "stem"
KINDS = (CHAIN, STEM)
MAX_IMAGES = 16  # of a chain: with more, a layer's own kernel has work enough
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)  # they hand their input on in eval mode
_SEQUENTIALS = (nn.Sequential, ChainedSequential)
Leaf: TypeAlias = tuple[str, nn.Module]


def kinds_of(asked: bool | str | Collection[str]) -> tuple[str, ...]:
    """The kinds of runs that an argument ``one_launch`` asks for: True stands for a chain alone.

    Raises:
        ValueError: another name.
    """
    if isinstance(asked, bool):
        return (CHAIN,) if asked else ()
    kinds = (asked,) if isinstance(asked, str) else tuple(asked)
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"graphed: expected one_launch of True, False or some of {', '.join(KINDS)}, got {asked!r}")
    return kinds


class OneLaunch:
    """A model to be recorded, in which runs of layers are one launch each.

    The modules of a run follow each other in an ``nn.Sequential``, inner ones counted in. A chain is two block-sparse
    convolutions or more with nothing but ``nn.Identity`` and dropout between them. A stem is a dense convolution of
    images, its ReLU, and one block-sparse convolution. Their explicit ``kernel`` does not matter. A hook on a
    module, or on one that holds it, keeps it out of a run, as does a ``forward`` of its own: they would be passed over.

    Args:
        asked: the kinds of runs, as `kinds_of` takes them.

    Attributes:
        model: what is to be recorded; equal to the given model but for its runs.
        asked: as it was given.
        runs: those that were found.
        reasons: why a layer that could be in a run is in none, by its name.
    """

    def __init__(self, model: nn.Module, asked: bool | str | Collection[str] = True) -> None:
        self.asked, self._kinds = asked, kinds_of(asked)
        self.runs: list[_Run] = []
        self.reasons: dict[str, str] = {}
        self._copies: dict[int, nn.Module] = {}
        found = [name or "the model" for name, module in model.named_modules() if self._wants(module)]
        if STEM in self._kinds and not any(_is_of_images(module) for module in model.modules()):
            self.reasons["the model"] = f"no dense convolution of at most {MOST_CHANNELS} channels is in it"
        if any(_GLOBAL_HOOKS):
            self.model = model
            self.reasons |= dict.fromkeys(found, "all modules have a hook")
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

    def _wants(self, module: nn.Module) -> bool:
        """Whether a module could be in a run of the kinds that were asked for, where its absence has a reason."""
        return (CHAIN in self._kinds and isinstance(module, BlockSparseConv2d)) or (
            STEM in self._kinds and _is_of_images(module)
        )

    def _copy_of(self, module: nn.Module, name: str) -> nn.Module:
        """The module, or one in its place that shares its tensors and attributes where there is a run below it."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        obstacle = _obstacle(module)
        if obstacle is not None:
            of = f"{name or 'the model'} {obstacle}"
            for inner, layer in module.named_modules(prefix=name):
                if self._wants(layer):
                    self.reasons.setdefault(inner, of if layer is not module else f"it {obstacle}")
            return module
        children = dict(module._modules)
        parts: list[Any] | None = None
        if _calls_in_turn(module):
            leaves = list(_leaves(module, name))
            parts = self._parts(leaves)
            changed = [id(part) for part in parts] != [id(leaf) for _, leaf in leaves]
        else:
            children = {
                key: child if child is None else self._copy_of(child, _joined(name, key))
                for key, child in children.items()
            }
            changed = any(children[key] is not child for key, child in module._modules.items())
        if not changed:
            return module
        copy = object.__new__(type(module) if parts is None else _WithRuns)
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = children
        if parts is not None:
            copy.__dict__["parts"] = parts
        self._copies[id(module)] = copy
        return copy

    def _parts(self, leaves: list[Leaf]) -> list[Any]:
        """The runs among modules that are called in turn, and the other modules, in their order."""
        parts: list[Any] = []
        pending: list[Leaf] = []

        def layers() -> list[str]:
            return [name for name, module in pending if isinstance(module, BlockSparseConv2d)]

        def flush() -> None:
            modules, names = [module for _, module in pending], layers()
            if len(names) > 1:
                parts.append(_Chain(modules, names))
                self.runs.append(parts[-1])
            else:
                parts.extend(modules)
                self.reasons |= dict.fromkeys(names, "no other such layer stands next to it")
            pending.clear()

        at = 0
        while at < len(leaves):
            stem = self._stem(leaves[at:])
            if stem is not None:
                flush()
                parts.append(stem)
                self.runs.append(stem)
                at += len(stem.modules)
                continue
            name, module = leaves[at]
            if not self._may_be_in_a_chain(name, module):
                flush()
                parts.append(self._copy_of(module, name))
            else:
                if isinstance(module, BlockSparseConv2d) and len(layers()) == MAX_LAYERS:
                    flush()
                pending.append(leaves[at])
            at += 1
        flush()
        return parts

    def _may_be_in_a_chain(self, name: str, module: nn.Module) -> bool:
        if CHAIN not in self._kinds:
            return False
        if isinstance(module, BlockSparseConv2d):
            reason = _chain_reason(module)
            if reason is not None:
                self.reasons.setdefault(name, reason)
            return reason is None
        return type(module) in _IDLE and _obstacle(module) is None and not module.training

    def _stem(self, leaves: list[Leaf]) -> _Stem | None:
        """The stem that modules called in turn begin with, where one was asked for."""
        name, first = leaves[0]
        if STEM not in self._kinds or not _is_of_images(first):
            return None
        end = 1
        while end < len(leaves) and type(leaves[end][1]) in (nn.ReLU, *_IDLE):
            end += 1
        between, behind = leaves[1:end], leaves[end : end + 1]
        reason = self._stem_reason(leaves[0], between, behind)
        if reason is not None:
            self.reasons.setdefault(name, reason)
            return None
        return _Stem([module for _, module in leaves[: end + 1]], [name, behind[0][0]])

    @staticmethod
    def _stem_reason(first: Leaf, between: list[Leaf], behind: list[Leaf]) -> str | None:
        """Why a layer is no stem with what follows it."""
        layer: Any = first[1]
        if not behind:
            return "no block-sparse convolution follows it"
        if not isinstance(behind[0][1], BlockSparseConv2d):
            return f"{behind[0][0]} follows it, which is no block-sparse convolution"
        reason = _layer_reason(layer)
        if reason is not None:
            return f"it {reason}"
        for name, module in between:
            if _obstacle(module) is not None or module.training:
                return f"{name} {_obstacle(module) or 'is in training mode'}"
        name, second = behind[0]
        reason = _layer_reason(second)
        if reason is not None:
            return f"{name} {reason}"
        return stem_reason(layer, second, any(type(module) is nn.ReLU for _, module in between))


class _Run:
    """Modules that follow each other: one launch where the kernel takes the input, else one after the other.

    Args:
        modules: all of them. names: of the layers among them.
        launch: what runs them in one launch.
    """

    def __init__(self, modules: list[nn.Module], names: list[str], launch: CudaChain | CudaStem) -> None:
        self.modules, self.names, self._launch = modules, names, launch
        # What the calls since the last recording began were: None for one launch, else why not.
        self.outcomes: dict[str | None, None] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return self._launch.tensors

    def __call__(self, x: Any) -> Any:
        reason = self._obstacle(x)
        self.outcomes[reason] = None
        if reason is None:
            return self._launch(x)
        for module in self.modules:
            x = module(x)
        return x

    def _obstacle(self, x: Any) -> str | None:
        dtype = self.tensors[0].dtype
        if type(x) is not Tensor or x.dim() != 4 or x.dtype != dtype:
            return f"its input is no batch of images in {dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast"
        return self._refusal(x)

    def _refusal(self, x: Tensor) -> str | None:
        """Why the kernel does not take a batch of images; None where it does."""
        raise NotImplementedError


class _Chain(_Run):
    _launch: CudaChain

    def __init__(self, modules: list[nn.Module], names: list[str]) -> None:
        super().__init__(modules, names, chain_of(modules))

    def _refusal(self, x: Tensor) -> str | None:
        if not 1 <= x.shape[0] <= MAX_IMAGES:
            return f"{x.shape[0]} images, not 1 to {MAX_IMAGES}"
        try:
            cuda_chain.plan_for(x, self._launch.layers)
        except ValueError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]} ({len(self.names)} layers)"


class _Stem(_Run):
    _launch: CudaStem

    def __init__(self, modules: list[nn.Module], names: list[str]) -> None:
        first, second = (module for module in modules if isinstance(module, (*_OF_IMAGES, BlockSparseConv2d)))
        # For mypy: the kinds of modules that `_stem_reason` found nothing against.
        super().__init__(modules, names, stem_of(first, second))  # type: ignore[arg-type]

    def _refusal(self, x: Tensor) -> str | None:
        return self._launch.obstacle(x)

    def __str__(self) -> str:
        return f"the stem {self.names[0]} and {self.names[1]}"


class _WithRuns(nn.Sequential):
    """An ``nn.Sequential`` with runs among its modules.

    Attributes:
        parts: runs and other modules, in their order; its modules are those of the original all the same. A slice of
            it has none.
    """

    parts: list[Any] | None = None

    # The name of the argument is that of nn.Sequential.
    def forward(self, input: Any) -> Any:
        for part in self if self.parts is None else self.parts:
            input = part(input)
        return input


class OneLaunchRecording:
    """A CUDA graph with runs in it, which hold packed copies of their weights.

    Where one of those weights was written in place since, it refuses to run: the rest of the graph would see such a
    write, and the runs would not. It looks at torch's counts of writes, which takes 5 us for the 60 tensors of VGG-19.

    Attributes:
        in_one_launch: the runs that are one launch in this recording, by the names of their first and last layers.
        reasons: why other layers are not in one, by their names.
        tensors: of which it holds packed copies.
    """

    def __init__(self, replay: Callable[..., Any], of: OneLaunch) -> None:
        self._replay, self._asked = replay, of.asked
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
                "since, which that does not see; record it again with "
                f"graphed(model, example_inputs, one_launch={self._asked!r})"
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


def _calls_in_turn(module: nn.Module) -> bool:
    """Whether a call of a module is that of its children, one after the other, and no more."""
    return type(module) in _SEQUENTIALS and _obstacle(module) is None and None not in module._modules.values()


def _leaves(module: nn.Module, name: str) -> Iterator[Leaf]:
    """What is called in turn, the children of inner ``nn.Sequential`` in their place, with names."""
    for key, child in module._modules.items():
        assert child is not None  # by `_calls_in_turn`
        path = _joined(name, key)
        if _calls_in_turn(child):
            yield from _leaves(child, path)
        else:
            yield path, child


def _obstacle(module: nn.Module) -> str | None:
    """Why a call of a module may do more, or other things, than its class says; None where it does not."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a hook"
    if "forward" in own:
        return "has a forward of its own"
    return "is a script module" if isinstance(module, torch.jit.ScriptModule) else None


_OF_IMAGES = (nn.Conv2d, FusedConv2d)


def _is_of_images(module: nn.Module) -> bool:
    """Whether a module is a dense convolution of few channels."""
    return isinstance(module, _OF_IMAGES) and module.in_channels <= MOST_CHANNELS


def _layer_reason(layer: nn.Module) -> str | None:
    """Why no run takes a layer, as what is said of it; None where one may."""
    obstacle = _obstacle(layer)
    if obstacle is not None:
        return obstacle
    if type(layer) not in (*_OF_IMAGES, BlockSparseConv2d):
        return f"is a {type(layer).__name__}"
    return "is in training mode" if layer.training else None


def _chain_reason(layer: BlockSparseConv2d) -> str | None:
    """Why a chain does not take a layer; None where it does."""
    reason = _layer_reason(layer)
    if reason is not None:
        return f"it {reason}"
    if layer.values.dtype not in (torch.float16, torch.bfloat16):
        return f"it is in {layer.values.dtype}"
    reason = cuda_chain.shape_reason(layer.weight_shape, layer.block_shape)
    return None if reason is None else f"the kernel takes {reason}"
