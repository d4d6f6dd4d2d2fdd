"""Which kernel a block-sparse module's calls take, and the pack of the tensor-core kernel of CUDA C++."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from slimkernels.dispatch.select import resolve
from slimkernels.formats import BSRWeight
from slimkernels.kernels import cuda_tensor_cores
from slimkernels.kernels.problems import Request


class PackedForKernel(nn.Module):
    """The pack is kept in eval mode, in a buffer outside of the state dict for each of `cuda_tensor_cores.Packed`."""

    values: nn.Parameter
    block_shape: tuple[int, int]
    epilogue: str
    kernel: str
    weight_bsr: Callable[[], BSRWeight]
    _op: str
    _tensor_core_names = tuple(f"tensor_core_{name}" for name in cuda_tensor_cores.Packed._fields)

    def _request(self) -> Request:
        return Request(self._op, self.values.dtype, self.values.device.type, self.block_shape, self.epilogue)

    def _isa(self) -> str | None:
        """Instruction set of the CPU kernel that the module's calls take; None where they take none."""
        try:
            return resolve(self.kernel, self._request()).isa
        except ValueError:  # the forward says why
            return None

    def _warn_of_reference(self) -> None:
        """Warns where no kernel but the reference, which multiplies the zeros, takes this dtype on this device."""
        if self.values.is_meta or self.values.dtype not in (torch.float16, torch.bfloat16):
            return  # who asks for float64 wants digits
        try:
            slow = resolve("auto", self._request()).backend == "reference"
            faster = slow and resolve("auto", self._request()._replace(dtype=torch.float32)).backend != "reference"
        except ValueError:  # the forward says why
            return
        if faster:
            warnings.warn(
                f"{type(self).__name__}: {str(self.values.dtype).removeprefix('torch.')} has no sparse kernel on "
                f"{self.values.device.type}, so zeros are multiplied and nothing is gained; convert in the dtype that "
                "serves, or go back to float32 with model.float()",
                stacklevel=2,
            )

    def _wants_tensor_cores(self) -> bool:
        """Whether the module's calls take the tensor-core kernel, which runs on explicit request."""
        if self.kernel != cuda_tensor_cores.NAME:
            return False
        try:
            return resolve(self.kernel, self._request()).name == cuda_tensor_cores.NAME
        except ValueError:  # the forward says why
            return False

    def _pack_for_tensor_cores(self) -> None:
        w = self.weight_bsr()
        with torch.inference_mode(False), torch.no_grad():
            packed = cuda_tensor_cores.pack(w.values, w.crow_indices, w.col_indices, w.weight_shape, w.block_shape)
        for name, tensor in zip(self._tensor_core_names, packed):
            setattr(self, name, tensor)
