"""Dense baselines of a whole network on a CPU beyond torch: ONNX Runtime and OpenVINO, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import timing


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def openvino(model: nn.Module, x: Tensor, precision: str = "f32") -> Callable[[], Any]:
    """The model compiled by OpenVINO at torch's thread count, its input already in OpenVINO's memory.

    Args:
        model: in float32, in eval mode.
        x: its input, float32.
        precision: what it multiplies in: ``f32``, ``bf16``.
    """
    ov: Any = importlib.import_module("openvino")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = ov.convert_model(model, example_input=x)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    graph.reshape({graph.inputs[0]: list(x.shape)})
    request = ov.compile_model(graph, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.contiguous().numpy()))

    def infer() -> Any:
        return next(iter(request.infer().values()))

    return infer


def onnx_runtime(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The model in ONNX Runtime at torch's thread count."""
    onnxruntime: Any = importlib.import_module("onnxruntime")

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # For mypy: with dynamo=False a file object is taken too.
        torch.onnx.export(model, (x,), buffer, dynamo=False, input_names=["x"])  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


# Name -> what makes it, and the packages that it needs.
_PEERS: dict[str, tuple[Callable[[nn.Module, Tensor], Callable[[], Any]], tuple[str, ...]]] = {
    "OpenVINO": (openvino, ("openvino",)),
    "ONNX Runtime": (onnx_runtime, ("onnxruntime", "onnx")),
}


def cpu_peers(model: nn.Module, x: Tensor, note: Callable[[str], None]) -> dict[str, Callable[[], Any]]:
    """OpenVINO and ONNX Runtime on a folded model, each checked against torch.

    Args:
        model: dense, in eval mode, with one tensor as its output.
        x: its input, float32 on the CPU.
        note: called with a line for each that is left out: not installed, cannot run this model, or computes something
            else.

    Returns:
        name -> function that runs the model on ``x`` and returns its output.
    """
    folded = timing.fold_batch_norm(model)
    with torch.no_grad():
        expected = folded(x)
    found: dict[str, Callable[[], Any]] = {}
    for name, (make, packages) in _PEERS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            note(f"{name} left out: not installed (pip install {' '.join(missing)})")
            continue
        try:
            call = make(folded, x)
            torch.testing.assert_close(
                torch.as_tensor(call()), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
            )
        except Exception as error:  # optional packages fail in their own ways
            note(f"{name} left out: {first_line(error)}")
        else:
            found[name] = call
    return found
