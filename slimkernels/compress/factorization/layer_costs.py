"""What a layer costs dense or at given ranks: parameters, bytes, multiply-adds, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.compress.training.evaluation import device_of, mode_of
from slimkernels.dispatch import select
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import LowRankConvProblem, LowRankLinearProblem
from slimkernels.nn import resolved_padding

BUDGETS = ("bytes", "parameters", "flops", "latency", "seconds")


@dataclass(frozen=True)
class Budget:
    """At most this much of one resource for the whole model.

    Args:
        resource: "bytes" (of all parameters and buffers), "parameters" (a count, or a share below 1 of those there
            are), "flops" (share of the multiply-adds of all Linear and Conv2d layers), "latency" (share of the time of
            the layers that may be factorized), "seconds" (that time itself).
        amount: positive.
        measure: times layers with the stopwatch rather than the cost model ("latency" and "seconds").

    Raises:
        ValueError: an unknown resource, an amount that is not positive, a share above 1.
    """

    resource: str
    amount: float
    measure: bool = False

    def __post_init__(self) -> None:
        if self.resource not in BUDGETS:
            raise ValueError(f"factorize_: expected a budget of one of {', '.join(BUDGETS)}, got {self.resource!r}")
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise TypeError(f"factorize_: expected the budget's {self.resource} to be a number, got {self.amount!r}")
        if not 0 < self.amount < math.inf or (self.resource in ("flops", "latency") and self.amount > 1):
            share = "in (0, 1], a share" if self.resource in ("flops", "latency") else "> 0 and finite"
            raise ValueError(f"factorize_: expected the budget's {self.resource} {share}, got {self.amount}")

    @classmethod
    def of(cls, budget: Budget | Mapping[str, Any]) -> Budget:
        """A budget from itself, or from a mapping such as ``{"bytes": 2_000_000}``, with ``measure`` beside it."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, Mapping):
            raise TypeError(f"factorize_: expected budget to be a Budget or a mapping, got {budget!r}")
        rest = {key: value for key, value in budget.items() if key != "measure"}
        if len(rest) != 1:
            raise ValueError(f"factorize_: expected a budget of one of {', '.join(BUDGETS)}, got {sorted(rest)}")
        ((resource, amount),) = rest.items()
        return cls(resource, amount, bool(budget.get("measure", False)))

    @property
    def needs_inputs(self) -> bool:
        """Whether the sizes of activations matter."""
        return self.resource in ("flops", "latency", "seconds")


def factor_shapes(weight_shape: Sequence[int], kind: str, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the factors in the order of `formats.LowRankWeight`; ``ranks`` is ``(rank,)`` or ``(rank_out,
    rank_in)``."""
    if len(weight_shape) == 2:
        out, in_features = weight_shape
        return (ranks[0], in_features), (out, ranks[0])
    n, c, kh, kw = weight_shape
    if kind == "tai":
        return (ranks[0], c, kh, 1), (n, ranks[0], 1, kw)
    if kind == "svd":
        return (ranks[0], c, kh, kw), (n, ranks[0], 1, 1)
    rank_out, rank_in = ranks
    return (rank_in, c, 1, 1), (rank_out, rank_in, kh, kw), (n, rank_out, 1, 1)


def factor_params(weight_shape: Sequence[int], kind: str, ranks: Sequence[int]) -> int:
    """Weights of all factors."""
    return sum(math.prod(shape) for shape in factor_shapes(weight_shape, kind, ranks))


@dataclass(frozen=True)
class Call:
    """One call of a layer: the input's shape, and the rows or pixels that come out."""

    shape: torch.Size
    rows: int


def recorded_calls(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, list[Call]]:
    """Every call of each layer, from one pass in eval mode without gradient.

    Args:
        example_inputs: a tensor, or a tuple of the model's arguments.

    Raises:
        ValueError: the example inputs do not reach a layer.
    """
    found: dict[str, list[Call]] = {name: [] for name in layers}

    def hook_of(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            found[name].append(Call(args[0].shape, output.numel() // module.weight.shape[0]))

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    device = device_of(model)
    try:
        with torch.no_grad(), mode_of(model, training=False):
            model(*[x.to(device) if isinstance(x, Tensor) else x for x in inputs])
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, calls in found.items() if not calls]
    if missing:
        raise ValueError(f"factorize_: expected the example inputs to reach layer {missing[0]!r}, they do not")
    return found


def problem(
    layer: Any, kind: str, ranks: Sequence[int], shape: torch.Size
) -> LowRankConvProblem | LowRankLinearProblem:
    """The low-rank problem of a dense layer at ranks, for an input of a shape."""
    weight = layer.weight
    shapes = factor_shapes(weight.shape, kind, ranks)
    device = weight.device.type
    if weight.dim() == 2:
        return LowRankLinearProblem(
            math.prod(shape[:-1]), weight.shape[1], weight.shape[0], ranks[0], weight.dtype, device
        )
    batch = math.prod(shape[:-3])
    return LowRankConvProblem(
        batch,
        shape[-2],
        shape[-1],
        kind,
        shapes,  # type: ignore[arg-type]  # shapes of the kind's lengths, which their type does not say
        tuple(layer.stride),
        resolved_padding(layer),
        tuple(layer.dilation),
        weight.dtype,
        device,
    )


def macs(layer: Any, kind: str, ranks: Sequence[int] | None, calls: Sequence[Call]) -> int:
    """Multiply-adds of a layer over calls, padding included; ``ranks`` None: dense."""
    if ranks is None:
        return sum(call.rows for call in calls) * layer.weight.numel()
    return sum(problem(layer, kind, ranks, call.shape).macs for call in calls)


def predicted_seconds(layer: Any, kind: str, ranks: Sequence[int] | None, calls: Sequence[Call]) -> float:
    """Seconds by the kernels' cost model, over calls; ``ranks`` None: torch's dense layer."""
    total = 0.0
    for call in calls:
        asked = problem(layer, kind, ranks or _ones(kind), call.shape)
        if ranks is None:
            total += select.predicted_dense_seconds(asked)
        else:
            choice = select.choose(asked)
            total += select.predicted_seconds(KERNELS[choice.name], asked, choice.config)
    return total


def _ones(kind: str) -> tuple[int, ...]:
    return (1, 1) if kind == "tucker2" else (1,)


def measured_seconds(modules: Sequence[nn.Module], calls: Sequence[Call], like: Tensor) -> list[float]:
    """Seconds of each module in eval mode over these calls, by turns, on the device and in the dtype of ``like``."""
    from slimkernels.conversion.measure import typical_seconds

    inputs = [torch.randn(call.shape, dtype=like.dtype, device=like.device) for call in calls]
    if like.dim() == 4:
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]

    def runner(module: nn.Module) -> Any:
        module.eval()
        if like.dim() == 4:
            # For mypy: torch's overloads of `to` leave out memory_format alone.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def run() -> None:
            with torch.inference_mode():
                for x in inputs:
                    module(x)

        return run

    return list(typical_seconds([runner(m) for m in modules], device=like.device.type, repeats=15, budget_s=0.3))
