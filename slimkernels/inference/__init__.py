"""Serving: `warm_up` loads every kernel before the first request, `graphed` records inference at fixed shapes."""

from slimkernels.inference.recordings import GraphedModel, graphed
from slimkernels.inference.replay import Replay
from slimkernels.inference.warming import LayerKernel, WarmUp, problem_of, warm_up

__all__ = ["GraphedModel", "LayerKernel", "Replay", "WarmUp", "graphed", "problem_of", "warm_up"]
