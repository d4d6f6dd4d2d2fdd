"""Attributes of the drop-in modules: which of torch's they take over, and what follows when one is changed."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn.modules.utils import _pair

from slimkernels.kernels import EPILOGUES
from slimkernels.kernels.problems import Pair, check_geometry


def unsupported_conv_reason(conv: nn.Conv2d) -> str | None:
    """Why a ``nn.Conv2d`` has no block-sparse or low-rank twin, naming attribute and value; None when it has one."""
    if conv.groups != 1:
        return f"groups={conv.groups} is not supported, expected 1"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported, expected 'zeros'"
    if not conv.weight.is_floating_point():
        return f"weight dtype {conv.weight.dtype} is not supported, expected floating point"
    try:
        resolved_padding(conv)
    except ValueError as error:
        return str(error)
    return None


def resolved_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """A convolution's padding as two ints; ``'same'`` where it is symmetric. Raises ValueError where it is not."""
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if any(t % 2 for t in total):
        raise ValueError(f"padding='same' with kernel_size={conv.kernel_size} is asymmetric and not supported")
    return total[0] // 2, total[1] // 2


def fx_call(module: nn.Module, x: Any) -> Any:
    """A module's call as one node where torch.fx traces it, as those of torch's own layers are; None elsewhere."""
    if not isinstance(x, fx.Proxy):
        return None
    tracer: Any = x.tracer  # of symbolic_trace, which knows where a module lies
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


class AttributesInUse(nn.Module):
    """A module that keeps what it made of its attributes, and makes it anew when one of them is assigned to.

    The first assignment of `_prepared` ends the construction; before it, attributes are just set.
    """

    _op: str
    # What the weight's tensors were built with.
    _fixed: frozenset[str] = frozenset()
    _used = frozenset({"stride", "padding", "dilation", "epilogue", "kernel", "kind"})

    def __setattr__(self, name: str, value: Any) -> None:
        if (name not in self._used and name not in self._fixed) or "_prepared" not in self.__dict__:
            super().__setattr__(name, value)
            return
        if name in self._fixed:
            raise AttributeError(f"{type(self).__name__}: {name} belongs to the stored weight and cannot be changed")
        if name in ("stride", "padding", "dilation"):
            value = int_pair(type(self).__name__, name, value)
        before = getattr(self, name)
        super().__setattr__(name, value)
        try:
            self._check_attributes()
        except (ValueError, TypeError):
            super().__setattr__(name, before)
            raise
        self._attributes_changed()

    def _check_attributes(self) -> None:
        """Raises ValueError, beginning with the module's name, where the attributes have no meaning."""
        module: Any = self  # attributes of the classes below
        check_epilogue(type(self).__name__, self._op, module.epilogue)
        if hasattr(self, "stride"):
            check_geometry(type(self).__name__, module.stride, module.padding, module.dilation)

    def _attributes_changed(self) -> None:
        """Renews what follows from the attributes."""
        raise NotImplementedError


def int_pair(owner: str, name: str, value: Any) -> tuple[int, int]:
    """Two ints from one or two. Raises TypeError or ValueError, beginning with ``owner``, for anything else."""
    try:
        pair = tuple(operator.index(v) for v in _pair(value))
    except TypeError:
        raise TypeError(f"{owner}: expected {name} to be one int or two, got {value!r}") from None
    if len(pair) != 2:
        raise ValueError(f"{owner}: expected {name} to be one int or two, got {value!r}")
    return pair[0], pair[1]


def conv_geometry(conv: nn.Conv2d) -> tuple[Pair, Pair, Pair, Pair]:
    """Kernel size, stride, padding and dilation of a convolution. Raises ValueError as `resolved_padding`."""
    return _pair(conv.kernel_size), _pair(conv.stride), resolved_padding(conv), _pair(conv.dilation)


def check_epilogue(name: str, op: str, epilogue: str) -> None:
    """Raises ValueError, beginning with the module's name, unless the op has this epilogue."""
    if epilogue not in EPILOGUES[op]:
        raise ValueError(f"{name}: expected epilogue in {sorted(EPILOGUES[op])}, got {epilogue!r}")
