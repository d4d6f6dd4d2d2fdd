"""How many floating-point operations the ops perform, for `torch.utils.flop_counter.FlopCounterMode`.

The counts follow torch's own rules, so that a converted model compares with a dense one: a multiplication and an
addition each count once, taps outside of the image and the bias are not told apart, epilogues cost nothing. Of a sparse
weight the stored blocks count, of a low-rank weight its factors: what is computed, not what it stands for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from slimkernels.kernels.problems import conv_output_size, factor_geometry
from slimkernels.ops.library import OPS

Shape = Sequence[int]


def _positions(x: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> int:
    """Output pixels of a convolution, over all images of ``x`` (N, C, H, W) and before any pooling."""
    sizes = (conv_output_size(x[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return x[0] * math.prod(sizes)


def _bsr_conv2d(
    x: Shape, values: Shape, crow: Shape, col: Shape, bias: Shape | None, packed: Any, weight_shape: Shape,
    block_shape: Shape, stride: Shape, padding: Shape, dilation: Shape, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * _positions(x, weight_shape[2:], stride, padding, dilation) * math.prod(values)


def _bsr_conv2d_backward(
    grad: Shape, x: Shape, values: Shape, crow: Shape, col: Shape, bias: Shape | None, y: Shape | None,
    transposed: Shape | None, weight_shape: Shape, block_shape: Shape, stride: Shape, padding: Shape, dilation: Shape,
    epilogue: str, kernel: str, output_mask: Sequence[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    # The gradients of x and of the stored values take as many operations as the forward.
    once = 2 * _positions(x, weight_shape[2:], stride, padding, dilation) * math.prod(values)
    return once * (int(output_mask[0]) + int(output_mask[1]))


def _bsr_linear(x: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(values)


def _low_rank_linear(x: Shape, U: Shape, V: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(U) + math.prod(V))


def _low_rank_conv2d(
    x: Shape, factors: Sequence[Shape], bias: Shape | None, packed: Any, stride: Shape, padding: Shape, dilation: Shape,
    kind: str, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    total, (n, _, h, w) = 0, x
    pairs: Any = [tuple(pair) for pair in (stride, padding, dilation)]
    for shape, geometry in zip(factors, factor_geometry(kind, len(factors), *pairs)):
        total += 2 * _positions((n, shape[1], h, w), shape[2:], *geometry) * math.prod(shape)
        h, w = (conv_output_size(size, shape[2 + i], *(g[i] for g in geometry)) for i, size in enumerate((h, w)))
    return total


def _fused_conv2d(
    x: Shape, weight: Shape, bias: Shape | None, stride: Shape, padding: Shape, dilation: Shape, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * _positions(x, weight[2:], stride, padding, dilation) * math.prod(weight)


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0  # as torch counts a batch norm


FORMULAS: dict[str, Callable[..., int]] = {
    "bsr_conv2d": _bsr_conv2d,
    "bsr_conv2d_backward": _bsr_conv2d_backward,
    "bsr_linear": _bsr_linear,
    "low_rank_linear": _low_rank_linear,
    "low_rank_linear_dgrad": _low_rank_linear,
    "low_rank_conv2d": _low_rank_conv2d,
    "fused_conv2d": _fused_conv2d,
    "batch_norm_forward": _nothing,
    "batch_norm_backward": _nothing,
}


def register_flop_formulas() -> None:
    """Makes the formulas known to `torch.utils.flop_counter`, once it is imported: it takes Triton with it."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


_COUNTER = "torch.utils.flop_counter"


def _register(counter: Any) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(OPS, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when torch's module of FLOP counts has been imported, and is gone then."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """torch's own spec of that module, with the registration behind its execution; None for every other one."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        # For mypy: the loader is this spec's own, made for one import.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
