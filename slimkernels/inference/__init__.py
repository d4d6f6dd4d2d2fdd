"""Serving: `warm_up` loads every kernel before the first request, `graphed` records inference at fixed shapes,
`export_onnx` leaves for other runtimes."""

from slimkernels.inference.cpu_replay import Replay
from slimkernels.inference.graphed_model import GraphedModel, graphed
from slimkernels.inference.onnx_export import export_onnx
from slimkernels.inference.warming import LayerKernel, WarmUp, problem_of, warm_up

__all__ = ["GraphedModel", "LayerKernel", "Replay", "WarmUp", "export_onnx", "graphed", "problem_of", "warm_up"]
