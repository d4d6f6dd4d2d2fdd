"""Launchers of the C++ batch norm of a training step and its gradients: what the kernel trusts is checked here."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.kernels.cpu.abi import BatchNormArguments, address
from slimkernels.kernels.cpu.library import library

_MOMENTS, _OUTPUT, _GRADIENT_SUMS, _INPUT_GRADIENT = range(4)


def launch_forward(
    isa: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, epilogue: str
) -> tuple[Tensor, Tensor]:
    """As `reference.batch_norm_forward`, for float32 x of at least one value.

    Raises:
        ValueError: tensors of another shape, dtype or device. RuntimeError: the native kernel failed (out of memory).
    """
    call = _Pass(isa, "batch_norm_forward", x, weight, bias, epilogue)
    mean, var = call.sums(_MOMENTS)
    n = call.values_a_channel
    statistics = torch.stack([mean, (var + eps).rsqrt(), var * (n / max(n - 1, 1))]).float()
    call.take_coefficients(statistics)
    y = torch.empty(call.output_shape, memory_format=torch.channels_last)
    call.run(_OUTPUT, y=y)
    return y, statistics


def launch_backward(
    isa: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.batch_norm_backward`, for float32 x of at least one value.

    Raises:
        ValueError: tensors of another shape, dtype or device. RuntimeError: the native kernel failed (out of memory).
    """
    call = _Pass(isa, "batch_norm_backward", x, weight, bias, epilogue)
    if grad.shape != call.output_shape or grad.dtype != torch.float32 or not grad.is_cpu:
        raise ValueError(
            f"batch_norm_backward: expected float32 grad of shape {tuple(call.output_shape)} on the CPU, "
            f"got {tuple(grad.shape)} {grad.dtype} on {grad.device}"
        )
    call.take_coefficients(statistics)
    call.grad = grad.detach().contiguous(memory_format=torch.channels_last)
    rstd, scale = statistics[1].double(), call.coefficients[1].double()
    of_bias, products = call.sums(_GRADIENT_SUMS)  # products with x less its mean
    n = call.values_a_channel
    call.coefficients[3:] = torch.stack([-scale * rstd.square() * products / n, -scale * of_bias / n])
    grad_x = torch.empty_like(call.x)
    call.run(_INPUT_GRADIENT, y=grad_x)
    return grad_x, torch.stack([of_bias, products * rstd]).float()


class _Pass:
    """What the passes over one activation have in common.

    Attributes:
        x: channels_last.
        grad: of the output, channels_last; None forward.
        coefficients: (5, C), see csrc/kernels.h.
        output_shape: of the epilogue's output.
        values_a_channel: that a mean is of.
    """

    def __init__(self, isa: str, op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, epilogue: str) -> None:
        c = x.shape[1] if x.dim() == 4 else 0
        affine = [t for t in (weight, bias) if t is not None]
        if x.dim() != 4 or x.numel() == 0 or x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(
                f"{op}: expected float32 x of shape (N, C, H, W) on the CPU, "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
        if len(affine) == 1 or any(t.shape != (c,) or not t.is_cpu for t in affine):
            raise ValueError(f"{op}: expected weight and bias of {c} values on the CPU, or neither")
        self.isa, self.op, self.epilogue = isa, op, epilogue
        self.weight, self.bias = weight, bias
        self.x = x.detach().contiguous(memory_format=torch.channels_last)
        self.grad: Tensor | None = None
        self.coefficients = torch.zeros(5, c)
        n, _, h, w = x.shape
        self.output_shape = torch.Size((n, c, h // 2, w // 2) if epilogue == "relu_maxpool2" else x.shape)
        if min(self.output_shape) == 0:
            raise ValueError(f"{op}: expected an image of at least 2x2 in front of a pool, got {h}x{w}")
        self.values_a_channel = n * h * w

    def take_coefficients(self, statistics: Tensor) -> None:
        """Fills in what an output is computed by: the same bits forward and backward."""
        if statistics.shape != (3, self.x.shape[1]) or statistics.dtype != torch.float32 or not statistics.is_cpu:
            raise ValueError(
                f"{self.op}: expected float32 statistics of shape {(3, self.x.shape[1])} on the CPU, "
                f"got {tuple(statistics.shape)} {statistics.dtype} on {statistics.device}"
            )
        mean, rstd = statistics[0], statistics[1]
        torch.neg(mean, out=self.coefficients[0])
        if self.weight is None or self.bias is None:
            self.coefficients[1] = rstd
        else:
            torch.mul(self.weight.detach().float(), rstd, out=self.coefficients[1])
            self.coefficients[2] = self.bias.detach()

    def sums(self, which: int) -> Tensor:
        """The two rows that a pass of sums finds, ``(2, C)`` in float64."""
        found = torch.empty(2, self.x.shape[1], dtype=torch.float64)
        self.run(which, sums=found)
        return found

    def run(self, which: int, *, y: Tensor | None = None, sums: Tensor | None = None) -> None:
        """One pass, on as many threads as torch has."""
        n, c, h, w = self.x.shape
        tensors = (self.x, self.grad, self.coefficients, y, sums)
        relu, pool = int(self.epilogue != "none"), int(self.epilogue == "relu_maxpool2")
        arguments = BatchNormArguments._make((*(address(t) for t in tensors), n, h, w, c, which, relu, pool))
        module = library()[0]
        assert module is not None
        status = module.batch_norm_f32(self.isa, arguments, torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"{self.op}: native kernel {self.isa} failed with status {status}")
