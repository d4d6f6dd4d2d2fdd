"""The functions and classes of `torch.cuda` that the package, its tests and its benchmarks call, without a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

# An H100 SXM.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
    L2_cache_size=50 * 2**20, shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120,
    is_integrated=0, is_multi_gpu_board=0, gcnArchName="", uuid="stand-in", pci_bus_id=0, pci_device_id=0,
)  # fmt: skip

# What tells cards apart by which kernels are chosen: `become`.
CARDS = {
    "h100": {"name": PROPERTIES.name, "total_memory": 80 * 2**30, "L2_cache_size": 50 * 2**20},
    "h200": {"name": "NVIDIA H200", "total_memory": 140 * 2**30, "L2_cache_size": 60 * 2**20},
}


def become(card: str) -> None:
    """Torch finds this one of `CARDS` from now on; forget what was chosen before (`slimkernels.dispatch.select`)."""
    PROPERTIES.__dict__.update(CARDS[card])


class Stream:
    """A stream that does its work at once."""

    cuda_stream = 0
    device = torch.device("cuda", 0)
    device_index, device_type, stream_id, priority = 0, 1, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: Any) -> None: ...


class Event:
    """An event that has happened; times are the host's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        if self._time is None or end._time is None:
            raise RuntimeError("both events must be recorded before their difference is asked")
        return max(1e3 * (end._time - self._time), 1e-6)

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class CUDAGraph:
    """The ops that ran inside `graph`, to be run again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Any] | None = None

    def replay(self) -> None:
        from stand_in import device_tensor

        if self.calls is None:
            raise RuntimeError("CUDAGraph.replay: nothing was captured")
        device_tensor.replay(self.calls)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def reset(self) -> None:
        self.calls = None


class Generator(torch.Generator):
    """A generator that says which device it is for; the CPU's numbers either way."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.on = torch.device(device)
        return made

    device = property(lambda self: self.on)  # type: ignore[assignment]


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **kwargs: Any) -> Iterator[None]:
    """Records the ops on the device inside the block, and takes back what they wrote: a capture runs nothing."""
    from stand_in import device_tensor

    calls: list[Any] = []
    device_tensor.capturing.append(calls)
    try:
        yield
    finally:
        device_tensor.capturing.pop()
        device_tensor.forget_capture()
    cuda_graph.calls = calls


class Profile:
    """A profile whose events are the names of ops and kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._names: list[str] = []

    def __enter__(self) -> Profile:
        from stand_in import device_tensor

        device_tensor.profiled = self._names
        return self

    def __exit__(self, *exception: Any) -> None:
        from stand_in import device_tensor

        device_tensor.profiled = None

    def events(self) -> list[Any]:
        cuda = torch.autograd.DeviceType.CUDA
        return [
            SimpleNamespace(name=name, device_type=cuda, time_range=SimpleNamespace(start=i, elapsed_us=lambda: 1.0))
            for i, name in enumerate(self._names)
        ]


@contextlib.contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _refuse_while_capturing(*args: Any, **kwargs: Any) -> None:
    from stand_in import device_tensor

    if device_tensor.capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def install() -> None:
    """Puts these in the place of torch's."""
    cuda = torch.cuda
    for name, value in {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "init": None,
        "_lazy_init": None, "set_device": None, "empty_cache": None, "memory_allocated": 0, "max_memory_allocated": 0,
        "memory_reserved": 0, "reset_peak_memory_stats": None, "manual_seed": None, "manual_seed_all": None,
        "seed_all": None, "get_device_capability": (9, 0),
        "get_device_properties": PROPERTIES, "mem_get_info": (70 * 2**30, 80 * 2**30), "is_bf16_supported": True,
        "_is_in_bad_fork": False, "clock_rate": 1980, "get_arch_list": ["sm_90"], "set_rng_state": None,
        "ipc_collect": None,
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *args, value=value, **kwargs: value)
    current = Stream()
    cuda.get_device_name = lambda *args, **kwargs: PROPERTIES.name
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.synchronize = _refuse_while_capturing
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: current
    cuda.is_current_stream_capturing = lambda: bool(_capturing())
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, CUDAGraph, graph
    cuda.stream = cuda.device = cuda.device_of = _nothing
    cuda.profiler.start = cuda.profiler.stop = lambda: None

    def compile(model: Any = None, **kwargs: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = compile
    torch.profiler.profile = Profile
    autocast = torch.autocast

    def cpu_autocast(device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if device_type == "cuda":  # in C++ the tensors are the CPU's
            dtype = dtype or torch.float16
            torch.set_autocast_dtype("cuda", dtype)
        return autocast("cpu", dtype, *args, **kwargs)

    torch.autocast = torch.amp.autocast = cpu_autocast
    torch.Generator = Generator
    tensor = torch.tensor

    def on_device(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        made = tensor(data, *args, **kwargs)
        return made if device is None else made.to(device)

    torch.tensor = on_device


def _capturing() -> list[Any]:
    from stand_in import device_tensor

    return device_tensor.capturing
