"""What a model computes on example inputs, and whether a converted one computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.conversion.graph import InputSet, scratch_copy
from slimkernels.kernels.cpu.pairs import may_be_in_bf16

# RMS of the difference over RMS of the output, between a model and its converted twin: far above what rounding leaves
# after tens of layers, far below a wrong layer.
_SAME_RMS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def own_tensors(sets: Sequence[InputSet]) -> list[InputSet]:
    """Clones of the tensors: a model may work on its input in place."""

    def clone(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    return [(_pytree.tree_map(clone, args), _pytree.tree_map(clone, kwargs)) for args, kwargs in sets]


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """A call of the model without gradient, as a function without arguments."""

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


class Outputs:
    """The outputs of a model on example inputs, to compare those of converted models with.

    The model runs twice on each: what differs between two runs (it draws random numbers), and what is not finite,
    cannot be compared.
    """

    def __init__(self, model: nn.Module, sets: Sequence[InputSet]) -> None:
        self.sets = sets
        runs = scratch_copy(model)
        self._leaves = [[self._run(runs, i) for _ in range(2)] for i in range(len(sets))]

    def _run(self, model: nn.Module, i: int) -> list[Any]:
        return _pytree.tree_leaves(call_of(model, *own_tensors([self.sets[i]])[0])())

    def difference(self, fast: nn.Module) -> str | None:
        """Why a converted model may not stand for the original; None when its outputs agree."""
        after = scratch_copy(fast)
        for i, (expected, again) in enumerate(self._leaves):
            try:
                got = self._run(after, i)
            except Exception as error:  # the model's own code runs here
                return f"the converted model does not run on example input {i}: {type(error).__name__}: {error}"
            where = f"the converted model's output at example input {i}"
            if len(expected) != len(again):
                continue
            if len(got) != len(expected):
                return f"{where} has another form"
            for a, b, c in zip(expected, again, got, strict=True):
                problem = _leaf_difference(a, b, c)
                if problem is not None:
                    return f"{where} {problem}"
        return None


def _leaf_difference(expected: Any, again: Any, got: Any) -> str | None:
    if not isinstance(expected, Tensor) or not expected.is_floating_point() or not torch.equal(expected, again):
        return None
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return "has another form"
    ref, out = expected.double(), got.double()
    if ref.numel() == 0 or not bool(torch.isfinite(ref).all()):
        return None
    rms = float((out - ref).square().mean().sqrt())
    dtype = torch.bfloat16 if may_be_in_bf16(expected) else expected.dtype
    allowed = _SAME_RMS.get(dtype, 1e-1) * float(ref.square().mean().sqrt())
    return None if rms <= allowed else f"differs: RMS {rms:.3g}, allowed {allowed:.3g}"
