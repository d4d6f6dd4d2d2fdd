"""The last touches of a converted or loaded model: its plan, what hands on layouts, guards, mode, and its chains."""

from __future__ import annotations

import warnings

from torch import nn

from slimkernels.conversion.hub import guard_publishing
from slimkernels.conversion.plan import ModelPlan
from slimkernels.conversion.units import GUARD_ATTRIBUTE, PLAN_ATTRIBUTE
from slimkernels.nn import guard_strided_pointwise_
from slimkernels.nn.chained import chain_sequentials_
from slimkernels.nn.contiguous_output import keep_contiguous_


def finish(model: nn.Module, plan: ModelPlan) -> nn.Module:
    """Attaches the plan, hooks and guards (`PublishGuard`, for an inference model `EvalGuard`), and sets the mode."""
    setattr(model, PLAN_ATTRIBUTE, plan)
    guard_publishing(model, plan)
    keep_contiguous_(model, plan.contiguous_outputs)
    nn.Module.train(model, plan.training)
    if plan.training:
        guard_strided_pointwise_(model)
    else:
        chain_sequentials_(model)
        setattr(model, GUARD_ATTRIBUTE, EvalGuard(model))
    return model


class EvalGuard:
    """Stands in for ``train`` on an inference model: warns once when it is put back into training mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.warned = False

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode and not self.warned:
            self.warned = True
            warnings.warn(
                "this model was converted for inference (batch norm folded, parameters without gradient); convert the "
                "original with training=True to train it",
                stacklevel=2,
            )
        return type(self.model).train(self.model, mode)
