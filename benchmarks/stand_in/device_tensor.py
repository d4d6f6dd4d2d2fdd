"""Tensors that say they are on ``cuda:0`` and hold a CPU tensor; every op on them is run on what they hold.

To torch's C++ they are on the CPU, whose autograd asks no driver; in Python they are on the device, and whatever is
computed from them is too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Ops that may take tensors of both devices, by their name without the overload.
MIXED = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_", "is_same_size"}
# Ops whose result the host waits for.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}
# The graph that is being captured, a list of calls, innermost last.
capturing: list[list[tuple[Callable[..., Any], Any, Any, Any]]] = []
# Memory that was there before the captured ops, by address, with what it held; None: they made it themselves.
_found: dict[int, tuple[Any, Any] | None] = {}
# Whether a copy to the CPU is meant as one: torch's own C++ names the device that it sees, which is the CPU.
_leaving = False
# Names of the ops and kernels that run while a profile is taken.
profiled: list[str] | None = None
_checking = True


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside, ops may wait for values while a graph is captured: they stand for a kernel that does not."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


class DeviceTensor(Tensor):
    """A tensor on the stand-in's device; ``inner`` is the CPU tensor with its values, sizes and strides."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="cpu", requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def _set_data(self, value: DeviceTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    data = property(lambda self: self.detach(), _set_data)  # type: ignore[assignment]

    def cpu(self, memory_format: Any = torch.preserve_format) -> Tensor:
        return _leave(self, memory_format=memory_format)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copied = kwargs.pop("copy", False)  # which the parser does not know
        device, dtype, _, memory_format = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)
        options = {"memory_format": memory_format or torch.preserve_format}
        if device is not None and device.type == "cpu":
            return _leave(self, dtype=dtype or self.dtype, **options)
        same = dtype in (None, self.dtype) and not copied
        moved = self if same else aten._to_copy(self, dtype=dtype, **options)
        return moved if memory_format is None else moved.contiguous(memory_format=memory_format)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.detach().clone(memory_format=torch.preserve_format).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.inner!r})"


def _leave(tensor: DeviceTensor, **options: Any) -> Tensor:
    """A copy on the CPU."""
    global _leaving
    _leaving = True
    try:
        return aten._to_copy(tensor, device=torch.device("cpu"), **options)
    finally:
        _leaving = False


def _without_tensor(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``to(other)`` as ``to(device, dtype)``; a boolean or a copy flag stays."""
    if args and isinstance(args[0], Tensor):
        return (args[0].device, args[0].dtype, *args[1:])
    return args


def unwrap(value: Any) -> Any:
    """The CPU tensor in place of a device tensor, and the CPU in place of the device."""
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def _name(func: Any) -> str:
    return func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)


def _check(func: Any, name: str, tensors: Sequence[Tensor]) -> None:
    """What a GPU would refuse."""
    on_device = any(isinstance(t, DeviceTensor) for t in tensors)
    if on_device and name not in MIXED:
        stray = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim() > 0 and t.device.type == "cpu"]
        if stray:
            raise RuntimeError(
                f"{func}: expected all tensors on cuda:0, got one of shape {tuple(stray[0].shape)} on cpu"
            )
    if capturing and on_device and _checking:
        leaves = name == "_to_copy" and _leaving
        leaves |= name == "copy_" and not all(isinstance(t, DeviceTensor) for t in tensors)
        if name in READS or leaves:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One op: its own code for the ops of slimkernels, else torch's on the CPU tensors inside."""
    name = _name(func)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == "cuda"
    _check(func, name, tensors)
    if func.namespace == "slimkernels":
        from stand_in.launches import run_op

        return run_op(name, args, kwargs)
    if profiled is not None and any(isinstance(t, DeviceTensor) for t in tensors):
        profiled.append(name)
    plain_args, plain_kwargs = tree_map(unwrap, (args, kwargs))
    if capturing:
        _remember(tree_flatten((plain_args, plain_kwargs))[0], made=False)
    call = CUDNN.get(name, func)
    result = call(*plain_args, **plain_kwargs)
    if capturing and "empty" not in name and (to_device or any(isinstance(t, DeviceTensor) for t in tensors)):
        capturing[-1].append((call, plain_args, plain_kwargs, result))
    if capturing:
        _remember(tree_flatten(result)[0], made=True)
    wrap = to_device or (any(isinstance(t, DeviceTensor) for t in tensors) and not _leaving)
    given = {id(unwrap(t)): t for t in tensors}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # written in place
            return given[id(value)]
        return DeviceTensor(value) if wrap and not isinstance(value, DeviceTensor) else value

    return tree_map(wrapped, result)


def _remember(values: Sequence[Any], made: bool) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            storage = value.untyped_storage()
            if storage.data_ptr() not in _found:
                _found[storage.data_ptr()] = None if made else (storage, storage.clone())


def launched(kernel: str) -> None:
    """Notes that a kernel ran, in a profile; while a graph is captured, that each replay runs it."""
    if profiled is not None:
        profiled.append(kernel)
    if capturing:
        capturing[-1].append((launched, (kernel,), {}, None))


def forget_capture() -> None:
    """Nothing ran: whatever the captured ops wrote into memory that was there before holds what it held."""
    for kept in _found.values():
        if kept is not None:
            storage, before = kept
            storage.copy_(before)
    _found.clear()


def replay(calls: list[tuple[Callable[..., Any], Any, Any, Any]]) -> None:
    """Runs captured ops again, in order, their results into the memory of the first results."""
    with torch.no_grad():
        for call, args, kwargs, first in calls:
            again = call(*args, **kwargs)
            for old, new in zip(tree_flatten(first)[0], tree_flatten(again)[0]):
                if isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _fused_relu(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return torch.relu_(torch.nn.functional.conv2d(x, weight, bias, *geometry))


def _fused_add_relu(
    x: Tensor, weight: Tensor, added: Tensor, factor: float, bias: Tensor | None, *geometry: Any
) -> Tensor:
    y = torch.nn.functional.conv2d(x, weight, bias, *geometry)
    if added.shape != y.shape:
        raise RuntimeError(f"cudnn_convolution_add_relu: expected {tuple(y.shape)}, got {tuple(added.shape)}")
    return torch.relu_(y.add_(added, alpha=factor))


# Ops that the CPU does not have.
CUDNN = {"cudnn_convolution_relu": _fused_relu, "cudnn_convolution_add_relu": _fused_add_relu}


class Device(TorchDispatchMode):
    """Catches what creates tensors on the device; ops on such tensors come here too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "slimkernels":
            with self:  # its code creates tensors on the device
                return run(func, args, kwargs or {})
        return run(func, args, kwargs or {})


def _to(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.to` of a CPU tensor, which in C++ would ask the driver for the number of the device."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, _, memory_format = torch._C._nn._parse_to(*_without_tensor(args), **known)
        if device is None or device.type != "cuda":
            return plain(self, *args, **kwargs)
        options = {"memory_format": memory_format or torch.preserve_format}
        return aten._to_copy(self, device=CUDA, dtype=dtype or self.dtype, **options)

    return to


def install() -> None:
    """Enters the mode for good. Parameters that move or change dtype become new ones: they hold a CPU tensor."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Tensor.to = _to(Tensor.to)  # type: ignore[method-assign]
    Tensor.cuda = lambda self, *args, **kwargs: self.to(CUDA)  # type: ignore[method-assign]
    Device().__enter__()
