"""`ChainedSequential`: an ``nn.Sequential`` that runs its native layers as chains, many modules in one native call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.nn.block_sparse import BlockSparseConv2d, BlockSparseLinear
from slimkernels.nn.low_rank import LowRankConv2d, LowRankLinear
from slimkernels.nn.packed_run import PackedRun
from slimkernels.nn.torch_linears import is_native
from slimkernels.nn.torch_poolings import POOLINGS
from slimkernels.ops.library import nothing_watches

_CONVOLUTIONS, _LINEAR = (BlockSparseConv2d, LowRankConv2d), (BlockSparseLinear, LowRankLinear)
# They hand their input on; dropout does so in eval mode.
_IDLE = (nn.Identity, nn.Dropout)
_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


class ChainedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose consecutive layers of `slimkernels.nn` run in one native call.

    `slimkernels.convert` makes one of every ``nn.Sequential`` that holds such layers; modules, names and state dict
    stay as they were. Called module by module, a layer costs some 20 us of Python, a parallel region and a fresh output
    of its own, and all activations lie channels last, while the kernels are faster with images innermost.

    It is the container that takes them together, since it alone sees a whole run of modules and knows that nothing else
    reads what they hand to each other. A layout that travelled with the tensors would be seen by hooks and by the
    user's own code, and a model rebuilt from a captured graph would no longer be the user's class.

    A run of layers is a chain for plain float32 CPU tensors in eval mode, with the weights that were packed. Whatever
    wants to see or change a single module makes the modules run one by one, as in any ``nn.Sequential``: a hook on one
    of them or on all modules, a module that was replaced or parametrized or has a ``forward`` of its own, dropout in
    training mode, an input or a weight that needs a gradient, autocast, torch's modes and transforms, a tensor
    subclass, tracing, compilation and export. So does a chain that would want much memory.

    A run of convolutions goes on over ``nn.MaxPool2d``, ``nn.AvgPool2d`` and ``nn.AdaptiveAvgPool2d``, with the
    attributes that they have in each call, and may end with one. It begins with none: what a pooling reads would have
    to be copied into the layout of the chain, and is larger than what it writes. Torch's own run where there is a
    ``divisor_override``, ``return_indices``, a size that ``ceil_mode`` rounds up or adaptive windows that overlap.

    A run of linear layers goes on over ``nn.Linear`` of at most a million weights, and the ``nn.ReLU`` behind it, and
    may begin with one. It does so for at most eight rows; more of them run faster with a vector of rows innermost,
    which torch's layer is not packed for: its weight is read where it lies.

    Where torch's module or anything else keeps the whole run from being a chain, the layers between torch's modules
    still may be.

    Outputs may differ in the last bits between the two ways, since sums are taken in another order. The way depends on
    the state of the modules, the shape of the input and the number of threads alone: equal calls give equal outputs.
    """

    _program: tuple[list[nn.Module], list[Callable[[Any], Any]]] | None = None

    # The name of the argument is that of nn.Sequential.
    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():  # a captured program shall not change what the module remembers
            return super().forward(input)
        modules, program = list(self._modules.values()), self._program
        if program is None or program[0] != modules:
            # For mypy: a Sequential holds no None.
            program = self._program = modules, _parts(modules)  # type: ignore[arg-type, assignment]
        for part in program[1]:
            input = part(input)
        return input

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_program", None)
        return state


class _Run:
    """Modules that follow each other, among them several native layers: as a chain where nothing speaks against it.

    Args:
        modules: native layers, and what a chain goes on over. Where they are no chain, those between torch's may be.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._members = [(module, type(module)) for module in modules]
        self._packed = PackedRun([m for m in modules if type(m) not in _IDLE], isinstance(modules[0], _CONVOLUTIONS))
        has_torchs = any(type(m) in (*POOLINGS, nn.Linear) for m in modules)
        self._parts: list[Callable[[Any], Any]] = _parts(modules, over_torchs=False) if has_torchs else [*modules]

    def __call__(self, x: Any) -> Any:
        if type(x) is Tensor and x.is_cpu and x.dtype is torch.float32 and self._is_undisturbed():
            packed = self._packed
            if nothing_watches(x) and packed.is_ready():
                y = packed.attempt(x)
                if y is not None:
                    return y
        for part in self._parts:
            x = part(x)
        return x

    def _is_undisturbed(self) -> bool:
        """Whether a call of the modules would do no more than their classes say; hooks on gradients would see none."""
        for module, kind in self._members:
            own = module.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or type(module) is not kind
                or "forward" in own
                or (kind is nn.Dropout and own["training"])
            ):
                return False
        return not any(_GLOBAL_HOOKS)


def _parts(modules: list[nn.Module], over_torchs: bool = True) -> list[Callable[[Any], Any]]:
    """What a Sequential calls in turn: its modules, those of a run together.

    Args:
        modules: in the order in which they run.
        over_torchs: whether a run goes on over poolings and dense linear layers of torch.
    """
    parts: list[Callable[[Any], Any]] = []
    at = 0
    while at < len(modules):
        length = _run_length(modules[at:], over_torchs)
        parts.append(_Run(modules[at : at + length]) if length > 1 else modules[at])
        at += max(length, 1)
    return parts


def _run_length(modules: list[nn.Module], over_torchs: bool = True) -> int:
    """How many modules from the first on are a run; 0 where that would be fewer than two layers, or torch's alone."""
    images = type(modules[0]) in _CONVOLUTIONS
    kinds = _CONVOLUTIONS if images else _LINEAR
    if not (type(modules[0]) in kinds or (over_torchs and is_native(modules[0]))):
        return 0
    end, ours, layers, dense = 0, 0, set(), False  # dense: whether torch's linear layer was the last one
    for module in modules:
        kind = type(module)
        if kind in kinds or (over_torchs and not images and is_native(module)):
            dense = kind is nn.Linear
            ours += not dense
            layers.add(id(module))
        elif kind is nn.ReLU and dense:
            dense = False
        elif kind not in _IDLE and not (over_torchs and images and kind in POOLINGS):
            break
        end += 1
    return end if ours and len(layers) > 1 else 0


def chain_sequentials_(model: nn.Module) -> None:
    """Makes a `ChainedSequential` of every ``nn.Sequential`` in a model that holds a run of native layers, in place."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            modules = list(module)
            if any(_run_length(modules[i:]) for i in range(len(modules))):
                module.__class__ = ChainedSequential


def unchain_sequentials_(model: nn.Module) -> None:
    """Undoes `chain_sequentials_`, in place."""
    for module in model.modules():
        if type(module) is ChainedSequential:
            module.__dict__.pop("_program", None)
            # For mypy: a class above its own, which adds nothing to what an instance holds.
            module.__class__ = nn.Sequential  # type: ignore[assignment]
