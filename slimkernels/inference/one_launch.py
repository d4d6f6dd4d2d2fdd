"""Layers that follow each other in one CUDA launch, inside the CUDA graphs of `graphed(one_launch=...)`.

Three kinds: a ``chain`` of block-sparse convolutions (`slimkernels.inference.cuda_chain`); a ``stem``, a dense
convolution of images with the block-sparse one behind it (`slimkernels.inference.cuda_stem`); and ``linear``, a chain
of linear layers (`slimkernels.inference.cuda_linear_chain`).

The model is not changed. `OneLaunch` makes a copy of the modules above its runs, which shares all tensors and all other
modules with it, and whose ``nn.Sequential`` call a run where its modules stand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from slimkernels.inference.cuda_graph import GraphRecording
from slimkernels.inference.cuda_stem import MOST_CHANNELS
from slimkernels.inference.one_launch_runs import (
    AUTO,
    AUTO_KINDS,
    CHAIN,
    IDLE,
    IDLE_OF_IMAGES,
    KINDS,
    STEM,
    Chain,
    Leaf,
    LinearChain,
    Run,
    Stem,
    chain_kind,
    chain_reason,
    disturbance,
    is_of_images,
    why_no_stem,
)
from slimkernels.kernels.chain_plan import MAX_LAYERS
from slimkernels.nn.chained import _GLOBAL_HOOKS, ChainedSequential

_SEQUENTIALS = (nn.Sequential, ChainedSequential)


def kinds_of(asked: bool | str | Collection[str]) -> tuple[str, ...]:
    """The kinds of runs that an argument ``one_launch`` asks for: True stands for a chain alone, ``auto`` for what is
    tried and measured.

    Raises:
        ValueError: another name.
    """
    if isinstance(asked, bool):
        return (CHAIN,) if asked else ()
    if asked == AUTO:
        return AUTO_KINDS
    kinds = (asked,) if isinstance(asked, str) else tuple(asked)
    if not set(kinds) <= set(KINDS):
        raise ValueError(
            f"graphed: expected one_launch of auto, True, False or some of {', '.join(KINDS)}, got {asked!r}"
        )
    return kinds


class OneLaunch:
    """A model to be recorded, in which runs of layers are one launch each.

    The modules of a run follow each other in an ``nn.Sequential``, inner ones counted in. A chain is two block-sparse
    convolutions or more with nothing but ``nn.Identity`` and dropout between them. A stem is a dense convolution of
    images, its ReLU, and one block-sparse convolution. Linear layers may have ReLUs between them. Their explicit
    ``kernel`` does not matter. A hook on a module, or on one that holds it, keeps it out of a run, as does a
    ``forward`` of its own: they would be passed over.

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
        self.runs: list[Run] = []
        self.reasons: dict[str, str] = {}
        self._copies: dict[int, nn.Module] = {}
        found = [name or "the model" for name, module in model.named_modules() if self._wants(module)]
        if STEM in self._kinds and not any(is_of_images(module) for module in model.modules()):
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

    def overlap(self, on: bool) -> None:
        """Whether chains begin while the kernel in front of them ends, in what is recorded from now on."""
        for run in self.runs:
            if isinstance(run, Chain | LinearChain):
                run.launch.config["overlap"] = int(on)

    def record(self, record: Callable[[], GraphRecording]) -> OneLaunchRecording:
        """What ``record`` returns, a call of `model` captured, with what that call made of the runs."""
        for run in self.runs:
            run.outcomes.clear()
        return OneLaunchRecording(record(), self)

    def _wants(self, module: nn.Module) -> bool:
        """Whether a module could be in a run of the kinds that were asked for, where its absence has a reason."""
        return (STEM in self._kinds and is_of_images(module)) or chain_kind(module) in self._kinds

    def _copy_of(self, module: nn.Module, name: str) -> nn.Module:
        """The module, or one in its place that shares its tensors and attributes where there is a run below it."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        reason = disturbance(module)
        if reason is not None:
            of = f"{name or 'the model'} {reason}"
            for inner, layer in module.named_modules(prefix=name):
                if self._wants(layer):
                    self.reasons.setdefault(inner, of if layer is not module else f"it {reason}")
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
        pending: list[Leaf] = []  # of a chain: a layer, and what may follow it

        def layers() -> list[Leaf]:
            return [leaf for leaf in pending if chain_kind(leaf[1])]

        def flush() -> None:
            modules, names = [module for _, module in pending], [name for name, _ in layers()]
            if len(names) > 1:
                chain: Run
                chain = Chain(modules, names) if chain_kind(modules[0]) == CHAIN else LinearChain(modules, names)
                parts.append(chain)
                self.runs.append(chain)
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
            if not self._goes_on(leaves[at], layers()):
                flush()
            if self._goes_on(leaves[at], layers()):
                pending.append(leaves[at])
            else:
                parts.append(self._copy_of(leaves[at][1], leaves[at][0]))
            at += 1
        flush()
        return parts

    def _goes_on(self, leaf: Leaf, before: list[Leaf]) -> bool:
        """Whether a chain of these layers goes on with a module, or begins with it where there are none."""
        name, module = leaf
        kind, last = chain_kind(module), before[-1][1] if before else None
        if kind in self._kinds:
            if last is not None and (chain_kind(last) != kind or len(before) == MAX_LAYERS):
                return False
            reason = chain_reason(module, last)
            if reason is not None and last is None:
                self.reasons.setdefault(name, reason)
            return reason is None
        between = (*IDLE, nn.ReLU) if isinstance(last, nn.Linear) else IDLE_OF_IMAGES
        return last is not None and type(module) in between and disturbance(module) is None and not module.training

    def _stem(self, leaves: list[Leaf]) -> Stem | None:
        """The stem that modules called in turn begin with, where one was asked for."""
        name, first = leaves[0]
        if STEM not in self._kinds or not is_of_images(first):
            return None
        end = 1
        while end < len(leaves) and type(leaves[end][1]) in (nn.ReLU, *IDLE_OF_IMAGES):
            end += 1
        between, behind = leaves[1:end], leaves[end : end + 1]
        reason = why_no_stem(leaves[0], between, behind)
        if reason is not None:
            self.reasons.setdefault(name, reason)
            return None
        return Stem([module for _, module in leaves[: end + 1]], [name, behind[0][0]])


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
        note: what its ``repr`` adds.
    """

    def __init__(self, replay: GraphRecording, of: OneLaunch) -> None:
        self.replay, self._asked, self.note = replay, of.asked, ""
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
        return self.replay(*args, **kwargs)

    def __repr__(self) -> str:
        text = "a CUDA graph"
        if self.in_one_launch:
            text += f", in one launch: {', '.join(self.in_one_launch)}{self.note}"
        reasons = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return f"{text}; not in one launch: {', '.join(reasons)}" if reasons else text


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _calls_in_turn(module: nn.Module) -> bool:
    """Whether a call of a module is that of its children, one after the other, and no more."""
    return type(module) in _SEQUENTIALS and disturbance(module) is None and None not in module._modules.values()


def _leaves(module: nn.Module, name: str) -> Iterator[Leaf]:
    """What is called in turn, the children of inner ``nn.Sequential`` in their place, with names."""
    for key, child in module._modules.items():
        assert child is not None  # by `_calls_in_turn`
        path = _joined(name, key)
        if _calls_in_turn(child):
            yield from _leaves(child, path)
        else:
            yield path, child
