"""Launches of one jitted kernel without Triton's per-call work on arguments.

Triton binds, specialises and hashes every argument of every call to find the compiled kernel. All of that follows
from the constants, the integers, and the pointers' dtypes and alignment; whoever keeps the first two fixed (a `Launch`
is made once a problem) needs to look at the pointers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

from slimkernels.kernels.triton.runtime import device_guard


def launch_options(config: Mapping[str, int], overlap: int) -> dict[str, int]:
    """num_warps, num_stages, maxnreg of a configuration; with an overlap it may begin before the last kernel ended."""
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config}
    return {**options, "launch_pdl": True} if overlap else options


class Launch:
    """A kernel with its grid, integers, constants and options fixed; called with the pointers.

    The kernel's parameters must be ordered pointers, integers, constants.

    Args:
        kernel: the jitted function.
        grid: three ints.
        integers: its integer arguments.
        constants: its constexpr arguments by name.
        options: num_warps, num_stages and others of `launch_options`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        integers: Sequence[int],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.integers, self.constants, self.options = tuple(integers), dict(constants), dict(options)
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._tail = (*self.integers, *(constants[name] for name in names))
        self._compiles = isinstance(kernel, JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launches on the first tensor's device and on that device's current stream."""
        x = tensors[0]
        if not self._compiles:  # decorated with TRITON_INTERPRET=1
            self.kernel[self.grid](*tensors, *self.integers, **self.constants, **self.options)
            return
        aligned = 0
        for i, tensor in enumerate(tensors):
            aligned |= (tensor.data_ptr() % 16 == 0) << i
        # A kernel compiled for float32 would write past the end of a 16-bit tensor.
        key = (x.get_device(), aligned, *[tensor.dtype for tensor in tensors])
        with device_guard(x):
            compiled = self._compiled.get(key)
            if compiled is None:
                self._compiled[key] = self.kernel[self.grid](*tensors, *self.integers, **self.constants, **self.options)
            else:
                compiled[self.grid](*tensors, *self._tail)
