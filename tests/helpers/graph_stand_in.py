"""`graphed` of a model for CUDA in a test: on a GPU where there is one, and on the CPU emulation of csrc/tests.

Without a GPU a stand-in takes the place of a CUDA graph: a replay is the captured call once more, on the recording's
own inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulation import Emulator, compiled
from tensor_core_device import HOPPER_SHARED, stand_in
from torch import Tensor, nn

from slimkernels.inference import cuda_graph, graphed_model
from slimkernels.inference.inputs import served_sets
from slimkernels.kernels import cuda, cuda_chain


class GraphStandIn:
    """What `capture.capture` returns: replayed by another call, whose results go to the captured outputs."""

    def __init__(self, call: Callable[[], Any], outputs: Tensor) -> None:
        self._call, self._outputs = call, outputs

    def replay(self) -> None:
        self._outputs.copy_(self._call())

    def pool(self) -> None:
        return None


def emulate_graphs(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """`graphed` takes a model on the CPU to be one on a GPU, whose launches are emulated."""
    emulator = stand_in(compiled(), monkeypatch, 20)
    emulator.library.set_mode(-1, HOPPER_SHARED)
    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setattr(
        cuda_chain, "_groups_at_once", lambda group, barrier, dtype, device: emulator.cuda_chain_groups(
            group, barrier, cuda._DTYPES[dtype], device)
    )  # fmt: skip

    def captured(call: Callable[[], Any], *, warm_up_calls: int, pool: Any) -> tuple[GraphStandIn, Any]:
        for _ in range(warm_up_calls):
            call()
        outputs = call()
        return GraphStandIn(call, outputs), outputs

    def on_cuda(op: str, model: nn.Module, example_inputs: Any) -> tuple[Any, torch.device]:
        return served_sets(op, model, example_inputs)[0], torch.device("cuda", 0)

    monkeypatch.setattr(cuda_graph, "capture", captured)
    monkeypatch.setattr(graphed_model, "served_sets", on_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    event = SimpleNamespace(record=lambda stream=None: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return emulator


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of models and inputs."""
    if request.param == "gpu":
        if cuda.available() is not None:
            pytest.skip(str(cuda.available()))
        yield "cuda"
        return
    emulate_graphs(monkeypatch)
    yield "cpu"


def close(got: Tensor, expected: Tensor) -> bool:
    """The two ways add up in another order, and so round the bf16 between layers to other neighbours here and there."""
    return bool((got - expected).float().norm() < 0.02 * expected.float().norm())


def only(found: Any) -> Any:
    """The one recording of what `graphed` returned."""
    (recording,) = found.recordings.values()
    return recording


def layers_of_launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch of a chain has from now on, in order."""
    launched: list[int] = []
    launch = cuda_chain.launch_chain
    monkeypatch.setattr(
        cuda_chain, "launch_chain", lambda x, layers, *rest: launched.append(len(layers)) or launch(x, layers, *rest)
    )
    return launched
