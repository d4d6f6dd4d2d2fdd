"""`fused_conv2d` by cuDNN: its convolution with bias and ReLU in one kernel, a 2x2 max-pool as a pass behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.kernels import reference

# What torch says where cuDNN has none of its kernels for a convolution.
_NO_KERNEL = ("unable to find an engine", "NOT_SUPPORTED")


def available() -> str | None:
    """None when torch has a cuDNN that runs here, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


def launch_fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    epilogue: str,
) -> Tensor:
    """``epilogue(conv2d(x, weight) + bias)``, channels_last; epilogue "relu" or "relu_maxpool2".

    Where cuDNN has no kernel for a layer with its ReLU, or is switched off, they run one after the other.

    Raises:
        ValueError: another epilogue.
    """
    if epilogue not in ("relu", "relu_maxpool2"):
        raise ValueError(f"fused_conv2d: expected epilogue 'relu' or 'relu_maxpool2' for cuDNN, got {epilogue!r}")
    geometry = stride, padding, dilation
    if not torch.backends.cudnn.enabled or x.numel() == 0:
        return reference.fused_conv2d(x, weight, bias, *geometry, epilogue)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    try:
        y = torch.cudnn_convolution_relu(x, weight, bias, *geometry, 1)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_KERNEL):
            raise
        return reference.fused_conv2d(x, weight, bias, *geometry, epilogue)
    if epilogue == "relu_maxpool2":
        y = F.max_pool2d(y, 2)
    return y.contiguous(memory_format=torch.channels_last)
