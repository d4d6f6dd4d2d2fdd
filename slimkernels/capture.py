"""CUDA graphs of a call, captured so that neither success nor failure is seen by what runs next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from slimkernels.tensors import kept_with_a_graph

_Result = TypeVar("_Result")


def capture(
    call: Callable[[], _Result], *, warm_up_calls: int = 2, calls: int = 1, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A CUDA graph of a call on the current device, and what the last captured call returned.

    The call runs and is captured on a stream of its own. That stream waits for the copies and fills of the current one,
    on which the call's inputs may still be on their way.

    The graph keeps what this package made for the kernels that it runs: packs, and what follows from a pattern, which
    are dropped elsewhere once a weight or a pattern is written to. Weights, inputs and the like are the caller's to
    keep.

    Args:
        call: what to capture; its tensors stay where they are.
        warm_up_calls: how often it runs before, for what libraries set up in a first call.
        calls: how often the graph holds it, one after the other.
        pool: the memory pool of another graph, to be shared.

    Raises:
        RuntimeError: torch's own, where the call cannot be captured. Random numbers work afterwards.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with kept_with_a_graph() as kept, torch.cuda.graph(graph, pool=pool, stream=side):
            for _ in range(calls):
                result = call()
    except BaseException:
        _end_capture_of_random_numbers()
        raise
    graph.__dict__["kept"] = kept
    return graph, result


def _end_capture_of_random_numbers() -> None:
    """Gives the current device's generator of random numbers a state that no capture has begun on.

    A capture that fails leaves the state as if it went on, and every later ``torch.randn`` of the process raises
    "Offset increment outside graph capture encountered unexpectedly" (seen with torch 2.11).
    """
    device = torch.cuda.current_device()
    for generator in torch.cuda.default_generators[device : device + 1]:
        generator.graphsafe_set_state(generator.clone_state())
