"""Ceilings of GPUs: what predictions divide by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GpuRates:
    """Ceilings of one GPU.

    Attributes:
        name: the device, as `slimkernels.dispatch.devices.device_name` spells it.
        matrix_flops: 16-bit matrix product on random data, FLOP/s.
        dense_flops: what the vendor's dense convolutions and products reach, FLOP/s.
        fma_flops: IEEE float32 on the plain cores, FLOP/s.
        memory_bytes_s: device memory, read plus written, bytes/s.
        l2_bytes_s: L2 to all processors, bytes/s.
        processors: streaming multiprocessors.
        launch_s: one kernel inside a CUDA graph, seconds.
        clock_hz: of the multiprocessors under load.
        l2_capacity: bytes of L2.
        shared_memory: bytes that one block may use.
        latency_s: from the address to the data of a load that L2 answers, under load.
    """

    name: str
    matrix_flops: float
    dense_flops: float
    fma_flops: float
    memory_bytes_s: float
    l2_bytes_s: float
    processors: int
    launch_s: float
    clock_hz: float = 1.7e9
    l2_capacity: int = 50 * 2**20
    shared_memory: int = 227 * 1024
    latency_s: float = 0.4e-6


# The H200's were measured by benchmarks/bench_ceilings.py (benchmarks/results/nvidia-h200): matrix product, dense 3x3
# convolution, copy, a gather from L2 (the same at 32, 64 and 128 contiguous bytes), launch, clock. Not measured: its
# float32 rate (the vendor's 67 TFLOP/s at 0.9) and latency.
H200 = GpuRates("nvidia-h200", 757e12, 745e12, 60e12, 4.24e12, 9.8e12, 132, 1.03e-6, 1.92e9, 60 * 2**20)
# The H100's matrix and memory rates were measured (bf16 product of 8192^3 on random data, device copy). The rest is the
# H200's: it is the same chip with as many processors, other memory and a smaller L2. About the A100 all is assumed.
H100 = replace(H200, name="nvidia-h100", matrix_flops=798e12, memory_bytes_s=3.0e12, l2_capacity=50 * 2**20)
A100 = GpuRates(
    "nvidia-a100", 280e12, 230e12, 17e12, 1.75e12, 4.2e12, 108, 1.5e-6, 1.41e9, 40 * 2**20, 163 * 1024, 0.4e-6
)
KNOWN = (H200, H100, A100)


def scaled_rates(name: str, properties: Any) -> GpuRates:
    """Ceilings of the card of this name; of another one, the H200's scaled by its processors.

    Args:
        name: as `slimkernels.dispatch.devices.device_name` spells it: ``nvidia-h100-80gb-hbm3``.
        properties: `torch.cuda.get_device_properties` of it.
    """
    like = next((rates for rates in KNOWN if name.startswith(rates.name)), None)
    known = like or H200
    count = properties.multi_processor_count
    share = count / known.processors
    return replace(
        known,
        name=name,
        matrix_flops=known.matrix_flops * share,
        dense_flops=known.dense_flops * share,
        fma_flops=known.fma_flops * share,
        l2_bytes_s=known.l2_bytes_s * share,
        processors=count,
        l2_capacity=properties.L2_cache_size,
        shared_memory=properties.shared_memory_per_block_optin,
    )
