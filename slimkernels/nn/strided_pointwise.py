"""Keeps oneDNN from the convolutions that `slimkernels.kernels.strided_pointwise` is about, in models of any layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from slimkernels.kernels.strided_pointwise import pixels_read

_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class StridedPointwiseGuard(TorchFunctionMode):
    """Context in which every convolution that this thread calls, by a layer or by a function, has a safe gradient.

    ``torch.compile`` sees the guard, and nothing of it stays in the model. It does not reach into ``torch.jit.script``,
    nor into what an activation checkpoint computes again during the backward pass: `strided_pointwise_guarded` covers
    the layers there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and torch.is_grad_enabled():
            return _convolution(func, *args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return func(pixels_read(input, weight, stride, padding), weight, bias, stride, padding, *args, **kwargs)


class PixelsRead:
    """Forward pre-hook of a convolution layer: hands it what it reads of its input, while gradients are recorded."""

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled():
            return args, kwargs
        x, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        return (pixels_read(x, layer.weight, layer.stride, layer.padding), *rest), {}  # type: ignore[arg-type]


def guard_strided_pointwise_(model: nn.Module) -> nn.Module:
    """Gives every strided 1x1 convolution layer of the model a `PixelsRead` hook, in place, once; returns the model.

    For models that are trained in a loop of the user's own: `slimkernels.factorize_` and ``convert(training=True)`` do
    it. Block-sparse and low-rank convolutions return channels_last images and the dense layers behind them pass that
    on, so that a model which trained well before may meet oneDNN's fault once some layers are replaced. Results do not
    change, and the functions of this package do not take it for a hook of the user's.
    """
    _register(model)
    return model


@contextmanager
def strided_pointwise_guarded(model: nn.Module) -> Iterator[None]:
    """The hooks of `guard_strided_pointwise_` are in the model inside the block."""
    handles = _register(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(model: nn.Module) -> list[RemovableHandle]:
    handles = []
    for layer in model.modules():
        pointwise = isinstance(layer, _LAYERS) and max(layer.kernel_size) == 1 and max(layer.stride) > 1
        if pointwise and not any(isinstance(hook, PixelsRead) for hook in layer._forward_pre_hooks.values()):
            handles.append(layer.register_forward_pre_hook(PixelsRead(), with_kwargs=True))
    return handles
