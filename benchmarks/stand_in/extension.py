"""The kernels of CUDA C++ on the stand-in: launchers check, pack and plan as on a GPU, and references fill in results.

`slimkernels._C` stays what it is but for its CUDA part, whose entries note a launch and do nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from stand_in import device_tensor, launches
from stand_in.cuda import PROPERTIES

_VERSION = 13_000


class Extension:
    """In the place of `slimkernels._C`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def build_info(self) -> dict[str, Any]:
        return self._module.build_info() | {"cuda": True, "cuda_version": _VERSION}

    def cuda_unavailable_reason(self) -> None:
        return None

    def cuda_chain_groups(self, group: int, barrier: int, dtype: int, device: int) -> int:
        return PROPERTIES.multi_processor_count // group

    def cuda_chain_conv2d(self, layers: Sequence[Sequence[int]], *arguments: int) -> int:
        return self._launched("chain_conv2d_kernel", layers=len(layers))

    def cuda_stem_conv2d(self, *arguments: int) -> int:
        return self._launched("stem_conv2d_kernel")

    def cuda_resident_conv2d(self, *arguments: Any) -> int:
        return self._launched("resident_conv2d_kernel")

    def cuda_weight_gradient(self, *arguments: Any) -> int:
        return self._launched("weight_gradient_kernel")

    def cuda_low_rank(self, *arguments: Any) -> int:
        return self._launched("low_rank_kernel")

    def _launched(self, kernel: str, **arguments: Any) -> int:
        device_tensor.launched(kernel)
        launches.record(kernel, (1, 1, 1), arguments, {})
        return 0


def of_extension(module: Any) -> None:
    """Gives `slimkernels._extension` the stand-in, where there is an extension at all."""
    plain = module.load

    def load() -> tuple[Any, str | None]:
        found, reason = plain()
        return found if found is None else _extension_of(found), reason

    module.load = load


_made: dict[int, Extension] = {}


def _extension_of(module: Any) -> Extension:
    return _made.setdefault(id(module), Extension(module))


def of_chain(module: Any) -> None:
    """What `slimkernels.kernels.cuda_chain` launches has the results of its layers' references, one after the other."""
    pack, launch = module.pack_layer, module.launch_chain
    signature = inspect.signature(pack)
    # By the address of the packed weights: the packed layer, which keeps them there, and what it was packed from.
    packed: dict[int, tuple[Any, dict[str, Any]]] = {}

    def pack_layer(*args: Any, **kwargs: Any) -> Any:
        layer = pack(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        packed[layer.pack.weights.data_ptr()] = layer, given.arguments
        return layer

    def launch_chain(x: Any, layers: Sequence[Any], *rest: Any) -> Any:
        y = launch(x, layers, *rest)
        with device_tensor.unchecked():
            for layer in layers:
                x = _bsr_conv2d(x, **packed[layer.pack.weights.data_ptr()][1])
            y.copy_(x)
        return y

    module.pack_layer, module.launch_chain = pack_layer, launch_chain


def of_tensor_cores(module: Any) -> None:
    """What `slimkernels.kernels.cuda_tensor_cores` launches has the results of its layer, a stem those of both."""
    of_resident(module)
    launch = module.launch_stem_conv2d
    signature = inspect.signature(launch)

    def launch_stem_conv2d(*args: Any, **kwargs: Any) -> Any:
        y = launch(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if y.numel() == 0:
            return y
        with device_tensor.unchecked():
            first_bias = given["first_bias"]
            weights = given["first_weight"].float(), None if first_bias is None else first_bias.float()
            middle = torch.relu(F.conv2d(given["x"].float(), *weights, padding=1)).to(y.dtype)
            parts = (given[name] for name in ("values", "crow_indices", "col_indices", "bias"))
            shapes = given["weight_shape"], given["block_shape"]
            y.copy_(_bsr_conv2d(middle, *parts, *shapes, (1, 1), (1, 1), (1, 1), given["epilogue"]))
        return y

    module.launch_stem_conv2d = launch_stem_conv2d


def of_resident(module: Any) -> None:
    """A block-sparse convolution has the result of the reference."""
    launch = module.launch_bsr_conv2d
    signature = inspect.signature(launch)

    def launch_bsr_conv2d(*args: Any, **kwargs: Any) -> Any:
        y = launch(*args, **kwargs)
        given = dict(signature.bind(*args, **kwargs).arguments)
        for name in ("packed", "config"):
            given.pop(name, None)
        if y.numel():
            with device_tensor.unchecked():
                y.copy_(_bsr_conv2d(**given))
        return y

    module.launch_bsr_conv2d = launch_bsr_conv2d


def of_zeros(module: Any) -> None:
    """Kernels that `EMPTY` names leave zeros: nothing that is rehearsed compares their results."""
    for name in EMPTY[module.__name__]:
        setattr(module, name, _emptied(getattr(module, name)))


def _emptied(launch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: launch(*args, **kwargs).zero_()


EMPTY = {
    "slimkernels.kernels.cuda_gradients": ("launch_wgrad",),
    "slimkernels.kernels.cuda_input_gradient": ("launch_dgrad",),
    "slimkernels.kernels.cuda_low_rank": ("launch_low_rank_linear", "launch_low_rank_conv2d"),
}


def _bsr_conv2d(
    x: Any, values: Any, crow_indices: Any, col_indices: Any, bias: Any, weight_shape: Any, block_shape: Any,
    stride: Any, padding: Any, dilation: Any, epilogue: str,
) -> Any:  # fmt: skip
    from slimkernels.kernels import reference

    arguments = (crow_indices, col_indices, None if bias is None else bias.float(), [], weight_shape, block_shape)
    return reference.bsr_conv2d(
        x.float(), values.float(), *arguments, stride, padding, dilation, epilogue
    ).to(x.dtype)  # fmt: skip


# What is done to modules when they are imported.
AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    "slimkernels._extension": of_extension,
    "slimkernels.kernels.cuda_chain": of_chain,
    **dict.fromkeys(EMPTY, of_zeros),
    "slimkernels.kernels.cuda_tensor_cores": of_tensor_cores,
}
