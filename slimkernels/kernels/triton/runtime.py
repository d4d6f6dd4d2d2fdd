"""Whether the Triton kernels can run here, and the few launch-time facts they share.

Importing this module does not import Triton; `bsr_conv2d` and `low_rank_linear` do.
"""

from __future__ import annotations

import contextlib
import importlib.util
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import env
from slimkernels.kernels.problems import Problem

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
INT32_MAX = 2**31 - 1
# Shared memory a block may use on compute capability 8.0, in bytes; 9.0 and 10.0 have 227 KB, 8.6, 8.9 and 12.0 99 KB.
SHARED_MEMORY_SM80 = 163 * 1024


def available() -> str | None:
    """None when the Triton kernels can run in this process, else the reason they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if env.triton_interpret():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0, the lowest the Triton kernels are compiled for"
    return None


def shape_reason(problem: Problem) -> str | None:
    """None when the Triton kernels take the problem, else why not: CPU tensors need the interpreter."""
    if problem.device == "cpu" and not env.triton_interpret():
        return "Triton kernels take CPU tensors under TRITON_INTERPRET=1 only"
    return None


def device_limits(x: Tensor) -> dict[str, int]:
    """`shared_memory` (bytes a block may use) and `processors` of x's device, the keywords of `default_config`.

    CPU tensors (the interpreter) get one processor, so that tiles are as large as the problem: programs run one by one.
    """
    if not x.is_cuda:
        return {"shared_memory": SHARED_MEMORY_SM80, "processors": 1}
    properties = torch.cuda.get_device_properties(x.device)
    return {
        "shared_memory": properties.shared_memory_per_block_optin,
        "processors": properties.multi_processor_count,
    }


class Limits(NamedTuple):
    """What launches and their configurations follow of a device."""

    shared_memory: int
    """Bytes that a block may use."""
    processors: int
    overlaps: bool
    """Whether a kernel may begin before the one in front of it has ended."""

    def overlap(self, programs: int) -> int:
        """OVERLAP of a forward kernel of so many programs, see `slimkernels.kernels.triton.tiles`.

        A kernel that leaves half of the device idle lets the next one begin at once. Where more runs, what waits takes
        the place of what works: VGG-19 at batch 1, 16 and 1024 took 83.6, 101.1 and 467.7 us on an H200 with all
        kernels EARLY, 89.7, 97.2 and 464.5 us LATE, and 96.6, 104.8 and 473.5 us without.
        """
        if not self.overlaps:
            return 0
        return 1 if 2 * programs <= self.processors else 2


@lru_cache
def limits(device: int) -> Limits:
    """The limits of a CUDA device by its index, or of the CPU (the interpreter) for -1; asked once."""
    found = device_limits(torch.empty(0, device="cpu" if device < 0 else f"cuda:{device}"))
    hopper = device >= 0 and torch.cuda.get_device_capability(device)[0] >= 9
    return Limits(found["shared_memory"], found["processors"], hopper)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device current, so that Triton launches on that device's current stream."""
    if not x.is_cuda or torch.cuda.current_device() == x.get_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def interpreted_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: `dtype` itself, except that interpreted bfloat16 is computed in float32.

    Triton's interpreter keeps bfloat16 as uint16 bit patterns and multiplies those in tl.dot. Products of bfloat16
    are exact in float32, so float32 in and one rounding at the end is the compiled kernel's arithmetic.
    """
    return torch.float32 if env.triton_interpret() and dtype == torch.bfloat16 else dtype


def gradient_precision(sizes: tuple[int, int, int, int]) -> str:
    """``ieee`` or ``tf32``: what torch's switches say of the float32 gradients of a convolution of (R, S, H, W).

    A linear layer arrives as the convolution of single pixels and follows the switch of matrix products.
    """
    switch = torch.backends.cuda.matmul if max(sizes) == 1 else torch.backends.cudnn.conv
    # For mypy: torch 2.9 has it, torch's annotations do not.
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def division(divisor: int) -> tuple[int, int]:
    """(factor, shift) with which `tiles.divide` divides by a positive divisor below 2^31.

    2^(31 + shift) / divisor rounded up lies in [2^31, 2^32]; what it exceeds the quotient by changes no n < 2^31. The
    factor comes as the int32 of the same bits, so that every divisor's is an argument of one type.
    """
    shift = (divisor - 1).bit_length()
    return 2 ** (31 + shift) // divisor + 1 - 2**32, shift


def power_of_2_divisor(n: int, cap: int) -> int:
    """Largest power of two that divides n, at most `cap` (itself a power of two)."""
    return min(n & -n, cap)
