"""The twin of ``nn.BatchNorm2d`` that runs the ReLU and the max-pool behind it in the same kernels while training."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from slimkernels import env
from slimkernels.kernels import EPILOGUES
from slimkernels.kernels.cpu.library import library
from slimkernels.kernels.reference import apply_epilogue
from slimkernels.ops import batch_norm

_Norm = TypeVar("_Norm", bound=nn.Module)


# Not an nn.BatchNorm2d: SyncBatchNorm.convert_sync_batchnorm would replace it, and what is behind it be run by nobody.
class FusedBatchNorm2d(nn.modules.batchnorm._NormBase):
    """Drop-in for ``nn.BatchNorm2d`` and the ReLU and 2x2 max-pool behind it.

    In training mode on a GPU, and in float32 on a CPU, it runs `slimkernels.ops.batch_norm`, which reads the activation
    twice forward and twice backward and keeps nothing but it. Otherwise, without the extension on a CPU, and with
    ``momentum=None`` or running statistics in another dtype than float32, it runs torch's ops one after the other.
    Parameters, buffers and a state dict's keys are those of ``nn.BatchNorm2d``, until it takes the bias of a layer
    (`take_bias_`). In training on several devices each has statistics of its own.

    Args:
        num_features: as ``nn.BatchNorm2d``.
        eps: as ``nn.BatchNorm2d``.
        momentum: as ``nn.BatchNorm2d``.
        affine: as ``nn.BatchNorm2d``.
        track_running_stats: as ``nn.BatchNorm2d``.
        epilogue: ``none``, ``relu`` or ``relu_maxpool2``.
        kernel: a ``batch_norm_forward`` kernel's name, or ``auto``.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape: ``(N, C, H, W)`` to ``(N, C, H, W)``, or ``(N, C, H // 2, W // 2)`` behind a max-pool.

    Raises:
        ValueError: an unknown epilogue.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        epilogue: str = "none",
        kernel: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if epilogue not in EPILOGUES["batch_norm_forward"]:
            expected = sorted(EPILOGUES["batch_norm_forward"])
            raise ValueError(f"FusedBatchNorm2d: expected epilogue in {expected}, got {epilogue!r}")
        self.epilogue, self.kernel = epilogue, kernel
        self._giver: tuple[nn.Module, nn.Parameter] | None = None  # in a tuple: not a child

    @property
    def giver(self) -> nn.Module | None:
        """The layer whose bias it has."""
        return self._giver[0] if self._giver else None

    @torch.no_grad()
    def take_bias_(self, layer: nn.Module) -> None:
        """Takes over the bias of the layer in front, whose output nothing else reads.

        In training the mean is subtracted, and the bias with it: adding it and summing its gradient, which is zero,
        took 1.1 of the 7.0 ms of a step of VGG-19 on an H200. In eval mode running means less the bias do the same.
        The bias waits in the buffer ``taken_bias``.

        Args:
            layer: a module with a parameter ``bias`` of a value per channel.
        """
        bias = layer._parameters["bias"]
        assert bias is not None
        layer._parameters["bias"] = None
        self._giver = (layer, bias)
        self.register_buffer("taken_bias", bias.detach())
        if self.running_mean is not None:
            self.running_mean.sub_(bias.to(self.running_mean.dtype))

    @torch.no_grad()
    def give_bias_back_(self) -> None:
        """Undoes `take_bias_`; the layer has its own parameter again."""
        assert self._giver is not None
        (layer, bias), value = self._giver, self._buffers.pop("taken_bias")
        assert value is not None
        bias.data = value  # the buffer, where the module was moved to another device or dtype
        layer._parameters["bias"] = bias
        self._giver = None
        if self.running_mean is not None:
            self.running_mean.add_(value.to(self.running_mean.dtype))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, epilogue: str = "none", kernel: str = "auto") -> FusedBatchNorm2d:
        """The twin of a batch norm, with its parameters, buffers and mode: the same tensors, not copies.

        Args:
            norm: the batch norm.
            epilogue: as for the class.
            kernel: as for the class.
        """
        settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        return _with_tensors_of(norm, cls(*settings, epilogue=epilogue, kernel=kernel, device="meta"))

    def to_batch_norm(self) -> nn.BatchNorm2d:
        """The plain batch norm, with the same tensors; what is behind it is no longer run."""
        settings = (self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats)
        return _with_tensors_of(self, nn.BatchNorm2d(*settings, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """``epilogue(batch_norm(input))``."""
        if not self._fuses(input):
            # For mypy: what torch's own reads of self is there.
            return apply_epilogue(nn.BatchNorm2d.forward(self, input), self.epilogue)  # type: ignore[arg-type]
        y = batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            momentum=self.momentum or 0.0,  # never None here
            eps=self.eps,
            epilogue=self.epilogue,
            kernel=self.kernel,
        )
        if self.num_batches_tracked is not None:  # behind the kernels: the first begins while the layer in front ends
            self.num_batches_tracked.add_(1)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        # For mypy: what torch's own reads of self is there.
        nn.BatchNorm2d._check_input_dim(self, input)  # type: ignore[arg-type]

    def _fuses(self, x: Tensor) -> bool:
        tracked = (self.running_mean, self.running_var)
        return (
            self.training
            and (x.is_cuda or env.triton_interpret() or (x.dtype is torch.float32 and x.is_cpu and bool(library()[2])))
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and x.dim() == 4
            and x.numel() > 0
            and self.momentum is not None
            and (self.weight is None) == (self.bias is None)
            and all(t is None or t.dtype == torch.float32 for t in tracked)
        )

    def extra_repr(self) -> str:
        """As of ``nn.BatchNorm2d``, with the epilogue."""
        return f"{super().extra_repr()}, epilogue={self.epilogue!r}"


class RunsInBatchNorm(nn.Identity):
    """Stands where a ReLU or a max-pool was that a `FusedBatchNorm2d` before it runs now; keeps it for the way back."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._kept = (original,)  # in a tuple: not a child

    @property
    def original(self) -> nn.Module:
        """What was here."""
        return self._kept[0]

    def extra_repr(self) -> str:
        """What was here."""
        return repr(self.original)


def _with_tensors_of(source: nn.Module, target: _Norm) -> _Norm:
    """``target`` with the parameters, buffers and mode of ``source``."""
    target._parameters.update(source._parameters)
    target._buffers.update((name, source._buffers[name]) for name in target._buffers)
    target.training = source.training
    return target
